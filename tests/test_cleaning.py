"""Cleaning: planted duplicates, outliers and harmful images are found, and nothing else; refusals."""

import numpy as np
import pytest

from whence.cleaning import clean, robust_z
from whence.config import CleaningSettings
from whence.data import ImageData
from whence.errors import ConfigError, ScoresError
from whence.scores import Scores

COUNT = 60
RNG = np.random.default_rng(0)
PIXELS = RNG.uniform(-0.9, 0.9, (COUNT, 3, 8, 8)).astype(np.float32)
PIXELS[10] = PIXELS[4]  # exact
PIXELS[20] = PIXELS[5] + np.float32(0.01)  # near
PIXELS[30] = PIXELS[6] + np.float32(0.05)  # not near enough
IMAGES = ImageData.from_arrays(PIXELS, [f"i-{k}" for k in range(COUNT)])


def self_scores(method="self_norm", outliers=(7,)):
    values = np.exp(RNG.normal(size=COUNT))
    values[list(outliers)] *= np.exp(12)
    return Scores(method, ("self",), IMAGES.ids, values[None], details={"train": {"fingerprint": IMAGES.fingerprint}})


def validation(harmful=(8,), wide=(9,), queries=5):
    values = RNG.normal(size=(queries, COUNT))
    values[:, list(harmful)] -= 15
    values[:, list(wide)] += 9
    values *= 10.0 ** np.arange(queries)[:, None]  # units differ between queries
    return Scores("retrac", tuple(f"q-{k}" for k in range(queries)), IMAGES.ids, values)


def quick(settings=None, **given):
    return clean(IMAGES, settings or CleaningSettings(top=3), show_progress=False, **given)


def test_what_was_planted_is_found_and_nothing_else():
    found = quick(self_scores=self_scores(), validation=[validation()])
    assert [(f.id, f.reason, f.duplicate_of) for f in found.findings] == [
        ("i-7", "outlier", ""),
        ("i-8", "harmful", ""),
        ("i-10", "duplicate", "i-4"),
        ("i-20", "duplicate", "i-5"),
    ]
    by_id = {f.id: f for f in found.findings}
    assert by_id["i-10"].figure == 0 and by_id["i-20"].figure == pytest.approx(0.01, rel=1e-4)
    assert by_id["i-20"].threshold == 0.02 and by_id["i-7"].figure >= by_id["i-7"].threshold == 5
    assert by_id["i-8"].figure <= by_id["i-8"].threshold == -5
    assert found.kept.tolist() == [k for k in range(COUNT) if k not in (7, 8, 10, 20)]
    assert "i-9" in found.influential and "i-9" not in by_id
    assert set(found.figures) == {"self_influence", "self_z", "mean_score", "score_z", "tops"}
    assert found.figures["tops"][9] == 5


def test_z_scores_are_those_of_median_and_deviation():
    scores = self_scores()
    found = quick(self_scores=scores)
    logs = np.log(scores.values[0])
    deviation = np.median(np.abs(logs - np.median(logs)))
    np.testing.assert_allclose(found.figures["self_z"], (logs - np.median(logs)) / (1.4826 * deviation))
    normal = np.random.default_rng(1).normal(3, 2, 20001)
    np.testing.assert_allclose(robust_z(normal), (normal - 3) / 2, atol=0.15)  # 1.4826 MAD estimates the deviation
    assert np.isnan(robust_z(np.array([1.0, 1.0, 1.0, 9.0]))).all() and np.isnan(robust_z(np.array([np.nan]))).all()


def test_an_unvisited_image_is_no_outlier_and_signed_scores_stay_as_they_are():
    scores = self_scores()
    scores.values[0, 3] = 0.0
    found = quick(self_scores=scores)
    assert np.isnan(found.figures["self_z"][3]) and [f.id for f in found.findings if f.reason == "outlier"] == ["i-7"]
    signed = self_scores("self_expected-retrac", outliers=())
    signed.values[0] = np.random.default_rng(2).normal(size=COUNT)
    signed.values[0, [1, 2]] = -50, 50
    assert [f.id for f in quick(self_scores=signed).findings if f.reason == "outlier"] == ["i-2"]


