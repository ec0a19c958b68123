"""The record: what training did, one row per visit of a sample.

    record/manifest.json                          settings, scheduler, seed, data fingerprint, versions; fixed
    record/parts-<rank>.json                      the parts that count, with checksums; rewritten when a part closes
    record/visits-<rank>-<first>-<last>.parquet   rows of the optimizer steps first..last
    record/probe-<rank>-<step>.parquet            a forward pass that trained nothing, for the replay check
    record/samples-<rank>-<kind>-<last>.parquet   ids first seen in that part; row numbers count on from part to part
    record/aside/                                 parts that a resumed run no longer stands on

A part closes at each checkpoint. Steps count from 1: the visits of step s are what turned the weights after s - 1 steps
into those after s, so a checkpoint of step s is explained by the steps up to and including s. Noise is not stored: it
is a function of the noise key (``whence.diffusion.noise``). Writing is the ``Recorder``'s business; this module fixes
the form.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Bool, Float32, Float64, Int64, UInt64
from numpy import ndarray

from whence._files import publish_file, sha256_of_file, sha256_of_json, write_json
from whence.errors import RecordError

FORMAT_VERSION = 1
_MANIFEST_KEYS = ("seed", "loss", "mixed_precision", "prediction_type", "data_fingerprint", "config")

SCHEMA = pa.schema(
    [
        ("step", pa.uint32()),
        ("micro_batch", pa.uint16()),
        ("rank", pa.uint16()),
        ("slot", pa.uint32()),
        ("sample", pa.uint32()),
        ("model_time", pa.float32()),
        ("sigma", pa.float32()),
        ("noise_key", pa.uint64()),
        ("flip", pa.bool_()),
        ("crop_top", pa.uint16()),
        ("crop_left", pa.uint16()),
        ("condition_dropped", pa.bool_()),
        ("learning_rate", pa.float64()),
        ("clip_coefficient", pa.float64()),
        ("samples_in_step", pa.uint32()),
        ("loss_weight", pa.float32()),
        ("loss", pa.float32()),
    ]
)


@dataclass(frozen=True)
class Visits:
    """Columns of a record, in the order of training. All have one entry per visit.

    ``learning_rate * clip_coefficient / samples_in_step`` is the weight with which the visit's loss gradient entered
    its optimizer step.
    """

    step: Int64[ndarray, " visit"]
    """Optimizer step, from 1."""
    micro_batch: Int64[ndarray, " visit"]
    """Forward pass within the step, from 0."""
    rank: Int64[ndarray, " visit"]
    """Process that saw it."""
    slot: Int64[ndarray, " visit"]
    """Place in the batch."""
    sample: Int64[ndarray, " visit"]
    """Row in the record's ``sample_ids`` (not in the data set)."""
    model_time: Float32[ndarray, " visit"]
    """The scheduler's time, as scripts hand it to the network; the timestep 0..T-1 for DDPM-like models."""
    sigma: Float32[ndarray, " visit"]
    """Standard deviation of the noise inside the noisy image."""
    noise_key: UInt64[ndarray, " visit"]
    """Key of the noise."""
    flip: Bool[ndarray, " visit"]
    """Whether the image was mirrored left to right."""
    crop_top: Int64[ndarray, " visit"]
    """First row of a random crop, in pixels; 0 without one."""
    crop_left: Int64[ndarray, " visit"]
    """First column of a random crop, in pixels; 0 without one."""
    condition_dropped: Bool[ndarray, " visit"]
    """Whether the caption or label was withheld."""
    learning_rate: Float64[ndarray, " visit"]
    """Of this optimizer step, read before the scheduler stepped."""
    clip_coefficient: Float64[ndarray, " visit"]
    """Factor of gradient clipping in (0, 1]; 0 where the step was skipped."""
    samples_in_step: Int64[ndarray, " visit"]
    """Samples in the whole optimizer step; where passes of a step differ in size, as many as make the weight right."""
    loss_weight: Float32[ndarray, " visit"]
    """Factor inside the loss."""
    loss: Float32[ndarray, " visit"]
    """The sample's loss, its weight included; NaN where a script did not tell it."""
    timestep: Int64[ndarray, " visit"]
    """The timestep 0..T-1, from least noise to most; follows from ``model_time``."""

    def __len__(self) -> int:
        return len(self.step)

    @property
    def weight(self) -> Float64[ndarray, " visit"]:
        """Learning rate x clip coefficient / samples in the optimizer step."""
        return self.learning_rate * self.clip_coefficient / self.samples_in_step

    def where(self, mask: Bool[ndarray, " visit"]) -> "Visits":
        """Keep the visits where ``mask`` is True."""
        return Visits(**{f.name: getattr(self, f.name)[mask] for f in fields(self)})

    @classmethod
    def from_table(cls, table: pa.Table, model_times: Sequence[float] | None = None) -> "Visits":
        """Read the columns of :data:`SCHEMA`; small integers widen to int64.

        Args:
            table: The columns.
            model_times: The scheduler's times by timestep, ascending. Default: the timesteps themselves.

        Returns:
            The visits.

        Raises:
            RecordError: If a time is none of the scheduler's.
        """
        columns = {}
        for name in SCHEMA.names:
            column = table[name].to_numpy()
            columns[name] = column.astype(np.int64) if column.dtype.kind == "u" and name != "noise_key" else column
        return cls(**columns, timestep=_timesteps(columns["model_time"], model_times))


