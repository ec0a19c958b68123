"""A cleaned data set on disk, with what was left out of it and why. The source is only read.

::

    DIR/images/...            kept files, byte for byte, where the source is a folder of images without captions
    DIR/train.parquet         or a table with a Hugging Face image column, id, label, caption: bytes as they were
    DIR/images.safetensors    or float images, exactly
    DIR/kept.csv              id and the figures of every image that stays
    DIR/removed.csv           id, reason, figure, threshold, duplicate_of: one line for each reason
    DIR/manifest.json         source, thresholds, counts, scores, generally influential images, fingerprints, notes

Images that are not encoded in their source (PIL images or arrays in memory) become PNG, which loses nothing. Ids stay,
and so do pixels: before the folder appears, it is opened and compared with what was to be kept.
"""

import csv
import json
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy import ndarray
from PIL import Image

from whence._files import publish_folder, write_json
from whence.cleaning import Cleaning
from whence.config import DataSettings
from whence.data import ImageData, open_images, save_arrays
from whence.errors import ConfigError, DataError

FORMAT_VERSION = 1
_ROWS = 256
_FEATURES = {"image": {"_type": "Image"}} | {
    name: {"dtype": "string", "_type": "Value"} for name in ("id", "label", "caption")
}


def export(cleaning: Cleaning, folder: Path, settings: DataSettings) -> Path:
    """Write what stays, and the tables.

    Args:
        cleaning: What stays.
        folder: A new folder; it appears whole or not at all.
        settings: How the images were read, so that what is written can be read the same way and compared.

    Returns:
        The file or folder that holds the images: a source for ``whence train``.

    Raises:
        ConfigError: If the folder exists.
        DataError: If the source changed since it was opened, or what was written does not read as what was kept.
    """
    if folder.exists():
        raise ConfigError(f"{folder} exists. Give a new folder: nothing is overwritten.")
    kept = cleaning.images.select(cleaning.kept)
    with publish_folder(folder) as partial:
        name = _write_images(kept, partial)
        _check_written(kept, partial / name, settings)
        _write_tables(cleaning, partial)
        counts = Counter(finding.reason for finding in cleaning.findings)
        manifest = {
            "format_version": FORMAT_VERSION,
            "whence": version("whence"),
            "images": name,
            "source": cleaning.images.source,
            "fingerprint": {"source": cleaning.images.fingerprint, "kept": kept.fingerprint},
            "num_images": {"source": len(cleaning.images), "kept": len(kept)},
            "findings": dict(sorted(counts.items())),
            "settings": asdict(cleaning.settings),
            "scores": cleaning.made_of,
            "generally_influential": cleaning.influential,
            "notes": cleaning.notes,
        }
        write_json(partial / "manifest.json", manifest)
    return folder / name


def _write_images(kept: ImageData, folder: Path) -> str:
    """Write images in the form that they had; give the name of the file or folder."""
    given = [kept.encoded(row) for row in range(len(kept))]
    paths = [one for one in given if isinstance(one, Path)]
    if len(paths) == len(given) and kept.captions is None and all(map(_ends_in, paths, kept.ids)):
        for path, id_ in zip(paths, kept.ids, strict=True):
            target = folder / "images" / id_
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
        return "images"
    if any(one is None for one in given) and not _are_bytes(kept):
        pixels = kept.pixels(range(len(kept)))
        save_arrays(folder / "images.safetensors", pixels, kept.ids, kept.labels, captions=kept.captions)
        return "images.safetensors"
    _write_parquet(kept, given, folder / "train.parquet")
    return "train.parquet"


def _ends_in(path: Path, id_: str) -> bool:
    """Tell whether an id is the path of its file from some folder, so that the same tree can be made again."""
    parts = PurePosixPath(id_).parts
    return ".." not in parts and not PurePosixPath(id_).is_absolute() and path.parts[-len(parts) :] == parts


def _are_bytes(kept: ImageData) -> bool:
    """Tell whether all values are those of 8 bit images."""
    return all(np.array_equal(_as_floats(_as_bytes(image)), image) for image in map(_only(kept), range(len(kept))))


def _only(kept: ImageData) -> Any:
    return lambda row: kept.pixels([row])[0]


def _as_bytes(image: ndarray) -> ndarray:
    return np.rint((image + 1) * 127.5).astype(np.uint8)


def _as_floats(values: ndarray) -> ndarray:
    return values.astype(np.float32) / np.float32(127.5) - np.float32(1)


def _write_parquet(kept: ImageData, given: Sequence[bytes | Path | None], path: Path) -> None:
    columns = {"label": kept.labels, "caption": kept.captions}
    texts = {name: values for name, values in columns.items() if values is not None}
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    features = {name: _FEATURES[name] for name in ("image", "id", *texts)}
    schema = pa.schema(
        [("image", image), ("id", pa.string()), *((name, pa.string()) for name in texts)],
        metadata={"huggingface": json.dumps({"info": {"features": features}})},
    )
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, len(kept), _ROWS):
            rows = range(start, min(start + _ROWS, len(kept)))
            images = [{"bytes": _bytes_of(kept, row, given[row]), "path": None} for row in rows]
            batch = {"image": images, "id": [kept.ids[row] for row in rows]}
            batch |= {name: [values[row] for row in rows] for name, values in texts.items()}
            writer.write_table(pa.Table.from_pydict(batch, schema))


def _bytes_of(kept: ImageData, row: int, given: bytes | Path | None) -> bytes:
    if isinstance(given, Path):
        return given.read_bytes()
    if given is not None:
        return given
    values = _as_bytes(kept.pixels([row])[0])
    stream = BytesIO()
    Image.fromarray(values[0] if len(values) == 1 else np.moveaxis(values, 0, -1)).save(stream, "PNG")
    return stream.getvalue()


def _check_written(kept: ImageData, path: Path, settings: DataSettings) -> None:
    columns = dict.fromkeys(("image_column", "id_column", "label_column", "caption_column"))
    grey = settings.grey or kept.channels == 1
    written = open_images(path, replace(settings, grey=grey, **columns))
    if dict(zip(written.ids, written.hashes, strict=True)) != dict(zip(kept.ids, kept.hashes, strict=True)):
        raise DataError(
            f"What was written does not read as the images of {kept.source} that were to be kept: the source changed "
            "while it was copied. Nothing is left behind; run again."
        )


def _write_tables(cleaning: Cleaning, folder: Path) -> None:
    with (folder / "removed.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "reason", "figure", "threshold", "duplicate_of"])
        for f in cleaning.findings:
            writer.writerow([f.id, f.reason, f"{f.figure:.6g}", f"{f.threshold:.6g}", f.duplicate_of])
    with (folder / "kept.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["id", *cleaning.figures])
        for row in cleaning.kept:
            writer.writerow([cleaning.images.ids[row], *(f"{values[row]:.6g}" for values in cleaning.figures.values())])