def test_a_duplicate_repeats_an_image_that_stays():
    # i-4 goes as an outlier, so that i-10, its copy, is not removed for its sake; i-10 stays in its place.
    found = quick(self_scores=self_scores(outliers=(4,)))
    assert [(f.id, f.reason) for f in found.findings] == [("i-4", "outlier"), ("i-20", "duplicate")]
    both = quick(self_scores=self_scores(outliers=(20,)))
    assert [(f.id, f.reason) for f in both.findings if f.id == "i-20"] == [("i-20", "duplicate"), ("i-20", "outlier")]


def test_what_is_not_looked_for_is_said():
    found = quick()
    assert {f.reason for f in found.findings} == {"duplicate"}
    assert any("Outliers are not looked for: that needs self-influence" in note for note in found.notes)
    assert any("Harmful images are not looked for: that needs scores of validation" in note for note in found.notes)
    only = quick(CleaningSettings(reasons=("harmful",)), validation=[validation()])
    assert {f.reason for f in only.findings} == {"harmful"} and not only.notes


def test_thresholds_move_the_line():
    assert len(quick(CleaningSettings(near=0.06)).findings) == 3
    assert [f.id for f in quick(CleaningSettings(near=0.0)).findings] == ["i-10"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"near": -1.0}, "near must be 0 or above and finite, found -1.0"),
        ({"near": float("nan")}, "near must be 0 or above"),
        ({"outlier_z": 0.0, "top": 0}, "outlier_z must be above 0 and finite, found 0.0; top must be above 0"),
        ({"reasons": ()}, "found none"),
        ({"reasons": ("outlier", "harmful")}, "outlier needs self-influence: .*; harmful needs scores of validation"),
    ],
)
def test_settings_that_cannot_be_met_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        quick(CleaningSettings(**changes))


def test_an_unknown_reason_lists_the_known_ones():
    settings = CleaningSettings()
    object.__setattr__(settings, "reasons", ("ugly",))  # type checks of tests would refuse it before
    with pytest.raises(ConfigError, match="reasons must be among duplicate, outlier, harmful, found ugly"):
        quick(settings)


def test_scores_that_do_not_fit_are_refused():
    good, other = self_scores(), self_scores("tracin")
    stranger = Scores("self_norm", ("self",), tuple("abc"), np.ones((1, 3)))
    changed = Scores("self_norm", ("self",), IMAGES.ids, good.values, details={"train": {"fingerprint": "0"}})
    broken = Scores("retrac", ("q",), IMAGES.ids, np.full((1, COUNT), np.nan))
    flat = Scores("self_norm", ("self",), IMAGES.ids, np.ones((1, COUNT)))
    for given, message in [
        ({"self_scores": stranger}, "of other training images than memory"),
        ({"self_scores": changed}, "of other training images"),
        ({"self_scores": other}, "found by self-influence, self_norm or self_expected; found tracin"),
        ({"self_scores": flat}, "have no scale"),
        ({"validation": [broken]}, "not all finite"),
        ({"validation": [good]}, "must be of queries; self_norm is self-influence"),
    ]:
        with pytest.raises(ScoresError, match=message):
            quick(**given)


def test_a_set_of_nothing_is_refused():
    two = ImageData.from_arrays(PIXELS[:2], ["a", "b"])
    own = Scores("self_expected", ("self",), two.ids, np.array([[1.0, 2.0]]))
    others = Scores("retrac", ("q",), two.ids, np.array([[-3.0, -1.0]]))
    settings = CleaningSettings(outlier_z=0.1, harmful_z=0.1)
    with pytest.raises(ConfigError, match="No image would stay. Raise the thresholds"):
        clean(two, settings, self_scores=own, validation=[others], show_progress=False)
    assert clean(two, settings, self_scores=own, show_progress=False).kept.tolist() == [0]
