"""Encoding of images for networks of latents, captions or classes: which encoder it takes, and a cache of its work.

    cache/encoded/<hash>/latents-<first>.safetensors    256 images: mean (deviation, mirrored_mean, mirrored_deviation)
    cache/encoded/<hash>/conditions.safetensors         an array for each argument of the network

The hash is that of the encoder, the images, their captions and of what is asked for. What is there is not made again,
so that latents whose encoding was interrupted go on from there.
"""

import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy import ndarray

from whence._array_files import read_arrays, write_arrays
from whence._columns import abbreviate
from whence._files import sha256_of_json
from whence.checkpoints import Checkpoint, describe_network
from whence.config import ConditioningSettings
from whence.data import ImageData
from whence.diffusion.adapters import channels_of, check_model, needed_conditions
from whence.encoded import AbstractEncoder, Arrays, Conditions, Encoded, Latents
from whence.errors import CheckpointError, ConfigError, DataError
from whence.inversion_encoder import InversionEncoder
from whence.pipeline_encoder import PipelineEncoder
from whence.progress import progress_bar
from whence.record import Record
from whence.words import WITHHELD, ClassEncoder, encoder_of

BLOCK = 256
"""Images in a file of the cache."""
_BATCH = 8
"""Images that go through a VAE at once."""


@dataclass(frozen=True)
class Encoding:
    """How the images of a model are encoded."""

    encoder: AbstractEncoder
    reads: str | None
    """What conditions are made of: ``captions``, ``labels``, or None for an unconditional network."""
    caption: str | None = None
    """Caption of images without one."""
    one_caption: bool = False
    """Whether training told that caption of every image, whatever stands beside it."""
    mirrored: bool = False
    """Whether training mirrored images before they were encoded."""
    drawn: bool = False
    """Whether training drew latents from the VAE's posterior."""

    def encode(self, images: ImageData, cache: Path | None, *, show_progress: bool = True) -> ImageData:
        """Put latents and conditions beside images.

        Args:
            images: Images, with the captions or labels that the network is told.
            cache: Folder for what is encoded; None: it is not kept, and there must be no VAE.
            show_progress: Show a progress bar.

        Returns:
            The images with an ``encoding``.

        Raises:
            DataError: If captions or labels are missing.
            CheckpointError: If a part of the pipeline is missing or does not fit the images.
        """
        texts = self._texts(images)
        key = sha256_of_json([self.encoder.hash, images.fingerprint, texts, self.mirrored, self.drawn])
        folder = None if cache is None else cache / "encoded" / key[:16]
        latents = mirrored = None
        if self.encoder.has_vae:
            assert folder is not None  # a VAE takes too long for its work to be lost
            arrays = self._latents(images, folder, show_progress)
            latents = Latents(arrays["mean"], arrays.get("deviation"))
            if self.mirrored:
                mirrored = Latents(arrays["mirrored_mean"], arrays.get("mirrored_deviation"))
        conditions = None if texts is None else self._conditions(texts, images, folder)
        return replace(images, encoding=Encoded(self.encoder.hash, latents, mirrored, conditions))

    def _texts(self, images: ImageData) -> list[str] | None:
        """Give the caption or label of each image."""
        if self.reads is None:
            return None
        found = images.captions if self.reads == "captions" else images.labels
        instead = (self.caption if self.reads == "captions" else None) or ""
        texts = [text or instead for text in found or [""] * len(images)]
        fault = self.encoder.fault_of(texts)
        if fault is not None:
            raise DataError(f"The {self.reads} of {images.source} {fault}")
        empty = [images.ids[row] for row, text in enumerate(texts) if not text]
        nothing_said = len(empty) == len(images) and not found
        if empty and (not self.encoder.knows_none or nothing_said):
            what, option = ("label", "--label-column") if self.reads == "labels" else ("caption", "--caption-column")
            raise DataError(
                f"The network is told the {what} of each image; {len(empty)} of {len(images)} images of "
                f"{images.source} have none: {abbreviate(empty)}. Name the column with {option}, or a metadata.jsonl "
                "beside the images"
                + (
                    "; or give one caption for all with --caption, to queries with --prompts."
                    if what == "caption"
                    else "."
                )
            )
        return texts

    def _conditions(self, texts: list[str], images: ImageData, folder: Path | None) -> Conditions:
        withheld = [WITHHELD] if self.encoder.knows_none else []
        distinct = sorted(set(texts + withheld))
        path = None if folder is None else folder / "conditions.safetensors"
        if path is not None and path.exists():
            arrays: Arrays = read_arrays(path)
        else:
            size = (images.height, images.width)
            parts = [
                self.encoder.conditions(distinct[start : start + BLOCK], size)
                for start in range(0, len(distinct), BLOCK)
            ]
            arrays = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
                write_arrays(path, dict(arrays))
        which = {text: k for k, text in enumerate(distinct)}
        return Conditions(
            tuple(distinct), arrays, np.array([which[text] for text in texts], dtype=np.int64), which.get(WITHHELD)
        )

    def _latents(self, images: ImageData, folder: Path, show_progress: bool) -> dict[str, ndarray]:
        folder.mkdir(parents=True, exist_ok=True)
        places = {folder / f"latents-{start:08d}.safetensors": start for start in range(0, len(images), BLOCK)}
        todo = {path: start for path, start in places.items() if not path.exists()}
        with progress_bar("encode", len(todo), "block", shown=show_progress and len(todo) > 1) as bar:
            for path, start in todo.items():
                write_arrays(path, self._encode_block(images, range(start, min(start + BLOCK, len(images)))))
                bar.update()
        blocks = [read_arrays(path) for path in places]
        return {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}

    def _encode_block(self, images: ImageData, rows: range) -> dict[str, ndarray]:
        parts: dict[str, list[ndarray]] = {}
        for start in range(rows.start, rows.stop, _BATCH):
            pixels = images.pixels(range(start, min(start + _BATCH, rows.stop)))
            ways = {"": pixels} | ({"mirrored_": np.ascontiguousarray(pixels[..., ::-1])} if self.mirrored else {})
            for prefix, some in ways.items():
                latents = self.encoder.latents(some, with_deviation=self.drawn)
                parts.setdefault(f"{prefix}mean", []).append(latents.mean)
                if latents.deviation is not None:
                    parts.setdefault(f"{prefix}deviation", []).append(latents.deviation)
        return {name: np.concatenate(arrays) for name, arrays in parts.items()}


