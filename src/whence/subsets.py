"""Random subsets of a training set, each a pure function of a seed, its number and the ids.

Of subset m, every sample has a keyed random number, and the samples with the smallest ones are its members. So subset m
does not depend on how many there are, nor on the order of the training set.
"""

import itertools
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool
from numpy import ndarray

from whence.diffusion.noise import noise_key
from whence.errors import ConfigError


def draw_subsets(
    ids: Sequence[str], count: int, fraction: float, seed: int, labels: Sequence[str] | None = None
) -> Bool[ndarray, "subset train"]:
    """Draw different subsets of one size.

    Args:
        ids: Training samples.
        count: How many subsets.
        fraction: Share of the samples in each, rounded to whole samples, halves up.
        seed: Seed of the draws.
        labels: Draw this share of every label apart (stratified); None: of all samples together.

    Returns:
        True where a sample is a member. The first m rows are the same whatever ``count``.

    Raises:
        ConfigError: If a subset would be empty or whole, or there are not so many different ones.

    Example:
        >>> draw_subsets(["a", "b", "c", "d"], 2, 0.5, seed=0)
        array([[ True,  True, False, False],
               [ True, False, False,  True]])
    """
    if count < 1:
        raise ConfigError(f"subsets must be above 0, found {count}.")
    groups = [np.flatnonzero(np.array(labels) == label) for label in sorted(set(labels))] if labels else []
    groups = groups or [np.arange(len(ids))]
    sizes = [math.floor(fraction * len(group) + 0.5) for group in groups]
    if not 0 < sum(sizes) < len(ids):
        raise ConfigError(
            f"A subset must leave out some training images and keep some; fraction {fraction} of {len(ids)} keeps "
            f"{sum(sizes)}."
        )
    possible = math.prod(math.comb(len(group), size) for group, size in zip(groups, sizes, strict=True))
    if count > possible:
        raise ConfigError(f"There are only {possible} different subsets of this size; {count} were asked for.")
    drawn: dict[bytes, Bool[ndarray, " train"]] = {}
    for number in range(count):
        # A repeated subset would be a second seed under another name; chance makes one only where few are possible.
        for attempt in itertools.count():
            members = _draw(ids, groups, sizes, seed, number, attempt)
            if drawn.setdefault(members.tobytes(), members) is members:
                break
    return np.stack(list(drawn.values()))


def draw_members(ids: Sequence[str], size: int, seed: int, number: int = 0) -> Bool[ndarray, " train"]:
    """Draw one set of a given size from all samples together.

    Args:
        ids: Training samples.
        size: Members, 0 to all.
        seed: Seed of the draw.
        number: Of the set.

    Returns:
        True where a sample is a member; sets of one number and seed are nested, a larger one holds the smaller ones.

    Example:
        >>> draw_members(["a", "b", "c", "d"], 1, seed=0)
        array([False,  True, False, False])
    """
    return _draw(ids, [np.arange(len(ids))], [size], seed, number, 0)


def _draw(
    ids: Sequence[str], groups: Sequence[ndarray], sizes: Sequence[int], seed: int, number: int, attempt: int
) -> Bool[ndarray, " train"]:
    keys = np.array([noise_key(seed, "subset", "train", id_, number, attempt) for id_ in ids], dtype=np.uint64)
    members = np.zeros(len(ids), dtype=bool)
    for group, size in zip(groups, sizes, strict=True):
        members[group[np.argsort(keys[group], kind="stable")[:size]]] = True
    return members
