"""All bias diagnostics of a run's scores in one table, as ``evaluation/bias.json`` and as Markdown.

See :mod:`whence.bias` for what is measured.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy import ndarray

from whence._files import publish_file, write_json
from whence.bias import (
    Intervention,
    choose_samples,
    correlations,
    intervene,
    is_replayed,
    norm_by_timestep,
    ranks_of,
    timestep_histogram,
)
from whence.comparison import markdown_table
from whence.config import TraceSettings
from whence.data import ImageData
from whence.errors import ConfigError, ScoresError
from whence.retrieval import names_apart
from whence.scores import Scores
from whence.subject import Subject

FORMAT_VERSION = 1  # of bias.json


def diagnose(
    subject: Subject,
    queries: ImageData,
    scores: Sequence[Scores],
    settings: TraceSettings | None,
    folder: Path,
    *,
    samples: Sequence[str] = (),
    count: int = 3,
    timesteps: int = 100,
    k: int = 10,
    show_progress: bool = True,
) -> dict[str, Any]:
    """Diagnose scores, and write ``evaluation/bias.json`` and ``bias.md``.

    Args:
        subject: Checkpoints, training images and record.
        queries: Queries of the scores.
        scores: One per method; those without gradients are left out.
        settings: Those of the trace; None: the scores are from a store, and there is no intervention.
        folder: The run.
        samples: Ids of training images that the intervention moves. Default: some at random.
        count: How many at random; 0: no intervention.
        timesteps: Points of a norm curve.
        k: Length of a ranking.
        show_progress: Show a progress bar.

    Returns:
        The table: ``columns``, ``rows`` (one per method) and ``notes``.

    Raises:
        ConfigError: If a number is below its least.
        ScoresError: If no scores have gradients.
    """
    if k < 1 or timesteps < 2 or count < 0:
        raise ConfigError(f"k must be above 0, timesteps above 1, count 0 or more; found {k}, {timesteps}, {count}.")
    with_gradients = [one for one in scores if one.train_norms is not None]
    if not with_gradients:
        raise ScoresError("None of these scores has gradients of training images. Trace tracin and retrac first.")
    names = dict(zip(map(id, with_gradients), names_apart(with_gradients), strict=True))
    replayed = [one for one in with_gradients if settings is not None and is_replayed(one)]
    notes = _notes(with_gradients, replayed)
    found = None
    if replayed and settings is not None and (samples or count):
        rows = subject.train.rows(samples) if samples else choose_samples(replayed[0], count)
        options: dict[str, Any] = {"timesteps": timesteps, "show_progress": show_progress}
        found = intervene(subject, queries, replayed, rows, settings, folder / "cache", **options)
        notes.append(
            f"as trained, as if: median rank over queries, mean over {', '.join(found.ids)}; as if: each had been "
            f"trained at the timestep where its gradient is longest. in top {k}: share of queries that have it there."
        )
    effects = {} if found is None else {names[id(one)]: _effect(one, found, k, subject.train) for one in replayed}
    methods = [_diagnose_method(names[id(one)], one, k) | effects.get(names[id(one)], {}) for one in with_gradients]
    table = _table(methods, k, has_intervention=bool(effects), notes=notes)
    record = {"format_version": FORMAT_VERSION, "k": k, "methods": methods, "notes": notes}
    record["samples"] = [] if found is None else _curves(found, [c.step for c in subject.checkpoints])
    write_json(folder / "evaluation" / "bias.json", record)
    with publish_file(folder / "evaluation" / "bias.md") as partial:
        partial.write_text(markdown_table(table))
    return table


def _diagnose_method(name: str, scores: Scores, k: int) -> dict[str, Any]:
    found = correlations(scores)
    result: dict[str, Any] = {
        "method": name,
        "scores": scores.content_hash,
        "norm_correlation": _median(found.with_norm),
        "timestep_correlation": None if found.with_timestep is None else _median(found.with_timestep),
        "per_query": {
            id_: [_number(values[row]) for values in (found.with_norm, found.with_timestep) if values is not None]
            for row, id_ in enumerate(scores.query_ids)
        },
    }
    if scores.train_timesteps is not None:
        histogram, (edges, medians) = timestep_histogram(scores, k), norm_by_timestep(scores)
        result["trained_timesteps"] = {
            "edges": histogram.edges.tolist(),
            "all": histogram.everything.tolist(),
            "top": histogram.top.tolist(),
        }
        result["median_norms"] = {"edges": edges.tolist(), "checkpoints": _numbers(medians)}
    return result


def _effect(scores: Scores, found: Intervention, k: int, train: ImageData) -> dict[str, Any]:
    """Ranks of each sample over queries, before and after."""
    rows = train.rows(found.ids)
    before, after = (ranks_of(part[scores.method], scores, rows) for part in (found.as_trained, found.as_if))
    return {
        "intervention": [
            {
                "id": id_,
                "rank_as_trained": float(np.median(before[:, column])),
                "rank_as_if": float(np.median(after[:, column])),
                "in_top_as_trained": float((before[:, column] <= k).mean()),
                "in_top_as_if": float((after[:, column] <= k).mean()),
            }
            for column, id_ in enumerate(found.ids)
        ]
    }


def _curves(found: Intervention, steps: Sequence[int]) -> list[dict[str, Any]]:
    return [
        {
            "id": id_,
            "timesteps": found.timesteps.tolist(),
            "checkpoints": [
                {
                    "step": step,
                    "norms": _numbers(found.curves[number, column]),
                    "trained_timestep": int(found.trained_timesteps[number, column]),
                    "trained_norm": _number(found.trained_norms[number, column]),
                    "largest_timestep": int(found.largest_timesteps[number, column]),
                }
                for number, step in enumerate(steps)
            ],
        }
        for column, id_ in enumerate(found.ids)
    ]


def _table(
    methods: Sequence[Mapping[str, Any]], k: int, *, has_intervention: bool, notes: Sequence[str]
) -> dict[str, Any]:
    effects = ("rank_as_trained", "rank_as_if", "in_top_as_trained", "in_top_as_if")
    columns = ["method", "|score| ~ norm", "|score| ~ timestep"]
    if has_intervention:
        columns += ["rank as trained", "rank as if", f"in top {k} as trained", f"in top {k} as if"]
    rows = []
    for one in methods:
        row: list[Any] = [one["method"], one["norm_correlation"], one["timestep_correlation"]]
        for name in effects if has_intervention else ():
            values = [sample[name] for sample in one.get("intervention", [])]
            row.append(float(np.mean(values)) if values else None)
        rows.append(row)
    return {"columns": columns, "rows": rows, "notes": list(notes)}


def _notes(scores: Sequence[Scores], replayed: Sequence[Scores]) -> list[str]:
    notes = [
        "|score| ~ norm, |score| ~ timestep: rank correlation, over training images, of the size of the score with the "
        "length of the gradient as it was trained, and with the timestep; median over queries. Near 0 without a bias."
    ]
    without = [one.method for one in scores if one.train_timesteps is None]
    if without:
        notes.append(f"{', '.join(without)}: training images are on a grid, so they have no trained timestep.")
    others = [one.method for one in scores if not any(one is other for other in replayed)]
    if others:
        notes.append(f"No intervention for {', '.join(others)}: it is that of tracin and retrac, as traced.")
    return notes


def _median(values: ndarray) -> float | None:
    return None if np.isnan(values).all() else float(np.nanmedian(values))


def _numbers(values: ndarray) -> Any:
    """Give nested lists, None where there is no number."""
    return [_numbers(part) if part.ndim else _number(part) for part in map(np.asarray, values)]


def _number(value: Any) -> float | None:
    return float(value) if math.isfinite(value) else None
