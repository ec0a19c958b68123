"""The part of the report that shows a diagnosis: whether scores follow the timesteps of training.

It reads ``evaluation/bias.json``, draws its figures with ``_plots`` and says in a sentence below each what it shows.
Its template is ``report_bias.html``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup
from numpy import ndarray

from whence._plots import draw_counts, draw_curves, draw_moves, draw_sizes
from whence.scores import Scores

FORMAT_VERSION = 2
"""Of ``bias.json``; a page shows no other."""

_LEFT_TO_RIGHT = {"shortest": "shortest gradient", "trained": "as trained", "longest": "longest gradient"}
_NO_RELATION, _WEAK = 0.1, 0.3
"""Rank correlations below these, of either sign, are called none and weak."""


@dataclass(frozen=True)
class Figure:
    """One plot, and what it says."""

    title: str
    plot: Markup
    sentence: str


@dataclass(frozen=True)
class Question:
    """Plots that answer one question."""

    title: str
    explanation: str
    legend: list[tuple[str, str]]
    """Class of each mark, and what it stands for."""
    figures: list[Figure]


def show_diagnosis(record: Mapping[str, Any] | None, names: Mapping[str, Scores]) -> dict[str, Any]:
    """Turn a diagnosis into what the template shows.

    Args:
        record: The content of ``bias.json``; None: there is none.
        names: The scores on the page, by the name that they have there.

    Returns:
        ``questions``, none if there is nothing to show, ``methods`` that they cover, and ``stale``: there is a
        diagnosis, but of other scores or by another version.
    """
    if record is None:
        return {"questions": [], "methods": [], "stale": False}
    named = {scores.content_hash: name for name, scores in names.items()}
    is_known = record.get("format_version") == FORMAT_VERSION
    methods = [
        one | {"method": named[one["scores"]]} for one in record["methods"] if is_known and one["scores"] in named
    ]
    if not methods:
        return {"questions": [], "methods": [], "stale": True}
    asked = (
        _ask_curves(record, methods),
        *_ask_sizes(methods),
        _ask_timesteps(record, methods),
        _ask_moves(record, methods),
    )
    return {
        "questions": [question for question in asked if question.figures],
        "methods": [one["method"] for one in methods],
        "stale": False,
    }


# --- Questions ---


def _ask_curves(record: Mapping[str, Any], methods: Sequence[Mapping[str, Any]]) -> Question:
    figures = []
    if record["samples"]:
        sample = record["samples"][0]
        parts = sample["checkpoints"]
        curves = _array([part["norms"] for part in parts])
        marks = _array([(part["trained_timestep"], part["trained_norm"]) for part in parts])
        timesteps, name = _array(sample["timesteps"]), f"gradient norm of {sample['id']} against timestep"
        plot = draw_curves(timesteps, curves, marks, until=timesteps.max(), name=name)
        figures += _figure(f"One image: {sample['id']}", plot, _say_curves(record["samples"]))
    medians = next((one["median_norms"] for one in methods if one.get("median_norms")), None)
    if medians is not None:
        edges, curves = _array(medians["edges"]), _array(medians["checkpoints"])
        middles, name = (edges[1:] + edges[:-1]) / 2, "median gradient norm by trained timestep"
        plot = draw_curves(middles, curves, np.empty((0, 2)), until=edges[-1], name=name)
        figures += _figure("All training images", plot, _say_medians(edges, curves[-1]))
    return Question(
        "Does the length of a gradient depend on the timestep?",
        "If it does, it matters at which timestep an image happened to be trained before each checkpoint, which is "
        "chance and says nothing about the image.",
        [("thin", "earlier checkpoints"), ("strong", "last checkpoint"), ("dot top", "where the image was trained")],
        figures,
    )


def _ask_sizes(methods: Sequence[Mapping[str, Any]]) -> list[Question]:
    legend = [("dot all", "training image"), ("dot top", "in the top of some query"), ("strong", "median")]
    asked = []
    for key, x_label, title, subject in (
        (
            "norm",
            "length of the gradient as trained",
            "Do images with longer gradients get larger scores?",
            "images with longer gradients",
        ),
        (
            "timestep",
            "trained timestep, mean over checkpoints",
            "Do scores follow the trained timestep?",
            "images trained at later timesteps",
        ),
    ):
        figures = []
        for one in methods:
            correlation, images = one[f"{key}_correlation"], one["images"]
            if correlation is not None:
                plot = draw_sizes(
                    _array(images[key]),
                    _array(images["size"]),
                    np.array(images["in_top"], dtype=bool),
                    x_label=x_label,
                    name=f"{one['method']}: size of scores against {x_label}",
                )
                figures += _figure(one["method"], plot, _say_correlation(correlation, subject))
        explanation = (
            "Sizes of scores, whatever their sign, are shares of the query’s strongest, averaged over queries. A level "
            "line is what a method without this bias has."
        )
        asked.append(Question(title, explanation, legend, figures))
    return asked


def _ask_timesteps(record: Mapping[str, Any], methods: Sequence[Mapping[str, Any]]) -> Question:
    figures = []
    for one in methods:
        if one.get("trained_timesteps"):
            edges, everything, top = (_array(one["trained_timesteps"][name]) for name in ("edges", "all", "top"))
            plot = draw_counts(edges, everything.astype(int), top.astype(int), name=one["method"])
            figures += _figure(one["method"], plot, _say_histogram(edges, everything, top, record["k"]))
    return Question(
        f"At which timesteps were the images of a top {record['k']} trained?",
        "Over all checkpoints, the last visit before each. Where the line runs along the bars, the timestep decides "
        "nothing.",
        [("box all", "all training images"), ("box top", f"places in the top {record['k']} of all queries")],
        figures,
    )


def _ask_moves(record: Mapping[str, Any], methods: Sequence[Mapping[str, Any]]) -> Question:
    figures, count = [], 0
    for one in methods:
        effects = one.get("intervention")
        if effects:
            count = len(effects)
            ranks = _array([[effect[way]["rank"] for effect in effects] for way in _LEFT_TO_RIGHT])
            name = f"{one['method']}: ranks of images that are moved to other timesteps"
            plot = draw_moves(ranks, list(_LEFT_TO_RIGHT.values()), record["num_train"], name=name)
            figures += _figure(one["method"], plot, _say_moves(record, one))
    return Question(
        "What if an image had been trained at another timestep?",
        f"{count} training images are scored again as if they had been trained where their gradient is longest, and "
        "where it is shortest; image, noise and weight stay as they were. Lines that rise to the right are images that "
        "owe their rank to the timestep.",
        [("thin", "one image, mean over queries"), ("strong", "median image"), ("dashed", "what chance gives")],
        figures,
    )


# --- Sentences ---


def _say_curves(samples: Sequence[Mapping[str, Any]]) -> str:
    """Tell at the last checkpoint that has one how far each curve goes, and where its peak is."""
    ratios, peaks = [], []
    for sample in samples:
        part = sample["checkpoints"][-1]
        norms = _array(part["norms"])
        if part["longest_timestep"] >= 0 and norms.min() > 0:
            ratios.append(norms.max() / norms.min())
            peaks.append(part["longest_timestep"])
    if not ratios:
        return "No image was visited before the last checkpoint."
    low, high = np.quantile(peaks, [0.25, 0.75])
    images = f"Over {len(ratios)} such images" if len(ratios) > 1 else "For this image"
    where = f"between timesteps {low:.0f} and {high:.0f}" if low < high else f"at timestep {low:.0f}"
    return (
        f"{images}, at the last checkpoint, the longest gradient is {np.median(ratios):.1f} times the shortest "
        f"(median), and {'for the middle half of them ' if len(ratios) > 3 else ''}it is longest {where}."
    )


def _say_medians(edges: ndarray, medians: ndarray) -> str:
    if np.isnan(medians).all():
        return "No image was visited before the last checkpoint."
    highest, lowest = int(np.nanargmax(medians)), int(np.nanargmin(medians))
    ratio = medians[highest] / medians[lowest] if medians[lowest] > 0 else np.inf
    where = f"{edges[highest]:.0f} to {edges[highest + 1]:.0f}"
    return (
        f"Images trained at timesteps {where} have the longest gradients at the last checkpoint, {ratio:.1f} times as "
        f"long as those trained at {edges[lowest]:.0f} to {edges[lowest + 1]:.0f}."
    )


def _say_correlation(correlation: float, subject: str) -> str:
    size = "larger" if correlation > 0 else "smaller"
    if abs(correlation) < _NO_RELATION:
        says = f"Hardly: {subject} get scores no larger or smaller than others"
    elif abs(correlation) < _WEAK:
        says = f"A little: {subject} tend to get {size} scores"
    else:
        says = f"Yes: {subject} get {size} scores"
    return f"{says} (rank correlation {correlation:+.2f}, median over queries).".replace("-", "−")


def _say_histogram(edges: ndarray, everything: ndarray, top: ndarray, k: int) -> str:
    shares = everything / max(everything.sum(), 1), top / max(top.sum(), 1)
    apart = 100 * np.abs(shares[0] - shares[1]).sum() / 2
    more = int(np.argmax(shares[1] - shares[0]))
    return (
        f"{apart:.0f} % of the places in a top {k} would have to go to other bars for the two to agree; most of all, "
        f"timesteps {edges[more]:.0f} to {edges[more + 1]:.0f} have {100 * shares[1][more]:.0f} % of the places and "
        f"{100 * shares[0][more]:.0f} % of the images."
    )


def _say_moves(record: Mapping[str, Any], one: Mapping[str, Any]) -> str:
    method, effects = one["method"], one["intervention"]
    k, num_query, least = record["k"], record["num_query"], record["generally_influential_from"]
    ranks = {way: np.mean([effect[way]["rank"] for effect in effects]) for way in _LEFT_TO_RIGHT}
    general = {
        way: sum(effect[way]["in_top"] * num_query >= least - 1e-9 for effect in effects) for way in _LEFT_TO_RIGHT
    }
    if general["longest"] <= general["trained"]:
        verdict = "makes no more of them generally influential."
    elif general["longest"] >= len(effects) / 2:
        verdict = "makes most of them generally influential."
    else:
        verdict = "makes some of them generally influential, and most of them not."
    return (
        f"Trained where its gradient is longest, an image goes from rank {ranks['trained']:,.0f} to "
        f"{ranks['longest']:,.0f} of {record['num_train']:,} on average{_say_interval(one['rank_change']['longest'])}, "
        f"and {general['longest']} of {len(effects)} images are in the top {k} of {least} or more of the {num_query} "
        f"queries, against {general['trained']} before; where it is shortest, to rank {ranks['shortest']:,.0f}. Under "
        f"{method}, the timestep alone {verdict}"
    )


def _say_interval(change: Mapping[str, float | None]) -> str:
    if change["low"] is None:
        return ""
    return f" (change {change['mean']:+,.0f}, 95 % interval {change['low']:+,.0f} to {change['high']:+,.0f})".replace(
        "-", "−"
    )


def _figure(title: str, plot: Markup | None, sentence: str) -> list[Figure]:
    return [] if plot is None else [Figure(title, plot, sentence)]


def _array(values: Any) -> ndarray:
    """Read numbers, None as NaN."""
    return np.array(values, dtype=np.float64)
