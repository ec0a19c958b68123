"""Benchmarks run and write what they promise. Figures of costs want a quiet machine and a longer run."""

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from whence.attribution import trace
from whence.config import DataSettings, ModelSettings, TraceSettings, TrainingSettings
from whence.methods import Grid
from whence.opening import train_run

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SCRIPT = BENCHMARKS / "engine.py"


@pytest.fixture
def benchmark_modules(monkeypatch):
    """Import scripts from where they find each other."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


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


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """A small run of the demo's images."""
    return train_run(
        tmp_path_factory.mktemp("toy") / "run",
        "demo",
        data_settings=DataSettings(resolution=8),
        model_settings=ModelSettings(widths=(8, 8), norm_groups=4),
        settings=TrainingSettings(epochs=1, batch_size=250, checkpoints=1),
        show_progress=False,
    )


def test_reliability_of_designs_is_tabulated(toy, tmp_path):
    command = [sys.executable, str(BENCHMARKS / "reliability.py"), str(toy.folder), "--queries", "2"]
    command += ["--passes", "16", "32", "--reference", "9", "2", "--repetitions", "1"]
    files = ["--json", str(tmp_path / "out.json"), "--markdown", str(tmp_path / "out.md")]
    made = subprocess.run([*command, *files], check=True, capture_output=True, text=True, timeout=300)
    result, text = json.loads((tmp_path / "out.json").read_text()), (tmp_path / "out.md").read_text()
    assert text in made.stdout
    names = {cell["design"] for cell in result["cells"]}
    assert {"random", "even", "midpoints", "stratified", "antithetic", "importance, pilot"} <= names
    # the pilot's passes count, and 16 of them leave nothing
    assert {c["passes"] for c in result["cells"] if c["design"] == "importance, pilot"} == {32}
    for name in ("tracin", "retrac"):
        assert all(-1 <= value <= 1 for cell in result["cells"] for value in cell[name]["spearman"])
        assert len(result["ceiling"][name]) == 2
        assert text.count(f"| {name}: design |") == 1
    assert text.count("| even |") == 2 + 6 and text.count("| 16 x 2 |") == 1
    assert [budget["path"][0] for budget in result["budgets"]] == [16] * 6  # the reference has too few draws for pairs


def test_even_design_scores_as_trace_does(toy, tmp_path, benchmark_modules):
    reliability = benchmark_modules("reliability")
    queries = toy.open_queries("demo-queries").select(range(2))
    found = reliability.Bench(toy.subject, queries).grid(Grid(8, 4), seed=3)
    settings = TraceSettings(timesteps=8, draws=4, seed=3)
    traced = trace(toy.subject, queries, reliability.METHODS, settings, tmp_path / "traced", show_progress=False)
    for name, scores in traced.items():
        assert scores.train_ids == toy.subject.train.ids
        for mine, own in ((found[name][0], scores.values), (found[name][1:3], scores.halves)):
            np.testing.assert_allclose(mine, own, atol=1e-5 * np.abs(own).max())
        np.testing.assert_allclose(found[name][3:5].sum(0), found[name][0], atol=1e-5 * np.abs(scores.values).max())


def test_points_of_designs(benchmark_modules):
    designs = benchmark_modules("designs")
    lengths = np.linspace(3.0, 1.0, 999)
    for design in designs.DESIGNS:
        points = design.points(32, 999, np.random.default_rng(0), lengths)
        before = designs.PILOT if design.lengths == "pilot" else 0
        assert len(points.timesteps) * points.draws + before == 32, design.name
        assert points.shares.sum() == pytest.approx(1)
        assert 1 <= points.timesteps.min() and points.timesteps.max() <= 999
    # What a point counts is one over its density: here gradients are shorter later on, so that points are fewer there.
    of_length = designs.by_length(16, 1, 999, lengths)
    np.testing.assert_allclose(of_length.shares * lengths[of_length.timesteps - 1], lengths.mean() / 16, rtol=0.02)
    assert np.all(np.diff(of_length.shares) > 0)
    flat = designs.by_length(16, 1, 999, np.ones(999))
    np.testing.assert_array_equal(flat.timesteps, designs.midpoints(16, 999))


def test_mirrored_draws_are_opposite_wherever_their_points_are(toy, benchmark_modules):
    designs = benchmark_modules("designs")
    queries = toy.open_queries("demo-queries").select(range(1))
    points = designs.equal(np.array([5, 900]), 4, mirrored=True)
    table = designs.events_of(queries, [points], 0, 1000)
    assert table.noise_key[::2].tolist() == table.noise_key[1::2].tolist() and len(set(table.noise_key.tolist())) == 4
    assert table.negated.tolist() == [False, True] * 4
    assert table.timestep.tolist() == [5] * 4 + [900] * 4


def test_passes_to_a_target_are_where_a_curve_stays_there(benchmark_modules):
    reliability = benchmark_modules("reliability")
    curve = [(16, 0.91), (32, 0.89), (64, 0.91), (128, 0.97)]
    assert reliability.passes_to(0.9, curve) == "45"  # half way from 32 to 64, the logarithm counted
    assert reliability.passes_to(0.85, curve) == "≤ 16"
    assert reliability.passes_to(0.98, curve) == "> 128"


def test_costs_of_a_lora_are_tabulated(tmp_path):
    command = [sys.executable, str(BENCHMARKS / "lora.py"), "--smoke", "--markdown", str(tmp_path / "lora.md")]
    subprocess.run(command, check=True, capture_output=True, timeout=200)
    text = (tmp_path / "lora.md").read_text()
    for path in ("plain step", "projected rows, exact norms", "exact dots, 176 vectors"):
        assert text.count(f"| {path} |") == 2
    off = [float(found) for found in re.findall(r"by at most (\S+) of both lengths", text)]
    assert len(off) == 2 and max(off) < 1e-5  # float32 sums in another order
