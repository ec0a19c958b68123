"""What a source holds, as it lies there: its pictures not yet decoded, their ids, labels and captions not yet checked.

A source is here a file or folder; this module chooses the format, the split and the columns. ``_images`` decodes the
pictures, and ``data`` makes an ImageData of them.
"""

import json
import os
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from whence._columns import (
    NAMES,
    Kind,
    abbreviate,
    as_text,
    choose_column,
    row_ids,
    warn_of_columns,
    warn_of_unusable,
)
from whence.config import DataSettings
from whence.errors import DataError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")

_DEMO_FILES = {
    "demo": "train.parquet",
    "demo-queries": "queries.parquet",
    "demo-styles": "styles.parquet",
    "demo-styles-queries": "styles-queries.parquet",
}
_METADATA = "metadata.jsonl"
_ACCEPTED = (
    f"Accepted are: a folder of images or one image ({' '.join(IMAGE_SUFFIXES)}); a .parquet file or a folder of them; "
    "a folder written by save_to_disk of Hugging Face datasets; a .safetensors file written by whence; or the words "
    f"{' and '.join(_DEMO_FILES)}."
)


class Found(NamedTuple):
    """What a file or folder holds: ``pictures`` gives one by ``[row]``; the rest is as found."""

    pictures: Any
    ids: Sequence[Any]
    labels: Sequence[Any] | None
    captions: Sequence[Any] | None


# ---- folders and files


def find_images(source: str | Path, settings: DataSettings) -> Found:
    """Find the pictures of a path or of demo data, and what is said of them, without decoding any."""
    path, name = Path(source), str(source)
    if source in _DEMO_FILES:
        path = Path(__file__).with_name("demo_data") / _DEMO_FILES[name]
    elif not name or not path.exists():
        raise DataError(f"{name!r} does not exist. {_ACCEPTED}")
    if path.is_dir():
        return _open_folder(path, settings, name)
    if path.suffix.lower() == ".parquet":
        return _open_parquet([path], settings, name)
    if path.suffix.lower() in IMAGE_SUFFIXES:
        return _open_image_folder({path.name: path}, _metadata_of(path), settings, name, alone=True)
    raise DataError(f"{path} is a file of another kind. {_ACCEPTED}")


