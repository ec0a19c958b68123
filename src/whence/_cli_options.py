"""Options that commands share."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from whence._cli_printing import print_rankings
from whence.config import ConditioningSettings, DataSettings, LossName, ObjectiveSettings, changed_settings
from whence.errors import ConfigError

if TYPE_CHECKING:
    from whence.arguments import Queries
    from whence.pipeline import Run
    from whence.scores import Scores, TopScores

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
            data_settings=changed_settings(self.data_settings),
            out=self.out,
            loss=self.loss,
            allow_pickle=self.allow_pickle,
            conditioning=changed_settings(self.conditioning),
            objective=changed_settings(self.objective),
        )


@dataclass(frozen=True)
class QueryOptions:
    """What is said of the queries beside where they are."""

    mask: Path | None = None
    """Which part of them counts: an image that is white there, one for all; or a folder with one of each one's name."""
    prompts: tuple[str, ...] = ()
    """Captions, or labels, of the queries: one for each in their order or one for all. Default: what comes with
    them."""
    together: str | None = None
    """Take all queries for one and call it this: a style, a set of failures."""

    def of(self, images: tuple[str, ...]) -> "Queries":
        """Say it of some images."""
        from whence.arguments import Queries

        return Queries(images, self.mask, self.prompts)

    def print(self, run: "Run", scores: "Mapping[str, Scores | TopScores]", top: int, json: bool) -> None:
        """Print what ranks first for each query, or for all of them together."""
        from whence.scores import Scores

        shown = list(scores.values())
        if self.together is not None:
            whole = [one for one in shown if isinstance(one, Scores)]
            if len(whole) < len(shown):
                raise ConfigError("Queries are taken together by all of their scores; leave --keep-top out.")
            shown = [run.pool(one, self.together) for one in whole]
        print_rankings(shown, top, json)
