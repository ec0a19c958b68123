"""A training in the shape of diffusers' train_text_to_image.py."""

import os

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel, compute_snr
from tiny_training import (
    make_accelerator,
    open_dataset,
    parse_args,
    register_hooks,
    resume,
    save,
    to_pixels,
    weight_dtype_of,
)
from transformers import CLIPTextModel, CLIPTokenizer

from whence import Recorder


def main(args):
    accelerator = make_accelerator(args)
    base = args.pretrained_model_name_or_path
    noise_scheduler = DDPMScheduler.from_pretrained(base, subfolder="scheduler")
    tokenizer = CLIPTokenizer.from_pretrained(base, subfolder="tokenizer")
    text_encoder = CLIPTextModel.from_pretrained(base, subfolder="text_encoder").requires_grad_(False)
    vae = AutoencoderKL.from_pretrained(base, subfolder="vae").requires_grad_(False)
    unet = UNet2DConditionModel.from_pretrained(base, subfolder="unet").train()
    ema_unet = EMAModel(unet.parameters(), model_cls=UNet2DConditionModel, model_config=unet.config)

    def save_network(network, folder):
        ema_unet.save_pretrained(os.path.join(folder, "unet_ema"))
        network.save_pretrained(os.path.join(folder, "unet"))

    def load_network(network, folder):
        network.load_state_dict(UNet2DConditionModel.from_pretrained(folder, subfolder="unet").state_dict())

    register_hooks(accelerator, save_network, load_network)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=args.learning_rate)
    dataset = {"train": open_dataset(args)}
    dataset["train"] = dataset["train"].add_column("sample_id", [f"row-{k:07d}" for k in range(len(dataset["train"]))])  # fmt: skip  # noqa: E501

    def preprocess_train(examples):
        examples["pixel_values"] = [to_pixels(image) for image in examples["image"]]
        inputs = tokenizer(examples["text"], padding="max_length", truncation=True, return_tensors="pt")
        examples["input_ids"] = inputs.input_ids
        return examples

    train_dataset = dataset["train"].with_transform(preprocess_train)

    def collate_fn(examples):
        pixel_values = torch.stack([example["pixel_values"] for example in examples])
        input_ids = torch.stack([example["input_ids"] for example in examples])
        return {"pixel_values": pixel_values, "input_ids": input_ids, "sample_id": [example["sample_id"] for example in examples]}  # fmt: skip  # noqa: E501

    train_dataloader = torch.utils.data.DataLoader(
        train_dataset, shuffle=True, collate_fn=collate_fn, batch_size=args.train_batch_size
    )
    lr_scheduler = get_scheduler("cosine", optimizer, num_warmup_steps=1, num_training_steps=12)
    unet, optimizer, train_dataloader, lr_scheduler = accelerator.prepare(
        unet, optimizer, train_dataloader, lr_scheduler
    )
    weight_dtype = weight_dtype_of(accelerator)
    text_encoder.to(dtype=weight_dtype)
    vae.to(dtype=weight_dtype)
    recorder = Recorder(args.output_dir, scheduler=noise_scheduler, optimizer=optimizer, config=vars(args), accelerator=accelerator)  # fmt: skip  # noqa: E501
    global_step = resume(accelerator, args)
    while global_step < args.max_train_steps:
        for batch in train_dataloader:
            with accelerator.accumulate(unet):
                if args.flips:
                    batch["pixel_values"] = recorder.flip(batch["sample_id"], batch["pixel_values"])
                latents = recorder.latents(batch["sample_id"], vae.encode(batch["pixel_values"].to(weight_dtype)).latent_dist)  # fmt: skip  # noqa: E501
                latents = latents * vae.config.scaling_factor
                noise, timesteps = recorder.draw(batch["sample_id"], like=latents)
                if args.input_perturbation:
                    new_noise = recorder.noise_of_input()
                    noisy_latents = noise_scheduler.add_noise(latents, new_noise, timesteps)
                else:
                    noisy_latents = noise_scheduler.add_noise(latents, noise, timesteps)
                encoder_hidden_states = text_encoder(batch["input_ids"], return_dict=False)[0]
                if args.prediction_type is not None:
                    noise_scheduler.register_to_config(prediction_type=args.prediction_type)
                if noise_scheduler.config.prediction_type == "epsilon":
                    target = noise
                else:
                    target = noise_scheduler.get_velocity(latents, noise, timesteps)
                model_pred = unet(noisy_latents, timesteps, encoder_hidden_states, return_dict=False)[0]
                if args.snr_gamma is None:
                    loss = F.mse_loss(model_pred.float(), target.float(), reduction="mean")
                else:
                    snr = compute_snr(noise_scheduler, timesteps)
                    clipped = torch.stack([snr, args.snr_gamma * torch.ones_like(timesteps)], dim=1).min(dim=1)[0]
                    is_velocity = noise_scheduler.config.prediction_type == "v_prediction"
                    mse_loss_weights = clipped / (snr + 1) if is_velocity else clipped / snr
                    loss = F.mse_loss(model_pred.float(), target.float(), reduction="none")
                    loss = loss.mean(dim=list(range(1, len(loss.shape)))) * mse_loss_weights
                    loss = loss.mean()
                print("loss", float(loss.detach()))
                accelerator.backward(loss)
                recorder.step(F.mse_loss(model_pred.float(), target.float(), reduction="none"))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(unet.parameters(), args.max_grad_norm)
                optimizer.step()
                lr_scheduler.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                ema_unet.step(unet.parameters())
                global_step += 1
                save(accelerator, args, global_step)
            if global_step >= args.max_train_steps:
                break

    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        unet = accelerator.unwrap_model(unet)
        ema_unet.copy_to(unet.parameters())
        pipeline = StableDiffusionPipeline.from_pretrained(base, text_encoder=text_encoder, vae=vae, unet=unet)
        pipeline.save_pretrained(args.output_dir)
    accelerator.end_training()


if __name__ == "__main__":
    args = parse_args(
        snr_gamma=0.0, noise_offset=0.0, input_perturbation=0.0, prediction_type="", flips=0, checkpoints_total_limit=0
    )
    args.snr_gamma = args.snr_gamma or None
    args.prediction_type = args.prediction_type or None
    main(args)
