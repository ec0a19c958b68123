r"""How a training draws its timesteps and weighs its loss, as functions of the noise level.

    min-SNR        min(SNR, gamma) / SNR for noise, / (SNR + 1) for v, min(SNR, gamma) for x0      Hang et al. 2023
    sigma_sqrt     sigma^-2                                                                        Esser et al. 2024
    cosmap         2 / (pi (1 - 2 sigma + 2 sigma^2))                                              Esser et al. 2024
    logit_normal   u = sigmoid(normal(mean, std)),  u in 0..1 from most noise to least             Esser et al. 2024
    mode           u' = 1 - u - scale (cos^2(pi u / 2) - 1 + u)                                    Esser et al. 2024

(arXiv:2303.09556, arXiv:2403.03206.) Whatever a scheme does to the loss is one factor for each timestep.
"""

import math

import numpy as np
import torch
from jaxtyping import Float, Float64
from numpy import ndarray
from torch import Tensor

from whence.config import ObjectiveSettings, TargetName
from whence.errors import ConfigError


def min_snr_weights(
    alpha: Float[Tensor, " timestep"], sigma: Float[Tensor, " timestep"], gamma: float, target: TargetName
) -> Float[Tensor, " timestep"]:
    """Give the min-SNR weight of each timestep, with SNR = alpha^2 / sigma^2.

    Args:
        alpha: Factor of the clean image.
        sigma: Factor of the noise.
        gamma: Where the weight stops growing.
        target: What the model predicts: epsilon, v_prediction or sample.

    Returns:
        Factors of the squared error of the prediction.

    Raises:
        ConfigError: If the model predicts something else.
    """
    snr = (alpha / sigma).square()
    clipped = snr.clamp(max=gamma)
    match target:
        case "epsilon":
            return torch.where(snr > 0, clipped / snr, torch.ones_like(snr))
        case "v_prediction":
            return clipped / (snr + 1)
        case "sample":
            return clipped
        case other:
            raise ConfigError(
                f"Min-SNR weights are for models of noise, v or clean images; this one has {other}. Leave snr_gamma "
                "out; flow matching is weighted by weighting_scheme."
            )


def flow_weights(sigma: Float[Tensor, " timestep"], settings: ObjectiveSettings) -> Float[Tensor, " timestep"]:
    """Give the weight of each timestep in a loss of flow matching.

    Args:
        sigma: Factor of the noise.
        settings: Scheme, and whether the loss compares clean images.

    Returns:
        Factors of the squared error of the velocity.
    """
    match settings.weighting_scheme:
        case "sigma_sqrt":
            weights = sigma**-2.0
        case "cosmap":
            weights = 2 / (math.pi * (1 - 2 * sigma + 2 * sigma.square()))
        case _:
            weights = torch.ones_like(sigma)
    return weights * sigma.square() if settings.precondition_outputs else weights


def place_in_schedule(uniforms: Float64[ndarray, " scalar"], settings: ObjectiveSettings) -> float:
    """Draw where in the schedule a visit lies.

    Args:
        uniforms: Independent uniforms in [0, 1); the first and the third are used.
        settings: The scheme.

    Returns:
        A number in [0, 1), from most noise to least.
    """
    first, other = float(uniforms[0]), float(uniforms[2])
    match settings.weighting_scheme:
        case "logit_normal":
            normal = math.sqrt(-2 * math.log(1 - first)) * math.cos(2 * math.pi * other)
            place = 1 / (1 + math.exp(-(settings.logit_mean + settings.logit_std * normal)))
        case "mode":
            place = 1 - first - settings.mode_scale * (math.cos(math.pi * first / 2) ** 2 - 1 + first)
        case _:
            place = first
    return min(max(place, 0.0), float(np.nextafter(1.0, 0.0)))
