"""Self-influence: how strongly a training sample pulls on itself.

It is large for outliers, mislabelled and memorised samples.

::

    self_norm       sum over checkpoints of w |g|^2 at the event that was trained
    self_expected   sum over checkpoints of w < g at the event that was trained, mean gradient over a grid >

The first costs one pass over the training set at each checkpoint. The second sets the sample against its own expected
gradient, as the TracIn paper for diffusion intends; it costs timesteps x draws passes more, and may be negative.
"""

import shutil
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float64
from numpy import ndarray

from whence._array_files import read_arrays, write_arrays
from whence._files import sha256_of_json
from whence.assembly import inverse
from whence.attribution import SCORING_VERSION, check_trace_settings, load_own_scores, notes_on
from whence.checkpoints import Checkpoint
from whence.config import TraceSettings
from whence.errors import ConfigError, RecordError, check_choice
from whence.event_table import EventTable
from whence.gradients import GradientSource
from whence.memory import choose_limits, measure_footprint
from whence.methods import TRACIN, Grid, Method, Replay
from whence.progress import progress_bar
from whence.scores import Scores
from whence.streaming import claim, rms_by_image
from whence.subject import Subject
from whence.workload import Demand, rows_between

Kind = Literal["self_norm", "self_expected"]

_Products = tuple[Float64[ndarray, " event"], Float64[ndarray, " event"]]
"""Products and lengths of some events."""

SELF = "self"
"""Id of the one row of such scores."""


@dataclass(frozen=True)
class SelfInfluenceCost:
    """What a computation costs before it is begun."""

    kind: Kind
    sample_passes: int
    """Forward and backward passes of one sample."""


