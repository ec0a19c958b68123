"""The exact, streaming way to scores, without a stored gradient.

At each checkpoint the queries' gradients come first, then one pass over the training events, whose gradients meet the
queries' layer by layer and are dropped. What is finished lies in a cache until the scores are written:

    <step>/query-<row>.safetensors            gradient sums of one query, if they took long; removed in the end
    <step>/tile-<turn>-<row>.safetensors      contributions of a block of training images to the queries of one turn
    <step>/done.json                          names of the tiles, once they are all there

A run that was killed goes on from these. Methods that need the same gradients share one pass.
"""

import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import torch
from jaxtyping import Float, Float64
from numpy import ndarray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from torch import Tensor

from whence._files import publish_file, write_json
from whence.checkpoints import Checkpoint
from whence.config import TraceSettings
from whence.data import ImageData
from whence.diffusion.process import even_timesteps
from whence.errors import ConfigError, InUseError, ScoresError, check_choice
from whence.event_table import EventTable, Replays
from whence.gradients import Family, GradientSource, GridVectors, num_vectors
from whence.methods.frame import Grid, Method, Replay, Unit, WeightsRule
from whence.progress import progress_bar
from whence.scores import Scores
from whence.subject import Subject

WORTH_KEEPING_S = 5.0
"""Gradient sums of a query that took less long are computed again after an interruption, rather than written."""

_FAMILIES: tuple[Family, ...] = ("none", "timestep")

_Products = tuple[Method, Float64[ndarray, "train vector"], dict[str, ndarray]]
"""A method, its training images' products with all query vectors, and facts about the training images."""


def num_phases(method: Method, settings: TraceSettings) -> int:
    """Count the bins of query timesteps that are kept apart: those asked for, or at most four."""
    return settings.phases or min(4, _query_grid(method).timesteps)


def check_method(method: Method, settings: TraceSettings) -> None:
    """Refuse a declaration that this way of computing cannot follow.

    Raises:
        ConfigError: With all faults found.
    """
    check_choice("unit", method.train.unit, Unit)
    check_choice("unit", method.query.unit, Unit)
    check_choice("weights", method.weights, WeightsRule)
    replayed = isinstance(method.train.events, Replay)
    allowed = ("none", "event") if replayed else ("none", "timestep", "sample")
    faults = []
    if method.train.unit not in allowed:
        faults.append(f"on the training side, {'a replay' if replayed else 'a grid'} has unit {', '.join(allowed)}")
    if not isinstance(method.query.events, Grid) or method.query.unit == "event":
        raise ConfigError(f"{method.name}: queries are taken on a grid, with unit none, timestep or sample.")
    if method.weights == "published" and method.train.events == Replay("all"):
        faults.append("weights 'published' are those of a whole interval; use them with the last visit")
    draws, timesteps = method.query.events.draws, method.query.events.timesteps
    if draws != 1 and draws % 2:
        faults.append(f"draws must be an even number, to be split in two halves, or 1; found {draws}")
    if num_phases(method, settings) > timesteps:
        faults.append(f"phases must be at most timesteps = {timesteps}, found {settings.phases}")
    if isinstance(method.train.events, Grid):
        draws = max(draws, method.train.events.draws)
    if draws > settings.batch_size:
        faults.append(f"batch_size must hold all draws of a timestep ({draws}), found {settings.batch_size}")
    if faults:
        raise ConfigError(f"{method.name}: {'; '.join(faults)}.")


@contextmanager
def claim(cache: Path) -> Iterator[None]:
    """Keep other processes from computing the same thing at the same time.

    Raises:
        InUseError: If one does already.
    """
    cache.parent.mkdir(parents=True, exist_ok=True)
    try:
        with filelock.FileLock(f"{cache}.lock", timeout=0):
            yield
    except filelock.Timeout as error:
        raise InUseError(f"Another process is computing the same scores in {cache.parent}. Wait for it.") from error


def _query_grid(method: Method) -> Grid:
    assert isinstance(method.query.events, Grid)  # check_method
    return method.query.events


