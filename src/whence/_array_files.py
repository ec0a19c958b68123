"""Files of named arrays that a run keeps for itself: caches of sums, tiles, decompositions."""

from hashlib import sha256
from pathlib import Path

import numpy as np
from numpy import ndarray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from whence._files import publish_file
from whence.errors import ScoresError


def write_arrays(path: Path, arrays: dict[str, ndarray]) -> None:
    """Write a file of the cache, whole or not at all."""
    kept = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    with publish_file(path) as partial:
        save_file(kept, partial, metadata={"sha256": _sha256(kept)})


def read_arrays(path: Path) -> dict[str, ndarray]:
    """Read a file of the cache.

    Returns:
        Its arrays by name.

    Raises:
        ScoresError: If it is damaged.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            want = (file.metadata() or {}).get("sha256")
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no dict
    except (OSError, SafetensorError) as error:
        raise ScoresError(f"{path} is damaged: {error}. Delete it; the next run makes it again.") from error
    if want is not None and want != _sha256(arrays):  # other files of a run, such as an optimizer's state, have none
        raise ScoresError(
            f"{path} is damaged: its content is not what was written. Delete it; the next run makes it again."
        )
    return arrays


def _sha256(arrays: dict[str, ndarray]) -> str:
    digest = sha256()
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].dtype.str} {arrays[name].shape}".encode())
        digest.update(np.ascontiguousarray(arrays[name]).data)
    return digest.hexdigest()
