"""Measures of a model: beside a plain loop, weights beside the textbook, and the grid's promises."""

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from scipy.stats import kstest

from conftest import TOY_MODEL, toy_images
from reference import prediction_and_target
from whence.config import ObjectiveSettings
from whence.diffusion.adapters import ADAPTERS, Adapter
from whence.diffusion.noise import noise_key, normals, scalar_draws
from whence.diffusion.objectives import bound_weights
from whence.diffusion.process import NoiseProcess
from whence.errors import ConfigError, NumericsError
from whence.measuring import MEASURES, finite_measures, make_grid, measure_model
from whence.training import make_model, make_scheduler

QUERIES = toy_images(3, "query", seed=1)


def scheduler_of(prediction_type, timesteps=50):
    return DDPMScheduler(num_train_timesteps=timesteps, prediction_type=prediction_type)


def plain_outputs(model, scheduler, image, sample_id, timesteps, draws, loss, seed):
    """One event at a time, with the weights of the textbook: METHODS 3.7."""
    num_timesteps, abar = len(scheduler.alphas_cumprod), scheduler.alphas_cumprod.double().tolist()
    rows, by_timestep = [], []
    for part in range(timesteps):
        keys = [noise_key(seed, "measure", "query", sample_id, part, pair) for pair in range(draws // 2)]
        t = int((part + scalar_draws(keys[0])[0]) * num_timesteps / timesteps)
        at_t = []
        for noise in (sign * normals(key, image.shape) for key in keys for sign in (1, -1)):
            with torch.no_grad():
                y, target = prediction_and_target(model, scheduler, image, t, noise)
            y, target, noisy = y.double(), target.double(), torch.as_tensor(noise).double()[None]
            x_t = abar[t] ** 0.5 * torch.as_tensor(image).double()[None] + (1 - abar[t]) ** 0.5 * noisy
            predicted_noise = {
                "epsilon": y,
                "v_prediction": abar[t] ** 0.5 * y + (1 - abar[t]) ** 0.5 * x_t,
                "sample": (x_t - abar[t] ** 0.5 * y) / (1 - abar[t]) ** 0.5,
            }[scheduler.config.prediction_type]
            noise_error = float((predicted_noise - noisy).square().mean())
            before = abar[t - 1] if t else 1.0
            alpha, beta = abar[t] / before, 1 - abar[t] / before
            simplified = beta / (2 * alpha * (1 - abar[t]))
            exact = beta / (2 * alpha * (1 - before)) if t else 0.0
            difference = y - target
            at_t.append(
                [
                    float(difference.abs().mean() if loss == "l1" else difference.square().mean()),
                    float(difference.square().mean()),
                    float(y.square().mean()),
                    num_timesteps * simplified * noise_error,
                    num_timesteps * exact * noise_error,
                ]
            )
        rows.append(np.mean(at_t, axis=0))
        by_timestep.append(rows[-1][0])
    return np.mean(rows, axis=0), by_timestep


@pytest.mark.parametrize(("prediction_type", "loss"), [("epsilon", "mse"), ("v_prediction", "l1"), ("sample", "mse")])
def test_outputs_are_those_of_a_plain_loop(prediction_type, loss):
    model, scheduler = make_model(TOY_MODEL, QUERIES, 0).eval().double(), scheduler_of(prediction_type)
    model.register_to_config(prediction_type=prediction_type)
    grid = make_grid(QUERIES.ids, 5, 4, 50, seed=3)
    process = NoiseProcess.from_scheduler(scheduler)
    single = make_model(TOY_MODEL, QUERIES, 0).eval()
    found = measure_model(single, process, QUERIES, grid, loss=loss, batch_size=7)
    for row, id_ in enumerate(QUERIES.ids):
        want, by_timestep = plain_outputs(model, scheduler, QUERIES.pixels([row])[0], id_, 5, 4, loss, seed=3)
        # The network ran in float32; the noise of a clean image's error is divided by a small sigma.
        np.testing.assert_allclose(found.outputs[:, row], want, rtol=2e-5)
        np.testing.assert_allclose(found.timestep_loss[row], by_timestep, rtol=2e-5)
    other = measure_model(single, process, QUERIES, grid, loss=loss, batch_size=60)
    np.testing.assert_allclose(other.outputs, found.outputs, rtol=2e-6)


def test_timesteps_are_stratified_and_uniform():
    grid = make_grid([f"q{k}" for k in range(400)], 10, 2, 1000, seed=0)
    assert ((grid.timesteps // 100) == np.arange(10)).all()
    assert kstest((grid.timesteps % 100).ravel() / 100, "uniform").pvalue > 1e-3
    uneven = make_grid([f"q{k}" for k in range(400)], 7, 2, 50, seed=0)  # 7 does not divide 50
    counts = np.bincount(uneven.timesteps.ravel(), minlength=50)
    assert counts.min() > 0 and abs(counts - 56).max() < 5 * 56**0.5


def test_a_querys_grid_does_not_depend_on_the_others():
    both, one = (make_grid(ids, 4, 2, 50, seed=0) for ids in (["a", "b"], ["b"]))
    np.testing.assert_array_equal(both.keys[1:], one.keys)
    np.testing.assert_array_equal(both.timesteps[1:], one.timesteps)
    assert (make_grid(["b"], 4, 2, 50, seed=1).keys != one.keys).all()


class Identity(torch.nn.Module):
    device = torch.device("cpu")

    def forward(self, noisy):
        return noisy


def test_opposite_noise_cancels_what_is_odd_in_it(monkeypatch):
    """Of a linear model y = x_t the mean square is even; the mean over a pair has no mixed term."""
    monkeypatch.setitem(ADAPTERS, "Identity", Adapter(lambda model, noisy, *_: model(noisy), lambda config: ()))
    process = NoiseProcess.from_scheduler(make_scheduler(TOY_MODEL))
    grid = make_grid(QUERIES.ids, 3, 2, 50, seed=0)
    found = measure_model(Identity(), process, QUERIES, grid, loss="mse", batch_size=4)
    for row in range(3):
        clean = QUERIES.pixels([row])[0].astype(np.float64)
        want = []
        for t, (key,) in zip(grid.timesteps[row], grid.keys[row], strict=True):
            noise = normals(int(key), clean.shape)
            signal = float(process.alpha[t]) ** 2
            want.append(signal * (clean**2).mean() + (1 - signal) * (noise.astype(np.float64) ** 2).mean())
        assert found.outputs[MEASURES.index("squares"), row] == pytest.approx(np.mean(want), rel=1e-6)


def test_the_loss_is_that_of_the_trainings_objective(monkeypatch):
    """Noise is shifted and perturbed, and the loss weighted, as in training; an error without a weight stays one."""
    monkeypatch.setitem(ADAPTERS, "Identity", Adapter(lambda model, noisy, *_: model(noisy), lambda config: ()))
    objective = ObjectiveSettings(snr_gamma=5.0, noise_offset=0.3, input_perturbation=0.2)
    process = NoiseProcess.from_scheduler(make_scheduler(TOY_MODEL), objective)
    grid = make_grid(QUERIES.ids, 4, 2, 50, seed=0)
    found = measure_model(Identity(), process, QUERIES, grid, loss="mse", batch_size=5)
    for row in range(3):
        clean, want = QUERIES.pixels([row])[0].astype(np.float64), []
        for t, keys in zip(grid.timesteps[row], grid.keys[row], strict=True):
            noise, seen = (n[0].astype(np.float64) for n in process.noise(keys, clean.shape))
            assert np.abs(noise - normals(int(keys[0]), clean.shape)).max() > 0.01
            alpha, sigma = float(process.alpha[t]), float(process.sigma[t])
            # The mean over both signs of the noise has no mixed term.
            want.append(((alpha * clean) ** 2).mean() + ((sigma * seen - noise) ** 2).mean())
        weighted = np.minimum(1, 5 * (process.sigma / process.alpha).square().numpy())[grid.timesteps[row]] * want
        np.testing.assert_allclose(found.timestep_loss[row], weighted, rtol=1e-5)
        assert found.outputs[MEASURES.index("loss"), row] == pytest.approx(weighted.mean(), rel=1e-5)
        assert found.outputs[MEASURES.index("mse"), row] == pytest.approx(np.mean(want), rel=1e-5)


def test_the_exact_bound_is_that_of_signal_to_noise_ratios():
    """1/2 (SNR(t-1) - SNR(t)) times the squared error of the clean image: Kingma et al. 2021, equation 13."""
    process = NoiseProcess.from_scheduler(scheduler_of("sample"))
    snr = (process.alpha / process.sigma).square()
    torch.testing.assert_close(bound_weights(process, "elbo")[1:], (snr[:-1] - snr[1:]) / 2, rtol=1e-9, atol=0)
    assert bound_weights(process, "elbo")[0] == 0


def test_a_schedule_that_ends_without_signal_has_no_bound_of_noise():
    ended = DDPMScheduler(num_train_timesteps=20, rescale_betas_zero_snr=True, prediction_type="epsilon")
    ended.alphas_cumprod[-1] = 0  # diffusers keeps 2^-24 there
    assert finite_measures(NoiseProcess.from_scheduler(ended)) == ("loss", "mse", "squares")
    ended.register_to_config(prediction_type="v_prediction")
    assert finite_measures(NoiseProcess.from_scheduler(ended)) == MEASURES


@pytest.mark.parametrize(("timesteps", "draws", "message"), [
    (0, 2, "timesteps must be 1 to 50"), (51, 2, "found 51"), (4, 3, "draws must be even"), (4, 0, "draws must be even")
])  # fmt: skip
def test_a_grid_that_cannot_be_is_refused(timesteps, draws, message):
    with pytest.raises(ConfigError, match=message):
        make_grid(["q"], timesteps, draws, 50, 0)


def test_an_output_that_is_not_finite_is_named():
    model = make_model(TOY_MODEL, QUERIES, 0).eval()
    model.conv_out.bias.data[:] = float("nan")
    grid = make_grid(QUERIES.ids, 2, 2, 50, seed=0)
    process = NoiseProcess.from_scheduler(make_scheduler(TOY_MODEL))
    with pytest.raises(NumericsError, match="query query-0 at timestep .* training has diverged"):
        measure_model(model, process, QUERIES, grid, loss="mse", batch_size=8)
