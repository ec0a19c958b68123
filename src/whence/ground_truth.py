"""Ground truth: outputs of models retrained on subsets, in two files that others open with plain numpy.

    ground_truth.json   manifest: format version, measures, sign, settings, hashes, a checksum of every array
    ground_truth.npz    the arrays below, by name

    subsets         (subset, train) bool            True where the sample was in the training set of the retraining
    train_ids       (train,) text                   columns of subsets
    seeds           (seed,) int64                   seeds of training; every subset was trained with each
    query_ids       (query,) text                   unique
    query_sets      (query,) text                   name of the set that a query belongs to
    query_hashes    (query,) text                   hash of the pixels of each; none where it is not known
    measures        (measure,) text                 names, as in the manifest
    outputs         (measure, subset, seed, query) float64
    timesteps       (query, timestep) int64         timesteps at which a query was measured, ascending
    timestep_loss   (subset, seed, query, timestep) float32    loss at each, the mean over its noise draws
    models          (subset, seed) text             hash of the configuration and the weights of each model

Outputs are the measures as they are, so that lower is better for all that are losses; scores have the other sign:
positive means that training on the sample lowers the measure. How models are made is the business of
``whence.retraining``, how they are measured of ``whence.measuring``, and what scores are compared with them of
``whence.lds``. This module needs no torch.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from jaxtyping import Float64
from numpy import ndarray

from whence._files import publish_folder, sha256_of_json, write_json
from whence.errors import GroundTruthError

FORMAT_VERSION = 1
SIGN = (
    "outputs are the measures as they are (a loss: lower is better); a score is positive where training on the sample "
    "lowers the measure, so scores summed over a subset are compared with minus its output"
)


@dataclass(frozen=True, eq=False)
class GroundTruth:
    """Outputs of models that were trained again on subsets of the training set.

    Shapes and types of the arrays stand at the top of this module; they are checked here, with messages for users.

    Raises:
        GroundTruthError: If shapes, types or ids do not fit each other, or an output is not finite; with all faults.
    """

    subsets: ndarray
    """(subset, train) bool: True where the sample was trained on."""
    train_ids: tuple[str, ...]
    seeds: tuple[int, ...]
    """Seeds of training."""
    query_ids: tuple[str, ...]
    query_sets: tuple[str, ...]
    """Name of the set that each query belongs to."""
    measures: tuple[str, ...]
    """Names of the outputs, such as loss."""
    outputs: ndarray
    """(measure, subset, seed, query) float64."""
    timesteps: ndarray
    """(query, timestep) int64: timesteps at which each query was measured."""
    timestep_loss: ndarray
    """(subset, seed, query, timestep) float32: loss at each of them, so that other weightings can be made."""
    query_hashes: tuple[str, ...] = ()
    """Hash of what the model sees of each query, ``ImageData.seen_hashes``; empty where it is not known."""
    models: tuple[tuple[str, ...], ...] = ()
    """Hash of each model's weights, by subset and seed; empty where it is not known."""
    details: dict[str, Any] = field(default_factory=dict)
    """How it was made: settings, hashes of images, versions, ``notes``."""
    folder: Path | None = None
    """Where it was loaded from."""

    def __post_init__(self):
        faults = _find_faults(self)
        if faults:
            raise GroundTruthError(f"This is no ground truth: {'; '.join(faults)}.")

    @cached_property
    def subset_hashes(self) -> tuple[str, ...]:
        """Hash of the members' ids of each subset, whatever the order of the training set."""
        ids = np.array(self.train_ids, dtype=object)
        return tuple(sha256_of_json(sorted(ids[members])) for members in self.subsets)

    @property
    def sets(self) -> tuple[str, ...]:
        """Names of the query sets, in order."""
        return tuple(dict.fromkeys(self.query_sets))

    @property
    def notes(self) -> list[str]:
        """What a reader has to know."""
        return list(self.details.get("notes", []))

    def output(self, measure: str = "loss") -> Float64[ndarray, "subset seed query"]:
        """Give one measure of every model.

        Args:
            measure: Its name.

        Returns:
            The outputs as they are: of a loss, lower is better.

        Raises:
            GroundTruthError: If there is no such measure; the message lists those that there are.
        """
        if measure not in self.measures:
            raise GroundTruthError(f"There is no measure {measure!r}; there are {', '.join(self.measures)}.")
        return self.outputs[self.measures.index(measure)]

    def select(
        self, *, subsets: Sequence[int] | ndarray | None = None, queries: Sequence[int] | ndarray | None = None
    ) -> "GroundTruth":
        """Keep some subsets or queries, in the order given.

        Args:
            subsets: Rows of subsets; all by default.
            queries: Rows of queries; all by default.

        Returns:
            A ground truth of these alone.
        """
        kept = np.arange(len(self.subsets))[slice(None) if subsets is None else np.asarray(subsets)]
        asked = np.arange(len(self.query_ids))[slice(None) if queries is None else np.asarray(queries)]
        return replace(
            self,
            subsets=self.subsets[kept],
            models=tuple(self.models[k] for k in kept) if self.models else (),
            query_ids=tuple(self.query_ids[q] for q in asked),
            query_sets=tuple(self.query_sets[q] for q in asked),
            query_hashes=tuple(self.query_hashes[q] for q in asked) if self.query_hashes else (),
            outputs=self.outputs[:, kept][..., asked],
            timesteps=self.timesteps[asked],
            timestep_loss=self.timestep_loss[kept][:, :, asked],
            folder=None,
        )

    def save(self, folder: str | Path) -> "GroundTruth":
        """Write both files into ``folder``, which appears whole or not at all.

        Returns:
            The ground truth as it is there.
        """
        folder = Path(folder)
        arrays = _to_arrays(self)
        manifest = {
            "format_version": FORMAT_VERSION,
            "kind": "outputs of models retrained on subsets",
            "sign": SIGN,
            "measures": list(self.measures),
            "query_sets": {name: self.query_sets.count(name) for name in self.sets},
            "details": self.details,
            "arrays": {name: _describe(array) for name, array in arrays.items()},
        }
        with publish_folder(folder) as partial:
            with (partial / _ARRAYS_FILE).open("wb") as file:
                np.savez_compressed(file, **arrays)
            write_json(partial / _MANIFEST, manifest | {"manifest_sha256": sha256_of_json(manifest)})
        return replace(self, folder=folder)

    @classmethod
    def load(cls, folder: str | Path) -> "GroundTruth":
        """Read a ground truth and check every array against the manifest.

        Args:
            folder: A folder with the two files.

        Returns:
            The ground truth.

        Raises:
            GroundTruthError: If a file is missing or damaged, the format is newer than this version reads, or what the
                files hold does not fit together.
        """
        folder = Path(folder)
        manifest = _read_manifest(folder)
        arrays = _read_arrays(folder / _ARRAYS_FILE, manifest["arrays"])
        try:
            return cls(
                subsets=arrays["subsets"],
                train_ids=tuple(arrays["train_ids"].tolist()),
                seeds=tuple(arrays["seeds"].tolist()),
                query_ids=tuple(arrays["query_ids"].tolist()),
                query_sets=tuple(arrays["query_sets"].tolist()),
                query_hashes=tuple(arrays["query_hashes"].tolist()),
                measures=tuple(arrays["measures"].tolist()),
                outputs=arrays["outputs"],
                timesteps=arrays["timesteps"],
                timestep_loss=arrays["timestep_loss"],
                models=tuple(map(tuple, arrays["models"].tolist())),
                details=manifest["details"],
                folder=folder,
            )
        except GroundTruthError as error:
            raise GroundTruthError(f"{folder}: {error}") from error


