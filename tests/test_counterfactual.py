"""Counterfactuals: models are those of plain trainings, effects those worked out by hand, and nothing is done twice."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from conftest import TOY_MODEL, TOY_TRAINING, toy_images
from own_trainers import save_shifted
from whence.checkpoints import list_checkpoints, load_model, load_scheduler
from whence.config import CounterfactualSettings
from whence.counterfactual import plan_counterfactual
from whence.data import ImageData, open_images
from whence.diffusion.process import NoiseProcess
from whence.effects import image_id, run_counterfactual
from whence.errors import ConfigError, ScoresError
from whence.measuring import make_grid, measure_model
from whence.record import Record
from whence.sampling import sample_images
from whence.scores import Scores
from whence.subject import Subject
from whence.subsets import draw_members
from whence.training import _Loop, train

MODEL = replace(TOY_MODEL, widths=(4, 4), attention_levels=0, norm_groups=2)
TRAINING = replace(TOY_TRAINING, epochs=2, checkpoints=1)
SETTINGS = CounterfactualSettings(
    top=(3,), seeds=(0, 4), timesteps=3, batch_size=16, sample_steps=3, sample_seed=7, random_seed=1
)
TRAIN = toy_images(12)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A trained run; read only."""
    folder = tmp_path_factory.mktemp("counterfactual") / "run"
    train(folder, TRAIN, MODEL, TRAINING, show_progress=False)
    return folder


@pytest.fixture(scope="module")
def queries(run):
    """One query that the model made, one that it did not."""
    checkpoint = list_checkpoints(run)[-1]
    model, scheduler = load_model(checkpoint), load_scheduler(checkpoint)
    made = sample_images(model, scheduler, ["made"], steps=3, seed=7, show_progress=False)
    pixels = np.concatenate([made, toy_images(1, "query", seed=1).pixels([0])])
    return ImageData.from_arrays(pixels, ["made", "query-0"])


def subject_of(run, with_record=True):
    return Subject(list_checkpoints(run), TRAIN, Record.open(run / "record") if with_record else None, "mse")


def scores_of(queries, method="retrac", seed=3):
    values = np.random.default_rng(seed).normal(size=(len(queries), len(TRAIN)))
    made_of = {"train": {"fingerprint": TRAIN.fingerprint}, "queries": {"fingerprint": queries.fingerprint}}
    return Scores(method, queries.ids, TRAIN.ids, values, details=made_of)


def plan(run, folder, queries, scores=None, **changes):
    with_record = "trainer" not in changes
    settings = replace(SETTINGS, **changes)
    return plan_counterfactual(subject_of(run, with_record), queries, scores or [scores_of(queries)], settings, folder)


@pytest.fixture(scope="module")
def planned(run, queries, tmp_path_factory):
    return plan(run, tmp_path_factory.mktemp("planned"), queries)


@pytest.fixture(scope="module")
def record(planned):
    return run_counterfactual(planned, show_progress=False)


def by_hand(left_out, seed, queries, folder):
    """Train without some rows, measure the loss of the queries, and draw the one that was made."""
    # 2 epochs of 3 batches of 4 over 12 images; 9 images make 3 batches too
    part, settings = TRAIN.select(np.setdiff1d(np.arange(12), left_out)), replace(TRAINING, seed=seed)
    checkpoint = train(folder, part, MODEL, settings, show_progress=False)
    model, scheduler = load_model(checkpoint), load_scheduler(checkpoint)
    process = NoiseProcess.from_scheduler(scheduler)
    grid = make_grid(queries.ids, 3, 2, process.num_timesteps, 0)
    measured = measure_model(model, process, queries, grid, loss="mse", batch_size=16).outputs[0]
    return measured, sample_images(model, scheduler, ["made"], steps=3, seed=7, show_progress=False)[0]


