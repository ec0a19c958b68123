"""``whence show``: what is in a folder, or the events of training images."""

import json as jsonlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tyro.conf import Positional

from whence._cli_options import Flat
from whence._cli_printing import print_rankings, print_table
from whence.config import DataSettings, changed_settings
from whence.errors import ConfigError

if TYPE_CHECKING:
    from whence.pipeline import Run


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
    data_settings: Flat[DataSettings] = DataSettings(),  # noqa: B008  frozen
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
        from whence.opening import open_run

        run = open_run(path, data=data, data_settings=changed_settings(data_settings))
        _show_events(run, events, method, replay, checkpoint, npz, json)
    elif (path / "scores.safetensors").exists():
        from whence.scores import Scores

        print_rankings([Scores.load(path)], top, json)
    elif (path / "top.json").exists():
        from whence.scores import TopScores

        print_rankings([TopScores.load(path)], top, json)
    elif (path / "ground_truth.json").exists():
        print_table(["what", "value"], _contents_of_ground_truth(path), json)
    else:
        print_table(["what", "value"], _contents(path), json)


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
            table.row, table.timestep, table.noise_key, table.flip, batch.loss_weight, table.weight, strict=True
        )
    ]
    if npz is not None:
        with publish_file(npz) as partial, partial.open("wb") as file:
            arrays: dict[str, Any] = {name: array.numpy() for name, array in batch.arrays().items()}
            np.savez(file, **arrays)
    print_table(["train id", "timestep", "noise key", "flip", "loss weight", "weight"], rows, json)


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
