"""What gradients of a LoRA cost on a large frozen base, as a ratio to a plain LoRA training step of the same batch.

    python benchmarks/lora.py --markdown docs/results/lora.md        five minutes on one core
    python benchmarks/lora.py --smoke                                a minute: small networks, one run

A plain step is forward and backward pass of the summed loss with gradients of the adapters alone, as training scripts
of ``diffusers`` make it: the base frozen, adapters of rank 4 on the attention layers, put there by peft. Paths and the
plain step take turns, each path right after a plain step; the ratio of the two is taken, and of many such ratios the
median. Time is that of the processor, which with one thread is wall time on a machine with nothing else to do. Memory
is the resident set's high-water mark above what was there before, in a child forked for one run.
"""

import argparse
import ctypes
import datetime
import gc
import multiprocessing
import platform
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor

from whence._allocator import keep_freed_memory
from whence.diffusion.adapters import predict
from whence.engine.capture import AbstractSink, Capture
from whence.engine.sinks import DotSink, Layout, ProjectSink
from whence.projections import make_projection

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
RANK = 4
PLAIN = "plain step"
NUM_VECTORS, TRACE_VECTORS = 16, 176
"""Vectors of 16 queries by one method; and of a trace by two, with phases and halves."""
ROW_WIDTH = 4096


def make_unet(widths: tuple[int, ...], text_width: int, norm_groups: int) -> Any:
    """Make a network as of Stable Diffusion 1, narrower."""
    return diffusers.UNet2DConditionModel(
        sample_size=16,
        block_out_channels=widths,
        norm_num_groups=norm_groups,
        cross_attention_dim=text_width,
        attention_head_dim=8,
    )


def make_sd3(layers: int, heads: int, text_width: int) -> Any:
    """Make a network as of Stable Diffusion 3, smaller."""
    return diffusers.SD3Transformer2DModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        num_layers=layers,
        attention_head_dim=64,
        num_attention_heads=heads,
        joint_attention_dim=text_width,
        caption_projection_dim=heads * 64,
        pooled_projection_dim=text_width,
        pos_embed_max_size=16,
    )


@dataclass(frozen=True)
class Setting:
    """One network, and how much of it."""

    name: str
    make: Callable[[], Any]
    text_width: int
    batch_size: int
    tokens: int = 77
    size: int = 16
    """Height and width of the latents."""


FULL = (
    Setting("U-Net of SD", lambda: make_unet((96, 192, 384, 384), 768, 32), 768, 4),
    Setting("transformer of SD3", lambda: make_sd3(8, 8, 1024), 1024, 4),
)
SMOKE = (
    Setting("U-Net of SD", lambda: make_unet((8, 8, 8, 8), 8, 4), 8, 2, tokens=5),
    Setting("transformer of SD3", lambda: make_sd3(1, 1, 8), 8, 2, tokens=5),
)


class Case:
    """A network with adapters, and a batch for it."""

    def __init__(self, setting: Setting):
        torch.manual_seed(0)
        self.model = setting.make().eval().requires_grad_(False)
        self.num_base = sum(p.numel() for p in self.model.parameters())
        config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(ATTENTION), init_lora_weights="gaussian")
        inject_adapter_in_model(config, self.model, "default")
        for name, parameter in self.model.named_parameters():
            if ".lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.02)  # zero at first, which would spare lora_A its work
        count, width = setting.batch_size, setting.text_width
        self.count = count
        self.noisy, self.target = torch.randn(2, count, 4, setting.size, setting.size)
        self.times = torch.randint(0, 1000, (count,))
        told = {"encoder_hidden_states": torch.randn(count, setting.tokens, width)}
        self.told = told | {"pooled_projections": torch.randn(count, width)}
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.capture = Capture(self.model)
        self.layout = Layout.of(self.capture.parameters)

    def losses(self, some: slice) -> Tensor:
        """Mean squared error of each sample."""
        told = {name: values[some] for name, values in self.told.items()}
        error = predict(self.model, self.noisy[some], self.times[some], told) - self.target[some]
        return error.square().flatten(1).mean(1)

    def plain(self) -> None:
        """Make the forward and backward pass of a training step."""
        self.losses(slice(0, self.count)).sum().backward()
        for parameter in self.parameters:
            parameter.grad = None

    def loop(self) -> Tensor:
        """Take the gradient of one sample at a time."""
        rows = []
        for event in range(self.count):
            gradients = torch.autograd.grad(self.losses(slice(event, event + 1)).sum(), self.parameters)
            rows.append(torch.cat([gradient.flatten() for gradient in gradients]))
        return torch.stack(rows)

    def run(self, sink: AbstractSink) -> None:
        """Make one pass of the engine."""
        self.capture.run(self.losses, self.count, self.count, [sink])

    def paths(self) -> dict[str, Callable[[], Any]]:
        """Give what is measured, by name."""
        vectors = torch.randn(TRACE_VECTORS, self.layout.num_params)
        shapes = {name: tuple(p.shape) for name, p in self.capture.parameters.items()}
        projection = make_projection("two_sided_sketch", shapes, width=ROW_WIDTH, seed=0)

        def project(with_norms: bool) -> None:
            self.run(ProjectSink(projection, torch.empty(self.count, projection.width), with_norms=with_norms))

        def dots(count: int) -> Callable[[], None]:
            few = vectors[:count].contiguous()
            return lambda: self.run(DotSink(self.layout, few, self.count))

        return {
            PLAIN: self.plain,
            "projected rows": lambda: project(with_norms=False),
            "projected rows, exact norms": lambda: project(with_norms=True),
            "exact norms": dots(0),
            f"exact dots, {NUM_VECTORS} vectors": dots(NUM_VECTORS),
            f"exact dots, {TRACE_VECTORS} vectors": dots(TRACE_VECTORS),
            "batch-of-one loop": self.loop,
        }

    def check(self) -> float:
        """Give how far inner products are off, relative to the lengths of both sides."""
        want = self.loop()
        sink = DotSink(self.layout, want[:2].contiguous(), self.count)
        self.run(sink)
        exact = want.double() @ want[:2].double().T  # over so many numbers a float32 sum is off by more
        return float(((sink.dots - exact).abs() / (want.norm(dim=1)[:, None] * want[:2].norm(dim=1))).max())


