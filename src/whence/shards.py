"""Shards: the gradient rows of one block of samples at one checkpoint, in a file of arrays with a sidecar.

    <block>-<sha256>.safetensors   the arrays; the name ends with the first 8 digits of their checksum
    <block>.json                   sidecar: ids in order, content hashes, checksum, counts; it makes the shard count

``<block>`` is a function of the ids alone, so that it is the same in whatever order and wherever the work is done. The
sidecar appears last and never changes. Two processes may write the same block at once, on one machine or on two: their
arrays have names of their own unless they are equal, the first sidecar stands, and what it does not name is removed.
Which shards belong together is the business of ``whence.store``.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Shaped
from numpy import ndarray

from whence._files import publish_file, sha256_of_file, sha256_of_json, write_json
from whence._tensor_file import DTYPE_OF, Tensor, code_of, from_bfloat16, map_tensors, pack, to_bfloat16
from whence.config import RowsDtype
from whence.errors import NumericsError, StoreError

ROWS_CODE: dict[RowsDtype, str] = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}
"""Dtype of rows to its name in safetensors."""

_FAMILIES = {"rows": "norms", "unit_rows": "unit_norms"}
_SIDECAR_KEYS = (
    "arrays",
    "content_hashes",
    "file",
    "ids",
    "num_bytes",
    "num_zero_norms",
    "row_counts",
    "sha256",
    "sidecar_sha256",
    "spec_sha256",
    "step",
)


@dataclass(frozen=True)
class Shard:
    """A finished shard, opened for reading."""

    path: Path
    """The file of arrays."""
    step: int
    """Optimizer step of the checkpoint."""
    ids: tuple[str, ...]
    """The samples of the block, in order."""
    content_hashes: tuple[str, ...]
    """Hash of the content of each."""
    row_counts: tuple[int, ...]
    """Rows of each; 0 where a sample has none."""
    num_zero_norms: int
    """Rows whose gradient was zero."""
    arrays: dict[str, tuple[str, tuple[int, ...]]]
    """Name of each array to its dtype, in the names of safetensors, and its shape."""
    num_bytes: int
    """Size of the file of arrays."""
    sha256: str
    """Its checksum."""
    spec_sha256: str
    """Hash of the specification of the store that it was made for."""

    @property
    def block(self) -> str:
        """Name of the block: a function of its ids."""
        return self.path.name.split("-")[0]

    @property
    def sidecar_path(self) -> Path:
        """The file that makes the shard count; without it, the block is computed again."""
        return self.path.with_name(f"{self.block}.json")

    @property
    def contents(self) -> dict[str, str]:
        """Hash of each sample's content, by id."""
        return dict(zip(self.ids, self.content_hashes, strict=True))

    @property
    def num_rows(self) -> int:
        """Rows of all samples together."""
        return sum(self.row_counts)

    @property
    def row_bytes(self) -> int:
        """Bytes that one row of ``rows`` takes on disk."""
        code, (_, width) = self.arrays["rows"]
        return width * np.dtype(DTYPE_OF[code]).itemsize

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Shaped[ndarray, "row *rest"]:
        """Read rows ``start`` to ``stop`` of an array.

        Nothing is copied: the file is mapped into memory, read-only, and costs a file handle until the array is gone.
        Only bfloat16, which numpy does not know, is converted, to float32.

        Args:
            name: ``rows``, ``norms``, ``sample``, or what else :attr:`arrays` has.
            start: First row.
            stop: Row after the last; None: to the end.

        Returns:
            The rows, in the dtype in which they are stored.

        Raises:
            StoreError: If there is no such array, or the file is missing, cut or no file of arrays. Its checksum is
                not read: that is what ``Store.check`` is for.
        """
        if name not in self.arrays:
            raise StoreError(f"{self.path} has no array {name!r}; it has {', '.join(sorted(self.arrays))}.")
        code, array = self._map()[name]
        return from_bfloat16(array[start:stop]) if code == "BF16" else array[start:stop]

    def read_all(self) -> dict[str, Shaped[ndarray, "row *rest"]]:
        """Read all arrays, as :meth:`read` does one."""
        return {name: from_bfloat16(array) if code == "BF16" else array for name, (code, array) in self._map().items()}

    def _map(self) -> dict[str, Tensor]:
        self.check_size()
        try:
            tensors = map_tensors(self.path)
            return {name: tensors[name] for name in self.arrays}
        except (ValueError, KeyError, TypeError) as error:
            raise StoreError(f"{self.path} cannot be read: {error}. {self._remedy}") from error

    def check_size(self) -> None:
        """Compare the size of the file with the sidecar's.

        Raises:
            StoreError: If it is another, or the file is missing.
        """
        try:
            found = self.path.stat().st_size
        except FileNotFoundError as error:
            raise StoreError(f"{self.path} is missing. {self._remedy}") from error
        if found != self.num_bytes:
            raise StoreError(
                f"{self.path} is damaged: it has {found} bytes, its sidecar says {self.num_bytes}. {self._remedy}"
            )

    def check_sha256(self) -> None:
        """Read the whole file and compare its checksum with the sidecar's.

        Raises:
            StoreError: If it is another, or the file is missing.
        """
        self.check_size()
        found = sha256_of_file(self.path)
        if found != self.sha256:
            raise StoreError(
                f"{self.path} is damaged: its SHA-256 is {found[:12]}…, its sidecar says {self.sha256[:12]}…. "
                f"{self._remedy}"
            )

    @property
    def _remedy(self) -> str:
        return (
            f"Restore the file, or delete {self.sidecar_path.name} beside it and run again: the block is computed anew."
        )


