"""Markdown tables, and intervals over training seeds, for the recipes beside."""

from collections.abc import Sequence

import numpy as np
from scipy import stats


def interval(values: Sequence[float]) -> str:
    """Mean and 95% interval of a few values (Student's t)."""
    mean, error = np.mean(values), stats.sem(values)
    if error == 0:
        return f"{mean:+.3f} (all equal)"
    low, high = stats.t.interval(0.95, len(values) - 1, mean, error)
    return f"{mean:+.3f} ({low:+.3f} to {high:+.3f})"


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lay out a Markdown table."""
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns), *(f"| {' | '.join(row)} |" for row in rows)]
    return "\n".join(lines) + "\n"
