"""Export: what is kept reads back with its ids, pixels and bytes, in the form it had; the source is only read."""

import csv
import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from whence.cleaning import clean
from whence.config import CleaningSettings, DataSettings
from whence.data import ImageData, open_images, save_arrays
from whence.errors import ConfigError, DataError
from whence.export import export

VALUES = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
VALUES[4] = VALUES[1]
PLAIN = DataSettings()


def save_folder(folder):
    """Six pictures, one of them twice; half of them JPEG, which must not be encoded again."""
    for k, values in enumerate(VALUES):
        path = folder / ("odd" if k % 2 else "even") / f"{k}.{'jpg' if k == 2 else 'png'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(values).save(path)
    return folder


def exported(source, out, settings=PLAIN):
    images = source if isinstance(source, ImageData) else open_images(source, settings)
    cleaning = clean(images, CleaningSettings(), show_progress=False)
    return images, cleaning, export(cleaning, out, settings)


def check_same(images, cleaning, written):
    """All but the copy, with ids, pixels, labels and captions."""
    kept = images.select(cleaning.kept)
    assert len(kept) == 5
    assert dict(zip(written.ids, written.hashes, strict=True)) == dict(zip(kept.ids, kept.hashes, strict=True))
    order = written.rows(kept.ids)
    for name in ("labels", "captions"):
        want, found = getattr(kept, name), getattr(written, name)
        assert want is None or tuple(found[row] for row in order) == want


def test_a_folder_stays_a_folder_of_the_same_files(tmp_path):
    source = save_folder(tmp_path / "images")
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in source.rglob("*") if path.is_file()}
    images, cleaning, path = exported(source, tmp_path / "clean")
    assert path == tmp_path / "clean" / "images"
    check_same(images, cleaning, open_images(path))
    assert {p.relative_to(path).as_posix(): p.read_bytes() for p in path.rglob("*.*")} == {
        id_: (source / id_).read_bytes() for id_ in np.array(images.ids)[cleaning.kept]
    }
    assert before == {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in source.rglob("*") if p.is_file()}


def test_the_tables_say_why(tmp_path):
    _, cleaning, _ = exported(save_folder(tmp_path / "images"), tmp_path / "clean")
    with (tmp_path / "clean" / "removed.csv").open() as file:
        (row,) = csv.DictReader(file)
    copies = {"even/4.png": "odd/1.png", "odd/1.png": "even/4.png"}
    assert row == {
        "id": row["id"],
        "reason": "duplicate",
        "figure": "0",
        "threshold": "0.02",
        "duplicate_of": copies[row["id"]],
    }
    with (tmp_path / "clean" / "kept.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 5
    manifest = json.loads((tmp_path / "clean" / "manifest.json").read_text())
    assert manifest["num_images"] == {"source": 6, "kept": 5} and manifest["findings"] == {"duplicate": 1}
    assert manifest["settings"]["near"] == 0.02 and manifest["notes"] == list(cleaning.notes)


def test_captions_make_a_table_with_the_bytes_of_the_files(tmp_path):
    source = save_folder(tmp_path / "images")
    names = [path.relative_to(source).as_posix() for path in sorted(source.rglob("*.*"))]
    lines = [json.dumps({"file_name": name, "text": f"about {name}"}) for name in names]
    (source / "metadata.jsonl").write_text("\n".join(lines))
    images, cleaning, path = exported(source, tmp_path / "clean")
    assert path.name == "train.parquet"
    check_same(images, cleaning, open_images(path))
    for row in pq.read_table(path).to_pylist():
        assert row["image"]["bytes"] == (source / row["id"]).read_bytes() and row["caption"]


def test_a_table_keeps_bytes_and_row_ids(tmp_path):
    folder = save_folder(tmp_path / "images")
    files = [path.read_bytes() for path in sorted(folder.rglob("*.*"))]
    table = pa.table({"image": [{"bytes": data, "path": None} for data in files], "label": list("abcdef")})
    pq.write_table(table, tmp_path / "train.parquet")
    images, cleaning, path = exported(tmp_path / "train.parquet", tmp_path / "clean")
    check_same(images, cleaning, open_images(path))
    rows = pq.read_table(path).to_pylist()
    assert [row["image"]["bytes"] for row in rows] == [files[int(row["id"].split("-")[1])] for row in rows]


def test_the_table_opens_with_datasets(tmp_path):
    datasets = pytest.importorskip("datasets")
    images, cleaning, path = exported(ImageData.from_dataset([Image.fromarray(v) for v in VALUES]), tmp_path / "clean")
    loaded = datasets.Dataset.from_parquet(str(path), cache_dir=str(tmp_path / "cache"))
    assert loaded[0]["image"].size == (8, 8) and loaded["id"][1] == "row-0000001"
    np.testing.assert_array_equal(np.asarray(loaded[0]["image"]), VALUES[0])


def test_resized_images_are_kept_at_full_size(tmp_path):
    settings = DataSettings(resolution=4)
    images, cleaning, path = exported(save_folder(tmp_path / "images"), tmp_path / "clean", settings)
    check_same(images, cleaning, open_images(path, settings))
    assert open_images(path).height == 8


def test_floats_stay_floats(tmp_path):
    pixels = np.random.default_rng(1).uniform(-1, 1, (6, 1, 8, 8)).astype(np.float32)
    pixels[4] = pixels[1]
    ids, captions = [f"f-{k}" for k in range(6)], [f"picture {k}" for k in range(6)]
    save_arrays(tmp_path / "images.safetensors", pixels, ids, list("aabbcc"), captions=captions)
    images, cleaning, path = exported(tmp_path / "images.safetensors", tmp_path / "clean")
    assert path.name == "images.safetensors"
    check_same(images, cleaning, open_images(path))


def test_grey_arrays_of_bytes_become_png(tmp_path):
    arrays = [values[None, :, :, 0] for values in VALUES]
    images, cleaning, path = exported(ImageData.from_dataset(arrays), tmp_path / "clean")
    assert path.name == "train.parquet"
    check_same(images, cleaning, open_images(path, DataSettings(grey=True)))


def test_nothing_is_overwritten(tmp_path):
    source = save_folder(tmp_path / "images")
    (tmp_path / "clean").mkdir()
    with pytest.raises(ConfigError, match="clean exists. Give a new folder: nothing is overwritten"):
        exported(source, tmp_path / "clean")
    assert not list((tmp_path / "clean").iterdir())


def test_a_source_that_changed_is_refused_and_nothing_is_left(tmp_path):
    source = save_folder(tmp_path / "images")
    images = open_images(source)
    cleaning = clean(images, CleaningSettings(), show_progress=False)
    shutil.copyfile(source / "even" / "0.png", source / "odd" / "3.png")
    with pytest.raises(DataError, match="does not read as the images of .* that were to be kept"):
        export(cleaning, tmp_path / "clean", PLAIN)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images"]
