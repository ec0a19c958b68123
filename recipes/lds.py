"""Which method predicts what retraining does: LDS of every method beside its cost, on two data sets.

    python recipes/lds.py --data FOLDER --out cifar2
    python recipes/lds.py --data FOLDER --dataset fashion-mnist --out fashion

FOLDER holds ``cifar2.parquet`` (5,000 CIFAR-10 automobiles and horses, 32 px) and ``cifar2_queries.parquet`` (200
others), or ``fashion_mnist.parquet`` (1,000 images of ten classes), with columns id, image, label. Steps that are done
are not done again: kill it, and run it again.

1. ``whence train`` on 256 images, as many of each class; ten checkpoints, and a record.
2. ``whence retrain`` on 40 random halves of them, two seeds each; measured on 20 other images (validation) and on 20
   images sampled from the model of step 1 (generated).
3. Every method of ``whence methods`` that this model can have, and combinations of them, by ``whence trace``, ``whence
   index`` and ``whence query``, each with its own default damping; ``trak`` and ``d-trak`` also with damping by
   cross-validation over training images. Neither looks at queries or retrained models. Rows called *oracle* do, and are
   there for comparison: as published, with the best damping of a grid on the very queries that are reported. LDS of
   each damping of each method with a ridge stands in ``OUT/dampings.md``.
4. LDS of the mean loss, with intervals over queries and subsets and the ceiling that the noise of retraining sets;
   *class@10*, the share of the top 10 of validation queries that is of the query's class; sample-passes, seconds and
   stored bytes of each method: ``OUT/table.md`` and ``OUT/table.json``.

Scaled to two CPU cores in about an hour: 256 images instead of 5,000, 16 px instead of 32, a UNet of 0.45 instead of
35.7 million parameters, 60 epochs instead of 200. At full size, on a GPU, as D-TRAK has it::

    python recipes/lds.py --data FOLDER --out cifar2-full --full --device cuda

which is 5,000 images, 32 px, widths 128 256 256 256, batches of 128, 200 epochs, 64 subsets x 3 seeds, 1,000 queries.
What came out of the small ones stands in docs/results/lds.md.
"""

import argparse
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from jaxtyping import Bool
from numpy import ndarray
from tables import markdown

import whence
from whence.config import DataSettings, IndexSettings, ModelSettings, RetrainingSettings, TrainingSettings
from whence.data import ImageData
from whence.evaluation import precision, unique_share
from whence.ground_truth import GroundTruth
from whence.lds import LdsResult, evaluate_lds
from whence.methods import (
    D_TRAK,
    DAS,
    DAS_SIGNED,
    DATAINF,
    EKFAC,
    GAS,
    GRAD_COS,
    GRAD_DOT,
    JOURNEY_TRAK,
    KFAC,
    MATCHED_COS,
    MATCHED_DOT,
    PIXELS,
    RANDOM,
    RELATIF,
    RELATIF_L,
    RENORMALISED,
    RETRAC,
    RETRAC_ADAM,
    RETRAC_MATCHED,
    TRACIN,
    TRACIN_ADAM,
    TRACIN_CP,
    TRAK,
    Baseline,
    Method,
    RidgeInverse,
)
from whence.pipeline import Run
from whence.retrieval import find_relevant
from whence.scores import Scores

DATASETS = {"cifar2": ("cifar2.parquet", "cifar2_queries.parquet"), "fashion-mnist": ("fashion_mnist.parquet",) * 2}
"""Files with training images and with queries; where they are one, queries are what training leaves over."""
DAMPINGS = tuple(10.0**k for k in range(-6, 5))
"""Of which the oracles take the best."""


@dataclass(frozen=True)
class Size:
    """How large everything is."""

    images: int
    queries: int
    resolution: int
    model: ModelSettings
    training: TrainingSettings
    retraining: RetrainingSettings
    timesteps: int
    """Timesteps of grids, on both sides."""
    draws: int
    """Draws at each timestep of a query, but for TracIn and ReTrac."""


