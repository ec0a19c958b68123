"""What a model gives for queries, on one grid of timesteps and noise that all models share.

    loss             the training loss, mean over the elements of an image, with the weight of its timestep
    mse              mean squared error, whatever the loss
    squares          mean square of the prediction, which D-TRAK attributes
    simplified_elbo  T x mean of weight x mean squared error, in nats an element; see ``bound_weights``
    elbo             the same with the weights of the exact bound

Each is the mean over the grid of a query: timesteps stratified, one drawn in each of as many equal parts of 0..T-1, and
at each as many draws of noise, in pairs of opposite sign. Both are functions of (seed, id), so that the noise of
measuring is the same for all models and cancels where they are compared.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32, Float64, Int64, UInt64
from numpy import ndarray
from torch import Tensor

from whence.config import LossName
from whence.data import ImageData
from whence.diffusion.adapters import predict
from whence.diffusion.noise import noise_key, scalar_draws
from whence.diffusion.objectives import bound_weights, sample_loss, sample_output
from whence.diffusion.process import NoiseProcess
from whence.errors import ConfigError, NumericsError
from whence.event_table import conditions_of, region_of

MEASURES = ("loss", "mse", "squares", "simplified_elbo", "elbo")


@dataclass(frozen=True)
class MeasuringGrid:
    """At which timesteps, with which noise, queries are measured."""

    timesteps: Int64[ndarray, "query timestep"]
    """Ascending."""
    keys: UInt64[ndarray, "query timestep pair"]
    """Each gives a noise, which is taken with both signs."""


@dataclass(frozen=True)
class Measured:
    """What one model gives."""

    outputs: Float64[ndarray, "measure query"]
    timestep_loss: Float32[ndarray, "query timestep"]


def make_grid(ids: Sequence[str], timesteps: int, draws: int, num_timesteps: int, seed: int) -> MeasuringGrid:
    """Draw timesteps and noise keys.

    Args:
        ids: Queries.
        timesteps: How many at each query.
        draws: Noise draws at each timestep.
        num_timesteps: Timesteps T of the noising process.
        seed: Seed of all draws.

    Returns:
        The grid; a query's part of it does not depend on the other queries.

    Raises:
        ConfigError: If there are more timesteps than the process has, or draws are not pairs.
    """
    if not 1 <= timesteps <= num_timesteps:
        raise ConfigError(f"timesteps must be 1 to {num_timesteps}, those of the model; found {timesteps}.")
    if draws < 2 or draws % 2:
        raise ConfigError(f"draws must be even, as noise comes in pairs of opposite sign; found {draws}.")
    keys = np.array(
        [
            [[noise_key(seed, "measure", "query", id_, part, pair) for pair in range(draws // 2)] for part in parts]
            for id_, parts in ((id_, range(timesteps)) for id_ in ids)
        ],
        dtype=np.uint64,
    )
    uniforms = np.array([[scalar_draws(int(key))[0] for key in row] for row in keys[:, :, 0]])
    drawn = ((np.arange(timesteps) + uniforms) * num_timesteps / timesteps).astype(np.int64)
    return MeasuringGrid(np.minimum(drawn, num_timesteps - 1), keys)


def finite_measures(process: NoiseProcess) -> tuple[str, ...]:
    """Name the measures that are finite for a noising process: bounds have weights that may not be."""
    bounds = [name for name in ("simplified_elbo", "elbo") if bound_weights(process, name).isfinite().all()]
    return (*MEASURES[:3], *bounds)


def measure_model(
    model: Any, process: NoiseProcess, queries: ImageData, grid: MeasuringGrid, *, loss: LossName, batch_size: int
) -> Measured:
    """Measure a model.

    Args:
        model: A denoising model in evaluation mode.
        process: The noising process it was trained with.
        queries: The images.
        grid: At which timesteps, with which noise.
        loss: Training loss.
        batch_size: Events in one forward pass.

    Returns:
        The measures of :func:`finite_measures`, and the loss by timestep.

    Raises:
        NumericsError: If an output is not finite; the message names the query and the timestep.
    """
    shape = (*grid.timesteps.shape, 2 * grid.keys.shape[2])
    values = np.empty((3, *shape))
    flat = values.reshape(3, -1)
    with torch.no_grad():
        for events, query, arrays in _batches(queries, process, grid, batch_size):
            timesteps, clean, noise, seen = (array.to(model.device) for array in arrays)
            conditions = conditions_of(queries, query, device=model.device)
            noisy = process.add_noise(clean, seen, timesteps)
            prediction = predict(model, noisy, process.times(timesteps), conditions).double()
            target = process.target(clean, noise, timesteps).double()
            region = region_of(queries, query, dtype=torch.float64, device=model.device)
            weight = process.loss_weight[timesteps.cpu()]
            flat[0, events] = weight * sample_loss(prediction, target, loss, region).cpu()
            flat[1, events] = sample_loss(prediction, target, "mse", region).cpu()
            flat[2, events] = sample_output(prediction, target, "squares", loss, region).cpu()
    bad = np.argwhere(~np.isfinite(values))
    if len(bad):
        _, query, timestep, _ = bad[0]
        raise NumericsError(
            f"The output for query {queries.ids[query]} at timestep {grid.timesteps[query, timestep]} is not finite: "
            "training has diverged, or the image is not what the model takes."
        )
    loss_of, mse, squares = values.mean(axis=3)  # each (query, timestep)
    weights = [bound_weights(process, name).numpy() for name in ("simplified_elbo", "elbo")]
    bounds = [process.num_timesteps * w[grid.timesteps] * mse for w in weights if np.isfinite(w).all()]
    outputs = np.stack([part.mean(axis=1) for part in (loss_of, mse, squares, *bounds)])
    return Measured(outputs, loss_of.astype(np.float32))


def _batches(
    queries: ImageData, process: NoiseProcess, grid: MeasuringGrid, batch_size: int
) -> Iterator[tuple[slice, ndarray, list[Tensor]]]:
    """Give the events by query, timestep, pair and sign.

    Yields:
        Their places and queries; and timesteps, clean images, noise, and what the noisy image is made of.
    """
    num_queries, num_timesteps, num_pairs = grid.keys.shape
    num_events = num_queries * num_timesteps * num_pairs * 2
    for start in range(0, num_events, batch_size):
        places = np.arange(start, min(start + batch_size, num_events))
        query, timestep, pair, sign = np.unravel_index(places, (num_queries, num_timesteps, num_pairs, 2))
        rows, which = np.unique(query, return_inverse=True)
        clean = queries.inputs(rows)[which]
        drawn, of_event = np.unique(np.stack([query, timestep, pair]), axis=1, return_inverse=True)
        signs = np.where(sign, -1, 1).astype(np.float32)[:, None, None, None]
        noise, seen = (n[of_event.ravel()] * signs for n in process.noise(grid.keys[tuple(drawn)], clean.shape[1:]))
        arrays = (grid.timesteps[query, timestep], clean, noise, seen)
        yield slice(start, start + len(places)), query, [torch.from_numpy(array) for array in arrays]
