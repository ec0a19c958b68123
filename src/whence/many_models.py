"""Many models, each trained from scratch on a subset of the training set, and what they give for queries.

    retraining/<hash>/manifest.json                     what each training depends on
    retraining/<hash>/models/subset-0003-seed-1/        in training; or finished, where models are kept
    retraining/<hash>/models/ids-<hash>-seed-1/         the same of a subset that was not drawn, named by its members
    retraining/<hash>/outputs-<hash>/subset-0003-seed-1.npz   outputs of one model for the queries; makes it count

One file of outputs is one unit of work: a subset and a seed. Any number of processes may run at once, on one disk; each
takes units that no other holds. Killed at any moment, the next run goes on with what is missing. Which subsets there
are is the business of ``whence.retraining`` and ``whence.counterfactual``.
"""

import io
import json
import shutil
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from jaxtyping import Bool
from numpy import ndarray

from whence._files import as_json, publish_file, sha256_of_json, try_lock, write_json
from whence._trainers import OwnTrainer, Recipe, make_trainer
from whence._workers import POLL_S, run_workers
from whence.checkpoints import check_files, list_checkpoints, load_model, load_scheduler
from whence.config import TrainAgainSettings
from whence.data import ImageData, concatenate
from whence.diffusion.adapters import check_model
from whence.diffusion.process import NoiseProcess
from whence.errors import ConfigError, RetrainingError, WhenceError
from whence.event_table import conditions_of
from whence.measuring import MeasuringGrid, make_grid, measure_model
from whence.progress import progress_bar
from whence.sampling import sample_in_parts
from whence.subject import Subject
from whence.training import check_device
from whence.words import encoder_of

VERSION = 1
"""Raised when the same settings give other outputs."""

_KEPT = ".keep"

Unit = tuple[int, int]
"""Number of the subset, and seed."""


@dataclass(frozen=True)
class Members:
    """On which subsets models are trained."""

    subsets: Bool[ndarray, "subset train"]
    names: tuple[str, ...]
    """Of each subset; the same name means the same images."""
    units: tuple[Unit, ...]
    """What is trained, in this order."""
    spec: Any
    """What the names do not say."""
    note: str
    """For the reader."""
    shared: frozenset[int] = frozenset()
    """Subsets whose models other questions need too: they are kept."""


@dataclass(frozen=True)
class Sampling:
    """Images to be sampled from every model, from the noise of these ids."""

    ids: tuple[str, ...]
    steps: int
    seed: int


def plan_models(
    subject: Subject,
    queries: Mapping[str, ImageData],
    settings: TrainAgainSettings,
    folder: Path,
    members: Members,
    sampling: Sampling | None = None,
) -> "ManyModels":
    """Check everything that can be checked without a training, of models on given subsets.

    Args:
        subject: Whose training is repeated.
        queries: Images to measure, by the name of their set.
        settings: Training, measuring, processes.
        folder: The run.
        members: The subsets.
        sampling: What to sample from each model as well.

    Returns:
        What :func:`train_models` trains.

    Raises:
        ConfigError: If settings cannot be met.
    """
    check_train_again(settings)
    if not queries:
        raise ConfigError("Give at least one set of queries to measure.")
    images = subject.train
    config = subject.record.manifest["config"] if subject.record else None
    trainer = make_trainer(settings, config, len(images))
    for size in sorted({int(size) for size in members.subsets.sum(axis=1)}):
        trainer.check(size)
    joined = concatenate(list(queries.values()))
    if (joined.channels, joined.height, joined.width) != (images.channels, images.height, images.width):
        raise ConfigError("Queries must have the size and the channels of the training images.")
    spec = {
        "version": VERSION,
        "train": {"fingerprint": images.fingerprint, "num_images": len(images)},
        "subsets": members.spec,
        **trainer.describe(),
    }
    measuring = {
        "loss": subject.loss,
        "process": subject.process.content_hash,
        "timesteps": settings.timesteps,
        "draws": settings.draws,
        "seed": settings.measure_seed,
        "weights_name": settings.weights_name,
        "queries": {name: {"fingerprint": q.fingerprint, "num_images": len(q)} for name, q in queries.items()},
    } | ({"sampling": vars(sampling)} if sampling else {})
    sets = tuple(name for name, part in queries.items() for _ in part.ids)
    return ManyModels(
        folder / "retraining" / sha256_of_json(spec)[:8],
        as_json(spec),
        as_json(measuring),
        replace(subject, checkpoints=subject.checkpoints[-1:], record=None),
        joined,
        sets,
        members,
        trainer,
        settings,
        subject.process,
        sampling,
    )


def train_models(work: "ManyModels", *, show_progress: bool = True) -> None:
    """Train and measure what is not finished, then clear away what a killed process left.

    Args:
        work: What :func:`plan_models` gave.
        show_progress: Show a progress bar.

    Raises:
        RetrainingError: If a training fails. What was finished is kept.
    """
    work.prepare()
    _warn_of_removed(work)
    _run(work, show_progress)
    work.tidy()


