"""The demo: the outlier experiment of the paper in small, on images that come with whence.

A model is trained on 960 emoji and 40 photographs of trousers. Asked about trousers that it has never seen, a good
method names the 40; asked about other emoji, it does not. The settings are those of the paper where they carry over to
a small model: L1 loss, a constant learning rate of 1e-4, batches of 32, no augmentation, ten checkpoints.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from whence.config import DataSettings, LossName, ModelSettings, TraceSettings, TrainingSettings
from whence.errors import ConfigError
from whence.opening import train_run
from whence.pipeline import Run

PLANTED = "trouser"
DATA = DataSettings(resolution=16)
MODEL = ModelSettings(widths=(32, 64, 64), layers_per_block=1, attention_levels=1)
TRACE = TraceSettings(timesteps=16, draws=4)
MARKER = ".whence-demo"
"""A file that tells a demo, which may be removed, from a run of the user's."""

METHODS = ("tracin", "retrac", "pixels", "random")


def training_settings(loss: LossName, seed: int) -> TrainingSettings:
    """Give the demo's training settings."""
    return TrainingSettings(
        epochs=40, batch_size=32, checkpoints=10, learning_rate=1e-4, schedule="constant", loss=loss, seed=seed
    )


def run_demo(
    folder: Path, *, fresh: bool = False, seed: int = 0, loss: LossName = "l1", show_progress: bool = True
) -> tuple[Run, Path, dict[str, Any]]:
    """Train, sample, trace and write the report; what is there already is used again.

    Args:
        folder: Where the run goes.
        fresh: Remove an earlier demo first.
        seed: Seed of training.
        loss: Training loss.
        show_progress: Show progress bars.

    Returns:
        The run, the page, and the table of what was measured.

    Raises:
        ConfigError: If ``fresh`` would remove something that is not a demo, or the folder holds something else.
    """
    claim_folder(folder, fresh=fresh)
    run = train_run(
        folder,
        "demo",
        data_settings=DATA,
        model_settings=MODEL,
        settings=training_settings(loss, seed),
        show_progress=show_progress,
    )
    generated = run.sample(8, show_progress=show_progress)
    run.trace(["demo-queries", generated], METHODS, TRACE, show_progress=show_progress)
    page = run.report(
        planted=PLANTED,
        notes=[
            f"The model saw images of {DATA.resolution} x {DATA.resolution} pixels. Each query was taken at "
            f"{TRACE.timesteps} timesteps x {TRACE.draws} draws; the default of whence trace is 100 x 16."
        ],
    )
    return run, page, json.loads((folder / "evaluation" / "retrieval.json").read_text())


def claim_folder(folder: Path, *, fresh: bool) -> None:
    """Make a folder for a demo, or take that of an earlier one.

    Args:
        folder: Where the run goes.
        fresh: Remove an earlier demo first.

    Raises:
        ConfigError: If the folder holds something that is not a demo.
    """
    if fresh:
        remove_demo(folder)
    if folder.exists() and any(folder.iterdir()) and not (folder / MARKER).exists():
        raise ConfigError(f"{folder} holds something that is not a demo. Give another --out.")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARKER).touch()


def remove_demo(folder: Path) -> None:
    """Remove an earlier demo, and nothing else.

    Raises:
        ConfigError: If the folder holds something that is not a demo.
    """
    if not folder.exists():
        return
    if not (folder / MARKER).exists():
        raise ConfigError(f"{folder} is not a demo of whence, so --fresh does not remove it. Give another --out.")
    shutil.rmtree(folder)
