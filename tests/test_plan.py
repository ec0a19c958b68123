"""The plan against what a run then does: passes, disk, turns; and what it refuses."""

from dataclasses import replace

import numpy as np
import pytest

import whence.streaming
from whence.attribution import trace
from whence.config import TraceSettings
from whence.errors import ConfigError
from whence.gradients import GradientSource
from whence.memory import measure_footprint
from whence.methods import EKFAC, GRAD_COS, PIXELS, RETRAC, TRACIN
from whence.plan import plan
from whence.progress import progress_bar
from whence.subject import Subject

SETTINGS = TraceSettings(timesteps=5, draws=4, phases=2, batch_size=8, block_size=4)
METHODS = [TRACIN, RETRAC, GRAD_COS, PIXELS]


@pytest.fixture(scope="module")
def three_turns(subject):
    """A bound that holds one query of tracin and retrac at a time."""
    footprint = measure_footprint(subject, SETTINGS)
    needs = footprint.weights + 7 * footprint.gradient + 4 * footprint.gradient + footprint.summed(8)
    return replace(SETTINGS, memory=f"{needs // 1024 + 1}KiB")


@pytest.fixture
def bars(monkeypatch):
    """Every progress bar that is opened, to be looked at when it is done."""
    opened = []

    def opening(*arguments, **options):
        opened.append(progress_bar(*arguments, **(options | {"shown": True})))
        return opened[-1]

    monkeypatch.setattr(whence.streaming, "progress_bar", opening)
    return opened


@pytest.mark.parametrize("bound", [False, True])
def test_passes_are_those_that_the_bar_of_the_run_counts(
    subject, toy_queries, tmp_path, bars, three_turns, bound, capsys
):
    settings = three_turns if bound else SETTINGS
    planned = plan(subject, toy_queries, METHODS, settings, tmp_path)
    trace(subject, toy_queries, METHODS, settings, tmp_path)
    assert [bar.n for bar in bars] == [one.sample_passes for one in planned.passes]
    assert [bar.total for bar in bars] == [one.sample_passes for one in planned.passes]
    assert planned.passes[0].turns == (3 if bound else 1)
    assert planned.sample_passes == sum(bar.n for bar in bars)
    assert [count.query for count in planned.passes[0].passes] == [3 * 5 * 4] * 2
    assert planned.passes[0].methods == ("tracin", "retrac")


def test_bytes_on_disk_are_those_of_the_run(subject, toy_queries, tmp_path, monkeypatch):
    methods = [TRACIN, RETRAC, PIXELS]
    planned = plan(subject, toy_queries, methods, SETTINGS, tmp_path)
    monkeypatch.setattr(whence.streaming.StreamingPass, "clean", lambda self: None)
    trace(subject, toy_queries, methods, SETTINGS, tmp_path, show_progress=False)
    scores = sum(p.stat().st_size for p in (tmp_path / "scores").rglob("*") if p.is_file())
    assert planned.score_bytes == pytest.approx(scores, rel=0.1)
    tiles = list((tmp_path / "cache").rglob("tile-*"))
    headers = sum(8 + int.from_bytes(p.read_bytes()[:8], "little") for p in tiles)  # safetensors: length, then JSON
    assert planned.cache_bytes == pytest.approx(sum(p.stat().st_size for p in tiles) - headers, rel=0.1)


def test_minutes_are_of_the_order_of_the_run(subject, toy_queries, tmp_path, monkeypatch):
    planned = plan(subject, toy_queries, [RETRAC], SETTINGS, tmp_path)
    assert 0 < planned.minutes < 1
    # Two checkpoints, 60 passes of queries and 20 of training images: twice the events are about twice the time.
    more = plan(subject, toy_queries, [RETRAC], replace(SETTINGS, timesteps=20), tmp_path)
    assert more.sample_passes == 2 * (3 * 20 * 4) + 20


def test_what_is_on_disk_costs_nothing(subject, toy_queries, tmp_path):
    trace(subject, toy_queries, METHODS, SETTINGS, tmp_path, show_progress=False)
    planned = plan(subject, toy_queries, METHODS, SETTINGS, tmp_path)
    assert (planned.passes, planned.sample_passes, planned.score_bytes, planned.minutes) == ([], 0, 0, 0)
    assert (planned.peak_bytes, planned.cache_bytes, planned.store_bytes) == (0, 0, 0)


def test_methods_without_a_model_cost_only_their_scores(subject, toy_queries, tmp_path, monkeypatch):
    monkeypatch.setattr(Subject, "source", lambda *a: pytest.fail("a model was loaded"))
    planned = plan(subject, toy_queries, [PIXELS], SETTINGS, tmp_path)
    assert planned.passes == [] and planned.score_bytes > 3 * 10 * 4


def test_nothing_is_written(subject, toy_queries, tmp_path):
    plan(subject, toy_queries, METHODS, SETTINGS, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_few_batches_are_made(subject, toy_queries, tmp_path, monkeypatch):
    batches, backward = [], GradientSource._backward
    monkeypatch.setattr(
        GradientSource,
        "_backward",
        lambda self, table, *rest: batches.append(len(table)) or backward(self, table, *rest),
    )
    plan(subject, toy_queries, [RETRAC], replace(SETTINGS, timesteps=20), tmp_path)
    # Four small ones measure memory, one is checked, and three of each side are timed; each is at most of full size.
    assert len(batches) <= 4 + 1 + 3 + 4 and max(batches) <= 8


def test_memory_grows_with_the_queries_held_until_the_bound(subject, toy_queries, tmp_path, three_turns):
    free = plan(subject, toy_queries, [TRACIN, RETRAC], SETTINGS, tmp_path)
    bound = plan(subject, toy_queries, [TRACIN, RETRAC], three_turns, tmp_path)
    gradient = measure_footprint(subject, SETTINGS).gradient
    assert free.peak_bytes - bound.peak_bytes == 2 * 7 * gradient


def test_a_bound_that_is_too_small_is_refused(subject, toy_queries, tmp_path):
    with pytest.raises(ConfigError, match=r"memory=2MiB does not hold .*; the smallest bound that does is \d+MiB"):
        plan(subject, toy_queries, [RETRAC], replace(SETTINGS, memory="2MiB"), tmp_path)


def test_passes_for_curvature_are_part_of_a_checkpoints_passes(subject, toy_queries, tmp_path):
    planned = plan(subject, toy_queries, [EKFAC], SETTINGS, tmp_path)
    (one,) = planned.passes
    (count,) = one.passes
    assert count.curvature == 10 * 10 * 2  # ten images, ten timesteps, twice
    assert one.at_checkpoint(count) == one.sample_passes == 3 * 5 * 4 + 10 * 10 + 10 * 10 * 2


def test_a_model_without_a_record(subject, toy_queries, tmp_path, bars):
    foreign = replace(subject, record=None)
    settings = replace(SETTINGS, train_timesteps=3, train_draws=2)
    planned = plan(foreign, toy_queries, [RETRAC], settings, tmp_path)
    trace(foreign, toy_queries, [RETRAC], settings, tmp_path)
    assert [bar.n for bar in bars] == [planned.sample_passes]
    assert np.isfinite(planned.minutes)
