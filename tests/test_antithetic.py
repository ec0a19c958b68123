"""Draws of queries in pairs of opposite noise: one grid of events, by every way to a score."""

from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

from whence.attribution import trace
from whence.bias import grid_of
from whence.checkpoints import list_checkpoints
from whence.config import IndexSettings, QuerySettings, TraceSettings
from whence.data import ImageData
from whence.diffusion.noise import normals_of_keys
from whence.errors import ConfigError
from whence.event_table import grid_events, make_batch
from whence.indexing import index
from whence.methods import PIXELS, RETRAC, TRACIN, AntitheticGrid, Grid
from whence.querying import query
from whence.record import Record
from whence.reliability import Target, largest_grid, schedule, trace_until
from whence.subject import Subject

SETTINGS = TraceSettings(timesteps=5, draws=4, phases=2, batch_size=8, block_size=4, dtype="float64", antithetic=True)
QUIET = {"show_progress": False}


@pytest.fixture(scope="module")
def subject(toy_run, toy_train):
    return Subject(list_checkpoints(toy_run), toy_train, Record.open(toy_run / "record"), "mse")


@pytest.fixture(scope="module")
def scores(subject, toy_queries, tmp_path_factory):
    return trace(subject, toy_queries, [TRACIN, RETRAC], SETTINGS, tmp_path_factory.mktemp("scores"), **QUIET)


def test_each_draw_is_followed_by_its_opposite(subject, toy_queries):
    num_timesteps = subject.process.num_timesteps
    table = grid_events(toy_queries, [1, 0], "query", AntitheticGrid(3, 4), num_timesteps, seed=2)
    plain = grid_events(toy_queries, [1, 0], "query", Grid(3, 2), num_timesteps, seed=2)
    assert table.noise_key[::2].tolist() == table.noise_key[1::2].tolist() == plain.noise_key.tolist()
    assert table.row[::2].tolist() == plain.row.tolist() and table.timestep[::2].tolist() == plain.timestep.tolist()
    batch, of_plain = (make_batch(t, toy_queries, subject.process, dtype=torch.float64) for t in (table, plain))
    assert torch.equal(batch.noise[::2], of_plain.noise) and torch.equal(batch.noisy[::2], of_plain.noisy)
    assert torch.equal(batch.noise[1::2], -batch.noise[::2])
    clean = 0.5 * (batch.noisy[1::2] + batch.noisy[::2])
    alpha = subject.process.alpha[torch.from_numpy(plain.timestep)].view(-1, 1, 1, 1)
    torch.testing.assert_close(clean, alpha * batch.clean[::2])


def test_sums_are_those_of_autograd(subject, toy_queries):
    grid = AntitheticGrid(2, 2)
    source = subject.source(subject.checkpoints[-1], SETTINGS)
    (found,) = source.grid_vectors(
        toy_queries, [0], "query", grid, ["none"], phases=1, halves=False, seed=0, update=lambda _: None
    )
    want = torch.zeros(source.layout.num_params, dtype=torch.float64)
    plain = grid_events(toy_queries, [0], "query", Grid(2, 1), subject.process.num_timesteps, seed=0)
    clean = torch.from_numpy(toy_queries.pixels([0])).double()
    for t, key in zip(plain.timestep.tolist(), plain.noise_key, strict=True):
        for sign in (1.0, -1.0):
            noise = sign * torch.from_numpy(normals_of_keys([int(key)], toy_queries.input_shape)).double()
            noisy = subject.process.alpha[t] * clean + subject.process.sigma[t] * noise
            loss = (source.model(noisy, t).sample - noise).square().mean()
            parameters = list(source.capture.parameters.values())
            gradients = torch.autograd.grad(loss, parameters)
            want += torch.cat([g.flatten() for g in gradients]) / 4
    torch.testing.assert_close(found.vectors[0], want, rtol=1e-7, atol=1e-10)


def test_halves_are_of_whole_pairs(subject, toy_queries, scores, tmp_path):
    one_pair = trace(subject, toy_queries, [TRACIN, RETRAC], replace(SETTINGS, draws=2), tmp_path, **QUIET)
    for name, both in scores.items():
        np.testing.assert_allclose(both.halves[0], one_pair[name].values, rtol=1e-9)
        assert not np.allclose(both.halves[0], both.halves[1], rtol=1e-3)
        assert both.reliability() is not None and one_pair[name].reliability() is None
        assert any(
            "or one antithetic pair, the reliability of the scores is not known" in n for n in one_pair[name].notes
        )
        assert not any("antithetic pair" in n for n in both.notes)


