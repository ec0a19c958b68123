"""Encoders: what turns images into features that are compared without any gradient.

::

    vae          the mode of an AutoencoderKL's posterior, shifted and scaled as denoising networks see it
    clip         image features of a CLIP model of transformers
    embeddings   of any model of transformers: its image features where it has a text side too, else its pooled output,
                 else the mean of its last hidden states; or what a function of the user's gives

An encoder is a folder that ``save_pretrained`` has written, ``hub:NAME`` or ``hub:NAME@REVISION`` (the only form that
may use the network), or a function: a callable, ``module:function`` or ``FILE.py:function``. Folders are told apart by
their configuration and weights; functions by what they give for a few of the training images.

Models of transformers get images of 8 bits a channel, as their own preprocessor takes them; all others floats in
[-1, 1]. Grey images become three equal channels where three are asked for. Arithmetic is float32.
"""

import hashlib
import importlib
import importlib.util
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32, UInt8
from numpy import ndarray
from PIL import Image
from torch import Tensor

from whence._files import sha256_of_file, sha256_of_json
from whence._model_files import quiet_diffusers, quiet_libraries
from whence.data import ImageData
from whence.diffusion.latents import latent_scaling
from whence.errors import ConfigError
from whence.methods.frame import Baseline, BaselineKind

SETTINGS: dict[BaselineKind, str] = {"vae": "vae", "clip": "clip", "embeddings": "encoder"}
"""Kind of a baseline to the setting that names its encoder."""

_INSTALL = "pip install 'whence[embeddings]'"
_HUB = "hub:"
_VAE_FILES = ["config.json", "diffusion_pytorch_model*.safetensors", "vae/*.json", "vae/*.safetensors"]
_MODEL_FILES = ["*.json", "*.safetensors"]
_PROBES = 4
"""Training images by which a function is told from another."""

Pixels = Float32[ndarray, "image channel height width"]
Features = Float32[ndarray, "image feature"]


@dataclass(frozen=True)
class LoadedEncoder:
    """An encoder in memory."""

    gives: str
    """What its features are, for the reader."""
    encode: Callable[[Pixels], Any]

    def __call__(self, pixels: Pixels) -> Features:
        """Encode images, values in [-1, 1].

        Returns:
            One row of features for each image.

        Raises:
            ConfigError: If what comes back is not one row of finite numbers for each image.
        """
        with torch.no_grad():
            found = self.encode(pixels)
        found = found.detach().float().cpu().numpy() if isinstance(found, Tensor) else np.asarray(found)
        if found.ndim != 2 or len(found) != len(pixels) or not found.shape[1] or found.dtype.kind != "f":
            raise ConfigError(
                f"An encoder must give one row of floats for each image, (image, feature); {self.gives} gave "
                f"{found.dtype} of shape {found.shape} for {len(pixels)} images."
            )
        if not np.isfinite(found).all():
            raise ConfigError(
                f"{self.gives} has values that are not finite for some of {len(pixels)} images whose values lie in "
                "[-1, 1]; look at the encoder's weights and at its arithmetic."
            )
        return found.astype(np.float32)


@dataclass(frozen=True)
class Encoder:
    """An encoder that is found but not in memory."""

    given: str
    """As the user named it."""
    identity: dict[str, Any]
    """Plain values that differ where its features may differ."""
    load: Callable[[], LoadedEncoder] = field(repr=False)

    @cached_property
    def loaded(self) -> LoadedEncoder:
        """The encoder in memory, loaded once."""
        return self.load()


def find_encoder(baseline: Baseline, train: ImageData, *, device: str = "cpu", allow_pickle: bool = False) -> Encoder:
    """Find the encoder of a baseline; models are not loaded yet.

    Args:
        baseline: A declaration whose encoder is filled in.
        train: The training images; functions are told apart by what they give for the first of them.
        device: Torch device.
        allow_pickle: Also read ``.bin`` weights.

    Returns:
        The encoder.

    Raises:
        ConfigError: If none is named, or there is no such thing.
    """
    given, setting = baseline.encoder, SETTINGS[baseline.kind]
    if given is None:
        raise ConfigError(
            f"{baseline.name} compares what an encoder makes of the images, and none is named: give --{setting} "
            f"({setting}=... in Python). {_FORMS[baseline.kind]}"
        )
    if callable(given):
        return _of_function(given, getattr(given, "__qualname__", type(given).__qualname__), train, device)
    folder = _download(given, baseline.kind) if given.startswith(_HUB) else Path(given)
    if folder.is_dir():
        find = {"vae": _find_vae, "clip": _find_clip}.get(baseline.kind, _find_transformers)
        return find(given, folder, device, allow_pickle)
    if baseline.kind == "embeddings" and ":" in given:
        return _of_function(_import_function(given), given, train, device)
    raise ConfigError(f"There is no encoder {given!r} for {baseline.name}. {_FORMS[baseline.kind]}")


_FORMS = {
    "vae": "It is a folder with a saved AutoencoderKL, or a pipeline's folder with one in vae/; or hub:NAME.",
    "clip": "It is a folder with a CLIP model and its preprocessor, saved by transformers; or hub:NAME.",
    "embeddings": (
        "It is a folder with a model and its preprocessor, saved by transformers; hub:NAME; module:function; or "
        "FILE.py:function."
    ),
}


