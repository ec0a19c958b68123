"""The networks that ``whence train`` trains: U-Nets of ``diffusers`` in pixels, told nothing, labels or words."""

from dataclasses import asdict
from typing import Any, get_args, get_type_hints

import torch

from whence.config import ModelSettings, TrainingSettings
from whence.data import ImageData
from whence.errors import ConfigError

_HEAD_WIDTH = 8  # attention_head_dim of diffusers.UNet2DModel by default


def make_model(settings: ModelSettings, data: ImageData, seed: int) -> Any:
    """Make a U-Net of ``diffusers`` with weights that depend on the seed alone.

    Args:
        settings: Architecture; a model that is told labels must have its ``classes``.
        data: Images of the size that it is made for.
        seed: Seed of the weights.

    Returns:
        A ``UNet2DModel``, or a ``UNet2DConditionModel`` where it is told words; on the CPU.

    Raises:
        ConfigError: If settings are out of range, do not fit each other, or do not fit the size of the images.
    """
    import diffusers

    raise_faults(model_faults(settings, data))
    levels = len(settings.widths)
    attention = [level >= levels - settings.attention_levels for level in range(levels)]
    kind = "CrossAttn" if settings.condition == "words" else "Attn"
    # By diffusers' own note, attention_head_dim of a UNet2DConditionModel is the number of heads.
    heads: Any = tuple(max(1, width // _HEAD_WIDTH) for width in settings.widths)
    shared: dict[str, Any] = dict(
        sample_size=(data.height, data.width),
        in_channels=data.channels,
        out_channels=data.channels,
        layers_per_block=settings.layers_per_block,
        block_out_channels=settings.widths,
        down_block_types=tuple(f"{kind}DownBlock2D" if a else "DownBlock2D" for a in attention),
        up_block_types=tuple(f"{kind}UpBlock2D" if a else "UpBlock2D" for a in reversed(attention)),
        norm_num_groups=settings.norm_groups,
        dropout=settings.dropout,
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        if settings.condition == "words":
            return diffusers.UNet2DConditionModel(
                **shared,
                cross_attention_dim=settings.word_width,
                attention_head_dim=heads,
            )
        return diffusers.UNet2DModel(
            **shared,
            add_attention=settings.attention_levels > 0,
            # One more than there are labels: that of a label which is withheld.
            num_class_embeds=len(settings.classes) + 1 if settings.condition == "label" else None,
        )


def make_scheduler(settings: ModelSettings) -> Any:
    """Make the ``diffusers.DDPMScheduler`` of a model."""
    import diffusers

    return diffusers.DDPMScheduler(
        num_train_timesteps=settings.train_timesteps,
        beta_schedule=settings.beta_schedule,
        prediction_type=settings.prediction_type,
    )


def recorded_settings(model: ModelSettings, training: TrainingSettings) -> dict[str, Any]:
    """Give the settings of a training as they are recorded, the model's under ``model``.

    Returns:
        Plain data. What only a conditional model has is left out of others, so that records stay as they were.
    """
    of_model, of_training = asdict(model), asdict(training)
    if model.condition == "none":
        for name in ("condition", "word_width", "caption_words", "classes"):
            del of_model[name]
        del of_training["caption_dropout"]
    return of_training | {"model": of_model}


def model_faults(settings: ModelSettings, data: ImageData) -> list[str]:
    """Say in a sentence each what is wrong with the settings of a model for such images."""
    faults = unknown_names(settings, "beta_schedule", "prediction_type", "condition")
    for name in ("word_width", "caption_words"):
        if settings.condition == "words" and getattr(settings, name) < 1:
            faults.append(f"{name} must be above 0, found {getattr(settings, name)}")
    if len(set(settings.classes)) < len(settings.classes) or "" in settings.classes:
        faults.append(f"classes must be different labels that are not empty, found {', '.join(settings.classes)}")
    if settings.classes and settings.condition != "label":
        faults.append("classes are of a model that is told labels; set condition to label, or leave them out")
    if settings.layers_per_block < 1:
        faults.append(f"layers_per_block must be above 0, found {settings.layers_per_block}")
    if not 0 <= settings.dropout < 1:
        faults.append(f"dropout must be at least 0 and below 1, found {settings.dropout}")
    if settings.train_timesteps < 2:
        faults.append(f"train_timesteps: the model needs at least 2 timesteps, found {settings.train_timesteps}")
    if settings.norm_groups < 1:
        faults.append(f"norm_groups must be above 0, found {settings.norm_groups}")
    if not settings.widths or min(settings.widths) < 1:
        return [*faults, f"widths must be one or more numbers of channels above 0, found {settings.widths}"]
    return faults + _level_faults(settings, data)


def _level_faults(settings: ModelSettings, data: ImageData) -> list[str]:
    """Find what does not fit the number and the widths of the levels."""
    faults = []
    levels = len(settings.widths)
    factor = 2 ** (levels - 1)
    if data.height % factor or data.width % factor:
        faults.append(
            f"a model of {levels} levels halves its images {levels - 1} times, so their sides must be multiples of "
            f"{factor}; found {data.width} x {data.height} pixels (set another --resolution or fewer --widths)"
        )
    if settings.norm_groups > 0 and any(width % settings.norm_groups for width in settings.widths):
        faults.append(f"each width in {settings.widths} must be a multiple of norm_groups = {settings.norm_groups}")
    if not 0 <= settings.attention_levels <= levels:
        return [
            *faults,
            f"attention_levels must be 0 to {levels}, the number of widths; found {settings.attention_levels}",
        ]
    # The middle of a model that is told words has cross-attention whatever the levels have.
    num_attended = max(settings.attention_levels, 1 if settings.condition == "words" else 0)
    attended = settings.widths[levels - num_attended :]
    if any(width % _HEAD_WIDTH for width in attended):
        faults.append(
            f"each width with attention must be a multiple of {_HEAD_WIDTH}, the width of a head; found {attended} "
            "(change the widths, or the number of attention_levels)"
        )
    return faults


def unknown_names(settings: ModelSettings | TrainingSettings, *names: str) -> list[str]:
    """Say which settings are none of the names that they may be."""
    known = {name: get_args(hint) for name, hint in get_type_hints(type(settings)).items()}
    return [
        f"{name} must be one of {', '.join(known[name])}, found {getattr(settings, name)}"
        for name in names
        if getattr(settings, name) not in known[name]
    ]


def raise_faults(faults: list[str]) -> None:
    """Raise what was found to be wrong, if anything."""
    if faults:
        raise ConfigError("; ".join(faults) + ".")
