import json
import pickle
import re
import struct
import subprocess
import sys
import zlib
from dataclasses import dataclass
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from numpy import ndarray
from PIL import Image
from safetensors.numpy import save_file

from whence import _images, _sources
from whence.config import DataSettings
from whence.data import ImageData, concatenate, open_images, save_arrays
from whence.errors import ConfigError, DataError


def noise(seed: int, height: int = 6, width: int = 6, channels: int = 3) -> ndarray:
    """Random bytes with axes height, width, channel; without the last for one channel."""
    values = np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return values[:, :, 0] if channels == 1 else values


def encode(image: Image.Image | ndarray, suffix: str = "PNG", **options: Any) -> bytes:
    stream = BytesIO()
    (Image.fromarray(image) if isinstance(image, ndarray) else image).save(stream, suffix, **options)
    return stream.getvalue()


def write(path: Path, image: Image.Image | ndarray | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(image if isinstance(image, bytes) else encode(image))
    return path


def unit(values: Any) -> ndarray:
    """Bytes as the model sees them, channels first."""
    values = np.asarray(values, np.float32)
    return np.moveaxis(values[:, :, None] if values.ndim == 2 else values, -1, 0) / np.float32(127.5) - 1


def one(tmp_path: Path, image: Image.Image | ndarray | bytes, settings: DataSettings | None = None) -> ImageData:
    return open_images(write(tmp_path / "one.png", image), settings or DataSettings())


def bytes_of(opened: ImageData, row: int = 0) -> list[Any]:
    """Decoded 8 bit values, channel first."""
    return np.rint((opened.pixels([row])[0] + 1) * 127.5).astype(int).tolist()


def write_table(path: Path, features: dict[str, Any] | None = None, **columns: Any) -> Path:
    table = pa.table(columns)
    if features is not None:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=3)
    return path


def image_column(num_rows: int, first: int = 0) -> list[dict[str, Any]]:
    return [{"bytes": encode(noise(first + row)), "path": None} for row in range(num_rows)]


class Sized:
    """A map-style data set as torch has them."""

    def __init__(self, items: list[Any]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, k: int) -> Any:
        return self.items[k]


# ---- sources


class TestFolder:
    def test_ids_are_sorted_relative_paths_and_labels_parent_folders(self, tmp_path: Path) -> None:
        for k, name in enumerate(["b/2.png", "a/1.png", "a/deep/3.png", "top.png"]):
            write(tmp_path / name, noise(k))
        opened = open_images(tmp_path)
        assert opened.ids == ("a/1.png", "a/deep/3.png", "b/2.png", "top.png")
        assert opened.labels == ("a", "deep", "b", "")
        assert opened.captions is None
        assert (opened.channels, opened.height, opened.width, len(opened)) == (3, 6, 6, 4)
        assert opened.source == str(tmp_path)
        assert opened.conversions == {}
        np.testing.assert_array_equal(opened.pixels([2, 0]), np.stack([unit(noise(0)), unit(noise(1))]))

    def test_without_subfolders_there_are_no_labels(self, tmp_path: Path) -> None:
        write(tmp_path / "1.png", noise(1))
        assert open_images(str(tmp_path)).labels is None

    def test_other_and_hidden_files_are_ignored(self, tmp_path: Path) -> None:
        write(tmp_path / "1.PNG", noise(1))
        for name in ["a.txt", "a.json", "README.md", ".hidden.png", ".cache/x.png"]:
            write(tmp_path / name, b"no image")
        assert open_images(tmp_path).ids == ("1.PNG",)

    @pytest.mark.parametrize("suffix", ["jpg", "jpeg", "webp", "bmp", "gif", "tif", "tiff", "png"])
    def test_each_suffix(self, tmp_path: Path, suffix: str) -> None:
        kind = {"jpg": "JPEG", "tif": "TIFF"}.get(suffix, suffix.upper())
        write(tmp_path / f"x.{suffix}", encode(np.full((4, 4, 3), 255, np.uint8), kind))
        np.testing.assert_array_equal(open_images(tmp_path).pixels([0]), np.ones((1, 3, 4, 4), np.float32))

    def test_linked_folders_are_followed_once(self, tmp_path: Path) -> None:
        write(tmp_path / "real/a/1.png", noise(1))
        (tmp_path / "set").mkdir()
        (tmp_path / "set/link").symlink_to(tmp_path / "real")
        (tmp_path / "real/a/loop").symlink_to(tmp_path / "set")
        assert open_images(tmp_path / "set").ids == ("link/a/1.png",)

    def test_metadata_gives_captions_and_labels(self, tmp_path: Path) -> None:
        write(tmp_path / "b.png", noise(1))
        write(tmp_path / "sub/a.png", noise(2))
        lines = [{"file_name": "sub/a.png", "text": "two\u2028parts", "label": 3}, {"file_name": "b.png", "text": "b"}]
        text = "\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
        (tmp_path / "metadata.jsonl").write_text(text + "\n", encoding="utf-8")
        opened = open_images(tmp_path)
        assert opened.ids == ("b.png", "sub/a.png")
        assert opened.captions == ("b", "two\u2028parts")
        assert opened.labels == ("", "3")

    def test_nearest_metadata_counts_and_columns_can_be_named(self, tmp_path: Path) -> None:
        write(tmp_path / "a/1.png", noise(1))
        (tmp_path / "metadata.jsonl").write_text('{"file_name": "a/1.png", "name": "far", "say": "far"}')
        (tmp_path / "a/metadata.jsonl").write_text('{"file_name": "1.png", "name": "near", "say": "hello"}')
        opened = open_images(tmp_path, DataSettings(id_column="name", caption_column="say"))
        assert opened.ids == ("near",)
        assert opened.captions == ("hello",)

    def test_of_one_image_is_known_what_stands_beside_it(self, tmp_path: Path) -> None:
        write(tmp_path / "1.png", noise(1))
        write(tmp_path / "2.png", noise(2))
        (tmp_path / "metadata.jsonl").write_text('{"file_name": "1.png", "text": "a cat"}')
        assert open_images(tmp_path / "1.png").captions == ("a cat",)
        assert open_images(tmp_path / "2.png").captions is None

    @pytest.mark.parametrize("line", ["no json", "[1]", '{"text": "x"}', '{"file_name": 3}'])
    def test_bad_line_of_metadata(self, tmp_path: Path, line: str) -> None:
        write(tmp_path / "1.png", noise(1))
        (tmp_path / "metadata.jsonl").write_text('{"file_name": "1.png"}\n' + line)
        with pytest.raises(DataError, match="Line 2 of .*must be a JSON object with a file_name"):
            open_images(tmp_path)

    def test_metadata_in_another_encoding(self, tmp_path: Path) -> None:
        write(tmp_path / "1.png", noise(1))
        (tmp_path / "metadata.jsonl").write_text('{"file_name": "1.png", "text": "é"}', encoding="latin-1")
        with pytest.raises(DataError, match=r"metadata\.jsonl must be text in UTF-8; found .* byte 0xe9"):
            open_images(tmp_path)

    def test_metadata_and_images_must_match(self, tmp_path: Path) -> None:
        write(tmp_path / "1.png", noise(1))
        (tmp_path / "metadata.jsonl").write_text('{"file_name": "2.png"}')
        with pytest.raises(DataError, match=r"1 lines have no image: .*2\.png; 1 images have no line: 1\.png"):
            open_images(tmp_path)

    def test_unknown_column_of_metadata(self, tmp_path: Path) -> None:
        write(tmp_path / "1.png", noise(1))
        (tmp_path / "metadata.jsonl").write_text('{"file_name": "1.png", "text": "x"}')
        with pytest.raises(DataError, match=r"caption_column=say .* no such column.*: file_name, text"):
            open_images(tmp_path, DataSettings(caption_column="say"))

    def test_column_setting_without_columns_warns(self, tmp_path: Path) -> None:
        write(tmp_path / "1.png", noise(1))
        with pytest.warns(UserWarning, match="has no columns, .*no effect: caption_column"):
            open_images(tmp_path, DataSettings(caption_column="say"))

    def test_empty_folder(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="holds no images; files found: none. Accepted are: a folder of images"):
            open_images(tmp_path)

    def test_folder_of_other_files(self, tmp_path: Path) -> None:
        write(tmp_path / "a.npy", b"x")
        write(tmp_path / "b.npy", b"x")
        with pytest.raises(DataError, match=r"holds no images; files found: 2 of \.npy"):
            open_images(tmp_path)

    def test_images_and_tables_together(self, tmp_path: Path) -> None:
        write(tmp_path / "1.png", noise(1))
        write_table(tmp_path / "a.parquet", image=image_column(1))
        with pytest.raises(DataError, match="1 images and 1 parquet files"):
            open_images(tmp_path)


