"""The recorder: four lines in anybody's training loop that make it exactly attributable.

    recorder = Recorder(run, scheduler=noise_scheduler, optimizer=optimizer, config=vars(args))   # once
    noise, timesteps = recorder.draw(ids, like=images)                                           # in each step
    recorder.step(loss_per_sample, grad_norm)                                                    # before the lr steps
    recorder.save(model)                                                                         # now and then

In a script that trains with ``accelerate``, give it the accelerator and leave the last line out: the script's own
``save_state`` and ``load_state`` close and rewind the record. The recorder draws noise and timesteps itself, from keys
(``whence.diffusion.noise``), so that they can be drawn again. What it writes is described in ``whence.record`` and
``whence.checkpoints``.
"""

import atexit
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from whence._accelerated import Accelerated, SavedState
from whence._recorder_checks import (
    MAX_UINT16,
    MAX_UINT32,
    check_batch,
    check_floating,
    checked_crops,
    checked_dropped,
    checked_ids,
    checked_norm,
    checked_optimizer,
    clip_coefficient_of,
    one_learning_rate,
    whole_number,
)
from whence._recorder_draws import StepDraws
from whence._recorder_folder import RecorderFolder
from whence._recorder_manifest import as_dict, make_manifest, objective_of
from whence._recorder_pass import Pass
from whence._script_flags import check_draws, check_flags, prior_weights, scheduler_of_training
from whence.checkpoints import Checkpoint, save_checkpoint
from whence.config import LossName, ObjectiveSettings
from whence.diffusion.noise import draw_latents, drawn_flip, is_withheld
from whence.diffusion.process import NoiseProcess
from whence.errors import NumericsError, RecordError


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
        accelerator: The ``accelerate.Accelerator`` of a script. Rank, precision and gradient accumulation are taken
            from it; ``save_state`` closes a part of the record, ``load_state`` goes back to where that was. Make the
            recorder in every process, after ``prepare`` and before ``load_state``.
        same_config: Also refuse to go on with another ``config``; otherwise only what a replay depends on must agree.

    Raises:
        RecordError: If the folder holds a record and ``resume_from`` is not given, or one made with other settings; or
            a setting is none that can be recorded, such as ``dream_training`` of the scripts.
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
        accelerator: Any = None,
        same_config: bool = False,
    ):
        self.folder = Path(folder)
        self.optimizer = checked_optimizer(optimizer)
        self._settings = settings = as_dict(config)
        check_flags(settings)
        self._accelerated = None if accelerator is None else Accelerated(accelerator, settings)
        self.scheduler = scheduler_of_training(scheduler, settings)
        self.process = NoiseProcess.from_scheduler(self.scheduler, objective or objective_of(settings))
        plain = replace(self.process.objective, precondition_outputs=False)
        self._weight_of_elements = replace(self.process, objective=plain).loss_weight
        self.rank = whole_number("rank", accelerator.process_index if accelerator else rank, 0, MAX_UINT16)
        self.seed = whole_number("seed", _first(seed, settings.get("seed"), 0), -(2**63), 2**64 - 1)
        self.max_grad_norm = checked_norm(_first(max_grad_norm, settings.get("max_grad_norm")))
        precision = accelerator.mixed_precision if accelerator else settings.get("mixed_precision")
        manifest = make_manifest(
            settings,
            self.process,
            self.scheduler,
            seed=self.seed,
            max_grad_norm=self.max_grad_norm,
            loss=_first(loss, settings.get("loss"), "mse"),
            mixed_precision=precision or "no",
            data_fingerprint=data_fingerprint,
        )
        # Whether a script finds a checkpoint to resume from is known when it calls load_state, or draws without.
        may_load = bool(accelerator and resume_from is None and settings.get("resume_from_checkpoint"))
        self._record = RecorderFolder(
            self.folder, manifest, self.rank, resume_from, may_load=may_load, same_config=same_config
        )
        self.last_step = resume_from or 0
        self._open: Pass | None = None
        self._step_rows: list[dict[str, Any]] = []
        self._part_rows: list[dict[str, Any]] = []
        self._draws = StepDraws(self.seed, self.rank)
        if accelerator:
            accelerator.register_for_checkpointing(SavedState(self.close_part, lambda: self.last_step, self._rewind))
            atexit.register(self.close)  # scripts end without a word, maybe after their last checkpoint

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
        flips = [drawn_flip(key) for key in self._keys(sample_ids)]
        self._prepare(sample_ids)["flip"] = flips
        return flip_where(images, torch.tensor(flips))

    def drop(self, ids: Iterable[Any], probability: float) -> Bool[Tensor, " event"]:
        """Decide by their keys whose captions or labels are withheld from the network.

        Call it before :meth:`draw` with the same ids; what stands in the place of a caption is up to the caller.

        Args:
            ids: As for :meth:`draw`.
            probability: Share of captions to withhold.

        Returns:
            True where it is withheld, on the CPU.

        Raises:
            RecordError: If the probability is not within 0 and 1, or an id cannot be used.
        """
        sample_ids = checked_ids(ids)
        if not 0 <= probability <= 1:
            raise RecordError(f"The probability of drop() must be 0 to 1; found {probability}.")
        dropped = [is_withheld(key, probability) for key in self._keys(sample_ids)]
        self._prepare(sample_ids)["condition_dropped"] = dropped
        return torch.tensor(dropped)

    def latents(self, ids: Iterable[Any], posterior: Any) -> Float[Tensor, "event *shape"]:
        """Draw latents from a VAE's posterior by their keys, in the place of ``latent_dist.sample()``.

        Call it before :meth:`draw` with the same ids, for all batches or for none.

        Args:
            ids: As for :meth:`draw`.
            posterior: What the VAE's ``encode`` gives as ``latent_dist``, with its ``mean`` and ``std``.

        Returns:
            Mean + standard deviation x normals, of the type of the mean, not yet scaled.

        Raises:
            RecordError: If the posterior has no mean and deviation, or ids and images differ in number.
        """
        sample_ids = checked_ids(ids)
        mean, std = (getattr(posterior, name, None) for name in ("mean", "std"))
        if not isinstance(mean, Tensor) or not isinstance(std, Tensor):
            raise RecordError(
                "latents() needs the posterior, vae.encode(images).latent_dist, with its mean and std; found "
                f"{type(posterior).__name__}."
            )
        check_batch("latents()", sample_ids, mean)
        self._prepare(sample_ids)["latents"] = True
        center, deviation = (values.detach().float().cpu().numpy() for values in (mean, std))
        return torch.from_numpy(draw_latents(center, deviation, self._keys(sample_ids))).to(mean)

    def noise_of_input(self) -> Float[Tensor, "event *shape"]:
        """Give what the noisy image of the pass under way is made of, under ``input_perturbation``.

        Returns:
            The noise of :meth:`draw` with the perturbation added.

        Raises:
            RecordError: If there is no pass under way.
        """
        if self._open is None:
            raise RecordError("There is no pass under way; call draw() first.")
        self._open.asks_for_input = False
        return self._open.noise_of_input

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
        priors = torch.tensor(prior_weights(self._settings, sample_ids))
        self._leave_open_pass()
        self._begin_if_not_loaded()
        prepared = self._take_prepared(sample_ids)
        if condition_dropped is not None and prepared.get("condition_dropped", dropped.tolist()) != dropped.tolist():
            raise RecordError("condition_dropped is not what drop() gave for this batch; leave it out of draw().")
        keys = self._keys(sample_ids)
        self._draws.count(sample_ids)
        timesteps = torch.tensor([self.process.drawn_timestep(key) for key in keys], dtype=torch.long)
        times = self.process.times(timesteps)
        noise, seen = (torch.from_numpy(n).to(like) for n in self.process.noise(keys, tuple(like.shape[1:])))
        columns = {
            "noise_key": keys,
            "model_time": times.tolist(),
            "sigma": self.process.sigma[timesteps].tolist(),
            "flip": prepared.get("flip", [False] * len(keys)),
            "crop_top": tops_lefts[:, 0].tolist(),
            "crop_left": tops_lefts[:, 1].tolist(),
            "condition_dropped": prepared.get("condition_dropped", dropped.tolist()),
        }
        self._open = Pass(
            sample_ids,
            columns,
            self.process.loss_weight[timesteps] * priors,
            self._weight_of_elements[timesteps] * priors,
            seen,
            asks_for_input=self.process.objective.input_perturbation > 0,
            with_prior=bool(self._settings.get("with_prior_preservation")),
        )
        self._drawn_at_rate = one_learning_rate(self.optimizer) if self._accelerated else None
        return noise, times.to(like.device)

    def accumulate(self, loss_per_sample: Float[Tensor, "event *shape"], *, loss_weight: Any = None) -> None:
        """Close a forward pass that is not the last of its optimizer step (gradient accumulation)."""
        self._step_rows.append(self._close(loss_per_sample, loss_weight, micro_batch=len(self._step_rows)))

    def step(
        self,
        loss_per_sample: Float[Tensor, "event *shape"],
        grad_norm: Tensor | float | None = None,
        *,
        loss_weight: Float[Tensor, " event"] | None = None,
        samples_in_step: int | None = None,
        skipped: bool = False,
    ) -> None:
        """Close the last forward pass of an optimizer step. Call it before the learning-rate scheduler steps.

        With an accelerator, call it once for each batch, right after ``accelerator.backward``: whether that ends an
        optimizer step, the accelerator knows, and the norm of the gradients is measured.

        Args:
            loss_per_sample: Losses whose mean is minimised, their weight included; not yet averaged over the batch. Or
                losses of all elements, as ``mse_loss(..., reduction="none")`` gives them, without a weight: they are
                averaged over each sample and multiplied with its weight. Under ``precondition_outputs`` they are of
                clean images, as the scripts compare them.
            grad_norm: Gradient norm before clipping, as ``clip_grad_norm_`` returns it.
            loss_weight: Factor inside each loss. Default: that of the objective (``snr_gamma``, ``weighting_scheme``,
                ``precondition_outputs``), 1 without one.
            samples_in_step: Samples in the optimizer step over all processes. Default: those of this process; with an
                accelerator, the batch size x accumulation steps x processes.
            skipped: The optimizer did not step (a gradient scaler found infinite gradients); the visits count nothing.

        Raises:
            RecordError: If there was no :meth:`draw`, the losses or their weights are not one per sample, or a gradient
                norm comes without the norm it is clipped to.
            NumericsError: If a loss or the gradient norm is not finite.
        """
        if samples_in_step is not None:
            samples_in_step = whole_number("samples_in_step", samples_in_step, 1, MAX_UINT32)
        accelerated = self._accelerated
        if accelerated and not accelerated.ends_step():
            return self.accumulate(loss_per_sample, loss_weight=loss_weight)
        if accelerated:
            grad_norm, is_skipped = accelerated.norm_and_skip(self.optimizer, grad_norm, self.max_grad_norm)
            skipped = skipped or is_skipped
        clip_coefficient = 0.0 if skipped else clip_coefficient_of(grad_norm, self.max_grad_norm)
        self.accumulate(loss_per_sample, loss_weight=loss_weight)
        if not math.isfinite(clip_coefficient):
            raise NumericsError(
                f"The gradient norm at step {self.last_step + 1} is {float(grad_norm or 0)}, though all losses are "
                "finite. Lower the learning rate; if a gradient scaler skipped the step, pass skipped=True."
            )
        self.last_step += 1
        learning_rate = one_learning_rate(self.optimizer)
        if accelerated and learning_rate != self._drawn_at_rate:
            raise RecordError(
                f"The learning rate was {self._drawn_at_rate} when noise was drawn and is {learning_rate} at step(). "
                "Call step() before lr_scheduler.step(), right after optimizer.step()."
            )
        together = sum(len(rows["ids"]) for rows in self._step_rows)
        for rows in self._step_rows:
            num_samples = samples_in_step or (self._samples_as_counted(rows) if accelerated else together)
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
        self._draws.end_step()
        if accelerated and accelerated.saves_after(self.last_step):
            self.close_part()
            accelerated.wait()  # no checkpoint before every process has written down what led to it

    def probe(self, loss_per_sample: Float[Tensor, "event *shape"], *, loss_weight: Any = None) -> None:
        """Close a forward pass that trains nothing, after the last checkpoint, so that it can be checked too."""
        rows = self._close(loss_per_sample, loss_weight, micro_batch=0)
        num_samples = len(rows["ids"])
        rows |= _constant(
            num_samples, step=self.last_step + 1, learning_rate=0.0, clip_coefficient=0.0, samples_in_step=num_samples
        )
        self._append([rows], kind="probe")
        self._draws.end_step()

    def has_probe(self) -> bool:
        """Tell whether the step after the last one was probed already."""
        return self._record.parts.has_probe(self.last_step + 1)

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
        """Let other processes record into the folder; with an accelerator, write down the whole steps so far first."""
        if self._accelerated and self._record.is_claimed:
            atexit.unregister(self.close)
            self._open, self._step_rows = None, []  # of a step that was not finished
            self.close_part()
        self._record.release()

    @property
    def manifest(self) -> dict[str, Any]:
        """What ``record/manifest.json`` says."""
        return self._record.manifest

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _rewind(self, step: int) -> None:
        """Go back to the checkpoint of ``step``, as ``accelerator.load_state`` does."""
        if self._open is not None or self._step_rows or self._part_rows:
            raise RecordError("load_state() was called in the midst of training; resume in a new process.")
        assert self._accelerated is not None  # nobody else may load
        self._record.rewind(step, self._accelerated.accelerator.num_processes)
        self.last_step = step

    def _begin_if_not_loaded(self) -> None:
        """Start over where a script asked to resume and found no checkpoint."""
        if self._record.may_load:
            self._rewind(0)

    def _leave_open_pass(self) -> None:
        """Keep a pass that was not closed where a script may call step() only when gradients are synchronised."""
        if self._open is None:
            return
        if not self._accelerated or self._accelerated.accelerator.gradient_accumulation_steps == 1:
            raise RecordError("draw() was called twice; close the first pass with step(), accumulate() or probe().")
        self._step_rows.append(self._open.rows_without_loss(len(self._step_rows)))
        self._open = None

    def _prepare(self, sample_ids: Sequence[str]) -> dict[str, Any]:
        """Give the place for what is drawn of a batch before its noise."""
        self._begin_if_not_loaded()
        self._leave_open_pass()
        return self._draws.prepared(sample_ids)

    def _take_prepared(self, sample_ids: Sequence[str]) -> dict[str, Any]:
        prepared = self._draws.take_prepared(sample_ids)
        check_draws(self._settings, prepared)
        self._record.note_latents("latents" in prepared, begun=bool(self.last_step or self._step_rows))
        return prepared

    def _keys(self, sample_ids: Sequence[str]) -> list[int]:
        return self._draws.keys(sample_ids, self.last_step + 1)

    def _close(self, loss_per_sample: Tensor, loss_weight: Tensor | None, micro_batch: int) -> dict[str, Any]:
        if self._open is None:
            raise RecordError("There is no pass to close; call draw() first, once for each forward pass.")
        rows = self._open.rows(loss_per_sample, loss_weight, step=self.last_step + 1, micro_batch=micro_batch)
        self._open = None
        return rows

    def _samples_as_counted(self, rows: dict[str, Any]) -> int:
        assert self._accelerated is not None  # otherwise all passes are counted together
        prior = self._settings.get("with_prior_preservation")
        return self._accelerated.samples_in_step(len(rows["ids"]) // (2 if prior else 1))

    def _append(self, passes: list[dict[str, Any]], kind: str = "visits") -> None:
        columns = {name: [v for rows in passes for v in rows[name]] for name in passes[0] if name != "ids"}
        self._record.parts.append(columns, [i for rows in passes for i in rows["ids"]], kind)


def flip_where(images: Float[Tensor, "event *shape"], flips: Bool[Tensor, " event"]) -> Float[Tensor, "event *shape"]:
    """Mirror the images left to right where ``flips`` is True."""
    where = flips.to(images.device).view(-1, *(1,) * (images.ndim - 1))
    return torch.where(where, images.flip(-1), images)


def _constant(count: int, **values: Any) -> dict[str, list[Any]]:
    return {name: [value] * count for name, value in values.items()}


def _first(*values: Any) -> Any:
    return next((v for v in values if v is not None), None)
