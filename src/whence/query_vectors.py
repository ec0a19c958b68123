"""The query side of a store: vectors that its rows are multiplied with, made once and kept.

Two kinds, by what stands between the two sides:

    RowsByTimestep       nothing, or what is made of the store's rows: gradients at each timestep of the grid, projected
                         as the rows are, by half of the draws. Any sums over timesteps are made of these afterwards.
    PreconditionedSums   a curvature or Adam's scale: it does not commute with a projection, so it is applied to sums of
                         whole gradients, by phase and half, as in streaming; what it gives is projected.

    cache/queries/<key>/<step>.safetensors    those of one query at one checkpoint
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float64
from numpy import ndarray
from torch import Tensor

from whence._array_files import read_arrays, write_arrays
from whence._files import sha256_of_json
from whence._store_checks import list_differences
from whence.assembly import FACTS, inverse, sample_lengths
from whence.checkpoints import Checkpoint
from whence.errors import StoreError
from whence.gradients import GradientSource
from whence.grid_sums import sum_coefficients
from whence.indexing import content_hashes
from whence.inverse_curvature import AbstractQueryPreconditioner, describe_solutions, make_preconditioner
from whence.memory import QUERY_BYTES
from whence.methods.frame import BeforeProjection, Trajectory
from whence.progress import progress_bar
from whence.projections import AbstractProjection, canonical_name
from whence.store import Store
from whence.store_spec import projection_of
from whence.workload import PassCount, Workload


@dataclass(frozen=True)
class QueryVectors:
    """The projected sums of some queries at one checkpoint, over all timesteps or at each where rows meet them."""

    vectors: Float[Tensor, "meeting query vector width"]
    lengths: Float64[ndarray, "query length"]
    """Of each query's whole sum and of its halves, in the family ``none``, before any preconditioner."""
    norms: Float64[ndarray, "query timestep"]
    """Exact lengths at each timestep."""


class AbstractQuerySide(ABC):
    """The vectors of the queries of a workload.

    Args:
        work: Subject, queries, methods and settings.
        store: Its rows are what the vectors meet.
        cache: The run's ``cache``.
    """

    def __init__(self, work: Workload, store: Store, cache: Path):
        self.work, self.store, self.cache = work, store, cache
        contents = content_hashes(work.queries)
        if isinstance(work.query_grid, Trajectory) and work.queries.trajectories is not None:
            contents = list(map("".join, zip(work.queries.trajectories.hashes, contents, strict=True)))
        shared = [vars(work.query_grid), work.outputs[1], *self._depends_on()]
        self.keys = [
            sha256_of_json([store.spec_sha256, query_id, content, *shared])[:16]
            for query_id, content in zip(work.queries.ids, contents, strict=True)
        ]

    @property
    @abstractmethod
    def bytes_per_query(self) -> int:
        """Bytes that are kept of a query at one checkpoint, beside names and shapes."""

    @abstractmethod
    def queries_at_once(self, count: int) -> int:
        """Say how many of so many queries should be held at once, where memory allows it."""

    @abstractmethod
    def read(self, step: int, rows: range) -> QueryVectors:
        """Give the vectors of some queries at one checkpoint; they are kept already."""

    @abstractmethod
    def _depends_on(self) -> list[Any]:
        """Name what the vectors depend on beside store, query, grid and output."""

    @abstractmethod
    def _make(
        self,
        source: GradientSource,
        projection: AbstractProjection,
        checkpoint: Checkpoint,
        rows: Sequence[int],
        bar: Any,
    ) -> None:
        """Make and keep the vectors of some queries at one checkpoint."""

    def describe(self) -> dict[str, Any]:
        """Say in plain values how the vectors were made, for the details of scores."""
        return {}

    def missing(self) -> dict[Checkpoint, list[int]]:
        """Give the queries whose vectors are not kept yet."""
        rows = range(len(self.work.queries))
        return {c: [row for row in rows if not self._path(c.step, row).exists()] for c in self.work.checkpoints}

    def passes(self) -> list[PassCount]:
        """Count the sample-passes for what is missing, at each checkpoint."""
        return [self.work.query_passes(checkpoint, len(rows)) for checkpoint, rows in self.missing().items()]

    def fill(self, show_progress: bool) -> None:
        """Make what is missing."""
        work, missing = self.work, self.missing()
        total = sum(count.query + count.curvature + count.curvature_per_turn for count in self.passes())
        with progress_bar("query", total, "pass", shown=show_progress) as bar:
            for checkpoint in (c for c in work.checkpoints if missing[c]):
                bar.set_description_str(f"{f'queries at {checkpoint.step}':<24}")
                source = work.subject.source(checkpoint, work.settings)
                source.of(work.outputs[1]).check(work.subject.train)
                projection = self._projection(source, checkpoint)
                self._make(source, projection, checkpoint, missing[checkpoint], bar)

    def _path(self, step: int, row: int) -> Path:
        return self.cache / "queries" / self.keys[row] / f"{step:08d}.safetensors"

    def _projection(self, source: GradientSource, checkpoint: Checkpoint) -> AbstractProjection:
        """Make the store's projection, and refuse a model whose parameters it is not made for."""
        space = self.store.spec["space"]
        names = {canonical_name(name): name for name in source.capture.parameters}
        shapes = {name: list(source.capture.parameters[own].shape) for name, own in names.items()}
        differences = list(list_differences({"parameters": space["parameters"]}, {"parameters": shapes}))
        if differences:
            raise StoreError(
                f"{self.store.folder} holds gradients of other parameters than checkpoint {checkpoint.step} has: "
                f"{'; '.join(differences)}. Make a store of this model with `whence index`."
            )
        about = space["projection"]
        return projection_of(source, about, [names[name] for name in about["direct"]])


