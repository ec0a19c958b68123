"""The contract of a layer kind."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import cached_property

import torch
from jaxtyping import Float, Float64
from torch import Tensor, nn

Call = tuple[Tensor, Tensor]
"""Input and output gradient of one call of a layer; both have the events on their first axis."""


class AbstractLayerFactors(ABC):
    """Per-unit gradients of one layer, from all calls of it in one pass.

    A layer kind gives :meth:`materialise`; norms and dot products follow from it, and a kind may take a shorter way to
    them.

    Args:
        layer: The layer.
        calls: Its calls. All of them enter one gradient before any norm is taken: norms do not add.
        num_units: Units in the batch.
    """

    def __init__(self, layer: nn.Module, calls: list[Call], num_units: int):
        self.layer = layer
        self.calls = calls
        self.num_units = num_units

    @abstractmethod
    def materialise(self) -> dict[str, Float[Tensor, "unit *shape"]]:
        """Make each unit's gradient, by the layer's own name of the parameter (``weight``, ``bias``)."""

    @cached_property
    def gradients(self) -> dict[str, Float[Tensor, "unit *shape"]]:
        """What :meth:`materialise` gives, made once."""
        return self.materialise()

    def norm_squared(self, names: list[str]) -> Float64[Tensor, " unit"]:
        """Squared length of each unit's gradient over the named parameters of this layer."""
        return sum(
            (squared_lengths(self.gradients[name].flatten(1)) for name in names),
            start=torch.zeros(self.num_units, dtype=torch.float64, device=self.calls[0][1].device),
        )

    def dot(self, vectors: Mapping[str, Float[Tensor, "vector param"]]) -> Float[Tensor, "unit vector"]:
        """Inner products of each unit's gradient with given vectors, added up over the named parameters."""
        products = [self.gradients[name].flatten(1) @ vector.T for name, vector in vectors.items()]
        return torch.stack(products).sum(0)

    def _sum_calls(self, one_call: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Add up what ``one_call`` makes of each call's input and output gradient."""
        total = one_call(*self.calls[0])
        for inputs, grads in self.calls[1:]:
            total += one_call(inputs, grads)
        return total

    def _per_unit(self, events: Float[Tensor, "event *rest"]) -> Float[Tensor, "unit member *rest"]:
        """Split the event axis into units and their members."""
        return events.unflatten(0, (self.num_units, -1))


def squared_lengths(rows: Float[Tensor, "unit param"]) -> Float64[Tensor, " unit"]:
    """Squared length of each row, in float64 so that layers can be added up."""
    # Not vector_norm: in float32 it adds one number after another, and is off by 1e-4 for a million of them.
    return rows.square().sum(1).double()
