"""The replay check passes on what training wrote, and fails when one thing of it is altered."""

from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import TOY_MODEL, TOY_TRAINING, toy_images
from whence.checkpoints import list_checkpoints
from whence.data import ImageData
from whence.errors import CheckpointError, RecordError
from whence.record import Record
from whence.replay_check import check_run
from whence.subject import Subject
from whence.training import train


@pytest.fixture
def subject(toy_run, toy_train):
    return Subject(list_checkpoints(toy_run), toy_train, Record.open(toy_run / "record"), "mse")


def altered(subject, step, **columns):
    """The subject with a column changed at the first visit of a step (or in the probe taken in its place)."""
    record = subject.record
    kind = "visits" if (record.visits.step == step).any() else "probes"
    visits = getattr(record, kind)
    first = int(np.flatnonzero(visits.step == step)[0])
    changed = {}
    for name, change in columns.items():
        changed[name] = getattr(visits, name).copy()
        changed[name][first] = change(changed[name][first])
    return replace(subject, record=replace(record, **{kind: replace(visits, **changed)}))


def verdicts(rows):
    return {row.what: row.verdict for row in rows}


def test_a_true_record_passes_at_every_checkpoint_the_last_included(subject):
    assert verdicts(check_run(subject)) == {"keys": "passed", "checkpoint 6": "passed", "checkpoint 12": "passed"}


@pytest.mark.parametrize("step, checkpoint", [(7, "checkpoint 6"), (13, "checkpoint 12")])
@pytest.mark.parametrize(
    "column, change, keys",
    [
        ("noise_key", lambda key: key + np.uint64(1), "failed"),
        ("flip", lambda flip: not flip, "failed"),
        ("timestep", lambda timestep: (timestep + 1) % 50, "failed"),
        ("loss_weight", lambda weight: weight * 1.01, "passed"),
        ("loss", lambda loss: loss * 1.0001, "passed"),
    ],
)
def test_one_altered_value_fails(subject, step, checkpoint, column, change, keys):
    found = verdicts(check_run(altered(subject, step, **{column: change})))
    assert found[checkpoint] == "failed"
    assert found["keys"] == keys
    assert [v for what, v in found.items() if what not in (checkpoint, "keys")] == ["passed"]


def test_an_altered_key_far_from_any_checkpoint_fails_too(subject):
    found = verdicts(check_run(altered(subject, 3, noise_key=lambda key: key ^ np.uint64(1))))
    assert found == {"keys": "failed", "checkpoint 6": "passed", "checkpoint 12": "passed"}


def test_one_altered_weight_of_the_model_fails(subject, toy_train, tmp_path):
    import shutil

    folder = tmp_path / "run"
    shutil.copytree(subject.checkpoints[0].folder.parents[1], folder)
    path = folder / "checkpoints" / "checkpoint-6" / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    weights["conv_in.weight"][0, 0, 0, 0] += 0.05
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="damaged or was altered"):
        check_run(Subject(list_checkpoints(folder), toy_train, Record.open(folder / "record"), "mse"))
    (folder / "checkpoints" / "checkpoint-6" / "checkpoint.json").unlink()  # as in a folder whence did not write
    rows = check_run(Subject(list_checkpoints(folder), toy_train, Record.open(folder / "record"), "mse"))
    assert verdicts(rows)["checkpoint 6"] == "failed"


def test_other_images_under_the_same_ids_are_refused(subject, toy_train):
    pixels = toy_train.pixels(range(10)).copy()
    pixels[3] = -pixels[3]
    other = ImageData.from_arrays(pixels, toy_train.ids)
    with pytest.raises(RecordError, match="not those that were trained on"):
        check_run(replace(subject, train=other))


def test_a_model_with_dropout_is_told_to_be_not_checkable(tmp_path, toy_train):
    train(tmp_path, toy_train, replace(TOY_MODEL, dropout=0.1), replace(TOY_TRAINING, epochs=2), show_progress=False)
    rows = check_run(Subject(list_checkpoints(tmp_path), toy_train, Record.open(tmp_path / "record"), "mse"))
    assert [row.verdict for row in rows[1:]] == ["not checkable", "not checkable"]
    assert "dropout" in rows[1].detail


@pytest.mark.parametrize("precision, micro_batch_size", [("bf16", None), ("no", 3)])
def test_autocast_and_micro_batches_are_replayed(tmp_path, toy_train, precision, micro_batch_size):
    settings = replace(TOY_TRAINING, epochs=2, mixed_precision=precision, micro_batch_size=micro_batch_size, loss="l1")
    train(tmp_path, toy_train, TOY_MODEL, settings, show_progress=False)
    subject = Subject(list_checkpoints(tmp_path), toy_train, Record.open(tmp_path / "record"), "l1")
    assert {row.verdict for row in check_run(subject)} == {"passed"}
    assert "failed" in verdicts(check_run(altered(subject, 4, flip=lambda flip: not flip))).values()


def test_the_check_leaves_torchs_random_state_alone(subject):
    before = torch.get_rng_state()
    check_run(subject)
    assert torch.equal(before, torch.get_rng_state())


def test_toy_images_are_not_symmetric():
    """A flip of a symmetric image changes nothing, and the tests above would prove nothing."""
    pixels = toy_images(10).pixels(range(10))
    assert (np.abs(pixels - pixels[..., ::-1]).max((1, 2, 3)) > 0.1).all()


def test_another_scheduler_than_that_of_the_training_is_refused(subject):
    manifest = deepcopy(subject.record.manifest)
    manifest["scheduler"]["config"]["beta_end"] = 0.03
    with pytest.raises(CheckpointError, match="makes another noise or target than the one that training had"):
        _ = replace(subject, record=replace(subject.record, manifest=manifest)).process
