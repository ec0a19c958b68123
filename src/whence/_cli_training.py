"""Commands that make a model and look after its training: demo, train, sample and check."""

import json as jsonlib
import sys
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, UseAppendAction

from whence._cli_options import Flat, given
from whence._cli_printing import print_table
from whence.config import DataSettings, LossName, ModelSettings, TrainingSettings


def demo(
    out: Path | None = None,
    *,
    text: bool = False,
    fresh: bool = False,
    seed: int = 0,
    loss: LossName | None = None,
    json: bool = False,
) -> None:
    """Train a small model on bundled images, find what its images came from, and write a page about it.

    Takes some minutes on two CPU cores. Run again, it uses what is there.

    Args:
        out: Folder of the run. Default: whence-demo, or whence-text-demo with --text.
        text: Train a text-to-image model on captioned emoji in four styles, and trace what it draws for some prompts.
        fresh: Remove an earlier demo in that folder and start over.
        seed: Seed of training.
        loss: Training loss. Default: l1, or mse with --text.
        json: Print the table as JSON.
    """
    if text:
        from whence.text_demo import run_text_demo

        _, page, table = run_text_demo(out or Path("whence-text-demo"), fresh=fresh, seed=seed, loss=loss or "mse")
    else:
        from whence.demo import run_demo

        _, page, table = run_demo(out or Path("whence-demo"), fresh=fresh, seed=seed, loss=loss or "l1")
    print_table(table["columns"], table["rows"], json, page=str(page), notes=table["notes"])


def train(
    data: Positional[str],
    /,
    *,
    out: Path,
    data_settings: Flat[DataSettings] = DataSettings(),  # noqa: B008  frozen
    model: Flat[ModelSettings] = ModelSettings(),  # noqa: B008
    training: Flat[TrainingSettings] = TrainingSettings(),  # noqa: B008
    device: str = "cpu",
    json: bool = False,
) -> None:
    """Train a diffusers U-Net with an exact record, or go on with a training that was interrupted.

    Args:
        data: Training images: a folder, a parquet file, a folder of datasets.save_to_disk, or demo.
        out: Folder of the run.
        data_settings: How images are read.
        model: Architecture and noise schedule.
        training: Optimizer, schedule, length, seed.
        device: Torch device, for example cpu or cuda:0.
        json: Print the result as JSON.
    """
    from whence.checkpoints import list_checkpoints
    from whence.opening import train_run

    run = train_run(out, data, data_settings=data_settings, model_settings=model, settings=training, device=device)
    rows = [[c.step, str(c.folder)] for c in list_checkpoints(run.folder)]
    print_table(["step", "checkpoint"], rows, json)


def sample(
    model: Positional[Path],
    /,
    *,
    count: int = 4,
    prompt: Annotated[tuple[str, ...], UseAppendAction] = (),
    guidance_scale: float = 1.0,
    steps: int = 50,
    seed: int = 0,
    trajectory: bool = False,
    data: str | None = None,
    out: Path | None = None,
    allow_pickle: bool = False,
    data_settings: Flat[DataSettings] = DataSettings(),  # noqa: B008
    json: bool = False,
) -> None:
    """Sample images from the last checkpoint with DDIM, to be traced as queries. The same seed gives the same images.

    Args:
        model: A run of whence, or a checkpoint folder, pipeline or model saved by diffusers.
        count: Images to sample; of each prompt, where there are some.
        prompt: Caption, or label, of a model that is told these; given again for each further one.
        guidance_scale: Scale of classifier-free guidance; 1 is the model's own prediction.
        steps: Denoising steps.
        seed: Seed of the noise.
        trajectory: Also keep what the sampler took each image to be at each step, as journey-trak needs it.
        data: Training images. A run knows its own.
        out: Folder for the images, where the model was not trained by whence.
        allow_pickle: Read weights from .bin files too, with weights_only. Only for files you trust.
        data_settings: How training images are read. Default: as the run did.
        json: Print the path as JSON.
    """
    from whence.opening import open_run

    run = open_run(model, data=data, data_settings=given(data_settings), out=out, allow_pickle=allow_pickle)
    path = run.sample(
        count, prompts=prompt, guidance_scale=guidance_scale, steps=steps, seed=seed, trajectory=trajectory
    )
    print(jsonlib.dumps({"images": str(path)}) if json else path)


def check(
    run: Positional[Path],
    /,
    *,
    data: str | None = None,
    data_settings: Flat[DataSettings] = DataSettings(),  # noqa: B008
    device: str = "cpu",
    json: bool = False,
) -> None:
    """Check that the record explains training: checksums, keys, and losses replayed at each checkpoint.

    Ends with status 1 where a check fails.

    Args:
        run: A run with a record.
        data: Training images, where the run does not know its own (a training loop of yours) or they were moved.
        data_settings: How images are read. Default: as the run did.
        device: Torch device.
        json: Print the verdicts as JSON.
    """
    from whence.opening import open_run

    rows = open_run(run, data=data, data_settings=given(data_settings)).check(device=device)
    print_table(["what", "verdict", "visits", "detail"], [[r.what, r.verdict, r.checked, r.detail] for r in rows], json)
    if any(row.verdict == "failed" for row in rows):
        sys.exit(1)
