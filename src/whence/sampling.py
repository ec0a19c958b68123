"""Sampling images or latents from a model, reproducibly: each from the noise of its own key.

DDPM-like models are sampled with DDIM (eta = 0), flow matching with Euler steps.
"""

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
from whence.diffusion.process import NoiseProcess
from whence.errors import ConfigError, UnsupportedModelError
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
    latent_shape: tuple[int, int, int] | None = None,
    keep: Callable[[int, Float32[ndarray, "sample channel height width"]], Any] | None = None,
) -> Float32[ndarray, "sample channel height width"]:
    """Sample without noise on the way, so that an image depends on the model and its noise key alone.

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
        latent_shape: Channels, height and width of latents, of a model that sees these.
        keep: Called at each step with its timestep and what the sampler takes the images to be, clipped to [-1, 1];
            latents are not clipped.

    Returns:
        Images clipped to [-1, 1], never rounded to 8 bit; or latents.

    Raises:
        ConfigError: If the guidance scale is not finite, or it is not 1 and it is not known what stands in the place
            of withheld conditions.
        UnsupportedModelError: If models of this scheduler are not sampled here.
    """
    if not math.isfinite(guidance_scale):
        raise ConfigError(f"guidance_scale must be finite, found {guidance_scale}.")
    guided = guidance_scale != 1.0
    if guided and withheld is None:
        raise ConfigError(
            f"guidance_scale is {guidance_scale}; only a model with captions or labels that training withheld now and "
            "then can be guided. Leave it at 1."
        )

    of_pixels = latent_shape is None
    shape = _image_shape(model) if latent_shape is None else latent_shape
    process = NoiseProcess.from_scheduler(scheduler)
    sampler = _make_sampler(scheduler, steps, shape, clip_sample=of_pixels)
    keys = [noise_key(seed, "trajectory", "query", i, scheduler.config.num_train_timesteps) for i in ids]
    noisy = torch.from_numpy(normals_of_keys(keys, shape)).to(model.device)

    def shown(images: Tensor) -> Float32[ndarray, "sample channel height width"]:
        array = images.float().cpu().numpy()
        return np.clip(array, -1, 1) if of_pixels else array

    with torch.no_grad(), progress_bar("sample", steps, "step", shown=show_progress) as bar:
        for place, time in enumerate(sampler.timesteps):
            times = time.expand(len(ids)).to(model.device)
            prediction = predict(model, noisy, times, conditions)
            if guided:
                without = predict(model, noisy, times, withheld)
                prediction = without + guidance_scale * (prediction - without)
            if process.prediction_type == "flow":
                clean = noisy - float(sampler.sigmas[place]) * prediction
                noisy = sampler.step(prediction, time, noisy).prev_sample
            else:
                made = sampler.step(prediction, time, noisy, eta=0.0)
                clean, noisy = made.pred_original_sample, made.prev_sample
            if keep is not None:
                keep(_timestep_of(process, time), shown(clean))
            bar.update()
    return shown(noisy)


def _image_shape(model: Any) -> tuple[int, int, int]:
    size = model.config.sample_size
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return model.config.in_channels, height, width


def _make_sampler(scheduler: Any, steps: int, shape: tuple[int, int, int], *, clip_sample: bool) -> Any:
    """Make a sampler of the same noise schedule.

    Returns:
        A scheduler that was told its steps.

    Raises:
        UnsupportedModelError: If there is none for this scheduler.
        ConfigError: If it has fewer timesteps than steps are asked for.
    """
    import diffusers

    if type(scheduler).__name__.startswith("FlowMatch"):
        config = scheduler.config
        sampler: Any = diffusers.FlowMatchEulerDiscreteScheduler.from_config(config)
        if not config.use_dynamic_shifting:
            sampler.set_timesteps(steps)
            return sampler
        # As the pipeline of FLUX does: the shift grows evenly with the number of tokens, patches of 2 x 2 latents.
        share = (shape[1] * shape[2] / 4 - config.base_image_seq_len) / (
            config.max_image_seq_len - config.base_image_seq_len
        )
        sampler.set_timesteps(steps, mu=config.base_shift + share * (config.max_shift - config.base_shift))
        return sampler
    if getattr(scheduler, "alphas_cumprod", None) is None:
        raise UnsupportedModelError(
            f"whence samples DDPM-like models and flow matching; {type(scheduler).__name__} is neither. Sample with "
            "the model's own pipeline and give the images as queries."
        )
    ddim: Any = diffusers.DDIMScheduler.from_config(scheduler.config, clip_sample=clip_sample)
    ddim.set_timesteps(steps)
    if int(ddim.timesteps.max()) >= scheduler.config.num_train_timesteps:
        raise ConfigError(
            f"{steps} steps are more than this {type(scheduler).__name__} of {scheduler.config.num_train_timesteps} "
            "timesteps can be sampled in. Take fewer with --steps."
        )
    return ddim


def _timestep_of(process: NoiseProcess, time: Tensor) -> int:
    """Find the timestep of a time of the sampler: the nearest one of the training's."""
    return int((process.model_time - time.cpu()).abs().argmin())


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
