"""Fully connected layers: the weight gradient of a unit is G^T A over all its positions."""

from jaxtyping import Float
from torch import Tensor, cat, nn

from whence.engine._base import AbstractLayerFactors


class LinearFactors(AbstractLayerFactors):
    """Gradients of an ``nn.Linear``, whose positions are tokens, pixels, or the event itself."""

    layer: nn.Linear

    def materialise(self) -> dict[str, Float[Tensor, "unit *shape"]]:
        inputs = cat([self._positions(a) for a, _ in self.calls], dim=1)
        grads = cat([self._positions(g) for _, g in self.calls], dim=1)
        return {"weight": grads.mT @ inputs, "bias": grads.sum(1)}

    def _positions(self, tensor: Float[Tensor, "event *middle feature"]) -> Float[Tensor, "unit position feature"]:
        return self._per_unit(tensor).flatten(1, -2)
