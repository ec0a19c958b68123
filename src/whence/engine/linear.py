"""Fully connected layers: the weight gradient of a unit is G^T A over all its positions."""

from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor, nn

from whence.engine._base import PER_PAIR, PER_PRODUCT, MatrixLayerFactors, add_up


class LinearFactors(MatrixLayerFactors):
    """Gradients of an ``nn.Linear``, whose positions are tokens, pixels, or the event itself."""

    layer: nn.Linear
    row_rate = PER_PRODUCT

    def weight_rows(self, outputs: slice) -> Float[Tensor, "unit out inner"]:
        """Multiply output gradients with inputs, and add up the calls."""
        if outputs == slice(0, self.layer.out_features):
            return add_up([torch.bmm(g.mT, a) for a, g in self._factors])
        return add_up([torch.bmm(g[:, :, outputs].mT, a) for a, g in self._factors])

    def bias(self) -> Float[Tensor, "unit out"]:
        """Add up the output gradients over positions and calls."""
        return add_up([g.sum(1) for _, g in self._factors])

    def gram_norm_squared(self) -> Float[Tensor, " unit"]:
        """Compare all pairs of positions."""
        ((a, g),) = self._factors
        return ((a @ a.mT) * (g @ g.mT)).sum((1, 2))

    def project_factors(
        self, out: Float[Tensor, "out k_out"] | None, inner: Float[Tensor, "inner k_inner"] | None
    ) -> Float[Tensor, "unit k_out k_inner"]:
        """Project features of inputs and of output gradients."""
        return add_up(
            (g if out is None else g @ out).mT @ (a if inner is None else a @ inner) for a, g in self._factors
        )

    def factors(self) -> list[tuple[Float[Tensor, "event position inner"], Float[Tensor, "event position out"]]]:
        """Give inputs and output gradients, position by position."""
        return [
            (a.unflatten(0, (len(a), 1)).flatten(1, -2), g.unflatten(0, (len(g), 1)).flatten(1, -2))
            for a, g in self.calls
        ]

    @property
    def positions(self) -> int:
        """Positions of a unit, over all calls."""
        return sum(g.shape[1] for _, g in self._factors)

    @property
    def gram_cost(self) -> float:
        """Two products of positions with positions, and a sum over their pairs."""
        return self.positions**2 * (PER_PRODUCT * (self.layer.in_features + self.layer.out_features) + PER_PAIR)

    @cached_property
    def _factors(self) -> list[tuple[Float[Tensor, "unit position inner"], Float[Tensor, "unit position out"]]]:
        num = self.num_units
        return [(a.reshape(num, -1, a.shape[-1]), g.reshape(num, -1, g.shape[-1])) for a, g in self.calls]
