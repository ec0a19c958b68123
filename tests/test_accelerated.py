"""The recorder with an accelerator in this very process: true weights of visits, and flags that it refuses."""

import math
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from torch import nn

from whence.checkpoints import Checkpoint, load_scheduler
from whence.diffusion.noise import derived_key, draw_latents, noise_key, scalar_draws
from whence.errors import CheckpointError, RecordError
from whence.record import Record
from whence.recorder import Recorder

SHAPE = (1, 2, 2)


@pytest.fixture
def make_accelerator(monkeypatch):
    """An accelerator on the CPU; accelerate keeps its state in the process, which is forgotten afterwards."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")

    def make(steps: int = 1) -> Accelerator:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        return Accelerator(cpu=True, gradient_accumulation_steps=steps)

    yield make
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def fake_accelerator(rank=0, num_processes=1, **changed):
    """What the recorder reads of an accelerator, for processes that are not there."""
    states = []
    settings = {"process_index": rank, "num_processes": num_processes, "mixed_precision": "no", "scaler": None}
    settings |= {"sync_gradients": True, "gradient_accumulation_steps": 1, "states": states}
    settings |= {"register_for_checkpointing": states.append, "wait_for_everyone": lambda: None}
    return SimpleNamespace(**(settings | changed))


def make_recorder(folder, accelerator=None, optimizer=None, **changed):
    optimizer = optimizer or torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.25)
    given = {"scheduler": DDPMScheduler(num_train_timesteps=50), "optimizer": optimizer, "config": {"seed": 3}}
    return Recorder(folder, accelerator=accelerator, **(given | changed))


class Scale(nn.Module):
    """One weight for each element, so that the gradient of a loss is known by hand."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.full(SHAPE, 0.5))

    def forward(self, noisy):
        return self.weight * noisy


def gradient(weight, noisy, target):
    """Of one sample's mean squared error."""
    return 2 * (weight * noisy - target) * noisy / noisy[0].numel()


class TestWeights:
    @pytest.mark.parametrize("max_norm", [None, 0.05])
    def test_weighted_gradients_of_the_visits_are_the_step(self, tmp_path, make_accelerator, max_norm):
        """Ten images in batches of four, two passes a step: the last step is one pass of two images, and halved."""
        accelerator = make_accelerator(steps=2)
        loader = torch.utils.data.DataLoader(torch.arange(10), batch_size=4)
        model = Scale()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        clean = torch.randn(10, *SHAPE, generator=torch.Generator().manual_seed(0))
        scheduler, steps, gradients = DDPMScheduler(num_train_timesteps=50), [], []
        recorder = make_recorder(tmp_path, accelerator, optimizer, scheduler=scheduler, max_grad_norm=max_norm)
        for ids in loader:
            with accelerator.accumulate(model):
                noise, timesteps = recorder.draw(ids, like=clean[ids])
                noisy = scheduler.add_noise(clean[ids], noise, timesteps)
                before = model.weight.detach().clone()
                gradients += list(gradient(before, noisy, noise))
                losses = (model(noisy) - noise).square()
                accelerator.backward(losses.mean())
                recorder.step(losses)
                if accelerator.sync_gradients and max_norm:
                    accelerator.clip_grad_norm_(model.parameters(), max_norm)
                optimizer.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                steps.append(before - model.weight.detach())
        recorder.close()
        visits = Record.open(tmp_path / "record").visits
        assert visits.step.tolist() == [1] * 8 + [2] * 2
        for step, moved in enumerate(steps, start=1):
            rows = np.flatnonzero(visits.step == step)
            predicted = sum(visits.weight[row] * gradients[row] for row in rows)
            torch.testing.assert_close(predicted.float(), moved, rtol=1e-4, atol=1e-7)
        assert (visits.clip_coefficient < 1).all() == (max_norm is not None)

    def test_step_where_gradients_are_synchronised_alone(self, tmp_path, make_accelerator):
        """Losses of the other passes are not known; all else of them is."""
        accelerator = make_accelerator(steps=2)
        recorder = make_recorder(tmp_path, accelerator)
        for ids in (["a"], ["b"], ["c"], ["d"]):
            with accelerator.accumulate(nn.Linear(1, 1)):
                recorder.draw(ids, like=torch.zeros(1, *SHAPE))
                if accelerator.sync_gradients:
                    recorder.step(torch.ones(1))
        recorder.close()
        visits = Record.open(tmp_path / "record").visits
        assert visits.step.tolist() == [1, 1, 2, 2] and visits.micro_batch.tolist() == [0, 1, 0, 1]
        assert np.isnan(visits.loss).tolist() == [True, False] * 2
        assert set(visits.samples_in_step) == {2}


