"""Grids of queries no larger than need be: until the noise draws agree on the scores.

The split-half reliability of a query's scores (``Scores.reliability``) says how far its noise draws agree. Grids grow
from 8 x 2 to the largest one allowed, those of antithetic draws from 8 x 4: timesteps double first, then draws. A
first look takes the smallest grid and up to 256 training images, drawn by key; from its reliability r, the formula of
Spearman and Brown predicts that of m times as many events, m r / (1 + (m - 1) r), and the smallest grid that should do
is taken with all images. Where it falls short, the next is predicted from what it gave, until the target is reached or
the largest grid is done.

Halves share their timesteps, so agreement of draws says nothing of a grid too coarse for the timesteps; this is why
timesteps grow first, which also gave the better scores for as many events (``docs/results/reliability.md``). The draws
of a coarser grid are among those of a finer one with the same timesteps, but their gradients are taken again: ReTrac's
are normalised over all draws of a timestep, and cannot be added to.
"""

import shutil
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np

from whence.attribution import TraceWork, prepare, trace
from whence.config import QuerySettings, TraceSettings
from whence.data import ImageData
from whence.diffusion.noise import keyed_order
from whence.errors import ConfigError, check_choice
from whence.methods.frame import AntitheticGrid, Baseline, Grid, Method, Replay
from whence.querying import query
from whence.record import Record
from whence.scores import Scores
from whence.store import Store
from whence.store_spec import trace_settings
from whence.subject import Subject

Of = Literal["median", "worst"]

SMALLEST = Grid(timesteps=8, draws=2)
PILOT_IMAGES = 256
"""Training images of the first look, at most."""
PREDICTS_FROM = 0.5
"""A reliability below this says too little to predict another from; the grid is doubled instead."""

_Settings = TypeVar("_Settings", TraceSettings, QuerySettings)


@dataclass(frozen=True)
class Round:
    """What one grid gave."""

    timesteps: int
    draws: int
    images: int
    """Training images that were scored."""
    reliability: dict[str, float | None]
    """Of each method, over queries; None where it is not defined."""
    sample_passes: int
    """Forward and backward passes of one sample, where the training images are gone through once."""


@dataclass(frozen=True)
class Target:
    """When to stop."""

    until: float
    """Reliability that every method is to reach."""
    of: Of = "median"
    """Of which query."""

    def __post_init__(self):
        check_choice("until_of", self.of, Of)
        if not 0 < self.until < 1:
            raise ConfigError(f"until is a reliability, above 0 and below 1; found {self.until}.")

    def measure(self, scores: Scores) -> float | None:
        """Give the reliability of the median or worst query; None where it is not defined."""
        found = scores.reliability()
        if found is None:
            return None
        value = np.nanmedian(found) if self.of == "median" and not np.isnan(found).all() else found.min()
        return float(value) if np.isfinite(value) else None


def schedule(largest: Grid, phases: int = 1) -> list[Grid]:
    """List the grids that are tried: timesteps double up to those of the largest, then draws.

    Args:
        largest: The last of them.
        phases: Bins of timesteps that are kept apart; the first grid has as many timesteps at least.

    Returns:
        Grids in order of size.

    Example:
        >>> [(grid.timesteps, grid.draws) for grid in schedule(Grid(20, 4))]
        [(8, 2), (16, 2), (20, 2), (20, 4)]
    """
    smallest = 2 * SMALLEST.draws if isinstance(largest, AntitheticGrid) else SMALLEST.draws
    grid = replace(
        largest,
        timesteps=min(max(SMALLEST.timesteps, phases), largest.timesteps),
        draws=min(smallest, largest.draws),
    )
    grids = [grid]
    while grid != largest:
        if grid.timesteps < largest.timesteps:
            grid = replace(grid, timesteps=min(2 * grid.timesteps, largest.timesteps))
        else:
            grid = replace(grid, draws=min(2 * grid.draws, largest.draws))
        grids.append(grid)
    return grids


def predicted(reliability: float, factor: float) -> float:
    """Predict the reliability of so many times as many events (Spearman and Brown)."""
    return factor * reliability / (1 + (factor - 1) * reliability)


def choose_next(grids: Sequence[Grid], at: int, reliability: float | None, until: float) -> int:
    """Choose the smallest later grid that should reach the target, or the last; the next one if that is not known.

    Returns:
        Its number, above ``at`` where there is one.
    """
    last = len(grids) - 1
    if reliability is None or reliability < PREDICTS_FROM:
        return min(at + 1, last)
    events = [grid.timesteps * grid.draws for grid in grids]
    enough = [k for k in range(at + 1, last) if predicted(reliability, events[k] / events[at]) >= until]
    return min([*enough, last])


