"""The frame in which every method is declared: which gradients, of what, at which events, with which weights.

    score(i, q) = sum_c a_i^c < psi_q^c , M_c sum_{e in E(i,c)} w_e u(g_{i,e}^c) >

``g`` are gradients of an output function at checkpoint c, ``E`` the events of training sample i, ``u`` a normalisation,
``psi`` the query's sum likewise, ``M`` a preconditioner and ``a`` what comes after. A method is data: it touches no
model and draws no noise.
"""

from dataclasses import dataclass
from typing import Literal

from whence.config import OutputName

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
    output: OutputName = "loss"
    """Output function whose gradient is taken: the training loss, with the model's own weighting, or a function of the
    network's prediction alone."""


After = Literal["none", "length", "theta_relative", "l_relative", "residual"]
"""What a training sample's score is multiplied with at last, phi being its gradient and M the preconditioner.

length: one over the length of phi. theta_relative: one over the length of M phi. l_relative: 1 / sqrt(<phi, M phi>);
both are RelatIF (Barshan et al. 2020, arXiv:2003.11630). residual: e / (1 - <phi, M phi>), e being the root mean square
error of the prediction (DAS).
"""


@dataclass(frozen=True)
class RidgeInverse:
    """The preconditioner (Phi^T Phi + d I)^-1 of all training gradients Phi of a checkpoint, as they are projected."""

    damping: float | None = None
    """d in multiples of the mean eigenvalue. None: chosen by generalised cross-validation over training gradients."""


@dataclass(frozen=True)
class KroneckerInverse:
    """The damped inverse of the Gauss-Newton matrix of the mean squared error, by Kronecker factors of each layer."""

    kind: Literal["kfac", "ekfac"] = "ekfac"
    sharing: Literal["expand", "reduce"] = "expand"
    """How positions of a layer enter (Eschenhagen et al. 2023, arXiv:2311.00636)."""
    events: Grid = Grid(timesteps=10)
    """At which events of all training images the matrix is taken."""
    damping: float = 0.1
    """In multiples of the mean eigenvalue of each layer."""


@dataclass(frozen=True)
class AdamInverse:
    """What Adam divides each gradient by: sqrt(v) + eps, v being its running mean square, corrected for its start."""

    eps: float = 1e-8


BeforeProjection = KroneckerInverse | AdamInverse
"""Preconditioners of whole gradients: they do not commute with a projection."""


@dataclass(frozen=True)
class Method:
    """One way to score. Positive scores: training on the sample lowers the query's output."""

    name: str
    train: GradientPlan
    query: GradientPlan
    checkpoints: Literal["all", "last"] = "all"
    weights: WeightsRule = "learning_rate"
    precondition: RidgeInverse | BeforeProjection | None = None
    """What stands between both gradients; it is applied to the query's."""
    after: After = "none"
    squared: bool = False
    """Square the scores at last, which takes their sign."""
    source: str = ""
    """Where the method was published."""

    @property
    def is_damped(self) -> bool:
        """Whether it has a damping."""
        return isinstance(self.precondition, RidgeInverse | KroneckerInverse)

    @property
    def needs_rows(self) -> bool:
        """Whether the gradients of all training samples are needed before the first score."""
        return isinstance(self.precondition, RidgeInverse) or self.after != "none" or self.squared


@dataclass(frozen=True)
class Baseline:
    """A way to score that needs no model."""

    name: str
    kind: Literal["pixels", "random"]
    source: str = ""


@dataclass(frozen=True)
class RetrainingMethod:
    """A way to score from the outputs of models that were trained on subsets, without a gradient."""

    name: str
    kind: Literal["difference", "ridge"]
    """difference: mean output of the models without a sample less that of the models with it. ridge: minus the
    coefficients of a ridge regression of the output on who was in the subset."""
    penalties: tuple[float, ...] = ()
    """Penalties of the regression, in multiples of the mean eigenvalue of the masks' Gram matrix; of each query the one
    with the least error in cross-validation over the subsets."""
    folds: int = 5
    """Parts of that cross-validation."""
    source: str = ""
