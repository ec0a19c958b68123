"""Reading the files of a model, with errors that say what to do."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from whence.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CheckpointError: If it cannot be read, or is something else.
    """
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}. Restore it or leave this checkpoint out.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object, found {type(value).__name__}. Restore it.")
    return value


def read_tensors(path: Path) -> "dict[str, Tensor]":
    """Read the tensors of a safetensors file.

    Raises:
        CheckpointError: If it cannot be read.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}. Restore it or leave this checkpoint out.") from error


def read_header(path: Path) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """Read the names and shapes of the tensors of a safetensors file, and its metadata; no tensor is read.

    Raises:
        CheckpointError: If it cannot be read.
    """
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if size > path.stat().st_size:
                raise ValueError("its header is cut off")
            header = json.loads(file.read(size))
        about = header.pop("__metadata__", {})
        return {name: tuple(entry["shape"]) for name, entry in header.items()}, about
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}. Restore it or leave this checkpoint out.") from error
