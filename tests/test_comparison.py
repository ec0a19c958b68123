"""All scores of a run beside one ground truth: names, notes, files."""

import json
from dataclasses import replace

import numpy as np
import pytest

from test_lds import EFFECTS, additive_truth, scores_of
from whence.comparison import compare, markdown_table
from whence.config import EvaluationSettings
from whence.errors import GroundTruthError, ScoresError

QUICK = EvaluationSettings(draws=10)


@pytest.fixture
def truth():
    return additive_truth(EFFECTS, noise=1.0, num_subsets=30, num_sets=2)


def test_two_of_one_method_are_told_apart_by_their_folders(truth, tmp_path):
    for name, sign in [("trak-1", 1), ("trak-2", -1)]:
        scores_of(sign * EFFECTS, truth, method="trak").save(tmp_path / "scores" / name)
    scores_of(EFFECTS, truth, method="retrac").save(tmp_path / "scores" / "retrac-1")
    results, table = compare(truth, tmp_path, settings=QUICK)
    assert [r.method for r in results] == ["retrac", "retrac", "trak-1", "trak-1", "trak-2", "trak-2"]
    assert results[2].lds == -results[4].lds > 0
    assert json.loads((tmp_path / "evaluation" / "lds.json").read_text())["results"][4]["lds"] == results[4].lds
    assert (tmp_path / "evaluation" / "lds.md").read_text() == markdown_table(table)


def test_given_scores_must_fit_and_found_ones_are_left_out_with_a_note(truth, tmp_path):
    other = replace(scores_of(EFFECTS, truth), train_ids=tuple(f"x{k}" for k in range(30)), method="other")
    other.save(tmp_path / "scores" / "other-1")
    with pytest.raises(ScoresError, match="no scores to compare .* other-1 is left out: .* lack 30"):
        compare(truth, tmp_path, settings=QUICK)
    scores_of(EFFECTS, truth, method="good").save(tmp_path / "scores" / "good-1")
    results, table = compare(truth, tmp_path, settings=QUICK)
    assert {r.method for r in results} == {"good"} and "other-1 is left out" in table["notes"][0]
    with pytest.raises(ScoresError, match="lack 30"):
        compare(truth, tmp_path, [other], QUICK)
    with pytest.raises(GroundTruthError, match="no measure 'elbo'"):
        compare(truth, tmp_path, settings=replace(QUICK, measure="elbo"))


def test_fitted_methods_are_evaluated_on_the_other_subsets(truth, tmp_path):
    scores_of(EFFECTS, truth, method="good").save(tmp_path / "scores" / "good-1")
    results, _ = compare(truth, tmp_path, settings=replace(QUICK, fit_subsets=20))
    assert {r.method for r in results} == {"empirical-influence", "datamodels", "good"}
    record = json.loads((tmp_path / "evaluation" / "lds.json").read_text())
    assert record["subsets"] == list(truth.subset_hashes[20:]) and record["fit_subsets"] == 20
    again, _ = compare(truth, tmp_path, settings=replace(QUICK, fit_subsets=20))
    np.testing.assert_array_equal([r.lds for r in again], [r.lds for r in results])


def test_a_table_in_markdown():
    table = {"columns": ["method", "LDS"], "rows": [["a|b", 0.12345], ["c", None]], "notes": ["mind"]}
    assert markdown_table(table) == "| method | LDS |\n| --- | --- |\n| a\\|b | 0.1235 |\n| c | - |\n\n- mind\n"