def find_encoding(
    checkpoint: Checkpoint,
    images: ImageData,
    record: Record | None,
    settings: ConditioningSettings,
) -> Encoding | None:
    """Find out how the images of a model are to be encoded.

    Args:
        checkpoint: Any checkpoint of the model.
        images: Training images, as opened.
        record: Record of the training, or None.
        settings: What the user said.

    Returns:
        The encoding, or None where the network sees pixels and is told nothing.

    Raises:
        CheckpointError: If the network needs a pipeline that is not found.
        ConfigError: If something is needed that nothing says; all of it in one message.
        DataError: If training had two prompts, and images do not say which is theirs.
    """
    own = own_encoding(encoder_of(checkpoint.folder))
    if own is not None:
        return own
    network = describe_network(checkpoint)
    check_model(network)
    needs = needed_conditions(network)
    _warn_of_vain(settings, network, needs)
    names_base, settings = settings.base is not None, _with_recorded(settings, record)
    pipeline = _pipeline_of(checkpoint, settings)
    if not needs and pipeline is None and channels_of(network) in (1, 3):
        return None
    encoder: AbstractEncoder
    if "class_labels" in needs:
        encoder = _class_encoder(network, images, settings, pipeline)
        reads = "labels"
    else:
        encoder = _need_pipeline(pipeline, network, needs, settings, checkpoint)
        if checkpoint.learned is not None:
            encoder = InversionEncoder(encoder, checkpoint.learned)
        reads = "captions" if needs else None
        if needs:
            _check_prior_prompts(images, record)
    if reads is None and not encoder.has_vae:
        return None
    flips = record is not None and bool(record.visits.flip.any() or record.probes.flip.any())
    drawn = record is not None and record.manifest.get("latents") == "sample"
    other_vae = None if record is None else record.manifest["config"].get("pretrained_vae_model_name_or_path")
    if encoder.has_vae and other_vae and not names_base:
        warnings.warn(
            f"Training encoded images by the VAE {other_vae}; here it is that of the pipeline. Where the two differ, "
            "put that VAE into the vae/ folder of a copy of the pipeline and give it with --base.",
            stacklevel=2,
        )
    return Encoding(
        encoder,
        reads,
        settings.caption,
        one_caption=reads == "captions" and _told_one_caption(record),
        mirrored=encoder.has_vae and flips,
        drawn=encoder.has_vae and drawn,
    )


def _warn_of_vain(asked: ConditioningSettings, network: Any, needs: tuple[str, ...]) -> None:
    """Warn of what the user said and the network is not told."""
    vain = []
    if asked.guidance_scale is not None and "guidance" not in needs:
        vain.append("guidance_scale")
    if asked.class_names and "class_labels" not in needs:
        vain.append("class_names")
    if asked.caption is not None and (not needs or "class_labels" in needs):
        vain.append("caption")
    if vain:
        warnings.warn(f"A {type(network).__name__} is not told {', '.join(vain)}: without effect here.", stacklevel=3)


def _told_one_caption(record: Record | None) -> bool:
    """Tell a training of DreamBooth that read no captions and had no class images, which have a prompt of their own."""
    config = {} if record is None else record.manifest["config"]
    alike = config.get("caption_column") is None and not config.get("with_prior_preservation")
    return alike and config.get("instance_prompt") is not None


