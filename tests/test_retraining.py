"""Retraining: that models are those of a plain training, shared work, kills, and trainers of one's own.

python tests/test_retraining.py FOLDER OUT       what the tests run in processes of their own
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import TOY_MODEL, TOY_TRAINING, toy_images
from whence.checkpoints import list_checkpoints, load_model, load_scheduler
from whence.config import ObjectiveSettings, RetrainingSettings
from whence.diffusion.process import NoiseProcess
from whence.errors import ConfigError, DataError, RetrainingError
from whence.ground_truth import GroundTruth
from whence.measuring import make_grid, measure_model
from whence.record import Record
from whence.retraining import retrain
from whence.subject import Subject
from whence.subsets import draw_subsets
from whence.training import train

SETTINGS = RetrainingSettings(subsets=4, seeds=(0, 5), timesteps=3, batch_size=16)
MODEL = replace(TOY_MODEL, widths=(4, 4), attention_levels=0, norm_groups=2)
TRAINING = replace(TOY_TRAINING, epochs=2, checkpoints=1)
QUERIES = {"validation": toy_images(2, "query", seed=1), "generated": toy_images(1, "made", seed=2)}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A trained run; read only."""
    folder = tmp_path_factory.mktemp("retrain") / "run"
    train(folder, toy_images(10), MODEL, TRAINING, show_progress=False)
    return folder


def subject_of(run, with_record=True):
    record = Record.open(run / "record") if with_record else None
    return Subject(list_checkpoints(run), toy_images(10), record, "mse")


def quick(run, folder, queries=None, **changes) -> GroundTruth:
    settings = replace(SETTINGS, **changes)
    return retrain(subject_of(run), queries or QUERIES, settings, folder, show_progress=False)


def own(run, folder, trainer, **changes) -> GroundTruth:
    """Retrain with a trainer of one's own, where nothing else is known of the training."""
    subject, settings = subject_of(run, with_record=False), replace(SETTINGS, trainer=trainer, **changes)
    return retrain(subject, QUERIES, settings, folder, show_progress=False)


@pytest.fixture(scope="module")
def truth(run, tmp_path_factory):
    return quick(run, tmp_path_factory.mktemp("truth"))


@contextmanager
def cpu_threads(count: int):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def bytes_of(truth: GroundTruth) -> dict[str, bytes]:
    assert truth.folder is not None
    return {file.name: file.read_bytes() for file in sorted(truth.folder.iterdir())}


def test_models_are_those_of_a_plain_training_on_the_subset(truth, tmp_path):
    images = toy_images(10)
    subsets = draw_subsets(images.ids, 4, 0.5, 0)
    np.testing.assert_array_equal(truth.subsets, subsets)
    assert truth.seeds == (0, 5) and truth.query_sets == ("validation", "validation", "generated")
    assert truth.query_ids == ("query-0", "query-1", "made-0")
    for subset, seed in [(0, 0), (3, 1)]:
        part, settings = images.select(np.flatnonzero(subsets[subset])), replace(TRAINING, seed=truth.seeds[seed])
        with cpu_threads(SETTINGS.threads):  # another number of threads adds up in another order
            checkpoint = train(tmp_path / f"{subset}-{seed}", part, MODEL, settings, show_progress=False)
        assert truth.models[subset][seed] == checkpoint.content_hash()
        process = NoiseProcess.from_scheduler(load_scheduler(checkpoint))
        for name, queries in QUERIES.items():
            grid = make_grid(queries.ids, 3, 2, process.num_timesteps, 0)
            measured = measure_model(load_model(checkpoint), process, queries, grid, loss="mse", batch_size=4)
            of_set = np.array([s == name for s in truth.query_sets])
            np.testing.assert_allclose(truth.outputs[:, subset, seed, of_set], measured.outputs, rtol=1e-5)
            np.testing.assert_allclose(truth.timestep_loss[subset, seed, of_set], measured.timestep_loss, rtol=1e-5)
            np.testing.assert_array_equal(truth.timesteps[of_set], grid.timesteps)
    assert len({m for row in truth.models for m in row}) == 8
    assert "4 subsets of 5 of 10 images, drawn plainly" in truth.notes[0] and "2 epochs" in truth.notes[1]


def test_nothing_but_outputs_stays_and_nothing_is_made_twice(run, truth):
    root = truth.folder.parent.parent
    left = {p.name.split("-")[0] for p in (root / "retraining").glob("*/*") if p.suffix != ".lock"}
    assert left == {"manifest.json", "outputs", "models"} and not list((root / "retraining").glob("*/.subset*"))
    assert not list((root / "retraining").glob("*/models/*"))
    times = {p: p.stat().st_mtime_ns for p in root.rglob("*") if p.is_file()}
    quick(run, root)
    assert {p: p.stat().st_mtime_ns for p in root.rglob("*") if p.is_file()} == times


