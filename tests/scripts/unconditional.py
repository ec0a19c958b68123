"""A training in the shape of diffusers' train_unconditional.py."""

import os

import torch
import torch.nn.functional as F
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from tiny_training import make_accelerator, open_dataset, parse_args, register_hooks, resume, save, to_pixels

from whence import Recorder


def tiny_unet():
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=16,
        layers_per_block=1,
        block_out_channels=(8, 8),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        add_attention=False,
    )


def main(args):
    accelerator = make_accelerator(args)
    model = tiny_unet()
    ema_model = EMAModel(model.parameters(), model_cls=UNet2DModel, model_config=model.config)

    def save_network(network, folder):
        if args.use_ema:
            ema_model.save_pretrained(os.path.join(folder, "unet_ema"))
        network.save_pretrained(os.path.join(folder, "unet"))

    def load_network(network, folder):
        if args.use_ema:
            found = EMAModel.from_pretrained(os.path.join(folder, "unet_ema"), UNet2DModel)
            ema_model.load_state_dict(found.state_dict())
        network.load_state_dict(UNet2DModel.from_pretrained(folder, subfolder="unet").state_dict())

    register_hooks(accelerator, save_network, load_network)
    noise_scheduler = DDPMScheduler(num_train_timesteps=50)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate)
    dataset = open_dataset(args)
    dataset = dataset.add_column("sample_id", [f"row-{k:07d}" for k in range(len(dataset))])

    def transform_images(examples):
        images = [to_pixels(image) for image in examples["image"]]
        return {"input": images, "sample_id": examples["sample_id"]}

    dataset.set_transform(transform_images)
    train_dataloader = torch.utils.data.DataLoader(dataset, batch_size=args.train_batch_size, shuffle=True)
    lr_scheduler = get_scheduler("cosine", optimizer, num_warmup_steps=2, num_training_steps=12)
    model, optimizer, train_dataloader, lr_scheduler = accelerator.prepare(
        model, optimizer, train_dataloader, lr_scheduler
    )
    recorder = Recorder(args.output_dir, scheduler=noise_scheduler, optimizer=optimizer, config=vars(args), max_grad_norm=1.0, accelerator=accelerator)  # fmt: skip  # noqa: E501
    global_step = resume(accelerator, args)
    while global_step < args.max_train_steps:
        model.train()
        for batch in train_dataloader:
            clean_images = batch["input"]
            noise, timesteps = recorder.draw(batch["sample_id"], like=clean_images)
            noisy_images = noise_scheduler.add_noise(clean_images, noise, timesteps)
            with accelerator.accumulate(model):
                model_output = model(noisy_images, timesteps).sample
                loss = F.mse_loss(model_output.float(), noise.float())
                print("loss", float(loss.detach()))
                accelerator.backward(loss)
                recorder.step(F.mse_loss(model_output.float(), noise.float(), reduction="none"))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                lr_scheduler.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                if args.use_ema:
                    ema_model.step(model.parameters())
                global_step += 1
                save(accelerator, args, global_step)
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
    main(parse_args(use_ema=0))
