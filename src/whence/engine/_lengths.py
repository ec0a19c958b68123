"""Squared lengths of gradients whose parts come one after another."""

from collections.abc import Iterator
from functools import cache
from math import ceil

import torch
from jaxtyping import Float, Float64
from torch import Tensor

_NUMBERS_PER_LENGTH = 2**12


class SquaredLengths:
    """Squared length of each unit's gradient, from parts of it.

    Parts are kept by their lengths until the sum is asked for: to square and add up those of all layers at once takes
    a few calls, where a layer by itself would take as many.

    Args:
        num_units: Units.
        device: Where the gradients are.
    """

    def __init__(self, num_units: int, device: torch.device):
        self._sum: Float64[Tensor, " unit"] = torch.zeros(num_units, dtype=torch.float64, device=device)
        self._lengths: list[Float[Tensor, "unit part"]] = []

    def measure(self, gradients: Float[Tensor, "unit element"]) -> None:
        """Add the squared length of a part."""
        self._lengths += _lengths(gradients)

    def add(self, norm_squared: Float[Tensor, " unit"]) -> None:
        """Add a squared length that is known."""
        self._sum += norm_squared

    def sum(self) -> Float64[Tensor, " unit"]:
        """Give the sum of all that was added."""
        if self._lengths:
            self._sum += _squares_added(self._lengths)
            self._lengths.clear()
        return self._sum


def squared_lengths(rows: Float[Tensor, "unit element"]) -> Float64[Tensor, " unit"]:
    """Squared length of each row, in float64."""
    return _squares_added(list(_lengths(rows)))


def _squares_added(lengths: list[Float[Tensor, "unit _"]]) -> Float64[Tensor, " unit"]:
    return torch.cat(lengths, dim=1).double().square().sum(1)


def _lengths(rows: Float[Tensor, "unit element"]) -> Iterator[Float[Tensor, "unit part"]]:
    """Give lengths of parts of each row."""
    # In float32 vector_norm adds one number after another, which is off by 1e-4 for a million of them; it is ten times
    # as fast as a sum of squares, and exact enough for some thousand.
    count = rows.shape[1]
    if count <= _NUMBERS_PER_LENGTH:
        yield torch.linalg.vector_norm(rows, dim=1, keepdim=True)
        return
    num_blocks, left = _blocks(count)
    whole = rows[:, : count - left] if left else rows
    yield torch.linalg.vector_norm(whole.view(len(rows), num_blocks, -1), dim=2)
    if left:
        yield torch.linalg.vector_norm(rows[:, count - left :], dim=1, keepdim=True)


@cache
def _blocks(count: int) -> tuple[int, int]:
    """Cut so many numbers into equal blocks of at most ``_NUMBERS_PER_LENGTH``, if possible with no number left.

    Returns:
        Number of blocks, and of numbers left.
    """
    fewest = ceil(count / _NUMBERS_PER_LENGTH)
    num_blocks = next((blocks for blocks in range(fewest, 2 * fewest) if count % blocks == 0), fewest)
    return num_blocks, count % num_blocks
