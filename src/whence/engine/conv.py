"""Convolutions: the weight gradient of a unit is G^T A, A the input unfolded into the patches that the kernel sees.

Where a unit has many positions nothing is unfolded: the weight gradient of many units is that of *one* convolution with
a group for each unit, which runs at the speed of training's own if the channels of a group fill vector instructions;
zeros see to that. Where positions are few such a convolution has little to work on, and on a GPU it is slow in any
case: there patches are gathered and multiplied. A projected ``A`` is the result of a small random convolution; and the
Gram matrix of patches is a sum, over the elements of the kernel, of shifted views of the Gram matrix of pixels.

A transposed convolution is a convolution from its output to its input: the patches are those of its output gradients,
and its inputs take their part.
"""

from functools import cache, cached_property
from itertools import product
from math import inf, prod

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from whence.engine._base import PER_GATHERED, PER_PAIR, PER_PRODUCT, Call, MatrixLayerFactors, add_up, numbers_at_once

_CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_BACKWARD = torch.ops.aten.convolution_backward.default

_CHANNELS = 8
"""A convolution with groups has fast code for multiples of these (oneDNN 3.12: 3 outputs took 0.9 ms, 8 took 0.3)."""

_Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d


class ConvFactors(MatrixLayerFactors):
    """Gradients of a convolution or transposed convolution, with any stride, padding, dilation and groups.

    Of a transposed convolution the weight has the shape (in, out, kernel), so its *inputs* count as outputs here.
    """

    layer: _Convolution
    row_rate = 1.0

    def __init__(self, layer: nn.Module, calls: list[Call], num_units: int):
        super().__init__(layer, calls, num_units)
        self._kept_patches: dict[int, Float[Tensor, "event inner position"]] = {}

    def weight_rows(self, outputs: slice) -> Float[Tensor, "unit out inner"]:
        """Convolve as the backward pass of training does, each unit in a group of its own; or multiply patches."""
        make = self._gather if self._gathers else self._convolve
        all_grads = [grads for _, grads in self._factors]
        if outputs != slice(0, self.weight_shape[0]):
            all_grads = [grads[:, outputs] for grads in all_grads]
        return add_up([make(call, grads) for call, grads in enumerate(all_grads)])

    def bias(self) -> Float[Tensor, "unit out"]:
        """Add up the output gradients over positions and calls."""
        return add_up([self._sum_members(grads.flatten(2).sum(2)) for _, grads in self.calls])

    def gram_norm_squared(self) -> Float[Tensor, " unit"]:
        """Compare all pairs of positions: of their patches and of their output gradients."""
        ((image, grads),) = self._factors
        by_patches, by_pixels = self._gram_costs
        if by_patches < by_pixels:
            seen, out = self._all_patches(0), grads.flatten(2)
            return ((seen.mT @ seen) * (out.mT @ out)).sum((1, 2))
        image = self._padded(image)
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
        kernel = inner.T.unflatten(1, self.weight_shape[1:])
        kernel = kernel if groups == 1 else kernel.repeat(groups, *[1] * (len(self._kernel) + 1))
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
        """Gather the patches; of a layer with groups, those of each group are positions of their own."""
        groups = self.layer.groups
        return [
            (
                self._patches(image, grads).unflatten(1, (groups, -1)).mT.flatten(1, 2),
                grads.flatten(2).unflatten(1, (groups, -1)).mT.flatten(1, 2),
            )
            for image, grads in self._factors
        ]

    @property
    def positions(self) -> int:
        """Positions of a unit, over all calls."""
        return sum(grads.shape[0] * prod(grads.shape[2:]) for _, grads in self._factors) // self.num_units

    @property
    def gram_cost(self) -> float:
        """Cost of the cheaper of two ways."""
        if self._factors[0][0].shape[0] != self.num_units or self.layer.groups > 1:
            return inf
        return min(self._gram_costs)

    @cached_property
    def _gram_costs(self) -> tuple[float, float]:
        """Cost of gathering patches and multiplying them, and of multiplying pixels and adding shifted products."""
        ((image, grads), *_) = self._factors
        num_channels, num_elements = image.shape[1], prod(self._kernel)
        num_pixels = prod(size + 2 * p for size, p in zip(image.shape[2:], self._padding, strict=True))
        num_positions = prod(grads.shape[2:])
        pairs = num_positions**2
        by_patches = num_positions * PER_GATHERED + pairs * PER_PRODUCT
        by_pixels = PER_PRODUCT * num_pixels**2 * num_channels + PER_PAIR * pairs * (num_elements + 1)
        of_grads = PER_PRODUCT * pairs * grads.shape[1]
        return by_patches * num_channels * num_elements + of_grads, by_pixels + of_grads

    @property
    def outputs_at_once(self) -> int:
        """Outputs in one piece of the weight gradient; all of them where they fall into groups."""
        return super().outputs_at_once if self.layer.groups == 1 else self._sizes[0]

    def _convolve(self, call: int, grads: Float[Tensor, "event out *size2"]) -> Float[Tensor, "unit out inner"]:
        image = self._factors[call][0]
        num_events, num_out = grads.shape[:2]
        if num_events == self.num_units or num_out == self.weight_shape[0]:
            # Members are the batch of the convolution. That takes a copy where units have several.
            rows = self._weight_gradient(self._side_by_side(image), self._side_by_side(grads), self.num_units)
        else:
            per_unit = zip(self._per_unit(image), self._per_unit(grads), strict=True)
            rows = torch.cat([self._weight_gradient(a, g, 1) for a, g in per_unit])
        return rows[:, :num_out].flatten(2)

    def _side_by_side(self, events: Float[Tensor, "event channel *size"]) -> Float[Tensor, "member channel2 *size"]:
        """Lay the units side by side as groups of channels, filled up to what runs fast."""
        num_channels, sizes = events.shape[1], events.shape[2:]
        if self.layer.groups == 1 and num_channels % _CHANNELS:
            events = F.pad(events, [0, 0] * len(sizes) + [0, -num_channels % _CHANNELS])
        if events.shape[0] > self.num_units:
            events = self._per_unit(events).transpose(0, 1)
        return events.reshape(-1, self.num_units * events.shape[-1 - len(sizes)], *sizes)

    def _weight_gradient(
        self, image: Float[Tensor, "batch unit_in *size"], grads: Float[Tensor, "batch unit_out *size2"], num_units: int
    ) -> Float[Tensor, "unit out inner *kernel"]:
        groups = num_units * self.layer.groups
        # Only the shape of the weight is looked at.
        weight = image.new_empty(()).expand(grads.shape[1], image.shape[1] // groups, *self._kernel)
        rows = _BACKWARD(
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
        return rows.unflatten(0, (num_units, -1))[:, :, : self.weight_shape[1]]

    @property
    def _gathers(self) -> bool:
        """Whether gradients are made of patches: on a GPU always, on a CPU where a unit has few positions."""
        if self.layer.groups > 1:
            return False
        few = self.positions < self.weight_shape[0] * len(self.calls)
        return few or self._is_pointwise or self.device.type != "cpu"

    @property
    def _is_pointwise(self) -> bool:
        """Whether a position sees its own pixel alone, as in a fully connected layer."""
        return {*self._kernel, *self.layer.stride} == {1} and not any(self._padding)

    def _patches(
        self, image: Float[Tensor, "event in *size"], grads: Float[Tensor, "event out *size2"]
    ) -> Float[Tensor, "event group_inner position"]:
        """Give what each position sees."""
        if self._is_pointwise:
            return image.flatten(2)
        image = self._padded(image)
        axes = zip(image.shape[2:], self._kernel, grads.shape[2:], self.layer.stride, self.layer.dilation, strict=True)
        seen = _pixels_seen(tuple(axes), image.device)
        gathered = image.flatten(2).gather(2, seen.expand(*image.shape[:2], -1))
        return gathered.view(image.shape[0], seen.shape[0] // prod(grads.shape[2:]) * image.shape[1], -1)

    def _padded(self, image: Float[Tensor, "event in *size"]) -> Float[Tensor, "event in *padded"]:
        """Add what the convolution itself would pad with."""
        if not any(self._padding):
            return image
        return F.pad(image, [p for padding in reversed(self._padding) for p in (padding, padding)])

    def _gather(self, call: int, grads: Float[Tensor, "event out *size2"]) -> Float[Tensor, "unit out inner"]:
        """Multiply patches, on a GPU of as many units as fit into memory."""
        out, members = grads.flatten(2), grads.shape[0] // self.num_units
        num_inner = prod(self.weight_shape[1:])
        at_once = max(1, numbers_at_once(grads.device) // (num_inner * out.shape[2] * members))
        if grads.device.type == "cpu" or at_once >= self.num_units:
            return self._multiply(out, self._all_patches(call))
        image, rows = self._factors[call][0], grads.new_empty(self.num_units, out.shape[1], num_inner)
        for start in range(0, self.num_units, at_once):
            units = slice(start, min(start + at_once, self.num_units))
            events = slice(units.start * members, units.stop * members)
            self._multiply(out[events], self._patches(image[events], grads), into=rows[units])
        return rows

    def _multiply(
        self,
        out: Float[Tensor, "event out position"],
        seen: Float[Tensor, "event inner position"],
        into: Float[Tensor, "unit out inner"] | None = None,
    ) -> Float[Tensor, "unit out inner"]:
        """Multiply output gradients with patches, and add up the members of each unit."""
        members = self.calls[0][0].shape[0] // self.num_units
        if members == 1:
            return torch.bmm(out, seen.mT, out=into)
        (num_out, num_positions), num_inner = out.shape[1:], seen.shape[1]
        if num_out * num_inner > (num_out + num_inner) * num_positions:
            # Fewer numbers are copied if the positions of all members are taken as one.
            out, seen = (x.unflatten(0, (-1, members)).transpose(1, 2).flatten(2) for x in (out, seen))
            return torch.bmm(out, seen.mT, out=into)
        return torch.sum((out @ seen.mT).unflatten(0, (-1, members)), 1, out=into)

    def _all_patches(self, call: int) -> Float[Tensor, "event inner position"]:
        """Gather the patches of all events, once for all outputs."""
        if call not in self._kept_patches:
            self._kept_patches[call] = self._patches(*self._factors[call])
        return self._kept_patches[call]

    @cached_property
    def _factors(self) -> list[tuple[Float[Tensor, "event in *size"], Float[Tensor, "event out *size2"]]]:
        """What is seen in patches, padded if the layer's own padding is not plain, and what it is multiplied with."""
        if self.layer.transposed:
            return [(grads, inputs) for inputs, grads in self.calls]
        if not any(self._own_padding):
            return self.calls
        mode = "constant" if self.layer.padding_mode == "zeros" else self.layer.padding_mode
        return [(F.pad(inputs, self._own_padding, mode=mode), grads) for inputs, grads in self.calls]

    @property
    def _own_padding(self) -> list[int]:
        """Padding of each side, last axis first, that the convolution itself cannot do."""
        if self.layer.padding_mode == "zeros" and not isinstance(self.layer.padding, str):
            return []
        # torch keeps it under this name for its own forward pass.
        return list(self.layer._reversed_padding_repeated_twice)  # noqa: SLF001

    @property
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


@cache
def _pixels_seen(axes: tuple[tuple[int, int, int, int, int], ...], device: torch.device) -> Int64[Tensor, " element"]:
    """Say which pixel each element of the kernel sees at each position.

    Args:
        axes: Size, kernel size, number of positions, stride and dilation along each axis; the size with its padding.
        device: Where it is wanted.

    Returns:
        Number of the pixel, by element of the kernel, then by position.
    """
    dims, where = len(axes), []
    for axis, (_, kernel, positions, stride, dilation) in enumerate(axes):
        seen = torch.arange(kernel)[:, None] * dilation + torch.arange(positions) * stride
        shape = [1] * (2 * dims)
        shape[axis], shape[dims + axis] = kernel, positions
        where.append(seen.view(shape))
    sizes = [size for size, *_ in axes]
    return torch.arange(prod(sizes)).view(sizes)[tuple(where)].flatten().to(device)
