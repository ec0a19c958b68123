"""Scores: query x train matrices with what made them, on disk and in memory.

    scores/<method>-<hash>/manifest.json        method, plans, weights, checkpoints, ids, checksums; fixed when written
    scores/<method>-<hash>/scores.safetensors   the arrays below

Positive means: training on this sample lowers the query's measure (a proponent). This module needs no torch and no
model, so that pages and notebooks open scores anywhere. Axes are named query, train, phase (bin of query timesteps,
from least noise to most), half (of the noise draws), checkpoint and timestep.
"""

import json
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save, save_file

from whence._files import as_json, publish_folder, sha256_of_file, sha256_of_json, write_json
from whence.errors import ConfigError, ScoresError

FORMAT_VERSION = 1


@dataclass(frozen=True)
class TopEntry:
    """One training sample in the ranking of one query; ``rank`` counts from 1."""

    rank: int
    train_id: str
    train_row: int
    score: float


@dataclass(frozen=True)
class Scores:
    """Influence of every training sample on every query by one method.

    Optional arrays are None where a method has no such thing (raw pixels have no timesteps).
    """

    method: str
    query_ids: tuple[str, ...]
    train_ids: tuple[str, ...]
    values: Float[ndarray, "query train"]
    """The scores. Their unit depends on the method; compare within one query."""
    phases: Float[ndarray, "query phase train"] | None = None
    """The same scores by bin of query timesteps; they add up to ``values``."""
    phase_timesteps: tuple[tuple[int, int], ...] = ()
    """First and last query timestep of each phase."""
    halves: Float[ndarray, "half query train"] | None = None
    """Scores from the first and from the second half of the noise draws alone."""
    train_norms: Float[ndarray, "checkpoint train"] | None = None
    """Length of each sample's gradient; the root of the mean square where it has several visits. NaN: not visited."""
    train_timesteps: Int[ndarray, "checkpoint train"] | None = None
    """Timestep at which the sample was (last) trained before the checkpoint; -1: not visited."""
    train_weights: Float[ndarray, "checkpoint train"] | None = None
    """Weight of each sample at each checkpoint."""
    query_norms: Float[ndarray, "checkpoint query timestep"] | None = None
    """Length of each query's gradient, averaged over its noise draws, at each timestep of the grid."""
    query_timesteps: Int[ndarray, " timestep"] | None = None
    """The query grid."""
    checkpoint_steps: tuple[int, ...] = ()
    """Optimizer steps at which the checkpoints were written."""
    details: dict[str, Any] = field(default_factory=dict)
    """The method's declaration, the settings, hashes of checkpoints and data, counts, and ``notes``."""
    folder: Path | None = field(default=None, compare=False)
    """Where they were loaded from."""

    def __post_init__(self):
        want = (len(self.query_ids), len(self.train_ids))
        if self.values.shape != want:
            raise ScoresError(
                f"Scores must have one row per query and one column per training sample, {want}; found "
                f"{self.values.shape}."
            )

    @property
    def notes(self) -> list[str]:
        """What a reader has to know: substitutions, samples without a visit, zero gradients."""
        return list(self.details.get("notes", []))

    def pool(self, name: str) -> "Scores":
        """Take all queries for one: a style, a set of failures.

        A score is linear in its query's side, so the mean over queries is the score of the mean query. Where a method
        brings each query to one length, each has the same say.

        Args:
            name: What to call the one query.

        Returns:
            Scores with one query.
        """

        def mean(array: ndarray | None, axis: int) -> ndarray | None:
            return None if array is None else array.mean(axis=axis, keepdims=True)

        return replace(
            self,
            query_ids=(name,),
            values=self.values.mean(axis=0, keepdims=True),
            phases=mean(self.phases, 0),
            halves=mean(self.halves, 1),
            query_norms=mean(self.query_norms, 1),
            details=self.details | {"pooled": list(self.query_ids)},
            folder=None,
        )

    def top(self, query_row: int, k: int = 10, *, proponents: bool = True) -> list[TopEntry]:
        """Rank the training samples of one query, strongest first; ties go to the lower row.

        Args:
            query_row: Row of the query.
            k: How many; fewer where the training set is smaller.
            proponents: The largest scores; False: the smallest (opponents), most negative first.

        Returns:
            Entries in order of rank.

        Raises:
            ConfigError: If ``k`` is below 1.
        """
        _check_k(k)
        keys = -self.values[query_row] if proponents else self.values[query_row]
        rows = np.argsort(keys, kind="stable")[:k]
        return [
            TopEntry(rank, self.train_ids[row], int(row), float(self.values[query_row, row]))
            for rank, row in enumerate(rows, start=1)
        ]

    def top_rows(self, k: int) -> Int[ndarray, "query k"]:
        """Rows of the ``k`` largest scores of every query, strongest first; ties go to the lower row."""
        _check_k(k)
        return np.argsort(-self.values, axis=1, kind="stable")[:, :k]

    def reliability(self) -> Float[ndarray, " query"] | None:
        """Split-half reliability of each query's scores over its noise draws.

        The correlation r of the two halves over the training set, stepped up to the full number of draws by the
        Spearman-Brown formula 2r / (1 + r).

        Returns:
            At most 1, one per query; NaN where a half is constant or r is -1; None where no halves were kept.
        """
        if self.halves is None:
            return None
        first, second = self.halves - self.halves.mean(axis=-1, keepdims=True)
        with np.errstate(invalid="ignore", divide="ignore"):
            r = (first * second).sum(-1) / np.sqrt((first**2).sum(-1) * (second**2).sum(-1))
            return 2 * r / (1 + r)

    @property
    def content_hash(self) -> str:
        """SHA-256 over all that :meth:`save` writes; the manifest's own hash on disk."""
        arrays = {name: np.ascontiguousarray(array) for name, array in self._arrays.items()}
        return sha256_of_json(self._manifest(sha256(save(arrays)).hexdigest()))

    def save(self, folder: str | Path) -> None:
        """Write to ``folder``, which appears whole or not at all."""
        with publish_folder(Path(folder)) as partial:
            save_file({name: np.ascontiguousarray(array) for name, array in self._arrays.items()}, partial / _FILE)
            manifest = self._manifest(sha256_of_file(partial / _FILE))
            write_json(partial / _MANIFEST, manifest | {"manifest_sha256": sha256_of_json(manifest)})

    @property
    def num_bytes(self) -> int:
        """Bytes that :meth:`save` writes, within some hundred."""
        manifest = as_json(self._manifest("0" * 64)) | {"manifest_sha256": "0" * 64}
        arrays = sum(array.nbytes + _HEADER_BYTES for array in self._arrays.values())
        return arrays + len(json.dumps(manifest, indent=1))

    @property
    def _arrays(self) -> dict[str, ndarray]:
        return {name: getattr(self, name) for name in _ARRAYS if getattr(self, name) is not None}

    def _manifest(self, sha256: str) -> dict[str, Any]:
        return {
            "format_version": FORMAT_VERSION,
            "method": self.method,
            "arrays": {name: {"shape": a.shape, "dtype": str(a.dtype)} for name, a in self._arrays.items()},
            "sha256": sha256,
            "checkpoint_steps": self.checkpoint_steps,
            "phase_timesteps": self.phase_timesteps,
            "details": self.details,
            "query_ids": self.query_ids,
            "train_ids": self.train_ids,
        }

    @classmethod
    def load(cls, folder: str | Path) -> "Scores":
        """Read scores and check them against their manifest.

        Args:
            folder: A folder that :meth:`save` has written.

        Returns:
            The scores.

        Raises:
            ScoresError: If a file is missing or damaged, or the format is newer than this version reads.
        """
        folder = Path(folder)
        manifest = _read_manifest(folder)
        try:
            _check_sha256(folder / _FILE, sha256_of_file(folder / _FILE), manifest["sha256"])
            arrays = load_file(folder / _FILE)
        except (OSError, SafetensorError) as error:
            raise ScoresError(
                f"{folder / _FILE} cannot be read: {error}. Delete the folder and trace again."
            ) from error
        return cls(
            method=manifest["method"],
            query_ids=tuple(manifest["query_ids"]),
            train_ids=tuple(manifest["train_ids"]),
            phase_timesteps=tuple((first, last) for first, last in manifest["phase_timesteps"]),
            checkpoint_steps=tuple(manifest["checkpoint_steps"]),
            details=manifest["details"],
            folder=folder,
            **arrays,
        )


