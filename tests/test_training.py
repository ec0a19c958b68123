"""Training: what it does, that it can be repeated and resumed to the same bytes, and what it refuses."""

import json
import os
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from conftest import TOY_MODEL, TOY_TRAINING, toy_images
from whence.checkpoints import WEIGHTS_FILE, check_files, list_checkpoints, load_model
from whence.config import ModelSettings, TrainingSettings
from whence.data import ImageData
from whence.diffusion.noise import drawn_flip, keyed_order, noise_key, normals
from whence.errors import ConfigError, RecordError
from whence.record import Record
from whence.training import check_device, checkpoint_steps, make_model, make_scheduler, train

MODEL = replace(TOY_MODEL, widths=(4, 4), attention_levels=0, norm_groups=2)
# Every feature that has a state of its own, so that a resume has to fetch them all.
EVERYTHING = replace(TOY_TRAINING, ema_decay=0.8, micro_batch_size=3)


def quick_train(folder, data, model=MODEL, settings=TOY_TRAINING):
    return train(folder, data, model, settings, show_progress=False)


def tree(run: Path) -> dict[str, bytes]:
    """All bytes of checkpoints and record, but for what was moved aside."""
    files = [f for part in ("checkpoints", "record") for f in (run / part).rglob("*") if f.is_file()]
    return {f.relative_to(run).as_posix(): f.read_bytes() for f in sorted(files) if "aside" not in f.parts}


def weights(checkpoint, kind="raw"):
    return load_file(checkpoint.weights_folder(kind) / WEIGHTS_FILE)


def flat(state):
    return torch.cat([state[name].flatten() for name in sorted(state)])


@pytest.fixture(scope="module", params=["plain", "everything", "dropout"])
def settings(request):
    return {
        "plain": (MODEL, TOY_TRAINING),
        "everything": (MODEL, EVERYTHING),
        "dropout": (replace(MODEL, dropout=0.2), EVERYTHING),
    }[request.param]


@pytest.fixture(scope="module")
def straight(tmp_path_factory, toy_train, settings):
    """A run that nothing interrupted."""
    run = tmp_path_factory.mktemp("straight") / "run"
    quick_train(run, toy_train, *settings)
    return run


