"""Tiny networks of diffusers with LoRA adapters, and the ways in which scripts save these."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.loaders import FluxLoraLoaderMixin, SD3LoraLoaderMixin, StableDiffusionLoraLoaderMixin
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn

UNET = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (4, 8),
    "layers_per_block": 1,
    "norm_num_groups": 2,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "attention_head_dim": 2,
    "cross_attention_dim": 6,
}


def sd() -> Any:
    return diffusers.UNet2DConditionModel(**UNET)


def sdxl() -> Any:
    return diffusers.UNet2DConditionModel(
        **UNET,
        addition_embed_type="text_time",
        addition_time_embed_dim=2,
        projection_class_embeddings_input_dim=5 + 6 * 2,
        transformer_layers_per_block=2,
        use_linear_projection=True,
    )


def sd3() -> Any:
    return diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=4,
        num_attention_heads=2,
        joint_attention_dim=6,
        caption_projection_dim=8,
        pooled_projection_dim=5,
        pos_embed_max_size=8,
        qk_norm="rms_norm",
    )


def flux() -> Any:
    return diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=6,
        pooled_projection_dim=5,
        axes_dims_rope=(2, 2, 4),
    )


NETWORKS: dict[str, Callable[[], Any]] = {"sd": sd, "sdxl": sdxl, "sd3": sd3, "flux": flux}
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")


def part_of(network: str) -> str:
    """Folder of the network in a pipeline."""
    return "unet" if network in ("sd", "sdxl") else "transformer"


def conditions(count: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """All that any of the networks is told."""
    drawn = torch.Generator().manual_seed(5)
    return {
        "encoder_hidden_states": torch.randn(count, 3, 6, generator=drawn, dtype=dtype),
        "pooled_projections": torch.randn(count, 5, generator=drawn, dtype=dtype),
        "text_embeds": torch.randn(count, 5, generator=drawn, dtype=dtype),
        "time_ids": torch.tensor([[8.0, 8, 0, 0, 8, 8]] * count, dtype=dtype),
    }


def draw_weights(model: nn.Module, seed: int, std: float = 0.3) -> None:
    """Draw all weights: what starts at zero, as lora_B does, would hide what comes before it."""
    drawn = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=drawn) * std)


def make_base(network: str, folder: Path) -> Any:
    """Save a network as a pipeline has it, with a scheduler beside it."""
    model = NETWORKS[network]()
    draw_weights(model, seed=0)
    model.save_pretrained(folder / part_of(network))
    flow = network in ("sd3", "flux")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler() if flow else diffusers.DDPMScheduler()
    scheduler.save_pretrained(folder / "scheduler")
    return model.eval()


def add_adapters(model: Any, seed: int, **settings: Any) -> LoraConfig:
    """Put trained adapters on a model, whatever its class."""
    config = LoraConfig(**({"r": 2, "lora_alpha": 3, "target_modules": list(ATTENTION)} | settings))
    base = {name: p.detach().clone() for name, p in model.named_parameters()}
    inject_adapter_in_model(config, model, "default")
    draw_weights(model, seed)
    for name, parameter in model.named_parameters():
        if ".lora_" not in name:
            parameter.data.copy_(base[name.replace(".base_layer.", ".")])
    return config


def save_diffusers(
    model: Any, config: LoraConfig, folder: Path, network: str, *, names: str = "peft", metadata: bool = True
) -> None:
    """Save adapters as the training scripts do, by the mixin of the pipeline."""
    state = get_peft_model_state_dict(model, adapter_name="default")
    if names == "diffusers":
        state = convert_state_dict_to_diffusers(state)
    settings = config.to_dict().items()  # a set has another order in another process
    about = {key: sorted(v) if isinstance(v, set) else v for key, v in settings} if metadata else None
    if part_of(network) == "unet":
        StableDiffusionLoraLoaderMixin.save_lora_weights(
            folder, unet_lora_layers=state, unet_lora_adapter_metadata=about
        )
    else:
        mixin = SD3LoraLoaderMixin if network == "sd3" else FluxLoraLoaderMixin
        mixin.save_lora_weights(folder, transformer_lora_layers=state, transformer_lora_adapter_metadata=about)


def save_peft(base: Any, config: LoraConfig, adapted: Any, folder: Path) -> None:
    """Save adapters as ``PeftModel.save_pretrained`` does."""
    wrapped = get_peft_model(base, config)
    trained = {f"base_model.model.{name}": p for name, p in adapted.named_parameters()}
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            parameter.copy_(trained[name])
    wrapped.save_pretrained(folder)
