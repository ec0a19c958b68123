"""Runs are opened and made here: by their folder, from a model that others trained, or by training one."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import yaml

from whence._run_config import FORMAT_VERSION, check_config, recorded_loss, write_config
from whence.checkpoints import list_checkpoints
from whence.config import (
    ConditioningSettings,
    DataSettings,
    LossName,
    ModelSettings,
    ObjectiveSettings,
    TrainingSettings,
    changed_settings,
)
from whence.errors import ConfigError, check_choice
from whence.pipeline import Run
from whence.training import train

SettingsT = TypeVar("SettingsT", DataSettings, ConditioningSettings, ObjectiveSettings)


def open_run(
    path: str | Path,
    *,
    data: str | None = None,
    data_settings: DataSettings | Mapping[str, Any] | None = None,
    out: str | Path | None = None,
    loss: LossName | None = None,
    allow_pickle: bool = False,
    conditioning: ConditioningSettings | Mapping[str, Any] | None = None,
    objective: ObjectiveSettings | Mapping[str, Any] | None = None,
) -> Run:
    """Open a run, or a model that others trained.

    Args:
        path: A run of whence, a training output folder of ``diffusers``, a checkpoint, a saved pipeline or model.
        data: Source of the training images. Needed for a foreign model; a run knows its own.
        data_settings: How they are read, or what is to be changed of how the run did it.
        out: Folder for scores and report of a foreign model.
        loss: Training loss of a foreign model. Default: mse, as in the training scripts of ``diffusers``.
        allow_pickle: Also read ``.bin`` weights.
        conditioning: Where latents, captions or classes of the network come from.
        objective: What a training without a record added to noise and loss. Default: nothing.

    Returns:
        The run; nothing of the model is loaded yet.

    Raises:
        ConfigError: If something is missing or contradicts what is known.
    """
    folder = Path(path)
    if out is not None and Path(out).exists() and not Path(out).is_dir():
        raise ConfigError(f"--out must be a folder; {out} is a file.")
    if loss is not None:
        check_choice("loss", loss, LossName)
    if (folder / "config.yaml").exists():
        known = _known_run(folder, data, data_settings, out, loss, allow_pickle)
        return _with_network_settings(known, conditioning, objective)
    kept = _kept_settings(Path(out) if out else folder)
    asked = _changed(kept.get("conditioning", ConditioningSettings()), conditioning)
    base = None if asked.base is None else Path(asked.base)
    list_checkpoints(folder, base=base, lora_alpha=asked.lora_alpha)  # raises, saying what is accepted
    recorded = recorded_loss(folder)
    if data is None:
        raise ConfigError(f"{folder} does not say what it was trained on; give the training images with --data.")
    if out is None and recorded is None:
        raise ConfigError(
            f"{folder} was not made by whence, so it is left as it is; say with --out where scores shall go."
        )
    if recorded and loss and loss != recorded:
        raise ConfigError(f"{folder} was trained with the loss {recorded}, by its record; leave --loss out.")
    run = Run(
        Path(out) if out else folder,
        data,
        _changed(DataSettings(), data_settings),
        folder,
        recorded or loss or "mse",
        allow_pickle,
        **kept,
    )
    check_config(run)
    return _with_network_settings(run, conditioning, objective)


def _with_network_settings(
    run: Run,
    conditioning: ConditioningSettings | Mapping[str, Any] | None,
    objective: ObjectiveSettings | Mapping[str, Any] | None,
) -> Run:
    """Put what the user says now in the place of what the run was opened with before.

    It is kept with the run once something was made by it, so that what is refused leaves nothing behind.

    Returns:
        The run with these settings.

    Raises:
        ConfigError: If a record says already what training added to noise and loss.
    """
    changed = replace(
        run,
        conditioning=_changed(run.conditioning, conditioning),
        objective=_changed(run.objective or ObjectiveSettings(), objective) if objective else run.objective,
    )
    said = changed_settings(changed.objective or ObjectiveSettings())
    if said and (run.model / "record" / "manifest.json").exists():
        raise ConfigError(
            f"{run.model} has a record, which says what training added to noise and loss. Leave out {', '.join(said)}."
        )
    return changed


def train_run(
    folder: str | Path,
    data: str,
    *,
    data_settings: DataSettings | None = None,
    model_settings: ModelSettings | None = None,
    settings: TrainingSettings | None = None,
    device: str = "cpu",
    show_progress: bool = True,
) -> Run:
    """Train a model with a record, or go on with an interrupted training.

    Args:
        folder: The run.
        data: Source of the training images.
        data_settings: How they are read.
        model_settings: Architecture and noise schedule.
        settings: Optimizer, schedule, length, seed.
        device: Torch device.
        show_progress: Show a progress bar.

    Returns:
        The run, ready to be traced.
    """
    settings = settings or TrainingSettings()
    run = Run(Path(folder), data, data_settings or DataSettings(), Path(folder), settings.loss)
    images = run.opened_images  # opened first, so that nothing is written where the images are at fault
    check_config(run)
    train(
        run.folder,
        images,
        model_settings or ModelSettings(),
        settings,
        device=device,
        show_progress=show_progress,
        # Only now is it known that the settings can be met, and are those of a record that is there already.
        on_start=lambda: write_config(run),
    )
    return run


def _known_run(
    folder: Path,
    data: str | None,
    data_settings: DataSettings | Mapping[str, Any] | None,
    out: str | Path | None,
    loss: LossName | None,
    allow_pickle: bool,
) -> Run:
    try:
        config = yaml.safe_load((folder / "config.yaml").read_text())
        found = config["format_version"]
        model = folder / config["model"]
        known = Run(
            folder,
            config["data"]["source"],
            DataSettings(**config["data"]["settings"]),
            model,
            config["loss"],
            **_network_settings(config),
        )
    except (OSError, ValueError, yaml.YAMLError, TypeError, KeyError) as error:
        raise ConfigError(f"{folder / 'config.yaml'} is not a configuration of whence: {error!r}.") from error
    if found != FORMAT_VERSION:
        raise ConfigError(f"{folder / 'config.yaml'} has format version {found}; this whence reads {FORMAT_VERSION}.")
    trained_with = recorded_loss(model) or known.loss
    if trained_with != (loss or known.loss) or trained_with != known.loss:
        asked = f"--loss {loss}" if loss else f"config.yaml says {known.loss}, which"
        raise ConfigError(f"{folder} was trained with the loss {trained_with}; {asked} contradicts it. Leave it out.")
    run = replace(
        known,
        folder=Path(out) if out else folder,
        data_source=data or known.data_source,
        data_settings=_changed(known.data_settings, data_settings),
        allow_pickle=allow_pickle,
    )
    if run.folder != folder:
        check_config(run)
        write_config(run)
    return run


def _changed(settings: SettingsT, changes: SettingsT | Mapping[str, Any] | None) -> SettingsT:
    if isinstance(changes, Mapping):
        values: dict[str, Any] = {str(name): value for name, value in changes.items()}
        return replace(settings, **values)
    return changes or settings


def _kept_settings(folder: Path) -> dict[str, Any]:
    """Give what a folder was opened with before, of latents, conditions and objective; nothing for a new one."""
    path = folder / "config.yaml"
    if not path.exists():
        return {}
    try:
        return _network_settings(yaml.safe_load(path.read_text()))
    except (OSError, ValueError, yaml.YAMLError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{path} is not a configuration of whence ({error!r}). Choose another folder; it is left as it is."
        ) from error


def _network_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    found = {"conditioning": _from_yaml(ConditioningSettings, config.get("conditioning"))}
    objective = config.get("objective")
    return found | ({"objective": _from_yaml(ObjectiveSettings, objective)} if objective else {})


def _from_yaml(kind: type[SettingsT], found: Mapping[str, Any] | None) -> SettingsT:
    values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in (found or {}).items()}
    return kind(**values)
