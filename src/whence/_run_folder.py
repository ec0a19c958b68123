"""What is in the folder of a run, and what is at hand before any stage works: images, record, checkpoints, scores."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from numpy import ndarray
from torch import Tensor

from whence._files import sha256_of_json, write_json
from whence.arguments import BUNDLED, Images, Queries, parts, sources
from whence.checkpoints import Checkpoint, list_checkpoints, load_model, load_scheduler
from whence.config import (
    ConditioningSettings,
    DataSettings,
    LossName,
    ObjectiveSettings,
    QuerySettings,
    TraceSettings,
)
from whence.data import ImageData, concatenate, open_images, save_arrays
from whence.encoding import Encoding, find_encoding
from whence.errors import ConfigError, DataError, RecordError, ScoresError
from whence.event_table import EventBatch, EventTable, grid_events, make_batch
from whence.methods import GradientPlan, Grid, Trajectory
from whence.record import Record, read_manifest
from whence.regions import with_masks
from whence.replay_check import CheckRow, check_run
from whence.sampling import sample_images
from whence.scores import Scores, TopScores
from whence.subject import Subject
from whence.trajectories import Trajectories
from whence.words import WITHHELD


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
            opened = _with_prompts(opened, queries.prompts, as_labels=self._reads == "labels")
            opened = opened if queries.mask is None else with_masks(opened, queries.mask, settings)
        made_by = None if opened.encoding is None else opened.encoding.encoder
        is_ours = self.encoding is not None and made_by == self.encoding.encoder.hash
        # Mirroring and draws from the posterior are of training.
        encoding = self.encoding and replace(self.encoding, mirrored=False, drawn=False)
        return opened if is_ours else self._encoded(opened, encoding)

    def load_scores(self, queries: ImageData | None = None) -> tuple[list[Scores], ImageData, dict[str, Any]]:
        """Load what was traced last: scores, queries, settings.

        Args:
            queries: The queries, where they were given to :meth:`trace` as opened images.

        Returns:
            Scores in the order they were asked for, the queries, and the settings.

        Raises:
            ScoresError: If nothing was traced, or the queries are not where they were.
        """
        path = self.folder / "scores" / "latest.json"
        if not path.exists():
            raise ScoresError(f"{self.folder} has no scores yet. Make some with `whence trace`.")
        try:
            latest = json.loads(path.read_text())
            folders, sources, settings = latest["folders"], latest["queries"], latest["settings"]
            told = latest.get("told")
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise ScoresError(f"{path} is damaged ({error!r}). Trace again; what is computed is used.") from error
        scores = [Scores.load(self.folder / "scores" / name) for name in folders]
        if queries is not None:
            return scores, queries, settings
        if None in sources:
            raise ScoresError("The queries were given as opened images, not as files; pass them as queries=....")
        try:
            return scores, self.open_queries(Queries(sources, **told) if told else sources), settings
        except DataError as error:
            raise ScoresError(f"The queries of the last trace cannot be opened again: {error}") from error

    def _note_latest(
        self, scores: Sequence[Scores | TopScores], queries: Images, settings: TraceSettings | QuerySettings
    ) -> None:
        """Remember what :meth:`report` shows."""
        write_json(
            self.folder / "scores" / "latest.json",
            {
                "folders": [s.folder.name for s in scores if s.folder],
                "queries": sources(queries),
                "told": queries.told() if isinstance(queries, Queries) else None,
                "settings": asdict(settings),
            },
        )

    def settings(self) -> dict[str, Any]:
        """Give the content of ``config.yaml``, and the training settings of the record."""
        config = yaml.safe_load((self.folder / "config.yaml").read_text())
        return config | ({"training": self.record.manifest["config"]} if self.record else {})

    def sample(
        self,
        count: int,
        *,
        prompts: Sequence[str] = (),
        guidance_scale: float = 1.0,
        steps: int = 50,
        seed: int = 0,
        trajectory: bool = False,
        show_progress: bool = True,
    ) -> Path:
        """Sample images from the last checkpoint into ``generated/``; what is there already is not sampled again.

        Args:
            count: How many; of each prompt, where there are some.
            prompts: Captions or labels, of a model that is told these; the empty one stands for none.
            guidance_scale: Scale of classifier-free guidance; 1 is the model's own prediction.
            steps: Denoising steps: of DDIM, or Euler's of flow matching.
            seed: Seed of the noise; the k-th image depends on it and k alone.
            trajectory: Also keep what the sampler took each image to be at each step, as journey-trak needs it.
            show_progress: Show a progress bar.

        Returns:
            A file that opens as images, with all its decimals and with the prompts as captions (and labels).

        Raises:
            ConfigError: If ``count`` or ``steps`` is not above 0, or prompts are missing or are not for this model.
            DataError: If a prompt has too many words, or is no label of the model.
        """
        if count < 1 or steps < 1:
            raise ConfigError(f"count and steps must be above 0; found {count} and {steps}.")
        last = self.subject.checkpoints[-1]
        self._check_prompts(prompts)
        sampler = "euler" if self.subject.process.prediction_type == "flow" else "ddim"
        name = f"{sampler}{steps}-{count}-seed{seed}-step{last.step}-{last.content_hash()[:8]}"
        if self.encoding is not None:
            name += f"-{sha256_of_json([prompts, guidance_scale, self.encoding.encoder.hash])[:8]}"
        path = self.folder / "generated" / f"{name}{'-trajectory' if trajectory else ''}.safetensors"
        if not path.exists():
            texts = [prompt for prompt in prompts or [""] for _ in range(count)]
            ids = [f"generated-{k}" for k in range(len(texts))]
            frames: dict[int, ndarray] = {}
            latent = self.encoding is not None and self.encoding.encoder.has_vae
            drawn = sample_images(
                load_model(last, allow_pickle=self.allow_pickle),
                load_scheduler(last),
                ids,
                steps=steps,
                seed=seed,
                show_progress=show_progress,
                conditions=self._told(texts),
                withheld=self._told([WITHHELD] * len(texts)) if guidance_scale != 1 else None,
                guidance_scale=guidance_scale,
                latent_shape=self.train_images.input_shape if latent else None,
                keep=frames.__setitem__ if trajectory else None,
            )
            about = {"checkpoint_step": last.step, "checkpoint_sha256": last.content_hash()}
            about |= {"sampler": sampler, "eta": 0.0, "steps": steps, "seed": seed}
            each = [about] * len(texts)
            if self._reads is not None:
                each = [about | {"guidance_scale": guidance_scale, "prompt": text} for text in texts]
            timesteps = tuple(sorted(frames))
            kept = [frames[t] for t in timesteps]
            path_taken = Trajectories(np.stack(kept, axis=1), timesteps, tuple(each), latent) if trajectory else None
            images = self.encoding.encoder.images_of(drawn) if latent and self.encoding is not None else drawn
            labels = texts if self._reads == "labels" else ["generated"] * len(texts)
            captions = texts if self._reads is not None else None
            save_arrays(path, images, ids, labels, path_taken, captions)
        return path

    @property
    def _reads(self) -> str | None:
        """What the network is told of images: captions, labels, or nothing."""
        return None if self.encoding is None else self.encoding.reads

    def _check_prompts(self, prompts: Sequence[str]) -> None:
        if prompts and self._reads is None:
            raise ConfigError(
                "The model is told nothing but the noisy image, so it cannot be given a prompt. Train one with "
                "--condition words or label."
            )
        if not prompts and self._reads is not None:
            raise ConfigError(f"The model is told {self._reads}; give at least one with --prompt ('' for none).")

    def _told(self, texts: Sequence[str]) -> dict[str, Tensor] | None:
        if self.encoding is None or self._reads is None:
            return None
        distinct = {text: k for k, text in enumerate(dict.fromkeys(texts))}
        made = self.encoding.encoder.conditions(list(distinct), (self.train_images.height, self.train_images.width))
        which = [distinct[text] for text in texts]
        return {name: torch.from_numpy(values[which]) for name, values in made.items()}

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
