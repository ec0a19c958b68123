"""Counterfactual removal, carried out: how a query changes without the images that a method ranks first.

::

    evaluation/counterfactual-<hash>/counterfactual.json   every effect, by seed, with what it was made of
    evaluation/counterfactual-<hash>/counterfactual.md     the table
    evaluation/counterfactual-<hash>/images.safetensors    generated queries as the models draw them; see ``image_id``
    evaluation/counterfactual-<hash>/index.html            the page, by ``whence prove``

The change of a query's loss is that of the models without the images less that of the models of all images; positive:
the images helped. Intervals are those of ``whence.contrasts``. Images are compared with that of the model of all images
and the same seed, drawn from the same noise. Which models there are is decided by ``whence.counterfactual``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

import numpy as np
from jaxtyping import Float, Float64
from numpy import ndarray

from whence._files import as_json, publish_folder, write_json
from whence.comparison import markdown_table
from whence.config import Way
from whence.contrasts import Change, contrast, cosines, distances, pairs_of, seed_floor
from whence.counterfactual import FORMAT_VERSION, Counterfactual, Question
from whence.data import save_arrays
from whence.many_models import Unit, train_models
from whence.measuring import finite_measures

Found = Mapping[Unit, Mapping[str, ndarray]]
"""What each model gave."""


def run_counterfactual(plan: Counterfactual, *, show_progress: bool = True) -> dict[str, Any]:
    """Train what is missing, and put everything into the plan's folder.

    Args:
        plan: Questions and models.
        show_progress: Show a progress bar.

    Returns:
        The content of ``counterfactual.json``.
    """
    train_models(plan.work, show_progress=show_progress)
    found = {unit: plan.work.read(unit) for unit in plan.work.units}
    effects = [_effect(plan, question, found) for question in plan.questions]
    record = {
        "format_version": FORMAT_VERSION,
        "whence": version("whence"),
        "measure": plan.settings.measure,
        "sign": "change = output of the models without the images, less that of the models of all images",
        "level": 0.95,
        "seeds": plan.settings.seeds,
        "effects": effects,
        "summary": _summary(plan, found) if len({e["query"] for e in effects}) > 1 else [],
        "training": plan.work.spec,
        "measuring": plan.work.measuring,
        "notes": plan.notes,
    }
    record = as_json(record)
    record["table"] = effect_table(record)
    arrays, ids = _images(plan, found)
    with publish_folder(plan.folder) as partial:
        write_json(partial / "counterfactual.json", record)
        (partial / "counterfactual.md").write_text(markdown_table(record["table"]))
        if ids:
            save_arrays(partial / "images.safetensors", arrays, ids)
    return record


def _outputs(plan: Counterfactual, units: Sequence[Unit], found: Found) -> Float64[ndarray, "seed query"]:
    measure = finite_measures(plan.work.process).index(plan.settings.measure)
    return np.stack([found[unit]["outputs"][measure] for unit in units])


def _effect(plan: Counterfactual, question: Question, found: Found) -> dict[str, Any]:
    query = plan.work.queries.ids.index(question.query)
    same = [q for q in plan.questions if (q.k, q.way) == (question.k, question.way)]
    groups = [plan.whole, plan.random[question.k, question.way], *dict.fromkeys(plan.top[q] for q in same)]
    values = np.stack([_outputs(plan, group, found)[:, query] for group in groups])
    place = groups.index(plan.top[question])
    return {
        **asdict(question),
        **_changes(values, place, question.way),
        "outputs": {name: values[row].tolist() for name, row in (("all", 0), ("random", 1), ("top", place))},
    } | _image_changes(plan, question, found)


def _summary(plan: Counterfactual, found: Found) -> list[dict[str, Any]]:
    """Give the mean over queries of each method, number of images and way."""
    rows = []
    for k, way in plan.random:
        here = [q for q in plan.questions if (q.k, q.way) == (k, way)]
        asked = [plan.work.queries.ids.index(id_) for id_ in dict.fromkeys(q.query for q in here)]
        methods = list(dict.fromkeys(q.method for q in here))
        own = [
            np.stack([_outputs(plan, plan.top[q], found)[:, plan.work.queries.ids.index(q.query)] for q in of_method])
            for of_method in ([q for q in here if q.method == method] for method in methods)
        ]
        shared = [_outputs(plan, units, found)[:, asked].mean(axis=1) for units in (plan.whole, plan.random[k, way])]
        means = [one.mean(axis=0) for one in own]
        distinct = {one.tobytes(): one for one in means}  # two methods may name the same images for every query
        values, name = np.stack([*shared, *distinct.values()]), f"mean of {len(asked)}"
        for method, one in zip(methods, means, strict=True):
            place = 2 + list(distinct).index(one.tobytes())
            rows.append({"method": method, "query": name, "k": k, "way": way} | _changes(values, place, way))
    return rows


def _image_changes(plan: Counterfactual, question: Question, found: Found) -> dict[str, Any]:
    """Compare images drawn from the same noise: with the model of all images of the same seed, and among those."""
    if question.query not in plan.drawn:
        return {"pixels": None, "features": None}
    whole, *others = (_drawn(plan, question.query, units, found) for units in _compared(plan, question).values())
    result: dict[str, Any] = {"pixels": _by_pair(distances, whole, others), "features": None}
    if plan.encoder is not None:
        rows, *rest = map(plan.encoder.loaded, (whole, *others))
        result["features"] = _by_pair(cosines, rows, rest)
    return result


def _compared(plan: Counterfactual, question: Question) -> dict[str, tuple[Unit, ...]]:
    named = f"{question.way} {question.k}"
    return {
        "all": plan.whole,
        f"{named} random": plan.random[question.k, question.way],
        f"{named} by {question.method}": plan.top[question],
    }


def _drawn(
    plan: Counterfactual, query: str, units: Sequence[Unit], found: Found
) -> Float[ndarray, "seed channel height width"]:
    return np.stack([found[unit]["images"][plan.drawn.index(query)] for unit in units])


def _images(plan: Counterfactual, found: Found) -> tuple[ndarray, list[str]]:
    """Gather the images that a page shows, named by :func:`image_id`."""
    images: dict[str, ndarray] = {}
    for question in (question for question in plan.questions if question.query in plan.drawn):
        for name, units in _compared(plan, question).items():
            ids = [image_id(question.query, name, seed) for seed in plan.settings.seeds]
            images |= dict(zip(ids, _drawn(plan, question.query, units, found), strict=True))
    return np.stack(list(images.values())) if images else np.empty(0), list(images)


def image_id(query: str, models: str, seed: int) -> str:
    """Name an image of ``images.safetensors``: a query as drawn by the models ``all``, ``without 50 random``, ....

    Returns:
        The id.
    """
    return f"{query} | {models} | seed {seed}"


def _changes(values: Float64[ndarray, "group seed"], place: int, way: Way) -> dict[str, Any]:
    """Compare the group at ``place`` with all images (group 0) and with random ones (group 1)."""
    if way == "without":
        top, random, difference = (contrast(values, a, b) for a, b in ((place, 0), (1, 0), (place, 1)))
        expected = 1
    else:
        # Models of few images are noisier than those of all, so that one estimate would not do for both.
        top, random = (Change(float((values[row] - values[0]).mean())) for row in (place, 1))
        difference, expected = contrast(values[1:], place - 1, 0), -1
    assert difference.low is not None and difference.high is not None
    near, far = sorted((expected * difference.low, expected * difference.high))
    verdict = "more than random" if near > 0 else "less than random" if far < 0 else "undecided"
    return {
        "change_top": asdict(top),
        "change_random": asdict(random),
        "top_minus_random": asdict(difference),
        "seed_floor": seed_floor(values[0]),
        "verdict": verdict,
    }


def _by_pair(measure: Any, whole: ndarray, others: Sequence[ndarray]) -> dict[str, Any]:
    """Compare each image with that of all images by the same seed, and those of two seeds with each other."""
    random, top = (measure(whole, other) for other in others)
    return {"top": top.tolist(), "random": random.tolist(), "seeds": measure(*pairs_of(whole)).tolist()}


def effect_table(record: Mapping[str, Any]) -> dict[str, Any]:
    """Put effects into a table for printing and for ``counterfactual.md``.

    Args:
        record: The content of ``counterfactual.json``.

    Returns:
        ``columns``, ``rows`` and ``notes``.
    """
    rows = []
    for effect in [*record["effects"], *record["summary"]]:
        numbers = [effect[name]["mean"] for name in ("change_top", "change_random", "top_minus_random")]
        numbers += [effect["top_minus_random"][end] for end in ("low", "high")]
        numbers.append(effect["seed_floor"])
        for kind in ("pixels", "features"):
            found = effect.get(kind)
            numbers += [None if found is None else float(np.mean(found[name])) for name in ("top", "random", "seeds")]
        rows.append([effect["method"], effect["query"], effect["k"], effect["way"], *numbers, effect["verdict"]])
    columns = ["method", "query", "k", "way", "top", "random", "top-random", "low", "high", "seeds"]
    columns += [*(f"{kind} {name}" for kind in ("L2", "cos") for name in ("top", "random", "seeds")), "verdict"]
    used = [place for place in range(len(columns)) if any(row[place] is not None for row in rows)]
    return {
        "columns": [columns[i] for i in used],
        "rows": [[row[i] for i in used] for row in rows],
        "notes": [
            f"top, random: change of the {record['measure']} of the query, that of models without the images less that "
            "of models of all images (only: of models of nothing but the images); mean over seeds.",
            "low, high: 95 % interval of top less random, over seeds. seeds: root mean square difference between two "
            "models of all images by different seeds.",
            "L2: distance of the image from that of the model of all images, both of one seed; seeds: of two seeds. "
            "cos: cosine of their features.",
            *record["notes"],
        ],
    }
