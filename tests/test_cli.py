"""The command line as a user meets it: whole flow, help, JSON, and bad input."""

import errno
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from conftest import TOY_MODEL, TOY_TRAINING, toy_images
from whence.cli import main
from whence.data import save_arrays
from whence.scores import Scores
from whence.training import train

TRACE = ["--timesteps", "4", "--draws", "2", "--phases", "2"]
TRAIN = ["--epochs", "2", "--batch-size", "4", "--checkpoints", "2", "--widths", "8", "8", "--norm-groups", "4"]


def save_pngs(folder, count=6, size=8, seed=0):
    """Write random pictures, half of them in a folder of its own."""
    rng = np.random.default_rng(seed)
    for k in range(count):
        path = folder / ("odd" if k % 2 else "even") / f"{k}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (size, size, 3), dtype=np.uint8)).save(path)
    return folder


@pytest.fixture
def images(tmp_path):
    return save_pngs(tmp_path / "images")


@pytest.fixture
def run(tmp_path, images):
    """A run that the command line trained."""
    main(["train", str(images), "--out", str(tmp_path / "run"), *TRAIN])
    return tmp_path / "run"


def fails(capsys, *arguments):
    """Run a command that must end with status 1; give what it says."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        main([str(a) for a in arguments])
    assert isinstance(exit_.value.code, str), exit_.value.code
    assert exit_.value.code.startswith("whence: ")
    return exit_.value.code


def answer(capsys, *arguments):
    """Run a command with --json; give what it prints."""
    capsys.readouterr()
    main([*(str(a) for a in arguments), "--json"])
    return json.loads(capsys.readouterr().out)


def test_the_whole_flow_from_images_to_a_page(run, tmp_path, capsys):
    queries = save_pngs(tmp_path / "queries", count=2, seed=1)
    assert {row["verdict"] for row in answer(capsys, "check", run)["rows"]} == {"passed"}
    traced = answer(
        capsys, "trace", run, "--queries", queries, *TRACE, "--methods", "tracin", "retrac", "pixels", "random"
    )
    assert len(traced["rows"]) == 4 * 2 * 5
    assert {row["train id"] for row in traced["rows"]} <= {f"{'odd' if k % 2 else 'even'}/{k}.png" for k in range(6)}
    page = answer(capsys, "report", run, "--planted", "odd")
    assert [row["method"] for row in page["rows"]] == ["tracin", "retrac", "pixels", "random", "chance"]
    html = (run / "report" / "index.html").read_text()
    assert page["page"] == str(run / "report" / "index.html") and "odd/1.png" in html
    assert len(answer(capsys, "self", run)["rows"]) == 6
    assert len(answer(capsys, "self", run, "--kind", "self_expected", "--method", "retrac", *TRACE)["rows"]) == 6
    shown = {row["what"]: row["value"] for row in answer(capsys, "show", run)["rows"]}
    assert shown["visits"] == 12 and shown["optimizer steps"] == 4 and "scores retrac" in shown
    scores = next((run / "scores").glob("retrac-*"))
    assert answer(capsys, "show", scores)["rows"] == [row for row in traced["rows"] if row["method"] == "retrac"]


def test_a_table_without_json_has_aligned_columns(run, capsys):
    capsys.readouterr()
    main(["check", str(run)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["what", "verdict", "visits", "detail"]
    assert lines[2].startswith("keys") and lines[2].index("passed") == lines[0].index("verdict")


def test_show_hands_out_the_events_themselves(run, tmp_path, capsys):
    shown = answer(capsys, "show", run, "--events", "even/0.png", "odd/1.png", "--npz", tmp_path / "events.npz")
    assert [row["train id"] for row in shown["rows"]] == ["even/0.png", "odd/1.png"]
    arrays = np.load(tmp_path / "events.npz")
    assert arrays["noisy"].shape == (2, 3, 8, 8)
    assert arrays["timesteps"].tolist() == [row["timestep"] for row in shown["rows"]]
    np.testing.assert_array_equal(arrays["target"], arrays["noise"])
    every = answer(capsys, "show", run, "--events", "even/0.png", "--replay", "all")
    assert len(every["rows"]) == 1  # one epoch between two checkpoints


def test_a_folder_of_diffusers_checkpoints_that_whence_did_not_write(run, images, tmp_path, capsys):
    foreign = tmp_path / "output"
    checkpoints = sorted((run / "checkpoints").glob("checkpoint-*"))
    for checkpoint in checkpoints:
        shutil.copytree(checkpoint / "unet", foreign / checkpoint.name / "unet")
    shutil.copytree(checkpoints[0] / "scheduler", foreign / "scheduler")
    before = sorted(p.relative_to(foreign) for p in foreign.rglob("*"))
    assert "--data" in fails(capsys, "trace", foreign, "--queries", images, *TRACE)
    assert "--out" in fails(capsys, "trace", foreign, "--queries", images, "--data", images, *TRACE)
    out = tmp_path / "traced"
    traced = answer(capsys, "trace", foreign, "--queries", images, "--data", images, "--out", out, *TRACE)
    assert "no record of training" in traced["notes"][0]
    main(["report", str(out)])
    assert "no record of training" in (out / "report" / "index.html").read_text()
    assert sorted(p.relative_to(foreign) for p in foreign.rglob("*")) == before
    assert "no record of training" in fails(capsys, "check", out)
    assert "needs a record" in fails(capsys, "self", out)


def test_training_again_with_other_settings_is_refused_and_the_run_kept(run, images, capsys):
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    message = fails(capsys, "train", images, "--out", run, *TRAIN, "--learning-rate", "0.5")
    assert "config.learning_rate is 0.001 in the record, 0.5 now" in message
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before


def test_a_failed_check_ends_with_status_1(run, images, capsys):
    import pyarrow.parquet as pq

    from whence._files import sha256_of_file

    part = next((run / "record").glob("visits-*.parquet"))
    table = pq.read_table(part)
    flips = table["flip"].to_pylist()
    table = table.set_column(
        table.schema.get_field_index("flip"), table.schema.field("flip"), [[not flips[0], *flips[1:]]]
    )
    old = sha256_of_file(part)
    pq.write_table(table, part)
    assert "damaged or was altered" in fails(capsys, "check", run)
    parts = run / "record" / "parts-0.json"
    parts.write_text(
        parts.read_text().replace(old, sha256_of_file(part))
    )  # whoever alters it may also mend the checksum
    with pytest.raises(SystemExit) as exit_:
        main(["check", str(run)])
    assert exit_.value.code == 1
    assert "flip" in capsys.readouterr().out


def empty_folder(path):
    path.mkdir()
    return path


def text_named_png(path):
    save_pngs(path)
    (path / "even" / "note.png").write_text("not a picture")
    return path


def two_sizes(path):
    save_pngs(path)
    Image.new("RGB", (12, 9)).save(path / "odd" / "large.png")
    return path


def truncated(path):
    save_pngs(path, size=64)
    file = path / "even" / "0.png"
    file.write_bytes(file.read_bytes()[:2000])
    return path


@pytest.mark.parametrize(
    "make, message",
    [
        (empty_folder, "no images|holds no"),
        (text_named_png, r"even/note\.png"),
        (two_sizes, "resolution"),
        (truncated, r"even/0\.png"),
        (lambda path: path, "does not exist|no such"),
    ],
)
def test_images_that_cannot_be_used_are_refused_before_anything_is_written(tmp_path, capsys, make, message):
    said = fails(capsys, "train", make(tmp_path / "images"), "--out", tmp_path / "run", *TRAIN)
    assert re.search(message, said, re.IGNORECASE), said
    assert not (tmp_path / "run").exists()


def test_one_image_alone_can_be_trained_on_and_traced(tmp_path, capsys):
    one = save_pngs(tmp_path / "one", count=1)
    main(["train", str(one), "--out", str(tmp_path / "run"), *TRAIN])
    traced = answer(capsys, "trace", tmp_path / "run", "--queries", one, *TRACE)
    assert {row["rank"] for row in traced["rows"]} == {1}
    main(["report", str(tmp_path / "run")])


def test_queries_of_another_size_are_brought_to_the_runs_resolution_or_refused(run, tmp_path, capsys):
    large = save_pngs(tmp_path / "large", count=2, size=20)
    assert "8 x 8" in fails(capsys, "trace", run, "--queries", large, *TRACE)


def test_a_record_that_does_not_match_the_images_is_refused(run, tmp_path, capsys):
    other = save_pngs(tmp_path / "other", seed=5)
    message = fails(capsys, "trace", run, "--queries", other, "--data", other, *TRACE)
    assert "not those that were trained on" in message
    fewer = save_pngs(tmp_path / "fewer", count=3)
    assert "of other images" in fails(capsys, "trace", run, "--queries", other, "--data", fewer, *TRACE)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--memory", "8"], "memory must be a number above 0 with a unit, such as 8GiB, 512MiB or 8GB; found '8'"),
        (["--memory", "nan GiB"], "memory must be a number above 0"),
        (["--memory", "0GB"], "memory must be a number above 0"),
        (["--methods", "retrack"], "Unknown method 'retrack'; known are tracin, retrac"),
        (["--draws", "3"], "even number"),
        (["--weights-name", "ema"], "no averaged weights"),
        (["--loss", "l1"], "contradicts"),
        (["--queries"], "at least one query"),
    ],
)
def test_settings_that_cannot_be_met_are_refused(run, images, capsys, arguments, message):
    assert message in fails(capsys, "trace", run, "--queries", images, *TRACE, *arguments)


def test_a_report_or_show_of_nothing_says_what_to_do(run, tmp_path, capsys):
    assert "whence trace" in fails(capsys, "report", run)
    assert "nobody.png" in fails(capsys, "show", run, "--events", "nobody.png")
    assert "not a folder" in fails(capsys, "show", tmp_path / "nowhere")
    assert "holds no checkpoint" in fails(capsys, "show", empty_folder(tmp_path / "empty"))


def test_a_full_disk_is_told_without_a_traceback(run, images, capsys, monkeypatch):
    def full(*arguments, **settings):
        raise OSError(errno.ENOSPC, "No space left on device", "tile.safetensors")

    monkeypatch.setattr("whence._array_files.save_file", full)
    message = fails(capsys, "trace", run, "--queries", images, *TRACE)
    assert "No space left on device" in message and "goes on from there" in message
    monkeypatch.undo()
    assert answer(capsys, "trace", run, "--queries", images, *TRACE)["rows"]


@pytest.mark.parametrize(
    "command",
    ["demo", "train", "sample", "trace", "plan", "self", "retrain", "evaluate", "diagnose", "report", "check", "show"],
)
def test_help_is_complete(command, capsys):
    with pytest.raises(SystemExit) as exit_:
        main([command, "--help"])
    assert exit_.value.code == 0
    out = capsys.readouterr().out
    assert "--json" in out
    # tyro prints an option without a help text as its name and "(default: ...)" alone.
    plain = re.sub(r"[|│+]", " ", out)
    assert not re.findall(r"^ *(--\S+)(?: \S+)? +\((?:default|required)", plain, re.MULTILINE)


def test_an_unknown_option_ends_with_status_2(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["trace", "run", "--queries", "x", "--time-steps", "4"])
    assert exit_.value.code == 2


def test_a_reader_that_goes_away_is_not_an_error(tmp_path, toy_train):
    save_arrays(tmp_path / "images.safetensors", toy_train.pixels(range(10)), toy_train.ids)
    train(tmp_path / "run", toy_images(10), TOY_MODEL, TOY_TRAINING, show_progress=False)
    program = f"{sys.executable} -m whence show {tmp_path / 'run'} | true"
    done = subprocess.run(["bash", "-c", program], capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr


def test_fresh_removes_a_demo_and_nothing_else(tmp_path, capsys):
    from whence.demo import MARKER, remove_demo
    from whence.errors import ConfigError

    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match="not a demo"):
        remove_demo(tmp_path)
    (tmp_path / "config.yaml").write_text("data: {source: demo}\n")  # a run of the user's on the demo's images
    with pytest.raises(ConfigError, match="not a demo"):
        remove_demo(tmp_path)
    (tmp_path / MARKER).touch()
    remove_demo(tmp_path)
    assert not tmp_path.exists()


def test_a_demo_does_not_go_into_a_folder_of_something_else(run, capsys):
    assert "not a demo" in fails(capsys, "demo", "--out", run)


def test_a_refused_training_leaves_the_runs_configuration(run, images, capsys):
    before = (run / "config.yaml").read_bytes()
    assert "loss is 'mse', not 'l1'" in fails(capsys, "train", images, "--out", run, *TRAIN, "--loss", "l1")
    assert "resolution is None, not 4" in fails(capsys, "train", images, "--out", run, *TRAIN, "--resolution", "4")
    assert (run / "config.yaml").read_bytes() == before


def test_a_configuration_that_contradicts_the_record_is_refused(run, images, capsys):
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("loss: mse", "loss: l1"))
    assert "trained with the loss mse; config.yaml says l1" in fails(capsys, "trace", run, "--queries", images, *TRACE)


def test_images_and_runs_may_be_moved(run, images, tmp_path, capsys):
    images.rename(tmp_path / "elsewhere")
    run.rename(tmp_path / "moved")
    moved, elsewhere = tmp_path / "moved", tmp_path / "elsewhere"
    assert "say with --data" in fails(capsys, "trace", moved, "--queries", elsewhere, *TRACE)
    assert answer(capsys, "trace", moved, "--queries", elsewhere, "--data", elsewhere, *TRACE)["rows"]
    assert answer(capsys, "report", moved, "--data", elsewhere)["page"]
    main(["train", str(elsewhere), "--out", str(moved), *TRAIN])  # finished already: nothing to do, and no complaint
    assert {row["verdict"] for row in answer(capsys, "check", moved)["rows"]} == {"passed"}


def test_one_data_setting_does_not_reset_the_others(tmp_path, capsys):
    large = save_pngs(tmp_path / "large", size=12)
    main(["train", str(large), "--out", str(tmp_path / "run"), "--resolution", "8", *TRAIN])
    assert answer(capsys, "trace", tmp_path / "run", "--queries", large, "--max-megapixels", "50", *TRACE)["rows"]


def test_a_record_without_its_manifest_is_not_taken_for_none(run, images, capsys):
    (run / "record" / "manifest.json").unlink()
    assert "has no manifest.json" in fails(capsys, "trace", run, "--queries", images, *TRACE)


def test_a_run_of_ones_own_loop_is_checked_with_its_images(run, images, capsys):
    (run / "config.yaml").unlink()
    assert "--data" in fails(capsys, "check", run)
    assert {row["verdict"] for row in answer(capsys, "check", run, "--data", images)["rows"]} == {"passed"}
    assert answer(capsys, "self", run, "--data", images)["rows"]


def test_damaged_small_files_are_named(run, images, capsys):
    answer(capsys, "trace", run, "--queries", images, *TRACE)
    latest = run / "scores" / "latest.json"
    latest.write_text("{}")
    assert "latest.json is damaged" in fails(capsys, "report", run)
    next((run / "scores").glob("retrac-*/manifest.json")).write_text("{}")
    shown = answer(capsys, "show", run)["rows"]
    assert any(str(row["value"]).startswith("damaged") for row in shown)
    (run / "config.yaml").write_text("a: b")
    assert "not a configuration of whence" in fails(capsys, "trace", run, "--queries", images, *TRACE)


def test_a_checkpoint_or_a_file_of_events_that_cannot_be(run, capsys):
    assert "2 checkpoints" in fails(capsys, "show", run, "--events", "even/0.png", "--checkpoint", "9")
    assert "--events" in fails(capsys, "show", run, "--npz", "x.npz")


def test_names_of_the_package_are_what_they_say():
    import whence
    import whence.pipeline

    assert whence.events is whence.pipeline.events and callable(whence.events)
    for name in whence.__all__ * 2:  # a module of the same name would take its place the second time
        assert getattr(whence, name).__name__ == name and not isinstance(getattr(whence, name), ModuleType)
    with pytest.raises(AttributeError, match="it has CleaningSettings, CounterfactualSettings, DataSettings"):
        _ = whence.nothing


def test_index_once_query_many_times(run, tmp_path, capsys):
    queries = save_pngs(tmp_path / "queries", count=2, seed=1)
    asked = ["query", run, "--queries", queries, *TRACE]
    assert "There is no store to query" in fails(capsys, *asked)
    assert "--part must be like 2/8" in fails(capsys, "index", run, "--part", "second")
    answer(capsys, "index", run, "--width", "64", "--block-size", "3", "--part", "1/2")
    held = answer(capsys, "index", run, "--width", "64", "--block-size", "3")
    assert [(row["images"], row["rows"]) for row in held["rows"]] == [(6, 6), (6, 6)]
    ranked = answer(capsys, *asked)
    assert {row["method"] for row in ranked["rows"]} == {"tracin", "retrac"}
    top = answer(capsys, *asked, "--methods", "retrac", "--keep-top", "2")
    first = [row for row in ranked["rows"] if row["method"] == "retrac" and row["rank"] <= 2]
    assert [row["train id"] for row in top["rows"]] == [row["train id"] for row in first]
    assert answer(capsys, "show", top["scores"]["retrac"])["rows"] == top["rows"]
    main(["report", str(run)])
    shown = {row["what"]: row["value"] for row in answer(capsys, "show", held["store"])["rows"]}
    assert shown["rows"] == "64 numbers of float16" and "provenance plan" in shown
    assert answer(capsys, "verify", run) == {"rows": [], "verified": 1}
    answer(capsys, "index", run, "--width", "32")
    assert "More than one store serves" in fails(capsys, *asked, "--draws", "4")
    assert answer(capsys, *asked, "--draws", "4", "--store", held["store"])["rows"]
    assert "grad-dot cannot be had from" in fails(capsys, *asked, "--methods", "grad-dot")


def test_stores_are_merged_and_damage_is_named(run, tmp_path, capsys):
    held = answer(capsys, "index", run, "--width", "64")["store"]
    merged = answer(capsys, "merge", tmp_path / "merged", held)
    assert merged["shards_taken_over"] == 2 and [row["images"] for row in merged["rows"]] == [6, 6]
    assert answer(capsys, "verify", tmp_path / "merged")["rows"] == []
    next((tmp_path / "merged").rglob("*.safetensors")).unlink()
    with pytest.raises(SystemExit) as exit_:
        main(["verify", str(tmp_path / "merged")])
    assert exit_.value.code == 1 and "is missing" in capsys.readouterr().out
    assert "is no store, and there is none" in fails(capsys, "verify", tmp_path)


def test_scores_of_two_models_are_averaged(run, images, tmp_path, capsys):
    other = tmp_path / "other"
    main(["train", str(images), "--out", str(other), *TRAIN, "--seed", "1"])
    asked = ["--queries", images / "odd", "--methods", "retrac", *TRACE]
    members = [answer(capsys, "trace", folder, *asked)["scores"]["retrac"] for folder in (run, other)]
    mean = answer(capsys, "ensemble", tmp_path / "mean", *members, "--top", "1")
    assert mean["notes"][0] == "Scores are the mean of 2 members." and len(mean["rows"]) == 3
    values = [Scores.load(folder).values for folder in (*members, tmp_path / "mean")]
    np.testing.assert_allclose(values[2], (values[0] + values[1]) / 2, rtol=1e-5)
    assert answer(capsys, "show", tmp_path / "mean", "--top", "1")["rows"] == mean["rows"]
    assert "exists; the mean goes into a new folder" in fails(capsys, "ensemble", tmp_path / "mean", *members)
    assert "at least two members" in fails(capsys, "ensemble", tmp_path / "one", members[0])


@pytest.mark.filterwarnings("default:width has no effect")
def test_a_plan_is_printed_before_anything_is_traced(run, images, capsys):
    planned = answer(capsys, "plan", run, "--queries", images, *TRACE)
    assert [row["checkpoint"] for row in planned["rows"]] == [2, 4]
    assert {row["query passes"] for row in planned["rows"]} == {6 * 4 * 2}
    assert {row["training passes a turn"] for row in planned["rows"]} == {6}
    assert planned["passes"] == sum(row["in all"] for row in planned["rows"]) == 2 * (48 + 6)
    assert planned["minutes"] >= 0 and planned["memory_bytes"] > 0 and planned["scores_bytes"] > 0
    assert "index_bytes" not in planned and not (run / "scores").exists()
    for queries in ([], ["--queries", str(images), *TRACE]):
        main(["plan", str(run), *queries, "--index", "--width", "64", "--rows", "float32"])
        printed = capsys.readouterr().out
        assert "index" in printed and ("tracin+retrac" in printed) == bool(queries)
    main(["plan", str(run), "--queries", str(images), *TRACE, "--width", "64"])
    assert "note: width has no effect: it is no setting of whence trace" in capsys.readouterr().err
    assert re.search(r"^memory: \d+MiB$", printed, re.MULTILINE) and "index: " in printed
    assert "smallest bound that does" in fails(capsys, "plan", run, "--queries", images, *TRACE, "--memory", "1MiB")


def test_scores_along_the_path_of_the_sampler(run, images, capsys):
    sampled = answer(capsys, "sample", run, "--count", "2", "--steps", "4", "--seed", "5", "--trajectory")["images"]
    main(["sample", str(run), "--count", "2", "--steps", "4", "--seed", "5", "--trajectory"])
    assert capsys.readouterr().out.strip() == sampled  # it is there already
    grid = ["--grid", "--train-timesteps", "3", "--checkpoints", "last", "--width", "256"]
    answer(capsys, "index", run, *grid)
    asked = ["--methods", "journey-trak", "--draws", "2", "--phases", "4", "--damping", "0.1"]
    found = answer(capsys, "query", run, "--queries", sampled, *asked)
    assert [row["query"] for row in found["rows"]] == ["generated-0"] * 5 + ["generated-1"] * 5
    scores = Scores.load(found["scores"]["journey-trak"])
    assert scores.phases.shape == (2, 4, 6)  # one score a step
    assert "journey-trak follows the steps by which a sampler came" in fails(
        capsys, "query", run, "--queries", images, *asked
    )
    same = ["--methods", "matched-cos", "--timesteps", "3", "--draws", "2", "--phases", "1"]
    cosines = Scores.load(answer(capsys, "query", run, "--queries", images, *same)["scores"]["matched-cos"])
    assert cosines.values.shape == (6, 6) and np.abs(cosines.values).max() < 1.1


RETRAIN = ["--subsets", "6", "--seeds", "0", "1", "--timesteps", "2", "--epochs", "6", "--batch-size", "32"]


def test_from_retraining_to_a_table_of_methods(run, tmp_path, capsys):
    validation, other = (
        save_pngs(tmp_path / name, count=2, seed=k) for k, name in enumerate(["val", "other"], start=1)
    )
    save_arrays(tmp_path / "made.safetensors", toy_images(1, "made").pixels([0]), ["made"])
    sets = ["--queries", f"validation={validation}", f"generated={tmp_path / 'made.safetensors'}"]
    made = answer(capsys, "retrain", run, *sets, *RETRAIN)
    assert {(row["queries"], row["count"]) for row in made["rows"]} == {("validation", 2), ("generated", 1)}
    assert {row["measure"] for row in made["rows"]} == {"loss", "mse", "squares", "simplified_elbo", "elbo"}
    assert all(row["spread over subsets"] > 0 for row in made["rows"])
    truth = made["ground_truth"]
    shown = {row["what"]: row["value"] for row in answer(capsys, "show", truth)["rows"]}
    assert shown["subsets"] == "6 of 3 of 6 images" and shown["queries generated"] == 1
    assert truth in [row["value"] for row in answer(capsys, "show", run)["rows"]]

    evaluate = ["evaluate", run, "--ground-truth", truth, "--draws", "20"]
    assert "no scores to compare" in fails(capsys, *evaluate)
    answer(capsys, "trace", run, "--queries", validation, tmp_path / "made.safetensors", *TRACE)
    answer(capsys, "trace", run, "--queries", validation, "--methods", "pixels")
    answer(capsys, "trace", run, "--queries", other, "--methods", "random")
    compared = answer(capsys, *evaluate)
    assert {(row["method"], row["queries"]) for row in compared["rows"]} == {
        *((method, name) for method in ("tracin", "retrac") for name in ("validation", "generated")),
        ("pixels", "validation"),
    }
    assert all(-1 <= row["low"] <= row["high"] <= 1 and 0 <= row["ceiling"] <= 1 for row in compared["rows"])
    assert any("random-" in note and "under the same ids" in note for note in compared["notes"])

    fitted = answer(capsys, *evaluate, "--fit-subsets", "3", "--measure", "mse")
    methods = {row["method"] for row in fitted["rows"]}
    assert methods == {"tracin", "retrac", "pixels", "datamodels", "empirical-influence"}
    again = answer(capsys, *evaluate)
    assert {row["method"] for row in again["rows"]} == methods - {"datamodels", "empirical-influence"}
    assert any("datamodels" in note and "judged by what it was told" in note for note in again["notes"])
    one = next((run / "scores").glob("datamodels-*"))
    assert "was fitted on 3 of the 6 subsets" in fails(capsys, *evaluate, "--scores", one)
    assert "no measure 'fid'; there are loss" in fails(capsys, *evaluate, "--measure", "fid")
    record = json.loads((run / "evaluation" / "lds.json").read_text())
    assert record["ground_truth"] == truth and len(record["subsets"]) == 6
    table = (run / "evaluation" / "lds.md").read_text()
    assert table.startswith("| method | queries | count | LDS |") and "| tracin | validation | 2 |" in table


def test_rankings_are_evaluated_and_diagnosed_without_retraining(run, images, tmp_path, capsys):
    assert "no scores yet" in fails(capsys, "evaluate", run)
    answer(capsys, "trace", run, "--queries", images, *TRACE, "--methods", "tracin", "retrac", "pixels")
    found = answer(capsys, "evaluate", run, "--k", "2")
    pixels, chance = ({**row} for row in found["rows"][-2:])
    assert pixels["self-rank"] == 1 and chance["self-rank"] == 3.5  # the queries are the six training images
    assert 0 < pixels["precision@2"] <= 1 and chance["method"] == "chance"
    assert Path(found["table"]).read_text().startswith("| method | precision@2 |")
    planted = answer(capsys, "evaluate", run, "--k", "2", "--planted", "odd")
    assert "false@2" in planted["rows"][0]

    flipped = tmp_path / "flipped.txt"
    flipped.write_text("odd/1.png\n")
    assert "make some with `whence self RUN`" in fails(capsys, "evaluate", run, "--flipped", flipped)
    answer(capsys, "self", run)
    (detected,) = answer(capsys, "evaluate", run, "--flipped", flipped)["more"]
    assert [row["method"] for row in detected["rows"]] == ["self_norm", "chance"]

    table = answer(capsys, "diagnose", run, "--count", "1", "--timesteps", "3", "--k", "2")
    assert [row["method"] for row in table["rows"]] == ["tracin", "retrac"]
    curves, moved = table["more"]
    assert len(curves["rows"]) == 2 and all(1 <= row["mean rank"] <= 6 for row in moved["rows"])
    bias = json.loads((run / "evaluation" / "bias.json").read_text())
    assert len(bias["samples"]) == 1 and len(bias["samples"][0]["checkpoints"][0]["norms"]) == 3
    page = Path(answer(capsys, "report", run)["page"]).read_text()
    assert page.count('class="question"') == 5
    small = answer(capsys, "trace", run, "--queries", images, *TRACE, "--until", "0.01", "--until-of", "worst")
    budget = Scores.load(small["scores"]["retrac"]).details["budget"]
    assert budget["of"] == "worst" and budget["rounds"][0]["timesteps"] == 4
    answer(capsys, "index", run)
    until = ["query", run, "--queries", images, "--timesteps", "2", "--draws", "2", "--until", "0.01"]
    assert "leave keep_top out" in fails(capsys, *until, "--keep-top", "2")
    answer(capsys, *until)
    stored = answer(capsys, "diagnose", run)
    assert not stored["more"] and any("No intervention" in note for note in stored["notes"])


def test_what_retraining_makes_cannot_be_traced(run, images, capsys):
    assert "whence retrain" in fails(capsys, "trace", run, "--queries", images, *TRACE, "--methods", "datamodels")
    assert "whence retrain" in fails(capsys, "query", run, "--queries", images, "--methods", "empirical-influence")


def test_sets_of_queries_are_named_before_an_equals_sign():
    from whence._cli_evaluation import _query_sets

    assert _query_sets(["a=x", "b/c=d.png", "a=y=z", "plain"]) == {"a": ["x", "y=z"], "queries": ["b/c=d.png", "plain"]}
