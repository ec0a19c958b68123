"""The check of the first batch: per-unit gradients against autograd's."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from whence.engine._base import AbstractLayerFactors
from whence.engine.capture import AbstractSink, Capture, Outputs, some_of
from whence.errors import UnsupportedModelError

TOLERANCES = {
    torch.float64: (1e-8, 1e-12),
    torch.float32: (1e-3, 1e-5),
    torch.float16: (3e-2, 1e-3),
    torch.bfloat16: (1e-1, 1e-2),
}
"""How far a gradient may be off: relative to itself, and to all gradients, by the coarsest type of the pass.

Rounding differs with the order of summation and with the size of the batch. A gradient that is zero in exact arithmetic
(a key's bias under softmax) is all rounding, hence the second. In half precision activations are rounded too, as are
autograd's weight gradients: of the networks in tests/engine/test_models.py under bfloat16, those that were off by more
than 3 percent of themselves were off by less than 0.001 of all gradients. A model that mixes samples is off by more.
"""


class GradientCheck(AbstractSink):
    """A sink that keeps what can be compared with autograd: the sum over all units, and some units' own gradients.

    Args:
        units: Which units' gradients are kept.
    """

    def __init__(self, units: Sequence[int] = ()):
        self.sums: dict[str, Tensor] = {}
        self.alone: dict[int, dict[str, Tensor]] = {unit: {} for unit in units}

    def consume(self, factors: AbstractLayerFactors, names: dict[str, str]) -> None:
        """Keep one layer's part."""
        for own, name in names.items():
            self.sums[name] = factors.gradients[own].sum(0)
            for unit, gradients in self.alone.items():
                gradients[name] = factors.gradients[own][unit].clone()


@torch.enable_grad()
def check_against_autograd(capture: Capture, outputs: Outputs, num_events: int, num_units: int) -> None:
    """Compare the units' gradients with autograd's, parameter by parameter.

    Run on the first batch of every run: a model that does something unforeseen is refused before it is attributed. The
    sum over all units must be autograd's gradient of the batch; and those of the first and the last unit must be what
    they are when the unit goes through the model alone, which a model that mixes samples does not keep.

    Args:
        capture: The capture in use.
        outputs: Makes a forward pass of some of the events and gives one number per event.
        num_events: Events of the batch.
        num_units: Units of the batch.

    Raises:
        UnsupportedModelError: If a parameter's gradients differ; all of them are listed.
    """
    check = GradientCheck(units=sorted({0, num_units - 1}))
    capture.run(outputs, num_events, num_units, [check])
    faults = _differences(capture, check.sums, outputs(slice(0, num_events)))
    # What runs each unit alone can only be off where a unit alone is something else.
    elsewhere = [fault for name, fault in faults.items() if name not in capture.uncovered]
    if elsewhere:
        raise UnsupportedModelError(
            f"Per-sample gradients do not add up to autograd's for {len(elsewhere)} parameters{some_of(elsewhere)}. "
            "The model uses these outside their layer's own forward pass, mixes samples in it, or gives another "
            "result each time (dropout). Leave them out by naming the others with --parameters."
        )
    members = num_events // num_units
    for unit, gradients in check.alone.items():
        faults |= _differences(capture, gradients, outputs(slice(unit * members, (unit + 1) * members)))
    if faults:
        raise UnsupportedModelError(
            f"The gradient of a sample depends on the other samples of its batch, for {len(faults)} parameters"
            f"{some_of(list(faults.values()))}. Per-sample gradients mean nothing where the model mixes samples (a "
            "mean over the batch) or gives another result each time (dropout)."
        )


def _differences(capture: Capture, found: dict[str, Tensor], outputs: Float[Tensor, " event"]) -> dict[str, str]:
    """Find the parameters whose gradient is not autograd's gradient of the sum of ``outputs``."""
    parameters = list(capture.parameters.values())
    wanted = torch.autograd.grad(outputs.sum(), parameters, materialize_grads=True)
    wanted = [want.to_dense() for want in wanted]  # an embedding's may be sparse
    total = sum(float(want.double().square().sum()) for want in wanted) ** 0.5
    coarsest = max(capture.arithmetic, *(p.dtype for p in parameters), key=lambda dtype: torch.finfo(dtype).eps)
    if coarsest == torch.float32 and parameters[0].device.type != "cpu":
        coarsest = torch.float16  # TensorFloat32, the default of convolutions on a GPU, has as many digits
    relative, absolute = TOLERANCES[coarsest]
    faults = {}
    for name, want in zip(capture.parameters, wanted, strict=True):
        error = float((found.get(name, torch.zeros_like(want)) - want).double().norm())
        if not error <= relative * float(want.double().norm()) + absolute * total:
            faults[name] = f"{name} (off by {error:.2g} of {float(want.norm()):.2g})"
    return faults
