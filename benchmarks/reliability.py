"""How many sample-passes a query needs: reliability of growing grids, beside agreement with converged scores.

    whence demo
    python benchmarks/reliability.py whence-demo --json reliability.json > docs/results/reliability.md
    python benchmarks/reliability.py whence-demo --queries 2 --largest 16 4

At the demo's last checkpoint, TracIn and ReTrac score 256 of its training images, drawn by key, on every grid that
``--until`` may try, and on some with as many events otherwise split. Each is compared with scores on the largest grid
with *other* noise, which the grids do not share. What is computed stays in the run's cache, so a killed run goes on.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import numpy as np

from whence.attribution import trace
from whence.config import TraceSettings
from whence.diffusion.noise import keyed_order
from whence.evaluation import rank_correlation
from whence.methods import RETRAC, TRACIN, Grid
from whence.opening import open_run
from whence.reliability import PILOT_IMAGES, Target, choose_next, restrict, schedule
from whence.scores import Scores

METHODS = [replace(method, checkpoints="last") for method in (TRACIN, RETRAC)]
OTHER_SPLITS = [Grid(16, 4), Grid(32, 4), Grid(8, 16), Grid(32, 8)]
UNTIL = 0.95


def measure(scores: Scores, converged: Scores) -> dict[str, float]:
    """Give medians over queries."""
    agreement = rank_correlation(scores.values.astype(np.float64), converged.values.astype(np.float64))
    reliability = Target(UNTIL).measure(scores)
    assert reliability is not None
    return {"reliability": reliability, "spearman": float(np.median(agreement)), "worst": float(agreement.min())}


def path_of(results: list[dict], grids: list[Grid], method: str) -> list[int]:
    """Say which grids of the schedule ``--until`` takes: a first look, then all images."""
    at = choose_next(grids, 0, results[0][method]["reliability"], UNTIL)
    path = [0, at]
    while results[at][method]["reliability"] < UNTIL and at < len(grids) - 1:
        at = choose_next(grids, at, results[at][method]["reliability"], UNTIL)
        path.append(at)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run of whence demo")
    parser.add_argument("--queries", type=int, default=3, help="queries, evenly spaced among the demo's own")
    parser.add_argument("--largest", type=int, nargs=2, default=(100, 16), help="timesteps and draws")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    arguments = parser.parse_args()
    run, largest = open_run(arguments.run), Grid(*arguments.largest)
    rows = np.sort(keyed_order(0, 0, len(run.train_images))[:PILOT_IMAGES]).tolist()
    subject = restrict(run.subject, rows)
    queries = run.open_queries("demo-queries")
    queries = queries.select(np.linspace(0, len(queries) - 1, arguments.queries).round().astype(int))

    def score(grid: Grid, seed: int) -> dict[str, Scores]:
        settings = TraceSettings(timesteps=grid.timesteps, draws=grid.draws, seed=seed)
        return trace(subject, queries, METHODS, settings, run.folder / "cache" / "reliability")

    grids = schedule(largest)
    converged = score(largest, seed=1)
    results = []
    for grid in [*grids, *(grid for grid in OTHER_SPLITS if grid.timesteps <= largest.timesteps)]:
        found = score(grid, seed=0)
        measured = {name: measure(one, converged[name]) for name, one in found.items()}
        results.append({"timesteps": grid.timesteps, "draws": grid.draws} | measured)
    print(
        "| grid | passes a query | " + " | ".join(f"{m.name}: {f}" for m in METHODS for f in results[0][m.name]) + " |"
    )
    print("|---" * (2 + 3 * len(METHODS)) + "|")
    for result in results:
        events = result["timesteps"] * result["draws"]
        numbers = [f"{value:.3f}" for m in METHODS for value in result[m.name].values()]
        print(f"| {result['timesteps']} x {result['draws']} | {events:,} | {' | '.join(numbers)} |")
    print()
    for method in METHODS:
        of_grids = [
            (grid.timesteps * grid.draws, result[method.name]) for grid, result in zip(grids, results, strict=False)
        ]
        enough = next((events for events, found in of_grids if found["spearman"] >= UNTIL), None)
        path = [of_grids[k][0] for k in path_of(results, grids, method.name)]
        print(
            f"- {method.name}: Spearman {UNTIL} with the converged scores takes {enough} passes a query, of "
            f"{largest.timesteps * largest.draws}. `--until {UNTIL}` takes {' + '.join(map(str, path))} = {sum(path)}."
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
