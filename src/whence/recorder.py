"""The recorder: four lines in anybody's training loop that make it exactly attributable.

    recorder = Recorder(run, scheduler=noise_scheduler, optimizer=optimizer, config=vars(args))   # once
    noise, timesteps = recorder.draw(ids, like=images)                                           # in each step
    recorder.step(loss_per_sample, grad_norm)                                                    # before the lr steps
    recorder.save(model)                                                                         # now and then

The recorder draws noise and timesteps itself, from keys (``whence.diffusion.noise``), so that they can be drawn again.
What it writes is described in ``whence.record`` and ``whence.checkpoints``.
"""

import math
import platform
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from whence._files import write_json
from whence._recorder_checks import (
    MAX_UINT16,
    MAX_UINT32,
    PRECISIONS,
    check_batch,
    check_floating,
    checked_crops,
    checked_dropped,
    checked_ids,
    checked_norm,
    checked_optimizer,
    checked_weights,
    known_name,
    whole_number,
)
from whence.checkpoints import Checkpoint, save_checkpoint
from whence.config import LossName, ObjectiveSettings
from whence.diffusion.noise import drawn_drop, drawn_flip, noise_key
from whence.diffusion.process import NoiseProcess
from whence.errors import InUseError, NumericsError, RecordError
from whence.record import FORMAT_VERSION, PartWriter, read_manifest


