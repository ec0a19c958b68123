from dataclasses import replace

import numpy as np
import pytest

import whence.reliability
from whence.attribution import trace
from whence.checkpoints import list_checkpoints
from whence.config import IndexSettings, QuerySettings, TraceSettings
from whence.errors import ConfigError
from whence.indexing import index
from whence.methods import JOURNEY_TRAK, MATCHED_COS, PIXELS, RETRAC, TRACIN, Grid
from whence.record import Record
from whence.reliability import (
    Target,
    choose_next,
    largest_grid,
    predicted,
    query_until,
    restrict,
    schedule,
    trace_until,
)
from whence.scores import Scores
from whence.subject import Subject

SETTINGS = TraceSettings(timesteps=12, draws=4, phases=1, batch_size=8, block_size=4, dtype="float64")
QUIET = {"show_progress": False}


@pytest.fixture(scope="module")
def subject(toy_run, toy_train):
    return Subject(list_checkpoints(toy_run), toy_train, Record.open(toy_run / "record"), "mse")


def sizes(scores):
    return [(r["timesteps"], r["draws"], r["images"]) for r in scores.details["budget"]["rounds"]]


def noisy(reliability, method="by hand", queries=1):
    """Scores whose halves have a split-half reliability of this."""
    r = reliability / (2 - reliability)  # correlation of the halves
    x, y = np.array([1.0, -1, 1, -1]), np.array([1.0, 1, -1, -1])
    halves = np.stack([x, r * x + np.sqrt(1 - r * r) * y])[:, None].repeat(queries, axis=1)
    ids = tuple(map(str, range(queries)))
    return Scores(method, ids, tuple("abcd"), halves.mean(0), halves=halves, query_timesteps=np.array([1]))


def test_timesteps_double_first_then_draws():
    sizes = [(grid.timesteps, grid.draws) for grid in schedule(Grid(100, 16))]
    assert sizes == [(8, 2), (16, 2), (32, 2), (64, 2), (100, 2), (100, 4), (100, 8), (100, 16)]
    assert schedule(Grid(3, 6)) == [Grid(3, 2), Grid(3, 4), Grid(3, 6)]
    assert schedule(Grid(2, 2)) == [Grid(2, 2)]
    assert schedule(Grid(100, 2), phases=50) == [Grid(50, 2), Grid(100, 2)]


def test_the_next_grid_is_the_smallest_that_should_do():
    grids = schedule(Grid(100, 16))
    assert predicted(0.6, 4.0) == pytest.approx(2.4 / 2.8)
    # From 0.6 at 16 events, 0.9 takes 6 times as many: 128 events, not 64.
    assert grids[choose_next(grids, 0, 0.6, 0.9)] == Grid(64, 2)
    assert grids[choose_next(grids, 0, 0.4, 0.9)] == grids[choose_next(grids, 0, None, 0.9)] == Grid(16, 2)
    assert grids[choose_next(grids, 3, 0.6, 0.999)] == Grid(100, 16)
    assert choose_next(grids, 7, 0.6, 0.9) == 7


def test_a_target_is_of_the_median_or_the_worst_query():
    scores = [noisy(0.9), noisy(0.5), noisy(0.8)]
    three = replace(noisy(0.9, queries=3), halves=np.concatenate([s.halves for s in scores], axis=1))
    assert Target(0.95).measure(three) == pytest.approx(0.8)
    assert Target(0.95, "worst").measure(three) == pytest.approx(0.5)
    constant = replace(three, halves=np.where(np.arange(3)[:, None] == 1, 1.0, three.halves))
    assert Target(0.95).measure(constant) == pytest.approx(0.85)
    assert Target(0.95, "worst").measure(constant) is None
    assert Target(0.95).measure(replace(three, halves=None)) is None
    with pytest.raises(ConfigError, match="until is a reliability, above 0 and below 1; found 1.5"):
        Target(1.5)


@pytest.mark.parametrize(
    "by_events, has_pilot, want",
    [
        # A first look at 16 events says that 64 do; they do.
        ({16: 0.83, 64: 0.96}, True, [(8, 2), (32, 2)]),
        # It says so, and they do not: from what they gave, 400 are enough, passing 128 and 200 over.
        ({16: 0.83, 64: 0.85, 400: 0.96}, True, [(8, 2), (32, 2), (100, 4)]),
        # It is good enough: the same grid with all images.
        ({16: 0.96}, True, [(8, 2), (8, 2)]),
        # It says too little: look again with twice as many.
        ({16: 0.2, 32: 0.92, 64: 0.99}, True, [(8, 2), (16, 2), (32, 2)]),
        # Nothing will do.
        (dict.fromkeys([16, 32, 64, 128, 200, 400, 800, 1600], 0.1), False, None),
    ],
)
def test_the_path_to_a_target(tmp_path, by_events, has_pilot, want):
    asked = []

    def attempt(grid, *, first_look):
        asked.append((grid.timesteps, grid.draws, first_look))
        folder = tmp_path / "scores" / f"{grid.timesteps}-{grid.draws}-{first_look}"
        noisy(by_events[grid.timesteps * grid.draws]).save(folder)
        return {"by hand": Scores.load(folder)}, 4, 7

    grids = schedule(Grid(100, 16))
    found, settings = whence.reliability._run(
        grids, attempt, QuerySettings(), tmp_path, Target(0.95), has_pilot=has_pilot
    )
    want = want or [(grid.timesteps, grid.draws) for grid in grids]
    assert [pair[:2] for pair in asked] == want
    assert not asked[-1][2] and all(first_look is has_pilot for *_, first_look in asked[:1])
    assert (settings.timesteps, settings.draws) == want[-1]
    budget = found["by hand"].details["budget"]
    assert [(r["timesteps"], r["draws"], r["sample_passes"]) for r in budget["rounds"]] == [(*w, 7) for w in want]
    assert budget["reached"] is (by_events[want[-1][0] * want[-1][1]] >= 0.95)
    notes = [note for note in found["by hand"].notes if "the most allowed; 0.95 was asked for" in note]
    assert bool(notes) is not budget["reached"]
    # What fell short is gone; what was only looked at is the caller's.
    left = {path.name for path in (tmp_path / "scores").iterdir()}
    assert left == {f"{t}-{d}-{f}" for t, d, f in asked if f or (t, d, f) == asked[-1]}