@dataclass(frozen=True)
class TopScores:
    """The training samples with the largest scores, where a whole matrix of scores would be too large.

    ::

        scores/<method>-<hash>/top.json    method, what made it, and the samples of each query with their scores
    """

    method: str
    query_ids: tuple[str, ...]
    entries: tuple[tuple[TopEntry, ...], ...]
    """The samples of each query, strongest first."""
    details: dict[str, Any] = field(default_factory=dict)
    """As in :class:`Scores`."""
    folder: Path | None = field(default=None, compare=False)
    """Where they lie."""

    @property
    def notes(self) -> list[str]:
        """What a reader has to know."""
        return list(self.details.get("notes", []))

    def top(self, query_row: int, k: int = 10) -> list[TopEntry]:
        """Give the first ``k`` samples of one query; no more than were kept."""
        _check_k(k)
        return list(self.entries[query_row][:k])

    def save(self, folder: str | Path) -> "TopScores":
        """Write to ``folder``, and give the scores as they are there."""
        content = {
            "format_version": FORMAT_VERSION,
            "method": self.method,
            "details": self.details,
            "query_ids": self.query_ids,
            "entries": [[[e.train_id, e.train_row, e.score] for e in entries] for entries in self.entries],
        }
        write_json(Path(folder) / _TOP, content | {"sha256": sha256_of_json(content)})
        return TopScores.load(folder)

    @classmethod
    def load(cls, folder: str | Path) -> "TopScores":
        """Read what :meth:`save` has written.

        Args:
            folder: The folder.

        Returns:
            The scores.

        Raises:
            ScoresError: If the file is missing or damaged.
        """
        path = Path(folder) / _TOP
        try:
            content = json.loads(path.read_bytes())
            _check_sha256(path, sha256_of_json({k: v for k, v in content.items() if k != "sha256"}), content["sha256"])
            return cls(
                content["method"],
                tuple(content["query_ids"]),
                tuple(
                    tuple(TopEntry(rank, *entry) for rank, entry in enumerate(entries, start=1))
                    for entries in content["entries"]
                ),
                content["details"],
                Path(folder),
            )
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise ScoresError(f"{path} cannot be read: {error!r}. Delete the folder and query again.") from error


