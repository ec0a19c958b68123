"""LDS: beside scipy, known answers, intervals, ceilings, and the choice of a damping."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import rankdata, spearmanr

from whence.comparison import lds_table
from whence.data import fingerprint_of
from whence.errors import ConfigError, GroundTruthError, ScoresError
from whence.ground_truth import GroundTruth
from whence.lds import (
    Ceiling,
    choose_damping_on_held_out,
    evaluate_lds,
    linear_datamodeling_score,
    seed_ceiling,
    weighted_spearman,
)
from whence.scores import Scores
from whence.subsets import draw_subsets


def additive_truth(effects, noise=0.0, num_subsets=40, num_seeds=2, num_sets=1, seed=0) -> GroundTruth:
    """Models whose loss falls by the sum of their members' effects, plus noise of training."""
    rng = np.random.default_rng(seed)
    num_queries, num_train = effects.shape
    ids = tuple(f"train-{k}" for k in range(num_train))
    subsets = draw_subsets(ids, num_subsets, 0.5, seed)
    loss = -(subsets @ effects.T)[:, None] + noise * rng.normal(size=(num_subsets, num_seeds, num_queries))
    return GroundTruth(
        subsets=subsets,
        train_ids=ids,
        seeds=tuple(range(num_seeds)),
        query_ids=tuple(f"query-{q}" for q in range(num_queries)),
        query_sets=tuple(("validation", "generated", "third")[q % num_sets] for q in range(num_queries)),
        measures=("loss",),
        outputs=loss[None],
        timesteps=np.zeros((num_queries, 1), dtype=np.int64),
        timestep_loss=loss[..., None].astype(np.float32),
    )


def scores_of(values, truth, method="by hand", **details) -> Scores:
    return Scores(method, truth.query_ids, truth.train_ids, np.asarray(values, dtype=np.float64), details=details)


def known(ceiling: Ceiling | None) -> Ceiling:
    assert ceiling is not None
    return ceiling


EFFECTS = np.random.default_rng(5).normal(size=(12, 30))


def test_it_is_the_rank_correlation_of_scipy_by_hand():
    rng = np.random.default_rng(1)
    truth = additive_truth(EFFECTS, noise=3.0, num_subsets=25, num_seeds=3)
    values = EFFECTS + rng.normal(size=EFFECTS.shape)
    (result,) = evaluate_lds(scores_of(values, truth), truth, draws=10)
    for q, id_ in enumerate(truth.query_ids):
        predicted = [sum(values[q, i] for i in np.flatnonzero(members)) for members in truth.subsets]
        measured = [-np.mean([truth.outputs[0, m, s, q] for s in range(3)]) for m in range(25)]
        assert result.per_query[id_] == pytest.approx(spearmanr(predicted, measured).statistic, abs=1e-12)
    assert result.lds == pytest.approx(np.mean(list(result.per_query.values())), abs=1e-14)


def test_ties_have_mid_ranks_as_in_scipy():
    rng = np.random.default_rng(2)
    left, right = rng.integers(0, 4, (6, 15)).astype(float), rng.integers(0, 3, (6, 15)).astype(float)
    found = weighted_spearman(left, right, np.ones((15, 1)))[:, 0]
    np.testing.assert_allclose(found, [spearmanr(x, y).statistic for x, y in zip(left, right, strict=True)], atol=1e-12)


def test_weights_are_repeated_columns():
    """A resample by weights is the rank correlation of the resampled columns themselves."""
    rng = np.random.default_rng(3)
    left, right = rng.normal(size=(4, 9)), rng.normal(size=(4, 9))
    weights = rng.multinomial(9, np.full(9, 1 / 9), size=20).T.astype(float)
    found = weighted_spearman(left, right, weights)
    for q, draw in itertools.product(range(4), range(20)):
        drawn = np.repeat(np.arange(9), weights[:, draw].astype(int))
        ranks = [rankdata(side[q, drawn]) for side in (left, right)]
        assert found[q, draw] == pytest.approx(np.corrcoef(*ranks)[0, 1], abs=1e-12)


def test_blocks_of_queries_change_nothing(monkeypatch):
    rng = np.random.default_rng(4)
    left, right, weights = rng.normal(size=(7, 5)), rng.normal(size=(7, 5)), np.ones((5, 3))
    whole = weighted_spearman(left, right, weights)
    monkeypatch.setattr("whence.lds._BLOCK_NUMBERS", 60)
    np.testing.assert_array_equal(weighted_spearman(left, right, weights), whole)


def test_perfect_scores_have_1_and_their_negative_minus_1():
    truth = additive_truth(EFFECTS)
    for sign in (1, -1):
        (result,) = evaluate_lds(scores_of(sign * EFFECTS, truth), truth, draws=20)
        assert (result.lds, result.low, result.high) == (sign, pytest.approx(sign), pytest.approx(sign))
        assert known(result.ceiling).ceiling == pytest.approx(1)


