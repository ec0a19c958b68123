"""The folder that a recorder writes into: its lock, its manifest, and its parts, which a resumed training rewinds."""

from contextlib import suppress
from pathlib import Path
from typing import Any, final

import filelock

from whence._files import write_json
from whence._recorder_manifest import check_same_settings
from whence.errors import InUseError, RecordError
from whence.record import PartWriter, read_manifest


@final
class RecorderFolder:
    """Claims ``record/`` of a run for one process.

    Args:
        run: The run.
        manifest: What the record is to say of the training.
        rank: Number of this process.
        resume_from: Step that training goes on from; None for a new record.
        may_load: Whether a script may yet load a checkpoint; until then nothing is moved aside.
        same_config: Also refuse another config than the record's.

    Raises:
        RecordError: If the folder holds a record and ``resume_from`` is not given, or one made with other settings.
        InUseError: If another process is recording into the folder.
    """

    def __init__(
        self,
        run: Path,
        manifest: dict[str, Any],
        rank: int,
        resume_from: int | None,
        *,
        may_load: bool = False,
        same_config: bool = False,
    ):
        self.folder = run / "record"
        self.manifest = manifest
        self.rank = rank
        self.may_load = may_load
        self._lock = filelock.FileLock(run / f".recorder-{rank}.lock", timeout=0)
        run.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire()
        except filelock.Timeout as error:
            raise InUseError(f"Another process is training into {run}. Wait for it, or choose a new folder.") from error
        try:
            self.parts = self._open(resume_from, same_config)
        except BaseException:
            self._lock.release()
            raise

    @property
    def is_claimed(self) -> bool:
        """Whether it was not released yet."""
        return self._lock.is_locked

    def release(self) -> None:
        """Let other processes record into the folder."""
        self._lock.release()

    def rewind(self, step: int, num_processes: int) -> None:
        """Go back to the checkpoint of ``step``, as ``accelerator.load_state`` does.

        Args:
            step: The checkpoint's.
            num_processes: How many train together now; the first takes care of those that are no more.

        Raises:
            RecordError: If the record does not reach so far.
        """
        if self.parts.parts or self.rank == 0:  # a process that was not there before has nothing to go back to
            _rewind(self.parts, step)
        if self.rank == 0:
            ranks = [int(file.stem.removeprefix("parts-")) for file in self.folder.glob("parts-*.json")]
            for other in (rank for rank in ranks if rank >= num_processes):
                PartWriter(self.folder, other).rewind(step)
        self.may_load = False

    def note_latents(self, drawn: bool, *, begun: bool) -> None:
        """Write down whether latents are drawn from a posterior, which is known when the first batch is.

        Args:
            drawn: Whether those of a batch were.
            begun: Whether there were batches before it.

        Raises:
            RecordError: If it was otherwise before.
        """
        known = self.manifest.get("latents") == "sample"
        if drawn == known:
            return
        if begun:
            raise RecordError(
                "Latents must be drawn by latents() for all batches or for none; so far it was "
                f"{'all' if known else 'none'}. Call it in every iteration."
            )
        self.manifest = {k: v for k, v in self.manifest.items() if k != "latents"}
        self.manifest |= {"latents": "sample"} if drawn else {}
        write_json(self.folder / "manifest.json", self.manifest, shared=True)

    def _open(self, resume_from: int | None, same_config: bool) -> PartWriter:
        self.folder.mkdir(exist_ok=True)
        # The manifest is shared by all ranks, and any of them may be the first to come here.
        if resume_from is None and not self.may_load and (self.folder / f"parts-{self.rank}.json").exists():
            raise RecordError(
                f"{self.folder} already holds a record. Give resume_from=<step of the checkpoint you go on from>, or "
                "choose a new folder; nothing is overwritten."
            )
        path = self.folder / "manifest.json"
        if not path.exists():
            with suppress(FileExistsError):
                write_json(path, self.manifest, shared=True, replace=False)
        found = read_manifest(self.folder)
        self.manifest |= {"latents": found["latents"]} if "latents" in found else {}
        check_same_settings(self.folder, found, self.manifest, with_config=same_config)
        parts = PartWriter(self.folder, self.rank)
        if not self.may_load:
            _rewind(parts, resume_from or 0)
        return parts


def _rewind(parts: PartWriter, step: int) -> None:
    parts.rewind(step)
    if parts.last_step != step:
        raise RecordError(
            f"The record in {parts.folder} ends at step {parts.last_step}, before the checkpoint of step {step}. "
            "Go on from an earlier checkpoint."
        )
