r"""Bias diagnostics: do scores follow the timestep at which a sample happened to be trained?

The length of a gradient depends on the timestep it is taken at, so a method that does not take lengths out may rank
samples by when they were trained, and find the same *generally influential* ones for every query (Xie et al. 2024,
arXiv:2401.09031). Four views of that, from scores that replay training::

    correlation     Spearman's, over training samples, of |score| with the length of the gradient as it was trained, and
                    with the timestep: median over queries. Near 0 where a method has no such bias
    histogram       trained timesteps of the samples in a top k, beside those of all
    norm curve      length of one sample's gradient against timestep, with the noise it was trained with, per checkpoint
    intervention    the sample is scored as if it had been trained at the timestep where its curve is highest, all else
                    as it was: its rank over queries, before and after; and, to compare, where the curve is lowest

Over several checkpoints, a sample's length and timestep are means weighted as the checkpoints are in the scores. The
intervention takes queries' gradients again, as many sample-passes as their trace took; the rest costs next to nothing.
"""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Float64, Int, Int64
from numpy import ndarray

from whence._array_files import read_arrays, write_arrays
from whence._files import sha256_of_json
from whence.assembly import inverse
from whence.checkpoints import Checkpoint
from whence.config import TraceSettings
from whence.data import ImageData
from whence.diffusion.noise import keyed_order
from whence.diffusion.process import even_timesteps
from whence.errors import ConfigError, RecordError, ScoresError
from whence.evaluation import rank_correlation
from whence.event_table import EventTable
from whence.gradients import GradientSource
from whence.methods.frame import AntitheticGrid, Grid, Replay
from whence.progress import progress_bar
from whence.scores import Scores
from whence.streaming import claim
from whence.subject import Subject

BINS = 20
"""Bars of a histogram of timesteps."""

WAYS = ("trained", "longest", "shortest")
"""Where a sample is trained in the intervention: where it was, where its gradient is longest, where it is shortest."""

AGREES_WITHIN = 1e-2
"""What a score may differ by from the same taken again, of the query's strongest: the rounding of half precision."""


@dataclass(frozen=True)
class Correlations:
    """How far the size of scores follows how samples were trained."""

    with_norm: Float64[ndarray, " query"]
    """Rank correlation of ``|score|`` with the length of the gradient as it was trained."""
    with_timestep: Float64[ndarray, " query"] | None
    """With the trained timestep; None where samples were taken on a grid."""


@dataclass(frozen=True)
class TimestepHistogram:
    """How trained timesteps are spread."""

    edges: Float64[ndarray, " edge"]
    everything: Int64[ndarray, " bin"]
    """Pairs of sample and checkpoint."""
    top: Int64[ndarray, " bin"]
    """The same of each place in a top k."""


@dataclass(frozen=True)
class Intervention:
    """Norm curves of training samples, and their scores as trained, and as if trained at the ends of the curve."""

    ids: tuple[str, ...]
    timesteps: Int64[ndarray, " timestep"]
    curves: Float64[ndarray, "checkpoint sample timestep"]
    """Length of the gradient; NaN where the sample was not visited."""
    trained_timesteps: Int64[ndarray, "checkpoint sample"]
    """-1 where it was not visited."""
    trained_norms: Float64[ndarray, "checkpoint sample"]
    scores: dict[str, Float64[ndarray, "way query sample"]]
    """By method; in the order of ``WAYS``."""

    @property
    def longest_timesteps(self) -> Int64[ndarray, "checkpoint sample"]:
        """Timestep at which each curve is highest; -1 where there is none."""
        visited = self.trained_timesteps >= 0
        return np.where(visited, self.timesteps[np.where(visited[..., None], self.curves, 0).argmax(axis=-1)], -1)


