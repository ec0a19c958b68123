"""Encoders without weights: the words of captions, and the numbers of labels.

    words.json      beside a checkpoint's weights: settings of the words' vectors (width, length, seed)
    classes.json    beside a checkpoint's weights: labels in the order of their numbers (classes)

A word is a vector of standard normals that its letters alone determine, so words need no weights, no vocabulary and no
download, and every word is known. A caption is a set of words: their order is not told. Where a caption or label is
withheld in training, the empty one stands in its place, and so does it for an image without one.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, final

import numpy as np
from jaxtyping import Float32
from numpy import ndarray

from whence._files import sha256_of_json
from whence.config import ModelSettings
from whence.data import ImageData
from whence.diffusion.noise import noise_key, normals
from whence.encoded import AbstractEncoder, Arrays
from whence.errors import CheckpointError, ConfigError, DataError

FORMAT_VERSION = 1
WORDS_FILE, CLASSES_FILE = "words.json", "classes.json"
WITHHELD = ""
"""The caption or label of an image that has none, or whose own was withheld."""


@final
@dataclass(frozen=True)
class WordEncoder(AbstractEncoder):
    """Captions as their words' vectors, for the cross-attention of a network."""

    width: int = 64
    """Length of a word's vector."""
    length: int = 16
    """Words in the longest caption; shorter ones are filled up with the vector of no word."""
    seed: int = 0
    """Seed of the vectors."""

    @property
    def hash(self) -> str:
        """Hash of all that what it makes depends on."""
        return sha256_of_json(["words", FORMAT_VERSION, asdict(self)])

    def conditions(self, texts: Sequence[str], size: tuple[int, int] = (0, 0)) -> Arrays:
        """Give the vectors of the words of captions.

        Args:
            texts: Captions. Words are their runs of letters and digits, whatever their case.
            size: Of no account.

        Returns:
            ``encoder_hidden_states``: float32 of axes text, word, width.

        Raises:
            DataError: If a caption has more words than ``length``.

        Example:
            >>> WordEncoder(width=8, length=4).conditions(["a red Apple"])["encoder_hidden_states"].shape
            (1, 4, 8)
        """
        return {"encoder_hidden_states": np.stack([self._encode(text) for text in texts])}

    def _encode(self, text: str) -> Float32[ndarray, "word width"]:
        found = words_of(text)
        if len(found) > self.length:
            raise DataError(
                f"A caption may have {self.length} words; {text[:80]!r} has {len(found)}. Shorten it, or train with a "
                "larger --caption-words."
            )
        filled = [*found, *[""] * (self.length - len(found))]
        return np.stack([_vector(word, self.width, self.seed) for word in filled])


@final
@dataclass(frozen=True)
class ClassEncoder(AbstractEncoder):
    """Labels as the numbers of classes."""

    classes: tuple[str, ...]
    """Labels in the order of their numbers."""
    withheld: int | None = None
    """Number that stands for a label that was withheld, where there is one."""
    vae: AbstractEncoder | None = None
    """What makes latents, of a network of these."""

    @property
    def hash(self) -> str:
        """Hash of the labels in their order, of the number of none, and of the VAE."""
        parts = [] if self.vae is None else [self.vae.hash]
        return sha256_of_json(["classes", FORMAT_VERSION, self.classes, self.withheld, *parts])

    @property
    def latent_encoder(self) -> AbstractEncoder | None:
        """What makes latents."""
        return self.vae

    @property
    def knows_none(self) -> bool:
        """Whether a number stands for a label that is withheld."""
        return self.withheld is not None

    def conditions(self, texts: Sequence[str], size: tuple[int, int] = (0, 0)) -> Arrays:
        """Number labels.

        Args:
            texts: Labels; the empty one is that of no label.
            size: Of no account.

        Returns:
            ``class_labels``: int64, one for each text.

        Raises:
            DataError: If a label is unknown.
        """
        number = {name: k for k, name in enumerate(self.classes)}
        if self.withheld is not None:
            number[WITHHELD] = self.withheld
        unknown = sorted({text for text in texts if text not in number})
        if unknown:
            raise DataError(
                f"The network knows the labels {', '.join(self.classes)}; found {', '.join(map(repr, unknown[:5]))}. "
                "Label images as those that it was trained on, or give the order of its classes with --class-names."
            )
        return {"class_labels": np.array([number[text] for text in texts], dtype=np.int64)}


def words_of(text: str) -> list[str]:
    """Split a caption into its words.

    Args:
        text: A caption.

    Returns:
        Its runs of letters and digits in lower case.

    Example:
        >>> words_of("Cat face, noto style")
        ['cat', 'face', 'noto', 'style']
    """
    return re.findall(r"[^\W_]+", text.casefold())


def encoder_of(folder: Path) -> WordEncoder | ClassEncoder | None:
    """Read from a checkpoint what its network is told of images.

    Args:
        folder: A checkpoint folder.

    Returns:
        The encoder, or None where the checkpoint does not say, such as one of an unconditional network.

    Raises:
        CheckpointError: If the file is damaged, or of another version.
    """
    for name in (WORDS_FILE, CLASSES_FILE):
        path = folder / name
        if path.exists():
            return _read(path)
    return None


def files_of(encoder: WordEncoder | ClassEncoder | None) -> dict[str, dict[str, Any]]:
    """Give what :func:`encoder_of` reads, by the name of its file."""
    if encoder is None:
        return {}
    name = WORDS_FILE if isinstance(encoder, WordEncoder) else CLASSES_FILE
    about = asdict(encoder) if isinstance(encoder, WordEncoder) else {"classes": encoder.classes}
    return {name: {"format_version": FORMAT_VERSION} | about}


def encoder_for(settings: ModelSettings) -> WordEncoder | ClassEncoder | None:
    """Make the encoder of a model that is to be trained; labels are given by :func:`with_classes`."""
    if settings.condition == "words":
        return WordEncoder(settings.word_width, settings.caption_words)
    return _of_classes(settings.classes) if settings.condition == "label" else None


def _of_classes(classes: Sequence[str]) -> ClassEncoder:
    """Our own networks have a number more than classes, for no label."""
    return ClassEncoder(tuple(classes), withheld=len(classes))


def with_classes(settings: ModelSettings, images: ImageData) -> ModelSettings:
    """Fill in the classes of a model that is told labels: those of the training images in alphabetical order.

    Args:
        settings: Of a model that is to be trained.
        images: The training images.

    Returns:
        The settings, changed where classes were missing.

    Raises:
        ConfigError: If the images have no labels.
    """
    if settings.condition != "label" or settings.classes:
        return settings
    classes = tuple(sorted({label for label in images.labels or () if label}))
    if not classes:
        raise ConfigError(
            f"condition label: the images of {images.source} have no labels. Name their column with --label-column, or "
            "train with --condition words or none."
        )
    return replace(settings, classes=classes)


def _read(path: Path) -> WordEncoder | ClassEncoder:
    try:
        found = json.loads(path.read_text())
        version = found.pop("format_version")
        encoder = WordEncoder(**found) if path.name == WORDS_FILE else _of_classes(found["classes"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error!r}. Restore it.") from error
    if version != FORMAT_VERSION:
        raise CheckpointError(f"{path} has format version {version}; this version of whence reads {FORMAT_VERSION}.")
    return encoder


@lru_cache(maxsize=65536)
def _vector(word: str, width: int, seed: int) -> Float32[ndarray, " width"]:
    return normals(noise_key(seed, "word", "train", word, 0), (width,))