def test_more_subsets_and_seeds_use_what_is_there(run, truth, tmp_path, monkeypatch):
    shutil.copytree(truth.folder.parent.parent, tmp_path / "run")
    trained = []
    plain = train
    monkeypatch.setattr(
        "whence._trainers.train", lambda folder, *a, **k: (trained.append(folder.name), plain(folder, *a, **k))
    )
    more = quick(run, tmp_path / "run", subsets=5, seeds=(5, 0, 7))
    assert sorted(trained) == sorted(
        ["subset-0004-seed-0", "subset-0004-seed-5", *(f"subset-000{m}-seed-7" for m in range(5))]
    )
    np.testing.assert_array_equal(more.outputs[:, :4, [1, 0]], truth.outputs)
    np.testing.assert_array_equal(more.subsets[:4], truth.subsets)


def test_kept_models_serve_other_queries_and_stay(run, tmp_path, monkeypatch):
    kept = quick(run, tmp_path, subsets=2, seeds=(0,), keep_models=True)
    models = sorted((tmp_path / "retraining").glob("*/models/*"))
    assert [m.name for m in models] == ["subset-0000-seed-0", "subset-0001-seed-0"]
    assert list_checkpoints(models[1])[-1].content_hash() == kept.models[1][0]
    monkeypatch.setattr("whence.training._Loop.step", lambda self: pytest.fail("trained again"))
    other = {"other": toy_images(2, "other", seed=7)}
    measured = quick(run, tmp_path, other, subsets=2, seeds=(0,))
    assert measured.models == kept.models and measured.query_sets == ("other", "other")
    assert sorted((tmp_path / "retraining").glob("*/models/*")) == models


def test_models_that_are_gone_cannot_be_kept(run, tmp_path):
    quick(run, tmp_path, subsets=1, seeds=(0,))
    with pytest.warns(UserWarning, match="keep_models comes too late for 1 models"):
        quick(run, tmp_path, subsets=2, seeds=(0,), keep_models=True)


def test_workers_change_no_byte_but_what_says_so(run, truth, tmp_path):
    assert bytes_of(quick(run, tmp_path, workers=2)) == bytes_of(truth)


def test_same_steps_lengthens_training(run, tmp_path):
    longer = quick(run, tmp_path, subsets=1, seeds=(0,), same_steps=True)
    # 2 epochs of 3 batches over 10 images, and 3 epochs of 2 batches over 5
    assert "Each model took 3 epochs over its subset, 6 optimizer steps." in longer.notes


def start(run, folder):
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path]),
    }
    return subprocess.Popen([sys.executable, __file__, str(run), str(folder)], env=environment, stderr=subprocess.PIPE)


def wait_for_outputs(folder, count, deadline_s=120):
    end = time.monotonic() + deadline_s
    while len(list(folder.glob("retraining/*/outputs-*/*.npz"))) < count:
        assert time.monotonic() < end
        time.sleep(0.005)


def test_killed_and_run_again_gives_the_same_bytes(run, truth, tmp_path):
    rng = random.Random(0)
    for count in (1, 4):
        process = start(run, tmp_path)
        wait_for_outputs(tmp_path, count)
        time.sleep(rng.uniform(0, 0.2))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        for path in tmp_path.glob("retraining/*/outputs-*/subset*.npz"):
            np.load(path).close()  # whole, whenever it was killed
    assert bytes_of(quick(run, tmp_path)) == bytes_of(truth)
    assert not list((tmp_path / "retraining").glob("*/models/*"))


def test_two_processes_share_the_work_and_one_may_be_killed(run, truth, tmp_path):
    first, second = start(run, tmp_path), start(run, tmp_path)
    wait_for_outputs(tmp_path, 2)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    assert second.communicate(timeout=200)[1] is not None and second.returncode == 0
    (folder,) = (tmp_path / "ground_truth").iterdir()
    assert bytes_of(GroundTruth.load(folder)) == bytes_of(truth)


