"""Attribution: from checkpoints, training images and queries to scores on disk, by any of the methods."""

import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy import ndarray

from whence._files import sha256_of_json
from whence.checkpoints import check_same_architecture
from whence.config import DtypeName, TraceSettings, WeightsName
from whence.data import ImageData
from whence.diffusion.noise import noise_key, normals
from whence.errors import ConfigError, ScoresError, check_choice
from whence.event_table import check_same_data
from whence.methods import Baseline, Grid, Method, Replay
from whence.methods.frame import ReplayedVisits
from whence.scores import Scores
from whence.streaming import StreamingPass, check_method, claim, num_phases
from whence.subject import Subject
from whence.training import check_device

SCORING_VERSION = 1
"""Part of every hash of scores; counts up when the same settings give other scores."""

UNRECORDED = Grid(timesteps=10, draws=1)
"""Where training images are taken whose visits are not on record."""


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
    query = method.query
    if isinstance(query.events, Grid):  # anything else is refused by check_method
        query = replace(query, events=_grid(query.events, settings.timesteps, settings.draws))
    events, unit, weights, notes = method.train.events, method.train.unit, method.weights, []
    if isinstance(events, Grid) or not has_record:
        events = _grid(events, settings.train_timesteps, settings.train_draws)
    elif settings.replay is not None:
        events = Replay(settings.replay)
    if isinstance(method.train.events, Replay) and isinstance(events, Grid):
        unit, weights = "timestep" if unit == "event" else unit, "equal"
        notes.append(
            f"There is no record of training, so {method.name} takes each training image on a grid of "
            f"{events.timesteps} timesteps x {events.draws} draws instead of at the timestep and noise it was trained "
            "on, and weights all checkpoints equally."
        )
    train = replace(method.train, events=events, unit=unit)
    return replace(method, train=train, query=query, weights=weights), notes


def _grid(events: Grid | Replay, timesteps: int | None, draws: int | None) -> Grid:
    """Change what is given of a declared grid; a replay that cannot be becomes ``UNRECORDED``."""
    grid = events if isinstance(events, Grid) else UNRECORDED
    return Grid(grid.timesteps if timesteps is None else timesteps, grid.draws if draws is None else draws)


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
    declared = [declare(method, settings, has_record=subject.record is not None) for method in methods]
    _check_methods([method for method, _ in declared], settings)
    check_same_architecture(subject.checkpoints, settings.weights_name)
    _check_query_size(subject.train, queries)
    if subject.record is not None:
        check_same_data(subject.record, subject.train)
    specs = {method.name: _spec(method, subject, queries, settings) for method, _ in declared}
    notes = {method.name: notes for method, notes in declared}
    folders = {name: folder / "scores" / f"{name}-{sha256_of_json(spec)[:8]}" for name, spec in specs.items()}
    wanted = [method for method, _ in declared if not (folders[method.name] / "manifest.json").exists()]

    def save(scores: Scores) -> None:
        name = scores.method
        details = specs[name] | {"notes": notes[name] + notes_on(scores, subject, settings)}
        if scores.query_timesteps is not None:
            details["computed_with"] = _computed_with(settings)
        replace(scores, details=details).save(folders[name])

    for baseline in (m for m in wanted if isinstance(m, Baseline)):
        save(_baseline(baseline, subject, queries, settings))
    # A pass is made of all methods asked for, wanted or not: which ones share it decides how its sums are rounded.
    for group in _groups([m for m, _ in declared if isinstance(m, Method)]):
        key = sha256_of_json([[specs[m.name] for m in group], _computed_with(settings)])[:16]
        with claim(folder / "cache" / key):
            work = StreamingPass(subject, queries, group, settings, folder / "cache" / key, show_progress)
            if any(method in wanted for method in group):
                for scores in work.run():
                    if scores.method in {method.name for method in wanted}:
                        save(scores)
            work.clean()
    return {name: load_own_scores(path, specs[name]) for name, path in folders.items()}