SMALL = Size(
    images=256,
    queries=20,
    resolution=16,
    model=ModelSettings(widths=(16, 32, 48)),
    training=TrainingSettings(
        epochs=60, batch_size=32, checkpoints=10, learning_rate=1e-3, schedule="cosine", warmup_steps=20, loss="mse"
    ),
    retraining=RetrainingSettings(subsets=40, seeds=(0, 1), timesteps=50, draws=2, workers=2),
    timesteps=20,
    draws=2,
)
FULL = Size(
    images=5000,
    queries=500,
    resolution=32,
    model=ModelSettings(widths=(128, 256, 256, 256), layers_per_block=2, norm_groups=32),
    training=TrainingSettings(
        epochs=200, batch_size=128, checkpoints=10, learning_rate=1e-4, schedule="cosine", warmup_steps=800, loss="mse"
    ),
    retraining=RetrainingSettings(subsets=64, seeds=(0, 1, 2), timesteps=100, draws=2),
    timesteps=100,
    draws=2,
)


def per_timestep(method: Method) -> Method:
    """Bring gradients to length 1 at each timestep before they are averaged, on both sides."""
    train, query = (replace(plan, unit="timestep") for plan in (method.train, method.query))
    return replace(method, name=f"{method.name}, unit timesteps", train=train, query=query)


def everywhere(method: Method) -> Method:
    """Take all checkpoints instead of the last."""
    return replace(method, name=f"{method.name}, all checkpoints", checkpoints="all")


TRACED: Sequence[Method | Baseline] = (
    *(PIXELS, RANDOM, TRACIN, RETRAC, GRAD_DOT, GRAD_COS),
    *(KFAC, EKFAC, DATAINF, TRACIN_ADAM, RETRAC_ADAM, TRACIN_CP, GAS, everywhere(EKFAC), RETRAC_MATCHED),
)
"""Methods that ``whence trace`` gives."""

D_TRAK_TO_LOSS = replace(D_TRAK, name="d-trak to loss", query=replace(D_TRAK.query, output="loss"))
STORED: Sequence[Method] = (
    *(D_TRAK, per_timestep(D_TRAK), D_TRAK_TO_LOSS, TRAK, per_timestep(TRAK), DAS, DAS_SIGNED),
    *(RELATIF, RELATIF_L, RENORMALISED, MATCHED_DOT, MATCHED_COS, JOURNEY_TRAK),
    *(everywhere(D_TRAK), everywhere(per_timestep(D_TRAK)), everywhere(TRAK)),
)
"""Methods that are scored from a store; some are combinations that nobody published."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with the parquet files")
    parser.add_argument("--dataset", choices=DATASETS, default="cifar2", help="which images")
    parser.add_argument("--out", type=Path, required=True, help="folder of everything that is made")
    parser.add_argument("--full", action="store_true", help="the size of the published experiment, for a GPU")
    parser.add_argument("--device", default="cpu", help="torch device")
    parser.add_argument("--workers", type=int, help="processes that retrain at once")
    names = [method.name for method in (*STORED, *TRACED)]
    parser.add_argument("--methods", nargs="+", choices=names, default=names, metavar="METHOD", help="these alone")
    arguments = parser.parse_args()
    size, out = (FULL if arguments.full else SMALL), arguments.out
    out.mkdir(parents=True, exist_ok=True)
    images, others = (arguments.data / name for name in DATASETS[arguments.dataset])
    train = choose_images(images, out / "train.parquet", size.images)
    validation = choose_images(others, out / "validation.parquet", size.queries, without=train)
    run = whence.train_run(
        out / "run",
        str(train),
        data_settings=DataSettings(resolution=size.resolution),
        model_settings=size.model,
        settings=size.training,
        device=arguments.device,
    )
    generated = run.sample(size.queries, steps=50, trajectory=True)
    sets = {"validation": str(validation), "generated": str(generated)}
    retraining = replace(size.retraining, devices=(arguments.device,))
    if arguments.workers:
        retraining = replace(retraining, workers=arguments.workers)
    truth = run.retrain(sets, retraining)
    write_table(run, truth, sets, size, arguments.device, out, arguments.methods)


def choose_images(source: Path, target: Path, count: int, without: Path | None = None) -> Path:
    """Write the first images of each label, as many of each; of those that are not in another file."""
    table = pq.read_table(source)
    if without is not None:
        table = table.filter(~np.isin(table["id"].to_pylist(), pq.read_table(without)["id"].to_pylist()))
    labels = np.array(table["label"].to_pylist())
    kinds = np.unique(labels)
    rows = np.sort(np.concatenate([np.flatnonzero(labels == label)[: count // len(kinds)] for label in kinds]))
    pq.write_table(table.take(rows), target)
    return target


@dataclass(frozen=True)
class Scored:
    """A method's scores, and what they cost."""

    name: str
    scores: Scores
    sample_passes: int
    seconds: float
    stored_bytes: int = 0
    lds_by_damping: Mapping[float, Mapping[str, float]] = field(default_factory=dict)
    """LDS with other dampings, by set of queries; looked at and not reported."""


