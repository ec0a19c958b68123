"""The replay check: does the record explain the losses that training saw?

Every visit's noise key, timestep and flip must be what its seed, step and id give; and the losses of the first
optimizer step after each checkpoint, computed anew at that checkpoint, must equal the recorded ones to the precision of
their type. One altered key, flip, weight or image, an exchanged caption or a stale latent makes it fail.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from diffusers.models.embeddings import LabelEmbedding
from torch import nn

from whence.checkpoints import Checkpoint, check_files, load_model
from whence.diffusion.adapters import check_model, predict
from whence.diffusion.noise import drawn_flip, is_withheld, visit_key
from whence.diffusion.objectives import sample_loss
from whence.diffusion.process import NoiseProcess
from whence.event_table import make_batch
from whence.precision import autocast, tensor_float_32
from whence.record import Record, Visits
from whence.subject import Subject
from whence.training import check_device

TOLERANCE = {"no": 1e-5, "fp16": 1e-2, "bf16": 5e-2}
"""Relative difference of a loss that is put down to rounding, by autocast type."""

Verdict = Literal["passed", "failed", "not checkable"]


@dataclass(frozen=True)
class CheckRow:
    """Verdict on one part of a run."""

    what: str
    verdict: Verdict
    checked: int
    """Visits looked at."""
    detail: str


def check_run(subject: Subject, *, device: str = "cpu") -> list[CheckRow]:
    """Check the keys of all visits, then replay one optimizer step at each checkpoint.

    Files are compared with their checksums when they are opened, which raises on its own.

    Args:
        subject: A run with a record; opening it has compared the images with the record.
        device: Torch device.

    Returns:
        One row for the keys, one per checkpoint.
    """
    check_device(device)
    record, replays = subject.record, subject.replays
    assert record is not None and replays is not None  # the caller has opened a record
    return [_check_keys(record, subject.process)] + [
        _replay(subject, checkpoint, device) for checkpoint in subject.checkpoints
    ]


def _check_keys(record: Record, process: NoiseProcess) -> CheckRow:
    faults = []
    seed, drawn_by_key = record.manifest["seed"], bool(record.visits.flip.any())
    dropout = _caption_dropout(record)
    for visits in (record.visits, record.probes):
        seen: Counter[tuple[int, int, str]] = Counter()
        for i in range(len(visits)):
            sample_id, step = record.sample_ids[visits.sample[i]], int(visits.step[i])
            rank = int(visits.rank[i])
            key = visit_key(seed, sample_id, step, rank, seen[rank, step, sample_id])
            seen[rank, step, sample_id] += 1
            timestep = process.drawn_timestep(key)
            if key != visits.noise_key[i] or timestep != visits.timestep[i]:
                faults.append(f"step {step}, {sample_id}: key or timestep")
            elif drawn_by_key and bool(visits.flip[i]) != drawn_flip(key):
                faults.append(f"step {step}, {sample_id}: flip")
            elif dropout is not None and bool(visits.condition_dropped[i]) != is_withheld(key, dropout):
                faults.append(f"step {step}, {sample_id}: withheld caption or label")
    checked = len(record.visits) + len(record.probes)
    if faults:
        return CheckRow("keys", "failed", checked, f"{len(faults)} visits differ, for example {'; '.join(faults[:3])}")
    return CheckRow("keys", "passed", checked, "every key, timestep and flip follows from seed, step and id")


def _caption_dropout(record: Record) -> float | None:
    """Share of visits whose caption ``whence train`` withheld; None where others trained, in their own way."""
    config = record.manifest["config"]
    model = config.get("model")
    return config.get("caption_dropout") if isinstance(model, dict) and "condition" in model else None


def _replay(subject: Subject, checkpoint: Checkpoint, device: str) -> CheckRow:
    record = subject.record
    assert record is not None
    what = f"checkpoint {checkpoint.step}"
    visits = record.visits_of_step(checkpoint.step + 1)
    if not np.isfinite(visits.loss).any():
        return CheckRow(what, "not checkable", 0, f"no pass of step {checkpoint.step + 1} is on record with its losses")
    check_files(checkpoint)
    model = load_model(checkpoint, allow_pickle=subject.allow_pickle, device=device)
    check_model(model)
    if any(isinstance(m, nn.Dropout) and m.p > 0 for m in model.modules()):
        return CheckRow(what, "not checkable", len(visits), "the model has dropout, whose draws are not on record")
    if any(isinstance(m, LabelEmbedding) and m.dropout_prob > 0 for m in model.modules()):
        return CheckRow(what, "not checkable", len(visits), "the model withholds labels itself, at random")
    precision = record.manifest["mixed_precision"]
    if precision not in TOLERANCE:
        return CheckRow(what, "not checkable", len(visits), f"mixed precision {precision!r} cannot be replayed")
    # On a GPU PyTorch's own default is TensorFloat32 in convolutions: training may have had it or not.
    ways = [False] if torch.device(device).type == "cpu" else [False, True]
    replayed = [_losses(subject, model.train(), visits, device, tf32=tf32) for tf32 in ways]
    told = np.isfinite(visits.loss)  # a script may tell the losses of a step's last pass alone
    visits, replayed = visits.where(told), [losses[told] for losses in replayed]
    found = min(replayed, key=lambda losses: np.abs(losses - visits.loss).max())
    difference = np.abs(found - visits.loss) / np.maximum(np.abs(visits.loss), 1e-3)
    worst = int(np.argmax(difference))
    detail = f"largest relative difference of a loss {difference[worst]:.1e}, allowed {TOLERANCE[precision]:.0e}"
    if difference[worst] <= TOLERANCE[precision]:
        return CheckRow(what, "passed", len(visits), detail)
    sample_id = record.sample_ids[visits.sample[worst]]
    detail += f"; at {sample_id} the record says {visits.loss[worst]:.6f}, the replay gives {found[worst]:.6f}"
    return CheckRow(what, "failed", len(visits), detail)


def _losses(subject: Subject, model: Any, visits: Visits, device: str, *, tf32: bool) -> np.ndarray:
    """Repeat the forward passes of one step, with the same batches."""
    assert subject.replays is not None and subject.record is not None
    losses = []
    # Visits are in this order, so their losses are too.
    for micro_batch, rank in sorted({*zip(visits.micro_batch.tolist(), visits.rank.tolist(), strict=True)}):
        table = subject.replays.table(visits.where((visits.micro_batch == micro_batch) & (visits.rank == rank)))
        batch = make_batch(table, subject.train, subject.process, device=device)
        with torch.no_grad(), autocast(subject.record.manifest["mixed_precision"], device), tensor_float_32(tf32):
            prediction = predict(model, batch.noisy, batch.times, batch.conditions)
        loss = sample_loss(prediction.float(), batch.target, subject.loss) * batch.loss_weight
        losses.append(loss.cpu().numpy())
    return np.concatenate(losses)
