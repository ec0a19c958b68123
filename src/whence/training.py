"""Training of a small diffusion model with an exact record.

Everything random is a function of the settings' seed and of the step, so a run that was killed goes on from its last
checkpoint to the same bytes. The optimizer step over a batch of n samples follows the mean of their losses.
"""

import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from whence.checkpoints import Checkpoint, check_files, list_checkpoints, load_model
from whence.config import ModelSettings, TrainingSettings
from whence.data import ImageData
from whence.diffusion.adapters import check_model, predict
from whence.diffusion.noise import keyed_order
from whence.diffusion.objectives import sample_loss
from whence.diffusion.process import NoiseProcess
from whence.encoding import own_encoding
from whence.errors import CheckpointError, ConfigError, RecordError
from whence.event_table import conditions_of
from whence.model_making import (
    make_model,
    make_scheduler,
    model_faults,
    raise_faults,
    recorded_settings,
    unknown_names,
)
from whence.precision import autocast
from whence.progress import progress_bar
from whence.recorder import Recorder
from whence.words import encoder_for, files_of, with_classes

_TIMED_STEPS = 6


def encoded_for(settings: ModelSettings, data: ImageData) -> ImageData:
    """Put beside training images what a model of such settings is told of them, where that is not done yet."""
    encoding = own_encoding(encoder_for(settings))
    if encoding is None or (data.encoding is not None and data.encoding.encoder == encoding.encoder.hash):
        return data
    return encoding.encode(data, None)


def checkpoint_steps(num_images: int, settings: TrainingSettings) -> list[int]:
    """Give the optimizer steps after which checkpoints are written: ends of epochs, spread evenly.

    Returns:
        As many steps as there are checkpoints, ascending.

    Raises:
        ConfigError: If there are more checkpoints than epochs, so that some interval would hold no whole epoch.

    Example:
        >>> checkpoint_steps(10, TrainingSettings(epochs=6, batch_size=4, checkpoints=2))
        [9, 18]
    """
    if not 1 <= settings.checkpoints <= settings.epochs:
        raise ConfigError(
            f"checkpoints must be 1 to {settings.epochs}, the number of epochs, so that every image is visited between "
            f"two of them; found {settings.checkpoints}."
        )
    epochs = [round(k * settings.epochs / settings.checkpoints) for k in range(1, settings.checkpoints + 1)]
    return [epoch * steps_per_epoch(num_images, settings) for epoch in epochs]


def train(
    folder: Path,
    data: ImageData,
    model_settings: ModelSettings,
    settings: TrainingSettings,
    *,
    device: str = "cpu",
    show_progress: bool = True,
    on_start: Callable[[], None] = lambda: None,
) -> Checkpoint:
    """Train with a record, or go on with a training that was interrupted.

    Args:
        folder: The run.
        data: Training images, with captions or labels where the model is told these.
        model_settings: Architecture and noise schedule.
        settings: Optimizer, schedule, length, seed.
        device: Torch device.
        show_progress: Show a progress bar.
        on_start: Called once all settings have been accepted, before the first step.

    Returns:
        The last checkpoint.

    Raises:
        ConfigError: If settings are out of range or contradict each other; nothing has been written then.
        RecordError: If the folder holds a record made with other settings or other images.
    """
    model_settings = with_classes(model_settings, data)
    _check_settings(folder, data, model_settings, settings, device)
    data = encoded_for(model_settings, data)
    stops = checkpoint_steps(len(data), settings)
    model = make_model(model_settings, data, settings.seed).to(device)
    loop = _Loop(folder, data, model, model_settings, settings, stops[-1], device)
    with (
        loop.recorder,
        torch.random.fork_rng(devices=_cuda_devices(device)),
        progress_bar("train", stops[-1], "step", shown=show_progress) as bar,
    ):
        on_start()
        _seed(settings.seed, device)
        checkpoint = loop.resume()
        bar.update(loop.recorder.last_step)
        while loop.recorder.last_step < stops[-1]:
            mean_loss = loop.step()
            bar.update()
            bar.set_postfix(loss=f"{mean_loss:.4f}", refresh=False)
            if loop.recorder.last_step in stops:
                checkpoint = loop.save()
        loop.probe()
    assert checkpoint is not None  # the last step is one of the stops
    return checkpoint


