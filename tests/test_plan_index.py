"""The plan of an index and of queries to it against what both then do."""

from dataclasses import replace

import pytest

import whence.indexing
import whence.query_vectors
from whence.config import IndexSettings, QuerySettings
from whence.errors import ConfigError, StoreError
from whence.gradients import GradientSource
from whence.indexing import index
from whence.memory import measure_footprint
from whence.methods import D_TRAK, DATAINF, EKFAC, GRAD_COS, INFLUENCE_CG, PIXELS, RETRAC, TRACIN, TRACIN_ADAM, Grid
from whence.plan_index import plan_index
from whence.progress import progress_bar
from whence.querying import query
from whence.subject import Subject

SETTINGS = IndexSettings(batch_size=8, block_size=4, width=64)
ASKED = QuerySettings(timesteps=5, draws=4, batch_size=8)


@pytest.fixture
def bars(monkeypatch):
    """Every progress bar that is opened, to be looked at when it is done."""
    opened = []

    def opening(*arguments, **options):
        opened.append(progress_bar(*arguments, **(options | {"shown": True})))
        return opened[-1]

    for module in (whence.indexing, whence.query_vectors):
        monkeypatch.setattr(module, "progress_bar", opening)
    return opened


def num_bytes(folder):
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


class TestIndex:
    @pytest.mark.parametrize(
        "changes",
        [
            {},
            {"replay": "all", "keep": "sum", "rows": "float32"},
            {"grid": True, "checkpoints": "last", "output": "squares", "train_timesteps": 3, "train_draws": 2},
            {"grid": True, "train_timesteps": 3, "keep": "sum", "rows": "bfloat16", "norms": "projected", "side": 4},
            {"projection": "two_sided", "side": 2},
        ],
    )
    def test_passes_and_bytes_are_those_of_the_run(self, subject, tmp_path, bars, changes):
        settings = replace(SETTINGS, **changes)
        if changes.get("norms") == "projected":
            with pytest.warns(UserWarning, match="norms='projected' has no effect"):
                planned = plan_index(subject, settings, tmp_path)
            settings = replace(settings, norms="exact")
        else:
            planned = plan_index(subject, settings, tmp_path)
        assert list(tmp_path.iterdir()) == []  # nothing is written
        store = index(subject, settings, tmp_path)
        assert [bar.n for bar in bars] == [planned.sample_passes]
        (one,) = planned.passes
        assert [count.step for count in one.passes] == store.steps
        assert one.methods == ("index",) and planned.score_bytes == planned.cache_bytes == 0
        shards = num_bytes(store.folder) - (store.folder / "manifest.json").stat().st_size
        assert planned.store_bytes == pytest.approx(shards, rel=0.05)
        assert 0 < planned.minutes < 1

    def test_the_batch_is_the_one_that_the_run_chooses(self, subject, tmp_path):
        needs = measure_footprint(subject, SETTINGS)
        bound = needs.weights + needs.gradient + needs.one_by_one(5)
        settings = replace(SETTINGS, memory=f"{bound // 1024 + 1}KiB")
        planned = plan_index(subject, settings, tmp_path)
        store = index(subject, settings, tmp_path, show_progress=False)
        assert planned.passes[0].batch_size == store.spec["provenance"]["batch_size"] == 5
        assert planned.peak_bytes == bound
        with pytest.raises(ConfigError, match="smallest bound that does is"):
            plan_index(subject, replace(settings, memory="1MiB"), tmp_path)

    def test_what_is_there_costs_nothing(self, subject, tmp_path, bars, monkeypatch):
        index(subject, SETTINGS, tmp_path, part=(1, 2))
        planned = plan_index(subject, SETTINGS, tmp_path)
        index(subject, SETTINGS, tmp_path)
        assert [bar.n for bar in bars] == [12, 8] and planned.sample_passes == 8  # blocks of 4, 4, 2 at two checkpoints
        monkeypatch.setattr(Subject, "source", lambda *a: pytest.fail("a model was loaded"))
        assert plan_index(subject, SETTINGS, tmp_path).passes == []

    def test_few_batches_are_made(self, subject, tmp_path, monkeypatch):
        batches, backward = [], GradientSource._backward
        monkeypatch.setattr(
            GradientSource,
            "_backward",
            lambda self, table, *rest: batches.append(len(table)) or backward(self, table, *rest),
        )
        plan_index(subject, replace(SETTINGS, grid=True, train_timesteps=30, train_draws=2), tmp_path)
        assert len(batches) <= 4 + 1 + 3 and max(batches) <= 8


