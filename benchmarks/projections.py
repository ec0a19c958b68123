"""How far scores from projected gradients are from exact ones, by kind of projection and width, on a trained model.

    whence demo
    python benchmarks/projections.py whence-demo --markdown docs/results/projections.md       five minutes on two cores

At the run's last checkpoint the replayed gradients of training images are multiplied with the gradients of queries
(summed over a grid of timesteps and draws, as TracIn and ReTrac take them), exactly and after projection. Measured are,
over all pairs of training image and query:

    error       root mean square of (projected - exact) / (|phi| |psi|), the error of a cosine
    bound       the same for a dense random projection of this width: sqrt((1 + cos²) / width)
    rank        Spearman correlation with the exact scores of a query, the mean over the queries
    top 10      images of the exact top 10 that are found in the projected one, the mean over the queries
    norms       root mean square of (projected length / exact length - 1)
"""

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy import ndarray
from scipy.stats import rankdata

from whence.config import TraceSettings
from whence.methods.frame import Grid, Replay
from whence.opening import open_run
from whence.projections import ProjectionKind, make_projection

KINDS: tuple[ProjectionKind, ...] = ("two_sided_sketch", "sketch", "rademacher")
WIDTHS = (512, 2048, 8192)
LEGEND = """At the last checkpoint of the demo, replayed gradients of training images and gradients of queries (16
timesteps x 4 draws) are multiplied exactly and after projection. *error*: root mean square of (projected - exact) /
(length x length), the error of a cosine. *dense bound*: the same for a dense random projection of that width,
sqrt((1 + cos^2) / width). *rank*: Spearman correlation with the exact scores, mean over queries. *top 10*: share of the
exact top 10 found. *norms*: root mean square relative error of the length of a projected gradient, which is what
`--norms projected` uses in place of the exact one. *s*: seconds for the rows, exact lengths included."""

METHODS = {"tracin": "none", "retrac": "timestep"}


@dataclass(frozen=True)
class Line:
    """One line of the table."""

    kind: str
    side: int | None
    width: int
    method: str
    error: float
    bound: float
    rank: float
    top_10: float
    norms: float
    rows_s: float
    """Seconds for the rows of the training images, exact lengths included."""


@dataclass(frozen=True)
class Exact:
    """Exact gradients of queries, and products with those of training images."""

    vectors: torch.Tensor  # query param
    cosines: ndarray  # query train
    norms: ndarray  # train


def compare(exact: Exact, rows: torch.Tensor, psi: torch.Tensor) -> dict[str, float]:
    """Compare projected scores with exact ones."""
    query_norms = exact.vectors.double().norm(dim=1).numpy()
    found = (psi @ rows.T).double().numpy() / np.outer(query_norms, exact.norms)
    ranks = [float(np.corrcoef(rankdata(a), rankdata(b))[0, 1]) for a, b in zip(found, exact.cosines, strict=True)]
    top, want = (np.argsort(-values, axis=1)[:, :10] for values in (found, exact.cosines))
    shared = [len(set(a) & set(b)) / 10 for a, b in zip(top, want, strict=True)]
    lengths = rows.double().norm(dim=1).numpy() / exact.norms - 1
    return {
        "error": float(np.sqrt(np.mean((found - exact.cosines) ** 2))),
        "bound": float(np.sqrt(np.mean(1 + exact.cosines**2) / rows.shape[1])),
        "rank": float(np.mean(ranks)),
        "top_10": float(np.mean(shared)),
        "norms": float(np.sqrt(np.mean(lengths**2))),
    }


def measure(run_folder: str, num_train: int, num_queries: int, kinds: list[ProjectionKind]) -> Iterator[Line]:
    """Give the lines of the table."""
    run = open_run(run_folder)
    subject, settings = run.subject, TraceSettings()
    queries = run.open_queries("demo-queries").select(range(num_queries))
    checkpoint = subject.checkpoints[-1]
    source = subject.source(checkpoint, settings)
    assert subject.replays is not None
    table = subject.replays.events(
        subject.previous_step[checkpoint.step], checkpoint.step, Replay("last"), "learning_rate"
    ).take(slice(0, num_train))
    made = source.grid_vectors(
        queries,
        range(num_queries),
        "query",
        Grid(timesteps=16, draws=4),
        ["none", "timestep"],
        phases=1,
        halves=False,
        seed=0,
        update=lambda count: None,
    )
    exact = {}
    for number, method in enumerate(METHODS):
        vectors = torch.stack([m.vectors[number] for m in made])
        dots, norms = source.dots(table, subject.train, vectors, lambda count: None)
        lengths = vectors.double().norm(dim=1).numpy()
        exact[method] = Exact(vectors, dots.T / np.outer(lengths, norms), norms)
    shapes = {name: tuple(p.shape) for name, p in source.capture.parameters.items()}
    direct = source.rank_one_parameters(subject.train)
    for kind in kinds:
        for width in WIDTHS:
            for side in (16, 32, 64) if kind == "two_sided_sketch" else (None,):
                projection = make_projection(kind, shapes, width=width, side=side or 32, seed=0, direct=direct)
                started_s = time.monotonic()
                rows, _ = source.rows(table, subject.train, projection, lambda count: None)
                rows_s = time.monotonic() - started_s
                for method, found in exact.items():
                    psi = source.project(projection, found.vectors)
                    yield Line(kind, side, width, method, **compare(found, rows, psi), rows_s=rows_s)


def to_markdown(lines: list[Line], command: str) -> str:
    """Write the page."""
    head = f"# Error of projected scores\n\n    whence demo\n    {command}\n\n{LEGEND}\n\n"
    columns = ["projection", "side", "width", "scores", "error", "dense bound", "rank", "top 10", "norms", "s"]
    text = head + "| " + " | ".join(columns) + " |\n|" + "---|" * len(columns) + "\n"
    for n in lines:
        cells = [n.kind, n.side or "", f"{n.width:,}", n.method, f"{n.error:.4f}", f"{n.bound:.4f}", f"{n.rank:.3f}"]
        text += "| " + " | ".join(map(str, [*cells, f"{n.top_10:.2f}", f"{n.norms:.3f}", f"{n.rows_s:.1f}"])) + " |\n"
    return text


def main() -> None:
    """Measure, and write or print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="folder of a run with a record, made by `whence demo`")
    parser.add_argument("--num-train", type=int, default=400, help="training images")
    parser.add_argument("--num-queries", type=int, default=8, help="queries")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    args = parser.parse_args()
    lines = list(measure(args.run, args.num_train, args.num_queries, args.kinds))
    if args.json:
        args.json.write_text(json.dumps([asdict(line) for line in lines], indent=1) + "\n")
    text = to_markdown(lines, "python benchmarks/projections.py whence-demo --markdown docs/results/projections.md")
    if args.markdown:
        args.markdown.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