def test_single_image(tmp_path: Path) -> None:
    opened = open_images(write(tmp_path / "sub/x.png", noise(1)))
    assert opened.ids == ("x.png",)
    assert opened.labels is None
    np.testing.assert_array_equal(opened.pixels([0])[0], unit(noise(1)))


@pytest.mark.parametrize("source", ["nowhere", "", "user/dataset"])
def test_missing_path(source: str) -> None:
    with pytest.raises(DataError, match=f"'{source}' does not exist. Accepted are"):
        open_images(source)


def test_unknown_suffix(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"x\.npy is a file of another kind. Accepted are: .*\.safetensors"):
        open_images(write(tmp_path / "x.npy", b"x"))


class TestParquet:
    def test_types_and_names_of_hugging_face(self, tmp_path: Path) -> None:
        path = write_table(
            tmp_path / "x.parquet",
            {"picture": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": ["cat", "dog"]}},
            picture=image_column(7),
            label=[0, 1, 1, -1, None, 0, 1],
            text=["a", "b", "c", "d", "e", "f", None],
        )
        opened = open_images(path)
        assert opened.ids == tuple(f"row-000000{row}" for row in range(7))
        assert opened.labels == ("cat", "dog", "dog", "", "", "cat", "dog")
        assert opened.captions == ("a", "b", "c", "d", "e", "f", "")
        np.testing.assert_array_equal(opened.pixels(range(7)), np.stack([unit(noise(row)) for row in range(7)]))

    def test_plain_binary_and_whole_number_ids(self, tmp_path: Path) -> None:
        path = write_table(tmp_path / "x.parquet", image_id=[5, 3], png=[encode(noise(0)), encode(noise(1))])
        opened = open_images(path)
        assert opened.ids == ("5", "3")
        assert opened.labels is None

    def test_dictionary_labels_and_usual_names(self, tmp_path: Path) -> None:
        image = [encode(noise(0))]
        path = write_table(
            tmp_path / "x.parquet", image=image, thumb=image, label=pa.array(["cat"]).dictionary_encode(), text=[1.5]
        )
        with pytest.warns(
            UserWarning, match="Column text of .* not used as caption, .* not hold text. Used instead: n"
        ):
            opened = open_images(path)
        assert opened.labels == ("cat",)
        assert opened.captions is None

    @pytest.mark.parametrize(
        ("more", "instead", "ids"),
        [({}, "row numbers", ("row-0000000",)), ({"sample_id": ["a"]}, "column sample_id", ("a",))],
    )
    def test_column_of_a_usual_name_that_cannot_hold_ids(
        self, tmp_path: Path, more: dict[str, Any], instead: str, ids: tuple[str, ...]
    ) -> None:
        path = write_table(tmp_path / "x.parquet", image=image_column(1), id=[1.5], **more)
        with pytest.warns(
            UserWarning, match=f"Column id of .* not used as id, .* text or whole numbers. Used instead: {instead}"
        ):
            assert open_images(path).ids == ids

    def test_columns_can_be_named(self, tmp_path: Path) -> None:
        path = write_table(
            tmp_path / "x.parquet", image=image_column(1), after=image_column(1, 9), key=["k"], kind=["l"], say=["c"]
        )
        settings = DataSettings(image_column="after", id_column="key", label_column="kind", caption_column="say")
        opened = open_images(path, settings)
        assert (opened.ids, opened.labels, opened.captions) == (("k",), ("l",), ("c",))
        np.testing.assert_array_equal(opened.pixels([0])[0], unit(noise(9)))

    def test_bytes_may_lie_in_a_file(self, tmp_path: Path) -> None:
        write(tmp_path / "files/1.png", noise(4))
        path = write_table(tmp_path / "x.parquet", image=[{"bytes": None, "path": "files/1.png"}])
        np.testing.assert_array_equal(open_images(path).pixels([0])[0], unit(noise(4)))

    def test_folder_of_parts(self, tmp_path: Path) -> None:
        write_table(tmp_path / "data/train-00001-of-00002.parquet", id=["c", "d"], image=image_column(2, 2))
        write_table(tmp_path / "data/train-00000-of-00002.parquet", id=["a", "b"], image=image_column(2))
        write_table(tmp_path / "data/test-00000-of-00001.parquet", id=["x"], image=image_column(1, 9))
        write(tmp_path / "README.md", b"text")
        opened = open_images(tmp_path)
        assert opened.ids == ("a", "b", "c", "d")
        np.testing.assert_array_equal(opened.pixels([3, 0]), np.stack([unit(noise(3)), unit(noise(0))]))

    @pytest.mark.parametrize("names", [("0000", "0001"), ("part-0", "part-1"), ("x_1", "x_2")])
    def test_numbered_files_are_one_split(self, tmp_path: Path, names: tuple[str, str]) -> None:
        for k, name in enumerate(names):
            write_table(tmp_path / f"{name}.parquet", id=[str(k)], image=image_column(1, k))
        assert open_images(tmp_path).ids == ("0", "1")

    def test_several_splits(self, tmp_path: Path) -> None:
        write_table(tmp_path / "a.parquet", image=image_column(1))
        write_table(tmp_path / "b.parquet", image=image_column(1))
        with pytest.raises(DataError, match="several splits and none is named train: a, b"):
            open_images(tmp_path)

    def test_parts_with_other_columns(self, tmp_path: Path) -> None:
        write_table(tmp_path / "a-0.parquet", image=image_column(1))
        write_table(tmp_path / "a-1.parquet", image=image_column(1), more=[1])
        with pytest.raises(DataError, match=r"must have the same columns; a-1\.parquet differs from a-0\.parquet"):
            open_images(tmp_path)

    def test_unknown_column(self, tmp_path: Path) -> None:
        path = write_table(tmp_path / "x.parquet", image=image_column(1), label=["a"])
        with pytest.raises(DataError, match=r"id_column=key .* no such column\. Columns that can be used: label"):
            open_images(path, DataSettings(id_column="key"))

    def test_column_of_another_type(self, tmp_path: Path) -> None:
        path = write_table(tmp_path / "x.parquet", image=image_column(1), label=["a"])
        with pytest.raises(DataError, match=r"image_column=label must name a column of encoded images; .*another type"):
            open_images(path, DataSettings(image_column="label"))

    @pytest.mark.parametrize("columns", [{"text": ["x"]}, {"a": [b"x"], "b": [b"x"]}])
    def test_no_or_several_image_columns(self, tmp_path: Path, columns: dict[str, Any]) -> None:
        path = write_table(tmp_path / "x.parquet", **columns)
        with pytest.raises(DataError, match=r"must have one column of encoded images.*found [02] among its columns"):
            open_images(path)

    def test_empty_table(self, tmp_path: Path) -> None:
        path = write_table(tmp_path / "x.parquet", image=pa.array([], pa.binary()))
        with pytest.raises(DataError, match=r"x\.parquet holds no images"):
            open_images(path)

    def test_row_without_image(self, tmp_path: Path) -> None:
        path = write_table(tmp_path / "x.parquet", id=["a", "b"], image=[encode(noise(0)), None])
        with pytest.raises(DataError, match="1 of 2 images .*\n  b: its row holds no image"):
            open_images(path)

    @pytest.mark.parametrize("content", [b"", b"PAR1 nonsense PAR1"])
    def test_damaged_file(self, tmp_path: Path, content: bytes) -> None:
        with pytest.raises(DataError, match="no readable table"):
            open_images(write(tmp_path / "x.parquet", content))

    def test_damaged_page(self, tmp_path: Path) -> None:
        path = tmp_path / "x.parquet"
        table = pa.table({"id": list(range(80)), "image": [encode(noise(row, 16, 16)) for row in range(80)]})
        pq.write_table(table, path, compression="NONE", use_dictionary=False, data_page_size=4000, write_batch_size=8)
        content = bytearray(path.read_bytes())
        start = content.index(encode(noise(56, 16, 16))) - 40
        content[start : start + 36] = b"\xff" * 36  # the header of the page that starts with row 56
        path.write_bytes(bytes(content))
        with pytest.raises(DataError, match="images of .* cannot be used") as caught:
            open_images(path)
        first, *rest = str(caught.value).splitlines()[1:-2]
        assert "OSError" in first
        assert len(rest) == 4
        assert all(line.endswith("a page of its row group cannot be read") for line in rest)

    def test_repeated_ids(self, tmp_path: Path) -> None:
        path = write_table(tmp_path / "x.parquet", id=["a", "b", "a"], image=image_column(3))
        with pytest.raises(DataError, match="Ids must be unique; 1 are repeated in .*: a"):
            open_images(path)

    @pytest.mark.parametrize("ids", [["a", ""], ["a", "b\nc"], ["a", None]])
    def test_ids_that_are_no_text_on_one_line(self, tmp_path: Path, ids: list[Any]) -> None:
        path = write_table(tmp_path / "x.parquet", id=ids, image=image_column(2))
        with pytest.raises(
            DataError, match="Ids must be whole numbers or non-empty printable text on one line; .* 1 oth"
        ):
            open_images(path)

    def test_class_without_a_name(self, tmp_path: Path) -> None:
        features = {"label": {"_type": "ClassLabel", "names": ["cat"]}}
        with pytest.raises(DataError, match="no readable table .*IndexError"):
            open_images(write_table(tmp_path / "x.parquet", features, image=image_column(1), label=[4]))


class TestSaveToDisk:
    @pytest.fixture
    def saved(self) -> Any:
        datasets = pytest.importorskip("datasets")
        datasets.disable_progress_bars()
        images = [Image.fromarray(noise(k)) for k in range(3)]
        features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])}
        return datasets.Dataset.from_dict({"image": images, "label": [0, 1, 1]}, datasets.Features(features))

    def test_dataset(self, tmp_path: Path, saved: Any) -> None:
        saved.select([2, 0]).save_to_disk(tmp_path / "x", num_shards=2)
        opened = open_images(tmp_path / "x")
        assert opened.ids == ("row-0000000", "row-0000001")
        assert opened.labels == ("dog", "cat")
        np.testing.assert_array_equal(opened.pixels([0, 1]), np.stack([unit(noise(2)), unit(noise(0))]))

    def test_same_as_the_dataset_in_memory(self, tmp_path: Path, saved: Any) -> None:
        saved.save_to_disk(tmp_path / "x")
        saved.to_parquet(tmp_path / "x.parquet")
        opened, table = open_images(tmp_path / "x"), open_images(tmp_path / "x.parquet")
        memory = ImageData.from_dataset(saved)
        assert opened.fingerprint == memory.fingerprint == table.fingerprint
        assert opened.labels == memory.labels == table.labels == ("cat", "dog", "dog")

    def test_split_named_train_is_taken(self, tmp_path: Path, saved: Any) -> None:
        datasets = pytest.importorskip("datasets")
        datasets.DatasetDict({"test": saved.select([0]), "train": saved}).save_to_disk(tmp_path / "x")
        datasets.DatasetDict({"all": saved}).save_to_disk(tmp_path / "y")
        assert len(open_images(tmp_path / "x")) == len(open_images(tmp_path / "y")) == 3

    def test_several_splits(self, tmp_path: Path) -> None:
        write(tmp_path / "dataset_dict.json", b'{"splits": ["old", "new"]}')
        with pytest.raises(
            DataError, match="several splits and none is named train: old, new. Give one of its folders"
        ):
            open_images(tmp_path)

    def test_mapping_of_rows_is_refused(self, tmp_path: Path) -> None:
        write(tmp_path / "dataset_info.json", b"{}")
        write(tmp_path / "state.json", b'{"_data_files": [], "_indices_data_files": [{"filename": "x"}]}')
        with pytest.raises(DataError, match="was saved with a mapping of rows"):
            open_images(tmp_path)

    def test_missing_part(self, tmp_path: Path) -> None:
        write(tmp_path / "dataset_info.json", b"{}")
        write(tmp_path / "state.json", b'{"_data_files": [{"filename": "gone.arrow"}]}')
        with pytest.raises(DataError, match="no readable table .*gone.arrow"):
            open_images(tmp_path)


