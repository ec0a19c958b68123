"""Draws of the optimizer step under way: the keys of its visits, and what is drawn of a batch before its noise."""

from collections import Counter
from collections.abc import Sequence
from typing import Any, final

from whence.diffusion.noise import visit_key
from whence.errors import RecordError


@final
class StepDraws:
    """The visits of one process in one optimizer step after the other.

    Args:
        seed: Seed of the training.
        rank: Number of the process.
    """

    def __init__(self, seed: int, rank: int):
        self._seed, self._rank = seed, rank
        self._occurrences: Counter[str] = Counter()
        self._prepared: dict[tuple[str, ...], dict[str, Any]] = {}

    def keys(self, sample_ids: Sequence[str], step: int) -> list[int]:
        """Give the noise keys of a batch that is not yet counted."""
        seen = self._occurrences.copy()
        keys = []
        for sample_id in sample_ids:
            keys.append(visit_key(self._seed, sample_id, step, self._rank, seen[sample_id]))
            seen[sample_id] += 1
        return keys

    def count(self, sample_ids: Sequence[str]) -> None:
        """Note that a batch was drawn: further visits of its samples in this step have other keys."""
        self._occurrences.update(sample_ids)

    def end_step(self) -> None:
        """Begin with the next optimizer step."""
        self._occurrences.clear()

    def prepared(self, sample_ids: Sequence[str]) -> dict[str, Any]:
        """Give the place for what is drawn of a batch before its noise, by name."""
        return self._prepared.setdefault(tuple(sample_ids), {})

    def take_prepared(self, sample_ids: Sequence[str]) -> dict[str, Any]:
        """Take out what was drawn of a batch before its noise.

        Raises:
            RecordError: If that was done for another batch.
        """
        if self._prepared and tuple(sample_ids) not in self._prepared:
            raise RecordError(
                "flip(), latents() or drop() was called with other ids than draw(). Call all with the same batch."
            )
        return self._prepared.pop(tuple(sample_ids), {})