class TestState:
    def test_saving_closes_a_part_and_loading_goes_back(self, tmp_path, make_accelerator):
        accelerator = make_accelerator()
        recorder = make_recorder(tmp_path, accelerator)
        for step in range(1, 4):
            recorder.draw(["a"], like=torch.zeros(1, *SHAPE))
            recorder.step(torch.full((1,), float(step)))
            if step == 2:
                accelerator.save_state(str(tmp_path / "checkpoint-2"))
        recorder.close()  # as the script ends
        accelerator = make_accelerator()
        resumed = make_recorder(tmp_path, accelerator, config={"seed": 3, "resume_from_checkpoint": "latest"})
        accelerator.load_state(str(tmp_path / "checkpoint-2"))
        assert resumed.last_step == 2
        resumed.draw(["b"], like=torch.zeros(1, *SHAPE))
        resumed.step(torch.full((1,), 9.0))
        resumed.close()
        assert Record.open(tmp_path / "record").visits.loss.tolist() == [1, 2, 9]

    def test_asked_to_resume_with_no_checkpoint_it_starts_over(self, tmp_path, make_accelerator):
        for loss in (1.0, 2.0):
            config = {"seed": 3, "resume_from_checkpoint": "latest"}
            with make_recorder(tmp_path, make_accelerator(), config=config) as recorder:
                recorder.draw(["a"], like=torch.zeros(1, *SHAPE))
                recorder.step(torch.full((1,), loss))
        assert Record.open(tmp_path / "record").visits.loss.tolist() == [2]
        assert (tmp_path / "record" / "aside").exists()

    def test_not_asked_to_resume_it_overwrites_nothing(self, tmp_path, make_accelerator):
        with make_recorder(tmp_path, make_accelerator()) as recorder:
            recorder.draw(["a"], like=torch.zeros(1, *SHAPE))
            recorder.step(torch.ones(1))
        with pytest.raises(RecordError, match="already holds a record"):
            make_recorder(tmp_path, make_accelerator())

    def test_resumed_with_fewer_processes_and_with_more(self, tmp_path):
        """Two processes took three steps and saved after two; one goes on, then two again."""
        for rank in (0, 1):
            with make_recorder(tmp_path, fake_accelerator(rank, 2), config={"checkpointing_steps": 2}) as recorder:
                for _ in range(3):
                    recorder.draw([f"of rank {rank}"], like=torch.zeros(1, *SHAPE))
                    recorder.step(torch.ones(1))
        assert len(Record.open(tmp_path / "record").visits) == 6
        resume = {"checkpointing_steps": 2, "resume_from_checkpoint": "latest"}
        for ranks in ([0], [0, 1]):
            for rank in ranks:
                accelerator = fake_accelerator(rank, len(ranks))
                with make_recorder(tmp_path, accelerator, config=resume) as recorder:
                    accelerator.states[0].load_state_dict({"whence_step": 2})
                    recorder.draw([f"of rank {rank}"], like=torch.zeros(1, *SHAPE))
                    recorder.step(torch.ones(1))
            visits = Record.open(tmp_path / "record").visits
            assert visits.rank[visits.step == 3].tolist() == ranks
            assert visits.samples_in_step[visits.step == 3].tolist() == [len(ranks)] * len(ranks)

    def test_a_state_that_is_not_the_recorders(self, tmp_path):
        accelerator = fake_accelerator()
        with make_recorder(tmp_path, accelerator), pytest.raises(RecordError, match="not that of a Recorder"):
            accelerator.states[0].load_state_dict({"step": 2})

    def test_saving_in_the_middle_of_a_step(self, tmp_path, make_accelerator):
        accelerator = make_accelerator(steps=2)
        with make_recorder(tmp_path, accelerator) as recorder:
            with accelerator.accumulate(nn.Linear(1, 1)):
                recorder.draw(["a"], like=torch.zeros(1, *SHAPE))
                recorder.step(torch.ones(1))
            with pytest.raises(RecordError, match="in the middle of an optimizer step"):
                accelerator.save_state(str(tmp_path / "checkpoint-1"))

    def test_the_scheduler_is_that_of_the_record(self, tmp_path, make_accelerator):
        """A pipeline above may have the one it samples with."""
        config = {"prediction_type": "v_prediction"}  # which text-to-image scripts set in their loop
        make_recorder(tmp_path, make_accelerator(), config=config).close()
        FlowMatchEulerDiscreteScheduler().save_pretrained(tmp_path / "scheduler")
        folder = tmp_path / "checkpoint-2"
        found = load_scheduler(Checkpoint(2, folder, folder / "unet", None))
        assert type(found) is DDPMScheduler
        assert (found.config.num_train_timesteps, found.config.prediction_type) == (50, "v_prediction")
        (tmp_path / "record" / "manifest.json").write_text("{}")
        with pytest.raises(CheckpointError, match="does not say which scheduler"):
            load_scheduler(Checkpoint(2, folder, folder / "unet", None))