@dataclass(frozen=True)
class Record:
    """A record opened for reading."""

    folder: Path
    manifest: dict[str, Any]
    sample_ids: tuple[str, ...]
    """Ids of the samples visited, each once, in order of their first visit (rank by rank)."""
    visits: Visits
    probes: Visits
    """Forward passes that trained nothing; their ``step`` is the one that would have come next."""

    @classmethod
    def open(cls, folder: str | Path) -> "Record":
        """Read the record in ``folder`` (a run's ``record/``) and check every part against its checksum.

        Returns:
            All visits in order of step, micro-batch, rank and slot.

        Raises:
            RecordError: If there is none, a part is missing or damaged, or the format is newer than this version reads.
        """
        folder = Path(folder)
        manifest = read_manifest(folder)
        row_of: dict[str, int] = {}
        tables: dict[str, list[pa.Table]] = {"visits": [SCHEMA.empty_table()], "probe": [SCHEMA.empty_table()]}
        for parts_file in sorted(folder.glob("parts-*.json")):
            rows: list[int] = []  # each rank numbers its samples from 0
            for part in _read_parts(parts_file):
                new_ids = _read_part(folder, part["samples"])["id"].to_pylist() if part["samples"] else []
                rows += [row_of.setdefault(sample_id, len(row_of)) for sample_id in new_ids]
                tables[part["kind"]].append(_number_samples(_read_part(folder, part["rows"]), rows))
        times = manifest.get("model_times")
        visits, probes = (
            Visits.from_table(_in_order(pa.concat_tables(tables[kind])), times) for kind in ("visits", "probe")
        )
        return cls(folder, manifest, tuple(row_of), visits, probes)

    @property
    def content_hash(self) -> str:
        """Hash of the manifest and of the checksums of all parts."""
        files = [self.folder / "manifest.json", *sorted(self.folder.glob("parts-*.json"))]
        return sha256_of_json({f.name: sha256_of_file(f) for f in files})

    def visits_of_step(self, step: int) -> Visits:
        """Give the visits of one optimizer step; where training ended before it, the probe taken in its place."""
        visits = self.visits.where(self.visits.step == step)
        return visits if len(visits) else self.probes.where(self.probes.step == step)


