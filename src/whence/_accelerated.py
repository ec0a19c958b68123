"""What the recorder learns from an ``accelerate.Accelerator``, and how the two save and resume together.

accelerate itself is never imported: all is read off the object that a script has made.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, final

from whence._recorder_checks import whole_number
from whence.errors import RecordError


@final
@dataclass(frozen=True)
class Accelerated:
    """One training with accelerate."""

    accelerator: Any
    checkpointing_steps: int | None
    """Rank 0 alone calls ``save_state`` in the scripts; the other ranks know from this when it does."""

    @classmethod
    def of(cls, accelerator: Any, optimizer: Any, settings: Mapping[str, Any]) -> "Accelerated":
        """Check that the accelerator is one, and knows the optimizer where it must.

        Raises:
            RecordError: If it lacks what the recorder reads, or fp16 steps can be skipped without anybody knowing.
        """
        needed = ("process_index", "num_processes", "sync_gradients", "gradient_accumulation_steps", "mixed_precision")
        lacking = [name for name in (*needed, "register_for_checkpointing") if not hasattr(accelerator, name)]
        if lacking:
            raise RecordError(
                f"accelerator must be an accelerate.Accelerator; this {type(accelerator).__name__} has no "
                f"{', '.join(lacking)}."
            )
        if accelerator.mixed_precision == "fp16" and not hasattr(optimizer, "step_was_skipped"):
            raise RecordError(
                "With fp16 some optimizer steps are skipped, which only the optimizer that accelerator.prepare "
                "returned knows. Make the Recorder after accelerator.prepare(...), with that optimizer."
            )
        every = settings.get("checkpointing_steps")
        return cls(accelerator, every if isinstance(every, int) and every > 0 else None)

    def ends_step(self) -> bool:
        """Tell whether the pass under way is the last of its optimizer step."""
        return bool(self.accelerator.sync_gradients)

    def samples_in_step(self, batch_size: int) -> int:
        """Count the samples of an optimizer step of which this pass is a part, as their loss counts in it.

        ``backward`` divides the mean over the batch by the accumulation steps, even where the data end before there
        were so many, and gradients are averaged over the processes.

        Args:
            batch_size: Samples in this pass of this process.

        Returns:
            Batch size x accumulation steps x processes.
        """
        return batch_size * int(self.accelerator.gradient_accumulation_steps) * int(self.accelerator.num_processes)

    def was_skipped(self, optimizer: Any, grad_norm: Any) -> bool:
        """Tell whether the gradient scaler skips the step; the norm says so before the optimizer does."""
        if self.accelerator.mixed_precision != "fp16":
            return False
        return bool(optimizer.step_was_skipped) if grad_norm is None else not math.isfinite(float(grad_norm))

    def saves_after(self, step: int) -> bool:
        """Tell whether rank 0 saves a checkpoint after this step, and others with it."""
        return bool(
            self.accelerator.num_processes > 1 and self.checkpointing_steps and step % self.checkpointing_steps == 0
        )

    def wait(self) -> None:
        """Wait until all processes are here."""
        self.accelerator.wait_for_everyone()


@final
class SavedState:
    """Rides in ``checkpoint-<step>``: saving it closes a part of the record, loading it rewinds the record.

    Args:
        close_part: Writes down the steps so far.
        last_step: Gives the step of the optimizer.
        rewind: Goes back to a step.
    """

    def __init__(self, close_part: Callable[[], None], last_step: Callable[[], int], rewind: Callable[[int], None]):
        self._close_part, self._last_step, self._rewind = close_part, last_step, rewind

    def state_dict(self) -> dict[str, Any]:
        """Close the part; called by ``accelerator.save_state``."""
        self._close_part()
        return {"whence_step": self._last_step()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back to where the checkpoint was saved; called by ``accelerator.load_state``.

        Raises:
            RecordError: If the state is not the recorder's.
        """
        if not isinstance(state, dict) or "whence_step" not in state:
            raise RecordError(
                "The checkpoint's custom state is not that of a Recorder. Resume with the script that saved it: "
                "objects must be registered for checkpointing in the same order."
            )
        self._rewind(whole_number("whence_step", state["whence_step"], 0, 2**32 - 1))
