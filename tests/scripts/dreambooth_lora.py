"""A training in the shape of diffusers' train_dreambooth_lora.py, with prior preservation."""

from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.optimization import get_scheduler
from diffusers.utils import convert_state_dict_to_diffusers, convert_unet_state_dict_to_peft
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
from transformers import CLIPTextModel, CLIPTokenizer

from whence import Recorder


class DreamBoothDataset(torch.utils.data.Dataset):
    def __init__(self, instance_data_root, class_data_root):
        self.instance_images_path = list(Path(instance_data_root).iterdir())
        self.num_instance_images = len(self.instance_images_path)
        self.class_images_path = list(Path(class_data_root).iterdir()) if class_data_root else []
        self.num_class_images = len(self.class_images_path)

    def __len__(self):
        return max(self.num_instance_images, self.num_class_images)

    def __getitem__(self, index):
        example = {}
        path = self.instance_images_path[index % self.num_instance_images]
        example["instance_images"] = to_pixels(Image.open(path))
        example["sample_id"] = self.instance_images_path[index % self.num_instance_images].name
        if self.class_images_path:
            path = self.class_images_path[index % self.num_class_images]
            example["class_images"] = to_pixels(Image.open(path))
            example["class_id"] = "class/" + self.class_images_path[index % self.num_class_images].name
        return example


def collate_fn(examples, with_prior_preservation):
    pixel_values = [example["instance_images"] for example in examples]
    if with_prior_preservation:
        pixel_values += [example["class_images"] for example in examples]
    batch = {"pixel_values": torch.stack(pixel_values)}
    batch["sample_id"] = [example["sample_id"] for example in examples]
    if with_prior_preservation:
        batch["sample_id"] += [example["class_id"] for example in examples]
    return batch


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
    unet.add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules=["to_k", "to_q", "to_v", "to_out.0"]))
    params_to_optimize = [p for p in unet.parameters() if p.requires_grad]

    def save_network(network, folder):
        state = convert_state_dict_to_diffusers(get_peft_model_state_dict(network))
        about = network.peft_config["default"].to_dict()
        StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=state, unet_lora_adapter_metadata=about)

    def load_network(network, folder):
        state = StableDiffusionPipeline.lora_state_dict(folder)[0]
        state = {k.removeprefix("unet."): v for k, v in state.items() if k.startswith("unet.")}
        set_peft_model_state_dict(network, convert_unet_state_dict_to_peft(state), adapter_name="default")

    register_hooks(accelerator, save_network, load_network)
    optimizer = torch.optim.AdamW(params_to_optimize, lr=args.learning_rate)
    train_dataset = DreamBoothDataset(args.train_data, args.class_data_dir)
    train_dataloader = torch.utils.data.DataLoader(
        train_dataset,
        batch_size=args.train_batch_size,
        shuffle=True,
        collate_fn=lambda examples: collate_fn(examples, args.with_prior_preservation),
    )
    lr_scheduler = get_scheduler("constant", optimizer)
    unet, optimizer, train_dataloader, lr_scheduler = accelerator.prepare(
        unet, optimizer, train_dataloader, lr_scheduler
    )
    recorder = Recorder(args.output_dir, scheduler=noise_scheduler, optimizer=optimizer, config=vars(args), accelerator=accelerator)  # fmt: skip  # noqa: E501
    prompts = [args.instance_prompt, args.class_prompt]
    instance_ids, class_ids = tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids
    global_step = resume(accelerator, args)
    while global_step < args.max_train_steps:
        unet.train()
        for batch in train_dataloader:
            with accelerator.accumulate(unet):
                pixel_values = batch["pixel_values"].to(dtype=weight_dtype)
                model_input = recorder.latents(batch["sample_id"], vae.encode(pixel_values).latent_dist)
                model_input = model_input * vae.config.scaling_factor
                noise, timesteps = recorder.draw(batch["sample_id"], like=model_input)
                noisy_model_input = noise_scheduler.add_noise(model_input, noise, timesteps)
                count = len(pixel_values) // 2 if args.with_prior_preservation else len(pixel_values)
                input_ids = [instance_ids] * count + [class_ids] * (len(pixel_values) - count)
                encoder_hidden_states = text_encoder(torch.stack(input_ids), return_dict=False)[0]
                model_pred = unet(noisy_model_input, timesteps, encoder_hidden_states, return_dict=False)[0]
                target = noise
                model_pred_prior, target_prior = model_pred[:0], target[:0]
                if args.with_prior_preservation:
                    model_pred, model_pred_prior = torch.chunk(model_pred, 2, dim=0)
                    target, target_prior = torch.chunk(target, 2, dim=0)
                    loss = F.mse_loss(model_pred.float(), target.float(), reduction="mean")
                    prior_loss = F.mse_loss(model_pred_prior.float(), target_prior.float(), reduction="mean")
                    loss = loss + args.prior_loss_weight * prior_loss
                else:
                    loss = F.mse_loss(model_pred.float(), target.float(), reduction="mean")
                print("loss", float(loss.detach()))
                accelerator.backward(loss)
                if args.with_prior_preservation:
                    recorder.step(F.mse_loss(torch.cat([model_pred, model_pred_prior]).float(), torch.cat([target, target_prior]).float(), reduction="none"))  # fmt: skip  # noqa: E501
                else:
                    recorder.step(F.mse_loss(model_pred.float(), target.float(), reduction="none"))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(params_to_optimize, args.max_grad_norm)
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
        save_network(accelerator.unwrap_model(unet).float(), args.output_dir)
    accelerator.end_training()


if __name__ == "__main__":
    args = parse_args(instance_prompt="a dog", class_prompt="an animal", class_data_dir="", prior_loss_weight=1.0)
    args.with_prior_preservation = bool(args.class_data_dir)
    main(args)