def block_name(ids: Sequence[str]) -> str:
    """Name the block of these ids: 16 hex digits that depend on the ids and their order alone."""
    return sha256_of_json(list(ids))[:16]


def write_shard(
    folder: Path,
    step: int,
    ids: Sequence[str],
    content_hashes: Sequence[str],
    tensors: Mapping[str, Tensor],
    spec_sha256: str,
) -> Shard:
    """Write a shard, or take the one that another process has finished meanwhile.

    Args:
        folder: Where the shards of the step lie.
        step: Optimizer step of the checkpoint.
        ids: The samples of the block, in order.
        content_hashes: Hash of the content of each.
        tensors: What :func:`encode` made.
        spec_sha256: Hash of the store's specification.

    Returns:
        The shard that now counts.
    """
    pieces = pack(tensors)
    checksum = hashlib.sha256()
    for piece in pieces:
        checksum.update(piece)
    shard = Shard(
        path=folder / f"{block_name(ids)}-{checksum.hexdigest()[:8]}.safetensors",
        step=step,
        ids=tuple(ids),
        content_hashes=tuple(content_hashes),
        row_counts=tuple(np.bincount(tensors["sample"][1], minlength=len(ids)).tolist()),
        num_zero_norms=int((tensors["norms"][1] == 0).sum()),
        arrays={name: (code, array.shape) for name, (code, array) in tensors.items()},
        num_bytes=sum(len(piece) for piece in pieces),
        sha256=checksum.hexdigest(),
        spec_sha256=spec_sha256,
    )

    def write(path: Path) -> None:
        with path.open("wb") as file:
            file.writelines(pieces)

    return _publish(shard, write)


def copy_shard(shard: Shard, folder: Path) -> Shard:
    """Take over a finished shard into another folder, as a hard link where the disk allows it.

    Args:
        shard: The shard.
        folder: Where the shards of the same step of the other store lie.

    Returns:
        The shard that now counts there.

    Raises:
        StoreError: If the shard is damaged.
    """
    shard.check_sha256()

    def link_or_copy(path: Path) -> None:
        try:
            path.hardlink_to(shard.path)
        except OSError:  # another disk, or one without links; what fails for another reason fails again here
            shutil.copyfile(shard.path, path)

    return _publish(replace(shard, path=folder / shard.path.name), link_or_copy)


def _publish(shard: Shard, write: Callable[[Path], None]) -> Shard:
    """Put a shard's arrays and then its sidecar in place, and give the shard whose sidecar was first."""
    try:
        with publish_file(shard.path, shared=True) as partial:
            write(partial)
        fields = _to_sidecar(shard)
        sealed = fields | {"sidecar_sha256": sha256_of_json(fields)}
        write_json(shard.sidecar_path, sealed, shared=True, replace=False)
    except (FileExistsError, FileNotFoundError):  # another process was first; it may have removed what it did not know
        if not shard.sidecar_path.exists():
            raise
    first = read_sidecar(shard.sidecar_path)
    for name in os.listdir(shard.path.parent):
        unfinished = name.startswith(f".{shard.block}") and name.endswith(".partial")
        if unfinished or (name.startswith(f"{shard.block}-") and name != first.path.name):
            shard.path.with_name(name).unlink(missing_ok=True)
    return first


def _to_sidecar(shard: Shard) -> dict[str, Any]:
    fields = {name: value for name, value in vars(shard).items() if name != "path"}
    return fields | {
        "file": shard.path.name,
        "arrays": {name: {"dtype": code, "shape": shape} for name, (code, shape) in shard.arrays.items()},
    }