def test_models_are_those_of_plain_trainings_without_the_images(planned, record, queries, tmp_path):
    scores = scores_of(queries)
    tops = [np.argsort(-scores.values[row], kind="stable")[:3] for row in range(2)]
    images = open_images(planned.folder / "images.safetensors")
    for effect, top in zip(record["effects"], tops, strict=True):
        assert effect["top"] == [TRAIN.ids[i] for i in top]
    for place, seed in enumerate((0, 4)):
        left_out = {"all": [], "random": np.flatnonzero(draw_members(TRAIN.ids, 3, 1, seed))}
        found = {}
        for name, rows in [*left_out.items(), ("top 0", tops[0]), ("top 1", tops[1])]:
            found[name] = by_hand(rows, seed, queries, tmp_path / f"{name}-{seed}")
        for row, effect in enumerate(record["effects"]):
            for name in ("all", "random", "top"):
                measured = found[f"top {row}" if name == "top" else name][0][row]
                assert effect["outputs"][name][place] == pytest.approx(measured, rel=1e-6)
        drawn = {"all": found["all"][1], "random": found["random"][1], "top": found["top 0"][1]}
        for name in ("random", "top"):
            far = np.sqrt(((drawn[name] - drawn["all"]).astype(float) ** 2).sum())
            assert record["effects"][0]["pixels"][name][place] == pytest.approx(far, rel=1e-5)
        ids = [image_id("made", name, seed) for name in ("all", "without 3 random", "without 3 by retrac")]
        np.testing.assert_allclose(images.pixels(images.rows(ids)), list(drawn.values()), atol=1e-5)


def test_effects_are_those_worked_out_by_hand(record):
    effect, real = record["effects"]
    whole, random, top = (np.array(effect["outputs"][name]) for name in ("all", "random", "top"))
    assert effect["change_top"]["mean"] == pytest.approx((top - whole).mean())
    assert effect["change_random"]["mean"] == pytest.approx((random - whole).mean())
    difference = effect["top_minus_random"]
    assert difference["mean"] == pytest.approx((top - random).mean())
    assert difference["low"] < difference["mean"] < difference["high"]
    assert effect["seed_floor"] == pytest.approx(abs(whole[0] - whole[1]))
    assert len(effect["pixels"]["seeds"]) == 1 and real["pixels"] is None
    assert any("1 of 2 queries are not what the model samples from seed 7 in 3 steps" in n for n in record["notes"])
    (mean,) = record["summary"]
    assert mean["query"] == "mean of 2" and mean["change_top"]["mean"] == pytest.approx(
        np.mean([e["change_top"]["mean"] for e in record["effects"]])
    )


def test_what_is_written_is_what_is_returned(planned, record):
    assert json.loads((planned.folder / "counterfactual.json").read_text()) == record
    assert "| retrac | made | 3 | without |" in (planned.folder / "counterfactual.md").read_text()


def test_a_verdict_needs_the_interval_to_leave_zero():
    from whence.effects import _changes

    values = np.array([[0.0, 0.01], [0.1, 0.11], [1.0, 1.0]])
    assert _changes(values, 2, "without")["verdict"] == "more than random"
    assert _changes(values, 2, "only")["verdict"] == "less than random"  # a model of these alone is worse
    assert _changes(values[[0, 2, 1]], 2, "without")["verdict"] == "less than random"
    noisy = np.array([[0.0, 1.0], [0.5, 0.1], [1.0, 0.0]])
    assert _changes(noisy, 2, "without")["verdict"] == _changes(noisy, 2, "only")["verdict"] == "undecided"