@dataclass(frozen=True)
class ManyModels:
    """All that a process needs to take part in the work."""

    folder: Path
    spec: dict[str, Any]
    """What a training depends on, beside its subset and seed."""
    measuring: dict[str, Any]
    """What measuring depends on."""
    subject: Subject
    queries: ImageData
    query_sets: tuple[str, ...]
    members: Members
    trainer: Recipe | OwnTrainer
    settings: TrainAgainSettings
    process: NoiseProcess
    sampling: Sampling | None = None

    @property
    def subsets(self) -> Bool[ndarray, "subset train"]:
        """True where a sample is trained on."""
        return self.members.subsets

    @property
    def units(self) -> tuple[Unit, ...]:
        """All that is to be trained."""
        return self.members.units

    @cached_property
    def grid(self) -> MeasuringGrid:
        """Timesteps and noise of measuring."""
        asked = self.settings
        return make_grid(self.queries.ids, asked.timesteps, asked.draws, self.process.num_timesteps, asked.measure_seed)

    def prepare(self) -> None:
        """Make the folder, or see that it is of this very training."""
        _ = self.grid  # raises where it cannot be
        path = self.folder / "manifest.json"
        if not path.exists():
            write_json(path, self.spec, shared=True)
        try:
            found = json.loads(path.read_text())
        except ValueError as error:
            raise RetrainingError(f"{path} cannot be read: {error}. Delete {self.folder} and train again.") from error
        if found != self.spec:
            raise RetrainingError(f"{path} is of another training. Delete {self.folder} and train again.")

    def outputs_path(self, unit: Unit) -> Path:
        """Give the file that makes a unit count."""
        return self.folder / f"outputs-{sha256_of_json(self.measuring)[:8]}" / f"{self.name(unit)}.npz"

    def model_folder(self, unit: Unit) -> Path:
        """Give the folder of a unit's model."""
        return self.folder / "models" / self.name(unit)

    def name(self, unit: Unit) -> str:
        """Name a unit's files."""
        return f"{self.members.names[unit[0]]}-seed-{unit[1]}"

    def missing(self) -> list[Unit]:
        """Give the units that are not finished."""
        return [unit for unit in self.units if not self.outputs_path(unit).exists()]

    def work(self, device: str, goes_on: Callable[[], bool], on_done: Callable[[], Any] = lambda: None) -> None:
        """Take units that nobody else has, until all are finished or ``goes_on`` says no."""
        threads = torch.get_num_threads()
        torch.set_num_threads(self.settings.threads)
        try:
            while todo := self.missing():
                taken = sum(self._take(unit, device, on_done) for unit in todo if goes_on())
                if not goes_on():
                    return
                if not taken:  # others hold all that is left; should they be killed, it is ours
                    time.sleep(POLL_S)
        finally:
            torch.set_num_threads(threads)

    def _take(self, unit: Unit, device: str, on_done: Callable[[], Any]) -> bool:
        with try_lock(self._lock(unit)) as mine:
            if not mine or self.outputs_path(unit).exists():
                return False
            try:
                self._train_and_measure(unit, device)
            except WhenceError as error:
                raise type(error)(f"Subset {unit[0]}, seed {unit[1]}: {error}") from error
            self._lock(unit).unlink(missing_ok=True)  # whoever still waits for it finds the outputs
        on_done()
        return True

    def _lock(self, unit: Unit) -> Path:
        return self.folder / f".{self.name(unit)}.lock"

    def _train_and_measure(self, unit: Unit, device: str) -> None:
        subset, seed = unit
        folder = self.model_folder(unit)
        images = self.subject.train.select(np.flatnonzero(self.subsets[subset]))
        self.trainer.train(folder, images, seed, device)
        path = self.outputs_path(unit)
        arrays = self._measure(folder, device)
        with publish_file(path, shared=True) as partial:
            content = io.BytesIO()
            np.savez(content, **arrays)
            partial.write_bytes(content.getvalue())
        self._keep_or_remove(unit)

    def _keep_or_remove(self, unit: Unit) -> None:
        """Mark a model that is to stay; remove one that no run has asked to keep."""
        folder = self.model_folder(unit)
        if (self.settings.keep_models or unit[0] in self.members.shared) and folder.exists():
            (folder / _KEPT).touch()
        elif not (folder / _KEPT).exists():
            shutil.rmtree(folder, ignore_errors=True)

    def _measure(self, folder: Path, device: str) -> dict[str, Any]:
        weights = self.settings.weights_name
        last = self.subject.checkpoints[-1]  # a trainer of one's own may leave a LoRA as well, of the same base
        checkpoint = list_checkpoints(folder, base=last.base_folder, lora_alpha=last.lora_alpha)[-1]
        check_files(checkpoint)
        scheduler = load_scheduler(checkpoint)
        process = NoiseProcess.from_scheduler(scheduler, self.process.objective)
        if process.content_hash != self.process.content_hash:
            raise RetrainingError(
                f"the noise schedule or prediction type of the model in {folder} is not that of the run, so that their "
                "outputs cannot be compared. Train with the run's scheduler."
            )
        model = load_model(checkpoint, weights, allow_pickle=self.subject.allow_pickle, device=device)
        check_model(model)
        self._check_encoder(checkpoint.folder)
        measured = measure_model(
            model, process, self.queries, self.grid, loss=self.subject.loss, batch_size=self.settings.batch_size
        )
        made_with = {"device": device, "threads": self.settings.threads, "torch": torch.__version__}
        return {
            "outputs": measured.outputs,
            "timestep_loss": measured.timestep_loss,
            "model": np.array(checkpoint.content_hash(weights)),
            "made_with": np.array(json.dumps(made_with, sort_keys=True)),
        } | ({"images": self.sample(model, scheduler)} if self.sampling else {})

    def _check_encoder(self, folder: Path) -> None:
        """Refuse a model that is told other words, or whose labels are numbered otherwise, than the run's."""
        own, encoding = encoder_of(folder), self.queries.encoding
        if own is not None and (encoding is None or encoding.encoder != own.hash):
            raise RetrainingError(
                f"the model in {folder} knows other labels, or other vectors of words, than the run's, so that queries "
                "would tell it something else. Train with the classes and the settings of words of the run."
            )

    def sample(self, model: Any, scheduler: Any) -> ndarray:
        """Sample the images that are asked of every model: (sample, channel, height, width)."""
        asked = self.sampling
        assert asked is not None
        rows = self.queries.rows(asked.ids)
        return sample_in_parts(
            model,
            scheduler,
            asked.ids,
            steps=asked.steps,
            seed=asked.seed,
            batch_size=self.settings.batch_size,
            conditions=conditions_of(self.queries, rows, device=model.device),
        )

    def tidy(self) -> None:
        """Clear away what a killed process left, where all units are finished."""
        for unit in self.units:
            with try_lock(self._lock(unit)) as mine:
                if mine:
                    self._keep_or_remove(unit)
                    self._lock(unit).unlink(missing_ok=True)

    def read(self, unit: Unit) -> dict[str, ndarray]:
        """Read what a finished model gave."""
        path = self.outputs_path(unit)
        try:
            with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
                images = ("images",) if self.sampling else ()
                return {name: file[name] for name in ("outputs", "timestep_loss", "model", "made_with", *images)}
        except (OSError, ValueError, KeyError, BadZipFile) as error:
            raise RetrainingError(f"{path} is damaged: {error}. Delete it and run again.") from error


