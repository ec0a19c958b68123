"""Pipelines of diffusers' and transformers' own classes with tiny random weights, saved as users have them on disk.

Images are 16 x 16, latents 4 x 8 x 8. Weights depend on a seed alone.
"""

import string
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

LETTERS = list(string.ascii_lowercase + string.digits + ",.-")
WIDTH = 8
"""Of text embeddings."""


def save_pipeline(kind: str, folder: Path, *, seed: int = 0, **scheduler: Any) -> Path:
    """Save a pipeline of a kind: sd, sdxl, sd3, flux, pixart, sana, dit, latents, pixels."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of settings that are older than what diffusers advises
        torch.manual_seed(seed)
        PIPELINES[kind](scheduler).save_pretrained(folder)
    return folder


def clip_tokenizer() -> Any:
    tokens = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    return transformers.CLIPTokenizer(
        vocab={token: k for k, token in enumerate(tokens)}, merges=[], model_max_length=16
    )


def clip_encoder(*, with_projection: bool = False) -> Any:
    vocabulary = 2 * len(LETTERS) + 2
    config = transformers.CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=WIDTH,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        projection_dim=WIDTH,
        bos_token_id=vocabulary - 2,
        eos_token_id=vocabulary - 1,
        pad_token_id=vocabulary - 1,
    )
    made = transformers.CLIPTextModelWithProjection if with_projection else transformers.CLIPTextModel
    return made(config).eval()


def t5_tokenizer() -> Any:
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -2.0), ("▁", -1.0), *((letter, -3.0) for letter in LETTERS)]
    return transformers.T5Tokenizer(vocab=pieces, model_max_length=16)


def t5_encoder(width: int = WIDTH) -> Any:
    config = transformers.T5Config(
        vocab_size=len(LETTERS) + 4, d_model=width, d_kv=4, d_ff=16, num_layers=1, num_heads=2
    )
    return transformers.T5EncoderModel(config).eval()


def gemma_tokenizer() -> Any:
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "▁", *LETTERS]
    return transformers.GemmaTokenizer(vocab={token: k for k, token in enumerate(tokens)}, merges=[])


def gemma_encoder() -> Any:
    config = transformers.Gemma2Config(
        vocab_size=len(LETTERS) + 5,
        hidden_size=WIDTH,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
    )
    return transformers.Gemma2Model(config).eval()


def vae(**changes: Any) -> Any:
    settings: dict[str, Any] = {
        "block_out_channels": (4, 8),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "latent_channels": 4,
        "norm_num_groups": 2,
        "sample_size": 16,
    }
    return diffusers.AutoencoderKL(**(settings | changes)).eval()


def text_unet(**changes: Any) -> Any:
    settings: dict[str, Any] = {
        "sample_size": 8,
        "block_out_channels": (4, 8),
        "layers_per_block": 1,
        "norm_num_groups": 2,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "attention_head_dim": 2,
        "cross_attention_dim": WIDTH,
    }
    return diffusers.UNet2DConditionModel(**(settings | changes))


def _ddpm(scheduler: dict[str, Any]) -> Any:
    return diffusers.DDPMScheduler(**({"num_train_timesteps": 50} | scheduler))


def _flow(scheduler: dict[str, Any]) -> Any:
    return diffusers.FlowMatchEulerDiscreteScheduler(**({"num_train_timesteps": 50, "shift": 3.0} | scheduler))


def stable_diffusion(scheduler: dict[str, Any]) -> Any:
    return diffusers.StableDiffusionPipeline(
        vae=vae(),
        text_encoder=clip_encoder(),
        tokenizer=clip_tokenizer(),
        unet=text_unet(),
        scheduler=_ddpm(scheduler),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def stable_diffusion_xl(scheduler: dict[str, Any]) -> Any:
    unet = text_unet(
        cross_attention_dim=2 * WIDTH,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 * 4 + WIDTH,
    )
    return diffusers.StableDiffusionXLPipeline(
        vae=vae(),
        text_encoder=clip_encoder(),
        text_encoder_2=clip_encoder(with_projection=True),
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(),
        unet=unet,
        scheduler=_ddpm(scheduler),
    )


def stable_diffusion_3(scheduler: dict[str, Any]) -> Any:
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=1,
        attention_head_dim=4,
        num_attention_heads=2,
        joint_attention_dim=2 * WIDTH,
        caption_projection_dim=8,
        pooled_projection_dim=2 * WIDTH,
        out_channels=4,
        pos_embed_max_size=8,
    )
    return diffusers.StableDiffusion3Pipeline(
        vae=vae(shift_factor=0.1, scaling_factor=1.5),
        text_encoder=clip_encoder(with_projection=True),
        text_encoder_2=clip_encoder(with_projection=True),
        text_encoder_3=t5_encoder(2 * WIDTH),
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(),
        tokenizer_3=t5_tokenizer(),
        transformer=transformer,
        scheduler=_flow(scheduler),
    )


def flux(scheduler: dict[str, Any]) -> Any:
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=1,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        axes_dims_rope=(2, 2, 4),
        guidance_embeds=scheduler.pop("guidance_embeds", False),
    )
    return diffusers.FluxPipeline(
        vae=vae(shift_factor=0.1, scaling_factor=0.4),
        text_encoder=clip_encoder(),
        text_encoder_2=t5_encoder(),
        tokenizer=clip_tokenizer(),
        tokenizer_2=t5_tokenizer(),
        transformer=transformer,
        scheduler=_flow(scheduler),
    )


def pixart(scheduler: dict[str, Any]) -> Any:
    transformer = diffusers.PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=4,
        in_channels=4,
        out_channels=8,
        num_layers=1,
        cross_attention_dim=8,
        sample_size=8,
        caption_channels=WIDTH,
        use_additional_conditions=False,
    )
    return diffusers.PixArtAlphaPipeline(
        vae=vae(),
        text_encoder=t5_encoder(),
        tokenizer=t5_tokenizer(),
        transformer=transformer,
        scheduler=_ddpm(scheduler),
    )


def sana(scheduler: dict[str, Any]) -> Any:
    transformer = diffusers.SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=4,
        num_cross_attention_heads=2,
        cross_attention_head_dim=4,
        cross_attention_dim=8,
        caption_channels=WIDTH,
        sample_size=8,
        patch_size=1,
    )
    autoencoder = diffusers.AutoencoderDC(
        latent_channels=4,
        encoder_block_types="ResBlock",
        decoder_block_types="ResBlock",
        encoder_block_out_channels=(4, 8),
        decoder_block_out_channels=(4, 8),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=((), ()),
        decoder_qkv_multiscales=((), ()),
        scaling_factor=0.5,
    )
    return diffusers.SanaPipeline(
        vae=autoencoder,
        text_encoder=gemma_encoder(),
        tokenizer=gemma_tokenizer(),
        transformer=transformer,
        scheduler=_flow(scheduler),
    )


def dit(scheduler: dict[str, Any]) -> Any:
    transformer = diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=4,
        in_channels=4,
        out_channels=8,
        num_layers=1,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=3,
        norm_num_groups=2,
    )
    return diffusers.DiTPipeline(transformer=transformer, vae=vae(), scheduler=_ddpm(scheduler))


def unconditional_unet(channels: int, size: int, **changes: Any) -> Any:
    return diffusers.UNet2DModel(
        sample_size=size,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=(4, 8),
        layers_per_block=1,
        norm_num_groups=2,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        **changes,
    )


def latents(scheduler: dict[str, Any]) -> Any:
    return diffusers.LDMPipeline(
        vqvae=diffusers.VQModel(
            block_out_channels=(4, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=4,
            norm_num_groups=2,
        ),
        unet=unconditional_unet(4, 8),
        scheduler=diffusers.DDIMScheduler(num_train_timesteps=50),
    )


def pixels(scheduler: dict[str, Any]) -> Any:
    return diffusers.DDPMPipeline(unet=unconditional_unet(3, 16), scheduler=_ddpm(scheduler))


PIPELINES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "sd": stable_diffusion,
    "sdxl": stable_diffusion_xl,
    "sd3": stable_diffusion_3,
    "flux": flux,
    "pixart": pixart,
    "sana": sana,
    "dit": dit,
    "latents": latents,
    "pixels": pixels,
}