def trained_as(scores: Scores) -> tuple[Float64[ndarray, " train"], Float64[ndarray, " train"] | None]:
    """Say how long each sample's gradient was as it was trained, and at which timestep: means over checkpoints.

    Returns:
        Lengths and timesteps, weighted as the checkpoints are in the scores; NaN for samples without a visit. No
        timesteps where samples were taken on a grid.

    Raises:
        ScoresError: If the scores have no gradients.
    """
    if scores.train_norms is None:
        raise ScoresError(f"The {scores.method} scores have no gradients of training images, so nothing to diagnose.")
    visited = np.isfinite(scores.train_norms)
    weights = np.where(visited, 1.0 if scores.train_weights is None else scores.train_weights, 0.0)

    def mean(values: ndarray) -> Float64[ndarray, " train"]:
        with np.errstate(invalid="ignore"):  # 0 / 0
            return (np.where(visited, values, 0.0) * weights).sum(axis=0) / weights.sum(axis=0)

    return mean(scores.train_norms), None if scores.train_timesteps is None else mean(scores.train_timesteps)


def correlations(scores: Scores) -> Correlations:
    """Correlate the size of scores with how samples were trained; see the module.

    Returns:
        One number for each query; NaN where scores are constant.
    """
    norms, timesteps = trained_as(scores)
    sizes, known = np.abs(scores.values).astype(np.float64), np.isfinite(norms)
    of_norm, of_timestep = (
        None if values is None else rank_correlation(sizes[:, known], values[known]) for values in (norms, timesteps)
    )
    assert of_norm is not None
    return Correlations(of_norm, of_timestep)


def timestep_histogram(scores: Scores, k: int) -> TimestepHistogram:
    """Count the trained timesteps of all samples, and of those in a top k, each place for itself.

    Args:
        scores: Scores that replay training.
        k: Length of a ranking.

    Returns:
        Counts over all checkpoints.

    Raises:
        ScoresError: If samples were taken on a grid.
    """
    if scores.train_timesteps is None:
        raise ScoresError(f"The {scores.method} scores do not replay training, so samples have no trained timestep.")
    top = scores.train_timesteps[:, scores.top_rows(k).ravel()]
    edges = np.linspace(0, scores.train_timesteps.max() + 1, BINS + 1)
    everything, of_top = (
        np.histogram(values[values >= 0], edges)[0].astype(np.int64) for values in (scores.train_timesteps, top)
    )
    return TimestepHistogram(edges, everything, of_top)


def norm_by_timestep(scores: Scores) -> tuple[Float64[ndarray, " edge"], Float64[ndarray, "checkpoint bin"]]:
    """Median length of gradients, as they were trained, by trained timestep.

    Returns:
        Edges of the bins, and medians; NaN where a bin is empty.

    Raises:
        ScoresError: If samples were taken on a grid.
    """
    if scores.train_timesteps is None or scores.train_norms is None:
        raise ScoresError(f"The {scores.method} scores do not replay training, so samples have no trained timestep.")
    edges = np.linspace(0, scores.train_timesteps.max() + 1, BINS + 1)
    medians = np.full((len(scores.train_timesteps), BINS), np.nan)
    for checkpoint, (timesteps, norms) in enumerate(zip(scores.train_timesteps, scores.train_norms, strict=True)):
        place = np.digitize(timesteps, edges) - 1
        for number in np.unique(place[timesteps >= 0]):
            medians[checkpoint, number] = np.median(norms[(place == number) & (timesteps >= 0)])
    return edges, medians


def ranks_of(
    values: Float64[ndarray, "query sample"], everything: Float[ndarray, "query train"], rows: Sequence[int]
) -> Int[ndarray, "query sample"]:
    """Rank, from 1, that samples would have among all others with these scores in place of their own."""
    ranks = np.empty(values.shape, dtype=np.int64)
    for column, row in enumerate(rows):
        others = np.delete(everything, row, axis=1)
        ranks[:, column] = 1 + (others > values[:, column : column + 1]).sum(axis=1)
    return ranks


def choose_samples(scores: Scores, count: int, seed: int = 0) -> list[int]:
    """Choose rows of training samples at random, among those with a visit before every checkpoint.

    Returns:
        As many as there are, at most ``count``.

    Raises:
        RecordError: If there is none.
    """
    assert scores.train_timesteps is not None  # they replay training
    visited = np.asarray((scores.train_timesteps >= 0).all(axis=0))
    rows = [int(row) for row in keyed_order(seed, 0, len(visited)) if visited[row]][:count]
    if not rows:
        raise RecordError(
            "No training image was visited before every checkpoint, so none can be followed over training. Give "
            "--samples."
        )
    return rows


