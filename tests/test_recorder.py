"""The recorder in a training loop that is not ours, and what it refuses."""

import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass

import filelock
import jaxtyping
import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, UNet2DModel
from torch.utils.data import DataLoader, TensorDataset

from whence.checkpoints import list_checkpoints, load_model
from whence.diffusion.noise import noise_key, normals
from whence.errors import InUseError, NumericsError, RecordError, UnsupportedModelError
from whence.record import Record
from whence.recorder import Recorder, flip_where


def tiny_model():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return UNet2DModel(
            sample_size=4,
            in_channels=1,
            out_channels=1,
            layers_per_block=1,
            block_out_channels=(4,),
            down_block_types=("DownBlock2D",),
            up_block_types=("UpBlock2D",),
            norm_num_groups=2,
            add_attention=False,
        )


def make_recorder(folder, **changed):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.25)
    scheduler = DDPMScheduler(num_train_timesteps=100)
    return Recorder(folder, **({"scheduler": scheduler, "optimizer": optimizer, "config": {"seed": 3}} | changed))


def take_step(recorder, ids, **options):
    noise, timesteps = recorder.draw(ids, like=torch.zeros(len(ids), 1, 4, 4))
    recorder.step(torch.full((len(ids),), 0.5), **options)
    return noise, timesteps


def flat_gradient(model):
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.fixture
def recorder(tmp_path):
    with make_recorder(tmp_path / "run") as made:
        yield made


@pytest.fixture
def as_in_use(monkeypatch):
    """Annotations unchecked, as they are outside of the tests: otherwise they refuse before the recorder does."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.fixture(scope="module")
def foreign_run(tmp_path_factory):
    """A plain torch loop over 10 images in batches of 4, with the recorder's four lines in it."""
    run = tmp_path_factory.mktemp("foreign") / "run"
    images = torch.rand(10, 1, 4, 4, generator=torch.Generator().manual_seed(1)) * 2 - 1
    loader = DataLoader(
        TensorDataset(images, torch.arange(100, 110)),
        batch_size=4,
        shuffle=True,
        generator=torch.Generator().manual_seed(2),
    )
    model, scheduler = tiny_model(), DDPMScheduler(num_train_timesteps=100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    learning_rates = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)
    seen = []  # what the record should say
    with Recorder(run, scheduler=scheduler, optimizer=optimizer, config={"seed": 3, "max_grad_norm": 0.05}) as recorder:
        for epoch in range(3):
            for clean, ids in loader:
                noise, timesteps = recorder.draw(ids, like=clean)
                prediction = model(scheduler.add_noise(clean, noise, timesteps), timesteps).sample
                loss = (prediction - noise).square().mean(dim=(1, 2, 3))
                loss.mean().backward()
                before = flat_gradient(model)
                grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)
                after = flat_gradient(model)
                rate = learning_rates.get_last_lr()[0]
                optimizer.step()
                recorder.step(loss, grad_norm)
                learning_rates.step()
                optimizer.zero_grad()
                multiplied = float((after.double() @ before.double()) / (before.double() @ before.double()))
                seen.append((ids.tolist(), timesteps.tolist(), noise, loss.detach(), rate, multiplied))
            if epoch != 1:
                recorder.save(model)
    return run, seen, scheduler, model


