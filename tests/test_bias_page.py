"""What the report shows of a diagnosis: its plots, a sentence for each, and nothing of other scores."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from test_report import Page, make_images, make_scores, render
from whence._bias_page import FORMAT_VERSION, show_diagnosis
from whence._plots import draw_curves, draw_moves, draw_sizes
from whence.diagnosis import FORMAT_VERSION as WRITTEN_VERSION
from whence.diagnosis import read_diagnosis
from whence.errors import ScoresError
from whence.scores import Scores

TRAIN, QUERIES = make_images(30, "train"), make_images(4, "query")


def effects(ranks: list[tuple[float, float, float]], in_top: list[tuple[float, float, float]]) -> list[dict[str, Any]]:
    """Of images that are trained where they were, at the longest, and at the shortest gradient."""
    return [
        {"id": f"train-{number}"}
        | {
            way: {"rank": rank, "in_top": share, "in_strongest": share}
            for way, rank, share in zip(("trained", "longest", "shortest"), of_image, shares, strict=True)
        }
        for number, (of_image, shares) in enumerate(zip(ranks, in_top, strict=True))
    ]


def method_record(scores: Scores, **changes: Any) -> dict[str, Any]:
    return {
        "method": scores.method.lower(),
        "scores": scores.content_hash,
        "norm_correlation": 0.42,
        "timestep_correlation": -0.05,
        "images": {
            "norm": [1.0, 2.0, 3.0],
            "timestep": [10.0, 500.0, 900.0],
            "size": [0.1, 0.2, 0.4],
            "in_top": [False, False, True],
        },
        "trained_timesteps": {"edges": [0.0, 500.0, 1000.0], "all": [10, 10], "top": [1, 3]},
        "median_norms": {"edges": [0.0, 500.0, 1000.0], "checkpoints": [[None, 1.0], [3.0, 1.5]]},
        "intervention": effects([(12, 2, 20), (18, 4, 22)], [(0, 1, 0), (0.25, 0.75, 0)]),
        "rank_change": {"longest": {"mean": -12.0, "low": -37.4, "high": 13.4}},
    } | changes


def record_of(methods: list[dict[str, Any]], **changes: Any) -> dict[str, Any]:
    checkpoints = [
        {
            "step": 100,
            "norms": [None] * 3,
            "trained_timestep": -1,
            "trained_norm": None,
            "longest_timestep": -1,
        },
        {
            "step": 200,
            "norms": [4.0, 2.0, 1.0],
            "trained_timestep": 500,
            "trained_norm": 2.0,
            "longest_timestep": 1,
        },
    ]
    return {
        "format_version": FORMAT_VERSION,
        "k": 2,
        "num_train": 30,
        "num_query": 4,
        "generally_influential_from": 3,
        "checkpoint_steps": [100, 200],
        "methods": methods,
        "samples": [{"id": "train-<0>", "timesteps": [1, 500, 999], "checkpoints": checkpoints}],
    } | changes


def show(tmp_path: Path, scores: list[Scores], record: dict[str, Any] | None) -> Page:
    return render(tmp_path, scores, TRAIN, QUERIES, diagnosis=record)


def test_both_sides_agree_on_the_format():
    assert FORMAT_VERSION == WRITTEN_VERSION


def test_a_diagnosis_answers_five_questions(tmp_path: Path):
    both = [make_scores(TRAIN, QUERIES), make_scores(TRAIN, QUERIES, "ReTrac", seed=1)]
    still = effects([(12, 12, 13), (18, 17, 18)], [(0, 0, 0), (0.75, 0.75, 0)])
    methods = [method_record(both[0]), method_record(both[1], norm_correlation=0.2, intervention=still)]
    page = show(tmp_path, both, record_of(methods))
    assert len(page.of_class("question")) == 5
    words = page.words
    for said in (
        "the longest gradient is 4.0 times the shortest (median)",
        "Images trained at timesteps 0 to 500 have the longest gradients at the last checkpoint, 2.0 times as long",
        "Yes: images with longer gradients get larger scores (rank correlation +0.42, median over queries).",
        "A little: images with longer gradients tend to get larger scores (rank correlation +0.20",
        "Hardly: images trained at later timesteps get scores no larger or smaller than others (rank correlation −0.05",
        "25 % of the places in a top 2 would have to go to other bars",
        "timesteps 500 to 1000 have 75 % of the places and 50 % of the images",
        "goes from rank 15 to 3 of 30 on average (change −12, 95 % interval −37 to +13), and 2 of 2 images are in the "
        "top 2 of 3 or more of the 4 queries, against 0 before; where it is shortest, to rank 21. Under TracIn, the "
        "timestep alone makes most of them generally",
        "and 1 of 2 images are in the top 2 of 3 or more of the 4 queries, against 1 before; where it is shortest, to "
        "rank 16. Under ReTrac, the timestep alone makes no more of them generally influential.",
        "One image: train-<0>",
    ):
        assert said in words
    # The histogram over all checkpoints stands in place of that of the last one.
    assert words.count("would have to go to other bars") == 2 and "bars, all training images" not in words


def test_without_a_diagnosis_the_page_says_how_to_make_one(tmp_path: Path):
    page = show(tmp_path, [make_scores(TRAIN, QUERIES)], None)
    assert "whence diagnose measures how far that goes" in page.words
    assert not page.of_class("question") and "bars, all training images" in page.words


@pytest.mark.parametrize("change", [{"format_version": 1}, {"methods": [{"scores": "ab" * 32}]}])
def test_a_diagnosis_of_other_scores_is_not_shown(tmp_path: Path, change: dict[str, Any]):
    scores = make_scores(TRAIN, QUERIES)
    page = show(tmp_path, [scores], record_of([method_record(scores)]) | change)
    assert "is of other scores" in page.words and "run whence diagnose again" in page.words
    assert not page.of_class("question")


def test_a_diagnosis_without_an_intervention_leaves_its_questions_out(tmp_path: Path):
    scores = make_scores(TRAIN, QUERIES)
    gridded = method_record(scores, timestep_correlation=None)
    for name in ("trained_timesteps", "median_norms", "intervention"):
        del gridded[name]
    gridded["images"] = gridded["images"] | {"timestep": None}
    page = show(tmp_path, [scores], record_of([gridded], samples=[]))
    (question,) = show_diagnosis(record_of([gridded], samples=[]), {"TracIn": scores})["questions"]
    assert question.title == "Do images with longer gradients get larger scores?"
    assert len(page.of_class("question")) == 1


def test_a_damaged_diagnosis_is_named(tmp_path: Path):
    assert read_diagnosis(tmp_path) is None
    path = tmp_path / "evaluation" / "bias.json"
    path.parent.mkdir()
    path.write_text(json.dumps(record_of([])))
    assert read_diagnosis(tmp_path) == record_of([])
    path.write_text("{")
    with pytest.raises(ScoresError, match=r"bias\.json cannot be read: .* run `whence diagnose` again"):
        read_diagnosis(tmp_path)


class TestPlots:
    def test_first_places_are_on_top(self):
        plot = draw_moves(np.array([[30.0, 20], [3, 2], [1, 1]]), ["a", "b", "c"], 30, name="moves")
        lines = [
            [float(point.split()[1]) for point in d.split("L")]
            for d in re.findall(r'class="(?:curve|median)" d="M([^"]*)"', plot)
        ]
        assert len(lines) == 3 and all(first > second > third for first, second, third in lines)
        assert lines[2][2] == lines[0][2]  # the median of two first places

    def test_a_curve_with_gaps_is_drawn_and_none_is_not(self):
        nan = np.nan
        timesteps = np.array([1.0, 500, 999])
        gaps = np.array([[nan, nan, nan], [1, nan, 2], [2, 0, 3]])
        plot = draw_curves(timesteps, gaps, np.array([[500.0, 2], [nan, 1]]), until=999.0, name="curves")
        assert plot is not None and plot.count('class="curve"') == 1 and plot.count('class="median"') == 1
        assert plot.count("h0") == 1 and "nan" not in plot
        assert draw_curves(timesteps, np.full((2, 3), nan), np.empty((0, 2)), until=999.0, name="curves") is None

    def test_sizes_have_a_median_line_and_skip_what_has_none(self):
        places = np.arange(100.0)
        plot = draw_sizes(places, places + 1, places > 90, x_label="norm", name="sizes")
        assert plot is not None and plot.count("h0") == 100
        (line,) = re.findall(r'class="median" d="M([^"]*)"', plot)
        heights = [float(point.split()[1]) for point in line.split("L")]
        assert len(heights) == 10 and heights == sorted(heights, reverse=True)
        assert ">0<" in plot and ">-0<" not in plot
        assert draw_sizes(places * np.nan, places, places > 90, x_label="norm", name="sizes") is None
