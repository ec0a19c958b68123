"""Self-influence: how strongly a training sample pulls on itself.

It is large for outliers, mislabelled and memorised samples.

::

    self_norm       sum over checkpoints of w |g|^2 at the event that was trained
    self_expected   sum over checkpoints of w < g at the event that was trained, mean gradient over a grid >

The first costs one pass over the training set at each checkpoint. The second sets the sample against its own expected
gradient, as the TracIn paper for diffusion intends; it costs timesteps x draws passes more, and may be negative.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float64
from numpy import ndarray

from whence._files import sha256_of_json
from whence.attribution import check_trace_settings
from whence.config import TraceSettings
from whence.errors import ConfigError, RecordError
from whence.events import EventTable
from whence.gradients import GradientSource
from whence.methods import Grid, Method, Replay
from whence.progress import progress_bar
from whence.scores import Scores
from whence.subject import Subject

Kind = Literal["self_norm", "self_expected"]

SELF = "self"
"""Id of the one row of such scores."""


@dataclass(frozen=True)
class SelfInfluenceCost:
    """What a computation costs before it is begun."""

    kind: Kind
    sample_passes: int
    """Forward and backward passes of one sample."""


def self_influence_cost(subject: Subject, kind: Kind, settings: TraceSettings) -> SelfInfluenceCost:
    """Count the sample-passes of :func:`self_influence`; the last visit of each sample counts once a checkpoint."""
    per_sample = 1 + (settings.timesteps * settings.draws if kind == "self_expected" else 0)
    return SelfInfluenceCost(kind, len(subject.checkpoints) * len(subject.train) * per_sample)


def self_influence(
    subject: Subject,
    kind: Kind,
    settings: TraceSettings,
    folder: Path,
    *,
    method: Method,
    show_progress: bool = True,
) -> Scores:
    """Score every training sample for itself.

    Args:
        subject: Checkpoints, training images and record.
        kind: Which of the two.
        settings: The grid of ``self_expected``, replay, arithmetic.
        folder: The run; ``scores/<kind>-<hash>`` is made in it.
        method: TracIn, or for ``self_expected`` also ReTrac, whose normalisations are then used on both sides.
        show_progress: Show a progress bar.

    Returns:
        Scores with the single row ``self``.

    Raises:
        ConfigError: If ``self_norm`` is asked for under a method that makes every gradient of length 1.
        RecordError: If there is no record.
    """
    check_trace_settings(settings)
    normalised = method.train.unit == "event"
    if kind == "self_norm" and normalised:
        raise ConfigError(
            f"self_norm under {method.name} is the same number for every sample, the sum of its weights, since each "
            "gradient has length 1. Use it with tracin, or use self_expected."
        )
    if subject.replays is None:
        raise RecordError("Self-influence needs a record of training, to know at which event each sample was trained.")
    spec = {
        "method": {"name": kind, "unit": method.train.unit, "replay": settings.replay},
        "settings": {"timesteps": settings.timesteps, "draws": settings.draws, "seed": settings.seed}
        if kind == "self_expected"
        else {},
        "loss": subject.loss,
        "dtype": settings.dtype,
        "checkpoints": [{"step": c.step, "sha256": c.content_hash(settings.weights_name)} for c in subject.checkpoints],
        "train": {"fingerprint": subject.train.fingerprint, "num_images": len(subject.train)},
    }
    name = kind if not normalised else f"{kind}-{method.name}"
    target = folder / "scores" / f"{name}-{sha256_of_json(spec)[:8]}"
    if not (target / "manifest.json").exists():
        _compute(subject, kind, settings, normalised, name, spec, show_progress).save(target)
    return Scores.load(target)


def _compute(
    subject: Subject, kind: Kind, settings: TraceSettings, normalised: bool, name: str, spec: dict, show_progress: bool
) -> Scores:
    assert subject.replays is not None  # checked by the caller
    num_train = len(subject.train)
    values = np.zeros(num_train)
    norms = np.full((len(subject.checkpoints), num_train), np.nan)
    previous = 0
    cost = self_influence_cost(subject, kind, settings)
    with progress_bar("self-influence", cost.sample_passes, "pass", shown=show_progress) as bar:
        for index, checkpoint in enumerate(subject.checkpoints):
            table = subject.replays.events(previous, checkpoint.step, Replay(settings.replay), "learning_rate")
            previous = checkpoint.step
            source = subject.source(checkpoint, settings)
            source.check(subject.train)
            if kind == "self_norm":
                lengths = source.dots(table, subject.train, source.no_vectors(), bar.update)[1]
                products = lengths**2
            else:
                products, lengths = _expected(source, subject, table, settings, normalised, bar.update)
            values += np.bincount(table.row, table.weight * products, num_train)
            norms[index, table.row] = lengths
    return Scores(
        method=name,
        query_ids=(SELF,),
        train_ids=subject.train.ids,
        values=values[None].astype(settings.dtype),
        train_norms=norms,
        checkpoint_steps=tuple(c.step for c in subject.checkpoints),
        details=spec,
    )


def _expected(
    source: GradientSource,
    subject: Subject,
    table: EventTable,
    settings: TraceSettings,
    normalised: bool,
    update: Callable[[int], Any],
) -> tuple[Float64[ndarray, " event"], Float64[ndarray, " event"]]:
    """Multiply each event's gradient with the expected gradient of the same sample."""
    products, lengths = np.zeros(len(table)), np.zeros(len(table))
    for row in np.unique(table.row):
        mine = np.flatnonzero(table.row == row)
        (expected,) = source.grid_vectors(
            subject.train,
            [int(row)],
            "query",
            Grid(settings.timesteps, settings.draws),
            ["timestep" if normalised else "none"],
            phases=1,
            halves=False,
            seed=settings.seed,
            update=update,
        )
        dots, lengths[mine] = source.dots(table.take(mine), subject.train, expected.vectors, update)
        scale = np.divide(1.0, lengths[mine], out=np.zeros(len(mine)), where=lengths[mine] > 0) if normalised else 1.0
        products[mine] = dots[:, 0] * scale
    return products, lengths