class TestOwnTrainers:
    def test_a_function_gets_ids_and_seed(self, run, tmp_path):
        found = own(run, tmp_path, "own_trainers:save_shifted", subsets=3)
        self.check(found, tmp_path)

    def test_an_objective_weighs_what_is_measured(self, run, tmp_path):
        plain = subject_of(run, with_record=False)
        weighted = replace(plain, objective=ObjectiveSettings(snr_gamma=5.0))
        settings = replace(SETTINGS, trainer="own_trainers:save_shifted", subsets=1)
        one, other = (
            retrain(s, QUERIES, settings, tmp_path, show_progress=False).timestep_loss for s in (plain, weighted)
        )
        grid = make_grid(("query-0", "query-1", "made-0"), 3, 2, 50, seed=0)
        np.testing.assert_allclose(other, one * weighted.process.loss_weight.numpy()[grid.timesteps], rtol=1e-5)
        assert (other < 0.9 * one).any()

    def test_a_command_gets_ids_and_seed(self, run, tmp_path):
        script = Path(__file__).with_name("own_trainers.py")
        paths = os.pathsep.join([str(script.parent), *sys.path])
        command = f"PYTHONPATH={paths} {sys.executable} {script} {{ids}} {{seed}} {{folder}}"
        found = own(run, tmp_path / "a folder with blanks", command, subsets=2, seeds=(1,))
        self.check(found, tmp_path)

    def check(self, found, tmp_path):
        """The bias of the last layer is the sum of the ids plus the seed: so is the mean prediction."""
        import own_trainers

        for subset, members in enumerate(found.subsets):
            for seed, training_seed in enumerate(found.seeds):
                ids = [id_ for id_, member in zip(found.train_ids, members, strict=True) if member]
                folder = tmp_path / f"{subset}-{seed}"
                own_trainers.save_shifted(ids, training_seed, folder)
                assert found.models[subset][seed] == list_checkpoints(folder)[0].content_hash()
        assert found.details["training"]["trainer"] and not list(tmp_path.rglob("*.partial"))

    @pytest.mark.parametrize(
        ("trainer", "error", "message"),
        [
            (
                "own_trainers:fail",
                RetrainingError,
                "Subset 0, seed 0: own_trainers:fail raised ValueError: out of luck",
            ),
            ("own_trainers:leave_nothing", Exception, "Subset 0, seed 0: .* holds no checkpoint"),
            ("own_trainers:nobody", ConfigError, "own_trainers:nobody cannot: .*nobody"),
            ("no_such_module:train", ConfigError, "can be imported from here"),
            ("own_trainers:NOT_A_FUNCTION", ConfigError, "must name a function; .* is of type int"),
            ("echo {ids}", ConfigError, r"must have \{ids\} and \{folder\}; it lacks \{folder\}"),
            ("echo {ids} {folder}; echo oh dear; exit 3", RetrainingError, "(?s)seed 0: .* status 3; .*oh dear"),
        ],
    )
    def test_what_goes_wrong_is_said(self, run, tmp_path, trainer, error, message):
        with pytest.raises(error, match=message):
            own(run, tmp_path, trainer)

    def test_errors_of_workers_come_through(self, run, tmp_path):
        with pytest.raises(RetrainingError, match="seed 0: own_trainers:fail raised ValueError: out of luck"):
            own(run, tmp_path, "own_trainers:fail", workers=2)

    def test_a_killed_worker_is_told(self, run, tmp_path):
        with pytest.raises(RetrainingError, match="A worker ended with status -9 .killed"):
            own(run, tmp_path, "own_trainers:die", workers=2)

    def test_settings_of_the_runs_own_training_are_refused(self, run, tmp_path):
        with pytest.raises(ConfigError, match="a trainer sets its own"):
            own(run, tmp_path, "own_trainers:save_shifted", epochs=3)

    def test_a_model_without_a_record_needs_one(self, run, tmp_path):
        with pytest.raises(ConfigError, match="was not trained by `whence train`.*--trainer"):
            own(run, tmp_path, None)

    def test_another_noise_schedule_is_refused(self, tmp_path):
        other = replace(MODEL, beta_schedule="squaredcos_cap_v2")
        train(tmp_path / "run", toy_images(10), other, TRAINING, show_progress=False)
        with pytest.raises(RetrainingError, match="noise schedule or prediction type .* is not that of the run"):
            own(tmp_path / "run", tmp_path, "own_trainers:save_shifted")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fraction": 1.0}, "fraction must lie between 0 and 1, found 1.0"),
        ({"seeds": (1, 1)}, "seeds must be one or more different"),
        ({"seeds": ()}, "seeds must be one or more different"),
        ({"workers": 0, "subsets": 0}, "subsets must be above 0, found 0; workers must be above 0"),
        ({"epochs": 3, "same_steps": True}, "contradict each other"),
        ({"checkpoints": 3}, "checkpoints must be 1 to 2"),
        ({"devices": ("nowhere:1",)}, "Device 'nowhere:1' cannot be used"),
        ({"timesteps": 51}, "timesteps must be 1 to 50"),
        ({"draws": 3}, "draws must be even"),
    ],
)
def test_settings_that_cannot_be_met_are_refused_before_anything_is_trained(run, tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        quick(run, tmp_path, **changes)
    assert not list(tmp_path.iterdir())


def test_strata_need_labels(run, tmp_path):
    assert quick(run, tmp_path, subsets=1, seeds=(0,), stratified=True).notes[0].count("stratified by label")
    subject = subject_of(run)
    bare = type(subject.train).from_arrays(subject.train.pixels(range(10)), subject.train.ids)
    with pytest.raises(DataError, match="no labels, by which subsets could be stratified"):
        retrain(replace(subject, train=bare), QUERIES, replace(SETTINGS, stratified=True), tmp_path)


def test_a_damaged_output_is_named(run, tmp_path):
    quick(run, tmp_path, subsets=2, seeds=(0,))
    shutil.rmtree(tmp_path / "ground_truth")
    (path,) = tmp_path.glob("retraining/*/outputs-*/subset-0001-seed-0.npz")
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(RetrainingError, match="subset-0001-seed-0.npz is damaged: .* Delete it and run again"):
        quick(run, tmp_path, subsets=2, seeds=(0,))
    path.unlink()
    assert quick(run, tmp_path, subsets=2, seeds=(0,))


if __name__ == "__main__":
    quick(Path(sys.argv[1]), Path(sys.argv[2]))
