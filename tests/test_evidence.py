"""The page of whence prove: self-contained, each image in its place, sentences that claim no more than was found."""

import re

import numpy as np
import pytest

from conftest import toy_images
from whence.data import ImageData
from whence.evidence import MAX_TOP, describe_effect, write_evidence

TRAIN, QUERIES = toy_images(40), toy_images(2, "query", seed=1)


def effect_of(**changes):
    change = {"mean": 0.25, "low": 0.2, "high": 0.3}
    return {
        "method": "retrac",
        "query": "query-0",
        "k": 30,
        "way": "without",
        "top": list(TRAIN.ids[:30]),
        "change_top": change,
        "change_random": {"mean": -0.05, "low": -0.1, "high": 0.0},
        "top_minus_random": {"mean": 0.3, "low": 0.22, "high": 0.38},
        "seed_floor": 0.01,
        "verdict": "more than random",
        "pixels": {"top": [5.0, 6.0], "random": [2.0, 3.0], "seeds": [1.5]},
        "features": None,
    } | changes


def drawn_by():
    names = [
        f"query-0 | {models} | seed {seed}"
        for models in ("all", "without 30 random", "without 30 by retrac")
        for seed in (0, 1)
    ]
    return ImageData.from_arrays(np.random.default_rng(0).uniform(-1, 1, (6, 3, 8, 8)), names)


def page(tmp_path, effects, drawn=None, **changes):
    table = {"columns": ["method", "top"], "rows": [["retrac", 0.25], ["<b>", None]], "notes": ["a & b"]}
    record = {"effects": effects, "seeds": [0, 1], "measure": "loss", "table": table} | changes
    path = write_evidence(tmp_path / "index.html", record=record, train=TRAIN, queries=QUERIES, drawn=drawn)
    return path.read_text(encoding="utf-8")


def test_each_image_stands_in_its_place_and_nothing_is_loaded(tmp_path):
    html = page(tmp_path, [effect_of()], drawn_by())
    assert set(re.findall(r'(?:src|href)="([^"]{5})', html)) == {"data:"} and "url(" in html and "<script" not in html
    assert not re.findall(r"url\((?!data:)|https?:|@import", html)
    table = re.search(r'<table class="drawn">.*?</table>', html, re.DOTALL).group()
    heads = re.findall(r'<th scope="col">([^<]*)</th>', table)
    assert heads == ["seed", "all images", "without 30 random", "without 30 by retrac"]
    assert re.findall(r"L2 ([\d.]+)", table) == ["2", "5", "3", "6"]
    assert len(set(re.findall(r"pic (p\d+)", table))) == 6
    assert html.count('<li title="train-') == MAX_TOP and f"and {30 - MAX_TOP} more" in html
    assert "1.5 on average" in html and "&lt;b&gt;" in html and "a &amp; b" in html


def test_a_query_that_was_not_sampled_has_no_images(tmp_path):
    html = page(tmp_path, [effect_of(query="query-1", pixels=None)])
    assert '<table class="drawn">' not in html and "not sampled from the model by a seed that is known" in html


def test_what_is_not_shown_is_said(tmp_path):
    html = page(tmp_path, [effect_of()], drawn_by())
    assert "What this does not show" in html and "noise floor" in html and "copied" in html


@pytest.mark.parametrize(
    ("changes", "ends"),
    [
        ({}, "So these images matter to this query more than random ones do."),
        ({"verdict": "undecided"}, "More seeds, or more images, may tell."),
        ({"verdict": "less than random"}, "the ranking is contradicted."),
        ({"way": "only"}, "So these images alone serve this query better than random ones do."),
        ({"way": "only", "verdict": "undecided"}, "serve the query better than random ones."),
        ({"way": "only", "verdict": "less than random"}, "serve this query worse than random ones do."),
    ],
)
def test_sentences_follow_the_verdict(changes, ends):
    said = describe_effect(effect_of(**changes), "loss", 2)
    assert said.endswith(ends)
    for part in ("the loss on query-0 rises by 0.25", "falls by 0.05", "+0.3", "+0.22 to +0.38", "0.01 apart"):
        assert part in said
