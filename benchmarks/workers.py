"""The driver's side of ``measure.serve``: processes that answer requests, one at a time."""

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import peers

HERE = Path(__file__).parent
OURS = "whence"
KEEP_FREED_MEMORY = {"MALLOC_TRIM_THRESHOLD_": str(2**31 - 1), "MALLOC_MMAP_THRESHOLD_": str(2**25)}
"""What whence asks of the C library, here for plain passes and peers too."""
PEER_TRIM_THRESHOLD = {"MALLOC_TRIM_THRESHOLD_": str(2**28)}
"""All peers are in memory at once, and some need ten times what whence does: so they keep less."""


class WorkerError(Exception):
    """A path cannot be measured; the message says why."""


class Worker:
    """A process that answers requests about paths.

    Args:
        command: What to run.
        limit_s: It is stopped when an answer takes longer than this many seconds.
        environment: Further variables.
    """

    def __init__(self, command: Sequence[str], limit_s: float, environment: Mapping[str, str]):
        self.limit_s = limit_s
        self.errors = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            env={**os.environ, **KEEP_FREED_MEMORY, **environment},
        )

    def ask(self, do: str, **request: Any) -> dict[str, Any]:
        """Send a request and wait for its answer."""
        assert self.process.stdin is not None and self.process.stdout is not None
        timer = threading.Timer(self.limit_s, self.process.kill)
        timer.start()
        try:
            print(json.dumps({"do": do} | request), file=self.process.stdin, flush=True)
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        stopped = timer.finished.is_set()
        timer.cancel()
        if not line and stopped:
            raise WorkerError(f"stopped after {self.limit_s:.0f} s")
        if not line:
            self.errors.seek(0)
            raise WorkerError(f"its process ended: {(self.errors.read().splitlines() or ['no message'])[-1]}")
        answer = json.loads(line)
        if "error" in answer:
            raise WorkerError(answer["error"])
        return answer

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.communicate()
        self.errors.close()


class Workers:
    """All processes that measure one case, each started at its first use and ended together.

    One has all paths of ours. Each path of a peer has its own, as peers change a model for good.

    Args:
        options: Options of ``measure.serve``.
        limit_s: Seconds after which a peer is stopped.
    """

    def __init__(self, options: Sequence[str], limit_s: float):
        self.options = options
        self.limit_s = limit_s
        self.running: dict[str, Worker] = {}

    def ask(self, library: str, path: str, do: str, **request: Any) -> dict[str, Any]:
        """Ask about a path of a library."""
        key = OURS if library == OURS else path
        if key not in self.running:
            python, script = (sys.executable, "paths.py") if library == OURS else (peers.PYTHON, "peers.py")
            limit_s = 3600 if library == OURS else self.limit_s
            environment = {} if library == OURS else PEER_TRIM_THRESHOLD
            command = [str(python), str(HERE / script), "work", *self.options]
            self.running[key] = Worker(command, limit_s, environment)
        return self.running[key].ask(do, path=path, **request)

    def __enter__(self) -> "Workers":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for worker in self.running.values():
            worker.close()
