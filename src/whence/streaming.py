"""The exact, streaming way to scores, without a stored gradient.

At each checkpoint the queries' gradients come first, then one pass over the training events, whose gradients meet the
queries' layer by layer and are dropped. What is finished lies in a cache until the scores are written:

    <step>/query-<point>-<row>.safetensors    gradient sums of one query, if they took long; removed in the end
    <step>/solved-<turn>-<n>.safetensors      the same of one or all queries of a turn, preconditioned, likewise
    <step>/tile-<turn>-<row>.safetensors      contributions of a block of training images to the queries of one turn
    <step>/done.json                          names of the tiles, once they are all there

A run that was killed goes on from these. Methods that need the same gradients share one pass. Where both sides meet
timestep by timestep, each timestep of the queries has turns of its own, with the training gradients at that timestep:
no gradient is taken twice, and no more is held at once than for sums.
"""

import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import torch
from jaxtyping import Float, Float64
from numpy import ndarray
from torch import Tensor

from whence._array_files import read_arrays, write_arrays
from whence._files import write_json
from whence.assembly import FACTS, inverse, join_meetings, make_scores, sample_lengths, split_products
from whence.checkpoints import Checkpoint
from whence.errors import InUseError
from whence.gradients import GradientSource
from whence.inverse_curvature import AbstractQueryPreconditioner, describe_solutions, make_preconditioner
from whence.methods.frame import Grid, Method, Replay
from whence.progress import progress_bar
from whence.scores import Scores
from whence.workload import Workload, family_of, rows_between

WORTH_KEEPING_S = 5.0
"""Gradient sums of a query that took less long are computed again after an interruption, rather than written."""


_Products = tuple[Method, Float64[ndarray, "train vector"], dict[str, ndarray]]
"""A method, its training images' products with all query vectors, and facts about the training images."""


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


@dataclass(frozen=True)
class _Turn:
    """The gradient sums of as many queries as fit into memory, over the timesteps that meet the training side."""

    index: int
    points: range
    """Which timesteps of the query grid."""
    num_queries: int
    vectors: Float[Tensor, "vector param"]
    """Those of all the queries, one after the other."""
    lengths: Float64[ndarray, "query length"]
    """Lengths of each query's whole sum and of its halves, in the family ``none``; zeros where it is not computed."""
    norms: Float64[ndarray, "query timestep"]
    """Length of each query's gradient at each timestep."""
    facts: dict[str, ndarray] = field(default_factory=dict)
    """About the preconditioner and its solutions."""


