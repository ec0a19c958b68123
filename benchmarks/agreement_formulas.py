"""What both sides of benchmarks/agreement.py share, and the formulas of the papers, written out.

Nothing of whence is used. What is handed over is a safetensors file: weights of the checkpoints, and the events of
training images and queries as noisy images, timesteps and targets. Gradients are taken with autograd, one sample at a
time, in float64; a sample is all events of an image.
"""

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from models import Inputs, predict, sample_losses
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

Output = Literal["loss", "squares", "mean"]


class Handover:
    """What both sides share, in float64.

    Args:
        file: What agreement.py has written.
    """

    def __init__(self, file: Path):
        with safe_open(file, "pt") as opened:
            about = json.loads(opened.metadata()["about"])
        self.tensors = load_file(file)
        self.config: dict[str, Any] = about["config"]
        self.damping: float = about["damping"]
        """In multiples of a mean eigenvalue."""
        self.query_timesteps: int = about["query_timesteps"]
        self.block: list[str] = about["block"]
        """Parameters of one layer."""
        self.num_checkpoints: int = about["num_checkpoints"]

    def part(self, prefix: str) -> dict[str, Tensor]:
        """Give the tensors whose names start so, by the rest of their names."""
        return {name.removeprefix(prefix): t for name, t in self.tensors.items() if name.startswith(prefix)}

    def weights(self, checkpoint: int = -1) -> dict[str, Tensor]:
        """Give the weights of a checkpoint, in the model's order."""
        return dict(self.model(checkpoint).named_parameters())

    def model(self, checkpoint: int = -1) -> nn.Module:
        """Make the network at a checkpoint."""
        import diffusers

        made: Any = diffusers.UNet2DModel.from_config(self.config)
        model = made.double().eval()
        model.load_state_dict(self.part(f"weights.{checkpoint % self.num_checkpoints}."))
        return model

    def inputs(self, name: str) -> Inputs:
        """Give events; their axes are sample, event, and those of an image."""
        return Inputs(**self.part(f"{name}."))

    @cached_property
    def train(self) -> Inputs:
        """Training images on a grid."""
        return self.inputs("train")

    @cached_property
    def queries(self) -> Inputs:
        """Queries on a grid, timestep by timestep."""
        return self.inputs("query")

    @cached_property
    def query_units(self) -> Inputs:
        """The draws of each query at each timestep, as a sample of its own."""
        shape = (len(self.queries) * self.query_timesteps, -1)
        return Inputs(*(t.reshape(*shape, *t.shape[2:]) for t in self.queries.tensors()))

    def replay(self, checkpoint: int) -> tuple[Inputs, Tensor]:
        """Give the last visits before a checkpoint, one event a sample, and their weights."""
        return self.inputs(f"replay.{checkpoint}"), self.tensors[f"replay_weight.{checkpoint}"]


def events_of(inputs: Inputs) -> Inputs:
    """Put samples and events on one axis."""
    return Inputs(*(t.flatten(0, 1) for t in inputs.tensors()))


def output_of(prediction: Tensor, target: Tensor, output: Output) -> Tensor:
    """Give the output function of some events, their mean."""
    values = {
        "loss": lambda: (prediction - target).square(),
        "squares": lambda: prediction.square(),
        "mean": lambda: prediction,
    }
    return values[output]().mean()


def gradients(
    model: nn.Module, inputs: Inputs, output: Output = "loss", names: Sequence[str] | None = None
) -> dict[str, Tensor]:
    """Take the gradient of each sample with autograd, one at a time.

    Returns:
        By parameter, samples on the first axis.
    """
    chosen = {name: p for name, p in model.named_parameters() if names is None or name in names}
    rows = []
    for sample in zip(*inputs.tensors(), strict=True):
        value = output_of(predict(model, sample[0], sample[1]), sample[2], output)
        rows.append(torch.autograd.grad(value, list(chosen.values())))
    return {name: torch.stack(column) for name, column in zip(chosen, zip(*rows, strict=True), strict=True)}


