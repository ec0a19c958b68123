"""How much work a trace is: at which events of which checkpoints gradients are taken, and what of them is held.

The pass itself, its bound on memory and the plan of it all count here, so that they cannot disagree.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Int64
from numpy import ndarray

from whence.checkpoints import Checkpoint
from whence.config import OutputName, TraceSettings
from whence.data import ImageData
from whence.diffusion.process import even_timesteps, nearest_timesteps
from whence.errors import ConfigError, check_choice
from whence.event_table import EventTable, Replays
from whence.grid_sums import Family, num_vectors
from whence.methods.frame import (
    After,
    AntitheticGrid,
    Baseline,
    BeforeProjection,
    ConjugateGradientInverse,
    DataInfInverse,
    Grid,
    IterativeInverse,
    KroneckerInverse,
    LissaInverse,
    Meet,
    Method,
    Replay,
    RidgeInverse,
    Trajectory,
    Unit,
    WeightsRule,
)
from whence.subject import Subject

_FAMILIES: tuple[Family, ...] = ("none", "timestep")


def num_phases(method: Method, settings: TraceSettings) -> int:
    """Count the bins of query timesteps that are kept apart: those asked for, or at most four."""
    return settings.phases or min(4, _query_grid(method).timesteps)


def check_method(method: Method, settings: TraceSettings) -> None:
    """Refuse a declaration that streaming cannot follow.

    Raises:
        ConfigError: With all faults found.
    """
    check_choice("unit", method.train.unit, Unit)
    check_choice("unit", method.query.unit, Unit)
    check_choice("weights", method.weights, WeightsRule)
    check_choice("meet", method.meet, Meet)
    replayed = isinstance(method.train.events, Replay)
    allowed = ("none", "event") if replayed else ("none", "timestep", "sample")
    faults = []
    if method.train.unit not in allowed:
        faults.append(f"on the training side, {'a replay' if replayed else 'a grid'} has unit {', '.join(allowed)}")
    if isinstance(method.query.events, Replay) or method.query.unit == "event":
        raise ConfigError(
            f"{method.name}: queries are taken on a grid or along a trajectory, with unit none, timestep or sample."
        )
    if isinstance(method.train.events, Trajectory):
        raise ConfigError(f"{method.name}: trajectories are of queries; training images are replayed or on a grid.")
    check_choice("after", method.after, After)
    needs_ridge = method.after in ("theta_relative", "l_relative", "residual")
    if needs_ridge and not isinstance(method.precondition, RidgeInverse):
        faults.append(f"after={method.after!r} needs a RidgeInverse as preconditioner")
    if method.weights == "published" and method.train.events == Replay("all"):
        faults.append("weights 'published' are those of a whole interval; use them with the last visit")
    draws, timesteps = method.query.events.draws, method.query.events.timesteps
    if isinstance(method.query.events, AntitheticGrid):
        if not method.query.events.has_halves and draws != 2:
            faults.append(
                f"draws must be a multiple of 4, to be split in two halves of whole pairs, or 2; found {draws}"
            )
    elif not method.query.events.has_halves and draws != 1:
        faults.append(f"draws must be an even number, to be split in two halves, or 1; found {draws}")
    if isinstance(method.train.events, AntitheticGrid):
        faults.append("pairs of opposite noise are of queries; training images have a plain grid")
    if num_phases(method, settings) > timesteps:
        faults.append(f"phases must be at most timesteps = {timesteps}, found {settings.phases}")
    if isinstance(method.train.events, Grid):
        draws = max(draws, method.train.events.draws)
    if draws > settings.batch_size:
        faults.append(f"batch_size must hold all draws of a timestep ({draws}), found {settings.batch_size}")
    faults += _faults_of_meeting(method) if method.meet == "timesteps" else []
    faults += _faults_of(method.precondition, settings)
    if faults:
        raise ConfigError(f"{method.name}: {'; '.join(faults)}.")


def _faults_of_meeting(method: Method) -> list[str]:
    """Say why gradients cannot meet timestep by timestep."""
    faults, train, query = [], method.train.events, _query_grid(method)
    if isinstance(train, Grid) and isinstance(query, Trajectory):
        faults.append("the steps of a trajectory are at other timesteps than a grid of training images")
    elif isinstance(train, Grid) and train.timesteps != query.timesteps:
        faults.append(
            "both sides meet timestep by timestep, so their grids must have the same timesteps; the training side has "
            f"{train.timesteps}, the query side {query.timesteps}. Give --timesteps and "
            "--train-timesteps the same number"
        )
    if "sample" in (method.train.unit, method.query.unit):
        faults.append("unit 'sample' is the length of a sum, and gradients that meet timestep by timestep have none")
    if method.after != "none":
        faults.append(f"after={method.after!r} is of a training image's summed gradient; it needs meet='sums'")
    return faults


def _faults_of(precondition: object, settings: TraceSettings) -> list[str]:
    """List what is wrong with how equations are to be solved."""
    if not isinstance(precondition, IterativeInverse | DataInfInverse):
        return []
    faults = [] if precondition.damping > 0 else [f"damping must be above 0, found {precondition.damping}"]
    match precondition:
        case ConjugateGradientInverse():
            counts = ("num_images", "max_iterations")
            if not 0 < precondition.tolerance < 1:
                faults.append(f"tolerance must be between 0 and 1, found {precondition.tolerance}")
        case LissaInverse():
            counts = ("num_images", "depth", "repeats", "events_per_step", "power_iterations")
        case DataInfInverse():
            counts = ()
            size = _grid_size(precondition.events)
            if size > settings.batch_size:
                faults.append(
                    f"batch_size must hold all events of a training image in the curvature ({size}), found "
                    f"{settings.batch_size}"
                )
    values = {name: getattr(precondition, name) for name in counts}
    return faults + [f"{name} must be above 0, found {v}" for name, v in values.items() if v is not None and v < 1]


@dataclass(frozen=True)
class PassCount:
    """Sample-passes at one checkpoint: forward and backward passes of one sample."""

    step: int
    query: int
    train: int
    """In one turn over the training set."""
    curvature: int = 0
    """For the curvature; at most, where an iteration may end early."""
    curvature_per_turn: int = 0
    """For the curvature, once more in each turn of queries."""


@dataclass(frozen=True)
class Demand:
    """What is held in memory beside the weights, but for its size."""

    num_queries: int
    vectors_per_query: int
    query_grid: Grid | Trajectory | None
    """Grid or trajectory whose gradients are summed into those vectors."""
    query_parts: int
    """Parts into which the draws of a timestep fall."""
    train_grid: Grid | None
    """Grid on the training side; None where events are taken one by one."""
    train_families: int
    draws: int = 1
    """Events that are one unit where they are taken one by one."""
    solved: int = 0
    """Whole gradients for which an iteration solves equations at once, with copies of its own."""
    kronecker: bool = False
    """Whether Kronecker factors are held."""
    unit: int = 1
    """Events of a training image whose mean is one gradient, in the making of a curvature."""
    held: str = "the gradients of one query"
    """What the vectors are, for messages."""

    @property
    def smallest_batch(self) -> int:
        """Events that must go through the network at once: the draws of a timestep."""
        return max([self.draws, self.unit, *(grid.draws for grid in (self.query_grid, self.train_grid) if grid)])


@dataclass(frozen=True)
class Workload:
    """The work of methods that take gradients at the same events of the same checkpoints."""

    subject: Subject
    queries: ImageData
    methods: Sequence[Method]
    settings: TraceSettings

    @property
    def train_events(self) -> Grid | Replay:
        """Events on the training side."""
        events = self.methods[0].train.events
        assert not isinstance(events, Trajectory)  # check_method
        return events

    @property
    def query_grid(self) -> Grid | Trajectory:
        """Events on the query side."""
        return _query_grid(self.methods[0])

    @cached_property
    def query_timesteps(self) -> Int64[ndarray, " timestep"]:
        """Timesteps at which gradients of queries are taken, ascending."""
        if isinstance(self.query_grid, Trajectory):
            assert self.queries.trajectories is not None  # fill_in_steps
            return np.array(self.queries.trajectories.timesteps)
        return even_timesteps(1, self.subject.process.num_timesteps - 1, self.query_grid.timesteps).numpy()

    @property
    def is_matched(self) -> bool:
        """Whether both sides meet timestep by timestep."""
        return self.methods[0].meet == "timesteps"

    @cached_property
    def meetings(self) -> list[range]:
        """Points of the query grid whose gradients are one sum: all of them, or each for itself."""
        count = self.query_grid.timesteps
        return [range(k, k + 1) for k in range(count)] if self.is_matched else [range(count)]

    @property
    def phases_at_once(self) -> int:
        """Bins of timesteps that are kept apart in one meeting."""
        return 1 if self.is_matched else self.phases

    def phases_of(self, points: range) -> slice:
        """Say which phases the points of a meeting belong to."""
        first, last = (point * self.phases // self.query_grid.timesteps for point in (points.start, points.stop - 1))
        return slice(first, last + 1)

    @property
    def precondition(self) -> BeforeProjection | None:
        """What is applied to whole gradients of queries."""
        found = self.methods[0].precondition
        return found if isinstance(found, BeforeProjection) else None

    @property
    def outputs(self) -> tuple[OutputName, OutputName]:
        """Output functions of the training side and of the query side."""
        return self.methods[0].train.output, self.methods[0].query.output

    @property
    def halves(self) -> bool:
        """Whether sums over half of the draws are kept."""
        return self.query_grid.has_halves

    @property
    def phases(self) -> int:
        """Bins of query timesteps that are kept apart."""
        return num_phases(self.methods[0], self.settings)

    @cached_property
    def query_families(self) -> list[Family]:
        """Sums on the query side."""
        return [f for f in _FAMILIES if any(family_of(m.query.unit) == f for m in self.methods)]

    @cached_property
    def train_families(self) -> list[Family]:
        """Sums on the training side, where it is a grid."""
        return [f for f in _FAMILIES if any(family_of(m.train.unit) == f for m in self.methods)]

    @cached_property
    def checkpoints(self) -> list[Checkpoint]:
        """Checkpoints at which gradients are taken."""
        return self.subject.used_checkpoints(self.methods[0].checkpoints)

    @property
    def vectors_per_query(self) -> int:
        """Whole gradients that are held for a query."""
        return sum(num_vectors(family, self.phases_at_once, self.halves) for family in self.query_families)

    @property
    def held_per_query(self) -> int:
        """Whole gradients that are held for a query and in the making of them for all queries of a turn at once."""
        return self.vectors_per_query * (2 if isinstance(self.precondition, DataInfInverse) else 1)

    @property
    def demand(self) -> Demand:
        """What is held in memory."""
        iterative = isinstance(self.precondition, IterativeInverse)
        return Demand(
            num_queries=len(self.queries),
            vectors_per_query=self.held_per_query,
            solved=self.vectors_per_query if iterative else 0,
            kronecker=isinstance(self.precondition, KroneckerInverse),
            unit=_grid_size(self.precondition.events) if isinstance(self.precondition, DataInfInverse) else 1,
            query_grid=self.query_grid,
            query_parts=2 if self.halves else 1,
            train_grid=self._train_grid,
            train_families=len(self.train_families),
        )

    @property
    def _train_grid(self) -> Grid | None:
        """What is summed at once on the training side."""
        if not isinstance(self.train_events, Grid):
            return None
        return replace(self.train_events, timesteps=1) if self.is_matched else self.train_events

    @cached_property
    def passes(self) -> list[PassCount]:
        """Sample-passes of each checkpoint."""
        everything = range(len(self.subject.train))
        return [
            replace(self.query_passes(c, len(self.queries)), train=self.num_events(c, everything))
            for c in self.checkpoints
        ]

    def query_passes(self, checkpoint: Checkpoint, num_queries: int) -> PassCount:
        """Count the sample-passes of some queries at a checkpoint, without the training images that they meet."""
        if not num_queries:
            return PassCount(checkpoint.step, query=0, train=0)
        curvature, meetings = curvature_passes(self.precondition, len(self.subject.train)), len(self.meetings)
        return PassCount(
            checkpoint.step,
            query=num_queries * self.query_grid.timesteps * self.query_grid.draws,
            train=0,
            curvature=curvature.once + curvature.per_vector * num_queries * self.vectors_per_query * meetings,
            curvature_per_turn=curvature.per_turn * meetings,
        )

    def num_passes(self, num_turns: int) -> int:
        """Count sample-passes in all."""
        per_turn = sum(count.train + count.curvature_per_turn for count in self.passes)
        return num_turns * per_turn + sum(count.query + count.curvature for count in self.passes)

    def num_events(self, checkpoint: Checkpoint, block: range, points: range | None = None) -> int:
        """Count the events of some training images: all, or those that meet the queries at some points."""
        if isinstance(self.train_events, Grid):
            met = points if points is not None and self.is_matched else range(self.train_events.timesteps)
            return len(block) * len(met) * self.train_events.draws
        table = rows_between(self.replayed_events(checkpoint, self.methods[0].weights), block)
        return len(table) if points is None else int(self.meets(table, points).sum())

    def meets(self, table: EventTable, points: range) -> Bool[ndarray, " event"]:
        """Say which replayed events meet the queries at some points."""
        if not self.is_matched:
            return np.ones(len(table), dtype=bool)
        return nearest_timesteps(self.query_timesteps, table.timestep) == points.start

    def split_queries(self, num_params: int, query_bytes: int) -> list[range]:
        """Split the queries into turns whose gradients fit into the memory allowed, of one query at least."""
        per_query = self.held_per_query * num_params * np.dtype(self.settings.dtype).itemsize
        at_once = max(1, query_bytes // per_query)
        return [range(i, min(i + at_once, len(self.queries))) for i in range(0, len(self.queries), at_once)]

    def replayed_events(self, checkpoint: Checkpoint, rule: WeightsRule) -> EventTable:
        """List the events of a checkpoint's interval, once."""
        assert isinstance(self.train_events, Replay)
        key = (checkpoint.step, rule)
        if key not in self._tables:
            replays, previous = self._need_replays(rule), self.subject.previous_step[checkpoint.step]
            self._tables[key] = replays.events(previous, checkpoint.step, self.train_events, rule)
        return self._tables[key]

    def grid_weight(self, checkpoint: Checkpoint, rule: WeightsRule) -> float:
        """Give the weight of a checkpoint where training images are taken on a grid."""
        if rule == "equal":
            return 1.0
        return self._need_replays(rule).grid_weight(self.subject.previous_step[checkpoint.step], checkpoint.step, rule)

    @cached_property
    def _tables(self) -> dict[tuple[int, WeightsRule], EventTable]:
        return {}

    def _need_replays(self, rule: WeightsRule) -> Replays:
        if self.subject.replays is None:
            raise ConfigError(
                f"weights={rule!r} and replays need a record of training; use a grid with weights='equal'."
            )
        return self.subject.replays


