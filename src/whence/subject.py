"""What is traced: a model's checkpoints together with the images and the record of its training."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from whence.checkpoints import Checkpoint, check_files, load_model, load_scheduler, scheduler_of_record
from whence.config import GradientSettings, LossName, ObjectiveSettings
from whence.data import ImageData
from whence.diffusion.adapters import channels_of, check_model, check_process, check_widths, needed_conditions
from whence.diffusion.process import NoiseProcess
from whence.errors import CheckpointError
from whence.event_table import Replays
from whence.gradients import GradientSource
from whence.record import Record


@dataclass(frozen=True)
class Subject:
    """The training side of a score: checkpoints, the images they were trained on, and the record of it."""

    checkpoints: Sequence[Checkpoint]
    train: ImageData
    record: Record | None
    """None for models that whence did not train; then the training side is taken on a grid."""
    loss: LossName
    allow_pickle: bool = False
    objective: ObjectiveSettings = ObjectiveSettings()
    """What training added to noise and loss."""

    @cached_property
    def process(self) -> NoiseProcess:
        """The noising process of the last checkpoint, with what training added to it.

        Raises:
            CheckpointError: If the scheduler is not the one that training had, by the record.
        """
        process = NoiseProcess.from_scheduler(load_scheduler(self.checkpoints[-1]), self.objective)
        if self.record is not None:
            manifest = self.record.folder / "manifest.json"
            trained = NoiseProcess.from_scheduler(scheduler_of_record(manifest, self.record.manifest), self.objective)
            if trained.content_hash != process.content_hash:
                raise CheckpointError(
                    f"The scheduler beside {self.checkpoints[-1].folder} makes another noise or target than the one "
                    f"that training had by {manifest}. Put the scheduler of the training there."
                )
        return process

    def used_checkpoints(self, which: Literal["all", "last"]) -> list[Checkpoint]:
        """Give the checkpoints that a method or store takes gradients at."""
        return list(self.checkpoints)[-1 if which == "last" else 0 :]

    @cached_property
    def previous_step(self) -> dict[int, int]:
        """Step of the checkpoint before each, by the checkpoint's step; 0 before the first."""
        steps = [c.step for c in self.checkpoints]
        return dict(zip(steps, [0, *steps], strict=False))

    @cached_property
    def _hashes(self) -> dict[tuple[int, str], str]:
        return {}

    @cached_property
    def _bases(self) -> dict[Any, Any]:
        """Base of the LoRA that was loaded last."""
        return {}

    def describe(self, checkpoints: Sequence[Checkpoint], settings: GradientSettings) -> dict[str, Any]:
        """Name all that gradients at some checkpoints depend on."""
        for c in checkpoints:
            key = (c.step, settings.weights_name)
            self._hashes[key] = self._hashes.get(key) or c.content_hash(settings.weights_name)
        return {
            "loss": self.loss,
            "weights_name": settings.weights_name,
            "parameters": settings.parameters,
            "dtype": settings.dtype,
            "autocast": settings.autocast,
            "tf32": settings.tf32,
            "process": self.process.content_hash,
            "checkpoints": [
                {
                    "after": self.previous_step[c.step],
                    "step": c.step,
                    "sha256": self._hashes[c.step, settings.weights_name],
                }
                for c in checkpoints
            ],
            "record": self.record.content_hash if self.record else None,
            "train": {"fingerprint": self.train.fingerprint, "num_images": len(self.train)},
        }

    @cached_property
    def replays(self) -> Replays | None:
        """The record matched with the images, or None."""
        return Replays(self.record, self.train) if self.record else None

    def source(self, checkpoint: Checkpoint, settings: GradientSettings) -> GradientSource:
        """Load a checkpoint to take gradients from."""
        check_files(checkpoint)
        model = load_model(
            checkpoint,
            settings.weights_name,
            allow_pickle=self.allow_pickle,
            device=settings.device,
            dtype=settings.dtype,
            bases=self._bases,
        )
        check_model(model)
        check_process(model, self.process, str(checkpoint.folder))
        check_inputs(model, self.train, str(checkpoint.folder))
        return GradientSource(
            model,
            self.process,
            self.loss,
            settings.batch_size,
            f"checkpoint {checkpoint.step}",
            patterns=settings.parameters,
            uncovered=settings.uncovered,
            autocast=settings.autocast,
            tf32=settings.tf32,
        )


def check_inputs(model: Any, images: ImageData, where: str) -> None:
    """Refuse images that a network cannot take: of another size, or without the conditions it is told.

    Args:
        model: The network.
        images: Training images or queries, encoded where the network asks for it.
        where: The checkpoint, for messages.

    Raises:
        CheckpointError: The message says what the network takes and what the images have.
    """
    given = images.conditions([0])
    lacking = [name for name in needed_conditions(model) if name not in given]
    if lacking:
        raise CheckpointError(
            f"The {type(model).__name__} in {where} is told {', '.join(lacking)} of each image; {images.source} comes "
            f"with {', '.join(given) or 'nothing but pixels'}. Give captions or labels with the images, and the whole "
            "pipeline folder with its text encoders."
        )
    check_widths(model, {name: values.shape[-1] for name, values in given.items() if values.ndim > 1}, where)
    channels, height, width = images.input_shape
    encoded = images.encoding is not None and images.encoding.latents is not None
    kind = "their latents have" if encoded else "the training images have"
    of_noised = channels_of(model)
    if of_noised != channels:
        raise CheckpointError(
            f"The model in {where} takes {of_noised} channels; {kind} {channels}. Where it was trained on latents, "
            "give the pipeline folder with its VAE."
        )
    size = getattr(model.config, "sample_size", None)
    want = tuple(size) if isinstance(size, list | tuple) else (size, size)
    if size is not None and not encoded and want != (height, width):
        raise CheckpointError(
            f"The model in {where} was made for {want[0]} x {want[1]} pixels; the training images have "
            f"{height} x {width}. Give --resolution."
        )