class TestSafetensors:
    def test_values_ids_and_bytes_are_kept(self, tmp_path: Path) -> None:
        pixels = np.random.default_rng(0).uniform(-1, 1, (3, 1, 4, 5)).astype(np.float32)
        save_arrays(tmp_path / "x.safetensors", pixels, ["a", "ä", "c"], ["l", "m", "n"])
        save_arrays(tmp_path / "y.safetensors", pixels, ["a", "ä", "c"], ["l", "m", "n"])
        assert (tmp_path / "x.safetensors").read_bytes() == (tmp_path / "y.safetensors").read_bytes()
        opened = open_images(tmp_path / "x.safetensors")
        assert (opened.ids, opened.labels) == (("a", "ä", "c"), ("l", "m", "n"))
        np.testing.assert_array_equal(opened.pixels([0, 1, 2]), pixels)
        assert opened.fingerprint == ImageData.from_arrays(pixels, ["a", "ä", "c"]).fingerprint

    def test_without_labels(self, tmp_path: Path) -> None:
        save_arrays(tmp_path / "x.safetensors", np.zeros((1, 3, 2, 2), np.float32), [7])
        opened = open_images(tmp_path / "x.safetensors", DataSettings(resolution=2))
        assert (opened.ids, opened.labels) == (("7",), None)

    def test_suffix(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="must end in .safetensors"):
            save_arrays(tmp_path / "x.bin", np.zeros((1, 3, 2, 2), np.float32), ["a"])

    @pytest.mark.parametrize("settings", [DataSettings(resolution=4), DataSettings(grey=True)])
    def test_settings_that_would_change_values(self, tmp_path: Path, settings: DataSettings) -> None:
        save_arrays(tmp_path / "x.safetensors", np.zeros((1, 3, 2, 2), np.float32), ["a"])
        with pytest.raises(DataError, match="float images of 3 x 2 x 2, which are kept exactly"):
            open_images(tmp_path / "x.safetensors", settings)

    def test_damaged_or_foreign_file(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="no readable file of images"):
            open_images(write(tmp_path / "x.safetensors", b"nonsense"))
        save_file({"images": np.zeros((1, 3, 2, 2), np.float32)}, tmp_path / "y.safetensors")
        with pytest.raises(
            DataError, match=r"no readable file of images .*KeyError.*written by whence\.data\.save_array"
        ):
            open_images(tmp_path / "y.safetensors")

    def test_newer_format(self, tmp_path: Path) -> None:
        entry = {"whence": json.dumps({"format_version": 99, "ids": ["a"], "labels": None})}
        save_file({"images": np.zeros((1, 3, 2, 2), np.float32)}, tmp_path / "x.safetensors", metadata=entry)
        with pytest.raises(DataError, match="format version 99; this version of whence reads 1"):
            open_images(tmp_path / "x.safetensors")