class TestForeignLoop:
    def test_every_visit_is_there_with_nothing_dropped(self, foreign_run):
        record = Record.open(foreign_run[0] / "record")
        assert len(record.visits) == 30
        for first in (1, 4, 7):
            epoch = record.visits.where((record.visits.step >= first) & (record.visits.step < first + 3))
            ids = Counter(record.sample_ids[row] for row in epoch.sample)
            assert ids == {str(i): 1 for i in range(100, 110)}

    def test_columns_are_what_the_loop_saw(self, foreign_run):
        run, seen, scheduler, _ = foreign_run
        record = Record.open(run / "record")
        for step, (ids, timesteps, noise, loss, rate, multiplied) in enumerate(seen, start=1):
            visits = record.visits_of_step(step)
            assert [record.sample_ids[row] for row in visits.sample] == [str(i) for i in ids]
            assert visits.model_time.tolist() == timesteps
            assert visits.timestep.tolist() == timesteps
            sigma = (1 - scheduler.alphas_cumprod[timesteps].double()).sqrt()
            np.testing.assert_allclose(visits.sigma, sigma.float(), rtol=1e-7)
            np.testing.assert_array_equal(visits.loss, loss)
            assert set(visits.learning_rate) == {rate}  # of this step, not of the next
            # The clipping itself runs in float32, over gradients of any size.
            np.testing.assert_allclose(visits.clip_coefficient, multiplied, rtol=1e-5)
            assert set(visits.samples_in_step) == {2 if step % 3 == 0 else 4}  # the rest of 10 in fours
            assert visits.slot.tolist() == list(range(len(ids)))
            for k, (sample_id, key) in enumerate(zip(ids, visits.noise_key, strict=True)):
                assert int(key) == noise_key(3, "record", "train", str(sample_id), step)
                np.testing.assert_array_equal(noise[k], normals(int(key), (1, 4, 4)))
        assert any(multiplied < 0.9 for *_, multiplied in seen)  # some steps really were clipped
        visits = record.visits
        assert not (visits.flip.any() or visits.crop_top.any() or visits.condition_dropped.any() or visits.rank.any())
        assert (visits.loss_weight == 1).all()

    def test_checkpoints_are_those_of_the_loop(self, foreign_run):
        run, _, _, model = foreign_run
        checkpoints = list_checkpoints(run)
        assert [c.step for c in checkpoints] == [3, 9]
        for name, value in load_model(checkpoints[-1]).state_dict().items():
            assert torch.equal(value, model.state_dict()[name])

    def test_parts_close_at_checkpoints(self, foreign_run):
        parts = json.loads((foreign_run[0] / "record" / "parts-0.json").read_text())
        assert [(p["first_step"], p["last_step"], p["rows"]["num_rows"]) for p in parts] == [(1, 3, 10), (4, 9, 20)]
        assert parts[0]["samples"]["num_rows"] == 10 and parts[1]["samples"] is None

    def test_the_manifest_says_how_it_was_trained(self, foreign_run):
        manifest = Record.open(foreign_run[0] / "record").manifest
        assert manifest["seed"] == 3 and manifest["max_grad_norm"] == 0.05 and manifest["loss"] == "mse"
        assert manifest["scheduler"]["class"] == "DDPMScheduler"
        assert manifest["scheduler"]["config"]["num_train_timesteps"] == 100
        assert {"python", "whence", "torch", "diffusers", "numpy"} <= manifest["versions"].keys()

    def test_diffusers_notes_to_itself_stay_out_of_the_manifest(self, foreign_run):
        """One of them is a set in disguise: its order differs between processes, and a resume would be refused."""
        config = Record.open(foreign_run[0] / "record").manifest["scheduler"]["config"]
        assert not [name for name in config if name.startswith("_")]


