"""What the scripts of this folder share: flags, data, and how checkpoints are saved and resumed from.

The scripts have the shape of diffusers' examples, with tiny models and the lines of docs/scripts.md in them.
"""

import argparse
import os
from collections.abc import Callable
from typing import Any

import datasets
import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration


def parse_args(**more: Any) -> argparse.Namespace:
    """Read the flags that all scripts have, and further ones by their defaults."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--train_data", required=True)
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--pretrained_model_name_or_path")
    defaults = {
        "train_batch_size": 4,
        "max_train_steps": 4,
        "gradient_accumulation_steps": 1,
        "checkpointing_steps": 2,
        "learning_rate": 1e-3,
        "max_grad_norm": 1.0,
        "mixed_precision": "no",
        "resume_from_checkpoint": "",
    }
    for name, default in (defaults | more).items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    args = parser.parse_args()
    args.use_ema = bool(getattr(args, "use_ema", 0))
    args.resume_from_checkpoint = args.resume_from_checkpoint or None
    return args


def make_accelerator(args: argparse.Namespace) -> Accelerator:
    return Accelerator(
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        mixed_precision=args.mixed_precision,
        project_config=ProjectConfiguration(project_dir=args.output_dir),
    )


def weight_dtype_of(accelerator: Accelerator) -> torch.dtype:
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision, torch.float32)


def open_dataset(args: argparse.Namespace) -> datasets.Dataset:
    rank = os.environ.get("RANK", "0")
    found = datasets.Dataset.from_parquet(args.train_data, cache_dir=os.path.join(args.output_dir, f"cache-{rank}"))
    return found.cast_column("image", datasets.Image())


def to_pixels(image: Any) -> torch.Tensor:
    return torch.from_numpy(np.array(image.convert("RGB")) / 127.5 - 1).float().permute(2, 0, 1)


def register_hooks(
    accelerator: Accelerator, save: Callable[[Any, str], None], load: Callable[[Any, str], None]
) -> None:
    """Save and load the network in diffusers' own way, in the place of accelerate's."""

    def save_model_hook(models, weights, output_dir):
        if accelerator.is_main_process:
            for model in models:
                save(accelerator.unwrap_model(model), output_dir)
                weights.pop()

    def load_model_hook(models, input_dir):
        while models:
            load(accelerator.unwrap_model(models.pop()), input_dir)

    accelerator.register_save_state_pre_hook(save_model_hook)
    accelerator.register_load_state_pre_hook(load_model_hook)


def resume(accelerator: Accelerator, args: argparse.Namespace) -> int:
    """Load the last checkpoint, if the script is to resume and there is one."""
    found = [name for name in os.listdir(args.output_dir) if name.startswith("checkpoint-")]
    if not args.resume_from_checkpoint or not found:
        return 0
    last = max(found, key=lambda name: int(name.split("-")[1]))
    accelerator.load_state(os.path.join(args.output_dir, last))
    return int(last.split("-")[1])


def save(accelerator: Accelerator, args: argparse.Namespace, global_step: int) -> None:
    """Save a checkpoint when it is time; in the main process alone, as the scripts do."""
    if accelerator.is_main_process and global_step % args.checkpointing_steps == 0:
        accelerator.save_state(os.path.join(args.output_dir, f"checkpoint-{global_step}"))
