"""How one model is trained on a subset: as the run was, by a function of the user's, or by a command."""

import importlib
import json
import os
import re
import secrets
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from whence.config import ModelSettings, TrainAgainSettings, TrainingSettings
from whence.data import ImageData
from whence.errors import ConfigError, RetrainingError, WhenceError
from whence.model_making import recorded_settings
from whence.training import checkpoint_steps, steps_per_epoch, train

_LOG_CHARS = 1500


@dataclass(frozen=True)
class Recipe:
    """The run's own training, cut to a subset; the seed is each training's own."""

    model: ModelSettings
    training: TrainingSettings
    same_steps_as: int | None = None
    """Train about as many steps as so many images would take in the epochs of ``training``; None: as many epochs."""

    def training_of(self, num_images: int) -> TrainingSettings:
        """Give the settings for a subset of this size."""
        if self.same_steps_as is None:
            return self.training
        steps = self.training.epochs * steps_per_epoch(self.same_steps_as, self.training)
        return replace(self.training, epochs=max(1, round(steps / steps_per_epoch(num_images, self.training))))

    def num_steps(self, num_images: int) -> int:
        """Count the optimizer steps of a training on so many images."""
        return self.training_of(num_images).epochs * steps_per_epoch(num_images, self.training)

    def describe(self) -> dict[str, Any]:
        """Name all that a training depends on beside its images and its seed."""
        training = recorded_settings(self.model, self.training)
        return {
            "model": training.pop("model"),
            "training": {k: v for k, v in training.items() if k != "seed"},
        } | ({} if self.same_steps_as is None else {"same_steps_as": self.same_steps_as})

    def check(self, num_images: int) -> None:
        """Refuse settings that cannot be met, before anything is trained."""
        checkpoint_steps(num_images, self.training_of(num_images))

    def train(self, folder: Path, images: ImageData, seed: int, device: str) -> None:
        """Train into a folder, or go on there."""
        training = replace(self.training_of(len(images)), seed=seed)
        train(folder, images, self.model, training, device=device, show_progress=False)


@dataclass(frozen=True)
class OwnTrainer:
    """A function or a command of the user's. It gets a new folder each time, as a killed command may still run."""

    text: str

    def describe(self) -> dict[str, Any]:
        """Name what was asked for; what it does is the user's own."""
        return {"trainer": self.text}

    def check(self, num_images: int) -> None:
        """Refuse a function that cannot be imported, and a command that is not told where to write."""
        if self._is_command:
            missing = [f"{{{name}}}" for name in ("ids", "folder") if f"{{{name}}}" not in self.text]
            if missing:
                raise ConfigError(f"trainer: the command must have {{ids}} and {{folder}}; it lacks {missing[0]}.")
        else:
            self._function()

    def train(self, folder: Path, images: ImageData, seed: int, device: str) -> None:
        """Train into a folder, which appears once training has ended well."""
        for left in folder.parent.glob(f".{folder.name}-*.partial"):
            shutil.rmtree(left, ignore_errors=True)
        if folder.exists():
            return
        partial = folder.with_name(f".{folder.name}-{secrets.token_hex(4)}.partial")
        partial.mkdir(parents=True)
        if self._is_command:
            self._run(partial, images.ids, seed, device)
        else:
            self._call(partial, images.ids, seed)
        partial.rename(folder)

    @property
    def _is_command(self) -> bool:
        return re.fullmatch(r"[\w.]+:[\w.]+", self.text) is None

    def _function(self) -> Callable[[Sequence[str], int, Path], Any]:
        module, _, name = self.text.partition(":")
        if os.getcwd() not in sys.path:  # a console script has its own folder there instead
            sys.path.insert(0, os.getcwd())
        try:
            found: Any = importlib.import_module(module)
            for part in name.split("."):
                found = getattr(found, part)
        except (ImportError, AttributeError) as error:
            raise ConfigError(
                f"trainer must be module:function that can be imported from here, or a command with {{ids}} and "
                f"{{folder}}; {self.text} cannot: {error}."
            ) from error
        if not callable(found):
            raise ConfigError(f"trainer must name a function; {self.text} is of type {type(found).__name__}.")
        return found

    def _call(self, folder: Path, ids: Sequence[str], seed: int) -> None:
        try:
            self._function()(list(ids), seed, folder)
        except WhenceError:
            raise
        except Exception as error:
            raise RetrainingError(f"{self.text} raised {type(error).__name__}: {error}.") from error

    def _run(self, folder: Path, ids: Sequence[str], seed: int, device: str) -> None:
        ids_file = folder / "ids.json"
        ids_file.write_text(json.dumps(list(ids)))
        values = {"ids": shlex.quote(str(ids_file)), "seed": str(seed), "folder": shlex.quote(str(folder))}
        command = re.sub(r"\{(ids|seed|folder)\}", lambda found: values[found[1]], self.text)
        log = folder / "train.log"
        with log.open("wb") as file:
            environment = os.environ | {"WHENCE_DEVICE": device}
            done = subprocess.run(command, shell=True, stdout=file, stderr=subprocess.STDOUT, env=environment)
        if done.returncode != 0:
            said = log.read_text(errors="replace").strip()[-_LOG_CHARS:]
            raise RetrainingError(f"the command ended with status {done.returncode}; its last words: {said}")


def make_trainer(settings: TrainAgainSettings, config: dict[str, Any] | None, num_train: int) -> Recipe | OwnTrainer:
    """Choose how models are trained.

    ``config`` is the run's record of its own training, None where there is no record.
    """
    if settings.trainer is not None:
        return OwnTrainer(settings.trainer)
    try:
        assert config is not None
        model = ModelSettings(**_tuples(config["model"]))
        names = [f.name for f in fields(TrainingSettings) if f.name != "caption_dropout" or model.condition != "none"]
        training = TrainingSettings(**{name: config[name] for name in names})
    except (AssertionError, KeyError, TypeError) as error:
        raise ConfigError(
            "This run was not trained by `whence train`, so that it is not known how to train it again. Say so with "
            "--trainer: module:function, or a command with {ids}, {seed} and {folder}."
        ) from error
    epochs = training.epochs if settings.epochs is None else settings.epochs
    training = replace(training, epochs=epochs, checkpoints=settings.checkpoints)
    return Recipe(model, training, num_train if settings.same_steps else None)


def _tuples(values: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
