import os
import subprocess
import sys

import pytest

from whence._allocator import keep_freed_memory

COUNT_FAULTS = """
import ctypes
import resource
import sys

import torch

from whence._allocator import keep_freed_memory

ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: a huge page is one fault, whoever hands it out
if "keep" in sys.argv:
    assert keep_freed_memory()
torch.set_num_threads(1)
for turn in range(12):
    if turn == 2:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    tensors = [torch.zeros(2**20) for _ in range(32)]  # 128 MiB
    del tensors
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def count_faults(*arguments: str) -> int:
    # 128 MiB at once is more than glibc keeps by itself, whatever was allocated before.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    run = [sys.executable, "-c", COUNT_FAULTS, *arguments]
    return int(subprocess.run(run, capture_output=True, text=True, check=True, env=environment).stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="faults are counted for glibc")
def test_memory_that_is_used_again_causes_no_faults():
    # Ten turns touch 327,680 pages. Without, one turn's worth or all of them fault, as the heap happens to lie.
    assert count_faults("keep") < 5000


def test_thresholds_of_the_user_are_left(monkeypatch):
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1")
    assert not keep_freed_memory.__wrapped__()
