"""Memory: what a pass needs, measured on a small batch, and how large a batch and how many queries a bound allows.

Held at once are the weights, the gradient sums of as many queries as one turn has, and what a batch needs::

    weights + turn x vectors + max(batch of the query side, batch of the training side, solver and its batch)

and, in the place of the weights, weights and Kronecker factors where a method has such.
What a batch needs is a line over its number of events, through the bytes of all tensors that live at the worst moment
of a pass over two events and over four. Python and torch themselves, and the images, come on top.
"""

import math
import re
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from whence.config import GradientSettings
from whence.errors import ConfigError
from whence.event_table import grid_events
from whence.gauss_newton import GaussNewton
from whence.gradients import GradientSource
from whence.grid_sums import points_at_once
from whence.methods.frame import Grid, Trajectory
from whence.subject import Subject
from whence.workload import Demand

QUERY_BYTES = 4 * 2**30
"""Gradients of queries that are held at once where no bound is given."""

WORTHWHILE_BATCH = 8
"""Smaller batches than this are taken only where nothing else fits: they waste more than a turn of queries does."""

SOLVER_VECTORS = 5
"""Whole gradients that a solver holds for each vector beside it: solution, residual, direction, a product, a step."""

OVERHEAD = 1.5
"""Memory that a pass takes of the system, by the bytes of its tensors: allocators do not use all that they take."""

WORKSPACE_BYTES = 128 * 2**20
"""What operations allocate for themselves and no tensor shows.

Measured with both on one core, a U-Net of 1.1 M parameters at 16 x 16 pixels: 767 MiB where 820 were planned (batches
of 64), 522 where 546 were (batches of 11).
"""

_UNITS = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_FEW, _MORE = 2, 4


