"""A training in the shape of diffusers' train_dreambooth_lora_sd3.py."""

import copy
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from diffusers.optimization import get_scheduler
from diffusers.training_utils import compute_loss_weighting_for_sd3
from peft import LoraConfig, set_peft_model_state_dict
from peft.utils import get_peft_model_state_dict
from PIL import Image
from tiny_training import (
    make_accelerator,
    parse_args,
    register_hooks,
    resume,
    save,
    to_pixels,
    weight_dtype_of,
)

from whence import Recorder


class DreamBoothDataset(torch.utils.data.Dataset):
    def __init__(self, instance_data_root):
        self.instance_images = [Image.open(path) for path in list(Path(instance_data_root).iterdir())]
        self.pixel_values = [to_pixels(image) for image in self.instance_images]
        self.num_instance_images = len(self.pixel_values)

    def __len__(self):
        return self.num_instance_images

    def __getitem__(self, index):
        example = {}
        example["instance_images"] = self.pixel_values[index % self.num_instance_images]
        example["sample_id"] = Path(self.instance_images[index % self.num_instance_images].filename).name
        return example


def collate_fn(examples):
    batch = {"pixel_values": torch.stack([example["instance_images"] for example in examples])}
    batch["sample_id"] = [example["sample_id"] for example in examples]
    return batch


def main(args):
    accelerator = make_accelerator(args)
    base = args.pretrained_model_name_or_path
    noise_scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(base, subfolder="scheduler")
    noise_scheduler_copy = copy.deepcopy(noise_scheduler)
    vae = AutoencoderKL.from_pretrained(base, subfolder="vae").requires_grad_(False)
    transformer = SD3Transformer2DModel.from_pretrained(base, subfolder="transformer").requires_grad_(False)
    weight_dtype = weight_dtype_of(accelerator)
    transformer.to(dtype=weight_dtype)
    torch.manual_seed(0)
    targets = ["attn.to_k", "attn.to_q", "attn.to_v", "attn.to_out.0"]
    transformer.add_adapter(LoraConfig(r=2, lora_alpha=2, init_lora_weights="gaussian", target_modules=targets))
    transformer_lora_parameters = [p for p in transformer.parameters() if p.requires_grad]

    def save_network(network, folder):
        layers = get_peft_model_state_dict(network)
        StableDiffusion3Pipeline.save_lora_weights(folder, transformer_lora_layers=layers)

    def load_network(network, folder):
        state = StableDiffusion3Pipeline.lora_state_dict(folder)
        state = {k.removeprefix("transformer."): v for k, v in state.items() if k.startswith("transformer.")}
        set_peft_model_state_dict(network, state, adapter_name="default")

    register_hooks(accelerator, save_network, load_network)
    optimizer = torch.optim.AdamW(transformer_lora_parameters, lr=args.learning_rate)
    train_dataset = DreamBoothDataset(args.train_data)
    train_dataloader = torch.utils.data.DataLoader(
        train_dataset, batch_size=args.train_batch_size, shuffle=True, collate_fn=collate_fn
    )
    pipeline = StableDiffusion3Pipeline.from_pretrained(base, vae=None, transformer=None)
    with torch.no_grad():
        prompt_embeds, _, pooled_prompt_embeds, _ = pipeline.encode_prompt(
            args.instance_prompt, None, None, do_classifier_free_guidance=False
        )
    lr_scheduler = get_scheduler("constant", optimizer)
    transformer, optimizer, train_dataloader, lr_scheduler = accelerator.prepare(
        transformer, optimizer, train_dataloader, lr_scheduler
    )
    recorder = Recorder(args.output_dir, scheduler=noise_scheduler, optimizer=optimizer, config=vars(args), accelerator=accelerator)  # fmt: skip  # noqa: E501
    global_step = resume(accelerator, args)

    def get_sigmas(timesteps, n_dim=4, dtype=torch.float32):
        sigmas = noise_scheduler_copy.sigmas.to(dtype=dtype)
        schedule_timesteps = noise_scheduler_copy.timesteps
        step_indices = [(schedule_timesteps == t).nonzero().item() for t in timesteps]
        return sigmas[step_indices].flatten().view(-1, *(1,) * (n_dim - 1))

    while global_step < args.max_train_steps:
        transformer.train()
        for batch in train_dataloader:
            with accelerator.accumulate(transformer):
                pixel_values = batch["pixel_values"].to(dtype=vae.dtype)
                model_input = recorder.latents(batch["sample_id"], vae.encode(pixel_values).latent_dist)
                model_input = (model_input - vae.config.shift_factor) * vae.config.scaling_factor
                model_input = model_input.to(dtype=weight_dtype)
                noise, timesteps = recorder.draw(batch["sample_id"], like=model_input)
                sigmas = get_sigmas(timesteps, n_dim=model_input.ndim, dtype=model_input.dtype)
                noisy_model_input = (1.0 - sigmas) * model_input + sigmas * noise
                count = len(model_input)
                model_pred = transformer(
                    hidden_states=noisy_model_input,
                    timestep=timesteps,
                    encoder_hidden_states=prompt_embeds.expand(count, -1, -1).to(weight_dtype),
                    pooled_projections=pooled_prompt_embeds.expand(count, -1).to(weight_dtype),
                    return_dict=False,
                )[0]
                if args.precondition_outputs:
                    model_pred = model_pred * (-sigmas) + noisy_model_input
                weighting = compute_loss_weighting_for_sd3(args.weighting_scheme, sigmas=sigmas)
                target = model_input if args.precondition_outputs else noise - model_input
                loss = torch.mean(
                    (weighting.float() * (model_pred.float() - target.float()) ** 2).reshape(target.shape[0], -1), 1
                )
                loss = loss.mean()
                print("loss", float(loss.detach()))
                accelerator.backward(loss)
                recorder.step((model_pred.float() - target.float()) ** 2)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(transformer_lora_parameters, args.max_grad_norm)
                optimizer.step()
                lr_scheduler.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                global_step += 1
                save(accelerator, args, global_step)
            if global_step >= args.max_train_steps:
                break

    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        save_network(accelerator.unwrap_model(transformer).float(), args.output_dir)
    accelerator.end_training()


if __name__ == "__main__":
    main(
        parse_args(
            instance_prompt="a dog",
            precondition_outputs=1,
            weighting_scheme="logit_normal",
            logit_mean=0.0,
            logit_std=1.0,
            mode_scale=1.29,
        )
    )
