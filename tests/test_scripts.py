"""The recorder in scripts of the shape of diffusers' examples: what they leave behind replays, and can be traced.

The scripts are in scripts/; docs/scripts.md shows the lines that are theirs.
"""

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tiny_pipelines import save_pipeline
from whence.cli import main
from whence.opening import open_run
from whence.record import Record, Visits
from whence.replay_check import TOLERANCE

TESTS = Path(__file__).parent
DOCS = TESTS.parent / "docs" / "scripts.md"
SCRIPTS = ("unconditional", "text_to_image", "text_to_image_lora", "dreambooth_lora", "dreambooth_lora_sd3")

LAUNCH = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "--num_machines", "1"]
LAUNCH += ["--dynamo_backend", "no"]
TWO_PROCESSES = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
"""accelerate launches several processes on CPUs by MPI alone; this is what it starts on GPUs."""


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Ten images in tables with and without captions and in folders, and the pipelines that are fine-tuned."""
    folder = tmp_path_factory.mktemp("files")
    drawn = np.random.default_rng(0)
    images = []
    for k in range(10):
        buffer = io.BytesIO()
        Image.fromarray(drawn.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(buffer, "PNG")
        images.append({"bytes": buffer.getvalue(), "path": f"{k}.png"})
    pq.write_table(pa.table({"image": images}), folder / "images.parquet")
    pq.write_table(pa.table({"image": images, "text": ["a dog"] * 5 + ["an animal"] * 5}), folder / "captions.parquet")
    for k, image in enumerate(images):  # a subject, its class, and both as whence is given them
        copies = ("dog", "both") if k < 5 else ("animals", "both/class")
        for name in copies:
            (folder / name).mkdir(parents=True, exist_ok=True)
            (folder / name / image["path"]).write_bytes(image["bytes"])
    prompts = [{"file_name": f"{k}.png", "text": "a dog"} for k in range(5)]
    prompts += [{"file_name": f"class/{k}.png", "text": "an animal"} for k in range(5, 10)]
    (folder / "both" / "metadata.jsonl").write_text("".join(f"{json.dumps(one)}\n" for one in prompts))
    for kind in ("sd", "sd3"):
        save_pipeline(kind, folder / kind)
    return folder


def train(script: str, data: Path, run: Path, *, launcher: list[str] = LAUNCH, **flags: Any) -> list[float]:
    """Run a script in processes of its own, and give the losses that it minimised, pass by pass."""
    flags |= {"train_data": data, "output_dir": run}
    options = [text for name, value in flags.items() for text in (f"--{name}", str(value))]
    precision = str(flags.get("mixed_precision", "no"))
    launch = [*launcher, "--mixed_precision", precision] if launcher is LAUNCH else launcher
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(TESTS.parent / "src"), os.environ.get("PYTHONPATH", "")]),
        "HF_HOME": str(run.parent / "huggingface"),
        "HF_HUB_OFFLINE": "1",
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
    }
    run.mkdir(exist_ok=True)
    command = [sys.executable, *launch, str(TESTS / "scripts" / f"{script}.py"), *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-4000:]
    return [float(found) for found in re.findall(r"^loss (\S+)$", done.stdout, re.MULTILINE)]


def check(run: Path, data: Path, **conditioning: Any) -> dict[str, str]:
    """Replay a run; a verdict for each part of it."""
    opened = open_run(run, data=str(data), conditioning=conditioning or None)
    rows = opened.check()
    print(*rows, sep="\n")  # shown where a test fails
    return {row.what: row.verdict for row in rows}


def losses_of_passes(visits: Visits) -> list[float]:
    """Give what each pass minimised, by the record: its part of the optimizer step's loss, times the passes of one."""
    passes = sorted({*zip(visits.step.tolist(), visits.micro_batch.tolist(), strict=True)})
    of_pass = [visits.where((visits.step == s) & (visits.micro_batch == m)) for s, m in passes]
    return [float(v.loss.mean()) for v in of_pass]


