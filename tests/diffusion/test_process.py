"""Noising, targets and losses against diffusers' own schedulers and torch's own losses."""

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler
from torch.nn import functional

from whence.diffusion.objectives import sample_loss
from whence.diffusion.process import NoiseProcess, even_timesteps
from whence.errors import ConfigError, UnsupportedModelError

TIMESTEPS = torch.tensor([0, 1, 499, 998, 999])


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    clean, noise = torch.randn(2, 5, 3, 4, 4, generator=generator)
    return clean, noise


@pytest.mark.parametrize("scheduler_class", [DDPMScheduler, DDIMScheduler])
@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_add_noise_is_that_of_diffusers(batch, scheduler_class, beta_schedule):
    scheduler = scheduler_class(beta_schedule=beta_schedule)
    found = NoiseProcess.from_scheduler(scheduler).add_noise(*batch, TIMESTEPS)
    # Levels are rounded once from float64 here, computed in float32 there.
    torch.testing.assert_close(found, scheduler.add_noise(*batch, TIMESTEPS), rtol=1e-6, atol=2e-7)


def test_targets_are_those_of_diffusers(batch):
    clean, noise = batch
    scheduler = DDPMScheduler(prediction_type="v_prediction")
    velocity = NoiseProcess.from_scheduler(scheduler).target(clean, noise, TIMESTEPS)
    torch.testing.assert_close(velocity, scheduler.get_velocity(clean, noise, TIMESTEPS), rtol=1e-6, atol=2e-7)
    for prediction_type, want in (("epsilon", noise), ("sample", clean)):
        process = NoiseProcess.from_scheduler(DDPMScheduler(prediction_type=prediction_type))
        assert torch.equal(process.target(clean, noise, TIMESTEPS), want)


def test_noise_and_velocity_give_back_the_clean_image(batch):
    """Alpha x_t - sigma v = x_0, by hand, in float64."""
    clean, noise = (x.double() for x in batch)
    process = NoiseProcess.from_scheduler(DDPMScheduler(prediction_type="v_prediction"))
    noisy, velocity = process.add_noise(clean, noise, TIMESTEPS), process.target(clean, noise, TIMESTEPS)
    alpha, sigma = (level[TIMESTEPS].view(-1, 1, 1, 1) for level in (process.alpha, process.sigma))
    torch.testing.assert_close(alpha * noisy - sigma * velocity, clean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(process.alpha**2 + process.sigma**2, torch.ones(1000).double(), rtol=1e-12, atol=0)


def test_levels_are_known_answers():
    process = NoiseProcess.from_scheduler(DDPMScheduler(num_train_timesteps=2, beta_start=0.19, beta_end=0.36))
    assert process.num_timesteps == 2
    # Cumulative products of 0.81 and 0.64 in the scheduler's float32.
    torch.testing.assert_close(process.alpha, torch.tensor([0.9, 0.72]).double(), rtol=1e-6, atol=0)


def test_the_dtype_is_that_of_the_images(batch):
    process = NoiseProcess.from_scheduler(DDPMScheduler())
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        clean, noise = (x.to(dtype) for x in batch)
        assert process.add_noise(clean, noise, TIMESTEPS).dtype == dtype


def test_an_empty_batch_stays_empty():
    process = NoiseProcess.from_scheduler(DDPMScheduler(prediction_type="v_prediction"))
    none, timesteps = torch.zeros(0, 3, 4, 4), torch.zeros(0, dtype=torch.long)
    assert process.add_noise(none, none, timesteps).shape == none.shape
    assert sample_loss(process.target(none, none, timesteps), none, "mse").shape == (0,)


def test_flow_matching_is_refused():
    with pytest.raises(UnsupportedModelError, match="FlowMatchEulerDiscreteScheduler has none"):
        NoiseProcess.from_scheduler(FlowMatchEulerDiscreteScheduler())


def test_an_unknown_prediction_type_is_refused_and_the_known_ones_listed():
    scheduler = DDPMScheduler()
    scheduler.register_to_config(prediction_type="flow")
    with pytest.raises(UnsupportedModelError, match="'flow'; known are epsilon, v_prediction, sample"):
        NoiseProcess.from_scheduler(scheduler)


def test_losses_are_means_over_the_elements_of_one_sample(batch):
    prediction, target = batch
    for name, loss in (("mse", functional.mse_loss), ("l1", functional.l1_loss)):
        each = sample_loss(prediction, target, name)
        want = torch.stack([loss(p, t) for p, t in zip(prediction, target, strict=True)])
        torch.testing.assert_close(each, want)
        # So their batch mean is what diffusers' training scripts minimise.
        torch.testing.assert_close(each.mean(), loss(prediction, target))


@pytest.mark.parametrize(
    "first, last, count, want",
    [
        (1, 999, 5, [1, 250, 500, 750, 999]),  # 250.5 and 749.5 are halves: rounded to even
        (1, 999, 2, [1, 999]),
        (1, 999, 1, [500]),
        (1, 49, 1, [25]),
        (1, 3, 3, [1, 2, 3]),
    ],
)
def test_even_timesteps(first, last, count, want):
    found = even_timesteps(first, last, count)
    assert (found.tolist(), found.dtype) == (want, torch.long)


def test_more_timesteps_than_there_are_is_refused():
    with pytest.raises(ConfigError, match="4 timesteps were asked for; from 1 to 2 there are 2|only 2 timesteps"):
        even_timesteps(1, 2, 4)


def test_even_timesteps_are_even():
    found = even_timesteps(1, 999, 100)
    steps = found.diff()
    assert (int(found[0]), int(found[-1]), set(steps.tolist())) == (1, 999, {10, 11})
