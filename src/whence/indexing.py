"""Indexing: one pass over the training images at each checkpoint, into a store of projected gradients.

A unit of work is a checkpoint and a block of images. Units that are finished are never done again, so that a killed run
goes on when it is given again, several processes share the work, and more images make new blocks. What a shard holds::

    keep = units    one row for each visit of a replay, or timestep of a grid, its draws averaged; exact norms
    keep = sum      one row a sample: the weighted mean of its units, plain and of unit length; projected norms

Exact norms of means would need all of a sample's units at once; so ``rows`` and ``unit_rows``, the mean of the units
and that of the units brought to length 1, have the lengths of the projected means beside them.

Columns beside them: ``weight.<rule>``, what the row counts in a score under that rule, such that a sample's weights at
a checkpoint add up to its own; ``timestep`` of the unit (of the last visit, where visits are summed); and with ``keep =
sum`` ``norm_rms``, the root of the mean square of the units' lengths.
"""

import hashlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy import ndarray

from whence._store_checks import name_ids
from whence.assembly import inverse
from whence.attribution import check_gradient_settings
from whence.checkpoints import Checkpoint, check_same_architecture
from whence.config import IndexSettings, OutputName, ProjectionKind, RowsDtype
from whence.data import ImageData
from whence.errors import ConfigError, StoreError, check_choice
from whence.event_table import EventTable, check_same_data, grid_events
from whence.gradients import GradientSource
from whence.memory import choose_limits, measure_footprint
from whence.methods.frame import Grid, Replay, WeightsRule
from whence.preconditioning import ERROR
from whence.progress import progress_bar
from whence.projections import AbstractProjection
from whence.store import Block, Store
from whence.store_spec import is_made_of, make_spec, plan_of, projection_of, settle, weight_rules
from whence.streaming import rms_by_image
from whence.subject import Subject
from whence.workload import Demand

_PIXELS_AT_ONCE = 256
"""Images held at once for their hashes."""

Part = tuple[int, int]
"""Which of how many parts of the work, from 1: (2, 8) is the second of eight."""


def index(
    subject: Subject,
    settings: IndexSettings,
    folder: Path,
    *,
    part: Part | None = None,
    show_progress: bool = True,
) -> Store:
    """Fill a store with the projected gradients of all training images; what it holds already is not computed again.

    Args:
        subject: Checkpoints, training images and record.
        settings: Which gradients, and how they are projected.
        folder: The run; ``stores/<hash of the specification>`` is made in it.
        part: Do only every n-th block, from the k-th on: (k, n). For jobs on several machines.
        show_progress: Show a progress bar.

    Returns:
        The store. Blocks that other processes are computing at this moment, or that belong to another part, may be
        missing from it.

    Raises:
        ConfigError: If settings contradict each other, or the memory allowed does not suffice.
        StoreError: If images have changed since the store was begun.
        NumericsError: If a gradient is not finite.
    """
    settings = settle_index(subject, settings, part)
    full = find_full_store(subject, settings, folder, part)
    if full is not None:
        return full
    ready = prepare_index(subject, settings, folder)
    found = ready.store
    store = Store.create(found.folder, found.spec, width=found.width, dtype=found.dtype)
    Indexing(subject, ready.settings, store, part).run(ready, show_progress)
    return store


@dataclass(frozen=True)
class ReadyIndex:
    """What an index needs of a model."""

    settings: IndexSettings
    """With the batch size that was chosen."""
    source: GradientSource
    """The last checkpoint."""
    projection: AbstractProjection
    store: Store
    """Where the rows go; maybe not yet on disk."""


def settle_index(subject: Subject, settings: IndexSettings, part: Part | None = None) -> IndexSettings:
    """Check the settings of an index, and take out what has no effect.

    Returns:
        The settings.

    Raises:
        ConfigError: If they contradict each other.
        CheckpointError: If the checkpoints differ in architecture.
    """
    _check_settings(settings, part)
    check_same_architecture(subject.checkpoints, settings.weights_name)
    if subject.record is not None:
        check_same_data(subject.record, subject.train)
    settings, vain = settle(settings, has_record=subject.record is not None)
    for sentence in vain:
        warnings.warn(sentence, stacklevel=3)
    with_draws = plan_of(settings, has_record=subject.record is not None)
    if isinstance(with_draws, Grid) and with_draws.draws > settings.batch_size:
        raise ConfigError(
            f"batch_size must hold all draws of a timestep ({with_draws.draws}), found {settings.batch_size}."
        )
    return settings