def test_some_images_alone_have_the_scores_they_have_among_all(subject, toy_queries, tmp_path):
    rows = [1, 4, 7]
    part = restrict(subject, rows)
    few, everything = (
        trace(s, toy_queries, [TRACIN, RETRAC], replace(SETTINGS, timesteps=3), tmp_path, **QUIET)
        for s in (part, subject)
    )
    for name in few:
        np.testing.assert_allclose(few[name].values, everything[name].values[:, rows], rtol=1e-9)
        np.testing.assert_array_equal(few[name].train_timesteps, everything[name].train_timesteps[:, rows])


def test_a_trace_takes_no_more_than_it_needs(subject, toy_queries, tmp_path, monkeypatch):
    monkeypatch.setattr(whence.reliability, "PILOT_IMAGES", 6)
    methods = [TRACIN, RETRAC, PIXELS]
    found, settings = trace_until(subject, toy_queries, methods, SETTINGS, tmp_path, Target(1e-6), **QUIET)
    assert list(found) == ["tracin", "retrac", "pixels"] and "budget" not in found["pixels"].details
    assert sizes(found["retrac"]) == [(8, 2, 6), (8, 2, 10)]
    plain = trace(subject, toy_queries, methods, replace(SETTINGS, timesteps=8, draws=2), tmp_path / "plain", **QUIET)
    np.testing.assert_array_equal(found["retrac"].values, plain["retrac"].values)
    assert settings == replace(SETTINGS, timesteps=8, draws=2)
    first, second = found["tracin"].details["budget"]["rounds"]
    visits, grids = 2 * 10, 2 * 3 * 16  # two checkpoints
    assert (first["sample_passes"], second["sample_passes"]) == (2 * 6 + grids, visits + grids)
    assert first["reliability"].keys() == {"tracin", "retrac"}
    assert not (tmp_path / "cache" / "until").exists()


def test_a_target_out_of_reach_is_said_and_a_later_one_replaces_it(subject, toy_queries, tmp_path):
    few = replace(SETTINGS, timesteps=8, draws=4)
    found, _ = trace_until(subject, toy_queries, [RETRAC], few, tmp_path, Target(1 - 1e-9), **QUIET)
    assert sizes(found["retrac"]) == [(8, 2, 10), (8, 4, 10)]
    assert any("with 8 timesteps x 4 draws, the most allowed; 1 was asked" in note for note in found["retrac"].notes)
    assert len(list((tmp_path / "scores").iterdir())) == 1
    again, _ = trace_until(subject, toy_queries, [RETRAC], replace(few, draws=2), tmp_path, Target(1e-6), **QUIET)
    assert again["retrac"].details["budget"]["reached"] and len(list((tmp_path / "scores").iterdir())) == 2
    assert not any("was asked for" in note for note in again["retrac"].notes)


def test_a_query_to_a_store_stops_too(subject, toy_queries, tmp_path):
    store = index(subject, IndexSettings(width=64, batch_size=8, block_size=4), tmp_path, **QUIET)
    asked = QuerySettings(timesteps=12, draws=4, batch_size=8)
    found, settings = query_until(subject, store, toy_queries, [RETRAC], asked, tmp_path, Target(1e-6), **QUIET)
    assert sizes(found["retrac"]) == [(8, 2, 10)] and settings.timesteps == 8
    assert found["retrac"].details["budget"]["rounds"][0]["sample_passes"] == 2 * 3 * 16


def test_what_the_largest_grid_would_raise_is_raised_at_once(subject, toy_queries, tmp_path):
    large = replace(SETTINGS, draws=16)  # batch_size is 8
    with pytest.raises(ConfigError, match=r"batch_size must hold all draws of a timestep \(16\), found 8"):
        trace_until(subject, toy_queries, [RETRAC], large, tmp_path, Target(0.9), **QUIET)
    assert not (tmp_path / "scores").exists()


def test_grids_that_cannot_grow_are_refused():
    assert largest_grid([TRACIN, PIXELS], QuerySettings()) == Grid(100, 16)
    assert largest_grid([TRACIN], QuerySettings(timesteps=10)) == Grid(10, 16)
    with pytest.raises(
        ConfigError, match="those of matched-cos, journey-trak are given by a sampler's steps or by the"
    ):
        largest_grid([TRACIN, MATCHED_COS, JOURNEY_TRAK], QuerySettings())
    with pytest.raises(ConfigError, match="until needs a method with gradients"):
        largest_grid([PIXELS], QuerySettings())
    with pytest.raises(ConfigError, match="draws must be even; found 5"):
        largest_grid([TRACIN], QuerySettings(draws=5))