def trace_until(
    subject: Subject,
    queries: ImageData,
    methods: Sequence[Method | Baseline],
    settings: TraceSettings,
    folder: Path,
    target: Target,
    *,
    show_progress: bool = True,
) -> tuple[dict[str, Scores], TraceSettings]:
    """Trace with as many timesteps and draws of the queries as the target needs; see :func:`whence.attribution.trace`.

    Args:
        subject: Checkpoints, training images and record.
        queries: The queries.
        methods: Declarations, with grids on the query side.
        settings: Its timesteps and draws are the largest that are allowed; by default those declared.
        folder: The run.
        target: When to stop.
        show_progress: Show a progress bar.

    Returns:
        Scores, whose manifests have the path to them under ``budget``; and settings with the grid they were made with.
        A note says so where the target was not reached.

    Raises:
        ConfigError: If a method's grid cannot be changed, or no method has one.
    """
    largest = largest_grid(methods, settings)
    grids = schedule(largest, settings.phases or 1)
    _work(subject, queries, methods, replace(settings, **vars(largest)), folder)  # raises now what it would raise later
    scratch = folder / "cache" / "until"
    pilot = None
    if len(subject.train) > PILOT_IMAGES:
        rows = np.sort(keyed_order(settings.seed, 0, len(subject.train))[:PILOT_IMAGES])
        pilot = restrict(subject, rows.tolist())

    def attempt(grid: Grid, *, first_look: bool) -> tuple[dict[str, Scores], int, int]:
        seen, where = (pilot, scratch) if first_look and pilot is not None else (subject, folder)
        asked = replace(settings, timesteps=grid.timesteps, draws=grid.draws)
        used = [method for method in methods if isinstance(method, Method)] if first_look else methods
        with warnings.catch_warnings():
            if first_look:
                warnings.simplefilter("ignore")  # all images will say it too
            found = trace(seen, queries, used, asked, where, show_progress=show_progress)
        work = _work(seen, queries, used, asked, where)
        return found, len(seen.train), sum(load.num_passes(num_turns=1) for load in work.loads)

    found, settings = _run(grids, attempt, settings, folder, target, has_pilot=pilot is not None)
    shutil.rmtree(scratch, ignore_errors=True)
    return found, settings


def query_until(
    subject: Subject,
    store: Store,
    queries: ImageData,
    methods: Sequence[Method | Baseline],
    settings: QuerySettings,
    folder: Path,
    target: Target,
    *,
    show_progress: bool = True,
) -> tuple[dict[str, Scores], QuerySettings]:
    """Query a store with as many timesteps and draws as the target needs; see :func:`whence.querying.query`.

    Args:
        subject: What the store was made of.
        store: A finished store.
        queries: The queries.
        methods: Declarations, with grids on the query side.
        settings: Its timesteps and draws are the largest that are allowed; by default those declared.
        folder: The run.
        target: When to stop.
        show_progress: Show a progress bar.

    Returns:
        As of :func:`trace_until`. Training images cost nothing here, so there is no first look at some of them.

    Raises:
        ConfigError: If a method's grid cannot be changed, or no method has one.
    """
    largest = largest_grid(methods, settings)
    grids = schedule(largest, settings.phases or 1)
    _work(subject, queries, methods, trace_settings(store.spec, replace(settings, **vars(largest))), folder)

    def attempt(grid: Grid, *, first_look: bool) -> tuple[dict[str, Scores], int, int]:
        asked = replace(settings, timesteps=grid.timesteps, draws=grid.draws)
        found = query(subject, store, queries, methods, asked, folder, show_progress=show_progress)
        work = _work(subject, queries, methods, trace_settings(store.spec, asked), folder)
        passes = sum(count.query for load in work.loads for count in load.passes)
        return {name: one for name, one in found.items() if isinstance(one, Scores)}, len(subject.train), passes

    return _run(grids, attempt, settings, folder, target, has_pilot=False)


