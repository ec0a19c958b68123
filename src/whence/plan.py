"""The plan: what a trace will cost, before it is run.

Counts are those of the pass itself (:mod:`whence.workload`), memory is what bounds it (:mod:`whence.memory`), and
minutes come from a few batches of both kinds of pass, on the actual model, at the actual batch size. What is on disk
already costs nothing. The plan of an index has a module of its own, :mod:`whence.plan_index`.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from torch import Tensor

from whence.attribution import TraceWork, check_streamed, describe_arithmetic, prepare
from whence.config import TraceSettings
from whence.data import ImageData
from whence.event_table import grid_events
from whence.gradients import GradientSource
from whence.grid_sums import points_at_once
from whence.memory import QUERY_BYTES, Footprint, Limits, choose_limits, measure_footprint, num_turns, peak_bytes
from whence.methods import Baseline, Grid, Method, Replay
from whence.scores import Scores
from whence.streaming import WORTH_KEEPING_S
from whence.subject import Subject
from whence.workload import PassCount, Workload

BATCHES = 3
"""Batches of each kind of pass that are timed; the first, which is slower, is not counted."""


@dataclass(frozen=True)
class Rates:
    """Seconds, as measured."""

    setup_s: float
    """To load and check a checkpoint."""
    query_s: float
    """A sample-pass on the query side."""
    train_s: float
    """A sample-pass on the training side."""


@dataclass(frozen=True)
class PlannedPass:
    """One pass over the checkpoints, of all methods that share it."""

    methods: tuple[str, ...]
    passes: list[PassCount]
    turns: int
    """Times that the training images are gone through at each checkpoint."""
    batch_size: int
    seconds: float
    peak_bytes: int
    """Weights, query gradients and a batch, at the worst moment."""
    cache_bytes: int
    """What lies in the cache until the scores are written."""
    store_bytes: int
    """What an index keeps."""

    @property
    def sample_passes(self) -> int:
        """Forward and backward passes of one sample, in all."""
        return sum(map(self.at_checkpoint, self.passes))

    def at_checkpoint(self, count: PassCount) -> int:
        """Count the sample-passes at one checkpoint."""
        return count.query + count.curvature + self.turns * (count.train + count.curvature_per_turn)


@dataclass(frozen=True)
class Plan:
    """What a trace will cost; see :func:`plan`."""

    passes: list[PlannedPass]
    score_bytes: int
    """All scores that are not on disk yet."""

    @property
    def sample_passes(self) -> int:
        """Forward and backward passes of one sample, in all."""
        return sum(one.sample_passes for one in self.passes)

    @property
    def minutes(self) -> float:
        """Time in all."""
        return sum(one.seconds for one in self.passes) / 60

    @property
    def peak_bytes(self) -> int:
        """Memory at the worst moment, on top of Python, torch and the images."""
        return max([0, *(one.peak_bytes for one in self.passes)])

    @property
    def cache_bytes(self) -> int:
        """Bytes of the cache, which goes from pass to pass."""
        return max([0, *(one.cache_bytes for one in self.passes)])

    @property
    def store_bytes(self) -> int:
        """Bytes of the index."""
        return sum(one.store_bytes for one in self.passes)


def plan(
    subject: Subject,
    queries: ImageData,
    methods: Sequence[Method | Baseline],
    settings: TraceSettings,
    folder: Path,
) -> Plan:
    """Say what :func:`whence.attribution.trace` with the same arguments will cost.

    Args:
        subject: Checkpoints, training images and record.
        queries: Query images.
        methods: Declarations.
        settings: Size of the grids, arithmetic, batch size, memory.
        folder: The run; only read.

    Returns:
        The plan.

    Raises:
        ConfigError: If settings contradict each other, or the memory allowed does not suffice.
    """
    work = prepare(subject, queries, methods, settings, folder)
    check_streamed(work)
    footprint = cache(lambda: measure_footprint(subject, settings, products=work.needs_products))
    passes = [_plan_pass(load, footprint()) for load in work.loads if work.is_wanted(load)]
    return Plan(passes, sum(blank_scores(work, method, subject, queries).num_bytes for method in work.wanted))


def _plan_pass(load: Workload, footprint: Footprint) -> PlannedPass:
    demand = load.demand
    limits = choose_limits(demand, load.settings, lambda: footprint)
    turns = num_turns(demand, footprint, limits.query_bytes)
    rates = _measure(replace(load, settings=replace(load.settings, batch_size=limits.batch_size)), limits)
    query = sum(count.query for count in load.passes)
    train = load.num_passes(turns) - query
    return PlannedPass(
        methods=tuple(method.name for method in load.methods),
        passes=load.passes,
        turns=turns,
        batch_size=limits.batch_size,
        seconds=len(load.checkpoints) * rates.setup_s + query * rates.query_s + train * rates.train_s,
        peak_bytes=peak_bytes(demand, footprint, limits),
        cache_bytes=_cache_bytes(load, turns, footprint, rates),
        store_bytes=0,
    )


def _cache_bytes(load: Workload, turns: int, footprint: Footprint, rates: Rates) -> int:
    """Count the tiles of all checkpoints, and the gradient sums of queries at one where they are kept."""
    num_query, num_train = len(load.queries), len(load.subject.train)
    replayed = not isinstance(load.train_events, Grid)
    per_query, per_turn = load.phases_at_once + 2 * load.halves, 4 if replayed else 3
    meetings = len(load.meetings)
    per_method = meetings * num_train * (num_query * per_query + turns * per_turn)
    blocks = -(-num_train // (load.settings.block_size * meetings))
    tiles = 8 * (len(load.methods) * per_method + blocks * num_query * load.query_grid.timesteps)
    kept = len(load.meetings[0]) * load.query_grid.draws * rates.query_s > WORTH_KEEPING_S
    sums = meetings * num_query * load.vectors_per_query * footprint.gradient
    solved = load.precondition is not None  # kept once more, unless the solution is quick
    return len(load.checkpoints) * tiles + (kept + solved) * sums


def blank_scores(work: TraceWork, method: Method | Baseline, subject: Subject, queries: ImageData) -> Scores:
    """Make scores of the right shape that take no memory.

    Returns:
        The scores of one method, all zero.
    """
    num_query, num_train = len(queries), len(subject.train)
    blank = Scores(
        method=method.name,
        query_ids=queries.ids,
        train_ids=subject.train.ids,
        values=_zeros(num_query, num_train, dtype="float32"),
        details=work.specs[method.name] | {"notes": work.notes[method.name]},
    )
    if isinstance(method, Baseline):
        return blank
    (load,) = [load for load in work.loads if method in load.methods]
    steps, dtype = len(load.checkpoints), load.settings.dtype
    limits = Limits(load.settings.batch_size, QUERY_BYTES)
    return replace(
        blank,
        values=_zeros(num_query, num_train, dtype=dtype),
        phases=_zeros(num_query, load.phases, num_train, dtype=dtype),
        phase_timesteps=((0, 0),) * load.phases,
        halves=_zeros(2, num_query, num_train, dtype=dtype) if load.halves else None,
        train_norms=_zeros(steps, num_train),
        train_timesteps=None if isinstance(load.train_events, Grid) else _zeros(steps, num_train, dtype="int64"),
        train_weights=_zeros(steps, num_train),
        query_norms=_zeros(steps, num_query, load.query_grid.timesteps),
        query_timesteps=_zeros(load.query_grid.timesteps, dtype="int64"),
        checkpoint_steps=tuple(c.step for c in load.checkpoints),
        details=blank.details | {"computed_with": describe_arithmetic(load.settings, limits)},
    )


def _zeros(*shape: int, dtype: str = "float64") -> np.ndarray:
    return np.broadcast_to(np.zeros((), dtype), shape)


def _measure(load: Workload, limits: Limits) -> Rates:
    """Time a few batches of both sides at the last checkpoint."""
    started_s = time.perf_counter()
    source = load.subject.source(load.checkpoints[-1], load.settings)
    source.check(load.subject.train)
    setup_s = time.perf_counter() - started_s
    held = len(load.split_queries(source.layout.num_params, limits.query_bytes)[0])
    shape = (held * load.vectors_per_query, source.layout.num_params)
    vectors = source.no_vectors().new_full(shape, 1e-3)  # such that no product is too small for a fast multiplication
    return Rates(
        setup_s,
        query_s=seconds_per_pass(lambda update: _query_batches(load, source, update)),
        train_s=seconds_per_pass(lambda update: _train_batches(load, source, vectors, update)),
    )


def _query_batches(load: Workload, source: GradientSource, update: Callable[[int], Any]) -> None:
    grid, parts = load.query_grid, 1 + load.halves
    points = BATCHES * points_at_once(source.batch_size, grid, parts * source.gradient_bytes)
    source.grid_vectors(
        load.queries,
        [0],
        "query",
        grid,
        load.query_families,
        phases=load.phases_at_once,
        halves=load.halves,
        seed=load.settings.seed,
        update=update,
        points=range(min(grid.timesteps, points)),
    )


def _train_batches(
    load: Workload, source: GradientSource, vectors: Float[Tensor, "vector param"], update: Callable[[int], Any]
) -> None:
    train, seed = load.subject.train, load.settings.seed
    if isinstance(load.train_events, Replay):
        rows = range(min(len(train), BATCHES * source.batch_size))
        table = grid_events(train, rows, "train", Grid(timesteps=1), load.subject.process.num_timesteps, seed)
        source.dots(table, train, vectors, update)
        return
    grid = load.train_events
    points = points_at_once(source.batch_size, grid, source.gradient_bytes)
    grid = replace(grid, timesteps=min(grid.timesteps, BATCHES * points))
    rows = list(range(min(len(train), max(1, source.batch_size // (grid.timesteps * grid.draws)))))
    source.grid_vectors(
        train, rows, "train", grid, load.train_families, phases=1, halves=False, seed=seed, update=update
    )


def seconds_per_pass(run: Callable[[Callable[[int], Any]], Any]) -> float:
    """Time batches as they report that they are done.

    Args:
        run: Makes batches and calls what it is given with the number of sample-passes of each.

    Returns:
        Seconds for a sample-pass; the first batch, which is slower, is not counted.
    """
    counts, seconds = [], []

    def update(num_events: int) -> None:
        nonlocal last_s
        now_s = time.perf_counter()
        counts.append(num_events)
        seconds.append(now_s - last_s)
        last_s = now_s

    while len(counts) < BATCHES:
        last_s = time.perf_counter()
        run(update)
    return sum(seconds[1:]) / sum(counts[1:])
