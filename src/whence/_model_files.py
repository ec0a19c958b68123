"""Reading the files of a model, and making it, with errors that say what to do."""

import importlib
import importlib.util
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from whence.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"


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


def hash_tensors(tensors: "Mapping[str, Tensor]") -> str:
    """Hash names, types, shapes and values of tensors, in whatever order they come."""
    import torch

    digest = sha256()
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


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


def read_weights(folder: Path, allow_pickle: bool) -> "dict[str, Tensor]":
    """Read the weights of a model.

    Args:
        folder: With safetensors or ``.bin`` files.
        allow_pickle: Also read ``.bin`` files, with torch's ``weights_only=True``.

    Returns:
        Tensors by name.

    Raises:
        CheckpointError: If there are none, they cannot be read, or are pickles and these are not allowed.
    """
    files = sorted(folder.glob("*.safetensors"))
    pickles = sorted(folder.glob("*.bin"))
    if not files and pickles and not allow_pickle:
        raise CheckpointError(
            f"{pickles[0]} is a pickle, which can run code when it is opened. Convert it with "
            "model.save_pretrained(folder, safe_serialization=True), or pass --allow-pickle if you trust its source."
        )
    if not files and not pickles:
        raise CheckpointError(f"{folder} has a config.json but no weights: expected {WEIGHTS_FILE}.")
    state: dict[str, Tensor] = {}
    for path in files or pickles:
        state |= read_tensors(path) if files else _read_pickle(path)
    return state


def _read_pickle(path: Path) -> "dict[str, Tensor]":
    import torch

    if path.stat().st_size == 0:
        raise CheckpointError(f"{path} cannot be read: it is empty. Restore it or leave this checkpoint out.")
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # unpickling raises whatever the file makes it raise
        # Not torch's own text, which advises to run whatever code the file holds.
        held = re.search(r"Unsupported \w+: (?:GLOBAL )?(\S+)", str(error))
        raise CheckpointError(
            f"{path} was refused by torch.load(weights_only=True): it "
            f"{f'holds {held[1]}, which is no tensor' if held else 'is damaged, or no pickle of tensors'}. Save the "
            "model's state_dict() alone, or leave this checkpoint out."
        ) from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} must hold a dict of tensors by parameter name; found {type(state).__name__}.")
    if not all(isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in state.items()):
        keys = ", ".join(map(str, list(state)[:8])) + (", …" if len(state) > 8 else "")
        raise CheckpointError(
            f"{path} must hold tensors by parameter name and nothing else; found a dict with the keys {keys}. Save the "
            "model's state_dict() alone."
        )
    return state


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keep diffusers and transformers from showing bars of their own, and notes on parts that are not used here."""
    libraries = [importlib.import_module("diffusers.utils.logging")]
    if importlib.util.find_spec("transformers") is not None:
        libraries.append(importlib.import_module("transformers.utils.logging"))
    before = [(library, library.get_verbosity(), library.is_progress_bar_enabled()) for library in libraries]
    for library in libraries:
        library.set_verbosity_error()
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library, verbosity, shown in before:
            library.set_verbosity(verbosity)
            if shown:
                library.enable_progress_bar()


def make_from_config(path: Path, config: dict[str, Any], kind: Literal["model", "scheduler"]) -> Any:
    """Make a ``diffusers`` object of the class that its configuration names.

    Args:
        path: Where the configuration is, for messages.
        config: What is in it.
        kind: What the class must be.

    Returns:
        The object; the weights of a model are drawn.

    Raises:
        CheckpointError: If diffusers does not know the class, or cannot make it from the configuration.
    """
    import diffusers
    import torch

    name = config.get("_class_name")
    made_of = getattr(diffusers, str(name), None)
    if not isinstance(made_of, type) or not hasattr(made_of, "from_config"):
        raise CheckpointError(f"{path} names class {name!r}, unknown to diffusers.")
    if not issubclass(made_of, getattr(diffusers, "ModelMixin" if kind == "model" else "SchedulerMixin")):
        raise CheckpointError(f"{path} must name a class of {kind}s; {name} of diffusers is not one. Restore the file.")
    try:
        with quiet_diffusers(), torch.random.fork_rng(devices=[]):  # weights are drawn, then replaced
            return made_of.from_config(config)
    except Exception as error:  # a constructor raises whatever it likes about values that it does not know
        raise CheckpointError(f"No {name} can be made from {path}: {error}") from error


@contextmanager
def quiet_diffusers() -> Iterator[None]:
    """Keep diffusers from reporting configuration keys that it does not use, and casts that change nothing."""
    from diffusers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