@pytest.mark.parametrize("name", ["demo", "demo-queries"])
def test_demo(name: str) -> None:
    opened = open_images(name)
    assert len(opened) > 0
    assert opened.source == name
    assert opened.labels is not None
    assert not opened.ids[0].startswith("row-")


def test_missing_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(_sources._DEMO_FILES, "demo", "gone.parquet")
    with pytest.raises(DataError, match=r"demo is no readable table .*gone\.parquet"):
        open_images("demo")


# ---- arrays and data sets in memory


class TestFromArrays:
    def test_values_are_kept_exactly(self) -> None:
        pixels = np.random.default_rng(0).uniform(-1, 1, (4, 3, 5, 2)).astype(np.float32)
        opened = ImageData.from_arrays(pixels, range(4), labels=[1, 2, 1, None], captions="abcd")
        np.testing.assert_array_equal(opened.pixels(np.array([3, 0])), pixels[[3, 0]])
        assert opened.ids == ("0", "1", "2", "3")
        assert opened.labels == ("1", "2", "1", "")
        assert opened.captions == ("a", "b", "c", "d")
        assert opened.source == "memory"
        before = pixels.copy()
        pixels[:] = 0
        np.testing.assert_array_equal(opened.pixels(range(4)), before)

    def test_half_precision_slightly_outside(self) -> None:
        opened = ImageData.from_arrays(np.full((1, 1, 2, 2), 1.0005), ["a"])
        np.testing.assert_array_equal(opened.pixels([0]), np.full((1, 1, 2, 2), 1.0005, np.float32))

    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
    def test_not_finite(self, value: float) -> None:
        pixels = np.zeros((3, 1, 2, 2), np.float32)
        pixels[1, 0, 1, 1] = value
        with pytest.raises(DataError, match="1 of 3 images of memory cannot be used:\n  b: NaN or infinite values"):
            ImageData.from_arrays(pixels, ["a", "b", "c"])

    def test_out_of_range(self) -> None:
        with pytest.raises(DataError, match=r"a: values from 0 to 1\.5, outside \[-1, 1\]"):
            ImageData.from_arrays(np.array([0, 1.5]).reshape(1, 1, 1, 2), ["a"])

    @pytest.mark.parametrize("shape", [(2, 3, 4), (1, 2, 4, 4), (0, 3, 4, 4), (1, 4, 4, 3)])
    def test_shape(self, shape: tuple[int, ...]) -> None:
        with pytest.raises(DataError, match="must be row, channel, height, width with one or three channels"):
            ImageData.from_arrays(np.zeros(shape, np.float32), ["a"])

    def test_bytes(self) -> None:
        with pytest.raises(DataError, match=r"pixels of uint8; they must be floats in \[-1, 1\]"):
            ImageData.from_arrays(np.zeros((1, 3, 2, 2), np.uint8), ["a"])

    @pytest.mark.parametrize("name", ["ids", "labels", "captions"])
    def test_count(self, name: str) -> None:
        columns: Any = {"ids": ["a", "b"], name: ["a", "b", "c"]}
        with pytest.raises(DataError, match=f"memory has 2 images and 3 {name}; give one for each"):
            ImageData.from_arrays(np.zeros((2, 1, 2, 2), np.float32), **columns)

    @pytest.mark.parametrize(("ids", "found"), [(["a", 1.5], "1.5"), (["a", True], "True"), (["a", "\ud800"], "ud800")])
    def test_ids_of_other_types(self, ids: list[Any], found: str) -> None:
        with pytest.raises(DataError, match=f"Ids must be whole numbers or .*{found}"):
            ImageData.from_arrays(np.zeros((2, 1, 2, 2), np.float32), ids)

    def test_repeated_ids(self) -> None:
        with pytest.raises(DataError, match="Ids must be unique; 1 are repeated in memory: 1"):
            ImageData.from_arrays(np.zeros((2, 1, 2, 2), np.float32), [1, "1"])


