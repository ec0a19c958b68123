"""``config.yaml`` of a run: where its images and its model are, and how they are read."""

from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from whence._files import as_json, publish_file
from whence._run_folder import RunFolder
from whence.arguments import absolute
from whence.config import ConditioningSettings, LossName
from whence.errors import ConfigError
from whence.record import read_manifest

FORMAT_VERSION = 1


def check_config(run: RunFolder) -> None:
    """Refuse to make something else of a folder that is a run already."""
    path = run.folder / "config.yaml"
    if not path.exists():
        return
    try:
        found = dict(yaml.safe_load(path.read_text()))
        found = {"model": found["model"], "loss": found["loss"], **found["data"]["settings"]}
    except (OSError, ValueError, yaml.YAMLError, TypeError, KeyError) as error:
        raise ConfigError(
            f"{path} is not a configuration of whence. Choose another folder; it is left as it is."
        ) from error
    config = _config_of(run)
    # Not the source: images may be moved, and a record's fingerprint tells whether they are the same.
    want = {"model": config["model"], "loss": config["loss"], **config["data"]["settings"]}
    differences = [f"{k} is {found.get(k)!r}, not {v!r}" for k, v in want.items() if found.get(k) != v]
    if differences:
        raise ConfigError(
            f"{run.folder} is another run: {'; '.join(differences)}. Choose another folder; it is left as it is."
        )


def write_config(run: RunFolder) -> None:
    """Write ``config.yaml`` into the folder of a run."""
    with publish_file(run.folder / "config.yaml") as partial:
        partial.write_text(yaml.safe_dump(_config_of(run), sort_keys=False))


def keep_network_settings(run: RunFolder) -> None:
    """Write ``config.yaml``, or what it says of latents, conditions and objective; the rest of it stays."""
    path = run.folder / "config.yaml"
    if not path.exists():
        write_config(run)
        return
    found = yaml.safe_load(path.read_text())
    rest = {name: value for name, value in found.items() if name not in ("conditioning", "objective")}
    changed = rest | _of_network(run)
    if changed != found:
        with publish_file(path) as partial:
            partial.write_text(yaml.safe_dump(changed, sort_keys=False))


def _config_of(run: RunFolder) -> dict[str, Any]:
    """Give the content of config.yaml, the same for the same settings."""
    return {
        "format_version": FORMAT_VERSION,
        "whence": version("whence"),
        "model": "." if run.model == run.folder else str(run.model.resolve()),
        "data": {"source": absolute(run.data_source), "settings": asdict(run.data_settings)},
        "loss": run.loss,
    } | _of_network(run)


def _of_network(run: RunFolder) -> dict[str, Any]:
    """Give what was said of latents, conditions and objective, where anything was."""
    said = {"conditioning": run.conditioning, "objective": run.objective}
    plain = {"conditioning": ConditioningSettings(), "objective": None}
    return {name: as_json(asdict(value)) for name, value in said.items() if value is not None and value != plain[name]}


def recorded_loss(model: Path) -> LossName | None:
    """Read the loss off a model's record, if there is one."""
    folder = model / "record"
    return read_manifest(folder)["loss"] if (folder / "manifest.json").exists() else None
