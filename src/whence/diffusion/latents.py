"""Scaling of latents: a network sees them less a shift and times a scale, both of which the VAE's config gives."""

from typing import Any

import torch
from jaxtyping import Float32
from torch import Tensor


def latent_scaling(config: Any) -> tuple[Float32[Tensor, "*shape"], Float32[Tensor, "*shape"]]:
    """Say how latents are brought to what a network is trained on.

    Where the VAE has a mean and a deviation for each channel of its latents (``latents_mean``, ``latents_std``, as that
    of Playground 2.5), latents are standardised by these before they are multiplied with its ``scaling_factor``.

    Args:
        config: Configuration of a VAE of ``diffusers``.

    Returns:
        What is taken off latents, and what they are then multiplied with: single numbers, or one for each channel, with
        axes channel, 1, 1.
    """
    factor = torch.tensor(float(config.scaling_factor or 1.0))
    mean, deviation = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
    if mean is not None and deviation is not None:
        return torch.tensor(mean).view(-1, 1, 1), factor / torch.tensor(deviation).view(-1, 1, 1)
    return torch.tensor(float(getattr(config, "shift_factor", None) or 0.0)), factor
