"""Latents and text embeddings as a pipeline of ``diffusers`` makes them, with its own VAE and text encoders.

Texts go through the pipeline's own ``encode_prompt``, without guidance; images through its VAE, shifted and scaled as
its configuration says. Nothing is downloaded: the pipeline is a folder with a ``model_index.json``.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32
from numpy import ndarray
from torch import Tensor

from whence._files import sha256_of_file, sha256_of_json
from whence._model_files import quiet_libraries, read_json
from whence.config import ConditioningSettings
from whence.diffusion.latents import latent_scaling
from whence.encoded import AbstractEncoder, Arrays, Latents
from whence.errors import CheckpointError, ConfigError

_AUTOENCODERS = ("vae", "vqvae")
_OF_TEXT = ("text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3")


@dataclass(frozen=True)
class PipelineEncoder(AbstractEncoder):
    """The VAE and the text encoders in the folder of a saved pipeline.

    Raises:
        CheckpointError: If the folder holds no pipeline.
    """

    folder: Path
    network: str
    """Class of the network that is told what comes out."""
    settings: ConditioningSettings
    device: str = "cpu"

    def __post_init__(self):
        if not (self.folder / "model_index.json").exists():
            raise CheckpointError(
                f"{self.folder} holds no pipeline: model_index.json is missing. Give the folder that "
                "pipeline.save_pretrained wrote, with --base."
            )

    @cached_property
    def parts(self) -> tuple[str, ...]:
        """Parts of the pipeline that are there, by their names."""
        return tuple(name for name, of in self._index.items() if of[0] is not None)

    @cached_property
    def _index(self) -> dict[str, list[Any]]:
        """Library and class of each part; None for those that the pipeline lacks."""
        index = read_json(self.folder / "model_index.json")
        return {name: of for name, of in index.items() if isinstance(of, list)}

    @property
    def has_vae(self) -> bool:
        """Whether the network sees latents."""
        return self._vae_name is not None

    @property
    def _vae_name(self) -> str | None:
        return next((name for name in _AUTOENCODERS if name in self.parts), None)

    @property
    def hash(self) -> str:
        """Hash of all that latents and conditions depend on."""
        return self._hash

    @cached_property
    def _hash(self) -> str:
        """Hash the files of VAE, tokenizers and text encoders, and of the settings that change what they give."""
        names = [name for name in (*_AUTOENCODERS, *_OF_TEXT) if name in self.parts]
        missing = [name for name in names if not (self.folder / name).is_dir()]
        if missing:
            raise CheckpointError(
                f"model_index.json in {self.folder} names {', '.join(missing)}, whose folders are missing. Restore "
                "them, or give the whole pipeline with --base."
            )
        files = [f for name in names for f in sorted((self.folder / name).iterdir())]
        known = {f"{f.parent.name}/{f.name}": sha256_of_file(f) for f in files if f.is_file()}
        asked = [self.settings.guidance_scale, self.settings.max_sequence_length]
        return sha256_of_json([self.network, known, asked])

    @torch.no_grad()
    def latents(self, pixels: Float32[ndarray, "row channel height width"], *, with_deviation: bool) -> Latents:
        """Encode images.

        Args:
            pixels: In [-1, 1].
            with_deviation: Also give the standard deviation of the posterior.

        Returns:
            What the network is trained on.

        Raises:
            CheckpointError: If the VAE has no posterior and a standard deviation is asked for, or takes other images.
        """
        vae = self._vae
        if pixels.shape[1] != vae.config.in_channels:
            raise CheckpointError(
                f"The VAE in {self.folder} takes {vae.config.in_channels} channels; the images have "
                f"{pixels.shape[1]}. Leave --grey out, or give the pipeline that was trained on such images."
            )
        encoded = vae.encode(torch.from_numpy(pixels).to(self.device))
        shift, scale = latent_scaling(vae.config)
        posterior = getattr(encoded, "latent_dist", None)
        if posterior is None:
            if with_deviation:
                raise CheckpointError(
                    f"Training drew latents from a posterior; the {type(vae).__name__} in {self.folder} has "
                    "none. Give the pipeline that was trained."
                )
            return Latents(((_latent_of(encoded).cpu() - shift) * scale).numpy())
        mean = ((posterior.mode().cpu() - shift) * scale).numpy()
        return Latents(mean, (posterior.std.cpu() * scale).numpy() if with_deviation else None)

    @torch.no_grad()
    def images_of(self, latents: Float32[ndarray, "row latent h w"]) -> Float32[ndarray, "row channel height width"]:
        """Decode latents.

        Args:
            latents: As the network makes them.

        Returns:
            Images in [-1, 1].
        """
        shift, scale = latent_scaling(self._vae.config)
        decoded = [
            self._vae.decode((torch.from_numpy(z[None]) / scale + shift).to(self.device)).sample for z in latents
        ]
        return torch.cat(decoded).clamp(-1, 1).float().cpu().numpy()

    @torch.no_grad()
    def conditions(self, texts: Sequence[str], size: tuple[int, int]) -> Arrays:
        """Encode captions.

        Args:
            texts: Captions; the empty one stands for a condition that is withheld.
            size: Height and width of the images in pixels.

        Returns:
            Arrays by the names of the network's arguments, one row for each caption.
        """
        encode = _OF_NETWORK[self.network]
        with quiet_libraries():
            given = encode(self._text_pipeline, list(texts), self._prompt_arguments)
        given |= self._further(len(texts), size)
        return {name: _as_array(value) for name, value in given.items()}

    def _further(self, count: int, size: tuple[int, int]) -> dict[str, Tensor]:
        """Give what networks are told besides the caption: sizes (SDXL), a guidance scale (FLUX)."""
        height, width = size
        further = {}
        if self.network == "UNet2DConditionModel" and "text_encoder_2" in self.parts:
            further["time_ids"] = torch.tensor([[height, width, 0, 0, height, width]] * count, dtype=torch.float32)
        if self.network == "PixArtTransformer2DModel":
            further["resolution"] = torch.tensor([[height, width]] * count, dtype=torch.float32)
            further["aspect_ratio"] = torch.tensor([[height / width]] * count, dtype=torch.float32)
        if self.settings.guidance_scale is not None:
            further["guidance"] = torch.full((count,), self.settings.guidance_scale, dtype=torch.float32)
        return further

    @property
    def _prompt_arguments(self) -> dict[str, Any]:
        """Give what ``encode_prompt`` is told beside the texts, as far as the pipeline takes it."""
        wanted = {
            "device": self.device,
            "num_images_per_prompt": 1,
            "do_classifier_free_guidance": False,
            "max_sequence_length": self.settings.max_sequence_length,
            "prompt_2": None,
            "prompt_3": None,
        }
        takes = inspect.signature(self._text_pipeline.encode_prompt).parameters
        if wanted["max_sequence_length"] is None:
            del wanted["max_sequence_length"]
        elif "max_sequence_length" not in takes:
            raise ConfigError(
                f"max_sequence_length has no effect on a {type(self._text_pipeline).__name__}, whose captions all have "
                "one length. Leave it out."
            )
        return {name: value for name, value in wanted.items() if name in takes}

    @cached_property
    def _vae(self) -> Any:
        assert self._vae_name is not None  # asked only where there is one
        return getattr(self._load(keep=_AUTOENCODERS), self._vae_name).eval()

    @cached_property
    def _text_pipeline(self) -> Any:
        missing = [name for name in ("tokenizer", "text_encoder") if name not in self.parts]
        if missing:
            raise CheckpointError(
                f"The pipeline in {self.folder} has no {' and no '.join(missing)}, by which the {self.network} is told "
                "captions. Give the whole pipeline with --base."
            )
        return self._load(keep=_OF_TEXT)

    def load_tokenizer(self) -> Any:
        """Load the pipeline's tokenizer alone.

        Returns:
            A tokenizer that the caller may change.

        Raises:
            CheckpointError: If the pipeline has none.
        """
        if "tokenizer" not in self.parts:
            raise CheckpointError(
                f"The pipeline in {self.folder} has no tokenizer, by which the {self.network} is told captions. Give "
                "the whole pipeline with --base."
            )
        return self._load(keep=("tokenizer",)).tokenizer

    def _load(self, keep: Sequence[str]) -> Any:
        import diffusers

        # Also those that the pipeline lacks, or it would ask for them.
        leave = {name: None for name in self._index if name not in keep}
        try:
            with quiet_libraries(), torch.random.fork_rng(devices=[]):
                pipeline = diffusers.DiffusionPipeline.from_pretrained(str(self.folder), local_files_only=True, **leave)
                return pipeline.to(self.device, torch.float32)
        except Exception as error:  # each part raises what its own library likes
            first = (str(error).splitlines() or [type(error).__name__])[0]
            raise CheckpointError(
                f"{', '.join(keep)} of the pipeline in {self.folder} cannot be loaded: {first}"
            ) from error


def _latent_of(encoded: Any) -> Tensor:
    return encoded.latent if hasattr(encoded, "latent") else encoded.latents


def _as_array(value: Tensor) -> ndarray:
    value = value.detach().cpu()
    return np.ascontiguousarray((value.float() if value.is_floating_point() else value).numpy())


def _stable_diffusion(pipeline: Any, texts: list[str], arguments: dict[str, Any]) -> dict[str, Tensor]:
    found = pipeline.encode_prompt(texts, **arguments)
    if len(found) == 2:
        return {"encoder_hidden_states": found[0]}
    return {"encoder_hidden_states": found[0], "text_embeds": found[2]}


def _sd3(pipeline: Any, texts: list[str], arguments: dict[str, Any]) -> dict[str, Tensor]:
    embeddings, _, pooled, _ = pipeline.encode_prompt(texts, **arguments)
    return {"encoder_hidden_states": embeddings, "pooled_projections": pooled}


def _flux(pipeline: Any, texts: list[str], arguments: dict[str, Any]) -> dict[str, Tensor]:
    embeddings, pooled, _ = pipeline.encode_prompt(texts, **arguments)
    return {"encoder_hidden_states": embeddings, "pooled_projections": pooled}


def _masked(pipeline: Any, texts: list[str], arguments: dict[str, Any]) -> dict[str, Tensor]:
    embeddings, mask, *_ = pipeline.encode_prompt(texts, **arguments)
    return {"encoder_hidden_states": embeddings, "encoder_attention_mask": mask}


_OF_NETWORK: dict[str, Callable[[Any, list[str], dict[str, Any]], dict[str, Tensor]]] = {
    "UNet2DConditionModel": _stable_diffusion,
    "SD3Transformer2DModel": _sd3,
    "FluxTransformer2DModel": _flux,
    "PixArtTransformer2DModel": _masked,
    "SanaTransformer2DModel": _masked,
}
"""What ``encode_prompt`` gives, by the network that it is for."""
