r"""Scores from retrained models themselves: empirical influence and datamodels.

Both read a ground truth of *other* subsets than the ones that judge them (``whence.ground_truth.split_subsets``); the
scores keep the hashes of the subsets they were fitted on, and ``whence.lds`` refuses to evaluate them on these.

    empirical influence   s_i = mean of f over subsets without i - mean of f over subsets with i
    datamodels            s = -w,   (w, b) = argmin sum_m (f_m - b - w . 1_m)^2 + penalty <w, w>

f is the measured output, mean over seeds, and 1_m says who is in subset m. The regression is solved in the space of
subsets, of which there are few: with centred masks X and outputs y, w = X^T (X X^T + penalty I)^-1 y.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float64
from numpy import ndarray

from whence._files import sha256_of_json
from whence.data import fingerprint_of
from whence.errors import GroundTruthError
from whence.ground_truth import GroundTruth, sha256_of_array
from whence.methods import DATAMODELS, EMPIRICAL_INFLUENCE, RetrainingMethod
from whence.scores import Scores

RETRAINING_METHODS = (EMPIRICAL_INFLUENCE, DATAMODELS)


def fit_scores(
    ground_truth: GroundTruth,
    folder: Path,
    *,
    methods: Sequence[RetrainingMethod] = RETRAINING_METHODS,
    measure: str = "loss",
) -> dict[str, Scores]:
    """Score training images for the queries of a ground truth, from its outputs.

    Args:
        ground_truth: Retrained models, on other subsets than those that the scores will be evaluated on.
        folder: The run; scores go into its ``scores/``.
        methods: Which.
        measure: Which of the outputs.

    Returns:
        Scores by method name; positive lowers the measure.

    Raises:
        GroundTruthError: If there is no such measure, or there are too few subsets.
    """
    made = {}
    for method in methods:
        spec = {
            "method": asdict(method),
            "measure": measure,
            "fitted_subsets": list(ground_truth.subset_hashes),
            "outputs": sha256_of_array(ground_truth.output(measure)),
            "queries": list(ground_truth.query_ids),
            "train": list(ground_truth.train_ids),
        }
        path = folder / "scores" / f"{method.name}-{sha256_of_json(spec)[:8]}"
        if not (path / "manifest.json").exists():
            values, more = _fit(method, ground_truth.subsets, ground_truth.output(measure).mean(axis=1))
            details = {k: v for k, v in spec.items() if k not in ("queries", "train")} | more
            if ground_truth.query_hashes:
                fingerprint = fingerprint_of(ground_truth.query_ids, ground_truth.query_hashes)
                details["queries"] = {"fingerprint": fingerprint, "num_images": len(ground_truth.query_ids)}
            Scores(method.name, ground_truth.query_ids, ground_truth.train_ids, values, details=details).save(path)
        made[method.name] = Scores.load(path)
    return made


def _fit(
    method: RetrainingMethod, subsets: Bool[ndarray, "subset train"], outputs: Float64[ndarray, "subset query"]
) -> tuple[Float64[ndarray, "query train"], dict[str, Any]]:
    notes = [f"Made from models trained on {len(subsets)} subsets."]
    if method.kind == "difference":
        always = subsets.all(axis=0) | ~subsets.any(axis=0)
        if always.any():
            notes.append(f"{int(always.sum())} training images are in all subsets or in none, and count 0.")
        return empirical_influence(subsets, outputs), {"notes": notes}
    model = fit_datamodels(subsets, outputs, penalties=method.penalties, folds=method.folds)
    return model.scores, {"penalties": model.penalties.tolist(), "notes": notes}


def empirical_influence(
    subsets: Bool[ndarray, "subset train"], outputs: Float64[ndarray, "subset query"]
) -> Float64[ndarray, "query train"]:
    """Take the difference of mean outputs without and with each training sample.

    Args:
        subsets: True where the sample was trained on.
        outputs: Measures as they are: of a loss, lower is better.

    Returns:
        Scores; positive where the measure is lower with the sample. 0 where a sample is in all subsets or in none.

    Example:
        >>> subsets = np.array([[True, False], [False, True]])
        >>> empirical_influence(subsets, np.array([[1.0], [3.0]]))
        array([[ 2., -2.]])
    """
    count_with = subsets.sum(axis=0)
    count_without = len(subsets) - count_with
    known = (count_with > 0) & (count_without > 0)
    centred = (outputs - outputs.mean(axis=0)).T  # sums of large numbers would cost digits
    with_ = centred @ subsets / np.maximum(count_with, 1)
    without = centred @ ~subsets / np.maximum(count_without, 1)
    return np.where(known, without - with_, 0.0)


@dataclass(frozen=True)
class Datamodels:
    """Linear models of the output by the members of a subset, one per query."""

    scores: Float64[ndarray, "query train"]
    """Minus the coefficients."""
    penalties: Float64[ndarray, " query"]
    """Chosen multiple of the mean eigenvalue."""
    errors: Float64[ndarray, "penalty query"]
    """Mean squared error of each penalty in cross-validation."""


def fit_datamodels(
    subsets: Bool[ndarray, "subset train"],
    outputs: Float64[ndarray, "subset query"],
    *,
    penalties: Sequence[float],
    folds: int = 5,
) -> Datamodels:
    """Regress outputs on who was in the subset, with the penalty that predicts left-out subsets best.

    Args:
        subsets: True where the sample was trained on.
        outputs: Measures as they are.
        penalties: To choose from, of each query; in multiples of the mean eigenvalue of the centred masks' Gram matrix.
        folds: Parts of the cross-validation: subset m is in part m modulo folds. No more parts than subsets are made.

    Returns:
        Scores of the whole, and how the penalties fared; of equal ones the larger is taken.

    Raises:
        GroundTruthError: If there are fewer than 3 subsets.
    """
    if len(subsets) < 3:
        raise GroundTruthError(f"A regression on subsets needs at least 3; there are {len(subsets)}.")
    ascending = np.array(sorted(penalties), dtype=np.float64)
    masks = subsets.astype(np.float64)
    part = np.arange(len(subsets)) % min(folds, len(subsets))
    errors = np.zeros((len(ascending), outputs.shape[1]))
    for out in range(part.max() + 1):
        fitted, left = part != out, part == out
        offset = outputs[fitted].mean(axis=0)
        for k, coefficients in enumerate(_ridge(masks[fitted], outputs[fitted], ascending)):
            predicted = (masks[left] - masks[fitted].mean(axis=0)) @ coefficients + offset
            errors[k] += ((predicted - outputs[left]) ** 2).sum(axis=0) / len(subsets)
    chosen = len(ascending) - 1 - np.argmin(errors[::-1], axis=0)
    coefficients = np.empty((masks.shape[1], outputs.shape[1]))
    for k in np.unique(chosen):
        here = chosen == k
        coefficients[:, here] = _ridge(masks, outputs[:, here], ascending[[k]])[0]
    return Datamodels(-coefficients.T, ascending[chosen], errors)


def _ridge(
    masks: Float64[ndarray, "subset train"], outputs: Float64[ndarray, "subset query"], penalties: ndarray
) -> list[Float64[ndarray, "train query"]]:
    """Give the coefficients under each penalty; the intercept is not penalised."""
    x, y = masks - masks.mean(axis=0), outputs - outputs.mean(axis=0)
    values, vectors = np.linalg.eigh(x @ x.T)
    values = np.maximum(values, 0)
    turned = vectors.T @ y
    # The mean of centred masks is zero, and so is an eigenvalue: nothing of y lies there.
    scales = [values + penalty * values.mean() for penalty in penalties]
    return [x.T @ (vectors @ (turned / np.where(scale > 0, scale, np.inf)[:, None])) for scale in scales]
