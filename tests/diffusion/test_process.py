"""Noising, targets and losses against diffusers' own schedulers and torch's own losses."""

import hashlib

import numpy as np
import pytest
import torch
from diffusers import (
    CMStochasticIterativeScheduler,
    DDIMScheduler,
    DDPMScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from diffusers.training_utils import (
    compute_density_for_timestep_sampling,
    compute_loss_weighting_for_sd3,
    compute_snr,
)
from scipy.stats import ks_2samp
from torch.nn import functional

from whence.config import ObjectiveSettings
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


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_matching_is_that_of_the_schedulers_own_functions(batch, shift):
    clean, noise = batch
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    process = NoiseProcess.from_scheduler(scheduler)
    times = process.times(TIMESTEPS)
    torch.testing.assert_close(times, scheduler.timesteps[len(scheduler.timesteps) - 1 - TIMESTEPS], rtol=0, atol=0)
    noisy = process.add_noise(clean, noise, TIMESTEPS)
    torch.testing.assert_close(noisy, scheduler.scale_noise(clean, times, noise), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(process.target(clean, noise, TIMESTEPS), noise - clean, rtol=0, atol=0)
    assert (process.sigma.diff() > 0).all()  # timesteps go from least noise to most


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_edm_targets_make_the_schedulers_own_preconditioning_exact(batch, prediction_type):
    """A network that answers the target lets the scheduler give back the clean image."""
    clean, noise = (x.double() for x in batch)
    scheduler = EDMEulerScheduler(prediction_type=prediction_type)
    process, places = NoiseProcess.from_scheduler(scheduler), 999 - TIMESTEPS
    sigma = scheduler.sigmas[places].double().view(-1, 1, 1, 1)
    seen, wanted = process.add_noise(clean, noise, TIMESTEPS), process.target(clean, noise, TIMESTEPS)
    raw = clean + sigma * noise
    torch.testing.assert_close(seen, scheduler.precondition_inputs(raw, sigma), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(scheduler.precondition_outputs(raw, wanted, sigma), clean, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(process.times(TIMESTEPS), scheduler.timesteps[places], rtol=0, atol=0)


def test_weights_are_those_of_diffusers():
    timesteps = torch.arange(1000)
    for prediction_type, by in (("epsilon", lambda snr: snr), ("v_prediction", lambda snr: snr + 1)):
        scheduler = DDPMScheduler(prediction_type=prediction_type)
        snr = compute_snr(scheduler, timesteps)
        want = torch.stack([snr, 5.0 * torch.ones_like(snr)], dim=1).min(dim=1)[0] / by(snr)
        found = NoiseProcess.from_scheduler(scheduler, ObjectiveSettings(snr_gamma=5.0)).loss_weight
        torch.testing.assert_close(found.float(), want, rtol=1e-4, atol=0)
    flow = FlowMatchEulerDiscreteScheduler(shift=3.0)
    for scheme in ("none", "sigma_sqrt", "cosmap", "logit_normal", "mode"):
        process = NoiseProcess.from_scheduler(flow, ObjectiveSettings(weighting_scheme=scheme))
        want = compute_loss_weighting_for_sd3(scheme, process.sigma)
        torch.testing.assert_close(process.loss_weight.float(), want.float(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("scheme", ["none", "logit_normal", "mode"])
def test_timesteps_are_drawn_from_the_density_of_diffusers(scheme):
    settings = ObjectiveSettings(weighting_scheme=scheme, logit_mean=0.5, logit_std=0.7, mode_scale=1.29)
    process = NoiseProcess.from_scheduler(FlowMatchEulerDiscreteScheduler(), settings)
    ours = 999 - np.array([process.drawn_timestep(key) for key in range(20_000)])
    theirs = compute_density_for_timestep_sampling(
        scheme, 20_000, logit_mean=0.5, logit_std=0.7, mode_scale=1.29, generator=torch.Generator().manual_seed(0)
    )
    # A two-sample Kolmogorov-Smirnov distance; that of equal distributions exceeds 0.02 once in a thousand.
    assert ks_2samp(ours, (theirs * 1000).long().numpy()).statistic < 0.02


def test_a_noise_offset_shifts_noise_and_target_and_perturbation_the_input_alone():
    keys, shape = list(range(4000)), (2, 2, 2)
    plain = NoiseProcess.from_scheduler(DDPMScheduler()).noise(keys, shape)
    assert plain[0] is plain[1]
    shifted, _ = NoiseProcess.from_scheduler(DDPMScheduler(), ObjectiveSettings(noise_offset=0.5)).noise(keys, shape)
    shift = shifted - plain[0]
    assert np.allclose(shift, shift[:, :, :1, :1], atol=1e-6) and abs(shift[:, :, 0, 0].std() - 0.5) < 0.03
    assert abs(np.corrcoef(shift[:, 0, 0, 0], shift[:, 1, 0, 0])[0, 1]) < 0.06  # each channel has its own
    of_target, seen = NoiseProcess.from_scheduler(DDPMScheduler(), ObjectiveSettings(input_perturbation=0.1)).noise(
        keys, shape
    )
    np.testing.assert_array_equal(of_target, plain[0])
    assert abs((seen - of_target).std() - 0.1) < 0.003


@pytest.mark.parametrize(
    ("scheduler", "settings", "message"),
    [
        (DDPMScheduler(), {"weighting_scheme": "mode"}, "mode is of flow matching. Leave it out"),
        (DDPMScheduler(), {"precondition_outputs": True}, "precondition_outputs is of flow matching"),
        (FlowMatchEulerDiscreteScheduler(), {"snr_gamma": 5.0}, "snr_gamma weighs models of noise"),
        (EDMEulerScheduler(), {"snr_gamma": 5.0}, "snr_gamma weighs models of noise"),
        (DDPMScheduler(), {"snr_gamma": -1.0}, "snr_gamma must be above 0, found -1.0"),
        (DDPMScheduler(), {"noise_offset": -0.1}, "noise_offset must not be negative"),
    ],
)
def test_an_objective_of_another_kind_of_model_is_refused(scheduler, settings, message):
    with pytest.raises(ConfigError, match=message):
        NoiseProcess.from_scheduler(scheduler, ObjectiveSettings(**settings))


def test_what_a_plain_process_hashes_to_does_not_depend_on_what_others_have():
    plain = NoiseProcess.from_scheduler(DDPMScheduler())
    assert plain.content_hash == hashlib.sha256(b"epsilon" + plain.alpha.numpy().tobytes()).hexdigest()
    others = [
        NoiseProcess.from_scheduler(DDPMScheduler(), ObjectiveSettings(snr_gamma=5.0)),
        NoiseProcess.from_scheduler(FlowMatchEulerDiscreteScheduler()),
        NoiseProcess.from_scheduler(FlowMatchEulerDiscreteScheduler(shift=3.0)),
        NoiseProcess.from_scheduler(EDMEulerScheduler()),
        NoiseProcess.from_scheduler(EDMEulerScheduler(prediction_type="v_prediction")),
    ]
    assert len({plain.content_hash, *(p.content_hash for p in others)}) == 6


def test_a_scheduler_without_a_known_kind_is_refused():
    with pytest.raises(UnsupportedModelError, match="CMStochasticIterativeScheduler is neither"):
        NoiseProcess.from_scheduler(CMStochasticIterativeScheduler())


def test_a_scheduler_that_was_told_to_sample_is_refused():
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(10)
    with pytest.raises(UnsupportedModelError, match="set to sample in 10 steps; training has 1000"):
        NoiseProcess.from_scheduler(scheduler)


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
