"""Killed at random moments of training and tracing, then run again: the same bytes as a run that nothing disturbed.

    python tests/test_kills.py FOLDER SEED      what the test runs in a process of its own

That process imports everything once and forks a child for each attempt, which is killed with SIGKILL after a random
time. It does no parallel work itself, so that forking it is safe. Set WHENCE_KILL_SEED to repeat a failure.
"""

import hashlib
import importlib
import json
import os
import random
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from pathlib import Path

KILLS = 20
GIVE_UP_AFTER = 60  # kills; where some stage was never hit


def test_killed_and_run_again_gives_the_same_bytes(tmp_path):
    seed = os.environ.get("WHENCE_KILL_SEED") or str(random.SystemRandom().randrange(10**6))
    print(f"WHENCE_KILL_SEED={seed}")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run(
        [sys.executable, "-W", "error", __file__, str(tmp_path), seed], env=environment, capture_output=True, text=True
    )
    print(done.stdout, done.stderr)
    assert done.returncode == 0, f"failed with WHENCE_KILL_SEED={seed}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["kills"]["train"] + report["kills"]["trace"] >= KILLS
    assert min(report["kills"].values()) >= 3
    assert report["rounds"] >= 2


def stages(run: Path, say):
    """Train the toy and trace it."""
    from conftest import TOY_TRAINING, toy_images
    from whence.attribution import trace
    from whence.checkpoints import list_checkpoints
    from whence.config import ModelSettings, TraceSettings
    from whence.methods import RETRAC, TRACIN
    from whence.record import Record
    from whence.subject import Subject
    from whence.training import train

    images = toy_images(10)
    model = ModelSettings(widths=(4, 4), attention_levels=0, norm_groups=2, train_timesteps=50)
    say(b"train ")
    train(run, images, model, TOY_TRAINING, show_progress=False)
    say(b"trace ")
    subject = Subject(list_checkpoints(run), images, Record.open(run / "record"), "mse")
    settings = TraceSettings(timesteps=4, draws=2, phases=2, batch_size=8, block_size=4)
    trace(subject, toy_images(3, "query", seed=1), [TRACIN, RETRAC], settings, run, show_progress=False)


def attempt(run: Path, kill_after_s: float | None) -> tuple[bool, str]:
    """Run the stages in a child; tell whether it finished, and in which stage it was when it ended."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        status = 1
        try:
            stages(run, lambda text: os.write(writing, text))
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    os.close(writing)
    deadline = None if kill_after_s is None else time.monotonic() + kill_after_s
    while (ended := os.waitpid(child, os.WNOHANG))[0] == 0:
        if deadline is not None and time.monotonic() >= deadline:
            os.kill(child, signal.SIGKILL)
            ended = os.waitpid(child, 0)
            break
        time.sleep(0.002)
    with os.fdopen(reading) as pipe:
        reached = (pipe.read().split() or ["train"])[-1]
    if os.WIFSIGNALED(ended[1]):
        return False, reached
    assert os.WEXITSTATUS(ended[1]) == 0, f"the stages failed in {run}"
    return True, reached


def hashes(run: Path) -> dict[str, str]:
    """Hash every file that a run is made of: not its locks, cache, or what was moved aside."""
    parts = [part for part in ("checkpoints", "record", "scores") if (run / part).exists()]
    files = [f for part in parts for f in sorted((run / part).rglob("*")) if f.is_file() and "aside" not in f.parts]
    return {f.relative_to(run).as_posix(): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def check_nothing_is_half_written(run: Path, want: dict[str, str]) -> None:
    """What bears its final name is whole, at any moment. The list of parts grows; hidden files are not finished."""
    for name, found in hashes(run).items():
        if not any(part.startswith(".") for part in Path(name).parts) and name != "record/parts-0.json":
            assert found == want.get(name), f"{name} is half-written after a kill"


def main(folder: Path, seed: int) -> None:
    # All that the children will need, so that none spends its time on importing it.
    for module in ("diffusers.optimization", "diffusers.training_utils", "pyarrow.parquet", "whence.training"):
        importlib.import_module(module)
    importlib.import_module("whence.attribution")
    diffusers = importlib.import_module("diffusers")
    assert diffusers.DDPMScheduler and diffusers.UNet2DModel  # imported when asked for
    importlib.import_module("torch").set_num_threads(1)
    start = time.monotonic()
    attempt(folder / "first", None)  # its time includes what only a first child pays
    start = time.monotonic()
    assert attempt(folder / "undisturbed", None)[0]
    undisturbed_s = time.monotonic() - start
    want = hashes(folder / "undisturbed")
    assert want == hashes(folder / "first")
    rng = random.Random(seed)
    kills: Counter[str] = Counter(train=0, trace=0)
    rounds = 0
    while kills.total() < KILLS or (min(kills.values()) < 3 and kills.total() < GIVE_UP_AFTER):
        run = folder / f"round-{rounds}"
        while True:
            finished, reached = attempt(run, rng.uniform(0, undisturbed_s))
            if finished:
                break
            kills[reached] += 1
            check_nothing_is_half_written(run, want)
        found = hashes(run)
        assert found == want, (
            f"{run}: {[name for name in found.keys() | want.keys() if found.get(name) != want.get(name)]}"
        )
        assert not [p for p in (run / "cache").glob("*") if p.suffix != ".lock"], (
            f"{run} keeps a cache that nothing needs"
        )
        rounds += 1
    print(
        json.dumps(
            {"kills": kills, "rounds": rounds, "undisturbed_s": undisturbed_s, "total_s": time.monotonic() - start}
        )
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