def score_all(
    run: Run, sets: Mapping[str, str], truth: GroundTruth, size: Size, device: str, names: Sequence[str]
) -> Iterator[Scored]:
    """Score by each of the named methods, one after the other."""
    queries = list(sets.values())
    for method in STORED:
        if method.name in names:
            yield from _stored(run, sets, truth, size, device, method)
    for method in TRACED:
        if method.name not in names:
            continue
        # The published grid of TracIn and ReTrac has 1,600 events; four draws are enough to tell methods apart here.
        grid = {"timesteps": size.timesteps, "draws": size.draws, "train_timesteps": size.timesteps, "device": device}
        passes = run.plan(queries, [method], **grid).sample_passes if isinstance(method, Method) else 0
        started = time.perf_counter()
        (scores,) = run.trace(queries, [method], show_progress=False, **grid).values()
        yield Scored(method.name, scores, passes, time.perf_counter() - started)


def _stored(
    run: Run, sets: Mapping[str, str], truth: GroundTruth, size: Size, device: str, method: Method
) -> Iterator[Scored]:
    settings = IndexSettings(
        grid=True,
        output=method.train.output,
        checkpoints=method.checkpoints,
        train_timesteps=size.timesteps,
        device=device,
    )
    started = time.perf_counter()
    store = run.index(settings, show_progress=False)
    index_s = time.perf_counter() - started
    queries = [sets["generated"]] if method == JOURNEY_TRAK else list(sets.values())
    grid: dict[str, Any] = {} if method == JOURNEY_TRAK else {"timesteps": size.timesteps, "draws": size.draws}
    num_events = 50 * 20 if method == JOURNEY_TRAK else size.timesteps * size.draws
    train_passes = len(run.train_images) * size.timesteps
    passes = len(store.steps) * (train_passes + len(run.open_queries(queries)) * num_events)
    num_bytes = sum(path.stat().st_size for path in store.folder.rglob("*") if path.is_file())

    def ask(method: Method) -> Scores:
        (scores,) = run.query(queries, [method], store=store, device=device, show_progress=False, **grid).values()
        assert isinstance(scores, Scores)
        return scores

    started = time.perf_counter()
    scores = ask(method)
    seconds = index_s + time.perf_counter() - started
    has_ridge = isinstance(method.precondition, RidgeInverse) and method.checkpoints == "last"
    tried = {d: ask(replace(method, precondition=RidgeInverse(damping=d))) for d in DAMPINGS} if has_ridge else {}
    lds = {d: {name: found.lds for name, found in _lds(one, truth).items()} for d, one in tried.items()}
    yield Scored(method.name, scores, passes, seconds, num_bytes, lds)
    if method in (D_TRAK, TRAK):
        by_training_images = replace(method, precondition=RidgeInverse(damping="gcv"))
        yield Scored(f"{method.name}, damping by cross-validation", ask(by_training_images), passes, 0.0, num_bytes)
        for name in sets:
            best = max(DAMPINGS, key=lambda damping: lds[damping][name])
            yield Scored(f"{method.name} (oracle for {name})", tried[best], passes, 0.0, num_bytes)


def class_precision(scores: Scores, queries: ImageData, same_class: Bool[ndarray, "query train"]) -> float | None:
    """Give the share of the top 10 that is of the query's class, mean over the labelled queries that are scored."""
    row_of = {id_: row for row, id_ in enumerate(scores.query_ids)}
    scored = [row for row, id_ in enumerate(queries.ids) if id_ in row_of]
    if not scored:
        return None
    top_rows = scores.top_rows(10)[[row_of[queries.ids[row]] for row in scored]]
    return float(precision(top_rows, same_class[scored]).mean())


