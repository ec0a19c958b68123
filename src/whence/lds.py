r"""The linear datamodeling score (LDS): how well scores predict what retraining on subsets does.

For each query, the sum of scores over a subset's members is compared, by rank over subsets, with minus the output of
the models that were trained on it (Park et al. 2023, arXiv:2303.14186); outputs are means over seeds. Sums over the
images that were *left out* give the same, as both sums add up to a constant.

**Interval.** Queries and subsets are both drawn anew, with replacement, and the percentiles of the resampled LDS are
its ends. A subset that is drawn twice stands beside itself in both rankings; ranks are mid-ranks, so a resample is the
rank correlation of the weighted subsets, and its ties say neither for nor against the scores. The point estimate is
that of the subsets as they are, not the mean of resamples.

**Ceiling.** No score can predict the noise of training. The seeds are cut into halves in all ways; the mean rank
correlation r of both halves' mean outputs, stepped up from half to all seeds by Spearman and Brown, is the reliability
R of the outputs; the true means would reach sqrt(R), by the correction for attenuation. Both formulas are those of
linear correlation and hold approximately for ranks.
"""

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Float64, Int
from numpy import ndarray

from whence.data import fingerprint_of
from whence.diffusion.noise import noise_key
from whence.errors import ConfigError, GroundTruthError, ScoresError
from whence.ground_truth import GroundTruth
from whence.scores import Scores

_BLOCK_NUMBERS = 2**22
"""Numbers in one block of ranks, by query, subset and draw: 32 MiB."""


def linear_datamodeling_score(
    scores: Float[ndarray, "query train"],
    subsets: Bool[ndarray, "subset train"],
    outputs: Float[ndarray, "subset query"],
) -> Float64[ndarray, " query"]:
    """Rank-correlate predicted with measured outputs of retrained models.

    Args:
        scores: Influence of each training sample; positive lowers the measure.
        subsets: True where the sample was in the retraining set.
        outputs: Minus the measure after retraining.

    Returns:
        Spearman correlation in [-1, 1], one per query; NaN where a query's outputs or predictions are all equal, or not
        finite.

    Example:
        >>> scores = np.array([[1.0, 2.0, 0.0]])
        >>> subsets = np.array([[1, 0, 0], [0, 1, 0], [1, 1, 0]], dtype=bool)
        >>> linear_datamodeling_score(scores, subsets, outputs=np.array([[0.1], [0.2], [0.4]]))
        array([1.])
    """
    predictions = scores.astype(np.float64) @ subsets.T
    return weighted_spearman(predictions, outputs.T.astype(np.float64), np.ones((len(subsets), 1)))[:, 0]


