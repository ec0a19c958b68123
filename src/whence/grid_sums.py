"""Sums of gradients over a grid of timesteps and draws: which there are, and how each is made of its points.

The gradient of all draws at one timestep is one unit, taken in two halves (A and B) where there is an even number of
draws, so that reliability can be computed under every normalisation::

    family none       sum over t of (A + B) / T             by phase, and of 2A / T  (half B follows from these)
    family timestep   sum over t of (A + B) / (T |A + B|)   by phase, and of A / (T |A|) and B / (T |B|)

with A and B the sums over half of the draws, divided by the number of all draws.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Float64
from numpy import ndarray
from torch import Tensor

from whence.methods.frame import Grid, Trajectory

Family = Literal["none", "timestep"]

GATHER_BYTES = 4 * 2**30
"""Whole gradients that are held at once in the making of sums, at most; one point of a grid in any case."""


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


def num_vectors(family: Family, phases: int, halves: bool) -> int:
    """Count the rows that a family takes in :class:`GridVectors`."""
    return phases + halves * (1 if family == "none" else 2)


def points_at_once(batch_size: int, grid: Grid | Trajectory, point_bytes: int) -> int:
    """Count the points of a grid whose draws fit into a batch, and whose gradients into ``GATHER_BYTES``."""
    return max(1, min(batch_size // grid.draws, GATHER_BYTES // point_bytes))


def sum_coefficients(
    lengths: Float64[Tensor, "point length"],
    phase_of_point: Tensor,
    families: Sequence[Family],
    phases: int,
    halves: bool,
) -> Float64[Tensor, "vector point part"]:
    """Say how each sum is made of the half-gradients of the points: the table at the top of this module.

    Args:
        lengths: Of the average over the draws, then of each part.
        phase_of_point: Bin of timesteps of each point.
        families: Which sums.
        phases: Bins of timesteps.
        halves: Whether there are two parts.

    Returns:
        What each part counts in each sum, but for the division by the number of timesteps.
    """
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
