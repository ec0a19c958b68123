"""Images sampled from a run's last checkpoint into ``generated/``: files that open as images, with their prompts.

A file is named for all that its images depend on, so that none is sampled twice. How a model is sampled is the business
of ``whence.sampling``.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor

from whence._files import sha256_of_json
from whence.checkpoints import Checkpoint, load_model, load_scheduler
from whence.config import SamplingSettings
from whence.data import save_arrays
from whence.encoding import Encoding
from whence.errors import ConfigError
from whence.sampling import sample_images
from whence.subject import Subject
from whence.trajectories import Trajectories
from whence.words import WITHHELD


def generate(
    subject: Subject,
    encoding: Encoding | None,
    folder: Path,
    count: int,
    settings: SamplingSettings,
    *,
    show_progress: bool = True,
) -> Path:
    """Sample images from the last checkpoint, unless they are there already.

    Args:
        subject: Whose checkpoint.
        encoding: How images and prompts are encoded; None where the network sees pixels and is told nothing.
        folder: The run.
        count: How many, at least one; of each prompt, where there are some.
        settings: Prompts, guidance, steps, seed.
        show_progress: Show a progress bar.

    Returns:
        A file that opens as images, with all its decimals and with the prompts as captions (and labels).

    Raises:
        ConfigError: If prompts are missing or are not for this model.
        DataError: If a prompt has too many words, or is no label of the model.
    """
    reads = None if encoding is None else encoding.reads
    _check_prompts(settings.prompts, reads)
    last, sampler = subject.checkpoints[-1], "euler" if subject.process.prediction_type == "flow" else "ddim"
    path = folder / "generated" / f"{_name_of(sampler, count, settings, last, encoding)}.safetensors"
    if path.exists():
        return path

    texts = [prompt for prompt in settings.prompts or [""] for _ in range(count)]
    ids = [f"generated-{k}" for k in range(len(texts))]
    size = subject.train.height, subject.train.width
    frames: dict[int, ndarray] = {}
    latent = encoding is not None and encoding.encoder.has_vae
    drawn = sample_images(
        load_model(last, allow_pickle=subject.allow_pickle),
        load_scheduler(last),
        ids,
        steps=settings.steps,
        seed=settings.seed,
        show_progress=show_progress,
        conditions=_told(encoding, texts, size),
        withheld=_told(encoding, [WITHHELD] * len(texts), size) if settings.guidance_scale != 1 else None,
        guidance_scale=settings.guidance_scale,
        latent_shape=subject.train.input_shape if latent else None,
        keep=frames.__setitem__ if settings.trajectory else None,
    )
    images = encoding.encoder.images_of(drawn) if latent and encoding is not None else drawn
    paths = _paths(frames, _accounts(sampler, settings, last, texts, reads), latent) if settings.trajectory else None
    labels = texts if reads == "labels" else ["generated"] * len(texts)
    save_arrays(path, images, ids, labels, paths, captions=texts if reads is not None else None)
    return path


def _check_prompts(prompts: Sequence[str], reads: str | None) -> None:
    if prompts and reads is None:
        raise ConfigError(
            "The model is told nothing but the noisy image, so it cannot be given a prompt. Train one with "
            "--condition words or label."
        )
    if not prompts and reads is not None:
        raise ConfigError(f"The model is told {reads}; give at least one with --prompt ('' for none).")


def _name_of(sampler: str, count: int, settings: SamplingSettings, last: Checkpoint, encoding: Encoding | None) -> str:
    name = f"{sampler}{settings.steps}-{count}-seed{settings.seed}-step{last.step}-{last.content_hash()[:8]}"
    if encoding is not None:
        name += f"-{sha256_of_json([settings.prompts, settings.guidance_scale, encoding.encoder.hash])[:8]}"
    return f"{name}-trajectory" if settings.trajectory else name


def _told(encoding: Encoding | None, texts: Sequence[str], size: tuple[int, int]) -> dict[str, Tensor] | None:
    """Encode prompts, each different one once."""
    if encoding is None or encoding.reads is None:
        return None
    distinct = {text: k for k, text in enumerate(dict.fromkeys(texts))}
    made = encoding.encoder.conditions(list(distinct), size)
    which = [distinct[text] for text in texts]
    return {name: torch.from_numpy(values[which]) for name, values in made.items()}


def _accounts(
    sampler: str, settings: SamplingSettings, last: Checkpoint, texts: Sequence[str], reads: str | None
) -> list[dict[str, Any]]:
    """Say of each image how it was made."""
    about = {"checkpoint_step": last.step, "checkpoint_sha256": last.content_hash()}
    about |= {"sampler": sampler, "eta": 0.0, "steps": settings.steps, "seed": settings.seed}
    if reads is None:
        return [about] * len(texts)
    return [about | {"guidance_scale": settings.guidance_scale, "prompt": text} for text in texts]


def _paths(frames: dict[int, ndarray], accounts: list[dict[str, Any]], latent: bool) -> Trajectories:
    timesteps = tuple(sorted(frames))
    return Trajectories(np.stack([frames[t] for t in timesteps], axis=1), timesteps, tuple(accounts), latent)
