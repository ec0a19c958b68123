"""Scores on disk and in memory: rankings, reliability, round trip, refusal."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from whence.errors import ConfigError, ScoresError
from whence.scores import Scores


def make_scores(**changes):
    rng = np.random.default_rng(0)
    values = rng.normal(size=(2, 5))
    fields = {
        "method": "retrac",
        "query_ids": ("q0", "q1"),
        "train_ids": tuple("abcde"),
        "values": values,
        "phases": np.stack([values / 4, values * 3 / 4], axis=1),
        "phase_timesteps": ((1, 500), (501, 999)),
        "halves": np.stack([values, values + 0.1]),
        "train_norms": np.array([[1.0, 2.0, np.nan, 0.0, 3.0]]),
        "train_timesteps": np.array([[5, 6, -1, 7, 8]]),
        "query_timesteps": np.array([1, 999]),
        "checkpoint_steps": (12,),
        "details": {"notes": ["a note"], "seed": 3},
    }
    return Scores(**(fields | changes))


def bare_scores(values, **changes):
    """Scores with nothing optional."""
    num_query, num_train = values.shape
    ids = [tuple(f"{letter}{k}" for k in range(n)) for letter, n in (("q", num_query), ("t", num_train))]
    return Scores("retrac", *ids, values, **changes)


def test_top_ranks_proponents_and_opponents():
    scores = make_scores(values=np.array([[1.0, -2.0, 5.0, 0.0, -1.0], [0.0, 0.0, 0.0, 1.0, 0.0]]))
    assert [(e.rank, e.train_id, e.score) for e in scores.top(0, 2)] == [(1, "c", 5.0), (2, "a", 1.0)]
    assert [e.train_id for e in scores.top(0, 2, proponents=False)] == ["b", "e"]
    assert [e.train_id for e in scores.top(1, 9)] == ["d", "a", "b", "c", "e"]  # ties go to the lower row
    np.testing.assert_array_equal(scores.top_rows(2), [[2, 0], [3, 0]])


def test_the_content_hash_is_that_of_the_manifest(tmp_path):
    scores = make_scores()
    scores.save(tmp_path / "scores")
    manifest = json.loads((tmp_path / "scores" / "manifest.json").read_text())
    assert scores.content_hash == manifest["manifest_sha256"] == Scores.load(tmp_path / "scores").content_hash
    assert make_scores(method="tracin").content_hash != scores.content_hash
    assert make_scores(values=scores.values + 1).content_hash != scores.content_hash


@pytest.mark.parametrize("k", [0, -1])
def test_a_ranking_has_at_least_one_place(k):
    with pytest.raises(ConfigError, match=f"k must be above 0, found {k}"):
        make_scores().top(0, k)
    with pytest.raises(ConfigError, match=f"k must be above 0, found {k}"):
        make_scores().top_rows(k)


@given(arrays(np.float64, (1, 7), elements=st.floats(-5, 5)))
@settings(deadline=None, max_examples=30)
def test_top_is_in_order_whatever_the_scores(values):
    scores = bare_scores(values)
    ranked = [entry.score for entry in scores.top(0, 7)]
    assert ranked == sorted(values[0].tolist(), reverse=True)
    assert [e.score for e in scores.top(0, 7, proponents=False)] == sorted(values[0].tolist())


def test_reliability_is_the_stepped_up_correlation_of_the_halves():
    rng = np.random.default_rng(1)
    halves = rng.normal(size=(2, 3, 40)) + rng.normal(size=(1, 3, 40))
    halves[:, 2] = 1.0
    found = bare_scores(halves.mean(0), halves=halves).reliability()
    assert found is not None
    for query in range(2):
        r = np.corrcoef(halves[0, query], halves[1, query])[0, 1]
        assert found[query] == pytest.approx(2 * r / (1 + r))
    assert np.isnan(found[2])
    assert make_scores(halves=None).reliability() is None


def test_scores_come_back_as_they_were_written(tmp_path):
    scores = make_scores()
    scores.save(tmp_path / "retrac-1")
    back = Scores.load(tmp_path / "retrac-1")
    for name, value in vars(scores).items():
        if isinstance(value, np.ndarray):
            np.testing.assert_array_equal(getattr(back, name), value)
            assert getattr(back, name).dtype == value.dtype
        elif name != "folder":
            assert getattr(back, name) == value
    assert back.train_weights is None and back.notes == ["a note"] and back.folder == tmp_path / "retrac-1"


def test_a_folder_may_be_given_as_text(tmp_path):
    make_scores().save(str(tmp_path / "x"))
    assert Scores.load(str(tmp_path / "x")).folder == tmp_path / "x"


def test_details_may_hold_numpy_scalars_and_numbers_as_keys(tmp_path):
    make_scores(details={"seed": np.int64(3), "rates": {2: np.float32(1), 10: 0.1}}).save(tmp_path / "x")
    assert Scores.load(tmp_path / "x").details == {"seed": 3, "rates": {"2": 1.0, "10": 0.1}}


def test_the_same_scores_are_the_same_bytes(tmp_path):
    for name in "ab":
        make_scores().save(tmp_path / name)
    for file in ("scores.safetensors", "manifest.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_a_flipped_byte_is_named(tmp_path):
    make_scores().save(tmp_path)
    path = tmp_path / "scores.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(ScoresError, match=r"scores\.safetensors is damaged"):
        Scores.load(tmp_path)


def test_a_missing_file_or_manifest_is_named(tmp_path):
    with pytest.raises(ScoresError, match="no readable scores"):
        Scores.load(tmp_path)
    make_scores().save(tmp_path / "x")
    (tmp_path / "x" / "scores.safetensors").unlink()
    with pytest.raises(ScoresError, match="cannot be read"):
        Scores.load(tmp_path / "x")


def test_a_changed_manifest_is_named(tmp_path):
    make_scores().save(tmp_path)
    path = tmp_path / "manifest.json"
    path.write_text(path.read_text().replace('"q1"', '"q2"'))
    with pytest.raises(ScoresError, match=r"manifest\.json is damaged: its SHA-256 is .*trace again"):
        Scores.load(tmp_path)


@pytest.mark.parametrize("text", ["{}", "[]", "null", '"format_version"', '{"format_version": 1, "method": "x"}'])
def test_a_manifest_of_something_else_is_named(tmp_path, text):
    make_scores().save(tmp_path)
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(
        ScoresError, match=r"manifest\.json is no manifest of scores: .* lacks .*sha256, checkpoint_steps"
    ):
        Scores.load(tmp_path)


def test_a_newer_format_is_refused(tmp_path):
    make_scores().save(tmp_path)
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": 99}))
    with pytest.raises(ScoresError, match="format version 99"):
        Scores.load(tmp_path)
