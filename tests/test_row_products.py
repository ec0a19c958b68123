"""Products with a store's rows against the same in one matrix, and the running top."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from whence.errors import ConfigError, StoreError
from whence.row_products import Multiplier, Reading, RunningTop, group_shards, sum_by_sample, top_of_store
from whence.store import Store

WIDTH = 6
IDS = tuple("abcdefgh")


def fill(folder, cuts=((4, 8), (4, 8)), steps=(1, 2)):
    """A store with two rows a sample; give it, and all of its rows by step."""
    store = Store.create(folder, {}, width=WIDTH, dtype="float32")
    everything = {}
    for step, cut in zip(steps, cuts, strict=True):
        rng = np.random.default_rng(step)
        rows, norms = rng.standard_normal((8, 2, WIDTH)).astype(np.float32), rng.uniform(1, 2, (8, 2))
        weights = rng.uniform(size=(8, 2))
        everything[step] = rows, norms.astype(np.float32), weights
        for first, last in zip((0, *cut), cut, strict=False):
            count = last - first
            arrays = {
                "rows": rows[first:last].reshape(-1, WIDTH),
                "norms": norms[first:last].ravel(),
                "weight.equal": weights[first:last].ravel(),
                "sample": np.repeat(np.arange(count), 2),
            }
            store.write_shard(step, IDS[first:last], IDS[first:last], arrays)
    return store, everything


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_products_do_not_depend_on_the_buffer(dtype, monkeypatch):
    monkeypatch.setattr("whence.row_products.BUFFER_BYTES", 3 * WIDTH * 4)
    rows = np.random.default_rng(0).standard_normal((10, WIDTH)).astype(dtype)
    rows.flags.writeable = False  # as a mapped file is
    vectors = torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(0))
    found = Multiplier(vectors).multiply(rows)
    np.testing.assert_allclose(
        found.numpy(), rows.astype(np.float64) @ vectors.double().numpy().T, rtol=1e-5, atol=1e-6
    )
    assert Multiplier(vectors).multiply(rows[:0]).shape == (0, 2)


def test_a_sample_without_rows_has_a_sum_of_zero():
    sums = sum_by_sample(torch.ones(2, 1), np.array([0, 2], dtype=np.int32), np.array([1.0, 3.0]), 4)
    assert sums.ravel().tolist() == [1, 0, 3, 0]


@pytest.mark.parametrize("cuts", [((4, 8), (4, 8)), ((4, 8), (3, 8))])
@pytest.mark.parametrize("norms", ["norms", None])
def test_top_is_that_of_the_whole_matrix(tmp_path, cuts, norms):
    store, everything = fill(tmp_path, cuts)
    vectors = {step: torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(step)) for step in everything}
    want = sum(
        np.einsum("srw,qw,sr->qs", rows, vectors[step].numpy(), weights * (lengths if norms else 1))
        for step, (rows, lengths, weights) in everything.items()
    )
    found = top_of_store(store, vectors, Reading(norms=norms, weights="weight.equal"), 3)
    order = np.argsort(-want, axis=1)[:, :3]
    assert found.ids == [[IDS[row] for row in rows] for rows in order]
    np.testing.assert_allclose(found.values, np.take_along_axis(want, order, 1), rtol=1e-5)


def test_unit_samples_have_length_one(tmp_path):
    store, everything = fill(tmp_path)
    rows, norms, weights = (array[:4] for array in everything[1])
    sums = np.einsum("srw,sr->sw", rows, weights * norms)
    shard = next(shard for shard in store.shards(1) if shard.ids[0] == "a")
    factors = Reading(weights="weight.equal", unit_samples=True).factors(shard.read_all())
    found = np.einsum("srw,sr->sw", rows, factors.reshape(4, 2))
    want = sums / np.linalg.norm(sums, axis=1, keepdims=True) * weights.sum(1, keepdims=True)
    np.testing.assert_allclose(found, want, rtol=1e-5)


def test_a_store_that_is_not_finished_is_refused(tmp_path):
    store, _ = fill(tmp_path, ((4, 8), (4,)))
    with pytest.raises(StoreError, match="is not finished: step 2 lacks 4 images, such as e, f, g, h"):
        group_shards(store, [1, 2])
    with pytest.raises(StoreError, match="is not finished: step 3 lacks all images"):
        group_shards(store, [3])


def test_the_first_of_equal_values_stays_first():
    top = RunningTop(2)
    for ids in ("ab", "cd"):
        top.add(list(ids), np.array([[1.0, 1.0]]))
    assert top.table().ids == [["a", "b"]]
    assert RunningTop(1).table().ids == []
    with pytest.raises(ConfigError, match="top must be above 0, found 0"):
        RunningTop(0)


def test_the_benchmark_runs_and_its_ways_agree(tmp_path):
    script = Path(__file__).parents[1] / "benchmarks" / "query.py"
    sizes = ["--rows", "600", "--width", "64", "--runs", "1", "--queries", "2", "--folder", tmp_path]
    command = [sys.executable, script, *sizes, "--threads", "1", "--json", tmp_path / "query.json"]
    subprocess.run(command, check=True, capture_output=True, timeout=100)
    figures = json.loads((tmp_path / "query.json").read_text())
    assert figures["rows"] == 600 and figures["ratio_to_plain"] > 0
