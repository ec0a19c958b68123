"""Gradient rows on disk: round trips, refusals, faults of the disk, several processes, kills.

    python tests/test_store.py fill FOLDER           write all toy blocks, one after the other
    python tests/test_store.py hold FOLDER           claim the first block until the process ends
    python tests/test_store.py kill FOLDER SEED      fill stores in children that are killed

These are what tests run in processes of their own.
"""

import errno
import itertools
import json
import mmap
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch

from whence import _files
from whence.errors import ConfigError, NumericsError, StoreError
from whence.shards import block_name
from whence.store import Store, merge_stores

SPEC = {"checkpoints": {"12": "ab", "24": "cd"}, "projection": {"kind": "two-sided", "seed": 3}}
WIDTH = 4
IDS = tuple(f"img-{k}" for k in range(10))
STEPS = (12, 24)


def content(ids):
    return [sha256(id_.encode()).hexdigest() for id_ in ids]


def make_arrays(ids, step=12, **changes):
    """Rows of a block: the k-th id in the alphabet of ids has k modulo 3 rows; the same wherever they are made."""
    sample = [place for place, id_ in enumerate(ids) for _ in range(int(id_.rsplit("-", 1)[1]) % 3)]
    rng = np.random.default_rng([step, *(int(id_.rsplit("-", 1)[1]) for id_ in ids)])
    rows = rng.normal(size=(len(sample), WIDTH))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    made = {
        "rows": rows.astype(np.float32),
        "norms": rng.uniform(0, 5, len(sample)),
        "sample": np.array(sample, dtype=np.int64),
        "timestep": rng.integers(0, 1000, len(sample), dtype=np.int32),
        "weight.learning_rate": rng.uniform(size=len(sample)),
    }
    return {name: array for name, array in (made | changes).items() if array is not None}


def make_store(folder, *, spec=SPEC, dtype="float16", width=WIDTH):
    return Store.create(folder, spec, width=width, dtype=dtype)


def fill(store, ids=IDS, steps=STEPS, block_size=4):
    for step in steps:
        for block in store.plan_blocks(step, ids, content(ids), block_size):
            with store.claim(step, block) as mine:
                if mine:
                    store.write_shard(step, block, content(block), make_arrays(block, step))
    return store


def tree(folder: Path) -> dict[str, bytes]:
    """All bytes of a store but of what was left behind, and of what remembers checks."""
    files = [f for f in sorted(folder.rglob("*")) if f.is_file() and not f.name.startswith((".", "verified"))]
    return {f.relative_to(folder).as_posix(): f.read_bytes() for f in files}


def change_byte(path: Path, place: int = -3) -> None:
    changed = bytearray(path.read_bytes())
    changed[place] ^= 1
    path.write_bytes(changed)


@pytest.fixture
def store(tmp_path):
    """A store of ten samples at two steps, in blocks of four."""
    return fill(make_store(tmp_path / "store"))