def test_sums_over_what_was_left_out_say_the_same():
    truth = additive_truth(EFFECTS, noise=2.0)
    left_out = linear_datamodeling_score(-EFFECTS, ~truth.subsets, -truth.output().mean(axis=1))
    kept = linear_datamodeling_score(EFFECTS, truth.subsets, -truth.output().mean(axis=1))
    np.testing.assert_allclose(left_out, kept, atol=1e-12)


def test_random_scores_have_0_within_their_interval():
    """The interval is conservative: 95 % hold 0 at least, here in all but at most 2 of 20 experiments."""
    held = []
    for seed in range(20):
        truth = additive_truth(EFFECTS, noise=4.0, seed=seed)
        values = np.random.default_rng(100 + seed).normal(size=EFFECTS.shape)
        (result,) = evaluate_lds(scores_of(values, truth), truth, draws=200)
        held.append(result.low < 0 < result.high)
        assert abs(result.lds) < 0.25 and result.low < result.lds < result.high
    assert sum(held) >= 18


@pytest.mark.parametrize("num_seeds", [2, 3, 4])
def test_true_effects_reach_the_ceiling_and_half_of_the_seeds_agree_less(num_seeds):
    effects = np.random.default_rng(6).normal(size=(60, 40))
    truth = additive_truth(effects, noise=4.0, num_subsets=200, num_seeds=num_seeds)
    (result,) = evaluate_lds(scores_of(effects, truth), truth, draws=200)
    # Signal: variance of a sum over half of 40 standard normal effects, about 10; noise 16 over the seeds.
    reliability = 10.0 / (10.0 + 16 / num_seeds)
    assert known(result.ceiling).reliability == pytest.approx(reliability, abs=0.04)
    assert known(result.ceiling).ceiling == pytest.approx(math.sqrt(reliability), abs=0.03)
    assert result.lds == pytest.approx(
        known(result.ceiling).ceiling, abs=0.02
    )  # ranks: 1 or 2 % below linear correlation
    assert known(result.ceiling).half < known(result.ceiling).reliability < known(result.ceiling).ceiling


def test_the_ceiling_by_hand():
    outputs = np.random.default_rng(7).normal(size=(9, 3, 2))
    pairs = [(0, 1), (0, 2), (1, 2)]  # one of three seeds is left out in turn
    r = np.mean([spearmanr(outputs[:, a, q], outputs[:, b, q]).statistic for a, b in pairs for q in range(2)])
    found = known(seed_ceiling(outputs))
    assert found.half == pytest.approx(r, abs=1e-12)
    assert found.reliability == pytest.approx(3 * r / (1 + 2 * r), abs=1e-12)
    assert found.ceiling == pytest.approx(math.sqrt(max(found.reliability, 0)), abs=1e-12)
    assert seed_ceiling(outputs[:, :1]) is None
    ramp = np.arange(5.0)
    assert known(seed_ceiling(np.stack([ramp, -ramp], axis=1)[..., None])).ceiling == 0.0


def test_sets_of_queries_are_kept_apart():
    truth = additive_truth(EFFECTS, num_sets=2)
    values = EFFECTS.copy()
    values[1::2] *= -1
    first, second = evaluate_lds(scores_of(values, truth), truth, draws=10)
    assert (first.query_set, first.lds) == ("validation", 1.0)
    assert (second.query_set, second.lds) == ("generated", -1.0)
    assert list(second.per_query) == list(truth.query_ids[1::2])


def test_queries_without_an_lds_are_counted_and_named():
    truth = additive_truth(EFFECTS)
    values = EFFECTS.copy()
    values[2] = 1.0  # all sums are equal
    values[5, 3] = np.nan
    (result,) = evaluate_lds(scores_of(values, truth), truth, draws=10)
    assert result.undefined == ("query-2", "query-5") and result.lds == 1.0
    table = lds_table([result])
    assert dict(zip(table["columns"], table["rows"][0], strict=True))["NaN"] == 2
    assert "no LDS for query-2, query-5" in table["notes"][0]
    (none,) = evaluate_lds(scores_of(values * 0, truth), truth, draws=10)
    assert math.isnan(none.lds) and len(none.undefined) == 12
    assert lds_table([none])["rows"][0][3:6] == [None, None, None]


def test_ids_are_matched_and_what_is_not_scored_is_told():
    truth = additive_truth(EFFECTS)
    columns, rows = np.random.default_rng(8).permutation(30), [4, 0, 7]
    shuffled = Scores(
        "shuffled",
        tuple(truth.query_ids[q] for q in rows) + ("another",),
        tuple(truth.train_ids[i] for i in columns),
        np.vstack([EFFECTS[np.ix_(rows, columns)], np.zeros((1, 30))]),
    )
    (result,) = evaluate_lds(shuffled, truth, draws=10)
    assert result.per_query == {"query-0": 1.0, "query-4": 1.0, "query-7": 1.0}
    assert len(result.unscored) == 9 and result.unscored[0] == "query-1"
    with pytest.raises(ScoresError, match="lack 1, for example train-29, and have 0 more"):
        evaluate_lds(Scores("few", truth.query_ids, truth.train_ids[:-1], EFFECTS[:, :-1]), truth)
    with pytest.raises(ScoresError, match="none of the 12 queries of the ground truth, such as query-0"):
        evaluate_lds(Scores("other", ("another",), truth.train_ids, EFFECTS[:1]), truth)


