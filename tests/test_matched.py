"""Gradients that meet timestep by timestep: against one cosine after the other, and what they must keep."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from safetensors.numpy import load_file
from scipy.stats import spearmanr

import reference
import whence.streaming
from conftest import toy_images
from whence.attribution import trace
from whence.checkpoints import load_model, load_scheduler
from whence.config import IndexSettings, QuerySettings, TraceSettings
from whence.data import ImageData
from whence.diffusion.noise import normals
from whence.diffusion.process import nearest_timesteps
from whence.errors import ConfigError, StoreError
from whence.indexing import index
from whence.methods import (
    GRAD_COS,
    GRAD_DOT,
    MATCHED_COS,
    MATCHED_DOT,
    RETRAC_MATCHED,
    AdamInverse,
    Grid,
    KroneckerInverse,
    Replay,
    RidgeInverse,
)
from whence.plan import plan
from whence.progress import progress_bar
from whence.querying import query

TIMESTEPS, DRAWS, PHASES = 5, 2, 2
SETTINGS = TraceSettings(
    timesteps=TIMESTEPS,
    draws=DRAWS,
    phases=PHASES,
    train_timesteps=TIMESTEPS,
    train_draws=1,
    batch_size=8,
    block_size=4,
    dtype="float64",
)
QUERY = QuerySettings(timesteps=TIMESTEPS, draws=DRAWS, phases=PHASES, batch_size=8)
INDEX = IndexSettings(projection="identity", rows="float32", batch_size=8, block_size=4)
GRID = replace(INDEX, grid=True, train_timesteps=TIMESTEPS, train_draws=1, checkpoints="last")
RETRAC_MATCHED_ALL = replace(RETRAC_MATCHED, train=replace(RETRAC_MATCHED.train, events=Replay("all")))


@pytest.fixture(scope="module")
def gridded(subject, toy_queries, tmp_path_factory):
    folder = tmp_path_factory.mktemp("scores")
    return trace(subject, toy_queries, [MATCHED_COS, MATCHED_DOT], SETTINGS, folder, show_progress=False)


@pytest.fixture(scope="module")
def replayed(subject, toy_queries, tmp_path_factory):
    folder = tmp_path_factory.mktemp("scores")
    return trace(subject, toy_queries, [RETRAC_MATCHED], SETTINGS, folder, show_progress=False)["retrac-matched"]


@pytest.fixture(scope="module")
def grid_store(subject, tmp_path_factory):
    return index(subject, GRID, tmp_path_factory.mktemp("run"), show_progress=False)


def gradients(subject, images, side, draws, checkpoint=-1):
    """Gradients averaged over the draws, (sample, timestep, param)."""
    model = load_model(subject.checkpoints[checkpoint], dtype="float64")
    scheduler = load_scheduler(subject.checkpoints[-1])
    take = partial(reference.query_gradients, model, scheduler, side=side, timesteps=TIMESTEPS, draws=draws)
    return np.stack([take(image=images.pixels([row])[0], sample_id=id_) for row, id_ in enumerate(images.ids)])


def unit(vectors):
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def check(found, want, tol=1e-7):
    np.testing.assert_allclose(found, want, rtol=tol, atol=tol * np.abs(want).max())
    for ours, theirs in zip(found, want, strict=True):
        assert spearmanr(ours, theirs).statistic > 0.999


@pytest.mark.parametrize("method", [MATCHED_COS, MATCHED_DOT], ids=lambda method: method.name)
def test_scores_are_means_over_timesteps_of_products_there(
    subject, gridded, grid_store, toy_train, toy_queries, tmp_path, method
):
    train = gradients(subject, toy_train, "train", draws=1)
    both, first = (gradients(subject, toy_queries, "query", draws) for draws in (DRAWS, 1))
    second = 2 * both - first
    if method is MATCHED_COS:
        train, both, first, second = map(unit, (train, both, first, second))
    at_timestep = np.zeros((TIMESTEPS, 3, 10))
    halves = np.zeros((2, 3, 10))
    for t in range(TIMESTEPS):
        for i in range(10):
            at_timestep[t, :, i] = both[:, t] @ train[i, t] / TIMESTEPS
            halves[:, :, i] += np.stack([first[:, t] @ train[i, t], second[:, t] @ train[i, t]]) / TIMESTEPS
    stored = query(subject, grid_store, toy_queries, [method], QUERY, tmp_path, show_progress=False)[method.name]
    for found, tol in ((gridded[method.name], 1e-7), (stored, 2e-3)):
        check(found.values, at_timestep.sum(0), tol)
        # Points 0, 1, 2 are the first of two bins of five.
        phases = np.stack([at_timestep[:3].sum(0), at_timestep[3:].sum(0)], axis=1)
        np.testing.assert_allclose(found.phases, phases, rtol=tol, atol=tol * np.abs(phases).max())
        np.testing.assert_allclose(found.halves, halves, rtol=tol, atol=tol * np.abs(halves).max())
        assert found.phase_timesteps == ((1, 25), (37, 49))
        assert found.query_timesteps.tolist() == [1, 13, 25, 37, 49]


def adam_scale(checkpoint, model):
    """Root of Adam's running mean square of each gradient, corrected for its start."""
    state = load_file(checkpoint.folder / "resume" / "optimizer.safetensors")
    parts = [state[f"exp_avg_sq.{name}"] / (1 - 0.999 ** state[f"step.{name}"]) for name, _ in model.named_parameters()]
    return np.concatenate([np.sqrt(part).ravel() + 1e-8 for part in parts])


