"""Commands that rank the training images of a model: trace, plan, self, ensemble, report and methods."""

import json as jsonlib
import sys
import warnings
from dataclasses import fields
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from whence._cli_options import Flat, ModelSource, QueryOptions
from whence._cli_printing import print_rankings, print_table
from whence.config import (
    IndexSettings,
    MemberImages,
    MemberScale,
    PlanSettings,
    QuerySettings,
    TraceSettings,
)
from whence.errors import ScoresError


def trace(
    model: Positional[Path],
    /,
    *,
    queries: tuple[str, ...],
    methods: tuple[str, ...] = ("tracin", "retrac"),
    until: float | None = None,
    until_of: Literal["median", "worst"] = "median",
    top: int = 5,
    asked: Flat[QueryOptions] = QueryOptions(),  # noqa: B008
    source: Flat[ModelSource] = ModelSource(),  # noqa: B008
    settings: Flat[TraceSettings] = TraceSettings(),  # noqa: B008
    json: bool = False,
) -> None:
    """Rank the training images of a model for each query image.

    Positive scores: training on the image lowered the query's loss. The scores stay in the run; `whence report` makes a
    page.

    Args:
        model: A run of whence, or a checkpoint folder, pipeline or model saved by diffusers.
        queries: Query images: folders, files, or demo-queries.
        methods: Any that `whence methods` lists with trace.
        until: Reliability, such as 0.95: take no more timesteps and draws of the queries than reach it. --timesteps and
            --draws are then the most that are taken.
        until_of: Reliability of the median query, or of the worst.
        top: Training images to print for each query.
        asked: What is said of the queries.
        source: Where the model is from and what it was trained on.
        settings: Size of the grids, arithmetic, batch sizes.
        json: Print the rankings as JSON.
    """
    run = source.open(model)
    scores = run.trace(asked.of(queries), methods, settings, until=until, until_of=until_of)
    asked.print(run, scores, top, json)


def plan(
    model: Positional[Path],
    /,
    *,
    queries: tuple[str, ...] = (),
    methods: tuple[str, ...] = ("tracin", "retrac"),
    index: bool = False,
    asked: Flat[QueryOptions] = QueryOptions(),  # noqa: B008
    source: Flat[ModelSource] = ModelSource(),  # noqa: B008
    settings: Flat[PlanSettings] = PlanSettings(),  # noqa: B008
    json: bool = False,
) -> None:
    """Say what `whence trace`, or `whence index`, will cost: passes, minutes, memory, disk. Nothing is run.

    Takes some seconds, in which a few batches are timed. What is on disk already costs nothing.

    Args:
        model: A run of whence, or a checkpoint folder, pipeline or model saved by diffusers.
        queries: Query images: folders, files, or demo-queries. Not needed with index.
        methods: Any that `whence methods` lists with trace.
        index: Plan `whence index`, and `whence query` where there are queries, instead of a trace.
        asked: What is said of the queries.
        source: Where the model is from and what it was trained on.
        settings: Those of whence trace; or, with index, of whence index and whence query.
        json: Print the plan as JSON.
    """
    from whence.memory import format_memory

    run = source.open(model)
    _warn_of_vain(settings, index)
    if index:
        made = run.plan_index(
            settings.part(IndexSettings),
            queries=asked.of(queries),
            methods=methods,
            asked=settings.part(QuerySettings),
        )
    else:
        made = run.plan(asked.of(queries), methods, settings.part(TraceSettings))
    columns = ["methods", "checkpoint", "batch size", "query passes", "turns", "training passes a turn"]
    columns += ["curvature passes", "in all"]
    table = [
        ["+".join(one.methods), c.step, one.batch_size, c.query, one.turns, c.train, c.curvature, one.at_checkpoint(c)]
        for one in made.passes
        for c in one.passes
    ]
    sizes = {"memory": made.peak_bytes, "scores": made.score_bytes, "cache": made.cache_bytes}
    sizes |= {"index": made.store_bytes} if index else {}
    if json:
        extra = {f"{name}_bytes": num_bytes for name, num_bytes in sizes.items()}
    else:
        extra = {name: format_memory(num_bytes) for name, num_bytes in sizes.items()}
    minutes = round(made.minutes, 2)
    print_table(columns, table, json, passes=made.sample_passes, minutes=minutes, **extra)


