"""The manifest of a record: what is kept of a training's settings, and when two of them are the same."""

import math
import platform
import re
from collections.abc import Mapping
from dataclasses import asdict, fields, is_dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from whence._recorder_checks import PRECISIONS, known_name
from whence.config import LossName, ObjectiveSettings
from whence.diffusion.process import NoiseProcess
from whence.errors import RecordError
from whence.record import FORMAT_VERSION


def make_manifest(
    settings: Mapping[str, Any],
    process: NoiseProcess,
    scheduler: Any,
    *,
    seed: int,
    max_grad_norm: float | None,
    loss: str,
    mixed_precision: str,
    data_fingerprint: str | None,
) -> dict[str, Any]:
    """Put together what ``record/manifest.json`` says."""
    return {
        "format_version": FORMAT_VERSION,
        "seed": seed,
        "max_grad_norm": max_grad_norm,
        "loss": known_name("loss", loss, LossName),
        "mixed_precision": known_name("mixed_precision", mixed_precision, PRECISIONS),
        "prediction_type": process.prediction_type,
        "scheduler": _describe_scheduler(scheduler),
        "data_fingerprint": data_fingerprint,
        "config": _plain(_without_secrets(settings)),
        "versions": _versions(),
    } | _of_objective(process)


def objective_of(settings: Mapping[str, Any]) -> ObjectiveSettings:
    """Read what a training adds to noise and loss off its settings, by the names of ``diffusers``' own flags.

    Args:
        settings: Such as ``vars(args)``.

    Returns:
        The objective; what the settings do not name is off.
    """
    found = {f.name: settings[f.name] for f in fields(ObjectiveSettings) if settings.get(f.name) is not None}
    if "precondition_outputs" in found:
        found["precondition_outputs"] = bool(found["precondition_outputs"])
    return ObjectiveSettings(**found)


def _of_objective(process: NoiseProcess) -> dict[str, Any]:
    """Describe what is not as in plain DDPM: what training added, and times that are not the timesteps themselves."""
    added = {} if process.objective == ObjectiveSettings() else {"objective": asdict(process.objective)}
    return added | ({"model_times": process.model_time.tolist()} if process.model_time.is_floating_point() else {})


def check_same_settings(folder: Path, found: dict[str, Any], want: dict[str, Any], *, with_config: bool) -> None:
    """Versions may differ, and the config of someone else's script; what a replay depends on may not."""
    flat_found, flat_want = _flat(found), _flat(want)
    free = ("versions.",) if with_config else ("versions.", "config.")
    keys = [k for k in sorted(flat_found.keys() | flat_want.keys()) if not k.startswith(free)]
    differences = [
        f"{k} is {flat_found.get(k)!r} in the record, {flat_want.get(k)!r} now"
        for k in keys
        if flat_found.get(k) != flat_want.get(k)
    ]
    if differences:
        raise RecordError(
            f"{folder} was made with other settings: {'; '.join(differences[:5])}. Go on with the recorded settings, "
            "or choose a new folder."
        )


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix[:-1]: value}
    return {k: v for key, inner in value.items() for k, v in _flat(inner, f"{prefix}{key}.").items()}


def as_dict(config: Any) -> dict[str, Any]:
    if isinstance(config, Mapping):
        return dict(config)
    if not is_dataclass(config) or isinstance(config, type):
        raise RecordError(
            f"config must be a mapping or a dataclass (of parsed arguments, vars(args)); found {type(config).__name__}."
        )
    return asdict(config)


def _describe_scheduler(scheduler: Any) -> dict[str, Any]:
    # Underscored settings are diffusers' own notes; the order of one of them differs from process to process.
    settings = {name: value for name, value in scheduler.config.items() if not name.startswith("_")}
    return {"class": type(scheduler).__name__, "config": _plain(settings)}


def _without_secrets(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {
        k: v for k, v in settings.items() if not re.search(r"token|secret|password|api_?key", str(k), re.IGNORECASE)
    }


def _plain(value: Any) -> Any:
    """Turn settings into what JSON can hold; anything else becomes its text."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, set | frozenset):
        return sorted(str(v) for v in value)
    kept = isinstance(value, str | int | bool | None) or (isinstance(value, float) and math.isfinite(value))
    return value if kept else str(value)


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in ("whence", "torch", "diffusers", "numpy"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:  # running from a source tree that was never installed
            versions[package] = "unknown"
    return versions
