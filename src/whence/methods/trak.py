"""TRAK and its kin: gradients with the inverse of their second moment between them.

On diffusion models the loss, and other outputs in its place, are averaged over a grid of timesteps.
"""

from dataclasses import replace

from whence.methods.frame import GradientPlan, Grid, Method, RidgeInverse, Trajectory

_GRID, _QUERY_GRID = Grid(timesteps=10, draws=1), Grid(timesteps=10, draws=2)

TRAK = Method(
    name="trak",
    train=GradientPlan(_GRID),
    query=GradientPlan(_QUERY_GRID),
    checkpoints="last",
    weights="equal",
    precondition=RidgeInverse(damping=10.0),
    source="Park et al. 2023, arXiv:2303.14186",
)
"""Ridge regression of the query's mean gradient of the loss on those of all training images.

Gradients of the loss want a hundred times the damping of those of other outputs (docs/design/0020).
"""

JOURNEY_TRAK = replace(
    TRAK,
    name="journey-trak",
    query=GradientPlan(Trajectory(draws=20)),
    source="Georgiev et al. 2023, arXiv:2312.06205",
)
"""TRAK of each step by which the sampler came to the query, rather than of the query itself.

The published score is one for each step: keep as many phases as there are steps. Their mean is the score here.
"""

D_TRAK = replace(
    TRAK,
    name="d-trak",
    train=GradientPlan(_GRID, output="squares"),
    query=GradientPlan(_QUERY_GRID, output="squares"),
    precondition=RidgeInverse(),
    source="Zheng et al. 2024, arXiv:2311.00500",
)
"""TRAK of the mean square of the network's prediction, which is no loss: that its sign is that of influence is found
by experiment."""

DAS = Method(
    name="das",
    train=GradientPlan(_GRID, unit="timestep", output="mean"),
    query=GradientPlan(_QUERY_GRID, unit="timestep", output="mean"),
    checkpoints="last",
    weights="equal",
    precondition=RidgeInverse(),
    after="residual",
    squared=True,
    source="Lin et al. 2025, arXiv:2410.18639",
)
"""Squared change of the mean prediction when a training image is left out, by one Newton step."""

DAS_SIGNED = replace(DAS, name="das-signed", squared=False)
"""DAS before it is squared."""

RELATIF = replace(TRAK, name="relatif", after="theta_relative", source="Barshan et al. 2020, arXiv:2003.11630")
"""TRAK by the change of the weights that the training image makes."""

RELATIF_L = replace(RELATIF, name="relatif-l", after="l_relative")
"""TRAK by the change of the training image's own loss."""

RENORMALISED = replace(TRAK, name="renormalised", after="length", source="Hammoudeh and Lowd 2022, arXiv:2201.10055")
"""TRAK by the length of the training gradient."""
