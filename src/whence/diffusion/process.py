r"""The forward noising process of a diffusion or flow-matching model, on a table of T timesteps.

    what the network sees        alpha_t x_0 + sigma_t noise'
    what it should answer        a_t x_0 + b_t noise

A *timestep* is a row 0..T-1 of the table, from least noise to most; ``model_time`` is what the network is told of it.
All kinds of models differ in the tables alone:

    prediction type   alpha, sigma                         target                       of
    epsilon           alpha^2 + sigma^2 = 1                noise                        DDPM (Ho et al. 2020)
    v_prediction      alpha^2 + sigma^2 = 1                alpha noise - sigma x_0      Salimans & Ho 2022
    sample            alpha^2 + sigma^2 = 1                x_0
    flow              alpha = 1 - sigma                    noise - x_0                  rectified flow, SD3, FLUX
    edm               c_in, c_in sigma                     (x_0 - c_skip x_t) / c_out   Karras et al. 2022

``noise'`` is ``noise`` but under input perturbation. Whatever the training target, it is made here and nowhere else.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, get_args

import numpy as np
import torch
from jaxtyping import Float, Float32, Int, Int64
from numpy import ndarray
from torch import Tensor

from whence.config import ObjectiveSettings, PredictionType, TargetName, WeightingScheme
from whence.diffusion.noise import derived_key, drawn_timestep, normals_of_keys, scalar_draws
from whence.diffusion.weighting import flow_weights, min_snr_weights, place_in_schedule
from whence.errors import ConfigError, UnsupportedModelError, check_choice

_PLAIN = ObjectiveSettings()


@dataclass(frozen=True)
class NoiseProcess:
    """Signal and noise level of every timestep, and what the model is trained to predict."""

    alpha: Float[Tensor, " timestep"]
    """Factor of the clean image."""
    sigma: Float[Tensor, " timestep"]
    """Factor of the noise."""
    prediction_type: TargetName
    model_time: Tensor
    """What the network is told: T integers, or T floats of the scheduler."""
    objective: ObjectiveSettings = field(default_factory=ObjectiveSettings)
    """What the training script added."""
    target_sign: int = 1
    """-1 where an EDM model predicts the negative, as those with v_prediction do."""

    @classmethod
    def from_scheduler(cls, scheduler: Any, objective: ObjectiveSettings = _PLAIN) -> "NoiseProcess":
        """Read the process off a ``diffusers`` scheduler: DDPM and its like, flow matching, or EDM.

        Args:
            scheduler: As made from its configuration; one that has been told to sample in a few steps is not.
            objective: What the training script added to noise and loss.

        Returns:
            Its levels in float64 on the CPU.

        Raises:
            UnsupportedModelError: If the scheduler is of neither kind, or its prediction type is not known.
            ConfigError: If the objective does not fit the kind.
        """
        name = type(scheduler).__name__
        if name.startswith("FlowMatch"):
            process = _flow_process(scheduler, objective)
        elif name.startswith("EDM"):
            process = _edm_process(scheduler, objective)
        elif getattr(scheduler, "alphas_cumprod", None) is not None:
            process = _discrete_process(scheduler, objective)
        else:
            raise UnsupportedModelError(
                f"whence needs a scheduler with alphas_cumprod, of flow matching or of EDM; {name} is neither. Give "
                "the scheduler of the training, such as DDPMScheduler or FlowMatchEulerDiscreteScheduler."
            )
        _check_objective(process, name)
        return process

    @property
    def content_hash(self) -> str:
        """Hash of everything that a noisy image, a target or a weight depends on."""
        digest = hashlib.sha256(self.prediction_type.encode() + self.alpha.numpy().tobytes())
        if self.prediction_type in ("flow", "edm"):
            digest.update(f"{self.target_sign}".encode() + self.sigma.numpy().tobytes())
            digest.update(self.model_time.numpy().tobytes())
        if self.objective != _PLAIN:
            digest.update(repr(self.objective).encode())
        return digest.hexdigest()

    @property
    def num_timesteps(self) -> int:
        """Timesteps T of the process."""
        return len(self.alpha)

    @cached_property
    def loss_weight(self) -> Float[Tensor, " timestep"]:
        """Factor inside the training loss at each timestep."""
        if self.prediction_type == "flow":
            return flow_weights(self.sigma, self.objective)
        if self.objective.snr_gamma is not None:
            return min_snr_weights(self.alpha, self.sigma, self.objective.snr_gamma, self.prediction_type)
        return torch.ones_like(self.alpha)

    def drawn_timestep(self, key: int) -> int:
        """Give the timestep that a noise key draws, from the density of the training."""
        if self.prediction_type != "flow":
            return drawn_timestep(key, self.num_timesteps)
        # Scripts count from most noise to least, and their draws are meant so.
        place = place_in_schedule(scalar_draws(key), self.objective)
        return self.num_timesteps - 1 - int(place * self.num_timesteps)

    def noise(
        self, keys: Sequence[int] | ndarray, shape: tuple[int, ...]
    ) -> tuple[Float32[ndarray, "event *shape"], Float32[ndarray, "event *shape"]]:
        """Draw the noise of some keys.

        Args:
            keys: Noise keys.
            shape: Of one sample.

        Returns:
            What the target is made of, and what the noisy image is made of: the same but under input perturbation.
        """
        noise = normals_of_keys(keys, shape)
        asked = self.objective
        if asked.noise_offset:
            shifts = normals_of_keys(
                [derived_key(int(k), "offset") for k in keys], (shape[0],) + (1,) * (len(shape) - 1)
            )
            noise = noise + np.float32(asked.noise_offset) * shifts
        if not asked.input_perturbation:
            return noise, noise
        more = normals_of_keys([derived_key(int(k), "perturbation") for k in keys], shape)
        return noise, noise + np.float32(asked.input_perturbation) * more

    def add_noise(
        self,
        clean: Float[Tensor, "event *shape"],
        noise: Float[Tensor, "event *shape"],
        timesteps: Int[Tensor, " event"],
    ) -> Float[Tensor, "event *shape"]:
        """Give x_t, what the network sees."""
        return _at(self.alpha, timesteps, clean) * clean + _at(self.sigma, timesteps, clean) * noise

    def target(
        self,
        clean: Float[Tensor, "event *shape"],
        noise: Float[Tensor, "event *shape"],
        timesteps: Int[Tensor, " event"],
    ) -> Float[Tensor, "event *shape"]:
        """Give what the network should answer; the table at the top of this module."""
        match self.prediction_type:
            case "epsilon":
                return noise
            case "sample":
                return clean
            case "flow":
                return noise - clean
            case "v_prediction":
                return _at(self.alpha, timesteps, clean) * noise - _at(self.sigma, timesteps, clean) * clean
            case "edm":
                # With c_in = 1 / sqrt(s^2 + d^2), alpha = c_in and sigma = c_in s, all comes down to these and d.
                level = self.sigma / self.alpha
                data = (1 / self.alpha.square() - level.square()).clamp(min=0).sqrt()
                of_clean = _at(self.sigma / data, timesteps, clean) * clean
                return self.target_sign * (of_clean - _at(data * self.alpha, timesteps, clean) * noise)

    def times(self, timesteps: Int[Tensor, " event"]) -> Tensor:
        """Look up what the network is told of timesteps."""
        return self.model_time.to(timesteps.device)[timesteps]


def _discrete_process(scheduler: Any, objective: ObjectiveSettings) -> NoiseProcess:
    prediction_type = scheduler.config.prediction_type
    if prediction_type not in get_args(PredictionType):
        raise UnsupportedModelError(
            f"{type(scheduler).__name__} has prediction_type {prediction_type!r}; known are "
            f"{', '.join(get_args(PredictionType))}."
        )
    signal_power = scheduler.alphas_cumprod.detach().cpu().double()
    alpha, sigma = signal_power.sqrt(), (1 - signal_power).sqrt()
    return NoiseProcess(alpha, sigma, prediction_type, torch.arange(len(alpha)), objective)


def _flow_process(scheduler: Any, objective: ObjectiveSettings) -> NoiseProcess:
    times, sigma = _whole_schedule(scheduler)
    return NoiseProcess(1 - sigma, sigma, "flow", times, objective)


def _edm_process(scheduler: Any, objective: ObjectiveSettings) -> NoiseProcess:
    times, level = _whole_schedule(scheduler)
    c_in = 1 / (level.square() + scheduler.config.sigma_data**2).sqrt()
    sign, kind = {"epsilon": 1, "v_prediction": -1}, scheduler.config.prediction_type
    if kind not in sign:
        raise UnsupportedModelError(f"{type(scheduler).__name__} has prediction_type {kind!r}; known are {list(sign)}.")
    return NoiseProcess(c_in, c_in * level, "edm", times, objective, sign[kind])


def _whole_schedule(scheduler: Any) -> tuple[Tensor, Float[Tensor, " timestep"]]:
    """Give times and noise levels from least noise to most, as many as there are timesteps in training.

    Returns:
        Times, and levels in float64.

    Raises:
        UnsupportedModelError: If the scheduler has been told to sample in fewer steps.
    """
    count = scheduler.config.num_train_timesteps
    if not count <= len(scheduler.timesteps) <= count + 1:  # EDM's have one more, which training never draws
        raise UnsupportedModelError(
            f"This {type(scheduler).__name__} was set to sample in {len(scheduler.timesteps)} steps; training has "
            f"{count}. Give a copy made by from_config, as training scripts do."
        )
    times, sigmas = (values.detach().cpu()[:count].flip(0) for values in (scheduler.timesteps, scheduler.sigmas))
    return times, sigmas.double()


def _check_objective(process: NoiseProcess, scheduler_name: str) -> None:
    """Refuse settings that have no effect on this kind of model: they were meant for another one."""
    asked, faults = process.objective, []
    check_choice("weighting_scheme", asked.weighting_scheme, WeightingScheme)
    if process.prediction_type in ("flow", "edm") and asked.snr_gamma is not None:
        faults.append("snr_gamma weighs models of noise, v or clean images")
    if process.prediction_type != "flow" and asked.weighting_scheme != "none":
        faults.append(f"weighting_scheme {asked.weighting_scheme} is of flow matching")
    if process.prediction_type != "flow" and asked.precondition_outputs:
        faults.append("precondition_outputs is of flow matching")
    if faults:
        raise ConfigError(f"With a {scheduler_name}: {'; '.join(faults)}. Leave it out, or give the other scheduler.")
    wrong = [
        f"{name} must not be negative"
        for name in ("noise_offset", "input_perturbation")
        if not getattr(asked, name) >= 0
    ]
    if asked.snr_gamma is not None and not asked.snr_gamma > 0:
        wrong.append("snr_gamma must be above 0")
    if wrong:
        raise ConfigError(f"{'; '.join(wrong)}; found {asked}.")


def _at(table: Tensor, timesteps: Tensor, like: Tensor) -> Tensor:
    """Look up a table with axes that broadcast over an event."""
    return table[timesteps.to(table.device)].to(like).view(-1, *(1,) * (like.ndim - 1))


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
            f"There are only {last - first + 1} timesteps from {first} to {last}; {count} were asked for. Ask for "
            "fewer with --timesteps, of training images with --train-timesteps."
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
