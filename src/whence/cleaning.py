"""Cleaning: which training images had better go, and why.

Reasons::

    duplicate   repeats an image that stays: see ``whence.duplicates``
    outlier     pulls on itself far more strongly than others: robust z-score of the logarithm of ``self_norm``, or of
                ``self_expected`` as it is, which may be negative
    harmful     training on it raises the loss of validation queries: negative mean score, of an extreme robust z-score

A robust z-score is (x - median) / (1.4826 x median absolute deviation), the usual z-score where x is normal. Scores of
each query are divided by their root mean square before they are averaged, so that no query decides alone. An image can
have several reasons. Generally influential images, among the first of many queries, are told and not removed: under
TracIn they may owe it to the timestep at which they happened to be trained.

What is decided here is written by ``whence.export``.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
from jaxtyping import Float, Float64, Int
from numpy import ndarray

from whence.config import CleaningSettings, Reason
from whence.data import ImageData
from whence.duplicates import find_duplicates
from whence.errors import ConfigError, ScoresError
from whence.evaluation import generally_influential_from
from whence.progress import progress_bar
from whence.scores import Scores

_SELF = ("self_norm", "self_expected")


@dataclass(frozen=True)
class Finding:
    """One reason for which an image is left out."""

    id: str
    reason: Reason
    figure: float
    """Distance to the image that it repeats; or its robust z-score."""
    threshold: float
    duplicate_of: str = ""


@dataclass(frozen=True)
class Cleaning:
    """What stays, what goes, and why."""

    images: ImageData
    findings: tuple[Finding, ...]
    """In the order of the images; one image may have several."""
    figures: dict[str, Float64[ndarray, " train"]]
    """Columns about every image, of what was looked at: self_influence, self_z, mean_score, score_z, tops."""
    influential: tuple[str, ...]
    """Ids of generally influential images, the most influential first."""
    settings: CleaningSettings
    notes: tuple[str, ...]
    made_of: dict[str, Any]
    """Scores that were used."""

    @property
    def kept(self) -> Int[ndarray, " kept"]:
        """Rows of the images that stay."""
        gone = set(self.images.rows(dict.fromkeys(finding.id for finding in self.findings)))
        return np.array([row for row in range(len(self.images)) if row not in gone], dtype=np.int64)


def clean(
    images: ImageData,
    settings: CleaningSettings,
    *,
    self_scores: Scores | None = None,
    validation: Sequence[Scores] = (),
    show_progress: bool = True,
) -> Cleaning:
    """Decide which images are left out.

    Args:
        images: The training images.
        settings: Reasons and thresholds.
        self_scores: Self-influence, as ``whence self`` gives it; without, outliers are not looked for.
        validation: Scores of one or more methods for validation queries; without, harmful images are not looked for.
        show_progress: Show a progress bar.

    Returns:
        The decision; nothing is written.

    Raises:
        ConfigError: If a threshold cannot be, a reason is asked for without the scores it needs, or nothing would stay.
        ScoresError: If scores are of other images, or not what is needed.
    """
    reasons, notes = _check(images, settings, self_scores, validation)
    findings: list[Finding] = []
    figures: dict[str, ndarray] = {}
    if "outlier" in reasons and self_scores is not None:
        found, columns, more = _outliers(self_scores, settings.outlier_z)
        findings, figures, notes = findings + found, figures | columns, notes + more
    influential: tuple[str, ...] = ()
    if "harmful" in reasons:
        found, columns = _harmful(images, validation, settings.harmful_z)
        findings, figures = findings + found, figures | columns
    if validation:
        tops, influential = _generally_influential(images, validation, settings.top)
        figures |= {"tops": tops}
    if "duplicate" in reasons:
        flagged = frozenset(images.rows(dict.fromkeys(finding.id for finding in findings)))
        with progress_bar("compare images", len(images), "image", shown=show_progress) as bar:
            pairs = find_duplicates(images, settings.near, never=flagged, update=bar.update)
        findings += [
            Finding(images.ids[row], "duplicate", off, settings.near, images.ids[first])
            for row, (first, off) in pairs.items()
        ]
    rank = {reason: place for place, reason in enumerate(get_args(Reason))}
    row_of = {id_: row for row, id_ in enumerate(images.ids)}
    findings.sort(key=lambda finding: (row_of[finding.id], rank[finding.reason]))
    used = [*([self_scores] if self_scores else []), *validation]
    made_of = {str(s.folder.name if s.folder else s.method): s.content_hash for s in used}
    cleaning = Cleaning(images, tuple(findings), figures, influential, settings, tuple(notes), made_of)
    if not len(cleaning.kept):
        raise ConfigError("No image would stay. Raise the thresholds, or look for fewer reasons.")
    return cleaning


def robust_z(values: Float[ndarray, " value"]) -> Float64[ndarray, " value"]:
    """Give (x - median) / (1.4826 MAD), taken over the finite values.

    Args:
        values: Any numbers; what is not finite gets NaN.

    Returns:
        One z-score for each; all NaN where more than half of the values are equal, so that there is no scale.

    Example:
        >>> robust_z(np.array([0.0, 1.0, 2.0, 3.0, 100.0])).round(2)
        array([-1.35, -0.67,  0.  ,  0.67, 66.1 ])
    """
    values = np.where(np.isfinite(values), values, np.nan).astype(np.float64)
    if np.isnan(values).all():
        return values
    median = np.nanmedian(values)
    deviation = np.nanmedian(np.abs(values - median))
    return (values - median) / (1.4826 * deviation) if deviation > 0 else np.full(len(values), np.nan)


def _check(
    images: ImageData, settings: CleaningSettings, self_scores: Scores | None, validation: Sequence[Scores]
) -> tuple[set[str], list[str]]:
    """Give the reasons to look for, and notes on what is not looked for."""
    faults = [
        f"{name} must be above 0 and finite, found {getattr(settings, name)}"
        for name in ("outlier_z", "harmful_z", "top")
        if not 0 < getattr(settings, name) < np.inf
    ]
    if not 0 <= settings.near < np.inf:
        faults.append(f"near must be 0 or above and finite, found {settings.near}")
    known = get_args(Reason)
    unknown = [reason for reason in settings.reasons or () if reason not in known]
    if unknown or settings.reasons == ():
        faults.append(f"reasons must be among {', '.join(known)}, found {', '.join(unknown) or 'none'}")
    missing = {"outlier": self_scores is None, "harmful": not validation}
    needs = {
        "outlier": "self-influence: make it with `whence self`",
        "harmful": "scores of validation queries: trace some, and give the folder with --validation",
    }
    faults += [f"{reason} needs {needs[reason]}" for reason in settings.reasons or () if missing.get(reason)]
    if faults:
        raise ConfigError("; ".join(faults) + ".")
    for one in [*([self_scores] if self_scores else []), *validation]:
        made_of = one.details.get("train", {}).get("fingerprint")
        if one.train_ids != images.ids or (made_of is not None and made_of != images.fingerprint):
            raise ScoresError(
                f"The {one.method} scores are of other training images than {images.source}. Make them again of these."
            )
        if not np.isfinite(one.values).all():
            raise ScoresError(f"The {one.method} scores are not all finite. Make them again.")
    if self_scores is not None and not self_scores.method.startswith(_SELF):
        raise ScoresError(f"Outliers are found by self-influence, {' or '.join(_SELF)}; found {self_scores.method}.")
    wrong = [one.method for one in validation if one.method.startswith(_SELF)]
    if wrong:
        raise ScoresError(f"Validation scores must be of queries; {wrong[0]} is self-influence.")
    looked = [reason for reason in known if not missing.get(reason)] if settings.reasons is None else settings.reasons
    left = [reason for reason in known if settings.reasons is None and missing.get(reason)]
    named = {"outlier": "Outliers", "harmful": "Harmful images"}
    return set(looked), [f"{named[reason]} are not looked for: that needs {needs[reason]}." for reason in left]


def _outliers(scores: Scores, threshold: float) -> tuple[list[Finding], dict[str, ndarray], list[str]]:
    values = scores.values[0].astype(np.float64)
    notes, shown = [], values
    if scores.method.startswith("self_norm"):
        with np.errstate(divide="ignore"):
            shown = np.log(values)  # -inf where a sample was never visited: no z-score, no outlier
        notes.append("self_norm also depends on the timesteps at which an image happened to be trained.")
    z = robust_z(shown)
    if np.isnan(z).all():
        raise ScoresError(f"Most {scores.method} scores are equal, so that they have no scale. Leave outliers out.")
    rows = np.flatnonzero(z >= threshold)
    findings = [Finding(scores.train_ids[row], "outlier", float(z[row]), threshold) for row in rows]
    return findings, {"self_influence": values, "self_z": z}, notes


def _harmful(
    images: ImageData, validation: Sequence[Scores], threshold: float
) -> tuple[list[Finding], dict[str, ndarray]]:
    values = np.concatenate([one.values for one in validation]).astype(np.float64)
    scale = np.sqrt((values**2).mean(axis=1, keepdims=True))
    mean = (values / np.where(scale == 0, 1, scale)).mean(axis=0)
    z = robust_z(mean)
    rows = np.flatnonzero((mean < 0) & (z <= -threshold))
    findings = [Finding(images.ids[row], "harmful", float(z[row]), -threshold) for row in rows]
    return findings, {"mean_score": mean, "score_z": z}


def _generally_influential(
    images: ImageData, validation: Sequence[Scores], top: int
) -> tuple[ndarray, tuple[str, ...]]:
    """Count in how many top lists each image is; name those that are in a quarter of them and twice by chance."""
    k = min(top, len(images))
    rows = np.concatenate([one.top_rows(k) for one in validation])
    counts = np.bincount(rows.ravel(), minlength=len(images))
    least = generally_influential_from(len(rows), len(images), k, at_least=2)
    wide = [row for row in np.argsort(-counts, kind="stable") if counts[row] >= least]
    return counts.astype(np.float64), tuple(images.ids[row] for row in wide)