PASSES_PER_PRODUCT = 2
"""What a product of one event's Gauss-Newton matrix with one vector takes, in sample-passes."""


@dataclass(frozen=True)
class CurvaturePasses:
    """Sample-passes that a preconditioner takes at a checkpoint."""

    once: int = 0
    per_vector: int = 0
    """At most, for each vector of each query."""
    per_turn: int = 0


def curvature_passes(precondition: BeforeProjection | None, num_train: int) -> CurvaturePasses:
    """Count the sample-passes of a preconditioner at one checkpoint."""
    match precondition:
        case KroneckerInverse():
            return CurvaturePasses(
                num_curvature_events(precondition, num_train) * (2 if precondition.kind == "ekfac" else 1)
            )
        case ConjugateGradientInverse():
            events = num_curvature_events(precondition, num_train)
            return CurvaturePasses(events, PASSES_PER_PRODUCT * events * (precondition.max_iterations + 1))
        case LissaInverse():
            events = num_curvature_events(precondition, num_train)
            in_samples = precondition.repeats * min(precondition.events_per_step or events, events)
            return CurvaturePasses(
                events + PASSES_PER_PRODUCT * precondition.power_iterations * in_samples,
                PASSES_PER_PRODUCT * (precondition.depth * in_samples + events),
            )
        case DataInfInverse():
            events = num_curvature_events(precondition, num_train)
            return CurvaturePasses(once=events, per_turn=events)
    return CurvaturePasses()


