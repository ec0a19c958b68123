"""Projections that give each parameter a span of its own in the row: ``identity`` and ``two_sided``."""

import sys
from itertools import accumulate

from jaxtyping import Float
from torch import Tensor

from whence.projections._base import AbstractProjection, Space
from whence.projections.sketch import FoldSketch


class SpanProjection(AbstractProjection):
    """Gradients or cores laid end to end, in the order of the shapes.

    In a kind with sides, a gradient that stays whole and has more numbers than the largest core is sketched to as many.
    """

    def __init__(self, space: Space):
        longest = sys.maxsize if space.side is None else space.side**2
        ends = list(accumulate((min(space.num_left(name), longest) for name in space.shapes), initial=0))
        super().__init__(space, width=ends[-1])
        self._spans = dict(zip(space.shapes, map(slice, ends, ends[1:]), strict=True))
        self._sketch = FoldSketch(space)

    def _add_flat(self, rows: Float[Tensor, "unit width"], name: str, flat: Float[Tensor, "unit number"]) -> None:
        span = rows[:, self._spans[name]]
        if span.shape[1] < flat.shape[1]:
            self._sketch.add(span, name, flat, span.shape[1])
        else:
            span += flat
