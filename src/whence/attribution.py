"""Attribution: from checkpoints, training images and queries to scores on disk, by any of the methods."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy import ndarray

from whence._files import sha256_of_json
from whence.checkpoints import check_same_architecture
from whence.config import TraceSettings
from whence.data import ImageData
from whence.diffusion.noise import noise_key, normals
from whence.errors import ConfigError
from whence.methods import Baseline, Grid, Method, Replay
from whence.scores import Scores
from whence.streaming import StreamingPass, check_units
from whence.subject import Subject


def declare(
    method: Method | Baseline, settings: TraceSettings, *, has_record: bool
) -> tuple[Method | Baseline, list[str]]:
    """Fill in a method's declaration from the settings, and say what had to be replaced.

    Without a record, visits cannot be replayed and learning rates are not known: the training side is then taken on a
    grid, with equal weights.

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
        f"There is no record of training, so {method.name} takes each training image on a grid of "
        f"{train_grid.timesteps} timesteps x {train_grid.draws} draws instead of at the timestep and noise it was "
        "trained on, and weights all checkpoints equally."
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
    notes = {method.name: notes for method, notes in declared}
    folders = {name: folder / "scores" / f"{name}-{sha256_of_json(spec)[:8]}" for name, spec in specs.items()}
    wanted = [method for method, _ in declared if not (folders[method.name] / "manifest.json").exists()]

    def save(scores: Scores) -> None:
        name = scores.method
        details = specs[name] | {"notes": notes[name] + _notes(scores, subject, settings)}
        if scores.query_timesteps is not None:
            details["computed_with"] = _computed_with(settings)
        replace(scores, details=details).save(folders[name])

    for baseline in (m for m in wanted if isinstance(m, Baseline)):
        save(_baseline(baseline, subject, queries, settings))
    # A pass is made of all methods asked for, wanted or not: which ones share it decides how its sums are rounded.
    for group in _groups([m for m, _ in declared if isinstance(m, Method)]):
        key = sha256_of_json([[specs[m.name] for m in group], _computed_with(settings)])[:16]
        work = StreamingPass(subject, queries, group, settings, folder / "cache" / key, show_progress)
        if any(method in wanted for method in group):
            for scores in work.run():
                if scores.method in {method.name for method in wanted}:
                    save(scores)
        work.clean()
    return {name: Scores.load(path) for name, path in folders.items()}


def check_trace_settings(settings: TraceSettings) -> None:
    """Refuse settings that contradict each other.

    Raises:
        ConfigError: With all faults found.
    """
    positive = ("timesteps", "draws", "train_timesteps", "train_draws", "phases", "batch_size", "block_size")
    faults = [
        f"{name} must be above 0, found {getattr(settings, name)}" for name in positive if getattr(settings, name) <= 0
    ]
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


def _groups(methods: Sequence[Method]) -> list[list[Method]]:
    """Put methods together that take gradients at the same events of the same checkpoints."""
    groups: dict[Any, list[Method]] = {}
    for method in methods:
        check_units(method)
        key = (method.checkpoints, method.train.events, method.query.events, method.train.output, method.query.output)
        groups.setdefault(key, []).append(method)
    return list(groups.values())


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
        "query_memory_gib": settings.query_memory_gib,
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
                f"{int(unvisited.sum())} of {unvisited.size} pairs of checkpoint and training image have no visit "
                f"between two checkpoints and count 0; {never} images were never visited."
            )
        zero = np.flatnonzero((scores.train_norms == 0).any(axis=0))
        if len(zero):
            some = ", ".join(scores.train_ids[row] for row in zero[:5])
            notes.append(
                f"{len(zero)} training images have a gradient of zero at some checkpoint and count 0 there: {some}."
            )
    if subject.record is not None:
        late = int((subject.record.visits.step > subject.checkpoints[-1].step).sum())
        if late:
            notes.append(f"{late} visits after the last checkpoint are not part of the scores.")
    if settings.draws == 1:
        notes.append(
            "With one draw at each timestep, the reliability of the scores is not known; use at least 2 draws."
        )
    if settings.weights_name == "ema":
        notes.append("Gradients are taken at averaged weights; training itself moved the raw ones.")
    return notes


def _baseline(baseline: Baseline, subject: Subject, queries: ImageData, settings: TraceSettings) -> Scores:
    """Score without a model: cosine of pixels, or keyed random numbers."""
    if baseline.kind == "pixels":
        train, query = (_unit_rows(images.pixels(range(len(images)))) for images in (subject.train, queries))
        values = (query @ train.T).astype(np.float32)
    else:
        keys = [noise_key(settings.seed, "order", "query", query_id, 0) for query_id in queries.ids]
        values = np.stack([normals(key, (len(subject.train),)) for key in keys])
    return Scores(baseline.name, queries.ids, subject.train.ids, values)


def _unit_rows(pixels: ndarray) -> ndarray:
    rows = pixels.reshape(len(pixels), -1).astype(np.float64)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


def _check_query_size(train: ImageData, queries: ImageData) -> None:
    want, found = [(i.channels, i.height, i.width) for i in (train, queries)]
    if want != found:
        raise ConfigError(
            f"Queries must have the size of the training images, {want[0]} x {want[1]} x {want[2]} (channels, height, "
            f"width); found {found[0]} x {found[1]} x {found[2]}. Give --resolution, or --grey for one channel."
        )
