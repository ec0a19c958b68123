"""Pictures: from an encoded file, a PIL image or an array to the array that a model sees, one by one and by source.

A picture is encoded bytes, the path of an image file, a PIL image, a numpy array or anything with ``detach`` (a torch
tensor). Arrays are uint8 in 0..255, or floats whose range the caller states; axes are channel, height, width or
height, width, channel. Files and PIL images become colour (or one channel, by setting); arrays keep their one or three
channels, because they are what some model is already fed with.

Everything that alters values is named in a list of conversions. What cannot be used raises a DataError that gives the
reason only, until ``read_pictures`` collects the reasons by id.
"""

import hashlib
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Float32, Shaped
from numpy import ndarray
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm

from whence.config import DataSettings
from whence.errors import ConfigError, DataError

ValueRange = tuple[int | float, int | float]  # int by name, for type checks at run time

RANGE_TOLERANCE = 1e-3  # half precision rounds values near 1 by at most 5e-4
PICTURE_PIXELS = 256  # longer side of a picture on a page
HELD_BYTES = 1 << 30  # decoded images of one source in memory
PROGRESS_FROM = 2000  # images; fewer are read in seconds

# NOTE: a whitelist, because Pillow tries every format it knows whatever the suffix says, and runs a program for some.
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
_ORIENTATION = 0x0112  # EXIF tag; 1 is upright
_PILLOW_LIMIT = threading.RLock()

_SETTING_TYPES = (
    ("resolution", Integral | None, "a whole number of pixels or None"),
    ("center_crop", bool, "True or False"),
    ("grey", bool, "True or False"),
    ("max_megapixels", Real, "a number"),
)


@dataclass(frozen=True, eq=False)
class Pictures:
    """The pictures of one source, by position, and what was found when each was first decoded."""

    given: Any
    """Gives a picture by ``[position]``; may read it from disk each time. None: there is nothing but ``held``."""
    settings: DataSettings
    value_range: ValueRange | None
    shape: tuple[int, ...]
    """Channel, height, width of every decoded image."""
    held: Shaped[ndarray, "row channel height width"] | None
    """The decoded images, uint8 or float32, if they fit."""
    hashes: Sequence[str]
    changes: Sequence[Sequence[str]]

    def pixels(self, k: int) -> Float32[ndarray, "channel height width"]:
        """Give the image at position ``k`` as the model sees it, decoded again if it is not held."""
        if self.held is not None:
            return _to_float(self.held[k])
        with _reasons():
            array, _ = decode(self.given[k], self.settings, self.value_range)
        if hash_pixels(array) != self.hashes[k]:
            raise DataError("its pixels are not those of the first reading")
        return _to_float(array)

    def encoded(self, k: int) -> bytes | Path | None:
        """Give what is encoded at position ``k``, or the path of its file; None for PIL images and arrays."""
        with _reasons():
            given = None if self.given is None else self.given[k]
        return given if isinstance(given, bytes | Path) else None

    def picture(self, k: int) -> bytes:
        """Give the image at position ``k`` as it came, as a small PNG file."""
        with _reasons():
            if self.given is None:
                return _encode_png(_show_array(self.pixels(k)))
            given = self.given[k]
            if _is_array(given):
                return _encode_png(_show_array(_read_array(given, self.value_range)))
            return _encode_png(_read_image(given, self.settings.max_megapixels, []))


def hold_floats(array: Float[ndarray, "row channel height width"], ids: Sequence[str], source: str) -> Pictures:
    """Wrap images that are already as a model sees them, in a copy; refuse all bad ones together."""
    bad: dict[str, str] = {}
    for id_, image in zip(ids, array, strict=True):
        try:
            _check_range(image, -1, 1)
        except DataError as error:
            bad[id_] = str(error)
    _raise_bad(bad, len(ids), source)
    held = np.array(array, dtype=np.float32, order="C")
    hashes = [hash_pixels(image) for image in held]
    return Pictures(None, DataSettings(), None, held.shape[1:], held, hashes, [()] * len(held))


