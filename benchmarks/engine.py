"""What gradients cost, as a ratio to one plain forward and backward pass over the same samples.

    python benchmarks/engine.py --json engine.json --markdown docs/results/engine.md      the full table
    python benchmarks/engine.py --quick --no-peers                                         three minutes on two cores

A plain pass (parameters require gradients, the summed loss goes backward once) is timed right before each run of a
path, in the same process; the ratio of the two is taken, and of many such ratios the median. Paths take turns, so that
a slow spell of the machine falls on all of them. Inputs are made once and not measured. Other libraries run in
processes and an environment of their own (``benchmarks/peers.py``), each beside its own plain pass, in the same turns.

Also measured: memory beyond model and inputs, as a ratio to what a plain pass takes; and how far scores and norms are
from those of the batch-of-one loop. ``benchmarks/bounds.py`` says what each path must compute at least.
"""

import argparse
import datetime
import json
import os
import platform
import shlex
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import paths
import peers
import torch
from bounds import count_operations
from models import DRAWS, MODELS, Case, load_case, save_case
from scipy.stats import rankdata
from table import to_markdown
from workers import OURS, WorkerError, Workers

SLOW_S = 20
"""A path that takes longer than this many seconds runs once."""
MEMORY_RUNS = 3
"""Of these the median."""


@dataclass(frozen=True)
class Settings:
    """How long is measured, and on what."""

    batch_size: dict[str, int]
    """Models, and samples in a batch; the query side has twice as many, and at least all draws of a timestep."""
    path_s: float
    """Time for the runs of one path, in seconds."""
    min_runs: int
    max_runs: int
    limit_s: float
    """A peer that takes longer than this for one answer is stopped."""
    peer_models: tuple[str, ...]
    """Models on which peers are measured."""


SMALL, MIDDLE, LARGE, DIT = "UNet 0.45 M, 16 px", "UNet 1.6 M, 16 px", "UNet 16 M, 32 px", "DiT 1.4 M, 16 px"
ALL = [name for name in MODELS if name != "toy"]
FOR_GPUS = "UNet 36 M, 32 px"

FULL = Settings(
    {name: 32 for name in ALL if name != FOR_GPUS} | {LARGE: 8},
    path_s=12,
    min_runs=5,
    max_runs=25,
    limit_s=180,
    peer_models=(SMALL, MIDDLE, LARGE, DIT),
)
QUICK = Settings({SMALL: 32, LARGE: 8, DIT: 32}, path_s=2, min_runs=3, max_runs=9, limit_s=120, peer_models=(SMALL,))
SMOKE = Settings({"toy": 4}, path_s=0, min_runs=1, max_runs=1, limit_s=60, peer_models=("toy",))


@dataclass
class Row:
    """One path on one model."""

    model: str
    package: str
    path: str
    computes: str
    seconds: list[float] = field(default_factory=list)
    """Time of each run."""
    ratios: list[float] = field(default_factory=list)
    """The same in plain passes over the same samples."""
    num_samples: int | None = None
    """Samples whose gradients a run takes."""
    num_params: int | None = None
    coverage: float | None = None
    """Share of the parameters that it covers, where these are not all."""
    bound: float | None = None
    """Operations that it must do, in those of the plain pass."""
    measured_bound: float | None = None
    """The same, with the measured time of the signal and of reading and writing gradients."""
    memory: float | None = None
    """Extra memory, in that of the plain pass."""
    scores_off: float | None = None
    """Distance of the scores from the exact ones, relative to these."""
    scores_spearman: float | None = None
    norms_off: float | None = None
    error: str | None = None
    """Why it cannot be measured."""

    def summary(self) -> dict[str, Any]:
        """Give all columns, times and ratios by their median, ratios also by their quartiles."""
        columns = asdict(self)
        del columns["num_params"]
        ratios, seconds = columns.pop("ratios"), columns.pop("seconds")
        quartiles = np.quantile(ratios, [0.25, 0.5, 0.75]).tolist() if ratios else [None] * 3
        low, ratio, high = quartiles
        return columns | {
            "seconds": median(seconds) if seconds else None,
            "ratio": ratio,
            "low": low,
            "high": high,
            "runs": len(ratios),
        }


def measure_model(
    name: str, batch_size: int, settings: Settings, libraries: Sequence[str], threads: int, device: str
) -> list[Row]:
    """Measure every path on one model."""
    rows = [Row(name, OURS, path, about.computes) for path, about in paths.PATHS.items()]
    rows += [Row(name, path.split()[0], path, about.computes) for path, about in peers.PATHS.items()]
    rows = [row for row in rows if row.package in libraries]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "case.safetensors"
        save_case(file, name, batch_size, max(DRAWS, 2 * batch_size))
        case = load_case(file, "cpu")
        options = ["--case", str(file), "--threads", str(threads), "--device", device]
        with Workers(options, settings.limit_s) as workers:
            compare(rows, workers, Path(folder))
            time_in_turns(rows, workers, settings)
        with Workers([*options, "--memory"], settings.limit_s) as workers:
            measure_memory(rows, workers)
    find_bounds(rows, case)
    for row in rows:
        row.coverage = None if row.num_params is None else row.num_params / case.num_params
    return rows


def find_bounds(rows: Sequence[Row], case: Case) -> None:
    """Put beside each row what it must take at least."""
    measured = {row.path: median(row.ratios) for row in rows if row.ratios}
    projection = paths.row_projection(case)
    operations = count_operations(case, {name: projection.space.core_shape(name) for name in case.parameters})
    for row in rows:
        work = paths.PATHS[row.path].work if row.package == OURS else None
        if work is not None:
            least = work(operations)
            row.bound = operations.bound(least)
            if paths.SIGNAL in measured and paths.TRAFFIC in measured:
                parts = measured[paths.SIGNAL], measured[paths.TRAFFIC]
                row.measured_bound = operations.measured_bound(least, *parts)


