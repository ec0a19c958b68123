"""The report: one HTML file that shows which training images made each query, with what is needed to judge it.

The page loads nothing: each picture stands once in its style sheet as a data URI, plots are inline SVG, there is no
script. This module turns scores into what the template ``report.html`` shows; it reads arrays, counts and sorts, and
computes no scores. How the page looks is in ``report.css``, plots are in ``_plots.py``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Int
from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup
from numpy import ndarray

from whence._bias_page import show_diagnosis
from whence._files import publish_file
from whence._page_text import (
    aligned_number,
    caption_of,
    common_exponent,
    dig,
    flatten,
    format_summary,
    short_number,
    shorten,
    superscript,
    text_of,
    tops,
)
from whence._pictures import MAX_PIXELS, Pictures
from whence._plots import MAX_DOTS, draw_norms, draw_scores, draw_timesteps, drawable_norms
from whence.data import ImageData
from whence.errors import ConfigError, ScoresError
from whence.scores import Scores

MAX_CARDS = 64
"""Queries shown one by one; counts and plots always cover all of them."""
MAX_OPPONENTS = 5
MAX_INFLUENTIAL = 12


def write_report(
    path: Path,
    *,
    title: str,
    scores: Sequence[Scores],
    train: ImageData,
    queries: ImageData,
    summary: Mapping[str, Any] | None = None,
    settings: Mapping[str, Any],
    diagnosis: Mapping[str, Any] | None = None,
    k: int = 10,
) -> Path:
    """Write the report page of one run.

    Args:
        path: The HTML file; it appears whole or not at all.
        title: Heading of the page.
        scores: One for each method, shown side by side in this order.
        train: The training images, in the order of the scores.
        queries: The query images, in the order of the scores.
        summary: A table computed elsewhere: ``columns``, ``rows``, and optionally ``caption`` and ``notes``.
        settings: What the run was made with; nested mappings are shown with dots.
        diagnosis: The content of ``evaluation/bias.json``, as ``whence diagnose`` writes it; shown where it is of these
            scores.
        k: How many proponents to show for each query; fewer where the training set is smaller.

    Returns:
        ``path``.

    Raises:
        ConfigError: If ``k`` is below 1.
        ScoresError: If there are no scores, or they are not finite, or belong to other images.
    """
    if k < 1:
        raise ConfigError(f"k is {k}; a report shows at least 1 proponent of each query.")
    if not scores:
        raise ScoresError("There are no scores to report. Pass the Scores of at least one method.")
    for one in scores:
        _check_ids(one, "train", one.train_ids, train.ids)
        _check_ids(one, "query", one.query_ids, queries.ids)
        _check_fingerprint(one, "train", train)
        _check_fingerprint(one, "queries", queries)
        _check_finite(one)
    html = _render(_assemble(title, scores, train, queries, summary, settings, diagnosis, k))
    with publish_file(path) as partial:
        partial.write_text(html, encoding="utf-8")
    return path


def _check_ids(scores: Scores, side: str, scored: Sequence[str], given: Sequence[str]) -> None:
    if not scored:
        raise ScoresError(f"The {scores.method} scores have no {side} images, so there is nothing to report.")
    if tuple(scored) == tuple(given):
        return
    where = next((row for row, (a, b) in enumerate(zip(scored, given, strict=False)) if a != b), None)
    found = (
        f"{len(scored)} ids against {len(given)}"
        if where is None
        else f"row {where} is {scored[where]!r} in the scores and {given[where]!r} in the images"
    )
    raise ScoresError(
        f"The {side} ids of the {scores.method} scores are not those of the {side} images: {found}. The page would "
        f"show the wrong pictures. Pass the {side} images that were scored, in the same order, or trace again."
    )


def _check_fingerprint(scores: Scores, side: Literal["train", "queries"], given: ImageData) -> None:
    """Refuse images that are not those scored, where the scores tell: scores made elsewhere may not."""
    want = dig(scores.details, (side, "fingerprint"))
    if want is not None and want != given.fingerprint:
        name = {"train": "training", "queries": "query"}[side]
        raise ScoresError(
            f"The {name} images in {given.source} changed since the {scores.method} scores were made: their "
            f"fingerprint is {given.fingerprint[:12]}…, the scores say {str(want)[:12]}…. The page would show the "
            "wrong pictures. Restore the images, or trace again."
        )


def _check_finite(scores: Scores) -> None:
    bad = np.argwhere(~np.isfinite(scores.values))
    if len(bad):
        query, sample = bad[0]
        raise ScoresError(
            f"The {scores.method} score of training image {scores.train_ids[sample]!r} for query "
            f"{scores.query_ids[query]!r} is {scores.values[query, sample]}; {len(bad)} scores are not finite. They "
            "cannot be ranked. Trace again."
        )


# --- What the template shows ---


@dataclass(frozen=True)
class _Hit:
    """One training image in a strip."""

    rank: int
    picture: str
    sample_id: str
    label: str
    caption: str
    score: str
    """Short, in units of the column's power of ten."""
    exact_score: str
    bar: float
    """Percent of the query's strongest |score|."""
    timestep: str
    """Where it was last trained; empty if never or unknown."""
    history: str
    """Trained timesteps before every checkpoint, in words."""
    timesteps: str
    """The same as bare numbers."""
    num_tops: int
    """In how many top k it is, where that is worth a mark; else 0."""
    num_ranked: int
    """Of how many."""
    parts: list[tuple[float, float, bool]] = field(default_factory=list)
    """Of each phase: width in percent, strength of the colour, whether it worked against the sum."""
    phases: str = ""


