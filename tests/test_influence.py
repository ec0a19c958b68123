"""Influence functions with Kronecker factors, on a trained model."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import reference
from whence.attribution import trace
from whence.checkpoints import load_model, load_scheduler
from whence.config import TraceSettings
from whence.diffusion.noise import normals
from whence.engine.curvature_sinks import CovarianceSink
from whence.errors import CheckpointError, ConfigError
from whence.event_table import grid_events
from whence.methods import EKFAC, KFAC, RETRAC_ADAM, TRACIN_ADAM, Grid, Replay
from whence.plan import plan
from whence.second_order import adam_scales, load_or_make_curvature

SETTINGS = TraceSettings(timesteps=5, draws=4, phases=2, train_timesteps=3, train_draws=1, batch_size=8, block_size=4)
SMALL = Grid(timesteps=2)
METHODS = [replace(m, precondition=replace(m.precondition, events=SMALL)) for m in (KFAC, EKFAC)]


@pytest.fixture(scope="module")
def scored(subject, toy_queries, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return folder, trace(subject, toy_queries, METHODS, SETTINGS, folder, show_progress=False)


def make_curvature(subject, method, path, settings=SETTINGS):
    source = subject.source(subject.checkpoints[-1], settings)
    return load_or_make_curvature(
        path, source, subject.train, method.precondition, settings.seed, lambda n: None
    ), source


def gradients_of(subject, images, timesteps, draws, side):
    model = load_model(subject.checkpoints[-1], dtype="float64")
    scheduler = load_scheduler(subject.checkpoints[-1])
    found = [
        reference.query_gradients(
            model, scheduler, images.pixels([row])[0], images.ids[row], timesteps, draws, side=side
        ).mean(0)
        for row in range(len(images))
    ]
    return torch.stack(found)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_scores_are_those_of_the_dense_inverse(subject, scored, toy_train, toy_queries, tmp_path, method):
    curvature, source = make_curvature(subject, method, tmp_path / "curvature.safetensors")
    phi = gradients_of(subject, toy_train, 3, 1, "train")
    psi = gradients_of(subject, toy_queries, 5, 4, "query")
    want, spans = np.zeros((3, 10)), source.layout.spans
    for name, block in curvature.blocks.items():
        shape = (len(block.eigenvalues), -1)
        names = [name] if block.bias is None else [name, block.bias]
        # Flattened row by row, the bias at the end of each.
        one, other = (
            torch.cat([v[:, spans[n]].unflatten(1, shape) for n in names], dim=2).flatten(1) for v in (phi, psi)
        )
        basis = torch.kron(block.out_basis, block.inner_basis).double()
        eigenvalues = block.eigenvalues.flatten().double()
        damped = basis @ torch.diag(1 / (eigenvalues + 0.1 * eigenvalues.mean())) @ basis.T
        want += (other @ damped @ one.T).numpy()
    for name, squares in curvature.squares.items():
        damped = squares.flatten().double() + 0.1 * squares.double().mean()
        want += (psi[:, spans[name]] / damped @ phi[:, spans[name]].T).numpy()
    found = scored[1][method.name]
    np.testing.assert_allclose(found.values, want, atol=1e-3 * np.abs(want).max())
    np.testing.assert_allclose(found.phases.sum(1), found.values, rtol=1e-4, atol=1e-6 * np.abs(want).max())


def test_the_gauss_newton_matrix_of_the_last_bias(subject):
    """Each pixel of a channel adds its bias once, so the matrix is 2/d times the pixels, on the diagonal."""
    source = subject.source(subject.checkpoints[-1], replace(SETTINGS, parameters=("conv_out.*",)))
    sink = CovarianceSink()
    table = grid_events(subject.train, range(10), "train", Grid(timesteps=40), 50, seed=0)
    source.sampled_gradients(table, subject.train, [sink], lambda n: None)
    covariance = sink.covariances["conv_out.weight"]
    found = covariance.out / len(table) * covariance.inner[-1, -1] / (len(table) * covariance.positions)
    pixels, numbers = 64, 192
    # 400 events x 64 pixels: the relative error of a variance is sqrt(2 / 25600).
    np.testing.assert_allclose(torch.diagonal(found), 2 * pixels / numbers, rtol=0.05)
    assert (found - torch.diag(torch.diagonal(found))).abs().max() < 0.05


def test_the_curvature_is_kept(subject, toy_queries, scored, monkeypatch):
    folder, _ = scored
    monkeypatch.setattr("whence.second_order._make_curvature", lambda *a: pytest.fail("it was made again"))
    found = trace(subject, toy_queries.select([0]), METHODS, SETTINGS, folder, show_progress=False)
    assert set(found) == {"kfac", "ekfac"}
    other = replace(SETTINGS, damping=1.0)  # needs no other curvature
    more = trace(subject, toy_queries.select([0]), METHODS, other, folder, show_progress=False)
    assert not np.allclose(more["ekfac"].values, found["ekfac"].values)


def test_passes_for_curvature_are_planned(subject, toy_queries, tmp_path):
    made = plan(subject, toy_queries, METHODS, SETTINGS, tmp_path)
    assert [[count.curvature for count in one.passes] for one in made.passes] == [[20], [40]]
    assert made.sample_passes == 2 * (3 * 20 + 10 * 3) + 20 + 40


def test_no_damping_is_refused(subject, toy_queries, tmp_path):
    with pytest.raises(ConfigError, match="damping must be above 0 with Kronecker factors"):
        trace(subject, toy_queries, METHODS, replace(SETTINGS, damping=0.0), tmp_path, show_progress=False)


ADAM = [replace(m, query=replace(m.query, events=Grid(5, 4))) for m in (TRACIN_ADAM, RETRAC_ADAM)]


def test_adam_divides_by_its_own_scale(subject, toy_queries, toy_train, tmp_path):
    settings = replace(SETTINGS, train_timesteps=None, train_draws=None)
    found = trace(subject, toy_queries, ADAM, settings, tmp_path, show_progress=False)
    want = dict.fromkeys(("tracin-adam", "retrac-adam"), 0.0)
    after = 0
    for checkpoint in subject.checkpoints:
        state = load_file(checkpoint.folder / "resume" / "optimizer.safetensors")
        model, scheduler = load_model(checkpoint, dtype="float64"), load_scheduler(checkpoint)
        scale = torch.cat(
            [
                (state[f"exp_avg_sq.{name}"] / (1 - 0.999 ** state[f"step.{name}"])).sqrt().flatten() + 1e-8
                for name, _ in model.named_parameters()
            ]
        )
        visits = subject.record.visits
        for row, sample_id in enumerate(toy_train.ids):
            *_, last = reference.visits_between(subject.record, sample_id, after, checkpoint.step)
            image = toy_train.pixels([row])[0]
            image = image[:, :, ::-1].copy() if visits.flip[last] else image
            noise = normals(int(visits.noise_key[last]), image.shape)
            g = reference.gradient(model, scheduler, image, int(visits.model_time[last]), noise)
            weight = subject.replays.events(after, checkpoint.step, Replay("last"), "learning_rate").weight[row]
            for column, image in enumerate(toy_queries.pixels(range(3))):
                q = reference.query_gradients(model, scheduler, image, toy_queries.ids[column], 5, 4, side="query")
                pairs = {
                    "tracin-adam": (g, q.mean(0)),
                    "retrac-adam": (g / g.norm(), (q / q.norm(dim=1, keepdim=True)).mean(0)),
                }
                for name, (one, other) in pairs.items():
                    scores = np.zeros((3, 10))
                    scores[column, row] = weight * float(one @ (other / scale))
                    want[name] = want[name] + scores
        after = checkpoint.step
    for name, scores in found.items():
        np.testing.assert_allclose(scores.values, want[name], rtol=2e-3, atol=2e-3 * np.abs(want[name]).max())


def test_adam_needs_the_state_of_the_optimizer(subject, tmp_path):
    checkpoint = subject.checkpoints[0]
    with pytest.raises(CheckpointError, match="has not the state of an Adam optimizer.*resume_tensors"):
        adam_scales(replace(checkpoint, folder=tmp_path), ["conv_in.weight"], 0.999, 1e-8)
    with pytest.raises(CheckpointError, match="has not the state of an Adam optimizer"):
        adam_scales(checkpoint, ["conv_in.weight", "other.weight"], 0.999, 1e-8)
    with pytest.raises(CheckpointError, match="has not adam_beta2 in the config"):
        adam_scales(checkpoint, ["conv_in.weight"], None, 1e-8)


def test_adam_has_no_damping(subject, toy_queries, tmp_path):
    settings = replace(SETTINGS, train_timesteps=None, train_draws=None, damping=1.0)
    with pytest.warns(UserWarning, match="damping has no effect"):
        trace(subject, toy_queries.select([0]), ADAM, settings, tmp_path, show_progress=False)