class TestRows:
    def test_one_id_twice_in_a_step_gets_two_noises(self, recorder):
        noise, _ = take_step(recorder, ["a", "b", "a"])
        assert not torch.equal(noise[0], noise[2])
        recorder.close_part()
        keys = Record.open(recorder.folder / "record").visits.noise_key.tolist()
        want = [("a", 0), ("b", 0), ("a", 1)]
        assert keys == [noise_key(3, "record", "train", i, 1, occurrence=n) for i, n in want]

    def test_occurrences_count_over_the_micro_batches_of_a_step_and_start_again(self, recorder):
        like = torch.zeros(1, 1, 4, 4)
        for _ in range(2):
            recorder.draw(["a"], like=like)
            recorder.accumulate(torch.tensor([0.5]))
            take_step(recorder, ["a"])
        recorder.close_part()
        visits = Record.open(recorder.folder / "record").visits
        want = [(1, 0), (1, 1), (2, 0), (2, 1)]
        assert visits.noise_key.tolist() == [noise_key(3, "record", "train", "a", s, occurrence=n) for s, n in want]

    def test_gradient_accumulation_is_one_step_of_several_passes(self, recorder):
        for ids in (["a", "b"], ["c", "d"]):
            recorder.draw(ids, like=torch.zeros(2, 1, 4, 4))
            recorder.accumulate(torch.tensor([0.1, 0.2]))
        take_step(recorder, ["e"])
        take_step(recorder, ["a"])
        recorder.close_part()
        visits = Record.open(recorder.folder / "record").visits
        assert visits.step.tolist() == [1] * 5 + [2]
        assert visits.micro_batch.tolist() == [0, 0, 1, 1, 2, 0]
        assert visits.slot.tolist() == [0, 1, 0, 1, 0, 0]
        assert visits.samples_in_step.tolist() == [5] * 5 + [1]

    def test_samples_in_step_counts_other_processes_where_told(self, recorder):
        take_step(recorder, ["a"], samples_in_step=8)
        recorder.close_part()
        (weight,) = Record.open(recorder.folder / "record").visits.weight
        assert weight == 0.25 / 8

    def test_flips_are_drawn_applied_and_written_down(self, recorder):
        images = torch.arange(160.0).view(10, 1, 4, 4)
        ids = [f"image {k}" for k in range(10)]
        flipped = recorder.flip(ids, images)
        recorder.draw(ids, like=flipped)
        recorder.step(torch.ones(10))
        recorder.close_part()
        flips = torch.from_numpy(Record.open(recorder.folder / "record").visits.flip)
        assert 0 < flips.sum() < 10
        assert torch.equal(flipped[flips], images[flips].flip(-1)) and torch.equal(flipped[~flips], images[~flips])
        assert torch.equal(flip_where(flipped, flips), images)

    def test_what_the_caller_did_to_the_batch_is_written_down(self, recorder):
        recorder.draw(
            [1, 2],
            like=torch.zeros(2, 1, 4, 4),
            crops=torch.tensor([[3, 4], [0, 1]]),
            condition_dropped=torch.tensor([True, False]),
        )
        recorder.step(torch.tensor([1.0, 2.0]), loss_weight=torch.tensor([0.5, 4.0]))
        recorder.close_part()
        visits = Record.open(recorder.folder / "record").visits
        assert (visits.crop_top.tolist(), visits.crop_left.tolist()) == ([3, 0], [4, 1])
        assert visits.condition_dropped.tolist() == [True, False]
        assert visits.loss_weight.tolist() == [0.5, 4.0] and visits.loss.tolist() == [1.0, 2.0]

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
    def test_noise_has_the_type_of_the_images(self, recorder, dtype):
        noise, _ = recorder.draw(["a"], like=torch.zeros(1, 1, 4, 4, dtype=dtype))
        want = torch.from_numpy(normals(noise_key(3, "record", "train", "a", 1), (1, 4, 4))).to(dtype)
        assert torch.equal(noise[0], want)

    def test_a_skipped_step_weighs_nothing(self, recorder):
        take_step(recorder, ["a"], skipped=True, grad_norm=float("inf"))
        recorder.close_part()
        visits = Record.open(recorder.folder / "record").visits
        assert (visits.step.tolist(), visits.weight.tolist()) == ([1], [0.0])

    def test_numbers_of_ids_are_texts(self, recorder):
        recorder.draw(np.array([7, 8]), like=torch.zeros(2, 1, 4, 4))
        recorder.step(torch.ones(2))
        recorder.close_part()
        assert Record.open(recorder.folder / "record").sample_ids == ("7", "8")

    def test_a_probe_is_no_training(self, recorder):
        take_step(recorder, ["a"])
        recorder.close_part()
        assert not recorder.has_probe()
        recorder.draw(["b", "a"], like=torch.zeros(2, 1, 4, 4))
        recorder.probe(torch.tensor([0.1, 0.2]))
        assert recorder.has_probe()
        record = Record.open(recorder.folder / "record")
        assert (len(record.visits), record.probes.step.tolist()) == (1, [2, 2])
        assert record.probes.weight.tolist() == [0.0, 0.0]
        # The step that comes next draws what the probe drew: it is that step, untrained.
        noise, _ = take_step(recorder, ["b"])
        np.testing.assert_array_equal(noise[0], normals(int(record.probes.noise_key[0]), (1, 4, 4)))


