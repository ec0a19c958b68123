"""Copies by their pixels: training images that are the same as a query, or nearly so, and those that repeat another.

Pairs within a set are first compared by the means of blocks of pixels. By Jensen's inequality, the distance of these
means, each weighted by the root of its block's size, is at most that of the pixels, so that no pair is missed; what is
left is compared pixel by pixel. The first step is a matrix product of all images with all others: its time goes with
the square of their number.
"""

import itertools
from collections.abc import Callable, Iterator

import numpy as np
from jaxtyping import Bool, Float, Float32, Float64
from numpy import ndarray

from whence.data import ImageData

NEAR_DISTANCE = 0.1
"""Images that differ by no more than this are near-duplicates: 5 % of the range from black to white."""

_BLOCKS_A_SIDE = 8
"""Blocks of pixels whose means are compared."""
_ROWS_AT_ONCE = 1024


def same_pixels(queries: ImageData, train: ImageData) -> Bool[ndarray, "query train"]:
    """Tell which images have exactly the same pixels, as the model sees them."""
    number = {pixels: k for k, pixels in enumerate(dict.fromkeys([*queries.hashes, *train.hashes]))}
    asked, held = (np.array([number[pixels] for pixels in images.hashes]) for images in (queries, train))
    return asked[:, None] == held[None, :]


def pixel_distances(queries: ImageData, train: ImageData) -> Float64[ndarray, "query train"]:
    """Root mean square difference of the pixels of two images, which run from -1 to 1.

    Args:
        queries: Images of the same size as the others.
        train: The others.

    Returns:
        From 0 to 2; exactly 0 for the same pixels.
    """
    rows = range(len(queries))
    asked = queries.pixels(rows).reshape(len(rows), -1).astype(np.float64)
    distances = np.empty((len(rows), len(train)))
    for start in range(0, len(train), _ROWS_AT_ONCE):
        block = range(start, min(start + _ROWS_AT_ONCE, len(train)))
        held = train.pixels(block).reshape(len(block), -1).astype(np.float64)
        squares = (asked**2).sum(axis=1)[:, None] + (held**2).sum(axis=1) - 2 * asked @ held.T
        distances[:, block.start : block.stop] = np.sqrt(np.maximum(squares, 0) / asked.shape[1])
    distances[same_pixels(queries, train)] = 0.0
    return distances


def root_mean_square(left: Float[ndarray, "*shape"], right: Float[ndarray, "*shape"]) -> float:
    """Root mean square difference over the elements of two images."""
    return float(np.sqrt(((left.astype(np.float64) - right.astype(np.float64)) ** 2).mean()))


def find_duplicates(
    images: ImageData,
    threshold: float,
    *,
    never: frozenset[int] = frozenset(),
    update: Callable[[int], object] = lambda _: None,
) -> dict[int, tuple[int, float]]:
    """Find the images that repeat an earlier one which stays.

    Images are taken in order. One that is within the threshold of an image that stays is a duplicate of the nearest
    such (the first of several); all others stay. So every duplicate is close to an image that is kept, and chains of
    small changes do not join images that are far apart.

    Args:
        images: The images.
        threshold: Largest root mean square difference of two duplicates, pixels in [-1, 1]; 0: equal in every pixel.
        never: Rows that do not stay in any case, so that nothing is a duplicate of them.
        update: Called with the number of images compared since the last call.

    Returns:
        Row of each duplicate to the row that it repeats, and the root mean square difference of the two.
    """
    if threshold == 0:
        return _equal(images, never)
    found: dict[int, tuple[int, float]] = {}
    for row, others in _candidates(images, threshold):
        pixels = images.pixels([row])[0] if others else None
        best: tuple[float, int] | None = None
        for other in others:
            if other in never or other in found:
                continue
            assert pixels is not None
            off = root_mean_square(pixels, images.pixels([other])[0])
            if off <= threshold and (best is None or off < best[0]):
                best = off, other
        if best is not None:
            found[row] = best[1], best[0]
        update(1)
    return found


def _equal(images: ImageData, never: frozenset[int]) -> dict[int, tuple[int, float]]:
    first: dict[str, int] = {}
    found = {}
    for row, hash_ in enumerate(images.hashes):
        if hash_ in first:
            found[row] = first[hash_], 0.0
        elif row not in never:
            first[hash_] = row
    return found


def _candidates(images: ImageData, threshold: float) -> Iterator[tuple[int, list[int]]]:
    """Give every row with the earlier ones whose block means are close enough."""
    means = _block_means(images)
    squares = (means**2).sum(axis=1)
    limit = images.channels * images.height * images.width * threshold**2
    for start in range(0, len(means), _ROWS_AT_ONCE):
        block = means[start : start + _ROWS_AT_ONCE]
        near: dict[int, list[int]] = {}
        for first in range(0, start + len(block), _ROWS_AT_ONCE):
            others = slice(first, min(first + _ROWS_AT_ONCE, start + len(block)))
            products = squares[start : start + len(block), None] + squares[None, others] - 2 * block @ means[others].T
            # What is lost in the difference of large numbers, so that rounding misses no pair.
            slack = 1e-9 * (squares[start : start + len(block), None] + squares[None, others])
            for row, other in zip(*np.nonzero(products <= limit + slack), strict=True):
                if first + other < start + row:
                    near.setdefault(start + int(row), []).append(first + int(other))
        for row in range(start, start + len(block)):
            yield row, near.get(row, [])


def _block_means(images: ImageData) -> Float64[ndarray, "row feature"]:
    parts = [
        _means_of(images.pixels(range(start, min(start + _ROWS_AT_ONCE, len(images)))))
        for start in range(0, len(images), _ROWS_AT_ONCE)
    ]
    return np.concatenate(parts)


def _means_of(pixels: Float32[ndarray, "row channel height width"]) -> Float64[ndarray, "row feature"]:
    """Mean of each block times the root of its size."""
    rows, columns = (np.array_split(np.arange(size), min(_BLOCKS_A_SIDE, size)) for size in pixels.shape[2:])
    blocks = [
        pixels[:, :, y[0] : y[-1] + 1, x[0] : x[-1] + 1].mean(axis=(2, 3), dtype=np.float64) * np.sqrt(len(y) * len(x))
        for y, x in itertools.product(rows, columns)
    ]
    return np.concatenate(blocks, axis=1)
