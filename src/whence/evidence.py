"""The page of ``whence prove``: a query as drawn by models with and without the images that a method ranks first.

It shows what ``counterfactual.json`` and ``images.safetensors`` hold, says in a sentence what that shows and what it
does not, and computes nothing. The page loads nothing: see ``_pictures``. Its template is ``evidence.html``.
"""

from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from whence._files import publish_file
from whence._pictures import Pictures
from whence.data import ImageData

MAX_TOP = 24
"""Training images shown of each ranking."""


def write_evidence(
    path: Path, *, record: Mapping[str, Any], train: ImageData, queries: ImageData, drawn: ImageData | None
) -> Path:
    """Write the page of one counterfactual.

    Args:
        path: The HTML file; it appears whole or not at all.
        record: The content of ``counterfactual.json``.
        train: The training images.
        queries: The queries.
        drawn: The images that models drew, ``images.safetensors``; None where no query was generated.

    Returns:
        ``path``.
    """
    pictures = Pictures()
    cards = [_card(effect, record, train, queries, drawn, pictures) for effect in record["effects"]]
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    template = environment.from_string(files("whence").joinpath("evidence.html").read_text(encoding="utf-8"))
    page = {
        "css": Markup(files("whence").joinpath("report.css").read_text(encoding="utf-8")),
        "cards": cards,
        "table": record["table"] | {"rows": [[_cell(value) for value in row] for row in record["table"]["rows"]]},
        "seeds": record["seeds"],
        "pictures": pictures.prepare(),
    }
    html = template.render(page)
    with publish_file(path) as partial:
        partial.write_text(html, encoding="utf-8")
    return path


def describe_effect(effect: Mapping[str, Any], measure: str, num_seeds: int) -> str:
    """Say in a sentence or two what an effect shows.

    Args:
        effect: One of ``counterfactual.json``.
        measure: Which output was compared.
        num_seeds: Over how many seeds.

    Returns:
        Plain text.
    """
    k, method = effect["k"], effect["method"]
    images = f"the {k} training images that {method} ranks first"
    if effect["way"] == "without":
        what, others = f"Without {images}, the {measure} on {effect['query']}", f"without {k} random ones"
    else:
        what, others = f"Trained on nothing but {images}, the {measure} on {effect['query']}", f"with {k} random ones"
    top, random, difference = effect["change_top"], effect["change_random"], effect["top_minus_random"]
    return (
        f"{what} {_moved(top['mean'])}; {others} it {_moved(random['mean'])}. The difference is "
        f"{difference['mean']:+.4g}, with a 95 % interval over {num_seeds} seeds of {difference['low']:+.4g} to "
        f"{difference['high']:+.4g}; two models of all images are {effect['seed_floor']:.4g} apart by their seeds "
        f"alone. {_VERDICTS[effect['way'], effect['verdict']]}"
    )


_VERDICTS = {
    ("without", "more than random"): "So these images matter to this query more than random ones do.",
    ("without", "less than random"): "So these images matter to this query less than random ones do: the ranking is "
    "contradicted.",
    (
        "without",
        "undecided",
    ): "That is within what seeds alone do: this is no evidence that these images matter more than "
    "random ones. More seeds, or more images, may tell.",
    ("only", "more than random"): "So these images alone serve this query better than random ones do.",
    ("only", "less than random"): "So these images alone serve this query worse than random ones do.",
    ("only", "undecided"): "That is within what seeds alone do: this is no evidence that these images serve the query "
    "better than random ones.",
}


def _moved(change: float) -> str:
    return f"{'rises' if change > 0 else 'falls' if change < 0 else 'stays,'} by {abs(change):.4g}"


def _card(
    effect: Mapping[str, Any],
    record: Mapping[str, Any],
    train: ImageData,
    queries: ImageData,
    drawn: ImageData | None,
    pictures: Pictures,
) -> dict[str, Any]:
    query = effect["query"]
    top = effect["top"][:MAX_TOP]
    return {
        "title": f"{query}: {effect['way']} the top {effect['k']} by {effect['method']}",
        "query": query,
        "query_picture": pictures.name(queries, queries.ids.index(query)),
        "sentence": describe_effect(effect, record["measure"], len(record["seeds"])),
        "rows": [] if drawn is None or effect["pixels"] is None else _rows(effect, record["seeds"], drawn, pictures),
        "seed_distance": None if effect["pixels"] is None else _cell(_mean(effect["pixels"]["seeds"])),
        "top": [{"id": id_, "picture": pictures.name(train, train.rows([id_])[0])} for id_ in top],
        "more": len(effect["top"]) - len(top),
    }


def _rows(
    effect: Mapping[str, Any], seeds: Sequence[int], drawn: ImageData, pictures: Pictures
) -> list[dict[str, Any]]:
    """One row of pictures for each seed; the column of all images is where a second seed shows."""
    named = f"{effect['way']} {effect['k']}"
    columns = {"all images": ("all", None), f"{named} random": (f"{named} random", "random")}
    columns[f"{named} by {effect['method']}"] = (f"{named} by {effect['method']}", "top")
    rows = []
    for place, seed in enumerate(seeds):
        cells = []
        for title, (models, distance) in columns.items():
            row = drawn.rows([f"{effect['query']} | {models} | seed {seed}"])[0]
            far = None if distance is None else effect["pixels"][distance][place]
            cells.append({"title": title, "picture": pictures.name(drawn, row), "distance": _cell(far)})
        rows.append({"seed": seed, "cells": cells})
    return rows


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