class TestDraws:
    def test_latents_of_a_posterior(self, tmp_path):
        mean, std = torch.randn(2, *SHAPE), torch.rand(2, *SHAPE)
        with make_recorder(tmp_path) as recorder:
            latents = recorder.latents(["a", "b"], SimpleNamespace(mean=mean, std=std))
            recorder.draw(["a", "b"], like=latents)
            recorder.step(torch.ones(2))
            recorder.close_part()
        record = Record.open(tmp_path / "record")
        assert record.manifest["latents"] == "sample"
        want = draw_latents(mean.numpy(), std.numpy(), record.visits.noise_key)
        np.testing.assert_array_equal(latents, want)

    def test_latents_for_some_batches_alone(self, tmp_path):
        posterior = SimpleNamespace(mean=torch.zeros(1, *SHAPE), std=torch.ones(1, *SHAPE))
        with make_recorder(tmp_path) as recorder:
            recorder.draw(["a"], like=torch.zeros(1, *SHAPE))
            recorder.step(torch.ones(1))
            with pytest.raises(RecordError, match="for all batches or for none; so far it was none"):
                recorder.draw(["a"], like=recorder.latents(["a"], posterior))

    def test_something_else_than_a_posterior(self, tmp_path):
        with make_recorder(tmp_path) as recorder, pytest.raises(RecordError, match="needs the posterior"):
            recorder.latents(["a"], torch.zeros(1, *SHAPE))

    def test_captions_are_withheld_by_keys(self, tmp_path):
        ids = [f"image {k}" for k in range(40)]
        with make_recorder(tmp_path) as recorder:
            withheld = recorder.drop(ids, 0.3)
            recorder.draw(ids, like=torch.zeros(40, *SHAPE))
            recorder.step(torch.ones(40))
            recorder.close_part()
        visits = Record.open(tmp_path / "record").visits
        assert visits.condition_dropped.tolist() == withheld.tolist()
        keys = [noise_key(3, "record", "train", i, 1) for i in ids]
        assert withheld.tolist() == [scalar_draws(derived_key(key, "dropped"))[0] < 0.3 for key in keys]
        assert 4 < withheld.sum() < 20

    @pytest.mark.parametrize("share", [-0.1, 1.5, math.nan])
    def test_a_share_that_is_none(self, tmp_path, share):
        with make_recorder(tmp_path) as recorder, pytest.raises(RecordError, match="must be 0 to 1"):
            recorder.drop(["a"], share)

    def test_noise_of_the_input_must_be_asked_for(self, tmp_path):
        with make_recorder(tmp_path, config={"input_perturbation": 0.1}) as recorder:
            with pytest.raises(RecordError, match="no pass under way"):
                recorder.noise_of_input()
            noise, _ = recorder.draw(["a"], like=torch.zeros(1, *SHAPE))
            with pytest.raises(RecordError, match="input_perturbation the noisy image takes other noise"):
                recorder.step(torch.ones(1))
            assert 0 < (recorder.noise_of_input() - noise).abs().max() < 1
            recorder.step(torch.ones(1))

    def test_losses_by_element_are_averaged_and_weighed(self, tmp_path):
        elements = torch.rand(2, *SHAPE)
        with make_recorder(tmp_path, config={"snr_gamma": 1.0}) as recorder:
            recorder.draw(["a", "b"], like=torch.zeros(2, *SHAPE))
            recorder.step(elements)
            recorder.close_part()
        visits = Record.open(tmp_path / "record").visits
        assert (visits.loss_weight < 1).any()
        np.testing.assert_allclose(visits.loss, elements.mean((1, 2, 3)).numpy() * visits.loss_weight, rtol=1e-6)