class RowsByTimestep(AbstractQuerySide):
    """Projected gradients at each timestep, by part: unit rows in the store's type, beside exact lengths."""

    @property
    def bytes_per_query(self) -> int:
        """Of parts and their lengths at all timesteps."""
        parts, row = 1 + self.work.halves, self.store.width * (4 if self.store.dtype == "float32" else 2)
        return self.work.query_grid.timesteps * (parts * row + 4 * (1 + parts))

    def queries_at_once(self, count: int) -> int:
        """One after the other."""
        return min(1, count)

    def read(self, step: int, rows: range) -> QueryVectors:
        """Sum what is kept over the timesteps; see :meth:`AbstractQuerySide.read`."""
        work = self.work
        vectors, lengths, norms = [], [], []
        for row in rows:
            arrays = read_arrays(self._path(step, row))
            found = torch.from_numpy(arrays["norms"]).double()  # timestep, length
            parts = _from_bits(arrays["rows"]) * found[:, 1:, None].float()  # timestep, part, width
            vectors.append(torch.stack([self._sum(parts, found, points) for points in work.meetings]))
            lengths.append(sample_lengths(work, vectors[-1][0]))
            norms.append(arrays["norms"][:, 0].astype(np.float64))
        return QueryVectors(torch.stack(vectors, dim=1), np.array(lengths), np.stack(norms))

    def _sum(
        self, parts: Float[Tensor, "timestep part width"], lengths: Float64[Tensor, "timestep length"], points: range
    ) -> Float[Tensor, "vector width"]:
        """Sum a query's gradients over some timesteps, as if there were no others."""
        some, count, phases = slice(points.start, points.stop), len(points), self.work.phases_at_once
        phase_of_point = torch.arange(count) * phases // count
        factors = sum_coefficients(lengths[some], phase_of_point, self.work.query_families, phases, self.work.halves)
        return (factors / count).flatten(1).float() @ parts[some].flatten(0, 1)

    def _depends_on(self) -> list[Any]:
        return []

    def _make(
        self,
        source: GradientSource,
        projection: AbstractProjection,
        checkpoint: Checkpoint,
        rows: Sequence[int],
        bar: Any,
    ) -> None:
        for row in rows:
            made = source.of(self.work.outputs[1]).grid_rows(
                self.work.queries,
                [row],
                "query",
                self.work.query_grid,
                projection,
                halves=self.work.halves,
                seed=self.work.settings.seed,
                update=bar.update,
            )
            norms = made.norms[0].astype(np.float32)
            unit_rows = made.rows[0].float().cpu() * torch.from_numpy(inverse(norms[:, 1:]))[..., None]
            arrays = {"rows": _to_bits(unit_rows, self.store.dtype), "norms": norms}
            write_arrays(self._path(checkpoint.step, row), arrays)


