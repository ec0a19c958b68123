"""What a network is given instead of the pixels of images, and beside them: latents and conditions.

    latents       scaled as the network sees them: mean of the VAE's posterior, and its standard deviation where
                  training drew from it; a second pair of mirrored images where training mirrored them
    conditions    arrays by the name under which the network takes them, such as ``encoder_hidden_states``; one array
                  for each different text or label, however many images have it

They are made once (``whence.encoding``) and travel with the images (``ImageData.encoding``). This module needs numpy
alone.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import sha256
from typing import final

import numpy as np
from jaxtyping import Bool, Float32, Int, Int64
from numpy import ndarray

from whence.errors import DataError

Arrays = Mapping[str, ndarray]
"""By the name under which a network takes them; one row for each event."""


@final
@dataclass(frozen=True, eq=False)
class Latents:
    """Posterior of a VAE for some images, scaled and shifted as the network sees it."""

    mean: Float32[ndarray, "row channel height width"]
    deviation: Float32[ndarray, "row channel height width"] | None = None
    """Standard deviation; None where the mean itself is what training saw."""

    def select(self, rows: Sequence[int] | ndarray) -> "Latents":
        """Keep those of some images, in the order given."""
        rows = np.asarray(rows, dtype=np.int64)
        return Latents(self.mean[rows], None if self.deviation is None else self.deviation[rows])


@final
@dataclass(frozen=True, eq=False)
class Conditions:
    """Conditions of some images, each different one held once."""

    texts: tuple[str, ...]
    """What each different condition was made of: a caption, a label."""
    arrays: Arrays
    """One row for each of ``texts``."""
    of_row: Int64[ndarray, " row"]
    """Which of them an image has."""
    withheld: int | None = None
    """Which of them stands for a condition that training withheld, such as the empty prompt."""

    def take(self, rows: Int[ndarray, " event"], dropped: Bool[ndarray, " event"] | None = None) -> dict[str, ndarray]:
        """Give the conditions of images.

        Args:
            rows: Positions of images.
            dropped: Where the condition was withheld.

        Returns:
            Arrays by name, one row for each of ``rows``.

        Raises:
            DataError: If a condition was withheld and it is not known what stood in its place.
        """
        which = self.of_row[rows]
        if dropped is not None and dropped.any():
            if self.withheld is None:
                raise DataError("Conditions were withheld in training, and it is not known what stood in their place.")
            which = np.where(dropped, self.withheld, which)
        return {name: values[which] for name, values in self.arrays.items()}


@final
@dataclass(frozen=True, eq=False)
class Encoded:
    """Latents and conditions of images, row by row."""

    encoder: str
    """Hash of all that encoded them: VAE, text encoders, how labels are numbered."""
    latents: Latents | None
    """None where the network sees pixels."""
    mirrored: Latents | None
    """Latents of the mirrored images, where training mirrored some."""
    conditions: Conditions | None
    """None for an unconditional network."""

    def clean(
        self, rows: Int[ndarray, " event"], flip: Bool[ndarray, " event"] | None = None
    ) -> tuple[Float32[ndarray, "event channel height width"], Float32[ndarray, "event channel height width"] | None]:
        """Give mean and standard deviation of the latents of images.

        Args:
            rows: Positions of images.
            flip: Which of them are mirrored.

        Returns:
            Mean, and standard deviation or None.

        Raises:
            DataError: If mirrored latents are needed and there are none.
        """
        assert self.latents is not None  # asked only where there are latents
        found = self.latents.select(rows)
        if flip is None or not flip.any():
            return found.mean, found.deviation
        if self.mirrored is None:
            raise DataError(
                "Training mirrored images before they were encoded; latents of mirrored images are missing. Delete the "
                "run's cache/ folder, so that they are encoded again."
            )
        other, where = self.mirrored.select(rows), flip[:, None, None, None]
        mean = np.where(where, other.mean, found.mean)
        if found.deviation is None or other.deviation is None:
            return mean, None
        return mean, np.where(where, other.deviation, found.deviation)

    @cached_property
    def hashes(self) -> tuple[str, ...]:
        """Hash of what each image was encoded with and of its condition; pixels do not count."""
        if self.conditions is None:
            texts = [""] * (0 if self.latents is None else len(self.latents.mean))
        else:
            texts = [self.conditions.texts[k] for k in self.conditions.of_row]
        return tuple(sha256(f"{self.encoder}\n{text}".encode()).hexdigest() for text in texts)

    def select(self, rows: Sequence[int] | ndarray) -> "Encoded":
        """Keep those of some images, in the order given."""
        rows = np.asarray(rows, dtype=np.int64)
        conditions = self.conditions and replace(self.conditions, of_row=self.conditions.of_row[rows])
        latents, mirrored = self.latents and self.latents.select(rows), self.mirrored and self.mirrored.select(rows)
        return Encoded(self.encoder, latents, mirrored, conditions)

    def with_latents(self, mean: Float32[ndarray, "row channel height width"], rows: ndarray) -> "Encoded":
        """Put other latents in the place of some images', which keep their conditions."""
        chosen = self.select(rows)
        return replace(chosen, latents=Latents(mean), mirrored=None)


