"""Retraining on subsets: many models, each trained from scratch on a part of the training set, and their outputs.

    retraining/<hash>/manifest.json                     what each training depends on
    retraining/<hash>/models/subset-0003-seed-1/        in training; or finished, where models are kept
    retraining/<hash>/models/ids-<hash>-seed-1/         the same of a subset that was not drawn, by its members
    retraining/<hash>/outputs-<hash>/subset-0003-seed-1.npz   outputs of one model for the queries; makes it count
    ground_truth/<hash>/                                all of them together: see ``whence.ground_truth``

One file of outputs is one unit of work: a subset and a seed. Any number of processes may run at once, on one disk; each
takes units that no other holds. Killed at any moment, the next run goes on with what is missing. More subsets or seeds
use what is there, and so do other queries where models were kept.
"""

import io
import json
import shutil
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import filelock
import numpy as np
import torch
from jaxtyping import Bool
from numpy import ndarray

from whence._files import as_json, publish_file, sha256_of_json, try_lock, write_json
from whence._trainers import OwnTrainer, Recipe, make_trainer
from whence._workers import POLL_S, run_workers
from whence.checkpoints import check_files, list_checkpoints, load_model, load_scheduler
from whence.config import RetrainingSettings, TrainAgainSettings
from whence.data import ImageData, concatenate
from whence.diffusion.adapters import check_model
from whence.diffusion.process import NoiseProcess
from whence.errors import ConfigError, DataError, RetrainingError, WhenceError
from whence.ground_truth import GroundTruth
from whence.measuring import MeasuringGrid, finite_measures, make_grid, measure_model
from whence.progress import progress_bar
from whence.sampling import sample_in_parts
from whence.subject import Subject
from whence.subsets import draw_subsets
from whence.training import check_device

VERSION = 1
"""Raised when the same settings give other outputs."""

_KEPT = ".keep"

Unit = tuple[int, int]
"""Number of the subset, and seed."""


def retrain(
    subject: Subject,
    queries: Mapping[str, ImageData],
    settings: RetrainingSettings,
    folder: Path,
    *,
    show_progress: bool = True,
) -> GroundTruth:
    """Train models on subsets of the training set and measure them.

    Args:
        subject: Whose training is repeated.
        queries: Images to measure, by the name of their set, such as validation and generated.
        settings: Subsets, seeds, training, measuring, processes.
        folder: The run.
        show_progress: Show a progress bar.

    Returns:
        The ground truth, which is also in ``ground_truth/`` of the run.

    Raises:
        ConfigError: If settings cannot be met; nothing is trained then.
        RetrainingError: If a training fails; the message names subset and seed. What was finished is kept.
    """
    work = _plan(subject, queries, settings, folder)
    target = folder / "ground_truth" / sha256_of_json(work.identity)[:8]
    if not (target / "ground_truth.json").exists():
        train_models(work, show_progress=show_progress)
        with filelock.FileLock(work.folder / ".assembling.lock"):  # others may end at the same moment
            if not (target / "ground_truth.json").exists():
                work.assemble().save(target)
    return GroundTruth.load(target)


