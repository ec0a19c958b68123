"""Attribution: from checkpoints, training images and queries to scores on disk, by any of the methods."""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from whence._files import sha256_of_json
from whence.checkpoints import check_same_architecture
from whence.config import AutocastName, DtypeName, GradientSettings, TraceSettings, WeightsName, changed_settings
from whence.data import ImageData
from whence.diffusion.process import NoiseProcess
from whence.encoders import SETTINGS as ENCODER_SETTINGS
from whence.encoders import Encoder, find_encoder
from whence.errors import ConfigError, ScoresError, check_choice
from whence.event_table import check_same_data
from whence.memory import Limits, choose_limits, measure_footprint, parse_memory
from whence.methods import Baseline, Grid, Method, Replay
from whence.methods.frame import (
    AdamInverse,
    AntitheticGrid,
    BaselineKind,
    BeforeProjection,
    Product,
    ReplayedVisits,
    RidgeInverse,
    Trajectory,
)
from whence.record import Record
from whence.scores import Scores
from whence.similarity import score_baseline
from whence.streaming import StreamingPass, claim
from whence.subject import Subject
from whence.training import check_device
from whence.workload import Workload, check_method, fill_in_steps, num_phases

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

    Raises:
        ConfigError: If the damping of a method is to be chosen by cross-validation and it has no ridge inverse.
    """
    if isinstance(method, Baseline):
        if method.kind in ENCODER_SETTINGS and method.encoder is None:
            method = replace(method, encoder=getattr(settings, ENCODER_SETTINGS[method.kind]))
        return method, []
    query = method.query
    if isinstance(query.events, Grid):  # anything else is refused by check_method
        grid = _grid(query.events, settings.timesteps, settings.draws)
        query = replace(query, events=AntitheticGrid(**vars(grid)) if settings.antithetic else grid)
    elif isinstance(query.events, Trajectory) and settings.draws is not None:
        query = replace(query, events=replace(query.events, draws=settings.draws))
    events, unit, weights, notes = method.train.events, method.train.unit, method.weights, []
    if isinstance(events, Grid) or (isinstance(events, Replay) and not has_record):
        events = _grid(events, settings.train_timesteps, settings.train_draws)
    elif isinstance(events, Replay) and settings.replay is not None:
        events = Replay(settings.replay)
    if isinstance(method.train.events, Replay) and isinstance(events, Grid):
        unit, weights = "timestep" if unit == "event" else unit, "equal"
        notes.append(
            f"There is no record of training, so {method.name} takes each training image on a grid of "
            f"{events.timesteps} timesteps x {events.draws} draws instead of at the timestep and noise it was trained "
            "on, and weights all checkpoints equally."
        )
    method = replace(method, train=replace(method.train, events=events, unit=unit), query=query, weights=weights)
    inverse = method.precondition
    if inverse is not None and not isinstance(inverse, AdamInverse) and settings.damping is not None:
        if settings.damping == "gcv" and not isinstance(inverse, RidgeInverse):
            raise ConfigError(
                f"Cross-validation chooses the damping of methods with a ridge inverse; {method.name} has another. "
                "Give a number, or none for its own."
            )
        method = replace(method, precondition=replace(inverse, damping=settings.damping))
    return method, notes


def _grid(events: Grid | Replay, timesteps: int | None, draws: int | None) -> Grid:
    """Change what is given of a declared grid; a replay that cannot be becomes ``UNRECORDED``."""
    grid = events if isinstance(events, Grid) else UNRECORDED
    given = {"timesteps": timesteps, "draws": draws}
    return replace(grid, **{name: number for name, number in given.items() if number is not None})


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
    work = prepare(subject, queries, methods, settings, folder)
    check_streamed(work)

    def save(scores: Scores, computed_with: dict[str, Any]) -> None:
        name = scores.method
        notes = (
            work.notes[name] + scores.notes + notes_on(scores, subject, settings) + notes_on_solutions(scores.details)
        )
        details = scores.details | work.specs[name] | {"notes": notes} | computed_with
        replace(scores, details=details).save(work.folders[name])

    for baseline in (baseline for baseline in work.baselines if baseline in work.wanted):
        images, cache_folder = (subject.train, queries), folder / "cache" / "embeddings"
        scores = score_baseline(baseline, work.encoders, *images, settings, cache_folder, show_progress=show_progress)
        save(scores, {name: value for name, value in scores.details.items() if name == "computed_with"})
    footprint = cache(lambda: measure_footprint(subject, settings, products=work.needs_products))
    limits = [
        choose_limits(load.demand, settings, footprint) if work.is_wanted(load) or settings.memory is None else None
        for load in work.loads
    ]  # all of them before the first is run: what does not fit is said at once
    for load, limit in zip(work.loads, limits, strict=True):
        if limit is not None:
            _stream(work, load, limit, folder / "cache", save, show_progress)
    return {name: load_own_scores(path, work.specs[name]) for name, path in work.folders.items()}


@dataclass(frozen=True)
class TraceWork:
    """What is to be done for some methods, and where it goes."""

    specs: dict[str, dict[str, Any]]
    """All that a method's scores depend on."""
    notes: dict[str, list[str]]
    folders: dict[str, Path]
    wanted: list[Method | Baseline]
    """Those whose scores are not on disk."""
    baselines: list[Baseline]
    encoders: dict[Baseline, Encoder]
    """Those of the baselines that have one."""
    loads: list[Workload]
    """Methods of one load share a pass, be they wanted or not: which ones do decides how its sums are rounded."""

    @property
    def needs_products(self) -> bool:
        """Whether a pass multiplies with a Gauss-Newton matrix."""
        return any(load.demand.solved for load in self.loads)

    def is_wanted(self, load: Workload) -> bool:
        """Tell whether a pass has to be made."""
        return any(method in self.wanted for method in load.methods)


