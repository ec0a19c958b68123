"""Attribution: from checkpoints, training images and queries to scores.

The exact, streaming way: at each checkpoint the queries' gradients first, then one pass over the training events, whose
gradients meet the queries' layer by layer and are dropped. What is finished lies in ``cache/`` until the scores are written:

    cache/<hash>/<step>/query-<n>.safetensors        gradient sums of one query; removed when the checkpoint is done
    cache/<hash>/<step>/tile-<n>-<row>.safetensors   contributions of a block of training images to some queries

A run that was killed goes on from these. Methods that need the same gradients share one pass.
"""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float64
from numpy import ndarray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from torch import Tensor

from whence._files import publish_file, sha256_of_json
from whence.checkpoints import Checkpoint, check_files, check_same_architecture, load_model, load_scheduler
from whence.config import LossName, TraceSettings
from whence.data import ImageData
from whence.diffusion.adapters import check_model
from whence.diffusion.noise import noise_key, normals
from whence.diffusion.process import NoiseProcess, even_timesteps
from whence.errors import CheckpointError, ConfigError, ScoresError
from whence.events import EventTable, Replays
from whence.gradients import Family, GradientSource, GridVectors, num_vectors
from whence.methods import Baseline, Grid, Method, Replay
from whence.methods.frame import WeightsRule
from whence.progress import progress_bar
from whence.record import Record
from whence.scores import Scores


@dataclass(frozen=True)
class Subject:
    """The training side of a score: checkpoints, the images they were trained on, and the record of it."""

    checkpoints: Sequence[Checkpoint]
    train: ImageData
    record: Record | None
    """None for models that whence did not train; then the training side is taken on a grid."""
    loss: LossName
    allow_pickle: bool = False

    @cached_property
    def process(self) -> NoiseProcess:
        """The noising process of the last checkpoint."""
        return NoiseProcess.from_scheduler(load_scheduler(self.checkpoints[-1]))

    @cached_property
    def replays(self) -> Replays | None:
        """The record matched with the images, or None."""
        return Replays(self.record, self.train) if self.record else None

    def source(self, checkpoint: Checkpoint, settings: TraceSettings) -> GradientSource:
        """Load a checkpoint to take gradients from."""
        check_files(checkpoint)
        model = load_model(
            checkpoint,
            settings.weights_name,
            allow_pickle=self.allow_pickle,
            device=settings.device,
            dtype=settings.dtype,
        )
        check_model(model)
        _check_image_size(model.config, self.train, checkpoint)
        return GradientSource(model, self.process, self.loss, settings.batch_size, f"checkpoint {checkpoint.step}")


def declare(method: Method | Baseline, settings: TraceSettings, *, has_record: bool) -> tuple[Method | Baseline, list[str]]:
    """Fill in a method's declaration from the settings, and say what had to be replaced.

    Without a record, visits cannot be replayed and learning rates are not known: the training side is then taken on a grid,
    with equal weights.

    Returns:
        The declaration as it will be computed, and notes for the reader.
    """
    if isinstance(method, Baseline):
        return method, []
    notes = []
    query = replace(method.query, events=Grid(settings.timesteps, settings.draws))
    train_grid = Grid(settings.train_timesteps, settings.train_draws)
    if isinstance(method.train.events, Grid):
        return replace(method, train=replace(method.train, events=train_grid), query=query), notes
    if has_record:
        return replace(method, train=replace(method.train, events=Replay(settings.replay)), query=query), notes
    unit = "timestep" if method.train.unit == "event" else method.train.unit
    notes.append(
        f"There is no record of training, so {method.name} takes each training image on a grid of {train_grid.timesteps} "
        f"timesteps x {train_grid.draws} draws instead of at the timestep and noise it was trained on, and weights all "
        "checkpoints equally."
    )
    train = replace(method.train, events=train_grid, unit=unit)
    return replace(method, train=train, query=query, weights="equal"), notes


