"""What models of whence's own are told of images: the words of their captions, or the number of their label.

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
from whence.encoded import Arrays, Conditions, Encoded
from whence.errors import CheckpointError, ConfigError, DataError

FORMAT_VERSION = 1
WORDS_FILE, CLASSES_FILE = "words.json", "classes.json"
WITHHELD = ""
"""The caption or label of an image that has none, or whose own was withheld."""


@final
@dataclass(frozen=True)
class WordEncoder:
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

    def encode(self, texts: Sequence[str]) -> dict[str, ndarray]:
        """Give the vectors of the words of captions.

        Args:
            texts: Captions. Words are their runs of letters and digits, whatever their case.

        Returns:
            ``encoder_hidden_states``: float32 of axes text, word, width.

        Raises:
            DataError: If a caption has more words than ``length``.

        Example:
            >>> WordEncoder(width=8, length=4).encode(["a red Apple"])["encoder_hidden_states"].shape
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
class ClassEncoder:
    """Labels as the numbers of classes; the number after the last one stands for a label that was withheld."""

    classes: tuple[str, ...]
    """Labels in the order of their numbers."""

    @property
    def hash(self) -> str:
        """Hash of the labels in their order."""
        return sha256_of_json(["classes", FORMAT_VERSION, self.classes])

    def encode(self, texts: Sequence[str]) -> dict[str, ndarray]:
        """Number labels.

        Args:
            texts: Labels; the empty one is that of no label.

        Returns:
            ``class_labels``: int64, one for each text.

        Raises:
            DataError: If a label is unknown.
        """
        number = {name: k for k, name in enumerate(self.classes)} | {WITHHELD: len(self.classes)}
        unknown = sorted({text for text in texts if text not in number})
        if unknown:
            raise DataError(
                f"The model knows the labels {', '.join(self.classes)}; found {', '.join(map(repr, unknown[:5]))}. "
                "Label images as those that it was trained on."
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


def encode_captions(images: ImageData, encoder: WordEncoder) -> ImageData:
    """Put the words of their captions beside images.

    Args:
        images: Images with captions.
        encoder: Makes the words' vectors.

    Returns:
        The images with an ``encoding``.

    Raises:
        DataError: If no image has a caption, or one has too many words.
    """
    if not any(images.captions or ()):
        raise DataError(
            f"The model is told the captions of images; those of {images.source} have none. Name their column with "
            "--caption-column, or put a metadata.jsonl beside the images."
        )
    return _encode(images, images.captions or (), encoder)


def encode_labels(images: ImageData, classes: Sequence[str]) -> ImageData:
    """Put the numbers of their labels beside images.

    Args:
        images: Images with labels.
        classes: Labels in the order of their numbers.

    Returns:
        The images with an ``encoding``.

    Raises:
        DataError: If no image has a label, or one is not among ``classes``.
    """
    if not any(images.labels or ()):
        raise DataError(
            f"The model is told the labels of images; those of {images.source} have none. Name their column with "
            "--label-column, or put images into a folder for each label."
        )
    return _encode(images, images.labels or (), ClassEncoder(tuple(classes)))


def encode_images(images: ImageData, encoder: WordEncoder | ClassEncoder) -> ImageData:
    """Put what the encoder makes of captions or labels beside images; see :func:`encode_captions`."""
    if isinstance(encoder, WordEncoder):
        return encode_captions(images, encoder)
    return encode_labels(images, encoder.classes)


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
    return {name: {"format_version": FORMAT_VERSION} | asdict(encoder)}


def encoder_for(settings: ModelSettings) -> WordEncoder | ClassEncoder | None:
    """Make the encoder of a model that is to be trained; labels are given by :func:`with_classes`."""
    if settings.condition == "words":
        return WordEncoder(settings.word_width, settings.caption_words)
    return ClassEncoder(settings.classes) if settings.condition == "label" else None


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
        encoder = WordEncoder(**found) if path.name == WORDS_FILE else ClassEncoder(tuple(found["classes"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error!r}. Restore it.") from error
    if version != FORMAT_VERSION:
        raise CheckpointError(f"{path} has format version {version}; this version of whence reads {FORMAT_VERSION}.")
    return encoder


def _encode(images: ImageData, texts: Sequence[str], encoder: WordEncoder | ClassEncoder) -> ImageData:
    distinct = tuple(dict.fromkeys([*texts, WITHHELD]))
    which = {text: k for k, text in enumerate(distinct)}
    arrays: Arrays = encoder.encode(distinct)
    of_row = np.array([which[text] for text in texts], dtype=np.int64)
    conditions = Conditions(distinct, arrays, of_row, withheld=which[WITHHELD])
    return replace(images, encoding=Encoded(encoder.hash, None, None, conditions))


@lru_cache(maxsize=65536)
def _vector(word: str, width: int, seed: int) -> Float32[ndarray, " width"]:
    return normals(noise_key(seed, "word", "train", word, 0), (width,))