class TestRoundTrip:
    @pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
    def test_arrays_come_back_as_they_were_stored(self, tmp_path, dtype):
        store = make_store(tmp_path, dtype=dtype)
        made = make_arrays(IDS[:5], unit_rows=np.eye(4, 4, dtype=np.float32), unit_norms=np.arange(4.0))
        shard = store.write_shard(12, IDS[:5], content(IDS[:5]), made)
        want = torch.from_numpy(made["rows"]).to(getattr(torch, dtype)).float().numpy()
        np.testing.assert_array_equal(shard.read("rows").astype(np.float32), want)
        assert shard.read("rows").dtype == ("float32" if dtype == "bfloat16" else dtype)
        np.testing.assert_array_equal(shard.read("rows", 1, 3), shard.read("rows")[1:3])
        np.testing.assert_array_equal(shard.read("norms"), made["norms"].astype(np.float32))
        for name, stored in (("sample", np.int32), ("timestep", np.int32), ("weight.learning_rate", np.float64)):
            np.testing.assert_array_equal(shard.read(name), made[name])
            assert shard.read(name).dtype == stored
        np.testing.assert_array_equal(shard.read("unit_rows"), made["unit_rows"])
        assert shard.read("unit_norms").dtype == np.float32 and shard.num_zero_norms == 0
        assert shard.row_counts == (0, 1, 2, 0, 1) and shard.num_rows == 4
        assert shard.row_bytes == WIDTH * (4 if dtype == "float32" else 2)

    def test_what_a_store_holds(self, store):
        opened = Store.open(str(store.folder))
        assert (opened.spec, opened.width, opened.dtype) == (SPEC, WIDTH, "float16")
        assert opened == store and opened.steps == [12, 24]
        blocks = [shard.ids for shard in opened.shards(12)]
        assert sorted(blocks) == [IDS[:4], IDS[4:8], IDS[8:]]
        assert [shard.block for shard in opened.shards(12)] == sorted(map(block_name, blocks))
        assert opened.ids(12) == [id_ for block in blocks for id_ in block]
        assert opened.num_rows(12) == sum(k % 3 for k in range(10)) and opened.num_rows(13) == 0
        assert opened.shards(12)[0].contents == dict(zip(blocks[0], content(blocks[0]), strict=True))
        assert opened.verify() == []

    @pytest.mark.parametrize("dtype", ["float16", "float32"])
    def test_plain_safetensors_opens_a_shard(self, tmp_path, dtype):
        shard = make_store(tmp_path, dtype=dtype).write_shard(12, IDS, content(IDS), make_arrays(IDS))
        found = safetensors.numpy.load_file(shard.path)
        assert set(found) == set(shard.arrays)
        for name in found:
            np.testing.assert_array_equal(found[name], shard.read(name))

    def test_torch_reads_bfloat16(self, tmp_path):
        shard = make_store(tmp_path, dtype="bfloat16").write_shard(12, IDS, content(IDS), make_arrays(IDS))
        found = safetensors.torch.load_file(shard.path)
        assert found["rows"].dtype == torch.bfloat16
        np.testing.assert_array_equal(found["rows"].float().numpy(), shard.read("rows"))
        assert found["weight.learning_rate"].dtype == torch.float64

    def test_a_block_may_have_no_rows(self, tmp_path):
        store = make_store(tmp_path)
        shard = store.write_shard(12, IDS[:1], content(IDS[:1]), make_arrays(IDS[:1]))
        assert shard.num_rows == 0 and shard.read("rows").shape == (0, WIDTH)
        assert safetensors.numpy.load_file(shard.path)["rows"].shape == (0, WIDTH)
        assert store.missing(12, [IDS[:1]]) == [] and store.verify() == []

    def test_zero_gradients_are_counted(self, tmp_path):
        made = make_arrays(IDS[:3], norms=np.array([0.0, 1.0, 0.0]))
        assert make_store(tmp_path).write_shard(12, IDS[:3], content(IDS[:3]), made).num_zero_norms == 2

    def test_rows_are_mapped_and_not_copied(self, tmp_path):
        rows = np.zeros((1000, WIDTH), np.float16)
        made = {"rows": rows, "norms": np.zeros(1000), "sample": np.zeros(1000, int)}
        found = make_store(tmp_path).write_shard(12, ["a"], ["x"], made).read("rows", 5, 7)
        base = found
        while isinstance(base, np.ndarray):
            base = base.base
        assert isinstance(base, memoryview) and isinstance(base.obj, mmap.mmap) and not found.flags.writeable

    def test_the_same_work_is_the_same_bytes(self, tmp_path):
        fill(make_store(tmp_path / "a"))
        fill(make_store(tmp_path / "b"), steps=STEPS[::-1])
        assert tree(tmp_path / "a") == tree(tmp_path / "b")

    def test_bytes_of_format_version_1(self, tmp_path):
        """A store that this version writes must stay readable; whoever changes its bytes raises FORMAT_VERSION."""
        store = make_store(tmp_path, dtype="bfloat16")
        made = {
            "rows": np.linspace(-1, 1, 12).reshape(3, 4),
            "norms": np.array([0.5, 0.0, 3.25]),
            "sample": np.array([0, 2, 2]),
            "timestep": np.array([1, 500, 999], np.int32),
            "weight.learning_rate": np.array([1e-4, 2e-4, 3e-4]),
        }
        store.write_shard(12, ["a", "b", "ü"], ["00", "01", "02"], made)
        found = {name: sha256(held).hexdigest()[:16] for name, held in tree(tmp_path).items()}
        assert found == {
            "00000012/5c2c9b6643ac1af6-fca53b70.safetensors": "fca53b7038305e82",
            "00000012/5c2c9b6643ac1af6.json": "7483f28c5b225745",
            "manifest.json": "e3641c4d685bdb8e",
        }


