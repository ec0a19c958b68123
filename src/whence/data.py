"""Images with stable ids, from files, tables, arrays or a data set in memory.

    ids           what a record, store or page calls a sample; unique, and the same at the next opening
    rows          positions 0..n-1 in one ImageData; never written to disk
    pixels        float32 in [-1, 1], axes row, channel, height, width: what a model is trained on
    fingerprint   one hash over all ids and pixels in order

Every image is decoded once at opening, so that all bad files are found before anything is trained, and nothing is
dropped or altered without being counted. Up to 1 GiB the decoded images stay in memory; beyond that they are decoded
again when asked for. What lies in a file or folder is found by ``_sources``, in a data set in memory by ``_datasets``,
in a file of float images by ``_float_images``; ``_columns`` knows names of columns, and ``_images`` decodes a picture.
None of them needs torch.
"""

import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any, SupportsIndex, final

import numpy as np
from jaxtyping import Bool, Float32
from numpy import ndarray

from whence._columns import abbreviate, as_text, checked_ids, warn_of_columns
from whence._datasets import Items, check_repeatable, count_items
from whence._float_images import read_float_images, write_float_images
from whence._images import Pictures, ValueRange, check_settings, hash_pixels, hold_floats, read_pictures
from whence._sources import find_images
from whence.config import DataSettings
from whence.encoded import Encoded
from whence.encoded import join as join_encoded
from whence.errors import DataError
from whence.trajectories import Trajectories
from whence.trajectories import join as join_trajectories

_AS_THEY_ARE = DataSettings()
_IF_JOINED_TWICE = (
    "The id of a single file is its name, in a folder its path from there: give the one folder that holds them all, "
    "rename one, or name an id_column of a table."
)


