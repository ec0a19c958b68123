"""The contract of a layer kind."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping
from functools import cached_property
from math import ceil, prod
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from whence.engine._lengths import SquaredLengths
from whence.projections import AbstractProjection

Call = tuple[Tensor, Tensor]
"""Input and output gradient of one call of a layer; both have the events on their first axis."""

# Costs in units of one multiplication and addition inside a convolution, measured on one core of a server CPU
# (benchmarks/engine.py shows what they lead to). They only choose between forms that give the same result.
PER_PRODUCT = 2.0
"""A multiplication inside a product of many small matrices."""
PER_ELEMENT = 80.0
"""Making, writing and reading again an element of a gradient."""
PER_PAIR = 140.0
"""Adding an element of one matrix of pairs of positions to another."""
PER_GATHERED = 32.0
"""Gathering an element of a patch."""


class Piece(NamedTuple):
    """Some columns of one parameter's per-unit gradients."""

    name: str
    """The layer's own name of the parameter."""
    span: slice
    """Which elements of the flattened parameter."""
    gradients: Float[Tensor, "unit element"]


class AbstractLayerFactors(ABC):
    """Per-unit gradients of one layer, from all calls of it in one pass.

    A layer kind gives :meth:`materialise`; everything else follows from it. A kind with large parameters also gives
    :meth:`pieces`, so that its gradients are used up while they are in the cache, and may take a shorter way to norms
    and projections.

    Args:
        layer: The layer.
        calls: Its calls. All of them enter one gradient before any norm is taken: norms do not add.
        num_units: Units in the batch.
    """

    wanted: tuple[str, ...] = ()
    """Attributes of the layer's own node in autograd's graph that spare work, where they are to be had."""

    def __init__(self, layer: nn.Module, calls: list[Call], num_units: int):
        self.layer = layer
        self.calls = calls
        self.num_units = num_units
        self.saved: list[tuple[Tensor, ...] | None] = [None] * len(calls)
        """What was wanted, by call; None where it is not to be had."""

    @abstractmethod
    def materialise(self) -> dict[str, Float[Tensor, "unit *shape"]]:
        """Make each unit's gradient, by the layer's own name of the parameter (``weight``, ``bias``)."""

    @cached_property
    def gradients(self) -> dict[str, Float[Tensor, "unit *shape"]]:
        """What :meth:`materialise` gives, made once."""
        return self.materialise()

    def gradient(self, name: str) -> Float[Tensor, "unit *shape"]:
        """Give each unit's gradient of one parameter."""
        return self.gradients[name]

    def pieces(self, names: Collection[str]) -> Iterator[Piece]:
        """Make the gradients of the named parameters piece by piece; the pieces of one parameter come in order."""
        for name in names:
            gradients = self.gradient(name).flatten(1)
            yield Piece(name, slice(0, gradients.shape[1]), gradients)

    def measure(self, names: Collection[str], lengths: SquaredLengths) -> None:
        """Add the squared length of each unit's gradient over the named parameters of this layer."""
        for piece in self.pieces(names):
            lengths.measure(piece.gradients)

    def dot(
        self, vectors: Mapping[str, Float[Tensor, "vector param"]], lengths: SquaredLengths
    ) -> Float[Tensor, "unit vector"]:
        """Give inner products of each unit's gradient with given vectors, and add its squared length.

        Args:
            vectors: Parts of the vectors, by the layer's own name of the parameter; over these both are added up.
            lengths: What the squared lengths are added to.
        """
        dots = []
        for name, span, gradients in self.pieces(vectors):
            dots.append(gradients @ vectors[name][:, span].T)
            lengths.measure(gradients)
        return add_up(dots)

    def project(
        self,
        projection: AbstractProjection,
        names: Mapping[str, str],
        rows: Float[Tensor, "unit width"],
        lengths: SquaredLengths | None,
    ) -> None:
        """Add the projected gradients to ``rows``.

        Args:
            projection: What to project with.
            names: The chosen parameters, from their name in the layer to that in the model.
            rows: What is added to.
            lengths: What their squared lengths are added to; None where these are not wanted.
        """
        for own, name in names.items():
            gradients = self.gradient(own)
            projection.add(rows, name, gradients)
            if lengths is not None:
                lengths.measure(gradients.flatten(1))

    def _per_unit(self, events: Float[Tensor, "event *rest"]) -> Float[Tensor, "unit member *rest"]:
        """Split the event axis into units and their members."""
        size, *rest = events.shape
        return events.view(self.num_units, size // self.num_units, *rest)

    @property
    def device(self) -> torch.device:
        """Where the gradients are."""
        return self.calls[0][1].device

    def _sum_members(self, events: Float[Tensor, "event *rest"]) -> Float[Tensor, "unit *rest"]:
        """Add up the members of each unit."""
        return events if events.shape[0] == self.num_units else self._per_unit(events).sum(1)


class MatrixLayerFactors(AbstractLayerFactors):
    r"""Gradients of a layer whose weight gradient is a sum over positions of G^T A.

    ``A`` is what an output sees of the input (features of a token, a patch of an image), of size ``inner``; ``G`` the
    gradient of the outputs. A weight has the shape (out, \*inner). From these two factors come

        a norm by Gram matrices        ‖G^T A‖² = sum((A A^T) * (G G^T))           where positions are few
        a two-sided projection         (G P_out)^T (A P_inner)                     where they are fewer than outputs

    and else both are made of the gradient itself, in pieces of some outputs at a time. A kind gives what is abstract
    here.
    """

    @abstractmethod
    def weight_rows(self, outputs: slice) -> Float[Tensor, "unit out inner"]:
        """Make the weight gradient of some outputs."""

    @abstractmethod
    def bias(self) -> Float[Tensor, "unit out"]:
        """Make the gradient of the bias."""

    @abstractmethod
    def gram_norm_squared(self) -> Float[Tensor, " unit"]:
        """Give the squared length of the weight gradient, by Gram matrices; asked only where it is cheaper."""

    @abstractmethod
    def project_factors(
        self, out: Float[Tensor, "out k_out"] | None, inner: Float[Tensor, "inner k_inner"] | None
    ) -> Float[Tensor, "unit k_out k_inner"]:
        """Project both factors and multiply them; None stands for the identity."""

    @abstractmethod
    def factors(self) -> list[tuple[Float[Tensor, "event position inner"], Float[Tensor, "event position out"]]]:
        """Give A and G of each call."""

    def covariance(
        self, *, with_bias: bool, reduce: bool = False
    ) -> tuple[Float[Tensor, "inner inner"], Float[Tensor, "out out"]]:
        """Give A^T A and G^T G, summed over events and positions: the factors of K-FAC (Martens and Grosse 2015).

        Positions count as samples of their own, which Eschenhagen et al. 2023 (arXiv:2311.00636) call *expand*. For the
        generalised Gauss-Newton matrix the output gradients must be sampled ones.

        Args:
            with_bias: Add a column of ones to A, which stands for the bias.
            reduce: Take the mean of A and the sum of G over the positions of each event first (*reduce*).
        """
        inner, out = [], []
        for a, g in self.factors():
            a = torch.cat([a, torch.ones_like(a[..., :1])], dim=-1) if with_bias else a
            a, g = (a.mean(1), g.sum(1)) if reduce else (a.flatten(0, 1), g.flatten(0, 1))
            inner.append(a.T @ a)
            out.append(g.T @ g)
        return add_up(inner), add_up(out)

    @property
    @abstractmethod
    def positions(self) -> int:
        """Positions of a unit."""

    layer: Any
    row_rate: float
    """Cost of a multiplication in :meth:`weight_rows`."""

    def __init__(self, layer: nn.Module, calls: list[Call], num_units: int):
        super().__init__(layer, calls, num_units)
        self.weight_shape: tuple[int, ...] = tuple(self.layer.weight.shape)
        """Outputs first; to ask the layer each time takes a while."""

    @property
    @abstractmethod
    def gram_cost(self) -> float:
        """Cost of :meth:`gram_norm_squared` for one unit; infinite where it is not to be had."""

    @property
    def outputs_at_once(self) -> int:
        """Outputs in one piece of the weight gradient."""
        num_out, num_inner = self._sizes
        num_pieces = ceil(self.num_units * num_out * num_inner / numbers_at_once(self.device))
        # Equal pieces, and multiples of the width of vector instructions.
        return max(1, ceil(num_out / num_pieces / 16)) * 16 if num_pieces > 1 else num_out

    def materialise(self) -> dict[str, Float[Tensor, "unit *shape"]]:
        """Make the gradients whole."""
        names = ["weight"] if self.layer.bias is None else ["weight", "bias"]
        return {name: self.gradient(name) for name in names}

    def gradient(self, name: str) -> Float[Tensor, "unit *shape"]:
        """Make the gradient of one parameter, and not that of the other."""
        if name == "bias":
            return self.bias()
        return self.weight_rows(slice(0, self.weight_shape[0])).view(self.num_units, *self.weight_shape)

    def pieces(self, names: Collection[str]) -> Iterator[Piece]:
        """Make the gradients some outputs at a time."""
        if "weight" in names:
            for start, rows in self._row_blocks():
                num_inner = rows.shape[2]
                yield Piece("weight", slice(start * num_inner, (start + rows.shape[1]) * num_inner), rows.flatten(1))
        if "bias" in names:
            bias = self.bias()
            yield Piece("bias", slice(0, bias.shape[1]), bias)

    def measure(self, names: Collection[str], lengths: SquaredLengths) -> None:
        """Take the cheaper of the two forms."""
        if "weight" not in names or not self._gram_pays:
            super().measure(names, lengths)
            return
        lengths.add(self.gram_norm_squared())
        if "bias" in names:
            lengths.measure(self.bias())

    def project(
        self,
        projection: AbstractProjection,
        names: Mapping[str, str],
        rows: Float[Tensor, "unit width"],
        lengths: SquaredLengths | None,
    ) -> None:
        """Project the two factors of the weight, or the gradient that they make, whichever is cheaper."""
        sides = projection.sides(names["weight"]) if "weight" in names else None
        if sides is None:
            super().project(projection, names, rows, lengths)
            return
        if self._factors_pay(sides.out, sides.inner, with_norms=lengths is not None):
            core = self.project_factors(sides.out, sides.inner)
            if lengths is not None:
                self.measure(["weight"], lengths)
        else:
            cores = []
            for start, block in self._row_blocks():
                inner = block if sides.inner is None else block @ sides.inner
                cores.append(inner if sides.out is None else sides.out[start : start + block.shape[1]].T @ inner)
                if lengths is not None:
                    lengths.measure(block.flatten(1))
            core = torch.cat(cores, dim=1) if sides.out is None else add_up(cores)
        projection.add_core(rows, names["weight"], core)
        if "bias" in names:
            super().project(projection, {"bias": names["bias"]}, rows, lengths)

    @property
    def _gram_pays(self) -> bool:
        return len(self.calls) == 1 and self.gram_cost < self._row_cost

    @property
    def _row_cost(self) -> float:
        num_out, num_inner = self._sizes
        return num_out * num_inner * (self.row_rate * self.positions + PER_ELEMENT)

    def _factors_pay(self, out: Tensor | None, inner: Tensor | None, *, with_norms: bool) -> bool:
        num_out, num_inner = self._sizes
        k_out = num_out if out is None else out.shape[1]
        k_inner = num_inner if inner is None else inner.shape[1]
        per_position = self.row_rate * num_inner * k_inner + PER_PRODUCT * k_out * (
            k_inner + (out is not None) * num_out
        )
        core_of_rows = PER_PRODUCT * num_out * k_inner * (num_inner + k_out)
        norms = min(self.gram_cost, self._row_cost) if with_norms else 0
        return self.positions * per_position + norms < self._row_cost + core_of_rows

    def _row_blocks(self) -> Iterator[tuple[int, Float[Tensor, "unit out inner"]]]:
        at_once, num_out = self.outputs_at_once, self._sizes[0]
        for start in range(0, num_out, at_once):
            yield start, self.weight_rows(slice(start, min(start + at_once, num_out)))

    @property
    def _sizes(self) -> tuple[int, int]:
        """Outputs, and weights of each."""
        num_out, *inner = self.weight_shape
        return num_out, prod(inner)


def add_up(parts: Iterable[Tensor]) -> Tensor:
    """Add tensors, of which there is at least one, without a copy of a single one."""
    first, *rest = parts
    return sum(rest, start=first) if rest else first


def numbers_at_once(device: torch.device) -> int:
    """Give the size of an intermediate result, in numbers.

    On a CPU it stays in the cache, and needs no fresh memory from the system.
    """
    return 2**20 if device.type == "cpu" else 2**26