def parse_memory(text: str) -> int:
    """Read an amount of memory.

    Returns:
        Bytes.

    Raises:
        ConfigError: If it is not a number above 0 with a unit.

    Example:
        >>> parse_memory("1.5GiB")
        1610612736
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]i?B)\s*", text)
    num_bytes = int(float(found[1]) * _UNITS[found[2]]) if found else 0
    if not num_bytes:
        raise ConfigError(f"memory must be a number above 0 with a unit, such as 8GiB, 512MiB or 8GB; found {text!r}.")
    return num_bytes


def format_memory(num_bytes: int) -> str:
    """Write an amount of memory, rounded up, as :func:`parse_memory` reads it."""
    unit = next((u for u in ("GiB", "MiB") if num_bytes >= 10 * _UNITS[u]), "KiB")
    return f"{math.ceil(num_bytes / _UNITS[unit])}{unit}"


@dataclass(frozen=True)
class Line:
    """Bytes over the number of events."""

    fixed: float
    per_event: float

    def __call__(self, num_events: int) -> int:
        """Give the bytes that some events need."""
        return math.ceil(self.fixed + num_events * self.per_event)


@dataclass(frozen=True)
class Footprint:
    """What passes of a model need, apart from vectors and buffers of whole gradients."""

    weights: int
    """Bytes of all weights."""
    gradient: int
    """Bytes of one whole gradient."""
    one_by_one: Line
    """A batch whose events are units, for inner products."""
    summed: Line
    """A batch whose gradients are gathered whole."""
    product: Line | None = None
    """A batch for a product with the Gauss-Newton matrix, if that was asked for."""
    kronecker: int = 0
    """Bytes of Kronecker factors, and of the sums that they are made of."""


@dataclass(frozen=True)
class Limits:
    """What a run holds at once."""

    batch_size: int
    query_bytes: int
    """Bound on the gradients of queries."""


def measure_footprint(subject: Subject, settings: GradientSettings, *, products: bool = False) -> Footprint:
    """Measure what passes need, at the last checkpoint; the same numbers for the same model and settings.

    Args:
        subject: The model.
        settings: Which parameters, in which arithmetic.
        products: Also measure products with the Gauss-Newton matrix.

    Returns:
        The measurement.
    """
    source = subject.source(subject.checkpoints[-1], settings)
    return Footprint(
        weights=sum(t.untyped_storage().nbytes() for t in [*source.model.parameters(), *source.model.buffers()]),
        gradient=source.gradient_bytes,
        one_by_one=_line(lambda count: _peak_one_by_one(source, subject, count)),
        summed=_line(lambda count: _peak_summed(source, subject, count)),
        product=_line(lambda count: _peak_product(source, subject, count)) if products else None,
        kronecker=sum(_kronecker_bytes(p) for p in source.capture.parameters.values()),
    )


def choose_limits(demand: Demand, settings: GradientSettings, footprint: Callable[[], Footprint]) -> Limits:
    """Choose the batch size and the memory for queries: few turns first, then large batches.

    Args:
        demand: What is held.
        settings: The bound, and the largest batch size.
        footprint: Measures the model; asked only where there is a bound.

    Returns:
        The choice, which depends on the settings and the model alone.

    Raises:
        ConfigError: If what must be held and the draws of one timestep do not fit. The message names the smallest
            bound that would do.
    """
    if settings.memory is None:
        return Limits(settings.batch_size, QUERY_BYTES)
    bound, needs = parse_memory(settings.memory), footprint()
    vectors, fixed = demand.vectors_per_query * needs.gradient, _fixed_bytes(demand, needs)
    fitting = [
        (size, left)
        for size in range(demand.smallest_batch, settings.batch_size + 1)
        if (left := bound - fixed - batch_bytes(demand, needs, size)) >= vectors
    ]
    if not fitting:
        least = fixed + batch_bytes(demand, needs, demand.smallest_batch) + vectors
        raise ConfigError(
            f"memory={settings.memory} does not hold the weights{' and the curvature' if demand.kronecker else ''} "
            f"({format_memory(fixed)}), "
            f"{demand.held} ({format_memory(vectors)}) and a batch of {demand.smallest_batch}; the smallest bound "
            f"that does is {format_memory(least)}."
        )
    large = [one for one in fitting if one[0] >= min(WORTHWHILE_BATCH, settings.batch_size)] or fitting[-1:]
    size, left = min(large, key=lambda one: (num_turns(demand, needs, one[1]), -one[0]))
    return Limits(size, left)


def num_turns(demand: Demand, footprint: Footprint, query_bytes: int) -> int:
    """Count the turns in which queries are taken."""
    vectors = demand.vectors_per_query * footprint.gradient
    return math.ceil(demand.num_queries / max(1, query_bytes // vectors)) if vectors else 1


def peak_bytes(demand: Demand, footprint: Footprint, limits: Limits) -> int:
    """Say what is held at the worst moment."""
    vectors = demand.vectors_per_query * footprint.gradient
    at_once = min(demand.num_queries, max(1, limits.query_bytes // vectors)) if vectors else 0
    return _fixed_bytes(demand, footprint) + at_once * vectors + batch_bytes(demand, footprint, limits.batch_size)


def batch_bytes(demand: Demand, footprint: Footprint, batch_size: int) -> int:
    """Say what a batch needs beside weights and query gradients, on the side that needs more."""
    needs = [0]
    if demand.query_grid:
        needs.append(_grid_bytes(demand.query_grid, demand.query_parts, footprint, batch_size))
    if demand.train_grid:
        per_sample = demand.train_grid.timesteps * demand.train_grid.draws
        # The sums of all samples of a batch, and once more in another order.
        sums = 2 * max(1, batch_size // per_sample) * demand.train_families * footprint.gradient
        needs.append(sums + _grid_bytes(demand.train_grid, 1, footprint, batch_size))
    else:
        needs.append(footprint.one_by_one(batch_size))
    if demand.solved:
        assert footprint.product is not None  # asked for with the demand
        needs.append(SOLVER_VECTORS * demand.solved * footprint.gradient + footprint.product(batch_size))
    return max(needs)


def _fixed_bytes(demand: Demand, footprint: Footprint) -> int:
    return footprint.weights + (footprint.kronecker if demand.kronecker else 0)


def _kronecker_bytes(parameter: Tensor) -> int:
    """Count the factors of a weight, with their eigenvalues, twice: as sums and as eigenvectors."""
    if parameter.ndim < 2:
        return 0
    num_out, num_inner = len(parameter), parameter[0].numel() + 1  # and the bias
    return 2 * (num_out**2 + num_inner**2 + num_out * num_inner) * parameter.element_size()


def _grid_bytes(grid: Grid | Trajectory, parts: int, footprint: Footprint, batch_size: int) -> int:
    points = points_at_once(batch_size, grid, parts * footprint.gradient)
    return points * parts * footprint.gradient + footprint.summed(points * grid.draws)


def _line(peak: Callable[[int], int]) -> Line:
    few, more = peak(_FEW), peak(_MORE)
    per_event = max(0.0, (more - few) / (_MORE - _FEW))
    return Line(WORKSPACE_BYTES + OVERHEAD * max(0.0, few - _FEW * per_event), OVERHEAD * per_event)


def _peak_one_by_one(source: GradientSource, subject: Subject, count: int) -> int:
    table = grid_events(subject.train, [0], "train", Grid(count), subject.process.num_timesteps, seed=0)
    source.batch_size = count
    vector = source.no_vectors().new_zeros(1, source.layout.num_params)
    with LiveBytes() as live:
        source.dots(table, subject.train, vector, lambda num_events: None)
    return live.peak


def _peak_product(source: GradientSource, subject: Subject, count: int) -> int:
    table = grid_events(subject.train, [0], "train", Grid(count), subject.process.num_timesteps, seed=0)
    source.batch_size = count
    vector = source.no_vectors().new_zeros(1, source.layout.num_params)
    with LiveBytes() as live:
        GaussNewton(source, subject.train, table).multiply(vector, lambda num_passes: None)
    return live.peak


def _peak_summed(source: GradientSource, subject: Subject, count: int) -> int:
    source.batch_size = count
    with LiveBytes() as live:
        source.grid_vectors(
            subject.train,
            [0],
            "query",
            Grid(1, draws=count),
            ["none"],
            phases=1,
            halves=False,
            seed=0,
            update=lambda num_events: None,
        )
    return live.peak - 2 * source.gradient_bytes  # the sum, and the one that is gathered


class LiveBytes(TorchDispatchMode):
    """Adds up the bytes of the tensors that operations make while it is on, as long as something holds them.

    ``peak`` is the largest sum. What an operation allocates for itself and frees before it returns is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and look at what it gives."""
        inside = {self._key(x) for x in tree_iter((args, kwargs)) if isinstance(x, Tensor)}
        result = func(*args, **(kwargs or {}))
        for made in tree_iter(result):
            if isinstance(made, Tensor) and self._key(made) not in inside:
                self._add(made)
        return result

    def _add(self, tensor: Tensor) -> None:
        storage, key = tensor.untyped_storage(), self._key(tensor)
        if key in self._known or not storage.nbytes():
            return
        self._known.add(key)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._remove, key, storage.nbytes())

    def _remove(self, key: int, num_bytes: int) -> None:
        self._known.discard(key)
        self.now -= num_bytes

    @staticmethod
    def _key(tensor: Tensor) -> int:
        return tensor.untyped_storage()._cdata  # noqa: SLF001  the identity that a storage has in PyTorch itself