def test_other_images_under_the_same_ids_are_refused():
    truth = additive_truth(EFFECTS)
    truth = replace(
        truth,
        query_hashes=tuple(f"hash-{q}" for q in range(12)),
        details={"training": {"train": {"fingerprint": "of the training images"}}},
    )
    mine = {"fingerprint": fingerprint_of(truth.query_ids, truth.query_hashes)}
    right = scores_of(EFFECTS, truth, queries=mine, train={"fingerprint": "of the training images"})
    assert evaluate_lds(right, truth, draws=5)
    for side, what in [("queries", "queries"), ("train", "training images")]:
        wrong = replace(right, details=right.details | {side: {"fingerprint": "another"}})
        with pytest.raises(ScoresError, match=f"are of other {what} than the ground truth, under the same ids"):
            evaluate_lds(wrong, truth, draws=5)
    # What cannot be told is let pass: a query that is not in the ground truth, another order of training images.
    more = replace(wrong, query_ids=(*truth.query_ids[:-1], "other"), train_ids=truth.train_ids[::-1])
    assert evaluate_lds(more, truth, draws=5)


def test_scores_fitted_on_the_same_subsets_are_refused():
    truth = additive_truth(EFFECTS)
    fitted = scores_of(EFFECTS, truth, method="datamodels", fitted_subsets=truth.subset_hashes[:3])
    with pytest.raises(GroundTruthError, match="datamodels was fitted on 3 of the 40 subsets"):
        evaluate_lds(fitted, truth)
    assert evaluate_lds(fitted, truth.select(subsets=range(3, 40)), draws=10)


@pytest.mark.parametrize(("changes", "message"), [({"draws": 0}, "draws must be above 0"), ({"level": 1.0}, "level")])
def test_an_interval_that_cannot_be_is_refused(changes, message):
    truth = additive_truth(EFFECTS)
    with pytest.raises(ConfigError, match=message):
        evaluate_lds(scores_of(EFFECTS, truth), truth, **changes)


def test_two_subsets_are_too_few():
    truth = additive_truth(EFFECTS).select(subsets=[0, 1])
    with pytest.raises(GroundTruthError, match="at least 3 subsets; there are 2"):
        evaluate_lds(scores_of(EFFECTS, truth), truth)


TRUTH = additive_truth(EFFECTS, noise=1.0, num_sets=2)
BY_DAMPING = {
    d: scores_of(EFFECTS + spread * np.random.default_rng(9).normal(size=EFFECTS.shape), TRUTH)
    for d, spread in [(0.1, 3.0), (1.0, 0.5), (10.0, 6.0)]
}


class TestDamping:
    def test_it_is_chosen_on_some_queries_and_reported_on_the_others(self):
        choice = choose_damping_on_held_out(BY_DAMPING, TRUTH, held_out=0.3, draws=20)
        assert choice.damping == 1.0 == max(choice.curve, key=choice.curve.get)
        assert len(choice.chosen_on) == 4 and {r.query_set for r in choice.reported} == {"validation", "generated"}
        reported = {id_ for result in choice.reported for id_ in result.per_query}
        assert reported | set(choice.chosen_on) == set(TRUTH.query_ids)
        assert not reported & set(choice.chosen_on)
        held = np.array([q in choice.chosen_on for q in TRUTH.query_ids])
        outputs = -TRUTH.output().mean(axis=1)[:, held]
        by_hand = linear_datamodeling_score(BY_DAMPING[0.1].values[held], TRUTH.subsets, outputs).mean()
        assert choice.curve[0.1] == pytest.approx(by_hand, abs=1e-12)

    def test_the_reported_queries_have_no_say(self):
        choice = choose_damping_on_held_out(BY_DAMPING, TRUTH, held_out=0.3, draws=5)
        spoilt = {d: s for d, s in BY_DAMPING.items()}
        held = np.array([q in choice.chosen_on for q in TRUTH.query_ids])
        values = np.where(held[:, None], BY_DAMPING[1.0].values, -EFFECTS)
        spoilt[1.0] = scores_of(values, TRUTH)
        again = choose_damping_on_held_out(spoilt, TRUTH, held_out=0.3, draws=5)
        assert again.damping == 1.0 and again.reported[0].lds < 0

    @pytest.mark.parametrize("held_out", [0.0, 1.0, 0.95])
    def test_both_parts_need_queries(self, held_out):
        with pytest.raises(ConfigError, match="held_out must leave queries on both sides"):
            choose_damping_on_held_out(BY_DAMPING, TRUTH, held_out=held_out)

    def test_nothing_to_choose_from_is_refused(self):
        with pytest.raises(ConfigError, match="at least one damping"):
            choose_damping_on_held_out({}, TRUTH)
        constant = {1.0: scores_of(EFFECTS * 0, TRUTH)}
        with pytest.raises(GroundTruthError, match="No damping has an LDS"):
            choose_damping_on_held_out(constant, TRUTH)