class PartWriter:
    """Appends parts to a record; each is on disk, with its checksum, before the next begins."""

    def __init__(self, folder: Path, rank: int = 0):
        self.folder = folder
        self.rank = rank
        self._parts_file = folder / f"parts-{rank}.json"
        self.parts: list[dict[str, Any]] = _read_parts(self._parts_file) if self._parts_file.exists() else []
        self._sample_rows: dict[str, int] = {}
        for part in self.parts:
            if part["samples"]:
                ids = _read_part(folder, part["samples"])["id"].to_pylist()
                self._sample_rows |= {i: len(self._sample_rows) + k for k, i in enumerate(ids)}

    @property
    def last_step(self) -> int:
        """Last optimizer step on disk; 0 when there is none."""
        return max((part["last_step"] for part in self.parts if part["kind"] == "visits"), default=0)

    def has_probe(self, step: int) -> bool:
        """Tell whether a probe of this step is on disk."""
        return any(part["kind"] == "probe" and part["first_step"] == step for part in self.parts)

    def append(self, columns: Mapping[str, Sequence[Any]], sample_ids: Sequence[str], kind: str = "visits") -> None:
        """Write one part: the columns of :data:`SCHEMA` but ``sample`` and ``rank``, and the id of each row's sample.

        Where writing fails, the part is not there and can be appended again.
        """
        new_ids = list(dict.fromkeys(i for i in sample_ids if i not in self._sample_rows))
        sample_rows = self._sample_rows | {i: len(self._sample_rows) + k for k, i in enumerate(new_ids)}
        rows = [sample_rows[sample_id] for sample_id in sample_ids]
        table = pa.table({**columns, "sample": rows, "rank": [self.rank] * len(rows)}, schema=SCHEMA)
        first, last = int(min(columns["step"])), int(max(columns["step"]))
        span = f"{first:08d}-{last:08d}" if kind == "visits" else f"{first:08d}"
        samples = None
        if new_ids:
            samples = self._write(f"samples-{self.rank}-{kind}-{last:08d}.parquet", pa.table({"id": new_ids}))
        entry = {
            "kind": kind,
            "first_step": first,
            "last_step": last,
            "rows": self._write(f"{kind}-{self.rank}-{span}.parquet", table),
            "samples": samples,
        }
        write_json(self._parts_file, [*self.parts, entry])
        self.parts.append(entry)
        self._sample_rows = sample_rows

    def rewind(self, step: int) -> None:
        """Move aside every part that reaches beyond ``step``, so that training can go on from there.

        A probe taken at the weights of ``step`` stays.
        """
        late = [part for part in self.parts if part["last_step"] > step + (part["kind"] == "probe")]
        if not late:
            return
        write_json(self._parts_file, [part for part in self.parts if part not in late])
        aside = self.folder / "aside"
        aside.mkdir(exist_ok=True)
        for file in (entry["file"] for part in late for entry in (part["rows"], part["samples"]) if entry):
            path = self.folder / file
            if path.exists():
                path.replace(aside / f"{len(list(aside.iterdir())):04d}-{file}")
        self.__init__(self.folder, self.rank)

    def _write(self, name: str, table: pa.Table) -> dict[str, Any]:
        with publish_file(self.folder / name) as partial:
            with partial.open("wb") as file:  # by its path, pyarrow would refuse one that is not UTF-8
                pq.write_table(table, file, compression="zstd")
            return {"file": name, "num_rows": table.num_rows, "sha256": sha256_of_file(partial)}


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read a record's manifest.

    Returns:
        What ``Recorder`` wrote.

    Raises:
        RecordError: If there is none, or its format is newer than this version reads.
    """
    path = folder / "manifest.json"
    if not path.exists():
        raise RecordError(
            f"{folder} holds no record of training (no manifest.json). Train with `whence train` or with a Recorder in "
            "your own loop; a model without a record can still be traced, on a grid of timesteps."
        )
    manifest = _read_json(path, dict)
    if manifest.get("format_version") != FORMAT_VERSION:
        raise RecordError(
            f"{path} has format version {manifest.get('format_version')}; this version of whence reads "
            f"{FORMAT_VERSION}. Open it with the version that wrote it."
        )
    missing = [key for key in _MANIFEST_KEYS if key not in manifest]
    if missing:
        raise RecordError(f"{path} lacks {', '.join(missing)}. The record is damaged; restore the file or train again.")
    return manifest


def _read_parts(path: Path) -> list[dict[str, Any]]:
    parts = _read_json(path, list)
    for number, part in enumerate(parts):
        if not _is_part(part):
            raise RecordError(
                f"{path}: entry {number} does not describe a part of a record. The record is damaged; restore the file "
                "or train again."
            )
    return parts


def _is_part(part: Any) -> bool:
    if not isinstance(part, dict) or not part.keys() >= {"kind", "first_step", "last_step", "rows", "samples"}:
        return False
    files = [part["rows"], *([] if part["samples"] is None else [part["samples"]])]
    return (
        part["kind"] in ("visits", "probe")
        and all(isinstance(part[name], int) for name in ("first_step", "last_step"))
        and all(isinstance(file, dict) for file in files)
        and all(isinstance(file.get(name), str) for file in files for name in ("file", "sha256"))
    )


def _read_json(path: Path, form: type) -> Any:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise RecordError(
            f"{path} cannot be read: {error}. The record is damaged; restore it or train again."
        ) from error
    if not isinstance(value, form):
        raise RecordError(f"{path} is not of the form of a record. The record is damaged; restore it or train again.")
    return value


def _read_part(folder: Path, entry: dict[str, Any]) -> pa.Table:
    path = folder / entry["file"]
    if not path.exists():
        raise RecordError(f"{path} is missing, though the record counts on it. Restore the file or train again.")
    found = sha256_of_file(path)
    if found != entry["sha256"]:
        raise RecordError(
            f"{path} is damaged or was altered: its SHA-256 is {found[:12]}…, the record says {entry['sha256'][:12]}…. "
            "Restore the file or train again."
        )
    with path.open("rb") as file:
        return pq.read_table(file)


def _number_samples(table: pa.Table, rows: Sequence[int]) -> pa.Table:
    """Replace a rank's own numbers of its samples by ``rows``."""
    column = pa.array(np.array(rows, dtype=np.uint32)[table["sample"].to_numpy()])
    return table.set_column(table.schema.get_field_index("sample"), SCHEMA.field("sample"), column)


def _timesteps(found: Float32[ndarray, " visit"], model_times: Sequence[float] | None) -> Int64[ndarray, " visit"]:
    if model_times is None:
        return found.astype(np.int64)
    times = np.array(model_times, dtype=np.float32)
    timesteps = np.minimum(np.searchsorted(times, found), len(times) - 1)
    if (times[timesteps] != found).any():
        raise RecordError(
            f"The time {found[times[timesteps] != found][0]} is none of the scheduler's times in the manifest. The "
            "record is damaged; restore it or train again."
        )
    return timesteps


def _in_order(table: pa.Table) -> pa.Table:
    return table.sort_by([(name, "ascending") for name in ("step", "micro_batch", "rank", "slot")])