def _run(work: ManyModels, show_progress: bool) -> None:
    total, settings = len(work.units), work.settings
    devices = [settings.devices[k % len(settings.devices)] for k in range(settings.workers)]
    with progress_bar("retrain", total, "model", initial=total - len(work.missing()), shown=show_progress) as bar:
        if settings.workers == 1:
            work.work(devices[0], lambda: True, bar.update)
        elif work.missing():
            run_workers(work.work, [(device,) for device in devices], lambda: _show(bar, total - len(work.missing())))


def _warn_of_removed(work: ManyModels) -> None:
    if not work.settings.keep_models:
        return
    finished = set(work.units) - set(work.missing())
    removed = [unit for unit in finished if not work.model_folder(unit).exists()]
    if removed:
        warnings.warn(f"keep_models comes too late for {len(removed)} models: they are removed already.", stacklevel=3)


def _show(bar: Any, done: int) -> None:
    bar.update(done - bar.n)


def check_train_again(settings: TrainAgainSettings, faults: Sequence[str] = ()) -> None:
    """Refuse settings that cannot be met, together with what else was found at fault.

    Raises:
        ConfigError: The message names all faults.
    """
    faults = [*faults]
    faults += [
        f"{name} must be above 0, found {getattr(settings, name)}"
        for name in ("checkpoints", "timesteps", "batch_size", "workers", "threads")
        if getattr(settings, name) < 1
    ]
    if not settings.seeds or len(set(settings.seeds)) < len(settings.seeds):
        faults.append(f"seeds must be one or more different numbers, found {settings.seeds}")
    if not settings.devices:
        faults.append("devices must name at least one")
    if settings.epochs is not None and settings.same_steps:
        faults.append("epochs and same_steps contradict each other; give one")
    lengthened = settings.epochs is not None or settings.same_steps or settings.checkpoints != 1
    if settings.trainer is not None and lengthened:
        faults.append("epochs, same_steps and checkpoints are of the run's own training; a trainer sets its own")
    if faults:
        raise ConfigError("; ".join(faults) + ".")
    for device in settings.devices:
        check_device(device)
