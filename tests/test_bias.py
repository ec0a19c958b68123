import json
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

from reference import gradient, grid, query_gradients, visits_between
from whence._run_scores import as_trace_settings
from whence.attribution import trace
from whence.bias import (
    choose_samples,
    correlations,
    intervene,
    norm_by_timestep,
    ranks_of,
    timestep_histogram,
    trained_as,
)
from whence.checkpoints import list_checkpoints, load_model, load_scheduler
from whence.config import QuerySettings, TraceSettings
from whence.diagnosis import diagnose
from whence.diffusion.noise import normals
from whence.errors import ConfigError, RecordError, ScoresError
from whence.evaluation import generally_influential_from
from whence.methods import GRAD_DOT, PIXELS, RETRAC, TRACIN
from whence.record import Record
from whence.scores import Scores
from whence.subject import Subject

SETTINGS = TraceSettings(timesteps=3, draws=2, phases=1, batch_size=8, block_size=4, dtype="float64")
QUIET = {"show_progress": False}


@pytest.fixture(scope="module")
def subject(toy_run, toy_train):
    return Subject(list_checkpoints(toy_run), toy_train, Record.open(toy_run / "record"), "mse")


@pytest.fixture(scope="module")
def traced(subject, toy_queries, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bias")
    return list(trace(subject, toy_queries, [TRACIN, RETRAC], SETTINGS, folder, **QUIET).values())


def scores_of(values, norms, timesteps, weights=None):
    values = np.array(values, dtype=np.float64)
    ids = tuple("abcdefgh"[: values.shape[1]])
    return Scores(
        "by hand",
        tuple("qrs"[: len(values)]),
        ids,
        values,
        train_norms=np.array(norms, dtype=np.float64),
        train_timesteps=None if timesteps is None else np.array(timesteps),
        train_weights=None if weights is None else np.array(weights, dtype=np.float64),
    )


def test_how_samples_were_trained_is_a_mean_weighted_as_the_scores():
    nan = np.nan
    scores = scores_of(
        np.zeros((1, 3)), [[1, nan, 4], [3, nan, nan]], [[10, -1, 30], [50, -1, -1]], [[1, 0, 2], [3, 0, 0]]
    )
    norms, timesteps = trained_as(scores)
    np.testing.assert_allclose(norms, [(1 + 3 * 3) / 4, nan, 4])
    np.testing.assert_allclose(timesteps, [(10 + 3 * 50) / 4, nan, 30])


def test_correlations_are_of_the_size_of_scores():
    scores = scores_of([[-3, 1, 2], [1, 2, 3], [1, 1, 1]], [[3, 1, 2]], [[1, 9, 5]])
    found = correlations(scores)
    np.testing.assert_allclose(found.with_norm, [1, -0.5, np.nan])
    np.testing.assert_allclose(found.with_timestep, [-1, 0.5, np.nan])
    assert correlations(scores_of([[-3, 1, 2]], [[3, 1, 2]], None)).with_timestep is None
    with pytest.raises(ScoresError, match="any scores have no gradients of training images"):
        correlations(Scores("any", ("q",), ("a",), np.zeros((1, 1))))


def test_histogram_and_medians_are_by_trained_timestep():
    scores = scores_of([[3, 1, 2], [0, 9, 1]], [[3, 1, 2], [5, 7, 9]], [[0, 39, 1], [-1, 38, 20]])
    found = timestep_histogram(scores, k=1)  # the top are samples 0 and 1
    assert found.edges[[0, 1, -1]].tolist() == [0, 2, 40]
    assert (found.everything[[0, 10, 19]].tolist(), found.everything.sum()) == ([2, 1, 2], 5)
    assert (found.top[[0, 19]].tolist(), found.top.sum()) == ([1, 2], 3)
    _, medians = norm_by_timestep(scores)
    assert medians[0, [0, 19]].tolist() == [2.5, 1] and medians[1, [10, 19]].tolist() == [9, 7]
    assert np.isnan(medians[1, 0])  # a sample without a visit is at no timestep
    for function in (lambda s: timestep_histogram(s, 1), norm_by_timestep):
        with pytest.raises(ScoresError, match="do not replay training"):
            function(scores_of([[1, 2]], [[1, 2]], None))


def test_a_rank_is_among_the_others():
    scores = scores_of([[3, 1, 2], [0, 9, 1]], [[1, 1, 1]], [[1, 1, 1]])
    assert ranks_of(np.array([[2.5], [0.5]]), scores.values, [0]).tolist() == [[1], [3]]
    assert ranks_of(scores.values[:, [1, 2]], scores.values, [1, 2]).tolist() == [[3, 2], [1, 2]]


def test_generally_influential_is_more_than_a_quarter_and_more_than_chance():
    assert generally_influential_from(num_query=16, num_train=1000, k=10) == 4  # a quarter
    assert generally_influential_from(num_query=6, num_train=1000, k=10) == 3  # no fewer than three
    assert generally_influential_from(num_query=16, num_train=50, k=10) == 7  # twice 3.2 of chance


def test_samples_are_chosen_among_those_that_were_always_visited():
    scores = scores_of(np.zeros((1, 4)), np.ones((2, 4)), [[1, 2, 3, 4], [-1, 5, -1, 6]])
    assert sorted(choose_samples(scores, 5)) == [1, 3]
    with pytest.raises(RecordError, match="No training image was visited before every checkpoint"):
        choose_samples(scores_of(np.zeros((1, 1)), np.ones((1, 1)), [[-1]]), 1)


def test_scores_as_if_trained_elsewhere_are_those_of_a_loop(subject, traced, toy_queries, tmp_path):
    row, count = 6, 7
    found = intervene(subject, toy_queries, traced, [row, 2], SETTINGS, tmp_path, timesteps=count, **QUIET)
    visits, previous = subject.record.visits, 0
    want = {"tracin": np.zeros((2, 3)), "retrac": np.zeros((2, 3))}
    for number, checkpoint in enumerate(subject.checkpoints):
        model, scheduler = load_model(checkpoint).double(), load_scheduler(checkpoint)
        mine = visits_between(subject.record, "train-6", previous, checkpoint.step)
        weight = sum(visits.learning_rate[v] * visits.clip_coefficient[v] / visits.samples_in_step[v] for v in mine)
        image, last = subject.train.pixels([row])[0], mine[-1]
        image = image[..., ::-1].copy() if visits.flip[last] else image
        noise = normals(int(visits.noise_key[last]), image.shape)
        gradients = [gradient(model, scheduler, image, t, noise) for t in grid(50, count)]
        curve = np.array([float(g.norm()) for g in gradients])
        np.testing.assert_allclose(found.curves[number, 0], curve, rtol=1e-6)
        assert found.longest_timesteps[number, 0] == grid(50, count)[curve.argmax()]
        assert found.trained_timesteps[number, 0] == visits.model_time[last]
        for query, (pixels, id_) in enumerate(zip(toy_queries.pixels(range(3)), toy_queries.ids, strict=True)):
            means = query_gradients(model, scheduler, pixels, id_, 3, 2)
            unit = (means / means.norm(dim=1, keepdim=True)).mean(0)
            for way, g in enumerate((gradients[curve.argmax()], gradients[curve.argmin()])):
                want["tracin"][way, query] += weight * float(g @ means.mean(0))
                want["retrac"][way, query] += weight * float(torch.dot(g / g.norm(), unit))
        previous = checkpoint.step
    for scores in traced:
        np.testing.assert_allclose(found.scores[scores.method][1:, :, 0], want[scores.method], rtol=1e-6)
        np.testing.assert_allclose(found.scores[scores.method][0], scores.values[:, [row, 2]], rtol=1e-8)
    assert not list(tmp_path.glob("diagnose-*/*"))


def test_what_cannot_be_moved_is_refused(subject, traced, toy_queries, toy_train, tmp_path):
    (gridded,) = trace(subject, toy_queries, [GRAD_DOT], SETTINGS, tmp_path, **QUIET).values()
    with pytest.raises(ConfigError, match="Give scores by tracin or retrac"):
        intervene(subject, toy_queries, [gridded], [0], SETTINGS, tmp_path, **QUIET)
    with pytest.raises(RecordError, match="Only a record of training says"):
        bare = Subject(subject.checkpoints, toy_train, None, "mse")
        intervene(bare, toy_queries, traced, [0], SETTINGS, tmp_path, **QUIET)
    wrong = [replace(traced[0], values=traced[0].values[:, ::-1])]
    with pytest.raises(ScoresError, match="Taken again, tracin scores differ by"):
        intervene(subject, toy_queries, wrong, [0], SETTINGS, tmp_path, timesteps=2, **QUIET)


def test_an_interrupted_diagnosis_goes_on(subject, traced, toy_queries, tmp_path, monkeypatch):
    whole = intervene(subject, toy_queries, traced, [1], SETTINGS, tmp_path / "a", timesteps=3, **QUIET)
    asked, source = [], Subject.source

    def once(self, checkpoint, settings):
        asked.append(checkpoint.step)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return source(self, checkpoint, settings)

    monkeypatch.setattr(Subject, "source", once)
    with pytest.raises(KeyboardInterrupt):
        intervene(subject, toy_queries, traced, [1], SETTINGS, tmp_path / "b", timesteps=3, **QUIET)
    again = intervene(subject, toy_queries, traced, [1], SETTINGS, tmp_path / "b", timesteps=3, **QUIET)
    assert len(asked) == 3  # the first checkpoint was not taken again
    np.testing.assert_array_equal(again.scores["retrac"], whole.scores["retrac"])


def test_a_diagnosis_has_a_row_for_each_method_with_gradients(subject, traced, toy_queries, tmp_path):
    others = trace(subject, toy_queries, [GRAD_DOT, PIXELS], SETTINGS, tmp_path, **QUIET)
    everything = [*traced, *others.values()]
    tables = diagnose(subject, toy_queries, everything, SETTINGS, tmp_path, count=2, timesteps=3, k=2, **QUIET)
    assert [row[0] for row in tables["bias"]["rows"]] == ["tracin", "retrac", "grad-dot"]
    tracin, _, gridded = tables["bias"]["rows"]
    assert tracin[1] == pytest.approx(np.median(correlations(traced[0]).with_norm))
    assert tracin[2] is not None and gridded[2] is None
    counts = np.bincount(traced[0].top_rows(2).ravel())
    assert tracin[3] == (counts == 3).sum()  # three queries, and no fewer than three make it general
    assert any("No intervention for grad-dot" in note for note in tables["bias"]["notes"])
    assert [row[:2] for row in tables["intervention"]["rows"]] == [
        [method, f"{where}"]
        for method in ("tracin", "retrac")
        for where in ("its own t", "t of longest gradient", "t of shortest gradient")
    ]
    record = json.loads((tmp_path / "evaluation" / "bias.json").read_text())
    row = subject.train.rows([record["samples"][0]["id"]])[0]
    mean_rank = np.mean(1 + (traced[0].values > traced[0].values[:, [row]]).sum(axis=1))
    assert record["methods"][0]["intervention"][0]["trained"]["rank"] == mean_rank
    moves = [e["longest"]["rank"] - e["trained"]["rank"] for e in record["methods"][0]["intervention"]]
    half = 12.7062 * abs(moves[0] - moves[1]) / 2  # Student's t with one degree of freedom
    assert tables["intervention"]["rows"][1][3:6] == pytest.approx(
        [np.mean(moves), np.mean(moves) - half, np.mean(moves) + half], rel=1e-4
    )
    assert len(tables["norm_curves"]["rows"]) == len(subject.checkpoints)
    curves = np.array([s["checkpoints"][-1]["norms"] for s in record["samples"]])
    assert tables["norm_curves"]["rows"][-1][-1] == pytest.approx(np.median(curves.max(1) / curves.min(1)))
    assert (tmp_path / "evaluation" / "intervention.md").read_text().startswith("| method | trained at | mean rank |")
    no_more = diagnose(subject, toy_queries, everything, None, tmp_path, k=2, **QUIET)
    assert list(no_more) == ["bias"]
    with pytest.raises(ScoresError, match="None of these scores has gradients"):
        diagnose(subject, toy_queries, [others["pixels"]], SETTINGS, tmp_path, **QUIET)
    with pytest.raises(ConfigError, match="k must be above 0"):
        diagnose(subject, toy_queries, traced, SETTINGS, tmp_path, k=0, **QUIET)


def test_settings_kept_before_one_existed_are_still_those_of_a_trace():
    used = asdict(TraceSettings(timesteps=7))
    del used["antithetic"]
    assert as_trace_settings(used) == TraceSettings(timesteps=7)
    assert as_trace_settings(asdict(QuerySettings())) is None
    assert as_trace_settings(used | {"of_a_later_version": 1}) is None
