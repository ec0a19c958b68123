"""What stands between whole gradients at a checkpoint: curvature, kept on disk, or the optimizer's own scale.

    cache/curvature/<key>.safetensors    <weight>:out, :inner, :eigenvalues of each layer; <parameter>:squares of others

The key is of all that the curvature depends on. It comes from passes over training images with sampled residuals: one
for the factors, and for EK-FAC a second one, for second moments in their eigenvectors.
"""

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from whence._array_files import read_arrays, write_arrays
from whence.checkpoints import Checkpoint
from whence.curvature.kronecker import KroneckerBlock, KroneckerCurvature
from whence.data import ImageData
from whence.engine.curvature_sinks import CovarianceSink, SecondMomentSink
from whence.errors import CheckpointError
from whence.event_table import grid_events
from whence.gradients import GradientSource
from whence.methods.frame import KroneckerInverse
from whence.workload import curvature_passes


def load_or_make_curvature(
    path: Path,
    source: GradientSource,
    images: ImageData,
    precondition: KroneckerInverse,
    seed: int,
    update: Callable[[int], Any],
) -> KroneckerCurvature:
    """Give the curvature of a checkpoint, from disk if it is there.

    Args:
        path: File that it is kept in.
        source: The model at the checkpoint.
        images: Training images; all of them count.
        precondition: Which curvature.
        seed: Seed of the noise.
        update: Called with the number of events done.

    Returns:
        The curvature.
    """
    if path.exists():
        update(curvature_passes(precondition, len(images)).once)
    else:
        write_arrays(path, _as_arrays(_make_curvature(source, images, precondition, seed, update)))
    return _from_arrays(path, source)


def adam_scales(
    checkpoint: Checkpoint, names: Collection[str], beta2: float | None, eps: float
) -> dict[str, Float[Tensor, "*shape"]]:
    """Read what Adam divided gradients by at a checkpoint: sqrt(v / (1 - beta2^step)) + eps.

    Args:
        checkpoint: It must hold the optimizer's state.
        names: Parameters.
        beta2: Decay rate of the mean square.
        eps: What was added to the root.

    Returns:
        The divisors by parameter.

    Raises:
        CheckpointError: If there is no such state, of these parameters, or ``beta2`` is not known.
    """
    path = checkpoint.folder / "resume" / "optimizer.safetensors"
    found = read_arrays(path) if path.exists() else {}
    lacking = [name for name in names if not {f"exp_avg_sq.{name}", f"step.{name}"} <= found.keys()]
    if lacking or beta2 is None:
        what = "the state of an Adam optimizer" if lacking else "adam_beta2 in the config of its record"
        raise CheckpointError(
            f"{checkpoint.folder} has not {what}. `whence train` writes it; in a loop of your own, give "
            "Recorder.save the optimizer's tensors as resume_tensors, and the Recorder a config with adam_beta2."
        )
    scales = {}
    for name in names:
        square, step = (torch.from_numpy(found[f"{field}.{name}"]) for field in ("exp_avg_sq", "step"))
        scales[name] = (square / (1 - beta2 ** float(step))).sqrt() + eps
    return scales


def _make_curvature(
    source: GradientSource,
    images: ImageData,
    precondition: KroneckerInverse,
    seed: int,
    update: Callable[[int], Any],
) -> KroneckerCurvature:
    rows = range(len(images))
    table = grid_events(images, rows, "train", precondition.events, source.process.num_timesteps, seed)
    first = CovarianceSink(reduce=precondition.sharing == "reduce")
    source.sampled_gradients(table, images, [first], update)
    blocks = {
        # A counts positions, G events: their sums over positions make one gradient.
        name: KroneckerBlock.of(found.out / len(table), found.inner / (len(table) * found.positions), found.bias)
        for name, found in first.covariances.items()
    }
    squares = {name: total / len(table) for name, total in first.squares.items()}
    if precondition.kind == "ekfac":
        second = SecondMomentSink({name: (block.out_basis, block.inner_basis) for name, block in blocks.items()})
        source.sampled_gradients(table, images, [second], update)
        blocks = {
            name: KroneckerBlock(b.out_basis, b.inner_basis, second.squares[name] / len(table), b.bias)
            for name, b in blocks.items()
        }
    return KroneckerCurvature(blocks, squares)


def _as_arrays(curvature: KroneckerCurvature) -> dict[str, Any]:
    arrays = {f"{name}:squares": squares for name, squares in curvature.squares.items()}
    for name, block in curvature.blocks.items():
        parts = {"out": block.out_basis, "inner": block.inner_basis, "eigenvalues": block.eigenvalues}
        arrays |= {f"{name}:{part}": tensor for part, tensor in parts.items()}
    return {name: tensor.cpu().numpy() for name, tensor in arrays.items()}


def _from_arrays(path: Path, source: GradientSource) -> KroneckerCurvature:
    arrays = {name: torch.from_numpy(array).to(source.device) for name, array in read_arrays(path).items()}
    names = [name.removesuffix(":out") for name in arrays if name.endswith(":out")]
    blocks = {}
    for name in names:
        out, inner, eigenvalues = (arrays[f"{name}:{part}"] for part in ("out", "inner", "eigenvalues"))
        has_bias = len(inner) > source.capture.parameters[name][0].numel()
        blocks[name] = KroneckerBlock(
            out, inner, eigenvalues, f"{name.removesuffix('weight')}bias" if has_bias else None
        )
    squares = {name.removesuffix(":squares"): array for name, array in arrays.items() if name.endswith(":squares")}
    return KroneckerCurvature(blocks, squares)
