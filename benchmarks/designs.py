"""Designs of a query grid: at which timesteps a query's gradient is taken, with which noise, and what each counts.

Each design spends a number of sample-passes on *points*: a timestep whose draws of noise are averaged before ReTrac
brings them to length 1, and the share that the point has in the query's sum. The sum that is estimated is the same for
all: the mean over timesteps 1..T-1.

    even         whence's own: timesteps from 1 to T-1, both included, equally far apart; noise drawn anew for each
    random       timesteps drawn independently
    midpoints    the middle of each of so many equal intervals of timesteps
    stratified   one timestep drawn from each of these intervals
    antithetic   whence's own too: the timesteps of ``even``; noise comes in pairs e, -e
    importance   the middle of each of so many intervals that have the same share of the summed length of gradients;
                 a point counts what its interval has of all timesteps, which is one over the density

The lengths are those of a pilot of ``PILOT`` passes for each query, counted among the passes, or those of the training
gradients, which are there anyway. ReTrac's gradients all have length 1 at their timestep, so that importance by length
is the uniform density: its row is ``midpoints``. What TracIn's density does to it is measured all the same.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from whence.data import ImageData
from whence.diffusion.noise import noise_key
from whence.diffusion.process import even_timesteps
from whence.event_table import EventTable, grid_events
from whence.methods import AntitheticGrid, Grid

PILOT = 16
"""Passes of a query that say how long its gradients are at which timestep."""


@dataclass(frozen=True)
class Points:
    """Where one query is looked at."""

    timesteps: Int[ndarray, " point"]
    shares: Float[ndarray, " point"]
    """What each point counts; they add up to 1."""
    draws: int
    mirrored: bool = False
    """Whether draws come in pairs of opposite noise."""
    grid: Grid | None = None
    """Which of whence's own grids they are, with its noise."""

    @property
    def has_halves(self) -> bool:
        """Whether the draws fall into two independent halves."""
        return (AntitheticGrid if self.mirrored else Grid)(len(self.timesteps), self.draws).has_halves


Lengths = Float[ndarray, " timestep"]
"""Length of a gradient at each of the timesteps 1..T-1."""


@dataclass(frozen=True)
class Design:
    """A way to spend passes."""

    name: str
    draws: int
    """At each point."""
    place: Callable[[int, int, int, np.random.Generator, Lengths], Points]
    """From number of points, draws, last timestep, random numbers and lengths of gradients to points."""
    lengths: Literal["pilot", "train"] | None = None
    """Where the lengths of gradients come from."""

    def points(self, passes: int, last: int, random: np.random.Generator, lengths: Lengths) -> Points | None:
        """Spend passes on timesteps 1..last; None where there are too few passes, or timesteps."""
        count = (passes - (PILOT if self.lengths == "pilot" else 0)) // self.draws
        return self.place(count, self.draws, last, random, lengths) if 2 <= count <= last else None


def equal(timesteps: Int[ndarray, " point"], draws: int, *, mirrored: bool = False) -> Points:
    """Let all points count the same."""
    return Points(timesteps, np.full(len(timesteps), 1 / len(timesteps)), draws, mirrored)


def even(grid: Grid, last: int) -> Points:
    """Give the points of whence's own grid."""
    timesteps = even_timesteps(1, last, grid.timesteps).numpy()
    return replace(equal(timesteps, grid.draws, mirrored=isinstance(grid, AntitheticGrid)), grid=grid)


def midpoints(count: int, last: int) -> Int[ndarray, " point"]:
    """Give the middle of each of so many equal intervals of 1..last."""
    return np.floor((np.arange(count) + 0.5) / count * last).astype(np.int64) + 1


def stratified(count: int, last: int, random: np.random.Generator) -> Int[ndarray, " point"]:
    return np.floor((np.arange(count) + random.random(count)) / count * last).astype(np.int64) + 1


def by_length(count: int, draws: int, last: int, lengths: Lengths) -> Points:
    """Place points by the summed length of gradients."""
    summed = np.append(0.0, np.cumsum(lengths)) / lengths.sum()  # at the edges of the timesteps
    places = np.interp(np.arange(2 * count + 1) / (2 * count), summed, np.arange(last + 1))
    timesteps = np.minimum(np.floor(places[1::2]).astype(np.int64) + 1, last)
    return Points(timesteps, np.diff(places[::2]) / last, draws)


DESIGNS = [
    Design("random", 1, lambda n, draws, last, random, _: equal(random.integers(1, last + 1, n), draws)),
    Design("even", 2, lambda n, draws, last, *_: even(Grid(n, draws), last)),
    Design("even, 1 draw", 1, lambda n, draws, last, *_: even(Grid(n, draws), last)),
    Design("midpoints", 1, lambda n, draws, last, *_: equal(midpoints(n, last), draws)),
    Design("stratified", 1, lambda n, draws, last, random, _: equal(stratified(n, last, random), draws)),
    Design("antithetic", 2, lambda n, draws, last, *_: even(AntitheticGrid(n, draws), last)),
    Design("antithetic, 4 draws", 4, lambda n, draws, last, *_: even(AntitheticGrid(n, draws), last)),
    Design("antithetic, midpoints", 2, lambda n, draws, last, *_: equal(midpoints(n, last), draws, mirrored=True)),
    Design("importance, pilot", 1, lambda n, draws, last, _, lengths: by_length(n, draws, last, lengths), "pilot"),
    Design("importance, train", 1, lambda n, draws, last, _, lengths: by_length(n, draws, last, lengths), "train"),
]


def lengths_between(timesteps: Int[ndarray, " event"], lengths: Float[ndarray, " event"], last: int) -> Lengths:
    """Interpolate lengths from some events: root mean squares of ``PILOT`` intervals, lines between.

    Returns:
        Lengths at 1..last.
    """
    interval = np.maximum(timesteps - 1, 0) * PILOT // last  # training has timestep 0 too
    there = np.unique(interval)
    rms = np.array([np.sqrt(np.mean(lengths[interval == k] ** 2)) for k in there])
    return np.interp(np.arange(1, last + 1), midpoints(PILOT, last)[there], rms)


def events_of(images: ImageData, points: Sequence[Points], seed: int, num_timesteps: int) -> EventTable:
    """List the events of all queries, query by query, at each point all draws."""
    if points[0].grid is not None:
        return grid_events(images, range(len(images)), "query", points[0].grid, num_timesteps, seed)
    keys, rows, timesteps, negated = [], [], [], []
    for row, some in enumerate(points):
        for number, t in enumerate(some.timesteps.tolist()):
            for draw in range(some.draws):
                pair = draw // 2 if some.mirrored else draw
                keys.append(noise_key(seed, "grid", "query", images.ids[row], t, pair, number + 1))
                rows.append(row)
                timesteps.append(t)
                negated.append(some.mirrored and draw % 2 == 1)
    no, noise_keys = np.zeros(len(rows), dtype=bool), np.array(keys, dtype=np.uint64)
    weight = np.ones(len(rows))
    return EventTable(
        np.array(rows), np.array(timesteps), noise_keys, no, no, no, None, weight, negated=np.array(negated)
    )
