"""The paper's claim on the demo: three training seeds, both losses, with intervals.

    python recipes/demo_claims.py --out demo-claims

Runs ``whence demo`` for the seeds 0, 1, 2 with L1 and with MSE loss (six runs of some minutes each; what is there is
used again) and compares ReTrac with TracIn: precision@10 of the planted images for the planted queries, false ones for
the others, and the share of unique images in the top 10 of all 16 queries. Each run gives one difference; over the
three seeds of a loss the table shows their mean and a 95% interval (Student's t with two degrees of freedom, so it is
wide). The settings were fixed on seed 100 before any of these runs: they are the paper's where the paper states them.
What came out stands in docs/results/demo.md.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from scipy import stats

from whence.demo import run_demo

SEEDS = (0, 1, 2)
MEASURES = ("precision@10", "false@10", "unique@10")


def interval(values: list[float]) -> str:
    """Mean and 95% interval of a few values."""
    mean, error = np.mean(values), stats.sem(values)
    if error == 0:
        return f"{mean:+.3f} (all equal)"
    low, high = stats.t.interval(0.95, len(values) - 1, mean, error)
    return f"{mean:+.3f} ({low:+.3f} to {high:+.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("demo-claims"), help="folder of the six runs")
    out = parser.parse_args().out
    results = []
    for loss in ("l1", "mse"):
        for seed in SEEDS:
            table = run_demo(out / f"{loss}-{seed}", seed=seed, loss=loss)[2]
            for row in table["rows"]:
                results.append({"loss": loss, "seed": seed} | dict(zip(table["columns"], row, strict=True)))
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    print(f"| loss | seed | method | {' | '.join(MEASURES)} | reliability |")
    print("|---|---|---|" + "---|" * (len(MEASURES) + 1))
    for r in results:
        values = " | ".join(f"{r[m]:.3f}" for m in MEASURES)
        reliability = "" if r["reliability"] is None else f"{r['reliability']:.3f}"
        print(f"| {r['loss']} | {r['seed']} | {r['method']} | {values} | {reliability} |")
    print(f"\n| ReTrac minus TracIn | {' | '.join(MEASURES)} |\n|---|" + "---|" * len(MEASURES))
    for loss in ("l1", "mse"):
        by = {(r["seed"], r["method"]): r for r in results if r["loss"] == loss}
        differences = [interval([by[s, "retrac"][m] - by[s, "tracin"][m] for s in SEEDS]) for m in MEASURES]
        print(f"| {loss} | {' | '.join(differences)} |")


if __name__ == "__main__":
    main()
