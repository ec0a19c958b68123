"""Writing to disk so that a file or folder is there whole or not at all, however the process ends."""

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import filelock
import numpy as np
from safetensors import SafetensorError


def sha256_of_file(path: Path) -> str:
    """Hash the bytes of a file, as 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_json(value: Any) -> str:
    """Hash a value by its canonical JSON text, as 64 hex digits; the same when it comes back from a JSON file."""
    text = json.dumps(as_json(value), sort_keys=True, separators=(",", ":"))  # keys are text before they are sorted
    return hashlib.sha256(text.encode()).hexdigest()


def as_json(value: Any) -> Any:
    """Give a value as it comes back from a JSON file: tuples as lists, keys as text, numpy scalars as plain ones."""
    return json.loads(json.dumps(value, default=_plain_number))


def _plain_number(value: Any) -> Any:
    """Turn a numpy scalar, which settings may hold, into the plain one that JSON knows."""
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"Object of type {type(value).__name__} is not JSON serializable")


def sync(path: Path) -> None:
    """Wait until a file or folder has reached the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def publish_file(path: Path, *, shared: bool = False, replace: bool = True) -> Iterator[Path]:
    """Give a path to write to; rename it to ``path`` when the block ends without an error.

    Where a file is ``shared``, other processes may be writing it at this moment: the path to write to is then this
    process's own, and what a killed one left behind stays for the caller to remove. Without ``replace``, a file that is
    already at ``path`` by then stays, and FileExistsError is raised.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}{f'.{secrets.token_hex(4)}' if shared else ''}.partial")
    try:
        with _disk_errors(path):
            yield partial
        _share(partial)
        sync(partial)
        if replace:
            partial.replace(path)
        else:
            _rename_unless_there(partial, path)
        sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def _rename_unless_there(partial: Path, path: Path) -> None:
    """Raise FileExistsError where ``path`` exists; only a hard link can tell in one go, and not all disks have them."""
    try:
        path.hardlink_to(partial)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        if path.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from error
        partial.rename(path)


@contextmanager
def publish_folder(path: Path) -> Iterator[Path]:
    """Give an empty folder to write to; rename it to ``path`` when the block ends without an error.

    A folder already at ``path`` is replaced, and stays until the new one is whole. What an interrupted call left behind
    is removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    replaced = path.with_name(f".{path.name}.replaced")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        with _disk_errors(path):
            yield partial
        for file in sorted(partial.rglob("*")):
            _share(file)
            sync(file)
        sync(partial)
        _swap(partial, path, replaced)
        sync(path.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _share(path: Path) -> None:
    """Let others read a file as the user's mask allows; safetensors writes its files for their owner alone.

    A hard link to a file elsewhere keeps that file's rights.
    """
    if path.is_file() and path.stat().st_nlink == 1:
        mask = os.umask(0)
        os.umask(mask)
        path.chmod(0o666 & ~mask)


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    """Raise what safetensors reports of a full or failing disk as the OSError that everything else raises."""
    try:
        yield
    except SafetensorError as error:
        code = re.search(r"os error (\d+)", str(error))
        if code is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from error


def _swap(partial: Path, path: Path, replaced: Path) -> None:
    """Put ``partial`` in the place of the folder ``path``; no rename does that in one go."""
    shutil.rmtree(replaced, ignore_errors=True)
    if path.exists():
        path.rename(replaced)
    try:
        partial.rename(path)
    except BaseException:
        if replaced.exists():
            replaced.rename(path)
        raise
    shutil.rmtree(replaced, ignore_errors=True)


@contextmanager
def try_lock(path: Path) -> Iterator[bool]:
    """Hold a lock file for the length of the block; False where another process holds it.

    The system frees it when the process ends, however it ends. The file stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(path, timeout=0)
    try:
        lock.acquire()
    except filelock.Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def write_json(path: Path, value: Any, *, shared: bool = False, replace: bool = True) -> None:
    """Write a value as indented JSON with sorted keys, whole or not at all; options as of :func:`publish_file`."""
    with publish_file(path, shared=shared, replace=replace) as partial:
        text = json.dumps(value, indent=1, sort_keys=True, allow_nan=False, default=_plain_number)
        partial.write_text(text + "\n")