def seconds_per_step(data: ImageData, model_settings: ModelSettings, settings: TrainingSettings, device: str) -> float:
    """Time some steps of a training of which nothing stays.

    Args:
        data: Training images.
        model_settings: Architecture and noise schedule.
        settings: Optimizer and batch.
        device: Torch device.

    Returns:
        The median over steps; the first one, which is slower, is not counted.
    """
    seconds = []
    model_settings = with_classes(model_settings, data)
    data = encoded_for(model_settings, data)
    with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng(devices=_cuda_devices(device)):
        _seed(settings.seed, device)
        model = make_model(model_settings, data, settings.seed).to(device)
        loop = _Loop(Path(folder), data, model, model_settings, settings, _TIMED_STEPS, device)
        with loop.recorder:
            for _ in range(_TIMED_STEPS):
                start_s = time.perf_counter()
                loop.step()  # gives its loss as a number, so that a GPU has finished
                seconds.append(time.perf_counter() - start_s)
    return statistics.median(seconds[1:])


class _Loop:
    """One training in progress: what an optimizer step changes, and how it is put away and fetched again."""

    def __init__(
        self,
        folder: Path,
        data: ImageData,
        model: Any,
        model_settings: ModelSettings,
        settings: TrainingSettings,
        steps: int,
        device: str,
    ):
        from diffusers.optimization import get_scheduler

        check_model(model)
        self.folder = folder
        self.data = data
        self.model = model.train()
        self.settings = settings
        self.encoder = encoder_for(model_settings)
        self.device = device
        scheduler = make_scheduler(model_settings)
        self.process = NoiseProcess.from_scheduler(scheduler)
        self.optimizer = torch.optim.AdamW(
            model.parameters(),
            lr=settings.learning_rate,
            betas=(settings.adam_beta1, settings.adam_beta2),
            weight_decay=settings.weight_decay,
        )
        name = "constant_with_warmup" if settings.schedule == "constant" else settings.schedule
        self.learning_rates = get_scheduler(
            name, self.optimizer, num_warmup_steps=settings.warmup_steps, num_training_steps=steps
        )
        self.scaler = torch.amp.GradScaler(device, enabled=settings.mixed_precision == "fp16")
        self.ema = _make_ema(model, settings.ema_decay)
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.long)
        self.last = _last_checkpoint(folder)
        self.recorder = Recorder(
            folder,
            scheduler=scheduler,
            optimizer=self.optimizer,
            config=recorded_settings(model_settings, settings),
            data_fingerprint=data.fingerprint,
            resume_from=_step_to_resume(folder, self.last),
            same_config=True,
        )

    def step(self) -> float:
        """Take one optimizer step; return its mean loss."""
        rows = self._rows_of_step(self.recorder.last_step + 1)
        micro_batches = list(rows.split(self.settings.micro_batch_size or len(rows)))
        losses = []
        for micro_batch in micro_batches:
            loss = self._losses(micro_batch)
            self.scaler.scale(loss.sum() / len(rows)).backward()
            losses.append(loss.detach())
            if len(losses) < len(micro_batches):
                self.recorder.accumulate(loss)
        self.scaler.unscale_(self.optimizer)
        grad_norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.max_grad_norm)
        scale = self.scaler.get_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.recorder.step(losses[-1], grad_norm, skipped=self.scaler.get_scale() < scale)
        self.learning_rates.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema is not None:
            self.ema.step(self.model.parameters())
        return float(torch.cat(losses).mean())

    def probe(self) -> None:
        """Record one more forward pass, so that the last checkpoint can be checked too."""
        if not self.recorder.has_probe():
            with torch.no_grad():
                self.recorder.probe(self._losses(self._rows_of_step(self.recorder.last_step + 1)))

    def save(self) -> Checkpoint:
        """Write a checkpoint that training can go on from."""
        names = {p: name for name, p in self.model.named_parameters()}
        optimizer = {
            f"{field}.{names[p]}": value.contiguous()
            for p, state in self.optimizer.state.items()
            for field, value in state.items()
        }
        return self.recorder.save(
            self.model,
            ema=self.ema,
            resume_tensors={"optimizer": optimizer, "rng": _rng_states(self.device)},
            resume_state={"learning_rates": self.learning_rates.state_dict(), "scaler": self.scaler.state_dict()},
            files=files_of(self.encoder),
        )

    def resume(self) -> Checkpoint | None:
        """Fetch the state of the last checkpoint, if there is one."""
        if self.last is None:
            return None
        from safetensors.torch import load_file

        check_files(self.last)
        folder = self.last.folder / "resume"
        self.model.load_state_dict(load_model(self.last).state_dict())
        parameters = dict(self.model.named_parameters())
        for key, value in load_file(folder / "optimizer.safetensors", device=self.device).items():
            field, name = key.split(".", maxsplit=1)
            # AdamW keeps its step count on the CPU, whatever the device of the weights.
            self.optimizer.state[parameters[name]][field] = value.cpu() if field == "step" else value
        state = json.loads((folder / "state.json").read_text())
        self.learning_rates.load_state_dict(state["learning_rates"])
        for group, rate in zip(self.optimizer.param_groups, self.learning_rates.get_last_lr(), strict=True):
            group["lr"] = rate
        self.scaler.load_state_dict(state["scaler"])
        if self.ema is not None:
            averages = dict(load_model(self.last, "ema", device=self.device).named_parameters())
            self.ema.shadow_params = [averages[name].detach() for name in parameters]
            self.ema.optimization_step = self.last.step
        _set_rng_states(load_file(folder / "rng.safetensors"), self.device)
        return self.last

    def _losses(self, rows: Tensor) -> Float[Tensor, " event"]:
        ids = [self.data.ids[row] for row in rows.tolist()]
        clean = torch.from_numpy(self.data.inputs(rows.tolist())).to(self.device)
        dropped = None if self.encoder is None else self.recorder.drop(ids, self.settings.caption_dropout)
        withheld = None if dropped is None else dropped.numpy()
        conditions = conditions_of(self.data, rows.tolist(), withheld, device=self.device)
        if self.settings.random_flip:
            clean = self.recorder.flip(ids, clean)
        noise, timesteps = self.recorder.draw(ids, like=clean)
        with autocast(self.settings.mixed_precision, self.device):
            noisy = self.process.add_noise(clean, noise, timesteps)
            prediction = predict(self.model, noisy, self.process.times(timesteps), conditions)
        return sample_loss(prediction.float(), self.process.target(clean, noise, timesteps), self.settings.loss)

    def _rows_of_step(self, step: int) -> Tensor:
        """Cut the epoch's order into batches; the last one holds the rest."""
        epoch, batch = divmod(step - 1, steps_per_epoch(len(self.data), self.settings))
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = torch.from_numpy(keyed_order(self.settings.seed, epoch, len(self.data)))
        return self._order[batch * self.settings.batch_size :][: self.settings.batch_size]


