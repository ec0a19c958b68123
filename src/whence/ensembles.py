"""Ensembles: the mean of the scores that independently trained models give.

The scores of one model are noisy: another seed ranks otherwise. The mean over models is what TRAK (Park et al. 2023,
arXiv:2303.14186) and D-TRAK (Zheng et al. 2024, arXiv:2311.00500) report as *ensembles*. Members may be trained on
random subsets, as theirs are; each then still scores every image, those included that it was not trained on (``images =
"same"``). Methods that follow training itself, such as ReTrac, have no such scores: with ``images = "held"`` the score
of an image is the mean over the members that were trained on it.

Members are read one at a time, twice.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from whence._files import as_json
from whence.config import MemberImages, MemberScale
from whence.errors import ScoresError, check_choice
from whence.scores import Scores, TopScores

_SAME = ("version", "method", "phases", "loss", "weights_name", "parameters", "process", "queries")
"""Details that members must have in common. Checkpoints, records, stores and seeds of the noise may differ."""
_OF_CHECKPOINTS = {"train_norms": np.nan, "train_timesteps": -1, "train_weights": 0, "query_norms": np.nan}
"""Arrays whose first axis is that of the checkpoints, and what stands for an image that a member does not have."""


def ensemble(
    members: Sequence[Scores | TopScores | str | Path], *, scale: MemberScale = "none", images: MemberImages = "same"
) -> Scores:
    """Average the scores of several models.

    Args:
        members: Scores of one method for the same queries, or folders of such; at least two.
        scale: none: scores as they are. unit_mean_square: each member's scores of each query are first divided by their
            root mean square over training images, so that members with larger gradients do not decide; halves by their
            own.
        images: same: all members must score the same training images, matched by their ids. held: each image is
            averaged over the members that have it.

    Returns:
        Scores of the same method. ``values``, ``phases`` and ``halves`` are means, so reliability is that of the mean;
        arrays by checkpoint hold the checkpoints of all members, one member after the other. ``details["ensemble"]``
        names the members by their hashes.

    Raises:
        ScoresError: If there are fewer than two members, one is there twice, they differ in method, queries, or in the
            images where these must be the same, or only the largest scores of one were kept.
    """
    check_choice("scale", scale, MemberScale)
    check_choice("images", images, MemberImages)
    if len(members) < 2:
        raise ScoresError(f"An ensemble has at least two members, found {len(members)}.")
    heads = [_Head.of(_load(member), number) for number, member in enumerate(members, start=1)]
    notes = _check(heads, images)
    ids = tuple(dict.fromkeys(id_ for head in heads for id_ in head.train_ids))
    mean = _Mean(heads[0].num_queries, {id_: column for column, id_ in enumerate(ids)}, scale)
    for member in members:
        mean.add(_load(member))
    first = _load(members[0])
    details = {key: first.details[key] for key in _SAME if key in first.details}
    if "train" in first.details and all(head.details.get("train") == first.details["train"] for head in heads):
        details["train"] = first.details["train"]
    listed = [{"sha256": head.sha256} | _provenance(head.details) for head in heads]
    scaled = "" if scale == "none" else ", each brought to a mean square of 1 for each query"
    return Scores(
        method=first.method,
        query_ids=first.query_ids,
        train_ids=ids,
        **mean.arrays(),
        phase_timesteps=first.phase_timesteps if "phases" in mean.sums else (),
        query_timesteps=first.query_timesteps,
        checkpoint_steps=tuple(step for head in heads for step in head.checkpoint_steps),
        details={
            **details,
            "ensemble": {"members": listed, "scale": scale, "images": images},
            "notes": [f"Scores are the mean of {len(heads)} members{scaled}.", *notes, *_join_notes(heads)],
        },
    )


def _load(member: Scores | TopScores | str | Path) -> Scores:
    if isinstance(member, Scores):
        return member
    if isinstance(member, TopScores) or (Path(member) / "top.json").exists():
        where = member.folder if isinstance(member, TopScores) else member
        raise ScoresError(
            f"{where} holds the largest scores of each query only, and a mean needs all of them. Query again without "
            "top."
        )
    return Scores.load(member)


@dataclass(frozen=True)
class _Head:
    """What is known of a member while its arrays are not in memory."""

    label: str
    method: str
    query_ids: tuple[str, ...]
    train_ids: tuple[str, ...]
    checkpoint_steps: tuple[int, ...]
    axes: tuple[Any, ...]
    """Timesteps of its phases and of its queries."""
    details: dict[str, Any]
    notes: list[str]
    sha256: str

    @property
    def num_queries(self) -> int:
        return len(self.query_ids)

    @classmethod
    def of(cls, scores: Scores, number: int) -> "_Head":
        timesteps = None if scores.query_timesteps is None else tuple(scores.query_timesteps.tolist())
        return cls(
            f"Member {number}" + (f" ({scores.folder})" if scores.folder else ""),
            scores.method,
            scores.query_ids,
            scores.train_ids,
            scores.checkpoint_steps,
            (scores.phase_timesteps, timesteps),
            as_json(scores.details),
            scores.notes,
            scores.content_hash,
        )


def _check(heads: Sequence[_Head], images: MemberImages) -> list[str]:
    """Refuse members that do not belong together; say in notes what could not be compared."""
    first = heads[0]
    seen: dict[str, str] = {}
    by_id_alone = False
    for head in heads:
        if head.sha256 in seen:
            raise ScoresError(f"{head.label} is the same as {seen[head.sha256]}. Give each model once.")
        seen[head.sha256] = head.label
        if head.method != first.method:
            raise ScoresError(f"{head.label} is of {head.method}, {first.label} of {first.method}. Give one method.")
        if head.query_ids != first.query_ids:
            raise ScoresError(
                f"{head.label} has other queries than {first.label}, or in another order. Score each model with the "
                "same queries."
            )
        differing = [key for key in _SAME if head.details.get(key) != first.details.get(key)]
        differing += ["timesteps"] if head.axes != first.axes else []
        if differing:
            found = "; ".join(f"{key}: {head.details.get(key)}, not {first.details.get(key)}" for key in differing)
            raise ScoresError(f"{head.label} was made otherwise than {first.label} ({found}). Score all models alike.")
        by_id_alone |= _check_images(head, first, images)
    return ["Training images of members are matched by their ids alone."] if by_id_alone else []


def _check_images(head: _Head, first: _Head, images: MemberImages) -> bool:
    """Refuse other images than those of the first member; tell whether their pixels could not be compared."""
    if head.train_ids == first.train_ids:
        if head.details.get("train") != first.details.get("train"):
            raise ScoresError(
                f"{head.label} and {first.label} have training images of the same ids with other pixels. Score all "
                "models with the same images."
            )
        return False
    odd = sorted(set(head.train_ids) ^ set(first.train_ids))
    if odd and images == "same":
        raise ScoresError(
            f"{head.label} and {first.label} differ in {len(odd)} training images, such as {odd[0]}. Score each model "
            "with all images, those included that it was not trained on; or, with images='held', average each image "
            "over the members that have it."
        )
    return True


def _provenance(details: dict[str, Any]) -> dict[str, Any]:
    return {
        key: details[key]
        for key in ("checkpoints", "record", "store", "train", "seed", "preconditioners", "ensemble")
        if key in details
    }


def _join_notes(heads: Sequence[_Head]) -> list[str]:
    """Give each note once; say whose it is where it is not everyone's."""
    texts = dict.fromkeys(note for head in heads for note in head.notes)
    owners = {text: [number for number, head in enumerate(heads, start=1) if text in head.notes] for text in texts}
    return [
        text if len(numbers) == len(heads) else f"Of member {', '.join(map(str, numbers))}: {text}"
        for text, numbers in owners.items()
    ]


