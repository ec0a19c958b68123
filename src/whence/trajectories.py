"""Trajectories: what a sampler took each image to be, step by step.

    frames      float32, axes row, step, channel, height, width: what the sampler takes the clean image to be
    timesteps   of the steps, ascending: from the last step of the sampler to its first

Frames are images in [-1, 1], or latents as the network sees them. Steps stand in the order of their timesteps, as
everything else that has phases, from least noise to most. They lie in the file of the sampled images
(``whence.data.save_arrays``), which says of each image what sampled it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from typing import Any, final

import numpy as np
from jaxtyping import Float32
from numpy import ndarray

from whence.errors import DataError


@final
@dataclass(frozen=True, eq=False)
class Trajectories:
    """The sampler's path to each of some images.

    Raises:
        DataError: If frames, timesteps and what sampled them do not fit each other.
    """

    frames: Float32[ndarray, "row step channel height width"]
    timesteps: tuple[int, ...]
    about: tuple[Mapping[str, Any], ...]
    """What sampled each image: checkpoint, sampler, steps, seed."""
    of_latents: bool = False
    """Whether frames are latents as the network sees them, and not images in [-1, 1]."""

    def __post_init__(self):
        faults = []
        if self.frames.ndim != 5 or self.frames.shape[:2] != (len(self.about), len(self.timesteps)):
            faults.append(
                f"frames must be row, step, channel, height, width of {len(self.about)} images at "
                f"{len(self.timesteps)} steps, found {self.frames.shape}"
            )
        elif not (np.abs(self.frames) <= (np.inf if self.of_latents else 1)).all():  # nor is NaN
            faults.append("frames must be numbers" if self.of_latents else "frames must be in [-1, 1]")
        if not self.timesteps or list(self.timesteps) != sorted(set(self.timesteps)) or self.timesteps[0] < 0:
            faults.append(f"timesteps must be ascending, from 0 on, found {list(self.timesteps)}")
        if faults:
            raise DataError(f"These are no trajectories: {'; '.join(faults)}. Sample them with `whence sample`.")

    def select(self, rows: Sequence[int]) -> "Trajectories":
        """Keep those of some images, in the order given."""
        about = tuple(self.about[row] for row in rows)
        return Trajectories(self.frames[list(rows)], self.timesteps, about, self.of_latents)

    @cached_property
    def hashes(self) -> tuple[str, ...]:
        """SHA-256 of each image's frames and their timesteps."""
        times = np.array(self.timesteps, "<i8").tobytes()
        return tuple(sha256(times + np.ascontiguousarray(row, "<f4").tobytes()).hexdigest() for row in self.frames)


def join(parts: Sequence[Trajectories | None]) -> Trajectories | None:
    """Join trajectories one after the other; None unless all parts have some, at the same timesteps."""
    held = [part for part in parts if part is not None]
    if len(held) != len(parts) or len({(part.timesteps, part.of_latents) for part in held}) != 1:
        return None
    about = tuple(one for part in held for one in part.about)
    frames = np.concatenate([part.frames for part in held])
    return Trajectories(frames, held[0].timesteps, about, held[0].of_latents)
