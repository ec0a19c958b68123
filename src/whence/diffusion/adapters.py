"""How a ``diffusers`` model is called. No other module knows whose network it is."""

from typing import Any

from jaxtyping import Float, Int
from torch import Tensor

from whence.errors import UnsupportedModelError

SUPPORTED = ("UNet2DModel",)


def check_model(model: Any) -> None:
    """Refuse a model that :func:`predict` does not know how to call.

    Raises:
        UnsupportedModelError: If the class is not one of ``SUPPORTED``, or the model takes class labels.
    """
    name = type(model).__name__
    if name not in SUPPORTED:
        raise UnsupportedModelError(f"whence calls models of class {', '.join(SUPPORTED)}; found {name}.")
    if getattr(model, "class_embedding", None) is not None:
        raise UnsupportedModelError(
            f"This {name} takes class labels (class_embed_type={model.config.class_embed_type!r}, "
            f"num_class_embeds={model.config.num_class_embeds}); whence handles unconditional models so far."
        )


def predict(
    model: Any, noisy: Float[Tensor, "event channel height width"], timesteps: Int[Tensor, " event"]
) -> Float[Tensor, "event channel height width"]:
    """Run the network on noisy images at their timesteps."""
    return model(noisy, timesteps, return_dict=False)[0]
