"""Events: the arrays of a batch by hand, grids, and the visits of a small record written for the purpose."""

from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler

from conftest import toy_images
from whence._files import write_json
from whence.config import PredictionType
from whence.data import ImageData
from whence.diffusion.noise import Side, noise_key, normals
from whence.diffusion.process import NoiseProcess
from whence.errors import RecordError
from whence.event_table import EventTable, Replays, check_same_data, grid_events, make_batch
from whence.methods import Grid, Replay
from whence.methods.frame import WeightsRule
from whence.record import FORMAT_VERSION, SCHEMA, PartWriter, Record

NUM_TIMESTEPS = 50


@pytest.fixture(scope="module")
def images():
    return toy_images(4)


def process(prediction_type: PredictionType = "epsilon"):
    scheduler = DDPMScheduler(num_train_timesteps=NUM_TIMESTEPS, prediction_type=prediction_type)
    return NoiseProcess.from_scheduler(scheduler)


# --- batches


def table_of(rows: list[int], timesteps: list[int], keys: list[int], flips: list[bool]) -> EventTable:
    count = len(rows)
    return EventTable(
        np.array(rows),
        np.array(timesteps),
        np.array(keys, np.uint64),
        np.array(flips, bool),
        np.zeros(count, bool),
        np.zeros(count, bool),
        np.arange(count, dtype=np.float32) + 1,
        np.arange(count) / 7.0,
        np.zeros(count, bool),
    )


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_a_batch_holds_what_the_formulas_say(images: ImageData, prediction_type: PredictionType):
    table = table_of([2, 0, 2], [0, 49, 7], [5, 2**64 - 1, 6], [False, True, True])
    batch = make_batch(table, images, process(prediction_type), dtype=torch.float64)
    alpha_bar = DDPMScheduler(num_train_timesteps=NUM_TIMESTEPS).alphas_cumprod.double()
    for event, (row, timestep, key, flip) in enumerate([(2, 0, 5, 0), (0, 49, 2**64 - 1, 1), (2, 7, 6, 1)]):
        clean = torch.from_numpy(images.pixels([row])[0]).double()
        clean = clean.flip(-1) if flip else clean
        noise = torch.from_numpy(normals(key, (3, 8, 8))).double()
        signal, sigma = alpha_bar[timestep].sqrt(), (1 - alpha_bar[timestep]).sqrt()
        target = {"epsilon": noise, "v_prediction": signal * noise - sigma * clean, "sample": clean}[prediction_type]
        # the noise is not mirrored with the image: training mirrors first, then adds noise
        assert torch.equal(batch.clean[event], clean)
        assert torch.equal(batch.noise[event], noise)
        # float64: one rounding a term
        torch.testing.assert_close(batch.noisy[event], signal * clean + sigma * noise, rtol=1e-14, atol=1e-14)
        torch.testing.assert_close(batch.target[event], target, rtol=1e-14, atol=1e-14)
    assert batch.timesteps.tolist() == [0, 49, 7]
    assert batch.loss_weight.tolist() == [1, 2, 3]
    assert batch.weight.tolist() == [0, 1 / 7, 2 / 7]


def test_a_batch_in_float32(images: ImageData):
    batch = make_batch(table_of([1], [10], [3], [False]), images, process())
    assert batch.conditions == {} and batch.region is None
    types = {name: array.dtype for name, array in batch.arrays().items()}
    assert types.pop("timesteps") == types.pop("times") == torch.int64
    assert types.pop("weight") == torch.float64
    assert set(types.values()) == {torch.float32}


def test_an_event_does_not_depend_on_its_batch(images: ImageData):
    table = grid_events(images, [3, 0, 1], "train", Grid(3, 2), NUM_TIMESTEPS, seed=0)
    together = make_batch(table, images, process())
    order = np.random.default_rng(0).permutation(len(table))
    permuted = make_batch(table.take(order), images, process())
    for event, place in enumerate(order):
        alone = make_batch(table.take(slice(place, place + 1)), images, process())
        for f in fields(alone):
            if f.name in ("conditions", "region"):
                continue
            assert torch.equal(getattr(alone, f.name)[0], getattr(together, f.name)[place])
            assert torch.equal(getattr(permuted, f.name)[event], getattr(together, f.name)[place])


def test_an_empty_batch(images: ImageData):
    batch = make_batch(grid_events(images, [], "train", Grid(2), NUM_TIMESTEPS, seed=0), images, process())
    assert batch.noisy.shape == (0, 3, 8, 8)


# --- grids


def test_a_grid_lists_rows_then_timesteps_then_draws(images: ImageData):
    table = grid_events(images, [2, 0], "query", Grid(timesteps=3, draws=2), NUM_TIMESTEPS, seed=4)
    assert table.row.tolist() == [2] * 6 + [0] * 6
    assert table.timestep.tolist() == [1, 1, 25, 25, 49, 49] * 2
    want = [
        noise_key(4, "grid", "query", sample_id, timestep, draw)
        for sample_id in ("train-2", "train-0")
        for timestep in (1, 25, 49)
        for draw in (0, 1)
    ]
    assert table.noise_key.tolist() == want
    assert not table.flip.any() and table.loss_weight is None and (table.weight == 1).all()


