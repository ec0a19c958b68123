"""The command line: it reads settings, calls the pipeline and prints.

Errors that whence raises on purpose end with status 1, a wrong command line with 2.
Heavy imports stand inside the commands, so that ``--help`` answers at once.
"""

import io
import json as jsonlib
import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro
from tyro.conf import Positional

from whence._cli_evidence import clean, prove
from whence.config import (
    DataSettings,
    IndexSettings,
    LossName,
    MemberImages,
    MemberScale,
    ModelSettings,
    PlanSettings,
    QuerySettings,
    RetrainingSettings,
    TraceSettings,
    TrainingSettings,
)
from whence.errors import ConfigError, ScoresError, WhenceError

if TYPE_CHECKING:
    from whence.pipeline import Run
    from whence.scores import Scores, TopScores
    from whence.store import Store

Flat = tyro.conf.OmitArgPrefixes


def demo(
    out: Path = Path("whence-demo"),
    *,
    fresh: bool = False,
    seed: int = 0,
    loss: LossName = "l1",
    json: bool = False,
) -> None:
    """Train a small model on bundled images, find what its images came from, and write a page about it.

    Takes some minutes on two CPU cores. Run again, it uses what is there.

    Args:
        out: Folder of the run.
        fresh: Remove an earlier demo in that folder and start over.
        seed: Seed of training.
        loss: Training loss.
        json: Print the table as JSON.
    """
    from whence.demo import run_demo

    _, page, table = run_demo(out, fresh=fresh, seed=seed, loss=loss)
    _print_table(table["columns"], table["rows"], json, page=str(page), notes=table["notes"])


def train(
    data: Positional[str],
    /,
    *,
    out: Path,
    data_settings: Flat[DataSettings] = DataSettings(),  # noqa: B008  frozen
    model: Flat[ModelSettings] = ModelSettings(),  # noqa: B008
    training: Flat[TrainingSettings] = TrainingSettings(),  # noqa: B008
    device: str = "cpu",
    json: bool = False,
) -> None:
    """Train a diffusers UNet2DModel with an exact record, or go on with a training that was interrupted.

    Args:
        data: Training images: a folder, a parquet file, a folder of datasets.save_to_disk, or demo.
        out: Folder of the run.
        data_settings: How images are read.
        model: Architecture and noise schedule.
        training: Optimizer, schedule, length, seed.
        device: Torch device, for example cpu or cuda:0.
        json: Print the result as JSON.
    """
    from whence.checkpoints import list_checkpoints
    from whence.pipeline import train_run

    run = train_run(out, data, data_settings=data_settings, model_settings=model, settings=training, device=device)
    rows = [[c.step, str(c.folder)] for c in list_checkpoints(run.folder)]
    _print_table(["step", "checkpoint"], rows, json)


def sample(
    model: Positional[Path],
    /,
    *,
    count: int = 4,
    steps: int = 50,
    seed: int = 0,
    trajectory: bool = False,
    data: str | None = None,
    out: Path | None = None,
    allow_pickle: bool = False,
    data_settings: Flat[DataSettings] = DataSettings(),  # noqa: B008
    json: bool = False,
) -> None:
    """Sample images from the last checkpoint with DDIM, to be traced as queries. The same seed gives the same images.

    Args:
        model: A run of whence, or a checkpoint folder, pipeline or model saved by diffusers.
        count: Images to sample.
        steps: Denoising steps.
        seed: Seed of the noise.
        trajectory: Also keep what the sampler took each image to be at each step, as journey-trak needs it.
        data: Training images. A run knows its own.
        out: Folder for the images, where the model was not trained by whence.
        allow_pickle: Read weights from .bin files too, with weights_only. Only for files you trust.
        data_settings: How training images are read. Default: as the run did.
        json: Print the path as JSON.
    """
    from whence.pipeline import open_run

    run = open_run(model, data=data, data_settings=_given(data_settings), out=out, allow_pickle=allow_pickle)
    path = run.sample(count, steps=steps, seed=seed, trajectory=trajectory)
    print(jsonlib.dumps({"images": str(path)}) if json else path)