def split_subsets(ground_truth: GroundTruth, num_fit: int, *, offset: int = 0) -> tuple[GroundTruth, GroundTruth]:
    """Split a ground truth into subsets to fit on and others to evaluate on.

    Subsets are independent draws, so that the first ones are as good as any.

    Args:
        ground_truth: All subsets.
        num_fit: How many to fit on.
        offset: The first of them.

    Returns:
        The part to fit on, and the rest.

    Raises:
        GroundTruthError: If either part would have fewer than two subsets.
    """
    count = len(ground_truth.subsets)
    if not (2 <= num_fit <= count - 2 and 0 <= offset <= count - num_fit):
        raise GroundTruthError(
            f"Of {count} subsets, at least 2 must be left to fit on and 2 to evaluate on; found {num_fit} to fit on, "
            f"from number {offset}. Retrain on more subsets, or fit on fewer."
        )
    chosen = np.arange(offset, offset + num_fit)
    rest = np.setdiff1d(np.arange(count), chosen)
    return ground_truth.select(subsets=chosen), ground_truth.select(subsets=rest)


def sha256_of_array(array: ndarray) -> str:
    """Hash an array by type, shape and bytes in C order; text by its characters, whatever the width of its type."""
    content = json.dumps(array.tolist()).encode() if array.dtype.kind == "U" else np.ascontiguousarray(array).tobytes()
    head = f"{'text' if array.dtype.kind == 'U' else array.dtype.str} {list(array.shape)} "
    return hashlib.sha256(head.encode() + content).hexdigest()


def _to_arrays(truth: GroundTruth) -> dict[str, Any]:
    texts = {name: np.array(getattr(truth, name), dtype=np.str_) for name in _TEXTS}
    numbers = {name: np.ascontiguousarray(getattr(truth, name)) for name in _NUMBERS}
    shape = (len(truth.subsets), len(truth.seeds)) if truth.models else (0, 0)
    models = np.array(truth.models, dtype=np.str_).reshape(shape)
    return numbers | texts | {"seeds": np.array(truth.seeds, dtype=np.int64), "models": models}


def _describe(array: ndarray) -> dict[str, Any]:
    dtype = "text" if array.dtype.kind == "U" else str(array.dtype)
    return {"shape": list(array.shape), "dtype": dtype, "sha256": sha256_of_array(array)}


