"""A forward pass under way: what was drawn for it, until its losses are known and it becomes rows of the record."""

import math
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from whence._recorder_checks import checked_losses, checked_weights
from whence.errors import NumericsError, RecordError


@final
@dataclass
class Pass:
    """One batch of one process."""

    ids: list[str]
    drawn: dict[str, list[Any]]
    """Columns of the record that are known before the pass."""
    weight: Tensor
    """Factor of each sample's loss by the objective of the training."""
    weight_of_elements: Tensor
    """The same for losses given by element, which have been compared as clean images where the objective says so."""
    noise_of_input: Tensor
    """What the noisy image is made of."""
    asks_for_input: bool
    """Whether that is other noise than the target's, and nobody has asked for it yet."""
    with_prior: bool
    """Whether the second half of the batch are class images."""

    def rows(self, loss: Tensor, loss_weight: Any, *, step: int, micro_batch: int) -> dict[str, list[Any]]:
        """Close the pass.

        Args:
            loss: One loss per sample with its weight, or the losses of all elements without.
            loss_weight: Weights to write down instead of the objective's.
            step: Optimizer step, for messages.
            micro_batch: Number of the pass in it.

        Returns:
            Columns of the record, and ids.

        Raises:
            RecordError: If the losses or weights are not of the batch, or the noisy image cannot be what is recorded.
            NumericsError: If a loss is not finite.
        """
        if self.asks_for_input:
            raise RecordError(
                "Under input_perturbation the noisy image takes other noise than the target. Make it of "
                "recorder.noise_of_input(), which must be called between draw() and step()."
            )
        weight = self.weight if loss_weight is None else checked_weights(loss_weight, len(self.ids))
        of_elements = self.weight_of_elements if loss_weight is None else weight
        losses = checked_losses(loss, of_elements, self.noise_of_input.shape, self.with_prior)
        if not losses.isfinite().all():
            bad = [i for i, ok in zip(self.ids, losses.isfinite().tolist(), strict=True) if not ok]
            raise NumericsError(
                f"The loss is not finite at step {step} for sample {', '.join(bad[:5])}. "
                "Lower the learning rate, or look at these images."
            )
        return self._rows(losses, weight, micro_batch)

    def rows_without_loss(self, micro_batch: int) -> dict[str, list[Any]]:
        """Close the pass where a script tells the losses of a step's last pass alone."""
        return self._rows(torch.full((len(self.ids),), math.nan), self.weight, micro_batch)

    def _rows(self, losses: Tensor, weight: Tensor, micro_batch: int) -> dict[str, list[Any]]:
        count = len(self.ids)
        of_pass = {"micro_batch": [micro_batch] * count, "slot": list(range(count))}
        told = {"loss": losses.tolist(), "loss_weight": weight.tolist()}
        return {"ids": list(self.ids)} | self.drawn | of_pass | told
