"""What each method needs, costs and keeps, read off its declaration: for ``whence methods`` and the documentation."""

from dataclasses import dataclass

from whence.methods.frame import (
    AdamInverse,
    Baseline,
    ConjugateGradientInverse,
    DataInfInverse,
    GradientPlan,
    Grid,
    KroneckerInverse,
    LissaInverse,
    Method,
    Replay,
    RetrainingMethod,
    RidgeInverse,
    Trajectory,
)

_MIDDLE = {
    RidgeInverse: "ridge inverse M",
    ConjugateGradientInverse: "Gauss-Newton inverse, by conjugate gradients",
    LissaInverse: "Gauss-Newton inverse, by a series",
    DataInfInverse: "mean of rank-one inverses",
    AdamInverse: "1 / Adam's scale",
}

_AFTER = {
    "none": "",
    "length": "/ |phi|",
    "theta_relative": "/ |M phi|",
    "l_relative": "/ sqrt(phi M phi)",
    "residual": "x error / (1 - phi M phi)",
}

_ENCODER_OPTIONS = {"vae": "--vae", "clip": "--clip", "embeddings": "--encoder"}


@dataclass(frozen=True)
class MethodFacts:
    """One method, as a reader chooses among them."""

    name: str
    gradients_of: str
    """Output function, of the training and the query side."""
    training: str
    """Events of a training image, and what is brought to length 1."""
    query: str
    between: str
    """What stands between the two, and what comes after."""
    checkpoints: str
    commands: str
    """Which commands give it."""
    passes_per_training_image: int | None
    """Forward and backward passes of one sample at each checkpoint; None: as many as visits."""
    passes_per_query: int | None
    """None: as many as its sampler had steps, times the draws."""
    rows_per_training_image: int | None
    """Rows that an index keeps of an image at each checkpoint; None: as many as visits."""
    sign: str
    source: str


def list_methods(methods: dict[str, Method | Baseline | RetrainingMethod]) -> list[MethodFacts]:
    """Describe methods.

    Args:
        methods: Declarations by name.

    Returns:
        One entry each, in their order.
    """
    return [_facts(method) for method in methods.values()]


def _facts(method: Method | Baseline | RetrainingMethod) -> MethodFacts:
    if isinstance(method, Method):
        return _of_method(method)
    return _of_baseline(method) if isinstance(method, Baseline) else _of_retraining(method)


def _of_method(method: Method) -> MethodFacts:
    train, query = method.train.events, method.query.events
    outputs = dict.fromkeys([method.train.output, method.query.output])
    inverse = method.precondition
    middle = (
        "" if inverse is None else inverse.kind if isinstance(inverse, KroneckerInverse) else _MIDDLE[type(inverse)]
    )
    meet = "timestep by timestep" if method.meet == "timesteps" else ""
    between = " ".join(filter(None, [middle, meet, _AFTER[method.after]]))
    one_visit = train == Replay("last")
    return MethodFacts(
        name=method.name,
        gradients_of=" and ".join(outputs),
        training=_events(method.train),
        query=_events(method.query),
        between=f"{between}, squared" if method.squared else between,
        checkpoints=method.checkpoints,
        commands="index, query" if method.needs_rows else "trace; index, query",
        passes_per_training_image=train.timesteps * train.draws
        if isinstance(train, Grid)
        else 1
        if one_visit
        else None,
        passes_per_query=query.timesteps * query.draws if isinstance(query, Grid) else None,
        rows_per_training_image=train.timesteps if isinstance(train, Grid) else 1 if one_visit else None,
        sign="none: a size" if method.squared else "positive lowers the query's output",
        source=method.source,
    )


def _of_baseline(baseline: Baseline) -> MethodFacts:
    return MethodFacts(
        name=baseline.name,
        gradients_of="",
        training="",
        query="",
        between="" if baseline.kind == "random" else baseline.product,
        checkpoints="",
        commands=f"trace {_ENCODER_OPTIONS[baseline.kind]}" if baseline.is_encoded else "trace",
        passes_per_training_image=0,
        passes_per_query=0,
        rows_per_training_image=0,
        sign="none" if baseline.kind == "random" else "similar is positive",
        source=baseline.source,
    )


def _of_retraining(method: RetrainingMethod) -> MethodFacts:
    between = {"difference": "mean without less mean with", "ridge": "ridge regression on members"}[method.kind]
    return MethodFacts(
        name=method.name,
        gradients_of="",
        training="subsets, retrained",
        query="any measure",
        between=between,
        checkpoints="",
        commands="retrain, evaluate --fit-subsets",
        passes_per_training_image=0,
        passes_per_query=0,
        rows_per_training_image=0,
        sign="positive lowers the query's output",
        source=method.source,
    )


def _events(plan: GradientPlan) -> str:
    if isinstance(plan.events, Replay):
        events = {"last": "last visit", "all": "all visits"}[plan.events.visits]
    elif isinstance(plan.events, Trajectory):
        events = f"steps of the sampler x {plan.events.draws}"
    else:
        events = f"{plan.events.timesteps} x {plan.events.draws}"
    return events if plan.unit == "none" else f"{events}, unit {plan.unit}"
