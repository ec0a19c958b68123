"""Flags of ``diffusers``' training scripts that a record cannot follow, or that spoil what it is for.

They are found in the config, ``vars(args)``, by the names that the scripts share.
"""

import copy
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from whence.errors import RecordError

_REFUSED = {
    "dream_training": "it replaces noise and target by the model's own prediction, which no key can draw again",
    "train_text_encoder": "what the network is told then changes with every step, and checkpoints of the network alone "
    "do not say what it was",
    "train_text_encoder_ti": "what the network is told then changes with every step, and checkpoints of the network "
    "alone do not say what it was",
}

_WARNED = {
    "checkpoints_total_limit": "the script deletes old checkpoints, and TracIn and ReTrac sum over all of them. Leave "
    "the flag out, or keep copies of their weights.",
    "cache_latents": "scripts look latents up by the number of the batch (latents_cache[step]), and loaders that "
    "reshuffle hand out other images by then: noise, loss and id would belong to different images. Key the cache by "
    "the image's id.",
}


def check_flags(settings: Mapping[str, Any]) -> None:
    """Refuse what cannot be replayed; warn of what makes a record worth less.

    Args:
        settings: Such as ``vars(args)``.

    Raises:
        RecordError: With all refused flags and the reasons.
    """
    faults = [f"{name}: {why}" for name, why in _REFUSED.items() if settings.get(name)]
    bias = settings.get("timestep_bias_strategy")
    if bias not in (None, "none"):
        faults.append(
            f"timestep_bias_strategy {bias}: the script draws its timesteps from a density of its own, and the "
            "recorder draws them evenly or by weighting_scheme"
        )
    if faults:
        raise RecordError(f"The config asks for what a record cannot follow. {'; '.join(faults)}. Train without.")
    for name, why in _WARNED.items():
        if settings.get(name):
            warnings.warn(f"{name}={settings[name]}: {why}", stacklevel=3)
    if str(settings.get("optimizer", "")).lower() == "prodigy":
        warnings.warn(
            "optimizer=prodigy: it multiplies the learning rate by a distance that it estimates, which is not on "
            "record; the weights of visits hold within a stretch of training, not between its beginning and its end.",
            stacklevel=3,
        )


def scheduler_of_training(scheduler: Any, settings: Mapping[str, Any]) -> Any:
    """Give the scheduler as the script uses it: text-to-image scripts set its prediction type in their loop.

    Args:
        scheduler: The noise scheduler.
        settings: Such as ``vars(args)``; its ``prediction_type`` wins.

    Returns:
        The scheduler, or a copy with the other prediction type.
    """
    asked = settings.get("prediction_type")
    if asked is None or getattr(scheduler.config, "prediction_type", asked) == asked:
        return scheduler
    changed = copy.deepcopy(scheduler)
    changed.register_to_config(prediction_type=asked)
    return changed


def prior_weights(settings: Mapping[str, Any], sample_ids: Sequence[str]) -> list[float]:
    """Give the factor of each sample's loss under prior preservation: 1 without it.

    Args:
        settings: Such as ``vars(args)``.
        sample_ids: Ids of a batch; with prior preservation those of its instances, then as many of class images.

    Returns:
        1 for instances, ``prior_loss_weight`` for class images: the loss is the mean over instances plus so many times
        the mean over class images.

    Raises:
        RecordError: If the halves differ in size, or class images have ids of instances.
    """
    count = len(sample_ids)
    if not settings.get("with_prior_preservation"):
        return [1.0] * count
    both = set(sample_ids[: count // 2]) & set(sample_ids[count // 2 :])
    if count % 2 or both:
        found = f"{count} ids" if count % 2 else f"{', '.join(sorted(both)[:3])} in both halves"
        raise RecordError(
            "With prior preservation a batch holds its instances, then as many class images; give both their ids, in "
            f'this order, those of class images with a prefix, such as "class/" + name. Found {found}.'
        )
    return [1.0] * (count // 2) + [float(settings.get("prior_loss_weight", 1.0))] * (count // 2)


def check_draws(settings: Mapping[str, Any], prepared: Mapping[str, Any]) -> None:
    """Refuse a batch whose captions the script withholds by chance that no key has drawn; warn of such flips.

    Raises:
        RecordError: If captions are withheld without :meth:`~whence.recorder.Recorder.drop`.
    """
    share = settings.get("proportion_empty_prompts")
    if share and "condition_dropped" not in prepared:
        raise RecordError(
            f"proportion_empty_prompts={share}: which captions were withheld must be on record. Draw them with "
            "recorder.drop(ids, args.proportion_empty_prompts) before draw(), in the place of the script's own draws."
        )
    if settings.get("random_flip") and "flip" not in prepared:
        warnings.warn(
            "random_flip: images that the script's own transform mirrors are taken for unmirrored ones. Leave the flag "
            "out and call recorder.flip(ids, pixel_values) before the images are encoded.",
            stacklevel=4,
        )
