"""Training functions as a user would write them, for tests/test_retraining.py; importable in worker processes."""

import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

from conftest import TOY_MODEL, toy_images
from lora_models import NETWORKS, add_adapters, draw_weights, save_diffusers
from whence.training import make_model, make_scheduler
from whence.words import encoder_for, files_of


def save_shifted(ids: list[str], seed: int, folder: Path) -> None:
    """Leave a model that tells which ids it was given: its last bias is their sum, plus the seed."""
    model = make_model(TOY_MODEL, toy_images(2), 0)
    model.conv_out.bias.data[:] = sum(int(id_.split("-")[1]) for id_ in ids) / 100 + seed
    model.save_pretrained(folder / "unet")
    make_scheduler(TOY_MODEL).save_pretrained(folder / "scheduler")


def save_renumbered(ids: list[str], seed: int, folder: Path) -> None:
    """Leave a model that is told labels, numbered from the last of the alphabet to the first."""
    settings = replace(TOY_MODEL, condition="label", classes=("odd", "even"))
    make_model(settings, toy_images(2), 0).save_pretrained(folder / "unet")
    make_scheduler(TOY_MODEL).save_pretrained(folder / "scheduler")
    for name, content in files_of(encoder_for(settings)).items():
        (folder / name).write_text(json.dumps(content))


def save_lora(ids: list[str], seed: int, folder: Path) -> None:
    """Leave a LoRA whose weights depend on the ids and the seed."""
    model = NETWORKS["sd"]()
    draw_weights(model, seed=0)
    config = add_adapters(model, seed=1000 * seed + sum(int(id_.split("-")[1]) for id_ in ids))
    save_diffusers(model, config, folder, "sd")


def fail(ids: list[str], seed: int, folder: Path) -> None:
    raise ValueError("out of luck")


def leave_nothing(ids: list[str], seed: int, folder: Path) -> None:
    """Train nothing."""


def die(ids: list[str], seed: int, folder: Path) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


NOT_A_FUNCTION = 3

if __name__ == "__main__":
    save_shifted(json.loads(Path(sys.argv[1]).read_text()), int(sys.argv[2]), Path(sys.argv[3]))