class TestRanks:
    def test_two_processes_record_into_one_run(self, tmp_path):
        with make_recorder(tmp_path) as first, make_recorder(tmp_path, rank=1) as second:
            for _ in range(2):
                take_step(first, ["a", "b"], samples_in_step=3)
                take_step(second, ["c"], samples_in_step=3)
            second.close_part()
            first.save(tiny_model())
        record = Record.open(tmp_path / "record")
        assert record.visits.step.tolist() == [1, 1, 1, 2, 2, 2]
        assert record.visits.rank.tolist() == [0, 0, 1] * 2
        assert [record.sample_ids[row] for row in record.visits.sample] == ["a", "b", "c"] * 2
        assert set(record.visits.samples_in_step) == {3}

    def test_one_sample_on_two_ranks_has_two_noises(self, tmp_path):
        with make_recorder(tmp_path) as first, make_recorder(tmp_path, rank=1) as second:
            noises = [take_step(recorder, ["a"])[0] for recorder in (first, second)]
        assert not torch.equal(*noises)

    def test_only_rank_0_writes_checkpoints(self, tmp_path):
        with make_recorder(tmp_path, rank=1) as second:
            take_step(second, ["a"])
            with pytest.raises(RecordError, match=r"Only rank 0 writes checkpoints; this is rank 1. Call close_part"):
                second.save(tiny_model())


