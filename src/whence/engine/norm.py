"""Normalisation layers without statistics across samples: the weight gradient is G times the normalised input."""

from abc import abstractmethod
from typing import Any

import torch
from diffusers.models import normalization
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from whence.engine._base import AbstractLayerFactors, Call, add_up

_BACKWARD = torch.ops.aten.native_group_norm_backward.default


class GroupNormFactors(AbstractLayerFactors):
    """Gradients of an ``nn.GroupNorm``, whose channels are on the second axis."""

    layer: nn.GroupNorm
    wanted = ("_saved_result1", "_saved_result2")  # mean and scale

    def materialise(self) -> dict[str, Float[Tensor, "unit channel"]]:
        """Run the layer's own backward pass as if the channels of all events were those of one event."""
        weights, biases = zip(*map(self._of_call, self.calls, self.saved), strict=True)
        return {"weight": add_up(weights), "bias": add_up(biases)}

    def _of_call(
        self, call: Call, saved: tuple[Tensor, ...] | None
    ) -> tuple[Float[Tensor, "unit channel"], Float[Tensor, "unit channel"]]:
        inputs, grads = call
        num_events, num_channels = inputs.shape[:2]
        num_positions, groups = inputs.numel() // (num_events * num_channels), self.layer.num_groups
        inputs, grads = inputs.contiguous(), grads.contiguous()
        if saved is not None and saved[0].dtype == inputs.dtype:
            mean, scale = saved
        else:
            sizes = (num_events, num_channels, num_positions, groups)
            _, mean, scale = torch.native_group_norm(inputs, None, None, *sizes, self.layer.eps)
        _, weight, bias = _BACKWARD(
            grads,
            inputs,
            mean,
            scale,
            inputs.new_empty(()).expand(num_events * num_channels),  # only gradients of inputs depend on the weight
            1,
            num_events * num_channels,
            num_positions,
            num_events * groups,
            [False, True, True],  # of input, weight, bias
        )
        weight, bias = (self._sum_members(x.view(num_events, num_channels)) for x in (weight, bias))
        return weight, bias


class AbstractLastAxesFactors(AbstractLayerFactors):
    """Gradients of a layer that normalises, then scales and perhaps shifts, along its last axes."""

    layer: Any

    @abstractmethod
    def normalise(self, inputs: Float[Tensor, "event *rest"]) -> Float[Tensor, "event *rest"]:
        """Do what the layer does before it scales."""

    def materialise(self) -> dict[str, Float[Tensor, "unit *shape"]]:
        """Multiply output gradients with normalised inputs, and add up positions and calls."""
        gradients = {}
        if self.layer.weight is not None:
            gradients["weight"] = add_up(self._sum_positions(g * self.normalise(a)) for a, g in self.calls)
        if getattr(self.layer, "bias", None) is not None:  # torch's RMSNorm has none
            gradients["bias"] = add_up(self._sum_positions(g) for _, g in self.calls)
        return gradients

    def _sum_positions(self, tensor: Float[Tensor, "event *rest"]) -> Float[Tensor, "unit *shape"]:
        per_unit = self._per_unit(tensor)
        return per_unit.sum(tuple(range(1, per_unit.ndim - self.layer.weight.ndim)))


class LayerNormFactors(AbstractLastAxesFactors):
    """Gradients of an ``nn.LayerNorm``."""

    layer: nn.LayerNorm

    def normalise(self, inputs: Float[Tensor, "event *rest"]) -> Float[Tensor, "event *rest"]:
        """Normalise the last axes."""
        return F.layer_norm(inputs, self.layer.normalized_shape, eps=self.layer.eps)


class RMSNormFactors(AbstractLastAxesFactors):
    """Gradients of an ``nn.RMSNorm``."""

    layer: nn.RMSNorm

    def normalise(self, inputs: Float[Tensor, "event *rest"]) -> Float[Tensor, "event *rest"]:
        """Divide by the root mean square of the last axes."""
        return F.rms_norm(inputs, self.layer.normalized_shape, eps=self.layer.eps)


class DiffusersRMSNormFactors(AbstractLastAxesFactors):
    """Gradients of diffusers' own ``RMSNorm``."""

    layer: normalization.RMSNorm

    def normalise(self, inputs: Float[Tensor, "event *rest"]) -> Float[Tensor, "event *rest"]:
        """Divide by the root mean square of the last axis alone, taken in float32 as the layer does."""
        mean_square = inputs.to(torch.float32).square().mean(-1, keepdim=True)
        return inputs * torch.rsqrt(mean_square + self.layer.eps)
