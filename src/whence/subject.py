"""What is traced: a model's checkpoints together with the images and the record of its training."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from whence.checkpoints import Checkpoint, check_files, load_model, load_scheduler
from whence.config import GradientSettings, LossName
from whence.data import ImageData
from whence.diffusion.adapters import check_model
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

    @cached_property
    def process(self) -> NoiseProcess:
        """The noising process of the last checkpoint."""
        return NoiseProcess.from_scheduler(load_scheduler(self.checkpoints[-1]))

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
        )
        check_model(model)
        _check_image_size(model.config, self.train, checkpoint)
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


def _check_image_size(config: Any, images: ImageData, checkpoint: Checkpoint) -> None:
    size = config.sample_size
    if config.in_channels != images.channels:
        raise CheckpointError(
            f"The model in {checkpoint.folder} takes {config.in_channels} channels; the training images have "
            f"{images.channels}."
        )
    want = tuple(size) if isinstance(size, list | tuple) else (size, size)
    if size is not None and want != (images.height, images.width):
        raise CheckpointError(
            f"The model in {checkpoint.folder} was made for {want[0]} x {want[1]} pixels; the training images have "
            f"{images.height} x {images.width}. Give --resolution."
        )
