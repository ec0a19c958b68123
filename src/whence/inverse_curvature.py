"""What is applied to whole gradients of queries at a checkpoint: the damped inverse of a curvature, or Adam's scale.

What a curvature costs passes over training images is kept, whatever the queries and the damping:

    cache/curvature/<key>.safetensors    Kronecker factors (whence.second_order); mean and largest eigenvalues of the
                                         Gauss-Newton matrix; mean squares of the gradients of each parameter
"""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray
from torch import Tensor

from whence._array_files import read_arrays, write_arrays
from whence._files import sha256_of_json
from whence.checkpoints import Checkpoint
from whence.config import TraceSettings
from whence.curvature.iterative import conjugate_gradient, largest_eigenvalue, lissa, relative_residuals
from whence.curvature.kronecker import NEGLIGIBLE, KroneckerCurvature
from whence.data import ImageData
from whence.diffusion.noise import keyed_order
from whence.engine.curvature_sinks import RankOneSink, SquaredLengthSink
from whence.event_table import EventTable, grid_events
from whence.gauss_newton import GaussNewton
from whence.gradients import GradientSource
from whence.methods.frame import (
    AdamInverse,
    BeforeProjection,
    ConjugateGradientInverse,
    DataInfInverse,
    IterativeInverse,
    KroneckerInverse,
    LissaInverse,
)
from whence.second_order import adam_scales, load_or_make_curvature
from whence.subject import Subject
from whence.workload import PASSES_PER_PRODUCT, curvature_passes

SCALE_MARGIN = 1.1
"""LiSSA's scale, over the largest eigenvalue that was found: power iteration finds it from below."""

LARGE_RESIDUAL = 0.1
"""Relative residual of a truncated series above which there is a warning."""

Update = Callable[[int], Any]
"""Called with the number of sample-passes done."""

Facts = dict[str, float]
"""About solutions: ``mean_eigenvalue``, ``damping`` (itself, no multiple), ``scale``, worst ``residual``, most
``iterations``, ``parameters_left_out``."""


class AbstractQueryPreconditioner(ABC):
    """What multiplies the gradients of queries."""

    together: bool = False
    """Whether one call is to have the vectors of all queries: it is a pass over training images for them all."""

    @abstractmethod
    def apply_(self, vectors: Float[Tensor, "vector param"], update: Update) -> Facts:
        """Multiply vectors in place, and report as many sample-passes as :meth:`passes` says."""

    def passes(self, num_vectors: int) -> int:
        """Count the sample-passes of a call with so many vectors; at most, where it may end early."""
        return 0 * num_vectors


class AdamScale(AbstractQueryPreconditioner):
    """Division by what Adam divides each gradient by."""

    def __init__(self, divisors: Float[Tensor, " param"]):
        self.divisors = divisors

    def apply_(self, vectors: Float[Tensor, "vector param"], update: Update) -> Facts:
        """Divide."""
        vectors.div_(self.divisors)
        return {}


class KroneckerSolve(AbstractQueryPreconditioner):
    """The damped inverse of Kronecker factors."""

    def __init__(self, curvature: KroneckerCurvature, spans: Mapping[str, slice], damping: float):
        self.curvature, self.spans, self.damping = curvature, spans, damping

    def apply_(self, vectors: Float[Tensor, "vector param"], update: Update) -> Facts:
        """Solve."""
        self.curvature.solve_(vectors, self.spans, self.damping)
        return {}