def intervene(
    subject: Subject,
    queries: ImageData,
    scores: Sequence[Scores],
    rows: Sequence[int],
    settings: TraceSettings,
    cache: Path,
    *,
    timesteps: int = 100,
    show_progress: bool = True,
) -> Intervention:
    """Score samples as if they had been trained at the timestep where their gradients are longest, or shortest.

    Noise, flip, weight and checkpoint stay as they were; only the timestep of each visit changes. The score as it was
    trained is taken again beside, and must be the one in ``scores``.

    Args:
        subject: Checkpoints, training images and record.
        queries: The queries.
        scores: TracIn, ReTrac or both, traced with ``replay="last"``; all with one grid of queries.
        rows: Which training samples.
        settings: Arithmetic, as of the trace.
        cache: Folder of the run's cache, to go on from after an interruption.
        timesteps: Points of a norm curve, evenly spaced on 1..T-1.
        show_progress: Show a progress bar.

    Returns:
        Curves and scores.

    Raises:
        ConfigError: If the scores cannot be taken this way.
        RecordError: If there is no record.
        ScoresError: If a score taken again is not the same.
    """
    if subject.replays is None:
        raise RecordError("Only a record of training says at which timesteps images were trained; there is none.")
    grids = {grid_of(one) for one in scores}
    if len(grids) != 1 or not all(is_replayed(one) for one in scores):
        raise ConfigError(
            "Give scores by tracin or retrac that whence trace made with the last visit (--replay last), all with the "
            "same grid of queries."
        )
    (grid,) = grids
    key = sha256_of_json([WAYS, [one.content_hash for one in scores], list(rows), timesteps])[:16]
    work = _Intervention(subject, queries, list(rows), grid, settings, timesteps)
    parts = []
    with (
        claim(cache / f"diagnose-{key}"),
        progress_bar("diagnose", work.num_passes, "pass", shown=show_progress) as bar,
    ):
        for checkpoint in subject.checkpoints:
            path = cache / f"diagnose-{key}" / f"{checkpoint.step:08d}.safetensors"
            if path.exists():
                bar.update(work.num_passes // len(subject.checkpoints))
            else:
                write_arrays(path, work.at_checkpoint(checkpoint, bar.update))
            parts.append(read_arrays(path))
        found = _join(parts, subject, rows, scores, work.timesteps)
        for one in scores:
            _check_same(one, found.scores[one.method][0], rows)
        shutil.rmtree(cache / f"diagnose-{key}", ignore_errors=True)
    return found


def is_replayed(scores: Scores) -> bool:
    """Tell whether scores are TracIn's or ReTrac's, traced with the last visits."""
    declared, traced = scores.details.get("method", {}), "store" not in scores.details
    train, query = declared.get("train", {}), declared.get("query", {})
    units = (train.get("unit"), query.get("unit"))
    return (
        traced
        and declared.get("events") == "Replay"
        and train.get("events", {}).get("visits") == "last"
        and units in (("none", "none"), ("event", "timestep"))
        and (declared.get("precondition"), declared.get("meet"), declared.get("weights"), declared.get("checkpoints"))
        == (None, "sums", "learning_rate", "all")
        and train.get("output") == query.get("output") == "loss"
    )


def grid_of(scores: Scores) -> Grid | None:
    """Give the grid of queries that scores were made with; None where it was none."""
    declared = scores.details.get("method", {})
    kind = {"Grid": Grid, "AntitheticGrid": AntitheticGrid}.get(declared.get("query_events"))
    return kind and kind(**declared["query"]["events"])


@dataclass(frozen=True)
class _Intervention:
    """What is taken at each checkpoint."""

    subject: Subject
    queries: ImageData
    rows: list[int]
    grid: Grid | None
    settings: TraceSettings
    num_timesteps: int

    @property
    def timesteps(self) -> Int64[ndarray, " timestep"]:
        return even_timesteps(1, self.subject.process.num_timesteps - 1, self.num_timesteps).numpy()

    @property
    def num_passes(self) -> int:
        assert self.grid is not None  # is_replayed
        per_query = self.grid.timesteps * self.grid.draws + len(WAYS) * len(self.rows)
        per_checkpoint = len(self.rows) * self.num_timesteps + len(self.queries) * per_query
        return len(self.subject.checkpoints) * per_checkpoint

    def at_checkpoint(self, checkpoint: Checkpoint, update: Any) -> dict[str, ndarray]:
        assert self.subject.replays is not None and self.grid is not None  # checked by the caller
        source = self.subject.source(checkpoint, self.settings)
        after = self.subject.previous_step[checkpoint.step]
        visits = self.subject.replays.events(after, checkpoint.step, Replay("last"), "learning_rate")
        trained = visits.take(np.isin(visits.row, self.rows))
        curves = self._curves(source, trained, update)
        ends = [self.timesteps[curves.argmax(axis=1)], self.timesteps[curves.argmin(axis=1)]]
        every_way = trained.take(np.tile(np.arange(len(trained)), len(WAYS)))
        every_way = replace_timesteps(every_way, np.concatenate([trained.timestep, *ends]))
        products, norms = np.zeros((len(self.queries), len(every_way), 2)), np.zeros(len(every_way))
        for query in range(len(self.queries)) if len(trained) else ():
            (made,) = source.grid_vectors(
                self.queries,
                [query],
                "query",
                self.grid,
                ["none", "timestep"],
                phases=1,
                halves=False,
                seed=self.settings.seed,
                update=update,
            )
            products[query], norms = source.dots(every_way, self.subject.train, made.vectors, update)
        return {
            "row": trained.row,
            "timestep": trained.timestep,
            "weight": trained.weight,
            "curves": curves,
            "products": products.reshape(len(self.queries), len(WAYS), len(trained), 2).swapaxes(0, 1),
            "norms": norms.reshape(len(WAYS), len(trained)),
        }

    def _curves(self, source: GradientSource, trained: EventTable, update: Any) -> Float64[ndarray, "sample timestep"]:
        count = len(self.timesteps)
        everywhere = trained.take(np.repeat(np.arange(len(trained)), count))
        table = replace_timesteps(everywhere, np.tile(self.timesteps, len(trained)))
        return source.dots(table, self.subject.train, source.no_vectors(), update)[1].reshape(-1, count)


def replace_timesteps(table: EventTable, timesteps: Int64[ndarray, " event"]) -> EventTable:
    """Move events to other timesteps; noise, flip and weights stay."""
    return replace(table, timestep=timesteps.astype(np.int64))


def _join(
    parts: Sequence[dict[str, ndarray]],
    subject: Subject,
    rows: Sequence[int],
    scores: Sequence[Scores],
    timesteps: Int64[ndarray, " timestep"],
) -> Intervention:
    """Add up the checkpoints; a sample without a visit before one counts 0 there."""
    num_query, shape = len(scores[0].query_ids), (len(parts), len(rows))
    curves = np.full((*shape, len(timesteps)), np.nan)
    trained_timesteps, trained_norms = np.full(shape, -1, dtype=np.int64), np.full(shape, np.nan)
    totals = {one.method: np.zeros((len(WAYS), num_query, len(rows))) for one in scores}
    for number, part in enumerate(parts):
        place = np.array([list(rows).index(row) for row in part["row"]], dtype=np.int64)
        curves[number, place] = part["curves"]
        trained_timesteps[number, place], trained_norms[number, place] = part["timestep"], part["norms"][0]
        for one in scores:
            retrac = one.details["method"]["train"]["unit"] == "event"
            factor = part["weight"] * (inverse(part["norms"]) if retrac else 1.0)  # (way, sample) or (sample,)
            totals[one.method][:, :, place] += (
                np.broadcast_to(factor, part["norms"].shape)[:, None] * (part["products"][..., int(retrac)])
            )
    ids = tuple(subject.train.ids[row] for row in rows)
    return Intervention(ids, timesteps, curves, trained_timesteps, trained_norms, totals)


def _check_same(scores: Scores, again: Float64[ndarray, "query sample"], rows: Sequence[int]) -> None:
    strongest = np.abs(scores.values).max(axis=1, keepdims=True)
    off = float((np.abs(again - scores.values[:, list(rows)]) / np.where(strongest > 0, strongest, 1)).max())
    if not off <= AGREES_WITHIN:
        raise ScoresError(
            f"Taken again, {scores.method} scores differ by {off:.2g} of the strongest one of their query, so they "
            "were made of something else. Trace again."
        )