def _find_faults(truth: GroundTruth) -> list[str]:
    """Say what does not fit; shapes first, as the rest is about entries."""
    num_subsets, num_train = truth.subsets.shape if truth.subsets.ndim == 2 else (0, 0)
    num_seeds, num_queries = len(truth.seeds), len(truth.query_ids)
    num_timesteps = truth.timesteps.shape[-1] if truth.timesteps.ndim else 0
    shapes: list[tuple[str, Any, tuple[int, ...], str]] = [
        ("subsets", truth.subsets, (num_subsets, len(truth.train_ids)), "b"),
        ("outputs", truth.outputs, (len(truth.measures), num_subsets, num_seeds, num_queries), "f"),
        ("timesteps", truth.timesteps, (num_queries, num_timesteps), "i"),
        ("timestep_loss", truth.timestep_loss, (num_subsets, num_seeds, num_queries, num_timesteps), "f"),
    ]
    faults = [
        f"{name} must have shape {want} and hold {_KINDS[kind]}, found {array.shape} of {array.dtype}"
        for name, array, want, kind in shapes
        if array.shape != want or array.dtype.kind != kind
    ]
    if len(truth.query_sets) != num_queries:
        faults.append(f"query_sets must name the set of each of {num_queries} queries, found {len(truth.query_sets)}")
    if truth.query_hashes and len(truth.query_hashes) != num_queries:
        faults.append(f"query_hashes must have one for each of {num_queries} queries, found {len(truth.query_hashes)}")
    if truth.models and [len(row) for row in truth.models] != [num_seeds] * num_subsets:
        faults.append(f"models must have a hash for each of {num_subsets} subsets and {num_seeds} seeds")
    for name in ("train_ids", "query_ids", "seeds", "measures"):
        entries = getattr(truth, name)
        twice = [entry for entry in dict.fromkeys(entries) if entries.count(entry) > 1] if _repeats(entries) else []
        faults += [f"{name} must be one or more and differ, found none"] if not entries else []
        faults += [f"{name} must differ, found {', '.join(map(str, twice[:3]))} more than once"] if twice else []
    if faults:
        return faults
    if num_subsets == 0 or num_train == 0:
        return ["there must be at least one subset and one training sample"]
    empty = np.flatnonzero(~truth.subsets.any(axis=1))
    faults += [f"subset {empty[0]} has no members"] if len(empty) else []
    bad = np.argwhere(~np.isfinite(truth.outputs))
    if len(bad):
        measure, subset, seed, query = bad[0]
        faults.append(
            f"outputs must be finite; {truth.measures[measure]} of query {truth.query_ids[query]}, subset {subset}, "
            f"seed {truth.seeds[seed]} is {truth.outputs[tuple(bad[0])]}"
        )
    return faults


def _repeats(entries: Sequence[Any]) -> bool:
    return len(set(entries)) < len(entries)


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / _MANIFEST
    try:
        manifest = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise GroundTruthError(
            f"{folder} holds no readable ground truth ({error}). It has a {_MANIFEST} and a {_ARRAYS_FILE}; make one "
            "with `whence retrain`."
        ) from error
    missing = [key for key in _KEYS if not isinstance(manifest, dict) or key not in manifest]
    if "format_version" not in missing and manifest["format_version"] != FORMAT_VERSION:
        raise GroundTruthError(
            f"{folder} has format version {manifest['format_version']}; this version of whence reads {FORMAT_VERSION}. "
            "Open it with the version that wrote it."
        )
    if missing:
        raise GroundTruthError(
            f"{path} is no manifest of a ground truth: it must have {', '.join(_KEYS)}, and lacks {', '.join(missing)}."
        )
    want = manifest.pop("manifest_sha256")
    found = sha256_of_json(manifest)
    if found != want:
        raise GroundTruthError(
            f"{path} is damaged: its SHA-256 is {found[:12]}…, it says itself {str(want)[:12]}…. Restore it from where "
            "it came."
        )
    return manifest


def _read_arrays(path: Path, described: dict[str, dict[str, Any]]) -> dict[str, ndarray]:
    try:
        # Opened here, as numpy leaves a file open that is no archive.
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, BadZipFile, EOFError) as error:
        raise GroundTruthError(f"{path} cannot be read: {error}. Restore it from where it came.") from error
    missing = [name for name in _ALL if name not in arrays or name not in described]
    if missing:
        raise GroundTruthError(f"{path} lacks {', '.join(missing)}. Restore it from where it came.")
    altered = [name for name in _ALL if _describe(arrays[name]) != described[name]]
    if altered:
        raise GroundTruthError(
            f"{path} does not fit {_MANIFEST}: {', '.join(altered)} differ from their checksum, shape or type there. "
            "The two files are of different makings, or one is damaged; restore both."
        )
    return arrays


_MANIFEST, _ARRAYS_FILE = "ground_truth.json", "ground_truth.npz"
_KEYS = ("format_version", "kind", "sign", "measures", "query_sets", "details", "arrays", "manifest_sha256")
_TEXTS = ("train_ids", "query_ids", "query_sets", "query_hashes", "measures")
_NUMBERS = ("subsets", "outputs", "timesteps", "timestep_loss")
_ALL = (*_TEXTS, *_NUMBERS, "seeds", "models")
_KINDS = {"b": "booleans", "f": "floats", "i": "integers"}
