"""LoRA adapters on disk, and how they are put on the model that they adapt.

    pytorch_lora_weights.safetensors                  of diffusers: names start with unet. or transformer.
    adapter_model.safetensors, adapter_config.json    of peft

Of the former, alpha stands in its header, in keys that end with .alpha, or nowhere. Both lie in the folder of a
checkpoint, or in ``unet`` or ``transformer`` below it. Whatever the file calls them, the adapters of a model are named
as peft names them: ``...to_q.lora_A.default.weight``. The base is frozen. torch and peft are imported only when
adapters are put on a model.
"""

import json
import re
import warnings
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from whence._files import sha256_of_json
from whence._model_files import hash_tensors, read_header, read_json, read_tensors
from whence.errors import CheckpointError, ConfigError, NumericsError

NETWORKS = ("unet", "transformer")
"""Folders of a pipeline, or of a checkpoint, in which the network lies that denoises."""
WEIGHTS_FILES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
_PICKLES = ("pytorch_lora_weights.bin", "adapter_model.bin")

_OF_OTHERS = ("text_encoder", "text_encoder_2", "text_encoder_3", "lora_te", "lora_te1", "lora_te2", "prior", "vae")
_USED = {"r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "lora_bias", "lora_dropout"}
"""Settings of peft's LoraConfig that are followed; the patterns are looked up for each layer."""
_WITHOUT_EFFECT = {
    "auto_mapping", "base_model_name_or_path", "ensure_weight_tying", "exclude_modules", "inference_mode",
    "layers_pattern", "layers_to_transform", "megatron_core", "peft_type", "peft_version", "qalora_group_size",
    "revision", "runtime_config", "target_modules", "task_type",
}  # fmt: skip
"""Those that say where adapters go, which the file itself says, or what training did before its first step."""
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
"""Ways of starting a LoRA that leave its base as it is."""


@dataclass(frozen=True)
class LoraFiles:
    """One adapter on disk.

    Raises:
        CheckpointError: If it holds adapters of a text encoder, or of several networks.
    """

    weights: Path
    config: Path | None
    """``adapter_config.json`` of peft."""

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor, by its name in the file."""
        return read_header(self.weights)[0]

    @cached_property
    def network(self) -> str | None:
        """Which network of a pipeline it adapts: unet or transformer, or None where the file does not say."""
        found = {_start_of(key) for key in self.shapes}
        others = sorted(start for start in found if start in _OF_OTHERS)
        if others:
            raise CheckpointError(
                f"{self.weights} also adapts {', '.join(others)}. The captions of its training went through encoders "
                "that changed, and whence encodes them with those of the base. Train the LoRA of the "
                "denoising network alone (without --train_text_encoder)."
            )
        if "lora_unet" in found:
            raise CheckpointError(
                f"{self.weights} has the names of kohya's scripts. Open it with pipeline.load_lora_weights of "
                "diffusers, and save it with pipeline.unet.save_lora_adapter(folder)."
            )
        networks = [name for name in NETWORKS if name in found]
        if len(networks) > 1:
            raise CheckpointError(f"{self.weights} adapts both unet and transformer. Save one file for each of them.")
        return networks[0] if networks else None

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Settings of peft's LoraConfig that came with it; empty where there are none."""
        if self.config is not None:
            return read_json(self.config)
        text = read_header(self.weights)[1].get("lora_adapter_metadata")
        if text is None:
            return {}
        try:
            found = dict(json.loads(text))
        except (ValueError, TypeError) as error:
            raise CheckpointError(
                f"The header of {self.weights} is damaged: lora_adapter_metadata is no JSON object ({error})."
            ) from error
        start = f"{self.network}."
        own = {key.removeprefix(start): value for key, value in found.items() if key.startswith(start)}
        return own or found

    @property
    def content_hash(self) -> str:
        """Hash of the adapters and of the settings that count; a file's header may stand in another order."""
        settings = {key: self.settings.get(key) for key in sorted(_USED)}
        return sha256_of_json([settings, hash_tensors(read_tensors(self.weights))])

    @property
    def architecture(self) -> dict[str, Any]:
        """What must be the same in a series: shapes, and settings that change what is computed."""
        settings = {key: self.settings.get(key) for key in sorted(_USED - {"lora_dropout"})}
        return settings | {_plain_name(key): shape for key, shape in self.shapes.items()}


def find_lora(folder: Path) -> LoraFiles | None:
    """Find the adapter of a checkpoint.

    Args:
        folder: Of the checkpoint.

    Returns:
        Its files, or None.

    Raises:
        CheckpointError: If it is a pickle, or lacks its configuration.
    """
    places = [folder, *(folder / name for name in NETWORKS)]
    for weights in (place / name for place in places for name in WEIGHTS_FILES):
        if weights.exists():
            config = weights.with_name("adapter_config.json")
            if weights.name == "adapter_model.safetensors" and not config.exists():
                raise CheckpointError(f"{config} is missing. Restore it, or save the adapter again with peft.")
            return LoraFiles(weights, config if weights.name == "adapter_model.safetensors" else None)
    for pickle in (place / name for place in places for name in _PICKLES):
        if pickle.exists():
            raise CheckpointError(
                f"{pickle} is a pickle, which can run code when it is opened. Save the adapter again as safetensors, "
                "with safe_serialization=True."
            )
    return None


def find_base(base: Path, lora: LoraFiles) -> Path:
    """Find the network that an adapter belongs to.

    Args:
        base: A saved pipeline, or a model.
        lora: The adapter.

    Returns:
        A folder with a config.json.

    Raises:
        CheckpointError: If it is not there.
    """
    wanted = [lora.network] if lora.network else list(NETWORKS)
    found = next((base / name for name in wanted if (base / name / "config.json").exists()), base)
    if not (found / "config.json").exists():
        raise CheckpointError(
            f"The base of a LoRA is a saved pipeline with a folder {' or '.join(wanted)}, or that model itself, with a "
            f"config.json; {base} holds {', '.join(sorted(f.name for f in base.glob('*'))[:8]) or 'nothing'}. Give the "
            "folder of the model that was fine-tuned with --base."
        )
    return found


def add_lora(model: Any, lora: LoraFiles, alpha: float | None = None) -> None:
    """Put adapters on a model. Its own parameters are frozen, those of the adapters are not.

    Args:
        model: The base, a ``diffusers`` model; it is changed.
        lora: The adapter.
        alpha: Where the files do not say it, of all layers. Default: their rank, as in ``diffusers``, with a warning.

    Raises:
        CheckpointError: If the adapter does not fit the model or is of a kind that is not known.
        NumericsError: If one of its weights is not finite.
        ConfigError: If peft is not installed.
    """
    import torch

    try:
        from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
    except ImportError as error:
        raise ConfigError(f"A LoRA needs peft ({error}). Install it: pip install 'whence[pipelines]'") from error
    held = {_plain_name(key): tensor for key, tensor in read_tensors(lora.weights).items()}
    alphas = {key.removesuffix(".alpha"): float(held.pop(key)) for key in list(held) if key.endswith(".alpha")}
    bad = [key for key, tensor in held.items() if not torch.isfinite(tensor).all()]
    if bad:
        raise NumericsError(f"{lora.weights}: {bad[0]} holds NaN or infinite values. Leave this checkpoint out.")
    ranks = _check_fits(lora, model, {key: tuple(tensor.shape) for key, tensor in held.items()})
    scales = _alphas(lora, ranks, alphas, alpha)
    settings = _check_settings(lora, ranks, LoraConfig())
    rank, of_most = Counter(ranks.values()).most_common(1)[0][0], Counter(scales.values()).most_common(1)[0][0]
    config = LoraConfig(
        r=rank,
        lora_alpha=of_most,  # pyright: ignore[reportArgumentType] -- peft divides it by the rank, whatever its type
        rank_pattern={f"^{re.escape(layer)}": r for layer, r in ranks.items() if r != rank},
        alpha_pattern={f"^{re.escape(layer)}": a for layer, a in scales.items() if a != of_most},
        target_modules="|".join(map(re.escape, ranks)),
        use_rslora=bool(settings.get("use_rslora")),
        lora_dropout=settings.get("lora_dropout") or 0.0,
        use_dora=any(".lora_magnitude_vector" in key for key in held),
        lora_bias=any(key.endswith(".lora_B.bias") for key in held),
    )
    model.requires_grad_(False)
    try:
        with torch.random.fork_rng(devices=[]):  # weights are drawn, then replaced
            inject_adapter_in_model(config, model, "default", state_dict=held)
        lacking = set_peft_model_state_dict(model, held, "default")
    except (RuntimeError, ValueError, TypeError) as error:
        raise CheckpointError(f"peft cannot put {lora.weights} on a {type(model).__name__}: {error}") from error
    missing = [key for key in lacking.missing_keys if ".lora_" in key]
    if missing or lacking.unexpected_keys:
        raise CheckpointError(
            f"{lora.weights} is not whole: missing are {missing[:5]}, too much are {lacking.unexpected_keys[:5]}. "
            "Save the adapter again."
        )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".lora_" in f".{name}")


