"""Differences between models that were trained on different images, beside what the seed alone does.

Models are laid out as groups x seeds, a group being a set of training images: a randomised block design with the seeds
as blocks, as models of one seed start from the same weights. The noise is what is left of the layout when the means of
its groups and of its seeds are taken out; all groups of a layout share its estimate, so that two seeds already give a
usable interval where two differences alone would not.
"""

import itertools
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float64
from numpy import ndarray
from scipy.stats import t as student_t

from whence.errors import ConfigError


@dataclass(frozen=True)
class Change:
    """A difference of two means, with its interval where one can be given."""

    mean: float
    low: float | None = None
    high: float | None = None


def contrast(values: Float64[ndarray, "group seed"], first: int, second: int, level: float = 0.95) -> Change:
    """Give the difference between two groups of a block design, with Student's interval.

    The noise variance is the sum of squares of x[g, s] - mean_s x[g] - mean_g x[s] + mean x over (G - 1)(S - 1) degrees
    of freedom, the variance of a difference of two group means twice that over S.

    Args:
        values: One output of every model.
        first: Group whose mean counts positive.
        second: Group whose mean counts negative.
        level: Of the interval.

    Returns:
        The mean over seeds of first minus second, and the ends of the interval.

    Raises:
        ConfigError: If there are fewer than two groups or seeds.

    Example:
        >>> round(contrast(np.array([[1.0, 1.2], [0.0, 0.4], [0.0, 0.2]]), 0, 1).mean, 6)
        0.9
    """
    num_groups, num_seeds = values.shape
    if num_groups < 2 or num_seeds < 2:
        raise ConfigError(f"An interval needs at least 2 groups and 2 seeds; found {num_groups} and {num_seeds}.")
    rest = values - values.mean(axis=1, keepdims=True) - values.mean(axis=0) + values.mean()
    freedom = (num_groups - 1) * (num_seeds - 1)
    error = np.sqrt(2 * (rest**2).sum() / freedom / num_seeds)
    mean = float((values[first] - values[second]).mean())
    reach = float(student_t.ppf((1 + level) / 2, freedom) * error)
    return Change(mean, mean - reach, mean + reach)


def seed_floor(values: Float64[ndarray, " seed"]) -> float:
    """Root mean square difference between two models that differ in nothing but the seed.

    Args:
        values: Their outputs, at least two.

    Returns:
        The mean over all pairs of seeds.

    Example:
        >>> seed_floor(np.array([1.0, 3.0]))
        2.0
    """
    pairs = np.array(list(itertools.combinations(values, 2)))
    return float(np.sqrt(((pairs[:, 0] - pairs[:, 1]) ** 2).mean()))


def distances(left: Float[ndarray, "row *shape"], right: Float[ndarray, "row *shape"]) -> Float64[ndarray, " row"]:
    """Euclidean distance of two images, or other arrays, in each row, over all their elements."""
    difference = left.astype(np.float64) - right.astype(np.float64)
    return np.sqrt((difference.reshape(len(left), -1) ** 2).sum(axis=1))


def cosines(left: Float[ndarray, "row feature"], right: Float[ndarray, "row feature"]) -> Float64[ndarray, " row"]:
    """Cosine of two rows of features; 0 where one of them is zero."""
    left, right = left.astype(np.float64), right.astype(np.float64)
    lengths = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
    return (left * right).sum(axis=1) / np.where(lengths == 0, 1, lengths)


def pairs_of(rows: Float[ndarray, "row *shape"]) -> tuple[ndarray, ndarray]:
    """Give the two members of every pair of rows, as two arrays."""
    first, second = np.triu_indices(len(rows), 1)
    return rows[first], rows[second]