class AbstractEncoder(ABC):
    """Makes latents of images, or conditions of captions or labels, or both."""

    @property
    @abstractmethod
    def hash(self) -> str:
        """Hash of all that what it makes depends on."""

    @property
    def latent_encoder(self) -> "AbstractEncoder | None":
        """What makes the latents, where that is another encoder."""
        return None

    @property
    def has_vae(self) -> bool:
        """Whether the network sees latents."""
        return self.latent_encoder is not None and self.latent_encoder.has_vae

    @property
    def knows_none(self) -> bool:
        """Whether the empty text, which stands for a condition that is withheld, is a condition too."""
        return True

    def fault_of(self, texts: Sequence[str]) -> str | None:
        """Say why captions or labels are of no use to the network, all together; None where they are of use.

        Args:
            texts: Of all images; the empty one stands for none.

        Returns:
            A message that goes on from "The captions of <source>".
        """
        return None

    def latents(self, pixels: Float32[ndarray, "row channel height width"], *, with_deviation: bool) -> Latents:
        """Encode images.

        Args:
            pixels: In [-1, 1].
            with_deviation: Also give the standard deviation of the posterior.

        Returns:
            What the network is trained on.
        """
        assert self.latent_encoder is not None  # asked only where there is one
        return self.latent_encoder.latents(pixels, with_deviation=with_deviation)

    def images_of(self, latents: Float32[ndarray, "row latent h w"]) -> Float32[ndarray, "row channel height width"]:
        """Decode latents; asked only where there is a VAE."""
        assert self.latent_encoder is not None
        return self.latent_encoder.images_of(latents)

    @abstractmethod
    def conditions(self, texts: Sequence[str], size: tuple[int, int]) -> Arrays:
        """Encode captions or labels.

        Args:
            texts: What conditions are made of; the empty one stands for a condition that is withheld.
            size: Height and width of the images in pixels.

        Returns:
            Arrays by the names of the network's arguments, one row for each text.
        """


def join(parts: Sequence[Encoded | None]) -> Encoded | None:
    """Join what belongs to data sets that are put one after the other; None unless all have some.

    Args:
        parts: What belongs to each data set.

    Returns:
        What belongs to all of them together.

    Raises:
        DataError: If they were encoded differently.
    """
    held = [part for part in parts if part is not None]
    if not held or len(held) != len(parts):
        return None
    if len({part.encoder for part in held}) > 1:
        raise DataError("Images that were encoded by different models cannot be joined. Encode them with one model.")
    return Encoded(
        held[0].encoder,
        _join_latents([part.latents for part in held]),
        _join_latents([part.mirrored for part in held]),
        _join_conditions([part.conditions for part in held]),
    )


def _join_latents(parts: Sequence[Latents | None]) -> Latents | None:
    held = [part for part in parts if part is not None]
    if not held or len(held) != len(parts):
        return None
    deviations = [part.deviation for part in held if part.deviation is not None]
    mean = np.concatenate([part.mean for part in held])
    return Latents(mean, np.concatenate(deviations) if len(deviations) == len(held) else None)


def _join_conditions(parts: Sequence[Conditions | None]) -> Conditions | None:
    held = [part for part in parts if part is not None]
    if not held or len(held) != len(parts):
        return None
    starts = np.cumsum([0, *(len(part.texts) for part in held)])
    arrays = {name: np.concatenate([part.arrays[name] for part in held]) for name in held[0].arrays}
    of_row = np.concatenate([part.of_row + start for part, start in zip(held, starts, strict=False)])
    texts = tuple(text for part in held for text in part.texts)
    return Conditions(texts, arrays, of_row, held[0].withheld)
