"""Sinks for curvature: what K-FAC, EK-FAC and DataInf are made of, added up over passes.

Only layers whose weight gradient is G^T A, one matrix for all, have Kronecker factors, which are made in passes of
*sampled* output gradients. Everything else (normalisations, embeddings, convolutions in groups, tables) has the mean
square of its gradients.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from whence.engine._base import AbstractLayerFactors, MatrixLayerFactors
from whence.engine._lengths import SquaredLengths
from whence.engine.capture import AbstractSink
from whence.engine.sinks import Layout

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


class SquaredLengthSink(AbstractSink):
    """Adds up the squared lengths of gradients, by parameter over all units, and keeps them by unit."""

    def __init__(self) -> None:
        self.totals: dict[str, float] = {}
        self._by_parameter: dict[str, Float64[Tensor, " unit"]] = {}
        self._units: list[Float64[Tensor, " unit"]] = []

    def consume(self, factors: AbstractLayerFactors, names: dict[str, str]) -> None:
        """Add one layer's part."""
        for own, name in names.items():
            lengths = SquaredLengths(factors.num_units, factors.device)
            factors.measure([own], lengths)
            self._by_parameter[name] = lengths.sum()

    def finish(self) -> None:
        """Add up the pass."""
        if self._by_parameter:
            lengths = torch.stack(list(self._by_parameter.values()))
            self._units.append(lengths.sum(0))
            for name, total in zip(self._by_parameter, lengths.sum(1).tolist(), strict=True):
                self.totals[name] = self.totals.get(name, 0.0) + total
        self._by_parameter.clear()

    @property
    def norm_squared(self) -> Float64[Tensor, " unit"]:
        """Squared length of each unit's gradient, of all passes so far."""
        return torch.cat(self._units)


class RankOneSink(AbstractSink):
    """Adds up g (g . v) / (d + |g|^2) over units, for each parameter's own g and d (DataInf).

    Args:
        layout: Order of the parameters.
        vectors: The v.
        dampings: The d by parameter; above 0.
        sums: What is added to.
    """

    def __init__(
        self,
        layout: Layout,
        vectors: Float[Tensor, "vector param"],
        dampings: Mapping[str, float],
        sums: Float[Tensor, "vector param"],
    ):
        self.layout, self.vectors, self.dampings, self.sums = layout, vectors, dampings, sums

    def consume(self, factors: AbstractLayerFactors, names: dict[str, str]) -> None:
        """Add one layer's part, whose gradients are made twice: the first time for their lengths."""
        for own, name in names.items():
            span = self.layout.spans[name]
            lengths = SquaredLengths(factors.num_units, factors.device)
            dots = factors.dot({own: self.vectors[:, span]}, lengths)
            shares = (dots.double() / (self.dampings[name] + lengths.sum())[:, None]).to(self.sums)
            for _, piece, gradients in factors.pieces([own]):
                columns = slice(span.start + piece.start, span.start + piece.stop)
                self.sums[:, columns].addmm_(shares.T, gradients)


def has_kronecker_factors(factors: AbstractLayerFactors, names: dict[str, str]) -> bool:
    """Say whether a layer's weight gradient is one product G^T A."""
    return isinstance(factors, MatrixLayerFactors) and "weight" in names and getattr(factors.layer, "groups", 1) == 1