def weighted_spearman(
    left: Float64[ndarray, "query subset"],
    right: Float64[ndarray, "query subset"],
    weights: Float64[ndarray, "subset draw"],
) -> Float64[ndarray, "query draw"]:
    """Rank-correlate rows of two matrices, the columns being counted as often as the weights say.

    Args:
        left: One row per query.
        right: Likewise.
        weights: How often each column counts, in each draw of a bootstrap.

    Returns:
        The correlation of mid-ranks; NaN where one side is constant, or not finite anywhere.
    """
    out = np.empty((len(left), weights.shape[1]))
    step = max(1, _BLOCK_NUMBERS // max(left.shape[1] * max(left.shape[1], weights.shape[1]), 1))
    for start in range(0, len(left), step):
        block = slice(start, start + step)
        x, y = (_centred_ranks(values[block], weights) for values in (left, right))
        with np.errstate(invalid="ignore", divide="ignore"):
            covariance = (weights * x * y).sum(axis=1)
            out[block] = covariance / np.sqrt((weights * x * x).sum(axis=1) * (weights * y * y).sum(axis=1))
    finite = np.isfinite(left).all(axis=1) & np.isfinite(right).all(axis=1)
    out[~finite] = np.nan
    return np.clip(out, -1, 1)


def _centred_ranks(
    values: Float64[ndarray, "query subset"], weights: Float64[ndarray, "subset draw"]
) -> Float64[ndarray, "query subset draw"]:
    """Mid-ranks of the columns, less their mean: the weight of what is smaller, and half of what is equal."""
    below = (values[:, None, :] < values[:, :, None]).astype(np.float64)
    below += 0.5 * (values[:, None, :] == values[:, :, None])
    return below @ weights - weights.sum(axis=0) / 2


@dataclass(frozen=True)
class Ceiling:
    """How far any score could come, from the spread over seeds."""

    half: float
    """Rank correlation between the means of two halves of the seeds."""
    reliability: float
    """Of the mean over all seeds, by Spearman and Brown."""
    ceiling: float
    """LDS that the true means would reach: the root of the reliability; 0 where that is not above 0."""


def seed_ceiling(outputs: Float64[ndarray, "subset seed query"]) -> Ceiling | None:
    """Estimate the ceiling of the LDS from the outputs of several seeds.

    Halves have as many seeds as go twice into all; of an odd number, each is left out in turn.

    Args:
        outputs: Measured outputs.

    Returns:
        The ceiling, mean over queries; None where there is one seed only.
    """
    num_subsets, num_seeds, _ = outputs.shape
    size = num_seeds // 2
    if size == 0:
        return None
    ones = np.ones((num_subsets, 1))
    halves = [
        weighted_spearman(outputs[:, first].mean(axis=1).T, outputs[:, second].mean(axis=1).T, ones)
        for first, second in _halves(num_seeds, size)
    ]
    found = np.concatenate(halves)
    half = float(np.nanmean(found)) if np.isfinite(found).any() else math.nan
    times = num_seeds / size
    below = 1 + (times - 1) * half
    reliability = times * half / below if below > 0 else -math.inf
    return Ceiling(half, reliability, math.nan if math.isnan(half) else math.sqrt(max(reliability, 0.0)))


def _halves(num_seeds: int, size: int) -> Iterator[tuple[list[int], list[int]]]:
    """Give every pair of disjoint halves once."""
    for first in itertools.combinations(range(num_seeds), size):
        rest = [seed for seed in range(num_seeds) if seed not in first]
        for second in itertools.combinations(rest, size):
            if first < second:
                yield list(first), list(second)


@dataclass(frozen=True)
class LdsResult:
    """The LDS of one method on one set of queries."""

    method: str
    query_set: str
    measure: str
    lds: float
    """Mean over queries that have one."""
    low: float
    """Lower end of the interval."""
    high: float
    """Upper end."""
    ceiling: Ceiling | None
    """Of the same queries; None with one seed."""
    per_query: dict[str, float]
    """LDS of each query, by id; NaN where it has none."""
    unscored: tuple[str, ...]
    """Queries of the set that the method has not scored: they are not part of the mean."""

    @property
    def undefined(self) -> tuple[str, ...]:
        """Queries whose LDS is NaN: they are not part of the mean."""
        return tuple(id_ for id_, value in self.per_query.items() if math.isnan(value))


def evaluate_lds(
    scores: Scores,
    ground_truth: GroundTruth,
    *,
    measure: str = "loss",
    draws: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> list[LdsResult]:
    """Compare the scores of a method with retrained models, each set of queries apart.

    Args:
        scores: The method's scores; positive lowers the measure. Queries and training images are matched by id.
        ground_truth: Retrained models.
        measure: Which of their outputs.
        draws: Resamples of queries and subsets.
        level: Of the interval.
        seed: Seed of the resamples.

    Returns:
        One result for each set of queries of which some are scored.

    Raises:
        ScoresError: If the scores are of other training images or of none of the queries.
        GroundTruthError: If the scores were fitted on subsets that they would be evaluated on, there is no such
            measure, or there are fewer than three subsets.
        ConfigError: If ``draws`` or ``level`` cannot be.
    """
    if draws < 1 or not 0 < level < 1:
        raise ConfigError(f"draws must be above 0 and level between 0 and 1; found {draws} and {level}.")
    if len(ground_truth.subsets) < 3:
        raise GroundTruthError(f"Ranks need at least 3 subsets; there are {len(ground_truth.subsets)}.")
    check_not_fitted(scores, ground_truth)
    values, rows = _align(scores, ground_truth)
    outputs = ground_truth.output(measure)
    results = []
    for name in ground_truth.sets:
        asked = [q for q, of_set in enumerate(ground_truth.query_sets) if of_set == name]
        kept = [q for q in asked if q in rows]
        if kept:
            found = _evaluate_set(
                values[[rows[q] for q in kept]], ground_truth.subsets, outputs[..., kept], draws, level, seed
            )
            per_query = {ground_truth.query_ids[q]: float(v) for q, v in zip(kept, found[0], strict=True)}
            unscored = tuple(ground_truth.query_ids[q] for q in asked if q not in rows)
            ceiling = seed_ceiling(outputs[..., kept])
            results.append(LdsResult(scores.method, name, measure, *found[1:], ceiling, per_query, unscored))
    return results


def _evaluate_set(
    values: Float[ndarray, "query train"],
    subsets: Bool[ndarray, "subset train"],
    outputs: Float64[ndarray, "subset seed query"],
    draws: int,
    level: float,
    seed: int,
) -> tuple[Float64[ndarray, " query"], float, float, float]:
    """Give the LDS of each query, their mean, and the ends of its interval."""
    predictions = values.astype(np.float64) @ subsets.T
    measured = -outputs.mean(axis=1).T
    per_query = weighted_spearman(predictions, measured, np.ones((len(subsets), 1)))[:, 0]
    good = np.isfinite(per_query)
    if not good.any():
        return per_query, math.nan, math.nan, math.nan
    rng = np.random.default_rng(seed)
    of_subsets = _counts(rng, len(subsets), draws)
    of_queries = _counts(rng, int(good.sum()), draws)
    resampled = weighted_spearman(predictions[good], measured[good], of_subsets)
    # A resample of few subsets may be constant for a query, which then has no part in it.
    of_queries = np.where(np.isnan(resampled), 0, of_queries)
    with np.errstate(invalid="ignore"):
        means = (np.nan_to_num(resampled) * of_queries).sum(axis=0) / of_queries.sum(axis=0)
    low, high = np.nanquantile(means, [(1 - level) / 2, (1 + level) / 2])
    return per_query, float(per_query[good].mean()), float(low), float(high)


def _counts(rng: np.random.Generator, num_items: int, draws: int) -> Float64[ndarray, "item draw"]:
    """Draw items with replacement; give how often each came, in each draw."""
    return rng.multinomial(num_items, np.full(num_items, 1 / num_items), size=draws).T.astype(np.float64)


def check_not_fitted(scores: Scores, ground_truth: GroundTruth) -> None:
    """Refuse scores that were fitted on the very subsets that would judge them.

    Raises:
        GroundTruthError: If they share a subset.
    """
    shared = set(scores.details.get("fitted_subsets", [])) & set(ground_truth.subset_hashes)
    if shared:
        raise GroundTruthError(
            f"{scores.method} was fitted on {len(shared)} of the {len(ground_truth.subsets)} subsets that it would be "
            "evaluated on, and would be judged by what it was told. Fit it on other subsets: see "
            "whence.ground_truth.split_subsets, or --fit-subsets of `whence evaluate`."
        )


def _align(scores: Scores, ground_truth: GroundTruth) -> tuple[Float[ndarray, "query train"], dict[int, int]]:
    """Give the scores in the ground truth's order of training images, and the row of each of its queries scored."""
    column_of = {id_: column for column, id_ in enumerate(scores.train_ids)}
    if set(column_of) != set(ground_truth.train_ids):
        missing = [id_ for id_ in ground_truth.train_ids if id_ not in column_of]
        more = len(set(column_of) - set(ground_truth.train_ids))
        raise ScoresError(
            f"The scores of {scores.method} must be of the {len(ground_truth.train_ids)} training images of the ground "
            f"truth; they lack {len(missing)}{f', for example {missing[0]}' if missing else ''}, and have {more} more."
        )
    row_of = {id_: row for row, id_ in enumerate(scores.query_ids)}
    rows = {q: row_of[id_] for q, id_ in enumerate(ground_truth.query_ids) if id_ in row_of}
    if not rows:
        raise ScoresError(
            f"The scores of {scores.method} are of none of the {len(ground_truth.query_ids)} queries of the ground "
            f"truth, such as {ground_truth.query_ids[0]}. Trace those queries."
        )
    _check_same_images(scores, ground_truth)
    order = [column_of[id_] for id_ in ground_truth.train_ids]
    return scores.values[:, order], rows


def _check_same_images(scores: Scores, ground_truth: GroundTruth) -> None:
    """Refuse other images under the same ids, as far as scores and ground truth tell what they were made of."""
    hash_of = dict(zip(ground_truth.query_ids, ground_truth.query_hashes, strict=False))
    made_of = ground_truth.details.get("training", {}).get("train", {}).get("fingerprint")
    known = {
        "queries": fingerprint_of(scores.query_ids, [hash_of[i] for i in scores.query_ids])
        if set(scores.query_ids) <= hash_of.keys()
        else None,
        "train": made_of if scores.train_ids == ground_truth.train_ids else None,
    }
    for side, want in known.items():
        found = scores.details.get(side, {}).get("fingerprint")
        if want is not None and found is not None and found != want:
            raise ScoresError(
                f"The scores of {scores.method} are of other {'queries' if side == 'queries' else 'training images'} "
                "than the ground truth, under the same ids: their fingerprints differ. Trace the images that were "
                "measured, read at the same size."
            )


@dataclass(frozen=True)
class DampingChoice:
    """A damping that was chosen on some queries, and its LDS on the others."""

    damping: float
    curve: dict[float, float]
    """LDS of every damping on the queries that it was chosen on."""
    chosen_on: tuple[str, ...]
    """These queries; they are not part of what is reported."""
    reported: list[LdsResult]
    """The chosen damping on the other queries."""


def choose_damping_on_held_out(
    scores_by_damping: Mapping[float, Scores],
    ground_truth: GroundTruth,
    *,
    held_out: float = 0.1,
    measure: str = "loss",
    seed: int = 0,
    draws: int = 1000,
) -> DampingChoice:
    """Choose a damping, or any other setting, on a part of the queries and report it on the rest.

    Args:
        scores_by_damping: Scores of one method by its damping.
        ground_truth: Retrained models.
        held_out: Share of the queries of each set to choose on, at least one.
        measure: Which of the outputs.
        seed: Seed of the choice of queries and of the interval.
        draws: Resamples of the interval.

    Returns:
        The damping with the highest mean LDS on the queries held out; the larger of two that are equal.

    Raises:
        ConfigError: If there is no damping, or ``held_out`` leaves no query on one side of some set.
        GroundTruthError: If no damping has an LDS.
    """
    if not scores_by_damping:
        raise ConfigError("Give the scores of at least one damping.")
    chosen = _hold_out(ground_truth, held_out, seed)
    rest = np.setdiff1d(np.arange(len(ground_truth.query_ids)), chosen)
    part = ground_truth.select(queries=chosen)
    curve = {d: _mean_lds(scores, part, measure) for d, scores in sorted(scores_by_damping.items())}
    defined = {d: value for d, value in curve.items() if not math.isnan(value)}
    if not defined:
        raise GroundTruthError("No damping has an LDS on the queries that were held out; all are constant.")
    best = max(defined, key=lambda d: (defined[d], d))
    reported = evaluate_lds(
        scores_by_damping[best], ground_truth.select(queries=rest), measure=measure, draws=draws, seed=seed
    )
    return DampingChoice(best, curve, part.query_ids, reported)


def _hold_out(ground_truth: GroundTruth, share: float, seed: int) -> Int[ndarray, " query"]:
    """Give the queries to choose on, by keyed order: whatever the other queries."""
    chosen = []
    for name in ground_truth.sets:
        rows = [q for q, of_set in enumerate(ground_truth.query_sets) if of_set == name]
        count = max(1, math.floor(share * len(rows) + 0.5))
        if not (0 < share < 1 and count < len(rows)):
            raise ConfigError(
                f"held_out must leave queries on both sides; {share} of the {len(rows)} queries of {name} does not."
            )
        chosen += sorted(rows, key=lambda q: noise_key(seed, "order", "query", ground_truth.query_ids[q], 1))[:count]
    return np.array(sorted(chosen))


def _mean_lds(scores: Scores, ground_truth: GroundTruth, measure: str) -> float:
    """Mean over all queries, whatever their set."""
    check_not_fitted(scores, ground_truth)
    values, rows = _align(scores, ground_truth)
    outputs = -ground_truth.output(measure).mean(axis=1)[:, list(rows)]
    found = linear_datamodeling_score(values[list(rows.values())], ground_truth.subsets, outputs)
    return float(np.nanmean(found)) if np.isfinite(found).any() else math.nan