def replay_reference(subject, train, queries, replay, scale=lambda checkpoint, model: 1.0):
    """One visit and one query at a time; scores by phase."""
    scores, visits = np.zeros((3, PHASES, 10)), subject.record.visits
    scheduler, grid = load_scheduler(subject.checkpoints[-1]), np.array(reference.grid(50, TIMESTEPS))
    after = 0
    for number, checkpoint in enumerate(subject.checkpoints):
        model = load_model(checkpoint, dtype="float64")
        queried = unit(gradients(subject, queries, "query", DRAWS, number)) / scale(checkpoint, model)
        for row, id_ in enumerate(train.ids):
            mine = reference.visits_between(subject.record, id_, after, checkpoint.step)
            weights = [visits.learning_rate[v] * visits.clip_coefficient[v] / visits.samples_in_step[v] for v in mine]
            if replay == "last":
                mine, weights = mine[-1:], [sum(weights)]
            for v, weight in zip(mine, weights, strict=True):
                image = train.pixels([row])[0]
                image = image[..., ::-1].copy() if visits.flip[v] else image
                timestep = int(visits.model_time[v])
                noise = normals(int(visits.noise_key[v]), image.shape)
                g = unit(reference.gradient(model, scheduler, image, timestep, noise).numpy())
                point = int(np.argmin(np.abs(grid - timestep)))
                scores[:, point * PHASES // TIMESTEPS, row] += weight * (queried[:, point] @ g)
        after = checkpoint.step
    return scores


@pytest.mark.parametrize("replay", ["last", "all"])
def test_a_visit_meets_the_nearest_timestep(subject, replayed, toy_train, toy_queries, tmp_path, replay):
    found = replayed
    if replay == "all":
        settings = replace(SETTINGS, replay="all")
        found = trace(subject, toy_queries, [RETRAC_MATCHED], settings, tmp_path, show_progress=False)["retrac-matched"]
    want = replay_reference(subject, toy_train, toy_queries, replay)
    check(found.values, want.sum(1))
    np.testing.assert_allclose(found.phases, want, rtol=1e-7, atol=1e-9 * np.abs(want).max())
    store = index(subject, replace(INDEX, replay=replay), tmp_path, show_progress=False)
    method = RETRAC_MATCHED if replay == "last" else RETRAC_MATCHED_ALL
    stored = query(subject, store, toy_queries, [method], QUERY, tmp_path, show_progress=False)["retrac-matched"]
    check(stored.values, want.sum(1), 1e-4)
    for name in ("halves", "train_norms", "train_timesteps", "train_weights", "query_norms"):
        theirs = getattr(found, name)
        atol = 1e-4 * np.nanmax(np.abs(theirs))
        np.testing.assert_allclose(getattr(stored, name), theirs, rtol=1e-4, atol=atol, err_msg=name)


def test_adam_stands_between_gradients_that_meet(subject, toy_train, toy_queries, tmp_path):
    method = replace(RETRAC_MATCHED, name="mine", precondition=AdamInverse())
    found = trace(subject, toy_queries, [method], SETTINGS, tmp_path, show_progress=False)["mine"]
    want = replay_reference(subject, toy_train, toy_queries, "last", adam_scale)
    np.testing.assert_allclose(found.phases, want, rtol=1e-5, atol=1e-6 * np.abs(want).max())  # its state is float32


def test_at_one_timestep_sums_and_timesteps_are_the_same(subject, toy_queries, tmp_path):
    sums = replace(GRAD_DOT, precondition=KroneckerInverse(kind="kfac", events=Grid(1)))
    methods = [sums, replace(sums, name="met", meet="timesteps")]
    settings = replace(SETTINGS, timesteps=1, train_timesteps=1, phases=1)
    found = trace(subject, toy_queries, methods, settings, tmp_path, show_progress=False)
    for name in ("values", "phases", "halves", "train_norms", "train_weights", "query_norms"):
        first, second = (getattr(scores, name) for scores in found.values())
        np.testing.assert_allclose(second, first, rtol=1e-9, err_msg=name)


def test_the_nearest_timestep_is_the_one_with_less_noise_where_two_are():
    found = nearest_timesteps(np.array([2, 6, 10]), np.array([0, 4, 5, 8, 9, 40]))
    assert found.tolist() == [0, 0, 1, 1, 2, 2]
    assert nearest_timesteps(np.array([7]), np.array([0, 40])).tolist() == [0, 0]


def test_an_image_with_its_own_noise_has_a_cosine_of_one(subject, toy_train, tmp_path, monkeypatch):
    from whence.event_table import noise_key

    # Queries draw the noise of training images, at the same timesteps.
    monkeypatch.setattr(
        "whence.event_table.noise_key", lambda seed, stream, side, *r: noise_key(seed, stream, "train", *r)
    )
    settings = replace(SETTINGS, train_draws=DRAWS, phases=TIMESTEPS)
    found = trace(subject, toy_train, [MATCHED_COS, MATCHED_DOT], settings, tmp_path, show_progress=False)
    cosines = np.einsum("ipi->ip", found["matched-cos"].phases) * TIMESTEPS
    np.testing.assert_allclose(cosines, 1, atol=1e-12)
    squares = np.diag(found["matched-dot"].values)
    np.testing.assert_allclose(squares, (found["matched-dot"].query_norms[0] ** 2).mean(1), rtol=1e-12)
    np.testing.assert_allclose(squares, found["matched-dot"].train_norms[0] ** 2, rtol=1e-12)
    assert (found["matched-cos"].values < 1 + 1e-12).all()


@pytest.mark.parametrize("batch_size, block_size", [(2, 1), (64, 100)])
def test_scores_do_not_depend_on_batch_block_or_turns(
    subject, toy_queries, gridded, replayed, tmp_path, monkeypatch, batch_size, block_size
):
    settings = replace(SETTINGS, batch_size=batch_size, block_size=block_size)
    monkeypatch.setattr("whence.memory.QUERY_BYTES", 1)  # every query in a turn of its own
    methods = [MATCHED_COS, RETRAC_MATCHED]
    others = trace(subject, toy_queries, methods, settings, tmp_path, show_progress=False)
    for other, want in zip(others.values(), (gridded["matched-cos"], replayed), strict=True):
        np.testing.assert_allclose(other.phases, want.phases, rtol=1e-9, atol=1e-15)
        np.testing.assert_allclose(other.halves, want.halves, rtol=1e-9, atol=1e-15)
        np.testing.assert_allclose(other.query_norms, want.query_norms, rtol=1e-9)
        np.testing.assert_allclose(other.train_norms, want.train_norms, rtol=1e-9)


def test_permuting_the_training_images_permutes_the_scores(subject, toy_train, toy_queries, gridded, tmp_path):
    order = [3, 1, 4, 9, 5, 2, 6, 8, 7, 0]
    permuted = ImageData.from_arrays(toy_train.pixels(order), [toy_train.ids[row] for row in order])
    other = replace(subject, train=permuted, record=None)
    found = trace(other, toy_queries, [MATCHED_COS], SETTINGS, tmp_path, show_progress=False)["matched-cos"]
    np.testing.assert_allclose(found.values, gridded["matched-cos"].values[:, order], rtol=1e-9)


def test_a_trace_goes_on_where_it_was_and_plans_what_it_does(subject, toy_queries, tmp_path, monkeypatch):
    bars = []

    def opening(*arguments, **options):
        bars.append(progress_bar(*arguments, **(options | {"shown": True})))
        return bars[-1]

    monkeypatch.setattr(whence.streaming, "progress_bar", opening)
    planned = plan(subject, toy_queries, [RETRAC_MATCHED, MATCHED_COS], SETTINGS, tmp_path)
    clean = whence.streaming.StreamingPass.clean
    monkeypatch.setattr(whence.streaming.StreamingPass, "clean", lambda self: None)
    first = trace(subject, toy_queries, [RETRAC_MATCHED, MATCHED_COS], SETTINGS, tmp_path)
    assert [bar.n for bar in bars] == [bar.total for bar in bars] == [one.sample_passes for one in planned.passes]
    tiles = list((tmp_path / "cache").rglob("tile-*"))
    headers = sum(8 + int.from_bytes(p.read_bytes()[:8], "little") for p in tiles)  # safetensors: length, then JSON
    assert sum(one.cache_bytes for one in planned.passes) == pytest.approx(
        sum(p.stat().st_size for p in tiles) - headers, rel=0.1
    )

    next((tmp_path / "cache").rglob("tile-000003-*")).unlink()
    for scores in first.values():
        (scores.folder / "manifest.json").unlink()
        (scores.folder / "scores.safetensors").unlink()
        scores.folder.rmdir()
    monkeypatch.setattr(whence.streaming.StreamingPass, "clean", clean)
    again = trace(subject, toy_queries, [RETRAC_MATCHED, MATCHED_COS], SETTINGS, tmp_path)
    assert [bar.n for bar in bars[2:]] == [bar.total for bar in bars[2:]]
    for name, scores in again.items():
        np.testing.assert_array_equal(scores.values, first[name].values)


def test_the_top_is_that_of_all_scores(subject, grid_store, toy_queries, tmp_path):
    found, top = (
        query(subject, grid_store, toy_queries, [MATCHED_COS], QUERY, tmp_path, top=top, show_progress=False)
        for top in (None, 4)
    )
    for row in range(3):
        want = found["matched-cos"].top(row, 4)
        assert [e.train_id for e in top["matched-cos"].top(row, 4)] == [e.train_id for e in want]
        assert [e.score for e in top["matched-cos"].top(row)] == pytest.approx([e.score for e in want], rel=1e-4)


def test_a_ridge_inverse_of_the_gradients_at_all_timesteps(subject, grid_store, toy_train, toy_queries, tmp_path):
    train = gradients(subject, toy_train, "train", draws=1)
    asked = gradients(subject, toy_queries, "query", DRAWS)
    rows = train.reshape(10 * TIMESTEPS, -1)
    gram = rows @ rows.T
    damping = 0.1 * np.trace(gram) / len(rows)
    solved = (rows.T @ np.linalg.inv(gram + damping * np.eye(len(rows)))).T.reshape(train.shape)
    want = np.einsum("qtp,itp->qi", asked, solved) / TIMESTEPS
    method = replace(MATCHED_DOT, name="mine", precondition=RidgeInverse(damping=0.1))
    found = query(subject, grid_store, toy_queries, [method], QUERY, tmp_path, show_progress=False)["mine"]
    np.testing.assert_allclose(found.values, want, rtol=2e-3, atol=2e-3 * np.abs(want).max())
    with pytest.raises(ConfigError, match=r"after='length' is of a training image's summed gradient"):
        odd = replace(method, after="length")
        query(subject, grid_store, toy_queries, [odd], QUERY, tmp_path, show_progress=False)


class TestRefusals:
    def test_other_timesteps(self, subject, grid_store, toy_queries, tmp_path):
        message = r"the training side has 5, the query side 4. Give --timesteps and --train-timesteps the same"
        with pytest.raises(ConfigError, match=message):
            trace(subject, toy_queries, [MATCHED_COS], replace(SETTINGS, timesteps=4), tmp_path, show_progress=False)
        with pytest.raises(ConfigError, match=message):
            settings = replace(QUERY, timesteps=4)
            query(subject, grid_store, toy_queries, [MATCHED_COS], settings, tmp_path, show_progress=False)

    def test_lengths_of_sums(self, subject, toy_queries, tmp_path):
        odd = replace(MATCHED_COS, train=GRAD_COS.train)
        with pytest.raises(ConfigError, match="unit 'sample' is the length of a sum"):
            trace(subject, toy_queries, [odd], SETTINGS, tmp_path, show_progress=False)

    def test_a_store_of_sums(self, subject, toy_queries, tmp_path):
        store = index(subject, replace(GRID, keep="sum"), tmp_path, show_progress=False)
        with pytest.raises(StoreError, match="needs a row at each timestep, the store holds their sums"):
            query(subject, store, toy_queries, [MATCHED_COS], QUERY, tmp_path, show_progress=False)


def test_without_a_record_the_grids_must_fit(subject, tmp_path):
    foreign, queries = replace(subject, record=None), toy_images(1, "query", seed=1)
    with pytest.raises(ConfigError, match="retrac-matched: .*the training side has 10, the query side 5"):
        settings = replace(SETTINGS, train_timesteps=None)
        trace(foreign, queries, [RETRAC_MATCHED], settings, tmp_path, show_progress=False)
    found = trace(foreign, queries, [RETRAC_MATCHED, MATCHED_COS], SETTINGS, tmp_path, show_progress=False)
    assert found["retrac-matched"].values.shape == (1, 10)
    assert "no record of training" in found["retrac-matched"].notes[0]