def test_scores_of_both_grids_lie_apart_and_those_of_the_plain_one_are_named_as_before(
    subject, toy_queries, scores, tmp_path
):
    plain = trace(subject, toy_queries, [TRACIN], replace(SETTINGS, antithetic=False), tmp_path, **QUIET)["tracin"]
    assert plain.folder.name != scores["tracin"].folder.name
    assert plain.details["method"]["query"]["events"] == {"timesteps": 5, "draws": 4}
    assert asdict(AntitheticGrid(5, 4)) == asdict(Grid(5, 4)) and AntitheticGrid(5, 4) != Grid(5, 4)
    assert grid_of(plain) == Grid(5, 4) and grid_of(scores["tracin"]) == AntitheticGrid(5, 4)


def test_a_declared_grid_stays_antithetic(subject, toy_queries, scores, tmp_path):
    declared = replace(RETRAC, query=replace(RETRAC.query, events=AntitheticGrid(100, 4)))
    found = trace(subject, toy_queries, [declared], replace(SETTINGS, antithetic=False), tmp_path, **QUIET)["retrac"]
    np.testing.assert_allclose(found.values, scores["retrac"].values, rtol=1e-12)  # alone, sums are rounded otherwise


def test_a_store_gives_the_scores_of_a_trace_and_keeps_both_grids_apart(subject, toy_queries, scores, tmp_path):
    held = index(
        subject, IndexSettings(projection="identity", rows="float32", batch_size=8, dtype="float64"), tmp_path, **QUIET
    )
    asked = QuerySettings(timesteps=5, draws=4, phases=2, batch_size=8)
    plain, found = (
        query(subject, held, toy_queries, [RETRAC], replace(asked, antithetic=antithetic), tmp_path, **QUIET)["retrac"]
        for antithetic in (False, True)
    )
    want = scores["retrac"]
    largest = np.abs(want.values).max()
    np.testing.assert_allclose(found.values, want.values, atol=1e-5 * largest)
    np.testing.assert_allclose(found.halves, want.halves, atol=1e-5 * largest)
    assert np.abs(plain.values - found.values).max() > 1e-3 * largest


def test_budgets_begin_with_two_pairs(subject, toy_queries, tmp_path):
    assert [(g.timesteps, g.draws) for g in schedule(AntitheticGrid(20, 8))] == [(8, 4), (16, 4), (20, 4), (20, 8)]
    assert all(isinstance(grid, AntitheticGrid) for grid in schedule(AntitheticGrid(20, 8)))
    assert largest_grid([TRACIN, PIXELS], QuerySettings(antithetic=True)) == AntitheticGrid(100, 16)
    with pytest.raises(ConfigError, match="must be a multiple of 4 where they are antithetic; found 2"):
        largest_grid([TRACIN], QuerySettings(antithetic=True, draws=2))
    settings = replace(SETTINGS, timesteps=12)
    found, used = trace_until(subject, toy_queries, [RETRAC], settings, tmp_path, Target(1e-6), **QUIET)
    assert (used.timesteps, used.draws) == (8, 4)
    assert grid_of(found["retrac"]) == AntitheticGrid(8, 4)


@pytest.mark.parametrize("draws", [1, 6])
def test_draws_that_do_not_pair_are_refused(subject, toy_queries, tmp_path, draws):
    with pytest.raises(
        ConfigError, match=f"multiple of 4, to be split in two halves of whole pairs, or 2; found {draws}"
    ):
        trace(subject, toy_queries, [RETRAC], replace(SETTINGS, draws=draws), tmp_path, **QUIET)


def test_training_images_have_no_pairs(subject, toy_queries, tmp_path):
    odd = replace(TRACIN, train=replace(TRACIN.train, events=AntitheticGrid(3, 2)), weights="equal")
    with pytest.raises(ConfigError, match="pairs of opposite noise are of queries"):
        trace(subject, toy_queries, [odd], SETTINGS, tmp_path, **QUIET)


def test_a_setting_without_effect_is_warned_of(subject: Subject, toy_queries: ImageData, tmp_path):
    with pytest.warns(UserWarning, match="antithetic has no effect: none of these methods takes queries on a grid"):
        trace(subject, toy_queries, [PIXELS], SETTINGS, tmp_path, **QUIET)