class TestResume:
    @pytest.fixture
    def run(self, tmp_path):
        """Checkpoints at steps 1 and 3, steps up to 3 recorded, step 4 lost."""
        with make_recorder(tmp_path) as recorder:
            take_step(recorder, ["a"])
            recorder.save(tiny_model())
            take_step(recorder, ["b"])
            take_step(recorder, ["c"])
            recorder.save(tiny_model())
            take_step(recorder, ["d"])
        return tmp_path

    def test_training_goes_on_from_the_last_checkpoint(self, run):
        with make_recorder(run, resume_from=3) as recorder:
            assert recorder.last_step == 3
            noise, _ = take_step(recorder, ["d"])
            recorder.save(tiny_model())
        record = Record.open(run / "record")
        assert record.sample_ids == ("a", "b", "c", "d") and record.visits.step.tolist() == [1, 2, 3, 4]
        np.testing.assert_array_equal(noise[0], normals(noise_key(3, "record", "train", "d", 4), (1, 4, 4)))

    def test_later_parts_are_moved_aside(self, run):
        with make_recorder(run, resume_from=1) as recorder:
            take_step(recorder, ["z"])
            recorder.save(tiny_model())
        record = Record.open(run / "record")
        assert record.sample_ids == ("a", "z") and record.visits.step.tolist() == [1, 2]
        assert len(list((run / "record" / "aside").iterdir())) == 2

    def test_resume_from_0_starts_over(self, run):
        with make_recorder(run, resume_from=0) as recorder:
            assert recorder.last_step == 0
        assert len(Record.open(run / "record").visits) == 0

    def test_a_record_is_not_overwritten(self, run):
        before = {f.name: f.read_bytes() for f in (run / "record").iterdir()}
        with pytest.raises(RecordError, match="already holds a record. Give resume_from="):
            make_recorder(run)
        assert {f.name: f.read_bytes() for f in (run / "record").iterdir()} == before

    def test_a_record_that_ends_too_early_is_refused(self, run):
        with pytest.raises(RecordError, match="ends at step 3, before the checkpoint of step 9"):
            make_recorder(run, resume_from=9)

    @pytest.mark.parametrize(
        "changed, message",
        [
            ({"config": {"seed": 4}}, "seed is 3 in the record, 4 now"),
            ({"config": {"seed": 3, "epochs": 2}, "same_config": True}, "config.epochs is None in the record, 2 now"),
            ({"max_grad_norm": 1.0}, "max_grad_norm is None in the record, 1.0 now"),
            ({"loss": "l1"}, "loss is 'mse' in the record, 'l1' now"),
            ({"data_fingerprint": "abc"}, "data_fingerprint is None in the record, 'abc' now"),
            (
                {"scheduler": DDPMScheduler(num_train_timesteps=50, prediction_type="sample")},
                "prediction_type is 'epsilon' in the record, 'sample' now; .*num_train_timesteps is 100",
            ),
        ],
    )
    def test_other_settings_are_refused_by_name(self, run, changed, message):
        with pytest.raises(RecordError, match=message):
            make_recorder(run, resume_from=3, **changed)

    def test_a_longer_training_or_another_flag_of_the_script_goes_on(self, run):
        make_recorder(
            run, resume_from=3, config={"seed": 3, "num_epochs": 9, "resume_from_checkpoint": "latest"}
        ).close()

    def test_a_refusal_leaves_the_folder_free(self, run):
        with pytest.raises(RecordError) as refusal:
            make_recorder(run, resume_from=3, seed=9)
        with make_recorder(run, resume_from=3):  # though the error, and so the first recorder, is still alive
            assert refusal.value is not None

    def test_other_versions_are_not_refused(self, run):
        manifest = json.loads((run / "record" / "manifest.json").read_text())
        manifest["versions"] = {"torch": "1.0"}
        (run / "record" / "manifest.json").write_text(json.dumps(manifest))
        make_recorder(run, resume_from=3).close()

    def test_a_scheduler_read_from_disk_is_the_same_scheduler(self, run, tmp_path):
        DDPMScheduler(num_train_timesteps=100).save_pretrained(tmp_path / "saved")
        make_recorder(run, resume_from=3, scheduler=DDPMScheduler.from_pretrained(tmp_path / "saved")).close()

    def test_a_damaged_part_is_refused(self, run):
        (part,) = (run / "record").glob("samples-0-visits-00000001.parquet")
        part.write_bytes(part.read_bytes()[:-9])
        with pytest.raises(RecordError, match="samples-0-visits-00000001.parquet is damaged"):
            make_recorder(run, resume_from=3)

    def test_saving_twice_at_one_step_keeps_one_checkpoint(self, run):
        with make_recorder(run, resume_from=3) as recorder:
            recorder.save(tiny_model())
        assert [c.step for c in list_checkpoints(run)] == [1, 3]
        assert sorted(f.name for f in (run / "checkpoints").iterdir()) == ["checkpoint-1", "checkpoint-3"]


class TestLock:
    def test_a_second_recorder_is_refused_until_the_first_is_closed(self, tmp_path):
        with make_recorder(tmp_path), pytest.raises(InUseError, match="Another process is training into"):
            make_recorder(tmp_path)
        make_recorder(tmp_path, resume_from=0).close()

    def test_a_second_process_is_refused_and_a_dead_one_holds_nothing(self, tmp_path):
        holding = (
            "import filelock, sys, time\n"
            f"lock = filelock.FileLock({os.fspath(tmp_path / '.recorder-0.lock')!r})\n"
            "lock.acquire()\n"
            "print('held', flush=True)\n"
            "time.sleep(60)\n"
        )
        with subprocess.Popen([sys.executable, "-c", holding], stdout=subprocess.PIPE, text=True) as other:
            assert other.stdout is not None and other.stdout.readline() == "held\n"
            with pytest.raises(InUseError, match="Wait for it, or choose a new folder"):
                make_recorder(tmp_path)
            other.kill()
        make_recorder(tmp_path).close()

    def test_the_lock_is_of_one_rank(self, tmp_path):
        with make_recorder(tmp_path), filelock.FileLock(tmp_path / ".recorder-1.lock", timeout=0):
            pass