def _check_k(k: int) -> None:
    if k < 1:
        raise ConfigError(f"k must be above 0, found {k}: it is how many training samples to rank.")


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / _MANIFEST
    try:
        manifest = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ScoresError(
            f"{folder} holds no readable scores ({error}). A folder of scores has a {_MANIFEST} and a {_FILE}; "
            "make them with `whence trace`."
        ) from error
    missing = [key for key in _KEYS if not isinstance(manifest, dict) or key not in manifest]
    if "format_version" not in missing and manifest["format_version"] != FORMAT_VERSION:
        raise ScoresError(
            f"{folder} has format version {manifest['format_version']}; this version of whence reads "
            f"{FORMAT_VERSION}. Open it with the version that wrote it, or trace again."
        )
    if missing:
        raise ScoresError(
            f"{path} is no manifest of scores: it must have {', '.join(_KEYS)}, and lacks {', '.join(missing)}. Delete "
            "the folder and trace again."
        )
    want = manifest.pop("manifest_sha256")
    _check_sha256(path, sha256_of_json(manifest), want)
    return manifest


def _check_sha256(path: Path, found: str, want: Any) -> None:
    if found != want:
        raise ScoresError(
            f"{path} is damaged: its SHA-256 is {found[:12]}…, the manifest says {str(want)[:12]}…. Delete the folder "
            "and trace again."
        )


_MANIFEST = "manifest.json"
_KEYS = (
    "format_version",
    "method",
    "sha256",
    "checkpoint_steps",
    "phase_timesteps",
    "details",
    "query_ids",
    "train_ids",
    "manifest_sha256",
)
_FILE = "scores.safetensors"
_HEADER_BYTES = 85
"""Of an array in a safetensors file, about: its name, type, shape and place."""
_TOP = "top.json"
_ARRAYS = (
    "values",
    "phases",
    "halves",
    "train_norms",
    "train_timesteps",
    "train_weights",
    "query_norms",
    "query_timesteps",
)
