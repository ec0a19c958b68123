"""The frame in which every method is declared: which gradients, of what, at which events, with which weights.

    score(i, q) = sum_c < psi_q^c , sum_{e in E(i,c)} w_e u(g_{i,e}^c) >

``g`` are gradients of an output function at checkpoint c, ``E`` the events of training sample i, ``u`` a normalisation
and ``psi`` the query's sum likewise. A method is data: it touches no model and draws no noise.
"""

from dataclasses import dataclass
from typing import Literal

Unit = Literal["none", "event", "timestep", "sample"]
"""What is brought to length 1: nothing, each event, the mean over draws at each timestep, or the sample's sum."""

WeightsRule = Literal["learning_rate", "equal", "published"]
"""How events are weighted.

learning_rate: learning rate x clip coefficient / samples in the optimizer step, from the record. Of a replay, summed
over the visits that an event stands for; of a grid, the mean over all samples. equal: 1. published: learning rate x
batch size x epochs since the previous checkpoint / size of the training set in whole batches, as in the code of the
TracIn paper for diffusion.
"""


ReplayedVisits = Literal["last", "all"]


@dataclass(frozen=True)
class Replay:
    """The visits of training itself, in (previous checkpoint, this one], with the noise they had."""

    visits: ReplayedVisits = "last"
    """``last``: the last visit carries the whole weight of the interval. ``all``: every visit, each with its own."""


@dataclass(frozen=True)
class Grid:
    """Timesteps spread evenly over 1..T-1, each with fresh draws of noise."""

    timesteps: int
    draws: int = 1


@dataclass(frozen=True)
class GradientPlan:
    """Which gradients stand for a sample."""

    events: Replay | Grid
    unit: Unit = "none"
    output: Literal["loss"] = "loss"
    """Output function whose gradient is taken: the training loss, with the model's own weighting."""


@dataclass(frozen=True)
class Method:
    """One way to score. Positive scores: training on the sample lowers the query's output."""

    name: str
    train: GradientPlan
    query: GradientPlan
    checkpoints: Literal["all", "last"] = "all"
    weights: WeightsRule = "learning_rate"
    source: str = ""
    """Where the method was published."""


@dataclass(frozen=True)
class Baseline:
    """A way to score that needs no model."""

    name: str
    kind: Literal["pixels", "random"]
    source: str = ""
