"""The exact, streaming way to scores, without a stored gradient.

At each checkpoint the queries' gradients come first, then one pass over the training events, whose gradients meet the queries'
layer by layer and are dropped. What is finished lies in a cache until the scores are written:

    <step>/query-<row>.safetensors            gradient sums of one query; removed when the checkpoint is done
    <step>/tile-<turn>-<row>.safetensors      contributions of a block of training images to the queries of one turn
    <step>/done                               the checkpoint needs no further work

A run that was killed goes on from these. Methods that need the same gradients share one pass.
"""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float64
from numpy import ndarray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from torch import Tensor

from whence._files import publish_file
from whence.checkpoints import Checkpoint
from whence.config import TraceSettings
from whence.data import ImageData
from whence.diffusion.process import even_timesteps
from whence.errors import ConfigError, ScoresError
from whence.events import EventTable, Replays
from whence.gradients import Family, GradientSource, GridVectors, num_vectors
from whence.methods.frame import Grid, Method, Replay, WeightsRule
from whence.progress import progress_bar
from whence.scores import Scores
from whence.subject import Subject


def check_units(method: Method) -> None:
    """Refuse a method whose normalisation this way of computing does not have.

    Raises:
        ConfigError: The message says which there are.
    """
    if not isinstance(method.query.events, Grid) or method.query.unit == "event":
        raise ConfigError(f"{method.name}: queries are taken on a grid, with unit none, timestep or sample.")
    replayed = isinstance(method.train.events, Replay)
    allowed = ("none", "event") if replayed else ("none", "timestep", "sample")
    if method.train.unit not in allowed:
        kind = "a replay" if replayed else "a grid"
        raise ConfigError(f"{method.name}: on the training side, {kind} has unit {', '.join(allowed)}.")


