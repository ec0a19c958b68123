"""Images with stable ids, from files, tables, arrays or a data set in memory.

    ids           what a record, store or page calls a sample; unique, and the same at the next opening
    rows          positions 0..n-1 in one ImageData; never written to disk
    pixels        float32 in [-1, 1], axes row, channel, height, width: what a model is trained on
    fingerprint   one hash over all ids and pixels in order

Every image is decoded once at opening, so that all bad files are found before anything is trained, and nothing is
dropped or altered without being counted. Up to 1 GiB the decoded images stay in memory; beyond that they are decoded
again when asked for. How one picture is decoded is in ``_images``; this module needs no torch.
"""

import json
import os
import re
import warnings
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from importlib import resources
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal, NamedTuple, SupportsIndex, final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float32
from numpy import ndarray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from whence._files import publish_file
from whence._images import Pictures, ValueRange, check_range, decode, hash_pixels, hold_floats, raise_bad, read_pictures
from whence.config import DataSettings
from whence.errors import ConfigError, DataError

FORMAT_VERSION = 1  # of files written by save_arrays
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")

_AS_THEY_ARE = DataSettings()
_REPEATED_READS = 8  # items of a data set read twice, to catch random transforms
_DEMO_FILES = {"demo": "train.parquet", "demo-queries": "queries.parquet"}
_METADATA = "metadata.jsonl"
_Kind = Literal["image", "id", "label", "caption"]
_NAMES: dict[_Kind, tuple[str, ...]] = {
    "image": ("image", "images", "img", "pixel_values", "input"),
    "id": ("id", "sample_id", "image_id"),
    "label": ("label", "class"),
    "caption": ("text", "caption", "prompt"),
}
_ACCEPTED = (
    f"Accepted are: a folder of images or one image ({' '.join(IMAGE_SUFFIXES)}); a .parquet file or a folder of them; "
    "a folder written by save_to_disk of Hugging Face datasets; a .safetensors file written by whence; or the words "
    f"{' and '.join(_DEMO_FILES)}."
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

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over every id and the pixels as the model sees them, in order; labels and captions do not count."""
        lines = (f"{id_}\n{source.hashes[k]}\n" for id_, (source, k) in zip(self.ids, self._entries, strict=True))
        return sha256("".join(lines).encode()).hexdigest()

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
                f"{len(unknown)} of {len(ids)} ids are not in {self.source}: {_some(unknown)}. Its {len(self)} ids are "
                f"relative paths in a folder, the id column or row numbers of a table: {_some(self.ids, 3)}."
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

    def picture(self, row: SupportsIndex) -> bytes:
        """Give an image for people to look at, as it came but in RGB; a DataError if its source has gone.

        Args:
            row: Position in 0..len-1.

        Returns:
            A PNG file of at most 256 pixels on its longer side.
        """
        return self._read(self._checked([row])[0], Pictures.picture)

    def select(self, rows: Sequence[SupportsIndex] | ndarray) -> "ImageData":
        """Make a data set of some images in the order given; a DataError if a row is given twice.

        Args:
            rows: Positions in 0..len-1, each at most once.

        Returns:
            A data set that shares the pixels of this one.
        """
        rows = self._checked(rows)
        return _join(
            (self.channels, self.height, self.width),
            [self._entries[row] for row in rows],
            [self.ids[row] for row in rows],
            None if self.labels is None else [self.labels[row] for row in rows],
            None if self.captions is None else [self.captions[row] for row in rows],
            self.source,
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
        ids = _checked_ids(ids, source)
        _check_count("ids", ids, len(array), source)
        bad = {}
        for id_, image in zip(ids, array, strict=True):
            try:
                check_range(image, -1, 1)
            except DataError as error:
                bad[id_] = str(error)
        raise_bad(bad, len(array), source)
        return _make(hold_floats(np.array(array, dtype=np.float32, order="C")), ids, labels, captions, source)

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
        try:
            num_items = len(dataset)
        except TypeError:
            raise DataError(
                f"{source} has no length. whence needs a map-style data set, with len() and [], so that it can come "
                "back to a sample; put the items of a stream into a list first."
            ) from None
        _check_settings(settings)
        items = _Items(dataset, num_items, settings, source)
        # The list of the items' own ids fills up while they are read.
        names = items.ids if ids is None else _checked_ids(ids, source)
        _check_count("ids", names, num_items, source)
        pictures = read_pictures(items, names, settings, source, value_range)
        for k in range(min(num_items, _REPEATED_READS)):
            if pictures.hashes[k] != hash_pixels(decode(items[k], settings, value_range)[0]):
                raise DataError(
                    f"Item {k} of {source} differs from one reading to the next. Scores belong to fixed images: take "
                    "random transforms out of the data set (flips are a setting of training)."
                )
        if value_range is not None and not items.has_floats:
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
    - A .safetensors file written by ``save_arrays``; its values are kept exactly.
    - "demo" and "demo-queries": images that come with whence.

    Of several splits the one named train is taken. A table without an id column has the ids row-0000000 and so on.

    Args:
        source: Path of the file or folder, or the name of demo data.
        settings: Sizes, columns and limits.

    Returns:
        The images, sorted by path in a folder, in the order of the table otherwise.

    Raises:
        DataError: If the source is not one of the above, is empty, or has images that cannot be used.
    """
    _check_settings(settings)
    if source not in _DEMO_FILES and not (str(source) and Path(source).exists()):
        raise DataError(f"{str(source)!r} does not exist. {_ACCEPTED}")
    found = _find_images(source, settings)
    if isinstance(found, ImageData):
        return found
    ids = _checked_ids(found.ids, str(source))
    pictures = read_pictures(found.pictures, ids, settings, str(source))
    return _make(pictures, ids, found.labels, found.captions, str(source))


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

    def join(name: str) -> list[str] | None:
        columns = [getattr(part, name) for part in parts]
        if all(column is None for column in columns):
            return None
        return [text for part, column in zip(parts, columns, strict=True) for text in column or [""] * len(part)]

    return _join(
        next(iter(sizes)),
        [entry for part in parts for entry in part._entries],
        [id_ for part in parts for id_ in part.ids],
        join("labels"),
        join("captions"),
        " + ".join(part.source for part in parts),
    )


def save_arrays(
    path: str | Path,
    pixels: ndarray,
    ids: Iterable[Any],
    labels: Iterable[Any] | None = None,
) -> None:
    """Write float images so that ``open_images`` gives the same values; the same images make the same bytes.

    Args:
        path: File to write, with the suffix .safetensors.
        pixels: As in ``ImageData.from_arrays``.
        ids: As in ``ImageData.from_arrays``.
        labels: As in ``ImageData.from_arrays``.

    Raises:
        DataError: If the suffix is another one, or pixels or ids cannot be used.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise DataError(f"{path} must end in .safetensors, by which open_images knows the format.")
    data = ImageData.from_arrays(pixels, ids, labels, source=str(path))
    # One entry, because the order of several differs from one writing to the next.
    text = json.dumps({"format_version": FORMAT_VERSION, "ids": data.ids, "labels": data.labels})
    with publish_file(path) as partial:
        save_file({"images": data.pixels(range(len(data)))}, partial, metadata={"whence": text})


class _Found(NamedTuple):
    """What a file or folder holds: ``pictures`` gives one by ``[row]``; the rest is not yet checked."""

    pictures: Any
    ids: Sequence[Any]
    labels: Sequence[str] | None
    captions: Sequence[str] | None


# ---- folders and files


def _find_images(source: str | Path, settings: DataSettings) -> _Found | ImageData:
    if source in _DEMO_FILES:
        demo = resources.files("whence") / "demo_data" / _DEMO_FILES[str(source)]
        return _open_parquet([Path(str(demo))], settings, str(source))
    path = Path(source)
    if path.is_dir():
        return _open_folder(path, settings, str(source))
    if path.suffix.lower() == ".parquet":
        return _open_parquet([path], settings, str(source))
    if path.suffix.lower() == ".safetensors":
        return _open_arrays(path, settings, str(source))
    if path.suffix.lower() in IMAGE_SUFFIXES:
        return _open_image_folder({path.name: path}, [], settings, str(source))
    raise DataError(f"{path} is a file of another kind. {_ACCEPTED}")


def _open_folder(folder: Path, settings: DataSettings, source: str) -> _Found:
    if (folder / "dataset_dict.json").is_file():
        with _table_errors(source):
            splits = json.loads((folder / "dataset_dict.json").read_text())["splits"]
        return _open_folder(folder / _choose_split(splits, source), settings, source)
    if (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file():
        return _open_saved(folder, settings, source)
    paths = {path.relative_to(folder).as_posix(): path for path in _walk(folder)}
    images = {id_: paths[id_] for id_ in sorted(paths) if paths[id_].suffix.lower() in IMAGE_SUFFIXES}
    tables = {id_: paths[id_] for id_ in sorted(paths) if paths[id_].suffix.lower() == ".parquet"}
    if images and tables:
        raise DataError(
            f"{source} holds {len(images)} images and {len(tables)} parquet files, and either may be meant. "
            "Give the file or the subfolder."
        )
    if tables:
        splits = {id_: _split_of(path, folder) for id_, path in tables.items()}
        split = _choose_split(sorted(set(splits.values())), source)
        return _open_parquet([path for id_, path in tables.items() if splits[id_] == split], settings, source)
    if not images:
        found = Counter(path.suffix or "no suffix" for path in paths.values())
        files = ", ".join(f"{count} of {suffix}" for suffix, count in found.most_common(5)) or "none"
        raise DataError(f"{source} holds no images; files found: {files}. {_ACCEPTED}")
    return _open_image_folder(images, [path for path in paths.values() if path.name == _METADATA], settings, source)


def _open_image_folder(images: dict[str, Path], metadata: list[Path], settings: DataSettings, source: str) -> _Found:
    ids: Sequence[Any] = list(images)
    labels = [path.parent.name if "/" in id_ else "" for id_, path in images.items()]
    captions = None
    if metadata:
        lines = _read_metadata(metadata, images, source)
        columns = dict.fromkeys((key for line in lines for key in line), True)
        if settings.id_column and (name := _find("id", settings, columns, source)):
            ids = [line.get(name) for line in lines]
        if name := _find("label", settings, columns, source):
            labels = [_text(line.get(name)) for line in lines]
        if name := _find("caption", settings, columns, source):
            captions = [_text(line.get(name)) for line in lines]
    else:
        _warn_of_columns(settings, source)
    return _Found(list(images.values()), ids, labels if any(labels) else None, captions)


def _walk(folder: Path) -> Iterator[Path]:
    """List files that are not hidden; follow links to folders, but none twice."""
    seen = set()
    for parent, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(parent)
        folders[:] = [] if real in seen else sorted(name for name in folders if not name.startswith("."))
        if real not in seen:
            yield from (Path(parent, name) for name in files if not name.startswith("."))
        seen.add(real)


def _read_metadata(metadata: list[Path], images: dict[str, Path], source: str) -> list[dict[str, Any]]:
    """Read what metadata.jsonl files say of each image; the nearest one counts."""
    lines: dict[str, dict[str, Any]] = {}
    for path in sorted(metadata, key=lambda path: len(path.parts)):
        # Not splitlines(), which also splits at separators that may stand inside a caption.
        for number, text in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
            if not text.strip():
                continue
            try:
                line = json.loads(text)
                lines[os.path.normpath(path.parent / line["file_name"])] = line
            except (ValueError, KeyError, TypeError):
                raise DataError(
                    f"Line {number} of {path} must be a JSON object with a file_name; found {text[:80]!r}."
                ) from None
    files = {os.path.normpath(path): id_ for id_, path in images.items()}
    absent = [path for path in lines if path not in files]
    unlisted = [files[path] for path in files if path not in lines]
    if absent or unlisted:
        raise DataError(
            f"Every image of {source} needs a line in {_METADATA}, and every line an image. {len(absent)} lines have "
            f"no image: {_some(absent)}; {len(unlisted)} images have no line: {_some(unlisted)}."
        )
    return [lines[path] for path in files]


def _open_arrays(path: Path, settings: DataSettings, source: str) -> ImageData:
    try:
        with safe_open(path, framework="numpy") as file:
            pixels, entry = file.get_tensor("images"), json.loads((file.metadata() or {})["whence"])
            version, ids, labels = entry["format_version"], entry["ids"], entry["labels"]
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{source} is no readable file of images ({type(error).__name__}: {error}). It must have a tensor images "
            "and metadata as written by whence.data.save_arrays; write it again with that."
        ) from error
    if version != FORMAT_VERSION:
        raise DataError(
            f"{source} has format version {version}; this version of whence reads {FORMAT_VERSION}. Open it with the "
            "version that wrote it."
        )
    data = ImageData.from_arrays(pixels, ids, labels, source=source)
    side = settings.resolution
    if side not in (None, data.height) or side not in (None, data.width) or (settings.grey and data.channels == 3):
        raise DataError(
            f"{source} holds float images of {data.channels} x {data.height} x {data.width}, which are kept exactly; "
            f"the settings ask for resolution {side} and grey {settings.grey}. Change the settings or the images."
        )
    _warn_of_columns(settings, source)
    return data


# ---- tables


def _open_saved(folder: Path, settings: DataSettings, source: str) -> _Found:
    """Read what ``Dataset.save_to_disk`` wrote: Arrow streams, here mapped rather than read."""
    with _table_errors(source):
        state = json.loads((folder / "state.json").read_text())
        if state.get("_indices_data_files"):
            raise DataError(f"{source} was saved with a mapping of rows. Save it again with a present-day datasets.")
        files = [pa.memory_map(str(folder / file["filename"])) for file in state["_data_files"]]
        table = pa.concat_tables([pa.ipc.open_stream(file).read_all() for file in files])
        return _open_table(table.schema, lambda name: table[name].to_pylist(), table.column, folder, settings, source)


def _open_parquet(paths: list[Path], settings: DataSettings, source: str) -> _Found:
    with _table_errors(source):
        files = [pq.ParquetFile(path, memory_map=True) for path in paths]
        schema = files[0].schema_arrow
        for path, file in zip(paths, files, strict=True):
            if not file.schema_arrow.equals(schema):
                raise DataError(
                    f"The parquet files of {source} must have the same columns; {path.name} differs from "
                    f"{paths[0].name}. Give one of them."
                )

        def read(name: str) -> list[Any]:
            return [value for file in files for value in file.read(columns=[name])[name].to_pylist()]

        return _open_table(schema, read, lambda name: _ParquetRows(paths, name), paths[0].parent, settings, source)


@contextmanager
def _table_errors(source: str) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError, ValueError, LookupError) as error:
        raise DataError(f"{source} is no readable table ({type(error).__name__}: {error}). Write it again.") from error


def _open_table(
    schema: pa.Schema,
    read: Callable[[str], list[Any]],
    images: Callable[[str], Any],
    folder: Path,
    settings: DataSettings,
    source: str,
) -> _Found:
    """Open a table, given how to read a small column at once and a column of images row by row."""
    features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    names = {kind: _find(kind, settings, _usable_columns(schema, kind), source) for kind in _NAMES}
    encoded = _Encoded(images(names["image"] or _only_image_column(schema, source)), folder)
    ids = read(names["id"]) if names["id"] else _row_ids(len(encoded))
    labels = captions = None
    if names["label"]:
        classes = features.get(names["label"], {}).get("names")
        labels = [_text(value, classes) for value in read(names["label"])]
    if names["caption"]:
        captions = [_text(value) for value in read(names["caption"])]
    return _Found(encoded, ids, labels, captions)


class _ParquetRows:
    """One column of parquet files by row, read forward in small batches: a row group may be larger than memory."""

    def __init__(self, paths: list[Path], column: str) -> None:
        self._paths, self._column = paths, column
        files = [pq.ParquetFile(path, memory_map=True) for path in paths]
        self._groups = [(file, group) for file in files for group in range(file.num_row_groups)]
        counts = [file.metadata.row_group(group).num_rows for file, group in self._groups]
        self._firsts = [0, *accumulate(counts)]
        self._group, self._start, self._batch, self._batches = -1, 0, (), iter(())

    def __len__(self) -> int:
        return self._firsts[-1]

    def __getitem__(self, row: int) -> Any:
        group = bisect_right(self._firsts, row) - 1
        if group != self._group or row < self._start:
            file, number = self._groups[group]
            self._group, self._start, self._batch = group, self._firsts[group], ()
            self._batches = file.iter_batches(batch_size=32, row_groups=[number], columns=[self._column])
        while row >= self._start + len(self._batch):
            self._start += len(self._batch)
            self._batch = next(self._batches).column(0)
        return self._batch[row - self._start]

    def __reduce__(self) -> tuple[Any, ...]:
        return _ParquetRows, (self._paths, self._column)


@dataclass(frozen=True)
class _Encoded:
    """Encoded images from a column of bytes, or of bytes and path where the bytes may lie in a file of their own."""

    rows: Any
    folder: Path

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> bytes | Path:
        value = self.rows[row].as_py()
        value = value if isinstance(value, dict) else {"bytes": value}
        if value["bytes"] is not None:
            return value["bytes"]
        if not value.get("path"):
            raise DataError("its row holds no image")
        return self.folder / value["path"]


def _usable_columns(schema: pa.Schema, kind: _Kind) -> dict[str, bool]:
    """Tell for every column whether its type can hold what is asked for."""
    usable = {}
    for field in schema:
        value = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
        is_text = pa.types.is_string(value) or pa.types.is_large_string(value)
        is_whole = pa.types.is_integer(value) or pa.types.is_boolean(value)
        usable[field.name] = {
            "image": _is_image_struct(value) or pa.types.is_binary(value) or pa.types.is_large_binary(value),
            "id": is_text or is_whole,
            "label": is_text or is_whole,
            "caption": is_text,
        }[kind]
    return usable


def _is_image_struct(value: pa.DataType) -> bool:
    return pa.types.is_struct(value) and value.get_field_index("bytes") >= 0


def _only_image_column(schema: pa.Schema, source: str) -> str:
    """Find the column of images by its type, where no name tells."""
    usable = _usable_columns(schema, "image")
    structs = [field.name for field in schema if _is_image_struct(field.type)]
    found = structs or [name for name in usable if usable[name]]
    if len(found) != 1:
        columns = ", ".join(f"{field.name} ({field.type})" for field in schema)
        raise DataError(
            f"{source} must have one column of encoded images, as struct of bytes and path or as binary; found "
            f"{len(found)} among its columns {columns}. Name one as image_column, or encode the images."
        )
    return found[0]


# ---- data sets in memory


class _Items:
    """The pictures of a map-style data set; notes what else an item says when it is read."""

    def __init__(self, dataset: Any, num_items: int, settings: DataSettings, source: str) -> None:
        self._dataset = dataset
        self.ids: list[str] = _row_ids(num_items)
        self.labels, self.captions = [""] * num_items, [""] * num_items
        self.has_floats = False
        self._keys: dict[_Kind, str | None] = {}
        try:
            first = dataset[0] if num_items else None
        except Exception as error:
            raise DataError(f"Item 0 of {source} cannot be read: {type(error).__name__}: {error}.") from error
        if isinstance(first, Mapping):
            self._keys = {kind: _find(kind, settings, dict.fromkeys(first, True), source) for kind in _NAMES}
            if self._keys["image"] is None:
                raise DataError(
                    f"Items of {source} must have an image under one of the keys {', '.join(_NAMES['image'])}; found "
                    f"{', '.join(map(str, first))}. Name the key as image_column."
                )
        else:
            _warn_of_columns(settings, source)
        self._classes = _class_names(dataset, self._keys.get("label"))

    def __getitem__(self, k: int) -> Any:
        item = self._dataset[k]
        if isinstance(item, Mapping):
            values = {kind: _scalar(item[key]) for kind, key in self._keys.items() if key is not None}
            if "id" in values:
                self.ids[k] = _checked_ids([values["id"]], "its item")[0]
            self.captions[k] = _text(values.get("caption"))
        elif isinstance(item, tuple | list):
            values = dict(zip(("image", "label"), (_scalar(value) for value in item), strict=False))
            if not isinstance(values.get("label"), str | int):
                values["label"] = None
        else:
            values = {"image": item}
        self.labels[k] = _text(values.get("label"), self._classes)
        picture = values.get("image")
        self.has_floats |= "float" in str(getattr(picture, "dtype", ""))
        return picture


def _scalar(value: Any) -> Any:
    """Unwrap a number from an array or tensor without axes."""
    return value.item() if getattr(value, "shape", None) == () else value


def _class_names(dataset: Any, label_key: str | None) -> Sequence[str] | None:
    """Find the names of integer labels where Hugging Face datasets and torchvision keep them."""
    features = getattr(dataset, "features", None)
    if label_key is not None and isinstance(features, Mapping):
        return getattr(features.get(label_key), "names", None)
    return getattr(dataset, "classes", None) if label_key is None else None


# ---- what all sources share


def _make(
    pictures: Pictures,
    ids: Iterable[Any],
    labels: Iterable[Any] | None,
    captions: Iterable[Any] | None,
    source: str,
) -> ImageData:
    return _join(pictures.shape, [(pictures, k) for k in range(len(pictures.hashes))], ids, labels, captions, source)


def _join(
    shape: tuple[int, int, int],
    entries: list[tuple[Pictures, int]],
    ids: Iterable[Any],
    labels: Iterable[Any] | None,
    captions: Iterable[Any] | None,
    source: str,
) -> ImageData:
    ids = _checked_ids(ids, source)
    columns = {"labels": labels, "captions": captions}
    texts = {name: None if values is None else tuple(map(_text, values)) for name, values in columns.items()}
    for name, values in {"ids": ids, **texts}.items():
        if values is not None:
            _check_count(name, values, len(entries), source)
    return ImageData(ids, texts["labels"], texts["captions"], *shape, source, tuple(entries))


def _checked_ids(ids: Iterable[Any], source: str) -> tuple[str, ...]:
    """Turn whole numbers into text; refuse ids that could not stand in a list or file, or are not unique."""
    given = list(ids)
    texts = [str(id_) if isinstance(id_, int | np.integer) and not isinstance(id_, bool) else id_ for id_ in given]
    bad = [id_ for id_ in texts if not isinstance(id_, str) or not id_.isprintable() or not id_]
    if bad:
        raise DataError(
            f"Ids must be whole numbers or non-empty printable text on one line; {source} has {len(bad)} others: "
            f"{_some(list(map(repr, bad)))}. Rename them, or name another id_column."
        )
    repeated = [id_ for id_, count in Counter(texts).items() if count > 1]
    if repeated:
        raise DataError(
            f"Ids must be unique; {len(repeated)} are repeated in {source}: {_some(repeated)}. Rename them, or name "
            "another id_column."
        )
    return tuple(map(str, texts))


def _check_count(name: str, values: Sequence[str], num_images: int, source: str) -> None:
    if len(values) != num_images:
        raise DataError(f"{source} has {num_images} images and {len(values)} {name}; give one for each image.")


def _check_settings(settings: DataSettings) -> None:
    if settings.resolution is not None and settings.resolution < 1:
        raise ConfigError(f"resolution must be at least 1 pixel; got {settings.resolution}.")
    if settings.center_crop and settings.resolution is None:
        warnings.warn("center_crop has no effect without a resolution.", stacklevel=3)


def _warn_of_columns(settings: DataSettings, source: str) -> None:
    named = [f"{kind}_column" for kind in _NAMES if getattr(settings, f"{kind}_column") is not None]
    if named:
        warnings.warn(f"{source} has no columns, so these settings have no effect: {', '.join(named)}.", stacklevel=4)


def _find(kind: _Kind, settings: DataSettings, columns: Mapping[str, bool], source: str) -> str | None:
    """Choose the column that the settings name, or else one with a usual name and a type that can be used."""
    named = getattr(settings, f"{kind}_column")
    if named is None:
        return next((name for name in _NAMES[kind] if columns.get(name)), None)
    if not columns.get(named):
        what = "encoded images" if kind == "image" else "text or whole numbers"
        found = "no such column" if named not in columns else "a column of another type"
        raise DataError(
            f"{kind}_column={named} must name a column of {what}; {source} has {found}. Columns that can be used: "
            f"{', '.join(str(name) for name in columns if columns[name])}."
        )
    return named


def _row_ids(num_rows: int) -> list[str]:
    return [f"row-{row:07}" for row in range(num_rows)]


def _text(value: Any, classes: Sequence[str] | None = None) -> str:
    """Write a label or caption as text; -1 is what Hugging Face datasets give images without a class."""
    if value is None or (classes is not None and value == -1):
        return ""
    return classes[value] if classes is not None and isinstance(value, int) else str(value)


def _split_of(path: Path, folder: Path) -> str:
    """Read the split from a file name such as train-00000-of-00004.parquet, or else from the folder."""
    name = re.sub(r"[-_.]?\d+([-_.]of[-_.]\d+.*)?$", "", path.stem)
    return name or path.parent.relative_to(folder).as_posix()


def _choose_split(splits: Sequence[str], source: str) -> str:
    if len(splits) == 1 or "train" in splits:
        return splits[0] if len(splits) == 1 else "train"
    raise DataError(
        f"{source} has several splits and none is named train: {', '.join(splits)}. Give one of its folders."
    )


def _some(ids: Sequence[Any], count: int = 5) -> str:
    return ", ".join(map(str, ids[:count])) + (", …" if len(ids) > count else "")