class ConjugateGradients(AbstractQueryPreconditioner):
    """The damped inverse of the Gauss-Newton matrix, by conjugate gradients.

    Args:
        matrix: The matrix.
        asked: Tolerance and iterations.
        mean_eigenvalue: That of the matrix.
    """

    def __init__(self, matrix: GaussNewton, asked: ConjugateGradientInverse, mean_eigenvalue: float):
        self.matrix, self.asked, self.mean_eigenvalue = matrix, asked, mean_eigenvalue
        self.damping = asked.damping * mean_eigenvalue

    def passes(self, num_vectors: int) -> int:
        """Count those of all iterations, and of the product for the residual."""
        return PASSES_PER_PRODUCT * len(self.matrix.table) * num_vectors * (self.asked.max_iterations + 1)

    def apply_(self, vectors: Float[Tensor, "vector param"], update: Update) -> Facts:
        """Solve to the tolerance, or as far as the iterations lead: then there is a warning."""
        done = 0

        def count(num_passes: int) -> None:
            nonlocal done
            done += num_passes
            update(num_passes)

        found = conjugate_gradient(
            partial(self.matrix.multiply, update=count),
            vectors,
            self.damping,
            tolerance=self.asked.tolerance,
            max_iterations=self.asked.max_iterations,
        )
        update(self.passes(len(vectors)) - done)
        vectors.copy_(found.vectors)
        residual = float(found.residuals.max())
        # The residual that conjugate gradients carry along differs from the true one by rounding.
        if residual > 2 * self.asked.tolerance:
            warnings.warn(
                f"Conjugate gradients reached a relative residual of {residual:.2g} in {found.iterations} iterations "
                f"at {self.matrix.source.label}, not {self.asked.tolerance:g}. Raise max_iterations or the damping, or "
                "use dtype float64 if more iterations do not help.",
                stacklevel=2,
            )
        return {
            "mean_eigenvalue": self.mean_eigenvalue,
            "damping": self.damping,
            "residual": residual,
            "iterations": float(found.iterations),
        }


class Lissa(AbstractQueryPreconditioner):
    """The damped inverse of the Gauss-Newton matrix, by the mean of some Neumann series over samples of its events.

    Args:
        matrix: The matrix.
        asked: Depth, repeats, size of the samples.
        mean_eigenvalue: That of the matrix.
        largest_eigenvalue: The largest of the matrix, or of some samples of it.
        seed: Seed of the samples.
    """

    def __init__(
        self, matrix: GaussNewton, asked: LissaInverse, mean_eigenvalue: float, largest_eigenvalue: float, seed: int
    ):
        self.matrix, self.asked, self.mean_eigenvalue, self.seed = matrix, asked, mean_eigenvalue, seed
        self.damping = asked.damping * mean_eigenvalue
        self.scale = SCALE_MARGIN * (largest_eigenvalue + self.damping)

    def passes(self, num_vectors: int) -> int:
        """Count those of all steps, and of the product for the residual."""
        num_events = len(self.matrix.table)
        in_samples = self.asked.repeats * min(self.asked.events_per_step or num_events, num_events)
        return PASSES_PER_PRODUCT * num_vectors * (self.asked.depth * in_samples + num_events)

    def apply_(self, vectors: Float[Tensor, "vector param"], update: Update) -> Facts:
        """Sum the series; where much is left, there is a warning."""
        mean = torch.zeros_like(vectors)
        for repeat in range(self.asked.repeats):
            multiply = partial(self._multiply, update=update, repeat=repeat)
            mean += lissa(multiply, vectors, self.damping, scale=self.scale, depth=self.asked.depth)
        mean /= self.asked.repeats
        exact = partial(self.matrix.multiply, update=update)
        residual = float(relative_residuals(exact, mean, vectors, self.damping).max())
        vectors.copy_(mean)
        if residual > LARGE_RESIDUAL:
            warnings.warn(
                f"LiSSA left a relative residual of {residual:.2g} at {self.matrix.source.label}: its series is cut "
                "off too early, or its samples are too few. Raise depth, the damping, repeats or events_per_step; or "
                "use influence-cg.",
                stacklevel=2,
            )
        return {
            "mean_eigenvalue": self.mean_eigenvalue,
            "damping": self.damping,
            "scale": self.scale,
            "residual": residual,
        }

    def _multiply(
        self, vectors: Float[Tensor, "vector param"], step: int, update: Update, repeat: int
    ) -> Float[Tensor, "vector param"]:
        sample = lissa_sample(self.matrix.table, self.asked, self.seed, repeat, step)
        return self.matrix.multiply(vectors, update, sample)