class StreamingPass:
    """One pass over checkpoints, queries and training images for methods that share their gradients."""

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
        self.train_events = self.methods[0].train.events
        query_events = self.methods[0].query.events
        assert isinstance(query_events, Grid)  # check_units
        self.query_grid = query_events
        all_checkpoints = list(subject.checkpoints)
        self.checkpoints = all_checkpoints if self.methods[0].checkpoints == "all" else all_checkpoints[-1:]
        self.previous_steps = dict(
            zip([c.step for c in all_checkpoints], [0, *(c.step for c in all_checkpoints)], strict=False)
        )
        self.halves = self.query_grid.draws > 1
        self.families: list[Family] = [
            f for f in ("none", "timestep") if any(_query_family(m) == f for m in self.methods)
        ]
        self.show_progress = show_progress
        self.cache = cache

    def run(self) -> list[Scores]:
        """Compute what is not in the cache, then add up the checkpoints."""
        with progress_bar("trace", self._num_passes(), "pass", shown=self.show_progress) as bar:
            for checkpoint in self.checkpoints:
                self._run_checkpoint(checkpoint, bar)
        return [self._assemble(method) for method in self.methods]

    def clean(self) -> None:
        """Remove the cache, once the scores are written."""
        shutil.rmtree(self.cache, ignore_errors=True)

    def _num_passes(self) -> int:
        """Sample-passes in all, for the bar."""
        if isinstance(self.train_events, Grid):
            train = (
                len(self.checkpoints) * len(self.subject.train) * self.train_events.timesteps * self.train_events.draws
            )
        else:
            train = sum(len(self._replay(checkpoint, "equal")) for checkpoint in self.checkpoints)
        query = len(self.checkpoints) * len(self.queries) * self.query_grid.timesteps * self.query_grid.draws
        return train + query

    def _run_checkpoint(self, checkpoint: Checkpoint, bar: Any) -> None:
        folder = self.cache / f"{checkpoint.step:08d}"
        blocks = range(0, len(self.subject.train), self.settings.block_size)
        done = folder / "done"
        source: GradientSource | None = None
        if not done.exists():
            source = self.subject.source(checkpoint, self.settings)
            source.check(self.subject.train)
            for turn, rows in enumerate(self._query_turns(source.layout.num_params)):
                bar.set_description_str(f"{'queries at ' + str(checkpoint.step):<24}")
                vectors = [self._query_vectors(source, folder, row, bar.update) for row in rows]
                bar.set_description_str(f"{'training at ' + str(checkpoint.step):<24}")
                for start in blocks:
                    path = folder / f"tile-{turn:03d}-{start:08d}.safetensors"
                    if not path.exists():
                        _write_arrays(path, self._tile(source, checkpoint, vectors, start, bar.update))
            for path in folder.glob("query-*"):
                path.unlink()
            with publish_file(done) as partial:
                partial.touch()

    def _query_turns(self, num_params: int) -> list[range]:
        """Split the queries so that their gradients fit into the memory allowed."""
        per_query = sum(num_vectors(f, self.settings.phases, self.halves) for f in self.families) * num_params
        item_bytes = 8 if self.settings.dtype == "float64" else 4
        at_once = max(1, int(self.settings.query_memory_gib * 2**30 // (per_query * item_bytes)))
        return [range(i, min(i + at_once, len(self.queries))) for i in range(0, len(self.queries), at_once)]

    def _query_vectors(
        self, source: GradientSource, folder: Path, row: int, update: Callable[[int], Any]
    ) -> GridVectors:
        path = folder / f"query-{row:06d}.safetensors"
        if not path.exists():
            (made,) = source.grid_vectors(
                self.queries,
                [row],
                "query",
                self.query_grid,
                self.families,
                phases=self.settings.phases,
                halves=self.halves,
                seed=self.settings.seed,
                update=update,
            )
            _write_arrays(path, {"vectors": made.vectors.cpu().numpy(), "norms": made.norms})
        arrays = _read_arrays(path)
        return GridVectors(torch.from_numpy(arrays["vectors"]).to(source.device), arrays["norms"])

    def _tile(
        self,
        source: GradientSource,
        checkpoint: Checkpoint,
        vectors: list[GridVectors],
        start: int,
        update: Callable[[int], Any],
    ) -> dict[str, ndarray]:
        """Contributions of one block of training images: by method, (query, phase, train) and (half, query, train)."""
        stop = min(start + self.settings.block_size, len(self.subject.train))
        stacked = torch.cat([v.vectors for v in vectors])
        make = self._replayed if isinstance(self.train_events, Replay) else self._gridded
        arrays = {"query_norms": np.stack([v.norms for v in vectors])}
        query_lengths = [self._sample_lengths(v.vectors) for v in vectors]
        for method, products, about in make(source, checkpoint, stacked, range(start, stop), update):
            phases, halves = self._split(
                method, products.reshape(stop - start, len(vectors), -1), np.array(query_lengths)
            )
            arrays |= {
                f"{method.name}.phases": phases,
                **({f"{method.name}.halves": halves} if halves is not None else {}),
            }
            arrays |= {f"{method.name}.{name}": array for name, array in about.items()}
        return arrays

    def _replayed(
        self, source: GradientSource, checkpoint: Checkpoint, stacked: Tensor, rows: range, update: Callable[[int], Any]
    ):
        """Give, for each method, the weighted products of replayed events, added up by training image."""
        tables = {
            rule: _rows_between(self._replay(checkpoint, rule), rows) for rule in {m.weights for m in self.methods}
        }
        table = next(iter(tables.values()))
        dots, norms = source.dots(table, self.subject.train, stacked, update)
        sample = table.row - rows.start
        visits = np.bincount(sample, minlength=len(rows))
        with np.errstate(invalid="ignore"):
            rms = np.sqrt(np.bincount(sample, norms**2, len(rows)) / visits)  # NaN: not visited
        timesteps = np.full(len(rows), -1, dtype=np.int64)
        timesteps[sample] = table.timestep  # events are in order of step, so the last visit stays
        for method in self.methods:
            weight = tables[method.weights].weight
            scale = (
                np.divide(1.0, norms, out=np.zeros_like(norms), where=norms > 0)
                if method.train.unit == "event"
                else 1.0
            )
            products = np.zeros((len(rows), dots.shape[1]))
            np.add.at(products, sample, (weight * scale)[:, None] * dots)
            weights = np.bincount(sample, weight, len(rows))
            yield method, products, {"train_norms": rms, "train_timesteps": timesteps, "train_weights": weights}

    def _gridded(
        self, source: GradientSource, checkpoint: Checkpoint, stacked: Tensor, rows: range, update: Callable[[int], Any]
    ):
        """Give, for each method, the weighted products of gradients summed over a grid."""
        grid = self.train_events
        assert isinstance(grid, Grid)
        families: list[Family] = [f for f in ("none", "timestep") if any(_train_family(m) == f for m in self.methods)]
        products = np.empty((len(families), len(rows), len(stacked)))
        lengths = np.empty((len(families), len(rows)))
        rms = np.empty(len(rows))
        at_once = max(1, source.batch_size // (grid.timesteps * grid.draws))
        for first in range(0, len(rows), at_once):
            some = list(rows[first : first + at_once])
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
            products[:, here] = (gradients @ stacked.T).double().cpu().numpy()
            lengths[:, here] = torch.linalg.vector_norm(gradients, dim=2, dtype=torch.float64).cpu().numpy()
            rms[here] = [np.sqrt(np.mean(m.norms**2)) for m in made]
        for method in self.methods:
            family = families.index(_train_family(method))
            weight = 1.0
            if method.weights != "equal":
                replays = self._need_replays(method.weights)
                weight = replays.grid_weight(self.previous_steps[checkpoint.step], checkpoint.step, method.weights)
            scale = np.divide(1.0, lengths[family], out=np.zeros(len(rows)), where=lengths[family] > 0)
            scale = weight * (scale if method.train.unit == "sample" else np.ones(len(rows)))
            yield (
                method,
                products[family] * scale[:, None],
                {"train_norms": rms, "train_weights": np.full(len(rows), weight)},
            )

    def _split(
        self,
        method: Method,
        products: Float64[ndarray, "train query vector"],
        query_lengths: Float64[ndarray, "query length"],
    ) -> tuple[ndarray, ndarray | None]:
        """Read phases and halves off a method's family; see ``gradients`` for the order of its rows."""
        family = _query_family(method)
        start = sum(
            num_vectors(f, self.settings.phases, self.halves) for f in self.families[: self.families.index(family)]
        )
        phases = products[:, :, start : start + self.settings.phases]
        halves = None
        if self.halves:
            after = start + self.settings.phases
            half_a = products[:, :, after]
            half_b = 2 * phases.sum(2) - half_a if family == "none" else products[:, :, after + 1]
            halves = np.stack([half_a, half_b])
        if method.query.unit == "sample":
            inverse = np.divide(1.0, query_lengths, out=np.zeros_like(query_lengths), where=query_lengths > 0)
            phases = phases * inverse[None, :, :1]
            halves = None if halves is None else halves * inverse.T[1:, None]
        return np.moveaxis(phases, 0, -1), None if halves is None else np.swapaxes(halves, 1, 2)

    def _sample_lengths(self, vectors: Tensor) -> list[float]:
        """Lengths of a query's whole sum and of its halves, in the family ``none``; zeros where it is not computed."""
        if self.families[0] != "none":
            return [0.0, 0.0, 0.0]
        whole = vectors[: self.settings.phases].sum(0)
        half_a = vectors[self.settings.phases] if self.halves else whole
        return [float(torch.linalg.vector_norm(v, dtype=torch.float64)) for v in (whole, half_a, 2 * whole - half_a)]

    def _replay(self, checkpoint: Checkpoint, rule: WeightsRule) -> EventTable:
        assert isinstance(self.train_events, Replay)
        previous = self.previous_steps[checkpoint.step]
        return self._need_replays(rule).events(previous, checkpoint.step, self.train_events, rule)

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
        phase_of = np.arange(len(timesteps)) * self.settings.phases // len(timesteps)
        return Scores(
            method=method.name,
            query_ids=self.queries.ids,
            train_ids=self.subject.train.ids,
            values=phases.sum(1).astype(dtype),
            phases=phases.astype(dtype),
            phase_timesteps=tuple(
                (int(timesteps[phase_of == p][0]), int(timesteps[phase_of == p][-1]))
                for p in range(self.settings.phases)
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
        folder = self.cache / f"{checkpoint.step:08d}"
        turns: dict[str, list[dict[str, ndarray]]] = {}
        for path in sorted(folder.glob("tile-*.safetensors")):
            turns.setdefault(path.name.split("-")[1], []).append(_read_arrays(path))
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


def _query_family(method: Method) -> Family:
    return "timestep" if method.query.unit == "timestep" else "none"


def _train_family(method: Method) -> Family:
    return "timestep" if method.train.unit == "timestep" else "none"


def _rows_between(table: EventTable, rows: range) -> EventTable:
    """Keep the events of some training images; the table is ordered by row."""
    first, last = np.searchsorted(table.row, [rows.start, rows.stop])
    return table.take(slice(int(first), int(last)))


def _write_arrays(path: Path, arrays: dict[str, ndarray]) -> None:
    with publish_file(path) as partial:
        save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, partial)


def _read_arrays(path: Path) -> dict[str, ndarray]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ScoresError(f"{path} is damaged: {error}. Delete it; the next run makes it again.") from error
