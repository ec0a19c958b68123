"""Commands that act on what was found: ``whence prove`` and ``whence clean``."""

import sys
from pathlib import Path
from typing import Annotated, Any

import tyro
from tyro.conf import Positional

from whence._cli_options import Flat, ModelSource
from whence._cli_printing import print_table
from whence.config import CleaningSettings, CounterfactualSettings, DataSettings, changed_settings


def prove(
    run: Positional[Path],
    /,
    *,
    queries: tuple[str, ...],
    methods: Annotated[tuple[str, ...], tyro.conf.arg(aliases=("--method",))] = ("retrac",),
    ids: tuple[str, ...] = (),
    scores: tuple[Path, ...] = (),
    plan: bool = False,
    source: Flat[ModelSource] = ModelSource(),  # noqa: B008
    settings: Flat[CounterfactualSettings] = CounterfactualSettings(),  # noqa: B008
    json: bool = False,
) -> None:
    """Train the model again without the images that a method ranks first for a query, and show what changes.

    Beside it, without as many random images, and with all images by a second seed, which is the noise floor. The cost
    is printed first. Run again, it goes on from there; run twice at once, both share the work. Table, images and page
    are in evaluation/ of the run.

    Args:
        run: A run of whence, or a model saved by diffusers, which needs a trainer of yours.
        queries: Query images: folders, files, or demo-queries. Images of `whence sample` are drawn again by each model.
        methods: Whose rankings; those of these queries in the run, else they are traced first, with default settings.
        ids: Ask about these of the queries only.
        scores: Folders of scores, instead of methods.
        plan: Print the cost and do nothing.
        source: Where the model is from and what it was trained on.
        settings: How many images, seeds, training, measuring, processes.
        json: Print as JSON.
    """
    from whence.evidence import describe_effect

    opened = source.open(run)
    work = opened.plan_counterfactual(queries, scores or None, settings, methods=methods, ids=ids, trace=not plan)
    cost = work.cost()
    facts = {
        "models": cost.models,
        "finished": cost.finished,
        "optimizer steps to do": cost.steps,
        "seconds a step": cost.seconds_per_step,
        "minutes": None if cost.minutes is None else round(cost.minutes, 2),
    }
    if plan:
        print_table(list(facts), [list(facts.values())], json, notes=list(work.notes))
        return
    time = "of unknown length, as the trainer is yours" if cost.minutes is None else f"about {cost.minutes:.3g} minutes"
    print(f"prove: {cost.models - cost.finished} of {cost.models} models to train, {time}", file=sys.stderr)
    record, page = opened.prove(work)
    table = record["table"]
    said = [describe_effect(effect, record["measure"], len(record["seeds"])) for effect in record["effects"]]
    extra: dict[str, Any] = {"findings": said} if json else {}
    print_table(table["columns"], table["rows"], json, page=str(page), notes=table["notes"], **extra)
    if not json:
        print(*said, sep="\n")


def clean(
    run: Positional[Path],
    /,
    *,
    out: Path | None = None,
    dry_run: bool = False,
    self_scores: Path | None = None,
    validation: tuple[Path, ...] = (),
    data: str | None = None,
    data_settings: Flat[DataSettings] = DataSettings(),  # noqa: B008
    settings: Flat[CleaningSettings] = CleaningSettings(),  # noqa: B008
    json: bool = False,
) -> None:
    """Write the training images without duplicates, outliers and harmful ones into a new folder, with reasons.

    The images themselves are only read; ids and files stay as they are. removed.csv has a line for each reason,
    kept.csv the figures of what stays, manifest.json the thresholds.

    Args:
        run: A run of whence.
        out: New folder for the data set.
        dry_run: Print what would go, and write nothing.
        self_scores: Folder of self-influence, for outliers. Default: the one that `whence self` made in this run.
        validation: Folders of scores of validation queries, for harmful images, such as RUN/scores/retrac-0123abcd.
        data: Training images, where they were moved.
        data_settings: How images are read. Default: as the run did.
        settings: Reasons and thresholds.
        json: Print what goes as JSON.

    Raises:
        ConfigError: If there is neither a new folder nor a dry run.
    """
    from whence.errors import ConfigError
    from whence.opening import open_run

    if (out is None) != dry_run:
        raise ConfigError("Give a new folder with --out, or --dry-run; one of the two.")
    if out is not None and out.exists():  # before anything is compared
        raise ConfigError(f"{out} exists. Give a new folder: nothing is overwritten.")
    opened = open_run(run, data=data, data_settings=changed_settings(data_settings))
    cleaning = opened.clean(settings, self_scores=self_scores, validation=validation)
    rows = [[f.id, f.reason, f.figure, f.threshold, f.duplicate_of or None] for f in cleaning.findings]
    counts = f"{len(cleaning.kept)} of {len(cleaning.images)}"
    extra = {"kept": counts} | ({} if out is None else {"images": str(opened.export(cleaning, out))})
    notes = list(cleaning.notes)
    if cleaning.influential:
        few = ", ".join(cleaning.influential[:5])
        notes.append(f"{len(cleaning.influential)} images are generally influential and stay, such as {few}.")
    print_table(["id", "reason", "figure", "threshold", "duplicate of"], rows, json, **extra, notes=notes)