class TestFromDataset:
    def test_dicts(self) -> None:
        items = [{"img": Image.fromarray(noise(k)), "id": 10 + k, "label": k, "text": f"t{k}"} for k in range(2)]
        opened = ImageData.from_dataset(Sized(items))
        assert (opened.ids, opened.labels, opened.captions) == (("10", "11"), ("0", "1"), ("t0", "t1"))
        np.testing.assert_array_equal(opened.pixels([1])[0], unit(noise(1)))
        assert opened.source == "Sized"

    def test_named_keys(self) -> None:
        item = {"x": noise(0), "y": torch.tensor(4), "name": "n", "image": None}
        settings = DataSettings(image_column="x", label_column="y", id_column="name")
        opened = ImageData.from_dataset([item], settings=settings)
        assert (opened.ids, opened.labels) == (("n",), ("4",))

    def test_tuples_with_names_of_classes(self) -> None:
        items = Sized([(torch.from_numpy(np.moveaxis(noise(k), -1, 0).copy()), torch.tensor(k)) for k in range(2)])
        items.classes = ["cat", "dog"]
        opened = ImageData.from_dataset(items)
        assert (opened.ids, opened.labels) == (("row-0000000", "row-0000001"), ("cat", "dog"))
        np.testing.assert_array_equal(opened.pixels([1])[0], unit(noise(1)))

    def test_tuples_with_something_else(self) -> None:
        assert ImageData.from_dataset([(noise(0), {"boxes": []}), (noise(1),)]).labels is None

    def test_torch_dataset_of_floats(self) -> None:
        images = torch.rand(3, 1, 5, 5, generator=torch.Generator().manual_seed(0))
        opened = ImageData.from_dataset(torch.utils.data.TensorDataset(images), value_range=(0, 1), ids=["a", "b", "c"])
        assert opened.channels == 1
        assert opened.ids == ("a", "b", "c")
        np.testing.assert_array_equal(opened.pixels(range(3)), (images * 2 - 1).numpy())

    def test_bfloat16_and_float64(self) -> None:
        image = torch.linspace(-1, 1, 48).reshape(3, 4, 4)
        for tensor in [image.bfloat16(), image.double().requires_grad_()]:
            opened = ImageData.from_dataset([tensor], value_range=(-1, 1))
            np.testing.assert_array_equal(opened.pixels([0])[0], tensor.detach().float().numpy())

    def test_channels_last_and_no_channels(self) -> None:
        opened = ImageData.from_dataset([noise(0)])
        np.testing.assert_array_equal(opened.pixels([0])[0], unit(noise(0)))
        assert ImageData.from_dataset([noise(0, 3, 4, channels=1)]).height == 3
        opened = ImageData.from_dataset([noise(0, channels=1)])
        assert opened.channels == 1
        np.testing.assert_array_equal(opened.pixels([0])[0], unit(noise(0, channels=1)))

    def test_alpha_of_arrays(self) -> None:
        opened = ImageData.from_dataset([np.dstack([noise(0), np.zeros((6, 6), np.uint8)])])
        assert opened.conversions == {"alpha laid over white": 1}
        np.testing.assert_array_equal(opened.pixels([0]), np.ones((1, 3, 6, 6), np.float32))

    def test_floats_are_resized_without_rounding_to_8_bit(self) -> None:
        step = np.concatenate([np.full((1, 8, 4), -1.0), np.full((1, 8, 4), 1.0)], axis=2)
        flat = np.full((1, 8, 8), 0.123456)
        opened = ImageData.from_dataset([step, flat], value_range=(-1, 1), settings=DataSettings(resolution=16))
        pixels = opened.pixels([0, 1])
        assert pixels.min() == -1 and pixels.max() == 1
        np.testing.assert_allclose(pixels[1], 0.123456, rtol=0, atol=1e-6)  # float32 sums in the filter
        assert opened.conversions == {"resized": 2}

    def test_floats_to_grey_and_square(self) -> None:
        image = np.stack([np.full((4, 6), value) for value in (1.0, 0.0, 0.0)])
        image[:, :, 0] = 1
        settings = DataSettings(resolution=4, center_crop=True, grey=True)
        opened = ImageData.from_dataset([torch.tensor(image)], value_range=(0, 1), settings=settings)
        np.testing.assert_allclose(opened.pixels([0]), np.full((1, 1, 4, 4), 2 * 0.299 - 1), atol=1e-6)  # float32
        assert opened.conversions == {"colour converted to grey": 1, "cut to the middle square": 1}

    def test_floats_without_range(self) -> None:
        with pytest.raises(
            DataError, match=r"row-0000000: floats, and their range is not known; say value_range=\(0, 1"
        ):
            ImageData.from_dataset([torch.zeros(3, 4, 4)])

    def test_floats_outside_their_range(self) -> None:
        with pytest.raises(DataError, match=r"values from -1 to -1, outside \[0, 1\]"):
            ImageData.from_dataset([-torch.ones(3, 4, 4)], value_range=(0, 1))

    def test_other_range(self) -> None:
        with pytest.raises(DataError, match=r"value_range must be \(0, 1\) or \(-1, 1\); got \(0, 255\)"):
            ImageData.from_dataset([torch.zeros(3, 4, 4)], value_range=(0, 255))

    def test_range_without_effect(self) -> None:
        with pytest.warns(UserWarning, match=r"value_range=\(0, 1\) has no effect: list holds no floats"):
            ImageData.from_dataset([noise(0)], value_range=(0, 1))

    @pytest.mark.parametrize(
        ("item", "reason"),
        [
            (np.zeros((4, 4), np.int64), "an array of int64; an image is uint8"),
            (np.zeros((9, 9, 9), np.uint8), "neither its first nor its last axis has 1 to 4 channels"),
            (np.zeros((3, 5, 3), np.uint8), "whose first or last axis may be the channels"),
            (np.zeros((2, 3, 9, 9), np.uint8), r"an array of shape \(2, 3, 9, 9\); an image is channel, height"),
            (np.zeros((3, 0, 9), np.uint8), r"an array of shape \(3, 0, 9\)"),
            (np.zeros((4, 9, 9)), "floats with 4 channels"),
            (np.full((3, 9, 9), np.nan), "NaN or infinite values"),
            (Image.new("RGB", (0, 5)), "0 x 5 pixels, an image without content"),
            (Image.new("F", (5, 5)), "32 bit floats of unknown range"),
            (
                Image.fromarray(np.full((2, 2), 70000, np.int32)),
                r"32 bit values from 70000 to 70000, outside the 0\.\.65",
            ),
            ("a/path.png", "a value of type str where an image was expected"),
            (None, "a value of type NoneType"),
        ],
    )
    def test_unusable_item(self, item: Any, reason: str) -> None:
        with pytest.raises(DataError, match=f"1 of 2 images of list cannot be used:\n  row-0000001: .*{reason}"):
            ImageData.from_dataset([np.zeros((9, 9), np.float32), item], value_range=(0, 1))

    def test_tensor_with_unclear_axes_has_channels_first(self) -> None:
        image = noise(0, 3, 5)
        opened = ImageData.from_dataset([torch.from_numpy(np.moveaxis(image, -1, 0).copy())])
        assert (opened.height, opened.width) == (3, 5)

    def test_no_key_of_an_image(self) -> None:
        with pytest.raises(DataError, match=r"must have an image under one of the keys image, .*found picture, label"):
            ImageData.from_dataset([{"picture": noise(0), "label": 1}])

    def test_unknown_key(self) -> None:
        with pytest.raises(DataError, match=r"label_column=kind .*no such column\. Columns that can be used: image"):
            ImageData.from_dataset([{"image": noise(0)}], settings=DataSettings(label_column="kind"))

    def test_key_without_items_that_have_keys(self) -> None:
        with pytest.warns(UserWarning, match="list has no columns, .*image_column"):
            ImageData.from_dataset([noise(0)], settings=DataSettings(image_column="x"))

    def test_missing_key_later(self) -> None:
        with pytest.raises(DataError, match="row-0000001: KeyError: 'image'"):
            ImageData.from_dataset([{"image": noise(0)}, {}])

    def test_bad_id_in_an_item(self) -> None:
        with pytest.raises(
            DataError, match="Ids must be whole numbers or non-empty printable text on one line; its item"
        ):
            ImageData.from_dataset([{"image": noise(0), "id": ""}])

    def test_first_item_cannot_be_read(self) -> None:
        class Broken(Sized):
            def __getitem__(self, k: int) -> Any:
                raise OSError("disk on fire")

        with pytest.raises(DataError, match="Item 0 of Broken cannot be read: OSError: disk on fire"):
            ImageData.from_dataset(Broken([1]))

    def test_later_item_cannot_be_read(self) -> None:
        class Broken(Sized):
            def __getitem__(self, k: int) -> Any:
                if k == 2:
                    raise RuntimeError("lost\nfor good")
                return noise(k)

        with pytest.raises(DataError, match="1 of 3 images of Broken .*:\n  row-0000002: RuntimeError: lost for good"):
            ImageData.from_dataset(Broken([1, 2, 3]))

    def test_random_transform(self) -> None:
        class Random(Sized):
            draws = 0

            def __getitem__(self, k: int) -> Any:
                self.draws += 1
                return noise(self.draws)

        with pytest.raises(DataError, match="Item 0 of Random differs from one reading to the next"):
            ImageData.from_dataset(Random([1, 2]))

    def test_empty(self) -> None:
        with pytest.raises(DataError, match="list holds no images"):
            ImageData.from_dataset([])

    def test_stream(self) -> None:
        with pytest.raises(DataError, match="generator has no length. whence needs a map-style data set"):
            ImageData.from_dataset(iter_items for iter_items in [noise(0)])

    def test_count_of_ids(self) -> None:
        with pytest.raises(DataError, match="list has 1 images and 2 ids"):
            ImageData.from_dataset([noise(0)], ids=["a", "b"])

    def test_repeated_ids(self) -> None:
        with pytest.raises(DataError, match="Ids must be unique; 1 are repeated in list: a"):
            ImageData.from_dataset([{"image": noise(k), "id": "a"} for k in range(2)])

    def test_mixed_types_and_channels(self) -> None:
        with pytest.raises(
            DataError, match=r"has 2 kinds in 1 sizes .*1 channels, uint8; row-0000001 .*float32.*alike"
        ):
            ImageData.from_dataset([noise(0, channels=1), torch.zeros(1, 6, 6)], value_range=(0, 1))