def flat(gradients: Mapping[str, Tensor]) -> Tensor:
    """Join the gradients of all parameters: (sample, parameter)."""
    return torch.cat([g.flatten(1) for g in gradients.values()], dim=1)


def formula_dots(case: Handover, checkpoints: Literal["all", "last"], normalised: bool) -> Tensor:
    """Inner products of mean gradients, or their cosines, added up over checkpoints."""
    total = torch.zeros(())
    for checkpoint in range(case.num_checkpoints) if checkpoints == "all" else [-1]:
        model = case.model(checkpoint)
        phi, psi = (flat(gradients(model, inputs)) for inputs in (case.train, case.queries))
        if normalised:
            phi, psi = unit(phi), unit(psi)
        total = total + psi @ phi.T
    return total


def formula_replay(case: Handover, normalised: bool, adam: bool) -> Tensor:
    """Diffusion-TracIn, and Diffusion-ReTrac where ``normalised``; with Adam's scale between the two."""
    total = torch.zeros(())
    for checkpoint in range(case.num_checkpoints):
        model = case.model(checkpoint)
        visits, weight = case.replay(checkpoint)
        phi, psi = (flat(gradients(model, inputs)) for inputs in (visits, case.query_units))
        if normalised:
            phi, psi = unit(phi), unit(psi)
        psi = psi.unflatten(0, (-1, case.query_timesteps)).mean(1)
        if adam:
            state = case.part(f"adam.{checkpoint}.")
            squares, steps = ({n: state[f"{field}.{n}"] for n in case.weights()} for field in ("exp_avg_sq", "step"))
            psi = psi / flat({n: ((s / (1 - 0.999 ** steps[n])).sqrt() + 1e-8)[None] for n, s in squares.items()})
        total = total + psi @ phi.T * weight
    return total


def formula_ridge(
    case: Handover,
    output: Output = "loss",
    after: Literal["none", "length", "theta", "l", "residual"] = "none",
    *,
    per_timestep: bool = False,
    squared: bool = False,
    checkpoints: Literal["all", "last"] = "last",
) -> Tensor:
    """TRAK and its kin: ridge regression of the query's gradient on those of training images."""
    total = torch.zeros(())
    for checkpoint in range(case.num_checkpoints) if checkpoints == "all" else [-1]:
        model = case.model(checkpoint)
        phi, psi = (features(model, inputs, case, output, per_timestep) for inputs in (case.train, case.queries))
        gram = phi @ phi.T
        inverse = torch.linalg.inv(gram + case.damping * gram.trace() / len(gram) * torch.eye(len(gram)).to(gram))
        moved = phi.T @ inverse  # column i is (Phi^T Phi + d)^-1 phi_i
        leverage = (phi * moved.T).sum(1)
        factors = {
            "none": lambda: torch.ones(()),
            "length": lambda phi=phi: 1 / phi.norm(dim=1),
            "theta": lambda moved=moved: 1 / moved.norm(dim=0),
            "l": lambda leverage=leverage: leverage.rsqrt(),
            "residual": lambda leverage=leverage, model=model: errors(model, case.train) / (1 - leverage),
        }
        total = total + psi @ moved * factors[after]()
    return total.square() if squared else total


def features(model: nn.Module, inputs: Inputs, case: Handover, output: Output, per_timestep: bool) -> Tensor:
    """Mean gradients of samples; or the mean of those of each timestep at length 1."""
    if not per_timestep:
        return flat(gradients(model, inputs, output))
    # Both grids have as many timesteps.
    units = Inputs(*(t.reshape(len(inputs) * case.query_timesteps, -1, *t.shape[2:]) for t in inputs.tensors()))
    return unit(flat(gradients(model, units, output))).unflatten(0, (len(inputs), -1)).mean(1)


@torch.no_grad()
def errors(model: nn.Module, inputs: Inputs) -> Tensor:
    """Root mean square error of the prediction over the events of each sample."""
    return sample_losses(model, events_of(inputs)).unflatten(0, (len(inputs), -1)).mean(1).sqrt()


def unit(rows: Tensor) -> Tensor:
    """Bring rows to length 1."""
    return rows / rows.norm(dim=1, keepdim=True)
