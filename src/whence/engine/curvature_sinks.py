"""Sinks for curvature: what K-FAC and EK-FAC are made of, added up over passes of *sampled* output gradients.

Only layers whose weight gradient is G^T A, one matrix for all, have Kronecker factors. Everything else (normalisations,
embeddings, convolutions in groups, tables) has the mean square of its gradients.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from whence.engine._base import AbstractLayerFactors, MatrixLayerFactors
from whence.engine.capture import AbstractSink

_NUMBERS_AT_ONCE = 2**24
"""Of gradients that are rotated at a time."""


@dataclass
class Covariance:
    """Sums of A^T A and G^T G of one layer."""

    inner: Float[Tensor, "inner inner"]
    """With a last row and column for the bias, if the layer has a chosen one."""
    out: Float[Tensor, "out out"]
    positions: int
    """Positions of an event: how many rows of A and G it has."""
    bias: str | None
    """Name of the bias in the model."""


class CovarianceSink(AbstractSink):
    """Adds up covariances by the name of the weight, and squares of all other gradients by name.

    Args:
        reduce: Take the mean of A and the sum of G over positions first: what Eschenhagen et al. 2023
            (arXiv:2311.00636) call *reduce*. Otherwise positions count as samples of their own: *expand*.
    """

    def __init__(self, *, reduce: bool = False):
        self.reduce = reduce
        self.covariances: dict[str, Covariance] = {}
        self.squares: dict[str, Float[Tensor, "*shape"]] = {}
        self.num_events = 0

    def consume(self, factors: AbstractLayerFactors, names: dict[str, str]) -> None:
        """Add one layer's part."""
        rest = names
        if has_kronecker_factors(factors, names):
            assert isinstance(factors, MatrixLayerFactors)
            inner, out = factors.covariance(with_bias="bias" in names, reduce=self.reduce)
            weight, positions = names["weight"], 1 if self.reduce else factors.positions
            found = self.covariances.setdefault(weight, Covariance(0 * inner, 0 * out, positions, names.get("bias")))
            found.inner += inner
            found.out += out
            rest = {}
        for own, name in rest.items():
            squares = factors.gradient(own).square().sum(0)
            self.squares[name] = self.squares[name] + squares if name in self.squares else squares


class SecondMomentSink(AbstractSink):
    """Adds up the squares of gradients along given directions: the eigenvalues of EK-FAC (George et al. 2018).

    Args:
        bases: By the name of the weight: directions of the outputs and of the inner side, bias included.
    """

    def __init__(self, bases: dict[str, tuple[Float[Tensor, "out out"], Float[Tensor, "inner inner"]]]):
        self.bases = bases
        self.squares: dict[str, Float[Tensor, "out inner"]] = {}

    def consume(self, factors: AbstractLayerFactors, names: dict[str, str]) -> None:
        """Add one layer's part."""
        if names.get("weight") not in self.bases:
            return
        weight = names["weight"]
        out, inner = self.bases[weight]
        gradients = factors.gradient("weight").flatten(2)
        bias = factors.gradient("bias")[..., None] if "bias" in names else gradients[..., :0]
        total = torch.zeros_like(self.squares.get(weight, gradients.new_zeros(len(out), len(inner))))
        for some in range(0, len(gradients), at_once := max(1, _NUMBERS_AT_ONCE // gradients[0].numel())):
            whole = torch.cat([gradients[some : some + at_once], bias[some : some + at_once]], dim=2)
            total += (out.T @ (whole @ inner)).square().sum(0)
        self.squares[weight] = self.squares[weight] + total if weight in self.squares else total


def has_kronecker_factors(factors: AbstractLayerFactors, names: dict[str, str]) -> bool:
    """Say whether a layer's weight gradient is one product G^T A."""
    return isinstance(factors, MatrixLayerFactors) and "weight" in names and getattr(factors.layer, "groups", 1) == 1
