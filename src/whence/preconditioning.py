"""Preconditioners of a store: made of its rows once at each checkpoint, kept, and used for any number of queries.

A sample's gradient is the sum of its rows that a method reads (:class:`whence.row_products.Reading`). Query vectors are
multiplied with the preconditioner before they meet the rows, so that all that streams stays as it is; what comes after
is one factor for each sample.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float64
from numpy import ndarray
from torch import Tensor

from whence._array_files import read_arrays, write_arrays
from whence._files import sha256_of_json
from whence.assembly import inverse
from whence.curvature.ridge import DampingChoice, Ridge
from whence.errors import StoreError
from whence.methods.frame import Method, RidgeInverse
from whence.row_products import Reading
from whence.shards import Shard

ERROR = "error"
"""Column of a store: root mean square error of the prediction at the row's events."""


@dataclass(frozen=True)
class Preconditioner:
    """What stands between queries and the samples of a store at one checkpoint, for one method."""

    ridge: Ridge
    damping: float
    """In multiples of the mean eigenvalue."""
    choice: DampingChoice | None
    """How it was chosen; None where it was given."""

    def describe(self) -> dict[str, Any]:
        """Say in plain values which damping it is and what it was chosen among."""
        found = {"damping": self.damping, "mean_eigenvalue": self.ridge.mean_eigenvalue}
        return found | ({} if self.choice is None else {"tried": self.choice.dampings, "errors": self.choice.errors})


def prepare_preconditioner(shards: Sequence[Shard], reading: Reading, method: Method, cache: Path) -> Preconditioner:
    """Make the preconditioner of a method at one checkpoint, or read it.

    Args:
        shards: All shards of the checkpoint.
        reading: Which rows stand for a sample.
        method: It has a preconditioner.
        cache: Folder in which it is kept.

    Returns:
        The preconditioner.
    """
    assert isinstance(method.precondition, RidgeInverse)
    made = _Decomposition(shards, reading, cache)
    if method.precondition.damping != "gcv":
        return Preconditioner(made.ridge, method.precondition.damping, None)
    return Preconditioner(made.ridge, made.choice.chosen, made.choice)


def factors_after(
    method: Method, preconditioner: Preconditioner | None, reading: Reading, arrays: Mapping[str, ndarray], count: int
) -> Float64[ndarray, " sample"]:
    """Give what the scores of a shard's samples are multiplied with at last.

    Args:
        method: The method.
        preconditioner: That of the checkpoint, if the method has one.
        reading: Which rows stand for a sample.
        arrays: Those of the shard.
        count: Samples of the shard.

    Returns:
        The factors; 0 for a sample whose gradient is 0.

    Raises:
        StoreError: If the store lacks what the method needs.
    """
    if method.after == "none":
        return np.ones(count)
    sums = reading.sums(arrays, count)
    if method.after == "length":
        return inverse(torch.linalg.vector_norm(sums, dim=1, dtype=torch.float64).numpy())
    assert preconditioner is not None  # checked where the method is declared
    found = preconditioner.ridge.leverages(sums, preconditioner.damping)
    if method.after == "theta_relative":
        return inverse(found.length.numpy())
    if method.after == "l_relative":
        return inverse(found.leverage.sqrt().numpy())
    if ERROR not in arrays:
        raise StoreError(
            f"{method.name} needs the errors of the predictions for training images, which this store lacks: its rows "
            "are sums, or it was made by an earlier version. Make one with `whence index` and keep='units'."
        )
    squares = np.bincount(arrays["sample"], arrays[ERROR].astype(np.float64) ** 2, count)
    error = np.sqrt(squares * inverse(np.bincount(arrays["sample"], minlength=count).astype(np.float64)))
    return error / (1 - found.leverage.numpy())


class _Decomposition:
    """The eigenvectors of a checkpoint's gradients, and the errors of cross-validation; each made when first needed."""

    def __init__(self, shards: Sequence[Shard], reading: Reading, cache: Path):
        self.shards, self.reading = shards, reading
        key = sha256_of_json([[shard.sha256 for shard in shards], asdict(reading)])[:16]
        self.folder = cache / key

    @cached_property
    def ridge(self) -> Ridge:
        """The decomposition."""
        width, path = self.shards[0].read("rows").shape[1], self.folder / "ridge.safetensors"
        num_samples = sum(sum(s.row_counts) if self.reading.meet_at else len(s.ids) for s in self.shards)
        if not path.exists():
            made = Ridge.of(self._blocks, num_samples, width)
            write_arrays(path, {"eigenvalues": made.eigenvalues.numpy(), "basis": made.basis.numpy()})
            return made
        arrays = {name: torch.from_numpy(array) for name, array in read_arrays(path).items()}
        return Ridge(arrays["eigenvalues"], arrays["basis"], width, num_samples)

    @cached_property
    def choice(self) -> DampingChoice:
        """The damping of the smallest error."""
        path = self.folder / "damping.safetensors"
        if not path.exists():
            choice = self.ridge.choose_damping(self._blocks)
            write_arrays(path, {"dampings": np.array(choice.dampings), "errors": np.array(choice.errors)})
        arrays = read_arrays(path)
        dampings = tuple(arrays["dampings"].tolist())
        return DampingChoice(dampings[int(arrays["errors"].argmin())], dampings, tuple(arrays["errors"].tolist()))

    def _blocks(self) -> Iterator[Float[Tensor, "sample width"]]:
        for shard in self.shards:
            yield self.reading.sums(shard.read_all(), len(shard.ids))
