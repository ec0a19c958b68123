from itertools import combinations, permutations

import numpy as np
import pytest

from whence.evaluation import (
    average_precision,
    chance_average_precision,
    chance_specificity,
    gini,
    largest_share,
    own_ranks,
    precision,
    rank_correlation,
    specificity,
    unique_share,
)


def test_shares_of_a_ranking_worked_by_hand():
    top = np.array([[0, 1, 2], [0, 3, 4], [0, 1, 5]])
    assert unique_share(top) == pytest.approx(6 / 9)
    assert largest_share(top) == 1.0
    member = np.array([True, False, False, True, True, False])
    np.testing.assert_allclose(precision(top, member), [1 / 3, 1.0, 1 / 3])
    of_each = np.array([member, ~member, ~member])
    np.testing.assert_allclose(precision(top, of_each), [1 / 3, 0.0, 2 / 3])


def test_gini_is_half_the_mean_absolute_difference_over_the_mean():
    counts = np.array([3, 0, 1, 1, 7])
    differences = [abs(a - b) for a in counts for b in counts]
    assert gini(counts) == pytest.approx(np.mean(differences) / 2 / counts.mean())
    assert gini(np.array([2, 2, 2])) == pytest.approx(0)
    top = np.array([[0, 1, 2], [0, 3, 4], [0, 1, 5]])
    assert specificity(top, 8).gini == pytest.approx(gini(np.array([3, 2, 1, 1, 1, 1, 0, 0])))


def test_average_precision_worked_by_hand():
    values = np.array([[0.9, 0.1, 0.8, 0.7], [0.0, 0.0, 0.0, 0.0], [0.9, 0.1, -np.inf, 0.7]])
    member = np.array([False, True, True, False])
    # Ranks of the members: 2 and 4; with ties in order of row, 2 and 3; with one left out, 3.
    np.testing.assert_allclose(
        average_precision(values, member), [(1 / 2 + 2 / 4) / 2, (1 / 2 + 2 / 3) / 2, 1 / 3], rtol=1e-12
    )
    assert np.isnan(average_precision(values, np.zeros(4, dtype=bool))).all()


@pytest.mark.parametrize("num_members", [1, 2, 4, 5])
def test_chance_is_the_mean_over_all_orders(num_members):
    member = np.arange(5) < num_members
    orders = np.array(list(permutations(range(5))), dtype=np.float64)
    assert chance_average_precision(num_members, 5) == pytest.approx(average_precision(orders, member).mean())
    assert np.isnan(chance_average_precision(0, 5))


def test_chance_of_specificity_is_the_mean_over_all_lists():
    lists = list(combinations(range(4), 2))
    every = [specificity(np.array([a, b]), 4) for a in lists for b in lists]
    found = chance_specificity(num_query=2, num_train=4, k=2, draws=2000)
    assert found.unique == pytest.approx(np.mean([s.unique for s in every]), abs=1e-12)
    # 2,000 draws of figures that spread by at most 0.5: three standard errors are below 0.034.
    assert found.widest == pytest.approx(np.mean([s.widest for s in every]), abs=0.034)
    assert found.gini == pytest.approx(np.mean([s.gini for s in every]), abs=0.034)
    assert chance_specificity(3, 50, 5) == chance_specificity(3, 50, 5)


def test_the_rank_of_a_query_among_the_training_images():
    is_self = np.array([[False, True, False, False], [True, False, True, False], [False] * 4, [True] + [False] * 3])
    values = np.array([[5.0, 9, 1, 2], [1.0, 4, 3, 2], [1.0, 2, 3, 4], [0.0, 0, 0, 0]])
    # The best of two copies is second; a constant has no merit.
    np.testing.assert_array_equal(own_ranks(values, is_self), [1, 2, np.nan, 4])


def test_rank_correlation_has_mid_ranks():
    left = np.array([[1.0, 2.0, 2.0, 10.0], [4.0, 3.0, 2.0, 1.0], [1.0, 1.0, 1.0, 1.0]])
    right = np.array([0.0, 1.0, 5.0, 7.0])
    ranks, others = np.array([1, 2.5, 2.5, 4]), np.array([1, 2, 3, 4])
    np.testing.assert_allclose(
        rank_correlation(left, right), [np.corrcoef(ranks, others)[0, 1], -1, np.nan], rtol=1e-12
    )
    np.testing.assert_allclose(rank_correlation(left[:2], left[:2]), [1, 1])
