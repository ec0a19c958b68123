"""Convolutions: the weight gradient of a unit is G^T A, A the input unfolded into the patches that the kernel sees."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from whence.engine._base import AbstractLayerFactors

_PATCHES_AT_ONCE = {"cpu": 2**20}
"""Numbers of unfolded input made at a time. On a CPU they stay in its cache: twice as fast as all at once."""
_PATCHES_AT_ONCE_ELSEWHERE = 2**28


class Conv2dFactors(AbstractLayerFactors):
    """Gradients of an ``nn.Conv2d`` with any stride, padding, dilation and groups."""

    layer: nn.Conv2d

    def materialise(self) -> dict[str, Float[Tensor, "unit *shape"]]:
        """Multiply output gradients with patches, and add up the calls."""
        gradients = {"weight": self._sum_calls(self._weight)}
        if self.layer.bias is not None:
            gradients["bias"] = self._sum_calls(lambda inputs, grads: self._per_unit(grads.flatten(2).sum(2)).sum(1))
        return gradients

    def _weight(
        self, inputs: Float[Tensor, "event in height width"], grads: Float[Tensor, "event out height2 width2"]
    ) -> Float[Tensor, "unit *shape"]:
        groups = self.layer.groups
        per_unit = self._per_unit(inputs)
        # The positions of all members of a unit lie side by side, so that one product adds them up.
        channels_first = self._per_unit(grads.flatten(2)).transpose(1, 2)
        out = channels_first.reshape(self.num_units * groups, grads.shape[1] // groups, -1)
        weight = inputs.new_empty(*out.shape[:2], self.layer.weight[0].numel())
        numbers_per_unit = groups * weight.shape[2] * out.shape[2]
        at_once = _PATCHES_AT_ONCE.get(inputs.device.type, _PATCHES_AT_ONCE_ELSEWHERE)
        units_at_once = max(1, at_once // numbers_per_unit)
        for first in range(0, self.num_units, units_at_once):
            here = slice(first * groups, (first + units_at_once) * groups)
            patches = self._patches(per_unit[first : first + units_at_once])
            patches = patches.reshape(-1, weight.shape[2], out.shape[2])
            torch.bmm(out[here], patches.mT, out=weight[here])
        return weight.view(self.num_units, *self.layer.weight.shape)

    def _patches(self, inputs: Float[Tensor, "unit member in height width"]) -> Float[Tensor, "unit patch position"]:
        """Unfold the input into what each element of the kernel sees, the positions of all members side by side."""
        layer = self.layer
        # torch keeps the padding of every side, last axis first, under this name for its own forward pass.
        padding = layer._reversed_padding_repeated_twice  # noqa: SLF001
        padded = inputs.flatten(0, 1)
        if any(padding):
            padded = F.pad(padded, padding, mode="constant" if layer.padding_mode == "zeros" else layer.padding_mode)
        for axis in (0, 1):
            span, stride, dilation = layer.kernel_size[axis], layer.stride[axis], layer.dilation[axis]
            padded = padded.unfold(2 + axis, dilation * (span - 1) + 1, stride)[..., ::dilation]
        # unit, member, in, row, column, kernel row, kernel column
        windows = padded.unflatten(0, inputs.shape[:2]).permute(0, 2, 5, 6, 1, 3, 4)
        return windows.reshape(len(inputs), layer.in_channels * windows.shape[2] * windows.shape[3], -1)
