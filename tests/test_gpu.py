"""A CUDA device gives what the CPU gives, within the rounding that is promised."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from conftest import TOY_MODEL, TOY_TRAINING
from whence.attribution import trace
from whence.checkpoints import list_checkpoints
from whence.config import IndexSettings, QuerySettings, TraceSettings
from whence.indexing import index
from whence.methods import DAS_SIGNED, GRAD_COS, KFAC, RETRAC, TRACIN, TRAK
from whence.querying import query
from whence.record import Record
from whence.replay_check import check_run
from whence.subject import Subject
from whence.training import train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

METHODS = (TRACIN, RETRAC, GRAD_COS, KFAC)  # not EK-FAC: it depends on the choice of eigenvectors in an eigenspace
SETTINGS = TraceSettings(timesteps=4, draws=2, train_timesteps=3, batch_size=8, block_size=4, dtype="float64")


@pytest.fixture(scope="module")
def exact(subject, toy_queries, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cpu")
    return trace(subject, toy_queries, METHODS, SETTINGS, folder, show_progress=False)


def off(found, want) -> float:
    """Largest difference, in the largest score."""
    return float(np.abs(found.values - want.values).max() / np.abs(want.values).max())


@pytest.mark.parametrize("batch_size", [4, 8, 64])
def test_scores_are_those_of_the_cpu(subject, toy_queries, exact, tmp_path, batch_size):
    settings = replace(SETTINGS, device="cuda", batch_size=batch_size)
    found = trace(subject, toy_queries, METHODS, settings, tmp_path, show_progress=False)
    for name, scores in found.items():
        assert off(scores, exact[name]) < 1e-6, name  # diffusers makes the time embedding in float32


def test_scores_in_float32_are_within_the_promised_rounding(subject, toy_queries, exact, tmp_path):
    settings = replace(SETTINGS, device="cuda", dtype="float32")
    found = trace(subject, toy_queries, [RETRAC], settings, tmp_path, show_progress=False)["retrac"]
    bound = 1e-5 * exact["retrac"].train_weights.sum(0)
    assert (np.abs(found.values - exact["retrac"].values) <= bound).all()


@pytest.mark.parametrize("autocast, bound", [("bf16", 0.06), ("fp16", 0.006)])
def test_coarser_forward_passes_cost_their_own_rounding(subject, toy_queries, exact, tmp_path, autocast, bound):
    """Twice what the same test allows on a CPU, as other kernels round elsewhere."""
    settings = replace(SETTINGS, device="cuda", dtype="float32", autocast=autocast)
    found = trace(subject, toy_queries, [TRACIN, RETRAC], settings, tmp_path, show_progress=False)
    for name, scores in found.items():
        assert off(scores, exact[name]) < bound, name


@pytest.mark.parametrize("method, output", [(RETRAC, None), (TRAK, "loss"), (DAS_SIGNED, "mean")])
def test_stores_made_on_a_gpu_answer_as_those_of_the_cpu(subject, toy_queries, tmp_path, method, output):
    found = {}
    for device in ("cpu", "cuda"):
        on_grid = {"grid": True, "train_timesteps": 3, "output": output, "checkpoints": "last"} if output else {}
        settings = IndexSettings(width=256, rows="float32", batch_size=8, block_size=4, device=device, **on_grid)
        store = index(subject, settings, tmp_path / device, show_progress=False)
        asked = QuerySettings(timesteps=3, draws=2, batch_size=8, device=device)
        found[device] = query(subject, store, toy_queries, [method], asked, tmp_path / device, show_progress=False)
    # float32 rows; a ridge inverse takes the differences of gradients up
    assert off(found["cuda"][method.name], found["cpu"][method.name]) < (1e-4 if output is None else 1e-2)


def test_a_record_made_on_the_cpu_replays_on_a_gpu(subject):
    assert [row.verdict for row in check_run(subject, device="cuda")] == ["passed"] * 3


def test_training_on_a_gpu_is_explained_by_its_record(toy_train, tmp_path):
    train(tmp_path / "run", toy_train, TOY_MODEL, TOY_TRAINING, device="cuda", show_progress=False)
    record = Record.open(tmp_path / "run" / "record")
    subject = Subject(list_checkpoints(tmp_path / "run"), toy_train, record, TOY_TRAINING.loss)
    assert [row.verdict for row in check_run(subject, device="cuda")] == ["passed"] * 3
