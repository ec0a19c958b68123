"""Inner products of a store's rows with vectors, fast: no model, no methods.

Rows come from the disk's cache as they lie there, in half precision. A block of them that stays in the processor's
cache is converted into one buffer, which is used again and again, and multiplied there with all vectors at once: a
second block of memory for each conversion would cost several times as much as both steps together.

A sample's rows at a checkpoint are added up to one value a vector::

    value(sample, vector) = sum over its rows of   weight x norm x <row, vector>

with ``weight`` and ``norm`` columns of the store, or 1. :class:`Reading` says which.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64, Shaped
from numpy import ndarray
from torch import Tensor

from whence._store_checks import name_ids
from whence.diffusion.process import nearest_timesteps
from whence.errors import ConfigError, StoreError
from whence.shards import Shard
from whence.store import Store

BUFFER_BYTES = 4 * 2**20
"""Of the converted block of rows. Measured on rows of 4,096: 2 to 16 MiB do equally well; smaller and larger, worse."""


@dataclass(frozen=True)
class Reading:
    """Which rows of a store are read, and what they are multiplied with."""

    rows: str = "rows"
    """``rows`` or ``unit_rows``."""
    norms: str | None = "norms"
    """Column of lengths; None: rows count as they are, of length about 1."""
    weights: str | None = None
    """Column of weights; None: 1."""

    unit_samples: bool = False
    """Bring the weighted mean of each sample's rows to length 1; its length is that of the projected mean."""
    meet_at: tuple[int, ...] = ()
    """Ascending timesteps, each with vectors of its own, which the rows nearest to it meet; (): all meet the same."""

    def meetings(self, arrays: Mapping[str, ndarray]) -> list[slice | ndarray]:
        """Say which rows of a shard meet the vectors of each timestep; one entry for all where there are none."""
        if not self.meet_at:
            return [slice(None)]
        point = nearest_timesteps(np.array(self.meet_at), arrays["timestep"])
        return [np.flatnonzero(point == k) for k in range(len(self.meet_at))]

    def factors(self, arrays: Mapping[str, ndarray]) -> Float64[ndarray, " row"]:
        """Give the factor of each row of a shard."""
        sample = arrays["sample"]
        weights = np.ones(len(sample)) if self.weights is None else arrays[self.weights]
        factors = weights * (1.0 if self.norms is None else arrays[self.norms])
        if not self.unit_samples or not len(sample):
            return factors
        num_samples = int(sample.max()) + 1
        sums = _sum_rows(arrays[self.rows], sample, factors, num_samples)
        lengths = torch.linalg.vector_norm(sums, dim=1, dtype=torch.float64).numpy()
        total = np.bincount(sample, weights, num_samples)
        return factors * np.divide(total, lengths, out=np.zeros(num_samples), where=lengths > 0)[sample]

    def sums(self, arrays: Mapping[str, ndarray], num_samples: int) -> Float[Tensor, "sample_or_row width"]:
        """Add up the rows of each sample of a shard, each times its factor; rows that meet apart stay apart."""
        if self.meet_at:
            alone = replace(self, weights=None).factors(arrays)
            return _sum_rows(arrays[self.rows], np.arange(len(alone)), alone, len(alone))
        return _sum_rows(arrays[self.rows], arrays["sample"], self.factors(arrays), num_samples)


@dataclass(frozen=True)
class TopTable:
    """The samples with the largest values, for each vector; the largest first."""

    ids: list[list[str]]
    """One list of ids per vector."""
    values: Float64[ndarray, "vector k"]