# ---- conversions


@dataclass
class Case:
    image: Image.Image | bytes
    conversions: list[str]
    expected: Any
    """Bytes of the first pixel in RGB."""
    expected_grey: int | None = None


def palette_with_transparency() -> bytes:
    image = Image.new("P", (2, 2), 1)
    image.putpalette([255, 0, 0, 0, 255, 0])
    return encode(image, transparency=1)


def png_of_16_bit(color_type: int, sample: bytes) -> bytes:
    """One pixel of 16 bit samples, which Pillow itself cannot write in colour."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 1, 1, 16, color_type, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" + sample)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def grey_16(value: int, **options: Any) -> bytes:
    return encode(Image.fromarray(np.full((2, 2), value, np.uint16)), **options)


GREY, ALPHA, DEEP = "grey repeated in three channels", "alpha laid over white", "16 bit scaled to 8 bit"
CASES = {
    "rgb": Case(Image.new("RGB", (2, 2), (10, 20, 30)), [], (10, 20, 30)),
    "half transparent": Case(Image.new("RGBA", (2, 2), (0, 0, 0, 128)), [ALPHA], (127, 127, 127)),
    "opaque": Case(Image.new("RGBA", (2, 2), (10, 20, 30, 255)), [], (10, 20, 30)),
    "grey and alpha": Case(Image.new("LA", (2, 2), (0, 0)), [ALPHA, GREY], (255, 255, 255), 255),
    "palette": Case(encode(Image.new("RGB", (2, 2), (9, 8, 7)).quantize(2)), [], (9, 8, 7)),
    "palette with transparency": Case(palette_with_transparency(), [ALPHA], (255, 255, 255)),
    "transparent colour": Case(encode(Image.new("RGB", (2, 2)), transparency=(0, 0, 0)), [ALPHA], (255, 255, 255)),
    "transparent grey": Case(encode(Image.new("L", (2, 2), 7), transparency=7), [ALPHA, GREY], (255, 255, 255), 255),
    "cmyk": Case(encode(Image.new("CMYK", (2, 2), (0, 0, 0, 255)), "TIFF"), ["CMYK converted to RGB"], (0, 0, 0)),
    "grey": Case(Image.new("L", (2, 2), 77), [GREY], (77, 77, 77), 77),
    "one bit": Case(Image.new("1", (2, 2), 1), [GREY], (255, 255, 255), 255),
    "16 bit": Case(grey_16(257 * 100 + 128), [DEEP, GREY], (100, 100, 100), 100),
    "16 bit, rounded up": Case(grey_16(257 * 100 + 129), [DEEP, GREY], (101, 101, 101), 101),
    "16 bit white": Case(grey_16(65535), [DEEP, GREY], (255, 255, 255), 255),
    "16 bit tiff": Case(
        encode(Image.fromarray(np.full((2, 2), 65535, np.uint16)), "TIFF"), [DEEP, GREY], (255, 255, 255), 255
    ),
    "16 bit with transparency": Case(grey_16(9, transparency=9), [DEEP, ALPHA, GREY], (255, 255, 255), 255),
    "32 bit integers": Case(
        encode(Image.fromarray(np.full((2, 2), 257 * 5, np.int32)), "TIFF"), [DEEP, GREY], (5, 5, 5), 5
    ),
    "16 bit colour": Case(png_of_16_bit(2, b"\x01\x01\x02\x02\xff\xff"), [DEEP], (1, 2, 255)),
    "16 bit colour and alpha": Case(png_of_16_bit(6, bytes(8)), [DEEP, ALPHA], (255, 255, 255)),
    "animation": Case(
        encode(
            Image.new("RGB", (2, 2), "red"), "GIF", save_all=True, append_images=[Image.new("RGB", (2, 2), "blue")]
        ),
        ["first frame of an animation"],
        (255, 0, 0),
    ),
    "animated webp": Case(
        encode(
            Image.new("RGB", (2, 2), "white"), "WEBP", save_all=True, append_images=[Image.new("RGB", (2, 2))],
            lossless=True,
        ),
        ["first frame of an animation"],
        (255, 255, 255),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_conversion_to_rgb(tmp_path: Path, name: str) -> None:
    case = CASES[name]
    opened = one(tmp_path, case.image)
    assert [channel[0][0] for channel in bytes_of(opened)] == list(case.expected)
    assert opened.conversions == dict.fromkeys(sorted(case.conversions), 1)
    assert Image.open(BytesIO(opened.picture(0))).getpixel((0, 0)) == case.expected


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.expected_grey is not None])
def test_grey_stays_one_channel(tmp_path: Path, name: str) -> None:
    case = CASES[name]
    opened = one(tmp_path, case.image, DataSettings(grey=True))
    assert bytes_of(opened)[0][0][0] == case.expected_grey
    assert opened.channels == 1
    assert opened.conversions == dict.fromkeys(sorted(set(case.conversions) - {GREY}), 1)


def test_colour_to_grey(tmp_path: Path) -> None:
    opened = one(tmp_path, Image.new("RGB", (2, 2), (255, 0, 0)), DataSettings(grey=True))
    assert bytes_of(opened) == [[[76, 76], [76, 76]]]  # 0.299 * 255
    assert opened.conversions == {"colour converted to grey": 1}


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_exif_orientation(tmp_path: Path, kind: str) -> None:
    image = Image.new("L", (16, 8))
    image.paste(255, (0, 0, 8, 8))  # left half white
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: a quarter clockwise makes it upright
    opened = one(tmp_path, encode(image.convert("RGB"), kind, exif=exif))
    assert (opened.height, opened.width) == (16, 8)
    pixels = opened.pixels([0])[0]
    assert pixels[:, :7].min() > 0.9 and pixels[:, 9:].max() < -0.9
    assert opened.conversions == {"rotated by its EXIF orientation": 1}
    assert Image.open(BytesIO(opened.picture(0))).size == (8, 16)


def test_squeeze_and_cut(tmp_path: Path) -> None:
    image = np.zeros((8, 16, 3), np.uint8)
    image[:, 4:12] = 255
    squeezed = one(tmp_path, image, DataSettings(resolution=8))
    assert np.asarray(bytes_of(squeezed))[0, 0].tolist()[3:5] == [255, 255]
    assert bytes_of(squeezed)[0][0][0] < 10
    assert squeezed.conversions == {"resized": 1}
    cut = one(tmp_path, image, DataSettings(resolution=8, center_crop=True))
    np.testing.assert_array_equal(cut.pixels([0]), np.ones((1, 3, 8, 8), np.float32))
    assert cut.conversions == {"cut to the middle square": 1}
    both = one(tmp_path, image, DataSettings(resolution=4, center_crop=True))
    assert both.conversions == {"cut to the middle square": 1, "resized": 1}
    assert both.pixels([0]).shape == (1, 3, 4, 4)


def test_image_of_the_right_size_is_not_touched(tmp_path: Path) -> None:
    opened = one(tmp_path, noise(3), DataSettings(resolution=6, center_crop=True))
    np.testing.assert_array_equal(opened.pixels([0])[0], unit(noise(3)))
    assert opened.conversions == {}


def test_conversions_count_images(tmp_path: Path) -> None:
    for k in range(3):
        write(tmp_path / f"{k}.png", Image.new("L", (4 + k, 4)))
    opened = open_images(tmp_path, DataSettings(resolution=4))
    assert opened.conversions == {GREY: 3, "resized": 2}
    assert opened.select([0, 1]).conversions == {GREY: 2, "resized": 1}


def test_settings_are_checked(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="center_crop has no effect without a resolution"):
        one(tmp_path, noise(0), DataSettings(center_crop=True))
    with pytest.raises(ConfigError, match="resolution must be at least 1 pixel; got 0"):
        one(tmp_path, noise(0), DataSettings(resolution=0))
    settings = DataSettings()
    for name, value in {"resolution": "x", "grey": "no", "max_megapixels": None}.items():
        object.__setattr__(settings, name, value)  # the type checks of tests are not on in use
    with pytest.raises(ConfigError, match=r"resolution must be .* or None; got 'x'; grey must .*; max_megapixels must"):
        one(tmp_path, noise(0), settings)


# ---- images that cannot be used


def test_two_sizes(tmp_path: Path) -> None:
    for k, size in enumerate([(4, 4), (4, 4), (6, 4), (5, 5)]):
        write(tmp_path / f"{k}.png", Image.new("RGB", size))
    found = r"has 3 kinds in 3 sizes.*: 0\.png has 4 x 4 pixels.*; 2\.png has 6 x 4 pixels.*\(--resolution\)"
    with pytest.raises(DataError, match=found):
        open_images(tmp_path)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"])
def test_truncated_file(tmp_path: Path, kind: str) -> None:
    encoded = encode(noise(0, 64, 64), kind)
    with pytest.raises(DataError, match=r"1 of 1 images of .*:\n  one\.png: "):
        one(tmp_path, encoded[: len(encoded) // 2])


def test_all_bad_files_are_counted_and_five_named(tmp_path: Path) -> None:
    write(tmp_path / "good.png", noise(0))
    for k in range(7):
        write(tmp_path / f"bad{k}.png", b"text")
    with pytest.raises(DataError, match="7 of 8 images") as caught:
        open_images(tmp_path)
    lines = str(caught.value).splitlines()
    assert lines[1] == "  bad0.png: 4 bytes that are no image in PNG, JPEG, WebP, BMP, GIF or TIFF"
    assert lines[6] == "  and 2 more"
    assert len(lines) == 8


def test_unreadable_file(tmp_path: Path) -> None:
    (tmp_path / "gone.png").symlink_to(tmp_path / "nothing")
    with pytest.raises(DataError, match=r"gone\.png: FileNotFoundError"):
        open_images(tmp_path)


def huge_header(side: int) -> bytes:
    encoded = bytearray(encode(Image.new("L", (1, 1))))
    encoded[16:24] = struct.pack(">II", side, side)
    encoded[29:33] = struct.pack(">I", zlib.crc32(encoded[12:29]))
    return bytes(encoded)


@pytest.mark.parametrize("side", [10_001, 20_000])  # Pillow's own limits warn at the first and raise at the second
def test_huge_header(tmp_path: Path, side: int) -> None:
    limit = Image.MAX_IMAGE_PIXELS
    with pytest.raises(
        DataError, match=rf"one\.png: {side} x {side} pixels, .* megapixels, where max_megapixels is 100"
    ):
        one(tmp_path, huge_header(side))
    assert limit == Image.MAX_IMAGE_PIXELS


def test_limit_is_a_setting_and_replaces_that_of_pillow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    assert len(one(tmp_path, noise(0))) == 1
    with pytest.raises(DataError, match="6 x 6 pixels, 3.6e-05 megapixels, where max_megapixels is 1e-05"):
        one(tmp_path, noise(0), DataSettings(max_megapixels=1e-5))


def test_other_formats_are_refused_whatever_the_suffix(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="bytes that are no image in PNG"):
        one(tmp_path, b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n")


# ---- what a data set can do


@pytest.fixture
def small() -> ImageData:
    return ImageData.from_dataset(
        [noise(k) for k in range(4)], ids=["a", "b", "c", "d"]
    )  # fmt: skip


class TestFingerprint:
    def test_same_content_from_anywhere(self, tmp_path: Path, small: ImageData) -> None:
        for k, name in enumerate(small.ids):
            write(tmp_path / "x" / f"{name}.png", noise(k))
        write_table(tmp_path / "x.parquet", id=[f"{name}.png" for name in small.ids], image=image_column(4))
        folder, table = open_images(tmp_path / "x"), open_images(tmp_path / "x.parquet")
        floats = ImageData.from_arrays(folder.pixels(range(4)), folder.ids)
        assert folder.fingerprint == table.fingerprint == floats.fingerprint
        assert re.fullmatch("[0-9a-f]{64}", folder.fingerprint)

    def test_worked_by_hand(self) -> None:
        opened = ImageData.from_arrays(np.ones((2, 1, 1, 1), np.float32), ["a", "b"])
        pixels = sha256(b"(1, 1, 1)" + struct.pack("<f", 1)).hexdigest()
        assert opened.fingerprint == sha256(f"a\n{pixels}\nb\n{pixels}\n".encode()).hexdigest()

    def test_changes_with_order_id_pixel_and_resolution(self, tmp_path: Path, small: ImageData) -> None:
        items = [noise(k) for k in range(4)]
        changed = [*items[:3], items[3] ^ np.eye(6, dtype=np.uint8)[:, :, None]]
        settings = DataSettings(resolution=5)
        found = {
            small.fingerprint,
            small.select([1, 0, 2, 3]).fingerprint,
            small.select([0, 1, 2]).fingerprint,
            ImageData.from_dataset(items, ids=["a", "b", "c", "e"]).fingerprint,
            ImageData.from_dataset(changed, ids=small.ids).fingerprint,
            ImageData.from_dataset(items, ids=small.ids, settings=settings).fingerprint,
        }
        assert len(found) == 6
        assert ImageData.from_dataset(items, ids=small.ids).fingerprint == small.fingerprint


class TestRows:
    def test_in_the_order_given(self, small: ImageData) -> None:
        assert small.rows(["d", "a", "d"]) == [3, 0, 3]
        assert small.rows([]) == []

    def test_unknown_ids(self, small: ImageData) -> None:
        found = r"6 of 7 ids are not in list: 0, 1, 2, 3, 4, …\. Its 4 ids are .*: a, b, c, …"
        with pytest.raises(DataError, match=found):
            small.rows(["0", "1", "2", "a", "3", "4", "5"])

    @pytest.mark.parametrize("rows", [[4], [-1], [True, False], [0.5], [[0]]])
    def test_bad_rows(self, small: ImageData, rows: Any) -> None:
        with pytest.raises(DataError, match=r"rows must be a list of whole numbers in 0\.\.3; got"):
            small.pixels(np.array(rows))

    def test_rows_of_numpy(self, small: ImageData) -> None:
        rows = np.argsort([3, 2, 1, 0])
        np.testing.assert_array_equal(small.pixels(list(rows)), small.pixels(rows))
        assert small.picture(rows[0]) == small.picture(3)

    def test_no_rows(self, small: ImageData) -> None:
        assert small.pixels([]).shape == (0, 3, 6, 6)
        with pytest.raises(DataError, match="A selection from list must have at least one row; found none"):
            small.select([])


class TestSelectAndConcatenate:
    def test_there_and_back(self, small: ImageData) -> None:
        joined = concatenate([small.select([2, 3]), small.select(np.array([0, 1]))])
        assert joined.ids == ("c", "d", "a", "b")
        assert joined.labels is None
        np.testing.assert_array_equal(joined.pixels([2, 0]), small.pixels([0, 2]))
        assert joined.select(joined.rows(small.ids)).fingerprint == small.fingerprint

    def test_labels_and_captions(self) -> None:
        zeros = np.zeros((2, 1, 2, 2), np.float32)
        first = ImageData.from_arrays(zeros, ["a", "b"], labels=["x", "y"], captions=["s", "t"], source="first")
        second = ImageData.from_arrays(zeros, ["c", "d"], labels=["z", "z"], source="second")
        joined = concatenate([first, second])
        assert joined.labels == ("x", "y", "z", "z")
        assert joined.captions == ("s", "t", "", "")
        assert joined.source == "first + second"
        assert joined.select([3, 0]).labels == ("z", "x")
        assert joined.select([1]).captions == ("t",)

    def test_repeated_ids(self, small: ImageData) -> None:
        with pytest.raises(DataError, match=r"Ids must be unique; 1 are repeated in list \+ list: a"):
            concatenate([small, small.select([0])])
        with pytest.raises(DataError, match="Ids must be unique; 1 are repeated in list: b. Give each row once"):
            small.select([1, 1])

    def test_single_files_of_one_name(self, tmp_path: Path) -> None:
        parts = [open_images(write(tmp_path / folder / "i0.png", noise(0))) for folder in "AQ"]
        with pytest.raises(DataError, match=r"repeated in .*: i0\.png\. .*give the one folder that holds them all"):
            concatenate(parts)
        assert open_images(tmp_path).ids == ("A/i0.png", "Q/i0.png")

    def test_sizes(self, small: ImageData) -> None:
        other = ImageData.from_arrays(np.zeros((1, 1, 6, 6)), ["x"])
        with pytest.raises(DataError, match="found 3 x 6 x 6 in list; 1 x 6 x 6 in memory"):
            concatenate([small, other])

    def test_nothing(self) -> None:
        with pytest.raises(DataError, match="found nothing to join"):
            concatenate([])


class TestPicture:
    def test_is_the_original_not_the_resized_one(self, tmp_path: Path) -> None:
        opened = one(tmp_path, noise(0, 6, 9), DataSettings(resolution=4, grey=True))
        shown = Image.open(BytesIO(opened.picture(0)))
        assert shown.format == "PNG"
        np.testing.assert_array_equal(np.asarray(shown), noise(0, 6, 9))

    def test_is_at_most_256_pixels(self, tmp_path: Path) -> None:
        opened = one(tmp_path, Image.new("RGB", (512, 128)))
        assert Image.open(BytesIO(opened.picture(0))).size == (256, 64)

    def test_of_floats(self) -> None:
        pixels = unit(noise(0, 3, 3))[None]  # three pixels high and wide: the axes must not be guessed
        shown = Image.open(BytesIO(ImageData.from_arrays(pixels, ["a"]).picture(0)))
        np.testing.assert_array_equal(np.asarray(shown), noise(0, 3, 3))

    def test_of_items(self) -> None:
        items = [noise(0), torch.from_numpy(noise(1)), Image.fromarray(noise(2))]
        opened = ImageData.from_dataset(items, settings=DataSettings(resolution=3))
        for k in range(3):
            np.testing.assert_array_equal(np.asarray(Image.open(BytesIO(opened.picture(k)))), noise(k))
        floats = ImageData.from_dataset([torch.zeros(1, 4, 4)], value_range=(0, 1))
        assert Image.open(BytesIO(floats.picture(0))).getpixel((0, 0)) == (0, 0, 0)

    def test_of_a_lost_file(self, tmp_path: Path) -> None:
        opened = one(tmp_path, noise(0))
        (tmp_path / "one.png").unlink()
        with pytest.raises(DataError, match=r"Image one\.png of .* cannot be read as it was when .*FileNotFoundError"):
            opened.picture(0)
        assert opened.pixels([0]).shape == (1, 3, 6, 6)


class TestOnDemand:
    """Sets too large to be held are decoded again."""

    @pytest.fixture(autouse=True)
    def hold_nothing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(_images, "HELD_BYTES", 100)

    def test_parquet_in_any_order(self, tmp_path: Path) -> None:
        write_table(tmp_path / "a-0.parquet", image=image_column(50), id=list(range(50)))
        write_table(tmp_path / "a-1.parquet", image=image_column(40, 50), id=list(range(50, 90)))
        opened = open_images(tmp_path)
        rows = np.random.default_rng(0).permutation(90)
        expected = np.stack([unit(noise(row)) for row in rows])
        np.testing.assert_array_equal(opened.pixels(rows), expected)
        np.testing.assert_array_equal(opened.select(rows).pixels(range(90)), expected)
        for row in (80, 3, 2, 60):
            np.testing.assert_array_equal(opened.pixels([row])[0], unit(noise(row)))
        copy = pickle.loads(pickle.dumps(opened))
        assert copy.fingerprint == opened.fingerprint
        np.testing.assert_array_equal(copy.pixels(rows), expected)

    def test_one_large_row_group(self, tmp_path: Path) -> None:
        pq.write_table(pa.table({"image": image_column(100)}), tmp_path / "x.parquet")
        opened = open_images(tmp_path / "x.parquet")
        for rows in ([99, 0, 50], [31, 32, 33], [33, 5]):
            np.testing.assert_array_equal(opened.pixels(rows), np.stack([unit(noise(row)) for row in rows]))

    def test_same_as_held(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        for k in range(3):
            write(tmp_path / f"{k}.png", noise(k, 8 + k, 8))
        opened = open_images(tmp_path, DataSettings(resolution=7))
        monkeypatch.setattr(_images, "HELD_BYTES", 1 << 30)
        held = open_images(tmp_path, DataSettings(resolution=7))
        assert opened.fingerprint == held.fingerprint
        np.testing.assert_array_equal(opened.pixels([2, 0, 1]), held.pixels([2, 0, 1]))

    def test_changed_file(self, tmp_path: Path) -> None:
        opened = one(tmp_path, noise(0))
        write(tmp_path / "one.png", noise(1))
        with pytest.raises(
            DataError, match=r"Image one\.png .*its pixels are not those of the first reading.*open it anew"
        ):
            opened.pixels([0])


def test_bar_for_large_sets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(_images, "PROGRESS_FROM", 1)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    ImageData.from_dataset([noise(0), noise(1)])
    assert "reading list" in capsys.readouterr().err
    ImageData.from_dataset([noise(0)])
    assert capsys.readouterr().err == ""


def test_import_brings_no_torch() -> None:
    code = "import sys, whence.data; print([name for name in ('torch', 'datasets', 'pandas') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
