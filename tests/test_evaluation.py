import numpy as np
import pytest

from conftest import toy_images
from whence.errors import ConfigError, DataError
from whence.evaluation import largest_share, precision, retrieval_table, unique_share
from whence.scores import Scores


def test_shares_of_a_ranking_worked_by_hand():
    top = np.array([[0, 1, 2], [0, 3, 4], [0, 1, 5]])
    assert unique_share(top) == pytest.approx(6 / 9)
    assert largest_share(top) == 1.0
    member = np.array([True, False, False, True, True, False])
    np.testing.assert_allclose(precision(top, member), [1 / 3, 1.0, 1 / 3])


def test_retrieval_separates_queries_of_the_planted_group_from_others():
    train, queries = toy_images(10), toy_images(10, "query")  # rows 4 and 9 are "odd"
    values = np.zeros((10, 10))
    values[4, [4, 9]] = values[9, [4, 0]] = values[0, [4, 1]] = 1.0
    values[[1, 2, 3, 5, 6, 7, 8], :2] = 1.0
    scores = Scores("by hand", queries.ids, train.ids, values)
    table = retrieval_table([scores], train, queries, planted="odd", k=2)
    ((name, own, false, unique, largest, reliability),) = table["rows"]
    assert (name, own, false, reliability) == ("by hand", 0.75, pytest.approx(0.5 / 8, abs=1e-3), None)
    assert (unique, largest) == (pytest.approx(4 / 20), pytest.approx(0.8))


@pytest.mark.parametrize(
    "planted, k, error, message",
    [
        ("dragon", 2, DataError, "no training image|No training image has the label 'dragon'; there are even, odd"),
        ("odd", 0, ConfigError, "k must be above 0"),
    ],
)
def test_a_group_that_is_not_there_is_refused(planted, k, error, message):
    with pytest.raises(error, match=message):
        retrieval_table([], toy_images(5), toy_images(5, "query"), planted, k)


def test_retrieval_needs_labels():
    train = toy_images(3)
    bare = type(train).from_arrays(train.pixels(range(3)), train.ids)
    with pytest.raises(DataError, match="need a label"):
        retrieval_table([], bare, train, planted="odd")
