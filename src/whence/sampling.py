"""Sampling images from a model, reproducibly: each from the noise of its own key."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32
from numpy import ndarray
from torch import Tensor

from whence.diffusion.adapters import predict
from whence.diffusion.noise import noise_key, normals_of_keys
from whence.errors import ConfigError
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
    withheld: Mapping[str, Tensor] | None = None,
    guidance_scale: float = 1.0,
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
        withheld: What stands in the place of conditions that are withheld, one row for each sample; for guidance.
        guidance_scale: Scale s of classifier-free guidance (Ho and Salimans 2022): the prediction is that without
            conditions plus s times what these change. 1 is the model's own prediction.
        keep: Called at each step with its timestep and what the sampler takes the images to be, clipped to [-1, 1].

    Returns:
        Images clipped to [-1, 1], never rounded to 8 bit.

    Raises:
        ConfigError: If the guidance scale is not finite, or it is not 1 and it is not known what stands in the place
            of withheld conditions.
    """
    import diffusers

    if not math.isfinite(guidance_scale):
        raise ConfigError(f"guidance_scale must be finite, found {guidance_scale}.")
    guided = guidance_scale != 1.0
    if guided and withheld is None:
        raise ConfigError(
            f"guidance_scale is {guidance_scale}; only a model with captions or labels that training withheld now and "
            "then can be guided. Leave it at 1."
        )

    ddim: Any = diffusers.DDIMScheduler.from_config(scheduler.config, clip_sample=True)
    ddim.set_timesteps(steps)
    size = model.config.sample_size
    shape = (model.config.in_channels, *(size if isinstance(size, list | tuple) else (size, size)))
    first = scheduler.config.num_train_timesteps
    keys = [noise_key(seed, "trajectory", "query", i, first) for i in ids]
    images = torch.from_numpy(normals_of_keys(keys, shape)).to(model.device)
    with torch.no_grad(), progress_bar("sample", steps, "step", shown=show_progress) as bar:
        for timestep in ddim.timesteps:
            times = timestep.expand(len(ids)).to(model.device)
            prediction = predict(model, images, times, conditions)
            if guided:
                without = predict(model, images, times, withheld)
                prediction = without + guidance_scale * (prediction - without)
            made = ddim.step(prediction, timestep, images, eta=0.0)
            images = made.prev_sample
            if keep is not None:
                keep(int(timestep), np.clip(made.pred_original_sample.cpu().numpy(), -1, 1))
            bar.update()
    return np.clip(images.cpu().numpy(), -1, 1)


def sample_in_parts(
    model: Any,
    scheduler: Any,
    ids: Sequence[str],
    *,
    steps: int,
    seed: int,
    batch_size: int,
    conditions: Mapping[str, Tensor] | None = None,
) -> Float32[ndarray, "sample channel height width"]:
    """Sample as :func:`sample_images` does, so many images at once, without a progress bar.

    Args:
        model: A denoising model in evaluation mode.
        scheduler: The noise scheduler it was trained with.
        ids: Names of the samples.
        steps: Denoising steps.
        seed: Seed of the noise.
        batch_size: Images at once.
        conditions: What a conditional model is told, one row for each sample.

    Returns:
        Images clipped to [-1, 1].
    """
    parts = [slice(start, start + batch_size) for start in range(0, len(ids), batch_size)]
    images = [
        sample_images(
            model,
            scheduler,
            list(ids[part]),
            steps=steps,
            seed=seed,
            show_progress=False,
            conditions={name: values[part] for name, values in (conditions or {}).items()},
        )
        for part in parts
    ]
    return np.concatenate(images)
