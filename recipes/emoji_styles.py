"""Do methods find who should be credited? Emoji in four known styles, a text-conditional and an unconditional model.

    python recipes/emoji_styles.py --out emoji-styles

For each seed two models are trained on the 140 captioned images of ``whence demo --text``: one that is told the words
of the captions, and one that is told nothing. Both are asked about 20 pictures of pairs of name and style that training
never saw, the conditional one also about what it draws for the demo's 12 prompts. A query's style and its name are
known, and so is which training images could be credited: precision@10 by style (35 of 140 images on average, so 0.25 by
chance) and by name (3 or 4 of 140).

Each run is a folder and goes on where it was left; ``--runs words-0`` makes single ones, so that several processes or
machines share the work. Without ``--runs`` the table over all is written to ``table.md`` beside them.

Hardware: two CPU cores, about six minutes of one core for each of the four runs. To be expected: D-TRAK at 0.53 (style)
and 0.27 (name) for the conditional model and held-out pictures, 0.38 and 0.18 for the unconditional one; TracIn, ReTrac
and grad-cos at 0.28 to 0.38 and 0.04 to 0.12. All of it stands in docs/results/demo_text.md.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from whence import text_demo
from whence._files import write_json
from whence.comparison import markdown_table
from whence.config import TrainingSettings
from whence.opening import train_run

KINDS = ("words", "none")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("emoji-styles"), help="folder of the runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="seeds of training")
    parser.add_argument("--runs", nargs="+", default=None, help="make only these runs, such as words-0 none-0")
    arguments = parser.parse_args()
    names = arguments.runs or [f"{kind}-{seed}" for seed in arguments.seeds for kind in KINDS]
    tables = {name: make_run(arguments.out / name, *name.rsplit("-", 1)) for name in names}
    if arguments.runs is None:
        text = "\n".join(markdown_table(mean_table(tables, kind)) for kind in KINDS)
        (arguments.out / "table.md").write_text(text)
        print(text)


def make_run(folder: Path, kind: str, seed: str, *, training: TrainingSettings | None = None) -> dict[str, Any]:
    """Train, trace and measure one model."""
    if kind not in KINDS:
        raise SystemExit(f"A run is named {' or '.join(f'{kind}-SEED' for kind in KINDS)}; found {folder.name}.")
    run = train_run(
        folder,
        text_demo.TRAIN,
        data_settings=text_demo.DATA,
        model_settings=replace(text_demo.MODEL, condition=kind),
        settings=training or text_demo.training_settings("mse", int(seed)),
    )
    queries: list[str | Path] = [text_demo.HELD_OUT]
    if kind == "words":
        queries.insert(0, run.sample(1, prompts=text_demo.PROMPTS))
    scores, opened = text_demo.score(run, queries), run.open_queries(queries)
    table = text_demo.factor_table(scores, run.train_images, opened)
    run.report(scores=scores, queries=opened, summary=table)
    write_json(folder / "evaluation" / "factors.json", table)
    return table


def mean_table(tables: dict[str, dict[str, Any]], kind: str) -> dict[str, Any]:
    """Put the seeds of one kind of model beside each other, and their mean."""
    chosen = {name: table for name, table in tables.items() if name.startswith(kind)}
    first = next(iter(chosen.values()))
    columns = first["columns"][1:]
    rows = []
    for place, row in enumerate(first["rows"]):
        by_seed = np.array([table["rows"][place][1:] for table in chosen.values()])
        rows.append([kind, row[0], *(_cell(values) for values in by_seed.T)])
    return {"columns": ["model", "method", *columns], "rows": rows, "notes": []}


def _cell(values: Sequence[float]) -> str:
    each = ", ".join(f"{value:.3f}" for value in values)
    return f"{np.mean(values):.3f}" if len(set(values)) == 1 else f"{np.mean(values):.3f} ({each})"


if __name__ == "__main__":
    main()