class TestTraps:
    @pytest.mark.parametrize(
        "flags, said",
        [
            ({"dream_training": True}, "dream_training: it replaces noise and target"),
            ({"train_text_encoder": True}, "train_text_encoder: what the network is told then changes"),
            ({"timestep_bias_strategy": "later"}, "timestep_bias_strategy later: .* a density of its own"),
        ],
    )
    def test_flags_that_are_refused(self, tmp_path, flags, said):
        with pytest.raises(RecordError, match=said):
            make_recorder(tmp_path, config=flags)

    @pytest.mark.parametrize(
        "flags, said",
        [
            ({"checkpoints_total_limit": 2}, "deletes old checkpoints"),
            ({"cache_latents": True}, "Key the cache by the image's id"),
            ({"optimizer": "prodigy"}, "multiplies the learning rate"),
        ],
    )
    def test_flags_that_are_warned_of(self, tmp_path, flags, said):
        with pytest.warns(UserWarning, match=said):
            make_recorder(tmp_path, config=flags).close()

    def test_the_defaults_of_the_scripts_are_not_warned_of(self, tmp_path):
        flags = {"dream_training": False, "train_text_encoder": False, "timestep_bias_strategy": "none"}
        flags |= {"checkpoints_total_limit": None, "cache_latents": False, "optimizer": "AdamW", "random_flip": False}
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with make_recorder(tmp_path, config=flags) as recorder:
                recorder.draw(["a"], like=torch.zeros(1, *SHAPE))

    def test_flips_of_the_script(self, tmp_path):
        with make_recorder(tmp_path, config={"random_flip": True}) as recorder:
            with pytest.warns(UserWarning, match="recorder.flip"):
                recorder.draw(["a"], like=torch.zeros(1, *SHAPE))

    def test_captions_withheld_by_the_script(self, tmp_path):
        with make_recorder(tmp_path, config={"proportion_empty_prompts": 0.2}) as recorder:
            with pytest.raises(RecordError, match=r"recorder.drop\(ids, args.proportion_empty_prompts\)"):
                recorder.draw(["a"], like=torch.zeros(1, *SHAPE))
            recorder.drop(["a"], 0.2)
            recorder.draw(["a"], like=torch.zeros(1, *SHAPE))

    def test_class_images_with_ids_of_instances(self, tmp_path):
        with make_recorder(tmp_path, config={"with_prior_preservation": True}) as recorder:
            with pytest.raises(RecordError, match="a in both halves"):
                recorder.draw(["a", "b", "c", "a"], like=torch.zeros(4, *SHAPE))
            with pytest.raises(RecordError, match="Found 3 ids"):
                recorder.draw(["a", "b", "c"], like=torch.zeros(3, *SHAPE))

    def test_losses_of_the_instances_alone(self, tmp_path, monkeypatch):
        with make_recorder(tmp_path, config={"with_prior_preservation": True}) as recorder:
            recorder.draw(["a", "class/b"], like=torch.zeros(2, *SHAPE))
            with pytest.raises(RecordError, match="before the script parts instances from class images"):
                recorder.step(torch.ones(1, *SHAPE))

    def test_a_learning_rate_that_was_stepped_already(self, tmp_path, make_accelerator):
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.25)
        with make_recorder(tmp_path, make_accelerator(), optimizer) as recorder:
            recorder.draw(["a"], like=torch.zeros(1, *SHAPE))
            optimizer.param_groups[0]["lr"] = 0.2
            with pytest.raises(RecordError, match=r"before lr_scheduler.step\(\)"):
                recorder.step(torch.ones(1))

    def test_gradients_that_were_clipped_already(self, tmp_path, make_accelerator):
        parameter = torch.zeros(4, requires_grad=True)
        optimizer = torch.optim.SGD([parameter], lr=0.25)
        with make_recorder(tmp_path, make_accelerator(), optimizer, max_grad_norm=1.0) as recorder:
            with pytest.raises(RecordError, match="clipped before step"):
                for _ in range(3):
                    recorder.draw(["a"], like=torch.zeros(1, *SHAPE))
                    parameter.grad = torch.full((4,), 3.0)
                    torch.nn.utils.clip_grad_norm_([parameter], 1.0)
                    recorder.step(torch.ones(1))

    def test_no_gradients_to_measure(self, tmp_path, make_accelerator):
        with make_recorder(tmp_path, make_accelerator(), max_grad_norm=1.0) as recorder:
            recorder.draw(["a"], like=torch.zeros(1, *SHAPE))
            with pytest.raises(RecordError, match="no gradients to measure"):
                recorder.step(torch.ones(1))

    def test_something_else_than_an_accelerator(self, tmp_path):
        with pytest.raises(RecordError, match="must be an accelerate.Accelerator; this SimpleNamespace has no process"):
            make_recorder(tmp_path, SimpleNamespace())

    def test_fp16_steps_that_are_skipped(self, tmp_path, make_accelerator):
        """The gradient scaler finds an infinite gradient; its optimizer is not told before step()."""
        parameter = torch.zeros(2, requires_grad=True)
        parameter.grad = torch.tensor([1.0, math.inf])
        accelerator = fake_accelerator(mixed_precision="fp16")
        optimizer = torch.optim.SGD([parameter], lr=0.25)
        with make_recorder(tmp_path, accelerator, optimizer) as recorder:
            recorder.draw(["a"], like=torch.zeros(1, *SHAPE))
            recorder.step(torch.ones(1))
        (weight,) = Record.open(tmp_path / "record").visits.weight
        assert weight == 0
