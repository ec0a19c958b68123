"""Gradients of samples at one checkpoint: sums over a grid, inner products with fixed vectors, and projected rows.

The query side of a streaming trace needs whole gradients, summed over a grid of timesteps; the training side streams,
layer by layer, through inner products with them. Both take the gradient of all draws at one timestep as one unit, in
two halves (A and B) where there is an even number of draws, so that reliability can be computed under every
normalisation::

    family none       sum over t of (A + B) / T             by phase, and of 2A / T  (half B follows from these)
    family timestep   sum over t of (A + B) / (T |A + B|)   by phase, and of A / (T |A|) and B / (T |B|)

with A and B the sums over half of the draws, divided by the number of all draws.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Float64
from numpy import ndarray
from torch import Tensor

from whence.config import LossName
from whence.data import ImageData
from whence.diffusion.adapters import predict
from whence.diffusion.objectives import sample_loss
from whence.diffusion.process import NoiseProcess
from whence.engine._base import squared_lengths
from whence.engine.capture import Capture
from whence.engine.check import check_against_autograd
from whence.engine.sinks import DotSink, GatherSink, Layout, ProjectSink
from whence.errors import ConfigError, NumericsError
from whence.event_table import EventTable, grid_events, make_batch
from whence.methods.frame import Grid
from whence.projections import AbstractProjection

Family = Literal["none", "timestep"]


@dataclass(frozen=True)
class GridVectors:
    """Summed gradients of one sample over a grid.

    The rows of ``vectors`` are, family by family: one per phase, then half A, then (family timestep) half B; the halves
    are missing where there is no even number of draws.
    """

    vectors: Float[Tensor, "vector param"]
    norms: Float64[ndarray, " timestep"]
    """Length of the gradient, averaged over the draws, at each timestep of the grid."""


@dataclass(frozen=True)
class GridRows:
    """Projected gradients of samples at each timestep of a grid, averaged over the draws."""

    rows: Float[Tensor, "sample timestep part width"]
    """In one part, or in two halves of the draws whose sum is the average over all of them."""
    norms: Float64[ndarray, "sample timestep length"]
    """Exact lengths of the gradients that were projected: of the average, then of each part."""


_Points = tuple[ndarray, ndarray, Float64[Tensor, "point length"], Float[Tensor, "part param"]]
"""Of some points of a grid: sample, number of the timestep, lengths of average and parts, gradients of the parts."""


def num_vectors(family: Family, phases: int, halves: bool) -> int:
    """Count the rows that a family takes in :class:`GridVectors`."""
    return phases + halves * (1 if family == "none" else 2)


class GradientSource:
    """A model at one checkpoint, from which gradients are taken.

    Args:
        model: The network, in evaluation mode, on its device and in its type.
        process: The noising process.
        loss: Loss whose gradient is taken.
        batch_size: Events in one forward and backward pass.
        label: Name of the checkpoint, for messages.
        patterns: Which parameters, by shell-style patterns over their names.
        memory_gib: Bound on the whole gradients that are held at once in the making of sums.
    """

    def __init__(
        self,
        model: Any,
        process: NoiseProcess,
        loss: LossName,
        batch_size: int,
        label: str,
        *,
        patterns: Sequence[str] = ("*",),
        memory_gib: float = 4.0,
    ):
        self.model = model
        self.process = process
        self.loss: LossName = loss
        self.batch_size = batch_size
        self.label = label
        self.memory_bytes = memory_gib * 2**30
        self.capture = Capture(model, patterns)
        self.layout = Layout.of(self.capture.parameters)
        parameter = next(iter(self.capture.parameters.values()))
        self.dtype, self.device = parameter.dtype, parameter.device

    def dots(
        self, table: EventTable, images: ImageData, vectors: Float[Tensor, "vector param"], update: Callable[[int], Any]
    ) -> tuple[Float64[ndarray, "event vector"], Float64[ndarray, " event"]]:
        """Multiply each event's gradient with fixed vectors.

        Args:
            table: Events; each is a unit.
            images: The images that they point into.
            vectors: What to multiply with; no rows if only norms are wanted.
            update: Called with the number of events done.

        Returns:
            Inner products, and the gradients' lengths.

        Raises:
            NumericsError: If a gradient is not finite.
        """
        dots = np.empty((len(table), len(vectors)))
        norms = np.empty(len(table))
        for start in range(0, len(table), self.batch_size):
            events = table.take(slice(start, start + self.batch_size))
            sink = DotSink(self.layout, vectors, len(events))
            self._backward(events, images, len(events), 1.0, [sink])
            norms[start : start + len(events)] = sink.norm_squared.sqrt().cpu().numpy()
            dots[start : start + len(events)] = sink.dots.double().cpu().numpy()
            self._check_finite(norms[start : start + len(events)], events, images)
            update(len(events))
        return dots, norms

    def grid_vectors(
        self,
        images: ImageData,
        rows: Sequence[int],
        side: Literal["train", "query"],
        grid: Grid,
        families: Sequence[Family],
        *,
        phases: int,
        halves: bool,
        seed: int,
        update: Callable[[int], Any],
    ) -> list[GridVectors]:
        """Sum the gradients of samples over a grid of timesteps and draws.

        Args:
            images: Where the samples are.
            rows: Which samples.
            side: Whose noise is drawn.
            grid: Timesteps and draws.
            families: Which sums.
            phases: Bins of timesteps that are kept apart.
            halves: Also keep sums over half of the draws; their number must be even.
            seed: Seed of the noise.
            update: Called with the number of events done.

        Returns:
            One per sample.

        Raises:
            ConfigError: If the draws at one timestep do not fit into a batch.
            NumericsError: If a gradient is not finite.
        """
        num_rows = sum(num_vectors(family, phases, halves) for family in families)
        sums = torch.zeros(len(rows), num_rows, self.layout.num_params, dtype=self.dtype, device=self.device)
        norms = np.empty((len(rows), grid.timesteps))
        parts = 2 if halves else 1
        for samples, steps, lengths, gradients in self._grid_points(images, rows, side, grid, parts, seed, update):
            norms[samples, steps] = lengths[:, 0].cpu().numpy()
            for sample in np.unique(samples):
                first, after = np.searchsorted(samples, [sample, sample + 1])
                phase_of_point = torch.from_numpy(steps[first:after] * phases // grid.timesteps)
                factors = _coefficients(lengths[first:after], phase_of_point, families, phases, halves) / grid.timesteps
                sums[sample].addmm_(factors.flatten(1).to(sums), gradients[first * parts : after * parts])
        return [GridVectors(vectors, norm) for vectors, norm in zip(sums, norms, strict=True)]

    def rows(
        self,
        table: EventTable,
        images: ImageData,
        projection: AbstractProjection,
        update: Callable[[int], Any],
        *,
        with_norms: bool = True,
    ) -> tuple[Float[Tensor, "event width"], Float64[ndarray, " event"]]:
        """Project each event's gradient.

        Args:
            table: Events; each is a unit.
            images: The images that they point into.
            projection: What to project with; made for this source's parameters.
            update: Called with the number of events done.
            with_norms: Also give exact lengths; without, they are those of the projected gradients.

        Returns:
            Projected gradients, not divided by their lengths; and the gradients' lengths.

        Raises:
            NumericsError: If a gradient is not finite.
        """
        rows = torch.empty(len(table), projection.width, dtype=self.dtype, device=self.device)
        norms = np.empty(len(table))
        for start in range(0, len(table), self.batch_size):
            events = table.take(slice(start, start + self.batch_size))
            here = slice(start, start + len(events))
            sink = ProjectSink(projection, rows[here], with_norms=with_norms)
            self._backward(events, images, len(events), 1.0, [sink])
            norm_squared = sink.norm_squared if with_norms else squared_lengths(rows[here])
            norms[here] = norm_squared.sqrt().cpu().numpy()
            self._check_finite(norms[here], events, images)
            update(len(events))
        return rows, norms

    def grid_rows(
        self,
        images: ImageData,
        rows: Sequence[int],
        side: Literal["train", "query"],
        grid: Grid,
        projection: AbstractProjection,
        *,
        halves: bool,
        seed: int,
        update: Callable[[int], Any],
    ) -> GridRows:
        """Project the gradients of samples at each timestep of a grid, averaged over the draws.

        Args:
            images: Where the samples are.
            rows: Which samples.
            side: Whose noise is drawn.
            grid: Timesteps and draws.
            projection: What to project with; made for this source's parameters.
            halves: Keep two halves of the draws apart; their number must be even.
            seed: Seed of the noise.
            update: Called with the number of events done.

        Returns:
            Projected gradients with exact lengths.

        Raises:
            ConfigError: If the draws at one timestep do not fit into a batch.
            NumericsError: If a gradient is not finite.
        """
        parts = 2 if halves else 1
        shape = (len(rows), grid.timesteps, parts)
        projected = torch.zeros(*shape, projection.width, dtype=self.dtype, device=self.device)
        norms = np.empty((len(rows), grid.timesteps, 1 + parts))
        for samples, steps, lengths, gradients in self._grid_points(images, rows, side, grid, parts, seed, update):
            norms[samples, steps] = lengths.cpu().numpy()
            found = torch.zeros(len(gradients), projection.width, dtype=self.dtype, device=self.device)
            for name, span in self.layout.spans.items():
                projection.add(found, name, gradients[:, span].view(-1, *self.capture.parameters[name].shape))
            projected[samples, steps] = found.unflatten(0, (-1, parts))
        return GridRows(projected, norms)

    def _grid_points(
        self,
        images: ImageData,
        rows: Sequence[int],
        side: Literal["train", "query"],
        grid: Grid,
        parts: int,
        seed: int,
        update: Callable[[int], Any],
    ) -> Iterator[_Points]:
        """Take the gradients at the points of a grid, as many at once as fit into a batch and into memory.

        A point is a sample at a timestep; its draws are averaged, in one or two parts whose sum is the average.

        Yields:
            See ``_Points``; what is given is overwritten by the next.

        Raises:
            ConfigError: If the draws at one timestep do not fit into a batch.
        """
        if grid.draws > self.batch_size:
            raise ConfigError(
                f"All draws of a timestep go through the network at once, so batch_size must be at least {grid.draws}; "
                f"found {self.batch_size}."
            )
        table = grid_events(images, rows, side, grid, self.process.num_timesteps, seed)
        point_bytes = parts * self.layout.num_params * self.dtype.itemsize
        points_per_batch = max(1, min(self.batch_size // grid.draws, int(self.memory_bytes // point_bytes)))
        buffer = torch.empty(points_per_batch * parts, self.layout.num_params, dtype=self.dtype, device=self.device)
        for start in range(0, len(rows) * grid.timesteps, points_per_batch):
            events = table.take(slice(start * grid.draws, (start + points_per_batch) * grid.draws))
            num_points = len(events) // grid.draws
            sink = GatherSink(self.layout, buffer[: num_points * parts], units_per_group=parts)
            self._backward(events, images, num_points * parts, 1.0 / grid.draws, [sink])
            lengths = torch.cat(
                [sink.group_norm_squared[:, None], sink.unit_norm_squared.unflatten(0, (num_points, parts))], dim=1
            ).sqrt()
            self._check_finite(lengths[:, 0].cpu().numpy(), events.take(slice(0, None, grid.draws)), images)
            yield *np.divmod(np.arange(start, start + num_points), grid.timesteps), lengths, sink.rows
            update(len(events))

    def no_vectors(self) -> Float[Tensor, "vector param"]:
        """Give an empty set of vectors for :meth:`dots`, where only lengths are wanted."""
        return torch.empty(0, self.layout.num_params, dtype=self.dtype, device=self.device)

    def check(self, images: ImageData) -> None:
        """Compare per-sample gradients with autograd's on a first small batch (two events of up to four images).

        Args:
            images: Any images that the model takes.

        Raises:
            NumericsError: If a gradient is not finite.
            UnsupportedModelError: If gradients differ.
        """
        rows = list(range(min(4, len(images))))
        table = grid_events(images, rows, "train", Grid(timesteps=2), self.process.num_timesteps, seed=0)
        no_vectors = torch.zeros(0, self.layout.num_params, dtype=self.dtype, device=self.device)
        self.dots(table, images, no_vectors, lambda num_events: None)
        check_against_autograd(
            self.capture,
            lambda some: self._outputs(table.take(some), images),
            num_events=len(table),
            num_units=len(table),
        )

    def _outputs(self, table: EventTable, images: ImageData) -> Float[Tensor, " event"]:
        batch = make_batch(table, images, self.process, dtype=self.dtype, device=self.device)
        prediction = predict(self.model, batch.noisy, batch.timesteps)
        return sample_loss(prediction, batch.target, self.loss) * batch.loss_weight

    def _backward(self, table: EventTable, images: ImageData, num_units: int, factor: float, sinks: list[Any]) -> None:
        self.capture.run(lambda some: self._outputs(table.take(some), images) * factor, len(table), num_units, sinks)

    def _check_finite(self, norms: ndarray, table: EventTable, images: ImageData) -> None:
        bad = np.flatnonzero(~np.isfinite(norms))
        if len(bad):
            row, timestep = table.row[bad[0]], table.timestep[bad[0]]
            raise NumericsError(
                f"The gradient of {images.ids[row]} at timestep {timestep} is not finite at {self.label} ({len(bad)} "
                "such in this batch). Look at the checkpoint's weights, or leave it out."
            )


def _coefficients(
    lengths: Float64[Tensor, "point length"],
    phase_of_point: Tensor,
    families: Sequence[Family],
    phases: int,
    halves: bool,
) -> Float64[Tensor, "vector point part"]:
    """Say how each sum is made of the half-gradients of the points: the table at the top of this module."""
    num_points, parts = len(lengths), 2 if halves else 1
    in_phase = torch.nn.functional.one_hot(phase_of_point, phases).T.to(lengths)  # phase, point
    both = torch.ones(parts, dtype=lengths.dtype, device=lengths.device)
    rows = []
    for family in families:
        # A zero gradient stays a zero row.
        scale = torch.ones_like(lengths) if family == "none" else torch.where(lengths > 0, 1 / lengths, 0.0)
        rows.append((in_phase * scale[:, 0])[:, :, None] * both)
        for half in range(num_vectors(family, phases, halves) - phases):
            only = torch.zeros(1, num_points, parts, dtype=lengths.dtype, device=lengths.device)
            only[0, :, half] = 2.0 if family == "none" else scale[:, 1 + half]
            rows.append(only)
    return torch.cat(rows)