class _Mean:
    """Adds members up.

    Args:
        num_queries: Queries of each.
        column_of: Column of each training image.
        scale: What scores are divided by.
    """

    def __init__(self, num_queries: int, column_of: dict[str, int], scale: MemberScale):
        self.column_of, self.scale = column_of, scale
        self.sums: dict[str, ndarray] = {"values": np.zeros((num_queries, len(column_of)))}
        self.counts = np.zeros(len(column_of))
        self.facts: dict[str, list[ndarray]] = {name: [] for name in _OF_CHECKPOINTS}
        self.dtypes: list[np.dtype] = []

    def add(self, scores: Scores) -> None:
        """Add a member."""
        columns = np.array([self.column_of[id_] for id_ in scores.train_ids], dtype=np.int64)
        found = {"values": scores.values, "phases": scores.phases, "halves": scores.halves}
        factors = {name: np.ones(()) for name in found}
        if self.scale == "unit_mean_square":
            of_values = _inverse_rms(scores.values)  # query
            factors = {"values": of_values[:, None], "phases": of_values[:, None, None]}
            if scores.halves is not None:
                factors["halves"] = _inverse_rms(scores.halves)[..., None]
        for name, array in found.items():
            if array is None or (name not in self.sums and self.dtypes):  # a member before had none
                self.sums.pop(name, None)
                continue
            total = self.sums.setdefault(name, np.zeros((*array.shape[:-1], len(self.column_of))))
            total[..., columns] += array.astype(np.float64) * factors[name]
        self.counts[columns] += 1
        self.dtypes.append(scores.values.dtype)
        self._add_facts(scores, columns)

    def _add_facts(self, scores: Scores, columns: Int[ndarray, " train"]) -> None:
        for name, absent in _OF_CHECKPOINTS.items():
            array = getattr(scores, name)
            if array is None:
                continue
            if name.startswith("train"):
                whole = np.full((len(array), len(self.column_of)), absent, dtype=array.dtype)
                whole[:, columns] = array
                array = whole
            self.facts[name].append(array)

    def arrays(self) -> dict[str, Any]:
        """Give the means, and what is known of each checkpoint where all members know it."""
        dtype, count = np.result_type(*self.dtypes), len(self.dtypes)
        means = {name: (total / self.counts).astype(dtype) for name, total in self.sums.items()}
        return means | {name: np.concatenate(found) for name, found in self.facts.items() if len(found) == count}


def _inverse_rms(scores: Float[ndarray, "*axes train"]) -> Float[ndarray, "*axes"]:
    """One over the root mean square over training images; 0 where all scores are 0."""
    rms = np.sqrt(np.mean(scores.astype(np.float64) ** 2, axis=-1))
    return np.divide(1.0, rms, out=np.zeros_like(rms), where=rms > 0)
