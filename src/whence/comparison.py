"""All scores of a run beside one ground truth, as a table, as Markdown and as ``evaluation/lds.json``."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from whence._files import publish_file, write_json
from whence.config import EvaluationSettings
from whence.datamodels import fit_scores
from whence.errors import GroundTruthError, ScoresError
from whence.ground_truth import GroundTruth, split_subsets
from whence.lds import LdsResult, evaluate_lds
from whence.scores import Scores

FORMAT_VERSION = 1  # of lds.json

_AS_USUAL = EvaluationSettings()


def compare(
    ground_truth: GroundTruth,
    folder: Path,
    scores: Sequence[Scores] | None = None,
    settings: EvaluationSettings = _AS_USUAL,
) -> tuple[list[LdsResult], dict[str, Any]]:
    """Evaluate scores against retrained models, and write ``evaluation/lds.json`` and ``lds.md``.

    Args:
        ground_truth: Retrained models.
        folder: The run.
        scores: What to evaluate. Default: all in ``scores/`` that are of the same images and queries; what is left out
            is told in the notes.
        settings: Which output of the models, resamples, subsets to fit on.

    Returns:
        One result for each method and set of queries, and the table of them.

    Raises:
        ScoresError: If there is nothing to evaluate, or given scores are of other images or queries.
        GroundTruthError: If given scores were fitted on subsets that they are evaluated on.
    """
    truth, fitted = ground_truth, []
    if settings.fit_subsets is not None:
        first, truth = split_subsets(ground_truth, settings.fit_subsets)
        fitted = list(fit_scores(first, folder, measure=settings.measure).values())
    results, notes = [], []

    def evaluate(one: Scores) -> None:
        found = evaluate_lds(one, truth, measure=settings.measure, draws=settings.draws, seed=settings.seed)
        results.append((one, found))

    for one in [*(scores or []), *fitted]:
        evaluate(one)
    for one in _others(folder, fitted) if scores is None else []:
        try:
            evaluate(one)
        except (ScoresError, GroundTruthError) as error:
            truth.output(settings.measure)  # raises where the fault is not the scores'
            notes.append(f"{one.folder.name if one.folder else one.method} is left out: {error}")
    if not results:
        raise ScoresError(
            f"There are no scores to compare in {folder / 'scores'}. Trace the ground truth's queries with `whence "
            f"trace`, or give --fit-subsets. {' '.join(notes)}"
        )
    flat = _named_apart(results)
    table = lds_table(flat)
    table["notes"] += notes + truth.notes
    record = lds_record(flat, truth, table["notes"])
    record |= {"ground_truth": str(ground_truth.folder)}
    record |= {"draws": settings.draws, "seed": settings.seed, "fit_subsets": settings.fit_subsets}
    write_table(folder / "evaluation" / "lds", table, record)
    return flat, table


def write_table(path: Path, table: Mapping[str, Any], record: Mapping[str, Any] | None = None) -> None:
    """Write a table as Markdown, and as JSON beside it.

    Args:
        path: Where to, without a suffix.
        table: As of :func:`lds_table`.
        record: What the JSON says, where that is more than the table.
    """
    write_json(path.with_suffix(".json"), table if record is None else record)
    with publish_file(path.with_suffix(".md")) as partial:
        partial.write_text(markdown_table(table))


def _others(folder: Path, fitted: Sequence[Scores]) -> list[Scores]:
    """Load the scores of a run that are not among those just fitted."""
    known = {scores.folder for scores in fitted}
    paths = sorted(path.parent for path in (folder / "scores").glob("*/manifest.json"))
    return [Scores.load(path) for path in paths if path not in known]


def _named_apart(results: Sequence[tuple[Scores, list[LdsResult]]]) -> list[LdsResult]:
    """Call scores by their folder where two are of one method."""
    counts = Counter(scores.method for scores, _ in results)
    return [
        replace(result, method=scores.folder.name) if counts[scores.method] > 1 and scores.folder else result
        for scores, found in results
        for result in found
    ]


def lds_table(results: Sequence[LdsResult]) -> dict[str, Any]:
    """Put results into a table for printing and for ``lds.json``.

    Args:
        results: Of any number of methods and sets.

    Returns:
        ``columns``, ``rows`` and ``notes``; NaN stands as None.
    """
    columns = ["method", "queries", "count", "LDS", "low", "high", "ceiling", "half", "NaN", "unscored"]
    rows = []
    for r in results:
        limit = (r.ceiling.ceiling, r.ceiling.half) if r.ceiling else (math.nan, math.nan)
        numbers = [_number(value) for value in (r.lds, r.low, r.high, *limit)]
        rows.append([r.method, r.query_set, len(r.per_query), *numbers, len(r.undefined), len(r.unscored)])
    notes = [
        f"{r.method}, {r.query_set}: no LDS for {', '.join(r.undefined[:5])}{'…' if len(r.undefined) > 5 else ''} "
        "(outputs or predictions all equal or not finite)."
        for r in results
        if r.undefined
    ]
    if any(r.ceiling is None for r in results):
        notes.append("One seed only: the noise of the outputs is not known, and no ceiling can be given.")
    return {"columns": columns, "rows": rows, "notes": notes}


def lds_record(results: Sequence[LdsResult], ground_truth: GroundTruth, notes: Sequence[str]) -> dict[str, Any]:
    """Put results into plain data, with the LDS of each query and what they were measured against.

    Args:
        results: Of any number of methods and sets.
        ground_truth: The subsets that they were evaluated on.
        notes: What a reader has to know.

    Returns:
        The content of ``evaluation/lds.json``.
    """
    return {
        "format_version": FORMAT_VERSION,
        "measures": list(dict.fromkeys(r.measure for r in results)),
        "results": [
            {
                "method": r.method,
                "query_set": r.query_set,
                "measure": r.measure,
                "lds": _number(r.lds),
                "interval": [_number(r.low), _number(r.high)],
                "ceiling": {name: _number(v) for name, v in vars(r.ceiling).items()} if r.ceiling else None,
                "per_query": {id_: _number(value) for id_, value in r.per_query.items()},
                "undefined": list(r.undefined),
                "unscored": list(r.unscored),
            }
            for r in results
        ],
        "subsets": list(ground_truth.subset_hashes),
        "seeds": list(ground_truth.seeds),
        "notes": list(notes),
    }


def markdown_table(table: Mapping[str, Any]) -> str:
    """Write a table of :func:`lds_table` as Markdown, its notes below.

    Args:
        table: Columns, rows and notes.

    Returns:
        The text.
    """
    cells = [[_cell(value) for value in row] for row in table["rows"]]
    lines = [table["columns"], ["---"] * len(table["columns"]), *cells]
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{text}\n\n" + "".join(f"- {note}\n" for note in table["notes"])


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" if isinstance(value, float) else str(value).replace("|", "\\|")
