"""The frame in which every method is declared: which gradients, of what, at which events, with which weights.

    score(i, q) = sum_c a_i^c < psi_q^c , M_c sum_{e in E(i,c)} w_e u(g_{i,e}^c) >

``g`` are gradients of an output function at checkpoint c, ``E`` the events of training sample i, ``u`` a normalisation,
``psi`` the query's sum likewise, ``M`` a preconditioner and ``a`` what comes after. Where both sides meet timestep by
timestep, ``psi`` is the query's gradient at the timestep of ``e``, and not a sum. A method is data: it touches no
model and draws no noise.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

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

    @property
    def has_halves(self) -> bool:
        """Whether the draws at a timestep fall into two independent halves."""
        return self.draws % 2 == 0


@dataclass(frozen=True)
class AntitheticGrid(Grid):
    """The same timesteps, with draws in pairs of opposite noise: e, then -e. Queries only; draws must be even.

    What of a gradient is odd in the noise cancels in each pair, so that fewer draws come as near to their mean. A pair
    lies in one half, so only a multiple of 4 draws has two halves, and a reliability.
    """

    @property
    def has_halves(self) -> bool:
        """Whether the pairs at a timestep fall into two independent halves."""
        return self.draws % 4 == 0


@dataclass(frozen=True)
class Trajectory:
    """The steps by which a sampler came to a query: what it took the image to be at each, noised again at its timestep.

    Journey-TRAK (Georgiev et al. 2023, arXiv:2312.06205). Queries only, and only those whose trajectory was kept.
    """

    draws: int = 1
    """Of fresh noise at each step."""
    steps: int = 0
    """How many; a declaration leaves it at 0, and the queries say it."""

    @property
    def has_halves(self) -> bool:
        """Whether the draws at a step fall into two independent halves."""
        return self.draws % 2 == 0

    @property
    def timesteps(self) -> int:
        """As of a grid: each step has one."""
        return self.steps


@dataclass(frozen=True)
class GradientPlan:
    """Which gradients stand for a sample."""

    events: Replay | Grid | Trajectory
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

    damping: float | Literal["gcv"] = 0.1
    """d in multiples of the mean eigenvalue. gcv: chosen by generalised cross-validation over training gradients."""


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


Meet = Literal["sums", "timesteps"]
"""What of both sides is multiplied.

sums: the sums over all events of each side. timesteps: the training gradient at each timestep with the query's at the
same timestep, the products then averaged; a replayed visit has one timestep, and meets the nearest of the query's. No
gradients of different timesteps are compared, and no sum of gradients that disagree gets short.
"""


@dataclass(frozen=True)
class ConjugateGradientInverse:
    """The damped inverse of the whole Gauss-Newton matrix of the mean squared error, by conjugate gradients."""

    events: Grid = Grid(timesteps=10)
    """At which events of the chosen training images the matrix is taken."""
    num_images: int = 256
    """At most so many training images, drawn by the seed."""
    damping: float = 0.1
    """In multiples of the mean eigenvalue."""
    tolerance: float = 1e-4
    """Relative residual at which a solution is good enough."""
    max_iterations: int = 100


@dataclass(frozen=True)
class LissaInverse:
    """The same inverse by LiSSA: a Neumann series, each step with a sample of the events, cut off at a depth."""

    events: Grid = Grid(timesteps=10)
    """At which events of the chosen training images the matrix is taken."""
    num_images: int = 256
    """At most so many training images, drawn by the seed."""
    damping: float = 0.1
    """In multiples of the mean eigenvalue."""
    depth: int = 500
    """Terms of the series."""
    repeats: int = 4
    """Series with other samples, of which the mean is taken."""
    events_per_step: int | None = 64
    """Events in the sample of a step. None: all, so that the series is that of the whole matrix."""
    power_iterations: int = 20
    """Products for the largest eigenvalue, which the scale of the series must exceed; of each repeat's first sample."""


@dataclass(frozen=True)
class DataInfInverse:
    """The mean of the damped inverses of each training gradient's outer product, parameter by parameter (DataInf)."""

    events: Grid = Grid(timesteps=10)
    """At which events the gradient of a training image is taken, as the mean over them; all training images count."""
    damping: float = 0.1
    """In multiples of the mean square of a parameter's gradients."""


IterativeInverse = ConjugateGradientInverse | LissaInverse
"""Inverses that are known by their products alone."""

BeforeProjection = KroneckerInverse | IterativeInverse | DataInfInverse | AdamInverse
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
    meet: Meet = "sums"
    after: After = "none"
    squared: bool = False
    """Square the scores at last, which takes their sign."""
    source: str = ""
    """Where the method was published."""

    @property
    def is_damped(self) -> bool:
        """Whether it has a damping."""
        return self.precondition is not None and not isinstance(self.precondition, AdamInverse)

    @property
    def needs_rows(self) -> bool:
        """Whether the gradients of all training samples are needed before the first score."""
        return isinstance(self.precondition, RidgeInverse) or self.after != "none" or self.squared


BaselineKind = Literal["pixels", "vae", "clip", "embeddings", "random"]
"""What of images a baseline compares: pixels, latents of a VAE, image features of a CLIP model, features of any
encoder; or nothing."""

Product = Literal["cosine", "dot"]


@dataclass(frozen=True)
class Baseline:
    """A way to score that takes no gradients: how alike images are by features of theirs."""

    name: str
    kind: BaselineKind
    product: Product = "cosine"
    """How the features of two images are compared; not at random."""
    encoder: str | Callable[..., Any] | None = None
    """Where features come from, as :mod:`whence.encoders` reads it. None: what the settings say for the kind."""
    source: str = ""

    @property
    def is_encoded(self) -> bool:
        """Whether it needs an encoder."""
        return self.kind not in ("pixels", "random")


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