@dataclass(frozen=True)
class _Turn:
    """The gradient sums of as many queries as fit into memory."""

    index: int
    num_queries: int
    vectors: Float[Tensor, "vector param"]
    """Those of all the queries, one after the other."""
    lengths: Float64[ndarray, "query length"]
    """Lengths of each query's whole sum and of its halves, in the family ``none``; zeros where it is not computed."""
    norms: Float64[ndarray, "query timestep"]
    """Length of each query's gradient at each timestep."""


class StreamingPass:
    """One pass over checkpoints, queries and training images for methods that share their gradients.

    Args:
        subject: Checkpoints, training images and record.
        queries: Query images.
        methods: Declarations with the same events, output and checkpoints.
        settings: Phases, arithmetic, batch size.
        cache: Folder of this very pass; what is in it is used.
        show_progress: Show a progress bar.
    """

    def __init__(
        self,
        subject: Subject,
        queries: ImageData,
        methods: Sequence[Method],
        settings: TraceSettings,
        cache: Path,
        show_progress: bool,
    ):
        self.subject, self.queries, self.methods, self.settings = subject, queries, methods, settings
        self.cache, self.show_progress = cache, show_progress
        self.train_events = methods[0].train.events
        self.query_grid = _query_grid(methods[0])
        self.halves = self.query_grid.draws > 1
        self.phases = num_phases(methods[0], settings)
        self.families: list[Family] = [f for f in _FAMILIES if any(_family(m.query.unit) == f for m in methods)]
        self.checkpoints = list(subject.checkpoints)[-1 if methods[0].checkpoints == "last" else 0 :]
        self._tables: dict[tuple[int, WeightsRule], EventTable] = {}

    def run(self) -> list[Scores]:
        """Compute what is not in the cache, then add up the checkpoints: one result per method."""
        with progress_bar("trace", self._num_passes(num_turns=1), "pass", shown=self.show_progress) as bar:
            for checkpoint in self.checkpoints:
                if self._is_done(checkpoint):
                    bar.update(bar.total // len(self.checkpoints))
                else:
                    self._run_checkpoint(checkpoint, bar)
        return [self._assemble(method) for method in self.methods]

    def clean(self) -> None:
        """Remove the cache, once the scores are written."""
        shutil.rmtree(self.cache, ignore_errors=True)

    def _folder(self, checkpoint: Checkpoint) -> Path:
        return self.cache / f"{checkpoint.step:08d}"

    def _num_passes(self, num_turns: int) -> int:
        """Count sample-passes in all, for the bar."""
        everything = range(len(self.subject.train))
        train = sum(self._num_events(checkpoint, everything) for checkpoint in self.checkpoints)
        query = len(self.checkpoints) * len(self.queries) * self.query_grid.timesteps * self.query_grid.draws
        return num_turns * train + query

    def _num_events(self, checkpoint: Checkpoint, block: range) -> int:
        if isinstance(self.train_events, Grid):
            return len(block) * self.train_events.timesteps * self.train_events.draws
        return len(rows_between(self._replayed_events(checkpoint, self.methods[0].weights), block))

    def _run_checkpoint(self, checkpoint: Checkpoint, bar: Any) -> None:
        folder = self._folder(checkpoint)
        source = self.subject.source(checkpoint, self.settings)
        source.check(self.subject.train)
        turns = self._split_queries(source.layout.num_params)
        bar.total = self._num_passes(len(turns))
        for index, rows in enumerate(turns):
            bar.set_description_str(f"{f'queries at {checkpoint.step}':<24}")
            turn = self._make_turn(index, [self._query_vectors(source, folder, row, bar.update) for row in rows])
            bar.set_description_str(f"{f'training at {checkpoint.step}':<24}")
            for start in range(0, len(self.subject.train), self.settings.block_size):
                block = range(start, min(start + self.settings.block_size, len(self.subject.train)))
                path = folder / f"tile-{index:06d}-{start:08d}.safetensors"
                if path.exists():
                    bar.update(self._num_events(checkpoint, block))
                else:
                    write_arrays(path, self._tile(source, checkpoint, turn, block, bar.update))
        for path in folder.glob("query-*"):
            path.unlink()
        write_json(folder / "done.json", sorted(path.name for path in folder.glob("tile-*")))

    def _is_done(self, checkpoint: Checkpoint) -> bool:
        folder = self._folder(checkpoint)
        if not (folder / "done.json").exists():
            return False
        return all((folder / name).exists() for name in json.loads((folder / "done.json").read_text()))

    def _split_queries(self, num_params: int) -> list[range]:
        """Split the queries so that their gradients fit into the memory allowed."""
        per_query = sum(num_vectors(f, self.phases, self.halves) for f in self.families) * num_params
        item_bytes = np.dtype(self.settings.dtype).itemsize
        at_once = max(1, int(self.settings.query_memory_gib * 2**30 // (per_query * item_bytes)))
        return [range(i, min(i + at_once, len(self.queries))) for i in range(0, len(self.queries), at_once)]

    def _query_vectors(
        self, source: GradientSource, folder: Path, row: int, update: Callable[[int], Any]
    ) -> GridVectors:
        path = folder / f"query-{row:06d}.safetensors"
        if path.exists():
            update(self.query_grid.timesteps * self.query_grid.draws)
            arrays = read_arrays(path)
            return GridVectors(torch.from_numpy(arrays["vectors"]).to(source.device), arrays["norms"])
        started_s = time.monotonic()
        (made,) = source.grid_vectors(
            self.queries,
            [row],
            "query",
            self.query_grid,
            self.families,
            phases=self.phases,
            halves=self.halves,
            seed=self.settings.seed,
            update=update,
        )
        if time.monotonic() - started_s > WORTH_KEEPING_S:
            write_arrays(path, {"vectors": made.vectors.cpu().numpy(), "norms": made.norms})
        return made

    def _make_turn(self, index: int, queries: list[GridVectors]) -> _Turn:
        vectors = torch.cat([q.vectors for q in queries])
        norms = np.stack([q.norms for q in queries])
        lengths = np.array([self._sample_lengths(q.vectors) for q in queries])
        return _Turn(index, len(queries), vectors, lengths, norms)

    def _sample_lengths(self, vectors: Float[Tensor, "vector param"]) -> list[float]:
        if self.families[0] != "none":
            return [0.0, 0.0, 0.0]
        whole = vectors[: self.phases].sum(0)
        half_a = vectors[self.phases] if self.halves else whole
        return [float(torch.linalg.vector_norm(v, dtype=torch.float64)) for v in (whole, half_a, 2 * whole - half_a)]

    def _tile(
        self, source: GradientSource, checkpoint: Checkpoint, turn: _Turn, block: range, update: Callable[[int], Any]
    ) -> dict[str, ndarray]:
        """Contributions of one block of training images: by method, (query, phase, train) and (half, query, train)."""
        products_of = self._replayed if isinstance(self.train_events, Replay) else self._gridded
        arrays = {"query_norms": turn.norms}
        for method, products, facts in products_of(source, checkpoint, turn.vectors, block, update):
            facts["phases"], halves = self._split(method, products.reshape(len(block), turn.num_queries, -1), turn)
            arrays |= {f"{method.name}.{name}": array for name, array in facts.items()}
            if halves is not None:
                arrays[f"{method.name}.halves"] = halves
        return arrays

    def _replayed(
        self,
        source: GradientSource,
        checkpoint: Checkpoint,
        vectors: Float[Tensor, "vector param"],
        block: range,
        update: Callable[[int], Any],
    ) -> Iterator[_Products]:
        """Give, for each method, the weighted products of replayed events, added up by training image."""
        table = rows_between(self._replayed_events(checkpoint, self.methods[0].weights), block)
        dots, norms = source.dots(table, self.subject.train, vectors, update)
        image = table.row - block.start
        rms = rms_by_image(image, norms, len(block))
        timesteps = np.full(len(block), -1, dtype=np.int64)
        timesteps[image] = table.timestep  # events are in order of step, so the last visit stays
        for method in self.methods:
            weight = rows_between(self._replayed_events(checkpoint, method.weights), block).weight
            factor = weight * (inverse(norms) if method.train.unit == "event" else 1.0)
            products = np.zeros((len(block), dots.shape[1]))
            np.add.at(products, image, factor[:, None] * dots)
            weights = np.bincount(image, weight, len(block)).astype(np.float64)  # int64 where there is no event
            yield method, products, {"train_norms": rms, "train_timesteps": timesteps, "train_weights": weights}

    def _gridded(
        self,
        source: GradientSource,
        checkpoint: Checkpoint,
        vectors: Float[Tensor, "vector param"],
        block: range,
        update: Callable[[int], Any],
    ) -> Iterator[_Products]:
        """Give, for each method, the weighted products of gradients summed over a grid."""
        grid = self.train_events
        assert isinstance(grid, Grid)
        families: list[Family] = [f for f in _FAMILIES if any(_family(m.train.unit) == f for m in self.methods)]
        products = np.empty((len(families), len(block), len(vectors)))
        lengths = np.empty((len(families), len(block)))
        rms = np.empty(len(block))
        at_once = max(1, source.batch_size // (grid.timesteps * grid.draws))
        for first in range(0, len(block), at_once):
            some = list(block[first : first + at_once])
            made = source.grid_vectors(
                self.subject.train,
                some,
                "train",
                grid,
                families,
                phases=1,
                halves=False,
                seed=self.settings.seed,
                update=update,
            )
            here = slice(first, first + len(some))
            gradients = torch.stack([m.vectors for m in made], dim=1)  # family, train, param
            products[:, here] = (gradients @ vectors.T).double().cpu().numpy()
            lengths[:, here] = torch.linalg.vector_norm(gradients, dim=2, dtype=torch.float64).cpu().numpy()
            rms[here] = [np.sqrt(np.mean(m.norms**2)) for m in made]
        for method in self.methods:
            family = families.index(_family(method.train.unit))
            weight = self._grid_weight(checkpoint, method.weights)
            factor = weight * (inverse(lengths[family]) if method.train.unit == "sample" else np.ones(len(block)))
            facts = {"train_norms": rms, "train_weights": np.full(len(block), weight)}
            yield method, products[family] * factor[:, None], facts

    def _split(
        self, method: Method, products: Float64[ndarray, "train query vector"], turn: _Turn
    ) -> tuple[Float64[ndarray, "query phase train"], Float64[ndarray, "half query train"] | None]:
        """Read phases and halves off a method's family; see ``gradients`` for the order of its rows."""
        num_phases = self.phases
        family = _family(method.query.unit)
        before = self.families[: self.families.index(family)]
        start = sum(num_vectors(f, num_phases, self.halves) for f in before)
        phases = products[:, :, start : start + num_phases]
        scale = inverse(turn.lengths) if method.query.unit == "sample" else np.ones_like(turn.lengths)
        by_phase = np.moveaxis(phases * scale[:, :1], 0, -1)
        if not self.halves:
            return by_phase, None
        half_a = products[:, :, start + num_phases]
        half_b = 2 * phases.sum(2) - half_a if family == "none" else products[:, :, start + num_phases + 1]
        return by_phase, np.stack([(half_a * scale[:, 1]).T, (half_b * scale[:, 2]).T])

    def _replayed_events(self, checkpoint: Checkpoint, rule: WeightsRule) -> EventTable:
        """List the events of a checkpoint's interval, once."""
        assert isinstance(self.train_events, Replay)
        key = (checkpoint.step, rule)
        if key not in self._tables:
            replays, previous = self._need_replays(rule), self.subject.previous_step[checkpoint.step]
            self._tables[key] = replays.events(previous, checkpoint.step, self.train_events, rule)
        return self._tables[key]

    def _grid_weight(self, checkpoint: Checkpoint, rule: WeightsRule) -> float:
        if rule == "equal":
            return 1.0
        return self._need_replays(rule).grid_weight(self.subject.previous_step[checkpoint.step], checkpoint.step, rule)

    def _need_replays(self, rule: WeightsRule) -> Replays:
        if self.subject.replays is None:
            raise ConfigError(
                f"weights={rule!r} and replays need a record of training; use a grid with weights='equal'."
            )
        return self.subject.replays

    def _assemble(self, method: Method) -> Scores:
        """Join the tiles along queries and training images, and add up the checkpoints."""
        per_checkpoint = [self._join(checkpoint, method) for checkpoint in self.checkpoints]
        dtype = np.dtype(self.settings.dtype)

        def total(name: str) -> ndarray | None:
            found = [arrays[name] for arrays in per_checkpoint if name in arrays]
            return np.sum(found, axis=0).astype(dtype) if found else None

        def stack(name: str) -> ndarray | None:
            found = [arrays[name] for arrays in per_checkpoint if name in arrays]
            return np.stack(found) if found else None

        phases = np.sum([arrays["phases"] for arrays in per_checkpoint], axis=0)
        timesteps = even_timesteps(1, self.subject.process.num_timesteps - 1, self.query_grid.timesteps).numpy()
        phase_of = np.arange(len(timesteps)) * self.phases // len(timesteps)
        return Scores(
            method=method.name,
            query_ids=self.queries.ids,
            train_ids=self.subject.train.ids,
            values=phases.sum(1).astype(dtype),
            phases=phases.astype(dtype),
            phase_timesteps=tuple(
                (int(timesteps[phase_of == p][0]), int(timesteps[phase_of == p][-1])) for p in range(self.phases)
            ),
            halves=total("halves"),
            train_norms=stack("train_norms"),
            train_timesteps=stack("train_timesteps"),
            train_weights=stack("train_weights"),
            query_norms=stack("query_norms"),
            query_timesteps=timesteps,
            checkpoint_steps=tuple(c.step for c in self.checkpoints),
        )

    def _join(self, checkpoint: Checkpoint, method: Method) -> dict[str, ndarray]:
        folder = self._folder(checkpoint)
        turns: dict[str, list[dict[str, ndarray]]] = {}
        for path in sorted(folder.glob("tile-*.safetensors")):
            turns.setdefault(path.name.split("-")[1], []).append(read_arrays(path))
        prefix = f"{method.name}."
        joined: dict[str, ndarray] = {}
        for name in [n.removeprefix(prefix) for n in next(iter(turns.values()))[0] if n.startswith(prefix)]:
            per_turn = [np.concatenate([tile[prefix + name] for tile in tiles], axis=-1) for tiles in turns.values()]
            if name in ("phases", "halves"):
                joined[name] = np.concatenate(per_turn, axis=0 if name == "phases" else 1)
            else:
                joined[name] = per_turn[0]
        joined["query_norms"] = np.concatenate([tiles[0]["query_norms"] for tiles in turns.values()])
        return joined


def _family(unit: Unit) -> Family:
    """Say which sums a normalisation is made of."""
    return "timestep" if unit == "timestep" else "none"


def inverse(lengths: ndarray) -> ndarray:
    """One over a length; 0 for a gradient of zero, which stays zero."""
    return np.divide(1.0, lengths, out=np.zeros_like(lengths), where=lengths > 0)


def rms_by_image(image: ndarray, norms: Float64[ndarray, " event"], num_images: int) -> Float64[ndarray, " train"]:
    """Give the root mean square of each image's gradient lengths; NaN where it was not visited."""
    with np.errstate(invalid="ignore"):  # 0 / 0
        return np.sqrt(np.bincount(image, norms**2, num_images) / np.bincount(image, minlength=num_images))


def rows_between(table: EventTable, rows: range) -> EventTable:
    """Keep the events of some training images; the table is ordered by row."""
    first, last = np.searchsorted(table.row, [rows.start, rows.stop])
    return table.take(slice(int(first), int(last)))


def write_arrays(path: Path, arrays: dict[str, ndarray]) -> None:
    """Write a file of the cache, whole or not at all."""
    with publish_file(path) as partial:
        save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, partial)


def read_arrays(path: Path) -> dict[str, ndarray]:
    """Read a file of the cache.

    Returns:
        Its arrays by name.

    Raises:
        ScoresError: If it is damaged.
    """
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ScoresError(f"{path} is damaged: {error}. Delete it; the next run makes it again.") from error
