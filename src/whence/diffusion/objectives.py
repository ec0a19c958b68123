"""Output functions: one number per event, whose gradient is attributed.

Every loss is the mean over the elements of one sample, so that its size does not depend on the resolution, and a batch
mean of it is what ``diffusers`` training scripts minimise.
"""

from typing import get_args

from jaxtyping import Float
from torch import Tensor

from whence.config import LossName
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
