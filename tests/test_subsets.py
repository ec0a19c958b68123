"""Subsets: sizes, independence of order and count, strata, and what is refused."""

import itertools

import numpy as np
import pytest

from whence.diffusion.noise import noise_key
from whence.errors import ConfigError
from whence.subsets import draw_subsets

IDS = [f"image-{k}" for k in range(30)]


def test_members_are_those_with_the_smallest_keys():
    subsets = draw_subsets(IDS, 3, 0.3, seed=7)
    for number, members in enumerate(subsets):
        smallest = sorted(IDS, key=lambda id_: noise_key(7, "subset", "train", id_, number))[:9]  # noqa: B023
        assert {id_ for id_, member in zip(IDS, members, strict=True) if member} == set(smallest)


def test_more_subsets_keep_the_first_and_another_order_keeps_the_members():
    few, many = draw_subsets(IDS, 4, 0.5, seed=1), draw_subsets(IDS, 9, 0.5, seed=1)
    np.testing.assert_array_equal(few, many[:4])
    np.testing.assert_array_equal(draw_subsets(IDS[::-1], 4, 0.5, seed=1)[:, ::-1], few)
    assert (draw_subsets(IDS, 4, 0.5, seed=2) != few).any()


def test_every_sample_is_in_half_of_many_subsets():
    subsets = draw_subsets(IDS, 2000, 0.5, seed=0)
    assert (subsets.sum(axis=1) == 15).all()
    # 5 standard deviations of a share of 2000 fair coins
    np.testing.assert_allclose(subsets.mean(axis=0), 0.5, atol=5 * np.sqrt(0.25 / 2000))


def test_strata_keep_their_share_and_plain_subsets_do_not():
    labels = ["rare" if k % 5 == 0 else "common" for k in range(30)]
    rare = np.array(labels) == "rare"
    stratified = draw_subsets(IDS, 50, 0.5, 0, labels)
    assert (stratified[:, rare].sum(axis=1) == 3).all() and (stratified[:, ~rare].sum(axis=1) == 12).all()
    assert len(set(draw_subsets(IDS, 50, 0.5, 0)[:, rare].sum(axis=1))) > 1


def test_subsets_differ_even_where_few_are_possible():
    subsets = draw_subsets(list("abcd"), 6, 0.5, seed=0)
    found = {tuple(np.flatnonzero(members)) for members in subsets}
    assert found == set(itertools.combinations(range(4), 2))


@pytest.mark.parametrize(
    ("ids", "count", "fraction", "message"),
    [
        (IDS, 0, 0.5, "subsets must be above 0, found 0"),
        (IDS, 1, 0.01, "fraction 0.01 of 30 keeps 0"),
        (IDS, 1, 0.99, "fraction 0.99 of 30 keeps 30"),
        (list("abcd"), 7, 0.5, "only 6 different subsets of this size; 7"),
    ],
)
def test_what_cannot_be_drawn_is_refused(ids, count, fraction, message):
    with pytest.raises(ConfigError, match=message):
        draw_subsets(ids, count, fraction, 0)