def test_asked_again_or_for_more_nothing_is_trained_twice(run, planned, record, queries, monkeypatch):
    folder = planned.work.folder.parents[1]
    steps = []
    plain = _Loop.step
    monkeypatch.setattr(_Loop, "step", lambda self: (steps.append(self.folder.name), plain(self))[1])
    assert run_counterfactual(plan(run, folder, queries), show_progress=False) == record
    assert not steps
    other = scores_of(queries, "tracin", seed=5)
    more = run_counterfactual(plan(run, folder, queries, [scores_of(queries), other]), show_progress=False)
    assert len(set(steps)) == 4 and len(steps) == 24  # two queries, two seeds, of the new method alone
    assert [e["outputs"] for e in more["effects"][:2]] == [e["outputs"] for e in record["effects"]]
    steps.clear()
    one = queries.select([1])
    run_counterfactual(plan(run, folder, one, [scores_of(queries)]), show_progress=False)
    # Models of all and of random images were kept for other queries; those of one ranking were not.
    assert len(set(steps)) == 2 and len(steps) == 12


def test_workers_find_the_same(run, record, queries, tmp_path):
    found = run_counterfactual(plan(run, tmp_path, queries, workers=2), show_progress=False)
    assert found["effects"] == record["effects"] and found["summary"] == record["summary"]


def test_images_that_a_query_depends_on_are_told_from_others(tmp_path):
    """Bright and dark images: without all bright ones, models know nothing of a bright query."""
    rng = np.random.default_rng(0)
    bright = np.arange(16) % 2 == 0
    pixels = np.where(bright, 0.8, -0.8)[:, None, None, None] + rng.normal(size=(16, 3, 8, 8)) * 0.05
    images = ImageData.from_arrays(np.clip(pixels, -1, 1).astype(np.float32), [f"i-{k}" for k in range(16)])
    one = ImageData.from_arrays(np.full((1, 3, 8, 8), 0.8, np.float32), ["bright"])
    settings = replace(TRAINING, epochs=40, learning_rate=1e-2, random_flip=False)
    train(tmp_path / "run", images, MODEL, settings, show_progress=False)
    subject = Subject(list_checkpoints(tmp_path / "run"), images, Record.open(tmp_path / "run" / "record"), "mse")
    scores = Scores("oracle", one.ids, images.ids, np.where(bright, 1.0, -1.0)[None])
    made = plan_counterfactual(subject, one, [scores], replace(SETTINGS, top=(8,), timesteps=25), tmp_path)
    (effect,) = run_counterfactual(made, show_progress=False)["effects"]
    assert effect["verdict"] == "more than random", effect


