"""A training in the shape of diffusers' train_text_to_image_lora.py."""

import os

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import compute_snr
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from tiny_training import make_accelerator, open_dataset, parse_args, resume, save, to_pixels, weight_dtype_of
from transformers import CLIPTextModel, CLIPTokenizer

from whence import Recorder


def main(args):
    accelerator = make_accelerator(args)
    base = args.pretrained_model_name_or_path
    noise_scheduler = DDPMScheduler.from_pretrained(base, subfolder="scheduler")
    tokenizer = CLIPTokenizer.from_pretrained(base, subfolder="tokenizer")
    text_encoder = CLIPTextModel.from_pretrained(base, subfolder="text_encoder").requires_grad_(False)
    vae = AutoencoderKL.from_pretrained(base, subfolder="vae").requires_grad_(False)
    unet = UNet2DConditionModel.from_pretrained(base, subfolder="unet").requires_grad_(False)
    weight_dtype = weight_dtype_of(accelerator)
    for frozen in (unet, vae, text_encoder):
        frozen.to(dtype=weight_dtype)
    torch.manual_seed(0)
    targets = ["to_k", "to_q", "to_v", "to_out.0"]
    unet.add_adapter(LoraConfig(r=2, lora_alpha=2, init_lora_weights="gaussian", target_modules=targets))
    lora_layers = [p for p in unet.parameters() if p.requires_grad]
    for parameter in lora_layers:
        parameter.data = parameter.data.float()
    optimizer = torch.optim.AdamW(lora_layers, lr=args.learning_rate)
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
    recorder = Recorder(args.output_dir, scheduler=noise_scheduler, optimizer=optimizer, config=vars(args), accelerator=accelerator)  # fmt: skip  # noqa: E501
    global_step = resume(accelerator, args)
    while global_step < args.max_train_steps:
        unet.train()
        for batch in train_dataloader:
            with accelerator.accumulate(unet):
                latents = recorder.latents(batch["sample_id"], vae.encode(batch["pixel_values"].to(dtype=weight_dtype)).latent_dist)  # fmt: skip  # noqa: E501
                latents = latents * vae.config.scaling_factor
                noise, timesteps = recorder.draw(batch["sample_id"], like=latents)
                noisy_latents = noise_scheduler.add_noise(latents, noise, timesteps)
                encoder_hidden_states = text_encoder(batch["input_ids"], return_dict=False)[0]
                target = noise
                model_pred = unet(noisy_latents, timesteps, encoder_hidden_states, return_dict=False)[0]
                snr = compute_snr(noise_scheduler, timesteps)
                mse_loss_weights = torch.stack([snr, args.snr_gamma * torch.ones_like(timesteps)], dim=1).min(dim=1)[0]
                loss = F.mse_loss(model_pred.float(), target.float(), reduction="none")
                loss = loss.mean(dim=list(range(1, len(loss.shape)))) * (mse_loss_weights / snr)
                loss = loss.mean()
                print("loss", float(loss.detach()))
                accelerator.backward(loss)
                recorder.step(F.mse_loss(model_pred.float(), target.float(), reduction="none"))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(lora_layers, args.max_grad_norm)
                optimizer.step()
                lr_scheduler.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                global_step += 1
                save(accelerator, args, global_step)
                if accelerator.is_main_process and global_step % args.checkpointing_steps == 0:
                    save_lora(
                        accelerator.unwrap_model(unet), os.path.join(args.output_dir, f"checkpoint-{global_step}")
                    )
            if global_step >= args.max_train_steps:
                break

    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        save_lora(accelerator.unwrap_model(unet).float(), args.output_dir)
    accelerator.end_training()


def save_lora(unet, folder):
    state = convert_state_dict_to_diffusers(get_peft_model_state_dict(unet))
    StableDiffusionPipeline.save_lora_weights(save_directory=folder, unet_lora_layers=state, safe_serialization=True)


if __name__ == "__main__":
    main(parse_args(snr_gamma=5.0, noise_offset=0.1))