def load_own_scores(folder: Path, spec: dict[str, Any]) -> Scores:
    """Load scores that were found by the hash of what they depend on.

    Returns:
        The scores.

    Raises:
        ScoresError: If they are damaged, or were made of something else.
    """
    scores = Scores.load(folder)
    others = sorted(k for k, v in spec.items() if sha256_of_json(scores.details.get(k)) != sha256_of_json(v))
    if others:
        raise ScoresError(f"{folder} was made with another {', '.join(others)}. Delete it and trace again.")
    return scores


def check_trace_settings(settings: TraceSettings) -> None:
    """Refuse settings that cannot be met whatever the method.

    Raises:
        ConfigError: With all faults found.
    """
    check_choice("weights_name", settings.weights_name, WeightsName)
    check_choice("dtype", settings.dtype, DtypeName)
    if settings.replay is not None:
        check_choice("replay", settings.replay, ReplayedVisits)
    positive = ["timesteps", "draws", "train_timesteps", "train_draws", "phases"]
    positive += ["batch_size", "block_size", "query_memory_gib"]
    values = {name: getattr(settings, name) for name in positive}
    # Not v <= 0, which NaN is not.
    faults = [f"{n} must be above 0, found {v}" for n, v in values.items() if v is not None and not 0 < v < math.inf]
    if faults:
        raise ConfigError("; ".join(faults) + ".")
    check_device(settings.device)


def _check_methods(methods: Sequence[Method | Baseline], settings: TraceSettings) -> None:
    if not methods:
        raise ConfigError("trace needs at least one method.")
    names = [method.name for method in dict.fromkeys(methods)]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(f"Two different declarations are named {', '.join(twice)}; give each a name of its own.")
    for method in methods:
        if isinstance(method, Method):
            check_method(method, settings)


def _groups(methods: Sequence[Method]) -> list[list[Method]]:
    """Put methods together that take gradients at the same events of the same checkpoints."""
    groups: dict[Any, list[Method]] = {}
    for method in methods:
        key = (method.checkpoints, method.train.events, method.query.events, method.train.output, method.query.output)
        groups.setdefault(key, []).append(method)
    return list(groups.values())


def _spec(method: Method | Baseline, subject: Subject, queries: ImageData, settings: TraceSettings) -> dict[str, Any]:
    """All that the scores depend on, but for rounding: two specs with one hash have the same scores."""
    asked = {"fingerprint": queries.fingerprint, "num_images": len(queries)}
    if isinstance(method, Baseline):
        train = {"fingerprint": subject.train.fingerprint, "num_images": len(subject.train)}
        seed = {"seed": settings.seed} if method.kind == "random" else {}
        return {"version": SCORING_VERSION, "method": asdict(method), **seed, "train": train, "queries": asked}
    kinds = {"events": type(method.train.events).__name__, "query_events": type(method.query.events).__name__}
    used = subject.checkpoints if method.checkpoints == "all" else subject.checkpoints[-1:]
    return {
        "version": SCORING_VERSION,
        "method": asdict(method) | kinds,
        "phases": num_phases(method, settings),
        "seed": settings.seed,
        "queries": asked,
        **subject.describe(used, settings),
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


def notes_on(scores: Scores, subject: Subject, settings: TraceSettings) -> list[str]:
    """Count what a reader of some scores has to know.

    Returns:
        Sentences.
    """
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
    if subject.record is not None and (subject.record.visits.loss_weight != 1).any():
        notes.append("Training weighted its losses; the weights are in replayed gradients, not in those on a grid.")
    if subject.record is not None:
        late = int((subject.record.visits.step > subject.checkpoints[-1].step).sum())
        if late:
            notes.append(f"{late} visits after the last checkpoint are not part of the scores.")
    if scores.query_timesteps is not None and scores.halves is None:
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