def _plan(
    subject: Subject, queries: Mapping[str, ImageData], settings: RetrainingSettings, folder: Path
) -> "Retraining":
    """Check everything that can be checked without a training."""
    _check_settings(settings)
    images = subject.train
    if settings.stratified and images.labels is None:
        raise DataError(f"{images.source} has no labels, by which subsets could be stratified.")
    labels = images.labels if settings.stratified else None
    subsets = draw_subsets(images.ids, settings.subsets, settings.fraction, settings.subset_seed, labels)
    how = "stratified by label" if settings.stratified else "drawn plainly"
    drawn = Members(
        subsets,
        tuple(f"subset-{number:04d}" for number in range(len(subsets))),
        tuple((number, seed) for seed in settings.seeds for number in range(len(subsets))),
        # The labels of subsets, not of anything else: renaming a label then changes nothing else.
        {
            "fraction": settings.fraction,
            "seed": settings.subset_seed,
            "strata": sha256_of_json(labels) if labels else None,
        },
        f"{len(subsets)} subsets of {int(subsets[0].sum())} of {len(images)} images, {how}, each trained from scratch "
        "with each seed.",
    )
    return plan_models(subject, queries, settings, folder, drawn)


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
) -> "Retraining":
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
    return Retraining(
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


def train_models(work: "Retraining", *, show_progress: bool = True) -> None:
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
class Retraining:
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
    def identity(self) -> dict[str, Any]:
        """What the ground truth depends on."""
        counts = {"subsets": len(self.subsets), "seeds": self.settings.seeds}
        return {"training": self.spec, "measuring": self.measuring, **counts}

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
        checkpoint = list_checkpoints(folder)[-1]
        check_files(checkpoint)
        scheduler = load_scheduler(checkpoint)
        process = NoiseProcess.from_scheduler(scheduler)
        if process.content_hash != self.process.content_hash:
            raise RetrainingError(
                f"the noise schedule or prediction type of the model in {folder} is not that of the run, so that their "
                "outputs cannot be compared. Train with the run's scheduler."
            )
        model = load_model(checkpoint, weights, allow_pickle=self.subject.allow_pickle, device=device)
        check_model(model)
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

    def sample(self, model: Any, scheduler: Any) -> ndarray:
        """Sample the images that are asked of every model: (sample, channel, height, width)."""
        asked = self.sampling
        assert asked is not None
        size = self.settings.batch_size
        return sample_in_parts(model, scheduler, asked.ids, steps=asked.steps, seed=asked.seed, batch_size=size)

    def tidy(self) -> None:
        """Clear away what a killed process left, where all units are finished."""
        for unit in self.units:
            with try_lock(self._lock(unit)) as mine:
                if mine:
                    self._keep_or_remove(unit)
                    self._lock(unit).unlink(missing_ok=True)

    def assemble(self) -> GroundTruth:
        """Put the outputs of all models together; units are all subsets with the first seed, then the second, ..."""
        shape = (len(self.settings.seeds), len(self.subsets))
        units = [self.read(unit) for unit in self.units]
        # Units are ordered by seed, then subset; the arrays by subset, then seed.
        outputs = np.stack([u["outputs"] for u in units]).reshape(*shape, -1, len(self.queries))
        losses = np.stack([u["timestep_loss"] for u in units]).reshape(*shape, len(self.queries), -1)
        models = np.array([str(u["model"]) for u in units]).reshape(shape)
        made_with = sorted({str(u["made_with"]) for u in units})
        return GroundTruth(
            subsets=self.subsets,
            train_ids=self.subject.train.ids,
            seeds=self.settings.seeds,
            query_ids=self.queries.ids,
            query_sets=self.query_sets,
            query_hashes=self.queries.hashes,
            measures=finite_measures(self.process),
            outputs=np.ascontiguousarray(outputs.transpose(2, 1, 0, 3)),
            timesteps=self.grid.timesteps,
            timestep_loss=np.ascontiguousarray(losses.transpose(1, 0, 2, 3)),
            models=tuple(map(tuple, models.T.tolist())),
            details=self.identity
            | {"made_with": [json.loads(text) for text in made_with], "whence": version("whence")}
            | {"notes": self._notes()},
        )

    def read(self, unit: Unit) -> dict[str, ndarray]:
        """Read what a finished model gave."""
        path = self.outputs_path(unit)
        try:
            with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
                images = ("images",) if self.sampling else ()
                return {name: file[name] for name in ("outputs", "timestep_loss", "model", "made_with", *images)}
        except (OSError, ValueError, KeyError, BadZipFile) as error:
            raise RetrainingError(f"{path} is damaged: {error}. Delete it and run again.") from error

    def _notes(self) -> list[str]:
        notes = [self.members.note]
        if isinstance(self.trainer, Recipe):
            size = int(self.subsets[0].sum())
            epochs, steps = self.trainer.training_of(size).epochs, self.trainer.num_steps(size)
            notes.append(f"Each model took {epochs} epochs over its subset, {steps} optimizer steps.")
        if len(self.settings.seeds) == 1:
            notes.append("With one seed the noise of the outputs is not known; no ceiling can be given.")
        return notes


def _run(work: Retraining, show_progress: bool) -> None:
    total, settings = len(work.units), work.settings
    devices = [settings.devices[k % len(settings.devices)] for k in range(settings.workers)]
    with progress_bar("retrain", total, "model", initial=total - len(work.missing()), shown=show_progress) as bar:
        if settings.workers == 1:
            work.work(devices[0], lambda: True, bar.update)
        elif work.missing():
            run_workers(work.work, [(device,) for device in devices], lambda: _show(bar, total - len(work.missing())))


def _warn_of_removed(work: Retraining) -> None:
    if not work.settings.keep_models:
        return
    finished = set(work.units) - set(work.missing())
    removed = [unit for unit in finished if not work.model_folder(unit).exists()]
    if removed:
        warnings.warn(f"keep_models comes too late for {len(removed)} models: they are removed already.", stacklevel=3)


def _show(bar: Any, done: int) -> None:
    bar.update(done - bar.n)


def _check_settings(settings: RetrainingSettings) -> None:
    faults = [f"subsets must be above 0, found {settings.subsets}"] if settings.subsets < 1 else []
    if not 0 < settings.fraction < 1:
        faults.append(f"fraction must lie between 0 and 1, found {settings.fraction}")
    check_train_again(settings, faults)


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
