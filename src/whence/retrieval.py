"""Tables of how good rankings are, by method, each beside what random scores would have.

    precision@k  share of the top k that is of the query's group: its own label, or the planted one
    AP           average precision of that group, over the whole ranking
    false@k      share of the planted group in the top k of queries that are not of it
    self-rank    rank at which a query that is a training image finds itself: 1, if a method is any good; median
    near AP      average precision of near-duplicates of a query, by their pixels
    unique@k     share of different images among the top k of all queries
    widest@k     largest share of queries that one and the same image is in the top k of
    gini@k       how unequally the places are spread over the training images: 0 evenly, 1 all to one

A column is there where the images allow it. A query that is a training image does not count as its own neighbour: it is
left out of its ranking, but for self-rank. The last three are those of specificity; alone they mean nothing, as random
scores are the most specific of all.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool
from numpy import ndarray

from whence.data import ImageData
from whence.duplicates import NEAR_DISTANCE, pixel_distances, same_pixels
from whence.errors import ConfigError, DataError, ScoresError
from whence.evaluation import (
    Specificity,
    average_precision,
    chance_average_precision,
    chance_specificity,
    own_ranks,
    precision,
    specificity,
)
from whence.scores import Scores
from whence.self_influence import SELF

CHANCE = "chance"
"""Name of the row of random scores."""


@dataclass(frozen=True)
class Relevance:
    """Which training images a query should find."""

    group: Bool[ndarray, "query train"] | None
    """Of its own label, or of the planted one."""
    own: Bool[ndarray, " query"]
    """Queries of a group."""
    others: Bool[ndarray, " query"]
    """Queries that should not find the planted group."""
    is_self: Bool[ndarray, "query train"]
    """Of the same pixels."""
    near: Bool[ndarray, "query train"]
    """Near-duplicates, without those of the same pixels."""


def find_relevant(
    train: ImageData, queries: ImageData, planted: str | None = None, near_distance: float = NEAR_DISTANCE
) -> Relevance:
    """Say which training images each query should find.

    Args:
        train: Training images.
        queries: Queries.
        planted: Label of a group. Without it each label that both sides have is a group.
        near_distance: Largest root mean square difference of near-duplicates, of pixels from -1 to 1.

    Returns:
        The groups.

    Raises:
        DataError: If ``planted`` is given and there are no labels, or none is that of the group.
    """
    if planted is not None and (train.labels is None or queries.labels is None):
        raise DataError("Retrieval is measured on labels; the training images and the queries need a label each.")
    if planted is not None and train.labels is not None and planted not in train.labels:
        raise DataError(
            f"No training image has the label {planted!r}; there are {', '.join(sorted(set(train.labels)))}."
        )
    is_self, distances = same_pixels(queries, train), pixel_distances(queries, train)
    near = (distances <= near_distance) & ~is_self
    nobody = np.zeros(len(queries), dtype=bool)
    if train.labels is None or queries.labels is None:
        return Relevance(None, nobody, nobody, is_self, near)
    of_train, of_query = np.array(train.labels), np.array(queries.labels)
    known = np.isin(of_query, of_train) & (of_query != "")
    if planted is None:
        group = (of_query[:, None] == of_train[None, :]) & known[:, None] & ~is_self
        return Relevance(group if known.any() else None, group.any(axis=1), nobody, is_self, near)
    members = np.broadcast_to(of_train == planted, is_self.shape) & ~is_self
    return Relevance(members, of_query == planted, known & (of_query != planted), is_self, near)


def retrieval_table(
    scores: Sequence[Scores],
    train: ImageData,
    queries: ImageData,
    planted: str | None = None,
    k: int = 10,
    *,
    near_distance: float = NEAR_DISTANCE,
    lds: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """Measure how methods find what they should, and how specific they are, beside chance.

    Args:
        scores: One per method, for these images.
        train: Training images.
        queries: Queries.
        planted: Label of a group of training images, to be found by queries of the same label, and not by others.
            Without it, queries should find the training images of their own label, if there are labels.
        k: Length of a ranking; that of all training images where there are fewer.
        near_distance: Largest pixel distance of near-duplicates; see :mod:`whence.duplicates`.
        lds: Linear datamodeling scores by method or by folder of scores, for a column of their own.

    Returns:
        ``columns``, ``rows`` (the last one is chance), ``caption`` and ``notes``, for
        :func:`whence.report.write_report`.

    Raises:
        DataError: If ``planted`` is given and there are no labels, or none is that of the group.
        ConfigError: If ``k`` is not above 0, or a distance is below 0.
        ScoresError: If scores are of other images.
    """
    if k < 1:
        raise ConfigError(f"k must be above 0, found {k}.")
    if not near_distance >= 0:
        raise ConfigError(f"The distance of near-duplicates must be 0 or more, found {near_distance}.")
    for one in scores:
        _check_images(one, train, queries)
    relevant = find_relevant(train, queries, planted, near_distance)
    k = max(1, min(k, len(train) - int(relevant.is_self.sum(axis=1).max())))
    measured = [_measure(one, relevant, k) | _lds_of(one, lds) for one in scores]
    measured.append(_measure_chance(relevant, k) | ({} if lds is None else {"LDS": 0.0}))
    columns = [name for name in measured[-1] if any(row[name] is not None for row in measured)]
    caption = f"Rankings of {len(train)} training images for {len(queries)} queries."
    if planted is not None:
        caption = (
            f"Retrieval of the {(train.labels or ()).count(planted)} images labelled {planted} among {len(train)}."
        )
    return {
        "columns": ["method", *columns],
        "rows": [
            [name, *(_rounded(row[column]) for column in columns)]
            for name, row in zip([*names_apart(scores), CHANCE], measured, strict=True)
        ],
        "caption": caption,
        "notes": _notes(relevant, planted, k, near_distance, columns),
    }


def names_apart(scores: Sequence[Scores]) -> list[str]:
    """Name scores by their method, and by their folder where two are of one method."""
    counts = Counter(one.method for one in scores)
    return [one.folder.name if counts[one.method] > 1 and one.folder else one.method for one in scores]


def detection_table(scores: Sequence[Scores], ids: Sequence[str]) -> dict[str, Any]:
    """Measure how self-influence finds training images that are known to be at fault, as those of flipped labels are.

    Args:
        scores: Self-influence: scores with the single row ``self``.
        ids: Ids of the images at fault.

    Returns:
        ``columns``, ``rows`` and ``notes``: the share of them among as many strongest images, and the average
        precision.

    Raises:
        ScoresError: If there are no such scores.
        DataError: If an id is not among the training images.
    """
    if not scores or any(one.query_ids != (SELF,) for one in scores):
        raise ScoresError("Faulty images are found by self-influence; make some with `whence self RUN`.")
    wanted, rows = set(ids), []
    for name, one in zip(names_apart(scores), scores, strict=True):
        unknown = sorted(wanted - set(one.train_ids))
        if unknown or not wanted:
            some = f"{len(unknown)} are not, for example {', '.join(unknown[:3])}" if unknown else "none were given"
            raise DataError(f"Ids of images at fault must be among the training images; {some}.")
        members = np.array([id_ in wanted for id_ in one.train_ids])
        found = precision(one.top_rows(len(wanted)), members)[0], average_precision(one.values, members)[0]
        rows.append([name, *map(_rounded, found)])
    num_train = len(scores[0].train_ids)
    chance = len(wanted) / num_train, chance_average_precision(len(wanted), num_train)
    return {
        "columns": ["method", f"precision@{len(wanted)}", "AP"],
        "rows": [*rows, [CHANCE, *map(_rounded, chance)]],
        "notes": [f"{len(wanted)} of {num_train} training images are at fault, by the list given."],
    }


def _measure(scores: Scores, relevant: Relevance, k: int) -> dict[str, float | None]:
    values = np.where(relevant.is_self, -np.inf, scores.values)
    top = np.argsort(-values, axis=1, kind="stable")[:, :k]
    reliability = scores.reliability()
    found = {f"precision@{k}": None, "AP": None, f"false@{k}": None}
    if relevant.group is not None:
        shares = precision(top, relevant.group)
        found = {
            f"precision@{k}": _mean(shares[relevant.own]),
            "AP": _mean(average_precision(values, relevant.group)[relevant.own]),
            f"false@{k}": _mean(shares[relevant.others]),
        }
    ranks = own_ranks(scores.values, relevant.is_self)
    return {
        **found,
        "self-rank": None if np.isnan(ranks).all() else float(np.nanmedian(ranks)),
        "near AP": _mean(average_precision(values, relevant.near)),
        **_named(specificity(top, values.shape[1]), k),
        "reliability": None if reliability is None else float(np.nanmedian(reliability)),
    }


def _measure_chance(relevant: Relevance, k: int) -> dict[str, float | None]:
    """Give the expectation of each figure for random scores; of queries one by one, as they differ in their groups."""
    num_query, num_train = relevant.is_self.shape
    places = num_train - relevant.is_self.sum(axis=1)  # of a ranking without the query itself
    found = {f"precision@{k}": None, "AP": None, f"false@{k}": None}
    if relevant.group is not None:
        base = relevant.group.sum(axis=1) / np.maximum(places, 1)
        found = {
            f"precision@{k}": _mean(base[relevant.own]),
            "AP": _mean(_chance_of(relevant.group, places)[relevant.own]),
            f"false@{k}": _mean(base[relevant.others]),
        }
    in_train = relevant.is_self.any(axis=1)
    # The best of m copies among N is at rank (N + 1) / (m + 1), of which m - 1 others of the same pixels do not count.
    copies = relevant.is_self.sum(axis=1)[in_train]
    ranks = 1 + (num_train - copies) / (copies + 1)
    return {
        **found,
        "self-rank": float(np.median(ranks)) if in_train.any() else None,
        "near AP": _mean(_chance_of(relevant.near, places)),
        **_named(chance_specificity(num_query, num_train, k), k),
        "reliability": None,
    }


def _lds_of(scores: Scores, lds: Mapping[str, float] | None) -> dict[str, float | None]:
    if lds is None:
        return {}
    return {"LDS": lds.get(scores.folder.name if scores.folder else scores.method, lds.get(scores.method))}


def _chance_of(members: Bool[ndarray, "query train"], places: ndarray) -> ndarray:
    counts = zip(members.sum(axis=1).tolist(), places.tolist(), strict=True)
    return np.array([chance_average_precision(count, num_places) for count, num_places in counts])


def _named(found: Specificity, k: int) -> dict[str, float | None]:
    return {f"unique@{k}": found.unique, f"widest@{k}": found.widest, f"gini@{k}": found.gini}


def _notes(relevant: Relevance, planted: str | None, k: int, near_distance: float, columns: Sequence[str]) -> list[str]:
    notes, own, others = [], int(relevant.own.sum()), int(relevant.others.sum())
    if relevant.group is not None and planted is not None:
        notes.append(
            f"precision@{k}: share of {planted} images in the top {k} of the {own} {planted} queries. false@{k}: the "
            f"same for the {others} queries with other labels."
        )
    elif relevant.group is not None:
        notes.append(
            f"precision@{k}: share of the top {k} that has the query's label, over {own} queries with a label of the "
            "training set."
        )
    if "AP" in columns:
        notes.append("AP: average precision of that group over the whole ranking.")
    if "self-rank" in columns:
        count = int(relevant.is_self.any(axis=1).sum())
        notes.append(
            f"self-rank: median rank of the query itself, for the {count} queries whose pixels are a training image's. "
            "These do not count in the other columns."
        )
    if "near AP" in columns:
        count = int(relevant.near.any(axis=1).sum())
        notes.append(
            f"near AP: average precision of near-duplicates, whose pixels (from -1 to 1) differ by at most "
            f"{near_distance:g} (root mean square), for the {count} queries that have some."
        )
    notes.append(
        f"unique@{k}: share of different images among the top {k} of all {len(relevant.own)} queries. widest@{k}: "
        f"share of queries that have one and the same image there. gini@{k}: 0 where all images have as many "
        "places, 1 where one has them all. Random scores are the most specific, so these mean nothing alone."
    )
    if not {f"precision@{k}", "self-rank", "near AP", "LDS"} & set(columns):
        notes.append(
            "There is nothing here that says whether a ranking is right: give images with labels, queries that are "
            "training images, or a ground truth of retrained models."
        )
    if "reliability" in columns:
        notes.append("reliability: median over queries of the split-half reliability over noise draws.")
    return [*notes, f"{CHANCE}: the expectation of random scores."]


def _check_images(scores: Scores, train: ImageData, queries: ImageData) -> None:
    for side, found, want in (("train", scores.train_ids, train.ids), ("query", scores.query_ids, queries.ids)):
        if found != want:
            raise ScoresError(
                f"The {side} ids of the {scores.method} scores are not those of the {side} images ({len(found)} and "
                f"{len(want)}). Give the images that were scored, in the same order."
            )


def _mean(values: ndarray) -> float | None:
    """Mean of what is a number; None where there is none."""
    values = values[~np.isnan(values)]
    return float(values.mean()) if len(values) else None


def _rounded(value: Any) -> float | None:
    return None if value is None or not math.isfinite(value) else round(float(value), 3)
