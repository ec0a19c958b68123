"""Normalisation layers without statistics across samples: the weight gradient is G times the normalised input."""

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from whence.engine._base import AbstractLayerFactors


class GroupNormFactors(AbstractLayerFactors):
    """Gradients of an ``nn.GroupNorm``, whose channels are on the second axis."""

    layer: nn.GroupNorm

    def materialise(self) -> dict[str, Float[Tensor, "unit *shape"]]:
        weight = sum(self._sum(g * F.group_norm(a, self.layer.num_groups, eps=self.layer.eps)) for a, g in self.calls)
        return {"weight": weight, "bias": sum(self._sum(g) for _, g in self.calls)}  # pyright: ignore[reportReturnType]

    def _sum(self, tensor: Float[Tensor, "event channel *position"]) -> Float[Tensor, "unit channel"]:
        return self._per_unit(tensor.flatten(2).sum(2) if tensor.ndim > 2 else tensor).sum(1)


class LayerNormFactors(AbstractLayerFactors):
    """Gradients of an ``nn.LayerNorm``, whose normalised axes come last."""

    layer: nn.LayerNorm

    def materialise(self) -> dict[str, Float[Tensor, "unit *shape"]]:
        shape = self.layer.normalized_shape
        weight = sum(self._sum(g * F.layer_norm(a, shape, eps=self.layer.eps)) for a, g in self.calls)
        return {"weight": weight, "bias": sum(self._sum(g) for _, g in self.calls)}  # pyright: ignore[reportReturnType]

    def _sum(self, tensor: Float[Tensor, "event *rest"]) -> Float[Tensor, "unit *shape"]:
        per_unit = self._per_unit(tensor)
        return per_unit.sum(tuple(range(1, per_unit.ndim - len(self.layer.normalized_shape))))
