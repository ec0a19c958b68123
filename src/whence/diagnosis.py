"""All bias diagnostics of a run's scores, as ``evaluation/bias.json`` and as three tables.

::

    bias             of each method: does the size of its scores follow length and timestep of the gradient?
    norm_curves      at each checkpoint: how long are gradients at which timestep?
    intervention     of tracin and retrac: what becomes of images that are moved to another timestep?

See :mod:`whence.bias` for what is measured.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy import ndarray
from scipy.special import stdtrit

from whence._files import publish_file, write_json
from whence.bias import (
    WAYS,
    Intervention,
    choose_samples,
    correlations,
    intervene,
    is_replayed,
    norm_by_timestep,
    ranks_of,
    timestep_histogram,
    trained_as,
)
from whence.comparison import markdown_table
from whence.config import TraceSettings
from whence.data import ImageData
from whence.errors import ConfigError, ScoresError
from whence.evaluation import generally_influential_from
from whence.retrieval import names_apart
from whence.scores import Scores
from whence.subject import Subject

FORMAT_VERSION = 2  # of bias.json

MAX_DOTS = 1500
"""Training images kept for plots of scores against norm and timestep, evenly chosen by row."""


def diagnose(
    subject: Subject,
    queries: ImageData,
    scores: Sequence[Scores],
    settings: TraceSettings | None,
    folder: Path,
    *,
    samples: Sequence[str] = (),
    count: int = 20,
    timesteps: int = 100,
    k: int = 10,
    show_progress: bool = True,
) -> dict[str, dict[str, Any]]:
    """Diagnose scores, and write ``evaluation/bias.json``, and a Markdown file for each table.

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
        Tables by name, each with ``columns``, ``rows`` and ``notes``; only the first one without an intervention.

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
    found = None
    if replayed and settings is not None and (samples or count):
        rows = subject.train.rows(samples) if samples else choose_samples(replayed[0], count)
        options: dict[str, Any] = {"timesteps": timesteps, "show_progress": show_progress}
        found = intervene(subject, queries, replayed, rows, settings, folder / "cache", **options)
    effects = {} if found is None else {names[id(one)]: _effect(one, found, k, subject.train) for one in replayed}
    methods = [_diagnose_method(names[id(one)], one, k) | effects.get(names[id(one)], {}) for one in with_gradients]
    num_query, num_train = with_gradients[0].values.shape
    record: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "k": k,
        "num_train": num_train,
        "num_query": num_query,
        "generally_influential_from": generally_influential_from(num_query, num_train, k),
        "checkpoint_steps": [checkpoint.step for checkpoint in subject.checkpoints],
        "methods": methods,
        "samples": [] if found is None else _curves(found, [c.step for c in subject.checkpoints]),
    }
    tables = {"bias": _bias_table(record, _notes(record, with_gradients, replayed))}
    if found is not None:
        tables |= {"norm_curves": _curve_table(found, record), "intervention": _intervention_table(record)}
    write_json(folder / "evaluation" / "bias.json", record | {"tables": tables})
    for name, table in tables.items():
        with publish_file(folder / "evaluation" / f"{name}.md") as partial:
            partial.write_text(markdown_table(table))
    return tables


def read_diagnosis(folder: Path) -> dict[str, Any] | None:
    """Read what :func:`diagnose` wrote for a run.

    Args:
        folder: The run.

    Returns:
        The content of ``bias.json``; None where there is none.

    Raises:
        ScoresError: If the file is damaged.
    """
    path = folder / "evaluation" / "bias.json"
    if not path.exists():
        return None
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ScoresError(f"{path} cannot be read: {error}. Delete it, or run `whence diagnose` again.") from error


# --- What is in bias.json ---


