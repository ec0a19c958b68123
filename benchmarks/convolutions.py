"""Two ways to the weight gradients of a convolution's units: one grouped convolution, or gathered patches.

    python benchmarks/convolutions.py                     a table for the CPU, with the threads that torch takes
    python benchmarks/convolutions.py --device cuda

Times are medians in microseconds, for one 3 x 3 convolution of as many units as events; ``plain`` is the weight
gradient of the whole batch, as training takes it. The engine gathers on a GPU, and on a CPU where there are more
outputs than positions (design note 0014).
"""

import argparse
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import nn

from whence.engine.conv import ConvFactors

SHAPES = (
    *((32, 16, 16, 16), (32, 48, 48, 16), (32, 96, 96, 16), (8, 128, 128, 16), (8, 64, 64, 32)),
    *((32, 32, 32, 8), (32, 96, 96, 8), (8, 256, 256, 8)),
    *((32, 48, 48, 4), (32, 96, 48, 4), (8, 128, 256, 4)),
)
"""Units, channels in and out, pixels along an edge."""


def seconds(run: Callable[[], Any], device: str) -> float:
    """Take the median of some runs."""
    found = []
    for turn in range(13):
        if device != "cpu":
            torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        if device != "cpu":
            torch.cuda.synchronize()
        if turn > 2:
            found.append(time.perf_counter() - start)
    return median(found)


def compare(num_units: int, num_in: int, num_out: int, size: int, device: str) -> dict[str, float]:
    """Time all ways for one shape, each checked against the other."""
    layer = nn.Conv2d(num_in, num_out, 3, padding=1).to(device).requires_grad_(False)
    image = torch.randn(num_units, num_in, size, size, device=device)
    grads = torch.randn(num_units, num_out, size, size, device=device)

    def grouped() -> torch.Tensor:
        return ConvFactors(layer, [(image, grads)], num_units)._convolve(0, grads)

    def gathered() -> torch.Tensor:
        return ConvFactors(layer, [(image, grads)], num_units)._gather(0, grads)

    def plain() -> torch.Tensor:
        return ConvFactors(layer, [(image, grads)], 1)._convolve(0, grads)

    torch.testing.assert_close(grouped(), gathered(), rtol=1e-3, atol=1e-3)
    ways = {"plain": plain, "grouped": grouped, "gathered": gathered}
    return {name: 1e6 * seconds(way, device) for name, way in ways.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cpu", help="torch device")
    device = parser.parse_args().device
    torch.backends.cudnn.allow_tf32 = False
    print("| units | in | out | positions | plain | grouped | gathered |\n|" + " --- |" * 7)
    for num_units, num_in, num_out, size in SHAPES:
        found = compare(num_units, num_in, num_out, size, device)
        cells = [num_units, num_in, num_out, size * size, *(f"{value:.0f}" for value in found.values())]
        print(f"| {' | '.join(map(str, cells))} |")


if __name__ == "__main__":
    main()