class TestSpec:
    def test_the_same_spec_opens_the_store(self, tmp_path):
        store = fill(make_store(tmp_path))
        before = tree(tmp_path)
        again = make_store(tmp_path, spec=SPEC | {"checkpoints": {12: "ab", 24: "cd"}})  # keys become text
        assert again == store and tree(tmp_path) == before

    def test_a_spec_may_hold_numpy_scalars_and_tuples(self, tmp_path):
        spec = {"seed": np.int64(3), "rate": np.float32(0.5), "steps": (1, 2), "flip": np.bool_(True)}
        store = make_store(tmp_path, spec=spec)
        assert store.spec == {"seed": 3, "rate": 0.5, "steps": [1, 2], "flip": True}
        assert make_store(tmp_path, spec=spec) == store == Store.open(tmp_path)

    def test_a_foreign_spec_is_refused_with_all_that_differs(self, tmp_path):
        make_store(tmp_path)
        spec = {"checkpoints": SPEC["checkpoints"], "projection": {"kind": "two-sided", "seed": 4}, "unit": "event"}
        with pytest.raises(StoreError, match="gradients of another specification: ") as error:
            make_store(tmp_path, spec=spec, width=8, dtype="float32")
        for part in (
            'dtype is "float16" there, "float32" is asked for',
            "projection.seed is 3 there, 4 is asked for",
            'unit is nothing there, "event" is asked for',
            "width is 4 there, 8 is asked for",
        ):
            assert part in str(error.value)
        assert "checkpoints" not in str(error.value)

    def test_a_long_value_is_cut_in_the_message(self, tmp_path):
        make_store(tmp_path, spec={"ids": ["x"] * 1000})
        with pytest.raises(StoreError, match=r"ids is \[.{70,80}… there, \[\] is asked for"):
            make_store(tmp_path, spec={"ids": []})

    @pytest.mark.parametrize("value", [np.zeros(2), float("nan"), {1, 2}])
    def test_a_spec_is_plain(self, tmp_path, value):
        with pytest.raises(ConfigError, match="specification must be plain values that JSON can hold"):
            make_store(tmp_path, spec={"a": value})
        assert not list(tmp_path.iterdir())

    def test_unknown_dtype_and_width(self, tmp_path):
        with pytest.raises(ConfigError, match="Unknown dtype of a store 'int8'; known are float16, bfloat16, float32"):
            Store.create.__wrapped__(Store, tmp_path, {}, width=4, dtype="int8")
        with pytest.raises(ConfigError, match="width must be above 0, found 0"):
            make_store(tmp_path, width=0)


class TestManifest:
    def test_a_folder_without_one(self, tmp_path):
        with pytest.raises(StoreError, match=r"holds no readable store .*has a manifest\.json"):
            Store.open(tmp_path)

    def test_a_truncated_one(self, store):
        path = store.folder / "manifest.json"
        path.write_bytes(path.read_bytes()[:40])
        with pytest.raises(StoreError, match="holds no readable store"):
            Store.open(store.folder)
        with pytest.raises(StoreError, match="holds no readable store"):
            make_store(store.folder)

    @pytest.mark.parametrize("text", ["{}", "[]", "null", '{"format_version": 1, "method": "x"}'])
    def test_that_of_something_else(self, store, text):
        (store.folder / "manifest.json").write_text(text)
        with pytest.raises(StoreError, match=r"manifest\.json is no manifest of a store: .* lacks .*spec"):
            Store.open(store.folder)

    @pytest.mark.parametrize("change", [{"width": 5}, {"dtype": "float32"}, {"spec": {}}, {"spec_sha256": "0"}])
    def test_a_changed_one(self, store, change):
        path = store.folder / "manifest.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
        with pytest.raises(StoreError, match=r"manifest\.json is damaged: the SHA-256 of its specification"):
            Store.open(store.folder)

    def test_a_newer_format(self, store):
        path = store.folder / "manifest.json"
        path.write_text(json.dumps({"format_version": 99}))
        with pytest.raises(StoreError, match=r"format version 99; this version of whence reads 1"):
            Store.open(store.folder)