def prepare(
    subject: Subject, queries: ImageData, methods: Sequence[Method | Baseline], settings: TraceSettings, folder: Path
) -> TraceWork:
    """Check everything that can be checked without a model, and say what there is to do; see :func:`trace`.

    Returns:
        The work.
    """
    check_trace_settings(settings)
    pairs = [declare(method, settings, has_record=subject.record is not None) for method in methods]
    declared = [fill_in_steps(method, queries) for method, _ in pairs]
    _check_methods(declared, settings)
    if settings.damping is not None and not any(isinstance(m, Method) and m.is_damped for m in declared):
        warnings.warn("damping has no effect: none of these methods has a preconditioner.", stacklevel=3)
    on_path = [m for m in declared if isinstance(m, Method) and isinstance(m.query.events, Trajectory)]
    if settings.timesteps is not None and len(on_path) == len(declared):
        warnings.warn("timesteps has no effect: queries are taken at the steps of their sampler.", stacklevel=3)
    if settings.antithetic and not any(isinstance(m, Method) and isinstance(m.query.events, Grid) for m in declared):
        warnings.warn("antithetic has no effect: none of these methods takes queries on a grid.", stacklevel=3)
    check_same_architecture(subject.checkpoints, settings.weights_name)
    _check_query_size(subject.train, queries)
    if subject.record is not None:
        check_same_data(subject.record, subject.train)
    baselines = [method for method in declared if isinstance(method, Baseline)]
    encoders = _find_encoders(baselines, subject, settings)
    specs = {method.name: _spec(method, encoders, subject, queries, settings) for method in declared}
    for method, notes in pairs:
        notes += _notes_on_trajectories(queries, specs[method.name])
        if queries.masks is not None:
            notes.append(
                "Baselines compare whole images; the mask has no part in them."
                if isinstance(method, Baseline)
                else "Of each query only the part counts that its mask marks."
            )
    folders = {name: folder / "scores" / f"{name}-{sha256_of_json(spec)[:8]}" for name, spec in specs.items()}
    groups = _groups([m for m in declared if isinstance(m, Method)])
    return TraceWork(
        specs,
        {method.name: notes for method, notes in pairs},
        folders,
        wanted=[method for method in declared if not (folders[method.name] / "manifest.json").exists()],
        baselines=baselines,
        encoders=encoders,
        loads=[Workload(subject, queries, group, settings) for group in groups],
    )


def _stream(
    work: TraceWork,
    load: Workload,
    limits: Limits,
    cache_folder: Path,
    save: Callable[[Scores, dict[str, Any]], None],
    show_progress: bool,
) -> None:
    """Make one pass, and remove its cache once the scores are written."""
    computed_with = describe_arithmetic(load.settings, limits)
    key = sha256_of_json([[work.specs[m.name] for m in load.methods], computed_with])[:16]
    load = replace(load, settings=replace(load.settings, batch_size=limits.batch_size))
    with claim(cache_folder / key):
        streaming = StreamingPass(load, limits.query_bytes, cache_folder / key, show_progress)
        if work.is_wanted(load):
            for scores in streaming.run():
                if scores.method in {method.name for method in work.wanted}:
                    save(scores, {"computed_with": computed_with})
        streaming.clean()


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
    wrong = settings.damping not in (None, "gcv") and not 0 <= settings.damping < math.inf
    faults = [f"damping must be 0 or more, or gcv; found {settings.damping}"] if wrong else []
    check_gradient_settings(settings, positive=("timesteps", "draws", "phases"), faults=faults)


