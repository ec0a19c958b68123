"""Projections to a row that all parameters share, by a sparse sketch: ``sketch`` and ``two_sided_sketch``."""

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from whence.projections._base import AbstractProjection, Space, canonical_name
from whence.projections._random import signs, uniforms

_FOLDS_IN_TURN = {"cpu": sys.maxsize}
"""Folds that are added one after another, in two calls each; on a CPU that is faster than a gather of any number."""
_FOLDS_IN_TURN_ELSEWHERE = 8
_GATHERED_AT_ONCE = 2**26
"""Numbers, of all units, that are gathered at a time."""


class SketchProjection(AbstractProjection):
    r"""Sum of the sketches of all gradients, or of all cores.

    The numbers of a parameter are cut into folds of ``width``. Each fold is multiplied with random signs, rotated by a
    random shift of its own, and added to the row. For number j with sign s_j that falls on place h_j,

        <row(x), row(y)> = \sum_j x_j y_j  +  \sum_{i != j} s_i s_j x_i y_j [h_i = h_j].

    The signs are independent, so the second sum is 0 on average, and in the mean of its square a pair (i, j) meets
    only itself:

        Var = \sum_{i < j} P(h_i = h_j) (x_i y_j + x_j y_i)^2.

    Two numbers of one fold never meet; two of different folds meet with probability 1/width, as the difference of
    their shifts is uniform. With x_f the part of x in fold f,

        Var = (|x|^2 |y|^2 + <x, y>^2 - \sum_f (|x_f|^2 |y_f|^2 + <x_f, y_f>^2)) / width.

    That is at most the variance of a count sketch (Charikar et al. 2002; Weinberger et al. 2009, arXiv:0902.2206),
    whose folds have one number each, and it takes nothing but slices, products and sums.
    """

    def __init__(self, space: Space, width: int):
        super().__init__(space, width)
        self._sketch = FoldSketch(space)
        if space.device.type == "cpu":  # where each call has its price and there is nothing to gather
            self.open_width = 2 * width

    def add_flat(
        self, rows: Float[Tensor, "unit width"], names: Sequence[str], flat: Float[Tensor, "unit number"]
    ) -> None:
        """Add several parameters at once where none has a core."""
        # Elsewhere sums at places that repeat depend on the order in which threads come to them.
        if rows.device.type != "cpu" or any(self.sides(name) for name in names):
            super().add_flat(rows, names, flat)
        else:
            counts = {canonical_name(name): self.num_numbers(name) for name in names}
            self._check_shapes(rows, ", ".join(names), flat, (sum(counts.values()),))
            self._sketch.add_together(rows, counts, flat.to(self.space.dtype), self.width)

    def _add_flat(self, rows: Float[Tensor, "unit width"], name: str, flat: Float[Tensor, "unit number"]) -> None:
        self._sketch.add(rows, name, flat, self.width)


class _Stretch(NamedTuple):
    """A part of a fold that falls on consecutive places."""

    fold: int
    start: int
    """First place in the rows."""
    length: int
    signs: Float[Tensor, " number"]


@dataclass(frozen=True)
class _Folds:
    """Random tables of one parameter."""

    signs: Float[Tensor, " number"]
    shifts: Int64[Tensor, " fold"]
    width: int

    @cached_property
    def whole(self) -> list[_Stretch]:
        """Give the folds as they lie in open rows, where none is cut."""
        firsts = range(0, len(self.signs), self.width)
        parts = [self.signs[first : first + self.width] for first in firsts]
        starts = self.shifts.tolist()
        return [_Stretch(k, start, len(part), part) for k, (start, part) in enumerate(zip(starts, parts, strict=True))]

    @cached_property
    def stretches(self) -> list[_Stretch]:
        """Cut each fold in two, up to the end of the rows and on from their beginning."""
        found = []
        for fold, start, count, its_signs in self.whole:
            turn = min(self.width - start, count)
            found.append(_Stretch(fold, start, turn, its_signs[:turn]))
            if turn < count:
                found.append(_Stretch(fold, 0, count - turn, its_signs[turn:]))
        return found

    def places(self) -> Int64[Tensor, " number"]:
        """Say where each number falls."""
        numbers = torch.arange(len(self.signs), device=self.signs.device)
        return (numbers % self.width + self.shifts[numbers // self.width]) % self.width


class FoldSketch:
    """The arithmetic of :class:`SketchProjection`, into rows or into a span of them."""

    def __init__(self, space: Space):
        self._space = space
        self._tables: dict[str, _Folds] = {}
        self._places: dict[tuple[str, ...], tuple[Float[Tensor, " number"], Int64[Tensor, " number"]]] = {}

    def add(self, rows: Float[Tensor, "unit place"], name: str, flat: Float[Tensor, "unit number"], width: int) -> None:
        """Add the sketch of a parameter's numbers.

        Args:
            rows: What is added to; open rows are twice as wide as the sketch.
            name: The parameter.
            flat: Its numbers.
            width: Width of the sketch, for one parameter always the same.
        """
        folds = self._folds(name, flat.shape[1], width)
        is_open = rows.shape[1] > width
        stretches, num_gathered = folds.whole if is_open else folds.stretches, flat.shape[1] // width
        if not is_open and num_gathered > _FOLDS_IN_TURN.get(rows.device.type, _FOLDS_IN_TURN_ELSEWHERE):
            at_once = max(1, _GATHERED_AT_ONCE // max(1, rows.numel()))
            for first in range(0, num_gathered, at_once):
                _add_whole_folds(rows, flat, folds, slice(first, min(first + at_once, num_gathered)))
            stretches = [stretch for stretch in stretches if stretch.fold >= num_gathered]
            flat = flat[:, num_gathered * width :]
        parts = flat.split_with_sizes([stretch.length for stretch in stretches], dim=1)
        for stretch, part in zip(stretches, parts, strict=True):
            rows.narrow(1, stretch.start, stretch.length).addcmul_(part, stretch.signs)

    def add_together(
        self,
        rows: Float[Tensor, "unit place"],
        counts: Mapping[str, int],
        flat: Float[Tensor, "unit number"],
        width: int,
    ) -> None:
        """Add the sketches of several parameters, whose numbers lie side by side: for many small ones."""
        key = tuple(counts)
        if key not in self._places:
            tables = [self._folds(name, count, width) for name, count in counts.items()]
            places = torch.cat([folds.places() for folds in tables])
            self._places[key] = torch.cat([folds.signs for folds in tables]), places
        signs_of_all, places = self._places[key]
        rows.index_add_(1, places, flat * signs_of_all)

    def _folds(self, name: str, count: int, width: int) -> _Folds:
        if name not in self._tables:
            self._tables[name] = self._draw(name, count, width)
        return self._tables[name]

    def _draw(self, name: str, count: int, width: int) -> _Folds:
        draws = uniforms(self._space.key("shifts", name), math.ceil(count / width))
        shifts = torch.from_numpy((draws * width).astype(np.int64))
        table = self._space.tensor(signs(self._space.key("signs", name), count))
        return _Folds(table, shifts.to(self._space.device), width)


def _add_whole_folds(rows: Tensor, flat: Tensor, folds: _Folds, chosen: slice) -> None:
    """Add many folds of full width in few calls, for devices on which each call has its price."""
    width = rows.shape[1]
    numbers = slice(chosen.start * width, chosen.stop * width)
    signed = (flat[:, numbers] * folds.signs[numbers]).unflatten(1, (-1, width))  # unit, fold, width
    sources = (torch.arange(width, device=rows.device) - folds.shifts[chosen, None]) % width
    rows += signed.gather(2, sources.expand_as(signed)).sum(1)