def read_pictures(
    given: Any, ids: Sequence[str], settings: DataSettings, source: str, value_range: ValueRange | None = None
) -> Pictures:
    """Decode every picture of a source once; refuse all bad ones together, and images that are not alike."""
    hashes: list[str] = []
    changes: list[Sequence[str]] = []
    bad: dict[str, str] = {}
    kinds: dict[tuple[tuple[int, ...], str], str] = {}
    held: ndarray | None = None
    hide = None if len(ids) > PROGRESS_FROM else True  # None: hide where stderr is not a terminal
    for k in tqdm(range(len(ids)), desc=f"reading {source}", unit="image", disable=hide):
        try:
            with _reasons():
                array, found = decode(given[k], settings, value_range)
        except DataError as error:
            bad[ids[k]] = str(error)
            continue
        if not kinds and array.nbytes * len(ids) <= HELD_BYTES:
            held = np.empty((len(ids), *array.shape), array.dtype)
        kinds.setdefault((array.shape, str(array.dtype)), ids[k])
        if len(kinds) == 1:
            hashes.append(hash_pixels(array))
            changes.append(tuple(found))
            if held is not None:
                held[k] = array
    _raise_bad(bad, len(ids), source)
    if not ids:
        raise DataError(f"{source} holds no images. Give a source with at least one.")
    if len(kinds) > 1:
        raise DataError(_describe_kinds(kinds, settings, source))
    return Pictures(given, settings, value_range, next(iter(kinds))[0], held, hashes, changes)


def _raise_bad(bad: dict[str, str], num_images: int, source: str) -> None:
    """Refuse a source with pictures that cannot be used, if there are any: the reason by id."""
    if bad:
        reasons = "".join(f"\n  {id_}: {reason}" for id_, reason in list(bad.items())[:5])
        more = f"\n  and {len(bad) - 5} more" if len(bad) > 5 else ""
        raise DataError(
            f"{len(bad)} of {num_images} images of {source} cannot be used:{reasons}{more}\n"
            "Repair them or take them out of the source; nothing is left out silently."
        )


def _describe_kinds(kinds: dict[tuple[tuple[int, ...], str], str], settings: DataSettings, source: str) -> str:
    sizes = {shape[1:] for shape, _ in kinds}
    examples = "; ".join(
        f"{id_} has {width} x {height} pixels, {channels} channels, {dtype}"
        for ((channels, height, width), dtype), id_ in list(kinds.items())[:2]
    )
    todo = "Make them alike in the data set."
    if len(sizes) > 1 and settings.resolution is None:
        todo = "Resize them all with the setting resolution (--resolution)."
    return (
        f"All images must have one size, type and number of channels; {source} has {len(kinds)} kinds in {len(sizes)} "
        f"sizes (width x height): {examples}. {todo}"
    )