class TestQueries:
    def test_passes_are_those_of_the_run(self, subject, toy_queries, tmp_path, bars):
        methods = [TRACIN, RETRAC]
        planned = plan_index(subject, SETTINGS, tmp_path, queries=toy_queries, methods=methods, asked=ASKED)
        store = index(subject, SETTINGS, tmp_path)
        query(subject, store, toy_queries, methods, ASKED, tmp_path)
        assert [bar.n for bar in bars] == [one.sample_passes for one in planned.passes] == [20, 2 * 3 * 5 * 4]
        assert planned.passes[1].methods == ("tracin", "retrac")
        scores = num_bytes(tmp_path / "scores")
        assert planned.score_bytes == pytest.approx(scores, rel=0.15)
        assert planned.cache_bytes == pytest.approx(num_bytes(tmp_path / "cache" / "queries"), rel=0.25)  # and headers
        again = plan_index(subject, SETTINGS, tmp_path, queries=toy_queries, methods=methods, asked=ASKED)
        assert (again.passes, again.score_bytes) == ([], 0)

    @pytest.mark.parametrize(
        ("method", "passes"),
        [
            (EKFAC, 2 * 10 * 2),
            (DATAINF, 2 * 10 * 2),
            (INFLUENCE_CG, 2 * 2 + 2 * (2 * 2) * 3 * 5 * 3),  # products x events x queries x vectors x (iterations + 1)
            (TRACIN_ADAM, 0),
        ],
        ids=lambda value: getattr(value, "name", None),
    )
    @pytest.mark.filterwarnings("ignore:Conjugate gradients reached")
    def test_passes_for_curvature_are_counted(self, subject, toy_queries, tmp_path, bars, method, passes):
        if method != TRACIN_ADAM:
            method = replace(method, precondition=replace(method.precondition, events=Grid(timesteps=2)))
        if method.name == "influence-cg":
            method = replace(method, precondition=replace(method.precondition, num_images=2, max_iterations=2))
        checkpoints = 2 if method == TRACIN_ADAM else 1
        settings = SETTINGS if method == TRACIN_ADAM else replace(SETTINGS, grid=True, checkpoints="last")
        planned = plan_index(subject, settings, tmp_path, queries=toy_queries, methods=[method], asked=ASKED)
        store = index(subject, settings, tmp_path)
        query(subject, store, toy_queries, [method], ASKED, tmp_path)
        _, asked = planned.passes
        assert bars[1].n == bars[1].total == asked.sample_passes == checkpoints * 3 * 5 * 4 + passes
        headers = 800 * 3 * checkpoints
        assert 0 < num_bytes(tmp_path / "cache" / "queries") - planned.cache_bytes < headers and asked.peak_bytes > 0
        scores = num_bytes(tmp_path / "scores")
        assert planned.score_bytes == pytest.approx(scores, rel=0.15)
        assert plan_index(subject, settings, tmp_path, queries=toy_queries, methods=[method], asked=ASKED).passes == []

    def test_gradients_that_are_kept_are_not_taken_again(self, subject, toy_queries, tmp_path):
        store = index(subject, SETTINGS, tmp_path, show_progress=False)
        query(subject, store, toy_queries, [TRACIN], ASKED, tmp_path, show_progress=False)
        planned = plan_index(subject, SETTINGS, tmp_path, queries=toy_queries, methods=[RETRAC], asked=ASKED)
        assert planned.sample_passes == 0 and planned.score_bytes > 0

    @pytest.mark.parametrize(("method", "needs"), [(GRAD_COS, "Grid"), (D_TRAK, "gradients of squares")])
    def test_a_store_that_would_not_serve_is_refused(self, subject, toy_queries, tmp_path, method, needs):
        with pytest.raises(StoreError, match=f"cannot be had from .* it needs .*{needs}"):
            plan_index(subject, SETTINGS, tmp_path, queries=toy_queries, methods=[method], asked=ASKED)

    def test_a_baseline_is_refused(self, subject, toy_queries, tmp_path):
        with pytest.raises(ConfigError, match="pixels needs no gradients and so no store"):
            plan_index(subject, SETTINGS, tmp_path, queries=toy_queries, methods=[PIXELS])


def test_a_full_store_is_found_without_a_model(subject, tmp_path, monkeypatch):
    index(subject, replace(SETTINGS, width=32), tmp_path, show_progress=False)
    store = index(subject, SETTINGS, tmp_path, show_progress=False)
    (tmp_path / "stores" / "0").mkdir()
    (tmp_path / "stores" / "0" / "manifest.json").write_text("damaged")
    loaded = []
    source = Subject.source
    monkeypatch.setattr(Subject, "source", lambda *a: loaded.append(1) or source(*a))
    assert index(subject, SETTINGS, tmp_path, show_progress=False).folder == store.folder
    assert loaded == []
    for changes in ({"rows": "float32"}, {"seed": 1}, {"projection_seed": 1}, {"width": 48}, {"batch_size": 4}):
        other = index(subject, replace(SETTINGS, **changes), tmp_path, show_progress=False)
        assert other.folder != store.folder and loaded, changes
        loaded.clear()
    shard = store.shards(store.steps[0])[0]
    shard.path.unlink()
    shard.sidecar_path.unlink()
    index(subject, SETTINGS, tmp_path, show_progress=False)
    assert loaded and shard.path.exists()