def find_full_store(subject: Subject, settings: IndexSettings, folder: Path, part: Part | None = None) -> Store | None:
    """Find the store that settled settings ask for, if all is in it, without loading a model.

    Under a bound on memory, the batch size, which rounding depends on, follows from the model: it is not looked for.

    Returns:
        The store, or None.
    """
    for manifest in sorted((folder / "stores").glob("*/manifest.json")) if settings.memory is None else []:
        try:
            store = Store.open(manifest.parent)
        except StoreError:  # a damaged one of other settings is none of this one's business
            continue
        if is_made_of(store, subject, settings) and not any(Indexing(subject, settings, store, part).todo.values()):
            return store
    return None


def prepare_index(subject: Subject, settings: IndexSettings, folder: Path) -> ReadyIndex:
    """Load the last checkpoint and say what its rows are; nothing is written.

    Args:
        subject: Checkpoints, training images and record.
        settings: As :func:`settle_index` gives them.
        folder: The run.

    Returns:
        What is needed to fill the store.

    Raises:
        ConfigError: If the memory allowed does not suffice.
    """
    limits = choose_limits(index_demand(subject, settings), settings, lambda: measure_footprint(subject, settings))
    settings = replace(settings, batch_size=limits.batch_size)
    last = subject.used_checkpoints(settings.checkpoints)[-1]
    source = subject.source(last, settings).of(settings.output)
    direct = source.rank_one_parameters(subject.train)
    about = {"kind": settings.projection, "seed": settings.projection_seed} | {
        "side": settings.side,
        "width": settings.width,
    }
    projection = projection_of(source, about, direct)
    spec = make_spec(subject, settings, projection, direct)
    name = Store(Path(), spec, projection.width, settings.rows).spec_sha256[:16]
    store = Store(folder / "stores" / name, spec, projection.width, settings.rows)
    return ReadyIndex(settings, source, projection, store)


def notes_on_store(store: Store) -> list[str]:
    """Say what a reader of a store has to know.

    Args:
        store: The store.

    Returns:
        Sentences: on gradients of zero, and on images without a row.
    """
    shards = [shard for step in store.steps for shard in store.shards(step)]
    notes = []
    zero = [
        (shard.step, shard.ids[sample])
        for shard in shards
        if shard.num_zero_norms
        for sample in np.unique(shard.read("sample")[shard.read("norms") == 0])
    ]
    if zero:
        some = [f"{id_} at step {step}" for step, id_ in zero]
        notes.append(f"{len(zero)} pairs of checkpoint and image have a gradient of zero: {name_ids(some)}.")
    without = sum(shard.row_counts.count(0) for shard in shards)
    if without:
        notes.append(f"{without} pairs of checkpoint and image have no visit between two checkpoints, and no row.")
    return notes


def content_hashes(images: ImageData) -> list[str]:
    """Hash the pixels of each image, as float32, what a conditional model is told of it, and its region.

    These are what stores hold, and so not ``ImageData.seen_hashes``, into which the shape of an image goes too.

    Returns:
        SHA-256, one per image.
    """
    found: list[str] = []
    for start in range(0, len(images), _PIXELS_AT_ONCE):
        pixels = images.pixels(range(start, min(start + _PIXELS_AT_ONCE, len(images))))
        found += [hashlib.sha256(np.ascontiguousarray(image, "<f4").tobytes()).hexdigest() for image in pixels]
    beside = zip(found, images.told_hashes, strict=True)
    return [hashlib.sha256(f"{one}{other}".encode()).hexdigest() if other else one for one, other in beside]


def _check_settings(settings: IndexSettings, part: Part | None) -> None:
    check_choice("projection", settings.projection, ProjectionKind)
    check_choice("rows", settings.rows, RowsDtype)
    check_choice("output", settings.output, OutputName)
    wrong_part = part is not None and not 1 <= part[0] <= part[1]
    faults = [f"part must be one of 1/n to n/n, found {part[0]}/{part[1]}"] if part and wrong_part else []
    check_gradient_settings(settings, positive=("width", "side"), faults=faults)


