"""What the specification of a store of training gradients says, for those who fill it and those who read it.

    space        checkpoints by content, parameters and their shapes, projection: the same for all rows and all queries
    provenance   which gradients the rows are: plan, loss, noise, record, arithmetic, batch and block size

The images are no part of it, so that a store grows with its data set. ``whence.store`` keeps it without knowing this.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from whence._files import as_json
from whence._store_checks import list_differences
from whence.attribution import UNRECORDED, declare
from whence.config import IndexSettings, QuerySettings, TraceSettings
from whence.errors import StoreError
from whence.gradients import GradientSource
from whence.methods import Baseline, Grid, Method, Replay
from whence.methods.frame import WeightsRule
from whence.projections import AbstractProjection, canonical_name, make_projection
from whence.store import Store
from whence.subject import Subject

PROJECTION_VERSION = 1
"""Part of every specification; counts up when the same projection settings give other rows."""

_OWN_WIDTH = ("identity", "two_sided")
"""Kinds of projection whose width follows from the parameters."""

_COMMANDS = {"Replay": "--replay {visits}", "Grid": "--grid --train-timesteps {timesteps} --train-draws {draws}"}


def plan_of(settings: IndexSettings, *, has_record: bool) -> Replay | Grid:
    """Choose the events of training images: replayed visits where there is a record, unless a grid is asked for."""
    if settings.grid or not has_record:
        return Grid(settings.train_timesteps or UNRECORDED.timesteps, settings.train_draws or UNRECORDED.draws)
    return Replay(settings.replay or "last")


def weight_rules(events: Replay | Grid, keep: str, *, has_record: bool) -> list[WeightsRule]:
    """List the rules whose weights a store holds: a sum of visits is weighted for good, all else can be later."""
    if not has_record:
        return ["equal"]
    if isinstance(events, Replay) and keep == "sum":
        return ["learning_rate"]
    if events == Replay("all"):
        return ["learning_rate", "equal"]  # published weights are those of a whole interval
    return ["learning_rate", "equal", "published"]


def projection_of(source: GradientSource, about: Mapping[str, Any], direct: Sequence[str]) -> AbstractProjection:
    """Make the projection of a store for a model.

    Args:
        source: The model at any of the checkpoints.
        about: ``kind``, ``seed``, ``side`` and ``width``.
        direct: Names of parameters whose gradients have rank one.

    Returns:
        The projection.
    """
    return make_projection(
        about["kind"],
        {name: tuple(parameter.shape) for name, parameter in source.capture.parameters.items()},
        width=None if about["kind"] in _OWN_WIDTH else about["width"],
        side=about["side"],
        seed=about["seed"],
        direct=direct,
        device=source.device,
        dtype=source.dtype,
    )


def make_spec(
    subject: Subject, settings: IndexSettings, projection: AbstractProjection, direct: Sequence[str]
) -> dict[str, Any]:
    """Say what the rows of a store are.

    Args:
        subject: Checkpoints and record.
        settings: What is asked for.
        projection: Made by :func:`projection_of`.
        direct: Names of parameters whose gradients have rank one.

    Returns:
        The specification, in plain values.
    """
    spec = spec_without_model(subject, settings)
    spec["space"]["parameters"] = {name: list(shape) for name, shape in projection.space.shapes.items()}
    spec["space"]["projection"] |= {"width": projection.width, "direct": sorted(map(canonical_name, direct))}
    return as_json(spec)


def spec_without_model(subject: Subject, settings: IndexSettings) -> dict[str, Any]:
    """Say of the rows of a store what can be said before a model is loaded.

    What is left out (the parameters, and of the projection its width and which parameters have rank one) follows from
    this and the settings.

    Returns:
        The specification but for that, in plain values.
    """
    has_record = subject.record is not None
    about = subject.describe(subject.used_checkpoints(settings.checkpoints), settings)
    del about["train"]  # a store grows with its data set
    events = plan_of(settings, has_record=has_record)
    space = {
        "checkpoints": about.pop("checkpoints"),
        "weights_name": about.pop("weights_name"),
        "projection": {
            "kind": settings.projection,
            "seed": settings.projection_seed,
            "side": settings.side,
            "version": PROJECTION_VERSION,
        },
    }
    plan = {
        "events": {"kind": type(events).__name__} | asdict(events),
        "output": settings.output,
        "keep": settings.keep,
        "norms": settings.norms if settings.keep == "units" else "projected",
        "weights": weight_rules(events, settings.keep, has_record=has_record),
    }
    provenance = {
        "plan": plan,
        "patterns": about.pop("parameters"),
        **about,
        "uncovered": settings.uncovered,
        "noise_seed": settings.seed,
        "batch_size": settings.batch_size,
        "block_size": settings.block_size,
    }
    return as_json({"space": space, "provenance": provenance})


def is_made_of(store: Store, subject: Subject, settings: IndexSettings) -> bool:
    """Tell, without a model, whether a store is the one that settings ask for.

    Returns:
        Whether it is, for settings whose batch size is final.
    """
    space, provenance = dict(store.spec.get("space", {})), store.spec.get("provenance", {})
    space.pop("parameters", None)
    space["projection"] = {k: v for k, v in space.get("projection", {}).items() if k not in ("width", "direct")}
    has_width = settings.projection in _OWN_WIDTH or store.width == settings.width
    found = {"space": space, "provenance": provenance}
    return has_width and store.dtype == settings.rows and found == spec_without_model(subject, settings)


def events_of(spec: Mapping[str, Any]) -> Replay | Grid:
    """Read the events of training images off a specification."""
    fields = dict(spec["provenance"]["plan"]["events"])
    return {"Replay": Replay, "Grid": Grid}[fields.pop("kind")](**fields)


def trace_settings(spec: Mapping[str, Any], asked: QuerySettings) -> TraceSettings:
    """Join what a query may choose with what the store has settled.

    Returns:
        The settings under which streaming would give the same scores, but for the projection.
    """
    provenance, events = spec["provenance"], events_of(spec)
    settled: dict[str, Any] = {"replay": events.visits} if isinstance(events, Replay) else {}
    if isinstance(events, Grid):
        settled = {"train_timesteps": events.timesteps, "train_draws": events.draws}
    return TraceSettings(
        **vars(asked),
        **settled,
        parameters=tuple(provenance["patterns"]),
        weights_name=spec["space"]["weights_name"],
        uncovered=provenance["uncovered"],
        dtype=provenance["dtype"],
        autocast=provenance["autocast"],
        tf32=provenance["tf32"],
        seed=provenance["noise_seed"],
        block_size=provenance["block_size"],
    )


def check_is_of(store: Store, subject: Subject) -> None:
    """Refuse a store that was not made of these checkpoints, this loss, noising process and record.

    Raises:
        StoreError: If it was made of others, or says nothing of what it was made of.
    """
    try:
        space, provenance = store.spec["space"], store.spec["provenance"]
        steps, version = [c["step"] for c in space["checkpoints"]], space["projection"]["version"]
        settings = trace_settings(store.spec, QuerySettings())
    except (KeyError, TypeError) as error:
        raise StoreError(
            f"{store.folder} does not say what its rows are ({error!r}), so nothing can be compared with them. Make a "
            "store with `whence index`."
        ) from error
    used = [c for c in subject.checkpoints if c.step in steps]
    about = as_json(subject.describe(used, settings))
    found = {"checkpoints": space["checkpoints"]} | {key: provenance[key] for key in ("loss", "process", "record")}
    asked = {key: about[key] for key in found} | {"projection version": PROJECTION_VERSION}
    differences = list(list_differences(found | {"projection version": version}, asked))
    if differences:
        raise StoreError(
            f"{store.folder} is a store of another model or training: {'; '.join(differences)}. Make one of this model "
            "with `whence index`."
        )


def check_serves(store: Store, method: Method, subject: Subject) -> None:
    """Refuse a store whose rows are not those that a method needs.

    Raises:
        StoreError: The message says what the store holds, what the method needs, and which command makes it.
    """
    plan, events = store.spec["provenance"]["plan"], events_of(store.spec)
    held = {c["step"] for c in store.spec["space"]["checkpoints"]}
    needed = {c.step for c in subject.used_checkpoints(method.checkpoints)}
    lacking = []
    if method.train.events != events:
        lacking.append(f"it needs {method.train.events} of each training image, the store holds {events}")
    if method.meet == "timesteps" and plan["keep"] == "sum":
        lacking.append("it needs a row at each timestep, the store holds their sums")
    if method.train.output != plan["output"]:
        lacking.append(f"it needs gradients of {method.train.output}, the store holds those of {plan['output']}")
    if needed - held:
        lacking.append(f"it needs the checkpoints {sorted(needed)}, the store holds {sorted(held)}")
    if method.weights not in plan["weights"]:
        lacking.append(f"it needs weights {method.weights}, the store holds {', '.join(plan['weights'])}")
    if lacking:
        options = _COMMANDS[type(method.train.events).__name__].format(**asdict(method.train.events))
        options += "" if method.train.output == "loss" else f" --output {method.train.output}"
        raise StoreError(
            f"{method.name} cannot be had from {store.folder}: {'; '.join(lacking)}. Make a store for it with "
            f"`whence index RUN {options}`, or use `whence trace`, which needs none."
        )


def choose_store(stores: Sequence[Store], subject: Subject, methods: Sequence[Method | Baseline]) -> Store:
    """Choose the store that serves some methods.

    Args:
        stores: Stores of a run.
        subject: What is traced.
        methods: As they are asked for; their training side is filled in from each store.

    Returns:
        The store.

    Raises:
        StoreError: If there is none, none serves, or more than one does.
    """
    if not stores:
        raise StoreError("There is no store to query. Make one with `whence index RUN`, or use `whence trace`.")
    refusals, serving = [], []
    for store in stores:
        try:
            check_is_of(store, subject)
            settings = trace_settings(store.spec, QuerySettings())
            declared = [declare(m, settings, has_record=subject.record is not None)[0] for m in methods]
            for method in (m for m in declared if isinstance(m, Method)):
                check_serves(store, method, subject)
            serving.append(store)
        except StoreError as error:
            refusals.append(str(error))
    if len(serving) == 1:
        return serving[0]
    if serving:
        names = ", ".join(str(store.folder) for store in serving)
        raise StoreError(f"More than one store serves these methods; say with --store which: {names}.")
    raise StoreError("\n".join(refusals))


def settle(settings: IndexSettings, *, has_record: bool) -> tuple[IndexSettings, list[str]]:
    """Take out of the settings what has no effect, so that the same rows have the same specification.

    Returns:
        The settings, and a sentence for each that was given in vain.
    """
    events, vain = plan_of(settings, has_record=has_record), []
    if isinstance(events, Grid) and settings.replay is not None:
        vain.append("replay has no effect: training images are taken on a grid.")
    if isinstance(events, Replay) and (settings.train_timesteps, settings.train_draws) != (None, None):
        vain.append("train_timesteps and train_draws have no effect: visits on record are replayed. Use grid.")
    if settings.keep == "sum" and (events == Replay("last") or (isinstance(events, Grid) and events.timesteps == 1)):
        vain.append("keep='sum' has no effect: there is one event, or timestep, of each image.")
        settings = replace(settings, keep="units")
    if settings.keep == "sum" and settings.norms == "projected":
        vain.append("norms='projected' has no effect: lengths of sums are always those of the projected sums.")
        settings = replace(settings, norms="exact")
    return settings, vain