@final
@dataclass(frozen=True, eq=False)
class ImageData:
    """Images of one size, in a fixed order, with their ids.

    Made by ``open_images``, ``from_arrays`` and ``from_dataset``, not by hand.
    """

    ids: tuple[str, ...]
    """Stable and unique."""
    labels: tuple[str, ...] | None
    """One for each image; empty where an image has none."""
    captions: tuple[str, ...] | None
    """One for each image; empty where an image has none."""
    channels: int
    height: int
    width: int
    source: str
    """What the user gave."""
    _entries: tuple[tuple[Pictures, int], ...]
    """Where each image is: selecting and joining data sets copies no pixels."""
    trajectories: Trajectories | None = None
    """How a sampler came to these images, where that was kept."""
    encoding: Encoded | None = None
    """What the network sees of them, where that is not the pixels alone."""
    masks: Float32[ndarray, "row height width"] | None = None
    """Which part of each image counts, 0 to 1; None: all of it. See :mod:`whence.regions`."""

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over every id and what the model sees of it, in order; what a model is not shown does not count."""
        return fingerprint_of(self.ids, self.seen_hashes)

    @cached_property
    def hashes(self) -> tuple[str, ...]:
        """Hash of the pixels of each image, as the model sees them."""
        return tuple(source.hashes[k] for source, k in self._entries)

    @cached_property
    def seen_hashes(self) -> tuple[str, ...]:
        """Hash of all that counts of each image: pixels, what the model is told, and the region."""
        return tuple(map("".join, zip(self.hashes, self.told_hashes, strict=True)))

    @cached_property
    def told_hashes(self) -> tuple[str, ...]:
        """Hash of what counts of each image beside its pixels; empty where nothing does."""
        hashes = [] if self.encoding is None else [self.encoding.hashes]
        if self.masks is not None:
            hashes.append(tuple(hash_pixels(mask[None]) for mask in self.masks))
        return tuple(map("".join, zip(*hashes, strict=True))) if hashes else ("",) * len(self)

    @cached_property
    def conversions(self) -> dict[str, int]:
        """In how many images what was altered on the way from the source to ``pixels``."""
        counts = Counter(change for source, k in self._entries for change in source.changes[k])
        return dict(sorted(counts.items()))

    @cached_property
    def _row_of(self) -> dict[str, int]:
        return {id_: row for row, id_ in enumerate(self.ids)}

    def rows(self, ids: Iterable[str]) -> list[int]:
        """Look up the rows of some ids.

        Args:
            ids: Ids of images, in any order.

        Returns:
            One row for each id, in the order given.

        Raises:
            DataError: If an id is not among ``self.ids``.
        """
        ids = list(ids)
        unknown = [id_ for id_ in ids if id_ not in self._row_of]
        if unknown:
            raise DataError(
                f"{len(unknown)} of {len(ids)} ids are not in {self.source}: {abbreviate(unknown)}. Its {len(self)} "
                "ids are relative paths in a folder, the id column or row numbers of a table: "
                f"{abbreviate(self.ids, 3)}."
            )
        return [self._row_of[id_] for id_ in ids]

    def pixels(self, rows: Sequence[SupportsIndex] | ndarray) -> Float32[ndarray, "row channel height width"]:
        """Give images as a model sees them; a DataError if one is not in its source as it was at opening.

        Args:
            rows: Positions in 0..len-1, in any order.

        Returns:
            float32 in [-1, 1]; a copy.
        """
        rows = self._checked(rows)
        out = np.empty((len(rows), self.channels, self.height, self.width), np.float32)
        # A parquet file is read forward only, so images are read in the order of their source.
        for place in sorted(range(len(rows)), key=lambda place: self._entries[rows[place]][1]):
            out[place] = self._read(rows[place], Pictures.pixels)
        return out

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of what is noised: latents, or else pixels."""
        if self.encoding is None or self.encoding.latents is None:
            return self.channels, self.height, self.width
        channels, height, width = self.encoding.latents.mean.shape[1:]
        return channels, height, width

    def inputs(self, rows: Sequence[SupportsIndex] | ndarray) -> Float32[ndarray, "row channel height width"]:
        """Give what is noised: latents (the posterior's mean), or else pixels.

        Args:
            rows: Positions in 0..len-1, in any order.

        Returns:
            float32; a copy.
        """
        if self.encoding is None or self.encoding.latents is None:
            return self.pixels(rows)
        return self.encoding.clean(np.array(self._checked(rows), dtype=np.int64))[0]

    def conditions(
        self, rows: Sequence[SupportsIndex] | ndarray, dropped: Bool[ndarray, " row"] | None = None
    ) -> dict[str, ndarray]:
        """Give what a conditional network is told of images, by the names of its arguments.

        Args:
            rows: Positions in 0..len-1, in any order.
            dropped: Where the condition is withheld.

        Returns:
            Arrays with one row for each of ``rows``; none for an unconditional network.
        """
        if self.encoding is None or self.encoding.conditions is None:
            return {}
        return self.encoding.conditions.take(np.array(self._checked(rows), dtype=np.int64), dropped)

    def region(self, rows: Sequence[SupportsIndex] | ndarray) -> Float32[ndarray, "row height width"] | None:
        """Give which part of what is noised counts, as a mean over the pixels of each latent; None: all of it.

        Args:
            rows: Positions in 0..len-1, in any order.

        Returns:
            Weights from 0 to 1 with the height and width of :attr:`input_shape`.

        Raises:
            DataError: If the latents do not divide the pixels evenly.
        """
        if self.masks is None:
            return None
        masks, (_, height, width) = self.masks[self._checked(rows)], self.input_shape
        if masks.shape[1:] == (height, width):
            return masks.copy()
        if masks.shape[1] % height or masks.shape[2] % width:
            raise DataError(
                f"A mask of {masks.shape[1]} x {masks.shape[2]} pixels cannot be brought to latents of {height} x "
                f"{width}. Give --resolution, a multiple of what the VAE shrinks to one."
            )
        steps = len(masks), height, masks.shape[1] // height, width, masks.shape[2] // width
        return masks.reshape(steps).mean(axis=(2, 4))

    def picture(self, row: SupportsIndex) -> bytes:
        """Give an image for people to look at, as it came but in RGB; a DataError if its source has gone.

        Args:
            row: Position in 0..len-1.

        Returns:
            A PNG file of at most 256 pixels on its longer side.
        """
        return self._read(self._checked([row])[0], Pictures.picture)

    def encoded(self, row: SupportsIndex) -> bytes | Path | None:
        """Give an image as it lies in its source; a DataError if its source has gone.

        Args:
            row: Position in 0..len-1.

        Returns:
            The encoded bytes, or the path of its file; None where it is not encoded: arrays and PIL images.
        """
        return self._read(self._checked([row])[0], Pictures.encoded)

    def select(self, rows: Sequence[SupportsIndex] | ndarray) -> "ImageData":
        """Make a data set of some images in the order given.

        Args:
            rows: Positions in 0..len-1, at least one, each at most once.

        Returns:
            A data set that shares the pixels of this one.

        Raises:
            DataError: If there are no rows, or one is given twice or is not in 0..len-1.
        """
        rows = self._checked(rows)
        if not rows:
            raise DataError(f"A selection from {self.source} must have at least one row; found none. Give some rows.")

        def take(values: Any) -> Any:
            return None if values is None else tuple(values[row] for row in rows)

        return replace(
            self,
            ids=checked_ids(take(self.ids), self.source, "Give each row once."),
            labels=take(self.labels),
            captions=take(self.captions),
            _entries=take(self._entries),
            trajectories=self.trajectories and self.trajectories.select(rows),
            encoding=self.encoding and self.encoding.select(rows),
            masks=None if self.masks is None else self.masks[rows],
        )

    def _checked(self, rows: Sequence[SupportsIndex] | ndarray) -> list[int]:
        array = np.asarray(rows)
        # A mask would pass for the rows 0 and 1, and negative rows would count from the end.
        if array.size and (
            array.ndim != 1 or array.dtype.kind not in "iu" or array.min() < 0 or array.max() >= len(self)
        ):
            raise DataError(
                f"rows must be a list of whole numbers in 0..{len(self) - 1}; got {array.dtype} of shape {array.shape} "
                f"with {array.min()} to {array.max()}."
            )
        return array.tolist()

    def _read(self, row: int, what: Callable[[Pictures, int], Any]) -> Any:
        try:
            return what(*self._entries[row])
        except DataError as error:
            raise DataError(
                f"Image {self.ids[row]} of {self.source} cannot be read as it was when the source was opened: {error}. "
                "Restore the source, or open it anew."
            ) from error

    @classmethod
    def from_arrays(
        cls,
        pixels: ndarray,
        ids: Iterable[Any],
        labels: Iterable[Any] | None = None,
        captions: Iterable[Any] | None = None,
        source: str = "memory",
    ) -> "ImageData":
        """Take images that are already as a model sees them, and keep their values exactly.

        Args:
            pixels: Floats in [-1, 1], axes row, channel, height, width with one or three channels; copied as float32.
            ids: One for each image: a string or a whole number, unique.
            labels: One for each image, if there are any.
            captions: One for each image, if there are any.
            source: What to call the data set in messages.

        Returns:
            The data set.

        Raises:
            DataError: If shape, type or values of the pixels, or the ids, are not as above.
        """
        array = np.asarray(pixels)
        if array.ndim != 4 or array.shape[1] not in (1, 3) or 0 in array.shape:
            raise DataError(
                f"{source} has pixels of shape {array.shape}; they must be row, channel, height, width with one or "
                "three channels and at least one row."
            )
        if array.dtype.kind != "f":
            raise DataError(
                f"{source} has pixels of {array.dtype}; they must be floats in [-1, 1]. Divide 0..255 by 127.5 and "
                "subtract 1, or use ImageData.from_dataset."
            )
        ids = checked_ids(ids, source)
        _check_count("ids", ids, len(array), source)
        return _make(hold_floats(array, ids, source), ids, labels, captions, source)

    @classmethod
    def from_dataset(
        cls,
        dataset: Any,
        *,
        settings: DataSettings = _AS_THEY_ARE,
        value_range: ValueRange | None = None,
        ids: Iterable[Any] | None = None,
    ) -> "ImageData":
        """Read a map-style data set: anything with ``len`` and ``[]``, such as those of torch and Hugging Face.

        An item is a PIL image, an array or tensor, a tuple of one of these and a label, or a dict with such an image
        under ``settings.image_column`` (else image, images, img, pixel_values or input) and perhaps id, label and
        caption. PIL images become RGB; arrays and tensors keep their one or three channels.

        Args:
            dataset: The data set, without random transforms.
            settings: Sizes and names of keys.
            value_range: (0, 1) or (-1, 1): what the values of float items mean. Not needed for other items.
            ids: One for each item; else the items' own, else row-0000000, row-0000001 and so on.

        Returns:
            The images as they are at this moment, float values kept exactly where they are not resized.

        Raises:
            DataError: If an item holds no usable image, two readings of an item differ, or ids are not unique.
        """
        source = type(dataset).__name__
        if value_range is not None and tuple(value_range) not in ((0, 1), (-1, 1)):
            raise DataError(f"value_range must be (0, 1) or (-1, 1); got {value_range}. Scale the items before.")
        num_items = count_items(dataset, source)
        check_settings(settings)
        items = Items(dataset, num_items, settings, source)
        # The list of the items' own ids fills up while they are read.
        names = items.ids if ids is None else checked_ids(ids, source)
        _check_count("ids", names, num_items, source)
        pictures = read_pictures(items, names, settings, source, value_range)
        dtype = check_repeatable(items, pictures, source)
        if value_range is not None and dtype == np.uint8:
            warnings.warn(f"value_range={value_range} has no effect: {source} holds no floats.", stacklevel=2)
        labels = items.labels if any(items.labels) else None
        captions = items.captions if any(items.captions) else None
        return _make(pictures, names, labels, captions, source)