def trace(
    subject: Subject,
    queries: ImageData,
    methods: Sequence[Method | Baseline],
    settings: TraceSettings,
    folder: Path,
    *,
    show_progress: bool = True,
) -> dict[str, Scores]:
    """Score every training image for every query by each method; what is on disk already is not computed again.

    Args:
        subject: Checkpoints, training images and record.
        queries: Images of the size that the model was trained on.
        methods: Declarations; their grids are taken from the settings.
        settings: Size of the grids, arithmetic, batch size.
        folder: The run; ``scores/<method>-<hash>`` and ``cache/`` are made in it.
        show_progress: Show a progress bar.

    Returns:
        Scores by method name, in the order asked for.

    Raises:
        ConfigError: If settings contradict each other, or there is nothing to score.
        CheckpointError: If checkpoints are damaged, differ in architecture, or take images of another size.
        NumericsError: If a gradient is not finite.
    """
    check_trace_settings(settings)
    if not methods:
        raise ConfigError("trace needs at least one method.")
    check_same_architecture(subject.checkpoints, settings.weights_name)
    _check_query_size(subject.train, queries)
    declared = [declare(method, settings, has_record=subject.record is not None) for method in methods]
    specs = {method.name: _spec(method, subject, queries, settings) for method, _ in declared}
    folders = {name: folder / "scores" / f"{name}-{sha256_of_json(spec)[:8]}" for name, spec in specs.items()}
    wanted = [(method, notes) for method, notes in declared if not (folders[method.name] / "manifest.json").exists()]
    for method, notes in wanted:
        if isinstance(method, Baseline):
            _baseline(method, subject, queries, settings, specs[method.name], notes).save(folders[method.name])
    for group in _groups([(m, notes) for m, notes in wanted if isinstance(m, Method)]):
        work = _Pass(subject, queries, group, settings, folder / "cache", specs, show_progress)
        for scores in work.run():
            scores.save(folders[scores.method])
        work.clean()
    return {name: Scores.load(path) for name, path in folders.items()}


def check_trace_settings(settings: TraceSettings) -> None:
    """Refuse settings that contradict each other.

    Raises:
        ConfigError: With all faults found.
    """
    positive = ("timesteps", "draws", "train_timesteps", "train_draws", "phases", "batch_size", "block_size")
    faults = [f"{name} must be above 0, found {getattr(settings, name)}" for name in positive if getattr(settings, name) <= 0]
    if settings.draws != 1 and settings.draws % 2:
        faults.append(f"draws must be an even number, to be split in two halves, or 1; found {settings.draws}")
    if settings.phases > settings.timesteps:
        faults.append(f"phases must be at most timesteps = {settings.timesteps}, found {settings.phases}")
    if max(settings.draws, settings.train_draws) > settings.batch_size:
        faults.append(f"batch_size must hold all draws of a timestep ({settings.draws}), found {settings.batch_size}")
    if settings.query_memory_gib <= 0:
        faults.append(f"query_memory_gib must be above 0, found {settings.query_memory_gib}")
    if faults:
        raise ConfigError("; ".join(faults) + ".")


Group = list[tuple[Method, list[str]]]


def _groups(methods: Group) -> list[Group]:
    """Put methods together that take gradients at the same events of the same checkpoints."""
    groups: dict[Any, Group] = {}
    for method, notes in methods:
        _check_units(method)
        key = (method.checkpoints, method.train.events, method.query.events, method.train.output, method.query.output)
        groups.setdefault(key, []).append((method, notes))
    return list(groups.values())


def _check_units(method: Method) -> None:
    """Say which normalisations this way of computing has."""
    if not isinstance(method.query.events, Grid) or method.query.unit == "event":
        raise ConfigError(f"{method.name}: queries are taken on a grid, with unit none, timestep or sample.")
    replayed = isinstance(method.train.events, Replay)
    allowed = ("none", "event") if replayed else ("none", "timestep", "sample")
    if method.train.unit not in allowed:
        kind = "a replay" if replayed else "a grid"
        raise ConfigError(f"{method.name}: on the training side, {kind} has unit {', '.join(allowed)}.")


