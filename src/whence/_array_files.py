"""Files of named arrays that a run keeps for itself: caches of sums, tiles, decompositions."""

from pathlib import Path

import numpy as np
from numpy import ndarray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from whence._files import publish_file
from whence.errors import ScoresError


def write_arrays(path: Path, arrays: dict[str, ndarray]) -> None:
    """Write a file of the cache, whole or not at all."""
    with publish_file(path) as partial:
        save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, partial)


def read_arrays(path: Path) -> dict[str, ndarray]:
    """Read a file of the cache.

    Returns:
        Its arrays by name.

    Raises:
        ScoresError: If it is damaged.
    """
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ScoresError(f"{path} is damaged: {error}. Delete it; the next run makes it again.") from error