def num_curvature_events(precondition: KroneckerInverse | IterativeInverse | DataInfInverse, num_train: int) -> int:
    """Count the events over which a curvature is a mean."""
    num_images = min(precondition.num_images, num_train) if isinstance(precondition, IterativeInverse) else num_train
    return num_images * _grid_size(precondition.events)


def family_of(unit: Unit) -> Family:
    """Say which sums a normalisation is made of."""
    return "timestep" if unit == "timestep" else "none"


def rows_between(table: EventTable, rows: range) -> EventTable:
    """Keep the events of some training images; the table is ordered by row."""
    first, last = np.searchsorted(table.row, [rows.start, rows.stop])
    return table.take(slice(int(first), int(last)))


def fill_in_steps(method: Method | Baseline, queries: ImageData) -> Method | Baseline:
    """Put the number of steps that the queries' trajectories have into a declaration that follows them.

    Returns:
        The declaration.

    Raises:
        ConfigError: If the queries have no trajectories, not at the same timesteps, or of what the model does not see.
    """
    if isinstance(method, Baseline) or not isinstance(method.query.events, Trajectory):
        return method
    if queries.trajectories is None:
        raise ConfigError(
            f"{method.name} follows the steps by which a sampler came to each query; {queries.source} does not have "
            "them, or not of all images at the same timesteps. Sample images with `whence sample RUN --trajectory` and "
            "give the file that it writes."
        )
    steps, asked = len(queries.trajectories.timesteps), method.query.events.steps
    if asked not in (0, steps):
        raise ConfigError(f"{method.name} asks for {asked} steps of a trajectory, {queries.source} has {steps}.")
    sampled, seen = queries.trajectories.frames.shape[2:], queries.input_shape
    in_latents = queries.encoding is not None and queries.encoding.latents is not None
    if sampled != seen or queries.trajectories.of_latents != in_latents:
        kinds = ["latents" if latents else "images" for latents in (queries.trajectories.of_latents, in_latents)]
        raise ConfigError(
            f"The trajectories of {queries.source} are of {kinds[0]} of {sampled} (channels, height, width); the model "
            f"sees {kinds[1]} of {seen}. Follow those that this model sampled, by `whence sample RUN --trajectory`."
        )
    events = replace(method.query.events, steps=steps)
    return replace(method, query=replace(method.query, events=events))


def _grid_size(grid: Grid) -> int:
    return grid.timesteps * grid.draws


def _query_grid(method: Method) -> Grid | Trajectory:
    assert not isinstance(method.query.events, Replay)  # check_method
    return method.query.events
