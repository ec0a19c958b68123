"""Gradients where no layer kind helps: a layer, or the whole model, is run again one unit at a time.

This is exact by definition, and slow. A layer by itself costs little; the whole model costs as many further forward and
backward passes as there are units, each as small as a unit.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn

from whence.engine._base import AbstractLayerFactors, Call


class ReplayedFactors(AbstractLayerFactors):
    """Gradients of any layer that takes one tensor and gives one, from calling it again.

    Args:
        layer: The layer.
        calls: Its calls.
        num_units: Units in the batch.
        names: Its own names of the chosen parameters.
    """

    def __init__(self, layer: nn.Module, calls: list[Call], num_units: int, names: Sequence[str]):
        super().__init__(layer, calls, num_units)
        self.names = names

    def materialise(self) -> dict[str, Float[Tensor, "unit *shape"]]:
        """Run the layer's forward and backward pass for each unit."""
        parameters = [self.layer.get_parameter(name) for name in self.names]
        rows = gradients_by_unit(parameters, self._replay, self.num_units)
        return dict(zip(self.names, rows, strict=True))

    def _replay(self, unit: int) -> Float[Tensor, ""]:
        """Give a number whose gradient is the unit's."""
        parts = [[tensor.unflatten(0, (self.num_units, -1))[unit] for tensor in call] for call in self.calls]
        return torch.stack([(self.layer(inputs) * grads).sum() for inputs, grads in parts]).sum()


class MaterialisedFactors(AbstractLayerFactors):
    """Gradients that are there already.

    Args:
        model: The model.
        gradients: Each unit's gradients, by the parameter's name in the model.
        num_units: Units in the batch.
    """

    def __init__(self, model: nn.Module, gradients: Mapping[str, Float[Tensor, "unit *shape"]], num_units: int):
        super().__init__(model, [], num_units)
        self._gradients = dict(gradients)

    def materialise(self) -> dict[str, Float[Tensor, "unit *shape"]]:
        """Give them."""
        return self._gradients

    @property
    def device(self) -> torch.device:
        """Where the gradients are."""
        return next(iter(self._gradients.values())).device


def gradients_by_unit(
    parameters: Sequence[nn.Parameter], output: Callable[[int], Float[Tensor, ""]], num_units: int
) -> list[Float[Tensor, "unit *shape"]]:
    """Take the gradients of parameters, one unit at a time.

    Args:
        parameters: The parameters; no other is differentiated that does not require it.
        output: Runs a unit and gives one number.
        num_units: Units in the batch.

    Returns:
        One tensor per parameter, that of a single number with an axis of its own; zeros where an output does not
        depend on it.
    """
    rows = [p.new_zeros(num_units, *(p.shape or [1])) for p in parameters]
    with torch.enable_grad(), _requiring_grad(parameters):
        for unit in range(num_units):
            for row, gradient in zip(rows, _gradients(parameters, output(unit)), strict=True):
                if gradient is not None:
                    row[unit] = gradient.to_dense()  # an embedding's may be sparse
    return rows


def find_used(parameters: Sequence[nn.Parameter], output: Callable[[], Float[Tensor, ""]]) -> list[bool]:
    """Say which parameters a number is made of, by running what makes it."""
    with torch.enable_grad(), _requiring_grad(parameters):
        return [gradient is not None for gradient in _gradients(parameters, output())]


def _gradients(parameters: Sequence[nn.Parameter], output: Float[Tensor, ""]) -> Sequence[Tensor | None]:
    """Take a number's gradients; None where it does not depend on a parameter."""
    if not output.requires_grad:
        return [None] * len(parameters)
    return torch.autograd.grad(output, parameters, allow_unused=True)


@contextmanager
def _requiring_grad(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Let frozen parameters require a gradient for a while."""
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)