def _check_prior_prompts(images: ImageData, record: Record | None) -> None:
    """Refuse a training with prior preservation whose images do not say which of the two prompts they were told."""
    config = {} if record is None else record.manifest["config"]
    told = images.captions or [""] * len(images)
    without = [id_ for id_, text in zip(images.ids, told, strict=True) if not text]
    if config.get("with_prior_preservation") and without:
        raise DataError(
            f"Training told instances {config.get('instance_prompt')!r} and class images "
            f"{config.get('class_prompt')!r}; {len(without)} of {len(images)} images of {images.source} do not say "
            f"which they are: {abbreviate(without)}. Give each its prompt in a metadata.jsonl beside the images."
        )


def _need_pipeline(
    pipeline: Path | None,
    network: Any,
    needs: tuple[str, ...],
    settings: ConditioningSettings,
    checkpoint: Checkpoint,
) -> PipelineEncoder:
    if pipeline is None:
        told = f"is told {', '.join(needs)}" if needs else f"takes {channels_of(network)} channels, which are latents"
        raise CheckpointError(
            f"The {type(network).__name__} in {checkpoint.folder} {told}. Give the pipeline that it was trained "
            "from, a folder with a model_index.json, with --base."
        )
    if "guidance" in needs and settings.guidance_scale is None:
        raise ConfigError(
            f"The {type(network).__name__} in {checkpoint.folder} is told a guidance scale. Give that of the training "
            "(its script's --guidance_scale) with --guidance-scale."
        )
    if "guidance" not in needs and settings.guidance_scale is not None:
        settings = replace(settings, guidance_scale=None)  # scripts have the flag whether the network is told or not
    return PipelineEncoder(pipeline, type(network).__name__, settings)


def own_encoding(encoder: AbstractEncoder | None) -> Encoding | None:
    """Say how images are encoded for a network that ``whence train`` made; None for one that is told nothing."""
    if encoder is None:
        return None
    return Encoding(encoder, "labels" if isinstance(encoder, ClassEncoder) else "captions")


def _class_encoder(
    network: Any, images: ImageData, settings: ConditioningSettings, pipeline: Path | None
) -> ClassEncoder:
    """Number the labels of the training images.

    Returns:
        What knows their numbers.

    Raises:
        ConfigError: If there are more of them than the network has classes.
    """
    classes, count = settings.class_names or _class_names(images), _num_classes(network)
    numbered = all(name.isdigit() for name in classes) and not settings.class_names
    if len(classes) > count or (len(classes) < count and not numbered):
        given = "--class-names has" if settings.class_names else "the images have"
        raise ConfigError(
            f"The network has {count} classes; {given} {len(classes)}: {abbreviate(classes)}. Give all labels of the "
            "training, in its order, with --class-names."
        )
    vae = None if pipeline is None else PipelineEncoder(pipeline, type(network).__name__, settings)
    # DiT learns an embedding more, for labels that training withholds.
    withheld = count if type(network).__name__ == "DiTTransformer2DModel" else None
    return ClassEncoder(classes, withheld, vae)


def _pipeline_of(checkpoint: Checkpoint, settings: ConditioningSettings) -> Path | None:
    """Find the pipeline's folder: the one that was named, or one around the checkpoint."""
    if settings.base is not None:
        # What adapts a network may be given that alone, which lies in the pipeline's folder.
        named = Path(settings.base)
        inside = not (named / "model_index.json").exists() and (named.parent / "model_index.json").exists()
        return named.parent if inside else named
    around = [checkpoint.folder, *list(checkpoint.folder.parents)[:2]]
    if checkpoint.base_folder is not None:
        around += [checkpoint.base_folder, checkpoint.base_folder.parent]
    return next((folder for folder in around if (folder / "model_index.json").exists()), None)


def _with_recorded(settings: ConditioningSettings, record: Record | None) -> ConditioningSettings:
    """Fill in what the training script was told, by the names of its flags."""
    if record is None:
        return settings
    config = record.manifest["config"]
    named = config.get("pretrained_model_name_or_path")
    found = {
        "base": named if isinstance(named, str) and (Path(named) / "model_index.json").exists() else None,
        "caption": config.get("instance_prompt"),
        "guidance_scale": config.get("guidance_scale"),
        "max_sequence_length": config.get("max_sequence_length"),
    }
    return replace(settings, **{name: value for name, value in found.items() if getattr(settings, name) is None})


def _class_names(images: ImageData) -> tuple[str, ...]:
    """Put labels into order: numbers by their value, names by the alphabet, as imagefolder does."""
    if images.labels is None:
        return ()
    distinct = set(images.labels) - {""}
    if all(label.isdigit() for label in distinct):
        return tuple(str(k) for k in range(max(map(int, distinct), default=-1) + 1))
    return tuple(sorted(distinct))


def _num_classes(network: Any) -> int:
    config = network.config
    return getattr(config, "num_class_embeds", None) or getattr(config, "num_embeds_ada_norm", None) or 0
