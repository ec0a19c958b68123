"""Retraining on subsets: many models, each trained from scratch on a random part of the training set.

    retraining/<hash>/        the models' outputs, one by one: see ``whence.many_models``
    ground_truth/<hash>/      all of them together: see ``whence.ground_truth``

More subsets or seeds later use what is there, and so do other queries where models were kept.
"""

import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import filelock
import numpy as np

from whence._files import sha256_of_json
from whence._trainers import Recipe
from whence.config import RetrainingSettings
from whence.data import ImageData
from whence.errors import DataError
from whence.ground_truth import GroundTruth
from whence.many_models import ManyModels, Members, check_train_again, plan_models, train_models
from whence.measuring import finite_measures
from whence.subject import Subject
from whence.subsets import draw_subsets


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
    target = folder / "ground_truth" / sha256_of_json(_identity(work))[:8]
    if not (target / "ground_truth.json").exists():
        train_models(work, show_progress=show_progress)
        with filelock.FileLock(work.folder / ".assembling.lock"):  # others may end at the same moment
            if not (target / "ground_truth.json").exists():
                _assemble(work).save(target)
    return GroundTruth.load(target)


def _plan(subject: Subject, queries: Mapping[str, ImageData], settings: RetrainingSettings, folder: Path) -> ManyModels:
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


def _check_settings(settings: RetrainingSettings) -> None:
    faults = [f"subsets must be above 0, found {settings.subsets}"] if settings.subsets < 1 else []
    if not 0 < settings.fraction < 1:
        faults.append(f"fraction must lie between 0 and 1, found {settings.fraction}")
    check_train_again(settings, faults)


def _identity(work: ManyModels) -> dict[str, Any]:
    """What the ground truth depends on."""
    counts = {"subsets": len(work.subsets), "seeds": work.settings.seeds}
    return {"training": work.spec, "measuring": work.measuring, **counts}


def _assemble(work: ManyModels) -> GroundTruth:
    """Put the outputs of all models together; units are all subsets with the first seed, then the second, ..."""
    shape = (len(work.settings.seeds), len(work.subsets))
    units = [work.read(unit) for unit in work.units]
    # Units are ordered by seed, then subset; the arrays by subset, then seed.
    outputs = np.stack([u["outputs"] for u in units]).reshape(*shape, -1, len(work.queries))
    losses = np.stack([u["timestep_loss"] for u in units]).reshape(*shape, len(work.queries), -1)
    models = np.array([str(u["model"]) for u in units]).reshape(shape)
    made_with = sorted({str(u["made_with"]) for u in units})
    return GroundTruth(
        subsets=work.subsets,
        train_ids=work.subject.train.ids,
        seeds=work.settings.seeds,
        query_ids=work.queries.ids,
        query_sets=work.query_sets,
        query_hashes=work.queries.seen_hashes,
        measures=finite_measures(work.process),
        outputs=np.ascontiguousarray(outputs.transpose(2, 1, 0, 3)),
        timesteps=work.grid.timesteps,
        timestep_loss=np.ascontiguousarray(losses.transpose(1, 0, 2, 3)),
        models=tuple(map(tuple, models.T.tolist())),
        details=_identity(work)
        | {"made_with": [json.loads(text) for text in made_with], "whence": version("whence")}
        | {"notes": _notes(work)},
    )


def _notes(work: ManyModels) -> list[str]:
    notes = [work.members.note]
    if isinstance(work.trainer, Recipe):
        size = int(work.subsets[0].sum())
        epochs, steps = work.trainer.training_of(size).epochs, work.trainer.num_steps(size)
        notes.append(f"Each model took {epochs} epochs over its subset, {steps} optimizer steps.")
    if len(work.settings.seeds) == 1:
        notes.append("With one seed the noise of the outputs is not known; no ceiling can be given.")
    return notes
