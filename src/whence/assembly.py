"""From inner products with query vectors to scores: what the streaming and the stored way to a score share.

Each query has a run of vectors, family by family, in the order that ``whence.grid_sums`` gives; here the phases and
halves of a method are read off the products with them, and results of checkpoints and blocks are joined.
"""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Float, Float64
from numpy import ndarray
from torch import Tensor

from whence.grid_sums import num_vectors
from whence.methods.frame import Method
from whence.scores import Scores
from whence.workload import Workload, family_of

FACTS = "facts:"
"""Begins the names of what is said about preconditioners in a tile; no method's name has a colon."""


def inverse(lengths: ndarray) -> ndarray:
    """One over a length; 0 for a gradient of zero, which stays zero."""
    return np.divide(1.0, lengths, out=np.zeros_like(lengths), where=lengths > 0)


def split_products(
    work: Workload,
    method: Method,
    products: Float64[ndarray, "train query vector"],
    lengths: Float64[ndarray, "query length"],
) -> tuple[Float64[ndarray, "query phase train"], Float64[ndarray, "half query train"] | None]:
    """Read phases and halves off a method's family of vectors.

    Args:
        work: Which families there are, how many phases are in a meeting, and whether there are halves.
        method: One of its methods.
        products: Products of training images with all vectors.
        lengths: Lengths of each query's whole sum and of its halves, in the family ``none``.

    Returns:
        Scores by phase, and by half.
    """
    num_phases = work.phases_at_once
    family = family_of(method.query.unit)
    before = work.query_families[: work.query_families.index(family)]
    start = sum(num_vectors(f, num_phases, work.halves) for f in before)
    phases = products[:, :, start : start + num_phases]
    scale = inverse(lengths) if method.query.unit == "sample" else np.ones_like(lengths)
    by_phase = np.moveaxis(phases * scale[:, :1], 0, -1)
    if not work.halves:
        return by_phase, None
    half_a = products[:, :, start + num_phases]
    half_b = 2 * phases.sum(2) - half_a if family == "none" else products[:, :, start + num_phases + 1]
    return by_phase, np.stack([(half_a * scale[:, 1]).T, (half_b * scale[:, 2]).T])


def sample_lengths(work: Workload, vectors: Float[Tensor, "vector number"]) -> list[float]:
    """Give the lengths of a query's whole sum and of its halves in the family ``none``; zeros where that is not."""
    if work.query_families[0] != "none":
        return [0.0, 0.0, 0.0]
    whole = vectors[: work.phases_at_once].sum(0)
    half_a = vectors[work.phases_at_once] if work.halves else whole
    return [float(torch.linalg.vector_norm(v, dtype=torch.float64)) for v in (whole, half_a, 2 * whole - half_a)]


def join_meetings(work: Workload, parts: Iterable[Mapping[str, ndarray]]) -> dict[str, ndarray]:
    """Join what was computed at each timestep of the queries: phases gather theirs, halves add up.

    Args:
        work: Timesteps and phases.
        parts: In the order of the timesteps; the arrays of :func:`make_scores`, of one phase, and ``train_counts``, the
            events of each training image.

    Returns:
        The same arrays of all timesteps.
    """
    joined: dict[str, ndarray] = {}
    added: list[str] = []
    query_norms = []
    for points, part in zip(work.meetings, parts, strict=True):
        query_norms.append(part["query_norms"])
        squares = np.where(part["train_counts"] > 0, part["train_norms"], 0) ** 2 * part["train_counts"]
        if not joined:
            num_query, _, num_train = part["phases"].shape
            added = [name for name in ("halves", "train_counts") if name in part]
            joined = {**part, **{name: np.zeros_like(part[name]) for name in added}}
            joined |= {"phases": np.zeros((num_query, work.phases, num_train)), "train_squares": np.zeros(num_train)}
        joined["phases"][:, work.phases_of(points)] += part["phases"]
        joined["train_squares"] += squares
        for name in added:
            joined[name] += part[name]
        for name in [name for name in part if name.startswith(FACTS)]:
            joined[name] = np.maximum(joined[name], part[name])
    with np.errstate(invalid="ignore"):  # 0 / 0
        joined["train_norms"] = np.sqrt(joined["train_squares"] / joined["train_counts"])
    return joined | {"query_norms": np.concatenate(query_norms, axis=1)}


def make_scores(
    work: Workload,
    method: Method,
    totals: Mapping[str, ndarray],
    per_checkpoint: Sequence[Mapping[str, ndarray]],
) -> Scores:
    """Bring what was computed for a method into the form of scores.

    Args:
        work: Queries, training images, checkpoints, phases.
        method: One of its methods.
        totals: ``phases`` (query, phase, train), and ``halves`` (half, query, train) if there are such, added up over
            the checkpoints.
        per_checkpoint: ``query_norms`` (query, timestep), ``train_norms``, ``train_weights`` and, if there is such,
            ``train_timesteps`` (train,).

    Returns:
        The scores.
    """
    dtype = np.dtype(work.settings.dtype)

    def stack(name: str) -> ndarray | None:
        found = [arrays[name] for arrays in per_checkpoint if name in arrays]
        return np.stack(found) if found else None

    phases, halves = totals["phases"], totals.get("halves")
    timesteps = work.query_timesteps
    phase_of = np.arange(len(timesteps)) * work.phases // len(timesteps)
    num_phases = 0 if method.squared else work.phases  # squares of the parts do not add up
    return Scores(
        method=method.name,
        query_ids=work.queries.ids,
        train_ids=work.subject.train.ids,
        values=(phases.sum(1) ** 2 if method.squared else phases.sum(1)).astype(dtype),
        phases=None if method.squared else phases.astype(dtype),
        phase_timesteps=tuple(
            (int(timesteps[phase_of == p][0]), int(timesteps[phase_of == p][-1])) for p in range(num_phases)
        ),
        halves=None if halves is None else (halves**2 if method.squared else halves).astype(dtype),
        train_norms=stack("train_norms"),
        train_timesteps=stack("train_timesteps"),
        train_weights=stack("train_weights"),
        query_norms=stack("query_norms"),
        query_timesteps=timesteps,
        checkpoint_steps=tuple(c.step for c in work.checkpoints),
    )