def open_images(source: str | Path, settings: DataSettings = _AS_THEY_ARE) -> ImageData:
    """Open images from a file or folder and decode each of them once.

    - A folder of images, with subfolders. The id is the path relative to the folder, the label the name of the
      subfolder. Columns come from files metadata.jsonl with a file_name, as in Hugging Face imagefolder.
    - One image; its id is the file name.
    - A .parquet file, or a folder of such files, with a column of images.
    - A folder written by ``save_to_disk`` of Hugging Face ``datasets``.
    - A .safetensors file written by ``save_arrays``; its values are kept exactly, and so are trajectories in it.
    - "demo", "demo-queries", "demo-styles" and "demo-styles-queries": images that come with whence.

    Of several splits the one named train is taken. A table without an id column has the ids row-0000000 and so on.

    Args:
        source: Path of the file or folder, or the name of demo data.
        settings: Sizes, columns and limits.

    Returns:
        The images, sorted by path in a folder, in the order of the table otherwise.

    Raises:
        DataError: If the source is not one of the above, is empty, or has images that cannot be used.
    """
    check_settings(settings)
    path, name = Path(source), str(source)
    if path.suffix.lower() == ".safetensors" and path.is_file():
        return _open_arrays(path, settings, name)
    found = find_images(source, settings)
    ids = checked_ids(found.ids, name)
    return _make(read_pictures(found.pictures, ids, settings, name), ids, found.labels, found.captions, name)