@dataclass
class Row:
    """One path on one network."""

    setting: str
    path: str
    seconds: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)
    extra_bytes: int | None = None


def measure(setting: Setting, runs: int) -> tuple[list[Row], Case, float]:
    """Time all paths in turn, then their memory.

    Returns:
        A row for each path, the case, and how far inner products are off.
    """
    case = Case(setting)
    paths = case.paths()
    rows = [Row(setting.name, path) for path in paths]
    off = case.check()
    for run in paths.values():
        run()
    for _ in range(runs):
        for row in rows:
            plain, seconds = _seconds(paths[PLAIN]), _seconds(paths[row.path])
            row.seconds.append(seconds)
            row.ratios.append(seconds / plain)
    if sys.platform == "linux":
        for row in rows:
            row.extra_bytes = _extra_bytes(paths[row.path])
    return rows, case, off


def _seconds(run: Callable[[], Any]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def _extra_bytes(run: Callable[[], Any]) -> int:
    """Measure the memory of one run, in a child of this process."""
    receiver, sender = multiprocessing.get_context("fork").Pipe(duplex=False)

    def in_child() -> None:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
        before = _resident("VmRSS")
        run()
        sender.send(_resident("VmHWM") - before)

    child = multiprocessing.get_context("fork").Process(target=in_child)
    child.start()
    sender.close()
    answer = receiver.recv()
    child.join()
    return answer


def _resident(key: str) -> int:
    found = re.search(rf"^{key}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


def to_markdown(measured: list[tuple[list[Row], Case, float]], settings: tuple[Setting, ...], command: str) -> str:
    """Write the page."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "diffusers", "peft", "numpy", "whence"))
    lines = [
        "# What gradients of a LoRA cost",
        "",
        f"    {command}",
        "",
        f"{datetime.date.today()}, {_processor()}, 1 thread; Python {platform.python_version()}, {versions}.",
        "",
        "A cell is the median over runs, quartiles in brackets, of the time of a path over the time of a *plain step*: "
        "forward and backward pass",
        "of a LoRA training step, of the same batch, timed right before in the same process. Paths take turns. Time is "
        "that of the processor.",
        "Memory is what a run takes at its peak beyond model and inputs, over what a plain step takes.",
        "",
    ]
    for setting, (rows, case, off) in zip(settings, measured, strict=False):  # those that are done
        plain = rows[0]
        lines += [
            f"## {setting.name}, {case.num_base / 1e6:.0f} M parameters",
            "",
            f"Rank {RANK} on attention: {case.layout.num_params:,} parameters in {len(case.parameters)} matrices. "
            f"Latents 4 x {setting.size} x {setting.size}, {setting.tokens} tokens, batch {setting.batch_size}.",
            f"A plain step takes {np.median(plain.seconds):.2f} s and {_mib(plain.extra_bytes)}. "
            f"Inner products differ from the batch-of-one loop by at most {off:.0e} of both lengths (float32).",
            "",
            "| path | time | memory |",
            "| --- | --- | --- |",
        ]
        for row in rows:
            low, middle, high = np.quantile(row.ratios, [0.25, 0.5, 0.75])
            memory = "" if row.extra_bytes is None else f"{row.extra_bytes / (plain.extra_bytes or 1):.2f}"
            lines.append(f"| {row.path} | {middle:.2f} ({low:.2f} to {high:.2f}) | {memory} |")
        lines.append("")
    return "\n".join(lines)


def _mib(number: int | None) -> str:
    return "unknown memory" if number is None else f"{number / 2**20:.0f} MiB"


def _processor() -> str:
    try:
        found = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else platform.processor()


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--smoke", action="store_true", help="small networks, one run: does it work")
    parser.add_argument("--only", choices=[setting.name for setting in FULL], help="one network")
    args = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    settings = tuple(s for s in (SMOKE if args.smoke else FULL) if args.only in (None, s.name))
    measured: list[tuple[list[Row], Case, float]] = []
    text = ""
    for setting in settings:
        measured.append(measure(setting, 1 if args.smoke else args.runs))
        text = to_markdown(measured, settings, f"python benchmarks/lora.py{' --smoke' if args.smoke else ''}")
        if args.markdown:
            args.markdown.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
