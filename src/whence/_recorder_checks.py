"""What the recorder accepts: each value is checked when it is given, so that nothing fails when a part is written."""

import math
from collections.abc import Iterable, Sequence
from typing import Any, get_args, get_type_hints

import numpy as np
import torch
from torch import Tensor

from whence.config import TrainingSettings
from whence.errors import RecordError

MAX_UINT16 = 2**16 - 1
MAX_UINT32 = 2**32 - 1

PRECISIONS = get_type_hints(TrainingSettings)["mixed_precision"]


def known_name(what: str, name: Any, choices: Any) -> str:
    if name not in get_args(choices):
        raise RecordError(f"Unknown {what} {name!r}; known are {', '.join(get_args(choices))}.")
    return name


def whole_number(name: str, value: Any, least: int, most: int) -> int:
    if not isinstance(value, int | np.integer) or isinstance(value, bool) or not least <= value <= most:
        raise RecordError(f"{name} must be a whole number from {least} to {most}; found {value!r}.")
    return int(value)


def checked_norm(norm: Any) -> float | None:
    if norm is None:
        return None
    known = isinstance(norm, int | float | np.number) and not isinstance(norm, bool)
    if not known or not math.isfinite(norm) or norm <= 0:
        raise RecordError(
            f"max_grad_norm must be a finite number above 0; found {norm!r}. If you do not clip, give None."
        )
    return float(norm)


def checked_optimizer(optimizer: Any) -> Any:
    groups = getattr(optimizer, "param_groups", None)
    if not isinstance(groups, list | tuple) or not all("lr" in group for group in groups):
        raise RecordError(
            "optimizer must be the torch optimizer of the training, for its param_groups say the learning rate; found "
            f"{type(optimizer).__name__}."
        )
    return optimizer


def checked_ids(ids: Iterable[Any]) -> list[str]:
    """Turn whole numbers into text; refuse what could not stand in a list of ids or a file."""
    listed = ids.tolist() if isinstance(ids, Tensor | np.ndarray) else ids
    if isinstance(listed, str | bytes) or not isinstance(listed, Iterable):
        raise RecordError(f"ids must be a list, tensor or array with one id per image; found {ids!r:.60}.")
    values = [i.item() if getattr(i, "shape", None) == () else i for i in listed]
    texts = [str(i) if isinstance(i, int) and not isinstance(i, bool) else i for i in values]
    bad = [i for i in texts if not isinstance(i, str) or not i.isprintable() or not i]
    if bad:
        raise RecordError(
            f"Ids must be whole numbers or non-empty printable text on one line; found {len(bad)} others: "
            f"{', '.join(f'{i!r:.60}' for i in bad[:5])}. Give each image the id that it has in the data set."
        )
    return list(map(str, texts))


def check_batch(call: str, sample_ids: Sequence[str], images: Any) -> None:
    if len(sample_ids) != len(images):
        raise RecordError(f"{call} needs one id per image; found {len(sample_ids)} ids and {len(images)} images.")
    if not sample_ids:
        raise RecordError(f"{call} needs at least one image; found an empty batch. Leave it out of the training.")


def check_floating(images: Any) -> None:
    if not isinstance(images, Tensor) or not images.is_floating_point():
        found = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise RecordError(
            f"like must be a tensor of floating-point images or latents, whose type the noise takes on; found {found}. "
            "Noise of another type would be cut off; scale the images to [-1, 1] first."
        )


def _as_tensor(name: str, values: Any, shape: tuple[int, ...]) -> Tensor:
    """Fetch what the caller gives for each sample of a batch."""
    try:
        tensor = torch.as_tensor(values).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise RecordError(f"{name} must be a tensor of shape {shape}; found {values!r:.60}.") from error
    if tensor.shape != shape:
        raise RecordError(f"{name} must have shape {shape}, one row per sample; found {tuple(tensor.shape)}.")
    return tensor


def checked_crops(crops: Any, num_samples: int) -> Tensor:
    if crops is None:
        return torch.zeros(num_samples, 2, dtype=torch.long)
    tensor = _as_tensor("crops", crops, (num_samples, 2))
    whole = tensor.long()
    if tensor.is_floating_point() or tensor.dtype == torch.bool or whole.min() < 0 or whole.max() > MAX_UINT16:
        raise RecordError(
            f"crops must be whole numbers of pixels, 0 to {MAX_UINT16}; found {tensor.dtype} from {tensor.min()} to "
            f"{tensor.max()}. Give top and left of each crop within its whole image."
        )
    return whole


def checked_dropped(dropped: Any, num_samples: int) -> Tensor:
    if dropped is None:
        return torch.zeros(num_samples, dtype=torch.bool)
    tensor = _as_tensor("condition_dropped", dropped, (num_samples,))
    if tensor.dtype != torch.bool:
        raise RecordError(f"condition_dropped must be True or False for each sample; found {tensor.dtype}.")
    return tensor


def checked_weights(weights: Any, num_samples: int) -> Tensor:
    if weights is None:
        return torch.ones(num_samples)
    tensor = _as_tensor("loss_weight", weights, (num_samples,)).float()
    if not tensor.isfinite().all():
        raise RecordError(f"loss_weight must be finite; found {tensor[~tensor.isfinite()][0]}.")
    return tensor


def checked_losses(losses: Tensor, weights: Tensor, shape: tuple[int, ...], with_prior: bool) -> Tensor:
    """Give one weighted loss per sample, where these are given, or the losses of all elements without their weight."""
    if losses.ndim > 1 and losses.shape == shape:
        return losses.detach().float().cpu().flatten(1).mean(1) * weights
    if losses.shape != shape[:1]:
        halved = with_prior and losses.shape[:1] == (shape[0] // 2,)
        raise RecordError(
            f"The losses must be one per sample, of shape {tuple(shape[:1])}; found {tuple(losses.shape)}. Average "
            "over the elements of each sample, not over the batch; or give all elements, of the shape of the noise."
            + (" Take them before the script parts instances from class images." if halved else "")
        )
    return losses.detach().float().cpu()


def one_learning_rate(optimizer: Any) -> float:
    rates = sorted({float(group["lr"]) for group in optimizer.param_groups})
    if len(rates) > 1:
        raise RecordError(
            "All parameters must have one learning rate; the optimizer's groups have "
            f"{', '.join(map(str, rates))}. The weight of a visit would not be one number; train with one rate."
        )
    return rates[0]


def clip_coefficient_of(grad_norm: Tensor | float | None, max_grad_norm: float | None) -> float:
    """Repeat what ``torch.nn.utils.clip_grad_norm_`` multiplied gradients with; NaN for a norm that is not finite."""
    if grad_norm is None and max_grad_norm is not None:
        raise RecordError(
            f"Gradients are clipped to the norm {max_grad_norm}, so step() needs the norm that "
            "clip_grad_norm_ returned. If you do not clip, make the Recorder with a config without max_grad_norm."
        )
    if grad_norm is None:
        return 1.0
    if max_grad_norm is None:
        raise RecordError(
            "step() got a gradient norm but does not know to what it is clipped. Make the Recorder with "
            "max_grad_norm=..., or leave the gradient norm out if you do not clip."
        )
    norm = float(grad_norm)
    return min(1.0, max_grad_norm / (norm + 1e-6)) if math.isfinite(norm) else math.nan
