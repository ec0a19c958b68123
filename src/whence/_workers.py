"""Processes that share a work: each takes what no other has taken, until nothing is left."""

import os
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from typing import Any

from whence.errors import RetrainingError, WhenceError

POLL_S = 0.5


def run_workers(work: Callable[..., None], arguments: list[tuple[Any, ...]], on_wait: Callable[[], None]) -> None:
    """Call ``work`` in a new process for each tuple of arguments, and wait for all of them.

    The first that fails ends the others; its error is raised here where it is one with a remedy.
    """
    context = get_context("spawn")
    ends = [context.Pipe(duplex=False) for _ in arguments]
    processes = [
        context.Process(target=_run, args=(work, given, writing, os.getpid()))
        for given, (_, writing) in zip(arguments, ends, strict=True)
    ]
    try:
        for process, (_, writing) in zip(processes, ends, strict=True):
            process.start()
            writing.close()
        while running := [process for process in processes if process.is_alive()]:
            wait([process.sentinel for process in running], timeout=POLL_S)
            on_wait()
            _raise_first(processes, [reading for reading, _ in ends])
        _raise_first(processes, [reading for reading, _ in ends])
    finally:
        for process in processes:
            if process.is_alive():
                process.terminate()
                process.join()


def parent_is_alive(parent: int) -> bool:
    """Tell whether the process that started this one is still there."""
    return os.getppid() == parent


def _run(work: Callable[..., None], arguments: tuple[Any, ...], writing: Connection, parent: int) -> None:
    try:
        work(*arguments, lambda: parent_is_alive(parent))
    except (WhenceError, OSError) as error:
        writing.send(error)
        raise SystemExit(1) from error


def _raise_first(processes: list[Any], readings: list[Connection]) -> None:
    for process, reading in zip(processes, readings, strict=True):
        if process.exitcode in (None, 0):
            continue
        try:
            error = reading.recv() if reading.poll() else None
        except EOFError:
            error = None
        raise error or RetrainingError(
            f"A worker ended with status {process.exitcode}"
            f"{' (killed; was there enough memory?)' if process.exitcode < 0 else ''}. What was finished is kept; run "
            "again, with fewer --workers if need be."
        )
