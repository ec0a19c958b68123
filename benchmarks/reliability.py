"""How many sample-passes a query needs: agreement with converged scores, by design of the query grid and passes spent.

    whence demo
    python benchmarks/reliability.py whence-demo --markdown docs/results/reliability.md --json reliability.json
    python benchmarks/reliability.py whence-demo --queries 2 --passes 16 32 --reference 16 4 --repetitions 1

At the demo's last checkpoint, TracIn and ReTrac score 256 of its training images, drawn by key, for queries evenly
spaced among the demo's own. ``designs.py`` says where each design looks. Scores are compared with those on the grid of
the paper, 100 timesteps x 16 draws, with noise that no design shares; two such grids with other noise say how far
agreement can go. The gradients of the training images are taken once, those of the queries summed as the design says.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
from designs import (
    DESIGNS,
    PILOT,
    Design,
    Lengths,
    Points,
    equal,
    even,
    events_of,
    lengths_between,
    midpoints,
)
from jaxtyping import Float
from numpy import ndarray
from table import lay_out
from torch import Tensor

from whence.config import TraceSettings
from whence.data import ImageData
from whence.diffusion.noise import keyed_order
from whence.evaluation import rank_correlation
from whence.event_table import EventTable
from whence.methods import RETRAC, TRACIN, AntitheticGrid, Grid
from whence.opening import open_run
from whence.projections import make_projection
from whence.reliability import PILOT_IMAGES, Target, choose_next, restrict, schedule
from whence.scores import Scores
from whence.subject import Subject
from whence.workload import Workload

METHODS = [replace(method, checkpoints="last") for method in (TRACIN, RETRAC)]
NAMES = [method.name for method in METHODS]
TARGETS = (0.9, 0.95, 0.97)
_HALVES = ("over draws", "over points")
POINTS_AT_ONCE = 32
"""Points whose whole gradients are held."""
REPETITIONS = {16: 3, 32: 2, 64: 2}
"""Of each design, by passes; otherwise one."""
REFERENCE_SEEDS = (1001, 1002)

_Scores = dict[str, Float[ndarray, "sum query train"]]
"""By method: of all, of both halves of the draws, of every other point and of those between."""


class Bench:
    """A run's last checkpoint, with the gradients of its training images."""

    def __init__(self, subject: Subject, queries: ImageData):
        settings = TraceSettings()
        load = Workload(subject, queries, METHODS, settings)
        (checkpoint,) = load.checkpoints
        self.queries = queries
        self.source = subject.source(checkpoint, settings)
        self.source.check(subject.train)
        shapes = {name: tuple(p.shape) for name, p in self.source.capture.parameters.items()}
        self.identity = make_projection("identity", shapes, seed=0)
        self.last = self.source.process.num_timesteps - 1
        self.passes = 0
        table = load.replayed_events(checkpoint, "learning_rate")
        self.train, norms = self._rows(table, subject.train)
        self.train_ids = tuple(subject.train.ids[row] for row in table.row)
        self.factors = {"tracin": table.weight, "retrac": table.weight / norms}
        self.train_lengths = lengths_between(table.timestep, norms, self.last)

    def _rows(
        self, table: EventTable, images: ImageData, per_unit: int = 1
    ) -> tuple[Float[Tensor, "unit param"], Float[ndarray, " unit"]]:
        """Take whole gradients, each the mean over so many consecutive events."""
        self.passes += len(table)
        return self.source.rows(
            table, images, self.identity, lambda _: None, with_norms=False, events_per_unit=per_unit
        )

    def scores(self, points: Sequence[Points], seed: int) -> _Scores:
        """Score the training images for all queries, each at points of its own."""
        draws, parts = points[0].draws, 2 if points[0].has_halves else 1
        table = events_of(self.queries, points, seed, self.source.process.num_timesteps)
        sums = torch.zeros(len(points), len(NAMES), 5, self.train.shape[1])
        at = 0
        for query, some in enumerate(points):
            for start in range(0, len(some.timesteps), POINTS_AT_ONCE):
                shares = some.shares[start : start + POINTS_AT_ONCE]
                events = table.take(slice(at, at := at + len(shares) * draws))
                gradients, lengths = self._rows(events, self.queries, draws // parts)
                weights = np.stack([_weights(shares, gradients, lengths, start, unit) for unit in (False, True)])
                sums[query] += (torch.from_numpy(weights).float().flatten(0, 1) @ gradients).unflatten(0, (-1, 5))
        products = (sums @ self.train.T).double().numpy()
        return {name: np.moveaxis(products[:, k], 0, 1) * self.factors[name] for k, name in enumerate(NAMES)}

    def grid(self, grid: Grid, seed: int) -> _Scores:
        """Score on whence's own grid."""
        return self.scores([even(grid, self.last)] * len(self.queries), seed)

    def pilot(self, seed: int) -> list[Lengths]:
        """Measure how long each query's gradients are at which timestep."""
        points = equal(midpoints(PILOT, self.last), draws=1)
        table = events_of(self.queries, [points] * len(self.queries), seed, self.source.process.num_timesteps)
        _, norms = self._rows(table, self.queries)
        return [lengths_between(points.timesteps, one, self.last) for one in norms.reshape(-1, PILOT)]

    def place(self, design: Design, passes: int, repetition: int) -> list[Points] | None:
        """Spend passes on each query; None where the design needs more."""
        lengths = [self.train_lengths] * len(self.queries)
        if design.lengths == "pilot" and passes > PILOT:
            lengths = self.pilot(repetition)
        points = [
            design.points(passes, self.last, np.random.default_rng([repetition, passes, query]), of_query)
            for query, of_query in enumerate(lengths)
        ]
        return [one for one in points if one is not None] or None


def _weights(
    shares: Float[ndarray, " point"],
    gradients: Float[Tensor, "unit param"],
    lengths: Float[ndarray, " unit"],
    first: int,
    to_length_1: bool,
) -> Float[ndarray, "sum unit"]:
    """Say what gradients count in five sums: all, both halves of the draws, every other point and those between.

    Where the draws are not halved, each half is all of them.
    """
    parts = len(gradients) // len(shares)
    whole = gradients.unflatten(0, (-1, parts)).mean(1) if parts == 2 else gradients
    scale = 1 / torch.linalg.vector_norm(whole, dim=1).double().numpy() if to_length_1 else 1.0
    of_all = np.repeat(shares * scale / parts, parts)
    of_part = np.repeat(shares, parts) * (1 / lengths if to_length_1 else 1.0)
    part, point = np.arange(len(gradients)) % parts, first + np.arange(len(gradients)) // parts
    halves = [np.where(part == half, of_part, 0) for half in (0, parts - 1)]
    return np.stack([of_all, *halves, *(np.where(point % 2 == k, of_all, 0) for k in (0, 1))])


def measure(bench: Bench, reference: Grid, all_passes: Sequence[int], repetitions: int | None) -> dict:
    """Score by every design, and on the grids that ``--until`` takes."""
    converged, other = (bench.grid(reference, seed) for seed in REFERENCE_SEEDS)

    def agreement(found: _Scores, name: str) -> list[float]:
        return rank_correlation(found[name][0], converged[name][0]).tolist()

    ceiling = {name: agreement(other, name) for name in NAMES}
    cells = []
    for passes in all_passes:
        for design in DESIGNS:
            for repetition in range(repetitions or REPETITIONS.get(passes, 1)):
                points = bench.place(design, passes, repetition)
                if points is not None:
                    found = bench.scores(points, repetition)
                    cell = {"design": design.name, "passes": passes, "repetition": repetition}
                    for name in NAMES:
                        halves = found[name][1:3] if np.any(found[name][1] != found[name][2]) else None
                        cell[name] = {
                            "spearman": agreement(found, name),
                            "over draws": reliability(bench, name, halves),
                            "over points": reliability(bench, name, found[name][3:5]),
                        }
                    cells.append(cell)
        print(f"{passes} passes: done", file=sys.stderr)

    @cache
    def on_grid(grid: Grid) -> dict[str, tuple[float | None, list[float]]]:
        found = bench.grid(grid, seed=0)
        return {name: (reliability(bench, name, found[name][1:3]), agreement(found, name)) for name in NAMES}

    kinds = {"even": reference, "antithetic": AntitheticGrid(**vars(reference))}
    budgets = [
        {"until": until, "design": kind, "method": name} | path_of(schedule(largest), on_grid, name, until)
        for until in TARGETS
        for kind, largest in kinds.items()
        if largest.has_halves
        for name in NAMES
    ]
    return {"ceiling": ceiling, "cells": cells, "budgets": budgets}


def reliability(bench: Bench, name: str, halves: Float[ndarray, "half query train"] | None) -> float | None:
    """Give the split-half reliability of the median query, as ``--until`` does; None where there are no halves."""
    if halves is None:
        return None
    scores = Scores(name, bench.queries.ids, bench.train_ids, halves.mean(0), halves=halves)
    return Target(0.5).measure(scores)


def path_of(grids: list[Grid], on_grid: Callable, name: str, until: float) -> dict:
    """Say which grids of the schedule ``--until`` takes: a first look, then all images."""

    def found(at: int) -> float:
        return on_grid(grids[at])[name][0] or 0.0

    at = 0 if found(0) >= until else choose_next(grids, 0, found(0), until)
    path = [0, at]
    while found(at) < until and at < len(grids) - 1:
        at = choose_next(grids, at, found(at), until)
        path.append(at)
    return {
        "path": [grids[k].timesteps * grids[k].draws for k in path],
        "reliability": found(at),
        "spearman": on_grid(grids[at])[name][1],
    }


def over_cells(cells: Sequence[dict], name: str, design: str, passes: int) -> tuple[float, float] | None:
    """Give the median Spearman over queries and repetitions, and that of the worst query over repetitions."""
    found = [cell[name]["spearman"] for cell in cells if (cell["design"], cell["passes"]) == (design, passes)]
    if not found:
        return None
    return float(np.median(found)), float(np.median(found, axis=0).min())


def passes_to(target: float, curve: Sequence[tuple[int, float]]) -> str:
    """Interpolate, over the logarithm of passes, from where a curve stays at a target."""
    below = [k for k, (_, value) in enumerate(curve) if value < target]
    if not below:
        return f"≤ {curve[0][0]}"
    if below[-1] == len(curve) - 1:
        return f"> {curve[-1][0]}"
    (before, low), (after, high) = curve[below[-1] : below[-1] + 2]
    return f"{before * (after / before) ** ((target - low) / (high - low)):.0f}"


def tabulate(result: dict, reference: Grid) -> str:
    """Write the tables of the page."""
    cells = result["cells"]
    all_passes = sorted({cell["passes"] for cell in cells})
    parts = []
    for name in NAMES:
        head = [f"{name}: design", *map(str, all_passes), *(f"to {target:.2f}" for target in TARGETS)]
        rows = []
        for design in dict.fromkeys(cell["design"] for cell in cells):
            found = {passes: over_cells(cells, name, design, passes) for passes in all_passes}
            curve = [(passes, one[0]) for passes, one in found.items() if one]
            values = ["" if one is None else f"{one[0]:.3f} ({one[1]:.2f})" for one in found.values()]
            rows.append([design, *values, *(passes_to(target, curve) for target in TARGETS)])
        ceiling = result["ceiling"][name]
        spent = reference.timesteps * reference.draws
        parts += [
            lay_out(head, rows),
            f"Two references of {spent:,} passes: {np.median(ceiling):.3f} ({min(ceiling):.3f}).",
        ]
    head = ["even grid", *(f"{n}: {what}" for n in NAMES for what in (*_HALVES, "Spearman"))]
    rows = []
    for passes in all_passes:
        here = [cell for cell in cells if (cell["design"], cell["passes"]) == ("even", passes)]
        columns: list[float] = []
        for name in NAMES:
            agreement = over_cells(cells, name, "even", passes)
            assert agreement is not None
            columns += [float(np.median([cell[name][what] for cell in here])) for what in _HALVES]
            columns.append(agreement[0])
        rows.append([f"{passes // 2} x 2", *(f"{value:.3f}" for value in columns)])
    parts.append(lay_out(head, rows))
    rows = []
    for budget in result["budgets"]:
        spearman = budget["spearman"]
        spent = f"{' + '.join(map(str, budget['path']))} = {sum(budget['path'])}"
        numbers = [f"{n:.3f}" for n in (budget["reliability"], np.median(spearman), min(spearman))]
        rows.append([str(budget["until"]), budget["design"], budget["method"], spent, *numbers])
    head = ["--until", "grid", "method", "passes", "reliability", "Spearman", "worst"]
    return "\n\n".join([*parts, lay_out(head, rows)]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run of whence demo")
    parser.add_argument("--queries", type=int, default=8, help="queries, evenly spaced among the demo's own")
    parser.add_argument("--passes", type=int, nargs="+", default=(16, 32, 64, 128), help="of a query")
    parser.add_argument("--reference", type=int, nargs=2, default=(100, 16), help="timesteps and draws")
    parser.add_argument("--repetitions", type=int, help="of each design; by default fewer of many passes, from 3 to 1")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    parser.add_argument("--markdown", type=Path, help="also write the tables to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    started_s = time.monotonic()
    run = open_run(arguments.run)
    rows = np.sort(keyed_order(0, 0, len(run.train_images))[:PILOT_IMAGES]).tolist()
    queries = run.open_queries("demo-queries")
    queries = queries.select(np.linspace(0, len(queries) - 1, arguments.queries).round().astype(int))
    bench = Bench(restrict(run.subject, rows), queries)
    result = measure(bench, Grid(*arguments.reference), sorted(arguments.passes), arguments.repetitions)
    result |= {"sample_passes": bench.passes, "seconds": time.monotonic() - started_s}
    tables = tabulate(result, Grid(*arguments.reference))
    print(tables, end="")
    print(f"\n{result['sample_passes']:,} sample-passes in {result['seconds']:.0f} s.")
    if arguments.markdown:
        arguments.markdown.write_text(tables)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
