"""Near duplicates: against comparing every pair, whatever the shape, and what stays of chains."""

import numpy as np
import pytest

from whence.data import ImageData
from whence.duplicates import _means_of, find_duplicates, root_mean_square


def images_of(pixels):
    return ImageData.from_arrays(np.asarray(pixels, np.float32), [f"i-{k}" for k in range(len(pixels))])


def slow(pixels, threshold, never=()):
    """Every image against every earlier one that stays."""
    found = {}
    for row in range(len(pixels)):
        best = None
        for other in range(row):
            if other in found or other in never:
                continue
            off = float(np.sqrt(np.mean((pixels[row].astype(float) - pixels[other].astype(float)) ** 2)))
            if off <= threshold and (best is None or off < best[1]):
                best = other, off
        if best:
            found[row] = best
    return found


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 11, 5), (3, 16, 16), (1, 3, 2)])
@pytest.mark.parametrize("threshold", [0.01, 0.05, 0.3])
def test_all_pairs_are_found_and_no_other(shape, threshold, monkeypatch):
    monkeypatch.setattr("whence.duplicates._ROWS_AT_ONCE", 7)  # several blocks, the last one smaller
    rng = np.random.default_rng(0)
    base = rng.uniform(-0.9, 0.9, (12, *shape))
    noisy = base[rng.integers(0, 12, 18)] + rng.normal(size=(18, *shape)) * rng.choice([0, 0.01, 0.05], (18, 1, 1, 1))
    pixels = np.clip(np.concatenate([base, noisy]), -1, 1)[rng.permutation(30)].astype(np.float32)
    expected = slow(pixels, threshold)
    found = find_duplicates(images_of(pixels), threshold)
    assert {row: other for row, (other, _) in found.items()} == {row: other for row, (other, _) in expected.items()}
    np.testing.assert_allclose([off for _, off in found.values()], [off for _, off in expected.values()])
    assert expected
    never = frozenset({0, 3, 5, 9})
    with_never = find_duplicates(images_of(pixels), threshold, never=never)
    assert {r: o for r, (o, _) in with_never.items()} == {r: o for r, (o, _) in slow(pixels, threshold, never).items()}


@pytest.mark.parametrize("shape", [(3, 9, 7), (1, 32, 32), (3, 2, 5)])
def test_block_means_are_never_further_apart_than_pixels(shape):
    rng = np.random.default_rng(1)
    pixels = rng.uniform(-1, 1, (20, *shape)).astype(np.float32)
    means = _means_of(pixels)
    for left in range(20):
        for right in range(left):
            far = np.sqrt(((pixels[left].astype(float) - pixels[right]) ** 2).sum())
            assert np.linalg.norm(means[left] - means[right]) <= far * (1 + 1e-6)


def test_a_chain_does_not_join_what_is_far_apart():
    pixels = np.stack([np.full((1, 4, 4), value, np.float32) for value in (0.0, 0.015, 0.03, 0.045)])
    found = find_duplicates(images_of(pixels), 0.02)
    assert {row: other for row, (other, _) in found.items()} == {1: 0, 3: 2}


def test_a_threshold_of_zero_takes_equal_images_only():
    pixels = np.zeros((4, 1, 4, 4), np.float32)
    pixels[1, 0, 0, 0] = 1e-6
    pixels[3, 0, 0, 0] = 1e-6
    assert find_duplicates(images_of(pixels), 0.0) == {2: (0, 0.0), 3: (1, 0.0)}
    assert find_duplicates(images_of(pixels), 0.0, never=frozenset({0})) == {3: (1, 0.0)}


def test_the_distance_is_the_root_of_the_mean_square():
    assert root_mean_square(np.zeros((1, 1, 2)), np.array([[[3.0, 4.0]]])) == pytest.approx(np.sqrt(12.5))
