"""Scores against the batch-of-one reference, and the identities that they must keep."""

import shutil
from dataclasses import replace

import filelock
import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from reference import query_gradients, replay_scores
from whence.attribution import check_trace_settings, declare, trace
from whence.checkpoints import list_checkpoints, load_model, load_scheduler
from whence.config import TraceSettings
from whence.data import ImageData
from whence.errors import CheckpointError, ConfigError, InUseError, RecordError, ScoresError
from whence.methods import GRAD_COS, GRAD_DOT, PIXELS, RANDOM, RETRAC, TRACIN, Grid, Replay
from whence.record import Record
from whence.scores import Scores
from whence.streaming import StreamingPass
from whence.subject import Subject

SETTINGS = TraceSettings(
    timesteps=5, draws=4, phases=2, train_timesteps=3, train_draws=2, batch_size=8, block_size=4, dtype="float64"
)


@pytest.fixture(scope="module")
def scores(subject, toy_queries, tmp_path_factory):
    methods = [TRACIN, RETRAC, GRAD_DOT, GRAD_COS, PIXELS, RANDOM]
    return trace(subject, toy_queries, methods, SETTINGS, tmp_path_factory.mktemp("scores"), show_progress=False)


def reference(subject, queries, *, normalise, replay="last"):
    models = [load_model(c).double() for c in subject.checkpoints]
    return replay_scores(
        models,
        [c.step for c in subject.checkpoints],
        load_scheduler(subject.checkpoints[-1]),
        subject.record,
        subject.train,
        queries,
        normalise=normalise,
        replay=replay,
        timesteps=SETTINGS.timesteps,
        draws=SETTINGS.draws,
    )


@pytest.mark.parametrize("method", [TRACIN, RETRAC])
@pytest.mark.parametrize("replay", ["last", "all"])
def test_replayed_scores_are_those_of_the_papers_formula(subject, toy_queries, tmp_path, method, replay):
    settings = replace(SETTINGS, replay=replay)
    found = trace(subject, toy_queries, [method], settings, tmp_path, show_progress=False)[method.name]
    want = reference(subject, toy_queries, normalise=method is RETRAC, replay=replay)
    np.testing.assert_allclose(found.values, want, rtol=1e-6, atol=1e-9 * np.abs(want).max())
    for ours, theirs in zip(found.values, want, strict=True):
        assert spearmanr(ours, theirs).statistic > 0.9999


def test_float32_scores_are_within_the_promised_rounding(subject, toy_queries, scores, tmp_path):
    single = trace(subject, toy_queries, [RETRAC], replace(SETTINGS, dtype="float32"), tmp_path, show_progress=False)[
        "retrac"
    ]
    # Every product is of two vectors of length at most 1, so the bound is 1e-5 of the sum of the weights.
    bound = 1e-5 * scores["retrac"].train_weights.sum(0)
    assert (np.abs(single.values - scores["retrac"].values) <= bound).all()