class PreconditionedSums(AbstractQuerySide):
    """Sums of whole gradients by family, phase and half, preconditioned, then projected; in float32."""

    @property
    def bytes_per_query(self) -> int:
        """Of all sums, with three lengths and those at all timesteps."""
        numbers = len(self.work.meetings) * self.work.vectors_per_query * self.store.width
        return 4 * numbers + 8 * (3 + self.work.query_grid.timesteps)

    def queries_at_once(self, count: int) -> int:
        """All where one pass over training images serves them all; otherwise one, so that what is solved is kept."""
        return count if self.work.query_passes(self.work.checkpoints[-1], 1).curvature_per_turn else min(1, count)

    def read(self, step: int, rows: range) -> QueryVectors:
        """Read them; see :meth:`AbstractQuerySide.read`."""
        found = [read_arrays(self._path(step, row)) for row in rows]
        return QueryVectors(
            torch.stack([torch.from_numpy(arrays["vectors"]) for arrays in found], dim=1),
            *(np.stack([arrays[name] for arrays in found]) for name in ("lengths", "norms")),
        )

    def describe(self) -> dict[str, Any]:
        """Say how well equations were solved; see :func:`whence.inverse_curvature.describe_solutions`."""
        found: dict[int, dict[str, list[ndarray]]] = {c.step: {} for c in self.work.checkpoints}
        for step, facts in found.items():
            for row in range(len(self.work.queries)):
                arrays = read_arrays(self._path(step, row))
                for name in (name for name in arrays if name.startswith(FACTS)):
                    facts.setdefault(name.removeprefix(FACTS), []).append(arrays[name])
        joined = {step: {name: np.stack(parts) for name, parts in facts.items()} for step, facts in found.items()}
        return describe_solutions(self._asked, self.work.subject, self.work.settings, joined)

    @property
    def _asked(self) -> BeforeProjection:
        assert self.work.precondition is not None  # make_query_side
        return self.work.precondition

    def _depends_on(self) -> list[Any]:
        train = self.work.subject.train  # a store grows with its images, a curvature is of them all
        return [
            *(type(self._asked).__name__, asdict(self._asked), train.fingerprint, len(train)),
            *(self.work.query_families, self.work.phases_at_once, self.work.is_matched),
        ]

    def _make(
        self,
        source: GradientSource,
        projection: AbstractProjection,
        checkpoint: Checkpoint,
        rows: Sequence[int],
        bar: Any,
    ) -> None:
        work = self.work
        bar.set_description_str(f"{f'curvature at {checkpoint.step}':<24}")
        preconditioner = make_preconditioner(
            self._asked, source, checkpoint, work.subject, work.settings, self.cache / "curvature", bar.update
        )
        held = work.held_per_query * source.gradient_bytes
        at_once = min(self.queries_at_once(len(rows)), max(1, QUERY_BYTES // held))
        turns = [rows[start : start + at_once] for start in range(0, len(rows), at_once)]
        bar.total += (len(turns) - 1) * work.query_passes(checkpoint, len(rows)).curvature_per_turn
        bar.set_description_str(f"{f'queries at {checkpoint.step}':<24}")
        for turn in turns:
            self._make_turn(source, projection, preconditioner, checkpoint, turn, bar.update)

    def _make_turn(
        self,
        source: GradientSource,
        projection: AbstractProjection,
        preconditioner: AbstractQueryPreconditioner,
        checkpoint: Checkpoint,
        rows: Sequence[int],
        update: Callable[[int], Any],
    ) -> None:
        """Make the vectors of queries that are held at once; one meeting after the other."""
        work = self.work
        projected, norms, facts, lengths = [], [], [], []
        for points in work.meetings:
            made = source.of(work.outputs[1]).grid_vectors(
                work.queries,
                rows,
                "query",
                work.query_grid,
                work.query_families,
                phases=work.phases_at_once,
                halves=work.halves,
                seed=work.settings.seed,
                update=update,
                points=points,
            )
            norms.append([m.norms for m in made])
            lengths = [sample_lengths(work, m.vectors) for m in made]
            vectors = torch.stack([m.vectors for m in made])
            facts.append(preconditioner.apply_(vectors.flatten(0, 1), update))
            projected.append(source.project(projection, vectors.flatten(0, 1)).unflatten(0, (len(rows), -1)))
        about = {f"{FACTS}{name}": np.array([max(f[name] for f in facts)]) for name in facts[0]}
        found, of_queries = torch.stack(projected, dim=1).float().cpu().numpy(), np.concatenate(norms, axis=1)
        for k, row in enumerate(rows):
            arrays = {"vectors": found[k], "lengths": np.array(lengths[k]), "norms": of_queries[k]}
            write_arrays(self._path(checkpoint.step, row), arrays | about)


def make_query_side(work: Workload, store: Store, cache: Path) -> AbstractQuerySide:
    """Make the query side of a workload: of the kind that its preconditioner asks for.

    Returns:
        The query side; nothing is computed yet.
    """
    kind = RowsByTimestep if work.precondition is None else PreconditionedSums
    return kind(work, store, cache)


def _to_bits(rows: Float[Tensor, "timestep part width"], dtype: str) -> ndarray:
    """Round rows to the type of the store's; bfloat16, which numpy does not know, is kept by its bits."""
    rounded = rows.to(getattr(torch, dtype))
    return rounded.view(torch.int16).numpy() if dtype == "bfloat16" else rounded.numpy()


def _from_bits(rows: ndarray) -> Float[Tensor, "timestep part width"]:
    """Give what :func:`_to_bits` has rounded, as float32."""
    found = torch.from_numpy(rows)
    return (found.view(torch.bfloat16) if found.dtype == torch.int16 else found).float()