class TestRefusals:
    def test_draw_twice(self, recorder):
        recorder.draw(["a"], like=torch.zeros(1, 1, 4, 4))
        with pytest.raises(RecordError, match=r"draw\(\) was called twice; close the first pass with step\(\)"):
            recorder.draw(["a"], like=torch.zeros(1, 1, 4, 4))

    @pytest.mark.parametrize("close", ["step", "accumulate", "probe"])
    def test_closing_without_a_draw(self, recorder, close):
        with pytest.raises(RecordError, match=r"There is no pass to close; call draw\(\) first"):
            getattr(recorder, close)(torch.ones(1))

    @pytest.mark.parametrize("loss", [torch.tensor(0.5), torch.ones(3), torch.ones(2, 1)])
    def test_losses_that_are_not_one_per_sample(self, recorder, loss):
        recorder.draw(["a", "b"], like=torch.zeros(2, 1, 4, 4))
        # Past the annotation of step(), which the shape checks of the tests would refuse first.
        with pytest.raises(RecordError, match=r"one per sample, of shape \(2,\); found .* not over the batch"):
            recorder._close(loss, None, micro_batch=0)

    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    def test_a_loss_that_is_not_finite(self, recorder, bad):
        take_step(recorder, ["x"])
        recorder.draw(["a", "b", "c"], like=torch.zeros(3, 1, 4, 4))
        with pytest.raises(NumericsError, match="not finite at step 2 for sample b, c"):
            recorder.step(torch.tensor([0.5, bad, bad]))

    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    def test_a_gradient_norm_that_is_not_finite(self, tmp_path, bad):
        with make_recorder(tmp_path, max_grad_norm=1.0) as recorder:
            with pytest.raises(NumericsError, match=f"gradient norm at step 1 is {bad}"):
                take_step(recorder, ["a"], grad_norm=bad)

    def test_a_gradient_norm_that_was_forgotten(self, tmp_path):
        with make_recorder(tmp_path, max_grad_norm=1.0) as recorder:
            with pytest.raises(RecordError, match="clipped to the norm 1.0, so step\\(\\) needs the norm"):
                take_step(recorder, ["a"])

    def test_two_learning_rates(self, tmp_path):
        groups = [{"params": [torch.zeros(1, requires_grad=True)], "lr": rate} for rate in (0.1, 0.2)]
        with make_recorder(tmp_path, optimizer=torch.optim.SGD(groups)) as recorder:
            with pytest.raises(RecordError, match="one learning rate; the optimizer's groups have 0.1, 0.2"):
                take_step(recorder, ["a"])

    def test_ids_that_do_not_match_the_images(self, recorder):
        with pytest.raises(RecordError, match="one id per image; found 3 ids and 2 images"):
            recorder.draw(["a", "b", "c"], like=torch.zeros(2, 1, 4, 4))

    def test_a_gradient_norm_without_the_norm_it_is_clipped_to(self, recorder):
        with pytest.raises(RecordError, match="does not know to what it is clipped. Make the Recorder with"):
            take_step(recorder, ["a"], grad_norm=1.0)

    def test_flips_of_other_ids(self, recorder):
        recorder.flip(["a"], torch.zeros(1, 1, 4, 4))
        with pytest.raises(RecordError, match="called with other ids than draw"):
            recorder.draw(["b"], like=torch.zeros(1, 1, 4, 4))

    def test_a_checkpoint_in_the_middle_of_a_step(self, recorder):
        recorder.draw(["a"], like=torch.zeros(1, 1, 4, 4))
        with pytest.raises(RecordError, match="in the middle of an optimizer step"):
            recorder.save(tiny_model())
        recorder.accumulate(torch.ones(1))
        with pytest.raises(RecordError, match="in the middle of an optimizer step"):
            recorder.close_part()

    def test_an_unknown_loss(self, tmp_path):
        with pytest.raises(RecordError, match="Unknown loss 'huber'; known are mse, l1"):
            make_recorder(tmp_path, config={"loss": "huber"})
        make_recorder(tmp_path).close()

    def test_a_config_that_is_neither_mapping_nor_dataclass(self, tmp_path):
        with pytest.raises(RecordError, match=r"mapping or a dataclass .*vars\(args\).*; found int"):
            make_recorder(tmp_path, config=3)

    def test_a_scheduler_of_no_known_kind(self, tmp_path):
        from diffusers import CMStochasticIterativeScheduler

        with pytest.raises(UnsupportedModelError, match="of flow matching or of EDM"):
            make_recorder(tmp_path, scheduler=CMStochasticIterativeScheduler())