def save_lora(model: Any, folder: Path) -> None:
    """Write the adapter of a model as ``diffusers`` does, so that a pipeline opens it with ``load_lora_weights``.

    Args:
        model: A ``diffusers`` model with an adapter of peft in it, or a ``PeftModel``.
        folder: Where the file goes.

    Raises:
        CheckpointError: If the model has several adapters.
    """
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    if len(model.peft_config) != 1:
        raise CheckpointError(
            f"A checkpoint holds one adapter; this model has {', '.join(model.peft_config)}. Delete the others, with "
            "model.delete_adapters."
        )
    ((name, config),) = model.peft_config.items()
    kind = type(model.get_base_model() if hasattr(model, "get_base_model") else model).__name__
    start = "unet" if kind.startswith("UNet") else "transformer"
    held = get_peft_model_state_dict(model, adapter_name=name).items()
    state = {f"{start}.{key.removeprefix('base_model.model.')}": tensor.contiguous() for key, tensor in held}
    settings = {
        f"{start}.{key}": sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()
    }
    about = {"format": "pt", "lora_adapter_metadata": json.dumps(settings, sort_keys=True)}
    save_file(state, folder / WEIGHTS_FILES[0], about)


def _start_of(key: str) -> str:
    """Give what a name in a file starts with, up to the first dot; of kohya's names, up to the second underscore."""
    start = key.split(".")[0]
    kohya = re.match(r"lora_(unet|te\d?)_", start)
    return f"lora_{kohya[1]}" if kohya else start


