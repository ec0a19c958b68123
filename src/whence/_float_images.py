"""Files of float images, ``.safetensors``: what lies in them, not yet checked.

images      float32, axes row, channel, height, width
frames      those of trajectories, where there are some
whence      one entry of metadata: format version, ids, labels, captions; of trajectories all but the frames
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy import ndarray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from whence._files import publish_file
from whence.errors import DataError
from whence.trajectories import Trajectories

FORMAT_VERSION = 1


class FloatImages(NamedTuple):
    """What a file holds."""

    pixels: ndarray
    ids: Sequence[Any]
    labels: Sequence[Any] | None
    captions: Sequence[Any] | None
    frames: ndarray | None
    steps: Mapping[str, Any] | None
    """Of the trajectories all but their frames."""


def write_float_images(
    path: Path,
    pixels: ndarray,
    ids: Sequence[str],
    labels: Sequence[str] | None,
    captions: Sequence[str] | None,
    trajectories: Trajectories | None,
) -> None:
    """Write a file; the same images make the same bytes."""
    # One entry, because the order of several differs from one writing to the next.
    about: dict[str, Any] = {"format_version": FORMAT_VERSION, "ids": ids, "labels": labels}
    about |= {} if captions is None else {"captions": captions}
    arrays = {"images": pixels}
    if trajectories is not None:
        about["trajectories"] = {"timesteps": trajectories.timesteps, "about": trajectories.about}
        if trajectories.of_latents:
            about["trajectories"]["of_latents"] = True
        arrays["frames"] = np.ascontiguousarray(trajectories.frames)
    with publish_file(path) as partial:
        save_file(arrays, partial, metadata={"whence": json.dumps(about)})


def read_float_images(path: Path, source: str) -> FloatImages:
    """Read a file; a DataError if it is not one, or of another version."""
    try:
        with safe_open(path, framework="numpy") as file:
            pixels, entry = file.get_tensor("images"), json.loads((file.metadata() or {})["whence"])
            version, ids, labels = entry["format_version"], entry["ids"], entry["labels"]
            captions, steps = entry.get("captions"), entry.get("trajectories")
            frames = None if steps is None else file.get_tensor("frames")
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{source} is no readable file of images ({type(error).__name__}: {error}). It must have a tensor images "
            "and metadata as written by whence.data.save_arrays; write it again with that."
        ) from error
    if version != FORMAT_VERSION:
        raise DataError(
            f"{source} has format version {version}; this version of whence reads {FORMAT_VERSION}. Open it with the "
            "version that wrote it."
        )
    return FloatImages(pixels, ids, labels, captions, frames, steps)