@pytest.mark.usefixtures("as_in_use")
class TestRefusalsAtOnce:
    """What could not be written at the next checkpoint is refused when it is given, and nothing is lost."""

    @pytest.mark.parametrize(
        "weights, message",
        [
            (torch.ones(3), r"loss_weight must have shape \(2,\), one row per sample; found \(3,\)"),
            (torch.tensor(1.0), r"loss_weight must have shape \(2,\).*; found \(\)"),
            (torch.tensor([1.0, float("nan")]), "loss_weight must be finite; found nan"),
            ("heavy", r"loss_weight must be a tensor of shape \(2,\); found 'heavy'"),
        ],
    )
    def test_weights_of_losses(self, recorder, weights, message):
        recorder.draw(["a", "b"], like=torch.zeros(2, 1, 4, 4))
        with pytest.raises(RecordError, match=message):
            recorder.step(torch.ones(2), loss_weight=weights)
        recorder.step(torch.ones(2), loss_weight=torch.ones(2))
        recorder.close_part()
        assert len(Record.open(recorder.folder / "record").visits) == 2

    @pytest.mark.parametrize(
        "options, message",
        [
            (
                {"crops": [[-1, 0], [0, 0]]},
                "crops must be whole numbers of pixels, 0 to 65535; found torch.int64 from -1",
            ),
            ({"crops": [[0, 0], [70000, 0]]}, "crops must be whole numbers .* to 70000. Give top and left"),
            ({"crops": torch.zeros(2, 2)}, "crops must be whole numbers .*; found torch.float32"),
            ({"crops": torch.zeros(2, dtype=torch.long)}, r"crops must have shape \(2, 2\), .*; found \(2,\)"),
            ({"crops": [[1, 2], [3]]}, r"crops must be a tensor of shape \(2, 2\); found \[\[1, 2\], \[3\]\]"),
            ({"condition_dropped": [True]}, r"condition_dropped must have shape \(2,\), .*; found \(1,\)"),
            ({"condition_dropped": torch.ones(2)}, "condition_dropped must be True or False .*; found torch.float32"),
            (
                {"like": torch.zeros(2, 1, 4, 4, dtype=torch.uint8)},
                "like must be a tensor of floating.*found torch.uint8",
            ),
            ({"like": np.zeros((2, 1, 4, 4))}, "like must be a tensor of floating-point .*; found ndarray"),
        ],
    )
    def test_what_was_done_to_the_batch(self, recorder, options, message):
        with pytest.raises(RecordError, match=message):
            recorder.draw(["a", "b"], **{"like": torch.zeros(2, 1, 4, 4)} | options)
        take_step(recorder, ["a", "b"])
        recorder.close_part()

    @pytest.mark.parametrize("call", ["draw", "flip"])
    @pytest.mark.parametrize(
        "ids, message",
        [
            ("ab", "ids must be a list, tensor or array with one id per image; found 'ab'"),
            (b"ab", "ids must be a list, .*; found b'ab'"),
            (7, "ids must be a list, .*; found 7"),
            ([["a"], ["b"]], r"Ids must be whole numbers or non-empty printable text .* 2 others: \['a'\], \['b'\]"),
            (torch.zeros(2, 1, dtype=torch.long), r"2 others: \[0\], \[0\]"),
            (torch.zeros(2), "2 others: 0.0, 0.0. Give each image the id that it has"),
            (["a", b"b"], "1 others: b'b'"),
            (["a", ""], "1 others: ''"),
            (["a", "b\n"], r"1 others: 'b\\n'"),
            (["a", None], "1 others: None"),
            (["a", True], "1 others: True"),
            ([], "needs one id per image; found 0 ids and 2 images"),
        ],
    )
    def test_ids(self, recorder, call, ids, message):
        with pytest.raises(RecordError, match=message):
            getattr(recorder, call)(ids, torch.zeros(2, 1, 4, 4))

    @pytest.mark.parametrize("call", ["draw", "flip"])
    def test_an_empty_batch(self, recorder, call):
        with pytest.raises(RecordError, match=rf"{call}\(\) needs at least one image; found an empty batch"):
            getattr(recorder, call)([], torch.zeros(0, 1, 4, 4))

    def test_ids_may_be_scalars_of_torch_and_numpy(self, recorder):
        take_step(recorder, [torch.tensor(7), np.int64(8), np.str_("nine")])
        recorder.close_part()
        assert Record.open(recorder.folder / "record").sample_ids == ("7", "8", "nine")

    @pytest.mark.parametrize("count", [0, -1, 2**32, 1.5])
    def test_samples_in_a_step(self, recorder, count):
        with pytest.raises(RecordError, match=f"samples_in_step must be a whole number from 1 to .*; found {count}"):
            take_step(recorder, ["a"], samples_in_step=count)

    @pytest.mark.parametrize(
        "changed, message",
        [
            ({"config": {"mixed_precision": "fp8"}}, "Unknown mixed_precision 'fp8'; known are no, bf16, fp16"),
            ({"config": {"max_grad_norm": "x"}}, "max_grad_norm must be a finite number above 0; found 'x'"),
            ({"max_grad_norm": float("nan")}, "max_grad_norm must be a finite number above 0; found nan"),
            ({"max_grad_norm": -1.0}, "max_grad_norm must be .*; found -1.0. If you do not clip, give None"),
            ({"optimizer": None}, "optimizer must be the torch optimizer of the training, .*; found NoneType"),
            ({"optimizer": 3}, "optimizer must be the torch optimizer .*; found int"),
            ({"config": {"seed": "x"}}, "seed must be a whole number from .*; found 'x'"),
            ({"rank": -1}, "rank must be a whole number from 0 to 65535; found -1"),
        ],
    )
    def test_settings(self, tmp_path, changed, message):
        with pytest.raises(RecordError, match=message):
            make_recorder(tmp_path / "run", **changed)
        assert not (tmp_path / "run").exists()


