"""What is in the folder of a run, and what is at hand before any stage works: images, record, checkpoints, scores."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from whence._run_scores import load_latest, shown_as_one
from whence.arguments import BUNDLED, Images, Queries, parts, prompts_of
from whence.checkpoints import Checkpoint, list_checkpoints
from whence.config import ConditioningSettings, DataSettings, LossName, ObjectiveSettings
from whence.data import ImageData, concatenate, open_images
from whence.encoding import Encoding, find_encoding
from whence.errors import ConfigError, DataError, RecordError, ScoresError
from whence.event_table import EventBatch, EventTable, grid_events, make_batch
from whence.methods import GradientPlan, Grid, Trajectory
from whence.record import Record, read_manifest
from whence.regions import with_masks
from whence.replay_check import CheckRow, check_run
from whence.scores import Scores
from whence.subject import Subject


@dataclass(frozen=True)
class RunFolder:
    """What a :class:`~whence.pipeline.Run` holds; the stages are added there."""

    folder: Path
    data_source: str
    data_settings: DataSettings
    model: Path
    """Where the checkpoints are: the run itself, or a folder of someone else's."""
    loss: LossName
    allow_pickle: bool = False
    conditioning: ConditioningSettings = ConditioningSettings()
    """Where latents and conditions come from."""
    objective: ObjectiveSettings | None = None
    """What a foreign training added to noise and loss; a record knows its own."""

    @cached_property
    def train_images(self) -> ImageData:
        """The training images, encoded where the network sees latents or is told conditions."""
        images = self.opened_images
        if self.encoding is not None and self.encoding.one_caption:
            images = replace(images, captions=None)
        return self._encoded(images, self.encoding)

    @cached_property
    def opened_images(self) -> ImageData:
        """The training images as they are in their source."""
        try:
            return open_images(self.data_source, self.data_settings)
        except DataError as error:
            if Path(self.data_source).exists() or self.data_source in BUNDLED:
                raise
            raise DataError(f"{error} If the images were moved, say with --data where they are now.") from error

    @cached_property
    def record(self) -> Record | None:
        """The record of training, or None."""
        folder = self.model / "record"
        if folder.exists() and not (folder / "manifest.json").exists():
            raise RecordError(
                f"{folder} has no manifest.json, so what is in it cannot be used. Restore it; or, to trace the model "
                "as one without a record, move the folder away."
            )
        return Record.open(folder) if folder.exists() else None

    @cached_property
    def checkpoints(self) -> list[Checkpoint]:
        """Checkpoints of the model."""
        base = None if self.conditioning.base is None else Path(self.conditioning.base)
        return list_checkpoints(self.model, base=base, lora_alpha=self.conditioning.lora_alpha)

    @cached_property
    def subject(self) -> Subject:
        """What is traced."""
        recorded = self.record and self.record.manifest.get("objective")
        objective = ObjectiveSettings(**recorded) if recorded else self.objective or ObjectiveSettings()
        return Subject(self.checkpoints, self.train_images, self.record, self.loss, self.allow_pickle, objective)

    @cached_property
    def encoding(self) -> Encoding | None:
        """How images are encoded; None where the network sees pixels and is told nothing."""
        return find_encoding(self.checkpoints[-1], self.opened_images, self.record, self.conditioning)

    def _encoded(self, images: ImageData, encoding: Encoding | None) -> ImageData:
        return images if encoding is None else encoding.encode(images, self.folder / "cache")

    def open_queries(self, queries: Images) -> ImageData:
        """Open query images, read them at the size of the training images, and encode them as those are."""
        given = parts(queries)
        if not given:
            raise ConfigError("Give at least one query image.")
        columns = dict.fromkeys(("image_column", "id_column", "label_column", "caption_column"))
        settings = replace(self.data_settings, **columns)
        opened = concatenate([p if isinstance(p, ImageData) else open_images(p, settings) for p in given])
        if isinstance(queries, Queries):
            told = None if self.encoding is None else self.encoding.reads
            opened = _with_prompts(opened, prompts_of(queries), as_labels=told == "labels")
            opened = opened if queries.mask is None else with_masks(opened, queries.mask, settings)
        made_by = None if opened.encoding is None else opened.encoding.encoder
        is_ours = self.encoding is not None and made_by == self.encoding.encoder.hash
        # Mirroring and draws from the posterior are of training.
        encoding = self.encoding and replace(self.encoding, mirrored=False, drawn=False)
        return opened if is_ours else self._encoded(opened, encoding)

    def keep_settings(self) -> None:
        """Write down how the model was opened, now that something was made by it."""
        from whence._run_config import keep_network_settings  # which knows this class

        keep_network_settings(self)

    def load_scores(self, queries: ImageData | None = None) -> tuple[list[Scores], ImageData, dict[str, Any]]:
        """Load what was traced last: scores, queries, settings.

        Args:
            queries: The queries, where they were given to :meth:`trace` as opened images.

        Returns:
            Scores in the order they were asked for, the queries, and the settings.

        Raises:
            ScoresError: If nothing was traced, or the queries are not where they were.
        """
        latest = load_latest(self.folder)
        if queries is not None:
            return latest.scores, queries, latest.settings
        given = latest.queries
        try:
            return *shown_as_one(latest.scores, self.open_queries(given)), latest.settings
        except DataError as error:
            raise ScoresError(f"The queries of the last trace cannot be opened again: {error}") from error

    def settings(self) -> dict[str, Any]:
        """Give the content of ``config.yaml``, and the training settings of the record."""
        config = yaml.safe_load((self.folder / "config.yaml").read_text())
        return config | ({"training": self.record.manifest["config"]} if self.record else {})

    def check(self, *, device: str = "cpu") -> list[CheckRow]:
        """Compare the record with itself and with the checkpoints; see :mod:`whence.replay_check`.

        Args:
            device: Torch device.

        Returns:
            One verdict on the keys, and one for each checkpoint.

        Raises:
            RecordError: If there is no record, or it is damaged or of other images.
        """
        self._check_recorded()
        return check_run(self.subject, device=device)

    def events(
        self, plan: GradientPlan, ids: Sequence[str], *, checkpoint: int = -1, seed: int = 0
    ) -> tuple[EventTable, EventBatch]:
        """Hand out the events at which training samples are taken, as arrays; see :func:`events`."""
        rows = self.train_images.rows(ids)
        process = self.subject.process
        if isinstance(plan.events, Grid):
            table = grid_events(self.train_images, rows, "train", plan.events, process.num_timesteps, seed)
        elif isinstance(plan.events, Trajectory):
            raise ConfigError("Trajectories are of queries, not of training images: these are replayed or on a grid.")
        else:
            self._check_recorded()
            checkpoints, replays = self.subject.checkpoints, self.subject.replays
            assert replays is not None  # there is a record
            if not -len(checkpoints) <= checkpoint < len(checkpoints):
                raise ConfigError(
                    f"There are {len(checkpoints)} checkpoints, 0 to {len(checkpoints) - 1}; found {checkpoint}."
                )
            step = checkpoints[checkpoint].step
            everything = replays.events(self.subject.previous_step[step], step, plan.events, "learning_rate")
            table = everything.take(np.concatenate([np.flatnonzero(everything.row == row) for row in rows]))
        return table, make_batch(table, self.train_images, process)

    def _check_recorded(self) -> None:
        if self.record is None:
            read_manifest(self.model / "record")  # raises, saying what is missing


def _with_prompts(images: ImageData, prompts: Sequence[str], *, as_labels: bool) -> ImageData:
    """Give images captions, or labels too: one for each, or one for all. They are to be encoded with these."""
    if not prompts:
        return images
    if len(prompts) not in (1, len(images)):
        raise DataError(
            f"There must be one prompt for each query image, or one for all; found {len(prompts)} prompts for "
            f"{len(images)} images of {images.source}."
        )
    texts = tuple(prompts) * (len(images) if len(prompts) == 1 else 1)
    return replace(images, captions=texts, labels=texts if as_labels else images.labels, encoding=None)
