"""How good a ranking is: retrieval of planted groups, and specificity.

All functions take the rows of the top k of each query (``Scores.top_rows``). Diversity alone can be had at random, so
:func:`unique_share` only means something beside :func:`precision` and beside a random method.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float64, Int
from numpy import ndarray

from whence.data import ImageData
from whence.errors import ConfigError, DataError
from whence.scores import Scores


def precision(top_rows: Int[ndarray, "query k"], is_member: Bool[ndarray, " train"]) -> Float64[ndarray, " query"]:
    """Share of each query's top k that belongs to a group: precision@k for its own queries, false rate for others.

    Returns:
        From 0 to 1, one per query.

    Example:
        >>> precision(np.array([[0, 1], [2, 3]]), np.array([True, False, True, True]))
        array([0.5, 1. ])
    """
    return is_member[top_rows].mean(axis=1)


def unique_share(top_rows: Int[ndarray, "query k"]) -> float:
    """Share of different samples among the top k of all queries.

    The paper of Diffusion-ReTrac calls samples that fill many top lists generally influential; the fewer there are, the
    higher this share.

    Returns:
        From 1 / queries to 1.

    Example:
        >>> unique_share(np.array([[0, 1], [0, 2]]))
        0.75
    """
    return len(np.unique(top_rows)) / top_rows.size


def largest_share(top_rows: Int[ndarray, "query k"]) -> float:
    """Largest share of queries whose top k one and the same sample is in.

    Returns:
        From 1 / queries to 1.

    Example:
        >>> largest_share(np.array([[0, 1], [0, 2]]))
        1.0
    """
    return float(np.bincount(top_rows.ravel()).max() / len(top_rows))


def retrieval_table(
    scores: Sequence[Scores], train: ImageData, queries: ImageData, planted: str, k: int = 10
) -> dict[str, Any]:
    """Measure how methods find a planted group: for its own queries, for others, and how specific they are.

    Args:
        scores: One per method.
        train: Training images with labels.
        queries: Queries; those labelled ``planted`` should find the group, other labels of the training set should not.
        planted: Label of the group.
        k: Length of a ranking.

    Returns:
        A table for :func:`whence.report.write_report`.

    Raises:
        DataError: If there are no labels, or none is that of the group.
        ConfigError: If ``k`` is not above 0.
    """
    if train.labels is None or queries.labels is None:
        raise DataError("Retrieval is measured on labels; the training images and the queries need a label each.")
    if planted not in train.labels:
        raise DataError(
            f"No training image has the label {planted!r}; there are {', '.join(sorted(set(train.labels)))}."
        )
    if k < 1:
        raise ConfigError(f"k must be above 0, found {k}.")
    is_member = np.array([label == planted for label in train.labels])
    labels = np.array(queries.labels)
    own = labels == planted
    others = np.isin(labels, sorted(set(train.labels) - {planted}))
    rows = []
    for s in scores:
        top = s.top_rows(k)
        shares = precision(top, is_member)
        reliability = s.reliability()
        rows.append(
            [
                s.method,
                _rounded(shares[own].mean() if own.any() else None),
                _rounded(shares[others].mean() if others.any() else None),
                _rounded(unique_share(top)),
                _rounded(largest_share(top)),
                None if reliability is None else _rounded(np.nanmedian(reliability)),
            ]
        )
    return {
        "columns": ["method", f"precision@{k}", f"false@{k}", f"unique@{k}", f"widest@{k}", "reliability"],
        "rows": rows,
        "caption": f"Retrieval of the {int(is_member.sum())} images labelled {planted} among {len(train)}.",
        "notes": [
            f"precision@{k}: share of {planted} images in the top {k} of the {int(own.sum())} {planted} queries. "
            f"false@{k}: the same for the {int(others.sum())} queries with other labels. By chance both are "
            f"{is_member.mean():.3f}.",
            f"unique@{k}: share of different images among the top {k} of all {len(labels)} queries. widest@{k}: share "
            "of queries that have one and the same image there. Random scores have the most unique images, so this "
            "means nothing alone.",
            "reliability: median over queries of the split-half reliability over noise draws.",
        ],
    }


def _rounded(value: Any) -> float | None:
    return None if value is None else round(float(value), 3)
