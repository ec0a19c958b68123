"""Measuring one path at a time, on request, in a process of its own.

A worker reads requests from its standard input and answers each with one line of JSON: the driver so interleaves what
is measured in several processes, ours and the peers', which have environments of their own. Time is wall time. Memory
is the resident set's high-water mark above what was there when the path started, in a child forked for that path alone.
"""

import argparse
import ctypes
import gc
import json
import multiprocessing
import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bounds import Operations, Work
from models import DRAWS, NUM_QUERIES, Case, load_case, plain_pass

PLAIN, QUERY_PLAIN = "plain", "plain, query side"
"""Plain passes of the two batch sizes."""

CAN_MEASURE_RESIDENT = sys.platform == "linux"
"""Whether the high-water mark can be read and reset; elsewhere memory is measured on CUDA devices alone."""


@dataclass(frozen=True)
class Prepared:
    """A path with everything made that is not measured."""

    run: Callable[[], Any]
    num_samples: int
    """Samples whose gradients one run takes."""
    results: Callable[[], Mapping[str, Any]] | None = None
    """What can be compared: ``scores`` (train, query) are inner products of gradients, ``norms`` (train,) lengths."""
    num_params: int | None = None
    """Parameters that it covers, where these are not all."""


@dataclass(frozen=True)
class GradientPath:
    """A way to take gradients."""

    computes: str
    prepare: Callable[[Case], Prepared]
    query_side: bool = False
    """Whether it goes by the larger batches of the query side."""
    work: Callable[[Operations], Work] | None = None
    """What it must do at least."""


class Worker:
    """Answers requests about paths, each loaded with a model of its own, which it may wrap or change.

    Args:
        paths: What can be asked for, by name.
        file: The case.
        threads: Threads of torch while something is measured.
        device: Device of torch.
    """

    def __init__(self, paths: Mapping[str, GradientPath], file: Path, threads: int, device: str):
        self.paths = paths
        self.file = file
        self.threads = threads
        self.device = device
        self.prepared: dict[str, Prepared] = {}
        self.plain_bytes: dict[str, int | None] = {}

    def time(self, path: str) -> dict[str, Any]:
        """Time one run of a path, and a plain pass right before it."""
        prepared, plain = self._prepare(path), self._prepare(self._plain_name(path))
        plain_seconds = self._seconds(plain.run)
        seconds = self._seconds(prepared.run)
        return {
            "seconds": seconds,
            "ratio": seconds / prepared.num_samples * plain.num_samples / plain_seconds,
            "num_samples": prepared.num_samples,
            "num_params": prepared.num_params,
        }

    def results(self, path: str, file: str) -> dict[str, Any]:
        """Write what can be compared, if there is something, and warm up."""
        prepared = self._prepare(path)
        self._prepare(self._plain_name(path)).run()  # the first run of anything is slower: not to be timed
        if prepared.results is None:
            prepared.run()
            return {"file": None}
        arrays = {key: value.detach().cpu().numpy() for key, value in prepared.results().items()}
        np.savez(file, **arrays)
        return {"file": file}

    def memory(self, path: str) -> dict[str, Any]:
        """Measure the memory of one run of a path, and of a plain pass of the same batch size."""
        plain = self._plain_name(path)
        if plain not in self.plain_bytes:
            self.plain_bytes[plain] = self._extra_bytes(plain)
        return {"bytes": self._extra_bytes(path), "plain_bytes": self.plain_bytes[plain]}

    def _plain_name(self, path: str) -> str:
        return QUERY_PLAIN if path in self.paths and self.paths[path].query_side else PLAIN

    def _prepare(self, path: str) -> Prepared:
        if path not in self.prepared:
            case = load_case(self.file, self.device)
            if path in (PLAIN, QUERY_PLAIN):
                inputs = case.train if path == PLAIN else case.query_batch
                self.prepared[path] = Prepared(lambda: plain_pass(case, inputs), len(inputs))
            else:
                self.prepared[path] = self.paths[path].prepare(case)
        return self.prepared[path]

    def _seconds(self, run: Callable[[], Any]) -> float:
        self._wait()
        start = time.perf_counter()
        result = run()
        self._wait()
        seconds = time.perf_counter() - start
        del result  # what it takes to free it is not part of the path
        return seconds

    def _wait(self) -> None:
        if self.device != "cpu":
            torch.cuda.synchronize()

    def _extra_bytes(self, path: str) -> int | None:
        if self.device != "cpu":
            run = self._prepare(path).run
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            run()
            return torch.cuda.max_memory_allocated() - before
        if not CAN_MEASURE_RESIDENT:
            return None
        context = multiprocessing.get_context("fork")
        receiver, sender = context.Pipe(duplex=False)
        child = context.Process(target=self._send_extra_bytes, args=(path, sender))
        child.start()
        sender.close()
        try:
            answer = receiver.recv()
        except EOFError:
            answer = "the process that measured it was killed"
        child.join()
        if isinstance(answer, str):
            raise RuntimeError(answer)
        return answer

    def _send_extra_bytes(self, path: str, sender: Any) -> None:
        try:
            torch.set_num_threads(self.threads)
            self._bring_in_code(path)
            run = self._prepare(path).run
            gc.collect()
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
            before = _resident_bytes("VmRSS")
            run()
            sender.send(_resident_bytes("VmHWM") - before)
        except Exception as error:
            sender.send(describe(error))

    def _bring_in_code(self, path: str) -> None:
        """Run a path on a few samples, for what a process loads and builds once."""
        case = load_case(self.file, self.device)
        few = replace(case, inputs=case.inputs[-DRAWS - NUM_QUERIES :], batch_size=2)
        plain_pass(few, few.train)
        if path in self.paths:
            self.paths[path].prepare(few).run()


def _resident_bytes(key: str) -> int:
    found = re.search(rf"^{key}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


def describe(error: BaseException) -> str:
    """Say in one line what went wrong."""
    lines = str(error).strip().splitlines() or ["no message"]
    return f"{type(error).__name__}: {' '.join(lines[0].split())}"


def serve(paths: Mapping[str, GradientPath]) -> None:
    """Answer requests until there are no more."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--case", type=Path, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--memory", action="store_true", help="measure memory, not time")
    args = parser.parse_args(sys.argv[2:])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not get between the answers
    warnings.simplefilter("ignore")
    torch.backends.cudnn.allow_tf32 = (
        False  # PyTorch's default; whence's passes are without it, and so is the plain one
    )
    # To fork is safe as long as the parent has no threads of torch, which it starts where more than one is allowed.
    torch.set_num_threads(1 if args.memory else args.threads)
    worker = Worker(paths, args.case, args.threads, args.device)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = getattr(worker, request.pop("do"))(**request)
        except Exception as error:
            answer = {"error": describe(error)}
        print(json.dumps(answer), file=answers, flush=True)