def self_(
    run: Positional[Path],
    /,
    *,
    kind: Literal["self_norm", "self_expected"] = "self_norm",
    method: Literal["tracin", "retrac"] = "tracin",
    top: int = 10,
    source: Flat[ModelSource] = ModelSource(),  # noqa: B008
    settings: Flat[TraceSettings] = TraceSettings(),  # noqa: B008
    json: bool = False,
) -> None:
    """Rank the training images of a run by their influence on themselves: outliers, mislabelled, memorised ones.

    Args:
        run: A run of whence.
        kind: self_norm: sum of weight x squared gradient length. self_expected: inner product with the sample's mean
            gradient over a grid of timesteps and draws, which costs that many passes more.
        method: For self_expected: retrac brings both sides to length 1.
        top: Training images to print.
        source: Where the model is from and what it was trained on.
        settings: The grid of self_expected, arithmetic, batch size.
        json: Print the ranking as JSON.
    """
    opened = source.open(run)
    cost = opened.self_influence_cost(kind, settings)
    print(f"{kind}: {cost.sample_passes:,} sample-passes", file=sys.stderr)
    scores = opened.self_influence(kind, settings, method=method)
    rows = [[e.rank, e.train_id, e.score] for e in scores.top(0, top)]
    print_table(["rank", "train id", scores.method], rows, json)


def ensemble(
    out: Positional[Path],
    members: Positional[tuple[Path, ...]],
    /,
    *,
    scale: MemberScale = "none",
    images: MemberImages = "same",
    top: int = 5,
    json: bool = False,
) -> None:
    """Average the scores of independently trained models, and print the rankings.

    Args:
        out: New folder for the mean.
        members: Folders of scores of one method for the same queries, such as RUN/scores/trak-stored-0123abcd.
        scale: none: scores as they are. unit_mean_square: each member's scores of each query divided by their root mean
            square first, so that members with larger gradients do not decide.
        images: same: all members must score the same training images. held: each image is averaged over the members
            that have it, for models of subsets.
        top: Training images to print for each query.
        json: Print the rankings as JSON.

    Raises:
        ScoresError: If the new folder is there already, or members do not belong together.
    """
    from whence.ensembles import ensemble as average
    from whence.scores import Scores

    if out.exists():
        raise ScoresError(f"{out} exists; the mean goes into a new folder. Give another name, or remove it.")
    average(members, scale=scale, images=images).save(out)
    print_rankings([Scores.load(out)], top, json)


def report(
    run: Positional[Path],
    /,
    *,
    planted: str | None = None,
    k: int = 10,
    data: str | None = None,
    json: bool = False,
) -> None:
    """Write a page about what was traced last.

    Args:
        run: A run with scores.
        planted: Label of a group of training images, to measure how well it is found for queries of the same label.
        k: Images in each ranking.
        data: Training images, where they were moved.
        json: Print the path as JSON.
    """
    from whence.opening import open_run

    page = open_run(run, data=data).report(planted=planted, k=k)
    if planted is None:
        print(jsonlib.dumps({"page": str(page)}) if json else page)
    else:
        table = jsonlib.loads((run / "evaluation" / "retrieval.json").read_text())
        print_table(table["columns"], table["rows"], json, page=str(page), notes=table["notes"])


def methods(*, json: bool = False) -> None:
    """List the methods: which gradients they compare, what they cost and who published them.

    Passes and rows are of one image at one checkpoint; grids are timesteps x draws, and change with --timesteps,
    --draws, --train-timesteps and --train-draws.

    Args:
        json: Print the table as JSON.
    """
    from dataclasses import asdict

    from whence.methods import METHODS
    from whence.methods.listing import list_methods

    facts = [asdict(one) for one in list_methods(METHODS)]
    # A terminal is not wide enough for all.
    shown = (
        list(facts[0]) if json else ["name", "gradients_of", "training", "query", "between", "checkpoints", "commands"]
    )
    rows = [[one[name] for name in shown] for one in facts]
    print_table([name.replace("_", " ") for name in shown], rows, json)


def _warn_of_vain(settings: PlanSettings, index: bool) -> None:
    """Say which settings belong to the command that is not planned."""
    used = [IndexSettings, QuerySettings] if index else [TraceSettings]
    names = {field.name for kind in used for field in fields(kind)}
    given = [f.name for f in fields(PlanSettings) if getattr(settings, f.name) != f.default and f.name not in names]
    for name in given:
        command = "index and query" if index else "trace"
        warnings.warn(f"{name} has no effect: it is no setting of whence {command}.", stacklevel=3)