class Recorder:
    """Draws the randomness of training and writes down, for each visit of a sample, all that is needed to replay it.

    Args:
        folder: The run; ``record/`` and ``checkpoints/`` are made in it.
        scheduler: The ``diffusers`` noise scheduler of the training.
        optimizer: Its optimizer; the learning rate is read from its first parameter group.
        config: Settings of the training, kept in the manifest: a mapping or a dataclass. ``seed``, ``max_grad_norm``,
            ``loss`` and ``mixed_precision`` are taken from it where it has them. Entries whose name speaks of a token,
            secret, password or API key are left out.
        seed: Seed of noise, timesteps and flips. Default: the config's, else 0.
        max_grad_norm: Norm to which gradients are clipped. Default: the config's, else none.
        loss: ``mse`` or ``l1``. Default: the config's, else mse, as in the training scripts of ``diffusers``.
        objective: What the training adds to noise and loss. Default: read off the config, by the names of the flags of
            the training scripts of ``diffusers``.
        data_fingerprint: Fingerprint of the training images, so that others cannot be taken for them.
        rank: Number of this process, where several train together.
        resume_from: Step of the checkpoint that training goes on from; parts beyond it are moved aside. 0 starts over.
        same_config: Also refuse to go on with another ``config``; otherwise only what a replay depends on must agree.

    Raises:
        RecordError: If the folder holds a record and ``resume_from`` is not given, or one made with other settings; or
            a setting is none that can be recorded.
        InUseError: If another process is recording into the folder.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        scheduler: Any,
        optimizer: torch.optim.Optimizer,
        config: Any,
        seed: int | None = None,
        max_grad_norm: float | None = None,
        loss: LossName | None = None,
        objective: ObjectiveSettings | None = None,
        data_fingerprint: str | None = None,
        rank: int = 0,
        resume_from: int | None = None,
        same_config: bool = False,
    ):
        self.folder = Path(folder)
        self.scheduler = scheduler
        self.optimizer = checked_optimizer(optimizer)
        settings = _as_dict(config)
        self.process = NoiseProcess.from_scheduler(scheduler, objective or objective_of(settings))
        self.rank = whole_number("rank", rank, 0, MAX_UINT16)
        self._same_config = same_config
        self.seed = whole_number("seed", _first(seed, settings.get("seed"), 0), -(2**63), 2**64 - 1)
        self.max_grad_norm = checked_norm(_first(max_grad_norm, settings.get("max_grad_norm")))
        self.manifest = {
            "format_version": FORMAT_VERSION,
            "seed": self.seed,
            "max_grad_norm": self.max_grad_norm,
            "loss": known_name("loss", _first(loss, settings.get("loss"), "mse"), LossName),
            "mixed_precision": known_name("mixed_precision", settings.get("mixed_precision") or "no", PRECISIONS),
            "prediction_type": self.process.prediction_type,
            "scheduler": _describe_scheduler(scheduler),
            "data_fingerprint": data_fingerprint,
            "config": _plain(_without_secrets(settings)),
            "versions": _versions(),
        } | _of_objective(self.process)
        self._lock = filelock.FileLock(self.folder / f".recorder-{rank}.lock", timeout=0)
        self._parts = self._claim_folder(resume_from)
        self.last_step = resume_from or 0
        self._open: dict[str, Any] | None = None
        self._step_rows: list[dict[str, Any]] = []
        self._part_rows: list[dict[str, Any]] = []
        self._occurrences: Counter[str] = Counter()
        self._flips: dict[tuple[str, ...], Bool[np.ndarray, " event"]] = {}

    def flip(self, ids: Iterable[Any], images: Float[Tensor, "event *shape"]) -> Float[Tensor, "event *shape"]:
        """Mirror about half of the images left to right, by their keys.

        Call it before :meth:`draw` with the same ids.

        Returns:
            The images, some of them mirrored.

        Raises:
            RecordError: If an id is neither a whole number nor printable text, or ids and images differ in number.
        """
        sample_ids = checked_ids(ids)
        check_batch("flip()", sample_ids, images)
        flips = np.array([drawn_flip(key) for key in self._keys(sample_ids)], dtype=bool)
        self._flips[tuple(sample_ids)] = flips
        return flip_where(images, torch.from_numpy(flips))

    def drop(self, ids: Iterable[Any], probability: float) -> Bool[Tensor, " event"]:
        """Choose, by their keys, the samples whose caption or label is withheld.

        Call it before :meth:`draw` with the same ids, and give it the mask as ``condition_dropped``.

        Args:
            ids: Stable ids of the samples, in the order of the batch.
            probability: Share of visits that withhold it.

        Returns:
            True where it is withheld.

        Raises:
            RecordError: If an id cannot be one, or the probability is not 0 to 1.
        """
        if not 0 <= probability <= 1:
            raise RecordError(f"The probability of drop() must be 0 to 1; found {probability}.")
        keys = self._keys(checked_ids(ids))
        return torch.tensor([drawn_drop(key, probability) for key in keys])

    def draw(
        self,
        ids: Iterable[Any],
        like: Float[Tensor, "event *shape"],
        *,
        crops: Int[Tensor, "event 2"] | None = None,
        condition_dropped: Bool[Tensor, " event"] | None = None,
    ) -> tuple[Float[Tensor, "event *shape"], Shaped[Tensor, " event"]]:
        """Draw noise and timesteps for one forward pass.

        Args:
            ids: Stable ids of the samples, in the order of the batch. Text or integers.
            like: The clean images or latents: shape, type and device of the noise.
            crops: Top and left of random crops made by the caller, to be written down.
            condition_dropped: Captions or labels withheld by the caller, to be written down.

        Returns:
            The noise, with the shift of a noise offset in it; and the times at which it is added, as the scheduler
            counts them: timesteps 0..T-1, uniformly drawn, or those of a flow-matching scheduler, from the density of
            the config's ``weighting_scheme``.

        Raises:
            RecordError: If ids and images differ in number, what is given cannot be written down, or the pass before
                was not closed.
        """
        sample_ids = checked_ids(ids)
        check_batch("draw()", sample_ids, like)
        check_floating(like)
        tops_lefts = checked_crops(crops, len(sample_ids))
        dropped = checked_dropped(condition_dropped, len(sample_ids))
        if self._open is not None:
            raise RecordError("draw() was called twice; close the first pass with step(), accumulate() or probe().")
        if self._flips and tuple(sample_ids) not in self._flips:
            raise RecordError("flip() was called with other ids than draw(). Call both with the same batch.")
        keys = self._keys(sample_ids)
        self._occurrences.update(sample_ids)
        timesteps = torch.tensor([self.process.drawn_timestep(key) for key in keys], dtype=torch.long)
        times = self.process.times(timesteps)
        self._open = {
            "ids": sample_ids,
            "noise_key": keys,
            "model_time": times.tolist(),
            "sigma": self.process.sigma[timesteps].tolist(),
            "own_weight": self.process.loss_weight[timesteps].tolist(),
            "flip": self._flips.pop(tuple(sample_ids), np.zeros(len(keys), dtype=bool)).tolist(),
            "crop_top": tops_lefts[:, 0].tolist(),
            "crop_left": tops_lefts[:, 1].tolist(),
            "condition_dropped": dropped.tolist(),
        }
        noise, self._seen_noise = (
            torch.from_numpy(n).to(like) for n in self.process.noise(keys, tuple(like.shape[1:]))
        )
        return noise, times.to(like.device)

    def accumulate(self, loss_per_sample: Float[Tensor, " event"], *, loss_weight: Any = None) -> None:
        """Close a forward pass that is not the last of its optimizer step (gradient accumulation)."""
        self._step_rows.append(self._close(loss_per_sample, loss_weight, micro_batch=len(self._step_rows)))

    def step(
        self,
        loss_per_sample: Float[Tensor, " event"],
        grad_norm: Tensor | float | None = None,
        *,
        loss_weight: Float[Tensor, " event"] | None = None,
        samples_in_step: int | None = None,
        skipped: bool = False,
    ) -> None:
        """Close the last forward pass of an optimizer step. Call it before the learning-rate scheduler steps.

        Args:
            loss_per_sample: Losses whose mean is minimised, their weight included; not yet averaged over the batch.
            grad_norm: Gradient norm before clipping, as ``clip_grad_norm_`` returns it.
            loss_weight: Factor inside each loss. Default: that of the objective (``snr_gamma``, ``weighting_scheme``,
                ``precondition_outputs``), 1 without one.
            samples_in_step: Samples in the optimizer step over all processes. Default: those of this process.
            skipped: The optimizer did not step (a gradient scaler found infinite gradients); the visits count nothing.

        Raises:
            RecordError: If there was no :meth:`draw`, the losses or their weights are not one per sample, or a gradient
                norm comes without the norm it is clipped to.
            NumericsError: If a loss or the gradient norm is not finite.
        """
        if samples_in_step is not None:
            samples_in_step = whole_number("samples_in_step", samples_in_step, 1, MAX_UINT32)
        clip_coefficient = 0.0 if skipped else self._clip_coefficient(grad_norm)
        self.accumulate(loss_per_sample, loss_weight=loss_weight)
        if not math.isfinite(clip_coefficient):
            raise NumericsError(
                f"The gradient norm at step {self.last_step + 1} is {float(grad_norm or 0)}, though all losses are "
                "finite. Lower the learning rate; if a gradient scaler skipped the step, pass skipped=True."
            )
        self.last_step += 1
        learning_rate = self._learning_rate()
        num_samples = samples_in_step or sum(len(rows["ids"]) for rows in self._step_rows)
        for rows in self._step_rows:
            self._part_rows.append(
                rows
                | _constant(
                    len(rows["ids"]),
                    step=self.last_step,
                    learning_rate=learning_rate,
                    clip_coefficient=clip_coefficient,
                    samples_in_step=num_samples,
                )
            )
        self._step_rows = []
        self._occurrences.clear()

    def probe(self, loss_per_sample: Float[Tensor, " event"], *, loss_weight: Any = None) -> None:
        """Close a forward pass that trains nothing, after the last checkpoint, so that it can be checked too."""
        rows = self._close(loss_per_sample, loss_weight, micro_batch=0)
        num_samples = len(rows["ids"])
        rows |= _constant(
            num_samples, step=self.last_step + 1, learning_rate=0.0, clip_coefficient=0.0, samples_in_step=num_samples
        )
        self._append([rows], kind="probe")
        self._occurrences.clear()

    def has_probe(self) -> bool:
        """Tell whether the step after the last one was probed already."""
        return self._parts.has_probe(self.last_step + 1)

    def save(
        self,
        model: Any,
        *,
        ema: Any = None,
        resume_tensors: dict[str, dict[str, Tensor]] | None = None,
        resume_state: dict[str, Any] | None = None,
        files: Mapping[str, Any] | None = None,
    ) -> Checkpoint:
        """Close the part and write a checkpoint of the model as it is after the steps so far.

        Where several processes train together, rank 0 calls it and the others call :meth:`close_part`.

        Args:
            model: A ``diffusers`` model with its raw weights.
            ema: A ``diffusers.training_utils.EMAModel``, where one is kept.
            resume_tensors: Safetensors files to put into the checkpoint's ``resume/``, by their stem.
            resume_state: Plain data to put into ``resume/state.json``.
            files: Plain data to put into JSON files beside the weights, by the names of these.

        Returns:
            The checkpoint on disk.

        Raises:
            RecordError: If called in the middle of an optimizer step, or by another rank than 0.
        """
        if self.rank:
            raise RecordError(f"Only rank 0 writes checkpoints; this is rank {self.rank}. Call close_part() here.")
        self.close_part()
        return save_checkpoint(
            self.folder / "checkpoints",
            self.last_step,
            model,
            self.scheduler,
            ema=ema,
            resume_tensors=resume_tensors,
            resume_state=resume_state,
            files=files,
        )

    def close_part(self) -> None:
        """Write down the steps so far, at the moment of a checkpoint that another process saves.

        Raises:
            RecordError: If called in the middle of an optimizer step.
        """
        if self._open is not None or self._step_rows:
            raise RecordError("save() was called in the middle of an optimizer step. Call step() first.")
        if self._part_rows:
            self._append(self._part_rows)
            self._part_rows = []

    def close(self) -> None:
        """Let other processes record into the folder."""
        self._lock.release()

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _claim_folder(self, resume_from: int | None) -> PartWriter:
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire()
        except filelock.Timeout as error:
            raise InUseError(
                f"Another process is training into {self.folder}. Wait for it, or choose a new folder."
            ) from error
        try:
            return self._open_parts(resume_from)
        except BaseException:
            self._lock.release()
            raise

    def _open_parts(self, resume_from: int | None) -> PartWriter:
        folder = self.folder / "record"
        folder.mkdir(exist_ok=True)
        # The manifest is shared by all ranks, and any of them may be the first to come here.
        if resume_from is None and (folder / f"parts-{self.rank}.json").exists():
            raise RecordError(
                f"{folder} already holds a record. Give resume_from=<step of the checkpoint you go on from>, or choose "
                "a new folder; nothing is overwritten."
            )
        if (folder / "manifest.json").exists():
            _check_same_settings(folder, read_manifest(folder), self.manifest, with_config=self._same_config)
        else:
            write_json(folder / "manifest.json", self.manifest)
        parts = PartWriter(folder, self.rank)
        parts.rewind(resume_from or 0)
        if parts.last_step != (resume_from or 0):
            raise RecordError(
                f"The record in {folder} ends at step {parts.last_step}, before the checkpoint of step {resume_from}. "
                "Go on from an earlier checkpoint."
            )
        return parts

    def _keys(self, sample_ids: Sequence[str]) -> list[int]:
        step = self.last_step + 1
        seen = self._occurrences.copy()
        keys = []
        for sample_id in sample_ids:
            keys.append(visit_key(self.seed, sample_id, step, self.rank, seen[sample_id]))
            seen[sample_id] += 1
        return keys

    def _close(self, loss_per_sample: Tensor, loss_weight: Tensor | None, micro_batch: int) -> dict[str, Any]:
        if self._open is None:
            raise RecordError("There is no pass to close; call draw() first, once for each forward pass.")
        num_samples = len(self._open["ids"])
        if loss_per_sample.shape != (num_samples,):
            raise RecordError(
                f"The losses must be one per sample, of shape ({num_samples},); found {tuple(loss_per_sample.shape)}. "
                "Average over the elements of each sample, not over the batch."
            )
        losses = loss_per_sample.detach().float().cpu()
        if not losses.isfinite().all():
            bad = [i for i, ok in zip(self._open["ids"], losses.isfinite().tolist(), strict=True) if not ok]
            raise NumericsError(
                f"The loss is not finite at step {self.last_step + 1} for sample {', '.join(bad[:5])}. "
                "Lower the learning rate, or look at these images."
            )
        rows = self._open | _constant(num_samples, micro_batch=micro_batch)
        own = torch.tensor(rows.pop("own_weight"))
        weights = own if loss_weight is None else checked_weights(loss_weight, num_samples)
        rows |= {"slot": list(range(num_samples)), "loss": losses.tolist(), "loss_weight": weights.tolist()}
        self._open = None
        return rows

    def _learning_rate(self) -> float:
        rates = sorted({float(group["lr"]) for group in self.optimizer.param_groups})
        if len(rates) > 1:
            raise RecordError(
                "All parameters must have one learning rate; the optimizer's groups have "
                f"{', '.join(map(str, rates))}. The weight of a visit would not be one number; train with one rate."
            )
        return rates[0]

    def _clip_coefficient(self, grad_norm: Tensor | float | None) -> float:
        """Repeat what ``torch.nn.utils.clip_grad_norm_`` multiplied the gradients with."""
        if grad_norm is None and self.max_grad_norm is not None:
            raise RecordError(
                f"Gradients are clipped to the norm {self.max_grad_norm}, so step() needs the norm that "
                "clip_grad_norm_ returned. If you do not clip, make the Recorder with a config without max_grad_norm."
            )
        if grad_norm is None:
            return 1.0
        if self.max_grad_norm is None:
            raise RecordError(
                "step() got a gradient norm but does not know to what it is clipped. Make the Recorder with "
                "max_grad_norm=..., or leave the gradient norm out if you do not clip."
            )
        norm = float(grad_norm)
        return min(1.0, float(self.max_grad_norm) / (norm + 1e-6)) if math.isfinite(norm) else math.nan

    def _append(self, passes: list[dict[str, Any]], kind: str = "visits") -> None:
        columns = {name: [v for rows in passes for v in rows[name]] for name in passes[0] if name != "ids"}
        self._parts.append(columns, [i for rows in passes for i in rows["ids"]], kind)


def objective_of(settings: Mapping[str, Any]) -> ObjectiveSettings:
    """Read what a training adds to noise and loss off its settings, by the names of ``diffusers``' own flags.

    Args:
        settings: Such as ``vars(args)``.

    Returns:
        The objective; what the settings do not name is off.
    """
    found = {f.name: settings[f.name] for f in fields(ObjectiveSettings) if settings.get(f.name) is not None}
    if "precondition_outputs" in found:
        found["precondition_outputs"] = bool(found["precondition_outputs"])
    return ObjectiveSettings(**found)


def _of_objective(process: NoiseProcess) -> dict[str, Any]:
    """Describe what is not as in plain DDPM: what training added, and times that are not the timesteps themselves."""
    added = {} if process.objective == ObjectiveSettings() else {"objective": asdict(process.objective)}
    return added | ({"model_times": process.model_time.tolist()} if process.model_time.is_floating_point() else {})


def visit_key(seed: int, sample_id: str, step: int, rank: int, occurrence: int) -> int:
    """Give the noise key of a visit; a sample that several processes see in one step has another noise in each."""
    return noise_key(seed, "record", "train", sample_id, step, occurrence=(rank << 16) + occurrence)


def flip_where(images: Float[Tensor, "event *shape"], flips: Bool[Tensor, " event"]) -> Float[Tensor, "event *shape"]:
    """Mirror the images left to right where ``flips`` is True."""
    where = flips.to(images.device).view(-1, *(1,) * (images.ndim - 1))
    return torch.where(where, images.flip(-1), images)


def _check_same_settings(folder: Path, found: dict[str, Any], want: dict[str, Any], *, with_config: bool) -> None:
    """Versions may differ, and the config of someone else's script; what a replay depends on may not."""
    flat_found, flat_want = _flat(found), _flat(want)
    free = ("versions.",) if with_config else ("versions.", "config.")
    keys = [k for k in sorted(flat_found.keys() | flat_want.keys()) if not k.startswith(free)]
    differences = [
        f"{k} is {flat_found.get(k)!r} in the record, {flat_want.get(k)!r} now"
        for k in keys
        if flat_found.get(k) != flat_want.get(k)
    ]
    if differences:
        raise RecordError(
            f"{folder} was made with other settings: {'; '.join(differences[:5])}. Go on with the recorded settings, "
            "or choose a new folder."
        )


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix[:-1]: value}
    return {k: v for key, inner in value.items() for k, v in _flat(inner, f"{prefix}{key}.").items()}