def fingerprint_of(ids: Iterable[str], hashes: Iterable[str]) -> str:
    """Hash ids and the hashes of their pixels in order, as :attr:`ImageData.fingerprint` does.

    Args:
        ids: Of the images.
        hashes: Of their pixels, one for each id.

    Returns:
        64 hex digits.
    """
    lines = (f"{id_}\n{hash_}\n" for id_, hash_ in zip(ids, hashes, strict=True))
    return sha256("".join(lines).encode()).hexdigest()


def concatenate(parts: Sequence[ImageData]) -> ImageData:
    """Join data sets one after the other.

    Args:
        parts: Data sets of one size and number of channels, without a common id.

    Returns:
        A data set that shares the pixels of its parts.

    Raises:
        DataError: If there are no parts, their sizes differ, or an id is in two of them.
    """
    sizes = {(part.channels, part.height, part.width): part.source for part in parts}
    if len(sizes) != 1:
        found = "; ".join(f"{c} x {h} x {w} in {source}" for (c, h, w), source in sizes.items()) or "nothing to join"
        raise DataError(
            f"Data sets can be joined if channels, height and width are the same; found {found}. Open them with one "
            "resolution."
        )

    def join(name: str) -> tuple[str, ...] | None:
        columns = [getattr(part, name) for part in parts]
        if all(column is None for column in columns):
            return None
        return tuple(text for part, column in zip(parts, columns, strict=True) for text in column or [""] * len(part))

    def join_masks() -> ndarray | None:
        if all(part.masks is None for part in parts):
            return None
        whole = [np.ones((len(part), part.height, part.width), np.float32) for part in parts]
        return np.concatenate([w if p.masks is None else p.masks for p, w in zip(parts, whole, strict=True)])

    source = " + ".join(part.source for part in parts)
    return replace(
        parts[0],
        ids=checked_ids([id_ for part in parts for id_ in part.ids], source, _IF_JOINED_TWICE),
        labels=join("labels"),
        captions=join("captions"),
        source=source,
        _entries=tuple(entry for part in parts for entry in part._entries),
        trajectories=join_trajectories([part.trajectories for part in parts]),
        encoding=join_encoded([part.encoding for part in parts]),
        masks=join_masks(),
    )