@dataclass(frozen=True)
class _Column:
    """One method's answer to one query."""

    method: str
    reliability: str
    reliability_hint: str
    unit: str
    has_timesteps: bool
    top_title: str
    proponents: list[_Hit]
    bottom_title: str
    opponents: list[_Hit]


@dataclass(frozen=True)
class _Card:
    """One query with every method's answer."""

    number: int
    picture: str
    query_id: str
    label: str
    caption: str
    columns: list[_Column]


@dataclass(frozen=True)
class _Method:
    """Scores with what is read off them once."""

    name: str
    """On the page."""
    scores: Scores
    top: Int[ndarray, "query k"]
    ranked_top: Int[ndarray, "ranked k"]
    """Without the queries whose scores are all equal: their order is that of the training set."""
    counts: Int[ndarray, " train"]
    """In how many of ``ranked_top`` each sample is."""
    reliability: Float[ndarray, " query"] | None


def _assemble(
    title: str,
    scores: Sequence[Scores],
    train: ImageData,
    queries: ImageData,
    summary: Mapping[str, Any] | None,
    settings: Mapping[str, Any],
    diagnosis: Mapping[str, Any] | None,
    k: int,
) -> dict[str, Any]:
    k = min(k, len(train.ids))
    methods = _count_tops(scores, k)
    bias = show_diagnosis(diagnosis, {method.name: method.scores for method in methods})
    pictures = Pictures()
    cards = [_make_card(row, methods, train, queries, pictures) for row in range(min(len(queries.ids), MAX_CARDS))]
    influential = [_make_influential(method, train, pictures) for method in methods]
    return {
        "title": title,
        "css": Markup(files("whence").joinpath("report.css").read_text(encoding="utf-8")),
        "facts": _collect_facts(scores, settings),
        "notes": _group_notes(methods),
        "summary": format_summary(summary) if summary else None,
        "cards": cards,
        "num_queries": len(queries.ids),
        "num_train": len(train.ids),
        "tops": tops(k),
        "k": k,
        "columns_wide": {1: 1, 2: 2, 4: 2}.get(len(methods), 3),
        "phase_legends": _collect_phase_legends(methods),
        "influential": influential,
        "plots": [_make_plots(method, method.name in bias["methods"]) for method in methods],
        "bias": bias,
        "settings": flatten(settings),
        "declared_columns": ["declaration", *(method.name for method in methods)],
        "declarations": _compare_declarations(methods),
        "data": [_describe_data("training images", train), _describe_data("queries", queries)],
        "pictures": pictures.prepare(),
        "max_pixels": MAX_PIXELS,
        "max_dots": MAX_DOTS,
    }