class TestWriting:
    def test_a_finished_shard_is_left_as_it_is(self, store):
        before = tree(store.folder)
        other = make_arrays(IDS[:4], rows=np.zeros((3, WIDTH)))
        shard = store.write_shard(12, IDS[:4], content(IDS[:4]), other)
        assert shard.read("rows").any() and tree(store.folder) == before

    def test_other_content_under_the_same_id_is_refused(self, store):
        changed = [*content(IDS[:3]), "0" * 64]
        with pytest.raises(StoreError, match=r"The content of samples has changed since .*: img-3\. An id must stand"):
            store.write_shard(12, IDS[:4], changed, make_arrays(IDS[:4]))

    def test_a_sample_of_another_block_is_refused(self, store):
        with pytest.raises(StoreError, match=r"\.json holds img-2, img-3 already, in another block"):
            store.write_shard(12, IDS[2:5], content(IDS[2:5]), make_arrays(IDS[2:5]))

    @pytest.mark.parametrize(
        ("ids", "hashes", "message"),
        [
            ((), (), "found 0 ids and 0 hashes"),
            (("a-1", "a-1"), "xy", "found 2 ids and 2 hashes, and more than once a-1"),
            (("a-1",), "xy", "found 1 ids and 2 hashes"),
        ],
    )
    def test_ids_come_once_with_a_hash(self, tmp_path, ids, hashes, message):
        with pytest.raises(StoreError, match=message):
            make_store(tmp_path).write_shard(12, ids, tuple(hashes), make_arrays(ids))

    def test_a_step_is_not_negative(self, tmp_path):
        with pytest.raises(StoreError, match="step must be 0 or above, found -1"):
            make_store(tmp_path).write_shard(-1, IDS, content(IDS), make_arrays(IDS))

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"norms": None}, "it must have norms, rows, sample, and lacks norms"),
            ({"unit_rows": np.zeros((3, WIDTH))}, "it must have norms, rows, sample, unit_norms, .* lacks unit_norms"),
            ({"rows": np.zeros((3, 5))}, r"rows must have shape \(3, 4\), one entry per row; found \(3, 5\)"),
            ({"norms": np.zeros(2)}, r"norms must have shape \(3,\), one entry per row; found \(2,\)"),
            ({"timestep": np.zeros((3, 1))}, r"timestep must have shape \(3,\), one entry per row; found \(3, 1\)"),
            ({"rows": np.zeros((3, WIDTH), int)}, "rows must hold floats; found int64"),
            ({"sample": np.zeros(3)}, "sample must hold integers; found float64"),
            (
                {"sample": np.array([0, 1, 4])},
                "one of|which of the block's 4 ids a row belongs to, from 0; found 0 to 4",
            ),
            ({"sample": np.array([-1, 1, 3])}, "found -1 to 3"),
            ({"caption": np.array(["a", "b", "c"])}, "caption of <U1 is nothing that safetensors can hold"),
            ({"__metadata__": np.zeros(3)}, "__metadata__ of float64 is nothing that safetensors can hold"),
        ],
    )
    def test_arrays_of_another_form_are_refused(self, tmp_path, changes, message):
        store = make_store(tmp_path)
        with pytest.raises(StoreError, match=f"A shard of step 12 cannot be written: .*{message}"):
            store.write_shard(12, IDS[:4], content(IDS[:4]), make_arrays(IDS[:4], **changes))
        assert store.missing(12, [IDS[:4]]) == [IDS[:4]]

    def test_all_faults_are_listed(self, tmp_path):
        made = make_arrays(IDS[:4], rows=np.zeros((3, 5)), norms=np.zeros(2))
        with pytest.raises(StoreError, match=r"rows must have shape .*; norms must have shape"):
            make_store(tmp_path).write_shard(12, IDS[:4], content(IDS[:4]), made)

    @pytest.mark.parametrize("value", [7e4, -7e4, np.nan, np.inf])
    def test_a_row_beyond_half_precision_names_its_sample(self, tmp_path, value):
        made = make_arrays(IDS[:4])
        made["rows"][1, 2] = value  # img-1 has one row, img-2 two
        with pytest.raises(NumericsError, match=r"Step 12, sample img-2: rows holds .* in row 1 of the block.*float16"):
            make_store(tmp_path).write_shard(12, IDS[:4], content(IDS[:4]), made)

    @pytest.mark.parametrize("dtype, value", [("bfloat16", 3.4e38), ("bfloat16", np.nan), ("float32", 1e39)])
    def test_a_row_beyond_other_dtypes_names_its_sample(self, tmp_path, dtype, value):
        made = make_arrays(IDS[:4], rows=np.zeros((3, WIDTH)))
        made["rows"][0, 0] = value
        with pytest.raises(NumericsError, match=f"sample img-1: rows holds .* must be finite as {dtype}"):
            make_store(tmp_path, dtype=dtype).write_shard(12, IDS[:4], content(IDS[:4]), made)

    @pytest.mark.parametrize("value", [-1.0, np.nan, np.inf, 1e39])
    def test_a_norm_is_finite_and_not_negative(self, tmp_path, value):
        made = make_arrays(IDS[:4], norms=np.array([1.0, 1.0, value]))
        with pytest.raises(NumericsError, match="sample img-2: norms holds .* in row 2 .* finite and not negative"):
            make_store(tmp_path).write_shard(12, IDS[:4], content(IDS[:4]), made)

    def test_an_array_that_is_not_there(self, store):
        with pytest.raises(StoreError, match="has no array 'sigma'; it has norms, rows, sample, timestep, weight"):
            store.shards(12)[0].read("sigma")


class TestPlan:
    def test_blocks_are_cut_in_order(self, tmp_path):
        store = make_store(tmp_path)
        assert store.plan_blocks(12, IDS, content(IDS), 4) == [IDS[:4], IDS[4:8], IDS[8:]]
        assert store.missing(12, [IDS[:4], IDS[4:8]]) == [IDS[:4], IDS[4:8]]

    def test_only_what_is_missing_is_cut(self, store):
        more = (*IDS, "img-10", "img-11", "img-12")
        before = tree(store.folder)
        assert store.plan_blocks(12, IDS, content(IDS), 4) == []
        assert store.plan_blocks(12, more, content(more), 2) == [more[10:12], more[12:]]
        fill(store, more)
        assert sorted(store.ids(12)) == sorted(more) == sorted(store.ids(24))
        assert before.items() <= tree(store.folder).items()

    def test_a_run_that_went_on_elsewhere_is_cut_alike(self, tmp_path):
        store = make_store(tmp_path)
        store.write_shard(12, IDS[4:8], content(IDS[4:8]), make_arrays(IDS[4:8]))
        assert store.plan_blocks(12, IDS, content(IDS), 4) == [IDS[:4], IDS[8:]]

    def test_other_steps_are_cut_alike(self, tmp_path):
        store = fill(make_store(tmp_path), IDS[:6], steps=[12])
        fill(store, IDS, steps=[12])
        assert store.plan_blocks(24, IDS, content(IDS), 3) == [IDS[:4], IDS[4:6], IDS[6:]]
        assert store.plan_blocks(24, IDS[:5], content(IDS[:5]), 3) == [IDS[:4], IDS[4:5]]

    def test_changed_content_is_refused_at_any_step(self, store):
        with pytest.raises(StoreError, match=r"samples has changed since .*: img-0, img-1, img-2, img-3\. An id"):
            store.plan_blocks(36, IDS, ["x"] * 10, 4)

    def test_a_block_has_a_sample(self, store):
        with pytest.raises(ConfigError, match="block_size must be above 0, found 0"):
            store.plan_blocks(12, IDS, content(IDS), 0)


