"""Sinks: what is wanted of the per-unit gradients of a backward pass."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor, nn

from whence.engine._base import AbstractLayerFactors, squared_lengths


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


class GatherSink:
    """Collects whole gradients, one row a unit, and the lengths of groups of consecutive units.

    Args:
        layout: Order of the parameters.
        rows: Where the gradients go; what was there is lost.
        units_per_group: Units whose gradients are also added up for a length of their own.
    """

    def __init__(self, layout: Layout, rows: Float[Tensor, "unit param"], units_per_group: int = 1):
        self.layout = layout
        self.rows = rows.zero_()  # a parameter that the output does not use is never handed over
        self.unit_norm_squared = torch.zeros(len(rows), dtype=torch.float64, device=rows.device)
        self.group_norm_squared = torch.zeros(len(rows) // units_per_group, dtype=torch.float64, device=rows.device)

    def consume(self, factors: AbstractLayerFactors, names: dict[str, str]) -> None:
        """Put one layer's part in its place."""
        for own, name in names.items():
            gradients = factors.gradients[own].flatten(1)
            self.rows[:, self.layout.spans[name]] = gradients
            groups = gradients.unflatten(0, (len(self.group_norm_squared), -1)).sum(1)
            self.unit_norm_squared += squared_lengths(gradients)
            self.group_norm_squared += squared_lengths(groups)


class DotSink:
    """Inner products with fixed vectors, and squared norms; no gradient outlives its layer."""

    def __init__(self, layout: Layout, vectors: Float[Tensor, "vector param"], num_units: int):
        self.layout = layout
        self.vectors = vectors
        self.dots: Float[Tensor, "unit vector"] = vectors.new_zeros(num_units, len(vectors))
        self.norm_squared: Float64[Tensor, " unit"] = torch.zeros(num_units, dtype=torch.float64, device=vectors.device)

    def consume(self, factors: AbstractLayerFactors, names: dict[str, str]) -> None:
        """Add one layer's part."""
        self.norm_squared += factors.norm_squared(list(names))
        if len(self.vectors):
            self.dots += factors.dot({own: self.vectors[:, self.layout.spans[name]] for own, name in names.items()})
