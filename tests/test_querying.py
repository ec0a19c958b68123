"""Stored scores against streaming ones, and what a store refuses to answer."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import EXACT, ask, stream, toy_images
from whence.config import IndexSettings
from whence.encoded import Conditions, Encoded
from whence.errors import ConfigError, NumericsError, ScoresError, StoreError
from whence.gradients import GradientSource
from whence.indexing import content_hashes, index, notes_on_store
from whence.methods import GRAD_COS, GRAD_DOT, PIXELS, RETRAC, TRACIN
from whence.methods.frame import Replay
from whence.scores import TopScores
from whence.store import Store, merge_stores
from whence.subject import Subject

TRAIN_SIDE = {"batch_size": 8, "block_size": 4}
GRID = replace(EXACT, grid=True, train_timesteps=3, train_draws=2)


@pytest.fixture(scope="module")
def grid_store(subject, tmp_path_factory):
    return index(subject, GRID, tmp_path_factory.mktemp("run"), show_progress=False)


def check_equal(found, want, tol=1e-5):
    """Within the promised rounding: tol x sum of w |phi| |psi| (unit-length sides count 1)."""
    bound = np.nansum(want.train_weights * want.train_norms, axis=0) * want.query_norms.mean((0, 2))[:, None]
    if found.method in ("retrac", "grad-cos"):
        bound = np.broadcast_to(want.train_weights.sum(0), want.values.shape)
    assert (np.abs(found.values - want.values) <= tol * bound).all()
    assert (np.abs(found.phases - want.phases) <= tol * bound[:, None]).all()
    assert (np.abs(found.halves - want.halves) <= 4 * tol * bound).all()
    np.testing.assert_allclose(found.train_norms, want.train_norms, rtol=1e-5)
    np.testing.assert_allclose(found.train_weights, want.train_weights, rtol=1e-6)
    np.testing.assert_allclose(found.query_norms, want.query_norms, rtol=1e-5)
    assert found.phase_timesteps == want.phase_timesteps
    assert found.checkpoint_steps == want.checkpoint_steps


class TestEqualToStreaming:
    """With an identity projection and float32 rows, nothing but rounding may differ."""

    def test_replayed_last_visit(self, subject, store, toy_queries, tmp_path):
        want = stream(subject, toy_queries, [TRACIN, RETRAC], tmp_path)
        found = ask(subject, store, toy_queries, [TRACIN, RETRAC], tmp_path)
        for name in want:
            check_equal(found[name], want[name])
            np.testing.assert_array_equal(found[name].train_timesteps, want[name].train_timesteps)
            assert str(found[name].folder).startswith(str(tmp_path / "scores" / f"{name}-stored-"))

    @pytest.mark.parametrize("keep", ["units", "sum"])
    def test_all_visits(self, subject, toy_queries, tmp_path, keep):
        held = index(subject, replace(EXACT, replay="all", keep=keep), tmp_path, show_progress=False)
        want = stream(subject, toy_queries, [TRACIN, RETRAC], tmp_path, replay="all")
        methods = [replace(m, train=replace(m.train, events=Replay("all"))) for m in (TRACIN, RETRAC)]
        found = ask(subject, held, toy_queries, methods, tmp_path)
        for name in want:
            check_equal(found[name], want[name])
            np.testing.assert_array_equal(found[name].train_timesteps, want[name].train_timesteps)

    @pytest.mark.parametrize("keep", ["units", "sum"])
    def test_gradient_similarity(self, subject, toy_queries, tmp_path, keep):
        held = index(subject, replace(GRID, keep=keep), tmp_path, show_progress=False)
        want = stream(subject, toy_queries, [GRAD_DOT, GRAD_COS], tmp_path, train_timesteps=3, train_draws=2)
        found = ask(subject, held, toy_queries, [GRAD_DOT, GRAD_COS], tmp_path)
        for name in want:
            check_equal(found[name], want[name])

    @pytest.mark.parametrize("keep", ["units", "sum"])
    def test_retrac_without_a_record(self, subject, toy_queries, tmp_path, keep):
        foreign = replace(subject, record=None)
        held = index(foreign, replace(GRID, grid=False, keep=keep), tmp_path, show_progress=False)
        want = stream(foreign, toy_queries, [TRACIN, RETRAC], tmp_path, train_timesteps=3, train_draws=2)
        found = ask(foreign, held, toy_queries, [TRACIN, RETRAC], tmp_path)
        for name in want:
            check_equal(found[name], want[name])

    @pytest.mark.parametrize("batch_size", [1, 7, 64])
    def test_whatever_the_batch_size(self, subject, store, toy_queries, tmp_path, batch_size):
        held = index(subject, replace(EXACT, batch_size=batch_size), tmp_path, show_progress=False)
        want = ask(subject, store, toy_queries, [TRACIN, RETRAC], tmp_path)
        found = ask(subject, held, toy_queries, [TRACIN, RETRAC], tmp_path)
        for name in want:
            check_equal(found[name], want[name])


def errors(subject, store, queries, folder):
    """Root mean square of the error of ReTrac relative to |phi| |psi|, and the correlation with exact scores."""
    want = stream(subject, queries, [RETRAC], folder)["retrac"]
    found = ask(subject, store, queries, [RETRAC], folder)["retrac"]
    assert want.train_weights is not None
    relative = (found.values - want.values) / want.train_weights.sum(0)
    return float(np.sqrt((relative**2).mean())), float(np.corrcoef(found.values.ravel(), want.values.ravel())[0, 1])


def test_wider_sketches_are_closer_to_exact_scores(subject, toy_queries, tmp_path):
    found = {}
    for width in (512, 2048, 8192):
        # Sides that shrink nothing, as their error has nothing to do with the width.
        settings = [IndexSettings(width=width, side=128, projection_seed=seed, **TRAIN_SIDE) for seed in (0, 1)]
        stores = [index(subject, s, tmp_path, show_progress=False) for s in settings]
        found[width] = np.mean([errors(subject, store, toy_queries, tmp_path) for store in stores], axis=0)
    print("rms error and correlation:", found)
    for width, (rms, _) in found.items():
        # Sketched inner products of unit vectors have a standard deviation of at most sqrt(2 / width).
        assert rms < 2 * np.sqrt(2 / width)
    assert found[8192][0] < found[512][0] / 2
    assert found[8192][1] > 0.98


@pytest.mark.parametrize("rows", ["float16", "bfloat16"])
def test_half_rows_cost_their_own_rounding(subject, store, toy_queries, tmp_path, rows):
    held = index(subject, replace(EXACT, rows=rows), tmp_path, show_progress=False)
    rms, correlation = errors(subject, held, toy_queries, tmp_path)
    assert rms < (1e-4 if rows == "float16" else 1e-3)  # random rounding of entries averages out
    assert correlation > 0.9999


def test_the_same_image_with_another_region_is_another_query(subject, store, toy_queries, tmp_path):
    """Vectors that are kept of a query are not taken for those of its parts."""
    halves = np.zeros((2, 1, 8, 8), np.float32)
    halves[0, :, :4], halves[1, :, 4:] = 1, 1
    whole, top, bottom = (
        ask(subject, store, queries, [TRACIN], tmp_path)["tracin"].values
        for queries in (toy_queries.select([0]), *(replace(toy_queries.select([0]), masks=mask) for mask in halves))
    )
    np.testing.assert_allclose((top + bottom) / 2, whole, rtol=1e-3, atol=1e-4 * np.abs(whole).max())
    assert np.abs(top - bottom).max() > 0.01 * np.abs(whole).max()


def test_asking_again_costs_nothing(subject, store, toy_queries, tmp_path, monkeypatch):
    first = ask(subject, store, toy_queries, [RETRAC], tmp_path)["retrac"]
    monkeypatch.setattr(Subject, "source", lambda *a: pytest.fail("a model was loaded"))
    np.testing.assert_array_equal(ask(subject, store, toy_queries, [RETRAC], tmp_path)["retrac"].values, first.values)
    other = ask(subject, store, toy_queries, [TRACIN], tmp_path)["tracin"]  # the same gradients, summed otherwise
    assert other.values.shape == first.values.shape


@pytest.mark.parametrize("method", [TRACIN, RETRAC])
def test_top_is_the_top_of_all_scores(subject, store, toy_queries, tmp_path, method):
    want = ask(subject, store, toy_queries, [method], tmp_path)[method.name]
    found = ask(subject, store, toy_queries, [method], tmp_path, top=3)[method.name]
    for row in range(3):
        assert [e.train_id for e in found.top(row, 3)] == [e.train_id for e in want.top(row, 3)]
        np.testing.assert_allclose(
            [e.score for e in found.top(row)], [e.score for e in want.top(row, 3)], rtol=1e-4, atol=1e-9
        )
    assert found.notes == want.notes[: len(found.notes)]
    (found.folder / "top.json").write_text("{}")
    with pytest.raises(ScoresError, match="Delete the folder and query again"):
        TopScores.load(found.folder)
    with pytest.raises(ConfigError, match="top must be above 0, found 0"):
        ask(subject, store, toy_queries, [method], tmp_path, top=0)


def test_top_of_gradient_similarity(subject, grid_store, toy_queries, tmp_path):
    want = ask(subject, grid_store, toy_queries, [GRAD_COS], tmp_path)["grad-cos"]
    found = ask(subject, grid_store, toy_queries, [GRAD_COS], tmp_path, top=20)["grad-cos"]
    assert [e.train_id for e in found.top(0, 20)] == [e.train_id for e in want.top(0, 20)]


class TestRefusals:
    def test_a_method_that_the_store_does_not_hold(self, subject, store, grid_store, toy_queries, tmp_path):
        with pytest.raises(
            StoreError, match=r"grad-dot cannot be had .* Grid.* the store holds Replay.*whence index RUN --grid"
        ):
            ask(subject, store, toy_queries, [GRAD_DOT], tmp_path)
        with pytest.raises(StoreError, match=r"needs Replay.*whence index RUN --replay last"):
            ask(subject, grid_store, toy_queries, [TRACIN], tmp_path)

    def test_weights_that_a_sum_has_settled(self, subject, toy_queries, tmp_path):
        held = index(subject, replace(EXACT, replay="all", keep="sum"), tmp_path, show_progress=False)
        with pytest.raises(StoreError, match="needs weights equal, the store holds learning_rate"):
            ask(subject, held, toy_queries, [replace(TRACIN, weights="equal")], tmp_path)

    def test_a_store_of_the_last_checkpoint_for_all(self, subject, toy_queries, tmp_path):
        held = index(subject, replace(EXACT, checkpoints="last"), tmp_path, show_progress=False)
        with pytest.raises(StoreError, match=r"needs the checkpoints \[6, 12\], the store holds \[12\]"):
            ask(subject, held, toy_queries, [TRACIN], tmp_path)
        assert ask(subject, held, toy_queries, [replace(TRACIN, checkpoints="last")], tmp_path)

    def test_a_baseline(self, subject, store, toy_queries, tmp_path):
        with pytest.raises(ConfigError, match="pixels needs no gradients and so no store"):
            ask(subject, store, toy_queries, [PIXELS], tmp_path)

    def test_another_training(self, subject, store, toy_queries, tmp_path):
        with pytest.raises(StoreError, match="of another model or training: record is"):
            ask(replace(subject, record=None), store, toy_queries, [TRACIN], tmp_path)
        with pytest.raises(StoreError, match='loss is "mse" there, "l1" is asked for'):
            ask(replace(subject, loss="l1"), store, toy_queries, [TRACIN], tmp_path)

    def test_images_with_other_content_under_the_same_ids(self, subject, toy_queries, tmp_path):
        """Such as another caption, or latents of another encoder, where no record knows better."""
        alone = replace(subject, record=None, train=subject.train.select([0, 1, 2]))
        held = index(alone, GRID, tmp_path, show_progress=False)
        some = Conditions(("a", "b"), {}, np.array([0, 0, 1]))
        told = replace(alone, train=replace(alone.train, encoding=Encoded("x", None, None, some)))
        with pytest.raises(StoreError, match="content of samples has changed .* train-0, train-1, train-2"):
            ask(told, held, toy_queries, [GRAD_DOT], tmp_path)
        assert not (tmp_path / "cache" / "queries").exists()

    def test_a_projection_of_another_version(self, subject, store, toy_queries, tmp_path, monkeypatch):
        monkeypatch.setattr("whence.store_spec.PROJECTION_VERSION", 2)
        with pytest.raises(StoreError, match="projection version is 1 there, 2 is asked for"):
            ask(subject, store, toy_queries, [TRACIN], tmp_path)

    def test_a_store_that_says_nothing(self, subject, toy_queries, tmp_path):
        blank = Store.create(tmp_path / "blank", {}, width=2, dtype="float16")
        with pytest.raises(StoreError, match="does not say what its rows are"):
            ask(subject, blank, toy_queries, [TRACIN], tmp_path)

    def test_other_parameters(self, subject, store, toy_queries, tmp_path):
        spec = {**store.spec, "space": {**store.spec["space"], "parameters": {"conv_in.bias": [8]}}}
        odd = Store.create(tmp_path / "odd", spec, width=store.width, dtype="float32")
        with pytest.raises(StoreError, match="holds gradients of other parameters than checkpoint"):
            ask(subject, odd, toy_queries, [TRACIN], tmp_path)

    def test_an_unfinished_store(self, subject, store, toy_queries, tmp_path):
        half = index(subject, EXACT, tmp_path, part=(1, 2), show_progress=False)
        with pytest.raises(StoreError, match="lacks 4 of the training images: train-4"):
            ask(subject, half, toy_queries, [TRACIN], tmp_path)
        half.shards(12)[0].sidecar_path.unlink()
        with pytest.raises(StoreError, match="is not finished: step"):
            ask(subject, Store.open(half.folder), toy_queries, [TRACIN], tmp_path)

    def test_a_damaged_store(self, subject, toy_queries, tmp_path):
        held = index(subject, EXACT, tmp_path, show_progress=False)
        path = held.shards(12)[0].path
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
        with pytest.raises(StoreError, match="is damaged"):
            ask(subject, held, toy_queries, [TRACIN], tmp_path)

    def test_more_images_than_there_are(self, subject, toy_queries, tmp_path):
        foreign = replace(subject, record=None)
        held = index(foreign, GRID, tmp_path, show_progress=False)
        fewer = replace(foreign, train=subject.train.select(range(8)))
        with pytest.raises(StoreError, match="holds 2 images that are not among the training images: train-8, train-9"):
            ask(fewer, held, toy_queries, [GRAD_DOT], tmp_path)


class TestIndexing:
    def test_a_second_time_computes_nothing(self, subject, tmp_path, monkeypatch):
        first = index(subject, EXACT, tmp_path, show_progress=False)
        before = {p: p.stat().st_mtime_ns for p in first.folder.rglob("*.safetensors")}
        index(subject, EXACT, tmp_path, show_progress=False)
        assert {p: p.stat().st_mtime_ns for p in first.folder.rglob("*.safetensors")} == before
        assert first.verify() == [] and first.folder.name == first.spec_sha256[:16]

    def test_parts_make_the_whole(self, subject, store, tmp_path):
        for k in (3, 1, 2):
            held = index(subject, EXACT, tmp_path, part=(k, 3), show_progress=False)
        assert shas(held) == shas(store)

    def test_stores_filled_apart_are_merged(self, subject, store, tmp_path):
        parts = [index(subject, EXACT, tmp_path / str(k), part=(k, 2), show_progress=False) for k in (1, 2)]
        assert merge_stores(parts[0], parts[1:]) == 2
        assert shas(parts[0]) == shas(store)

    def test_more_images_come_into_new_blocks(self, subject, toy_queries, tmp_path):
        foreign = replace(subject, record=None, train=subject.train.select(range(8)))
        held = index(foreign, GRID, tmp_path, show_progress=False)
        before = shas(held)
        more = replace(foreign, train=toy_images(10))
        grown = index(more, GRID, tmp_path, show_progress=False)
        assert grown.folder == held.folder and before.items() <= shas(grown).items()
        assert ask(more, grown, toy_queries, [GRAD_DOT], tmp_path)["grad-dot"].values.shape == (3, 10)
        changed = replace(more, train=toy_images(10, seed=5))
        with pytest.raises(StoreError, match="content of samples has changed"):
            index(changed, GRID, tmp_path, show_progress=False)

    def test_layers_on_the_time_embedding_are_sketched_directly(self, subject, tmp_path):
        held = index(subject, IndexSettings(width=64, **TRAIN_SIDE), tmp_path, show_progress=False)
        direct = held.spec["space"]["projection"]["direct"]
        assert "time_embedding.linear_1.weight" in direct
        assert not any("to_q" in name or "conv" in name for name in direct)

    def test_norms_are_exact_unless_projected_ones_are_asked_for(self, subject, store, tmp_path):
        sketched = IndexSettings(width=64, **TRAIN_SIDE)
        exact = index(subject, sketched, tmp_path, show_progress=False)
        projected = index(subject, replace(sketched, norms="projected"), tmp_path, show_progress=False)
        (a, b, c) = (s.shards(12)[0].read("norms") for s in (store, exact, projected))
        np.testing.assert_allclose(a, b, rtol=1e-5)
        assert not np.allclose(b, c, rtol=1e-3)
        rows = projected.shards(12)[0].read("rows").astype(np.float32)
        np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, rtol=1e-3)

    def test_columns_serve_every_rule_of_weights(self, store):
        (shard, *_) = store.shards(12)
        assert {"weight.learning_rate", "weight.equal", "weight.published", "timestep"} <= shard.arrays.keys()
        np.testing.assert_array_equal(shard.read("weight.equal"), 1)

    def test_a_gradient_of_zero_is_a_zero_row_and_is_told(self, subject, tmp_path):
        visits = subject.record.visits
        is_third = visits.sample == subject.record.sample_ids.index("train-3")
        weights = np.where(is_third, 0.0, 1.0).astype(np.float32)
        silent = replace(subject, record=replace(subject.record, visits=replace(visits, loss_weight=weights)))
        held = index(silent, EXACT, tmp_path, show_progress=False)
        (note,) = notes_on_store(held)
        assert note == "2 pairs of checkpoint and image have a gradient of zero: train-3 at step 6, train-3 at step 12."

    def test_images_without_a_visit_have_no_row_and_are_told(self, subject, toy_queries, tmp_path):
        visits = subject.record.visits
        fewer = visits.where(visits.sample != subject.record.sample_ids.index("train-3"))
        unvisited = replace(subject, record=replace(subject.record, visits=fewer))
        held = index(unvisited, EXACT, tmp_path, show_progress=False)
        assert "2 pairs of checkpoint and image have no visit" in notes_on_store(held)[0]
        scores = ask(unvisited, held, toy_queries, [TRACIN], tmp_path)["tracin"]
        assert (scores.values[:, 3] == 0).all() and np.isnan(scores.train_norms[:, 3]).all()

    def test_a_nan_stops(self, subject, tmp_path):
        visits = subject.record.visits
        broken = visits.loss_weight.copy()
        broken[:] = np.nan
        odd = replace(subject, record=replace(subject.record, visits=replace(visits, loss_weight=broken)))
        with pytest.raises(NumericsError, match="is not finite at checkpoint 12"):
            index(odd, EXACT, tmp_path, show_progress=False)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"replay": "last", "grid": True}, "replay has no effect"),
            ({"train_draws": 2}, "train_timesteps and train_draws have no effect"),
            ({"keep": "sum"}, "keep='sum' has no effect"),
            ({"replay": "all", "keep": "sum", "norms": "projected"}, "norms='projected' has no effect"),
        ],
    )
    def test_settings_without_effect_warn(self, subject, tmp_path, change, message):
        with pytest.warns(UserWarning, match=message):
            index(subject, replace(EXACT, **change), tmp_path, show_progress=False)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"width": 0}, "width must be above 0, found 0"),
            ({"grid": True, "train_draws": 9}, r"batch_size must hold all draws of a timestep \(9\), found 8"),
            ({"dtype": "float64", "autocast": "bf16"}, "float64 .* autocast"),
        ],
    )
    def test_settings_that_cannot_be_met_are_refused(self, subject, tmp_path, change, message):
        with pytest.raises(ConfigError, match=message):
            index(subject, replace(EXACT, **change), tmp_path, show_progress=False)

    def test_a_part_that_is_none_is_refused(self, subject, tmp_path):
        with pytest.raises(ConfigError, match="part must be one of 1/n to n/n, found 3/2"):
            index(subject, EXACT, tmp_path, part=(3, 2), show_progress=False)

    def test_memory_bounds_the_batch(self, subject, tmp_path, monkeypatch):
        free = index(subject, EXACT, tmp_path / "free", show_progress=False)
        with pytest.raises(
            ConfigError, match=r"memory=1MiB does not hold .* tables of a projection .* \d+MiB"
        ) as refused:
            index(subject, replace(EXACT, memory="1MiB"), tmp_path, show_progress=False)
        smallest = str(refused.value).rstrip(".").rsplit(" ", 1)[1]
        chosen = []
        rows = GradientSource.rows
        monkeypatch.setattr(
            GradientSource,
            "rows",
            lambda self, *args, **kw: (chosen.append(self.batch_size), rows(self, *args, **kw))[1],
        )
        bound = index(subject, replace(EXACT, memory=smallest), tmp_path / "bound", show_progress=False)
        assert max(chosen) < EXACT.batch_size
        assert bound.spec["space"] == free.spec["space"]
        assert bound.spec["provenance"]["batch_size"] == max(chosen)
        for one, other in zip(free.shards(12), bound.shards(12), strict=True):
            np.testing.assert_allclose(one.read("rows"), other.read("rows"), atol=1e-5)

    def test_content_hashes_are_of_pixels(self, toy_train):
        first, second = content_hashes(toy_train.select([0, 1]))
        assert first != second and content_hashes(toy_train.select([1])) == [second]


def shas(store):
    return {shard.path.name: shard.sha256 for step in store.steps for shard in store.shards(step)}


def start_indexing(run, folder):
    """Start a process that indexes the run of the fixture ``subject``, with as many threads as this one has."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[3])\n"
        "from pathlib import Path\n"
        "from conftest import EXACT, Record, Subject, index, list_checkpoints, toy_images\n"
        "run = Path(sys.argv[1])\n"
        "subject = Subject(list_checkpoints(run), toy_images(10), Record.open(run / 'record'), 'mse')\n"
        "index(subject, EXACT, Path(sys.argv[2]), show_progress=False)\n"
    )
    command = [sys.executable, "-c", code, str(run), str(folder), str(Path(__file__).parent)]
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE)


def test_two_processes_share_the_work(subject, store, toy_run, tmp_path):
    """Started at the same moment on the same store: both end well, and every block is there once."""
    for worker in [start_indexing(toy_run, tmp_path) for _ in range(2)]:
        _, said = worker.communicate(timeout=120)
        assert worker.returncode == 0, said.decode()
    (folder,) = (tmp_path / "stores").iterdir()
    both = Store.open(folder)
    assert both.verify() == [] and shas(both) == shas(store)


def test_killed_while_indexing_goes_on_to_the_same_bytes(subject, store, toy_run, tmp_path):
    """Killed with SIGKILL as soon as there are some shards, several times, then run again."""
    for num_shards in (1, 3, 4):
        worker = start_indexing(toy_run, tmp_path)
        while len(list(tmp_path.rglob("*.safetensors"))) < num_shards and worker.poll() is None:
            time.sleep(0.005)
        worker.kill()
        _, said = worker.communicate(timeout=60)
        assert worker.returncode in (0, -signal.SIGKILL), said.decode()
    held = index(subject, EXACT, tmp_path, show_progress=False)
    assert shas(held) == shas(store)
    assert not [finding for finding in held.verify() if "interrupted" not in finding]
