"""The store: projected gradient rows on disk.

    stores/<name>/manifest.json                             format version, specification and its hash; fixed
    stores/<name>/<step>/<block>-<sha256>.safetensors       arrays with one entry per row (``whence.shards``)
    stores/<name>/<step>/<block>.json                       sidecar: ids, content hashes, checksum, counts
    stores/<name>/verified.json                             which shards were read whole since they were written

One shard is one unit of work: a checkpoint, named by its step in eight digits, and a block of samples. Its arrays:

    rows        (row, width)  float16, bfloat16 or float32; the projection of a unit's gradient, divided by its norm
    norms       (row,)        float32; exact norm of the unit's gradient, so that it is about norms[:, None] * rows
    sample      (row,)        int32; which of the block's ids a row belongs to; a sample has none, one or many rows
    unit_rows, unit_norms     the same forms, where a plan sums units: rows of the sum of unit-length gradients
    any other   (row,)        columns of the plan, such as timestep or weight.learning_rate

They open with plain safetensors (with ``safetensors.torch`` for bfloat16)::

    from safetensors.numpy import load_file
    arrays = load_file("run/stores/a/00000012/0123456789abcdef-89abcdef.safetensors")

Finished shards never change, so that processes and machines can share the work without talking to one another, and a
store grows with its data set. This module needs no torch and no model. It knows nothing of what a specification says:
only that rows of two specifications do not belong together.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from numpy import ndarray

from whence._files import as_json, sha256_of_json, try_lock, write_json
from whence._store_checks import (
    STEP_FOLDER,
    check_belongs,
    check_block,
    check_once,
    check_same_content,
    find_faults,
    list_changed,
    list_differences,
    name_ids,
)
from whence.errors import ConfigError, StoreError, check_choice
from whence.shards import RowsDtype, Shard, block_name, copy_shard, encode, read_sidecar, write_shard

FORMAT_VERSION = 1

Block = tuple[str, ...]
"""Ids of the samples that one shard holds, in order."""


@dataclass(frozen=True)
class Store:
    """Gradient rows of one specification, by step and block.

    What other processes finish is seen at the next call; sidecars are read once.
    """

    folder: Path
    spec: dict[str, Any]
    """What the rows are: checkpoints, parameters, projection, plan, as the caller has said it."""
    width: int
    """Length of a row."""
    dtype: RowsDtype
    """Of the rows on disk; bfloat16 is read as float32."""
    _known: dict[int, "_Step"] = field(default_factory=dict, init=False, repr=False, compare=False)

    @classmethod
    def create(cls, folder: str | Path, spec: Mapping[str, Any], *, width: int, dtype: RowsDtype) -> "Store":
        """Begin a store, or open the one in ``folder`` where its specification is the same.

        Args:
            folder: Where it is to lie.
            spec: What the rows are, in anything that JSON can say; numpy scalars count as plain numbers.
            width: Length of a row.
            dtype: Of the rows.

        Returns:
            The store.

        Raises:
            ConfigError: If width or dtype is none, or JSON cannot say the specification.
            StoreError: If the folder holds a store of another specification; the message lists what differs.

        Example:
            >>> import tempfile
            >>> import numpy as np
            >>> folder = tempfile.TemporaryDirectory()
            >>> store = Store.create(folder.name, {"projection": {"seed": 3}}, width=2, dtype="float16")
            >>> rows = np.array([[0.6, 0.8], [0.0, 1.0]])
            >>> arrays = {"rows": rows, "norms": np.array([5.0, 0.5]), "sample": np.array([0, 1])}
            >>> shard = store.write_shard(12, ["cat", "dog"], ["3f5e", "a80b"], arrays)
            >>> shard.read("norms", 1)
            array([0.5], dtype=float32)
            >>> store.plan_blocks(12, ["cat", "dog", "hen"], ["3f5e", "a80b", "90c1"], block_size=2)
            [('hen',)]
            >>> folder.cleanup()
        """
        check_choice("dtype of a store", dtype, RowsDtype)
        if width < 1:
            raise ConfigError(f"width must be above 0, found {width}: it is the length of a row.")
        try:
            plain = as_json(dict(spec))
            json.dumps(plain, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"A store's specification must be plain values that JSON can hold: {error}.") from error
        asked = cls(Path(folder), plain, width, dtype)
        manifest = asked._identity | {"format_version": FORMAT_VERSION, "spec_sha256": asked.spec_sha256}
        if not (asked.folder / _MANIFEST).exists():
            try:
                write_json(asked.folder / _MANIFEST, manifest, shared=True, replace=False)
            except FileExistsError:
                pass  # another process began it at the same time
        found = cls.open(folder)
        check_same_spec(found, asked)
        return found

    @classmethod
    def open(cls, folder: str | Path) -> "Store":
        """Open a store.

        Args:
            folder: A folder that :meth:`create` has made.

        Returns:
            The store; of its shards, nothing is read yet.

        Raises:
            StoreError: If there is none, its manifest is damaged, or the format is newer than this version reads.
        """
        folder = Path(folder)
        manifest = _read_manifest(folder)
        store = cls(folder, manifest["spec"], manifest["width"], manifest["dtype"])
        if store.spec_sha256 != manifest["spec_sha256"]:
            raise StoreError(
                f"{folder / _MANIFEST} is damaged: the SHA-256 of its specification is {store.spec_sha256[:12]}…, it "
                f"says itself {str(manifest['spec_sha256'])[:12]}…. Restore the file."
            )
        return store

    @cached_property
    def spec_sha256(self) -> str:
        """Hash of the specification, with width and dtype."""
        return sha256_of_json(self._identity)

    @property
    def _identity(self) -> dict[str, Any]:
        return {"spec": self.spec, "width": self.width, "dtype": self.dtype}

    @property
    def steps(self) -> list[int]:
        """Steps of the checkpoints of which there is a finished shard, in order."""
        there = os.listdir(self.folder) if self.folder.exists() else []  # a store that is only planned has none
        names = (name for name in there if STEP_FOLDER.fullmatch(name))
        return sorted(step for step in map(int, names) if self.shards(step))

    def shards(self, step: int) -> list[Shard]:
        """Give the finished shards of a step, in the order of their blocks' names: always the same.

        Args:
            step: Optimizer step of a checkpoint.

        Returns:
            The shards; none where nothing is finished.

        Raises:
            StoreError: If a sidecar is damaged or of another specification, or two shards hold the same sample.
        """
        return [shard for _, shard in sorted(self._at(step).shards.items())]

    def ids(self, step: int) -> list[str]:
        """Give the ids of all samples of a step, in the order of :meth:`shards`."""
        return [id_ for shard in self.shards(step) for id_ in shard.ids]

    def num_rows(self, step: int) -> int:
        """Count the rows of a step."""
        return sum(shard.num_rows for shard in self.shards(step))

    def write_shard(
        self, step: int, ids: Sequence[str], content_hashes: Sequence[str], arrays: Mapping[str, ndarray]
    ) -> Shard:
        """Write the rows of one block; a finished shard of the same block is left as it is.

        Args:
            step: Optimizer step of the checkpoint, from 0.
            ids: The samples of the block, each once, in order.
            content_hashes: Hash of the content of each, so that a row is never taken for that of a changed image.
            arrays: ``rows`` (row, width), ``norms`` (row,), ``sample`` (row,) and what else has one entry per row; see
                the top of ``whence.store``. Rows and norms are rounded to the dtypes in which they are stored.

        Returns:
            The shard that counts: where another process was faster, that process's.

        Raises:
            StoreError: If the ids or arrays are not of this form, a sample has other content than before, or a shard of
                another block holds it.
            NumericsError: If a row or norm is not finite; the message names the sample.
        """
        check_block(step, ids, content_hashes)
        there = self._at(step)
        for shard in there.holders(ids):
            if shard.ids != tuple(ids):
                raise StoreError(
                    f"{shard.sidecar_path} holds {name_ids([i for i in ids if i in set(shard.ids)])} already, in "
                    "another block. Cut samples into blocks with plan_blocks, which leaves out what is finished."
                )
        if block_name(ids) not in there.shards:
            tensors = encode(arrays, step=step, ids=ids, width=self.width, dtype=self.dtype)
            there.add(write_shard(there.folder, step, ids, content_hashes, tensors, self.spec_sha256))
        shard = there.shards[block_name(ids)]
        check_same_content([shard], dict(zip(ids, content_hashes, strict=True)))
        return shard

    @contextmanager
    def claim(self, step: int, ids: Sequence[str]) -> Iterator[bool]:
        """Take a block for this process, so that several on one machine share the work.

        It is a lock that the system frees when the process ends, however it ends. It only saves work: two processes
        that write the same block both end well.

        Args:
            step: Optimizer step of the checkpoint.
            ids: The samples of the block.

        Yields:
            Whether to do the work: False where another process does it or has done it.
        """
        path = self._at(step).folder / f".{block_name(ids)}.lock"
        with try_lock(path) as mine:
            try:
                yield mine and bool(self.missing(step, [tuple(ids)]))
            finally:
                if mine:
                    path.unlink(missing_ok=True)

    def missing(self, step: int, blocks: Sequence[Block]) -> list[Block]:
        """Give those of ``blocks`` of which a step has no finished shard, in their order."""
        finished = self._at(step).shards
        return [block for block in blocks if block_name(block) not in finished]

    def plan_blocks(self, step: int, ids: Sequence[str], content_hashes: Sequence[str], block_size: int) -> list[Block]:
        """Cut the samples that a step does not hold yet into blocks.

        Blocks that other steps have finished are taken as they are where they fit, so that all steps are cut alike; the
        rest is cut in order. Samples added to a data set come into new blocks.

        Args:
            step: Optimizer step of the checkpoint.
            ids: All samples that the step is to hold, in order.
            content_hashes: Hash of the content of each.
            block_size: Samples in a block; the last may have fewer.

        Returns:
            The blocks still to be written.

        Raises:
            ConfigError: If ``block_size`` is below 1.
            StoreError: If a sample has other content than when a shard was made of it, at any step.
        """
        if block_size < 1:
            raise ConfigError(
                f"block_size must be above 0, found {block_size}: it is the number of samples in a block."
            )
        check_block(step, ids, content_hashes)
        contents = dict(zip(ids, content_hashes, strict=True))
        shards = [shard for step in self.steps for shard in self.shards(step)]
        check_same_content(shards, contents)
        held = set(self.ids(step))
        waiting = {id_: place for place, id_ in enumerate(ids) if id_ not in held}
        taken = []
        for block in dict.fromkeys(shard.ids for shard in shards):
            if all(id_ in waiting for id_ in block):
                taken.append((min(waiting.pop(id_) for id_ in block), block))
        rest = tuple(waiting)
        cut = [rest[start : start + block_size] for start in range(0, len(rest), block_size)]
        return [block for _, block in sorted(taken)] + cut

    def check(self) -> None:
        """Read every shard that was not yet read whole since it was written, and compare it with its checksum.

        What was read is remembered by size and time of change, so that the next call costs little.

        Raises:
            StoreError: If a shard or sidecar is missing or damaged; the message lists all shards that are.
        """
        check_once([shard for step in self.steps for shard in self.shards(step)], self.folder / "verified.json")

    def verify(self) -> list[str]:
        """Read everything, whether or not it was read before.

        Returns:
            All faults found, a sentence each: damaged or foreign files, shards without a sidecar and other remains of
            interrupted runs, samples that a step holds twice or lacks, and samples whose content differs between steps.
        """
        return find_faults(self.folder, self.spec_sha256)

    def _at(self, step: int) -> "_Step":
        """Look up what is finished at a step by now."""
        if step not in self._known:
            self._known[step] = _Step(self.folder / f"{step:08d}", self.spec_sha256)
        self._known[step].refresh()
        return self._known[step]


class _Step:
    """The finished shards of one step, by block, and which of them holds a sample."""

    def __init__(self, folder: Path, spec_sha256: str):
        self.folder = folder
        self.shards: dict[str, Shard] = {}
        self._spec_sha256 = spec_sha256
        self._holder: dict[str, Shard] = {}

    def refresh(self) -> None:
        """Read the sidecars that are new."""
        names = os.listdir(self.folder) if self.folder.exists() else []
        finished = {name.removesuffix(".json") for name in names if name.endswith(".json") and name[0] != "."}
        if not self.shards.keys() <= finished:  # a user deleted some, to have them computed again
            self.shards, self._holder = {}, {}
        for block in sorted(finished - self.shards.keys()):
            path = self.folder / f"{block}.json"
            shard = read_sidecar(path)
            check_belongs(shard, path, self._spec_sha256)
            self.add(shard)

    def add(self, shard: Shard) -> None:
        """Count a finished shard, unless another holds one of its samples."""
        twice = [id_ for id_ in shard.ids if id_ in self._holder]
        if twice:
            raise StoreError(
                f"{shard.sidecar_path} and {self._holder[twice[0]].sidecar_path} both hold {name_ids(twice)}. "
                "Delete one of the two; its other samples are then computed again."
            )
        self.shards[shard.block] = shard
        self._holder |= dict.fromkeys(shard.ids, shard)

    def holders(self, ids: Sequence[str]) -> list[Shard]:
        """Give the shards that hold any of these samples."""
        found = {self._holder[id_].block for id_ in ids if id_ in self._holder}
        return [self.shards[block] for block in sorted(found)]


def merge_stores(target: Store, sources: Sequence[Store]) -> int:
    """Take over the shards of stores that were filled apart, as hard links where the disk allows it.

    Everything is compared before anything is written. Each shard is checked against its checksum, and appears whole or
    not at all; an interrupted merge can be repeated.

    Args:
        target: Where the shards go.
        sources: Where they come from; they stay as they are.

    Returns:
        How many shards were taken over.

    Raises:
        StoreError: If specifications differ, a block has other bytes in two stores, a sample lies in differently cut
            blocks of a step or has other content; or if a shard is damaged. The message lists all conflicts.
    """
    for source in sources:
        check_same_spec(source, target)
    conflicts: list[str] = []
    new: list[Shard] = []
    holder: dict[tuple[int, str], Shard] = {}
    contents: dict[str, str] = {}
    for store in (target, *sources):
        for shard in (shard for step in store.steps for shard in store.shards(step)):
            held = {h.sidecar_path: h for id_ in shard.ids if (h := holder.get((shard.step, id_)))}
            conflicts += [conflict for other in held.values() if (conflict := _find_conflict(other, shard))]
            changed = list_changed(shard, contents)
            contents |= shard.contents
            if changed:
                conflicts.append(f"{shard.sidecar_path} was made of other content: {name_ids(changed)}")
            if not held:
                holder |= dict.fromkeys(((shard.step, i) for i in shard.ids), shard)
                new += [] if store is target else [shard]
    if conflicts:
        raise StoreError("Stores that disagree cannot be merged:\n" + "\n".join(conflicts))
    for shard in new:
        copy_shard(shard, target.folder / shard.path.parent.name)
    return len(new)


def _find_conflict(first: Shard, second: Shard) -> str | None:
    """Say why two shards of one step that share samples cannot both count; None where they are the same."""
    if first.ids != second.ids:
        shared = [id_ for id_ in second.ids if id_ in set(first.ids)]
        return f"{first.sidecar_path} and {second.sidecar_path} are cut otherwise and share {name_ids(shared)}"
    if first.sha256 != second.sha256:
        return f"{first.path} and {second.path} hold the same samples with other rows: {name_ids(second.ids)}"
    return None


def check_same_spec(found: Store, asked: Store) -> None:
    """Refuse to use rows of two specifications together.

    Args:
        found: A store that is there.
        asked: What is asked for.

    Raises:
        StoreError: If they differ; the message lists what does, with both values.
    """
    differences = list(list_differences(found._identity, asked._identity))
    if differences:
        raise StoreError(
            f"{found.folder} holds gradients of another specification: {'; '.join(differences)}. Rows of the two "
            "cannot be compared. Use the store with its own settings, or write to a new folder."
        )


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / _MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise StoreError(
            f"{folder} holds no readable store ({error}). A store has a {_MANIFEST}; make one with `whence index`."
        ) from error
    missing = [key for key in _KEYS if not isinstance(manifest, dict) or key not in manifest]
    if "format_version" not in missing and manifest["format_version"] != FORMAT_VERSION:
        raise StoreError(
            f"{folder} has format version {manifest['format_version']}; this version of whence reads "
            f"{FORMAT_VERSION}. Open it with the version that wrote it, or make it again."
        )
    if missing:
        raise StoreError(
            f"{path} is no manifest of a store: it must have {', '.join(_KEYS)}, and lacks {', '.join(missing)}. "
            "Restore the file, or write to a new folder."
        )
    return manifest


_MANIFEST = "manifest.json"
_KEYS = ("format_version", "spec", "spec_sha256", "dtype", "width")
