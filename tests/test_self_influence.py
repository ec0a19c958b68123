from dataclasses import replace

import numpy as np
import pytest
import torch

from reference import gradient, query_gradients, visits_between
from whence.checkpoints import list_checkpoints, load_model, load_scheduler
from whence.config import TraceSettings
from whence.diffusion.noise import normals
from whence.errors import ConfigError, RecordError
from whence.methods import RETRAC, TRACIN, Replay
from whence.record import Record
from whence.self_influence import self_influence, self_influence_cost
from whence.streaming import write_arrays
from whence.subject import Subject

SETTINGS = TraceSettings(timesteps=3, draws=2, phases=1, batch_size=8, block_size=4, dtype="float64")
NO_GRID = TraceSettings(batch_size=8, block_size=4, dtype="float64")


@pytest.fixture
def subject(toy_run, toy_train):
    return Subject(list_checkpoints(toy_run), toy_train, Record.open(toy_run / "record"), "mse")


def trained_gradients(subject, row):
    """Gradient and weight of an image's last visit before each checkpoint, one event at a time."""
    visits, previous = subject.record.visits, 0
    for checkpoint in subject.checkpoints:
        model, scheduler = load_model(checkpoint).double(), load_scheduler(checkpoint)
        mine = visits_between(subject.record, subject.train.ids[row], previous, checkpoint.step)
        weight = sum(visits.learning_rate[v] * visits.clip_coefficient[v] / visits.samples_in_step[v] for v in mine)
        image = subject.train.pixels([row])[0]
        image = image[..., ::-1].copy() if visits.flip[mine[-1]] else image
        noise = normals(int(visits.noise_key[mine[-1]]), image.shape)
        yield model, scheduler, weight, gradient(model, scheduler, image, int(visits.model_time[mine[-1]]), noise)
        previous = checkpoint.step


def test_self_norm_is_the_weighted_squared_length(subject, tmp_path):
    scores = self_influence(subject, "self_norm", NO_GRID, tmp_path, method=TRACIN, show_progress=False)
    want = sum(weight * float(g @ g) for _, _, weight, g in trained_gradients(subject, 6))
    assert scores.values[0, 6] == pytest.approx(want, rel=1e-6)
    assert (scores.values > 0).all()


@pytest.mark.parametrize("method", [TRACIN, RETRAC])
def test_self_expected_sets_a_sample_against_its_own_mean(subject, tmp_path, method):
    scores = self_influence(subject, "self_expected", SETTINGS, tmp_path, method=method, show_progress=False)
    want = 0.0
    for model, scheduler, weight, g in trained_gradients(subject, 6):
        means = query_gradients(model, scheduler, subject.train.pixels([6])[0], "train-6", 3, 2)
        if method is RETRAC:
            g, means = g / g.norm(), means / means.norm(dim=1, keepdim=True)
        want += weight * float(torch.dot(g, means.mean(0)))
    assert scores.values[0, 6] == pytest.approx(want, rel=1e-6)


def test_self_norm_is_refused_where_it_is_constant(subject, tmp_path):
    with pytest.raises(ConfigError, match="same number for every sample"):
        self_influence(subject, "self_norm", NO_GRID, tmp_path, method=RETRAC, show_progress=False)


def test_self_influence_needs_a_record(subject, tmp_path):
    foreign = Subject(subject.checkpoints, subject.train, None, "mse")
    with pytest.raises(RecordError, match="needs a record"):
        self_influence(foreign, "self_norm", NO_GRID, tmp_path, method=TRACIN, show_progress=False)


def test_the_cost_is_known_beforehand(subject):
    assert self_influence_cost(subject, "self_norm", SETTINGS).sample_passes == 2 * 10
    assert self_influence_cost(subject, "self_expected", SETTINGS).sample_passes == 2 * 10 * (1 + 3 * 2)


def test_an_image_that_was_never_visited_has_no_length(subject, tmp_path):
    first = Subject(subject.checkpoints[:1], subject.train, subject.record, "mse")
    scores = self_influence(first, "self_norm", NO_GRID, tmp_path, method=TRACIN, show_progress=False)
    assert not np.isnan(scores.train_norms).any()


def test_a_setting_without_effect_warns(subject, tmp_path):
    with pytest.warns(UserWarning, match="no effect on self_norm"):
        self_influence(subject, "self_norm", SETTINGS, tmp_path, method=TRACIN, show_progress=False)


def test_an_interrupted_computation_goes_on_from_its_blocks(subject, tmp_path, monkeypatch):
    whole = self_influence(subject, "self_expected", SETTINGS, tmp_path / "whole", method=RETRAC, show_progress=False)
    done = []

    def interrupted(path, arrays):
        if len(done) == 4:
            raise KeyboardInterrupt
        done.append(path)
        write_arrays(path, arrays)

    monkeypatch.setattr("whence.self_influence.write_arrays", interrupted)
    with pytest.raises(KeyboardInterrupt):
        self_influence(subject, "self_expected", SETTINGS, tmp_path / "cut", method=RETRAC, show_progress=False)
    monkeypatch.setattr(
        "whence.self_influence.write_arrays", lambda path, arrays: done.append(path) or write_arrays(path, arrays)
    )
    cut = self_influence(subject, "self_expected", SETTINGS, tmp_path / "cut", method=RETRAC, show_progress=False)
    assert len(done) == len(set(done)) == 6  # two checkpoints of three blocks
    np.testing.assert_array_equal(cut.values, whole.values)


def test_all_visits_may_count(subject, tmp_path):
    settings = replace(NO_GRID, replay="all")
    scores = self_influence(subject, "self_norm", settings, tmp_path, method=TRACIN, show_progress=False)
    source = subject.source(subject.checkpoints[0], settings)
    table = subject.replays.events(0, 6, Replay("all"), "learning_rate")
    mine = table.take(table.row == 3)
    _, lengths = source.dots(mine, subject.train, source.no_vectors(), lambda n: None)
    assert len(mine) == 2
    assert scores.train_norms[0, 3] == pytest.approx(np.sqrt(np.mean(lengths**2)))