class TestChecks:
    def test_every_shard_is_read_once(self, store, monkeypatch):
        store.check()
        monkeypatch.setattr("whence.shards.sha256_of_file", lambda path: pytest.fail(f"{path} was read again"))
        Store.open(store.folder).check()
        with pytest.raises(pytest.fail.Exception, match="was read again"):
            os.utime(store.shards(12)[1].path, ns=(1, 1))
            store.check()

    @pytest.mark.parametrize("text", ["", "[]", "{"])
    def test_a_damaged_memory_is_none(self, store, text):
        store.check()
        (store.folder / "verified.json").write_text(text)
        store.check()
        assert len(json.loads((store.folder / "verified.json").read_text())) == 6

    def test_a_flipped_byte_is_named(self, store):
        shards = store.shards(12)[:2]
        for shard in shards:
            change_byte(shard.path)
        with pytest.raises(StoreError, match=r"damaged: its SHA-256 is .*delete .*\.json beside it") as error:
            store.check()
        found = store.verify()
        assert len(found) == 2
        for shard, fault in zip(shards, sorted(found), strict=True):
            assert str(shard.path) in fault and fault in str(error.value)
        assert len(json.loads((store.folder / "verified.json").read_text())) == 4

    def test_verify_finds_what_a_check_has_forgotten(self, store):
        store.check()
        path = store.shards(12)[0].path
        before = path.stat()
        change_byte(path)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        store.check()
        (fault,) = store.verify()
        assert f"{path} is damaged: its SHA-256" in fault

    def test_a_truncated_shard_is_named(self, store):
        shard = store.shards(12)[0]
        os.truncate(shard.path, 100)
        for use in (store.check, lambda: shard.read("rows")):
            with pytest.raises(StoreError, match=f"is damaged: it has 100 bytes, its sidecar says {shard.num_bytes}"):
                use()
        assert "has 100 bytes" in "".join(store.verify())

    def test_a_missing_shard_is_named(self, store):
        shard = store.shards(12)[0]
        shard.path.unlink()
        for use in (store.check, lambda: shard.read("rows")):
            with pytest.raises(
                StoreError, match=r"safetensors is missing\. Restore the file, or delete .*\.json beside it"
            ):
                use()
        assert "safetensors is missing" in "".join(store.verify())

    def test_a_file_that_is_no_safetensors_is_named(self, store):
        shard = store.shards(12)[0]
        for junk in (b"\xff" * 8, b"\x02" + bytes(7) + b"{}", b"\x02" + bytes(7) + b"17"):
            shard.path.write_bytes(junk.ljust(shard.num_bytes, b" "))
            with pytest.raises(StoreError, match=r"safetensors cannot be read: .*Restore the file, or delete .*\.json"):
                shard.read("rows")

    def test_a_deleted_sidecar_is_computed_again(self, store):
        before = tree(store.folder)
        shard = store.shards(12)[0]
        change_byte(shard.path)
        shard.sidecar_path.unlink()
        fault, _ = store.verify()  # the other: the step lacks its samples
        assert f"{shard.path} is named by no sidecar" in fault
        assert store.missing(12, [shard.ids]) == [shard.ids]
        fill(store)
        assert tree(store.folder) == before and store.verify() == []

    @pytest.mark.parametrize(
        ("damage", "message"),
        [
            (lambda text: text[:50], "cannot be read"),
            (lambda text: "", "cannot be read"),
            (lambda text: "[]", "is no sidecar of a shard: it lacks arrays, content_hashes"),
            (lambda text: text.replace("img-0", "img-x"), "is damaged: its SHA-256 is"),
            (lambda text: text.replace('"step": 12', '"step": 24'), "is damaged: its SHA-256 is"),
        ],
    )
    def test_a_damaged_sidecar_is_named(self, store, damage, message):
        path = store.folder / "00000012" / f"{block_name(IDS[:4])}.json"
        path.write_text(damage(path.read_text()))
        fresh = Store.open(store.folder)
        for use in (lambda: fresh.shards(12), lambda: fresh.steps, fresh.check):
            with pytest.raises(StoreError, match=rf"{path.name} {message}.*delete it and run again"):
                use()
        fault, _ = fresh.verify()
        assert f"{path} {message}" in fault

    def test_a_foreign_shard_is_refused(self, store, tmp_path):
        other = fill(make_store(tmp_path / "other", spec={"seed": 4}), IDS[:4], steps=[36])
        os.rename(other.folder / "00000036", store.folder / "00000036")
        with pytest.raises(StoreError, match=r"json belongs to a store of another specification: its hash is"):
            store.check()
        assert "another specification" in "".join(store.verify())

    def test_a_shard_out_of_place_is_refused(self, store):
        os.rename(store.folder / "00000024", store.folder / "00000036")
        with pytest.raises(StoreError, match=r"json is out of its place: it is of block [0-9a-f]{16} of step 24"):
            Store.open(store.folder).shards(36)
        assert "out of its place" in "".join(store.verify())

    def test_verify_never_stops_at_the_first(self, store, tmp_path):
        store.write_shard(12, ["img-11"], ["yy"], make_arrays(["img-11"]))
        store.write_shard(12, ["img-10"], content(["img-10"]), make_arrays(["img-10"]))
        twice = fill(make_store(tmp_path / "twice"), IDS[3:5], steps=[12])  # cut otherwise
        for path in (twice.folder / "00000012").glob("[!.]*"):
            path.rename(store.folder / "00000012" / path.name)
        store = Store.open(store.folder)
        changed = store.write_shard(24, ["img-11"], ["xx"], make_arrays(["img-11"]))
        first, second = [shard for shard in store.shards(24) if shard != changed][:2]
        change_byte(first.path)
        second.sidecar_path.unlink()
        (store.folder / "00000012" / ".x.json.0123.partial").write_text("{")
        (store.folder / "notes.txt").write_text("mine")
        faults = "\n".join(store.verify())
        for part in (
            f"{first.path} is damaged",
            f"{second.path} is named by no sidecar",
            ".x.json.0123.partial was left behind",
            "notes.txt is no part of a store",
            "beside it holds too: img-3",
            "other content than at other steps: img-11",
            "Step 24 lacks samples that other steps hold: ",
        ):
            assert part in faults
        with pytest.raises(StoreError, match=r"\.json and .*\.json both hold img-[34]"):
            Store.open(store.folder).check()


