"""Empirical influence and datamodels: beside loops and normal equations, known answers, signs, refusals."""

import numpy as np
import pytest

from test_lds import EFFECTS, additive_truth
from whence.datamodels import RETRAINING_METHODS, empirical_influence, fit_datamodels, fit_scores
from whence.errors import GroundTruthError
from whence.ground_truth import split_subsets
from whence.lds import evaluate_lds
from whence.methods import DATAMODELS

PENALTIES = DATAMODELS.penalties


def noisy(num_subsets=20, noise=2.0):
    truth = additive_truth(EFFECTS, noise=noise, num_subsets=num_subsets)
    return truth.subsets, truth.output().mean(axis=1)


def plain_ridge(masks, y, penalty):
    """Normal equations in the space of samples, with a column of ones that is not penalised."""
    x = np.column_stack([masks.astype(float), np.ones(len(masks))])
    centred = masks - masks.mean(axis=0)
    scale = penalty * (centred**2).sum() / len(masks)  # trace of the Gram matrix over its size
    weight = np.diag([scale] * masks.shape[1] + [0.0])
    return np.linalg.solve(x.T @ x + weight, x.T @ y)


def test_empirical_influence_is_the_difference_of_means():
    subsets, outputs = noisy()
    found = empirical_influence(subsets, outputs + 1e6)
    for q, i in [(0, 0), (3, 7), (11, 29)]:
        with_ = np.mean([outputs[m, q] for m in range(20) if subsets[m, i]])
        without = np.mean([outputs[m, q] for m in range(20) if not subsets[m, i]])
        assert found[q, i] == pytest.approx(without - with_, abs=1e-8)


def test_a_sample_that_is_always_or_never_there_counts_0(tmp_path):
    subsets = np.array([[1, 0, 1], [1, 0, 0], [1, 0, 1]], dtype=bool)
    found = empirical_influence(subsets, np.array([[1.0], [4.0], [3.0]]))
    np.testing.assert_array_equal(found, [[0.0, 0.0, 2.0]])


@pytest.mark.parametrize("penalty", [1e-3, 1.0, 50.0])
def test_datamodels_solve_the_normal_equations(penalty):
    subsets, outputs = noisy()
    found = fit_datamodels(subsets, outputs, penalties=[penalty])
    for q in range(len(EFFECTS)):
        want = plain_ridge(subsets, outputs[:, q], penalty)
        np.testing.assert_allclose(found.scores[q], -want[:-1], rtol=1e-7, atol=1e-9)


def test_the_penalty_is_the_best_of_a_plain_cross_validation():
    subsets, outputs = noisy(num_subsets=23)
    found = fit_datamodels(subsets, outputs, penalties=PENALTIES, folds=4)
    for q in range(0, len(EFFECTS), 3):
        errors = []
        for penalty in PENALTIES:
            squares = []
            for part in range(4):
                left = np.arange(23) % 4 == part
                model = plain_ridge(subsets[~left], outputs[~left, q], penalty)
                squares += list((subsets[left] @ model[:-1] + model[-1] - outputs[left, q]) ** 2)
            errors.append(np.mean(squares))
        np.testing.assert_allclose(found.errors[:, q], errors, rtol=1e-6)
        assert found.penalties[q] == PENALTIES[int(np.argmin(errors))]


def test_without_noise_and_with_more_subsets_than_samples_the_effects_are_found():
    truth = additive_truth(EFFECTS, num_subsets=80)
    found = fit_datamodels(truth.subsets, truth.output().mean(axis=1), penalties=[1e-12])
    # All subsets are of one size, so that effects are known up to a constant; the least one has mean 0.
    np.testing.assert_allclose(found.scores, EFFECTS - EFFECTS.mean(axis=1, keepdims=True), atol=1e-8)


def test_outputs_that_do_not_differ_have_no_effects():
    subsets, outputs = noisy()
    found = fit_datamodels(subsets, outputs * 0 + 3.0, penalties=PENALTIES)
    np.testing.assert_array_equal(found.scores, 0)
    assert (found.penalties == max(PENALTIES)).all()


def test_both_are_scores_that_predict_other_subsets(tmp_path):
    truth = additive_truth(EFFECTS, noise=1.0, num_subsets=120)
    fit, rest = split_subsets(truth, 80)
    made = fit_scores(fit, tmp_path)
    assert list(made) == ["empirical-influence", "datamodels"] == [m.name for m in RETRAINING_METHODS]
    for scores in made.values():
        (result,) = evaluate_lds(scores, rest, draws=20)
        assert result.lds > 0.6
        with pytest.raises(GroundTruthError, match="fitted on 80 of the 120 subsets"):
            evaluate_lds(scores, truth)
    assert "80 subsets" in made["datamodels"].notes[0] and len(made["datamodels"].details["penalties"]) == 12
    files = {p: p.stat().st_mtime_ns for p in (tmp_path / "scores").rglob("*")}
    assert fit_scores(fit, tmp_path)["datamodels"].folder == made["datamodels"].folder
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "scores").rglob("*")} == files
    assert fit_scores(rest, tmp_path)["datamodels"].folder != made["datamodels"].folder


def test_always_there_is_said(tmp_path):
    truth = additive_truth(EFFECTS).select(subsets=[0, 1, 2])
    made = fit_scores(truth, tmp_path, methods=RETRAINING_METHODS[:1])
    always = int((truth.subsets.all(axis=0) | ~truth.subsets.any(axis=0)).sum())
    assert always and f"{always} training images are in all subsets or in none" in made["empirical-influence"].notes[1]


def test_two_subsets_are_too_few():
    subsets, outputs = noisy()
    with pytest.raises(GroundTruthError, match="needs at least 3; there are 2"):
        fit_datamodels(subsets[:2], outputs[:2], penalties=[1.0])