@pytest.fixture(scope="module")
def unconditional(files, tmp_path_factory):
    """Three optimizer steps of two passes each, then on from the checkpoint of step 2."""
    run = tmp_path_factory.mktemp("unconditional") / "run"
    flags = {"gradient_accumulation_steps": 2, "use_ema": 1}
    first = train("unconditional", files / "images.parquet", run, max_train_steps=3, **flags)
    more = {"max_train_steps": 5, "resume_from_checkpoint": "latest", **flags}
    return run, first, train("unconditional", files / "images.parquet", run, **more)


class TestUnconditional:
    def test_losses_replay_before_and_after_the_resume(self, unconditional, files):
        verdicts = check(unconditional[0], files / "images.parquet")
        assert verdicts == {"keys": "passed", "checkpoint 2": "passed", "checkpoint 4": "passed"}

    def test_the_record_goes_on_where_the_checkpoint_was(self, unconditional):
        run, first, second = unconditional
        record = Record.open(run / "record")
        assert sorted({*record.visits.step.tolist()}) == [1, 2, 3, 4, 5]
        assert len(list((run / "record" / "aside").iterdir())) == 1  # step 3 of the first process
        np.testing.assert_allclose(losses_of_passes(record.visits), first[:3] + second, rtol=1e-6)

    def test_weights_of_visits_count_accumulated_passes(self, unconditional):
        visits = Record.open(unconditional[0] / "record").visits
        whole = visits.where(visits.step == 1)
        assert (len(whole), *set(whole.samples_in_step)) == (8, 8)
        # The data ended after one pass of two images, whose mean was halved all the same.
        rest = visits.where(visits.step == 2)
        assert (len(rest), *set(rest.samples_in_step)) == (2, 4)
        assert 0 < visits.clip_coefficient.min() < 1

    def test_learning_rates_are_those_of_the_steps(self, unconditional):
        visits = Record.open(unconditional[0] / "record").visits
        rates = [visits.learning_rate[visits.step == step][0] for step in range(1, 6)]
        assert rates[:3] == pytest.approx([0.0, 5e-4, 1e-3])  # warm-up of two steps
        assert rates[2] > rates[3] > rates[4]

    def test_it_is_traced_from_the_command_line(self, unconditional, files, tmp_path, capsys):
        run, data = str(unconditional[0]), str(files / "images.parquet")
        queries = tmp_path / "queries"
        queries.mkdir()
        Image.new("RGB", (16, 16), "red").save(queries / "red.png")
        options = ["--queries", str(queries), "--methods", "retrac", "--timesteps", "4", "--draws", "2"]
        main(["trace", run, "--data", data, *options])
        assert "row-000000" in capsys.readouterr().out
        main(["check", run])
        assert capsys.readouterr().out.count("passed") == 3

    def test_raw_and_averaged_weights_are_told_apart(self, unconditional, files):
        checkpoint = open_run(unconditional[0], data=str(files / "images.parquet")).checkpoints[-1]
        assert checkpoint.content_hash("raw") != checkpoint.content_hash("ema")


@pytest.fixture(scope="module")
def two_processes(files, tmp_path_factory):
    run = tmp_path_factory.mktemp("two") / "run"
    flags = {"train_batch_size": 2, "gradient_accumulation_steps": 2, "max_train_steps": 3}
    train("unconditional", files / "images.parquet", run, launcher=TWO_PROCESSES, **flags)
    return run


class TestTwoProcesses:
    def test_losses_of_both_replay(self, two_processes, files):
        assert check(two_processes, files / "images.parquet") == {"keys": "passed", "checkpoint 2": "passed"}
        visits = Record.open(two_processes / "record").visits_of_step(3)
        assert visits.rank.tolist() == [0, 0, 1, 1] * 2

    def test_a_step_counts_the_samples_of_both(self, two_processes):
        visits = Record.open(two_processes / "record").visits
        assert set(visits.samples_in_step) == {8}
        assert visits.weight[visits.step == 1].tolist() == [0.0] * 8  # warm-up

    def test_the_same_image_in_both_has_two_noises(self, two_processes):
        visits = Record.open(two_processes / "record").visits
        assert len(set(visits.noise_key.tolist())) == len(visits)