class TestMerge:
    def test_shards_are_taken_over(self, tmp_path):
        whole = fill(make_store(tmp_path / "whole"))
        parts = [fill(make_store(tmp_path / name), steps=[step]) for name, step in (("a", 12), ("b", 24))]
        target = make_store(tmp_path / "target")
        assert merge_stores(target, parts) == 6
        assert tree(target.folder) == tree(whole.folder) and target.verify() == []
        assert merge_stores(target, [*parts, whole]) == 0

    def test_a_disk_without_links_gets_copies(self, tmp_path, monkeypatch):
        source, target = fill(make_store(tmp_path / "a")), make_store(tmp_path / "b")

        def no_links(self, target):
            raise OSError(errno.EPERM, os.strerror(errno.EPERM))

        monkeypatch.setattr(Path, "hardlink_to", no_links)
        assert merge_stores(target, [source]) == 6
        assert tree(target.folder) == tree(source.folder) and target.verify() == []
        fill(make_store(tmp_path / "c"))
        assert tree(tmp_path / "c") == tree(source.folder)

    def test_an_interrupted_merge_goes_on(self, tmp_path):
        source, target = fill(make_store(tmp_path / "a")), make_store(tmp_path / "b")
        merge_stores(target, [source])
        target.shards(12)[0].sidecar_path.unlink()
        assert merge_stores(target, [source]) == 1
        assert tree(target.folder) == tree(source.folder) and target.verify() == []

    def test_a_foreign_spec_is_refused(self, tmp_path):
        source = fill(make_store(tmp_path / "a", spec=SPEC | {"unit": "event"}))
        with pytest.raises(StoreError, match='a holds gradients of another spec.*: unit is "event" there, nothing is'):
            merge_stores(make_store(tmp_path / "b"), [source])

    def test_disagreeing_stores_are_refused_before_anything_is_written(self, tmp_path):
        target = make_store(tmp_path / "target")
        a = fill(make_store(tmp_path / "a"), IDS[:8], steps=[12])
        b = make_store(tmp_path / "b")
        b.write_shard(12, IDS[:4], content(IDS[:4]), make_arrays(IDS[:4], step=13))  # other rows
        fill(b, IDS[5:], steps=[12], block_size=2)
        b.write_shard(36, IDS[:1], ["other"], make_arrays(IDS[:1]))
        with pytest.raises(StoreError, match="Stores that disagree cannot be merged:") as error:
            merge_stores(target, [a, b])
        for part in (
            "hold the same samples with other rows: img-0, img-1, img-2, img-3",
            "are cut otherwise and share img-5, img-6",
            "are cut otherwise and share img-7",
            "was made of other content: img-0",
        ):
            assert part in str(error.value)
        assert target.steps == []

    def test_a_damaged_source_is_refused(self, tmp_path):
        source, target = fill(make_store(tmp_path / "a")), make_store(tmp_path / "b")
        change_byte(source.shards(24)[0].path)
        with pytest.raises(StoreError, match="is damaged: its SHA-256"):
            merge_stores(target, [source])
        assert target.steps == [12, 24] or target.steps == [12]
        target.check()


