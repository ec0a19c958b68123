"""Full and read-only disks, at every place where training and tracing write.

Nothing finished is lost, and the next run ends with the same bytes as one that nothing disturbed. As root, permissions
prove nothing, so the faults are put into the calls that reach the disk. A limit on the size of files, which the kernel
keeps, covers what libraries write by themselves.
"""

import builtins
import errno
import io
import os
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import safetensors.torch

from conftest import TOY_TRAINING, toy_images
from whence import _array_files, scores
from whence.attribution import trace
from whence.checkpoints import list_checkpoints
from whence.config import ModelSettings, TraceSettings
from whence.errors import WhenceError
from whence.methods import RETRAC, TRACIN
from whence.record import Record
from whence.subject import Subject
from whence.training import train

MODEL = ModelSettings(widths=(4, 4), attention_levels=0, norm_groups=2, train_timesteps=50)
SETTINGS = TraceSettings(timesteps=3, draws=2, phases=1, batch_size=8, block_size=5)
IMAGES = toy_images(10)


def train_toy(run: Path) -> None:
    train(run, IMAGES, MODEL, TOY_TRAINING, show_progress=False)


def trace_toy(run: Path) -> None:
    subject = Subject(list_checkpoints(run), IMAGES, Record.open(run / "record"), "mse")
    trace(subject, toy_images(2, "query", seed=1), [TRACIN, RETRAC], SETTINGS, run, show_progress=False)


STAGES = {"train": train_toy, "trace": trace_toy}


class FailingDisk:
    """Counts the calls that change the disk; from the ``good``-th on they fail, as they do while a disk is full."""

    def __init__(self, good: int | None, code: int):
        self.good, self.code, self.calls = good, code, 0

    def touch(self) -> None:
        self.calls += 1
        if self.good is not None and self.calls > self.good:
            raise OSError(self.code, os.strerror(self.code))

    def wrap(self, function, *, writes=lambda *args, **kwargs: True):
        def wrapped(*args, **kwargs):
            if writes(*args, **kwargs):
                self.touch()
            return function(*args, **kwargs)

        return wrapped


@contextmanager
def failing_disk(good: int | None, code: int = errno.ENOSPC) -> Iterator[FailingDisk]:
    disk = FailingDisk(good, code)

    def opened_to_write(file, mode="r", *args, **kwargs):
        return bool(set(mode) & set("wax+"))

    def created(path, flags, *args, **kwargs):
        return bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))

    with pytest.MonkeyPatch.context() as patch:
        for module in (builtins, io):
            patch.setattr(module, "open", disk.wrap(open, writes=opened_to_write))
        patch.setattr(os, "open", disk.wrap(os.open, writes=created))
        for name in ("fsync", "mkdir", "rename", "replace"):
            patch.setattr(os, name, disk.wrap(getattr(os, name)))
        for module in (safetensors.torch, _array_files, scores):
            patch.setattr(module, "save_file", disk.wrap(module.save_file))
        patch.setattr(pq, "write_table", disk.wrap(pq.write_table))
        yield disk


def tree(run: Path) -> dict[str, bytes]:
    """All bytes of a run but locks, the cache, and what was moved aside."""
    parts = [run / part for part in ("checkpoints", "record", "scores") if (run / part).exists()]
    files = [f for part in parts for f in sorted(part.rglob("*")) if f.is_file() and "aside" not in f.parts]
    return {f.relative_to(run).as_posix(): f.read_bytes() for f in files}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run that nothing disturbed, and one that is only trained."""
    folder = tmp_path_factory.mktemp("finished")
    calls = {}
    train_toy(folder / "first")  # whose calls include what a first import writes
    with failing_disk(good=None) as disk:
        train_toy(folder / "run")
        calls["train"] = disk.calls
        shutil.copytree(folder / "run", folder / "trained")
        disk.calls = 0
        trace_toy(folder / "run")
        calls["trace"] = disk.calls
    return folder, calls


@pytest.mark.parametrize("stage", ["train", "trace"])
@pytest.mark.parametrize("part", range(16))
def test_a_disk_that_fails_costs_nothing_that_was_finished(tmp_path, finished, stage, part):
    folder, calls = finished
    code = errno.EROFS if part % 2 else errno.ENOSPC
    assert calls[stage] > 32  # the faults below fall on different calls
    run, want = tmp_path / "run", tree(folder / ("trained" if stage == "train" else "run"))
    if stage == "trace":
        shutil.copytree(folder / "trained", run)
    good = (calls[stage] - 1) * part // 15  # the first call, the last, and 14 between
    with failing_disk(good, code), pytest.raises(OSError, match=os.strerror(code)):
        STAGES[stage](run)
    for name, found in tree(run).items():
        if name != "record/parts-0.json":
            assert found == want[name], f"{name} is half-written"
    STAGES[stage](run)
    assert tree(run) == want
    assert not [p for p in (run / "cache").glob("*") if p.suffix != ".lock"]


@pytest.mark.parametrize("stage, limit_bytes", [("train", 16_000), ("train", 30_000), ("trace", 2_000)])
def test_what_libraries_write_fails_as_an_error_of_the_disk(tmp_path, finished, stage, limit_bytes):
    """The kernel refuses files above a size, whoever writes them: safetensors in Rust, parquet in C++."""
    run = tmp_path / "run"
    if stage == "trace":
        shutil.copytree(finished[0] / "trained", run)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            STAGES[stage](run)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    STAGES[stage](run)
    assert tree(run) == tree(finished[0] / ("trained" if stage == "train" else "run"))


def test_an_error_of_the_disk_is_not_taken_for_a_damaged_file(tmp_path):
    """A user who frees space should not be sent to delete a run."""
    with failing_disk(good=0), pytest.raises(OSError) as error:
        train_toy(tmp_path / "run")
    assert not isinstance(error.value, WhenceError)
