"""whence prove and whence clean as a user meets them."""

import json

import numpy as np
import pytest
from PIL import Image

from test_cli import TRACE, TRAIN, answer, fails, save_pngs
from whence.cli import main
from whence.data import open_images

AGAIN = ["--timesteps", "3", "--sample-steps", "3", "--sample-seed", "7"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with a generated query, its scores and self-influence; one image stands in it twice. Commands add to it."""
    folder = tmp_path_factory.mktemp("evidence")
    images = save_pngs(folder / "images", count=8)
    Image.open(images / "even" / "0.png").save(images / "even" / "copy.png")
    main(["train", str(images), "--out", str(folder / "run"), *TRAIN])
    main(["sample", str(folder / "run"), "--count", "2", "--steps", "3", "--seed", "7"])
    (generated,) = (folder / "run" / "generated").iterdir()
    main(["trace", str(folder / "run"), "--queries", str(generated), "--methods", "retrac", "pixels", *TRACE])
    main(["self", str(folder / "run")])
    return folder / "run"


def test_prove_tells_the_cost_then_shows_what_changes(run, capsys):
    (generated,) = (run / "generated").iterdir()
    asked = ["prove", run, "--queries", generated, "--method", "retrac", "--ids", "generated-1", "--top", "2", *AGAIN]
    (cost,) = answer(capsys, *asked, "--plan")["rows"]
    assert cost["models"] == 6 and cost["finished"] == 0 and cost["minutes"] is not None
    assert not (run / "retraining").exists() and not (run / "evaluation").exists()
    capsys.readouterr()
    main([*map(str, asked), "--json"])
    printed = capsys.readouterr()
    assert "prove: 6 of 6 models to train, about" in printed.err
    shown = json.loads(printed.out)
    (row,) = shown["rows"]
    assert row["method"] == "retrac" and row["query"] == "generated-1" and row["L2 top"] > 0
    assert shown["findings"][0].startswith(
        "Without the 2 training images that retrac ranks first, the loss on generated-1"
    )
    (folder,) = (run / "evaluation").glob("counterfactual-*")
    assert shown["page"] == str(folder / "index.html")
    assert {p.name for p in folder.iterdir()} == {
        "index.html",
        "counterfactual.json",
        "counterfactual.md",
        "images.safetensors",
    }
    assert len(open_images(folder / "images.safetensors")) == 6
    assert answer(capsys, *asked, "--plan")["rows"][0]["finished"] == 6
    capsys.readouterr()
    main([*map(str, asked)])
    assert "page: " in capsys.readouterr().out


def test_prove_says_what_is_missing(run, capsys):
    (generated,) = (run / "generated").iterdir()
    asked = ["prove", run, "--queries", generated, *AGAIN, "--plan"]
    assert "no scores of tracin for these queries yet" in fails(capsys, *asked, "--methods", "tracin", "--top", "2")
    assert "top must be one or more different numbers from 1 to 8, found 50" in fails(capsys, *asked)
    assert "are not in" in fails(capsys, *asked, "--ids", "generated-9", "--top", "2")
    assert "at least two" in fails(capsys, *asked, "--top", "2", "--seeds", "1")


def test_clean_writes_a_new_data_set_and_says_why(run, tmp_path, capsys):
    (scores,) = (run / "scores").glob("retrac-*")
    asked = ["clean", run, "--validation", scores]
    dry = answer(capsys, *asked, "--dry-run")
    assert dry["kept"] == "8 of 9" and not (tmp_path / "clean").exists()
    (row,) = [row for row in dry["rows"] if row["reason"] == "duplicate"]
    assert (row["id"], row["duplicate of"]) == ("even/copy.png", "even/0.png")
    done = answer(capsys, *asked, "--out", tmp_path / "clean")
    assert done["rows"] == dry["rows"] and done["images"] == str(tmp_path / "clean" / "images")
    kept = open_images(done["images"])
    assert len(kept) == 8 and "even/copy.png" not in kept.ids
    assert {p.name for p in (tmp_path / "clean").iterdir()} == {"images", "removed.csv", "kept.csv", "manifest.json"}
    main(["train", done["images"], "--out", str(tmp_path / "again"), *TRAIN])
    assert np.isfinite(open_images(done["images"]).pixels([0])).all()


def test_clean_refuses_what_makes_no_sense(run, tmp_path, capsys):
    assert "one of the two" in fails(capsys, "clean", run)
    assert "one of the two" in fails(capsys, "clean", run, "--dry-run", "--out", tmp_path / "new")
    assert f"{tmp_path} exists" in fails(capsys, "clean", run, "--out", tmp_path)
    assert "near must be 0 or above" in fails(capsys, "clean", run, "--dry-run", "--near", "-1")
    main(["self", str(run), "--kind", "self_expected", *TRACE])
    assert "self-influence of several kinds" in fails(capsys, "clean", run, "--dry-run")
    (one,) = (run / "scores").glob("self_norm-*")
    assert answer(capsys, "clean", run, "--dry-run", "--self-scores", one)["kept"] == "8 of 9"