def _constant(count: int, **values: Any) -> dict[str, list[Any]]:
    return {name: [value] * count for name, value in values.items()}


def _first(*values: Any) -> Any:
    return next((v for v in values if v is not None), None)


def _as_dict(config: Any) -> dict[str, Any]:
    if isinstance(config, Mapping):
        return dict(config)
    if not is_dataclass(config) or isinstance(config, type):
        raise RecordError(
            f"config must be a mapping or a dataclass (of parsed arguments, vars(args)); found {type(config).__name__}."
        )
    return asdict(config)


def _describe_scheduler(scheduler: Any) -> dict[str, Any]:
    # Underscored settings are diffusers' own notes; the order of one of them differs from process to process.
    settings = {name: value for name, value in scheduler.config.items() if not name.startswith("_")}
    return {"class": type(scheduler).__name__, "config": _plain(settings)}


def _without_secrets(settings: dict[str, Any]) -> dict[str, Any]:
    return {
        k: v for k, v in settings.items() if not re.search(r"token|secret|password|api_?key", str(k), re.IGNORECASE)
    }


def _plain(value: Any) -> Any:
    """Turn settings into what JSON can hold; anything else becomes its text."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, set | frozenset):
        return sorted(str(v) for v in value)
    kept = isinstance(value, str | int | bool | None) or (isinstance(value, float) and math.isfinite(value))
    return value if kept else str(value)


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in ("whence", "torch", "diffusers", "numpy"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:  # running from a source tree that was never installed
            versions[package] = "unknown"
    return versions