def write_block(store, **changes):
    return store.write_shard(12, IDS[:4], content(IDS[:4]), make_arrays(IDS[:4], **changes))


@contextmanager
def calling_before(monkeypatch, moment, act):
    """Do something just before one of the calls that reach the disk; give the names of the calls."""
    calls = []

    def interrupting(name, function):
        def called(*args, **kwargs):
            calls.append(name)
            if len(calls) == moment + 1:
                patch.undo()
                act()
            return function(*args, **kwargs)

        return called

    with monkeypatch.context() as patch:
        for name in ("fsync", "replace", "link", "chmod", "unlink", "listdir"):
            patch.setattr(os, name, interrupting(name, getattr(os, name)))
        yield calls


def run_self(*arguments, **options):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent)}
    return subprocess.Popen([sys.executable, "-W", "error", __file__, *map(str, arguments)], env=environment, **options)


class TestSeveralProcesses:
    def test_a_claim_of_another_process_holds_until_it_ends(self, tmp_path):
        store = make_store(tmp_path)
        with run_self("hold", tmp_path, stdout=subprocess.PIPE, text=True) as other:
            assert other.stdout is not None and other.stdout.readline() == "held\n"
            with store.claim(12, IDS[:4]) as mine:
                assert not mine
            with store.claim(12, IDS[4:8]) as mine:
                assert mine
            other.kill()
        with store.claim(12, IDS[:4]) as mine:
            assert mine
            store.write_shard(12, IDS[:4], content(IDS[:4]), make_arrays(IDS[:4]))
            with store.claim(12, IDS[:4]) as again:
                assert not again
        with store.claim(12, IDS[:4]) as mine:
            assert not mine  # the work is done
        assert store.verify() == []

    def test_an_error_frees_the_claim(self, tmp_path):
        store = make_store(tmp_path)
        with pytest.raises(KeyError), store.claim(12, IDS[:4]):
            raise KeyError
        with store.claim(12, IDS[:4]) as mine:
            assert mine

    def test_many_processes_end_with_one_content(self, tmp_path):
        want = tree(fill(make_store(tmp_path / "alone"), block_size=1).folder)
        workers = [run_self("fill", tmp_path / "store") for _ in range(3)]
        assert [worker.wait() for worker in workers] == [0] * 3
        assert tree(tmp_path / "store") == want
        assert Store.open(tmp_path / "store").verify() == []

    def test_the_first_of_two_writers_stands(self, tmp_path, monkeypatch):
        """The other writes the same block, rounded otherwise, at every moment of the first's work in turn."""
        for moment in itertools.count():
            store, other = make_store(tmp_path / str(moment)), make_store(tmp_path / str(moment))
            with calling_before(monkeypatch, moment, lambda other=other: write_block(other, norms=np.ones(3))) as calls:
                shard = write_block(store)
            assert store.verify() == other.verify() == []
            assert shard == other.shards(12)[0]
            if len(calls) <= moment:
                assert set(calls) == {"fsync", "replace", "link", "chmod", "unlink", "listdir"}
                break

    def test_writers_of_different_content_are_told_apart(self, tmp_path, monkeypatch):
        store, other = make_store(tmp_path), make_store(tmp_path)
        hardlink_to = Path.hardlink_to

        def late(self, target):
            monkeypatch.undo()
            other.write_shard(12, IDS[:4], ["x"] * 4, make_arrays(IDS[:4]))
            hardlink_to(self, target)

        monkeypatch.setattr(Path, "hardlink_to", late)
        with pytest.raises(StoreError, match="content of samples has changed"):
            store.write_shard(12, IDS[:4], content(IDS[:4]), make_arrays(IDS[:4]))
        assert store.verify() == []