def _open_folder(folder: Path, settings: DataSettings, source: str) -> Found:
    if (folder / "dataset_dict.json").is_file():
        with _table_errors(source):
            splits = json.loads((folder / "dataset_dict.json").read_text())["splits"]
        return _open_folder(folder / _choose_split(splits, source), settings, source)
    if (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file():
        return _open_saved(folder, settings, source)
    paths = dict(sorted((path.relative_to(folder).as_posix(), path) for path in _walk(folder)))
    images = {id_: path for id_, path in paths.items() if path.suffix.lower() in IMAGE_SUFFIXES}
    tables = [path for path in paths.values() if path.suffix.lower() == ".parquet"]
    if images and tables:
        raise DataError(
            f"{source} holds {len(images)} images and {len(tables)} parquet files, and either may be meant. "
            "Give the file or the subfolder."
        )
    if tables:
        split = _choose_split(sorted({_split_of(path, folder) for path in tables}), source)
        return _open_parquet([path for path in tables if _split_of(path, folder) == split], settings, source)
    if not images:
        found = Counter(path.suffix or "no suffix" for path in paths.values())
        files = ", ".join(f"{count} of {suffix}" for suffix, count in found.most_common(5)) or "none"
        raise DataError(f"{source} holds no images; files found: {files}. {_ACCEPTED}")
    return _open_image_folder(images, [path for path in paths.values() if path.name == _METADATA], settings, source)


def _metadata_of(image: Path) -> list[Path]:
    """Find the file beside an image that says something of it."""
    beside = image.parent / _METADATA
    listed = beside.is_file() and any(
        line.get("file_name") == image.name for line in _lines_of(beside) if isinstance(line.get("file_name"), str)
    )
    return [beside] if listed else []


def _open_image_folder(
    images: dict[str, Path], metadata: list[Path], settings: DataSettings, source: str, *, alone: bool = False
) -> Found:
    ids: Sequence[Any] = list(images)
    labels = [path.parent.name if "/" in id_ else "" for id_, path in images.items()]
    captions = None
    if metadata:
        lines = _read_metadata(metadata, images, source, alone=alone)
        columns = dict.fromkeys((key for line in lines for key in line), NAMES)
        if settings.id_column and (name := choose_column("id", settings, columns, source)):
            ids = [line.get(name) for line in lines]
        if name := choose_column("label", settings, columns, source):
            labels = [as_text(line.get(name)) for line in lines]
        if name := choose_column("caption", settings, columns, source):
            captions = [line.get(name) for line in lines]
    else:
        warn_of_columns(settings, source)
    return Found(list(images.values()), ids, labels if any(labels) else None, captions)


def _walk(folder: Path) -> Iterator[Path]:
    """List files that are not hidden; follow links to folders, but none twice."""
    seen = set()
    for parent, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(parent)
        folders[:] = [] if real in seen else sorted(name for name in folders if not name.startswith("."))
        if real not in seen:
            yield from (Path(parent, name) for name in files if not name.startswith("."))
        seen.add(real)


def _lines_of(path: Path) -> Iterator[dict[str, Any]]:
    """Read a metadata.jsonl file."""
    # Not splitlines(), which also splits at separators that may stand inside a caption.
    for number, text in enumerate(_read_utf8(path).split("\n"), start=1):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
            Path(line["file_name"])
        except (ValueError, KeyError, TypeError):
            raise DataError(
                f"Line {number} of {path} must be a JSON object with a file_name; found {text[:80]!r}."
            ) from None
        yield line


def _read_metadata(metadata: list[Path], images: dict[str, Path], source: str, *, alone: bool) -> list[dict[str, Any]]:
    """Read what metadata.jsonl files say of each image; the nearest one counts."""
    lines: dict[str, dict[str, Any]] = {}
    for path in sorted(metadata, key=lambda path: len(path.parts)):
        for line in _lines_of(path):
            lines[os.path.normpath(path.parent / line["file_name"])] = line
    files = {os.path.normpath(path): id_ for id_, path in images.items()}
    absent = [] if alone else [path for path in lines if path not in files]
    unlisted = [files[path] for path in files if path not in lines]
    if absent or unlisted:
        raise DataError(
            f"Every image of {source} needs a line in {_METADATA}, and every line an image. {len(absent)} lines have "
            f"no image: {abbreviate(absent)}; {len(unlisted)} images have no line: {abbreviate(unlisted)}."
        )
    return [lines[path] for path in files]


def _read_utf8(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} must be text in UTF-8; found {error}. Save it in UTF-8.") from None


def _split_of(path: Path, folder: Path) -> str:
    """Read the split from a file name such as train-00000-of-00004.parquet, or else from the folder."""
    name = re.sub(r"[-_.]?\d+([-_.]of[-_.]\d+.*)?$", "", path.stem)
    return name or path.parent.relative_to(folder).as_posix()


def _choose_split(splits: Sequence[str], source: str) -> str:
    if "train" in splits:
        return "train"
    if len(splits) == 1:
        return splits[0]
    raise DataError(
        f"{source} has several splits and none is named train: {', '.join(splits)}. Give one of its folders."
    )


# ---- tables


def _open_saved(folder: Path, settings: DataSettings, source: str) -> Found:
    """Read what ``Dataset.save_to_disk`` wrote: Arrow streams, here mapped rather than read."""
    with _table_errors(source):
        state = json.loads((folder / "state.json").read_text())
        if state.get("_indices_data_files"):
            raise DataError(f"{source} was saved with a mapping of rows. Save it again with a present-day datasets.")
        files = [pa.memory_map(str(folder / file["filename"])) for file in state["_data_files"]]
        table = pa.concat_tables([pa.ipc.open_stream(file).read_all() for file in files])
        return _open_table(table.schema, table.column, folder, settings, source)


def _open_parquet(paths: list[Path], settings: DataSettings, source: str) -> Found:
    with _table_errors(source):
        schemas = [pq.ParquetFile(path, memory_map=True).schema_arrow for path in paths]
        for path, schema in zip(paths, schemas, strict=True):
            if not schema.equals(schemas[0]):
                raise DataError(
                    f"The parquet files of {source} must have the same columns; {path.name} differs from "
                    f"{paths[0].name}. Give one of them."
                )
        return _open_table(schemas[0], lambda name: _ParquetRows(paths, name), paths[0].parent, settings, source)


@contextmanager
def _table_errors(source: str) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError, ValueError, LookupError) as error:
        raise DataError(f"{source} is no readable table ({type(error).__name__}: {error}). Write it again.") from error


