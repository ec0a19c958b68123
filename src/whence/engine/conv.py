"""Convolutions: the weight gradient of a unit is G^T A, A the input unfolded into the patches that the kernel sees."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from whence.engine._base import AbstractLayerFactors


class Conv2dFactors(AbstractLayerFactors):
    """Gradients of an ``nn.Conv2d`` with any stride, padding, dilation and groups."""

    layer: nn.Conv2d

    def materialise(self) -> dict[str, Float[Tensor, "unit *shape"]]:
        weight, bias = zip(*(self._one_call(inputs, grads) for inputs, grads in self.calls), strict=True)
        return {
            "weight": torch.stack(weight).sum(0).view(self.num_units, *self.layer.weight.shape),
            "bias": torch.stack(bias).sum(0),
        }

    def _one_call(
        self, inputs: Float[Tensor, "event in height width"], grads: Float[Tensor, "event out height2 width2"]
    ) -> tuple[Tensor, Tensor]:
        groups = self.layer.groups
        patches = self._per_unit(self._patches(inputs).unflatten(1, (groups, -1)))
        grads = self._per_unit(grads.flatten(2).unflatten(1, (groups, -1)))
        # group, in (of the group, times kernel), out (of the group), position
        weight = torch.einsum("umgop,umgip->ugoi", grads, patches)
        return weight, grads.sum((1, 4)).flatten(1)

    def _patches(self, inputs: Float[Tensor, "event in height width"]) -> Float[Tensor, "event patch position"]:
        """Unfold the input. Padding comes first: ``unfold`` itself pads with zeros only, and knows no 'same'."""
        layer = self.layer
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        # torch keeps the padding of every side, last axis first, under this name for its own forward pass.
        padded = F.pad(inputs, layer._reversed_padding_repeated_twice, mode=mode)  # noqa: SLF001
        return F.unfold(padded, layer.kernel_size, layer.dilation, stride=layer.stride)  # pyright: ignore[reportArgumentType]