class DataInf(AbstractQueryPreconditioner):
    r"""The mean of damped inverses of rank-one matrices, one for each training image, parameter by parameter.

    With damping d::

        mean_i (g_i g_i^T + d I)^-1 v = (v - mean_i g_i <g_i, v> / (d + |g_i|^2)) / d

    with g_i the part of a parameter in the mean gradient of training image i over its events, and d a multiple of the
    mean square of its entries over all i (Kwon et al. 2024, arXiv:2310.00902, eq. 5). Each parameter counts alike,
    however small its gradients, so those whose gradients are nothing but rounding, as of the bias of attention's keys,
    are left out.

    Args:
        source: The model.
        images: Training images; all of them count.
        table: Their events.
        mean_squares: By parameter.
        asked: Damping and events.
    """

    together = True

    def __init__(
        self,
        source: GradientSource,
        images: ImageData,
        table: EventTable,
        mean_squares: Mapping[str, float],
        asked: DataInfInverse,
    ):
        self.source, self.images, self.table = source, images, table
        numbers = {name: source.layout.num_numbers(name) for name in mean_squares}
        mean = sum(square * numbers[name] for name, square in mean_squares.items()) / source.layout.num_params
        least = (NEGLIGIBLE * torch.finfo(source.dtype).eps) ** 2 * mean
        self.left_out = [name for name, square in mean_squares.items() if square <= least]
        self.dampings = {
            name: 1.0 if name in self.left_out else asked.damping * square for name, square in mean_squares.items()
        }

    def passes(self, num_vectors: int) -> int:
        """Count those of one pass over all training images."""
        return len(self.table)

    def apply_(self, vectors: Float[Tensor, "vector param"], update: Update) -> Facts:
        """Make one pass over the training images, whose gradients are dropped layer by layer."""
        source, num_images = self.source, len(self.images)
        scale = source.output_scale(self.images)
        sums = torch.zeros_like(vectors)
        scaled = {name: damping * scale**2 for name, damping in self.dampings.items()}
        sink = RankOneSink(source.layout, vectors, scaled, sums)
        source.unit_gradients(self.table, self.images, len(self.table) // num_images, [sink], update)
        vectors.sub_(sums.div_(num_images))
        for name, span in source.layout.spans.items():
            vectors[:, span] /= self.dampings[name]
        for name in self.left_out:
            vectors[:, source.layout.spans[name]] = 0
        return {"parameters_left_out": float(len(self.left_out))}


def make_preconditioner(
    asked: BeforeProjection,
    source: GradientSource,
    checkpoint: Checkpoint,
    subject: Subject,
    settings: TraceSettings,
    folder: Path,
    update: Update,
) -> AbstractQueryPreconditioner:
    """Make what is applied to gradients of queries at a checkpoint, from what is kept if it is there.

    Args:
        asked: What the method declares.
        source: The model at the checkpoint.
        checkpoint: The checkpoint.
        subject: Training images and record.
        settings: Those of the trace.
        folder: Where curvature is kept.
        update: Called with the number of sample-passes done.

    Returns:
        The preconditioner.

    Raises:
        NumericsError: If a gradient is not finite.
    """
    spans, images, seed = source.layout.spans, subject.train, settings.seed

    def path_of(about: dict[str, Any]) -> Path:
        key = sha256_of_json([about, subject.describe([checkpoint], settings), seed])[:16]
        return folder / f"{key}.safetensors"

    def keep(about: dict[str, Any], num_passes: int, make: Callable[[], dict[str, float]]) -> dict[str, float]:
        path = path_of(about)
        if path.exists():
            update(num_passes)
        else:
            write_arrays(path, {name: np.array([number]) for name, number in make().items()})
        return {name: float(array[0]) for name, array in read_arrays(path).items()}

    match asked:
        case AdamInverse():
            config = subject.record.manifest["config"] if subject.record else {}
            scales = adam_scales(checkpoint, spans, config.get("adam_beta2"), asked.eps)
            return AdamScale(torch.cat([scales[name].flatten() for name in spans]).to(source.device))
        case KroneckerInverse():
            path = path_of(asdict(replace(asked, damping=1.0)))
            return KroneckerSolve(
                load_or_make_curvature(path, source, images, asked, seed, update), spans, asked.damping
            )
        case DataInfInverse():
            table = grid_events(images, range(len(images)), "train", asked.events, source.process.num_timesteps, seed)
            about = {"mean squares": asdict(asked.events)}
            squares = keep(about, len(table), lambda: _mean_squares(source, images, table, update))
            return DataInf(source, images, table, squares, asked)
    rows = curvature_rows(asked, len(images), seed)
    table = grid_events(images, rows, "train", asked.events, source.process.num_timesteps, seed)
    matrix = GaussNewton(source, images, table)
    about = {"gauss-newton": asdict(asked.events), "num_images": len(rows)}
    mean = keep(about, len(table), lambda: {"mean": matrix.mean_eigenvalue(update)})["mean"]
    if isinstance(asked, ConjugateGradientInverse):
        return ConjugateGradients(matrix, asked, mean)
    about |= {name: getattr(asked, name) for name in ("repeats", "events_per_step", "power_iterations")}
    num_passes = curvature_passes(asked, len(images)).once - len(table)
    largest = keep(about, num_passes, lambda: {"largest": _largest_eigenvalue(matrix, asked, seed, update)})
    return Lissa(matrix, asked, mean, largest["largest"], seed)


def curvature_rows(asked: IterativeInverse, num_train: int, seed: int) -> list[int]:
    """Draw the training images over which the Gauss-Newton matrix is a mean, in their order; a function of the seed."""
    return np.sort(keyed_order(seed, 0, num_train)[: asked.num_images]).tolist()


def describe_solutions(
    asked: BeforeProjection | None,
    subject: Subject,
    settings: TraceSettings,
    facts: Mapping[int, Mapping[str, ndarray]],
) -> dict[str, Any]:
    """Say in plain values what was found about solutions, for the details of scores.

    Args:
        asked: What the method declares.
        subject: Training images.
        settings: Those of the trace.
        facts: By the step of the checkpoint, :data:`Facts` of all solutions.

    Returns:
        The largest of each at each checkpoint, and the images that the curvature is of where it is not all.
    """
    about = {str(step): {name: float(found.max()) for name, found in some.items()} for step, some in facts.items()}
    details: dict[str, Any] = {"preconditioners": about} if any(about.values()) else {}
    if isinstance(asked, IterativeInverse):
        rows = curvature_rows(asked, len(subject.train), settings.seed)
        details["curvature_images"] = [subject.train.ids[row] for row in rows]
    return details


def lissa_sample(table: EventTable, asked: LissaInverse, seed: int, repeat: int, step: int) -> EventTable:
    """Draw the events of one step of one series: a function of the seed, and of no batch."""
    if asked.events_per_step is None:
        return table
    # Position 0 is that of the images.
    order = keyed_order(seed, 1 + repeat * asked.depth + step, len(table))
    return table.take(np.sort(order[: asked.events_per_step]))


def _largest_eigenvalue(matrix: GaussNewton, asked: LissaInverse, seed: int, update: Update) -> float:
    """Give the largest of the largest eigenvalues of the first samples, one of each repeat."""
    generator, source = torch.Generator().manual_seed(seed), matrix.source
    # Any start will do; where it lies decides no score, but for the margin by which the scale is too large.
    start = torch.randn(source.layout.num_params, generator=generator, dtype=source.dtype).to(source.device)
    found = []
    for repeat in range(asked.repeats):
        sample = lissa_sample(matrix.table, asked, seed, repeat, step=0)
        multiply = partial(matrix.multiply, update=update, events=sample)
        found.append(largest_eigenvalue(multiply, start, asked.power_iterations))
    return max(found)


def _mean_squares(source: GradientSource, images: ImageData, table: EventTable, update: Update) -> dict[str, float]:
    """Give the mean square of the entries of each parameter's gradients, over training images."""
    sink, events_per_image = SquaredLengthSink(), len(table) // len(images)
    scale = source.unit_gradients(table, images, events_per_image, [sink], update)
    firsts = table.take(slice(0, None, events_per_image))
    source.check_finite(sink.norm_squared.sqrt().cpu().numpy(), firsts, images)
    count, layout = len(images) * scale**2, source.layout
    return {name: sink.totals.get(name, 0.0) / (count * layout.num_numbers(name)) for name in layout.spans}
