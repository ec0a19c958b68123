"""Numbers, settings and names as a page shows them: short, and with signs and powers that read well."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from typing import Any

import numpy as np

from whence.data import ImageData


def format_summary(summary: Mapping[str, Any]) -> dict[str, Any]:
    rows = [list(row) for row in summary["rows"]]
    numeric = [
        bool(rows) and all(isinstance(row[place], (int, float, np.number, type(None))) for row in rows)
        for place in range(len(summary["columns"]))
    ]
    return {
        "columns": list(zip(summary["columns"], numeric, strict=True)),
        "rows": [[(cell(value), right) for value, right in zip(row, numeric, strict=True)] for row in rows],
        "caption": summary.get("caption") or "",
        "notes": summary.get("notes") or [],
    }


def cell(value: Any) -> str:
    if value is None or (isinstance(value, (float, np.floating)) and np.isnan(value)):
        return "–"
    if isinstance(value, (bool, np.bool_)):
        return "yes" if value else "no"
    if isinstance(value, (int, np.integer)):
        return f"{value:,}".replace("-", "−")
    return short_number(float(value)) if isinstance(value, (float, np.floating)) else str(value)


def flatten(value: Any, prefix: str = "") -> list[tuple[str, str]]:
    mapping = as_mapping(value)
    if mapping is not None and mapping:
        return [
            row for key, inner in mapping.items() for row in flatten(inner, f"{prefix}.{key}" if prefix else str(key))
        ]
    return [(prefix, value_text(value))] if prefix else []


def value_text(value: Any) -> str:
    """Show a setting in one line: long lists and hashes by their beginning."""
    mapping = as_mapping(value)
    if mapping is not None:
        return ", ".join(f"{key} {value_text(inner)}" for key, inner in mapping.items()) or "–"
    if isinstance(value, (list, tuple)):
        shown = ("; " if any(as_mapping(item) for item in value) else ", ").join(value_text(item) for item in value[:8])
        return (shown or "–") if len(value) <= 8 else f"{shown}, … ({len(value):,} in all)"
    if isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value):
        return f"{value[:12]}…"
    return "–" if value is None else str(value)


def as_mapping(value: Any) -> Mapping[str, Any] | None:
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    return value if isinstance(value, Mapping) else None


def dig(value: Any, keys: tuple[str, ...]) -> Any:
    for key in keys:
        value = as_mapping(value)
        if value is None:
            return None
        value = value.get(key)
    return value


def caption_of(images: ImageData, row: int) -> str:
    """Give an image's caption, unless it only repeats the label."""
    caption = text_of(images.captions, row)
    return "" if caption == text_of(images.labels, row) else caption


def text_of(column: Sequence[str] | None, row: int) -> str:
    return "" if column is None else column[row]


def tops(k: int) -> str:
    return "top tens" if k == 10 else f"top {k}s" if k > 1 else "first places"


def shorten(text: str, longest: int = 12) -> str:
    """Cut the middle out of a long id: its end tells more than its beginning."""
    tail = (longest - 1) * 2 // 3
    return text if len(text) <= longest else f"{text[: longest - 1 - tail]}…{text[-tail:]}"


def common_exponent(strongest: float) -> int:
    """Choose the power of ten that the scores of one query are shown in; 0 where plain numbers are short enough."""
    if not strongest or 0.01 <= strongest < 10000:
        return 0
    return int(np.floor(np.log10(strongest)))


def aligned_number(value: float, strongest: float) -> str:
    """Show three digits of the strongest score, and as many decimals in all others, so that a column lines up."""
    decimals = max(0, 2 - int(np.floor(np.log10(strongest)))) if strongest else 0
    return f"{value:,.{min(decimals, 4)}f}".replace("-", "−")


def short_number(value: float, digits: int = 3) -> str:
    mantissa, _, power = f"{value:.{digits}g}".replace("-", "−").partition("e")
    return f"{mantissa} × 10{superscript(int(power.replace('−', '-')))}" if power else mantissa


def superscript(power: int) -> str:
    return str(power).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
