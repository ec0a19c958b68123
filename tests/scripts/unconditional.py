"""A training in the shape of diffusers' train_unconditional.py, with the lines of docs/scripts.md in it."""

import argparse
import os

import datasets
import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel

from whence import Recorder


def parse_args():
    parser = argparse.ArgumentParser()
    parser.add_argument("--train_data", required=True)
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--train_batch_size", type=int, default=4)
    parser.add_argument("--max_train_steps", type=int, default=4)
    parser.add_argument("--gradient_accumulation_steps", type=int, default=1)
    parser.add_argument("--checkpointing_steps", type=int, default=2)
    parser.add_argument("--mixed_precision", default="no")
    parser.add_argument("--use_ema", action="store_true")
    parser.add_argument("--resume_from_checkpoint", default=None)
    parser.add_argument("--hub_token", default="secret")
    return parser.parse_args()


def tiny_unet():
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(8, 8),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        add_attention=False,
    )


def main(args):
    accelerator = Accelerator(
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        mixed_precision=args.mixed_precision,
        project_config=ProjectConfiguration(project_dir=args.output_dir),
    )
    model = tiny_unet()
    ema_model = EMAModel(model.parameters(), model_cls=UNet2DModel, model_config=model.config) if args.use_ema else None

    def save_model_hook(models, weights, output_dir):
        if accelerator.is_main_process:
            if args.use_ema:
                ema_model.save_pretrained(os.path.join(output_dir, "unet_ema"))
            for one in models:
                accelerator.unwrap_model(one).save_pretrained(os.path.join(output_dir, "unet"))
                weights.pop()

    def load_model_hook(models, input_dir):
        while models:
            one = models.pop()
            found = UNet2DModel.from_pretrained(input_dir, subfolder="unet")
            one.load_state_dict(found.state_dict())

    accelerator.register_save_state_pre_hook(save_model_hook)
    accelerator.register_load_state_pre_hook(load_model_hook)

    noise_scheduler = DDPMScheduler(num_train_timesteps=50)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    dataset = datasets.Dataset.from_parquet(args.train_data, cache_dir=os.path.join(args.output_dir, "cache"))
    dataset = dataset.cast_column("image", datasets.Image())
    dataset = dataset.add_column("sample_id", [f"row-{k:07d}" for k in range(len(dataset))])

    def transform_images(examples):
        images = [torch.from_numpy(np.array(image) / 127.5 - 1).float().permute(2, 0, 1) for image in examples["image"]]
        return {"input": images, "sample_id": examples["sample_id"]}

    dataset.set_transform(transform_images)
    train_dataloader = torch.utils.data.DataLoader(dataset, batch_size=args.train_batch_size, shuffle=True)
    lr_scheduler = get_scheduler("cosine", optimizer, num_warmup_steps=2, num_training_steps=10)
    model, optimizer, train_dataloader, lr_scheduler = accelerator.prepare(
        model, optimizer, train_dataloader, lr_scheduler
    )
    recorder = Recorder(args.output_dir, scheduler=noise_scheduler, optimizer=optimizer, config=vars(args), max_grad_norm=1.0, accelerator=accelerator)  # fmt: skip  # noqa: E501

    global_step = 0
    if args.resume_from_checkpoint:
        found = [d for d in os.listdir(args.output_dir) if d.startswith("checkpoint-")]
        if found:
            path = max(found, key=lambda name: int(name.split("-")[1]))
            accelerator.load_state(os.path.join(args.output_dir, path))
            global_step = int(path.split("-")[1])

    while global_step < args.max_train_steps:
        model.train()
        for batch in train_dataloader:
            clean_images = batch["input"]
            noise, timesteps = recorder.draw(batch["sample_id"], like=clean_images)
            noisy_images = noise_scheduler.add_noise(clean_images, noise, timesteps)
            with accelerator.accumulate(model):
                model_output = model(noisy_images, timesteps).sample
                loss = F.mse_loss(model_output.float(), noise.float())
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    grad_norm = accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                recorder.step(F.mse_loss(model_output.float(), noise.float(), reduction="none"), grad_norm if accelerator.sync_gradients else None)  # fmt: skip  # noqa: E501
                lr_scheduler.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                if args.use_ema:
                    ema_model.step(model.parameters())
                global_step += 1
                if accelerator.is_main_process and global_step % args.checkpointing_steps == 0:
                    accelerator.save_state(os.path.join(args.output_dir, f"checkpoint-{global_step}"))
            if global_step >= args.max_train_steps:
                break

    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        unet = accelerator.unwrap_model(model)
        if args.use_ema:
            ema_model.copy_to(unet.parameters())
        DDPMPipeline(unet=unet, scheduler=noise_scheduler).save_pretrained(args.output_dir)
    accelerator.end_training()


if __name__ == "__main__":
    main(parse_args())
