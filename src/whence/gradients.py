"""Gradients of samples at one checkpoint: sums over a grid, inner products with fixed vectors, and projected rows.

The query side of a streaming trace needs whole gradients, summed over a grid of timesteps as ``whence.grid_sums`` says;
the training side streams, layer by layer, through inner products with them. Both take the gradient of all draws at one
timestep as one unit.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Float64
from numpy import ndarray
from torch import Tensor, nn

from whence._allocator import keep_freed_memory
from whence.config import AutocastName, LossName, OutputName
from whence.data import ImageData
from whence.diffusion.adapters import predict
from whence.diffusion.noise import normals_of_keys
from whence.diffusion.objectives import sample_loss, sample_output
from whence.diffusion.process import NoiseProcess
from whence.engine._lengths import squared_lengths
from whence.engine.capture import AbstractSink, Capture, Uncovered
from whence.engine.check import check_against_autograd
from whence.engine.sinks import DotSink, GatherSink, Layout, ProjectSink
from whence.errors import ConfigError, NumericsError
from whence.event_table import EventBatch, EventTable, grid_events, make_batch, sample_events
from whence.grid_sums import Family, GridRows, GridVectors, num_vectors, points_at_once, sum_coefficients
from whence.methods.frame import Grid, Trajectory
from whence.precision import autocast, output_scale, tensor_float_32
from whence.projections import AbstractProjection

_Points = tuple[ndarray, ndarray, Float64[Tensor, "point length"], Float[Tensor, "part param"]]
"""Of some points of a grid: sample, number of the timestep, lengths of average and parts, gradients of the parts."""


class GradientSource:
    """A model at one checkpoint, from which gradients are taken.

    Args:
        model: The network, in evaluation mode, on its device and in its type.
        process: The noising process.
        loss: Loss whose gradient is taken.
        batch_size: Events in one forward and backward pass.
        label: Name of the checkpoint, for messages.
        patterns: Which parameters, by shell-style patterns over their names.
        uncovered: What is done with parameters that belong to no layer that can be captured.
        autocast: Type of the forward pass, where it is coarser than that of the parameters.
        tf32: Let CUDA multiply with the digits of TensorFloat32.
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
        uncovered: Uncovered = "exact",
        autocast: AutocastName = "no",
        tf32: bool = False,
    ):
        self.model = model
        self.process = process
        self.loss: LossName = loss
        self.output: OutputName = "loss"
        self.batch_size = batch_size
        self.label = label
        self.autocast: AutocastName = autocast
        self.tf32 = tf32
        self.capture = Capture(model, patterns, uncovered)
        self.layout = Layout.of(self.capture.parameters)
        parameter = next(iter(self.capture.parameters.values()))
        self.dtype, self.device = parameter.dtype, parameter.device
        if self.device.type == "cpu":
            keep_freed_memory()

    def of(self, output: OutputName) -> "GradientSource":
        """Give the same model with another output function; nothing is copied."""
        other = copy(self)
        other.output = output
        return other

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
            scale = self._backward(events, images, len(events), 1.0, [sink])
            norms[start : start + len(events)] = (sink.norm_squared.sqrt() / scale).cpu().numpy()
            dots[start : start + len(events)] = (sink.dots.double() / scale).cpu().numpy()
            self.check_finite(norms[start : start + len(events)], events, images)
            update(len(events))
        return dots, norms

    def grid_vectors(
        self,
        images: ImageData,
        rows: Sequence[int],
        side: Literal["train", "query"],
        grid: Grid | Trajectory,
        families: Sequence[Family],
        *,
        phases: int,
        halves: bool,
        seed: int,
        update: Callable[[int], Any],
        out: Float[Tensor, "sample vector param"] | None = None,
        points: range | None = None,
    ) -> list[GridVectors]:
        """Sum the gradients of samples over a grid of timesteps and draws.

        Args:
            images: Where the samples are.
            rows: Which samples.
            side: Whose noise is drawn.
            grid: Timesteps, or steps of the samples' trajectories, and draws.
            families: Which sums.
            phases: Bins of timesteps that are kept apart.
            halves: Also keep sums over half of the draws; their number must be even.
            seed: Seed of the noise.
            update: Called with the number of events done.
            out: Where the sums go, if not into memory of their own; what was there is lost.
            points: Sum over these timesteps of the grid alone, by their number, as if there were no others; None: all.

        Returns:
            One per sample.

        Raises:
            ConfigError: If the draws at one timestep do not fit into a batch.
            NumericsError: If a gradient is not finite.
        """
        num_rows = sum(num_vectors(family, phases, halves) for family in families)
        shape = (len(rows), num_rows, self.layout.num_params)
        sums = torch.empty(shape, dtype=self.dtype, device=self.device) if out is None else out
        begun: set[int] = set()
        points = range(grid.timesteps) if points is None else points
        norms = np.empty((len(rows), len(points)))
        parts = 2 if halves else 1
        for samples, steps, lengths, gradients in self._grid_points(
            images, rows, side, grid, parts, seed, update, points
        ):
            norms[samples, steps] = lengths[:, 0].cpu().numpy()
            for sample in np.unique(samples):
                first, after = np.searchsorted(samples, [sample, sample + 1])
                phase_of_point = torch.from_numpy(steps[first:after] * phases // len(points))
                factors = sum_coefficients(lengths[first:after], phase_of_point, families, phases, halves) / len(points)
                # What was there is written over by the first, not read.
                beta = int(sample in begun)
                sums[sample].addmm_(factors.flatten(1).to(sums), gradients[first * parts : after * parts], beta=beta)
                begun.add(sample)
        for sample in set(range(len(rows))) - begun:
            sums[sample] = 0
        return [GridVectors(vectors, norm) for vectors, norm in zip(sums, norms, strict=True)]

    def rows(
        self,
        table: EventTable,
        images: ImageData,
        projection: AbstractProjection,
        update: Callable[[int], Any],
        *,
        with_norms: bool = True,
        events_per_unit: int = 1,
        errors: Float64[ndarray, " unit"] | None = None,
    ) -> tuple[Float[Tensor, "unit width"], Float64[ndarray, " unit"]]:
        """Project the gradients of events, one by one or averaged.

        Args:
            table: Events.
            images: The images that they point into.
            projection: What to project with; made for this source's parameters.
            update: Called with the number of events done.
            with_norms: Also give exact lengths; without, they are those of the projected gradients.
            events_per_unit: So many consecutive events are averaged to one unit, such as the draws of one timestep.
            errors: Where the root mean square errors of the units' predictions go, if they are wanted.

        Returns:
            Projected gradients, not divided by their lengths; and the gradients' lengths.

        Raises:
            ConfigError: If the events of a unit do not fit into a batch.
            NumericsError: If a gradient is not finite.
        """
        self._check_batch_holds(events_per_unit)
        num_units, units_per_batch = len(table) // events_per_unit, self.batch_size // events_per_unit
        rows = torch.empty(num_units, projection.width, dtype=self.dtype, device=self.device)
        norms = np.empty(num_units)
        for start in range(0, num_units, units_per_batch):
            here = slice(start, min(start + units_per_batch, num_units))
            events = table.take(slice(start * events_per_unit, here.stop * events_per_unit))
            sink = ProjectSink(projection, rows[here], with_norms=with_norms)
            squares = torch.zeros(len(events), dtype=self.dtype, device=self.device)
            scale = self._backward(events, images, here.stop - start, 1.0 / events_per_unit, [sink], squares)
            if errors is not None:
                errors[here] = squares.unflatten(0, (-1, events_per_unit)).mean(1).sqrt().cpu().numpy()
            norm_squared = sink.norm_squared if with_norms else squared_lengths(rows[here])
            norms[here] = (norm_squared.sqrt() / scale).cpu().numpy()
            rows[here] /= scale
            self.check_finite(norms[here], events.take(slice(0, None, events_per_unit)), images)
            update(len(events))
        return rows, norms

    def grid_rows(
        self,
        images: ImageData,
        rows: Sequence[int],
        side: Literal["train", "query"],
        grid: Grid | Trajectory,
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
            grid: Timesteps, or steps of the samples' trajectories, and draws.
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
        for samples, steps, lengths, gradients in self._grid_points(
            images, rows, side, grid, parts, seed, update, range(grid.timesteps)
        ):
            norms[samples, steps] = lengths.cpu().numpy()
            projected[samples, steps] = self.project(projection, gradients).unflatten(0, (-1, parts))
        return GridRows(projected, norms)

    def project(
        self, projection: AbstractProjection, gradients: Float[Tensor, "unit param"]
    ) -> Float[Tensor, "unit width"]:
        """Project whole gradients, laid out as :attr:`layout` says."""
        rows = torch.zeros(len(gradients), projection.width, dtype=self.dtype, device=self.device)
        for name, span in self.layout.spans.items():
            projection.add(rows, name, gradients[:, span].view(-1, *self.capture.parameters[name].shape))
        return rows

    def _grid_points(
        self,
        images: ImageData,
        rows: Sequence[int],
        side: Literal["train", "query"],
        grid: Grid | Trajectory,
        parts: int,
        seed: int,
        update: Callable[[int], Any],
        points: range,
    ) -> Iterator[_Points]:
        """Take the gradients at the points of a grid, as many at once as fit into a batch and into memory.

        A point is a sample at a timestep; its draws are averaged, in one or two parts whose sum is the average.

        Yields:
            See ``_Points``; what is given is overwritten by the next.

        Raises:
            ConfigError: If the draws at one timestep do not fit into a batch.
        """
        self._check_batch_holds(grid.draws)
        images, table = sample_events(images, rows, side, grid, self.process.num_timesteps, seed, points)
        points_per_batch = points_at_once(self.batch_size, grid, parts * self.gradient_bytes)
        buffer = torch.empty(points_per_batch * parts, self.layout.num_params, dtype=self.dtype, device=self.device)
        for start in range(0, len(rows) * len(points), points_per_batch):
            events = table.take(slice(start * grid.draws, (start + points_per_batch) * grid.draws))
            num_points = len(events) // grid.draws
            sink = GatherSink(self.layout, buffer[: num_points * parts], units_per_group=parts)
            scale = self._backward(events, images, num_points * parts, 1.0 / grid.draws, [sink])
            of_parts = sink.unit_norm_squared.unflatten(0, (num_points, parts))
            of_average = of_parts if parts == 1 else sink.group_norm_squared[:, None]
            lengths = torch.cat([of_average, of_parts], dim=1).sqrt() / scale
            if scale != 1:
                sink.rows /= scale
            self.check_finite(lengths[:, 0].cpu().numpy(), events.take(slice(0, None, grid.draws)), images)
            yield *np.divmod(np.arange(start, start + num_points), len(points)), lengths, sink.rows
            update(len(events))

    def _check_batch_holds(self, num_draws: int) -> None:
        if num_draws > self.batch_size:
            raise ConfigError(
                f"All draws of a timestep go through the network at once, so batch_size must be at least {num_draws}; "
                f"found {self.batch_size}."
            )

    @torch.no_grad()
    def rank_one_parameters(self, images: ImageData) -> list[str]:
        """Find the weights whose gradient has rank one for each event: those of linear layers fed one position.

        Such are the layers on the time embedding. It is a property of the model, found by running it on one image.

        Args:
            images: Any images that the model takes.

        Returns:
            Names of parameters that gradients are taken of, sorted.
        """
        found: set[str] = set()

        def note(name: str, inputs: tuple[Tensor, ...]) -> None:
            if inputs[0].ndim == 2:
                found.add(f"{name}.weight")

        hooks = [
            module.register_forward_pre_hook(lambda _, inputs, name=name: note(str(name), inputs))
            for name, module in self.model.named_modules()
            if isinstance(module, nn.Linear)
        ]
        try:
            self._outputs(grid_events(images, [0], "train", Grid(1), self.process.num_timesteps, seed=0), images)
        finally:
            for hook in hooks:
                hook.remove()
        return sorted(self.capture.parameters.keys() & found)

    @property
    def gradient_bytes(self) -> int:
        """Bytes of one whole gradient."""
        return self.layout.num_params * self.dtype.itemsize

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
        self.dots(table, images, self.no_vectors(), lambda num_events: None)
        scale = self.output_scale(images)
        with tensor_float_32(self.tf32):
            check_against_autograd(
                self.capture,
                lambda some: self._outputs(table.take(some), images) * scale,
                num_events=len(table),
                num_units=len(table),
            )

    def _outputs(
        self, table: EventTable, images: ImageData, squares: Float[Tensor, " event"] | None = None
    ) -> Float[Tensor, " event"]:
        """Give the outputs of events, and put mean squared errors into ``squares``."""
        batch = make_batch(table, images, self.process, dtype=self.dtype, device=self.device)
        prediction = self._predict(batch)
        if squares is not None:
            squares.copy_(sample_loss(prediction.detach(), batch.target, "mse", batch.region))
        values = sample_output(prediction, batch.target, self.output, self.loss, batch.region)
        return values * batch.loss_weight if self.output == "loss" else values

    def _predict(self, batch: EventBatch) -> Float[Tensor, "event *shape"]:
        with autocast(self.autocast, self.device):
            prediction = predict(self.model, batch.noisy, batch.times, batch.conditions)
        return prediction.to(self.dtype)

    def output_scale(self, images: ImageData) -> float:
        """Give what outputs are multiplied with before the backward pass, which autocast may ask for."""
        return output_scale(self.autocast, math.prod(images.input_shape))

    def _backward(
        self,
        table: EventTable,
        images: ImageData,
        num_units: int,
        factor: float,
        sinks: list[Any],
        squares: Float[Tensor, " event"] | None = None,
    ) -> float:
        """Fill the sinks; what is in them then is to be divided by the number that is returned."""
        scale = self.output_scale(images)

        def outputs(some: slice) -> Float[Tensor, " event"]:
            of_these = None if squares is None else squares[some]
            return self._outputs(table.take(some), images, of_these) * (factor * scale)

        with tensor_float_32(self.tf32):
            self.capture.run(outputs, len(table), num_units, sinks)
        return scale

    def sampled_gradients(
        self, table: EventTable, images: ImageData, sinks: list[AbstractSink], update: Callable[[int], Any]
    ) -> None:
        """Fill sinks with the gradients of sampled residuals, whose second moment is the Gauss-Newton matrix.

        That of the mean squared error, J^T (2/d) J for a prediction of d numbers: the residual of each event is drawn
        anew, from a normal distribution.

        Args:
            table: Events; each is a unit.
            images: The images that they point into.
            sinks: What is wanted.
            update: Called with the number of events done.
        """
        for start in range(0, len(table), self.batch_size):
            events = table.take(slice(start, start + self.batch_size))
            batch = make_batch(events, images, self.process, dtype=self.dtype, device=self.device)
            # Not the noise of the image: all bits of its key are turned.
            drawn = torch.from_numpy(normals_of_keys(~events.noise_key, tuple(batch.target.shape[1:])))
            residual = drawn.to(batch.target) * (2 / batch.target[0].numel()) ** 0.5

            def outputs(
                some: slice, batch: EventBatch = batch, residual: Float[Tensor, "event *shape"] = residual
            ) -> Float[Tensor, " event"]:
                return (self._predict(batch.take(some)) * residual[some]).flatten(1).sum(1)

            with tensor_float_32(self.tf32):
                self.capture.run(outputs, len(events), len(events), sinks)
            update(len(events))

    def unit_gradients(
        self,
        table: EventTable,
        images: ImageData,
        events_per_unit: int,
        sinks: list[AbstractSink],
        update: Callable[[int], Any],
    ) -> float:
        """Fill sinks with the gradients of units, each the mean over so many consecutive events.

        Args:
            table: Events.
            images: The images that they point into.
            events_per_unit: Such as all of a sample.
            sinks: What is wanted; they see batch after batch.
            update: Called with the number of events done.

        Returns:
            What the gradients in the sinks were multiplied with.

        Raises:
            ConfigError: If the events of a unit do not fit into a batch.
        """
        self._check_batch_holds(events_per_unit)
        events_per_batch = self.batch_size // events_per_unit * events_per_unit
        for start in range(0, len(table), events_per_batch):
            events = table.take(slice(start, start + events_per_batch))
            self._backward(events, images, len(events) // events_per_unit, 1.0 / events_per_unit, sinks)
            update(len(events))
        return self.output_scale(images)

    def check_finite(self, norms: ndarray, table: EventTable, images: ImageData) -> None:
        """Refuse gradients that are not finite.

        Args:
            norms: Their lengths.
            table: An event of each.
            images: The images that they point into.

        Raises:
            NumericsError: The message names a sample, its timestep and the checkpoint.
        """
        bad = np.flatnonzero(~np.isfinite(norms))
        if len(bad):
            row, timestep = table.row[bad[0]], table.timestep[bad[0]]
            narrow = " It may be too large for float16; try autocast bf16." if self.autocast == "fp16" else ""
            raise NumericsError(
                f"The gradient of {images.ids[row]} at timestep {timestep} is not finite at {self.label} ({len(bad)} "
                f"such in this batch). Look at the checkpoint's weights, or leave it out.{narrow}"
            )
