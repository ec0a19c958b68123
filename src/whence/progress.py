"""Progress bars: stage, rate and time left, on the error stream."""

import sys
from typing import Any

from tqdm import tqdm


def progress_bar(stage: str, total: int, unit: str, *, initial: int = 0, shown: bool = True) -> "tqdm[Any]":
    """Open a bar that the caller updates and closes; use it in a ``with`` block.

    Args:
        stage: What is being done, a word or two.
        total: Units in all.
        unit: Name of one unit, for the rate.
        initial: Units that were there already.
        shown: False for no bar at all.

    Returns:
        The bar.
    """
    # Into a file, one line in a while is enough; on a terminal the bar moves.
    interval_s = 0.2 if sys.stderr.isatty() else 20.0
    return tqdm(
        total=total,
        initial=initial,
        desc=f"{stage:<24}",
        unit=f" {unit}",
        disable=not shown,
        mininterval=interval_s,
        maxinterval=max(interval_s, 10.0),
        dynamic_ncols=True,
        smoothing=0.1,
    )