class _Pass:
    """One pass over checkpoints, queries and training images for methods that share their gradients."""

    def __init__(
        self,
        subject: Subject,
        queries: ImageData,
        group: Group,
        settings: TraceSettings,
        cache: Path,
        specs: dict[str, Any],
        show_progress: bool,
    ):
        self.subject, self.queries, self.group, self.settings, self.specs = subject, queries, group, settings, specs
        self.methods = [method for method, _ in group]
        self.train_events = self.methods[0].train.events
        query_events = self.methods[0].query.events
        assert isinstance(query_events, Grid)  # _check_units
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
        own = {"methods": [specs[m.name] for m in self.methods], "batch": settings.batch_size, "block": settings.block_size}
        own |= {"memory": settings.query_memory_gib, "device": settings.device, "threads": torch.get_num_threads()}
        self.cache = cache / sha256_of_json(own)[:16]

    def run(self) -> list[Scores]:
        """Compute what is not in the cache, then add up the checkpoints."""
        with progress_bar("trace", self._num_passes(), "pass", shown=self.show_progress) as bar:
            for checkpoint in self.checkpoints:
                self._run_checkpoint(checkpoint, bar)
        return [self._assemble(method, notes) for method, notes in self.group]

    def clean(self) -> None:
        """Remove the cache, once the scores are written."""
        shutil.rmtree(self.cache)

    def _num_passes(self) -> int:
        """Sample-passes in all, for the bar."""
        if isinstance(self.train_events, Grid):
            train = len(self.checkpoints) * len(self.subject.train) * self.train_events.timesteps * self.train_events.draws
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

    def _query_vectors(self, source: GradientSource, folder: Path, row: int, update: Callable[[int], Any]) -> GridVectors:
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
            phases, halves = self._split(method, products.reshape(stop - start, len(vectors), -1), np.array(query_lengths))
            arrays |= {f"{method.name}.phases": phases, **({f"{method.name}.halves": halves} if halves is not None else {})}
            arrays |= {f"{method.name}.{name}": array for name, array in about.items()}
        return arrays

    def _replayed(
        self, source: GradientSource, checkpoint: Checkpoint, stacked: Tensor, rows: range, update: Callable[[int], Any]
    ):
        """Give, for each method, the weighted products of replayed events, added up by training image."""
        tables = {rule: _rows_between(self._replay(checkpoint, rule), rows) for rule in {m.weights for m in self.methods}}
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
            scale = np.divide(1.0, norms, out=np.zeros_like(norms), where=norms > 0) if method.train.unit == "event" else 1.0
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
            yield method, products[family] * scale[:, None], {"train_norms": rms, "train_weights": np.full(len(rows), weight)}

    def _split(
        self, method: Method, products: Float64[ndarray, "train query vector"], query_lengths: Float64[ndarray, "query length"]
    ) -> tuple[ndarray, ndarray | None]:
        """Read phases and halves off a method's family; see ``gradients`` for the order of its rows."""
        family = _query_family(method)
        start = sum(num_vectors(f, self.settings.phases, self.halves) for f in self.families[: self.families.index(family)])
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
            raise ConfigError(f"weights={rule!r} and replays need a record of training; use a grid with weights='equal'.")
        return self.subject.replays

    def _assemble(self, method: Method, notes: list[str]) -> Scores:
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
        scores = Scores(
            method=method.name,
            query_ids=self.queries.ids,
            train_ids=self.subject.train.ids,
            values=phases.sum(1).astype(dtype),
            phases=phases.astype(dtype),
            phase_timesteps=tuple(
                (int(timesteps[phase_of == p][0]), int(timesteps[phase_of == p][-1])) for p in range(self.settings.phases)
            ),
            halves=total("halves"),
            train_norms=stack("train_norms"),
            train_timesteps=stack("train_timesteps"),
            train_weights=stack("train_weights"),
            query_norms=stack("query_norms"),
            query_timesteps=timesteps,
            checkpoint_steps=tuple(c.step for c in self.checkpoints),
            details=self.specs[method.name] | {"computed_with": _computed_with(self.settings)},
        )
        scores.details["notes"] = notes + _notes(scores, self.subject, self.settings)
        return scores

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