def compare(rows: Sequence[Row], workers: Workers, folder: Path) -> None:
    """Make what each row computes and compare it with the exact path's, which is the first to run."""
    exact: dict[str, np.ndarray] = {}
    for row in sorted(rows, key=lambda row: row.path != paths.EXACT):
        try:
            answer = workers.ask(row.package, row.path, "results", file=str(folder / "results.npz"))
        except WorkerError as error:
            row.error = str(error)
            continue
        found = dict(np.load(answer["file"])) if answer["file"] else {}
        exact = exact or found
        if "scores" in found:
            row.scores_spearman = spearman(found["scores"], exact["scores"])
            row.scores_off = distance(found["scores"], exact["scores"])
        if "norms" in found:
            row.norms_off = distance(found["norms"], exact["norms"])


def spearman(found: np.ndarray, exact: np.ndarray) -> float:
    """Correlation of ranks among all pairs of a sample and a query."""
    return float(np.corrcoef(rankdata(found), rankdata(exact))[0, 1])


def distance(found: np.ndarray, exact: np.ndarray) -> float:
    """Length of the difference, relative to that of the exact values."""
    return float(np.linalg.norm(found - exact) / np.linalg.norm(exact))


def time_in_turns(rows: Sequence[Row], workers: Workers, settings: Settings) -> None:
    """Time one run of each row in turn, until each has its number of runs."""
    runs = [settings.max_runs] * len(rows)
    for turn in range(settings.max_runs):
        for k, row in enumerate(rows):
            if row.error or turn >= runs[k]:
                continue
            try:
                answer = workers.ask(row.package, row.path, "time")
            except WorkerError as error:
                row.error = str(error)
                continue
            row.num_samples, row.num_params = answer["num_samples"], answer["num_params"]
            row.seconds.append(answer["seconds"])
            row.ratios.append(answer["ratio"])
            runs[k] = max(settings.min_runs, min(settings.max_runs, int(settings.path_s / answer["seconds"])))
            if answer["seconds"] > SLOW_S:
                runs[k] = 1


def measure_memory(rows: Sequence[Row], workers: Workers) -> None:
    """Measure the extra memory of each row that could be timed, three times, as the system hands out pages by luck."""
    for row in rows:
        if row.error is None:
            try:
                answers = [workers.ask(row.package, row.path, "memory") for _ in range(MEMORY_RUNS)]
            except WorkerError:
                continue
            if all(answer["bytes"] is not None for answer in answers):
                row.memory = median(answer["bytes"] / answer["plain_bytes"] for answer in answers)


def describe_machine(threads: int, device: str, libraries: Sequence[str]) -> dict[str, Any]:
    """Say what was measured where."""
    device_name = torch.cuda.get_device_name(device) if device != "cpu" else cpu_name()
    packages = ["torch", "diffusers", "numpy", "whence"]
    versions = {name: version(name) for name in packages}
    versions |= peers.versions(name for name in libraries if name != OURS)
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": device_name,
        "cores": os.cpu_count(),
        "threads": threads,
        "python": platform.python_version(),
        "versions": versions,
    }


def cpu_name() -> str:
    """Name the processor as its maker does, where that can be found."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def command(args: argparse.Namespace) -> str:
    """Write the command without what does not change the figures."""
    options = [f"--{name}" for name in ("quick", "smoke") if getattr(args, name)]
    options += [] if args.peers else ["--no-peers"]
    options += ["--models", *args.models] if args.models else []
    options += ["--batch-size", str(args.batch_size)] if args.batch_size else []
    options += ["--device", args.device] if args.device != "cpu" else []
    return shlex.join(["python", "benchmarks/engine.py", *options])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--quick", action="store_true", help="fewer models and runs, peers on the smallest alone")
    length.add_argument("--smoke", action="store_true", help="a toy, one run each: that it works, not what it costs")
    parser.add_argument("--peers", action=argparse.BooleanOptionalAction, default=True, help="measure other libraries")
    parser.add_argument("--models", nargs="+", choices=ALL, help="measure these alone")
    parser.add_argument("--batch-size", type=int, help="samples in a batch, in place of each model's own")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of torch")
    parser.add_argument("--device", default="cpu", help="torch device, for example cuda")
    parser.add_argument("--json", type=Path, help="file for all figures")
    parser.add_argument("--markdown", type=Path, help="file for the tables")
    args = parser.parse_args()
    settings = QUICK if args.quick else SMOKE if args.smoke else FULL
    libraries = [OURS]
    if args.peers:
        peers.install()
        libraries += dict.fromkeys(path.split()[0] for path in peers.PATHS)
    batch_sizes = {
        name: args.batch_size or settings.batch_size.get(name, 32) for name in args.models or settings.batch_size
    }
    about = describe_machine(args.threads, args.device, libraries)
    about |= {"command": command(args), "batch_size": batch_sizes}
    rows: list[Row] = []
    text = ""
    for name, batch_size in batch_sizes.items():
        start = time.perf_counter()
        chosen = libraries if name in settings.peer_models else [OURS]
        rows += measure_model(name, batch_size, settings, chosen, args.threads, args.device)
        print(f"{name}: {time.perf_counter() - start:.0f} s", file=sys.stderr)
        result = {"about": about, "rows": [row.summary() for row in rows]}
        text = to_markdown(result)
        if args.json:
            args.json.write_text(json.dumps(result, indent=1) + "\n")
        if args.markdown:
            args.markdown.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
