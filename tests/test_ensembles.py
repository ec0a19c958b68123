"""Ensembles: means of the scores of several models, on hand-made scores and from checkpoints to a page of rankings."""

import inspect
from dataclasses import replace

import numpy as np
import pytest

from conftest import TOY_MODEL, TOY_TRAINING
from whence.attribution import trace
from whence.checkpoints import list_checkpoints
from whence.config import IndexSettings, QuerySettings, TraceSettings
from whence.ensembles import ensemble
from whence.errors import ConfigError, ScoresError
from whence.indexing import index
from whence.methods import GRAD_COS, RETRAC, TRAK
from whence.querying import query
from whence.record import Record
from whence.scores import Scores, TopScores
from whence.subject import Subject
from whence.training import train


def member(seed, train_ids="abcde", **changes):
    """Scores of two queries with all that scores may have."""
    rng = np.random.default_rng(seed)
    shape = (2, len(train_ids))
    phases = rng.normal(size=(2, 2, len(train_ids)))
    fields = {
        "method": "retrac",
        "query_ids": ("q0", "q1"),
        "train_ids": tuple(train_ids),
        "values": phases.sum(1),
        "phases": phases,
        "phase_timesteps": ((1, 500), (501, 999)),
        "halves": rng.normal(size=(2, *shape)) + phases.sum(1),
        "train_norms": rng.uniform(1, 2, (1, len(train_ids))),
        "train_timesteps": rng.integers(0, 999, (1, len(train_ids))),
        "train_weights": np.ones((1, len(train_ids))),
        "query_norms": rng.uniform(1, 2, (1, 2, 3)),
        "query_timesteps": np.array([1, 500, 999]),
        "checkpoint_steps": (10 * seed + 10,),
        "details": {
            "loss": "mse",
            "seed": seed,
            "queries": {"fingerprint": "f"},
            "train": {"fingerprint": "".join(train_ids)},
            "notes": ["of all", f"of {seed}"],
        },
    }
    return Scores(**(fields | changes))


def test_everything_is_averaged():
    members = [member(0), member(1), member(2)]
    found = ensemble(members)
    for name in ("values", "phases", "halves"):
        np.testing.assert_allclose(getattr(found, name), np.mean([getattr(m, name) for m in members], axis=0))
    assert found.phases is not None
    np.testing.assert_allclose(found.phases.sum(1), found.values)
    for name in ("train_norms", "train_timesteps", "train_weights", "query_norms"):
        np.testing.assert_array_equal(getattr(found, name), np.concatenate([getattr(m, name) for m in members]))
    assert found.checkpoint_steps == (10, 20, 30)
    assert found.phase_timesteps == members[0].phase_timesteps


def test_reliability_is_that_of_the_mean():
    members = [member(0), member(1)]
    first, second = np.mean([m.halves for m in members], axis=0)
    r = [np.corrcoef(a, b)[0, 1] for a, b in zip(first, second, strict=True)]
    np.testing.assert_allclose(ensemble(members).reliability(), [2 * x / (1 + x) for x in r])


def test_members_are_brought_to_one_size_where_asked():
    small = member(0)
    large = member(1, **{name: 1e3 * getattr(member(1), name) for name in ("values", "phases", "halves")})
    found = ensemble([small, large], scale="unit_mean_square")
    sizes = [np.sqrt((m.values**2).mean(1, keepdims=True)) for m in (small, large)]
    want = (small.values / sizes[0] + large.values / sizes[1]) / 2
    np.testing.assert_allclose(found.values, want)
    assert found.phases is not None
    np.testing.assert_allclose(found.phases.sum(1), want)
    halves = [m.halves / np.sqrt((m.halves**2).mean(-1, keepdims=True)) for m in (small, large)]
    np.testing.assert_allclose(found.halves, np.mean(halves, axis=0))
    assert found.details["ensemble"]["scale"] == "unit_mean_square"
    assert "mean square of 1" in found.notes[0]