def check_gradient_settings(settings: GradientSettings, *, positive: Sequence[str], faults: Sequence[str] = ()) -> None:
    """Refuse settings under which no gradients of training images can be taken.

    Args:
        settings: What is asked for, of a trace or an index.
        positive: More fields that must be above 0 where they are given.
        faults: What was found already.

    Raises:
        ConfigError: With all faults found.
    """
    check_choice("weights_name", settings.weights_name, WeightsName)
    check_choice("dtype", settings.dtype, DtypeName)
    check_choice("autocast", settings.autocast, AutocastName)
    if settings.replay is not None:
        check_choice("replay", settings.replay, ReplayedVisits)
    names = [*positive, "train_timesteps", "train_draws", "batch_size", "block_size"]
    values = {name: getattr(settings, name) for name in names}
    # Not v <= 0, which NaN is not.
    below = [f"{n} must be above 0, found {v}" for n, v in values.items() if v is not None and not 0 < v < math.inf]
    if below or faults:
        raise ConfigError("; ".join([*below, *faults]) + ".")
    if settings.memory is not None:
        parse_memory(settings.memory)
    check_device(settings.device)
    on_gpu = torch.device(settings.device).type == "cuda"
    if settings.dtype == "float64" and settings.autocast != "no":
        raise ConfigError(
            f"dtype float64 is for exact scores, and autocast {settings.autocast} rounds what enters them; use one of "
            "the two."
        )
    if settings.tf32 and not on_gpu:
        warnings.warn(f"tf32 has no effect on {settings.device}: it is a type of CUDA devices.", stacklevel=3)


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
        else:
            check_choice("kind of baseline", method.kind, BaselineKind)
            check_choice("product", method.product, Product)


def _find_encoders(baselines: Sequence[Baseline], subject: Subject, settings: TraceSettings) -> dict[Baseline, Encoder]:
    """Find the encoders of baselines; two that have the same share it."""
    for kind, setting in ENCODER_SETTINGS.items():
        if getattr(settings, setting) is not None and not any(baseline.kind == kind for baseline in baselines):
            warnings.warn(f"{setting} has no effect: none of these methods is {kind} or {kind}-dot.", stacklevel=4)
    find = cache(partial(find_encoder, train=subject.train, device=settings.device, allow_pickle=subject.allow_pickle))
    alike = {baseline: replace(baseline, name=baseline.kind, product="cosine", source="") for baseline in baselines}
    return {baseline: find(alike[baseline]) for baseline in baselines if baseline.is_encoded}


def check_streamed(work: "TraceWork") -> None:
    """Refuse methods that need the gradients of all training images before the first score.

    Raises:
        ConfigError: The message says which commands give them.
    """
    needs_rows = [m for load in work.loads for m in load.methods if m.needs_rows]
    if needs_rows:
        output = needs_rows[0].train.output
        option = "" if output == "loss" else f" --output {output}"
        raise ConfigError(
            f"{', '.join(m.name for m in needs_rows)} cannot be traced: the gradients of all training images are "
            f"needed at once. Keep them with `whence index RUN --grid{option}`, then use `whence query`."
        )


def _groups(methods: Sequence[Method]) -> list[list[Method]]:
    """Put methods together that take gradients at the same events of the same checkpoints."""
    groups: dict[Any, list[Method]] = {}
    for method in methods:
        before_projection = method.precondition if isinstance(method.precondition, BeforeProjection) else None
        key = (
            *(method.checkpoints, method.train.events, method.query.events, method.train.output, method.query.output),
            *(before_projection, method.meet),
        )
        groups.setdefault(key, []).append(method)
    return list(groups.values())