def index_demand(subject: Subject, settings: IndexSettings) -> Demand:
    """Say what is held in memory, but for its size.

    Returns:
        The tables of a projection, and a batch.
    """
    events = plan_of(settings, has_record=subject.record is not None)
    return Demand(
        num_queries=1,
        vectors_per_query=1,
        query_grid=None,
        query_parts=1,
        train_grid=None,
        train_families=0,
        draws=events.draws if isinstance(events, Grid) else 1,
        held="the tables of a projection",  # of a sketch: a sign for each number of a gradient
    )


class Indexing:
    """One run over all blocks that are not finished."""

    def __init__(self, subject: Subject, settings: IndexSettings, store: Store, part: Part | None = None):
        self.subject, self.settings, self.store, self.part = subject, settings, store, part
        self.images = subject.train
        self.events = plan_of(settings, has_record=subject.record is not None)
        self.rules = weight_rules(self.events, settings.keep, has_record=subject.record is not None)
        self._tables: dict[tuple[int, WeightsRule], EventTable] = {}

    @cached_property
    def contents(self) -> dict[str, str]:
        """Hash of each image."""
        return dict(zip(self.images.ids, content_hashes(self.images), strict=True))

    @cached_property
    def todo(self) -> dict[Checkpoint, list[Block]]:
        """Blocks to compute, the last checkpoint first: its model is loaded already."""
        order = self.subject.used_checkpoints(self.settings.checkpoints)[::-1]
        return {checkpoint: self._blocks(checkpoint) for checkpoint in order}

    def run(self, ready: ReadyIndex, show_progress: bool) -> None:
        """Fill the store."""
        source, loaded = ready.source, next(iter(self.todo))
        total = sum(self.num_events(c, block) for c, blocks in self.todo.items() for block in blocks)
        with progress_bar("index", total, "pass", shown=show_progress) as bar:
            for checkpoint, blocks in self.todo.items():
                if not blocks:
                    continue
                if checkpoint is not loaded:
                    source = self.subject.source(checkpoint, self.settings).of(self.settings.output)
                source.check(self.images)
                bar.set_description_str(f"{f'index at {checkpoint.step}':<24}")
                for block in blocks:
                    with self.store.claim(checkpoint.step, block) as mine:
                        if mine:
                            self._write(source, ready.projection, checkpoint, block, bar.update)
                        else:
                            bar.update(self.num_events(checkpoint, block))

    def num_events(self, checkpoint: Checkpoint, block: Block) -> int:
        """Count the sample-passes of a block."""
        if isinstance(self.events, Grid):
            return len(block) * self.events.timesteps * self.events.draws
        return len(self._replayed(checkpoint, block, "learning_rate")[1])

    def num_rows(self, checkpoint: Checkpoint, block: Block) -> int:
        """Count the rows of a block."""
        if isinstance(self.events, Grid):
            return len(block) * (1 if self.settings.keep == "sum" else self.events.timesteps)
        sample, _ = self._replayed(checkpoint, block, "learning_rate")
        return len(np.unique(sample)) if self.settings.keep == "sum" else len(sample)

    def _blocks(self, checkpoint: Checkpoint) -> list[Block]:
        blocks = self.store.plan_blocks(
            checkpoint.step, self.images.ids, list(self.contents.values()), self.settings.block_size
        )
        if self.part is None:
            return blocks
        # By where a block lies among all images, which does not depend on what is finished.
        which, count = self.part
        starts = self.images.rows([block[0] for block in blocks])
        size = self.settings.block_size
        return [b for b, start in zip(blocks, starts, strict=True) if start // size % count == which - 1]

    def _write(
        self,
        source: GradientSource,
        projection: AbstractProjection,
        checkpoint: Checkpoint,
        block: Block,
        update: Callable[[int], Any],
    ) -> None:
        units_of = self._grid_units if isinstance(self.events, Grid) else self._replay_units
        draws = self.events.draws if isinstance(self.events, Grid) else 1
        table, sample, columns = units_of(checkpoint, block)
        errors = np.empty(len(table) // draws)
        rows, norms = source.rows(
            table,
            self.images,
            projection,
            update,
            with_norms=self.settings.norms == "exact",
            events_per_unit=draws,
            errors=errors,
        )
        norms = norms.astype(np.float32)  # as they are stored, so that row x norm is the gradient
        units = {
            "rows": rows.cpu().numpy() * inverse(norms)[:, None],
            "norms": norms,
            "sample": sample,
            "timestep": table.timestep[::draws].astype(np.int32),
            ERROR: errors.astype(np.float32),
            **columns,
        }
        arrays = units if self.settings.keep == "units" else sum_units(units, len(block))
        hashes = [self.contents[id_] for id_ in block]
        self.store.write_shard(checkpoint.step, block, hashes, arrays)

    def _grid_units(self, checkpoint: Checkpoint, block: Block) -> tuple[EventTable, ndarray, dict[str, ndarray]]:
        grid = self.events
        assert isinstance(grid, Grid)
        rows, num_timesteps = self.images.rows(block), self.subject.process.num_timesteps
        table = grid_events(self.images, rows, "train", grid, num_timesteps, self.settings.seed)
        sample = np.repeat(np.arange(len(block)), grid.timesteps)
        weights = {rule: self._grid_weight(checkpoint, rule) / grid.timesteps for rule in self.rules}
        return table, sample, {f"weight.{rule}": np.full(len(sample), weight) for rule, weight in weights.items()}

    def _grid_weight(self, checkpoint: Checkpoint, rule: WeightsRule) -> float:
        if self.subject.replays is None:
            return 1.0  # the only rule is then equal
        return self.subject.replays.grid_weight(self.subject.previous_step[checkpoint.step], checkpoint.step, rule)

    def _replay_units(self, checkpoint: Checkpoint, block: Block) -> tuple[EventTable, ndarray, dict[str, ndarray]]:
        columns = {f"weight.{rule}": self._replayed(checkpoint, block, rule)[1].weight for rule in self.rules}
        sample, table = self._replayed(checkpoint, block, "learning_rate")
        return table, sample, columns

    def _replayed(self, checkpoint: Checkpoint, block: Block, rule: WeightsRule) -> tuple[ndarray, EventTable]:
        """Give the events of a block's images in their order, and the position of each in the block."""
        assert isinstance(self.events, Replay) and self.subject.replays is not None
        key = (checkpoint.step, rule)
        if key not in self._tables:
            after = self.subject.previous_step[checkpoint.step]
            self._tables[key] = self.subject.replays.events(after, checkpoint.step, self.events, rule)
        table = self._tables[key]
        first, last = (np.searchsorted(table.row, self.images.rows(block), side) for side in ("left", "right"))
        which = [np.arange(a, b) for a, b in zip(first, last, strict=True)]
        return np.repeat(np.arange(len(block)), last - first), table.take(np.concatenate(which))


def sum_units(units: dict[str, ndarray], num_samples: int) -> dict[str, ndarray]:
    """Take the units of each sample together to one row, their mean under their weights, plain and of unit length.

    Args:
        units: Arrays of a shard with one row a unit, ordered by sample.
        num_samples: Samples of the block.

    Returns:
        Arrays with one row a sample that has units; weights are added up.
    """
    sample, norms, rows = units["sample"], units["norms"], units["rows"]
    rules = [name for name in units if name.startswith("weight.")]
    totals = {rule: np.bincount(sample, units[rule], num_samples) for rule in rules}
    rule = "weight.equal" if "weight.equal" in rules else rules[0]  # on a grid all are equal, but some may be 0
    share = units[rule] * inverse(totals[rule])[sample]
    held = np.unique(sample)
    position = np.searchsorted(held, sample)
    arrays: dict[str, ndarray] = {"sample": held}
    for prefix, factors in {"": share * norms, "unit_": share}.items():
        mean = np.zeros((len(held), rows.shape[1]))
        np.add.at(mean, position, factors[:, None] * rows)
        length = np.linalg.norm(mean, axis=1).astype(np.float32)
        arrays |= {f"{prefix}rows": mean * inverse(length)[:, None], f"{prefix}norms": length}
    last = np.append(position[1:] != position[:-1], True)[: len(position)]
    arrays["timestep"] = units["timestep"][last]
    arrays["norm_rms"] = rms_by_image(sample, norms.astype(np.float64), num_samples)[held]
    return arrays | {rule: total[held] for rule, total in totals.items()}
