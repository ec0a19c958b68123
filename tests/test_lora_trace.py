"""DreamBooth of a LoRA, traced as by the command: a pipeline, a series of adapters, images without captions."""

import copy
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from lora_models import add_adapters, part_of, save_diffusers
from test_encoding import make_images
from tiny_pipelines import save_pipeline
from whence.checkpoints import load_model
from whence.data import ImageData
from whence.diffusion.adapters import predict
from whence.errors import CheckpointError
from whence.event_table import grid_events, make_batch
from whence.methods import Grid
from whence.opening import open_run

KINDS = ["sd", "sdxl", "sd3", "flux"]
QUICK: dict[str, Any] = {"timesteps": 2, "draws": 2, "show_progress": False}


def make_lora(kind: str, folder: Path) -> Path:
    """Save a pipeline in ``base`` and the LoRA after 5 and 10 steps in ``run``."""
    save_pipeline(kind, folder / "base")
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder / "base")
    for step in (5, 10):
        adapted = copy.deepcopy(getattr(pipeline, part_of(kind)))
        config = add_adapters(adapted, seed=step)
        save_diffusers(adapted, config, folder / "run" / f"checkpoint-{step}", kind)
    return folder / "run"


def open_lora(kind: str, folder: Path, **more: Any) -> Any:
    told = {"base": str(folder / "base"), "caption": "sks dog"}
    run = open_run(make_lora(kind, folder), data="demo", out=folder / "out", conditioning=told | more)
    run.__dict__["opened_images"] = make_images(captions=None)
    return run


@pytest.mark.parametrize("kind", KINDS)
def test_a_lora_is_traced(kind: str, tmp_path: Path):
    run = open_lora(kind, tmp_path)
    queries = make_images(captions=None).select([1])
    scores = run.trace(queries, ["grad-dot"], train_timesteps=2, dtype="float64", **QUICK)["grad-dot"]
    model = load_model(run.checkpoints[-1], dtype="float64")
    adapters = [p for p in model.parameters() if p.requires_grad]
    assert 0 < len(adapters) < len(list(model.parameters()))

    def gradient(images: ImageData, row: int, side: Any, grid: Grid) -> torch.Tensor:
        table = grid_events(images, [row], side, grid, run.subject.process.num_timesteps, seed=0)
        batch = make_batch(table, images, run.subject.process, dtype=torch.float64)
        error = (predict(model, batch.noisy, batch.times, batch.conditions) - batch.target).square().mean()
        return torch.cat([g.flatten() for g in torch.autograd.grad(error, adapters)])

    asked = gradient(run.open_queries(queries), 0, "query", Grid(2, 2))
    want = [float(asked @ gradient(run.train_images, row, "train", Grid(2, 1))) for row in range(4)]
    np.testing.assert_allclose(scores.values[0], want, rtol=1e-6)


def test_all_checkpoints_and_a_store(tmp_path: Path):
    run = open_lora("sd", tmp_path)
    queries = make_images(captions=None).select([0, 1])
    traced = run.trace(queries, ["tracin", "retrac"], train_timesteps=2, **QUICK)
    run.index(train_timesteps=2, projection="identity", rows="float32", show_progress=False)
    stored = run.query(queries, ["tracin", "retrac"], **QUICK)
    for method, scores in traced.items():
        spread = float(np.abs(scores.values).max())
        np.testing.assert_allclose(stored[method].values, scores.values, rtol=0, atol=1e-4 * spread)
    # The folder knows its base when it is opened again.
    again = open_run(tmp_path / "out")
    assert [c.base_folder for c in again.checkpoints] == [tmp_path / "base" / "unet"] * 2


def test_the_base_is_asked_for(tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"checkpoint-5 holds a LoRA.*with --base"):
        open_run(make_lora("sd", tmp_path), data="demo", out=tmp_path / "out")
