"""How a ``diffusers`` network is called. No other module knows whose network it is.

Noisy images or latents, the scheduler's times and conditions by name go in; what comes out has the shape of what was
noised. Conditions bear the names that the network's ``forward`` gives them, those of ``added_cond_kwargs`` included.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from whence.diffusion.process import NoiseProcess
from whence.errors import UnsupportedModelError

Network = Any
"""A ``ModelMixin`` of ``diffusers``, perhaps with adapters of ``peft`` in it."""

Given = Mapping[str, Tensor]
"""Conditions by name, one row for each event."""


@dataclass(frozen=True)
class Adapter:
    """How networks of one class are called."""

    call: Callable[[Network, Tensor, Tensor, Given], Tensor]
    """Takes network, noisy, times, conditions; gives the prediction, perhaps with learned variances behind it."""
    needs: Callable[[Any], tuple[str, ...]]
    """Names the conditions that a configuration asks for."""
    widths: Callable[[Any], dict[str, int]] = lambda config: {}
    """Gives the length of the vectors of conditions, where a configuration says it."""
    by_flow_matching: bool = False
    """Whether networks of this class are trained by flow matching and nothing else."""


def predict(
    model: Network,
    noisy: Float[Tensor, "event channel height width"],
    times: Tensor,
    conditions: Given | None = None,
) -> Float[Tensor, "event channel height width"]:
    """Run the network on noisy images or latents.

    Args:
        model: One of the classes in :data:`ADAPTERS`.
        noisy: What was noised.
        times: The scheduler's time of each event.
        conditions: What the network is told besides.

    Returns:
        The prediction; learned variances are cut off.
    """
    prediction = ADAPTERS[_class_name(model)].call(model, noisy, times, conditions or {})
    # Some transformers predict variances too, behind the channels of the prediction.
    return prediction[:, : noisy.shape[1]] if prediction.shape[1] == 2 * noisy.shape[1] else prediction


def check_model(model: Network) -> None:
    """Refuse a network that :func:`predict` does not know how to call.

    Raises:
        UnsupportedModelError: If the class is not one of :data:`ADAPTERS`, or its configuration has a part that is not
            known, such as conditions on images.
    """
    name = _class_name(model)
    if name not in ADAPTERS:
        raise UnsupportedModelError(f"whence calls models of class {', '.join(sorted(ADAPTERS))}; found {name}.")
    if name in ("UNet2DConditionModel", "InvertedUNet"):
        _check_conditional_unet(model.config)
    if getattr(model.config, "class_embed_type", None) not in (None, "timestep"):
        raise UnsupportedModelError(
            f"This {name} has class_embed_type={model.config.class_embed_type!r}: it is given vectors in the place of "
            "classes, and whence does not know where they come from. Known are classes by number."
        )


def check_process(model: Network, process: NoiseProcess, where: str) -> None:
    """Refuse a scheduler that a network of this class was not trained with.

    Args:
        model: The network.
        process: What its scheduler says.
        where: The checkpoint, for messages.

    Raises:
        UnsupportedModelError: If the network is of flow matching and the scheduler is not.
    """
    if ADAPTERS[_class_name(model)].by_flow_matching and process.prediction_type != "flow":
        raise UnsupportedModelError(
            f"A {_class_name(model)} is trained by flow matching; the scheduler that belongs to {where} is for "
            f"{process.prediction_type}. Put the scheduler of the training there, a FlowMatchEulerDiscreteScheduler."
        )


def check_widths(model: Network, given: Mapping[str, int], where: str) -> None:
    """Refuse conditions of another length than the network takes: they are of another model's encoders.

    Args:
        model: The network.
        given: Length of the vectors of each condition.
        where: The checkpoint, for messages.

    Raises:
        UnsupportedModelError: The message says what is taken and what was found.
    """
    wanted = ADAPTERS[_class_name(model)].widths(model.config)
    faults = [
        f"{name} of {width} numbers, the pipeline gives {given[name]}"
        for name, width in wanted.items()
        if name in given and given[name] != width
    ]
    if faults:
        raise UnsupportedModelError(
            f"The {_class_name(model)} in {where} takes {'; '.join(faults)}. The pipeline is another model's; give the "
            "one that it was trained from with --base."
        )


def needed_conditions(model: Network) -> tuple[str, ...]:
    """Name the conditions that a network has to be given; see :func:`check_model`."""
    return ADAPTERS[_class_name(model)].needs(model.config)


def channels_of(model: Network) -> int:
    """Count the channels of what a network denoises; FLUX sees patches of 2 x 2 latents."""
    channels = model.config.in_channels
    return channels // 4 if _class_name(model) == "FluxTransformer2DModel" else channels


def _class_name(model: Network) -> str:
    return type(model).__name__


def _check_conditional_unet(config: Any) -> None:
    faults = [
        f"{name} = {getattr(config, name)!r}"
        for name, known in _UNET_KNOWN.items()
        if getattr(config, name, None) not in known
    ]
    if faults:
        raise UnsupportedModelError(
            f"This UNet2DConditionModel has {'; '.join(faults)}, which whence cannot call yet. It knows the networks "
            "of Stable Diffusion 1, 2 and XL."
        )


_UNET_KNOWN: dict[str, tuple[Any, ...]] = {
    "addition_embed_type": (None, "text_time"),
    "encoder_hid_dim_type": (None, "text_proj"),
    "time_cond_proj_dim": (None,),
}


def _call_unet(model: Network, noisy: Tensor, times: Tensor, given: Given) -> Tensor:
    return model(noisy, times, class_labels=given.get("class_labels"), return_dict=False)[0]


def _call_conditional_unet(model: Network, noisy: Tensor, times: Tensor, given: Given) -> Tensor:
    added = {name: given[name] for name in ("text_embeds", "time_ids") if name in given}
    return model(
        noisy,
        times,
        given["encoder_hidden_states"],
        class_labels=given.get("class_labels"),
        encoder_attention_mask=given.get("encoder_attention_mask"),
        added_cond_kwargs=added or None,
        return_dict=False,
    )[0]


def _call_inverted_unet(model: Network, noisy: Tensor, times: Tensor, given: Given) -> Tensor:
    return model(noisy, times, given["input_ids"])


def _call_dit(model: Network, noisy: Tensor, times: Tensor, given: Given) -> Tensor:
    return model(noisy, timestep=times, class_labels=given["class_labels"], return_dict=False)[0]


def _call_sd3(model: Network, noisy: Tensor, times: Tensor, given: Given) -> Tensor:
    return model(
        hidden_states=noisy,
        timestep=times,
        encoder_hidden_states=given["encoder_hidden_states"],
        pooled_projections=given["pooled_projections"],
        return_dict=False,
    )[0]


def _call_flux(model: Network, noisy: Tensor, times: Tensor, given: Given) -> Tensor:
    """Call with patches of 2 x 2 latents as tokens, as the pipeline and the training scripts do."""
    count, channels, height, width = noisy.shape
    patches = noisy.view(count, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    rows, columns = torch.arange(height // 2, device=noisy.device), torch.arange(width // 2, device=noisy.device)
    places = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1).view(-1, 2).to(noisy)
    text = given["encoder_hidden_states"]
    prediction = model(
        hidden_states=patches.reshape(count, -1, 4 * channels),
        timestep=times / 1000,  # the network multiplies it again
        guidance=given.get("guidance"),
        pooled_projections=given["pooled_projections"],
        encoder_hidden_states=text,
        txt_ids=text.new_zeros(text.shape[1], 3),
        img_ids=torch.cat([places.new_zeros(len(places), 1), places], dim=1),
        return_dict=False,
    )[0]
    patches = prediction.view(count, height // 2, width // 2, channels, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return patches.reshape(noisy.shape)


def _call_pixart(model: Network, noisy: Tensor, times: Tensor, given: Given) -> Tensor:
    return model(
        noisy,
        encoder_hidden_states=given["encoder_hidden_states"],
        encoder_attention_mask=given["encoder_attention_mask"],
        timestep=times,
        added_cond_kwargs={"resolution": given.get("resolution"), "aspect_ratio": given.get("aspect_ratio")},
        return_dict=False,
    )[0]


def _call_sana(model: Network, noisy: Tensor, times: Tensor, given: Given) -> Tensor:
    return model(
        noisy,
        encoder_hidden_states=given["encoder_hidden_states"],
        encoder_attention_mask=given["encoder_attention_mask"],
        timestep=times,
        guidance=given.get("guidance"),
        return_dict=False,
    )[0]


def _needs_of_unet(config: Any) -> tuple[str, ...]:
    classes = config.class_embed_type is not None or config.num_class_embeds is not None
    return ("class_labels",) if classes else ()


def _needs_of_conditional_unet(config: Any) -> tuple[str, ...]:
    sdxl = ("text_embeds", "time_ids") if config.addition_embed_type == "text_time" else ()
    return ("encoder_hidden_states", *sdxl, *_needs_of_unet(config))


def _widths_of_conditional_unet(config: Any) -> dict[str, int]:
    width = config.encoder_hid_dim if config.encoder_hid_dim_type == "text_proj" else config.cross_attention_dim
    return {"encoder_hidden_states": width} if isinstance(width, int) else {}


def _widths_of_joint(config: Any) -> dict[str, int]:
    return {"encoder_hidden_states": config.joint_attention_dim, "pooled_projections": config.pooled_projection_dim}


def _widths_of_captions(config: Any) -> dict[str, int]:
    return {} if config.caption_channels is None else {"encoder_hidden_states": config.caption_channels}


def _needs_of_flux(config: Any) -> tuple[str, ...]:
    text = ("encoder_hidden_states", "pooled_projections")
    return (*text, "guidance") if config.guidance_embeds else text


def _needs_of_pixart(config: Any) -> tuple[str, ...]:
    text = ("encoder_hidden_states", "encoder_attention_mask")
    # As the network itself decides whether it is told of sizes.
    sized = config.use_additional_conditions
    sized = config.sample_size == 128 if sized is None else sized
    return (*text, "resolution", "aspect_ratio") if sized else text


def _needs_of_sana(config: Any) -> tuple[str, ...]:
    text = ("encoder_hidden_states", "encoder_attention_mask")
    return (*text, "guidance") if getattr(config, "guidance_embeds", False) else text


ADAPTERS: dict[str, Adapter] = {
    "UNet2DModel": Adapter(_call_unet, _needs_of_unet),
    "UNet2DConditionModel": Adapter(_call_conditional_unet, _needs_of_conditional_unet, _widths_of_conditional_unet),
    "InvertedUNet": Adapter(_call_inverted_unet, lambda config: ("input_ids",)),
    "DiTTransformer2DModel": Adapter(_call_dit, lambda config: ("class_labels",)),
    "SD3Transformer2DModel": Adapter(
        _call_sd3, lambda config: ("encoder_hidden_states", "pooled_projections"), _widths_of_joint, True
    ),
    "FluxTransformer2DModel": Adapter(_call_flux, _needs_of_flux, _widths_of_joint, True),
    "PixArtTransformer2DModel": Adapter(_call_pixart, _needs_of_pixart, _widths_of_captions),
    "SanaTransformer2DModel": Adapter(_call_sana, _needs_of_sana, _widths_of_captions, True),
}
"""By class. A further one needs no change elsewhere."""
