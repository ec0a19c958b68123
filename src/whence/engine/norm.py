"""Normalisation layers without statistics across samples: the weight gradient is G times the normalised input."""

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from whence.engine._base import AbstractLayerFactors


class GroupNormFactors(AbstractLayerFactors):
    """Gradients of an ``nn.GroupNorm``, whose channels are on the second axis."""

    layer: nn.GroupNorm

    def materialise(self) -> dict[str, Float[Tensor, "unit *shape"]]:
        """Multiply output gradients with normalised inputs, and add up positions and calls."""
        groups, eps = self.layer.num_groups, self.layer.eps
        return {
            "weight": self._sum_calls(lambda a, g: self._sum_positions(g * F.group_norm(a, groups, eps=eps))),
            "bias": self._sum_calls(lambda a, g: self._sum_positions(g)),
        }

    def _sum_positions(self, tensor: Float[Tensor, "event channel *position"]) -> Float[Tensor, "unit channel"]:
        return self._per_unit(tensor.flatten(2).sum(2) if tensor.ndim > 2 else tensor).sum(1)


class LayerNormFactors(AbstractLayerFactors):
    """Gradients of an ``nn.LayerNorm``, whose normalised axes come last."""

    layer: nn.LayerNorm

    def materialise(self) -> dict[str, Float[Tensor, "unit *shape"]]:
        """Multiply output gradients with normalised inputs, and add up positions and calls."""
        shape, eps = self.layer.normalized_shape, self.layer.eps
        gradients = {"weight": self._sum_calls(lambda a, g: self._sum_positions(g * F.layer_norm(a, shape, eps=eps)))}
        if self.layer.bias is not None:
            gradients["bias"] = self._sum_calls(lambda a, g: self._sum_positions(g))
        return gradients

    def _sum_positions(self, tensor: Float[Tensor, "event *rest"]) -> Float[Tensor, "unit *shape"]:
        per_unit = self._per_unit(tensor)
        return per_unit.sum(tuple(range(1, per_unit.ndim - len(self.layer.normalized_shape))))
