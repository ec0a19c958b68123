"""Contrasts: against a least-squares fit written out, and how often intervals hold the truth."""

import numpy as np
import pytest
from scipy.stats import t as student_t

from whence.contrasts import contrast, cosines, distances, pairs_of, seed_floor
from whence.errors import ConfigError


def fitted(values, first, second):
    """The same by ordinary least squares with a column for every group and every seed but the last."""
    num_groups, num_seeds = values.shape
    rows = []
    for group in range(num_groups):
        for seed in range(num_seeds):
            rows.append(
                [*(float(group == g) for g in range(num_groups)), *(float(seed == s) for s in range(num_seeds - 1))]
            )
    design, target = np.array(rows), values.reshape(-1)
    solution, *_ = np.linalg.lstsq(design, target, rcond=None)
    freedom = len(target) - design.shape[1]
    variance = ((target - design @ solution) ** 2).sum() / freedom
    row = np.zeros(design.shape[1])
    row[first], row[second] = 1, -1
    error = np.sqrt(variance * row @ np.linalg.inv(design.T @ design) @ row)
    reach = student_t.ppf(0.975, freedom) * error
    return row @ solution, row @ solution - reach, row @ solution + reach


@pytest.mark.parametrize("shape", [(2, 2), (3, 2), (5, 4)])
def test_a_contrast_is_that_of_a_least_squares_fit(shape):
    values = np.random.default_rng(0).normal(size=shape)
    found = contrast(values, 1, 0)
    np.testing.assert_allclose([found.mean, found.low, found.high], fitted(values, 1, 0), rtol=1e-9)


def test_intervals_hold_the_truth_as_often_as_they_say():
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(2000):
        values = rng.normal(size=(3, 2)) + rng.normal(size=2) + np.array([[0.0], [1.0], [3.0]])
        found = contrast(values, 2, 1)
        assert found.low is not None and found.high is not None
        held += found.low <= 2 <= found.high
    assert abs(held / 2000 - 0.95) < 4 * np.sqrt(0.95 * 0.05 / 2000)


def test_what_all_models_of_a_seed_share_does_not_widen_the_interval():
    values = np.array([[0.0, 0.1, -0.1], [1.0, 0.9, 1.1], [2.0, 2.1, 2.0]])
    plain, shifted = contrast(values, 1, 0), contrast(values + np.array([5.0, -3.0, 100.0]), 1, 0)
    np.testing.assert_allclose(list(vars(plain).values()), list(vars(shifted).values()), atol=1e-12)


def test_the_floor_is_the_root_mean_square_over_pairs():
    assert seed_floor(np.array([1.0, 2.0, 4.0])) == pytest.approx(np.sqrt((1 + 9 + 4) / 3))


def test_distances_and_cosines_by_hand():
    left, right = np.zeros((2, 1, 1, 2)), np.array([[[[3.0, 4.0]]], [[[0.0, 1.0]]]])
    np.testing.assert_allclose(distances(left, right), [5, 1])
    np.testing.assert_allclose(
        cosines(np.array([[1.0, 0.0], [0.0, 0.0]]), np.array([[1.0, 1.0], [1.0, 0.0]])), [2**-0.5, 0]
    )
    first, second = pairs_of(np.arange(3.0))
    assert list(zip(first, second, strict=True)) == [(0, 1), (0, 2), (1, 2)]


@pytest.mark.parametrize("shape", [(1, 3), (3, 1)])
def test_one_group_or_seed_is_refused(shape):
    with pytest.raises(ConfigError, match="at least 2 groups and 2 seeds; found"):
        contrast(np.zeros(shape), 0, 0)