class Multiplier:
    """Multiplies rows of any shard with the same vectors.

    Args:
        vectors: In the type in which products are taken, on the device where they are; one block of them, or one for
            each meeting of a :class:`Reading`.
    """

    def __init__(self, vectors: Float[Tensor, "*meeting vector width"]):
        width = vectors.shape[-1]
        self.columns = vectors.view(-1, *vectors.shape[-2:]).transpose(1, 2).contiguous()
        at_once = max(1, BUFFER_BYTES // (width * vectors.element_size()))
        self.buffer = vectors.new_empty(at_once, width)

    def multiply(self, rows: Shaped[ndarray, "row width"], meeting: int = 0) -> Float[Tensor, "row vector"]:
        """Give the inner products of rows, which may be read-only and in half precision, with all vectors."""
        columns = self.columns[meeting]
        products = columns.new_empty(len(rows), columns.shape[1])
        found = _as_tensor(rows)
        for start in range(0, len(rows), len(self.buffer)):
            block = self.buffer[: min(len(self.buffer), len(rows) - start)]
            block.copy_(found[start : start + len(block)])
            torch.mm(block, columns, out=products[start : start + len(block)])
        return products


def sum_by_sample(
    products: Float[Tensor, "row vector"],
    sample: Shaped[ndarray, " row"],
    factors: Float64[ndarray, " row"],
    num_samples: int,
) -> Float64[ndarray, "sample vector"]:
    """Add up the products of each sample's rows, each times its factor.

    Args:
        products: Inner products of rows with vectors.
        sample: Position of each row's sample in its block.
        factors: Of the rows.
        num_samples: Samples of the block; one without rows has sums of 0.

    Returns:
        The sums.
    """
    sums = torch.zeros(num_samples, products.shape[1], dtype=torch.float64)
    weighted = products.cpu().double() * torch.from_numpy(factors)[:, None]
    return sums.index_add_(0, _as_index(sample), weighted).numpy()


def group_shards(store: Store, steps: Sequence[int]) -> list[list[Shard]]:
    """Put shards together so that all rows of a sample, at all steps, are in one group.

    Where every step is cut into the same blocks, a group is a block at all steps; otherwise it is everything.

    Args:
        store: The store.
        steps: Which checkpoints.

    Returns:
        Groups, each with its shards in the order of the steps.

    Raises:
        StoreError: If a step lacks samples that another step holds.
    """
    by_step = [{shard.block: shard for shard in store.shards(step)} for step in steps]
    everything = {id_ for shards in by_step for shard in shards.values() for id_ in shard.ids}
    for step, shards in zip(steps, by_step, strict=True):
        lacking = sorted(everything - {id_ for shard in shards.values() for id_ in shard.ids})
        if lacking or not shards:
            raise StoreError(
                f"{store.folder} is not finished: step {step} lacks {len(lacking) or 'all'} images"
                f"{f', such as {name_ids(lacking)}' if lacking else ''}. Run `whence index` again, which goes on from "
                "there."
            )
    if all(shards.keys() == by_step[0].keys() for shards in by_step):
        return [[shards[block] for shards in by_step] for block in by_step[0]]
    return [[shard for shards in by_step for shard in shards.values()]]


def top_of_store(
    store: Store,
    vectors: Mapping[int, Float[Tensor, "*meeting vector width"]],
    reading: Reading,
    k: int,
    *,
    after: Callable[[Shard, Mapping[str, ndarray]], Float64[ndarray, " sample"]] | None = None,
    squared: bool = False,
) -> TopTable:
    """Find the samples with the largest values, keeping no more than these at any time.

    Args:
        store: The store; its shards are taken as checked.
        vectors: The vectors of each step, for each meeting of the rows.
        reading: Which rows, with which factors.
        k: How many.
        after: Gives what the values of a shard's samples are multiplied with, from the shard and its arrays.
        squared: Square the sums over the steps.

    Returns:
        The ``k`` samples with the largest sums over the steps, for each vector; fewer where there are fewer.

    Raises:
        ConfigError: If ``k`` is below 1.
        StoreError: If a step lacks samples that another step holds.
    """
    multipliers = {step: Multiplier(v) for step, v in vectors.items()}
    top = RunningTop(k)
    for shards in group_shards(store, list(vectors)):
        ids = block_ids(shards)
        placed = [_place(_values(shard, multipliers[shard.step], reading, after), shard, ids) for shard in shards]
        total = np.sum(placed, axis=0).T
        top.add(ids, total**2 if squared else total)
    return top.table()


def _sum_rows(
    rows: ndarray, sample: ndarray, factors: Float64[ndarray, " row"], num_samples: int
) -> Float[Tensor, "sample width"]:
    weighted = torch.from_numpy(factors).float()[:, None] * _as_tensor(rows)
    return torch.zeros(num_samples, rows.shape[1]).index_add_(0, _as_index(sample), weighted)


def _values(
    shard: Shard,
    multiplier: Multiplier,
    reading: Reading,
    after: Callable[[Shard, Mapping[str, ndarray]], Float64[ndarray, " sample"]] | None,
) -> Float64[ndarray, "sample vector"]:
    arrays = shard.read_all()
    sample, factors, rows = arrays["sample"], reading.factors(arrays), arrays[reading.rows]
    sums = np.zeros((len(shard.ids), multiplier.columns.shape[2]))
    for k, met in enumerate(reading.meetings(arrays)):
        sums += sum_by_sample(multiplier.multiply(rows[met], k), sample[met], factors[met], len(shard.ids))
    return sums if after is None else sums * after(shard, arrays)[:, None]


def block_ids(shards: Sequence[Shard]) -> tuple[str, ...]:
    """Give the ids of a group of shards, each once."""
    first = shards[0].ids
    if all(shard.ids == first for shard in shards):
        return first
    return tuple(dict.fromkeys(id_ for shard in shards for id_ in shard.ids))


def _place(values: ndarray, shard: Shard, ids: tuple[str, ...]) -> ndarray:
    if shard.ids == ids:
        return values
    row_of = {id_: row for row, id_ in enumerate(ids)}
    placed = np.zeros((len(ids), values.shape[1]))
    placed[[row_of[id_] for id_ in shard.ids]] = values
    return placed


class RunningTop:
    """The largest values so far, of each vector.

    Args:
        k: How many are kept.

    Raises:
        ConfigError: If that is below 1.
    """

    def __init__(self, k: int):
        if k < 1:
            raise ConfigError(f"top must be above 0, found {k}: it is how many training images to keep of each query.")
        self.k = k
        self._values: Float64[ndarray, "vector kept"] | None = None
        self._index: Int64[ndarray, "vector kept"] | None = None
        self._ids: list[str] = []

    def add(self, ids: Sequence[str], values: Float64[ndarray, "vector sample"]) -> None:
        """Take in the values of more samples."""
        index = np.broadcast_to(np.arange(len(self._ids), len(self._ids) + len(ids)), values.shape)
        self._ids += ids
        if self._values is not None and self._index is not None:
            if values.shape[1] and self._values.shape[1] == self.k and (values.max(1) <= self._values[:, -1]).all():
                return
            values = np.concatenate([self._values, values], axis=1)
            index = np.concatenate([self._index, index], axis=1)
        # Of equal values the one that came first stays first.
        order = np.argsort(-values, axis=1, kind="stable")[:, : self.k]
        self._values, self._index = np.take_along_axis(values, order, 1), np.take_along_axis(index, order, 1)

    def table(self) -> TopTable:
        """Give what is kept."""
        if self._values is None or self._index is None:
            return TopTable([], np.empty((0, 0)))
        return TopTable([[self._ids[i] for i in row] for row in self._index], self._values)


def _as_tensor(rows: ndarray) -> Tensor:
    """Wrap rows without a copy; they are only read, so that it does not matter whether they may be written."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable", UserWarning)
        return torch.from_numpy(rows)


def _as_index(sample: ndarray) -> Int64[Tensor, " row"]:
    return torch.from_numpy(sample.astype(np.int64))
