"""Latents of a pipeline's VAE, and captions as the numbers of their tokens, for a network with learned tokens.

The text encoder is part of such a network (``whence.inverted_unet``): captions go no further than the tokenizer.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Int64
from numpy import ndarray

from whence._files import sha256_of_json
from whence._model_files import read_json
from whence.encoded import AbstractEncoder, Arrays
from whence.errors import CheckpointError
from whence.pipeline_encoder import PipelineEncoder
from whence.textual_inversion import LearnedEmbeddings


@dataclass(frozen=True)
class InversionEncoder(AbstractEncoder):
    """The VAE and the tokenizer of a saved pipeline, and the placeholder tokens that were added to it."""

    pipeline: PipelineEncoder
    learned: LearnedEmbeddings
    """Any of a series: the tokens count, not the vectors."""

    @property
    def hash(self) -> str:
        """Hash of all that latents and tokens depend on."""
        return sha256_of_json([self.pipeline.hash, {name: list(tokens) for name, tokens in self._tokens.items()}])

    @property
    def latent_encoder(self) -> PipelineEncoder:
        """The pipeline, whose VAE makes the latents."""
        return self.pipeline

    def conditions(self, texts: Sequence[str], size: tuple[int, int]) -> Arrays:
        """Give the numbers of the tokens of captions.

        Args:
            texts: Captions; the empty one stands for a condition that is withheld.
            size: Height and width of the images in pixels; not used.

        Returns:
            ``input_ids``, one row for each caption. Learned tokens come after the text encoder's own.
        """
        return {"input_ids": self._numbers(texts)}

    def fault_of(self, texts: Sequence[str]) -> str | None:
        """Find fault with captions of which none has a placeholder token: their gradients are all zero.

        Args:
            texts: Captions of all images.

        Returns:
            A message that goes on from "The captions of <source>"; None where some have the token.
        """
        if (self._numbers(sorted(set(texts))) >= self._num_frozen).any():
            return None
        return (
            f"must contain {' or '.join(self._tokens)}, the token of {self.learned.weights}; none of {len(texts)} does "
            f"(within the {self._tokenizer.model_max_length} tokens that the text encoder reads). Without it an image "
            "has no gradient. Put it into the captions; or give one caption for all that have none, with --caption "
            f'"a photo of {next(iter(self._tokens))}", to queries with --prompts.'
        )

    @property
    def _tokens(self) -> dict[str, tuple[str, ...]]:
        return self.learned.tokens

    @cached_property
    def _num_frozen(self) -> int:
        """Tokens that the text encoder has a row for."""
        path = self.pipeline.folder / "text_encoder" / "config.json"
        count = read_json(path).get("vocab_size")
        if not isinstance(count, int):
            raise CheckpointError(f"{path} does not say vocab_size. Save the pipeline again.")
        return count

    @cached_property
    def _tokenizer(self) -> Any:
        tokenizer = self.pipeline.load_tokenizer()
        # A pipeline that was saved after the training knows them already.
        tokenizer.add_tokens([token for tokens in self._tokens.values() for token in tokens])
        return tokenizer

    def _numbers(self, texts: Sequence[str]) -> Int64[ndarray, "text place"]:
        tokenizer = self._tokenizer
        length = tokenizer.model_max_length
        told = [self._with_all_vectors(text) for text in texts]
        ids = tokenizer(told, padding="max_length", truncation=True, max_length=length).input_ids
        ids = np.array(ids, dtype=np.int64).reshape(len(told), length)
        numbers = ids.copy()
        learned = [token for tokens in self._tokens.values() for token in tokens]
        for k, token in enumerate(learned):
            numbers[ids == tokenizer.convert_tokens_to_ids(token)] = self._num_frozen + k
        return numbers

    def _with_all_vectors(self, text: str) -> str:
        """Write a placeholder of several vectors as all its tokens, as pipelines of ``diffusers`` do."""
        for name, tokens in self._tokens.items():
            whole = " ".join(tokens)
            text = text.replace(whole, name).replace(name, whole)  # it may have been written out already
        return text
