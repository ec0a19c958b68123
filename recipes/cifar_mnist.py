"""The outlier experiment of the paper: 5,000 airplanes, 200 handwritten zeros among them, three training seeds.

    python recipes/cifar_mnist.py --data FOLDER --out cifar-mnist

FOLDER holds ``cifar_mnist.parquet`` (5,000 CIFAR-10 airplanes, then 200 MNIST zeros, 32 px) and
``cifar_mnist_queries.parquet`` (16 other airplanes, 16 other zeros), with columns id, image, label (airplane, mnist-0).
For each seed it runs ``whence train``, ``whence check``, ``whence trace`` and ``whence report``, and prints each before
it does; then it writes ``OUT/table.md`` and ``OUT/table.json``: what each seed gives, and ReTrac minus TracIn with a
95% interval over seeds (Student's t with two degrees of freedom, so it is wide). Steps that are done are not done
again: kill it, and run it again.

Scaled to two CPU cores in about 17 minutes a seed: 16 px instead of 32, a UNet of 1.1 instead of 133 million
parameters, 30 epochs instead of 500. Kept from the paper: L1 loss, a learning rate of 1e-4, batches of 32, no
augmentation, ten checkpoints. At full size, on a GPU::

    python recipes/cifar_mnist.py --data FOLDER --out cifar-mnist-full --full --device cuda

which is 32 px, widths 128 256 512 1024, 500 epochs, and queries on 100 timesteps x 16 draws. What came out of the small
one stands in docs/results/cifar_mnist.md.
"""

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from tables import interval, markdown

import whence
from whence.evaluation import generally_influential_from
from whence.retrieval import retrieval_table

PLANTED = "mnist-0"
SMALL = ("--resolution 16 --widths 32 64 64", "--epochs 30", "--timesteps 16 --draws 4")
FULL = ("--resolution 32 --widths 128 256 512 1024", "--epochs 500", "--timesteps 100 --draws 16")
TRAINING = "--batch-size 32 --checkpoints 10 --learning-rate 1e-4 --schedule constant --loss l1"
METHODS = "tracin retrac pixels random"
GENERAL = "images in the top 10 of a quarter of all queries"
COLUMNS = ("precision@10", "AP", "false@10", "unique@10", GENERAL, "reliability")
COMPARED = COLUMNS[:5]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with the two parquet files")
    parser.add_argument("--out", type=Path, default=Path("cifar-mnist"), help="folder of the runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds of training")
    parser.add_argument("--full", action="store_true", help="the size of the paper, for a GPU")
    parser.add_argument("--device", default="cpu", help="torch device")
    arguments = parser.parse_args()
    found: dict[int, dict[str, dict[str, Any]]] = {}
    for seed in arguments.seeds:
        run = arguments.out / f"seed-{seed}"
        make_run(run, arguments.data, seed, FULL if arguments.full else SMALL, arguments.device)
        found[seed] = measure(run)
        write_tables(found, arguments.out)


def make_run(run: Path, data: Path, seed: int, size: tuple[str, str, str], device: str) -> None:
    """Train, check, trace, and make the page."""
    model, epochs, grid = size
    place, train, queries = map(
        shlex.quote, (str(run), *(str(data / f"cifar_mnist{x}.parquet") for x in ("", "_queries")))
    )
    for command in [
        f"train {train} --out {place} {model} --beta-schedule squaredcos_cap_v2 {epochs} {TRAINING} --seed {seed} "
        f"--device {device}",
        f"check {place}",
        f"trace {place} --queries {queries} --methods {METHODS} {grid} --top 1 --device {device}",
        f"report {place} --planted {PLANTED}",
    ]:
        print(f"\n$ whence {command}", flush=True)
        subprocess.run([sys.executable, "-m", "whence", *shlex.split(command)], check=True)


def measure(folder: Path) -> dict[str, dict[str, Any]]:
    """Give retrieval and specificity of each method of a run, and of chance."""
    run = whence.open_run(folder)
    scores, queries, _ = run.load_scores()
    table = retrieval_table(scores, run.train_images, queries, PLANTED)
    found = {row[0]: dict(zip(table["columns"], row, strict=True)) for row in table["rows"]}
    for one in scores:
        counts = np.bincount(one.top_rows(10).ravel(), minlength=len(run.train_images))
        least = generally_influential_from(len(queries), len(run.train_images), k=10)
        found[one.method][GENERAL] = int((counts >= least).sum())
    return found


def write_tables(found: dict[int, dict[str, dict[str, Any]]], out: Path) -> None:
    """Write what each seed gives, and the differences between the two methods of the paper."""
    rows = [
        [str(seed), method, *(cell(row.get(column)) for column in COLUMNS)]
        for seed, methods in found.items()
        for method, row in methods.items()
    ]
    text = markdown(["seed", "method", *COLUMNS], rows)
    if len(found) > 1:
        differences = [
            interval([methods["retrac"][column] - methods["tracin"][column] for methods in found.values()])
            for column in COMPARED
        ]
        text += "\n" + markdown(["", *COMPARED], [["ReTrac minus TracIn", *differences]])
    (out / "table.md").write_text(text)
    (out / "table.json").write_text(json.dumps(found, indent=1) + "\n")
    print(f"\n{text}", flush=True)


def cell(value: Any) -> str:
    """Write a figure, or nothing."""
    return "" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