def keys_of(table: EventTable, images: ImageData) -> dict[tuple[str, int, int], int]:
    """Key by id, timestep, and count within the timestep."""
    seen: dict[tuple[str, int, int], int] = {}
    for row, timestep, key in zip(table.row.tolist(), table.timestep.tolist(), table.noise_key.tolist(), strict=True):
        draw = 0
        while (images.ids[row], timestep, draw) in seen:
            draw += 1
        seen[images.ids[row], timestep, draw] = key
    return seen


def test_noise_depends_on_id_timestep_and_draw_alone(images: ImageData):
    few = keys_of(grid_events(images, [1], "train", Grid(3, 1), NUM_TIMESTEPS, seed=0), images)
    many = keys_of(grid_events(images, [3, 1, 0], "train", Grid(5, 4), NUM_TIMESTEPS, seed=0), images)
    assert few.items() <= many.items()
    permuted = ImageData.from_arrays(images.pixels([1, 3, 0, 2]), [images.ids[row] for row in (1, 3, 0, 2)])
    assert keys_of(grid_events(permuted, [0, 1, 2], "train", Grid(5, 4), NUM_TIMESTEPS, seed=0), permuted) == many
    assert len(set(many.values())) == len(many)
    others: list[tuple[Side, int]] = [("query", 0), ("train", 1)]
    for side, seed in others:
        other = keys_of(grid_events(images, [1], side, Grid(3, 1), NUM_TIMESTEPS, seed=seed), images)
        assert other.keys() == few.keys() and not set(other.values()) & set(few.values())


# --- replays

VISITS = [
    # step, sample id, timestep, key, flip, learning rate, clip coefficient, samples in the step, loss weight
    (1, "train-2", 10, 100, False, 0.1, 1.0, 2, 1.0),
    (1, "train-0", 11, 101, True, 0.1, 1.0, 2, 1.0),
    (2, "train-2", 12, 102, True, 0.2, 0.5, 1, 1.0),
    (3, "train-0", 13, 103, False, 0.4, 0.25, 2, 3.0),
    (3, "train-2", 14, 104, False, 0.4, 0.25, 2, 1.0),
    (4, "train-3", 15, 105, False, 0.8, 1.0, 1, 1.0),
]
"""Of four images; train-1 is never visited."""


def write_record(folder: Path, *, fingerprint: str | None = None, **changes: Any) -> Record:
    folder.mkdir()
    manifest = {"seed": 0, "loss": "mse", "mixed_precision": "no", "prediction_type": "epsilon", "config": {}}
    manifest |= {"format_version": FORMAT_VERSION, "data_fingerprint": fingerprint}
    write_json(folder / "manifest.json", manifest)
    columns = dict(
        zip(
            (
                "step",
                "ids",
                "model_time",
                "noise_key",
                "flip",
                "learning_rate",
                "clip_coefficient",
                "samples_in_step",
                "loss_weight",
            ),
            map(list, zip(*VISITS, strict=True)),
            strict=True,
        )
    )
    ids = columns.pop("ids")
    columns |= {name: [0] * len(VISITS) for name in ("micro_batch", "sigma", "crop_top", "crop_left", "loss")}
    columns |= {"condition_dropped": [False] * len(VISITS), "slot": list(range(len(VISITS)))} | changes
    assert columns.keys() | {"sample", "rank"} == set(SCHEMA.names)
    PartWriter(folder).append(columns, ids)
    return Record.open(folder)


@pytest.fixture
def replays(tmp_path: Path, images: ImageData):
    return Replays(write_record(tmp_path / "record"), images)


def listed(table: EventTable):
    """Row, key, weight."""
    weights = [float(f"{weight:.12g}") for weight in table.weight]
    return list(zip(table.row.tolist(), table.noise_key.tolist(), weights, strict=True))


def test_all_visits_each_with_its_own_weight(replays: Replays):
    # learning rate x clip coefficient / samples in the step
    want = [(0, 101, 0.05), (0, 103, 0.05), (2, 100, 0.05), (2, 102, 0.1), (2, 104, 0.05), (3, 105, 0.8)]
    assert listed(replays.events(0, 4, Replay("all"), "learning_rate")) == want
    assert [w for _, _, w in listed(replays.events(0, 4, Replay("all"), "equal"))] == [1] * 6


def test_the_last_visit_carries_the_weight_of_the_interval(replays: Replays):
    assert listed(replays.events(0, 4, Replay("last"), "learning_rate")) == [
        (0, 103, 0.1),
        (2, 104, 0.2),
        (3, 105, 0.8),
    ]
    assert listed(replays.events(0, 4, Replay("last"), "equal")) == [(0, 103, 1), (2, 104, 1), (3, 105, 1)]


