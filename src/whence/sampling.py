"""Sampling images from a model, reproducibly: each from the noise of its own key."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32
from numpy import ndarray
from torch import Tensor

from whence.diffusion.adapters import predict
from whence.diffusion.noise import noise_key, normals_of_keys
from whence.progress import progress_bar


def sample_images(
    model: Any,
    scheduler: Any,
    ids: list[str],
    *,
    steps: int = 50,
    seed: int = 0,
    show_progress: bool = True,
    conditions: Mapping[str, Tensor] | None = None,
    keep: Callable[[int, Float32[ndarray, "sample channel height width"]], Any] | None = None,
) -> Float32[ndarray, "sample channel height width"]:
    """Sample with DDIM (eta = 0), so that an image depends on the model and its noise key alone.

    Args:
        model: A denoising model in evaluation mode.
        scheduler: The noise scheduler it was trained with.
        ids: Names of the samples; each gives its own first noise.
        steps: Denoising steps.
        seed: Seed of the noise.
        show_progress: Show a progress bar.
        conditions: What a conditional model is told, one row for each sample.
        keep: Called at each step with its timestep and what the sampler takes the images to be, clipped to [-1, 1].

    Returns:
        Images clipped to [-1, 1], never rounded to 8 bit.
    """
    import diffusers

    ddim: Any = diffusers.DDIMScheduler.from_config(scheduler.config, clip_sample=True)
    ddim.set_timesteps(steps)
    size = model.config.sample_size
    shape = (model.config.in_channels, *(size if isinstance(size, list | tuple) else (size, size)))
    first = scheduler.config.num_train_timesteps
    keys = [noise_key(seed, "trajectory", "query", i, first) for i in ids]
    images = torch.from_numpy(normals_of_keys(keys, shape)).to(model.device)
    with torch.no_grad(), progress_bar("sample", steps, "step", shown=show_progress) as bar:
        for timestep in ddim.timesteps:
            noise = predict(model, images, timestep.expand(len(ids)).to(model.device), conditions)
            made = ddim.step(noise, timestep, images, eta=0.0)
            images = made.prev_sample
            if keep is not None:
                keep(int(timestep), np.clip(made.pred_original_sample.cpu().numpy(), -1, 1))
            bar.update()
    return np.clip(images.cpu().numpy(), -1, 1)


def sample_in_parts(
    model: Any, scheduler: Any, ids: Sequence[str], *, steps: int, seed: int, batch_size: int
) -> Float32[ndarray, "sample channel height width"]:
    """Sample as :func:`sample_images` does, so many images at once, without a progress bar.

    Args:
        model: A denoising model in evaluation mode.
        scheduler: The noise scheduler it was trained with.
        ids: Names of the samples.
        steps: Denoising steps.
        seed: Seed of the noise.
        batch_size: Images at once.

    Returns:
        Images clipped to [-1, 1].
    """
    parts = [list(ids[start : start + batch_size]) for start in range(0, len(ids), batch_size)]
    images = [sample_images(model, scheduler, part, steps=steps, seed=seed, show_progress=False) for part in parts]
    return np.concatenate(images)