def _plain_name(key: str) -> str:
    """Give the name of a tensor as peft saves it, without what wraps the model and without the adapter's own name."""
    from diffusers.utils import convert_unet_state_dict_to_peft

    while True:
        shorter = re.sub(r"^(unet|transformer|base_model\.model|base_model|module|_orig_mod)\.", "", key)
        if shorter == key:
            break
        key = shorter
    key = re.sub(r"\.(_orig_mod|module)\.", ".", key)
    (key,) = convert_unet_state_dict_to_peft({key: None})
    key = re.sub(r"(\.lora)?\.alpha$", ".alpha", key)
    key = re.sub(r"\.lora_magnitude_vector(\..*)?$", ".lora_magnitude_vector", key)
    return re.sub(r"\.lora_([AB])\.(?!weight$|bias$)[^.]+\.(weight|bias)$", r".lora_\1.\2", key)


def _check_fits(lora: LoraFiles, model: Any, shapes: dict[str, tuple[int, ...]]) -> dict[str, int]:
    """Refuse adapters that do not fit a model.

    Returns:
        Rank of each adapted layer, by its name.

    Raises:
        CheckpointError: The message lists what does not fit.
    """
    layers = dict(model.named_modules())
    faults, ranks = [], {}
    by_layer: dict[str, dict[str, tuple[int, ...]]] = {}
    for key, shape in shapes.items():
        layer, found, kind = key.rpartition(".lora_")
        if not found or kind not in ("A.weight", "B.weight", "B.bias", "magnitude_vector"):
            faults.append(f"{key} is no part of a LoRA that is known")
        elif layer not in layers:
            faults.append(f"{key} fits no layer of the {type(model).__name__}")
        else:
            by_layer.setdefault(layer, {})[kind] = shape
    for layer, found in by_layer.items():
        missing = [kind for kind in ("A.weight", "B.weight") if kind not in found]
        weight = getattr(layers[layer], "weight", None)
        if missing:
            faults += [f"{layer}.lora_{kind} is missing" for kind in missing]
            continue
        if weight is None:  # peft has adapters for a few layers without one, and says which
            ranks[layer] = found["A.weight"][0]
            continue
        rank, *inner = found["A.weight"]
        ranks[layer] = rank
        inner[0] //= getattr(layers[layer], "groups", 1)
        if (found["B.weight"][0], *inner) != tuple(weight.shape):
            faults.append(
                f"{layer} has a weight of shape {tuple(weight.shape)}, its LoRA has {found['A.weight']} and "
                f"{found['B.weight']}"
            )
    if not faults and not ranks:
        faults.append("there is no LoRA in it")
    if faults:
        more = f" and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise CheckpointError(
            f"{lora.weights} does not fit its base: {'; '.join(faults[:5])}{more}. Give the model that was fine-tuned "
            "with --base."
        )
    return ranks


