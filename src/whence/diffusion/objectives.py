"""Output functions: one number per event, whose gradient is attributed.

Every loss is the mean over the elements of one sample, so that its size does not depend on the resolution, and a batch
mean of it is what ``diffusers`` training scripts minimise. Outputs other than the loss are functions of the prediction
alone (D-TRAK: Zheng et al. 2024, arXiv:2311.00500), for v and x0 prediction as for that of the noise:

    squares   mean of y^2      D-TRAK's own                  l1    mean of |y|
    mean      mean of y        DAS's (Lin et al. 2025)       l2    root of the mean of y^2
                                                             max   largest |y|
"""

import math
from typing import get_args

import torch
from jaxtyping import Float
from torch import Tensor

from whence.config import LossName, OutputName
from whence.errors import ConfigError


def sample_loss(
    prediction: Float[Tensor, "event *shape"], target: Float[Tensor, "event *shape"], loss: LossName
) -> Float[Tensor, " event"]:
    """Compare predictions with targets.

    Args:
        prediction: What the network gave.
        target: What it should have given.
        loss: ``mse`` for the mean squared, ``l1`` for the mean absolute error.

    Returns:
        One loss per event.

    Raises:
        ConfigError: If the loss is unknown.
    """
    error = prediction - target
    match loss:
        case "mse":
            elements = error.square()
        case "l1":
            elements = error.abs()
        case unknown:
            raise ConfigError(f"Unknown loss {unknown!r}; known are {', '.join(get_args(LossName))}.")
    return elements.flatten(start_dim=1).mean(dim=1)


def sample_output(
    prediction: Float[Tensor, "event *shape"],
    target: Float[Tensor, "event *shape"],
    output: OutputName,
    loss: LossName,
) -> Float[Tensor, " event"]:
    """Make one number of each prediction.

    Args:
        prediction: What the network gave.
        target: What it should have given; of no account but for the loss.
        output: Output function.
        loss: Training loss.

    Returns:
        One number per event.

    Raises:
        ConfigError: If the output or the loss is unknown.
    """
    elements = prediction.flatten(start_dim=1)
    match output:
        case "loss":
            return sample_loss(prediction, target, loss)
        case "squares":
            return elements.square().mean(dim=1)
        case "mean":
            return elements.mean(dim=1)
        case "l1":
            return elements.abs().mean(dim=1)
        case "l2":
            return torch.linalg.vector_norm(elements, dim=1) / math.sqrt(elements.shape[1])
        case "max":
            return elements.abs().amax(dim=1)
        case unknown:
            raise ConfigError(f"Unknown output {unknown!r}; known are {', '.join(get_args(OutputName))}.")