def _spec(method: Method | Baseline, subject: Subject, queries: ImageData, settings: TraceSettings) -> dict[str, Any]:
    """All that the scores depend on, but for rounding: two specs with one hash have the same scores."""
    data = {
        "train": {"fingerprint": subject.train.fingerprint, "num_images": len(subject.train)},
        "queries": {"fingerprint": queries.fingerprint, "num_images": len(queries)},
    }
    if isinstance(method, Baseline):
        seed = {"seed": settings.seed} if method.kind == "random" else {}
        return {"method": asdict(method), **seed, **data}
    used = subject.checkpoints if method.checkpoints == "all" else subject.checkpoints[-1:]
    names = {"events": type(method.train.events).__name__, "query_events": type(method.query.events).__name__}
    return {
        "method": asdict(method) | names,
        "loss": subject.loss,
        "weights_name": settings.weights_name,
        "dtype": settings.dtype,
        "phases": settings.phases,
        "seed": settings.seed,
        "checkpoints": [{"step": c.step, "sha256": c.content_hash(settings.weights_name)} for c in used],
        "record": subject.record.content_hash if subject.record else None,
        **data,
    }


def _computed_with(settings: TraceSettings) -> dict[str, Any]:
    """What changes scores by rounding only."""
    return {
        "batch_size": settings.batch_size,
        "block_size": settings.block_size,
        "device": settings.device,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def _notes(scores: Scores, subject: Subject, settings: TraceSettings) -> list[str]:
    """Count what a reader has to know."""
    notes = []
    if scores.train_norms is not None:
        unvisited = np.isnan(scores.train_norms)
        if unvisited.any():
            never = int(unvisited.all(axis=0).sum())
            notes.append(
                f"{int(unvisited.sum())} of {unvisited.size} pairs of checkpoint and training image have no visit between two "
                f"checkpoints and count 0; {never} images were never visited."
            )
        zero = np.flatnonzero((scores.train_norms == 0).any(axis=0))
        if len(zero):
            some = ", ".join(scores.train_ids[row] for row in zero[:5])
            notes.append(f"{len(zero)} training images have a gradient of zero at some checkpoint and count 0 there: {some}.")
    if subject.record is not None:
        late = int((subject.record.visits.step > subject.checkpoints[-1].step).sum())
        if late:
            notes.append(f"{late} visits after the last checkpoint are not part of the scores.")
    if settings.draws == 1:
        notes.append("With one draw at each timestep, the reliability of the scores is not known; use at least 2 draws.")
    if settings.weights_name == "ema":
        notes.append("Gradients are taken at averaged weights; training itself moved the raw ones.")
    return notes


def _baseline(
    baseline: Baseline, subject: Subject, queries: ImageData, settings: TraceSettings, spec: dict[str, Any], notes: list[str]
) -> Scores:
    """Score without a model: cosine of pixels, or keyed random numbers."""
    if baseline.kind == "pixels":
        train, query = (_unit_rows(images.pixels(range(len(images)))) for images in (subject.train, queries))
        values = (query @ train.T).astype(np.float32)
    else:
        keys = [noise_key(settings.seed, "order", "query", query_id, 0) for query_id in queries.ids]
        values = np.stack([normals(key, (len(subject.train),)) for key in keys])
    return Scores(baseline.name, queries.ids, subject.train.ids, values, details=spec | {"notes": notes})


def _unit_rows(pixels: ndarray) -> ndarray:
    rows = pixels.reshape(len(pixels), -1).astype(np.float64)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


def _check_query_size(train: ImageData, queries: ImageData) -> None:
    want, found = [(i.channels, i.height, i.width) for i in (train, queries)]
    if want != found:
        raise ConfigError(
            f"Queries must have the size of the training images, {want[0]} x {want[1]} x {want[2]} (channels, height, width); "
            f"found {found[0]} x {found[1]} x {found[2]}. Give --resolution, or --grey for one channel."
        )


def _check_image_size(config: Any, images: ImageData, checkpoint: Checkpoint) -> None:
    size = config.sample_size
    if config.in_channels != images.channels:
        raise CheckpointError(
            f"The model in {checkpoint.folder} takes {config.in_channels} channels; the training images have {images.channels}."
        )
    want = tuple(size) if isinstance(size, list | tuple) else (size, size)
    if size is not None and want != (images.height, images.width):
        raise CheckpointError(
            f"The model in {checkpoint.folder} was made for {want[0]} x {want[1]} pixels; the training images have "
            f"{images.height} x {images.width}. Give --resolution."
        )


def _write_arrays(path: Path, arrays: dict[str, ndarray]) -> None:
    with publish_file(path) as partial:
        save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, partial)


def _read_arrays(path: Path) -> dict[str, ndarray]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ScoresError(f"{path} is damaged: {error}. Delete it; the next run makes it again.") from error