def _render(page: dict[str, Any]) -> str:
    environment = Environment(
        loader=FunctionLoader(lambda name: files("whence").joinpath(name).read_text(encoding="utf-8")),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters["shorten"] = shorten
    return environment.get_template("report.html").render(page)


def _count_tops(scores: Sequence[Scores], k: int) -> list[_Method]:
    names = [one.method for one in scores]
    methods = []
    for place, one in enumerate(scores):
        # The same method twice, say with other settings, needs two names.
        name = one.method if names.count(one.method) == 1 else f"{one.method} ({names[: place + 1].count(one.method)})"
        top = one.top_rows(k)
        ranked = top[(one.values.max(axis=1) > one.values.min(axis=1)) | (len(one.train_ids) == 1)]
        counts = np.bincount(ranked.ravel(), minlength=len(one.train_ids))
        methods.append(_Method(name, one, top, ranked, counts, one.reliability()))
    return methods


# --- Cards ---


def _make_card(
    query_row: int, methods: list[_Method], train: ImageData, queries: ImageData, pictures: Pictures
) -> _Card:
    return _Card(
        number=query_row + 1,
        picture=pictures.name(queries, query_row),
        query_id=queries.ids[query_row],
        label=text_of(queries.labels, query_row),
        caption=caption_of(queries, query_row),
        columns=[_make_column(method, query_row, train, pictures) for method in methods],
    )


def _make_column(method: _Method, query_row: int, train: ImageData, pictures: Pictures) -> _Column:
    scores, values = method.scores, method.scores.values[query_row]
    top = method.top[query_row].tolist()
    bottom = [entry.train_row for entry in scores.top(query_row, MAX_OPPONENTS, proponents=False)]
    bottom = [row for row in bottom if row not in top]
    exponent = common_exponent(float(np.abs(values).max()))
    proponents, opponents = (
        [_make_hit(method, query_row, row, rank, exponent, train, pictures) for rank, row in enumerate(rows, start=1)]
        for rows in (top, bottom)
    )
    reliability, hint = _describe_reliability(method, query_row)
    return _Column(
        method=method.name,
        reliability=reliability,
        reliability_hint=hint,
        unit=f"scores × 10{superscript(exponent)}" if exponent else "",
        has_timesteps=scores.train_timesteps is not None,
        top_title=_title_top(values, len(top)),
        proponents=proponents,
        bottom_title="Opponents" if len(bottom) and values[bottom[0]] < 0 <= values.max() else "Lowest scores",
        opponents=opponents,
    )


def _title_top(values: Float[ndarray, " train"], num_shown: int) -> str:
    if len(values) > 1 and values.min() == values.max():
        return "All scores are equal: the order below means nothing"
    if values.max() < 0:
        return f"Highest {num_shown} scores (every score is negative)"
    return "Proponents"


def _make_hit(
    method: _Method, query_row: int, row: int, rank: int, exponent: int, train: ImageData, pictures: Pictures
) -> _Hit:
    scores, value = method.scores, float(method.scores.values[query_row, row])
    strongest = float(np.abs(scores.values[query_row]).max())
    timestep, history, timesteps = _describe_timesteps(scores, row)
    parts, phases = _split_phases(scores, query_row, row)
    return _Hit(
        rank=rank,
        picture=pictures.name(train, row),
        sample_id=train.ids[row],
        label=text_of(train.labels, row),
        caption=caption_of(train, row),
        score=aligned_number(value / 10.0**exponent, strongest / 10.0**exponent),
        exact_score=short_number(value, 6),
        bar=round(100 * abs(value) / strongest, 1) if strongest else 0.0,
        timestep=timestep,
        history=history,
        timesteps=timesteps,
        num_tops=_count_if_common(method, row),
        num_ranked=len(method.ranked_top),
        parts=parts,
        phases=phases,
    )


def _count_if_common(method: _Method, row: int) -> int:
    """Count the top k that a sample is in; 0 below 3, below a quarter of all, or below twice what chance gives."""
    num_queries, k = method.ranked_top.shape
    count, by_chance = int(method.counts[row]), num_queries * k / len(method.counts)
    return count if count >= max(3, num_queries / 4, 2 * by_chance) else 0


def _describe_timesteps(scores: Scores, row: int) -> tuple[str, str, str]:
    """Say where a sample was trained last, and where before every checkpoint: in words and as numbers."""
    if scores.train_timesteps is None:
        return "", "", ""
    timesteps = scores.train_timesteps[:, row].tolist()
    steps = scores.checkpoint_steps or tuple(range(1, len(timesteps) + 1))
    trained = [timestep for timestep in timesteps if timestep >= 0]
    words = [
        f"{timestep if timestep >= 0 else 'not visited'} (by step {step:,})"
        for step, timestep in zip(steps, timesteps, strict=True)
    ]
    return (
        f"t {trained[-1]}" if trained else "never trained",
        "trained at timestep " + ", ".join(words),
        ", ".join(str(timestep) if timestep >= 0 else "–" for timestep in timesteps),
    )


def _split_phases(scores: Scores, query_row: int, row: int) -> tuple[list[tuple[float, float, bool]], str]:
    """Split a score by noise phase: widths are shares of the sum of |parts|; parts of the other sign are marked."""
    if scores.phases is None:
        return [], ""
    parts = scores.phases[query_row, :, row].astype(np.float64)
    total = np.abs(parts).sum()
    if not total:
        return [], ""
    against = parts * np.sign(scores.values[query_row, row]) < 0
    shades = _shades(len(parts))
    words = [
        f"{name} {100 * part / total:+.0f} %".replace("-", "−")
        for name, part in zip(_name_phases(scores), parts, strict=True)
    ]
    widths = [round(100 * float(abs(part)) / float(total), 1) for part in parts]
    return list(zip(widths, shades, against.tolist(), strict=True)), "by query timestep: " + ", ".join(words)


def _shades(num_phases: int) -> list[float]:
    return [round(float(shade), 2) for shade in np.linspace(0.18, 1.0, num_phases)] if num_phases > 1 else [1.0]


def _name_phases(scores: Scores) -> list[str]:
    assert scores.phases is not None
    if len(scores.phase_timesteps) == scores.phases.shape[1]:
        return [f"{first}–{last}" if first < last else str(first) for first, last in scores.phase_timesteps]
    return [f"phase {number}" for number in range(1, scores.phases.shape[1] + 1)]


def _collect_phase_legends(methods: list[_Method]) -> list[tuple[str, list[tuple[str, float]]]]:
    """List the phases with their shades, once for all methods that share them."""
    users: dict[tuple[str, ...], list[str]] = {}
    for method in methods:
        if method.scores.phases is not None:
            users.setdefault(tuple(_name_phases(method.scores)), []).append(method.name)
    return [
        (", ".join(names) if len(users) > 1 else "", list(zip(phases, _shades(len(phases)), strict=True)))
        for phases, names in users.items()
    ]


def _describe_reliability(method: _Method, query_row: int) -> tuple[str, str]:
    values = method.reliability
    if values is None and method.scores.query_timesteps is None:
        return "not applicable", "This method draws no noise."
    if values is None:
        return "not available: needs two draws", "The query grid had one noise draw; two halves cannot be compared."
    if not np.isfinite(values[query_row]):
        return "not available", "Undefined here: the scores of one half of the noise draws are all equal."
    return (
        f"{values[query_row]:.2f}".replace("-", "−"),
        "How well two halves of the noise draws agree on this ranking, stepped up to all draws. 1 is best.",
    )


# --- Generally influential samples ---


def _make_influential(method: _Method, train: ImageData, pictures: Pictures) -> dict[str, Any]:
    num_queries, k = method.ranked_top.shape
    order = np.argsort(-method.counts, kind="stable")[:MAX_INFLUENTIAL]
    distinct, places = int((method.counts > 0).sum()), num_queries * k
    return {
        "method": method.name,
        "distinct": distinct,
        "places": places,
        "share": f"{100 * distinct / max(places, 1):.0f} %",
        "num_queries": num_queries,
        "num_unranked": len(method.top) - num_queries,
        "entries": [_make_entry(method, int(row), train, pictures) for row in order if method.counts[row] >= 2],
    }


def _make_entry(method: _Method, row: int, train: ImageData, pictures: Pictures) -> dict[str, Any]:
    count = int(method.counts[row])
    timestep, history, _ = _describe_timesteps(method.scores, row)
    return {
        "picture": pictures.name(train, row),
        "sample_id": train.ids[row],
        "label": text_of(train.labels, row),
        "count": count,
        "bar": round(100 * count / len(method.ranked_top), 1),
        "timestep": timestep,
        "history": history,
    }


# --- Plots ---


def _make_plots(method: _Method, is_diagnosed: bool) -> dict[str, Any]:
    """Draw what every method has; a diagnosis has the timesteps of all checkpoints, and its own plot of them."""
    scores = method.scores
    in_top = method.counts > 0
    norms, left_out = _plot_norms(method, in_top)
    spread = None
    if scores.train_timesteps is not None and not is_diagnosed:
        last = _last_timesteps(scores.train_timesteps)
        places = last[method.ranked_top.ravel()]
        if (last >= 0).any():
            spread = draw_timesteps(last[last >= 0], places[places >= 0], name=method.name)
    strongest = np.abs(scores.values).max(axis=1, keepdims=True)
    relative = scores.values / np.where(strongest > 0, strongest, 1)
    top = np.take_along_axis(relative, method.top, axis=1)
    return {
        "method": method.name,
        "norms": norms,
        "left_out": left_out,
        "thinned": norms is not None and scores.train_timesteps is not None and len(scores.train_ids) > MAX_DOTS,
        "timesteps": spread,
        "scores": draw_scores(relative.ravel(), top.ravel(), name=method.name),
        "range": f"{short_number(float(scores.values.min()))} to {short_number(float(scores.values.max()))}",
    }


def _plot_norms(method: _Method, in_top: ndarray) -> tuple[Markup | None, int]:
    """Draw norms at the last checkpoint; also count the samples that have none to draw."""
    scores = method.scores
    timesteps, norms = np.empty(0, dtype=np.int64), np.empty(0)
    if scores.train_timesteps is not None and scores.train_norms is not None:
        timesteps, norms = scores.train_timesteps[-1], scores.train_norms[-1]
    grid, curves = np.empty(0, dtype=np.int64), np.empty((1, 0))
    if scores.query_norms is not None and scores.query_timesteps is not None:
        grid, curves = scores.query_timesteps, scores.query_norms.reshape(-1, len(scores.query_timesteps))
    plot = draw_norms(timesteps, norms, in_top[: len(norms)], grid, curves, name=method.name)
    return plot, int((~drawable_norms(timesteps, norms)).sum())


def _last_timesteps(train_timesteps: Int[ndarray, "checkpoint train"]) -> Int[ndarray, " train"]:
    """Take each sample's trained timestep at the last checkpoint that has one; -1: none has."""
    visited = train_timesteps >= 0
    last = len(visited) - 1 - visited[::-1].argmax(axis=0)
    return np.where(visited.any(axis=0), train_timesteps[last, np.arange(visited.shape[1])], -1)


# --- Numbers, notes, settings ---


def _collect_facts(scores: Sequence[Scores], settings: Mapping[str, Any]) -> list[tuple[str, str]]:
    facts = [
        (f"{len(scores[0].train_ids):,}", "training images"),
        (f"{len(scores[0].query_ids):,}", "queries" if len(scores[0].query_ids) != 1 else "query"),
    ]
    num_checkpoints = max(len(one.checkpoint_steps) for one in scores)
    if num_checkpoints:
        facts.append((f"{num_checkpoints:,}", "checkpoints" if num_checkpoints != 1 else "checkpoint"))
    num_timesteps = max(0 if one.query_timesteps is None else len(one.query_timesteps) for one in scores)
    draws = _find_draws(scores, settings)
    if num_timesteps and draws:
        facts.append((f"{num_timesteps:,} × {draws:,}", "query timesteps × noise draws"))
    elif num_timesteps:
        facts.append((f"{num_timesteps:,}", "query timesteps"))
    return facts


def _find_draws(scores: Sequence[Scores], settings: Mapping[str, Any]) -> int | None:
    """Read the number of noise draws from the declaration of a method that has a grid, or from the settings."""
    declared = [dig(one.details, ("method", "query", "events", "draws")) for one in scores]
    found = [*declared, dig(settings, ("draws",)), dig(settings, ("trace", "draws"))]
    return next((draws for draws in found if isinstance(draws, int)), None)


def _group_notes(methods: list[_Method]) -> list[tuple[str, str]]:
    """List each note once with the methods it holds for; no methods where it holds for all."""
    users: dict[str, list[str]] = {}
    for method in methods:
        for note in dict.fromkeys(method.scores.notes):
            users.setdefault(str(note), []).append(method.name)
    return [(note, "" if len(names) == len(methods) else ", ".join(names)) for note, names in users.items()]


def _compare_declarations(methods: list[_Method]) -> list[list[str]]:
    """Put what the methods declare side by side: one row a key, one column a method."""
    declared = [dict(flatten(_without_notes(method.scores))) for method in methods]
    keys = dict.fromkeys(key for one in declared for key in one)
    return [[key, *(one.get(key, "–") for one in declared)] for key in keys]


def _without_notes(scores: Scores) -> dict[str, Any]:
    details = {key: value for key, value in scores.details.items() if key != "notes"}
    return {**details, "checkpoint_steps": list(scores.checkpoint_steps)} if scores.checkpoint_steps else details


def _describe_data(name: str, data: ImageData) -> dict[str, str]:
    channels = {1: "grey", 3: "RGB"}.get(data.channels, f"{data.channels} channels")
    return {
        "name": name,
        "source": str(data.source),
        "count": f"{len(data.ids):,}",
        "size": f"{data.width} × {data.height} pixels, {channels}",
        "fingerprint": str(data.fingerprint),
        "conversions": "; ".join(
            f"{key}: {value}" for key, value in (flatten(data.conversions) or [("", data.conversions)]) if value
        ),
    }