def _diagnose_method(name: str, scores: Scores, k: int) -> dict[str, Any]:
    found = correlations(scores)
    num_query, num_train = scores.values.shape
    counts = np.bincount(scores.top_rows(k).ravel(), minlength=num_train)
    result: dict[str, Any] = {
        "method": name,
        "scores": scores.content_hash,
        "generally_influential": int((counts >= generally_influential_from(num_query, num_train, k)).sum()),
        "norm_correlation": _median(found.with_norm),
        "timestep_correlation": None if found.with_timestep is None else _median(found.with_timestep),
        "per_query": {
            id_: [_number(values[row]) for values in (found.with_norm, found.with_timestep) if values is not None]
            for row, id_ in enumerate(scores.query_ids)
        },
        "images": _dots(scores, k),
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


def _dots(scores: Scores, k: int) -> dict[str, Any]:
    """Give length, timestep and size of score: the mean over queries of |score|, as a share of the strongest."""
    norms, timesteps = trained_as(scores)
    sizes = np.abs(scores.values)
    strongest = sizes.max(axis=1, keepdims=True)
    sizes = (sizes / np.where(strongest > 0, strongest, 1)).mean(axis=0)
    rows = np.flatnonzero(np.isfinite(norms))
    if len(rows) > MAX_DOTS:
        rows = rows[np.linspace(0, len(rows) - 1, MAX_DOTS).round().astype(int)]
    in_top = np.isin(rows, scores.top_rows(k))
    return {
        "norm": _numbers(norms[rows]),
        "timestep": None if timesteps is None else _numbers(timesteps[rows]),
        "size": _numbers(sizes[rows]),
        "in_top": in_top.tolist(),
    }


def _effect(scores: Scores, found: Intervention, k: int, train: ImageData) -> dict[str, Any]:
    """Ranks of each sample over queries, at its own timestep and where it was moved."""
    rows = train.rows(found.ids)
    effects: list[dict[str, Any]] = [{"id": id_} for id_ in found.ids]
    for way, values in zip(WAYS, found.scores[scores.method], strict=True):
        ranks = ranks_of(values, scores.values, rows)
        of_sizes = ranks_of(np.abs(values), np.abs(scores.values), rows)
        for column, effect in enumerate(effects):
            effect[way] = {
                "rank": float(ranks[:, column].mean()),
                "in_top": float((ranks[:, column] <= k).mean()),
                "in_strongest": float((of_sizes[:, column] <= k).mean()),
            }
    changes = {
        way: _change([effect[way]["rank"] - effect["trained"]["rank"] for effect in effects]) for way in WAYS[1:]
    }
    return {"intervention": effects, "rank_change": changes}


def _change(changes: Sequence[float]) -> dict[str, float | None]:
    """Give the mean over samples with Student's 95 % interval; without ends for one sample."""
    mean = float(np.mean(changes))
    if len(changes) < 2:
        return {"mean": mean, "low": None, "high": None}
    half = float(stdtrit(len(changes) - 1, 0.975) * np.std(changes, ddof=1) / len(changes) ** 0.5)
    return {"mean": mean, "low": mean - half, "high": mean + half}


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
                    "longest_timestep": int(found.longest_timesteps[number, column]),
                }
                for number, step in enumerate(steps)
            ],
        }
        for column, id_ in enumerate(found.ids)
    ]


# --- Tables ---


def _bias_table(record: Mapping[str, Any], notes: Sequence[str]) -> dict[str, Any]:
    columns = ["method", "|score| ~ norm", "|score| ~ timestep", "generally influential"]
    fields = ("method", "norm_correlation", "timestep_correlation", "generally_influential")
    rows = [[one[field] for field in fields] for one in record["methods"]]
    return {"columns": columns, "rows": rows, "notes": list(notes)}


