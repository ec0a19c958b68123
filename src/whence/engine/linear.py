"""Fully connected layers: the weight gradient of a unit is G^T A over all its positions."""

from jaxtyping import Float
from torch import Tensor, nn

from whence.engine._base import AbstractLayerFactors


class LinearFactors(AbstractLayerFactors):
    """Gradients of an ``nn.Linear``, whose positions are tokens, pixels, or the event itself."""

    layer: nn.Linear

    def materialise(self) -> dict[str, Float[Tensor, "unit *shape"]]:
        """Multiply output gradients with inputs, and add up the calls."""
        gradients = {"weight": self._sum_calls(lambda a, g: self._positions(g).mT @ self._positions(a))}
        if self.layer.bias is not None:
            gradients["bias"] = self._sum_calls(lambda a, g: self._positions(g).sum(1))
        return gradients

    def _positions(self, tensor: Float[Tensor, "event *middle feature"]) -> Float[Tensor, "unit position feature"]:
        return self._per_unit(tensor).flatten(1, -2)