def _alphas(
    lora: LoraFiles, ranks: dict[str, int], of_layers: dict[str, float], given: float | None
) -> dict[str, float]:
    """Find the alpha of each layer: in keys of the file, its settings, what the user says, or the rank."""
    settings = lora.settings
    if of_layers.keys() - ranks.keys():
        raise CheckpointError(
            f"{lora.weights} has an alpha for {sorted(of_layers.keys() - ranks.keys())[0]}, and no LoRA. Restore it."
        )
    if of_layers and of_layers.keys() != ranks.keys():
        raise CheckpointError(
            f"{lora.weights} has an alpha for some layers, and none for {sorted(ranks.keys() - of_layers.keys())[0]}. "
            "Restore it."
        )
    if of_layers:
        found = of_layers
    elif "lora_alpha" in settings:
        found = {layer: float(_of_pattern(settings, "alpha_pattern", "lora_alpha", layer)) for layer in ranks}
    elif given is not None:
        return dict.fromkeys(ranks, given)
    else:
        warnings.warn(
            f"{lora.weights.name} does not say the alpha of the LoRA. It is taken to be the rank, as diffusers does; "
            "give it with --lora-alpha if training had another.",
            stacklevel=4,
        )
        return {layer: float(rank) for layer, rank in ranks.items()}
    if given is not None and set(found.values()) != {given}:
        raise CheckpointError(
            f"{lora.weights} says that its alpha is {', '.join(f'{a:g}' for a in sorted(set(found.values())))}; "
            f"--lora-alpha {given:g} contradicts it. Leave it out."
        )
    return found


def _check_settings(lora: LoraFiles, ranks: dict[str, int], default: Any) -> dict[str, Any]:
    """Refuse settings of peft that are not known, and ranks that are not the file's.

    Returns:
        The settings.

    Raises:
        CheckpointError: The message lists them.
    """
    settings, faults = lora.settings, []
    if str(settings.get("peft_type", "LORA")).rpartition(".")[2] != "LORA":
        raise CheckpointError(f"{lora.weights} is a {settings['peft_type']} adapter; whence knows LORA alone.")
    for key, value in settings.items():
        if key in _USED | _WITHOUT_EFFECT or not value:
            continue
        if key == "init_lora_weights":
            if value not in _PLAIN_STARTS:
                faults.append(
                    f"init_lora_weights {value!r} (it changed the base, which is to be saved with the change)"
                )
        elif key != "bias" or value != "none":
            if not hasattr(default, key) or value != getattr(default, key):
                faults.append(f"{key} {value!r}")
    for layer, rank in ranks.items():
        said = _of_pattern(settings, "rank_pattern", "r", layer) if "r" in settings else rank
        if said != rank:
            faults.append(f"rank {said} of {layer}, which has {rank}")
    if faults:
        raise CheckpointError(
            f"{lora.config or lora.weights} has settings that whence does not follow: {'; '.join(faults[:5])}. Train a "
            "plain LoRA or a DoRA, or save all weights of the fine-tuned model."
        )
    return settings


def _of_pattern(settings: dict[str, Any], pattern: str, otherwise: str, layer: str) -> Any:
    """Look up a layer in a pattern as peft does."""
    for key, value in (settings.get(pattern) or {}).items():
        if re.match(rf"(.*\.)?({key})$", layer):
            return value
    return settings[otherwise]