def read_sidecar(path: Path) -> Shard:
    """Read what makes a shard count.

    Args:
        path: The sidecar.

    Returns:
        The shard; its arrays are not read.

    Raises:
        StoreError: If the file is missing, damaged, or not the sidecar of a shard.
    """
    remedy = "Restore the file, or delete it and run again: its block is computed anew."
    try:
        fields = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError) as error:
        raise StoreError(f"{path} cannot be read: {error}. {remedy}") from error
    missing = [key for key in _SIDECAR_KEYS if not isinstance(fields, dict) or key not in fields]
    if missing:
        raise StoreError(f"{path} is no sidecar of a shard: it lacks {', '.join(missing)}. {remedy}")
    want = fields.pop("sidecar_sha256")
    found = sha256_of_json(fields)
    if found != want:
        raise StoreError(f"{path} is damaged: its SHA-256 is {found[:12]}…, it says itself {str(want)[:12]}…. {remedy}")
    return Shard(
        path=path.with_name(fields["file"]),
        step=fields["step"],
        ids=tuple(fields["ids"]),
        content_hashes=tuple(fields["content_hashes"]),
        row_counts=tuple(fields["row_counts"]),
        num_zero_norms=fields["num_zero_norms"],
        arrays={name: (array["dtype"], tuple(array["shape"])) for name, array in fields["arrays"].items()},
        num_bytes=fields["num_bytes"],
        sha256=fields["sha256"],
        spec_sha256=fields["spec_sha256"],
    )


def encode(
    arrays: Mapping[str, ndarray], *, step: int, ids: Sequence[str], width: int, dtype: RowsDtype
) -> dict[str, Tensor]:
    """Check the arrays of a shard and bring them into the form in which they are stored.

    Args:
        arrays: As for ``Store.write_shard``.
        step: Optimizer step of the checkpoint, for messages.
        ids: The samples of the block.
        width: Length of a row.
        dtype: Of the rows.

    Returns:
        Tensors to be written.

    Raises:
        StoreError: If an array is missing or has another shape or dtype; the message lists all faults.
        NumericsError: If a row or norm is not finite, or a norm is negative; the message names the sample.
    """
    faults = _find_faults(arrays, len(ids), width)
    if faults:
        raise StoreError(f"A shard of step {step} cannot be written: {'; '.join(faults)}.")
    tensors = {name: _to_tensor(name, array, dtype) for name, array in arrays.items()}
    for name in [name for pair in _FAMILIES.items() for name in pair if name in tensors]:
        bad = _find_bad_number(name, tensors[name])
        if bad is not None:
            sample_id = ids[arrays["sample"][bad[0]]]
            raise NumericsError(
                f"Step {step}, sample {sample_id}: {name} holds {arrays[name][bad]} in row {bad[0]} of the block. It "
                f"must be finite{f' as {dtype}' if name in _FAMILIES else ' and not negative'}. Rows are gradients "
                "divided by their norm, about 1 long; look at the sample's loss and gradient."
            )
    return tensors


def _find_faults(arrays: Mapping[str, ndarray], num_ids: int, width: int) -> list[str]:
    needed = {"rows", "norms", "sample"} | {
        name for pair in _FAMILIES.items() if set(pair) & set(arrays) for name in pair
    }
    missing = sorted(needed - set(arrays))
    if missing:
        return [f"it must have {', '.join(sorted(needed))}, and lacks {', '.join(missing)}"]
    faults = []
    num_rows = len(arrays["sample"])
    for name, array in arrays.items():
        shape = (num_rows, width) if name in _FAMILIES else (num_rows,)
        if array.shape != shape:
            faults.append(f"{name} must have shape {shape}, one entry per row; found {array.shape}")
        if name in needed and array.dtype.kind not in ("iu" if name == "sample" else "f"):
            faults.append(f"{name} must hold {'integers' if name == 'sample' else 'floats'}; found {array.dtype}")
        elif code_of(array.dtype) is None or name == "__metadata__":
            faults.append(f"{name} of {array.dtype} is nothing that safetensors can hold")
    sample = arrays["sample"]
    if not faults and num_rows and not (0 <= sample.min() and sample.max() < num_ids):
        faults.append(
            f"sample must say which of the block's {num_ids} ids a row belongs to, from 0; found {sample.min()} to "
            f"{sample.max()}"
        )
    return faults


def _to_tensor(name: str, array: Shaped[ndarray, "row *rest"], dtype: RowsDtype) -> Tensor:
    """Round an array to what is stored of it; what is beyond the largest number becomes infinite."""
    with np.errstate(over="ignore", invalid="ignore"):
        if name == "sample":
            return "I32", array.astype(np.int32)
        if name in _FAMILIES.values():
            return "F32", array.astype(np.float32)
        if name not in _FAMILIES:
            return code_of(array.dtype) or "", array
        rows = to_bfloat16(array.astype(np.float32)) if dtype == "bfloat16" else array.astype(dtype)
        return ROWS_CODE[dtype], rows


def _find_bad_number(name: str, tensor: Tensor) -> tuple[int, ...] | None:
    """Find the first number of an array that is not finite, or a norm below zero."""
    code, array = tensor
    values = from_bfloat16(array) if code == "BF16" else array
    good = np.isfinite(values) if name in _FAMILIES else np.isfinite(values) & (values >= 0)
    return None if good.all() else tuple(map(int, np.unravel_index(np.argmin(good), good.shape)))
