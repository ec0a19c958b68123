"""The tables of a measurement as Markdown, with what a reader must know to take them rightly."""

from collections.abc import Callable, Sequence
from typing import Any

from workers import OURS

EXPLANATION = """\
A cell is the median over runs, its quartiles in brackets, of the time of a path over the time of a *plain pass*: one
forward and one backward pass over the same samples at the same batch size, parameters requiring gradients, timed right
before in the same process. Paths take turns. Noisy images, timesteps and targets are made once and not measured, but in
the row `make_batch`, which is that alone. In all processes the C library is told to keep freed memory, as whence tells
it. Weights are random: costs do not depend on them.
"""

BOUNDS = """\
What a path must do at least, over the plain pass (`benchmarks/bounds.py` has the formulas). First in floating-point
operations: forward pass, backward signal, and what the path takes in the place of weight gradients. Then with forward
pass and signal as measured (`signal alone`), and with the time in which the gradients that it makes are written and
read once (`traffic of gradients`). In brackets, what the path takes over the second.
"""

MEMORY = """\
The most memory at any time of a run, beyond model, inputs and query vectors, over what a plain pass takes beyond model
and inputs; median of three.
"""

AGREEMENT = """\
Against the batch-of-one loop: relative distance of the scores of a batch against 16 queries, their Spearman
correlation, and relative distance of norms. Projections keep inner products in expectation; on random weights and
noise, as here, all gradients are much alike, so this says little about ranks in a trained model.
"""

PEERS = """\
Each in a process of its own and in an environment that they share (`benchmarks/peers-constraints.txt`), beside its own
plain pass, in the settings that suited it best here (`benchmarks/peers.py`). Samples are those whose gradients a run
takes: where a library takes the queries' in the same call, they count. That dattri's TracIn takes them again for every
further batch of training samples is not counted.
"""


def to_markdown(result: dict[str, Any]) -> str:
    """Write the tables.

    Args:
        result: What ``benchmarks/engine.py`` writes as JSON.
    """
    about, rows = result["about"], result["rows"]
    models = list(dict.fromkeys(row["model"] for row in rows))
    ours = [row for row in rows if row["package"] == OURS]
    theirs = [row for row in rows if row["package"] != OURS]
    parts = [
        "# What gradients cost",
        f"    {about['command']}",
        _describe(about, models),
        EXPLANATION,
        _grid("path", ours, models, _time),
        "## Bounds",
        BOUNDS,
        _grid("path", ours, models, _bounds),
        "## Memory",
        MEMORY,
        _grid("path", ours, models, lambda row: _number(row["memory"])),
        "## Agreement",
        AGREEMENT,
        _grid("path", ours, models, _agreement),
    ]
    if theirs:
        parts += ["## Other libraries", PEERS, _peers(theirs, models)]
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def _describe(about: dict[str, Any], models: Sequence[str]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    batches = ", ".join(f"{about['batch_size'][model]} for {model}" for model in models)
    machine = f"{about['device']}, {about['threads']} threads on {about['cores']} cores"
    return (
        f"{about['date']}, {machine}; Python {about['python']}, {versions}.\n\n"
        f"Samples in a batch: {batches}; on the query side twice as many, and at least 16."
    )


def _grid(first: str, rows: Sequence[dict[str, Any]], models: Sequence[str], cell: Callable[[Any], str]) -> str:
    """Lay out one line a path, one column a model; a path with nothing in its line is left out."""
    paths = dict.fromkeys((row["path"], row["computes"]) for row in rows)
    of = {(row["path"], row["model"]): row for row in rows}
    lines = [[path, computes, *(cell(of[path, model]) for model in models)] for path, computes in paths]
    return lay_out([first, "computes", *models], [line for line in lines if any(line[2:])])


def _peers(rows: Sequence[dict[str, Any]], models: Sequence[str]) -> str:
    columns = ["path", "computes", "model", "time", "memory", "samples", "parameters", "agreement"]
    order = sorted(rows, key=lambda row: models.index(row["model"]))
    cells = [
        [
            row["path"],
            row["computes"],
            row["model"],
            row["error"] and f"cannot: {row['error']}" or _time(row),
            _number(row["memory"]),
            str(row["num_samples"] or ""),
            "" if row["num_samples"] is None else f"{row['coverage'] or 1:.0%}",
            _agreement(row),
        ]
        for row in order
    ]
    return lay_out(columns, cells)


def lay_out(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Write a Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _time(row: dict[str, Any]) -> str:
    if row["ratio"] is None:
        return row["error"] or ""
    if row["runs"] == 1:
        return f"{_number(row['ratio'])} (one run)"
    return f"{_number(row['ratio'])} ({_number(row['low'])} to {_number(row['high'])})"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.0f}" if value >= 20 else f"{value:.2f}"


def _bounds(row: dict[str, Any]) -> str:
    if row["measured_bound"] is None or row["ratio"] is None:
        return _number(row["bound"])
    over = row["ratio"] / row["measured_bound"]
    return f"{_number(row['bound'])}, {_number(row['measured_bound'])} ({_number(over)} x)"


def _agreement(row: dict[str, Any]) -> str:
    parts = []
    if row["scores_off"] is not None:
        parts.append(f"scores {row['scores_off']:.0e}, Spearman {row['scores_spearman']:.3f}")
    if row["norms_off"] is not None:
        parts.append(f"norms {row['norms_off']:.0e}")
    return "; ".join(parts)
