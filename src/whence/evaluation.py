"""How good a ranking is: statistics of retrieval, of specificity, and of finding faults, each beside chance.

All are plain functions of scores or of top lists (``Scores.top_rows``); tables of them are in ``whence.retrieval``.
Diversity alone can be had at random, so :func:`unique_share` and its kin only mean something beside
:func:`precision`, or an LDS, and beside :func:`chance_specificity`.
"""

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Float64, Int
from numpy import ndarray
from scipy.stats import rankdata

CHANCE_DRAWS = 20
"""Random top lists that a figure of chance is a mean over, where there is no formula."""


def precision(
    top_rows: Int[ndarray, "query k"], is_member: Bool[ndarray, " train"] | Bool[ndarray, "query train"]
) -> Float64[ndarray, " query"]:
    """Share of each query's top k that belongs to a group: precision@k for its own queries, false rate for others.

    Args:
        top_rows: Rows of the k strongest training samples.
        is_member: The group; or one for each query.

    Returns:
        From 0 to 1, one per query.

    Example:
        >>> precision(np.array([[0, 1], [2, 3]]), np.array([True, False, True, True]))
        array([0.5, 1. ])
    """
    members = np.broadcast_to(is_member, (len(top_rows), is_member.shape[-1]))
    return np.take_along_axis(members, top_rows, axis=1).mean(axis=1)


def average_precision(
    values: Float[ndarray, "query train"], is_member: Bool[ndarray, " train"] | Bool[ndarray, "query train"]
) -> Float64[ndarray, " query"]:
    """Mean, over the members of a group, of the precision at each one's rank: the area under precision and recall.

    Ties go to the lower row, as in ``Scores.top``.

    Args:
        values: Scores, the strongest first. A sample scored minus infinity is left out.
        is_member: The group; or one for each query.

    Returns:
        From 0 to 1, one per query; NaN where a group is empty.

    Example:
        >>> average_precision(np.array([[4.0, 3.0, 2.0, 1.0]]), np.array([True, False, True, False]))
        array([0.83333333])
    """
    members = np.broadcast_to(is_member, values.shape) & (values > -np.inf)
    found = np.take_along_axis(members, np.argsort(-values, axis=1, kind="stable"), axis=1)
    precisions = np.cumsum(found, axis=1) / np.arange(1, values.shape[1] + 1)
    with np.errstate(invalid="ignore"):  # 0 / 0
        return (precisions * found).sum(axis=1) / found.sum(axis=1)


def chance_average_precision(num_members: int, num_train: int) -> float:
    """Expected :func:`average_precision` of a random ranking.

    With H the harmonic number of N = ``num_train``, and R members: (H + (N - H)(R - 1) / (N - 1)) / N, since the sample
    at rank i is a member with probability R / N, and one before it, given that, with (R - 1) / (N - 1).

    Returns:
        From 0 to 1; NaN without a member.

    Example:
        >>> chance_average_precision(1, 2)
        0.75
    """
    if num_members < 1:
        return float("nan")
    harmonic = float((1 / np.arange(1, num_train + 1)).sum())
    others = (num_train - harmonic) * (num_members - 1) / max(num_train - 1, 1)
    return (harmonic + others) / num_train


def own_ranks(
    values: Float[ndarray, "query train"], is_self: Bool[ndarray, "query train"]
) -> Float64[ndarray, " query"]:
    """Rank, from 1, of each query's own training sample: that of the same pixels, the best one where there are several.

    Samples with the same score count as ranked before it, so that constant scores have no merit.

    Returns:
        1 where it is found first; NaN where the query is no training sample.

    Example:
        >>> own_ranks(np.array([[0.1, 0.7, 0.7]]), np.array([[False, True, False]]))
        array([2.])
    """
    own = np.where(is_self, values, -np.inf).max(axis=1, keepdims=True)
    before = ((values >= own) & ~is_self).sum(axis=1)
    return np.where(is_self.any(axis=1), 1.0 + before, np.nan)


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


def generally_influential_from(num_query: int, num_train: int, k: int, at_least: int = 3) -> int:
    """Say in how many top k a sample is generally influential.

    Returns:
        A quarter of the queries, twice what chance gives, or ``at_least``, whichever is most.
    """
    return math.ceil(max(at_least, num_query / 4, 2 * num_query * k / num_train))


def gini(counts: Int[ndarray, " train"]) -> float:
    """Gini coefficient of how often each training sample is in a top k: how unequally influence is spread.

    Half the mean absolute difference of two counts, divided by their mean. It counts samples in no top list too, and is
    high for random lists where there are fewer places than samples; read it beside :func:`chance_specificity`.

    Args:
        counts: Of each training sample, those that are in no top k included.

    Returns:
        0: all equally often; (N - 1) / N: one alone.

    Example:
        >>> gini(np.array([0, 0, 0, 4]))
        0.75
    """
    size, ascending = len(counts), np.sort(counts)
    return float((2 * np.arange(1, size + 1) - size - 1) @ ascending / (size * ascending.sum()))


@dataclass(frozen=True)
class Specificity:
    """How far different queries have different top lists."""

    unique: float
    """:func:`unique_share`."""
    widest: float
    """:func:`largest_share`."""
    gini: float
    """:func:`gini`."""


def specificity(top_rows: Int[ndarray, "query k"], num_train: int) -> Specificity:
    """Measure how far the top lists of different queries differ.

    Returns:
        Three figures, to be read beside those of chance.
    """
    counts = np.bincount(top_rows.ravel(), minlength=num_train)
    return Specificity(unique_share(top_rows), largest_share(top_rows), gini(counts))


def chance_specificity(num_query: int, num_train: int, k: int, *, draws: int = CHANCE_DRAWS) -> Specificity:
    """Give the expected :func:`specificity` of random scores.

    The share of unique samples has a formula, N (1 - (1 - k / N)^Q) / (Q k). The others are means over simulated lists,
    the same ones each time.

    Args:
        num_query: Number Q of queries.
        num_train: Number N of training samples.
        k: Length of a ranking, at most N.
        draws: Simulated sets of lists.

    Returns:
        The expectations.
    """
    rng = np.random.Generator(np.random.Philox(key=0))
    simulated = [
        specificity(np.stack([rng.choice(num_train, k, replace=False) for _ in range(num_query)]), num_train)
        for _ in range(draws)
    ]
    unique = num_train * (1 - (1 - k / num_train) ** num_query) / (num_query * k)
    return Specificity(
        unique, float(np.mean([s.widest for s in simulated])), float(np.mean([s.gini for s in simulated]))
    )


def rank_correlation(
    left: Float[ndarray, "row sample"], right: Float[ndarray, " sample"] | Float[ndarray, "row sample"]
) -> Float64[ndarray, " row"]:
    """Spearman's correlation, with mid-ranks, of each row with the same numbers or with a row of its own.

    Returns:
        From -1 to 1; NaN where one side is constant.

    Example:
        >>> rank_correlation(np.array([[1.0, 2.0, 9.0]]), np.array([3.0, 2.0, 1.0]))
        array([-1.])
    """
    x, y = (rankdata(np.atleast_2d(side), axis=1) for side in (left, right))
    x, y = (ranks - ranks.mean(axis=1, keepdims=True) for ranks in (x, y))
    with np.errstate(invalid="ignore"):  # 0 / 0
        return (x * y).sum(axis=1) / np.sqrt((x * x).sum(axis=1) * (y * y).sum(axis=1))
