"""Commands that make a model and look after its training: demo, train, sample and check."""

import json as jsonlib
import sys
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, UseAppendAction

from whence._cli_options import Flat, ModelSource
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
    guidance: float = 1.0,
    steps: int = 50,
    seed: int = 0,
    trajectory: bool = False,
    source: Flat[ModelSource] = ModelSource(),  # noqa: B008
    json: bool = False,
) -> None:
    """Sample images from the last checkpoint with DDIM, to be traced as queries. The same seed gives the same images.

    Args:
        model: A run of whence, or a checkpoint folder, pipeline or model saved by diffusers.
        count: Images to sample; of each prompt, where there are some.
        prompt: Caption, or label, of a model that is told these; given again for each further one.
        guidance: Scale of classifier-free guidance; 1 is the model's own prediction.
        steps: Denoising steps.
        seed: Seed of the noise.
        trajectory: Also keep what the sampler took each image to be at each step, as journey-trak needs it.
        source: Where the model is from and what it was trained on.
        json: Print the path as JSON.
    """
    run = source.open(model)
    path = run.sample(count, prompts=prompt, guidance_scale=guidance, steps=steps, seed=seed, trajectory=trajectory)
    print(jsonlib.dumps({"images": str(path)}) if json else path)


def check(
    run: Positional[Path],
    /,
    *,
    source: Flat[ModelSource] = ModelSource(),  # noqa: B008
    device: str = "cpu",
    json: bool = False,
) -> None:
    """Check that the record explains training: checksums, keys, and losses replayed at each checkpoint.

    Ends with status 1 where a check fails.

    Args:
        run: A run with a record.
        source: Where the model is from and what it was trained on.
        device: Torch device.
        json: Print the verdicts as JSON.
    """
    rows = source.open(run).check(device=device)
    print_table(["what", "verdict", "visits", "detail"], [[r.what, r.verdict, r.checked, r.detail] for r in rows], json)
    if any(row.verdict == "failed" for row in rows):
        sys.exit(1)
