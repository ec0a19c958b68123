"""The text demo at a toy size, and the table of who should be credited."""

from dataclasses import replace

import numpy as np
import pytest

from conftest import toy_images
from whence import text_demo
from whence.config import TraceSettings
from whence.data import open_images, save_arrays
from whence.errors import ConfigError, DataError
from whence.scores import Scores
from whence.text_demo import HELD_OUT, PROMPTS, TRAIN, factor_table, factors_of, read_caption


def test_bundled_images_are_all_pairs_without_the_held_out_ones():
    train, held_out = open_images(TRAIN), open_images(HELD_OUT)
    assert train.captions is not None and held_out.captions is not None
    pairs, others = ([read_caption(one) for one in captions] for captions in (train.captions, held_out.captions))
    assert len(set(pairs) | set(others)) == 160 == len(pairs) + len(others)
    assert [style for _, style in pairs] == list(train.labels or ())
    assert {name for name, _ in others} <= {name for name, _ in pairs}
    assert sorted(style for _, style in others) == sorted(["fluent", "noto", "openmoji", "twemoji"] * 5)
    known = set(train.captions) | set(held_out.captions)
    assert set(PROMPTS) <= known and set(PROMPTS) & set(held_out.captions) and len(set(PROMPTS)) == len(PROMPTS)


def test_captions_are_read_and_others_refused():
    assert read_caption("family man, boy, noto style") == ("family man, boy", "noto")
    for caption in ("cat face", "cat face, noto", ", noto style", "cat face,  style"):
        with pytest.raises(DataError, match="reads 'name, STYLE style'"):
            read_caption(caption)


def test_the_table_counts_styles_and_names_apart():
    train = replace(toy_images(4), captions=("cat, a style", "dog, a style", "cat, b style", "sun, b style"))
    queries = replace(toy_images(2, "query", 1), captions=("cat, b style", "dog, b style"), labels=("generated", "b"))
    factors = factors_of(train, queries)
    assert factors["style"].tolist() == [[False, False, True, True]] * 2
    assert factors["name"].tolist() == [[True, False, True, False], [False, True, False, False]]
    values = np.array([[0.3, 0.1, 0.4, 0.2], [0.1, 0.2, 0.3, 0.4]], np.float32)
    table = factor_table([Scores("toy", queries.ids, train.ids, values)], train, queries, k=2)
    assert table["columns"] == ["method", "style@2, drawn", "name@2, drawn", "style@2, held out", "name@2, held out"]
    assert table["rows"] == [
        ["toy", 0.5, 1.0, 1.0, 0.0],
        ["chance", 0.5, 0.5, 0.5, 0.25],
        ["best possible", 1.0, 1.0, 1.0, 0.5],
    ]


def test_the_demo_runs_and_shows_prompts_and_captions(tmp_path, monkeypatch):
    for name, count in (("TRAIN", 12), ("HELD_OUT", 3)):
        images = open_images(getattr(text_demo, name), replace(text_demo.DATA, resolution=8)).select(range(count))
        path, pixels = tmp_path / f"{name}.safetensors", images.pixels(range(count))
        save_arrays(path, pixels, images.ids, images.labels, captions=images.captions)
        monkeypatch.setattr(text_demo, name, str(path))
    monkeypatch.setattr(text_demo, "DATA", replace(text_demo.DATA, resolution=8))
    monkeypatch.setattr(text_demo, "MODEL", replace(text_demo.MODEL, widths=(8, 8), norm_groups=4))
    monkeypatch.setattr(text_demo, "TRACE", TraceSettings(timesteps=2, draws=2))
    monkeypatch.setattr(text_demo, "PROMPTS", PROMPTS[-2:])
    settings = text_demo.training_settings
    monkeypatch.setattr(
        text_demo,
        "training_settings",
        lambda loss, seed: replace(settings(loss, seed, epochs=1), batch_size=6, checkpoints=1),
    )
    folder = tmp_path / "demo"
    run, page, table = text_demo.run_text_demo(folder, show_progress=False)
    text = page.read_text()
    for prompt in PROMPTS[-2:]:
        assert f">{prompt}</h3>" in text  # the prompt is the title of its query
    assert '<span class="caption">' in text
    assert [row[0] for row in table["rows"]] == [
        "d-trak",
        *text_demo.METHODS,
        "chance",
        "best possible",
    ]
    assert {row.verdict for row in run.check()} == {"passed"}
    again = text_demo.run_text_demo(folder, show_progress=False)
    assert again[2] == table
    (folder / text_demo.__name__).touch()
    (folder / ".whence-demo").unlink()
    with pytest.raises(ConfigError, match="not a demo"):
        text_demo.run_text_demo(folder, show_progress=False)