def _work(
    subject: Subject,
    queries: ImageData,
    methods: Sequence[Method | Baseline],
    settings: TraceSettings,
    folder: Path,
) -> TraceWork:
    """Check and count; what there is to warn of is said by the trace or query itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return prepare(subject, queries, methods, settings, folder)


def _run(
    grids: Sequence[Grid],
    attempt: Callable[..., tuple[dict[str, Scores], int, int]],
    settings: _Settings,
    folder: Path,
    target: Target,
    *,
    has_pilot: bool,
) -> tuple[dict[str, Scores], _Settings]:
    """Try grids until the target is reached; what fell short is removed in the end, unless it was there before."""
    rounds: list[Round] = []
    short: list[Path] = []
    first_look, at = has_pilot, 0
    while True:
        there = set((folder / "scores").glob("*"))
        found, images, passes = attempt(grids[at], first_look=first_look)
        measured = {s.method: target.measure(s) for s in found.values() if s.query_timesteps is not None}
        rounds.append(Round(grids[at].timesteps, grids[at].draws, images, measured, passes))
        defined = [value for value in measured.values() if value is not None]
        lowest = min(defined) if len(defined) == len(measured) else None
        reached, is_last = lowest is not None and lowest >= target.until, at == len(grids) - 1
        if not first_look and (reached or is_last):
            break
        if not first_look:
            made = [s.folder for s in found.values() if s.folder and s.query_timesteps is not None]
            short += [path for path in made if path not in there]
        first_look = first_look and not is_last and (lowest is None or lowest < PREDICTS_FROM)
        at = at if reached else choose_next(grids, at, lowest, target.until)
    kept = {name: _with_budget(one, target, rounds) for name, one in found.items()}
    for path in short:  # only now, so that a run that was killed finds them again
        shutil.rmtree(path, ignore_errors=True)
    return kept, replace(settings, timesteps=grids[at].timesteps, draws=grids[at].draws)


def _with_budget(scores: Scores, target: Target, rounds: Sequence[Round]) -> Scores:
    """Write the path to some scores into their manifest, in the place of an earlier one."""
    if scores.query_timesteps is None or scores.folder is None:
        return scores
    last, earlier = rounds[-1], scores.details.get("budget", {}).get("note")
    value = last.reliability[scores.method]
    note = None
    if value is None or value < target.until:
        note = (
            f"The {target.of} reliability over queries is {'not defined' if value is None else f'{value:.3f}'} with "
            f"{last.timesteps} timesteps x {last.draws} draws, the most allowed; {target.until:g} was asked for. Allow "
            "more with --timesteps and --draws."
        )
    budget = {**asdict(target), "reached": note is None, "note": note, "rounds": [asdict(one) for one in rounds]}
    notes = [n for n in scores.notes if n != earlier] + ([] if note is None else [note])
    replace(scores, details=scores.details | {"budget": budget, "notes": notes}).save(scores.folder)
    return Scores.load(scores.folder)


def largest_grid(methods: Sequence[Method | Baseline], settings: QuerySettings) -> Grid:
    """Give the largest grid of queries that is allowed: what is asked for, or else the largest that is declared.

    Returns:
        The grid.

    Raises:
        ConfigError: If a method's grid cannot be changed, no method has one, or draws cannot be halved.
    """
    with_grid = [method for method in methods if isinstance(method, Method)]
    fixed = [
        method.name
        for method in with_grid
        if not isinstance(method.query.events, Grid)
        or (method.meet == "timesteps" and not isinstance(method.train.events, Replay))
    ]
    if fixed:
        raise ConfigError(
            f"until changes the timesteps of queries; those of {', '.join(fixed)} are given by a sampler's steps or by "
            "the training side. Leave --until out, or these methods."
        )
    declared = [method.query.events for method in with_grid]
    if not declared:
        raise ConfigError("until needs a method with gradients: it is the reliability over their noise draws.")
    largest = Grid(
        settings.timesteps or max(grid.timesteps for grid in declared if isinstance(grid, Grid)),
        settings.draws or max(grid.draws for grid in declared if isinstance(grid, Grid)),
    )
    if settings.antithetic or all(isinstance(grid, AntitheticGrid) for grid in declared):
        largest = AntitheticGrid(**vars(largest))
    if not largest.has_halves:
        must = "a multiple of 4 where they are antithetic" if isinstance(largest, AntitheticGrid) else "even"
        raise ConfigError(f"until compares two halves of the draws, so draws must be {must}; found {largest.draws}.")
    return largest


def restrict(subject: Subject, rows: Sequence[int]) -> Subject:
    """Give the same checkpoints with some of the training images, and the record of these alone."""
    train = subject.train.select(rows)
    return replace(subject, train=train, record=subject.record and _restrict_record(subject.record, train))


def _restrict_record(record: Record, train: ImageData) -> Record:
    kept = set(train.ids)
    is_kept = np.array([id_ in kept for id_ in record.sample_ids], dtype=bool)
    number = np.cumsum(is_kept) - 1
    visits = record.visits.where(is_kept[record.visits.sample])
    return replace(
        record,
        manifest=record.manifest | {"data_fingerprint": train.fingerprint},
        sample_ids=tuple(id_ for id_ in record.sample_ids if id_ in kept),
        visits=replace(visits, sample=number[visits.sample]),
        probes=record.probes.where(np.zeros(len(record.probes), dtype=bool)),
    )
