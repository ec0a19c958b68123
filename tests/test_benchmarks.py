"""Benchmarks run and write what they promise. Figures of costs want a quiet machine and a longer run."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from whence.config import DataSettings, ModelSettings, TrainingSettings
from whence.opening import train_run

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SCRIPT = BENCHMARKS / "engine.py"


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """What a run without peers on a toy writes."""
    folder = tmp_path_factory.mktemp("benchmark")
    files = ["--json", str(folder / "engine.json"), "--markdown", str(folder / "engine.md")]
    command = [sys.executable, str(SCRIPT), "--smoke", "--no-peers", "--threads", "1", *files]
    subprocess.run(command, check=True, capture_output=True, timeout=200)
    return json.loads((folder / "engine.json").read_text()), (folder / "engine.md").read_text()


def test_json_says_what_was_measured_where(smoke):
    about = smoke[0]["about"]
    assert about["threads"] == 1
    assert {"torch", "diffusers", "whence"} <= about["versions"].keys()
    assert {"date", "device", "command", "batch_size"} <= about.keys()


def test_every_path_is_measured(smoke):
    rows = smoke[0]["rows"]
    assert {"exact norms", "exact dots, 16 vectors", "query side", "batch-of-one loop"} <= {row["path"] for row in rows}
    for row in rows:
        assert row["error"] is None, row
        assert row["ratio"] > 0
        assert row["low"] <= row["ratio"] <= row["high"]
        assert row["bound"] is None or row["bound"] > 0
        if sys.platform == "linux":
            assert row["memory"] >= 0


def test_exact_paths_agree_with_the_loop(smoke):
    exact = [row for row in smoke[0]["rows"] if "projected" not in row["path"]]
    # float32 sums in another order
    assert all(row["scores_off"] < 1e-5 for row in exact if row["scores_off"] is not None)
    norms = [row["norms_off"] for row in smoke[0]["rows"] if row["norms_off"] is not None]
    assert len(norms) >= 4
    assert max(norms) < 1e-5


def test_tables_have_a_line_for_every_path(smoke):
    result, text = smoke
    for row in result["rows"]:
        assert f"| {row['path']} |" in text


@pytest.fixture(scope="module")
def agreement(tmp_path_factory):
    """What the comparison with formulas alone writes on a toy."""
    folder = tmp_path_factory.mktemp("agreement")
    files = ["--json", str(folder / "agreement.json"), "--markdown", str(folder / "agreement.md")]
    command = [sys.executable, str(BENCHMARKS / "agreement.py"), "--smoke", "--no-peers", *files]
    subprocess.run(command, check=True, capture_output=True, timeout=280)
    return json.loads((folder / "agreement.json").read_text()), (folder / "agreement.md").read_text()


def test_scores_are_those_of_the_formulas(agreement):
    result, text = agreement
    names = {row["scores"] for row in result["rows"]}
    assert {"tracin", "retrac", "retrac-adam", "gas", "trak", "trak, all checkpoints", "d-trak", "das"} <= names
    for row in result["rows"]:
        assert row["error"] is None, row
        assert row["spearman"] > 0.999, row
        # rows of a store are float32, the optimizer's state too
        assert row["distance"] < 1e-5 and abs(row["factor"] - 1) < 1e-5, row
        assert f"| {row['scores']} | formula |" in text


def test_reliability_of_growing_grids_is_tabulated(tmp_path):
    train_run(
        tmp_path / "run",
        "demo",
        data_settings=DataSettings(resolution=8),
        model_settings=ModelSettings(widths=(8, 8), norm_groups=4),
        settings=TrainingSettings(epochs=1, batch_size=250, checkpoints=1),
        show_progress=False,
    )
    command = [sys.executable, str(BENCHMARKS / "reliability.py"), str(tmp_path / "run"), "--queries", "1"]
    command += ["--largest", "9", "2", "--json", str(tmp_path / "out.json")]
    made = subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
    results = json.loads((tmp_path / "out.json").read_text())
    assert [(r["timesteps"], r["draws"]) for r in results] == [(8, 2), (9, 2), (8, 16)]
    assert all(-1 <= r[m]["spearman"] <= 1 for r in results for m in ("tracin", "retrac"))
    assert "| 8 x 2 | 16 |" in made.stdout and "`--until 0.95` takes 16" in made.stdout


def test_costs_of_a_lora_are_tabulated(tmp_path):
    command = [sys.executable, str(BENCHMARKS / "lora.py"), "--smoke", "--markdown", str(tmp_path / "lora.md")]
    subprocess.run(command, check=True, capture_output=True, timeout=200)
    text = (tmp_path / "lora.md").read_text()
    for path in ("plain step", "projected rows, exact norms", "exact dots, 176 vectors"):
        assert text.count(f"| {path} |") == 2
    off = [float(found) for found in re.findall(r"by at most (\S+) of both lengths", text)]
    assert len(off) == 2 and max(off) < 1e-5  # float32 sums in another order