class TestSteps:
    @pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
    @pytest.mark.parametrize("loss", ["mse", "l1"])
    def test_one_step_is_that_of_plain_torch(self, tmp_path, toy_train, prediction_type, loss):
        """AdamW on the mean loss over the batch, clipped, by hand and with diffusers' own scheduler."""
        model_settings = replace(MODEL, prediction_type=prediction_type)
        settings = TrainingSettings(
            epochs=1, batch_size=10, checkpoints=1, warmup_steps=0, schedule="constant", loss=loss, max_grad_norm=0.1
        )
        checkpoint = quick_train(tmp_path, toy_train, model_settings, settings)
        record = Record.open(tmp_path / "record")
        model, scheduler = make_model(model_settings, toy_train, 0).train(), make_scheduler(model_settings)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-6)
        order = [toy_train.ids.index(record.sample_ids[row]) for row in record.visits.sample]
        clean = torch.from_numpy(toy_train.pixels(order))
        noise = torch.from_numpy(np.stack([normals(int(k), clean.shape[1:]) for k in record.visits.noise_key]))
        timesteps = torch.from_numpy(record.visits.timestep)
        prediction = model(scheduler.add_noise(clean, noise, timesteps), timesteps).sample
        targets = {"epsilon": noise, "sample": clean, "v_prediction": scheduler.get_velocity(clean, noise, timesteps)}
        error = prediction - targets[prediction_type]
        losses = (error.abs() if loss == "l1" else error.square()).mean(dim=(1, 2, 3))
        losses.mean().backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        np.testing.assert_allclose(record.visits.loss, losses.detach(), rtol=1e-5)
        np.testing.assert_allclose(record.visits.clip_coefficient, min(1, 0.1 / (float(norm) + 1e-6)), rtol=1e-4)
        for name, value in weights(checkpoint).items():
            # Adam's first step has the size of the learning rate whatever the gradient: rounding counts where it is ~0.
            torch.testing.assert_close(value, model.state_dict()[name], rtol=0, atol=2e-5)

    def test_bf16_trains_float32_weights_to_about_the_same(self, tmp_path, toy_train, toy_run):
        settings = replace(TOY_TRAINING, mixed_precision="bf16")
        checkpoint = quick_train(tmp_path, toy_train, TOY_MODEL, settings)
        assert Record.open(tmp_path / "record").manifest["mixed_precision"] == "bf16"
        full, half = Record.open(toy_run / "record").visits, Record.open(tmp_path / "record").visits
        assert (half.noise_key == full.noise_key).all() and (half.loss != full.loss).any()
        np.testing.assert_allclose(half.loss, full.loss, rtol=0.05)  # bfloat16 has 8 bits
        assert {value.dtype for value in weights(checkpoint).values()} == {torch.float32}

    @pytest.mark.parametrize("micro_batch_size", [1, 3, 4])
    def test_micro_batches_give_the_weights_of_the_whole_batch(self, tmp_path, toy_train, toy_run, micro_batch_size):
        settings = replace(TOY_TRAINING, micro_batch_size=micro_batch_size)
        checkpoint = quick_train(tmp_path, toy_train, TOY_MODEL, settings)
        start = flat(make_model(TOY_MODEL, toy_train, 0).state_dict())
        want, found = flat(weights(list_checkpoints(toy_run)[-1])), flat(weights(checkpoint))
        # Of the way that training went. Adam turns the rounding of gradients that are nearly 0 into steps of any size.
        assert (found - want).norm() < 1e-3 * (want - start).norm()
        parts, whole = (Record.open(run / "record").visits for run in (tmp_path, toy_run))
        for column in ("step", "sample", "noise_key", "flip", "samples_in_step", "learning_rate"):
            assert (getattr(parts, column) == getattr(whole, column)).all()
        np.testing.assert_allclose(parts.clip_coefficient, whole.clip_coefficient, rtol=1e-3)
        assert parts.micro_batch.max() == -(-4 // micro_batch_size) - 1

    def test_ema_is_the_moving_average_of_the_raw_weights(self, tmp_path, toy_train):
        """One checkpoint a step: the average follows from the raw weights by diffusers' own warm-up of the decay."""
        settings = replace(TOY_TRAINING, epochs=3, batch_size=10, checkpoints=3, ema_decay=0.3)
        quick_train(tmp_path, toy_train, MODEL, settings)
        average = dict(make_model(MODEL, toy_train, 0).named_parameters())
        for step, checkpoint in enumerate(list_checkpoints(tmp_path), start=1):
            decay = min(0.3, step / (9 + step)) if step > 1 else 0.0
            raw, ema = weights(checkpoint), weights(checkpoint, "ema")
            average = {name: decay * average[name].detach() + (1 - decay) * raw[name] for name in raw}
            for name, value in ema.items():
                torch.testing.assert_close(value, average[name], rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
    def test_learning_rates_follow_the_schedule(self, tmp_path, toy_train, schedule):
        settings = replace(TOY_TRAINING, warmup_steps=4, schedule=schedule, learning_rate=0.01)
        quick_train(tmp_path, toy_train, MODEL, settings)
        visits = Record.open(tmp_path / "record").visits
        _, first = np.unique(visits.step, return_index=True)
        done = np.arange(12)  # optimizer steps taken before
        left = (done - 4) / 8
        after = {"constant": np.ones(12), "linear": 1 - left, "cosine": 0.5 * (1 + np.cos(np.pi * left))}[schedule]
        want = 0.01 * np.where(done < 4, done / 4, after)
        np.testing.assert_allclose(visits.learning_rate[first], want, rtol=1e-12, atol=1e-18)


class TestRecord:
    def test_every_image_is_visited_once_an_epoch(self, toy_run, toy_train):
        record = Record.open(toy_run / "record")
        assert record.visits.samples_in_step.tolist() == ([4] * 8 + [2] * 2) * 4  # 10 images in fours: 4, 4, 2
        for epoch in range(4):
            visits = record.visits.where((record.visits.step - 1) // 3 == epoch)
            order = [record.sample_ids[row] for row in visits.sample]
            assert Counter(order) == Counter(toy_train.ids)
            assert order == [toy_train.ids[row] for row in keyed_order(0, epoch, 10)]

    def test_keys_and_flips_are_functions_of_seed_id_and_step(self, toy_run):
        record = Record.open(toy_run / "record")
        visits = record.visits
        for sample, step, key, flip in zip(visits.sample, visits.step, visits.noise_key, visits.flip, strict=True):
            assert int(key) == noise_key(0, "record", "train", record.sample_ids[sample], int(step))
            assert bool(flip) == drawn_flip(int(key))

    def test_the_step_after_the_last_is_probed(self, toy_run, toy_train):
        probes = Record.open(toy_run / "record").probes
        assert set(probes.step) == {13} and len(probes) == 4
        assert not probes.weight.any()

    def test_the_manifest_names_settings_and_data(self, toy_run, toy_train):
        manifest = Record.open(toy_run / "record").manifest
        assert manifest["data_fingerprint"] == toy_train.fingerprint
        assert manifest["config"]["batch_size"] == 4 and manifest["config"]["model"]["widths"] == [8, 8]
        assert (manifest["max_grad_norm"], manifest["loss"], manifest["prediction_type"]) == (0.5, "mse", "epsilon")

    def test_no_flips_unless_asked_for(self, tmp_path, toy_train):
        quick_train(tmp_path, toy_train, MODEL, replace(TOY_TRAINING, random_flip=False))
        assert not Record.open(tmp_path / "record").visits.flip.any()

    def test_a_single_image_can_be_trained_on(self, tmp_path):
        quick_train(tmp_path, toy_images(1), MODEL, TOY_TRAINING)
        assert Record.open(tmp_path / "record").visits.samples_in_step.tolist() == [1] * 4


class TestCheckpointSteps:
    @pytest.mark.parametrize(
        "num_images, epochs, batch_size, checkpoints, want",
        [
            (10, 4, 4, 2, [6, 12]),
            (10, 4, 4, 4, [3, 6, 9, 12]),
            (10, 5, 4, 2, [6, 15]),  # 2.5 epochs is 2: halves to even
            (8, 3, 4, 1, [6]),
            (3, 2, 100, 2, [1, 2]),
            (1, 1, 1, 1, [1]),
        ],
    )
    def test_they_are_ends_of_epochs(self, num_images, epochs, batch_size, checkpoints, want):
        settings = TrainingSettings(epochs=epochs, batch_size=batch_size, checkpoints=checkpoints)
        assert checkpoint_steps(num_images, settings) == want

    def test_they_are_where_checkpoints_are(self, toy_run, toy_train):
        assert [c.step for c in list_checkpoints(toy_run)] == checkpoint_steps(len(toy_train), TOY_TRAINING)

    @pytest.mark.parametrize("checkpoints", [0, 5])
    def test_more_checkpoints_than_epochs_are_refused(self, checkpoints):
        with pytest.raises(ConfigError, match=f"checkpoints must be 1 to 4, the number of epochs.*found {checkpoints}"):
            checkpoint_steps(10, replace(TOY_TRAINING, checkpoints=checkpoints))


class TestSameBytes:
    def test_a_second_run_has_the_same_bytes(self, tmp_path, toy_train, straight, settings):
        torch.manual_seed(12345)  # whatever was drawn before
        quick_train(tmp_path / "again", toy_train, *settings)
        assert tree(tmp_path / "again") == tree(straight)

    def test_a_resumed_run_has_the_same_bytes(self, tmp_path, toy_train, straight, settings):
        run = tmp_path / "run"
        shutil.copytree(straight, run)
        shutil.rmtree(run / "checkpoints" / "checkpoint-12")
        torch.manual_seed(54321)
        quick_train(run, toy_train, *settings)
        assert tree(run) == tree(straight)
        assert (run / "record" / "aside").is_dir()
        check_files(list_checkpoints(run)[-1])

    def test_a_run_killed_before_its_first_checkpoint_has_the_same_bytes(self, tmp_path, toy_train, straight, settings):
        run = tmp_path / "run"
        shutil.copytree(straight, run)
        shutil.rmtree(run / "checkpoints")
        quick_train(run, toy_train, *settings)
        assert tree(run) == tree(straight)

    def test_a_finished_run_is_left_as_it_is(self, toy_train, straight, settings):
        before = {f: f.stat().st_mtime_ns for f in straight.rglob("*") if f.is_file() and f.suffix != ".lock"}
        checkpoint = quick_train(straight, toy_train, *settings)
        assert checkpoint.step == 12
        assert {f: f.stat().st_mtime_ns for f in before} == before
        assert not (straight / "record" / "aside").exists()

    def test_another_seed_has_other_weights_and_another_order(self, tmp_path, toy_train, toy_run):
        quick_train(tmp_path, toy_train, TOY_MODEL, replace(TOY_TRAINING, seed=1))
        ours, theirs = Record.open(tmp_path / "record"), Record.open(toy_run / "record")
        assert ours.sample_ids != theirs.sample_ids
        assert not set(ours.visits.noise_key.tolist()) & set(theirs.visits.noise_key.tolist())

    def test_the_global_generator_is_not_disturbed(self, tmp_path, toy_train):
        torch.manual_seed(7)
        before = torch.get_rng_state()
        quick_train(tmp_path, toy_train, replace(MODEL, dropout=0.2), replace(EVERYTHING, epochs=2))
        assert torch.equal(torch.get_rng_state(), before)


class TestRefusals:
    @pytest.mark.parametrize(
        "changed, message",
        [
            ({"epochs": 0}, "epochs must be above 0, found 0"),
            ({"batch_size": -1}, "batch_size must be above 0, found -1"),
            ({"checkpoints": 0}, "checkpoints must be above 0"),
            ({"learning_rate": 0.0}, "learning_rate must be above 0 and finite, found 0.0"),
            ({"learning_rate": float("nan")}, "learning_rate must be above 0 and finite, found nan"),
            ({"max_grad_norm": 0.0}, "max_grad_norm must be above 0 and finite, found 0.0"),
            ({"max_grad_norm": float("inf")}, "max_grad_norm must be above 0 and finite, found inf"),
            ({"adam_beta1": 1.0}, "adam_beta1 must be at least 0 and below 1, found 1.0"),
            ({"adam_beta2": -0.1}, "adam_beta2 must be at least 0 and below 1, found -0.1"),
            ({"weight_decay": float("nan")}, "weight_decay must be finite and not negative, found nan"),
            ({"weight_decay": -1.0}, "weight_decay must be finite and not negative, found -1.0"),
            ({"seed": 2**63}, r"seed must be from -2\^63 to 2\^63 - 1, found 9223372036854775808"),
            ({"warmup_steps": -1}, "warmup_steps must not be negative, found -1"),
            ({"micro_batch_size": 0}, "micro_batch_size must be 1 to batch_size = 4, found 0"),
            ({"micro_batch_size": 5}, "micro_batch_size must be 1 to batch_size = 4, found 5"),
            ({"ema_decay": 1.0}, "ema_decay must lie between 0 and 1"),
            ({"mixed_precision": "fp16"}, "fp16 needs a GPU; use bf16 or no"),
            ({"epochs": 0, "ema_decay": 2.0}, "epochs must be above 0.*; ema_decay must lie"),
            ({"checkpoints": 5}, "checkpoints must be 1 to 4"),
        ],
    )
    def test_contradictory_settings(self, tmp_path, toy_train, changed, message):
        with pytest.raises(ConfigError, match=message):
            quick_train(tmp_path / "run", toy_train, MODEL, replace(TOY_TRAINING, **changed))
        assert not (tmp_path / "run").exists()

    @pytest.mark.parametrize(
        "name, known", [("loss", "mse, l1"), ("schedule", "constant, cosine, linear"), ("mixed_precision", "no, bf16")]
    )
    def test_unknown_names(self, tmp_path, toy_train, name, known):
        settings = replace(TOY_TRAINING)
        object.__setattr__(settings, name, "other")  # the checks of the tests refuse it in the constructor
        with pytest.raises(ConfigError, match=f"{name} must be one of {known}.*, found other"):
            quick_train(tmp_path, toy_train, MODEL, settings)

    @pytest.mark.parametrize(
        "changed, message",
        [
            ({"widths": (4, 4, 4, 4, 4)}, "must be multiples of 16; found 8 x 8 pixels"),
            ({"widths": (4, 6), "norm_groups": 4}, r"each width in \(4, 6\) must be a multiple of norm_groups = 4"),
            ({"widths": (8, 4), "attention_levels": 1}, r"with attention must be a multiple of 8.*; found \(4,\)"),
            ({"attention_levels": 3}, "attention_levels must be 0 to 2, the number of widths; found 3"),
            ({"norm_groups": 0}, "^norm_groups must be above 0, found 0.$"),
            ({"widths": ()}, r"^widths must be one or more numbers of channels above 0, found \(\).$"),
            ({"widths": (4, 0)}, r"^widths must be .* above 0, found \(4, 0\).$"),
            ({"widths": (-4,)}, r"^widths must be .* above 0, found \(-4,\).$"),
            ({"layers_per_block": 0}, "layers_per_block must be above 0, found 0"),
            ({"dropout": 1.0}, "dropout must be at least 0 and below 1, found 1.0"),
            ({"dropout": float("nan")}, "dropout must be at least 0 and below 1, found nan"),
            ({"train_timesteps": 1}, "needs at least 2 timesteps, found 1"),
        ],
    )
    def test_models_that_cannot_be_made(self, tmp_path, toy_train, changed, message):
        with pytest.raises(ConfigError, match=message):
            quick_train(tmp_path / "run", toy_train, replace(MODEL, **changed))
        assert not (tmp_path / "run").exists()

    def test_all_faults_are_told_at_once(self, tmp_path, toy_train):
        with pytest.raises(ConfigError, match="^dropout .*; norm_groups .*; epochs .*; Device 'foo'"):
            train(
                tmp_path / "run",
                toy_train,
                replace(MODEL, norm_groups=0, dropout=2.0),
                replace(TOY_TRAINING, epochs=0),
                device="foo",
            )
        assert not (tmp_path / "run").exists()

    @pytest.mark.parametrize("device", ["foo", "cuda:99", "meta"])
    def test_a_device_that_is_not_there(self, tmp_path, toy_train, device):
        with pytest.raises(ConfigError, match=f"Device '{device}' cannot be used: .* Give cpu, or a device of this"):
            train(tmp_path / "run", toy_train, MODEL, TOY_TRAINING, device=device)
        assert not (tmp_path / "run").exists()
        check_device("cpu")

    @pytest.mark.parametrize("name", ["notes", "notes/run"])
    def test_a_file_in_the_place_of_the_folder(self, tmp_path, toy_train, name):
        (tmp_path / "notes").write_text("mine")
        with pytest.raises(ConfigError, match="^--out must be a folder; .*notes is a file.$"):
            quick_train(tmp_path / name, toy_train)
        assert (tmp_path / "notes").read_text() == "mine"

    def test_a_folder_whose_name_is_not_utf_8(self, tmp_path, toy_train):
        run = tmp_path / os.fsdecode(b"out\xff")
        quick_train(run, toy_train, MODEL, replace(TOY_TRAINING, epochs=2))
        assert len(Record.open(run / "record").visits) == 20

    def test_images_whose_sides_cannot_be_halved(self, tmp_path):
        data = ImageData.from_arrays(np.zeros((2, 3, 8, 7), np.float32), ["a", "b"])
        with pytest.raises(ConfigError, match="their sides must be multiples of 2; found 7 x 8 pixels"):
            quick_train(tmp_path, data)

    @pytest.mark.parametrize(
        "model, changed, message",
        [
            (MODEL, {"learning_rate": 1.0}, "config.learning_rate is 0.001 in the record, 1.0 now"),
            (replace(MODEL, dropout=0.5), {}, "config.model.dropout is 0.0 in the record, 0.5 now"),
            (replace(MODEL, widths=(8, 8)), {}, r"config.model.widths is \[4, 4\] in the record, \[8, 8\] now"),
        ],
    )
    def test_a_run_with_other_settings(self, tmp_path, toy_train, model, changed, message):
        quick_train(tmp_path, toy_train, MODEL, replace(TOY_TRAINING, epochs=2))
        before = tree(tmp_path)
        with pytest.raises(RecordError, match=message):
            quick_train(tmp_path, toy_train, model, replace(TOY_TRAINING, epochs=2, **changed))
        assert tree(tmp_path) == before

    def test_a_run_with_other_data(self, tmp_path, toy_train):
        quick_train(tmp_path, toy_train, MODEL, replace(TOY_TRAINING, epochs=2))
        with pytest.raises(RecordError, match="data_fingerprint is '.*' in the record, '.*' now"):
            quick_train(tmp_path, toy_images(10, seed=5), MODEL, replace(TOY_TRAINING, epochs=2))

    def test_checkpoints_without_their_record(self, tmp_path, toy_train):
        quick_train(tmp_path, toy_train, MODEL, replace(TOY_TRAINING, epochs=2))
        shutil.rmtree(tmp_path / "record")
        with pytest.raises(RecordError, match="checkpoint-6 is a checkpoint without the record of its training"):
            quick_train(tmp_path, toy_train, MODEL, replace(TOY_TRAINING, epochs=2))


def test_a_model_depends_on_its_seed_alone(toy_train):
    torch.manual_seed(1)
    first = make_model(TOY_MODEL, toy_train, 3).state_dict()
    torch.manual_seed(2)
    second = make_model(TOY_MODEL, toy_train, 3).state_dict()
    other = make_model(TOY_MODEL, toy_train, 4).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["conv_in.weight"], other["conv_in.weight"])


def test_a_model_is_as_its_settings_say(toy_train):
    settings = ModelSettings(widths=(8, 16), layers_per_block=2, attention_levels=1, norm_groups=4, dropout=0.1)
    config = make_model(settings, toy_train, 0).config
    assert tuple(config.block_out_channels) == (8, 16) and tuple(config.sample_size) == (8, 8)
    assert config.down_block_types == ("DownBlock2D", "AttnDownBlock2D")
    assert config.up_block_types == ("AttnUpBlock2D", "UpBlock2D")
    assert (config.layers_per_block, config.norm_num_groups, config.dropout) == (2, 4, 0.1)
    plain = make_model(replace(settings, attention_levels=0), toy_train, 0)
    assert not [name for name, _ in plain.named_parameters() if "attentions" in name]


def test_checkpoints_load_as_what_was_trained(toy_run):
    for checkpoint in list_checkpoints(toy_run):
        check_files(checkpoint)
        state = json.loads((checkpoint.folder / "resume" / "state.json").read_text())
        assert state["learning_rates"]["last_epoch"] == checkpoint.step
        names = {name for name, _ in load_model(checkpoint).named_parameters()}
        saved = load_file(checkpoint.folder / "resume" / "optimizer.safetensors")
        assert saved.keys() == {f"{field}.{name}" for name in names for field in ("step", "exp_avg", "exp_avg_sq")}
