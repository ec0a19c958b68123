"""Journey-TRAK: the sampler's path, written and read, and scores along it, against one event at a time."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

import reference
from whence.attribution import trace
from whence.checkpoints import load_model, load_scheduler
from whence.config import DataSettings, IndexSettings, QuerySettings, TraceSettings
from whence.data import concatenate, open_images, save_arrays
from whence.diffusion.noise import noise_key, normals
from whence.errors import ConfigError, DataError
from whence.indexing import index
from whence.methods import GRAD_COS, GRAD_DOT, JOURNEY_TRAK, MATCHED_COS, GradientPlan, Grid, Trajectory
from whence.pipeline import Run
from whence.plan import plan
from whence.querying import query
from whence.trajectories import Trajectories

STEPS, DRAWS, SEED, DAMPING = 5, 2, 3, 0.1
QUERY = QuerySettings(draws=DRAWS, phases=STEPS, batch_size=8, damping=DAMPING)
GRID = IndexSettings(
    grid=True,
    train_timesteps=3,
    train_draws=2,
    checkpoints="last",
    projection="identity",
    rows="float32",
    batch_size=8,
    block_size=4,
)
GRAD_DOT_OF_PATHS = replace(GRAD_DOT, name="path-dot", query=GradientPlan(Trajectory(DRAWS)))


@pytest.fixture(scope="module")
def run(toy_run, toy_train, tmp_path_factory):
    """A run beside the one that was trained, to which files can be added."""
    folder = tmp_path_factory.mktemp("run")
    save_arrays(folder / "train.safetensors", toy_train.pixels(range(10)), toy_train.ids)
    return Run(folder, str(folder / "train.safetensors"), DataSettings(), toy_run, "mse")


@pytest.fixture(scope="module")
def sampled(run):
    path = run.sample(3, steps=STEPS, seed=SEED, trajectory=True, show_progress=False)
    return open_images(path)


@pytest.fixture(scope="module")
def store(subject, tmp_path_factory):
    return index(subject, GRID, tmp_path_factory.mktemp("store"), show_progress=False)


@pytest.fixture(scope="module")
def scores(subject, store, sampled, tmp_path_factory):
    folder = tmp_path_factory.mktemp("scores")
    return query(subject, store, sampled, [JOURNEY_TRAK], QUERY, folder, show_progress=False)["journey-trak"]


@torch.no_grad()
def sample_by_hand(model, scheduler, sample_id):
    """DDIM without noise (Song et al. 2021, equation 12), x_0 clamped; its x_0 by timestep, and the image."""
    alpha_bar = scheduler.alphas_cumprod.double().tolist()
    x = torch.from_numpy(normals(noise_key(SEED, "trajectory", "query", sample_id, 50), (3, 8, 8))).double()[None]
    frames = {}
    for t in range(50 - 50 // STEPS, -1, -50 // STEPS):
        noise = model(x, torch.tensor([t])).sample
        frames[t] = ((x - (1 - alpha_bar[t]) ** 0.5 * noise) / alpha_bar[t] ** 0.5).clamp(-1, 1)
        before = alpha_bar[t - 50 // STEPS] if t else 1.0
        x = before**0.5 * frames[t] + (1 - before) ** 0.5 * noise
    return {t: frame[0].numpy() for t, frame in frames.items()}, x[0].numpy()


def test_the_path_is_that_of_the_sampler(subject, run, sampled):
    model, scheduler = load_model(subject.checkpoints[-1], dtype="float64"), load_scheduler(subject.checkpoints[-1])
    assert sampled.trajectories.timesteps == (0, 10, 20, 30, 40)
    for row, id_ in enumerate(sampled.ids):
        frames, image = sample_by_hand(model, scheduler, id_)
        for step, t in enumerate(sampled.trajectories.timesteps):
            np.testing.assert_allclose(sampled.trajectories.frames[row, step], frames[t], atol=1e-4)
        np.testing.assert_allclose(sampled.pixels([row])[0], image, atol=1e-4)
        assert sampled.trajectories.about[row] == {
            "checkpoint_step": 12,
            "checkpoint_sha256": subject.checkpoints[-1].content_hash(),
            "sampler": "ddim",
            "eta": 0.0,
            "steps": STEPS,
            "seed": SEED,
        }
    plain = open_images(run.sample(3, steps=STEPS, seed=SEED, show_progress=False))
    np.testing.assert_array_equal(plain.pixels(range(3)), sampled.pixels(range(3)))
    assert plain.fingerprint == sampled.fingerprint and plain.trajectories is None


def gradients_of_steps(subject, sampled):
    """Gradients averaged over the draws, (query, step, param), one event at a time."""
    model, scheduler = load_model(subject.checkpoints[-1], dtype="float64"), load_scheduler(subject.checkpoints[-1])
    found = []
    for id_, frames in zip(sampled.ids, sampled.trajectories.frames, strict=True):
        for frame, t in zip(frames, sampled.trajectories.timesteps, strict=True):
            noises = [normals(noise_key(0, "trajectory", "query", id_, t, d), frame.shape) for d in range(DRAWS)]
            found.append(np.mean([reference.gradient(model, scheduler, frame, t, n).numpy() for n in noises], axis=0))
    return np.stack(found).reshape(len(sampled), STEPS, -1)


@pytest.fixture(scope="module")
def of_steps(subject, sampled):
    return gradients_of_steps(subject, sampled)


@pytest.fixture(scope="module")
def phi(subject, toy_train):
    model, scheduler = load_model(subject.checkpoints[-1], dtype="float64"), load_scheduler(subject.checkpoints[-1])
    return np.stack(
        [
            reference.query_gradients(model, scheduler, toy_train.pixels([row])[0], id_, 3, 2, side="train").mean(0)
            for row, id_ in enumerate(toy_train.ids)
        ]
    )


def test_scores_at_each_step_are_ridge_regressions_of_its_gradient(scores, of_steps, phi):
    gram = phi @ phi.T
    inverse = np.linalg.inv(gram + DAMPING * np.trace(gram) / len(phi) * np.eye(len(phi)))
    at_step = of_steps @ phi.T @ inverse / STEPS  # query, step, train
    np.testing.assert_allclose(scores.phases, at_step, rtol=2e-3, atol=2e-3 * np.abs(at_step).max())
    np.testing.assert_allclose(scores.values, at_step.sum(1), rtol=2e-3, atol=2e-3 * np.abs(at_step.sum(1)).max())
    for found, want in zip(scores.values, at_step.sum(1), strict=True):
        assert spearmanr(found, want).statistic > 0.999
    np.testing.assert_allclose(scores.halves.mean(0), scores.values, rtol=1e-3, atol=1e-4 * np.abs(scores.values).max())
    np.testing.assert_allclose(scores.query_norms[0], np.linalg.norm(of_steps, axis=2), rtol=1e-4)
    assert scores.phase_timesteps == ((0, 0), (10, 10), (20, 20), (30, 30), (40, 40))
    assert scores.query_timesteps.tolist() == [0, 10, 20, 30, 40]
    assert scores.reliability().shape == (3,)
    assert not any("other weights" in note for note in scores.notes)


def test_any_method_may_follow_the_path(subject, sampled, of_steps, phi, tmp_path):
    settings = TraceSettings(phases=2, train_timesteps=3, train_draws=2, batch_size=8, block_size=4, dtype="float64")
    planned = plan(subject, sampled, [GRAD_DOT_OF_PATHS], settings, tmp_path)
    assert planned.sample_passes == 3 * STEPS * DRAWS + 10 * 3 * 2
    found = trace(subject, sampled, [GRAD_DOT_OF_PATHS], settings, tmp_path, show_progress=False)["path-dot"]
    np.testing.assert_allclose(found.values, of_steps.mean(1) @ phi.T, rtol=1e-7, atol=1e-12)
    for batch_size in (2, 64):
        settings = replace(settings, batch_size=batch_size)
        other = trace(subject, sampled, [GRAD_DOT_OF_PATHS], settings, tmp_path / str(batch_size), show_progress=False)
        np.testing.assert_allclose(other["path-dot"].values, found.values, rtol=1e-9)


def test_a_query_has_the_same_scores_beside_others_or_alone(subject, store, sampled, scores, tmp_path):
    order = [2, 0]
    some = sampled.select(order)
    found = query(subject, store, some, [JOURNEY_TRAK], QUERY, tmp_path, show_progress=False)["journey-trak"]
    np.testing.assert_allclose(found.phases, scores.phases[order], rtol=1e-4, atol=1e-6 * np.abs(scores.phases).max())
    joined = concatenate([sampled.select([1]), some])
    assert joined.trajectories.hashes == tuple(sampled.trajectories.hashes[row] for row in (1, 2, 0))


def test_paths_of_other_weights_are_noted_and_scored_anew(subject, store, sampled, scores, tmp_path):
    path = sampled.trajectories
    odd = Trajectories(path.frames * 0.5, path.timesteps, ({"checkpoint_sha256": "0"},) * 3)
    other = replace(sampled, trajectories=odd)
    found = query(subject, store, other, [JOURNEY_TRAK], QUERY, scores.folder.parents[1], show_progress=False)
    assert "3 of 3 queries were sampled from other weights than those that are traced." in found["journey-trak"].notes
    assert found["journey-trak"].folder != scores.folder
    assert np.abs(found["journey-trak"].values - scores.values).max() > 1e-3 * np.abs(scores.values).max()


def test_a_path_that_counts_in_a_region_is_scored_anew(subject, store, sampled, scores, tmp_path):
    masks = np.zeros((3, 8, 8), np.float32)
    masks[:, :4] = 1
    folders = (tmp_path, scores.folder.parents[1])  # nothing is kept of these queries in the former
    found = [
        query(subject, store, replace(sampled, masks=masks), [JOURNEY_TRAK], QUERY, folder, show_progress=False)
        for folder in folders
    ]
    alone, beside = (one["journey-trak"].values for one in found)
    np.testing.assert_array_equal(beside, alone)
    assert np.abs(alone - scores.values).max() > 1e-3 * np.abs(scores.values).max()


class TestRefusals:
    def test_queries_without_a_path(self, subject, store, sampled, toy_queries, tmp_path):
        message = r"journey-trak follows the steps by which a sampler came to each query; .*`whence sample RUN --traj"
        for queries in (toy_queries, concatenate([sampled, toy_queries])):
            with pytest.raises(ConfigError, match=message):
                query(subject, store, queries, [JOURNEY_TRAK], QUERY, tmp_path, show_progress=False)

    def test_another_number_of_steps(self, subject, sampled, tmp_path):
        odd = replace(GRAD_DOT, query=GradientPlan(Trajectory(2, steps=7)))
        with pytest.raises(ConfigError, match=r"grad-dot asks for 7 steps of a trajectory, .* has 5"):
            trace(subject, sampled, [odd], TraceSettings(), tmp_path, show_progress=False)

    def test_paths_of_training_images(self, subject, run, sampled, tmp_path):
        odd = replace(GRAD_DOT, train=GradientPlan(Trajectory(1)))
        for traced in (subject, replace(subject, record=None)):
            with pytest.raises(ConfigError, match="trajectories are of queries; training images are replayed or on a"):
                trace(traced, sampled, [odd], TraceSettings(), tmp_path, show_progress=False)
        with pytest.raises(ConfigError, match="Trajectories are of queries, not of training images"):
            run.events(GradientPlan(Trajectory(1)), ["train-0"])

    def test_steps_that_would_meet_a_grid(self, subject, sampled, tmp_path):
        odd = replace(MATCHED_COS, query=GradientPlan(Trajectory(2), unit="timestep"))
        with pytest.raises(ConfigError, match="the steps of a trajectory are at other timesteps than a grid"):
            trace(subject, sampled, [odd], TraceSettings(), tmp_path, show_progress=False)

    def test_a_number_of_timesteps_has_no_effect(self, subject, store, sampled, tmp_path):
        settings = replace(QUERY, timesteps=7)
        with pytest.warns(UserWarning, match="timesteps has no effect: queries are taken at the steps"):
            query(subject, store, sampled, [JOURNEY_TRAK], settings, tmp_path, show_progress=False)

    def test_a_trace(self, subject, sampled, tmp_path):
        with pytest.raises(ConfigError, match=r"journey-trak cannot be traced: .*`whence index RUN --grid`"):
            trace(subject, sampled, [JOURNEY_TRAK], TraceSettings(phases=2), tmp_path, show_progress=False)

    @pytest.mark.parametrize(
        "change, message",
        [
            ({"frames": np.zeros((2, 5, 3, 8, 8), np.float32)}, "of 3 images at 5 steps, found"),
            ({"frames": np.full((3, 5, 3, 8, 8), np.nan, np.float32)}, r"frames must be in \[-1, 1\]"),
            ({"timesteps": (0, 20, 10, 30, 40)}, r"timesteps must be ascending, from 0 on, found \[0, 20, 10"),
        ],
    )
    def test_what_is_no_path(self, sampled, change, message):
        with pytest.raises(DataError, match=message):
            replace(sampled.trajectories, **change)

    def test_a_path_of_other_images(self, sampled, tmp_path):
        path = sampled.trajectories
        small = Trajectories(path.frames[..., :4], path.timesteps, path.about)
        with pytest.raises(DataError, match=r"Frames must be of \[3, 3, 8, 8\] .*, found \[3, 3, 8, 4\]"):
            save_arrays(tmp_path / "x.safetensors", sampled.pixels(range(3)), sampled.ids, trajectories=small)


def test_queries_on_a_grid_do_not_mind_a_path(subject, sampled, tmp_path):
    settings = TraceSettings(timesteps=2, draws=2, phases=1, train_timesteps=2, train_draws=1)
    plain = replace(sampled, trajectories=None)
    first, second = (
        trace(subject, queries, [replace(GRAD_COS, query=GradientPlan(Grid(2, 2), unit="sample"))], settings, folder)
        for queries, folder in ((sampled, tmp_path / "a"), (plain, tmp_path / "b"))
    )
    np.testing.assert_array_equal(first["grad-cos"].values, second["grad-cos"].values)
    assert first["grad-cos"].folder.name == second["grad-cos"].folder.name
