"""A UNet behind its text encoder, of whose vocabulary some tokens are learned: what textual inversion trains."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn


class LearnedTokens(nn.Module):
    """A table of token embeddings that goes on, behind its frozen rows, with learned ones.

    Args:
        frozen: The text encoder's own.
        vectors: Of the learned tokens, whose numbers follow those of ``frozen``.
    """

    def __init__(self, frozen: nn.Embedding, vectors: Float[Tensor, "token width"]):
        super().__init__()
        self.frozen = frozen
        # A layer, so that the engine takes its gradients by event from inputs and output gradients.
        self.learned = nn.Embedding.from_pretrained(vectors, freeze=False)

    def forward(self, ids: Int[Tensor, "event place"]) -> Float[Tensor, "event place width"]:
        """Look tokens up."""
        first = self.frozen.num_embeddings
        frozen, learned = self.frozen(ids.clamp(max=first - 1)), self.learned((ids - first).clamp(min=0))
        return torch.where((ids >= first)[..., None], learned, frozen)


class InvertedUNet(nn.Module):
    """A frozen UNet that is told captions by their tokens, of which the placeholder's are learned.

    Args:
        unet: A ``UNet2DConditionModel``.
        text_encoder: A ``CLIPTextModel``; its token embeddings are replaced.
        vectors: Of the placeholder's tokens.
    """

    def __init__(self, unet: Any, text_encoder: Any, vectors: Float[Tensor, "token width"]):
        super().__init__()
        self.unet = unet.requires_grad_(False)
        self.text_encoder = text_encoder.requires_grad_(False)
        text_encoder.set_input_embeddings(LearnedTokens(text_encoder.get_input_embeddings(), vectors))

    @property
    def config(self) -> Any:
        """The UNet's configuration."""
        return self.unet.config

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.parameters()).device

    def forward(
        self, noisy: Float[Tensor, "event channel height width"], times: Tensor, input_ids: Int[Tensor, "event place"]
    ) -> Float[Tensor, "event channel height width"]:
        """Predict from noisy latents and the tokens of captions, as the training script does."""
        states = self.text_encoder(input_ids)[0]
        return self.unet(noisy, times, states, return_dict=False)[0]