def save_arrays(
    path: str | Path,
    pixels: ndarray,
    ids: Iterable[Any],
    labels: Iterable[Any] | None = None,
    trajectories: Trajectories | None = None,
    captions: Iterable[Any] | None = None,
) -> None:
    """Write float images so that ``open_images`` gives the same values; the same images make the same bytes.

    Args:
        path: File to write, with the suffix .safetensors.
        pixels: As in ``ImageData.from_arrays``.
        ids: As in ``ImageData.from_arrays``.
        labels: As in ``ImageData.from_arrays``.
        trajectories: How a sampler came to the images.
        captions: As in ``ImageData.from_arrays``.

    Raises:
        DataError: If the suffix is another one, or pixels or ids cannot be used.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise DataError(f"{path} must end in .safetensors, by which open_images knows the format.")
    data = ImageData.from_arrays(pixels, ids, labels, captions, source=str(path))
    if trajectories is not None:
        _check_frames(trajectories, data)
    write_float_images(path, data.pixels(range(len(data))), data.ids, data.labels, data.captions, trajectories)


def _open_arrays(path: Path, settings: DataSettings, source: str) -> ImageData:
    found = read_float_images(path, source)
    data = ImageData.from_arrays(found.pixels, found.ids, found.labels, found.captions, source=source)
    side = settings.resolution
    if side not in (None, data.height) or side not in (None, data.width) or (settings.grey and data.channels == 3):
        raise DataError(
            f"{source} holds float images of {data.channels} x {data.height} x {data.width}, which are kept exactly; "
            f"the settings ask for resolution {side} and grey {settings.grey}. Change the settings or the images."
        )
    warn_of_columns(settings, source)
    if found.frames is None or found.steps is None:
        return data
    try:
        steps = found.steps
        timesteps, about = tuple(steps["timesteps"]), tuple(steps["about"])
        trajectories = Trajectories(found.frames, timesteps, about, bool(steps.get("of_latents")))
        _check_frames(trajectories, data)
    except (DataError, KeyError, TypeError) as error:
        raise DataError(f"{source} has trajectories that cannot be used: {error}") from error
    return replace(data, trajectories=trajectories)


def _check_frames(trajectories: Trajectories, data: ImageData) -> None:
    rows, _, *size = trajectories.frames.shape
    if trajectories.of_latents:
        return  # their size is that of the network's latents, which is known where they are used
    want = [len(data), data.channels, data.height, data.width]
    if [rows, *size] != want:
        raise DataError(f"Frames must be of {want} (images, channels, height, width), found {[rows, *size]}.")


def _make(
    pictures: Pictures, ids: Iterable[Any], labels: Iterable[Any] | None, captions: Iterable[Any] | None, source: str
) -> ImageData:
    """Put ids, labels and captions beside their pictures; refuse what does not fit."""
    columns = {"labels": labels, "captions": captions}
    texts = {name: None if values is None else tuple(map(as_text, values)) for name, values in columns.items()}
    entries = tuple((pictures, k) for k in range(len(pictures.hashes)))
    for name, values in texts.items():
        if values is not None:
            _check_count(name, values, len(entries), source)
    channels, height, width = pictures.shape
    ids = checked_ids(ids, source)
    return ImageData(ids, texts["labels"], texts["captions"], channels, height, width, source, entries)


def _check_count(name: str, values: Sequence[str], num_images: int, source: str) -> None:
    if len(values) != num_images:
        raise DataError(f"{source} has {num_images} images and {len(values)} {name}; give one for each image.")