def trace(
    model: Positional[Path],
    /,
    *,
    queries: tuple[str, ...],
    methods: tuple[str, ...] = ("tracin", "retrac"),
    data: str | None = None,
    out: Path | None = None,
    loss: LossName | None = None,
    allow_pickle: bool = False,
    until: float | None = None,
    until_of: Literal["median", "worst"] = "median",
    top: int = 5,
    data_settings: Flat[DataSettings] = DataSettings(),  # noqa: B008
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
        data: Training images. A run knows its own.
        out: Folder for scores and report, where the model was not trained by whence.
        loss: Training loss of a model without a record. Default: mse.
        allow_pickle: Read weights from .bin files too, with weights_only. Only for files you trust.
        until: Reliability, such as 0.95: take no more timesteps and draws of the queries than reach it. --timesteps and
            --draws are then the most that are taken.
        until_of: Reliability of the median query, or of the worst.
        top: Training images to print for each query.
        data_settings: How images are read. Default: as the run did.
        settings: Size of the grids, arithmetic, batch sizes.
        json: Print the rankings as JSON.
    """
    from whence.pipeline import open_run

    run = open_run(model, data=data, data_settings=_given(data_settings), out=out, loss=loss, allow_pickle=allow_pickle)
    scores = run.trace(queries, methods, settings, until=until, until_of=until_of)
    _print_rankings(list(scores.values()), top, json)


def plan(
    model: Positional[Path],
    /,
    *,
    queries: tuple[str, ...] = (),
    methods: tuple[str, ...] = ("tracin", "retrac"),
    data: str | None = None,
    out: Path | None = None,
    loss: LossName | None = None,
    allow_pickle: bool = False,
    index: bool = False,
    data_settings: Flat[DataSettings] = DataSettings(),  # noqa: B008
    settings: Flat[PlanSettings] = PlanSettings(),  # noqa: B008
    json: bool = False,
) -> None:
    """Say what `whence trace`, or `whence index`, will cost: passes, minutes, memory, disk. Nothing is run.

    Takes some seconds, in which a few batches are timed. What is on disk already costs nothing.

    Args:
        model: A run of whence, or a checkpoint folder, pipeline or model saved by diffusers.
        queries: Query images: folders, files, or demo-queries. Not needed with index.
        methods: Any that `whence methods` lists with trace.
        data: Training images. A run knows its own.
        out: Folder for scores and report, where the model was not trained by whence.
        loss: Training loss of a model without a record. Default: mse.
        allow_pickle: Read weights from .bin files too, with weights_only. Only for files you trust.
        index: Plan `whence index`, and `whence query` where there are queries, instead of a trace.
        data_settings: How images are read. Default: as the run did.
        settings: Those of whence trace; or, with index, of whence index and whence query.
        json: Print the plan as JSON.
    """
    from whence.memory import format_memory
    from whence.pipeline import open_run

    run = open_run(model, data=data, data_settings=_given(data_settings), out=out, loss=loss, allow_pickle=allow_pickle)
    _warn_of_vain(settings, index)
    if index:
        asked = settings.part(QuerySettings)
        made = run.plan_index(settings.part(IndexSettings), queries=queries, methods=methods, asked=asked)
    else:
        made = run.plan(queries, methods, settings.part(TraceSettings))
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
    _print_table(columns, table, json, passes=made.sample_passes, minutes=minutes, **extra)


def index(
    model: Positional[Path],
    /,
    *,
    part: str | None = None,
    data: str | None = None,
    out: Path | None = None,
    loss: LossName | None = None,
    allow_pickle: bool = False,
    data_settings: Flat[DataSettings] = DataSettings(),  # noqa: B008
    settings: Flat[IndexSettings] = IndexSettings(),  # noqa: B008
    json: bool = False,
) -> None:
    """Put projected gradients of all training images into a store, so that any number of queries cost little later.

    Run again, it goes on from there; run twice at once, both share the work.

    Args:
        model: A run of whence, or a checkpoint folder, pipeline or model saved by diffusers.
        part: Do only this part of the work, as 2/8 for the second of eight; for jobs on several machines.
        data: Training images. A run knows its own.
        out: Folder for the store, where the model was not trained by whence.
        loss: Training loss of a model without a record. Default: mse.
        allow_pickle: Read weights from .bin files too, with weights_only. Only for files you trust.
        data_settings: How images are read. Default: as the run did.
        settings: Which gradients, their projection, arithmetic.
        json: Print what the store holds as JSON.
    """
    from whence.indexing import notes_on_store
    from whence.pipeline import open_run

    run = open_run(model, data=data, data_settings=_given(data_settings), out=out, loss=loss, allow_pickle=allow_pickle)
    store = run.index(settings, part=None if part is None else _part(part))
    rows = [[step, len(store.ids(step)), store.num_rows(step)] for step in store.steps]
    _print_table(["step", "images", "rows"], rows, json, store=str(store.folder), notes=notes_on_store(store))


def query(
    model: Positional[Path],
    /,
    *,
    queries: tuple[str, ...],
    methods: tuple[str, ...] = ("tracin", "retrac"),
    store: Path | None = None,
    keep_top: int | None = None,
    data: str | None = None,
    out: Path | None = None,
    loss: LossName | None = None,
    allow_pickle: bool = False,
    until: float | None = None,
    until_of: Literal["median", "worst"] = "median",
    top: int = 5,
    data_settings: Flat[DataSettings] = DataSettings(),  # noqa: B008
    settings: Flat[QuerySettings] = QuerySettings(),  # noqa: B008
    json: bool = False,
) -> None:
    """Rank the training images of a model for each query image, from a store that `whence index` has made.

    Args:
        model: A run of whence, or a checkpoint folder, pipeline or model saved by diffusers.
        queries: Query images: folders, files, or demo-queries.
        methods: Any that the store can serve; `whence methods` lists them.
        store: The store. Default: the one of the run that serves the methods.
        keep_top: Keep only so many training images of each query, where all scores would be too many. No page then.
        data: Training images. A run knows its own.
        out: Folder of the stores and scores, where the model was not trained by whence.
        loss: Training loss of a model without a record. Default: mse.
        allow_pickle: Read weights from .bin files too, with weights_only. Only for files you trust.
        until: Reliability, such as 0.95: take no more timesteps and draws of the queries than reach it. --timesteps and
            --draws are then the most that are taken.
        until_of: Reliability of the median query, or of the worst.
        top: Training images to print for each query.
        data_settings: How images are read. Default: as the run did.
        settings: Size of the query grid, batch size.
        json: Print the rankings as JSON.
    """
    from whence.pipeline import open_run

    run = open_run(model, data=data, data_settings=_given(data_settings), out=out, loss=loss, allow_pickle=allow_pickle)
    scores = run.query(queries, methods, settings, store=store, top=keep_top, until=until, until_of=until_of)
    _print_rankings(list(scores.values()), top, json)


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
    _print_table([name.replace("_", " ") for name in shown], rows, json)


def verify(path: Positional[Path], /, *, json: bool = False) -> None:
    """Read all of a store, or of all stores of a run, and name what is damaged, missing or left behind.

    Ends with status 1 where something is.

    Args:
        path: A store or a run.
        json: Print the findings as JSON.
    """
    stores = _open_stores(path)
    findings = [[str(store.folder), finding] for store in stores for finding in store.verify()]
    _print_table(["store", "finding"], findings, json, verified=len(stores))
    if findings:
        sys.exit(1)


def merge(target: Positional[Path], sources: Positional[tuple[Path, ...]], /, *, json: bool = False) -> None:
    """Take the shards of stores that were filled apart over into one of them, or into a new folder.

    Args:
        target: Store that is to hold everything.
        sources: Stores of the same specification; they stay as they are.
        json: Print the result as JSON.
    """
    from whence.store import Store, merge_stores

    found = [Store.open(source) for source in sources]
    if not (target / "manifest.json").exists() and found:
        Store.create(target, found[0].spec, width=found[0].width, dtype=found[0].dtype)
    opened = Store.open(target)
    count = merge_stores(opened, found)
    rows = [[step, len(opened.ids(step)), opened.num_rows(step)] for step in opened.steps]
    _print_table(["step", "images", "rows"], rows, json, store=str(target), shards_taken_over=count)


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
    _print_rankings([Scores.load(out)], top, json)


def self_(
    run: Positional[Path],
    /,
    *,
    kind: Literal["self_norm", "self_expected"] = "self_norm",
    method: Literal["tracin", "retrac"] = "tracin",
    top: int = 10,
    data: str | None = None,
    data_settings: Flat[DataSettings] = DataSettings(),  # noqa: B008
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
        data: Training images, where the run does not know its own (a training loop of yours) or they were moved.
        data_settings: How images are read. Default: as the run did.
        settings: The grid of self_expected, arithmetic, batch size.
        json: Print the ranking as JSON.
    """
    from whence.pipeline import open_run

    opened = open_run(run, data=data, data_settings=_given(data_settings))
    cost = opened.self_influence_cost(kind, settings)
    print(f"{kind}: {cost.sample_passes:,} sample-passes", file=sys.stderr)
    scores = opened.self_influence(kind, settings, method=method)
    rows = [[e.rank, e.train_id, e.score] for e in scores.top(0, top)]
    _print_table(["rank", "train id", scores.method], rows, json)


def retrain(
    run: Positional[Path],
    /,
    *,
    queries: tuple[str, ...],
    data: str | None = None,
    out: Path | None = None,
    loss: LossName | None = None,
    allow_pickle: bool = False,
    data_settings: Flat[DataSettings] = DataSettings(),  # noqa: B008
    settings: Flat[RetrainingSettings] = RetrainingSettings(),  # noqa: B008
    json: bool = False,
) -> None:
    """Train the model again on random subsets of its training images, and measure query images with each.

    Run again, it goes on from there; run twice at once, both share the work. The result is a ground truth that scores
    are compared with: `whence evaluate`.

    Args:
        run: A run of whence, or a model saved by diffusers, which needs a trainer of yours.
        queries: Query images, each as NAME=SOURCE, such as validation=FOLDER generated=FILE; sources of one name are
            one set, and without a name the set is called queries.
        data: Training images. A run knows its own.
        out: Folder for what is made, where the model was not trained by whence.
        loss: Training loss of a model without a record. Default: mse.
        allow_pickle: Read weights from .bin files too, with weights_only. Only for files you trust.
        data_settings: How images are read. Default: as the run did.
        settings: Subsets, seeds, training, measuring, processes.
        json: Print what was made as JSON.
    """
    from whence.pipeline import open_run

    opened = open_run(
        run, data=data, data_settings=_given(data_settings), out=out, loss=loss, allow_pickle=allow_pickle
    )
    truth = opened.retrain(_query_sets(queries), settings)
    rows = [
        [name, truth.query_sets.count(name), measure, float(of_set.mean()), float(of_set.mean(axis=(1, 2)).std())]
        for name in truth.sets
        for measure in truth.measures
        for of_set in [truth.output(measure)[..., [s == name for s in truth.query_sets]]]
    ]
    columns = ["queries", "count", "measure", "mean", "spread over subsets"]
    _print_table(columns, rows, json, ground_truth=str(truth.folder), notes=truth.notes)


def evaluate(
    run: Positional[Path],
    /,
    *,
    ground_truth: Path | None = None,
    scores: tuple[Path, ...] = (),
    measure: str = "loss",
    fit_subsets: int | None = None,
    draws: int = 1000,
    seed: int = 0,
    planted: str | None = None,
    k: int = 10,
    near_distance: float = 0.1,
    flipped: Path | None = None,
    data: str | None = None,
    json: bool = False,
) -> None:
    """Say how good scores are: retrieval and specificity beside chance; and, with a ground truth, their LDS.

    Retrieval and specificity are of what was traced last: does a query find its own label, itself, its near-duplicates,
    and have different queries different answers? LDS, the linear datamodeling score, is the rank correlation over
    subsets between the sum of the scores of a subset's images and minus the measured output of the model that was
    retrained on it, mean over queries. Its interval is 95 %, over queries and subsets; the ceiling is what no score can
    beat, from the spread over seeds. All tables are also in evaluation/ of the run.

    Args:
        run: A run with scores.
        ground_truth: Folder that `whence retrain` has made, or that others have published.
        scores: Folders of scores. Default: for LDS all of the run that fit, else those of the last trace.
        measure: For LDS, which output: loss, mse, squares, simplified_elbo, elbo.
        fit_subsets: For LDS, also fit empirical influence and datamodels on so many subsets, and evaluate on the rest.
        draws: Resamples for the interval.
        seed: Seed of the resamples.
        planted: Label of a group of training images that queries of this label should find. Default: queries should
            find the training images of their own label.
        k: Length of a ranking.
        near_distance: Largest difference of near-duplicates: root mean square over pixels from -1 to 1.
        flipped: File with ids of training images that are at fault, one a line, such as those with flipped labels: how
            well does the run's self-influence (`whence self`) find them?
        data: Training images, where they were moved.
        json: Print the tables as JSON.
    """
    from whence.pipeline import open_run

    opened = open_run(run, data=data)
    tables: dict[str, dict[str, Any]] = {}
    lds: dict[str, float] | None = None
    if ground_truth is not None:
        results, tables["lds"] = opened.evaluate(
            ground_truth, scores or None, measure=measure, fit_subsets=fit_subsets, draws=draws, seed=seed
        )
        by_method = {r.method: [one.lds for one in results if one.method == r.method] for r in results}
        lds = {method: sum(values) / len(values) for method, values in by_method.items()}
    if ground_truth is None or planted is not None:
        tables["rankings"] = opened.evaluate_rankings(
            scores or None, planted=planted, k=k, near_distance=near_distance, lds=lds
        )
    if flipped is not None:
        tables["detection"] = opened.evaluate_detection(flipped.read_text(encoding="utf-8").split())
    _print_tables({str(run / "evaluation" / f"{name}.md"): table for name, table in tables.items()}, json)


def diagnose(
    run: Positional[Path],
    /,
    *,
    samples: tuple[str, ...] = (),
    count: int = 3,
    timesteps: int = 100,
    k: int = 10,
    data: str | None = None,
    json: bool = False,
) -> None:
    """Say how far scores follow the timesteps at which images happened to be trained, instead of what is in the images.

    Of what was traced last: correlations of scores with gradient norms and trained timesteps; and the experiment of the
    ReTrac paper: some images are scored as if they had been trained at the timestep where their gradient is longest,
    which costs as many passes as tracing the queries did. Norm curves and histograms are in evaluation/bias.json.

    Args:
        run: A run with scores.
        samples: Ids of training images for the experiment. Default: some at random.
        count: How many at random; 0: none, and nothing is computed but statistics of the scores.
        timesteps: Points of a norm curve.
        k: Length of a ranking.
        data: Training images, where they were moved.
        json: Print the table as JSON.
    """
    from whence.pipeline import open_run

    table = open_run(run, data=data).diagnose(samples=samples, count=count, timesteps=timesteps, k=k)
    _print_tables({str(run / "evaluation" / "bias.md"): table}, json)


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
    from whence.pipeline import open_run

    page = open_run(run, data=data).report(planted=planted, k=k)
    if planted is None:
        print(jsonlib.dumps({"page": str(page)}) if json else page)
    else:
        table = jsonlib.loads((run / "evaluation" / "retrieval.json").read_text())
        _print_table(table["columns"], table["rows"], json, page=str(page), notes=table["notes"])


def check(
    run: Positional[Path],
    /,
    *,
    data: str | None = None,
    data_settings: Flat[DataSettings] = DataSettings(),  # noqa: B008
    device: str = "cpu",
    json: bool = False,
) -> None:
    """Check that the record explains training: checksums, keys, and losses replayed at each checkpoint.

    Ends with status 1 where a check fails.

    Args:
        run: A run with a record.
        data: Training images, where the run does not know its own (a training loop of yours) or they were moved.
        data_settings: How images are read. Default: as the run did.
        device: Torch device.
        json: Print the verdicts as JSON.
    """
    from whence.pipeline import open_run

    rows = open_run(run, data=data, data_settings=_given(data_settings)).check(device=device)
    _print_table(
        ["what", "verdict", "visits", "detail"], [[r.what, r.verdict, r.checked, r.detail] for r in rows], json
    )
    if any(row.verdict == "failed" for row in rows):
        sys.exit(1)


def show(
    path: Positional[Path],
    /,
    *,
    events: tuple[str, ...] = (),
    method: Literal["tracin", "retrac", "grad-dot", "grad-cos"] = "retrac",
    replay: Literal["last", "all"] = "last",
    checkpoint: int = -1,
    npz: Path | None = None,
    top: int = 5,
    data: str | None = None,
    data_settings: Flat[DataSettings] = DataSettings(),  # noqa: B008
    json: bool = False,
) -> None:
    """Show what is in a run, record, checkpoint folder, store, ground truth or scores; or events of training images.

    Args:
        path: What to look at.
        events: Ids of training images whose events are shown: timestep, noise key, flip, weight.
        method: Method whose training events these are.
        replay: Which visits, for methods that replay.
        checkpoint: Number of the checkpoint, from 0; -1 is the last.
        npz: Also write the events' arrays to this file: clean, noise, noisy (x_t), target, timesteps, weight.
        top: Training images to print for each query of scores.
        data: For events: training images, where the run does not know its own.
        data_settings: How images are read. Default: as the run did.
        json: Print as JSON.

    Raises:
        ConfigError: If ``npz`` is given without events.
    """
    if npz is not None and not events:
        raise ConfigError("--npz holds the arrays of events; say of which images with --events.")
    if events:
        from whence.pipeline import open_run

        run = open_run(path, data=data, data_settings=_given(data_settings))
        _show_events(run, events, method, replay, checkpoint, npz, json)
    elif (path / "scores.safetensors").exists():
        from whence.scores import Scores

        _print_rankings([Scores.load(path)], top, json)
    elif (path / "top.json").exists():
        from whence.scores import TopScores

        _print_rankings([TopScores.load(path)], top, json)
    elif (path / "ground_truth.json").exists():
        _print_table(["what", "value"], _contents_of_ground_truth(path), json)
    else:
        _print_table(["what", "value"], _contents(path), json)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command; exit with status 1 on an error that has a remedy, 2 on a wrong command line."""
    commands = {
        "demo": demo,
        "train": train,
        "sample": sample,
        "trace": trace,
        "plan": plan,
        "self": self_,
        "index": index,
        "query": query,
        "report": report,
        "check": check,
        "retrain": retrain,
        "evaluate": evaluate,
        "prove": prove,
        "clean": clean,
        "diagnose": diagnose,
        "methods": methods,
        "verify": verify,
        "merge": merge,
        "ensemble": ensemble,
        "show": show,
    }
    warnings.showwarning = _show_warning
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # ids may hold what a terminal cannot show
    try:
        tyro.extras.subcommand_cli_from_dict(
            commands,
            prog="whence",
            description="Which training images made this one? Data attribution for diffusion models.",
            args=arguments,
            config=(tyro.conf.FlagCreatePairsOff,),
        )
    except WhenceError as error:
        sys.exit(f"whence: {error}")
    except KeyboardInterrupt:
        print("\nwhence: stopped; the same command goes on from here.", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # whoever read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as error:
        place = f" ({error.filename})" if error.filename else ""
        sys.exit(
            f"whence: {error.strerror or error}{place}. What was finished is kept; once this is solved, the same "
            "command goes on from there."
        )


def _show_warning(message: Warning | str, *_: Any) -> None:
    print(f"whence: note: {message}", file=sys.stderr)


def _given(settings: DataSettings) -> dict[str, Any]:
    """Keep what differs from the defaults: the rest is as the run did it."""
    return {name: value for name, value in vars(settings).items() if value != getattr(DataSettings(), name)}


def _warn_of_vain(settings: PlanSettings, index: bool) -> None:
    """Say which settings belong to the command that is not planned."""
    used = [IndexSettings, QuerySettings] if index else [TraceSettings]
    names = {field.name for kind in used for field in fields(kind)}
    given = [f.name for f in fields(PlanSettings) if getattr(settings, f.name) != f.default and f.name not in names]
    for name in given:
        command = "index and query" if index else "trace"
        warnings.warn(f"{name} has no effect: it is no setting of whence {command}.", stacklevel=3)


def _show_events(
    run: "Run",
    ids: Sequence[str],
    method: str,
    replay: Literal["last", "all"],
    checkpoint: int,
    npz: Path | None,
    json: bool,
) -> None:
    import numpy as np

    from whence._files import publish_file
    from whence.methods import METHODS, Method, Replay

    declared = METHODS[method]
    assert isinstance(declared, Method)  # the choices of --method
    plan = declared.train
    if isinstance(plan.events, Replay):
        plan = replace(plan, events=Replay(replay))
    table, batch = run.events(plan, ids, checkpoint=checkpoint)
    rows = [
        [run.train_images.ids[row], int(t), f"{key:016x}", bool(flip), float(loss_weight), float(weight)]
        for row, t, key, flip, loss_weight, weight in zip(
            table.row, table.timestep, table.noise_key, table.flip, table.loss_weight, table.weight, strict=True
        )
    ]
    if npz is not None:
        with publish_file(npz) as partial, partial.open("wb") as file:
            np.savez(file, **{name: array.numpy() for name, array in vars(batch).items()})
    _print_table(["train id", "timestep", "noise key", "flip", "loss weight", "weight"], rows, json)


def _contents(path: Path) -> list[list[Any]]:
    """Say what lies in a folder."""
    from whence.checkpoints import list_checkpoints
    from whence.errors import CheckpointError, ScoresError
    from whence.record import Record
    from whence.scores import Scores

    if (path / "manifest.json").exists() and "spec_sha256" in (path / "manifest.json").read_text():
        return _contents_of_store(path)
    rows: list[list[Any]] = []
    record_folder = path if (path / "manifest.json").exists() else path / "record"
    if (record_folder / "manifest.json").exists():
        record = Record.open(record_folder)
        visits = record.visits
        rows += [
            ["visits", len(visits)],
            ["training images visited", len(record.sample_ids)],
            ["optimizer steps", int(visits.step.max()) if len(visits) else 0],
            ["loss", record.manifest["loss"]],
            ["prediction type", record.manifest["prediction_type"]],
            ["seed", record.manifest["seed"]],
            ["data fingerprint", record.manifest["data_fingerprint"]],
        ]
    try:
        rows += [[f"checkpoint {c.step}", str(c.folder)] for c in list_checkpoints(path)]
    except CheckpointError:
        if not rows:
            raise
    rows += [["store", str(manifest.parent)] for manifest in sorted((path / "stores").glob("*/manifest.json"))]
    for manifest in sorted((path / "scores").glob("*/manifest.json")):
        try:
            scores = Scores.load(manifest.parent)
        except ScoresError as error:
            rows.append(["scores", f"damaged: {error}"])
            continue
        size = f"{len(scores.query_ids)} queries x {len(scores.train_ids)} training images"
        rows.append([f"scores {scores.method}", f"{size}, {scores.folder}"])
    rows += [
        ["ground truth", str(manifest.parent)] for manifest in sorted(path.glob("ground_truth/*/ground_truth.json"))
    ]
    if (path / "report" / "index.html").exists():
        rows.append(["report", str(path / "report" / "index.html")])
    return rows


def _contents_of_store(path: Path) -> list[list[Any]]:
    from whence.store import Store

    store = Store.open(path)
    rows: list[list[Any]] = [["rows", f"{store.width} numbers of {store.dtype}"]]
    rows += [[f"step {step}", f"{len(store.ids(step))} images, {store.num_rows(step)} rows"] for step in store.steps]
    for part in ("space", "provenance"):
        fields = store.spec.get(part, {})
        rows += [[f"{part} {name}", jsonlib.dumps(value)] for name, value in fields.items() if name != "parameters"]
    return [*rows, ["specification", store.spec_sha256]]


def _contents_of_ground_truth(path: Path) -> list[list[Any]]:
    from whence.ground_truth import GroundTruth

    truth = GroundTruth.load(path)
    rows: list[list[Any]] = [
        ["subsets", f"{len(truth.subsets)} of {int(truth.subsets.sum(axis=1).max())} of {len(truth.train_ids)} images"],
        ["seeds", ", ".join(map(str, truth.seeds))],
        ["measures", ", ".join(truth.measures)],
        ["timesteps of a query", truth.timesteps.shape[1]],
    ]
    rows += [[f"queries {name}", truth.query_sets.count(name)] for name in truth.sets]
    return rows + [["note", note] for note in truth.notes]


def _open_stores(path: Path) -> "list[Store]":
    from whence.errors import StoreError
    from whence.store import Store

    if (path / "manifest.json").exists():
        return [Store.open(path)]
    folders = sorted((path / "stores").glob("*"))
    if not folders:
        raise StoreError(f"{path} is no store, and there is none in {path / 'stores'}. Make one with `whence index`.")
    return [Store.open(folder) for folder in folders]


def _part(text: str) -> tuple[int, int]:
    """Read 2/8 as (2, 8)."""
    which, slash, count = text.partition("/")
    if not (slash and which.isdecimal() and count.isdecimal()):
        raise ConfigError(f"--part must be like 2/8, the second of eight; found {text}.")
    return int(which), int(count)


def _query_sets(queries: Sequence[str]) -> dict[str, list[str]]:
    """Read NAME=SOURCE; a path that holds an equals sign is taken whole where what is before it is no name."""
    sets: dict[str, list[str]] = {}
    for text in queries:
        name, equals, source = text.partition("=")
        named = bool(equals) and name.replace("-", "_").isidentifier()
        sets.setdefault(name if named else "queries", []).append(source if named else text)
    return sets


def _print_rankings(scores: "Sequence[Scores | TopScores]", top: int, json: bool) -> None:
    rows = [
        [s.method, query_id, e.rank, e.train_id, e.score]
        for s in scores
        for row, query_id in enumerate(s.query_ids)
        for e in s.top(row, top)
    ]
    notes = list(dict.fromkeys(note for s in scores for note in s.notes))
    folders = {s.method: str(s.folder) for s in scores}
    _print_table(["method", "query", "rank", "train id", "score"], rows, json, notes=notes, scores=folders)


def _print_table(columns: Sequence[str], rows: Sequence[Sequence[Any]], json: bool, **extra: Any) -> None:
    """Print rows in columns, or one JSON object with the rows as objects."""
    if json:
        table = [dict(zip(columns, row, strict=True)) for row in rows]
        print(jsonlib.dumps({"rows": table, **extra}, indent=1))
        return
    cells = [[_cell(value) for value in row] for row in rows]
    widths = [max(len(c[i]) for c in [*cells, list(columns)]) for i in range(len(columns))]
    for line in [list(columns), ["-" * w for w in widths], *cells]:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    for name, value in extra.items():
        _print_extra(name, value)


def _print_tables(tables: Mapping[str, Mapping[str, Any]], json: bool) -> None:
    """Print tables one after the other, each with the file that it is in; as JSON, one list of them."""
    if json:
        found = [
            {"table": file, "rows": [dict(zip(table["columns"], row, strict=True)) for row in table["rows"]]}
            | {"notes": table["notes"]}
            for file, table in tables.items()
        ]
        print(jsonlib.dumps({**found[0], "more": found[1:]}, indent=1))
        return
    for number, (file, table) in enumerate(tables.items()):
        if number:
            print()
        _print_table(table["columns"], table["rows"], json, table=file, notes=table["notes"])


def _print_extra(name: str, value: Any) -> None:
    if isinstance(value, Mapping):
        print(*(f"{name} of {key}: {inner}" for key, inner in value.items()), sep="\n")
    elif isinstance(value, list):
        print(*(f"note: {note}" for note in value), sep="\n") if value else None
    else:
        print(f"{name}: {value}")


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
