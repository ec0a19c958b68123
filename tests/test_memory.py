"""A bound on memory: what it chooses, what it refuses, and that the measurement holds for larger batches."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from whence.attribution import trace
from whence.config import TraceSettings
from whence.errors import ConfigError
from whence.event_table import grid_events
from whence.gauss_newton import GaussNewton
from whence.memory import (
    OVERHEAD,
    QUERY_BYTES,
    WORKSPACE_BYTES,
    Footprint,
    Limits,
    Line,
    LiveBytes,
    batch_bytes,
    choose_limits,
    format_memory,
    measure_footprint,
    num_turns,
    parse_memory,
    peak_bytes,
)
from whence.methods import GRAD_COS, RETRAC, TRACIN, Grid, KroneckerInverse
from whence.second_order import load_or_make_curvature
from whence.self_influence import self_influence
from whence.streaming import StreamingPass
from whence.workload import Demand

SETTINGS = TraceSettings(timesteps=5, draws=4, phases=2, batch_size=8, block_size=4)

ROUND = Footprint(weights=1000, gradient=100, one_by_one=Line(50.0, 10.0), summed=Line(40.0, 20.0))
"""Numbers that can be added up by hand."""

REPLAYED = Demand(6, 5, Grid(10, draws=4), query_parts=2, train_grid=None, train_families=0)


@pytest.mark.parametrize(
    "text, num_bytes",
    [("8GiB", 8 * 2**30), ("512MiB", 512 * 2**20), ("8GB", 8 * 10**9), (" 1.5 KiB ", 1536), ("2TB", 2 * 10**12)],
)
def test_amounts_of_memory(text, num_bytes):
    assert parse_memory(text) == num_bytes


@pytest.mark.parametrize("text", ["8", "8G", "GiB", "-1GiB", "0GiB", "8gib", "1e3MB", "nan GiB", "8GiB 2", ""])
def test_other_texts_are_refused_with_the_accepted_forms(text):
    with pytest.raises(ConfigError, match="memory must be .*such as 8GiB, 512MiB or 8GB; found"):
        parse_memory(text)


@pytest.mark.parametrize("num_bytes", [1, 1023, 1025, 10 * 2**20 + 1, 10 * 2**30 - 1, 123456789012])
def test_what_is_written_can_be_read_and_is_no_less(num_bytes):
    assert num_bytes <= parse_memory(format_memory(num_bytes)) <= 1.11 * num_bytes + 1024


def test_what_a_batch_needs_by_hand():
    # Two points of four draws in two halves: a buffer of 4 gradients, and eight events; more than 8 events one by one.
    assert batch_bytes(REPLAYED, ROUND, 8) == 4 * 100 + 40 + 8 * 20
    assert batch_bytes(replace(REPLAYED, query_grid=None), ROUND, 8) == 50 + 8 * 10
    # A grid on the training side: sums of 2 samples in 2 families, twice, and a buffer of 8 points.
    gridded = replace(REPLAYED, train_grid=Grid(2, draws=1), train_families=2, query_grid=None)
    assert batch_bytes(gridded, ROUND, 4) == 2 * 2 * 2 * 100 + 4 * 100 + 40 + 4 * 20


def test_what_a_solver_needs_by_hand():
    solving = replace(REPLAYED, query_grid=None, solved=3)
    # Five gradients for each of three vectors, and a batch of products: more than eight events one by one.
    needs = replace(ROUND, product=Line(5.0, 30.0))
    assert batch_bytes(solving, needs, 8) == 5 * 3 * 100 + 5 + 8 * 30
    # All events of a training image go through the network at once where their mean is one gradient.
    assert replace(REPLAYED, unit=10).smallest_batch == 10


def test_kronecker_factors_count():
    factors = replace(REPLAYED, kronecker=True)
    needs = replace(ROUND, kronecker=7000)
    limits = Limits(8, 2**20)
    assert peak_bytes(factors, needs, limits) == peak_bytes(REPLAYED, needs, limits) + 7000
    with pytest.raises(ConfigError, match=r"does not hold the weights and the curvature \(8KiB\).* 9KiB"):
        choose_limits(factors, replace(SETTINGS, memory="8KB"), lambda: needs)
    assert choose_limits(REPLAYED, replace(SETTINGS, memory="8KB"), lambda: needs).batch_size == 8


def test_kronecker_factors_are_as_large_as_they_were_said_to_be(subject, tmp_path):
    source = subject.source(subject.checkpoints[-1], SETTINGS)
    small = KroneckerInverse("kfac", events=Grid(1))
    made = load_or_make_curvature(tmp_path / "c.safetensors", source, subject.train, small, 0, lambda n: None)
    held = sum(t.nbytes for b in made.blocks.values() for t in (b.out_basis, b.inner_basis, b.eigenvalues))
    # Sums and eigenvectors; what is planned has a bias for every layer.
    assert 2 * held <= measure_footprint(subject, SETTINGS).kronecker < 1.1 * 2 * held


def test_a_small_batch_of_products_foretells_a_large_one(subject):
    needs = measure_footprint(subject, SETTINGS, products=True).product
    source = subject.source(subject.checkpoints[-1], replace(SETTINGS, batch_size=32))
    table = grid_events(subject.train, [0, 1], "train", Grid(16), 50, seed=0)
    vectors = torch.zeros(3, source.layout.num_params)
    with LiveBytes() as live:
        GaussNewton(source, subject.train, table).multiply(vectors, lambda num_passes: None)
    more = 2 * source.gradient_bytes  # the products of three vectors, where one was measured
    assert needs(32) == pytest.approx(WORKSPACE_BYTES + OVERHEAD * (live.peak - more), rel=0.02)


def test_nothing_changes_where_no_bound_is_given():
    limits = choose_limits(REPLAYED, SETTINGS, lambda: pytest.fail("the model was measured"))
    assert limits == Limits(8, QUERY_BYTES)


@pytest.mark.parametrize(
    "memory, batch_size, turns",
    [
        ("100KiB", 16, 1),
        ("5.16KB", 16, 1),  # weights 1000, six queries of 500, four points 1160: just fits
        ("4.84KB", 11, 1),  # a batch of two points, 600, spares a turn
        ("3.62KB", 15, 2),  # two turns of three queries, and three points, 880
        ("1.99KB", 7, 6),  # 1000 + 500 + one point, 320: smaller than worthwhile, as nothing else fits
    ],
)
def test_few_turns_come_before_large_batches(memory, batch_size, turns):
    settings = replace(SETTINGS, batch_size=16, memory=memory)
    limits = choose_limits(REPLAYED, settings, lambda: ROUND)
    assert (limits.batch_size, num_turns(REPLAYED, ROUND, limits.query_bytes)) == (batch_size, turns)
    assert peak_bytes(REPLAYED, ROUND, limits) <= parse_memory(memory)


def test_what_does_not_fit_is_refused_with_the_smallest_bound_that_does(subject, toy_queries, tmp_path, monkeypatch):
    monkeypatch.setattr(StreamingPass, "run", lambda self: pytest.fail("it was begun"))
    with pytest.raises(ConfigError, match=r"memory=1MiB does not hold .*smallest bound that does is \d+MiB") as refused:
        trace(subject, toy_queries, [RETRAC], replace(SETTINGS, memory="1MiB"), tmp_path, show_progress=False)
    monkeypatch.undo()
    smallest = str(refused.value).rstrip(".").rsplit(" ", 1)[1]
    found = trace(subject, toy_queries, [RETRAC], replace(SETTINGS, memory=smallest), tmp_path, show_progress=False)
    assert found["retrac"].details["computed_with"]["batch_size"] >= SETTINGS.draws


def test_scores_under_a_bound_are_the_same_and_say_what_was_chosen(subject, toy_queries, tmp_path):
    methods, settings = [TRACIN, RETRAC, GRAD_COS], replace(SETTINGS, dtype="float64")
    free = trace(subject, toy_queries, methods, settings, tmp_path / "free", show_progress=False)
    footprint = measure_footprint(subject, settings)
    # Room for weights, workspace, and the gradients of one query: three turns.
    vectors = 7 * footprint.gradient
    memory = f"{(footprint.weights + vectors + footprint.summed(8) + 4 * footprint.gradient) // 1024 + 1}KiB"
    bound = replace(settings, memory=memory)
    found = trace(subject, toy_queries, methods, bound, tmp_path / "bound", show_progress=False)
    for name in free:
        np.testing.assert_allclose(found[name].values, free[name].values, rtol=1e-9, atol=1e-15)
        assert found[name].details["computed_with"]["query_bytes"] < QUERY_BYTES
    assert free["tracin"].details["computed_with"]["batch_size"] == 8


def test_self_influence_keeps_the_bound_too(subject, tmp_path):
    settings = replace(SETTINGS, phases=None, block_size=10)
    small = replace(settings, memory="1MiB")
    with pytest.raises(ConfigError, match="memory=1MiB does not hold"):
        self_influence(subject, "self_expected", small, tmp_path, method=TRACIN, show_progress=False)
    small = replace(small, timesteps=None, draws=None)
    with pytest.raises(ConfigError, match="memory=1MiB does not hold"):
        self_influence(subject, "self_norm", small, tmp_path, method=TRACIN, show_progress=False)
    free = self_influence(subject, "self_expected", settings, tmp_path / "free", method=TRACIN, show_progress=False)
    bound = replace(settings, memory="160MiB")
    found = self_influence(subject, "self_expected", bound, tmp_path / "bound", method=TRACIN, show_progress=False)
    np.testing.assert_allclose(found.values, free.values, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("autocast", ["no", "bf16"])
def test_a_small_batch_foretells_a_large_one(subject, autocast):
    settings = replace(SETTINGS, autocast=autocast)
    footprint = measure_footprint(subject, settings)
    assert footprint == measure_footprint(subject, replace(settings, batch_size=64))
    source = subject.source(subject.checkpoints[-1], replace(settings, batch_size=32))
    with LiveBytes() as live:
        source.grid_vectors(
            subject.train,
            [0],
            "query",
            Grid(8, draws=4),
            ["none"],
            phases=1,
            halves=False,
            seed=0,
            update=lambda num_events: None,
        )
    activations = live.peak - 9 * source.gradient_bytes
    assert footprint.summed(32) == pytest.approx(WORKSPACE_BYTES + OVERHEAD * activations, rel=0.02)


def test_live_bytes_are_those_of_tensors_that_something_holds():
    with LiveBytes() as live:
        first = torch.zeros(100)
        view = first[:50].view(5, 10)
        second = view + 1
        del first
        assert live.now == 400 + 200  # the view holds the whole
        del view, second
        assert live.now == 0
        torch.ones(10).add_(1)
    assert live.peak == 600
