"""Projections by a dense random matrix, to compare others with: ``gaussian`` and ``rademacher``."""

import math
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from whence.projections._base import AbstractProjection, Space
from whence.projections._random import normals, signs

_NUMBERS_PER_BLOCK = 2**20
"""NOTE: blocks have keys of their own, so another size means another matrix."""
_CACHED_NUMBERS = 2**27
"""Numbers of the matrix that are kept; the rest is made again each time."""

_DRAW = {"gaussian": normals, "rademacher": signs}


class DenseProjection(AbstractProjection):
    r"""Product with one matrix, made in blocks of a parameter's numbers.

    Its entries are normal with variance 1/width, or +-1/sqrt(width). The variance of <row(x), row(y)> is

        (|x|^2 |y|^2 + <x, y>^2) / width,    less 2 \sum_j x_j^2 y_j^2 / width for signs.
    """

    def __init__(self, space: Space, width: int, entries: Literal["gaussian", "rademacher"]):
        super().__init__(space, width)
        self._entries = entries
        self._blocks: dict[tuple[str, int], Tensor] = {}
        self._num_cached = 0

    def _add_flat(self, rows: Float[Tensor, "unit width"], name: str, flat: Float[Tensor, "unit number"]) -> None:
        for index, part in enumerate(flat.split(max(1, _NUMBERS_PER_BLOCK // self.width), dim=1)):
            rows += part @ self._block(name, index, part.shape[1])

    def _block(self, name: str, index: int, count: int) -> Float[Tensor, "number width"]:
        if (name, index) in self._blocks:
            return self._blocks[name, index]
        draws = _DRAW[self._entries](self.space.key(f"{self._entries} {index}", name), count * self.width)
        block = self.space.tensor(draws.reshape(count, self.width) / math.sqrt(self.width))
        if self._num_cached + block.numel() <= _CACHED_NUMBERS:
            self._num_cached += block.numel()
            self._blocks[name, index] = block
        return block
