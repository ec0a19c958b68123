"""The report page: what is on it, that it loads nothing, and that odd data do not break it."""

import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from whence.config import TraceSettings
from whence.data import ImageData
from whence.errors import ConfigError, ScoresError
from whence.report import MAX_CARDS, write_report
from whence.scores import Scores

VOID = {"meta", "link", "br", "hr", "img", "input", "path"}
SETTINGS = {"trace": {"timesteps": 6, "draws": 2}, "device": "cpu"}


class Page(HTMLParser):
    """Parses a page, checks that its elements nest, and keeps what the tests ask for."""

    def __init__(self, html: str):
        super().__init__()
        self.html, self.tags, self.text = html, [], ""
        self.open: list[str] = []
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {key: value or "" for key, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {key: value or "" for key, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data + " "

    def of_class(self, name: str) -> list[dict[str, str]]:
        return [attrs for _, attrs in self.tags if name in attrs.get("class", "").split()]

    @property
    def words(self) -> str:
        return " ".join(self.text.split())


def make_images(num: int, prefix: str, *, channels: int = 3, size: int = 8, **columns: Any) -> ImageData:
    pixels = np.random.default_rng(len(prefix)).uniform(-1, 1, (num, channels, size, size)).astype(np.float32)
    columns = {"ids": [f"{prefix}-{row}" for row in range(num)]} | columns
    return ImageData.from_arrays(pixels, **columns)


def make_scores(train: ImageData, queries: ImageData, method: str = "TracIn", seed: int = 0, **changes: Any) -> Scores:
    rng = np.random.default_rng(seed)
    num_train, num_query = len(train.ids), len(queries.ids)
    phases = rng.normal(size=(num_query, 2, num_train))
    values = phases.sum(axis=1)
    timesteps = rng.integers(0, 1000, (2, num_train))
    timesteps[0, 0] = timesteps[-1, -1] = -1
    scores = Scores(
        method=method,
        query_ids=queries.ids,
        train_ids=train.ids,
        values=values,
        phases=phases,
        phase_timesteps=((1, 500), (501, 999)),
        halves=values + 0.1 * rng.normal(size=(2, *values.shape)),
        train_norms=np.where(timesteps < 0, np.nan, rng.lognormal(size=(2, num_train))),
        train_timesteps=timesteps,
        query_norms=rng.lognormal(size=(2, num_query, 6)),
        query_timesteps=np.linspace(1, 999, 6).round().astype(int),
        checkpoint_steps=(100, 200),
        details={
            "method": {"query": {"events": {"timesteps": 6, "draws": 2}}},
            "data": {"fingerprint": "ab" * 32},
            "notes": ["no record: every image counts alike"],
        },
    )
    return replace(scores, **changes)


def plain_scores(train: ImageData, queries: ImageData, values: np.ndarray | None = None) -> Scores:
    """Scores of a method that has nothing but values."""
    if values is None:
        values = np.random.default_rng(5).normal(size=(len(queries.ids), len(train.ids)))
    return Scores("pixels", queries.ids, train.ids, values)


def render(tmp_path: Path, scores: list[Scores], train: ImageData, queries: ImageData, **arguments: Any) -> Page:
    arguments = {"title": "A run", "settings": SETTINGS} | arguments
    path = write_report(tmp_path / "report.html", scores=scores, train=train, queries=queries, **arguments)
    page = Page(path.read_text(encoding="utf-8"))
    check_page(page)
    return page


def check_page(page: Page) -> None:
    """What must hold for every page."""
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    for _, attrs in page.tags:
        for name in {"src", "href", "srcset", "action", "data", "poster"} & attrs.keys():
            assert attrs[name].startswith(("#", "data:")), attrs
            assert not attrs[name].startswith("#") or attrs[name][1:] in ids, attrs
    assert all(uri.startswith("data:image/") for uri in re.findall(r"url\(([^)]*)\)", page.html))
    assert "script" not in {tag for tag, _ in page.tags} and "@import" not in page.html
    uris = Counter(re.findall(r"data:image/[^)\"]+", page.html))
    assert uris and set(uris.values()) == {1}
    # Every picture on the page has its rule, and every rule is used.
    used = {name for attrs in page.of_class("pic") for name in attrs["class"].split() if re.fullmatch(r"p\d+", name)}
    assert used == set(re.findall(r"\.(p\d+)\{background-image", page.html)) and len(used) == len(uris)
    assert all(attrs["aria-label"] for attrs in page.of_class("pic") + page.of_class("plot"))
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after - before <= 1 for before, after in zip(levels, levels[1:], strict=False))
    assert all(attrs.get("scope") in ("row", "col") for tag, attrs in page.tags if tag == "th")
    assert "nan" not in page.words.lower().split() and "NaN" not in page.html.split("</style>")[1]


@pytest.fixture
def train() -> ImageData:
    return make_images(30, "train", labels=[f"kind {row % 3}" for row in range(30)])


@pytest.fixture
def queries() -> ImageData:
    return make_images(4, "query", labels=["kind 0"] * 4)


class TestContents:
    def test_two_methods(self, tmp_path: Path, train: ImageData, queries: ImageData):
        scores = [make_scores(train, queries), make_scores(train, queries, "ReTrac", seed=1)]
        page = render(tmp_path, scores, train, queries, title="Which made these?", k=10)
        assert page.words.startswith("Which made these?")
        assert len(page.of_class("card")) == 4
        assert len(page.of_class("proponents")) == len(page.of_class("opponents")) == 8
        assert len(page.of_class("rank")) == 8 * (10 + 5)
        assert len(page.of_class("plot")) == 2 * 3
        assert "6 × 2" in page.words and "kind 0" in page.words

    def test_ranks_scores_and_timesteps_are_those_of_the_scores(
        self, tmp_path: Path, train: ImageData, queries: ImageData
    ):
        scores = make_scores(train, queries)
        page = render(tmp_path, [scores], train, queries, k=3)
        first = scores.top(0, 3)[0]
        assert scores.train_timesteps is not None
        hit = next(
            attrs["title"] for tag, attrs in page.tags if tag == "li" and attrs.get("title", "").startswith("1. ")
        )
        assert hit.splitlines()[:2] == [f"1. {first.train_id}", train.labels[first.train_row] if train.labels else ""]
        assert f"score {first.score:.6g}" in hit
        assert all(str(t) in hit or t < 0 for t in scores.train_timesteps[:, first.train_row].tolist())
        assert f"{first.train_id} {', '.join(map(str, scores.train_timesteps[:, first.train_row]))}" in page.words
        worst = scores.top(0, 1, proponents=False)[0]
        assert f"1. {worst.train_id}" in [
            attrs["title"].splitlines()[0] for tag, attrs in page.tags if tag == "li" and attrs
        ]

    def test_reliability(self, tmp_path: Path, train: ImageData, queries: ImageData):
        scores = make_scores(train, queries)
        reliability = scores.reliability()
        assert reliability is not None
        page = render(tmp_path, [scores], train, queries)
        assert f"reliability {reliability[0]:.2f}" in page.words

    def test_phase_bars_mark_parts_of_the_other_sign(self, tmp_path: Path, train: ImageData, queries: ImageData):
        phases = np.zeros((4, 2, 30))
        phases[:, :, 0] = [3.0, -1.0]
        page = render(tmp_path, [make_scores(train, queries, phases=phases, values=phases.sum(1))], train, queries, k=1)
        bar = next(attrs for attrs in page.of_class("phases"))
        assert bar["title"] == "by query timestep: 1–500 +75 %, 501–999 −25 %"
        # The legend and the one proponent of each of four queries.
        assert len(page.of_class("against")) == 5

    def test_generally_influential_samples_are_counted_and_marked(
        self, tmp_path: Path, train: ImageData, queries: ImageData
    ):
        values = np.random.default_rng(0).uniform(0, 1, (4, 30))
        values[:, 7] = 2.0
        values[:2, 8] = 1.5
        page = render(tmp_path, [plain_scores(train, queries, values)], train, queries, k=2)
        assert "in 4 of 4 top 2s" in page.words and "in 2 of 4 top 2s" not in page.words
        assert "4 of 4" in page.words.split("Generally influential samples")[1]

    def test_summary(self, tmp_path: Path, train: ImageData, queries: ImageData):
        summary = {
            "columns": ["method", "distinct", "many", "flag"],
            "rows": [["TracIn", 0.33333, 12345, True], ["ReTrac", float("nan"), None, False]],
            "caption": "How they differ.",
            "notes": ["Distinct is a share."],
        }
        page = render(tmp_path, [make_scores(train, queries)], train, queries, summary=summary)
        for text in ("How they differ.", "Distinct is a share.", "0.333", "12,345", "yes", "TracIn"):
            assert text in page.words
        assert {"scope": "col", "class": "number"} in [attrs for tag, attrs in page.tags if tag == "th"]
        assert "summary" not in [
            attrs.get("id") for _, attrs in render(tmp_path, [make_scores(train, queries)], train, queries).tags
        ]

    def test_settings_are_flat_and_notes_stand_first(self, tmp_path: Path, train: ImageData, queries: ImageData):
        scores = [make_scores(train, queries), plain_scores(train, queries)]
        page = render(
            tmp_path, scores, train, queries, settings={"trace": TraceSettings(timesteps=100), "ids": list(range(20))}
        )
        for text in (
            "trace.timesteps 100",
            "method.query.events.draws 2",
            "abababababab…",
            "(20 in all)",
            "checkpoint_steps",
        ):
            assert text in page.words
        notes, cards = page.words.index("TracIn: no record: every image counts alike"), page.words.index("Query 1")
        assert notes < cards

    def test_same_method_twice_gets_two_names(self, tmp_path: Path, train: ImageData, queries: ImageData):
        page = render(tmp_path, [make_scores(train, queries), make_scores(train, queries, seed=1)], train, queries)
        assert "TracIn (1)" in page.words and "TracIn (2)" in page.words

    def test_captions_are_shown(self, tmp_path: Path, queries: ImageData):
        train = make_images(5, "train", captions=[f"a thing {row}" for row in range(5)])
        assert "a thing 3" in render(tmp_path, [plain_scores(train, queries)], train, queries).words

    def test_a_query_that_is_a_training_image_is_embedded_once(self, tmp_path: Path, train: ImageData):
        queries = train.select([3, 4])
        page = render(tmp_path, [plain_scores(train, queries)], train, queries, k=30)
        assert len(re.findall("data:image/", page.html)) == 30

    def test_small_pictures_are_pixelated_and_large_ones_reduced(self, tmp_path: Path):
        train, queries = make_images(3, "train", size=200), make_images(1, "query", size=16)
        page = render(tmp_path, [plain_scores(train, queries)], train, queries)
        assert page.html.count("image-rendering:pixelated") == 1
        assert page.html.count("data:image/jpeg") == 3 and "Large pictures are reduced to 160 pixels." in page.words


class TestEdgeCases:
    @pytest.mark.parametrize("num_methods", [1, 2, 3, 4])
    def test_only_values(self, tmp_path: Path, train: ImageData, queries: ImageData, num_methods: int):
        page = render(tmp_path, [plain_scores(train, queries)] * num_methods, train, queries, settings={})
        assert "reliability not applicable" in page.words and "keeps no gradient norms" in page.words
        assert len(page.of_class("plot")) == num_methods

    def test_k_beyond_the_training_set(self, tmp_path: Path, queries: ImageData):
        train = make_images(3, "train")
        page = render(tmp_path, [make_scores(train, queries)], train, queries, k=50)
        assert len(page.of_class("proponents")) == 4 and not page.of_class("opponents")
        assert "top 3s" in page.words and not page.of_class("common")

    def test_single_training_image_and_query(self, tmp_path: Path):
        train, queries = make_images(1, "train"), make_images(1, "query")
        scores = make_scores(train, queries, train_timesteps=np.array([[5], [7]]), train_norms=np.ones((2, 1)))
        page = render(tmp_path, [scores], train, queries)
        assert "No training image is in the top 1 of more than one query." in page.words
        assert "t 7" in page.words and "first places" in page.words

    def test_nothing_was_visited(self, tmp_path: Path, train: ImageData, queries: ImageData):
        scores = make_scores(
            train, queries, train_norms=np.full((2, 30), np.nan), train_timesteps=np.full((2, 30), -1), query_norms=None
        )
        page = render(tmp_path, [scores], train, queries)
        assert "never trained" in page.words and len(page.of_class("plot")) == 1

    def test_zero_and_infinite_norms_are_left_out_of_the_plot(
        self, tmp_path: Path, train: ImageData, queries: ImageData
    ):
        norms = np.ones((2, 30))
        norms[:, 0], norms[:, 1] = 0, np.inf
        query_norms = np.ones((2, 4, 6))
        query_norms[..., 0] = np.nan
        page = render(
            tmp_path, [make_scores(train, queries, train_norms=norms, query_norms=query_norms)], train, queries
        )
        assert "Not drawn: 3 without a visit" in page.words

    def test_constant_rows(self, tmp_path: Path, train: ImageData, queries: ImageData):
        values = np.zeros((4, 30))
        values[1] = 3.0
        page = render(
            tmp_path, [make_scores(train, queries, values=values, halves=np.zeros((2, 4, 30)))], train, queries
        )
        assert page.words.count("All scores are equal") == 4
        assert not page.of_class("common") and not page.of_class("counts")
        assert "reliability not available" in page.words

    def test_constant_rows_do_not_count_as_top_places(self, tmp_path: Path, train: ImageData, queries: ImageData):
        values = make_scores(train, queries).values
        values[1] = 3.0
        page = render(tmp_path, [plain_scores(train, queries, values)], train, queries)
        assert "take the 30 places" in page.words and "Left out, as all their scores are equal: 1" in page.words

    def test_one_draw_has_no_reliability(self, tmp_path: Path, train: ImageData, queries: ImageData):
        page = render(tmp_path, [make_scores(train, queries, halves=None)], train, queries)
        assert "not available: needs two draws" in page.words

    def test_negative_scores_are_not_called_proponents(self, tmp_path: Path, train: ImageData, queries: ImageData):
        values = -np.random.default_rng(0).uniform(1, 2, (4, 30))
        page = render(tmp_path, [plain_scores(train, queries, values)], train, queries)
        assert "Highest 10 scores (every score is negative)" in page.words and "Lowest scores" in page.words

    @pytest.mark.parametrize("scale", [1e-30, 1e-9, 0.3, 1.0, 1e6, 1e30])
    def test_scores_of_any_size_are_short(self, tmp_path: Path, train: ImageData, queries: ImageData, scale: float):
        page = render(
            tmp_path, [plain_scores(train, queries, make_scores(train, queries).values * scale)], train, queries
        )
        shown = re.findall(r'<div class="score">.*?<b>(.*?)</b>', page.html)
        assert shown and max(len(text) for text in shown if " of " not in text) <= 6

    def test_text_from_data_is_escaped(self, tmp_path: Path):
        evil = '<script>alert("x")</script>&"\''
        train = make_images(2, "t", ids=[evil, evil + "2"], labels=[evil, evil], captions=[evil, evil])
        queries = make_images(2, "q", ids=[evil, evil + "2"], labels=[evil, evil])
        scores = make_scores(train, queries, method=evil, details={"notes": [evil], evil: evil})
        summary = {"columns": [evil], "rows": [[evil]], "caption": evil, "notes": [evil]}
        page = render(tmp_path, [scores], train, queries, title=evil, settings={evil: {evil: evil}}, summary=summary)
        assert "<script" not in page.html
        assert evil in [attrs.get("title") for _, attrs in page.tags]
        assert page.text.count(evil) > 10

    def test_long_ids_are_shortened_with_the_whole_in_the_title(self, tmp_path: Path, queries: ImageData):
        long = "path/to/" + "x" * 290 + "42"
        train = make_images(2, "train", ids=[long, "short"])
        page = render(tmp_path, [plain_scores(train, queries)], train, queries)
        assert "path…xxxxx42" in page.words
        assert long in [attrs.get("title") for attrs in page.of_class("id")]

    def test_grey_images_without_labels(self, tmp_path: Path):
        train, queries = make_images(6, "train", channels=1), make_images(2, "query", channels=1)
        page = render(tmp_path, [make_scores(train, queries)], train, queries)
        assert "8 × 8 pixels, grey" in page.words and not page.of_class("label")


class TestScale:
    def test_the_page_of_a_usual_run_is_small(self, tmp_path: Path):
        train, queries = make_images(1000, "train", size=32), make_images(16, "query", size=32)
        scores = [make_scores(train, queries), make_scores(train, queries, "ReTrac", seed=1)]
        path = write_report(
            tmp_path / "r.html", title="r", scores=scores, train=train, queries=queries, settings=SETTINGS
        )
        # White noise does not compress: 300 pictures of 3 KiB, and as much again for all the rest.
        assert path.stat().st_size < 3e6

    def test_many_queries_are_limited_and_said_to_be(self, tmp_path: Path):
        train, queries = make_images(2000, "train", size=4), make_images(1000, "query", size=4)
        page = render(tmp_path, [make_scores(train, queries)], train, queries)
        assert len(page.of_class("card")) == MAX_CARDS
        assert "Shown are the first 64 of 1,000 queries." in page.words
        assert "take the 10,000 places" in page.words and "At most 1,500 dots" in page.words


class TestRefusals:
    def test_ids_in_another_order(self, tmp_path: Path, train: ImageData, queries: ImageData):
        swapped = (train.ids[1], train.ids[0], *train.ids[2:])
        scores = make_scores(train, queries, train_ids=swapped)
        with pytest.raises(
            ScoresError, match="train ids of the TracIn scores .* row 0 is 'train-1' .* 'train-0'.*trace again"
        ):
            render(tmp_path, [make_scores(train, queries), scores], train, queries)

    def test_other_number_of_queries(self, tmp_path: Path, train: ImageData, queries: ImageData):
        scores = make_scores(train, queries)
        with pytest.raises(ScoresError, match="query ids .* 4 ids against 2"):
            render(tmp_path, [scores], train, queries.select([0, 1]))
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize(("side", "name"), [("train", "training"), ("queries", "query")])
    def test_images_that_changed_under_the_same_ids(
        self, tmp_path: Path, train: ImageData, queries: ImageData, side: str, name: str
    ):
        details = {"train": {"fingerprint": train.fingerprint}, "queries": {"fingerprint": queries.fingerprint}}
        render(tmp_path / "same", [make_scores(train, queries, details=details)], train, queries)
        changed = make_scores(train, queries, details=details | {side: {"fingerprint": "ab" * 32}})
        with pytest.raises(
            ScoresError,
            match=rf"{name} images in memory changed since the TracIn scores .* abababababab….*Restore .*trace again",
        ):
            render(tmp_path / "new", [changed], train, queries)

    def test_no_scores(self, tmp_path: Path, train: ImageData, queries: ImageData):
        with pytest.raises(ScoresError, match="no scores to report"):
            render(tmp_path, [], train, queries)

    def test_scores_that_are_not_finite(self, tmp_path: Path, train: ImageData, queries: ImageData):
        values = np.zeros((4, 30))
        values[2, 5] = np.nan
        with pytest.raises(ScoresError, match="'train-5' for query 'query-2' is nan; 1 scores are not finite"):
            render(tmp_path, [plain_scores(train, queries, values)], train, queries)

    def test_k_below_one(self, tmp_path: Path, train: ImageData, queries: ImageData):
        with pytest.raises(ConfigError, match="k is 0"):
            render(tmp_path, [plain_scores(train, queries)], train, queries, k=0)


def test_import_does_not_import_torch():
    code = "import sys, whence.report; sys.exit('torch' in sys.modules or 'matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
