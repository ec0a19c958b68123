"""Diffusion-TracIn, Diffusion-ReTrac (Xie, Li, Bai, Hsieh; TMLR 2024; arXiv:2401.09031), and gradient similarity."""

from dataclasses import replace

from whence.methods.frame import AdamInverse, GradientPlan, Grid, Method, Replay

_SOURCE = "Xie et al. 2024, arXiv:2401.09031"
_QUERY_GRID = Grid(timesteps=100, draws=16)

TRACIN = Method(
    name="tracin",
    train=GradientPlan(Replay("last"), unit="none"),
    query=GradientPlan(_QUERY_GRID, unit="none"),
    source=_SOURCE,
)
"""Gradient of the sample as it was trained, with the query's mean gradient."""

RETRAC = Method(
    name="retrac",
    train=GradientPlan(Replay("last"), unit="event"),
    query=GradientPlan(_QUERY_GRID, unit="timestep"),
    source=_SOURCE,
)
"""TracIn with both sides brought to length 1: the sample's gradient, and the query's at each timestep.

The query's normalised gradients are then averaged over timesteps, so a query whose timesteps disagree has smaller
scores: the result is a cosine times the query's coherence.
"""

TRACIN_ADAM = replace(TRACIN, name="tracin-adam", precondition=AdamInverse(), source="TracIn, with Adam's step")
"""TracIn for models that Adam trained: its step divides each gradient by the root of the running mean square."""

RETRAC_ADAM = replace(RETRAC, name="retrac-adam", precondition=AdamInverse(), source="ReTrac, with Adam's step")
"""ReTrac with Adam's scale between the two gradients of length 1."""

GRAD_DOT = Method(
    name="grad-dot",
    train=GradientPlan(Grid(timesteps=10, draws=1)),
    query=GradientPlan(Grid(timesteps=10, draws=2)),
    checkpoints="last",
    weights="equal",
    source="Charpiat et al. 2019, arXiv:2102.05262",
)
"""Inner product of the mean gradients of both at the last checkpoint."""

GRAD_COS = Method(
    name="grad-cos",
    train=GradientPlan(Grid(timesteps=10, draws=1), unit="sample"),
    query=GradientPlan(Grid(timesteps=10, draws=2), unit="sample"),
    checkpoints="last",
    weights="equal",
    source="Charpiat et al. 2019, arXiv:2102.05262",
)
"""Cosine of the mean gradients of both at the last checkpoint."""

MATCHED_COS = Method(
    name="matched-cos",
    train=GradientPlan(Grid(timesteps=10, draws=1), unit="timestep"),
    query=GradientPlan(Grid(timesteps=10, draws=2), unit="timestep"),
    checkpoints="last",
    weights="equal",
    meet="timesteps",
    source="ReTrac's lengths, timestep by timestep",
)
"""Mean over timesteps of the cosine of both gradients there: 1 for gradients that agree at each timestep."""

MATCHED_DOT = replace(
    MATCHED_COS,
    name="matched-dot",
    train=replace(MATCHED_COS.train, unit="none"),
    query=replace(MATCHED_COS.query, unit="none"),
    source="Kwon et al. 2024, arXiv:2310.00902: gradients joined over timesteps",
)
"""Mean over timesteps of the inner product of both gradients there."""

RETRAC_MATCHED = replace(
    RETRAC, name="retrac-matched", meet="timesteps", source="ReTrac, at the timestep that was trained"
)
"""Cosine of the gradient of the sample as it was trained, with the query's at the nearest timestep.

ReTrac without the query's coherence: at each checkpoint a sample meets only one timestep of the query, so scores
compare samples at different ones, and their phases tell which.
"""

TRACIN_CP = replace(GRAD_DOT, name="tracin-cp", checkpoints="all", source="Pruthi et al. 2020, arXiv:2002.08484")
"""Inner products of the mean gradients of both, added up over checkpoints."""

GAS = replace(GRAD_COS, name="gas", checkpoints="all", source="Hammoudeh and Lowd 2022, arXiv:2201.10055")
"""Cosines of the mean gradients of both, added up over checkpoints."""