class TestFaults:
    @pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
    def test_a_disk_that_fails_costs_nothing_that_was_finished(self, tmp_path, monkeypatch, code):
        want = tree(fill(make_store(tmp_path / "alone")).folder)
        total = self.count_calls(monkeypatch, lambda: fill(make_store(tmp_path / "counted")))
        assert total > 60
        for good in range(0, total, 7):
            folder = tmp_path / str(good)
            with pytest.raises(OSError, match=os.strerror(code)):
                self.count_calls(monkeypatch, lambda folder=folder: fill(make_store(folder)), good, code)
            for name, found in tree(folder).items():
                assert found == want[name], f"{name} is half-written"
            store = fill(make_store(folder))
            assert tree(folder) == want and store.verify() == []

    @staticmethod
    def count_calls(monkeypatch, work, good=None, code=0):
        """Count the calls that change the disk; from the ``good``-th on they fail."""
        calls = 0

        def failing(function):
            def called(*args, **kwargs):
                nonlocal calls
                calls += 1
                if good is not None and calls > good:
                    raise OSError(code, os.strerror(code))
                return function(*args, **kwargs)

            return called

        with monkeypatch.context() as patch:
            for name in ("fsync", "mkdir", "replace", "link", "rename"):
                patch.setattr(os, name, failing(getattr(os, name)))
            patch.setattr(Path, "open", failing(Path.open))
            patch.setattr(Path, "write_text", failing(Path.write_text))
            work()
        return calls

    def test_a_full_device_is_an_error_and_not_half_a_shard(self, tmp_path, monkeypatch):
        """/dev/full takes no byte: what is written through it fails as on a full disk."""
        store = make_store(tmp_path)
        monkeypatch.setattr(_files.secrets, "token_hex", lambda size: "token")
        want = make_store(tmp_path / "other").write_shard(12, IDS, content(IDS), make_arrays(IDS)).path.name
        (tmp_path / "00000012").mkdir()
        (tmp_path / "00000012" / f".{want}.token.partial").symlink_to("/dev/full")
        with pytest.raises(OSError, match="No space left"):
            store.write_shard(12, IDS, content(IDS), make_arrays(IDS))
        assert list((tmp_path / "00000012").iterdir()) == []

    @pytest.mark.parametrize("code", [errno.EMFILE, errno.EACCES, errno.EIO])
    def test_an_error_of_the_disk_is_not_taken_for_damage(self, store, monkeypatch, code):
        """Nobody should be sent to delete a good file."""

        def failing(*args, **kwargs):
            raise OSError(code, os.strerror(code))

        shards, fresh = store.shards(12), Store.open(store.folder)
        monkeypatch.setattr(Path, "read_bytes", failing)
        with pytest.raises(OSError, match=os.strerror(code)):
            fresh.shards(12)
        monkeypatch.undo()
        monkeypatch.setattr(Path, "open", failing)
        with pytest.raises(OSError, match=os.strerror(code)):
            shards[0].read("rows")
        assert len(store.verify()) == 6  # which goes on after each

    def test_a_read_only_store_opens(self, store, monkeypatch):
        def read_only(*args, **kwargs):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))

        for name in ("mkdir", "replace", "link", "rename", "unlink"):
            monkeypatch.setattr(os, name, read_only)
        monkeypatch.setattr(Path, "write_text", read_only)
        opened = Store.open(store.folder)
        opened.check()
        assert not (store.folder / "verified.json").exists()
        assert make_store(store.folder) == opened and opened.verify() == []
        assert [shard.read("rows").shape[1] for shard in opened.shards(12)] == [WIDTH] * 3
        with pytest.raises(OSError, match="Read-only"):
            opened.write_shard(36, IDS, content(IDS), make_arrays(IDS))


KILLS = 20
KILL_IDS = tuple(f"img-{k}" for k in range(30))


def test_killed_at_any_moment_nothing_is_half_written(tmp_path):
    """Set WHENCE_KILL_SEED to repeat a failure."""
    seed = os.environ.get("WHENCE_KILL_SEED") or str(random.SystemRandom().randrange(10**6))
    with run_self("kill", tmp_path, seed, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as child:
        output, _ = child.communicate()
    assert child.returncode == 0, f"failed with WHENCE_KILL_SEED={seed}: {output[-3000:]}"
    print(output)


def fill_and_kill(folder: Path, kill_after_s: float | None) -> bool:
    """Fill a store in a child of this process; tell whether it finished."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            fill(make_store(folder), KILL_IDS, block_size=1)
            status = 0
        finally:
            os._exit(status)
    if kill_after_s is not None:
        time.sleep(kill_after_s)
        os.kill(child, signal.SIGKILL)  # a child that has ended is still there to be asked
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return not os.WIFSIGNALED(status)


def kill_again_and_again(folder: Path, seed: int) -> None:
    rng = random.Random(seed)
    start = time.monotonic()
    assert fill_and_kill(folder / "undisturbed", None)
    undisturbed_s = time.monotonic() - start
    want = tree(folder / "undisturbed")
    kills = rounds = 0
    while kills < KILLS:
        run = folder / f"round-{rounds}"
        while not fill_and_kill(run, rng.uniform(0, undisturbed_s)):
            kills += 1
            found = tree(run)
            for name in found:
                assert found[name] == want.get(name), f"{run / name} is half-written after a kill"
            if "manifest.json" in found:
                Store.open(run).check()
        assert tree(run) == want
        left = [fault for fault in Store.open(run).verify() if "interrupted run" not in fault]
        assert not left, left
        rounds += 1
    print(json.dumps({"kills": kills, "rounds": rounds, "undisturbed_s": undisturbed_s}))


def main(command: str, folder: Path, *rest: str) -> None:
    if command == "kill":
        kill_again_and_again(folder, int(*rest))
    elif command == "fill":
        fill(make_store(folder), block_size=1)
    else:
        with make_store(folder).claim(12, IDS[:4]) as mine:
            assert mine
            print("held", flush=True)
            time.sleep(60)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:])