def _spec(
    method: Method | Baseline,
    encoders: Mapping[Baseline, Encoder],
    subject: Subject,
    queries: ImageData,
    settings: TraceSettings,
) -> dict[str, Any]:
    """All that the scores depend on, but for rounding: two specs with one hash have the same scores."""
    asked = {"fingerprint": queries.fingerprint, "num_images": len(queries)}
    if isinstance(method, Baseline):
        train = {"fingerprint": subject.train.fingerprint, "num_images": len(subject.train)}
        seed = {"seed": settings.seed} if method.kind == "random" else {}
        encoder = {"encoder": encoders[method].identity} if method in encoders else {}
        declared = asdict(replace(method, encoder=None))  # it counts by what it is, not by where it lies
        return {
            "version": SCORING_VERSION,
            "method": declared,
            **seed,
            **encoder,
            "train": train,
            "queries": asked,
        }
    kinds = {"events": type(method.train.events).__name__, "query_events": type(method.query.events).__name__}
    used = subject.used_checkpoints(method.checkpoints)
    if isinstance(method.query.events, Trajectory) and queries.trajectories is not None:
        asked["trajectories"] = sha256_of_json(queries.trajectories.hashes)
    return {
        "version": SCORING_VERSION,
        "method": asdict(method) | kinds,
        "phases": num_phases(method, settings),
        "seed": settings.seed,
        "queries": asked,
        **subject.describe(used, settings),
    }


def _notes_on_trajectories(queries: ImageData, spec: Mapping[str, Any]) -> list[str]:
    """Say where queries were sampled from other weights than those that are traced."""
    if queries.trajectories is None or "trajectories" not in spec["queries"]:
        return []
    traced = {checkpoint["sha256"] for checkpoint in spec["checkpoints"]}
    others = [one for one in queries.trajectories.about if one.get("checkpoint_sha256") not in traced]
    if not others:
        return []
    return [f"{len(others)} of {len(queries)} queries were sampled from other weights than those that are traced."]


def describe_arithmetic(settings: TraceSettings, limits: Limits) -> dict[str, Any]:
    """Name what changes scores by rounding only."""
    return {
        "batch_size": limits.batch_size,
        "block_size": settings.block_size,
        "query_bytes": limits.query_bytes,
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
    if subject.record is None and scores.query_timesteps is not None:
        notes.append(_without_record(subject))
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
    if subject.record is not None and _weighs_otherwise(subject.record, subject.process):
        notes.append("Training weighted its losses; the weights are in replayed gradients, not in those on a grid.")
    if subject.record is not None:
        late = int((subject.record.visits.step > subject.checkpoints[-1].step).sum())
        if late:
            notes.append(f"{late} visits after the last checkpoint are not part of the scores.")
    if scores.query_timesteps is not None and scores.halves is None:
        notes.append(
            "With one draw at each timestep, or one antithetic pair, the reliability of the scores is not known; use "
            "at least 2 draws, of antithetic ones 4."
        )
    if settings.weights_name == "ema":
        notes.append("Gradients are taken at averaged weights; training itself moved the raw ones.")
    return notes


def notes_on_solutions(details: Mapping[str, Any]) -> list[str]:
    """Say how far the equations of an influence function were solved.

    Args:
        details: Those of the scores.

    Returns:
        Sentences.
    """
    return [
        f"At step {step}, the equations of the influence function are solved to a relative residual of "
        f"{found['residual']:.2g}."
        for step, found in details.get("preconditioners", {}).items()
        if "residual" in found
    ]


def _without_record(subject: Subject) -> str:
    """Say what has to be taken on trust, where a record would tell and the replay check would prove it."""
    changed = [f"{name} {value}" for name, value in changed_settings(subject.objective).items()]
    told = ", told what stands beside them" if subject.train.conditions([0]) else ""
    return (
        f"Without a record it is taken on trust that the model was trained on these images{told}, that its loss was "
        f"{subject.loss} of {subject.process.prediction_type} with {', '.join(changed) or 'all timesteps alike'}, and "
        "that nothing else was drawn at random; nothing can check it."
    )


def _weighs_otherwise(record: Record, process: NoiseProcess) -> bool:
    """Tell whether training weighed its losses by more than their timesteps."""
    known = process.loss_weight.numpy()[record.visits.timestep]
    return not np.allclose(record.visits.loss_weight, known, rtol=1e-4)


def _check_query_size(train: ImageData, queries: ImageData) -> None:
    want, found = [(i.channels, i.height, i.width) for i in (train, queries)]
    if want != found:
        raise ConfigError(
            f"Queries must have the size of the training images, {want[0]} x {want[1]} x {want[2]} (channels, height, "
            f"width); found {found[0]} x {found[1]} x {found[2]}. Give --resolution, or --grey for one channel."
        )