class StreamingPass:
    """One pass over checkpoints, queries and training images for methods that share their gradients.

    Args:
        work: Subject, queries, methods and settings.
        query_bytes: Bound on the gradients of queries that are held at once.
        cache: Folder of this very pass; what is in it is used.
        show_progress: Show a progress bar.
    """

    def __init__(self, work: Workload, query_bytes: int, cache: Path, show_progress: bool):
        self.work, self.query_bytes = work, query_bytes
        self.subject, self.queries, self.methods, self.settings = (
            work.subject,
            work.queries,
            work.methods,
            work.settings,
        )
        self.cache, self.show_progress = cache, show_progress

    def run(self) -> list[Scores]:
        """Compute what is not in the cache, then add up the checkpoints: one result per method."""
        with progress_bar("trace", self.work.num_passes(num_turns=1), "pass", shown=self.show_progress) as bar:
            for checkpoint in self.work.checkpoints:
                if self._is_done(checkpoint):
                    bar.update(bar.total // len(self.work.checkpoints))
                else:
                    self._run_checkpoint(checkpoint, bar)
        return [self._assemble(method) for method in self.methods]

    def clean(self) -> None:
        """Remove the cache, once the scores are written."""
        shutil.rmtree(self.cache, ignore_errors=True)

    def _folder(self, checkpoint: Checkpoint) -> Path:
        return self.cache / f"{checkpoint.step:08d}"

    def _run_checkpoint(self, checkpoint: Checkpoint, bar: Any) -> None:
        folder = self._folder(checkpoint)
        source = self.subject.source(checkpoint, self.settings)
        for output in dict.fromkeys(self.work.outputs):
            source.of(output).check(self.subject.train)
        preconditioner = self._preconditioner(source, checkpoint, bar)
        turns = self.work.split_queries(source.layout.num_params, self.query_bytes)
        bar.total = self.work.num_passes(len(turns))
        for index, (points, rows) in enumerate(product(self.work.meetings, turns)):
            self._run_turn(source, checkpoint, preconditioner, index, points, rows, bar)
        for path in [*folder.glob("query-*"), *folder.glob("solved-*")]:
            path.unlink()
        write_json(folder / "done.json", sorted(path.name for path in folder.glob("tile-*")))

    def _preconditioner(
        self, source: GradientSource, checkpoint: Checkpoint, bar: Any
    ) -> AbstractQueryPreconditioner | None:
        """Give what is applied to gradients of queries in place, if there is such a thing."""
        if self.work.precondition is None:
            return None
        bar.set_description_str(f"{f'curvature at {checkpoint.step}':<24}")
        folder = self.cache.parent / "curvature"
        return make_preconditioner(
            self.work.precondition, source, checkpoint, self.subject, self.settings, folder, bar.update
        )

    def _precondition(
        self, preconditioner: AbstractQueryPreconditioner, turn: _Turn, folder: Path, update: Callable[[int], Any]
    ) -> dict[str, ndarray]:
        """Apply it to the gradients of a turn, in place; what took long is kept, to go on from."""
        found = []
        groups = [turn.vectors] if preconditioner.together else turn.vectors.split(self.work.vectors_per_query)
        for number, vectors in enumerate(groups):
            path = folder / f"solved-{turn.index:06d}-{number:06d}.safetensors"
            if path.exists():
                update(preconditioner.passes(len(vectors)))
                arrays = read_arrays(path)
                vectors.copy_(torch.from_numpy(arrays.pop("vectors")))
            else:
                started_s = time.monotonic()
                facts = preconditioner.apply_(vectors, update)
                arrays = {name: np.array([number], dtype=np.float64) for name, number in facts.items()}
                if time.monotonic() - started_s > WORTH_KEEPING_S:
                    write_arrays(path, {"vectors": vectors.cpu().numpy()} | arrays)
            found.append(arrays)
        return {name: np.concatenate([arrays[name] for arrays in found]) for name in found[0]}

    def _run_turn(
        self,
        source: GradientSource,
        checkpoint: Checkpoint,
        preconditioner: AbstractQueryPreconditioner | None,
        index: int,
        points: range,
        rows: range,
        bar: Any,
    ) -> None:
        """Take some queries through all training images; their gradients are let go before the next turn."""
        folder, num_train = self._folder(checkpoint), len(self.subject.train)
        # Of one timestep of many, that many more images, so that a tile is as much work.
        size = self.settings.block_size * len(self.work.meetings)
        blocks = [range(start, min(start + size, num_train)) for start in range(0, num_train, size)]
        tiles = {folder / f"tile-{index:06d}-{block.start:08d}.safetensors": block for block in blocks}
        if all(path.exists() for path in tiles):
            query = len(rows) * len(points) * self.work.query_grid.draws
            bar.update(query + self.work.num_events(checkpoint, range(num_train), points))
            return
        bar.set_description_str(f"{f'queries at {checkpoint.step}':<24}")
        turn = self._make_turn(source, folder, index, points, rows, bar.update)
        if preconditioner is not None:
            bar.set_description_str(f"{f'solutions at {checkpoint.step}':<24}")
            turn = replace(turn, facts=self._precondition(preconditioner, turn, folder, bar.update))
        bar.set_description_str(f"{f'training at {checkpoint.step}':<24}")
        for path, block in tiles.items():
            if path.exists():
                bar.update(self.work.num_events(checkpoint, block, points))
            else:
                write_arrays(path, self._tile(source, checkpoint, turn, block, bar.update))

    def _is_done(self, checkpoint: Checkpoint) -> bool:
        folder = self._folder(checkpoint)
        if not (folder / "done.json").exists():
            return False
        return all((folder / name).exists() for name in json.loads((folder / "done.json").read_text()))

    def _make_turn(
        self,
        source: GradientSource,
        folder: Path,
        index: int,
        points: range,
        rows: range,
        update: Callable[[int], Any],
    ) -> _Turn:
        # Made where they stay: a copy of them would take as much memory again.
        vectors = source.no_vectors().new_empty(len(rows), self.work.vectors_per_query, source.layout.num_params)
        norms = np.stack(
            [self._query_vectors(source, folder, row, points, vectors[k], update) for k, row in enumerate(rows)]
        )
        lengths = np.array([sample_lengths(self.work, v) for v in vectors])
        return _Turn(index, points, len(rows), vectors.flatten(0, 1), lengths, norms)

    def _query_vectors(
        self,
        source: GradientSource,
        folder: Path,
        row: int,
        points: range,
        vectors: Float[Tensor, "vector param"],
        update: Callable[[int], Any],
    ) -> Float64[ndarray, " timestep"]:
        """Put a query's gradient sums into ``vectors``; give their lengths at each timestep."""
        path = folder / f"query-{points.start:06d}-{row:06d}.safetensors"
        if path.exists():
            update(len(points) * self.work.query_grid.draws)
            arrays = read_arrays(path)
            vectors.copy_(torch.from_numpy(arrays["vectors"]))
            return arrays["norms"]
        started_s = time.monotonic()
        (made,) = source.of(self.work.outputs[1]).grid_vectors(
            self.queries,
            [row],
            "query",
            self.work.query_grid,
            self.work.query_families,
            phases=self.work.phases_at_once,
            halves=self.work.halves,
            seed=self.settings.seed,
            update=update,
            out=vectors[None],
            points=points,
        )
        if time.monotonic() - started_s > WORTH_KEEPING_S:
            write_arrays(path, {"vectors": vectors.cpu().numpy(), "norms": made.norms})
        return made.norms

    def _tile(
        self, source: GradientSource, checkpoint: Checkpoint, turn: _Turn, block: range, update: Callable[[int], Any]
    ) -> dict[str, ndarray]:
        """Contributions of one block of training images: by method, (query, phase, train) and (half, query, train)."""
        products_of = self._replayed if isinstance(self.work.train_events, Replay) else self._gridded
        source = source.of(self.work.outputs[0])
        arrays = {"query_norms": turn.norms} | {f"{FACTS}{name}": array for name, array in turn.facts.items()}
        for method, products, facts in products_of(source, checkpoint, turn, block, update):
            products = products.reshape(len(block), turn.num_queries, -1)
            facts["phases"], halves = split_products(self.work, method, products, turn.lengths)
            arrays |= {f"{method.name}.{name}": array for name, array in facts.items()}
            if halves is not None:
                arrays[f"{method.name}.halves"] = halves
        return arrays

    def _replayed(
        self,
        source: GradientSource,
        checkpoint: Checkpoint,
        turn: _Turn,
        block: range,
        update: Callable[[int], Any],
    ) -> Iterator[_Products]:
        """Give, for each method, the weighted products of replayed events, added up by training image."""
        table = rows_between(self.work.replayed_events(checkpoint, self.methods[0].weights), block)
        image, met = table.row - block.start, self.work.meets(table, turn.points)
        dots, norms = source.dots(table.take(met), self.subject.train, turn.vectors, update)
        counts = np.bincount(image[met], minlength=len(block)).astype(np.float64)
        timesteps = np.full(len(block), -1, dtype=np.int64)
        timesteps[image] = table.timestep  # events are in order of step, so the last visit stays
        facts = {"train_norms": rms_by_image(image[met], norms, len(block)), "train_counts": counts}
        for method in self.methods:
            weight = rows_between(self.work.replayed_events(checkpoint, method.weights), block).weight
            factor = weight[met] * (inverse(norms) if method.train.unit == "event" else 1.0)
            products = np.zeros((len(block), dots.shape[1]))
            np.add.at(products, image[met], factor[:, None] * dots)
            weights = np.bincount(image, weight, len(block)).astype(np.float64)  # int64 where there is no event
            yield method, products, facts | {"train_timesteps": timesteps, "train_weights": weights}

    def _gridded(
        self,
        source: GradientSource,
        checkpoint: Checkpoint,
        turn: _Turn,
        block: range,
        update: Callable[[int], Any],
    ) -> Iterator[_Products]:
        """Give, for each method, the weighted products of gradients summed over a grid, or at one timestep of it."""
        grid, vectors = self.work.train_events, turn.vectors
        assert isinstance(grid, Grid)
        points = turn.points if self.work.is_matched else range(grid.timesteps)
        families = self.work.train_families
        products = np.empty((len(families), len(block), len(vectors)))
        lengths = np.empty((len(families), len(block)))
        rms = np.empty(len(block))
        at_once = max(1, source.batch_size // (len(points) * grid.draws))
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
                points=points,
            )
            here = slice(first, first + len(some))
            gradients = torch.stack([m.vectors for m in made], dim=1)  # family, train, param
            products[:, here] = (gradients @ vectors.T).double().cpu().numpy()
            lengths[:, here] = torch.linalg.vector_norm(gradients, dim=2, dtype=torch.float64).cpu().numpy()
            rms[here] = [np.sqrt(np.mean(m.norms**2)) for m in made]
        for method in self.methods:
            family = families.index(family_of(method.train.unit))
            weight = self.work.grid_weight(checkpoint, method.weights)
            factor = weight * (inverse(lengths[family]) if method.train.unit == "sample" else np.ones(len(block)))
            factor /= len(self.work.meetings)  # sums over the grid are means already
            facts = {"train_norms": rms, "train_weights": np.full(len(block), weight)}
            facts["train_counts"] = np.full(len(block), float(len(points)))
            yield method, products[family] * factor[:, None], facts

    def _assemble(self, method: Method) -> Scores:
        """Join the tiles along queries and training images, and add up the checkpoints."""
        joined = [self._join(checkpoint, method) for checkpoint in self.work.checkpoints]
        summed = [name for name in ("phases", "halves") if name in joined[0]]
        totals = {name: np.sum([arrays[name] for arrays in joined], axis=0) for name in summed}
        scores = make_scores(self.work, method, totals, joined)
        facts = {
            c.step: {name.removeprefix(FACTS): array for name, array in arrays.items() if name.startswith(FACTS)}
            for c, arrays in zip(self.work.checkpoints, joined, strict=True)
        }
        details = describe_solutions(self.work.precondition, self.subject, self.settings, facts)
        return replace(scores, details=details)

    def _join(self, checkpoint: Checkpoint, method: Method) -> dict[str, ndarray]:
        turns: dict[str, list[Path]] = {}
        for path in sorted(self._folder(checkpoint).glob("tile-*.safetensors")):
            turns.setdefault(path.name.split("-")[1], []).append(path)
        tiles, at_once = list(turns.values()), len(turns) // len(self.work.meetings)
        parts = (self._join_turns(tiles[k : k + at_once], method) for k in range(0, len(tiles), at_once))
        return join_meetings(self.work, parts) if self.work.is_matched else next(parts)

    @staticmethod
    def _join_turns(paths: list[list[Path]], method: Method) -> dict[str, ndarray]:
        turns = [[read_arrays(path) for path in tiles] for tiles in paths]
        prefix = f"{method.name}."
        joined: dict[str, ndarray] = {}
        for name in [n.removeprefix(prefix) for n in turns[0][0] if n.startswith(prefix)]:
            per_turn = [np.concatenate([tile[prefix + name] for tile in tiles], axis=-1) for tiles in turns]
            if name in ("phases", "halves"):
                joined[name] = np.concatenate(per_turn, axis=0 if name == "phases" else 1)
            else:
                joined[name] = per_turn[0]
        for name in [n for n in turns[0][0] if n.startswith(FACTS)]:
            joined[name] = np.concatenate([tiles[0][name] for tiles in turns])
        joined["query_norms"] = np.concatenate([tiles[0]["query_norms"] for tiles in turns])
        return joined


def rms_by_image(image: ndarray, norms: Float64[ndarray, " event"], num_images: int) -> Float64[ndarray, " train"]:
    """Give the root mean square of each image's gradient lengths; NaN where it was not visited."""
    with np.errstate(invalid="ignore"):  # 0 / 0
        return np.sqrt(np.bincount(image, norms**2, num_images) / np.bincount(image, minlength=num_images))