def test_text_to_image(files, tmp_path):
    """With all that the script can add to noise and loss."""
    run, data = tmp_path / "run", files / "captions.parquet"
    flags = {"noise_offset": 0.1, "input_perturbation": 0.1, "snr_gamma": 5.0, "prediction_type": "v_prediction"}
    losses = train(
        "text_to_image", data, run, pretrained_model_name_or_path=files / "sd", max_train_steps=3, flips=1, **flags
    )
    assert check(run, data) == {"keys": "passed", "checkpoint 2": "passed"}
    record = Record.open(run / "record")
    np.testing.assert_allclose(losses_of_passes(record.visits), losses, rtol=1e-5)
    assert record.manifest["latents"] == "sample" and record.visits.flip.any()
    assert record.manifest["scheduler"]["config"]["prediction_type"] == "v_prediction"
    assert record.manifest["objective"]["snr_gamma"] == 5.0


def test_text_to_image_lora_in_bfloat16(files, tmp_path):
    run, data = tmp_path / "run", files / "captions.parquet"
    losses = train(
        "text_to_image_lora",
        data,
        run,
        pretrained_model_name_or_path=files / "sd",
        max_train_steps=3,
        mixed_precision="bf16",
    )
    assert check(run, data, lora_alpha=2.0) == {"keys": "passed", "checkpoint 2": "passed"}
    record = Record.open(run / "record")
    assert record.manifest["mixed_precision"] == "bf16"
    np.testing.assert_allclose(losses_of_passes(record.visits), losses, rtol=TOLERANCE["bf16"])


def test_dreambooth_lora_with_prior_preservation(files, tmp_path):
    run, data = tmp_path / "run", files / "dog"
    flags = {"pretrained_model_name_or_path": files / "sd", "class_data_dir": files / "animals"}
    flags |= {"train_batch_size": 2, "prior_loss_weight": 0.5}
    losses = train("dreambooth_lora", data, run, max_train_steps=3, **flags)
    more = train("dreambooth_lora", data, run, max_train_steps=5, resume_from_checkpoint="latest", **flags)
    assert check(run, files / "both") == {"keys": "passed", "checkpoint 2": "passed", "checkpoint 4": "passed"}
    visits = Record.open(run / "record").visits
    first = visits.where(visits.step == 1)
    assert first.samples_in_step.tolist() == [2] * 4  # the mean is over instances
    assert first.loss_weight.tolist() == [1, 1, 0.5, 0.5]
    by_step = [visits.where(visits.step == step) for step in range(1, 6)]
    told = [(v.loss / v.samples_in_step).sum() for v in by_step]
    np.testing.assert_allclose(told, losses[:2] + more, rtol=1e-5)


def test_dreambooth_lora_sd3(files, tmp_path):
    """Flow matching, with the loss of clean images and timesteps of logit_normal."""
    run, data = tmp_path / "run", files / "dog"
    losses = train("dreambooth_lora_sd3", data, run, pretrained_model_name_or_path=files / "sd3", max_train_steps=3)
    assert check(run, data, lora_alpha=2.0) == {"keys": "passed", "checkpoint 2": "passed"}
    record = Record.open(run / "record")
    np.testing.assert_allclose(losses_of_passes(record.visits), losses, rtol=1e-5)
    np.testing.assert_allclose(record.visits.loss_weight, record.visits.sigma**2, rtol=1e-6)


class TestDocs:
    @pytest.mark.parametrize("script", SCRIPTS)
    def test_the_lines_of_the_docs_are_those_of_the_scripts(self, script):
        added = added_lines(script)
        assert 0 < len(added) <= 7
        lines = [line.strip() for line in (TESTS / "scripts" / f"{script}.py").read_text().splitlines()]
        missing = [one for one in added if not any(line.startswith(one) for line in lines)]
        assert not missing


def added_lines(script: str) -> list[str]:
    """Read the lines that a diff of the docs adds."""
    (diff,) = re.findall(rf"```diff\n--- \S+/train_{script}\.py\n(.*?)```", DOCS.read_text(), re.DOTALL)
    return [line[1:].strip() for line in diff.splitlines() if line.startswith("+") and not line.startswith("+++")]