def test_own_trainers_get_the_ids_and_only_keeps_nothing_else(run, queries, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    changes = {"trainer": "own_trainers:save_shifted", "ways": ("without", "only"), "sample_seed": 0}
    one = queries.select([1])
    made = plan(run, tmp_path, one, [scores_of(queries)], **changes)
    found = run_counterfactual(made, show_progress=False)
    for effect in found["effects"]:
        assert (
            effect["change_top"]["low"] is None if effect["way"] == "only" else effect["change_top"]["low"] is not None
        )
        ids = effect["top"] if effect["way"] == "only" else [i for i in TRAIN.ids if i not in effect["top"]]
        for place, seed in enumerate((0, 4)):
            folder = tmp_path / f"own-{effect['way']}-{seed}"
            save_shifted(ids, seed, folder)
            checkpoint = list_checkpoints(folder)[0]
            process = NoiseProcess.from_scheduler(load_scheduler(checkpoint))
            grid = make_grid(one.ids, 3, 2, process.num_timesteps, 0)
            measured = measure_model(load_model(checkpoint), process, one, grid, loss="mse", batch_size=16)
            assert effect["outputs"]["top"][place] == pytest.approx(measured.outputs[0, 0], rel=1e-6)
    cost = made.cost()
    assert cost.minutes is None and cost.finished == cost.models == 10


def test_the_cost_counts_models_and_steps(run, queries, tmp_path):
    cost = plan(run, tmp_path, queries).cost()
    # all, random, and two queries' top, with two seeds; 6 steps each: 12 images or 9, batches of 4, 2 epochs
    assert (cost.models, cost.finished, cost.steps) == (8, 0, 48)
    assert cost.minutes is not None and cost.minutes > 0 and not list(tmp_path.iterdir())


def test_as_many_steps_unless_epochs_are_given(run, queries, tmp_path):
    longer = plan(run, tmp_path, queries, top=(8,))
    assert longer.work.trainer.num_steps(4) == 6 and longer.work.trainer.num_steps(12) == 6
    assert plan(run, tmp_path, queries, top=(8,), same_steps=False).work.trainer.num_steps(4) == 2
    assert plan(run, tmp_path, queries, top=(8,), epochs=3).work.trainer.num_steps(4) == 3


def test_features_of_an_encoder_are_compared(run, planned, record, queries, tmp_path):
    (tmp_path / "encoder.py").write_text("def halves(pixels):\n    return pixels.reshape(len(pixels), -1)[:, :5]\n")
    folder = planned.work.folder.parents[1]
    encoder = f"{tmp_path / 'encoder.py'}:halves"
    found = run_counterfactual(plan(run, folder, queries, encoder=encoder), show_progress=False)
    images = open_images(planned.folder / "images.safetensors")
    rows = images.pixels(images.rows([image_id("made", n, 0) for n in ("all", "without 3 by retrac")]))
    a, b = rows.reshape(2, -1)[:, :5].astype(float)
    cosine = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
    assert found["effects"][0]["features"]["top"][0] == pytest.approx(cosine, rel=1e-5)
    assert "cos top" in found["table"]["columns"] and "cos top" not in record["table"]["columns"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top": (0,)}, "top must be one or more different numbers from 1 to 11, found 0"),
        ({"top": (12,)}, "from 1 to 11, found 12"),
        ({"top": ()}, "found none"),
        ({"seeds": (1,)}, "seeds must be at least two, as their difference is the noise floor"),
        ({"ways": ()}, "ways must be one or more"),
        ({"measure": "beauty"}, "Unknown measure 'beauty'; known are loss, mse"),
        ({"sample_steps": 0}, "sample_steps must be above 0"),
        ({"draws": 3}, "draws must be even"),
        ({"workers": 0}, "workers must be above 0"),
    ],
)
def test_settings_that_cannot_be_met_are_refused(run, queries, tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        run_counterfactual(plan(run, tmp_path, queries, **changes), show_progress=False)
    assert not list(tmp_path.iterdir())


def test_scores_of_other_images_are_refused(run, queries, tmp_path):
    good = scores_of(queries)
    bad_values = good.values.copy()
    bad_values[0, 0] = np.nan
    others = ImageData.from_arrays(queries.pixels([1, 0]), queries.ids)
    cases = [
        (
            [replace(good, train_ids=tuple(f"x-{i}" for i in TRAIN.ids))],
            queries,
            "of other training images than memory",
        ),
        ([replace(good, details={"train": {"fingerprint": "0"}})], queries, "of other training images"),
        ([good], toy_images(1, "stranger"), "lack 1 of 1 queries, such as stranger-0; they have made, query-0"),
        ([good], others, "of other queries under the same ids"),
        ([replace(good, values=bad_values)], queries, "not all finite"),
        ([good, good], queries, "different methods, or from different folders"),
    ]
    for scores, asked, message in cases:
        with pytest.raises(ScoresError, match=message):
            plan(run, tmp_path, asked, scores)
    with pytest.raises(ScoresError, match="scores of at least one method"):
        plan_counterfactual(subject_of(run), queries, [], SETTINGS, tmp_path)


def test_short_rankings_and_queries_that_were_trained_on_are_told(run, tmp_path):
    own = TRAIN.select([2])
    scores = scores_of(own)
    scores = replace(scores, values=np.where(np.arange(12) == 5, 1.0, -1.0)[None])
    notes = plan(run, tmp_path, own, [scores]).notes
    assert any("only 1 images have a positive score, fewer than 3" in note for note in notes)
    assert any("The query train-2 is itself a training image, train-2." in note for note in notes)
