"""The paper's claim on the demo: three training seeds, both losses, with intervals.

    python recipes/demo_claims.py --out demo-claims

Runs ``whence demo`` for the seeds 0, 1, 2 with L1 and with MSE loss (six runs of about five minutes on two CPU cores;
what is there is used again) and prints three tables, which docs/results/demo.md keeps and discusses:

1. each run: precision@10 of the planted images for the planted queries, false ones for the others, the share of unique
   images in the top 10 of all 16 queries, and reliability;
2. ReTrac minus TracIn: the mean over the three seeds of a loss with its 95% interval (Student's t with two degrees of
   freedom, so it is wide);
3. why: how gradient norms depend on the timestep, how far scores follow them, and from which phase of the planted
   queries the planted images' scores come.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from scipy import stats
from tables import interval, markdown

from whence.demo import PLANTED, run_demo
from whence.pipeline import Run

LOSSES = ("l1", "mse")
SEEDS = (0, 1, 2)
MEASURES = ("precision@10", "false@10", "unique@10")


def explain(run: Run) -> list[str]:
    """Describe gradient norms, and what the scores of both methods owe to them."""
    scores, queries, _ = run.load_scores()
    tracin, retrac = (next(s for s in scores if s.method == name) for name in ("tracin", "retrac"))
    assert tracin.query_norms is not None and tracin.train_norms is not None  # gradient methods have them
    norms = np.median(tracin.query_norms, axis=(0, 1))
    cells = [f"{norms[0]:.2f}, {norms[len(norms) // 2]:.2f}, {norms[-1]:.2f}"]
    train_norms = np.sqrt(np.mean(tracin.train_norms**2, axis=0))
    planted = np.array(run.train_images.labels) == PLANTED
    asked = np.array(queries.labels) == PLANTED
    for s in (tracin, retrac):
        assert s.phases is not None
        follows = stats.spearmanr(np.abs(s.values).mean(axis=0), train_norms)[0]
        sizes = np.abs(s.phases[asked][:, :, planted]).mean(axis=(0, 2))
        cells += [f"{follows:+.2f}", f"{sizes[0] / sizes.sum():.2f}"]
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("demo-claims"), help="folder of the six runs")
    out = parser.parse_args().out
    results, reasons = {}, []
    for loss in LOSSES:
        for seed in SEEDS:
            run, _, table = run_demo(out / f"{loss}-{seed}", seed=seed, loss=loss)
            for row in table["rows"]:
                results[loss, seed, row[0]] = dict(zip(table["columns"], row, strict=True))
            reasons.append([loss, str(seed), *explain(run)])
    (out / "results.json").write_text(
        json.dumps([{"loss": k[0], "seed": k[1]} | r for k, r in results.items()], indent=1)
    )

    rows = [[loss, str(seed), name, *(f"{r[m]:.3f}" for m in MEASURES)] for (loss, seed, name), r in results.items()]
    reliability = ["" if r["reliability"] is None else f"{r['reliability']:.3f}" for r in results.values()]
    print(
        markdown(
            ["loss", "seed", "method", *MEASURES, "reliability"],
            [[*row, cell] for row, cell in zip(rows, reliability, strict=True)],
        )
    )
    differences = [
        [
            loss,
            *(
                interval([results[loss, s, "retrac"][m] - results[loss, s, "tracin"][m] for s in SEEDS])
                for m in MEASURES
            ),
        ]
        for loss in LOSSES
    ]
    print(markdown(["ReTrac minus TracIn", *MEASURES], differences))
    columns = ["loss", "seed", "query norm at t = 1, 533, 999"]
    for name in ("TracIn", "ReTrac"):
        columns += [f"{name}: Spearman of score size and norm", f"{name}: share of the least noisy phase"]
    print(markdown(columns, reasons))


if __name__ == "__main__":
    main()
