"""Embeddings that textual inversion learned, on disk, and how they are put into the text encoder of their base.

    learned_embeds.safetensors             vectors by placeholder token, as the script of diffusers writes them last
    learned_embeds-steps-<N>.safetensors   those after N steps, beside it

One text encoder of CLIP knows the tokens: Stable Diffusion 1 and 2. The base, a saved pipeline, is frozen. torch and
transformers are imported only when a model is made.
"""

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from whence._files import sha256_of_file
from whence._model_files import quiet_libraries, read_header, read_json, read_tensors
from whence.errors import CheckpointError, ConfigError, NumericsError

if TYPE_CHECKING:
    from whence.inverted_unet import InvertedUNet

FILE = "learned_embeds.safetensors"
_OF_STEPS = re.compile(r"learned_embeds-steps-(\d+)\.safetensors")


@dataclass(frozen=True)
class LearnedEmbeddings:
    """One file of learned embeddings."""

    weights: Path

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of the vectors of each placeholder token: width, or vectors and width.

        Raises:
            CheckpointError: If there are none, or they are no vectors of one width.
        """
        shapes = read_header(self.weights)[0]
        widths = {shape[-1] for shape in shapes.values() if shape}
        if len(widths) != 1 or any(len(shape) not in (1, 2) or 0 in shape for shape in shapes.values()):
            raise CheckpointError(
                f"{self.weights} must hold vectors of one width, by placeholder token; found {shapes or 'nothing'}. "
                "Save it as the textual_inversion.py of diffusers does."
            )
        return shapes

    @property
    def tokens(self) -> dict[str, tuple[str, ...]]:
        """The tokens of each placeholder, one for each of its vectors: ``<cat>``, ``<cat>_1``, ..."""
        counts = {name: 1 if len(shape) == 1 else shape[0] for name, shape in self.shapes.items()}
        return {name: (name, *(f"{name}_{k}" for k in range(1, count))) for name, count in sorted(counts.items())}

    @cached_property
    def content_hash(self) -> str:
        """Hash of the file."""
        return sha256_of_file(self.weights)

    @property
    def architecture(self) -> dict[str, Any]:
        """What must be the same in a series."""
        return {f"vectors of {name}": shape for name, shape in self.shapes.items()}


def find_embeddings(folder: Path) -> LearnedEmbeddings | None:
    """Find the learned embeddings of a checkpoint.

    Args:
        folder: Of the checkpoint.

    Returns:
        The file, or None.

    Raises:
        CheckpointError: If they are pickles, or of two text encoders.
    """
    _refuse_others(folder)
    return LearnedEmbeddings(folder / FILE) if (folder / FILE).exists() else None


def find_series(folder: Path) -> dict[int, LearnedEmbeddings]:
    """Find the embeddings that a training kept every so many steps.

    Args:
        folder: Output folder of the training.

    Returns:
        Files by step, in order; none where the training kept none.

    Raises:
        CheckpointError: If they are pickles, or of two text encoders, or the step of the last one is not known.
    """
    _refuse_others(folder)
    numbered = [(int(m[1]), f) for f in folder.glob("*") if (m := _OF_STEPS.fullmatch(f.name))]
    series = {step: LearnedEmbeddings(path) for step, path in sorted(numbered)}
    if len(series) < len(numbered):
        raise CheckpointError(f"Two files learned_embeds-steps-*.safetensors in {folder} have the same step.")
    last = find_embeddings(folder)
    if series and last is not None and last.content_hash != list(series.values())[-1].content_hash:
        raise CheckpointError(
            f"{last.weights} is not the last of the series beside it, and does not say after how many steps it was "
            "written. Rename it to learned_embeds-steps-<N>.safetensors, N being the training's --max_train_steps; or "
            f"trace it alone, in a folder of its own with the name {FILE}."
        )
    return series


def _refuse_others(folder: Path) -> None:
    found = sorted(folder.glob("learned_embeds*"))
    of_two = [path for path in found if path.name.startswith("learned_embeds_2")]
    if of_two:
        raise CheckpointError(
            f"{of_two[0]} is an embedding for the second text encoder of SDXL. whence takes gradients of embeddings of "
            "one text encoder, as in Stable Diffusion 1 and 2. Fine-tune the network on the same images instead, as a "
            "LoRA for example, and trace that."
        )
    pickles = [path for path in found if path.suffix != ".safetensors"]
    if pickles:
        raise CheckpointError(
            f"{pickles[0]} is a pickle, which can run code when it is opened. Save the embedding again as safetensors, "
            "without --no_safe_serialization."
        )


def find_inverted_base(base: Path, learned: LearnedEmbeddings) -> Path:
    """Find the UNet of the pipeline that an embedding was trained for.

    Args:
        base: A saved pipeline, or its ``unet`` folder.
        learned: The embedding.

    Returns:
        The folder of the UNet; ``text_encoder`` lies beside it.

    Raises:
        CheckpointError: If one of them is missing, or there are several text encoders.
    """
    pipeline = base if (base / "unet" / "config.json").exists() else base.parent
    lacking = [name for name in ("unet", "text_encoder") if not (pipeline / name / "config.json").exists()]
    if lacking:
        raise CheckpointError(
            f"{learned.weights} was learned for a saved pipeline with a UNet and a text encoder; {base} has no folder "
            f"{' and no folder '.join(lacking)} with a config.json. Give the pipeline of the training with --base."
        )
    if (pipeline / "text_encoder_2").exists():
        raise CheckpointError(
            f"{pipeline} has two text encoders, as SDXL does; whence takes gradients of embeddings of one text "
            f"encoder, as in Stable Diffusion 1 and 2. Give the pipeline that {learned.weights} was trained for."
        )
    return pipeline / "unet"


def load_text_encoder(folder: Path, *, allow_pickle: bool = False) -> Any:
    """Load a text encoder, in float32.

    Args:
        folder: Of a saved ``CLIPTextModel``.
        allow_pickle: Also read ``.bin`` files.

    Returns:
        The ``CLIPTextModel``.

    Raises:
        CheckpointError: If it is of another class, or cannot be loaded.
        ConfigError: If transformers is not installed.
    """
    import torch

    transformers = _import_transformers()
    _check_class(folder)
    pickle = next(iter(sorted(folder.glob("*.bin"))), None)
    if pickle is not None and not allow_pickle and not any(folder.glob("*.safetensors")):
        raise CheckpointError(
            f"{pickle} is a pickle, which can run code when it is opened. Save the pipeline again with "
            "safe_serialization=True, or pass --allow-pickle if you trust its source."
        )
    try:
        with quiet_libraries(), torch.random.fork_rng(devices=[]):
            model, about = transformers.CLIPTextModel.from_pretrained(
                str(folder),
                local_files_only=True,
                use_safetensors=None if allow_pickle else True,
                dtype=torch.float32,
                output_loading_info=True,
            )
    except Exception as error:  # transformers raises what it likes
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"The text encoder in {folder} cannot be loaded: {first}") from error
    missing = sorted(about["missing_keys"])
    if missing:
        raise CheckpointError(f"The text encoder in {folder} is not whole: missing are {missing[:5]}. Restore it.")
    return model


def describe_text_encoder(folder: Path) -> Any:
    """Make a text encoder without its weights; it cannot be run.

    Args:
        folder: Of a saved ``CLIPTextModel``.

    Returns:
        The ``CLIPTextModel`` on the device ``meta``.
    """
    import torch

    transformers = _import_transformers()
    _check_class(folder)
    with torch.device("meta"), quiet_libraries():
        return transformers.CLIPTextModel(transformers.CLIPTextConfig.from_pretrained(str(folder)))


def _import_transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ConfigError(
            f"Embeddings of textual inversion need transformers ({error}). Install it: pip install 'whence[pipelines]'"
        ) from error
    return transformers


def _check_class(folder: Path) -> None:
    named = read_json(folder / "config.json").get("architectures")
    if named != ["CLIPTextModel"]:
        raise CheckpointError(
            f"{folder / 'config.json'} names class {named}; whence puts learned embeddings into a CLIPTextModel, the "
            "text encoder of Stable Diffusion 1 and 2."
        )


def invert(unet: Any, text_encoder: Any, learned: LearnedEmbeddings) -> "InvertedUNet":
    """Put learned embeddings before a frozen text encoder and UNet.

    Args:
        unet: The UNet of the base; its parameters are frozen.
        text_encoder: The text encoder of the base; it is changed.
        learned: The embeddings.

    Returns:
        A network that is told ``input_ids``; its learned vectors alone are trainable.

    Raises:
        CheckpointError: If the vectors have another width than the text encoder.
        NumericsError: If one of them is not finite.
    """
    import torch

    from whence.inverted_unet import InvertedUNet

    width, shapes = text_encoder.config.hidden_size, learned.shapes
    wrong = [f"{token} has {shape[-1]}" for token, shape in shapes.items() if shape[-1] != width]
    if wrong:
        raise CheckpointError(
            f"The text encoder of the base has embeddings of width {width}; in {learned.weights} {', '.join(wrong)}. "
            "Give the pipeline of the training with --base."
        )
    held = read_tensors(learned.weights)
    bad = [token for token, vectors in held.items() if not torch.isfinite(vectors).all()]
    if bad:
        raise NumericsError(f"{learned.weights}: {bad[0]} holds NaN or infinite values. Leave this checkpoint out.")
    return InvertedUNet(
        unet, text_encoder, torch.cat([held[token].float().reshape(-1, width) for token in learned.tokens])
    )
