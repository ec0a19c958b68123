"""Similarity: scores without gradients, by features of images that are kept from one set of queries to the next.

::

    cache/embeddings/<key>/about.json                     what the features are, of which encoder and images
    cache/embeddings/<key>/features-<row>.safetensors     those of a block of images; row is its first

The key is a hash of the encoder's identity, the images' fingerprint and the size of a block.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, Float64
from numpy import ndarray

from whence._array_files import read_arrays, write_arrays
from whence._files import sha256_of_json, write_json
from whence.config import TraceSettings
from whence.data import ImageData
from whence.diffusion.noise import noise_key, normals
from whence.encoders import Encoder
from whence.errors import ScoresError
from whence.methods.frame import Baseline, Product
from whence.progress import progress_bar
from whence.scores import Scores

FEATURES_VERSION = 1
"""Part of every key; counts up when the same encoder gives other features."""


@dataclass(frozen=True)
class _Features:
    """Features of some images, block by block."""

    images: ImageData
    encoder: Encoder | None
    """None: the pixels themselves."""
    cache: Path
    settings: TraceSettings
    show_progress: bool = False

    def blocks(self) -> Iterator[tuple[slice, Float32[ndarray, "image feature"]]]:
        """Give rows and their features; those that are not kept are computed, and kept."""
        size = self.settings.block_size
        starts = range(0, len(self.images), size)
        if self.encoder is None:
            for start in starts:
                rows = range(start, min(start + size, len(self.images)))
                yield slice(rows.start, rows.stop), self.images.pixels(rows).reshape(len(rows), -1)
            return
        missing = [start for start in starts if not self._path(start).exists()]
        total = sum(min(size, len(self.images) - start) for start in missing)
        with progress_bar("features", total, "image", shown=self.show_progress and bool(missing)) as bar:
            for start in starts:
                rows = range(start, min(start + size, len(self.images)))
                if start in missing:
                    found = self._encode(rows, self.encoder)
                    write_arrays(self._path(start), {"features": found})
                    bar.update(len(rows))
                yield slice(rows.start, rows.stop), read_arrays(self._path(start))["features"]

    def about(self) -> dict[str, Any]:
        """Say what the features are."""
        assert self.encoder is not None  # pixels need no word
        path = self.folder / "about.json"
        if not path.exists():
            write_json(
                path,
                {
                    "encoder": self.encoder.identity,
                    "features": self.encoder.loaded.gives,
                    "images": self.images.fingerprint,
                },
            )
        try:
            return json.loads(path.read_bytes())
        except ValueError as error:
            raise ScoresError(f"{path} is damaged: {error}. Delete it; the next run makes it again.") from error

    @property
    def folder(self) -> Path:
        """Where they are kept."""
        assert self.encoder is not None
        about = [FEATURES_VERSION, self.encoder.identity, self.images.fingerprint, self.settings.block_size]
        return self.cache / sha256_of_json(about)[:16]

    def _path(self, start: int) -> Path:
        return self.folder / f"features-{start:08d}.safetensors"

    def _encode(self, rows: range, encoder: Encoder) -> Float32[ndarray, "image feature"]:
        size = self.settings.batch_size
        batches = (range(k, min(k + size, rows.stop)) for k in range(rows.start, rows.stop, size))
        return np.concatenate([encoder.loaded(self.images.pixels(batch)) for batch in batches])


def score_baseline(
    baseline: Baseline,
    encoders: Mapping[Baseline, Encoder],
    train: ImageData,
    queries: ImageData,
    settings: TraceSettings,
    cache: Path,
    *,
    show_progress: bool = True,
) -> Scores:
    """Score training images without a gradient.

    Args:
        baseline: What is compared.
        encoders: Those of the baselines that have one.
        train: Training images.
        queries: Query images.
        settings: Seed of random scores, batch and block size.
        cache: Folder for features.
        show_progress: Show a progress bar.

    Returns:
        Cosines in [-1, 1] or inner products; or normal numbers of the seed.

    Raises:
        ConfigError: If the encoder cannot be loaded, or gives something else than features.
    """
    if baseline.kind == "random":
        keys = [noise_key(settings.seed, "order", "query", query_id, 0) for query_id in queries.ids]
        return Scores(baseline.name, queries.ids, train.ids, np.stack([normals(key, (len(train),)) for key in keys]))
    encoder = encoders.get(baseline)
    asked = _Features(queries, encoder, cache, settings)
    kept = _Features(train, encoder, cache, settings, show_progress)
    details: dict[str, Any] = {}
    if encoder is not None:
        about = kept.about()
        details["computed_with"] = {"encoder": encoder.given, "features": about["features"]}
        details["notes"] = [f"{baseline.name} compares the {about['features']}, from {encoder.given}."]
    rows = _factors(np.concatenate([features for _, features in asked.blocks()]), baseline.product)
    values = np.empty((len(queries), len(train)), np.float32)
    for columns, features in kept.blocks():
        values[:, columns] = rows @ _factors(features, baseline.product).T
    return Scores(baseline.name, queries.ids, train.ids, values, details=details)


def _factors(features: Float32[ndarray, "image feature"], product: Product) -> Float64[ndarray, "image feature"]:
    rows = features.astype(np.float64)
    if product == "dot":
        return rows
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
