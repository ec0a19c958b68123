"""Map-style data sets in memory: their pictures one by one, not yet decoded, and what their items say of these."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from whence._columns import NAMES, as_text, checked_ids, choose_column, row_ids, warn_of_columns
from whence._images import Pictures, decode, hash_pixels
from whence.config import DataSettings
from whence.errors import DataError

_REPEATED_READS = 8  # items of a data set read twice, to catch random transforms


def count_items(dataset: Any, source: str) -> int:
    """Count the items of a data set; refuse a stream."""
    try:
        return len(dataset)
    except TypeError:
        raise DataError(
            f"{source} has no length. whence needs a map-style data set, with len() and [], so that it can come "
            "back to a sample; put the items of a stream into a list first."
        ) from None


class Items:
    """The pictures of a map-style data set; notes what else an item says when it is read."""

    def __init__(self, dataset: Any, num_items: int, settings: DataSettings, source: str) -> None:
        self._dataset = dataset
        self.ids: list[str] = row_ids(num_items)
        self.labels, self.captions = [""] * num_items, [""] * num_items
        self._keys: dict[str, str] = {}
        try:
            first = dataset[0] if num_items else None
        except Exception as error:
            raise DataError(f"Item 0 of {source} cannot be read: {type(error).__name__}: {error}.") from error
        if isinstance(first, Mapping):
            columns = dict.fromkeys(first, NAMES)
            self._keys = {kind: key for kind in NAMES if (key := choose_column(kind, settings, columns, source))}
            if "image" not in self._keys:
                raise DataError(
                    f"Items of {source} must have an image under one of the keys {', '.join(NAMES['image'])}; found "
                    f"{', '.join(map(str, first))}. Name the key as image_column."
                )
        else:
            warn_of_columns(settings, source)
        self._classes = _class_names(dataset, self._keys.get("label"))

    def __getitem__(self, k: int) -> Any:
        item = self._dataset[k]
        if isinstance(item, Mapping):
            values = {kind: _scalar(item[key]) for kind, key in self._keys.items()}
            if "id" in values:
                self.ids[k] = checked_ids([values["id"]], "its item")[0]
            self.captions[k] = as_text(values.get("caption"))
        elif isinstance(item, tuple | list):
            values = dict(zip(("image", "label"), map(_scalar, item), strict=False))
            if not isinstance(values.get("label"), str | int):
                values["label"] = None
        else:
            values = {"image": item}
        self.labels[k] = as_text(values.get("label"), self._classes)
        return values.get("image")


def _scalar(value: Any) -> Any:
    """Unwrap a number from an array or tensor without axes."""
    return value.item() if getattr(value, "shape", None) == () else value


def _class_names(dataset: Any, label_key: str | None) -> Sequence[str] | None:
    """Find the names of integer labels where Hugging Face datasets and torchvision keep them."""
    if label_key is None:
        return getattr(dataset, "classes", None)
    features = getattr(dataset, "features", None)
    return getattr(features.get(label_key), "names", None) if isinstance(features, Mapping) else None


def check_repeatable(items: Items, pictures: Pictures, source: str) -> np.dtype:
    """Read some items again, and refuse a data set that gives others.

    Returns:
        The type of the decoded items.

    Raises:
        DataError: If an item differs from the one that was read first.
    """
    some = range(min(len(pictures.hashes), _REPEATED_READS))
    repeated = [decode(items[k], pictures.settings, pictures.value_range)[0] for k in some]
    for k, array in enumerate(repeated):
        if hash_pixels(array) != pictures.hashes[k]:
            raise DataError(
                f"Item {k} of {source} differs from one reading to the next. Scores belong to fixed images: take "
                "random transforms out of the data set (flips are a setting of training)."
            )
    return repeated[0].dtype
