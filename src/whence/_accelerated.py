"""What the recorder learns from an ``accelerate.Accelerator``, and how the two save and resume together.

accelerate itself is never imported: all is read off the object that a script has made.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, final

import torch

from whence._recorder_checks import whole_number
from whence.errors import RecordError


@final
class Accelerated:
    """One training with accelerate.

    Args:
        accelerator: The script's.
        settings: Such as ``vars(args)``. Rank 0 alone calls ``save_state`` in the scripts; the other ranks know from
            ``checkpointing_steps`` when it does.

    Raises:
        RecordError: If the accelerator lacks what the recorder reads.
    """

    def __init__(self, accelerator: Any, settings: Mapping[str, Any]):
        needed = ("process_index", "num_processes", "sync_gradients", "gradient_accumulation_steps", "mixed_precision")
        lacking = [name for name in (*needed, "register_for_checkpointing") if not hasattr(accelerator, name)]
        if lacking:
            raise RecordError(
                f"accelerator must be an accelerate.Accelerator; this {type(accelerator).__name__} has no "
                f"{', '.join(lacking)}."
            )
        self.accelerator = accelerator
        every = settings.get("checkpointing_steps")
        self._checkpointing_steps = every if isinstance(every, int) and every > 0 else None
        self._norms_as_if_clipped = 0

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

    def measured_norm(self, optimizer: Any, max_norm: float | None) -> float:
        """Measure the norm of the gradients that ``clip_grad_norm_`` is about to clip.

        Args:
            optimizer: Whose parameters' gradients.
            max_norm: What they are clipped to.

        Returns:
            Their norm, without the factor of a gradient scaler.

        Raises:
            RecordError: If there are no gradients, other processes hold a part of them, or they were clipped already.
        """
        kind = str(getattr(self.accelerator, "distributed_type", "")).rpartition(".")[2].upper()
        if kind in ("DEEPSPEED", "FSDP", "MEGATRON_LM"):
            raise RecordError(
                f"Under {kind} each process holds a part of the gradients. Give step() the norm that "
                "accelerator.clip_grad_norm_ returned."
            )
        grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if not grads:
            raise RecordError(
                "There are no gradients to measure. Call step() right after accelerator.backward(loss), or give it the "
                "norm that clip_grad_norm_ returned."
            )
        scaler = getattr(self.accelerator, "scaler", None)
        scale = float(scaler.get_scale()) if scaler is not None and scaler.is_enabled() else 1.0
        # As clip_grad_norm_ does it: the norm of the norms.
        device = grads[0].device
        norm = float(torch.stack([torch.linalg.vector_norm(g).to(device) for g in grads]).norm()) / scale
        # One norm may happen to be the bound, three in a row were made so.
        clipped = max_norm is not None and abs(norm - max_norm) <= 1e-4 * max_norm
        self._norms_as_if_clipped = self._norms_as_if_clipped + 1 if clipped else 0
        if self._norms_as_if_clipped >= 3:
            raise RecordError(
                f"Gradients have had the norm {max_norm} three times, so they were clipped before step() looked. Call "
                "it right after accelerator.backward(loss), or give it the norm that clip_grad_norm_ returned."
            )
        return norm

    def norm_and_skip(self, optimizer: Any, grad_norm: Any, max_norm: float | None) -> tuple[Any, bool]:
        """Fill in the norm of the gradients where it is needed, and tell whether the gradient scaler skips the step.

        Args:
            optimizer: The optimizer.
            grad_norm: What the script knows; it is believed.
            max_norm: What gradients are clipped to.

        Returns:
            The norm, None where nobody needs it; and whether the step is skipped.
        """
        scaled = self.accelerator.mixed_precision == "fp16"
        found = grad_norm
        if found is None and (scaled or max_norm is not None):
            found = self.measured_norm(optimizer, max_norm)
        skipped = scaled and found is not None and not math.isfinite(float(found))
        return (found if grad_norm is None and max_norm is not None else grad_norm), skipped

    def saves_after(self, step: int) -> bool:
        """Tell whether rank 0 saves a checkpoint after this step, and others with it."""
        every = self._checkpointing_steps
        return bool(self.accelerator.num_processes > 1 and every and step % every == 0)

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