def _cuda_devices(device: str) -> list[int]:
    """List the GPUs whose generator a training draws from (dropout): its own, or none."""
    parsed = torch.device(device)
    if parsed.type != "cuda":
        return []
    return [torch.cuda.current_device() if parsed.index is None else parsed.index]


def _seed(seed: int, device: str) -> None:
    """Seed the generators of the CPU and of the training's own GPU, and no others."""
    torch.default_generator.manual_seed(seed)
    for index in _cuda_devices(device):
        torch.cuda.default_generators[index].manual_seed(seed)


def _rng_states(device: str) -> dict[str, Tensor]:
    states = {"torch": torch.get_rng_state()}
    for index in _cuda_devices(device):
        states["cuda"] = torch.cuda.get_rng_state(index)
    return states


def _set_rng_states(states: dict[str, Tensor], device: str) -> None:
    torch.set_rng_state(states["torch"])
    for index in _cuda_devices(device):
        if "cuda" in states:  # not where the training began on a CPU
            torch.cuda.set_rng_state(states["cuda"], index)


def steps_per_epoch(num_images: int, settings: TrainingSettings) -> int:
    """Count the optimizer steps of a pass over so many images."""
    return -(-num_images // settings.batch_size)


def _make_ema(model: Any, decay: float | None) -> Any:
    if decay is None:
        return None
    from diffusers.training_utils import EMAModel

    return EMAModel(model.parameters(), decay=decay, model_cls=type(model), model_config=model.config)


def _last_checkpoint(folder: Path) -> Checkpoint | None:
    try:
        found = list_checkpoints(folder / "checkpoints")
    except CheckpointError:
        return None  # a new run, or one that was killed before its first checkpoint
    return found[-1]


def _step_to_resume(folder: Path, last: Checkpoint | None) -> int | None:
    if not (folder / "record" / "manifest.json").exists():
        if last is not None:
            raise RecordError(
                f"{last.folder} is a checkpoint without the record of its training. Put record/ back to go on from it, "
                "or train into a new folder."
            )
        return None
    return last.step if last else 0


def check_device(device: str) -> None:
    """Refuse a device on which torch cannot compute here.

    Raises:
        ConfigError: The message names the device and gives torch's reason.
    """
    try:
        torch.zeros(1, device=device).cpu()
    except Exception as error:  # each backend has its own way of not being there
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise ConfigError(
            f"Device {device!r} cannot be used: {reason[:200]}. Give cpu, or a device of this machine such as cuda:0."
        ) from error


def _check_settings(
    folder: Path, data: ImageData, model_settings: ModelSettings, settings: TrainingSettings, device: str
) -> None:
    raise_faults(
        _folder_faults(folder)
        + model_faults(model_settings, data)
        + _training_faults(settings)
        + _device_faults(settings, device)
    )


def _folder_faults(folder: Path) -> list[str]:
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return [] if nearest.is_dir() else [f"--out must be a folder; {nearest} is a file"]


def _training_faults(settings: TrainingSettings) -> list[str]:
    faults = [
        f"{name} must be above 0, found {getattr(settings, name)}"
        for name in ("epochs", "batch_size", "checkpoints")
        if getattr(settings, name) <= 0
    ]
    for name in ("learning_rate", "max_grad_norm"):
        value = getattr(settings, name)
        if not (math.isfinite(value) and value > 0):  # NaN is neither above 0 nor below
            faults.append(f"{name} must be above 0 and finite, found {value}")
    for name in ("adam_beta1", "adam_beta2"):
        if not 0 <= getattr(settings, name) < 1:
            faults.append(f"{name} must be at least 0 and below 1, found {getattr(settings, name)}")
    if not (math.isfinite(settings.weight_decay) and settings.weight_decay >= 0):
        faults.append(f"weight_decay must be finite and not negative, found {settings.weight_decay}")
    faults += unknown_names(settings, "loss", "schedule", "mixed_precision")
    if not 0 <= settings.caption_dropout < 1:
        faults.append(f"caption_dropout must be at least 0 and below 1, found {settings.caption_dropout}")
    if settings.warmup_steps < 0:
        faults.append(f"warmup_steps must not be negative, found {settings.warmup_steps}")
    if settings.micro_batch_size is not None and not 0 < settings.micro_batch_size <= settings.batch_size:
        faults.append(
            f"micro_batch_size must be 1 to batch_size = {settings.batch_size}, found {settings.micro_batch_size}"
        )
    if settings.ema_decay is not None and not 0 < settings.ema_decay < 1:
        faults.append(f"ema_decay must lie between 0 and 1, found {settings.ema_decay}")
    if not -(2**63) <= settings.seed < 2**63:
        faults.append(f"seed must be from -2^63 to 2^63 - 1, found {settings.seed}")
    return faults


def _device_faults(settings: TrainingSettings, device: str) -> list[str]:
    try:
        check_device(device)
    except ConfigError as error:
        return [str(error).rstrip(".")]
    if settings.mixed_precision == "fp16" and torch.device(device).type == "cpu":
        return ["mixed_precision fp16 needs a GPU; use bf16 or no on the CPU"]
    return []