class TestConfig:
    def test_settings_come_from_a_dataclass_and_arguments_win(self, tmp_path):
        @dataclass(frozen=True)
        class Settings:
            seed: int = 5
            max_grad_norm: float = 2.0
            loss: str = "l1"
            mixed_precision: str = "bf16"

        with make_recorder(tmp_path, config=Settings(), seed=6) as recorder:
            assert (recorder.seed, recorder.max_grad_norm) == (6, 2.0)
            assert recorder.manifest["loss"] == "l1" and recorder.manifest["mixed_precision"] == "bf16"

    def test_secrets_are_not_written_down(self, tmp_path):
        config = {
            "hub_token": "t",
            "WANDB_API_KEY": "k",
            "db_password": "p",
            "client_secret": "s",
            "tokenizer": "x",
            "lr": 1,
        }
        make_recorder(tmp_path, config=config).close()
        found = (tmp_path / "record" / "manifest.json").read_text()
        assert json.loads(found)["config"] == {"lr": 1}

    def test_anything_in_a_config_becomes_plain(self, tmp_path):
        config = {"path": tmp_path, "widths": (1, 2), "bad": float("nan"), "names": {"b", "a"}, "none": None}
        with make_recorder(tmp_path, config=config) as recorder:
            assert recorder.seed == 0
        found = json.loads((tmp_path / "record" / "manifest.json").read_text())["config"]
        want = {"path": str(tmp_path), "widths": [1, 2], "bad": "nan", "names": ["a", "b"], "none": None}
        assert found == want
