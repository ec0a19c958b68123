"""Checkpoints: folders in the layout of ``diffusers``, ordered by optimizer step.

    checkpoints/checkpoint-<step>/unet/        raw weights as ``save_pretrained`` writes them: config.json, safetensors
    checkpoints/checkpoint-<step>/unet_ema/    moving average of the weights, where one is kept
    checkpoints/checkpoint-<step>/pytorch_lora_weights.safetensors   instead of both, where a LoRA is trained
    checkpoints/checkpoint-<step>/scheduler/   scheduler_config.json
    checkpoints/checkpoint-<step>/resume/      optimizer.safetensors (by parameter name), rng.safetensors, state.json
    checkpoints/checkpoint-<step>/checkpoint.json   step and a checksum of every file

Folders that ``accelerate`` and the ``diffusers`` example scripts write (``checkpoint-<step>/unet`` or ``transformer``,
a pipeline with ``model_index.json``, a single model folder) open as they are, and so do those of a LoRA
(:mod:`whence.lora`) and of textual inversion (:mod:`whence.textual_inversion`), whose base lies elsewhere. torch and
diffusers are imported only when a model is loaded.
"""

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from whence._files import publish_folder, sha256_of_file, sha256_of_json, write_json
from whence._model_files import WEIGHTS_FILE, make_from_config, quiet_diffusers, read_json
from whence._networks import load_network, read_config
from whence.config import WeightsName
from whence.errors import CheckpointError, check_choice
from whence.lora import NETWORKS, LoraFiles, add_lora, find_base, find_lora, save_lora
from whence.record import read_manifest
from whence.textual_inversion import (
    LearnedEmbeddings,
    describe_text_encoder,
    find_embeddings,
    find_inverted_base,
    find_series,
    invert,
    load_text_encoder,
)

if TYPE_CHECKING:
    from torch import Tensor

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint on disk."""

    step: int
    """Optimizer steps taken; 0 for a lone model whose step is not known."""
    folder: Path
    model_folder: Path
    """Raw weights; of a LoRA or of learned embeddings, those of the base's network."""
    ema_folder: Path | None
    """Moving average of the weights, or None."""
    lora: LoraFiles | None = None
    """Adapters, where the checkpoint holds these alone."""
    lora_alpha: float | None = None
    """Alpha of the adapters, where the user says it."""

    learned: LearnedEmbeddings | None = None
    """Embeddings of textual inversion, where the checkpoint holds these alone."""

    @property
    def base_folder(self) -> Path | None:
        """Folder of the network that a LoRA adapts, or that embeddings were learned for; or None."""
        return self.model_folder if self.lora or self.learned else None

    def weights_folder(self, weights: WeightsName) -> Path:
        """Give the folder of the raw or of the averaged weights.

        Returns:
            A folder with a config.json.

        Raises:
            CheckpointError: If averaged weights are asked for and there are none.
        """
        check_choice("weights", weights, WeightsName)
        if weights == "raw":
            return self.model_folder
        if self.base_folder is not None:
            kind = "a LoRA" if self.lora else "embeddings of textual inversion"
            raise CheckpointError(f"{self.folder} holds {kind}, of which there is no moving average. Use raw weights.")
        if self.ema_folder is None:
            raise CheckpointError(
                f"{self.folder} has no averaged weights (no unet_ema). Use the raw ones, or train with --ema-decay."
            )
        return self.ema_folder

    def content_hash(self, weights: WeightsName = "raw") -> str:
        """Hash what a gradient depends on: the model's configuration and its weights, adapters, embeddings."""
        kept = _model_files_in(self.weights_folder(weights))
        if self.lora is not None:
            base = _hashes_of_base(kept)
            return sha256_of_json({"base": base, "lora": self.lora.content_hash, "alpha": self.lora_alpha})
        if self.learned is not None:
            base = [_hashes_of_base(kept), _hashes_of_base(_model_files_in(_text_encoder_of(self)))]
            return sha256_of_json({"base": base, "learned": self.learned.content_hash})
        return sha256_of_json({f.name: sha256_of_file(f) for f in kept})