def _curve_table(found: Intervention, record: Mapping[str, Any]) -> dict[str, Any]:
    """Medians over samples, at five timesteps of the curve; those not visited before a checkpoint are left out."""
    last = len(found.timesteps) - 1
    places = sorted({0, last // 4, last // 2, 3 * last // 4, last})
    rows = []
    for number, step in enumerate(record["checkpoint_steps"]):
        curves = found.curves[number][found.trained_timesteps[number] >= 0]
        if not len(curves):
            rows.append([step, *([None] * (len(places) + 2))])
            continue
        lengths = [_number(np.median(curves[:, place])) for place in places]
        peak = float(np.median(found.timesteps[curves.argmax(axis=1)]))
        lowest = curves.min(axis=1)
        ratio = float(np.median(curves.max(axis=1) / np.where(lowest > 0, lowest, np.nan)))
        rows.append([step, *lengths, peak, _number(ratio)])
    columns = ["step", *(f"t {found.timesteps[place]}" for place in places), "longest at t", "longest / shortest"]
    note = (
        f"Length of the gradient by timestep, with the noise of training: median over {len(found.ids)} training "
        "images. longest at t, longest / shortest: of each image's own curve, median over images."
    )
    return {"columns": columns, "rows": rows, "notes": [note]}


def _intervention_table(record: Mapping[str, Any]) -> dict[str, Any]:
    k, least, num_query = record["k"], record["generally_influential_from"], record["num_query"]
    columns = ["method", "trained at", "mean rank", "change", "low", "high", "rose"]
    columns += [f"in top {k}", f"in {k} strongest", "generally influential"]
    places = {"trained": "its own t", "longest": "t of longest gradient", "shortest": "t of shortest gradient"}
    rows, count = [], 0
    for one in record["methods"]:
        effects = one.get("intervention", [])
        count = max(count, len(effects))
        for way in WAYS if effects else ():
            rank, in_top, in_strongest = (
                float(np.mean([effect[way][name] for effect in effects])) for name in ("rank", "in_top", "in_strongest")
            )
            general = sum(effect[way]["in_top"] * num_query >= least - 1e-9 for effect in effects)
            rose = sum(effect[way]["rank"] < effect["trained"]["rank"] for effect in effects)
            change = [None] * 4 if way == "trained" else [*one["rank_change"][way].values(), rose]
            rows.append([one["method"], places[way], rank, *change, in_top, in_strongest, general])
    notes = [
        f"{count} training images, each scored as if it had been trained at another timestep; by chance, the mean rank "
        f"is {(record['num_train'] + 1) / 2:g} of {record['num_train']}, and in top {k} {k / record['num_train']:.2g}.",
        "change: of the mean rank, against that at its own timestep; below 0, towards the first place. low, high: 95 % "
        "interval over images (Student's t). rose: images with a better mean rank than at their own timestep.",
        f"mean rank, in top {k}: over images and queries. in {k} strongest: among the largest scores of either sign. "
        f"generally influential: images in the top {k} of {least} or more of the {num_query} queries.",
    ]
    return {"columns": columns, "rows": rows, "notes": notes}


def _notes(record: Mapping[str, Any], scores: Sequence[Scores], replayed: Sequence[Scores]) -> list[str]:
    notes = [
        "|score| ~ norm, |score| ~ timestep: rank correlation, over training images, of the size of the score with the "
        "length of the gradient as it was trained, and with the timestep; median over queries. Near 0 without a bias.",
        f"generally influential: training images in the top {record['k']} of {record['generally_influential_from']} or "
        f"more of the {record['num_query']} queries.",
    ]
    without = [one.method for one in scores if one.train_timesteps is None]
    if without:
        notes.append(f"{', '.join(without)}: training images are on a grid, so they have no trained timestep.")
    others = [one.method for one in scores if not any(one is other for other in replayed)]
    if others:
        notes.append(
            f"No intervention for {', '.join(others)}: only for tracin and retrac as `whence trace` makes them."
        )
    return notes


def _median(values: ndarray) -> float | None:
    return None if np.isnan(values).all() else float(np.nanmedian(values))


def _numbers(values: ndarray) -> Any:
    """Give nested lists, None where there is no number."""
    return [_numbers(part) if part.ndim else _number(part) for part in map(np.asarray, values)]


def _number(value: Any) -> float | None:
    return float(value) if math.isfinite(value) else None
