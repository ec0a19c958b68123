"""Number types of a pass: autocast of the forward half, TensorFloat32, and outputs scaled for half precision.

Weights, captured gradients, norms and dot products keep the type of the parameters; only what the network computes
inside its layers is of the coarser type.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from whence.config import AutocastName

_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(name: AutocastName, device: str | torch.device) -> AbstractContextManager[Any]:
    """Give the context in which a forward pass runs."""
    if name == "no":
        return nullcontext()
    return torch.autocast(torch.device(device).type, _TYPES[name])


def output_scale(name: AutocastName, num_elements: int) -> float:
    """Give the power of two that a sample's loss is multiplied with before the backward pass.

    The mean over a sample's elements divides the gradient of each by their number, and what follows in the network is
    smaller still, below what float16 can tell from zero. With this factor the gradient of an element is of the order of
    its error. A power of two is taken out again without rounding.

    Args:
        name: Autocast type.
        num_elements: Elements of a sample.

    Returns:
        The factor; 1 for types with the exponents of float32.
    """
    return float(1 << (num_elements.bit_length() - 1)) if name == "fp16" else 1.0


@contextmanager
def tensor_float_32(allowed: bool) -> Iterator[None]:
    """Let CUDA multiply float32 with the digits of TensorFloat32 or not, and leave the switches as they were.

    PyTorch lets convolutions do so by default: 10 bits of mantissa instead of 23.
    """
    switches: list[Any] = [torch.backends.cuda.matmul, torch.backends.cudnn]
    before = [switch.allow_tf32 for switch in switches]
    try:
        for switch in switches:
            switch.allow_tf32 = allowed
        yield
    finally:
        for switch, value in zip(switches, before, strict=True):
            switch.allow_tf32 = value
