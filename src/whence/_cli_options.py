"""Options that commands share."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from whence.config import ConditioningSettings, DataSettings, LossName, ObjectiveSettings

if TYPE_CHECKING:
    from whence.pipeline import Run

Flat = tyro.conf.OmitArgPrefixes
"""Settings whose options carry no name before their own: ``--timesteps``, not ``--settings.timesteps``."""


@dataclass(frozen=True)
class ModelSource:
    """What a model was trained on, and how. A run of whence knows all of it."""

    data: str | None = None
    """Training images: of a model that others trained, or where they are now."""
    out: Path | None = None
    """Folder for what is made, where the model was not trained by whence."""
    loss: LossName | None = None
    """Training loss of a model without a record. Default: mse."""
    allow_pickle: bool = False
    """Read weights from .bin files too, with weights_only. Only for files you trust."""
    data_settings: Flat[DataSettings] = DataSettings()
    """How images are read. Default: as the run did."""
    conditioning: Flat[ConditioningSettings] = ConditioningSettings()
    """Where latents, captions or classes come from."""
    objective: Flat[ObjectiveSettings] = ObjectiveSettings()
    """What a training without a record added to noise and loss."""

    def open(self, model: Path) -> "Run":
        """Open a run, or a model that others trained."""
        from whence.opening import open_run

        return open_run(
            model,
            data=self.data,
            data_settings=given(self.data_settings),
            out=self.out,
            loss=self.loss,
            allow_pickle=self.allow_pickle,
            conditioning=given(self.conditioning),
            objective=given(self.objective),
        )


def given(settings: DataSettings | ConditioningSettings | ObjectiveSettings) -> dict[str, Any]:
    """Keep what differs from the defaults: the rest is as the run did it."""
    plain = type(settings)()
    return {name: value for name, value in vars(settings).items() if value != getattr(plain, name)}