def test_intervals_are_open_below_and_closed_above(replays: Replays):
    assert listed(replays.events(0, 2, Replay("last"), "learning_rate")) == [(0, 101, 0.05), (2, 102, 0.15)]
    assert listed(replays.events(2, 3, Replay("last"), "learning_rate")) == [(0, 103, 0.05), (2, 104, 0.05)]
    for replay in (Replay("last"), Replay("all")):
        for rule in get_args(WeightsRule):
            assert len(replays.events(4, 9, replay, rule)) == 0


def test_published_weights(replays: Replays):
    # learning rate of the last visit x batch size x epochs / size of the training set in whole batches
    whole = 0.6  # 0.8 x 2 x (6 / 4) / 4
    assert listed(replays.events(0, 4, Replay("last"), "published")) == [
        (0, 103, whole),
        (2, 104, whole),
        (3, 105, whole),
    ]
    assert listed(replays.events(0, 2, Replay("last"), "published"))[0] == (0, 101, 0.075)  # 0.2 x 2 x (3 / 4) / 4
    # three images make one whole batch of two
    three = ImageData.from_arrays(toy_images(4).pixels([0, 2, 3]), ["train-0", "train-2", "train-3"])
    found = Replays(replays.record, three).events(0, 4, Replay("last"), "published")
    assert listed(found)[0] == (0, 103, 1.6)  # 0.8 x 2 x (6 / 3) / 2


def test_weights_of_grids(replays: Replays):
    assert replays.grid_weight(0, 4, "learning_rate") == pytest.approx((0.05 * 4 + 0.1 + 0.8) / 4)
    assert replays.grid_weight(0, 4, "published") == pytest.approx(0.8 * 2 * (6 / 4) / 4)
    assert replays.grid_weight(0, 4, "equal") == 1
    assert replays.grid_weight(4, 9, "learning_rate") == 0
    assert replays.grid_weight(4, 9, "published") == 0


def test_a_replayed_event_is_the_visit(replays: Replays):
    table = replays.events(2, 4, Replay("all"), "learning_rate")
    assert table.timestep.tolist() == [13, 14, 15]
    assert table.flip.tolist() == [False] * 3
    assert table.loss_weight.tolist() == [3, 1, 1]
    first = replays.events(0, 2, Replay("last"), "equal")
    assert first.timestep.tolist() == [11, 12] and first.flip.tolist() == [True, True]


def test_visits_as_a_table_keep_their_order(replays: Replays):
    table = replays.table(replays.record.visits_of_step(3))
    assert listed(table) == [(0, 103, 1), (2, 104, 1)]
    assert replays.table(replays.record.visits_of_step(1)).row.tolist() == [2, 0]


def test_the_order_of_the_images_only_numbers_them_anew(replays: Replays, images: ImageData):
    order = [3, 2, 0, 1]
    permuted = ImageData.from_arrays(images.pixels(order), [images.ids[row] for row in order])
    there = listed(Replays(replays.record, permuted).events(0, 4, Replay("last"), "learning_rate"))
    here = listed(replays.events(0, 4, Replay("last"), "learning_rate"))
    assert there == sorted((order.index(row), key, weight) for row, key, weight in here)


def test_a_sample_without_a_visit_has_no_event(replays: Replays):
    assert 1 not in replays.events(0, 4, Replay("all"), "equal").row
    assert 3 not in replays.events(0, 3, Replay("last"), "equal").row


def test_images_without_the_recorded_ids_are_refused(replays: Replays):
    others = ImageData.from_arrays(toy_images(2).pixels([0, 1]), ["train-0", "cat"], source="cats.parquet")
    message = (
        r"is of other images: 2 of its 3 ids are not in cats.parquet, for example train-2, train-3. Give .* --data"
    )
    with pytest.raises(RecordError, match=message):
        Replays(replays.record, others)


def test_images_with_another_fingerprint_are_refused(tmp_path: Path, images: ImageData):
    record = write_record(tmp_path / "record", fingerprint=images.fingerprint)
    check_same_data(record, images)
    pixels = images.pixels(range(4))
    pixels[3, 0, 0, 0] += 0.01
    changed = ImageData.from_arrays(pixels, images.ids)
    message = rf"fingerprint is {changed.fingerprint[:12]}…, the record says {images.fingerprint[:12]}…"
    with pytest.raises(RecordError, match=message):
        Replays(record, changed)


@pytest.mark.parametrize("name", ["crop_top", "crop_left", "condition_dropped"])
def test_crops_and_conditions_that_are_not_known_are_refused(tmp_path: Path, images: ImageData, name: str):
    marked = [k == 3 for k in range(6)]
    column: dict[str, Any] = {name: marked if name == "condition_dropped" else [int(m) for m in marked]}
    record = write_record(tmp_path / "record", **column)
    with pytest.raises(RecordError, match="random crops, which cannot be|conditions were withheld in training, and"):
        Replays(record, images)


def test_a_table_is_taken_by_position_and_mask():
    table = table_of([2, 0, 1], [1, 2, 3], [4, 5, 6], [True, False, True])
    assert listed(table.take(slice(1, None))) == listed(table.take(np.array([False, True, True])))
    assert replace(table.take(slice(0, 1)), row=np.array([9])).row.tolist() == [9]
    assert len(table.take(slice(0, 0))) == 0