def test_scores_of_zero_stay_zero():
    nothing = member(0, values=np.zeros((2, 5)), phases=np.zeros((2, 2, 5)), halves=np.zeros((2, 2, 5)))
    found = ensemble([nothing, member(1)], scale="unit_mean_square")
    assert np.isfinite(found.values).all()
    np.testing.assert_allclose((found.values**2).mean(1), 0.25)


def test_images_are_matched_by_id():
    ordered, turned = member(0), member(1, "edcba")
    found = ensemble([ordered, turned])
    np.testing.assert_allclose(found.values, (ordered.values + turned.values[:, ::-1]) / 2)
    np.testing.assert_array_equal(found.train_norms[1], turned.train_norms[0, ::-1])
    assert "Training images of members are matched by their ids alone." in found.notes
    assert "train" not in found.details


def test_models_of_subsets_are_averaged_where_they_hold_an_image():
    one, other = member(0, "abc"), member(1, "bcd")
    with pytest.raises(ScoresError, match=r"Member 2 and Member 1 differ in 2 training images, such as a\..*'held'"):
        ensemble([one, other])
    found = ensemble([one, other], images="held")
    assert found.train_ids == tuple("abcd")
    want = np.stack(
        [
            one.values[:, 0],
            (one.values[:, 1] + other.values[:, 0]) / 2,
            (one.values[:, 2] + other.values[:, 1]) / 2,
            other.values[:, 2],
        ],
        axis=1,
    )
    np.testing.assert_allclose(found.values, want)
    assert np.isnan(found.train_norms[0, 3]) and np.isnan(found.train_norms[1, 0])
    assert found.train_timesteps[0, 3] == -1 and found.train_weights[1, 0] == 0


def test_what_not_all_members_have_is_left_out():
    for members in ([member(0), member(1, halves=None)], [member(0, halves=None), member(1)]):
        found = ensemble(members)
        assert found.halves is None and found.phases is not None
    found = ensemble([member(0, train_norms=None), member(1)])
    assert found.train_norms is None and found.train_weights is not None


def test_notes_and_provenance_are_kept(tmp_path):
    members = [member(0), member(1)]
    for number, one in enumerate(members):
        one.save(tmp_path / str(number))
    found = ensemble([tmp_path / "0", tmp_path / "1"])
    assert found.notes == ["Scores are the mean of 2 members.", "of all", "Of member 1: of 0", "Of member 2: of 1"]
    hashes = [entry["sha256"] for entry in found.details["ensemble"]["members"]]
    assert hashes == [m.content_hash for m in members]
    assert [entry["seed"] for entry in found.details["ensemble"]["members"]] == [0, 1]
    found.save(tmp_path / "mean")
    loaded = Scores.load(tmp_path / "mean")
    np.testing.assert_array_equal(loaded.values, found.values)
    assert loaded.details["ensemble"]["members"][0]["sha256"] == hashes[0]


def test_an_ensemble_of_ensembles_names_its_members():
    pairs = [ensemble([member(0), member(1)]), ensemble([member(2), member(3)])]
    found = ensemble(pairs)
    np.testing.assert_allclose(found.values, np.mean([member(k).values for k in range(4)], axis=0))
    assert found.details["ensemble"]["members"][1]["ensemble"]["members"][0]["sha256"] == member(2).content_hash


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (member(0), "Member 2 is the same as Member 1. Give each model once"),
        (member(1, method="tracin"), "Member 2 is of tracin, Member 1 of retrac"),
        (member(1, query_ids=("q1", "q0")), "has other queries than Member 1, or in another order"),
        (member(1, details={"loss": "l1"}), r"otherwise than Member 1 \(loss: l1, not mse; queries: None, not"),
        (member(1, query_timesteps=np.array([1, 2, 3])), "otherwise than Member 1"),
        (
            member(1, details=member(0).details | {"train": {"fingerprint": "others"}}),
            "training images of the same ids with other pixels",
        ),
        (TopScores("retrac", ("q0", "q1"), ((), ())), "largest scores of each query only, and a mean needs all"),
    ],
)
def test_members_that_do_not_belong_together_are_refused(other, message):
    with pytest.raises(ScoresError, match=message):
        ensemble([member(0), other])


