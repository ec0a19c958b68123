r"""The forward noising process of a discrete-time diffusion model.

    x_t = alpha_t x_0 + sigma_t noise,      alpha_t^2 + sigma_t^2 = 1

``sigma`` is the standard deviation of the noise inside x_t; ``timestep`` an integer in 0..T-1. Whatever a model
predicts (noise, velocity, clean image), its training target is made here and nowhere else.
"""

import hashlib
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
import torch
from jaxtyping import Float, Int, Int64
from numpy import ndarray
from torch import Tensor

from whence.config import PredictionType
from whence.errors import ConfigError, UnsupportedModelError


@dataclass(frozen=True)
class NoiseProcess:
    """Signal and noise level of every timestep, and what the model is trained to predict."""

    alpha: Float[Tensor, " timestep"]
    """Factor of the clean image, sqrt of the cumulative product of 1 - beta."""
    sigma: Float[Tensor, " timestep"]
    """Factor of the noise."""
    prediction_type: PredictionType

    @classmethod
    def from_scheduler(cls, scheduler: Any) -> "NoiseProcess":
        """Read the process off a ``diffusers`` scheduler with discrete timesteps (DDPM, DDIM and their like).

        Returns:
            Its levels in float64 on the CPU.

        Raises:
            UnsupportedModelError: If the scheduler has no ``alphas_cumprod`` (flow matching), or its prediction type is
                not one of epsilon, v_prediction and sample.
        """
        name = type(scheduler).__name__
        if getattr(scheduler, "alphas_cumprod", None) is None:
            raise UnsupportedModelError(
                f"whence needs a scheduler with discrete timesteps and alphas_cumprod; {name} has none (flow matching "
                "is not supported yet). Train or trace with a DDPMScheduler."
            )
        prediction_type = scheduler.config.prediction_type
        if prediction_type not in get_args(PredictionType):
            raise UnsupportedModelError(
                f"{name} has prediction_type {prediction_type!r}; known are {', '.join(get_args(PredictionType))}."
            )
        signal_power = scheduler.alphas_cumprod.detach().cpu().double()
        return cls(signal_power.sqrt(), (1 - signal_power).sqrt(), prediction_type)

    @property
    def content_hash(self) -> str:
        """Hash of everything that a noisy image or a target depends on."""
        return hashlib.sha256(self.prediction_type.encode() + self.alpha.numpy().tobytes()).hexdigest()

    @property
    def num_timesteps(self) -> int:
        """Timesteps T of the process."""
        return len(self.alpha)

    def add_noise(
        self,
        clean: Float[Tensor, "event *shape"],
        noise: Float[Tensor, "event *shape"],
        timesteps: Int[Tensor, " event"],
    ) -> Float[Tensor, "event *shape"]:
        """Give x_t, what the network sees."""
        alpha, sigma = self._levels(timesteps, clean)
        return alpha * clean + sigma * noise

    def target(
        self,
        clean: Float[Tensor, "event *shape"],
        noise: Float[Tensor, "event *shape"],
        timesteps: Int[Tensor, " event"],
    ) -> Float[Tensor, "event *shape"]:
        """Give what the network should predict: noise, alpha noise - sigma x_0 (velocity), or x_0."""
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "sample":
            return clean
        alpha, sigma = self._levels(timesteps, clean)
        return alpha * noise - sigma * clean

    def _levels(self, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Look up alpha and sigma with axes that broadcast over an event."""
        shape = (-1,) + (1,) * (like.ndim - 1)
        index = timesteps.to(self.alpha.device)
        return self.alpha[index].to(like).view(shape), self.sigma[index].to(like).view(shape)


def even_timesteps(first: int, last: int, count: int) -> Int[Tensor, " timestep"]:
    """Give ``count`` timesteps spread evenly from ``first`` to ``last``, both included.

    They are rounded to integers, halves to the even one. One timestep alone is the middle one.

    Returns:
        Timesteps in ascending order.

    Raises:
        ConfigError: If there are not so many different timesteps.

    Example:
        >>> even_timesteps(1, 999, 5).tolist()
        [1, 250, 500, 750, 999]
    """
    if count > last - first + 1:
        raise ConfigError(
            f"There are only {last - first + 1} timesteps from {first} to {last}; {count} were asked for."
        )
    if count == 1:
        return torch.tensor([(first + last) // 2])
    return torch.linspace(first, last, count, dtype=torch.float64).round().long()


def nearest_timesteps(timesteps: Int[ndarray, " point"], wanted: Int[ndarray, " event"]) -> Int64[ndarray, " event"]:
    """Find the nearest of some ascending timesteps; halfway between two, it is the one with less noise.

    Returns:
        Positions in ``timesteps``.

    Example:
        >>> nearest_timesteps(np.array([1, 5, 9]), np.array([0, 3, 4, 30])).tolist()
        [0, 0, 1, 2]
    """
    return np.searchsorted((timesteps[1:] + timesteps[:-1]) / 2, wanted)
