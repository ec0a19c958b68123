"""Copies by their pixels: which training images are the same as a query, and which nearly so."""

import numpy as np
from jaxtyping import Bool, Float64
from numpy import ndarray

from whence.data import ImageData

NEAR_DISTANCE = 0.1
"""Images that differ by no more than this are near-duplicates: 5 % of the range from black to white."""

_BLOCK = 512


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
    for start in range(0, len(train), _BLOCK):
        block = range(start, min(start + _BLOCK, len(train)))
        held = train.pixels(block).reshape(len(block), -1).astype(np.float64)
        squares = (asked**2).sum(axis=1)[:, None] + (held**2).sum(axis=1) - 2 * asked @ held.T
        distances[:, block.start : block.stop] = np.sqrt(np.maximum(squares, 0) / asked.shape[1])
    distances[same_pixels(queries, train)] = 0.0
    return distances