def _open_table(
    schema: pa.Schema, column: Callable[[str], Any], folder: Path, settings: DataSettings, source: str
) -> Found:
    """Open a table whose columns have ``len``, an Arrow value by ``[row]``, and ``to_pylist``."""
    kinds = {field.name: _kinds_of(field.type) for field in schema}
    names: dict[Kind, str | None] = {kind: choose_column(kind, settings, kinds, source) for kind in NAMES}
    warn_of_unusable(names, kinds, settings, source)
    encoded = _Encoded(column(names["image"] or _only_image_column(schema, source)), folder)
    ids = column(names["id"]).to_pylist() if names["id"] else row_ids(len(encoded))
    labels = captions = None
    if names["label"]:
        features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {}).get("features", {})
        classes = features.get(names["label"], {}).get("names")
        labels = [as_text(value, classes) for value in column(names["label"]).to_pylist()]
    if names["caption"]:
        captions = column(names["caption"]).to_pylist()
    return Found(encoded, ids, labels, captions)


class _ParquetRows:
    """One column of parquet files by row, read forward in small batches: a row group may be larger than memory."""

    def __init__(self, paths: list[Path], column: str) -> None:
        self._paths, self._column = paths, column
        self._files = [pq.ParquetFile(path, memory_map=True) for path in paths]
        self._groups = [(file, group) for file in self._files for group in range(file.num_row_groups)]
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
            # Emptied first: after an error the old batch must not pass for the next one.
            self._start, self._batch = self._start + len(self._batch), ()
            batch = next(self._batches, None)
            if batch is None:  # an error before has ended the reading
                raise DataError("a page of its row group cannot be read")
            self._batch = batch.column(0)
        return self._batch[row - self._start]

    def to_pylist(self) -> list[Any]:
        return [value for file in self._files for value in file.read(columns=[self._column])[self._column].to_pylist()]

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


def _kinds_of(column: pa.DataType) -> set[Kind]:
    """Tell what a column of this type can hold."""
    value = column.value_type if pa.types.is_dictionary(column) else column
    if _is_image_struct(value) or pa.types.is_binary(value) or pa.types.is_large_binary(value):
        return {"image"}
    if pa.types.is_string(value) or pa.types.is_large_string(value):
        return {"id", "label", "caption"}
    return {"id", "label"} if pa.types.is_integer(value) or pa.types.is_boolean(value) else set()


def _is_image_struct(column: pa.DataType) -> bool:
    return pa.types.is_struct(column) and column.get_field_index("bytes") >= 0


def _only_image_column(schema: pa.Schema, source: str) -> str:
    """Find the column of images by its type, where no name tells."""
    structs = [field.name for field in schema if _is_image_struct(field.type)]
    found = structs or [field.name for field in schema if "image" in _kinds_of(field.type)]
    if len(found) != 1:
        columns = ", ".join(f"{field.name} ({field.type})" for field in schema)
        raise DataError(
            f"{source} must have one column of encoded images, as struct of bytes and path or as binary; found "
            f"{len(found)} among its columns {columns}. Name one as image_column, or encode the images."
        )
    return found[0]