def test_gradient_similarity_is_that_of_mean_gradients_at_the_last_checkpoint(subject, toy_queries, scores):
    model = load_model(subject.checkpoints[-1]).double()
    scheduler = load_scheduler(subject.checkpoints[-1])

    def means(images, side, timesteps, draws):
        return torch.stack(
            [
                query_gradients(model, scheduler, pixels, i, timesteps, draws, side=side).mean(0)
                for pixels, i in zip(images.pixels(range(len(images))), images.ids, strict=True)
            ]
        )

    train = means(subject.train, "train", SETTINGS.train_timesteps, SETTINGS.train_draws)
    query = means(toy_queries, "query", SETTINGS.timesteps, SETTINGS.draws)
    dot = (query @ train.T).numpy()
    np.testing.assert_allclose(scores["grad-dot"].values, dot, rtol=1e-6, atol=1e-12)
    cosine = dot / np.outer(query.norm(dim=1), train.norm(dim=1))
    np.testing.assert_allclose(scores["grad-cos"].values, cosine, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("name", ["tracin", "retrac", "grad-dot", "grad-cos"])
def test_phases_add_up_to_the_scores(scores, name):
    np.testing.assert_allclose(scores[name].phases.sum(1), scores[name].values, rtol=1e-12)


def test_halves_of_tracin_average_to_the_scores(scores):
    np.testing.assert_allclose(scores["tracin"].halves.mean(0), scores["tracin"].values, rtol=1e-9)


@pytest.mark.parametrize("batch_size, block_size", [(4, 3), (64, 100)])
def test_scores_do_not_depend_on_batch_or_block_size(
    subject, toy_queries, scores, tmp_path, monkeypatch, batch_size, block_size
):
    settings = replace(SETTINGS, batch_size=batch_size, block_size=block_size)
    monkeypatch.setattr("whence.memory.QUERY_BYTES", 1)  # every query in a turn of its own
    others = trace(subject, toy_queries, [TRACIN, RETRAC, GRAD_COS], settings, tmp_path, show_progress=False)
    for name, other in others.items():
        np.testing.assert_allclose(other.values, scores[name].values, rtol=1e-9, atol=1e-15)
        np.testing.assert_allclose(other.halves, scores[name].halves, rtol=1e-9, atol=1e-15)
        np.testing.assert_allclose(other.query_norms, scores[name].query_norms, rtol=1e-9)


def test_permuting_the_training_images_permutes_the_scores(toy_run, toy_train, toy_queries, scores, tmp_path):
    order = [3, 1, 4, 9, 5, 2, 6, 8, 7, 0]
    permuted = ImageData.from_arrays(toy_train.pixels(order), [toy_train.ids[row] for row in order])
    record = Record.open(toy_run / "record")
    record.manifest["data_fingerprint"] = permuted.fingerprint  # the order is part of the fingerprint
    subject = Subject(list_checkpoints(toy_run), permuted, record, "mse")
    found = trace(subject, toy_queries, [RETRAC], SETTINGS, tmp_path, show_progress=False)["retrac"]
    np.testing.assert_allclose(found.values, scores["retrac"].values[:, order], rtol=1e-9)


def test_retrac_of_an_event_with_itself_is_the_sum_of_weights(subject):
    """Matched timestep and noise on both sides: the cosine is 1 at every checkpoint (METHODS 6.10)."""
    from whence.methods import Replay

    for checkpoint, after in zip(subject.checkpoints, [0, subject.checkpoints[0].step], strict=True):
        source = subject.source(checkpoint, SETTINGS)
        table = subject.replays.events(after, checkpoint.step, Replay("last"), "learning_rate")
        for event in range(3):
            one = table.take(slice(event, event + 1))
            vectors = whole_gradient(source, one, subject.train)
            dots, norms = source.dots(one, subject.train, vectors, lambda n: None)
            assert dots[0, 0] / norms[0] / float(vectors.norm()) == pytest.approx(1.0, abs=1e-12)


def whole_gradient(source, table, images):
    from whence.engine.sinks import GatherSink

    sink = GatherSink(source.layout, source.no_vectors().new_zeros(1, source.layout.num_params))
    source._backward(table, images, 1, 1.0, [sink])
    return sink.rows


def test_scaling_the_loss_scales_tracin_and_leaves_retrac(subject, toy_queries, scores, tmp_path):
    visits = subject.record.visits
    is_third = visits.sample == subject.record.sample_ids.index("train-3")
    weights = np.where(is_third, 10.0, 1.0).astype(np.float32)
    scaled = replace(subject, record=replace(subject.record, visits=replace(visits, loss_weight=weights)))
    found = trace(scaled, toy_queries, [TRACIN, RETRAC], SETTINGS, tmp_path, show_progress=False)
    np.testing.assert_allclose(found["tracin"].values[:, 3], 10 * scores["tracin"].values[:, 3], rtol=1e-6)
    np.testing.assert_allclose(found["retrac"].values[:, 3], scores["retrac"].values[:, 3], rtol=1e-6)
    np.testing.assert_allclose(found["tracin"].values[:, 4], scores["tracin"].values[:, 4], rtol=1e-9)


def test_one_step_on_a_sample_lowers_the_query_loss_by_its_tracin_score(subject, toy_queries):
    """First order: a step of SGD on sample i alone changes the query's loss by minus the score."""
    checkpoint = subject.checkpoints[-1]
    source = subject.source(checkpoint, SETTINGS)
    (query,) = source.grid_vectors(
        toy_queries,
        [0],
        "query",
        TRACIN.query.events.__class__(5, 4),
        ["none"],
        phases=1,
        halves=False,
        seed=0,
        update=lambda n: None,
    )
    table = subject.replays.events(0, checkpoint.step, TRACIN.train.events, "learning_rate").take(slice(2, 3))
    dots, _ = source.dots(table, subject.train, query.vectors, lambda n: None)
    learning_rate = 1e-6
    before = mean_loss(source, toy_queries)
    with torch.no_grad():
        step = whole_gradient(source, table, subject.train)[0]
        for name, parameter in source.capture.parameters.items():
            parameter -= learning_rate * step[source.layout.spans[name]].view_as(parameter)
    assert before - mean_loss(source, toy_queries) == pytest.approx(learning_rate * dots[0, 0], rel=1e-3)


def mean_loss(source, queries):
    from whence.event_table import grid_events
    from whence.methods import Grid

    table = grid_events(queries, [0], "query", Grid(5, 4), source.process.num_timesteps, 0)
    with torch.no_grad():
        return float(source._outputs(table, queries).mean())


def test_without_a_record_the_training_side_is_a_grid_and_says_so(subject, toy_queries, tmp_path):
    foreign = replace(subject, record=None)
    found = trace(foreign, toy_queries, [RETRAC], SETTINGS, tmp_path, show_progress=False)["retrac"]
    assert "no record of training" in found.notes[0]
    assert found.train_timesteps is None
    model = load_model(subject.checkpoints[0]).double()
    scheduler = load_scheduler(subject.checkpoints[0])

    def unit_mean(images, row, side, timesteps, draws):
        g = query_gradients(model, scheduler, images.pixels([row])[0], images.ids[row], timesteps, draws, side=side)
        return (g / g.norm(dim=1, keepdim=True)).mean(0)

    first = replace(foreign, checkpoints=subject.checkpoints[:1])
    alone = trace(first, toy_queries, [RETRAC], SETTINGS, tmp_path, show_progress=False)["retrac"]
    want = float(unit_mean(toy_queries, 1, "query", 5, 4) @ unit_mean(subject.train, 7, "train", 3, 2))
    assert alone.values[1, 7] == pytest.approx(want, rel=1e-6)


def test_scores_on_disk_are_not_computed_again(subject, toy_queries, tmp_path, monkeypatch):
    first = trace(subject, toy_queries, [RETRAC], SETTINGS, tmp_path, show_progress=False)["retrac"]
    monkeypatch.setattr(Subject, "source", lambda *a: pytest.fail("a model was loaded"))
    again = trace(subject, toy_queries, [RETRAC], replace(SETTINGS, batch_size=16), tmp_path, show_progress=False)[
        "retrac"
    ]
    np.testing.assert_array_equal(first.values, again.values)


def test_visits_after_the_last_checkpoint_and_missing_visits_are_told(subject, toy_queries, tmp_path):
    fewer = replace(subject, checkpoints=subject.checkpoints[:1])
    notes = trace(fewer, toy_queries, [RETRAC], SETTINGS, tmp_path, show_progress=False)["retrac"].notes
    assert any("20 visits after the last checkpoint" in note for note in notes)


def test_what_a_method_declares_is_what_is_computed():
    own = replace(RETRAC, train=replace(RETRAC.train, events=Replay("all")))
    declared, _ = declare(own, TraceSettings(), has_record=True)
    assert declared == own
    assert declare(GRAD_DOT, TraceSettings(), has_record=True)[0] == GRAD_DOT
    changed, _ = declare(GRAD_DOT, TraceSettings(timesteps=7, train_draws=3), has_record=False)
    assert (changed.query.events, changed.train.events) == (Grid(7, 2), Grid(10, 3))


def test_published_weights_are_those_of_the_published_code(subject, toy_queries, tmp_path):
    published = replace(TRACIN, name="tracin-published", weights="published")
    settings = replace(SETTINGS, dtype="float64")
    found = trace(subject, toy_queries, [TRACIN, published], settings, tmp_path, show_progress=False)
    rates = [subject.record.visits.learning_rate[subject.record.visits.step == step][0] for step in (6, 12)]
    want = [rate * 4 * 2 / 8 for rate in rates]  # lr x batch x epochs / whole batches of 10 images
    np.testing.assert_allclose(found["tracin-published"].train_weights, np.outer(want, np.ones(10)))


def test_two_declarations_of_one_name_are_refused(subject, toy_queries, tmp_path):
    other = replace(RETRAC, weights="equal")
    with pytest.raises(ConfigError, match="Two different declarations are named retrac"):
        trace(subject, toy_queries, [RETRAC, other], SETTINGS, tmp_path, show_progress=False)


def test_another_noise_schedule_gives_other_scores_not_the_old_ones(toy_run, toy_train, toy_queries, tmp_path):
    """A foreign model whose scheduler file is put right after a first trace."""
    run = tmp_path / "run"
    shutil.copytree(toy_run, run)
    for file in run.rglob("checkpoint.json"):
        file.unlink()

    def traced():
        subject = Subject(list_checkpoints(run), toy_train, None, "mse")
        return trace(subject, toy_queries, [RETRAC], SETTINGS, tmp_path / "out", show_progress=False)["retrac"]

    first = traced()
    for file in run.rglob("scheduler_config.json"):
        file.write_text(file.read_text().replace('"epsilon"', '"v_prediction"'))
    assert not np.allclose(traced().values, first.values)


def test_the_interval_before_a_last_checkpoint_is_part_of_what_scores_depend_on(subject, toy_queries, tmp_path):
    last = replace(TRACIN, checkpoints="last")
    first = trace(subject, toy_queries, [last], SETTINGS, tmp_path, show_progress=False)["tracin"]
    alone = replace(subject, checkpoints=subject.checkpoints[1:])
    again = trace(alone, toy_queries, [last], SETTINGS, tmp_path, show_progress=False)["tracin"]
    assert (again.train_weights > first.train_weights).all()


def test_a_deleted_tile_is_made_again(subject, toy_queries, scores, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Scores, "save", lambda *a: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(OSError, match="No space"):
            trace(subject, toy_queries, [RETRAC], SETTINGS, tmp_path, show_progress=False)
    next(tmp_path.rglob("tile-*")).unlink()
    found = trace(subject, toy_queries, [RETRAC], SETTINGS, tmp_path, show_progress=False)["retrac"]
    np.testing.assert_allclose(found.values, scores["retrac"].values, rtol=1e-12)


def test_a_second_process_on_the_same_scores_is_refused(subject, toy_queries, tmp_path, monkeypatch):
    monkeypatch.setattr(StreamingPass, "run", lambda self: pytest.fail("both ran"))
    with monkeypatch.context() as patch:
        patch.setattr(StreamingPass, "clean", lambda self: None)
        patch.setattr(StreamingPass, "run", lambda self: [])
        with pytest.raises(ScoresError):  # nothing was computed, but the lock's name is known now
            trace(subject, toy_queries, [RETRAC], SETTINGS, tmp_path, show_progress=False)
    (lock,) = tmp_path.rglob("*.lock")
    with filelock.FileLock(lock), pytest.raises(InUseError, match="Another process is computing the same scores"):
        trace(subject, toy_queries, [RETRAC], SETTINGS, tmp_path, show_progress=False)


def test_other_images_are_refused_for_every_method(subject, toy_queries, tmp_path):
    other = ImageData.from_arrays(-subject.train.pixels(range(10)), subject.train.ids)
    with pytest.raises(RecordError, match="not those that were trained on"):
        trace(replace(subject, train=other), toy_queries, [GRAD_DOT], SETTINGS, tmp_path, show_progress=False)


def test_parameters_can_be_chosen(subject, toy_queries, tmp_path):
    settings = replace(SETTINGS, parameters=("conv_in.*",))
    found = trace(subject, toy_queries, [TRACIN], settings, tmp_path, show_progress=False)["tracin"]
    model = load_model(subject.checkpoints[0])
    model.requires_grad_(False)
    model.conv_in.requires_grad_(True)
    source = subject.source(subject.checkpoints[0], settings)
    assert source.layout.num_params == sum(p.numel() for p in model.conv_in.parameters())
    assert (found.train_norms > 0).all()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"draws": 3}, "even number"),
        ({"draws": 16, "batch_size": 8}, "batch_size must hold"),
        ({"phases": 9}, "at most timesteps"),
        ({"timesteps": 0}, "above 0"),
        ({"device": "abacus"}, "Device 'abacus' cannot be used"),
    ],
)
def test_contradictory_settings_are_refused(subject, toy_queries, tmp_path, change, message):
    with pytest.raises(ConfigError, match=message):
        trace(subject, toy_queries, [RETRAC], replace(SETTINGS, **change), tmp_path, show_progress=False)