def _download(given: str, kind: BaselineKind) -> Path:
    """Take a model from the hub, which the user has asked for by its id."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    name, _, revision = given.removeprefix(_HUB).partition("@")
    files, others = (_VAE_FILES, None) if kind == "vae" else (_MODEL_FILES, ["*/*"])
    try:
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=files, ignore_patterns=others))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ConfigError(
            f"{given} cannot be had from the hub: {error} Download it elsewhere and give its folder."
        ) from error


# Folders


def _identify(kind: str, folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    files = [f for f in sorted(folder.iterdir()) if f.suffix in (".json", ".safetensors", ".bin")]
    name = config.get("_class_name") or next(iter(config.get("architectures") or []), None)
    return {"kind": kind, "class": name, "sha256": sha256_of_json({f.name: sha256_of_file(f) for f in files})}


def _read_config(folder: Path, remedy: str) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        config = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder} holds no model: {path.name} cannot be read ({error}). {remedy}") from error
    return config if isinstance(config, dict) else {}


def _find_vae(given: str, folder: Path, device: str, allow_pickle: bool) -> Encoder:
    folder = folder / "vae" if (folder / "vae" / "config.json").exists() else folder
    config = _read_config(folder, _FORMS["vae"])
    if config.get("_class_name") != "AutoencoderKL":
        raise ConfigError(f"{folder} holds a {config.get('_class_name')}, no AutoencoderKL. {_FORMS['vae']}")
    load = partial(_load_vae, folder, device, allow_pickle)
    identity = _identify("vae", folder, config)
    if config.get("latents_mean") is not None and config.get("latents_std") is not None:
        identity["channels"] = "standardised"  # scores from before that was done are other ones
    return Encoder(given, identity, load)


def _load_vae(folder: Path, device: str, allow_pickle: bool) -> LoadedEncoder:
    from diffusers import AutoencoderKL

    with quiet_diffusers():
        try:
            loaded: Any = AutoencoderKL.from_pretrained(
                folder,
                local_files_only=True,
                use_safetensors=None if allow_pickle else True,
                low_cpu_mem_usage=False,
                output_loading_info=True,
            )
            model, info = loaded
        except (OSError, ValueError, RuntimeError) as error:
            raise ConfigError(f"The AutoencoderKL in {folder} cannot be loaded: {error}") from error
        _check_complete(folder, info["missing_keys"])
        model = model.to(device, torch.float32).eval()
    shift, scale = latent_scaling(model.config)

    def encode(pixels: Pixels) -> Tensor:
        images = torch.from_numpy(_with_channels(pixels, model.config["in_channels"], folder)).to(device)
        return ((model.encode(images).latent_dist.mode().cpu() - shift) * scale).flatten(1)

    return LoadedEncoder("latents (mode of the posterior, scaled) of AutoencoderKL", encode)


def _find_clip(given: str, folder: Path, device: str, allow_pickle: bool) -> Encoder:
    found = _read_config(folder, _FORMS["clip"]).get("model_type")
    if found not in ("clip", "clip_vision_model"):
        raise ConfigError(
            f"{folder} holds a model of type {found}, no CLIP model. For any other encoder, use the method embeddings "
            "and --encoder."
        )
    return _find_transformers(given, folder, device, allow_pickle)


def _find_transformers(given: str, folder: Path, device: str, allow_pickle: bool) -> Encoder:
    config = _read_config(folder, _FORMS["embeddings"])
    if not (folder / "preprocessor_config.json").exists():
        raise ConfigError(
            f"{folder} has no preprocessor_config.json, which says how the model takes images. Save the model's image "
            "processor there: processor.save_pretrained(folder)."
        )
    _import_transformers()  # said before anything is computed
    return Encoder(
        given,
        _identify("transformers", folder, config),
        partial(_load_transformers, folder, config, device, allow_pickle),
    )


def _load_transformers(folder: Path, config: dict[str, Any], device: str, allow_pickle: bool) -> LoadedEncoder:
    transformers = _import_transformers()
    # A CLIP vision model has its projection in a class of its own; as a plain model it would go without.
    projected = config.get("architectures") == ["CLIPVisionModelWithProjection"]
    with quiet_libraries():
        try:
            # The same pixels whether or not torchvision is there.
            processor = transformers.AutoImageProcessor.from_pretrained(folder, local_files_only=True, backend="pil")
            model_class = transformers.CLIPVisionModelWithProjection if projected else transformers.AutoModel
            model, info = model_class.from_pretrained(
                folder,
                local_files_only=True,
                use_safetensors=None if allow_pickle else True,
                output_loading_info=True,
                dtype=torch.float32,
            )
        except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:
            raise ConfigError(f"The model in {folder} cannot be loaded: {error}") from error
    has_pooler = not any(name.startswith("pooler.") for name in info["missing_keys"])
    _check_complete(folder, [name for name in info["missing_keys"] if not name.startswith("pooler.")])
    model = model.to(device).eval()

    def prepare(pixels: Pixels) -> Tensor:
        pictures = [Image.fromarray(image) for image in _to_bytes(_with_channels(pixels, 3, folder))]
        return processor(images=pictures, return_tensors="pt")["pixel_values"].to(device)

    with torch.no_grad():
        gives, features = _choose_features(model, has_pooler, prepare(np.zeros((1, 3, 32, 32), np.float32)))

    def encode(pixels: Pixels) -> Tensor:
        return features(prepare(pixels))

    return LoadedEncoder(f"{gives} of {type(model).__name__}", encode)


def _choose_features(model: Any, has_pooler: bool, probe: Tensor) -> tuple[str, Callable[[Tensor], Tensor]]:
    """Choose what of a model's output stands for an image, by its output for one.

    A pooler whose weights are not in the folder is one of random numbers, and is passed over.

    Returns:
        What it is, and a function that gives it.

    Raises:
        ConfigError: If there is nothing that could.
    """
    if hasattr(model, "get_image_features") and hasattr(model, "get_text_features"):
        return "image features", partial(_image_features, model)
    found = model(pixel_values=probe)
    if found.get("image_embeds") is not None:
        return "image features", lambda pixels: model(pixel_values=pixels).image_embeds
    if has_pooler and found.get("pooler_output") is not None:
        return "pooled output", lambda pixels: model(pixel_values=pixels).pooler_output.flatten(1)
    if found.get("last_hidden_state") is not None:
        return "mean of the last hidden states", partial(_mean_state, model)
    raise ConfigError(
        f"{type(model).__name__} gives {', '.join(found)}: neither image features, nor a pooled output, nor hidden "
        "states. Wrap it in a function that gives one row of features for each image."
    )


def _image_features(model: Any, pixels: Tensor) -> Tensor:
    found = model.get_image_features(pixel_values=pixels)
    return found if isinstance(found, Tensor) else found.pooler_output


def _mean_state(model: Any, pixels: Tensor) -> Tensor:
    """Average over tokens, or over the positions of a map of features."""
    states = model(pixel_values=pixels).last_hidden_state
    return states.mean(1) if states.ndim == 3 else states.flatten(2).mean(2)


def _check_complete(folder: Path, missing: Sequence[str]) -> None:
    if missing:
        names = ", ".join(sorted(missing)[:5])
        raise ConfigError(
            f"{folder} lacks {len(missing)} of the model's weights ({names}), which would be drawn at random. Save the "
            "whole model there."
        )


def _import_transformers() -> Any:
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise ConfigError(f"Encoders of transformers need that package ({error}). Install it: {_INSTALL}") from error


def _with_channels(pixels: Pixels, channels: int, folder: Path) -> Float32[ndarray, "image wanted height width"]:
    if pixels.shape[1] == 1 and channels == 3:
        pixels = pixels.repeat(3, axis=1)
    if pixels.shape[1] != channels:
        raise ConfigError(
            f"The encoder in {folder} takes {channels} channels, the images have {pixels.shape[1]}. Give another."
        )
    return pixels


def _to_bytes(pixels: Pixels) -> UInt8[ndarray, "image height width channel"]:
    return np.clip(np.rint((pixels + 1) * 127.5), 0, 255).astype(np.uint8).transpose(0, 2, 3, 1)


# Functions


def _of_function(function: Callable[..., Any], given: str, train: ImageData, device: str) -> Encoder:
    """Take a function, and try it: what its weights are cannot be seen from outside."""

    def encode(pixels: Pixels) -> Any:
        return function(torch.from_numpy(pixels).to(device))

    loaded = LoadedEncoder(given, encode)
    probe = train.pixels(range(min(_PROBES, len(train))))
    first, second = loaded(probe), loaded(probe)
    scale = max(float(np.abs(first).max()), 1e-30)
    if first.shape != second.shape or np.abs(first - second).max() > 1e-3 * scale:
        raise ConfigError(
            f"{given} gives other features when it sees the same images again. Features must be fixed: put the model "
            "into evaluation mode, and leave out random crops and noise."
        )
    sha256 = hashlib.sha256(np.ascontiguousarray(first, "<f4").tobytes()).hexdigest()
    return Encoder(given, {"kind": "function", "name": given, "sha256_of_features": sha256}, lambda: loaded)


def _import_function(given: str) -> Callable[..., Any]:
    """Import ``module:function`` or ``FILE.py:function``."""
    place, _, name = given.rpartition(":")
    try:
        module = _run_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    except (ImportError, OSError) as error:
        raise ConfigError(f"The encoder {given} cannot be imported: {error}. {_FORMS['embeddings']}") from error
    function = getattr(module, name, None)
    if not callable(function):
        known = [n for n, value in vars(module).items() if callable(value) and not n.startswith("_")]
        raise ConfigError(
            f"{place} has no function {name}, which the encoder {given} names; it has {', '.join(known) or 'none'}."
        )
    return function


def _run_file(path: Path) -> ModuleType:
    name = f"whence_encoder_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None  # of a name that ends with .py there is always one
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickles look their module up
    spec.loader.exec_module(module)
    return module