def self_influence_cost(subject: Subject, kind: Kind, settings: TraceSettings) -> SelfInfluenceCost:
    """Count the sample-passes of :func:`self_influence`, one event for each sample at each checkpoint.

    Returns:
        The count.
    """
    grid = _grid(settings)
    per_sample = 1 + (grid.timesteps * grid.draws if kind == "self_expected" else 0)
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
    """Score every training sample for itself. A run that was killed goes on from its last block of samples.

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
    check_choice("kind", kind, Kind)
    check_trace_settings(settings)
    normalised = method.train.unit == "event"
    if kind == "self_norm" and normalised:
        raise ConfigError(
            f"self_norm under {method.name} is the same number for every sample, the sum of its weights, since each "
            "gradient has length 1. Use it with tracin, or use self_expected."
        )
    if subject.replays is None:
        raise RecordError("Self-influence needs a record of training, to know at which event each sample was trained.")
    if kind == "self_norm" and (settings.timesteps, settings.draws) != (None, None):
        warnings.warn("timesteps and draws have no effect on self_norm, which has no grid.", stacklevel=2)
    replay, grid = Replay(settings.replay or "last"), _grid(settings)
    expected = {"grid": asdict(grid), "seed": settings.seed} if kind == "self_expected" else {}
    spec = {
        "version": SCORING_VERSION,
        "method": {"name": kind, "unit": method.train.unit, "replay": replay.visits} | expected,
        **subject.describe(subject.checkpoints, settings),
    }
    name = kind if not normalised else f"{kind}-{method.name}"
    key = sha256_of_json(spec)
    target, cache = folder / "scores" / f"{name}-{key[:8]}", folder / "cache" / f"self-{key[:16]}-{settings.block_size}"
    if not (target / "manifest.json").exists():
        with claim(cache):
            demand = Demand(1, 1, grid, 1, None, 0) if kind == "self_expected" else Demand(0, 0, None, 1, None, 0)
            limits = choose_limits(demand, settings, lambda: measure_footprint(subject, settings))
            settings = replace(settings, batch_size=limits.batch_size)
            work = _Pass(subject, kind, settings, replay, grid, normalised, cache)
            work.run(show_progress)
            work.assemble(name, spec).save(target)
    shutil.rmtree(cache, ignore_errors=True)
    return load_own_scores(target, spec)


class _Pass:
    """One pass over checkpoints and blocks of training samples, each block a file of the cache."""

    def __init__(
        self,
        subject: Subject,
        kind: Kind,
        settings: TraceSettings,
        replay: Replay,
        grid: Grid,
        normalised: bool,
        cache: Path,
    ):
        assert subject.replays is not None  # checked by the caller
        self.subject, self.replays, self.settings = subject, subject.replays, settings
        self.kind: Kind = kind
        self.replay, self.grid, self.normalised, self.cache = replay, grid, normalised, cache

    def run(self, show_progress: bool) -> None:
        """Compute the blocks that are not in the cache."""
        cost = self_influence_cost(self.subject, self.kind, self.settings)
        with progress_bar("self-influence", cost.sample_passes, "pass", shown=show_progress) as bar:
            for checkpoint in self.subject.checkpoints:
                missing = [start for start in self._starts() if not self._path(checkpoint, start).exists()]
                source = self.subject.source(checkpoint, self.settings) if missing else None
                if source is not None:
                    source.check(self.subject.train)
                for start in missing:
                    assert source is not None
                    table = rows_between(self._events(checkpoint), range(start, start + self.settings.block_size))
                    products, lengths = self._products(source, table, bar.update)
                    write_arrays(self._path(checkpoint, start), {"products": products, "lengths": lengths})

    def assemble(self, name: str, spec: dict[str, Any]) -> Scores:
        """Add up the checkpoints."""
        num_train = len(self.subject.train)
        values, norms = np.zeros(num_train), []
        for checkpoint in self.subject.checkpoints:
            table = self._events(checkpoint)
            blocks = [read_arrays(self._path(checkpoint, start)) for start in self._starts()]
            products, lengths = (np.concatenate([b[n] for b in blocks]) for n in ("products", "lengths"))
            values += np.bincount(table.row, table.weight * products, num_train)
            norms.append(rms_by_image(table.row, lengths, num_train))
        scores = Scores(
            method=name,
            query_ids=(SELF,),
            train_ids=self.subject.train.ids,
            values=values[None].astype(self.settings.dtype),
            train_norms=np.stack(norms),
            checkpoint_steps=tuple(c.step for c in self.subject.checkpoints),
        )
        return replace(scores, details=spec | {"notes": notes_on(scores, self.subject, self.settings)})

    def _starts(self) -> range:
        return range(0, len(self.subject.train), self.settings.block_size)

    def _path(self, checkpoint: Checkpoint, start: int) -> Path:
        return self.cache / f"{checkpoint.step:08d}" / f"tile-{start:08d}.safetensors"

    def _events(self, checkpoint: Checkpoint) -> EventTable:
        after = self.subject.previous_step[checkpoint.step]
        return self.replays.events(after, checkpoint.step, self.replay, "learning_rate")

    def _products(self, source: GradientSource, table: EventTable, update: Callable[[int], Any]) -> _Products:
        """Multiply each event's gradient with itself, or with the expected gradient of the same sample."""
        if self.kind == "self_norm":
            lengths = source.dots(table, self.subject.train, source.no_vectors(), update)[1]
            return lengths**2, lengths
        products, lengths = np.zeros(len(table)), np.zeros(len(table))
        for row in np.unique(table.row):
            mine = np.flatnonzero(table.row == row)
            (expected,) = source.grid_vectors(
                self.subject.train,
                [int(row)],
                "query",
                self.grid,
                ["timestep" if self.normalised else "none"],
                phases=1,
                halves=False,
                seed=self.settings.seed,
                update=update,
            )
            dots, lengths[mine] = source.dots(table.take(mine), self.subject.train, expected.vectors, update)
            products[mine] = dots[:, 0] * (inverse(lengths[mine]) if self.normalised else 1.0)
        return products, lengths


def _grid(settings: TraceSettings) -> Grid:
    """Give the grid of ``self_expected``: that of TracIn's queries, but for what is given."""
    declared = TRACIN.query.events
    assert isinstance(declared, Grid)
    return Grid(settings.timesteps or declared.timesteps, settings.draws or declared.draws)
