"""Ids, labels and captions of images: which column or key of a source has them, and how they become text."""

import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from whence.config import DataSettings
from whence.errors import DataError

Kind = Literal["image", "id", "label", "caption"]

NAMES: dict[Kind, tuple[str, ...]] = {
    "image": ("image", "images", "img", "pixel_values", "input"),
    "id": ("id", "sample_id", "image_id"),
    "label": ("label", "class"),
    "caption": ("text", "caption", "prompt"),
}
HELD: dict[Kind, str] = {
    "image": "encoded images",
    "id": "text or whole numbers",
    "label": "text or whole numbers",
    "caption": "text",
}


def checked_ids(
    ids: Iterable[Any], source: str, if_repeated: str = "Rename them, or name another id_column."
) -> tuple[str, ...]:
    """Turn whole numbers into text; refuse ids that could not stand in a list or file, or are not unique."""
    texts = [str(id_) if isinstance(id_, int | np.integer) and not isinstance(id_, bool) else id_ for id_ in ids]
    bad = [id_ for id_ in texts if not isinstance(id_, str) or not id_.isprintable() or not id_]
    if bad:
        raise DataError(
            f"Ids must be whole numbers or non-empty printable text on one line; {source} has {len(bad)} others: "
            f"{abbreviate(list(map(repr, bad)))}. Rename them, or name another id_column."
        )
    repeated = [id_ for id_, count in Counter(texts).items() if count > 1]
    if repeated:
        raise DataError(
            f"Ids must be unique; {len(repeated)} are repeated in {source}: {abbreviate(repeated)}. {if_repeated}"
        )
    return tuple(map(str, texts))


def warn_of_columns(settings: DataSettings, source: str) -> None:
    """Warn where the settings name columns and the source has none."""
    named = [f"{kind}_column" for kind in NAMES if getattr(settings, f"{kind}_column") is not None]
    if named:
        warnings.warn(f"{source} has no columns, so these settings have no effect: {', '.join(named)}.", stacklevel=4)


def choose_column(
    kind: Kind, settings: DataSettings, columns: Mapping[str, Collection[Kind]], source: str
) -> str | None:
    """Choose the column that the settings name, or else one with a usual name, among those that can hold the kind."""
    usable = [name for name, kinds in columns.items() if kind in kinds]
    named = getattr(settings, f"{kind}_column")
    if named is None:
        return next((name for name in NAMES[kind] if name in usable), None)
    if named not in usable:
        found = "no such column" if named not in columns else "a column of another type"
        raise DataError(
            f"{kind}_column={named} must name a column of {HELD[kind]}; {source} has {found}. Columns that can be "
            f"used: {', '.join(map(str, usable))}."
        )
    return named


def warn_of_unusable(
    names: Mapping[Kind, str | None], columns: Collection[str], settings: DataSettings, source: str
) -> None:
    """Warn where a column has a usual name and a type that cannot be used; images are found by type anyway."""
    for kind in ("id", "label", "caption"):
        first = next((name for name in NAMES[kind] if name in columns), None)
        if getattr(settings, f"{kind}_column") is None and first != names[kind]:
            instead = f"column {names[kind]}" if names[kind] else "row numbers" if kind == "id" else "nothing"
            warnings.warn(
                f"Column {first} of {source} is not used as {kind}, because it does not hold {HELD[kind]}. Used "
                f"instead: {instead}. Convert it, or name another {kind}_column.",
                stacklevel=6,
            )


def row_ids(num_rows: int) -> list[str]:
    return [f"row-{row:07}" for row in range(num_rows)]


def as_text(value: Any, classes: Sequence[str] | None = None) -> str:
    """Write a label or caption as text; -1 is what Hugging Face datasets give images without a class."""
    if value is None or (classes is not None and value == -1):
        return ""
    return classes[value] if classes is not None and isinstance(value, int) else str(value)


def abbreviate(ids: Sequence[Any], count: int = 5) -> str:
    """List the first few in a message."""
    return ", ".join(map(str, ids[:count])) + (", …" if len(ids) > count else "")
