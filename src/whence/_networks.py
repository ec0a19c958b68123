"""A network as it lies in a folder of ``diffusers``: made of its configuration, and filled with its own weights."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from whence._model_files import make_from_config, quiet_diffusers, read_json, read_weights
from whence.errors import CheckpointError, NumericsError

# EMAModel.save_pretrained adds its own state to the model's config.json.
_EMA_KEYS = frozenset(
    {"decay", "min_decay", "optimization_step", "update_after_step", "use_ema_warmup", "inv_gamma", "power"}
)


def read_config(folder: Path) -> dict[str, Any]:
    """Read what the network is, and nothing of a moving average's state."""
    return {k: v for k, v in read_json(folder / "config.json").items() if k not in _EMA_KEYS}


def load_network(folder: Path, allow_pickle: bool, device: str, dtype: str) -> Any:
    """Load a network in evaluation mode.

    Args:
        folder: With a config.json and weights.
        allow_pickle: Also read ``.bin`` files, with torch's ``weights_only=True``.
        device: Torch device.
        dtype: Name of a torch type.

    Returns:
        The network.

    Raises:
        CheckpointError: If files are missing, damaged or pickled, or do not fit the configuration.
        NumericsError: If a weight is not finite.
    """
    import torch

    config = read_config(folder)
    state = read_weights(folder, allow_pickle)
    model = make_from_config(folder / "config.json", config, "model")
    _check_fits(folder, {k: v.shape for k, v in model.state_dict().items()}, {k: v.shape for k, v in state.items()})
    for name, tensor in state.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise NumericsError(f"{folder}: parameter {name} holds NaN or infinite values. Leave this checkpoint out.")
    model.load_state_dict(state)
    with quiet_diffusers():
        return model.to(device, getattr(torch, dtype)).eval()


def _check_fits(folder: Path, want: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    faults = [f"{name} is missing" for name in want if name not in found]
    faults += [f"{name} is not part of the model" for name in found if name not in want]
    faults += [
        f"{name} has shape {tuple(found[name])}, the configuration asks for {tuple(want[name])}"
        for name in want
        if name in found and want[name] != found[name]
    ]
    if faults:
        more = f" and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise CheckpointError(
            f"The weights in {folder} do not fit its config.json: {'; '.join(faults[:5])}{more}. "
            "They belong to a model of another architecture."
        )
