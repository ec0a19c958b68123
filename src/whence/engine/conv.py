"""Convolutions: the weight gradient of a unit is G^T A, A the input unfolded into the patches that the kernel sees.

For gradients nothing is unfolded. The weight gradient of many units is that of *one* convolution with a group for each
unit, which runs at the speed of training's own; a projected ``A`` is the result of a small random convolution; and the
Gram matrix of patches is a sum, over the elements of the kernel, of shifted views of the Gram matrix of pixels.

A transposed convolution is a convolution from its output to its input: the patches are those of its output gradients,
and its inputs take their part.
"""

from functools import cached_property
from itertools import product
from math import inf, prod

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from whence.engine._base import PER_PAIR, PER_PRODUCT, MatrixLayerFactors, add_up, numbers_at_once

_CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}

_Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d


class ConvFactors(MatrixLayerFactors):
    """Gradients of a convolution or transposed convolution, with any stride, padding, dilation and groups.

    Of a transposed convolution the weight has the shape (in, out, kernel), so its *inputs* count as outputs here.
    """

    layer: _Convolution
    row_rate = 1.0

    def weight_rows(self, outputs: slice) -> Float[Tensor, "unit out inner"]:
        """Convolve as the backward pass of training does, each unit in a group of its own."""
        return add_up(self._weight_rows(image, grads[:, outputs]) for image, grads in self._factors)

    def bias(self) -> Float[Tensor, "unit out"]:
        """Add up the output gradients over positions and calls."""
        return add_up(self._sum_members(grads.flatten(2).sum(2)) for _, grads in self.calls)

    def gram_norm_squared(self) -> Float[Tensor, " unit"]:
        """Compare all pairs of positions: of their patches and of their output gradients."""
        ((image, grads),) = self._factors
        image = F.pad(image, [p for padding in reversed(self._padding) for p in (padding, padding)])
        sizes, num_pixels = image.shape[2:], image[0, 0].numel()
        units_at_once = max(1, numbers_at_once(image.device) // num_pixels**2)
        parts = []
        for pixels, out in zip(
            image.flatten(2).split(units_at_once), grads.flatten(2).split(units_at_once), strict=True
        ):
            pairs = (pixels.mT @ pixels).view(-1, *sizes, *sizes)
            of_patches = add_up(pairs[(slice(None), *seen, *seen)] for seen in self._seen_by_elements(grads.shape[2:]))
            parts.append((of_patches.reshape(len(out), out.shape[2], -1) * (out.mT @ out)).sum((1, 2)))
        return torch.cat(parts)

    def project_factors(
        self, out: Float[Tensor, "out k_out"] | None, inner: Float[Tensor, "inner k_inner"] | None
    ) -> Float[Tensor, "unit k_out k_inner"]:
        """Project the patches by a convolution of ``k_inner`` outputs."""
        groups = self.layer.groups
        if inner is None:
            inner = torch.eye(self.layer.weight[0].numel()).to(self.layer.weight)
        kernel = inner.T.unflatten(1, self.layer.weight.shape[1:]).repeat(groups, *[1] * (len(self._kernel) + 1))
        cores = []
        for image, grads in self._factors:
            patches = _CONVOLVE[len(self._kernel)](
                image, kernel, None, self.layer.stride, self._padding, self.layer.dilation, groups
            )
            patches, across = patches.flatten(2), grads.flatten(2)
            if groups == 1:
                core = (across if out is None else out.T @ across) @ patches.mT
            else:
                core = self._core_of_groups(across, patches, out)
            cores.append(self._sum_members(core))
        return add_up(cores)

    def _core_of_groups(
        self,
        grads: Float[Tensor, "event out position"],
        patches: Float[Tensor, "event group_inner position"],
        out: Float[Tensor, "out k_out"] | None,
    ) -> Float[Tensor, "event k_out k_inner"]:
        grads, patches = (x.unflatten(1, (self.layer.groups, -1)) for x in (grads, patches))
        if out is None:
            return (grads @ patches.mT).flatten(1, 2)
        return (out.unflatten(0, (self.layer.groups, -1)).mT @ grads @ patches.mT).sum(1)

    def factors(self) -> list[tuple[Float[Tensor, "event position inner"], Float[Tensor, "event position out"]]]:
        """Unfold the patches; of a layer with groups, those of each group are positions of their own."""
        groups = self.layer.groups
        found = []
        for image, grads in self._factors:
            patches = F.pad(image, [p for padding in reversed(self._padding) for p in (padding, padding)])
            axes = zip(self._kernel, self.layer.stride, self.layer.dilation, strict=True)
            for axis, (size, stride, dilation) in enumerate(axes, start=2):
                patches = patches.unfold(axis, dilation * (size - 1) + 1, stride)[..., ::dilation]
            # event, in, *position, *kernel
            dims = len(self._kernel)
            patches = patches[(..., *[slice(0, count) for count in grads.shape[2:]], *[slice(None)] * dims)]
            patches = patches.unflatten(1, (groups, -1)).movedim(2, 2 + dims)  # event, group, *position, in, *kernel
            out = grads.unflatten(1, (groups, -1)).movedim(2, -1)
            found.append((patches.flatten(2 + dims).flatten(1, 1 + dims), out.flatten(1, 1 + dims)))
        return found

    @property
    def positions(self) -> int:
        """Positions of a unit, over all calls."""
        return sum(grads[:, 0].numel() for _, grads in self._factors) // self.num_units

    @property
    def gram_cost(self) -> float:
        """Products of pixels with pixels and of positions with positions, and sums over shifted pairs of positions."""
        ((image, grads), *_) = self._factors
        if len(image) != self.num_units or self.layer.groups > 1:
            return inf
        num_pixels = prod(size + 2 * p for size, p in zip(image.shape[2:], self._padding, strict=True))
        num_positions = grads[0, 0].numel()
        products = num_pixels**2 * image.shape[1] + num_positions**2 * grads.shape[1]
        return PER_PRODUCT * products + PER_PAIR * num_positions**2 * (prod(self._kernel) + 1)

    @property
    def outputs_at_once(self) -> int:
        """Outputs in one piece of the weight gradient; all of them where they fall into groups."""
        return super().outputs_at_once if self.layer.groups == 1 else len(self.layer.weight)

    def _weight_rows(
        self, image: Float[Tensor, "event in *size"], grads: Float[Tensor, "event out *size2"]
    ) -> Float[Tensor, "unit out inner"]:
        if self._pointwise:
            pixels, out = (self._per_unit(x.flatten(2)).transpose(1, 2).flatten(2) for x in (image, grads))
            rows = out @ pixels.mT
        elif len(image) == self.num_units or grads.shape[1] == len(self.layer.weight):
            # Members are the batch of the convolution. That takes a copy where units have several.
            image, across = (self._per_unit(x).transpose(0, 1).flatten(1, 2) for x in (image, grads))
            rows = self._weight_gradient(image, across, self.num_units)
        else:
            per_unit = zip(self._per_unit(image), self._per_unit(grads), strict=True)
            rows = torch.stack([self._weight_gradient(a, g, 1) for a, g in per_unit])
        return rows.view(self.num_units, grads.shape[1], -1)

    def _weight_gradient(
        self, image: Float[Tensor, "batch in *size"], grads: Float[Tensor, "batch out *size2"], num_units: int
    ) -> Float[Tensor, "out inner *kernel"]:
        groups = num_units * self.layer.groups
        # Only the shape of the weight is looked at.
        weight = image.new_empty(()).expand(grads.shape[1], *self.layer.weight.shape[1:])
        return torch.ops.aten.convolution_backward(
            grads.contiguous(),
            image.contiguous(),
            weight,
            None,
            self.layer.stride,
            self._padding,
            self.layer.dilation,
            False,  # transposed
            [0] * len(self._kernel),  # output padding
            groups,
            [False, True, False],  # of input, weight, bias
        )[1]

    @cached_property
    def _pointwise(self) -> bool:
        """Whether a position sees its own pixel alone, as in a fully connected layer."""
        layer = self.layer
        return layer.groups == 1 and {*self._kernel, *layer.stride} == {1} and not any(self._padding)

    @cached_property
    def _factors(self) -> list[tuple[Float[Tensor, "event in *size"], Float[Tensor, "event out *size2"]]]:
        """What is seen in patches, padded if the layer's own padding is not plain, and what it is multiplied with."""
        if self.layer.transposed:
            return [(grads, inputs) for inputs, grads in self.calls]
        if not any(self._own_padding):
            return self.calls
        mode = "constant" if self.layer.padding_mode == "zeros" else self.layer.padding_mode
        return [(F.pad(inputs, self._own_padding, mode=mode), grads) for inputs, grads in self.calls]

    @cached_property
    def _own_padding(self) -> list[int]:
        """Padding of each side, last axis first, that the convolution itself cannot do."""
        if self.layer.padding_mode == "zeros" and not isinstance(self.layer.padding, str):
            return []
        # torch keeps it under this name for its own forward pass.
        return list(self.layer._reversed_padding_repeated_twice)  # noqa: SLF001

    @cached_property
    def _padding(self) -> list[int]:
        return (
            [0] * len(self._kernel)
            if any(self._own_padding) or isinstance(self.layer.padding, str)
            else list(self.layer.padding)
        )

    @property
    def _kernel(self) -> tuple[int, ...]:
        return self.layer.kernel_size

    def _seen_by_elements(self, positions: torch.Size) -> product:
        """Say for each element of the kernel which pixels it sees, along each axis, over all positions."""
        axes = zip(self._kernel, positions, self.layer.stride, self.layer.dilation, strict=True)
        return product(
            *(
                [slice(k * dilation, k * dilation + (count - 1) * stride + 1, stride) for k in range(size)]
                for size, count, stride, dilation in axes
            )
        )