def _lds(scores: Scores, truth: GroundTruth) -> dict[str, LdsResult]:
    return {result.query_set: result for result in evaluate_lds(scores, truth)}


def write_table(
    run: Run,
    truth: GroundTruth,
    sets: Mapping[str, str],
    size: Size,
    device: str,
    out: Path,
    names: Sequence[str],
) -> None:
    """Score by every method and compare with the ground truth; a row is written as soon as it is there.

    What a method cost is kept from the first time: scores that are there cost nothing.
    """
    rows: list[dict[str, Any]] = []
    dampings: dict[str, Mapping[float, Mapping[str, float]]] = {}
    costs_file = out / "costs.json"
    costs: dict[str, dict[str, Any]] = json.loads(costs_file.read_text()) if costs_file.exists() else {}
    labelled = run.open_queries(sets["validation"])
    same_class = find_relevant(run.train_images, labelled).group
    assert same_class is not None  # both files have labels
    for scored in score_all(run, sets, truth, size, device, names):
        found = _lds(scored.scores, truth)
        row: dict[str, Any] = {"method": scored.name}
        for name in sets:
            result = found.get(name)
            row[name] = None if result is None else [result.lds, result.low, result.high]
        fields = ("sample_passes", "seconds", "stored_bytes")
        cost = costs.setdefault(scored.name, {name.replace("_", " "): getattr(scored, name) for name in fields})
        costs_file.write_text(json.dumps(costs, indent=1) + "\n")
        row["class@10"] = class_precision(scored.scores, labelled, same_class)
        row |= {"unique@10": unique_share(scored.scores.top_rows(10)), **cost}
        print(row, flush=True)
        rows.append(row)
        ceilings = {result.query_set: result.ceiling.ceiling for result in found.values() if result.ceiling}
        (out / "table.json").write_text(json.dumps({"ceilings": ceilings, "rows": rows}, indent=1) + "\n")
        (out / "table.md").write_text(to_markdown(rows, list(sets), ceilings))
        if scored.lds_by_damping:
            dampings[scored.name] = scored.lds_by_damping
            (out / "dampings.json").write_text(json.dumps(dampings, indent=1) + "\n")
            (out / "dampings.md").write_text("\n".join(dampings_to_markdown(dampings, name) for name in sets))


def to_markdown(rows: Sequence[Mapping[str, Any]], sets: Sequence[str], ceilings: Mapping[str, float]) -> str:
    """Lay the rows out as a table, the best on validation queries first."""
    heads = [
        "method",
        *(f"LDS, {name}" for name in sets),
        "class@10",
        "unique@10",
        "sample-passes",
        "seconds",
        "stored",
    ]
    lines = []
    for row in sorted(rows, key=lambda row: -(row[sets[0]] or [-1])[0]):
        lds = [f"{row[n][0]:.3f} ({row[n][1]:.3f} to {row[n][2]:.3f})" if row[n] else "" for n in sets]
        stored = f"{row['stored bytes'] / 2**20:.0f} MiB" if row["stored bytes"] else ""
        of_class = "" if row["class@10"] is None else f"{row['class@10']:.2f}"
        cells = [row["method"], *lds, of_class, f"{row['unique@10']:.2f}"]
        cells += [f"{row['sample passes']:,}", f"{row['seconds']:.0f}", stored]
        lines.append(cells)
    limits = [f"{ceilings[name]:.3f}" if name in ceilings else "" for name in sets]
    return markdown(heads, [*lines, ["ceiling", *limits, *[""] * 5]])


def dampings_to_markdown(dampings: Mapping[str, Mapping[float, Mapping[str, float]]], name: str) -> str:
    """Lay out LDS on one set of queries by method and damping."""
    rows = [
        [method, *(f"{found[damping][name]:.3f}" for damping in DAMPINGS)]
        for method, found in dampings.items()
        if name in found[DAMPINGS[0]]
    ]
    return markdown([f"LDS, {name}", *(f"{damping:g}" for damping in DAMPINGS)], rows)


if __name__ == "__main__":
    main()
