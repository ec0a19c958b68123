"""Commands that say how good scores are: retrain, evaluate and diagnose."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from whence._cli_options import Flat, ModelSource
from whence._cli_printing import print_table, print_tables
from whence.config import RetrainingSettings


def retrain(
    run: Positional[Path],
    /,
    *,
    queries: tuple[str, ...],
    source: Flat[ModelSource] = ModelSource(),  # noqa: B008
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
        source: Where the model is from and what it was trained on.
        settings: Subsets, seeds, training, measuring, processes.
        json: Print what was made as JSON.
    """
    opened = source.open(run)
    truth = opened.retrain(_query_sets(queries), settings)
    rows = [
        [name, truth.query_sets.count(name), measure, float(of_set.mean()), float(of_set.mean(axis=(1, 2)).std())]
        for name in truth.sets
        for measure in truth.measures
        for of_set in [truth.output(measure)[..., [s == name for s in truth.query_sets]]]
    ]
    columns = ["queries", "count", "measure", "mean", "spread over subsets"]
    print_table(columns, rows, json, ground_truth=str(truth.folder), notes=truth.notes)


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
    from whence.opening import open_run

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
    print_tables({str(run / "evaluation" / f"{name}.md"): table for name, table in tables.items()}, json)


def diagnose(
    run: Positional[Path],
    /,
    *,
    samples: tuple[str, ...] = (),
    count: int = 20,
    timesteps: int = 100,
    k: int = 10,
    data: str | None = None,
    json: bool = False,
) -> None:
    """Say how far scores follow the timesteps at which images happened to be trained, instead of what is in the images.

    Of what was traced last: correlations of scores with gradient norms and trained timesteps; lengths of gradients by
    timestep; and the experiment of the ReTrac paper: some images are scored as if they had been trained at the timestep
    where their gradient is longest, or shortest, which costs a little more passes than tracing the queries did. `whence
    report`, run afterwards, shows all of it as plots; the figures are in evaluation/bias.json.

    Args:
        run: A run with scores.
        samples: Ids of training images for the experiment. Default: some at random.
        count: How many at random; 0: none, and nothing is computed but statistics of the scores.
        timesteps: Points of a norm curve.
        k: Length of a ranking.
        data: Training images, where they were moved.
        json: Print the tables as JSON.
    """
    from whence.opening import open_run

    tables = open_run(run, data=data).diagnose(samples=samples, count=count, timesteps=timesteps, k=k)
    print_tables({str(run / "evaluation" / f"{name}.md"): table for name, table in tables.items()}, json)


def _query_sets(queries: Sequence[str]) -> dict[str, list[str]]:
    """Read NAME=SOURCE; a path that holds an equals sign is taken whole where what is before it is no name."""
    sets: dict[str, list[str]] = {}
    for text in queries:
        name, equals, source = text.partition("=")
        named = bool(equals) and name.replace("-", "_").isidentifier()
        sets.setdefault(name if named else "queries", []).append(source if named else text)
    return sets