def test_wrong_choices_are_refused(tmp_path):
    with pytest.raises(ScoresError, match="at least two members, found 1"):
        ensemble([member(0)])
    untyped = inspect.unwrap(ensemble)  # the tests' type checks would refuse them first
    with pytest.raises(ConfigError, match="Unknown scale 'rank'; known are none, unit_mean_square"):
        untyped([member(0), member(1)], scale="rank")
    with pytest.raises(ConfigError, match="Unknown images 'all'; known are same, held"):
        untyped([member(0), member(1)], images="all")
    top = TopScores("retrac", ("q0",), ((),)).save(tmp_path / "top")
    with pytest.raises(ScoresError, match="a mean needs all of them. Query again without top"):
        ensemble([member(0), top.folder])


def test_models_trained_apart_make_an_ensemble(toy_run, toy_train, toy_queries, tmp_path):
    """Two seeds, and a model of half of the images that scores all of them on a grid."""
    train(tmp_path / "other", toy_train, TOY_MODEL, replace(TOY_TRAINING, seed=1), show_progress=False)
    train(tmp_path / "half", toy_train.select(range(5)), TOY_MODEL, TOY_TRAINING, show_progress=False)
    subjects = [
        Subject(list_checkpoints(toy_run), toy_train, Record.open(toy_run / "record"), "mse"),
        Subject(list_checkpoints(tmp_path / "other"), toy_train, Record.open(tmp_path / "other" / "record"), "mse"),
        Subject(list_checkpoints(tmp_path / "half"), toy_train, None, "mse"),
    ]
    settings = TraceSettings(timesteps=2, draws=2, phases=1, train_timesteps=2, batch_size=8)
    indexed = IndexSettings(grid=True, train_timesteps=2, width=64, checkpoints="last", batch_size=8)
    asked = QuerySettings(timesteps=2, draws=2, phases=1, batch_size=8)
    traced, stored = [], []
    for number, subject in enumerate(subjects):
        folder = tmp_path / f"scores-{number}"
        traced.append(trace(subject, toy_queries, [GRAD_COS], settings, folder, show_progress=False)["grad-cos"])
        store = index(subject, indexed, folder, show_progress=False)
        stored.append(query(subject, store, toy_queries, [TRAK], asked, folder, show_progress=False)["trak"])
    for members in (traced, stored):
        found = ensemble([m.folder for m in members])
        np.testing.assert_allclose(found.values, np.mean([m.values for m in members], axis=0), rtol=1e-5)
        assert found.details["train"]["num_images"] == 10
        assert len({c["sha256"] for m in found.details["ensemble"]["members"] for c in m["checkpoints"]}) == 3
    assert "preconditioners" in ensemble(stored).details["ensemble"]["members"][0]


def test_models_that_followed_subsets_are_averaged_where_they_hold_an_image(toy_run, toy_train, toy_queries, tmp_path):
    half = toy_train.select(range(5))
    train(tmp_path / "half", half, TOY_MODEL, TOY_TRAINING, show_progress=False)
    settings = TraceSettings(timesteps=2, draws=2, phases=1, batch_size=8)
    members = [
        trace(
            Subject(list_checkpoints(run), images, Record.open(run / "record"), "mse"),
            toy_queries,
            [RETRAC],
            settings,
            tmp_path / f"scores-{number}",
            show_progress=False,
        )["retrac"]
        for number, (run, images) in enumerate([(toy_run, toy_train), (tmp_path / "half", half)])
    ]
    with pytest.raises(ScoresError, match="differ in 5 training images"):
        ensemble(members)
    found = ensemble(members, images="held")
    np.testing.assert_allclose(found.values[:, 5:], members[0].values[:, 5:])
    np.testing.assert_allclose(found.values[:, :5], (members[0].values[:, :5] + members[1].values) / 2, rtol=1e-5)