def _text_encoder_of(checkpoint: Checkpoint) -> Path:
    return checkpoint.model_folder.parent / "text_encoder"


def _model_files_in(folder: Path) -> list[Path]:
    return [f for f in sorted(folder.iterdir()) if f.suffix in (".json", ".safetensors", ".bin")]


def _hashes_of_base(files: Sequence[Path]) -> dict[str, str]:
    return {f.name: _hash_of_base_file(f, f.stat().st_mtime_ns, f.stat().st_size) for f in files}


@lru_cache(maxsize=64)
def _hash_of_base_file(path: Path, _changed_ns: int, _size: int) -> str:
    """Hash a large file that all checkpoints of a series share; once, unless it was written since."""
    return sha256_of_file(path)


def list_checkpoints(path: Path, *, base: Path | None = None, lora_alpha: float | None = None) -> list[Checkpoint]:
    """Find the checkpoints below a folder, in order of their steps.

    Args:
        path: A run of whence, a training output folder with ``checkpoint-<step>`` folders, one checkpoint, a saved
            pipeline, or a saved model.
        base: What a LoRA adapts, or embeddings were learned for: a saved pipeline, or a model. Default: the folder
            that the record names as ``pretrained_model_name_or_path``. Whole weights need none.
        lora_alpha: Alpha of a LoRA whose files do not say it.

    Returns:
        At least one checkpoint. Folders that were not finished are left out.

    Raises:
        CheckpointError: If there is none, two have the same step, or a base is not found.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a folder. Give a run, a checkpoint folder or a saved diffusers model.")
    for parent in (path / "checkpoints", path):
        numbered = [(int(m[1]), f) for f in parent.glob("*") if (m := re.fullmatch(r"checkpoint-(\d+)", f.name))]
        found = sorted(
            (c for step, folder in numbered if (c := _as_checkpoint(folder, step))),
            key=lambda c: (c.step, c.folder.name),
        )
        for left, right in zip(found, found[1:], strict=False):
            if left.step == right.step:
                raise CheckpointError(f"{left.folder} and {right.folder} have the same step. Remove one of them.")
        if found:
            return _on_base(found, path, base, lora_alpha)
    if series := find_series(path):
        return _on_base([Checkpoint(n, path, path, None, learned=e) for n, e in series.items()], path, base, lora_alpha)
    step = re.fullmatch(r"checkpoint-(\d+)", path.resolve().name)
    lone = _as_checkpoint(path, int(step[1]) if step else 0)
    if lone is None:
        contents = ", ".join(sorted(f.name for f in path.iterdir())[:8]) or "nothing"
        raise CheckpointError(
            f"{path} holds no checkpoint: expected checkpoint-<step> folders, a unet or transformer folder, a LoRA, "
            f"learned_embeds.safetensors, or a config.json beside {WEIGHTS_FILE}; found {contents}."
        )
    return _on_base([lone], path, base, lora_alpha)


def _as_checkpoint(folder: Path, step: int) -> Checkpoint | None:
    lora, learned = find_lora(folder), find_embeddings(folder)
    if learned is not None and lora is not None:
        raise CheckpointError(
            f"{folder} holds a LoRA, {lora.weights.name}, beside embeddings of textual inversion, "
            f"{learned.weights.name}. whence takes gradients of one of them, on a base that did not change. Train one "
            "of them alone."
        )
    if learned is not None:
        return Checkpoint(step, folder, folder, None, learned=learned)
    names = [name for name in NETWORKS if (folder / name / "config.json").exists()]
    if len(names) > 1:
        raise CheckpointError(f"{folder} holds both unet and transformer. Give the folder of the one to be traced.")
    if not names and not (folder / "config.json").exists():
        if lora is not None:
            return Checkpoint(step, folder, folder, None, lora)
        if (folder / "checkpoint.json").exists():  # written last, so the folder was whole once
            raise CheckpointError(f"{folder / 'unet' / 'config.json'} is missing. Restore it, or delete {folder}.")
        return None
    model_folder = folder / names[0] if names else folder
    if lora is not None:
        raise CheckpointError(
            f"{folder} holds a LoRA, {lora.weights.relative_to(folder)}, beside a whole model. Move the LoRA into a "
            f"folder of its own and trace that with --base {folder}, or move it away and trace the model."
        )
    ema = folder / (f"{names[0]}_ema" if names else "unet_ema")
    return Checkpoint(step, folder, model_folder, ema if (ema / "config.json").exists() else None)


def _on_base(found: list[Checkpoint], path: Path, base: Path | None, lora_alpha: float | None) -> list[Checkpoint]:
    """Say on what base the LoRAs or embeddings among some checkpoints are."""
    learned = [c for c in found if c.learned is not None]
    if learned and len(learned) < len(found):
        other = next(c for c in found if c.learned is None)
        raise CheckpointError(
            f"{learned[0].folder} holds embeddings of textual inversion, {other.folder} other weights. Move one "
            "kind away."
        )
    loras = [c for c in found if c.lora is not None]
    if not loras:
        if lora_alpha is not None:
            kind = "embeddings of textual inversion" if learned else "whole weights"
            raise CheckpointError(f"{path} holds {kind} and no LoRA. Leave --lora-alpha out.")
        if not learned:
            return found
        whole = (path / "model_index.json").exists()  # the script saved the pipeline around its embeddings
        base = base or (path if whole else _recorded_base(path, learned[0]))
        return [replace(c, model_folder=find_inverted_base(base, c.learned)) for c in found if c.learned is not None]
    if len(loras) < len(found):
        whole = next(c for c in found if c.lora is None)
        raise CheckpointError(f"{loras[0].folder} holds a LoRA, {whole.folder} whole weights. Move one kind away.")
    base = base or _recorded_base(path, loras[0])
    return [
        replace(c, model_folder=find_base(base, c.lora), lora_alpha=lora_alpha) for c in found if c.lora is not None
    ]


def _recorded_base(path: Path, checkpoint: Checkpoint) -> Path:
    """Look up a base in the record of its training, or in what peft keeps beside it."""
    records = [place / "record" for place in (path, path.parent, path.parent.parent)]
    record = next((r for r in records if (r / "manifest.json").exists()), None)
    named = read_manifest(record)["config"].get("pretrained_model_name_or_path") if record else None
    if named is None and checkpoint.lora is not None and checkpoint.lora.config is not None:
        named = checkpoint.lora.settings.get("base_model_name_or_path")
    if named and Path(named).is_dir():
        return Path(named)
    found = f" It was trained on {named}, which is no folder here." if named else ""
    if checkpoint.lora is None:
        raise CheckpointError(
            f"{checkpoint.folder} holds embeddings of textual inversion, which say nothing without the pipeline that "
            f"they were learned for.{found} Give the folder of that pipeline with --base."
        )
    raise CheckpointError(
        f"{checkpoint.folder} holds a LoRA, which says nothing without the model that it adapts.{found} Give the "
        "folder of that model, a saved pipeline or the network alone, with --base."
    )


def check_files(checkpoint: Checkpoint) -> None:
    """Compare every file of a checkpoint that whence wrote with its checksum; foreign folders have none and pass.

    Raises:
        CheckpointError: If a file is missing or differs.
    """
    manifest = checkpoint.folder / "checkpoint.json"
    if not manifest.exists():
        return
    checksums = read_json(manifest).get("sha256")
    if not isinstance(checksums, dict):
        raise CheckpointError(
            f"{manifest} has no checksums under sha256. It is damaged; restore it, or delete {checkpoint.folder} and "
            "train again."
        )
    for name, want in checksums.items():
        path = checkpoint.folder / name
        if not path.exists() or sha256_of_file(path) != want:
            state = "damaged or was altered" if path.exists() else "missing"
            raise CheckpointError(f"{path} is {state}. Restore it, or delete {checkpoint.folder} and train again.")


def load_model(
    checkpoint: Checkpoint,
    weights: WeightsName = "raw",
    *,
    allow_pickle: bool = False,
    device: str = "cpu",
    dtype: str = "float32",
    bases: dict[tuple[Path, str, str], Any] | None = None,
) -> Any:
    """Load a model as its own ``diffusers`` class, in evaluation mode.

    Args:
        checkpoint: Which checkpoint.
        weights: Raw or averaged weights.
        allow_pickle: Also read ``.bin`` files, with torch's ``weights_only=True``.
        device: Torch device.
        dtype: Name of a torch type.
        bases: Where a base is kept for the next checkpoint; models share its tensors. The last one stays.

    Returns:
        The model. That of a LoRA has trainable adapters on a frozen base; that of learned embeddings is an
        :class:`~whence.inverted_unet.InvertedUNet`.

    Raises:
        CheckpointError: If files are missing, damaged or pickled, or do not fit the configuration.
        NumericsError: If a weight is not finite.
    """
    import torch

    folder = checkpoint.weights_folder(weights)
    if checkpoint.base_folder is None:
        return load_network(folder, allow_pickle, device, dtype)
    key, kept = (folder, device, dtype), {} if bases is None else bases
    if key not in kept:
        kept.clear()
        parts = [load_network(folder, allow_pickle, device, dtype)]
        if checkpoint.learned is not None:
            text_encoder = load_text_encoder(_text_encoder_of(checkpoint), allow_pickle=allow_pickle)
            parts.append(text_encoder.to(device, getattr(torch, dtype)))
        kept[key] = [part.requires_grad_(False) for part in parts]
    tensors = [tensor for part in kept[key] for tensor in chain(part.parameters(), part.buffers())]
    model, *text_encoders = copy.deepcopy(kept[key], {id(tensor): tensor for tensor in tensors})
    with quiet_diffusers():
        if checkpoint.lora is not None:
            add_lora(model, checkpoint.lora, checkpoint.lora_alpha)
        if checkpoint.learned is not None:
            model = invert(model, text_encoders[0], checkpoint.learned)
        return model.to(device, getattr(torch, dtype)).eval()


def describe_network(checkpoint: Checkpoint) -> Any:
    """Make a checkpoint's network without its weights, to look at its class and configuration.

    Args:
        checkpoint: Which checkpoint.

    Returns:
        The network on the device ``meta``; it cannot be run.

    Raises:
        CheckpointError: If the configuration is missing, or diffusers does not know its class.
    """
    import torch

    folder = checkpoint.model_folder
    with torch.device("meta"):
        network = make_from_config(folder / "config.json", read_config(folder), "model")
    if checkpoint.learned is None:
        return network
    return invert(network, describe_text_encoder(_text_encoder_of(checkpoint)), checkpoint.learned)


def check_same_architecture(checkpoints: Sequence[Checkpoint], weights: WeightsName = "raw") -> None:
    """Refuse a series whose models differ in anything but their weights.

    Raises:
        CheckpointError: If two configurations differ; the message names the settings.
    """
    first = checkpoints[0]
    want = _architecture(first, weights)
    for other in checkpoints[1:]:
        found = _architecture(other, weights)
        keys = sorted(k for k in want.keys() | found.keys() if not k.startswith("_") and want.get(k) != found.get(k))
        if keys or want.get("_class_name") != found.get("_class_name"):
            differences = "; ".join(f"{k} is {found.get(k)!r}, not {want.get(k)!r}" for k in keys or ["_class_name"])
            raise CheckpointError(
                f"All checkpoints must have one architecture; {other.folder} differs from {first.folder}: "
                f"{differences}."
            )


def _architecture(checkpoint: Checkpoint, weights: WeightsName) -> dict[str, Any]:
    config = read_config(checkpoint.weights_folder(weights))
    of_base = checkpoint.lora or checkpoint.learned
    return config if of_base is None else config | of_base.architecture


def load_scheduler(checkpoint: Checkpoint) -> Any:
    """Load the noise scheduler that belongs to a checkpoint.

    It is the one in the checkpoint's folder; else that of the record of its training, in one of the two folders above;
    else the one of a pipeline there, or beside the base. The record comes before the pipeline, because scripts of
    ``diffusers`` save a pipeline with the scheduler it samples with, which need not be the one it was trained with.

    Returns:
        A scheduler of its own ``diffusers`` class.

    Raises:
        CheckpointError: If there is none, or diffusers does not know its class.
    """
    above = [checkpoint.folder.parent, checkpoint.folder.parent.parent]
    base = [] if checkpoint.base_folder is None else [checkpoint.base_folder, checkpoint.base_folder.parent]
    places = [checkpoint.folder / "scheduler" / "scheduler_config.json"]
    places += [parent / "record" / "manifest.json" for parent in above]
    places += [folder / "scheduler" / "scheduler_config.json" for folder in above + base]
    path = next((place for place in places if place.exists()), None)
    if path is None:
        raise CheckpointError(
            f"No scheduler/scheduler_config.json in {checkpoint.folder} or the two folders above it. Save the noise "
            "scheduler of the training there: scheduler.save_pretrained(folder / 'scheduler')."
        )
    config = read_json(path)
    return (
        scheduler_of_record(path, config)
        if path.name == "manifest.json"
        else make_from_config(path, config, "scheduler")
    )


def scheduler_of_record(path: Path, manifest: Mapping[str, Any]) -> Any:
    """Make the noise scheduler that a record says training had.

    Args:
        path: The manifest, for messages.
        manifest: What is in it.

    Returns:
        A scheduler of its own ``diffusers`` class.

    Raises:
        CheckpointError: If the manifest does not say, or diffusers does not know its class.
    """
    recorded = manifest.get("scheduler")
    if not isinstance(recorded, dict) or not isinstance(recorded.get("config"), dict):
        raise CheckpointError(f"{path} does not say which scheduler training had. Restore it or train again.")
    return make_from_config(path, recorded["config"] | {"_class_name": recorded.get("class")}, "scheduler")


def save_checkpoint(
    folder: Path,
    step: int,
    model: Any,
    scheduler: Any,
    *,
    ema: Any = None,
    resume_tensors: "dict[str, dict[str, Tensor]] | None" = None,
    resume_state: dict[str, Any] | None = None,
    files: Mapping[str, Any] | None = None,
) -> Checkpoint:
    """Write ``folder/checkpoint-<step>``, which appears whole or not at all.

    Args:
        folder: Where checkpoints are kept.
        step: Optimizer steps taken.
        model: A ``diffusers`` model with its raw weights; of one with adapters of peft these alone are written.
        scheduler: The noise scheduler.
        ema: A ``diffusers.training_utils.EMAModel``, where one is kept.
        resume_tensors: Safetensors files to put into ``resume/``, by their stem.
        resume_state: Plain data to put into ``resume/state.json``.
        files: Plain data to put into JSON files beside the weights, by the names of these.

    Returns:
        The checkpoint on disk.

    Raises:
        CheckpointError: If a moving average of adapters is asked for.
    """
    from safetensors.torch import save_file

    target = folder / f"checkpoint-{step}"
    adapted = bool(getattr(model, "peft_config", None))
    if adapted and ema is not None:
        raise CheckpointError("No moving average is kept of a LoRA. Save its checkpoints without ema.")
    with publish_folder(target) as partial:
        if adapted:
            save_lora(model, partial)
        else:
            model.save_pretrained(partial / "unet", safe_serialization=True)
        if ema is not None:
            import torch

            with torch.random.fork_rng(devices=[]):  # it makes a model, which draws weights
                ema.save_pretrained(partial / "unet_ema")
        scheduler.save_pretrained(partial / "scheduler")
        if resume_state is not None:
            (partial / "resume").mkdir()
            for stem, tensors in (resume_tensors or {}).items():
                save_file(tensors, partial / "resume" / f"{stem}.safetensors")
            write_json(partial / "resume" / "state.json", resume_state)
        for name, value in (files or {}).items():
            write_json(partial / name, value)
        written = [f for f in sorted(partial.rglob("*")) if f.is_file()]
        checksums = {f.relative_to(partial).as_posix(): sha256_of_file(f) for f in written}
        write_json(partial / "checkpoint.json", {"format_version": FORMAT_VERSION, "step": step, "sha256": checksums})
    checkpoint = _as_checkpoint(target, step)
    assert checkpoint is not None  # its weights have just been written
    return checkpoint