@contextmanager
def _reasons() -> Iterator[None]:
    """Turn any error into a DataError: codecs and users' data sets raise whatever they like."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}") from error


def check_settings(settings: DataSettings) -> None:
    """Refuse settings by which no picture can be decoded; warn where one has no effect."""
    faults = [
        f"{name} must be {what}; got {value!r}"
        for name, kind, what in _SETTING_TYPES
        if not isinstance(value := getattr(settings, name), kind) or (isinstance(value, bool) and kind is not bool)
    ]
    if faults:
        raise ConfigError("; ".join(faults) + ".")
    if settings.resolution is not None and settings.resolution < 1:
        raise ConfigError(f"resolution must be at least 1 pixel; got {settings.resolution}.")
    if settings.center_crop and settings.resolution is None:
        warnings.warn("center_crop has no effect without a resolution.", stacklevel=3)


def decode(
    picture: Any, settings: DataSettings, value_range: ValueRange | None = None
) -> tuple[Shaped[ndarray, "channel height width"], list[str]]:
    """Bring a picture to the form of the settings: uint8, or float32 in [-1, 1] where it was given in floats.

    Also returns the conversions, each named once.
    """
    changes: list[str] = []
    if _is_array(picture):
        array = _read_array(picture, value_range)
        if array.dtype != np.uint8:
            return _fit_floats(array, settings, changes), changes
        image = _show_array(array)
    else:
        image = _read_image(picture, settings.max_megapixels, changes)
    image = _as_grey_or_rgb(image, changes)
    if settings.grey and image.mode == "RGB":
        changes.append("colour converted to grey")
        image = image.convert("L")
    elif image.mode == "L" and not settings.grey and not _is_array(picture):
        changes.append("grey repeated in three channels")
        image = image.convert("RGB")
    pixels = np.asarray(_fit(image, settings, changes))
    return np.ascontiguousarray(pixels[None] if pixels.ndim == 2 else np.moveaxis(pixels, -1, 0)), changes


def _is_array(picture: Any) -> bool:
    """Tell arrays and tensors from encoded and PIL images."""
    return isinstance(picture, ndarray) or hasattr(picture, "detach")


def _to_float(pixels: Shaped[ndarray, "*shape"]) -> Float32[ndarray, "*shape"]:
    """Map uint8 in 0..255 to float32 in [-1, 1]; return floats as they are."""
    return pixels.astype(np.float32) / np.float32(127.5) - np.float32(1) if pixels.dtype == np.uint8 else pixels


def hash_pixels(pixels: Shaped[ndarray, "channel height width"]) -> str:
    """Hash an image as the model sees it, so that the same values in uint8 and in floats have one hash."""
    values = np.ascontiguousarray(_to_float(pixels), dtype="<f4")
    return hashlib.sha256(repr(values.shape).encode() + values.tobytes()).hexdigest()


def _show_array(array: Shaped[ndarray, "channel height width"]) -> Image.Image:
    if array.dtype != np.uint8:
        array = np.rint((np.clip(array, -1, 1) + 1) * 127.5).astype(np.uint8)
    return Image.fromarray(array[0] if len(array) == 1 else np.moveaxis(array, 0, -1))


def _encode_png(image: Image.Image) -> bytes:
    """Convert to colour, make it not larger than a page wants it, and encode."""
    image = _as_grey_or_rgb(image, []).convert("RGB")
    image.thumbnail((PICTURE_PIXELS, PICTURE_PIXELS), Image.Resampling.LANCZOS)
    image.info.clear()  # no comments, profiles or positions of the camera on pages
    stream = BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


@contextmanager
def _without_pillow_limit() -> Iterator[None]:
    """Lift Pillow's own size limit, which warns or raises by a global number, while ours has been or is checked."""
    with _PILLOW_LIMIT:
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def _read_image(picture: Any, max_megapixels: float, changes: list[str]) -> Image.Image:
    """Decode the first frame of a file or PIL image and turn it upright; any mode."""
    if isinstance(picture, Path):
        picture = picture.read_bytes()
    if not isinstance(picture, bytes | Image.Image):
        raise DataError(f"a value of type {type(picture).__name__} where an image was expected")
    with _without_pillow_limit():
        image = _open_file(picture) if isinstance(picture, bytes) else picture
        width, height = image.size
        if width * height > max_megapixels * 1e6:
            raise DataError(
                f"{width} x {height} pixels, {width * height / 1e6:.4g} megapixels, where max_megapixels is "
                f"{max_megapixels:g}"
            )
        if width * height == 0:
            raise DataError(f"{width} x {height} pixels, an image without content")
        # An MPO file is a JPEG with previews behind it (cameras write them), not an animation.
        if getattr(image, "is_animated", False) and image.format != "MPO":
            changes.append("first frame of an animation")
        # Pillow drops the low byte of 16 bit colour while it decodes; only the raw mode tells.
        if not image.mode.startswith("I") and ";16" in str([tile[3] for tile in getattr(image, "tile", [])]):
            changes.append("16 bit scaled to 8 bit")
        # TIFF files are turned by load() itself, so the tag is read first.
        if image.getexif().get(_ORIENTATION, 1) in range(2, 9):
            changes.append("rotated by its EXIF orientation")
        image.load()
        return ImageOps.exif_transpose(image)


def _open_file(encoded: bytes) -> Image.Image:
    try:
        return Image.open(BytesIO(encoded), formats=_FORMATS)
    except UnidentifiedImageError:
        raise DataError(f"{len(encoded)} bytes that are no image in PNG, JPEG, WebP, BMP, GIF or TIFF") from None


def _as_grey_or_rgb(image: Image.Image, changes: list[str]) -> Image.Image:
    """Convert any mode to L or RGB of 8 bits."""
    if image.mode == "F":
        raise DataError("32 bit floats of unknown range; save the image with 8 or 16 bits")
    if image.mode == "I" or image.mode.startswith("I;16"):
        return _scale_16_bit(image, changes)
    if image.has_transparency_data:
        is_grey = image.mode in ("1", "L", "LA", "La")
        image = image.convert("RGBA")
        if image.getchannel("A").getextrema() != (255, 255):
            changes.append("alpha laid over white")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB").convert("L" if is_grey else "RGB")
    if image.mode in ("1", "L"):
        return image.convert("L")
    if image.mode not in ("RGB", "P"):
        changes.append(f"{image.mode} converted to RGB")
    return image.convert("RGB")


