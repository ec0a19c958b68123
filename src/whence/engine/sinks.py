"""Sinks: what is wanted of the per-unit gradients of a backward pass."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor, nn

from whence.engine._base import AbstractLayerFactors, add_up, numbers_at_once
from whence.engine._lengths import SquaredLengths, squared_lengths
from whence.engine.capture import AbstractSink
from whence.projections import AbstractProjection

_SMALL = 1024
"""Numbers of a parameter whose gradients are kept back to be used up with others: biases, scales, shifts."""
_NUMBERS_PER_CALL = 2**14
"""Numbers that are copied in the time of a call: a product of matrices and what goes before it."""
_SUMMED = 2**12
"""Numbers over which a product is taken at once: over some hundred thousand it is off by 1e-5 in float32."""


@dataclass(frozen=True)
class Layout:
    """Where each parameter lies in one long vector of all of them."""

    spans: dict[str, slice]
    num_params: int

    @classmethod
    def of(cls, parameters: Mapping[str, nn.Parameter]) -> "Layout":
        """Lay the parameters end to end in their own order."""
        spans, start = {}, 0
        for name, parameter in parameters.items():
            spans[name] = slice(start, start + parameter.numel())
            start += parameter.numel()
        return cls(spans, start)

    def num_numbers(self, name: str) -> int:
        """Count the numbers of a parameter."""
        return self.spans[name].stop - self.spans[name].start

    def runs(self, names: Iterable[str]) -> list[tuple[list[str], slice]]:
        """Find the parameters among some that lie end to end.

        Args:
            names: Of parameters, in any order.

        Returns:
            The names in each run, in the order of the layout, and where it lies.
        """
        found: list[tuple[list[str], slice]] = []
        for name in sorted(names, key=lambda name: self.spans[name].start):
            span = self.spans[name]
            if found and found[-1][1].stop == span.start:
                run, before = found.pop()
                found.append(([*run, name], slice(before.start, span.stop)))
            else:
                found.append(([name], span))
        return found


class GatherSink(AbstractSink):
    """Collects whole gradients, one row a unit, and the lengths of groups of consecutive units.

    Args:
        layout: Order of the parameters.
        rows: Where the gradients go; what was there is lost.
        units_per_group: Units whose gradients are also added up for a length of their own.
    """

    def __init__(self, layout: Layout, rows: Float[Tensor, "unit param"], units_per_group: int = 1):
        self.layout = layout
        self.rows = rows
        self.units_per_group = units_per_group
        self._unused = set(layout.spans)

    def consume(self, factors: AbstractLayerFactors, names: dict[str, str]) -> None:
        """Put one layer's part in its place."""
        for own, span, gradients in factors.pieces(names):
            start = self.layout.spans[names[own]].start
            self.rows[:, start + span.start : start + span.stop] = gradients
        self._unused.difference_update(names.values())

    def finish(self) -> None:
        """Put zeros where a parameter was never handed over, as the output does not use it."""
        for name in self._unused:
            self.rows[:, self.layout.spans[name]] = 0
        self._unused = set(self.layout.spans)

    @property
    def unit_norm_squared(self) -> Float64[Tensor, " unit"]:
        """Squared length of each unit's gradient, when the pass is over."""
        return squared_lengths(self.rows)

    @property
    def group_norm_squared(self) -> Float64[Tensor, " group"]:
        """Squared length of each group's sum, when the pass is over."""
        if self.units_per_group == 1:
            return self.unit_norm_squared
        groups = self.rows.unflatten(0, (-1, self.units_per_group))
        columns_at_once = max(1, numbers_at_once(self.rows.device) // len(groups))
        return add_up(squared_lengths(columns.sum(1)) for columns in groups.split(columns_at_once, dim=2))


_Use = Callable[[list[str], Float[Tensor, "unit number"]], None]
"""Uses up the gradients of some parameters, flattened and side by side."""


class _SmallParameters:
    """Gradients of small parameters, kept back to be used up together: a call for each would cost more than its work.

    What uses them up is given anew each time: a sink that it belongs to would otherwise stay in memory, with all
    gradients in it, until Python next looks for cycles.
    """

    def __init__(self):
        self._kept: dict[str, Float[Tensor, "unit number"]] = {}
        self._num_kept = 0

    def keep(
        self, factors: AbstractLayerFactors, names: dict[str, str], num_numbers: Callable[[str], int], use: _Use
    ) -> dict[str, str]:
        """Keep the small ones of a layer, and return the names of the others."""
        large = {}
        for own, name in names.items():
            if num_numbers(name) > _SMALL:
                large[own] = name
                continue
            flat = factors.gradient(own).flatten(1)
            self._kept[name] = flat
            self._num_kept += flat.numel()
            if self._num_kept > numbers_at_once(flat.device):
                self.use_up(use)
        return large

    def use_up(self, use: _Use) -> None:
        """Hand over what was kept."""
        if self._kept:
            use(list(self._kept), torch.cat(list(self._kept.values()), dim=1))
        self._kept.clear()
        self._num_kept = 0


class DotSink(AbstractSink):
    """Inner products with fixed vectors, and squared norms; no gradient outlives its layer."""

    def __init__(self, layout: Layout, vectors: Float[Tensor, "vector param"], num_units: int):
        self.layout = layout
        self.vectors = vectors
        self.dots: Float[Tensor, "unit vector"] = vectors.new_zeros(num_units, len(vectors))
        self._lengths = SquaredLengths(num_units, vectors.device)
        self._small = _SmallParameters()

    @property
    def norm_squared(self) -> Float64[Tensor, " unit"]:
        """Squared length of each unit's gradient, when the pass is over."""
        return self._lengths.sum()

    def consume(self, factors: AbstractLayerFactors, names: dict[str, str]) -> None:
        """Add one layer's part."""
        names = self._small.keep(factors, names, self.layout.num_numbers, self._add_flat)
        if not names:
            return
        if not len(self.vectors):
            factors.measure(names, self._lengths)
            return
        self.dots += factors.dot({own: self._vectors(name) for own, name in names.items()}, self._lengths)

    def finish(self) -> None:
        """Add the small parameters' part."""
        self._small.use_up(self._add_flat)

    def _add_flat(self, names: list[str], flat: Float[Tensor, "unit number"]) -> None:
        self._lengths.measure(flat)
        if not len(self.vectors):
            return
        runs = self.layout.runs(names)
        if len(self.vectors) * flat.shape[1] > len(runs) * _NUMBERS_PER_CALL:
            # To bring gradients into the order of so many vectors is less work than the other way round.
            of = dict(zip(names, flat.split([self.layout.num_numbers(name) for name in names], dim=1), strict=True))
            parts = [(torch.cat([of[name] for name in run], dim=1), self.vectors[:, span]) for run, span in runs]
        else:
            parts = [(flat, torch.cat([self._vectors(name) for name in names], dim=1))]
        for gradients, vectors in parts:
            for few, of_vectors in zip(gradients.split(_SUMMED, dim=1), vectors.split(_SUMMED, dim=1), strict=True):
                self.dots += few @ of_vectors.T

    def _vectors(self, name: str) -> Float[Tensor, "vector number"]:
        return self.vectors[:, self.layout.spans[name]]


class ProjectSink(AbstractSink):
    """Projected gradients, and their exact squared norms; no gradient outlives its layer.

    Args:
        projection: What to project with.
        rows: Where the projected gradients go; what was there is lost.
        with_norms: Whether exact norms are wanted.
    """

    def __init__(self, projection: AbstractProjection, rows: Float[Tensor, "unit width"], *, with_norms: bool = True):
        self.projection = projection
        self.rows = rows.zero_()
        is_open = projection.open_width > projection.width
        self._opened = rows.new_zeros(len(rows), projection.open_width) if is_open else self.rows
        self._lengths = SquaredLengths(len(rows), rows.device) if with_norms else None
        self._small = _SmallParameters()

    @property
    def norm_squared(self) -> Float64[Tensor, " unit"]:
        """Squared length of each unit's gradient, when the pass is over; zeros if not wanted."""
        lengths = SquaredLengths(len(self.rows), self.rows.device) if self._lengths is None else self._lengths
        return lengths.sum()

    def consume(self, factors: AbstractLayerFactors, names: dict[str, str]) -> None:
        """Add one layer's part."""
        names = self._small.keep(factors, names, self.projection.num_numbers, self._add_flat)
        if names:
            factors.project(self.projection, names, self._opened, self._lengths)

    def finish(self) -> None:
        """Add the small parameters' part, and give the rows their width."""
        self._small.use_up(self._add_flat)
        if self._opened is not self.rows:
            self.projection.close(self._opened, self.rows)

    def _add_flat(self, names: list[str], flat: Float[Tensor, "unit number"]) -> None:
        self.projection.add_flat(self._opened, names, flat)
        if self._lengths is not None:
            self._lengths.measure(flat)
