"""Normalisation layers without statistics across samples: the weight gradient is G times the normalised input."""

from abc import abstractmethod
from typing import Any

import torch
from diffusers.models import normalization
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from whence.engine._base import AbstractLayerFactors, add_up


class AbstractNormFactors(AbstractLayerFactors):
    """Gradients of a layer that normalises, then scales and shifts."""

    layer: Any

    @abstractmethod
    def normalise(self, inputs: Float[Tensor, "event *rest"]) -> Float[Tensor, "event *rest"]:
        """Do what the layer does before it scales."""

    @abstractmethod
    def sum_positions(self, tensor: Float[Tensor, "event *rest"]) -> Float[Tensor, "unit *shape"]:
        """Add up what is scaled by the same weight, and the members of a unit."""

    def materialise(self) -> dict[str, Float[Tensor, "unit *shape"]]:
        """Multiply output gradients with normalised inputs, and add up positions and calls."""
        gradients = {}
        if self.layer.weight is not None:
            gradients["weight"] = add_up(self.sum_positions(g * self.normalise(a)) for a, g in self.calls)
        if getattr(self.layer, "bias", None) is not None:  # torch's RMSNorm has none
            gradients["bias"] = add_up(self.sum_positions(g) for _, g in self.calls)
        return gradients


class GroupNormFactors(AbstractNormFactors):
    """Gradients of an ``nn.GroupNorm``, whose channels are on the second axis."""

    layer: nn.GroupNorm

    def normalise(self, inputs: Float[Tensor, "event *rest"]) -> Float[Tensor, "event *rest"]:
        """Normalise each group of channels."""
        return F.group_norm(inputs, self.layer.num_groups, eps=self.layer.eps)

    def sum_positions(self, tensor: Float[Tensor, "event channel *position"]) -> Float[Tensor, "unit channel"]:
        """Add up all positions."""
        return self._sum_members(tensor.flatten(2).sum(2) if tensor.ndim > 2 else tensor)


class _LastAxesFactors(AbstractNormFactors):
    """Gradients of a layer whose scaled axes come last."""

    def sum_positions(self, tensor: Float[Tensor, "event *rest"]) -> Float[Tensor, "unit *shape"]:
        """Add up all axes but the last."""
        per_unit = self._per_unit(tensor)
        return per_unit.sum(tuple(range(1, per_unit.ndim - self.layer.weight.ndim)))


class LayerNormFactors(_LastAxesFactors):
    """Gradients of an ``nn.LayerNorm``."""

    layer: nn.LayerNorm

    def normalise(self, inputs: Float[Tensor, "event *rest"]) -> Float[Tensor, "event *rest"]:
        """Normalise the last axes."""
        return F.layer_norm(inputs, self.layer.normalized_shape, eps=self.layer.eps)


class RMSNormFactors(_LastAxesFactors):
    """Gradients of an ``nn.RMSNorm``."""

    layer: nn.RMSNorm

    def normalise(self, inputs: Float[Tensor, "event *rest"]) -> Float[Tensor, "event *rest"]:
        """Divide by the root mean square of the last axes."""
        return F.rms_norm(inputs, self.layer.normalized_shape, eps=self.layer.eps)


class DiffusersRMSNormFactors(_LastAxesFactors):
    """Gradients of diffusers' own ``RMSNorm``."""

    layer: normalization.RMSNorm

    def normalise(self, inputs: Float[Tensor, "event *rest"]) -> Float[Tensor, "event *rest"]:
        """Divide by the root mean square of the last axis alone, taken in float32 as the layer does."""
        mean_square = inputs.to(torch.float32).square().mean(-1, keepdim=True)
        return inputs * torch.rsqrt(mean_square + self.layer.eps)