def _scale_16_bit(image: Image.Image, changes: list[str]) -> Image.Image:
    """Map 0..65535 to 0..255, to the nearest."""
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise DataError(f"32 bit values from {values.min()} to {values.max()}, outside the 0..65535 of 16 bit images")
    changes.append("16 bit scaled to 8 bit")
    transparent = values == image.info.get("transparency", -1)
    if transparent.any():
        changes.append("alpha laid over white")
    return Image.fromarray(np.where(transparent, 255, (values + 128) // 257).astype(np.uint8))


def _fit(image: Image.Image, settings: DataSettings, changes: list[str]) -> Image.Image:
    """Bring an image of any mode to the resolution of the settings, if they have one."""
    side = settings.resolution
    if side is None or image.size == (side, side):
        return image
    size = (side, side)
    if settings.center_crop:
        shorter = min(image.size)
        size = (round(image.width * side / shorter), round(image.height * side / shorter))
    if image.size != size:
        changes.append("resized")
        image = image.resize(size, Image.Resampling.LANCZOS)
    if size == (side, side):
        return image
    changes.append("cut to the middle square")
    left, top = (size[0] - side) // 2, (size[1] - side) // 2
    return image.crop((left, top, left + side, top + side))


def _fit_floats(
    array: Float32[ndarray, "channel height width"], settings: DataSettings, changes: list[str]
) -> Float32[ndarray, "channel2 height2 width2"]:
    """Do for floats what ``decode`` does for 8 bits, without rounding to 8 bits on the way."""
    if settings.grey and len(array) == 3:
        changes.append("colour converted to grey")
        weights = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R 601, as Pillow has it
        array = np.tensordot(weights, array, axes=1)[None]
    fitted = [np.asarray(_fit(Image.fromarray(channel), settings, found := [])) for channel in array]
    changes += found
    # The filter overshoots at edges; 8 bit images are clipped by their type.
    return np.clip(fitted, -1, 1) if "resized" in found else np.stack(fitted)


def _read_array(picture: Any, value_range: ValueRange | None) -> Shaped[ndarray, "channel height width"]:
    """Check an array or tensor and bring it to channel, height, width: uint8, or float32 in [-1, 1]."""
    is_tensor = not isinstance(picture, ndarray)
    if is_tensor:
        picture = picture.detach().cpu()
        picture = (picture.float() if picture.is_floating_point() else picture).numpy()  # numpy has no bfloat16
    array = _channel_first(picture, channel_first_if_unclear=is_tensor)
    if array.dtype == np.uint8:
        return array
    if array.dtype.kind != "f":
        raise DataError(f"an array of {array.dtype}; an image is uint8 in 0..255 or floats")
    if len(array) not in (1, 3):
        raise DataError(f"floats with {len(array)} channels; an image in floats has one or three")
    if value_range is None:
        raise DataError("floats, and their range is not known; say value_range=(0, 1) or value_range=(-1, 1)")
    _check_range(array, *value_range)
    scaled = array if value_range[0] == -1 else array * 2 - 1
    return scaled.astype(np.float32)


def _check_range(array: Shaped[ndarray, "*shape"], low: int | float, high: int | float) -> None:
    """Refuse values that are not finite or, beyond rounding, outside the range."""
    if not np.isfinite(array).all():
        raise DataError("NaN or infinite values")
    if array.min() < low - RANGE_TOLERANCE or array.max() > high + RANGE_TOLERANCE:
        raise DataError(f"values from {array.min():.4g} to {array.max():.4g}, outside [{low:g}, {high:g}]")


def _channel_first(array: ndarray, *, channel_first_if_unclear: bool) -> Shaped[ndarray, "channel height width"]:
    if array.ndim == 2 and array.size:
        return array[None]
    if array.ndim != 3 or array.size == 0:
        raise DataError(
            f"an array of shape {array.shape}; an image is channel, height, width or height, width, channel"
        )
    first, last = array.shape[0] in (1, 2, 3, 4), array.shape[2] in (1, 2, 3, 4)
    if not first and not last:
        raise DataError(f"an array of shape {array.shape}; neither its first nor its last axis has 1 to 4 channels")
    if first and last and not channel_first_if_unclear:
        raise DataError(f"an array of shape {array.shape}, whose first or last axis may be the channels; give a tensor")
    return array if first else np.moveaxis(array, -1, 0)