def test_units_that_cannot_be_computed_are_refused(subject, toy_queries, tmp_path):
    odd = replace(RETRAC, train=replace(RETRAC.train, unit="timestep"))
    with pytest.raises(ConfigError, match="a replay has unit none, event"):
        trace(subject, toy_queries, [odd], SETTINGS, tmp_path, show_progress=False)


def test_a_query_that_is_not_on_a_grid_is_refused(subject, toy_queries, tmp_path):
    odd = replace(RETRAC, query=replace(RETRAC.query, events=Replay("last")))
    with pytest.raises(ConfigError, match="queries are taken on a grid"):
        trace(subject, toy_queries, [odd], SETTINGS, tmp_path, show_progress=False)


def test_images_of_another_size_are_refused(subject, toy_queries, tmp_path):
    large = ImageData.from_arrays(np.zeros((1, 3, 16, 16), np.float32), ["large"])
    with pytest.raises(ConfigError, match="3 x 8 x 8"):
        trace(subject, large, [RETRAC], SETTINGS, tmp_path, show_progress=False)
    images = ImageData.from_arrays(np.zeros((1, 3, 16, 16), np.float32), ["train-0"])
    with pytest.raises(CheckpointError, match="8 x 8 pixels"):
        trace(replace(subject, train=images, record=None), large, [RETRAC], SETTINGS, tmp_path, show_progress=False)


def test_declarations_take_their_grids_from_the_settings():
    declared, notes = declare(RETRAC, SETTINGS, has_record=True)
    assert (declared.query.events.timesteps, declared.query.events.draws, notes) == (5, 4, [])


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("dtype", "float16", "Unknown dtype 'float16'; known are float32, float64"),
        ("weights_name", "mean", "Unknown weights_name 'mean'; known are raw, ema"),
        ("replay", "first", "Unknown replay 'first'; known are last, all"),
    ],
)
def test_an_unknown_name_lists_the_known_ones(name, value, message):
    settings = replace(SETTINGS)
    object.__setattr__(settings, name, value)  # past the annotation, which the checks of the tests would refuse first
    with pytest.raises(ConfigError, match=message):
        check_trace_settings(settings)
