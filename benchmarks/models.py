"""The networks and inputs that are measured, and the plain pass that everything is measured against.

Both our process and the peers' import this, so it needs torch, diffusers and safetensors, and nothing of whence.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

NUM_TIMESTEPS = 1000
NUM_QUERIES = 16
DRAWS = 16
"""Draws at one timestep of the query side."""


@dataclass(frozen=True)
class Inputs:
    """What the network sees and should answer; samples on the first axis."""

    noisy: Tensor  # (sample, channel, height, width)
    timesteps: Tensor  # (sample,)
    target: Tensor  # (sample, channel, height, width)

    def __len__(self) -> int:
        return len(self.timesteps)

    def __getitem__(self, which: slice) -> "Inputs":
        return Inputs(self.noisy[which], self.timesteps[which], self.target[which])

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Give the columns, for libraries that take data as tuples."""
        return self.noisy, self.timesteps, self.target


@dataclass(frozen=True)
class Case:
    """A network and fixed inputs, the same in every process."""

    name: str
    model: nn.Module
    inputs: Inputs
    """Enough for the largest batch, then the queries."""
    batch_size: int

    @property
    def train(self) -> Inputs:
        """The batch that every path is measured on."""
        return self.inputs[: self.batch_size]

    @property
    def queries(self) -> Inputs:
        """What the batch is scored against."""
        return self.inputs[-NUM_QUERIES:]

    @property
    def query_batch(self) -> Inputs:
        """The larger batch of the query side, whose units are all draws of a timestep."""
        return self.inputs[:-NUM_QUERIES]

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """Parameters whose gradients are wanted."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    @property
    def num_params(self) -> int:
        """Length of a gradient."""
        return sum(p.numel() for p in self.parameters.values())


class UnlabelledDiT(nn.Module):
    """A DiT called as an unconditional network is. The table of class embeddings is not trained: every class is 0."""

    def __init__(self, net: Any):
        super().__init__()
        self.net = net
        for name, parameter in net.named_parameters():
            parameter.requires_grad_("embedding_table" not in name)

    def forward(
        self, noisy: Tensor, timesteps: Tensor, class_labels: None = None, return_dict: bool = False
    ) -> tuple[Tensor]:
        """Run the network; a tuple of one, as diffusers gives without ``return_dict``."""
        del class_labels
        classes = torch.zeros_like(timesteps)
        return self.net(noisy, timestep=timesteps, class_labels=classes, return_dict=return_dict)


def make_unet(size: int, widths: tuple[int, ...], layers_per_block: int, norm_groups: int) -> nn.Module:
    """Make a UNet2DModel with self-attention at its lowest level."""
    import diffusers

    plain_levels = len(widths) - 1
    return diffusers.UNet2DModel(
        sample_size=size,
        block_out_channels=widths,
        layers_per_block=layers_per_block,
        down_block_types=("DownBlock2D",) * plain_levels + ("AttnDownBlock2D",),
        up_block_types=("AttnUpBlock2D",) + ("UpBlock2D",) * plain_levels,
        norm_num_groups=norm_groups,
    )


def make_dit(size: int, heads: int, layers: int) -> nn.Module:
    """Make a DiT on patches of 2 x 2 pixels, with heads of 32 channels."""
    import diffusers

    net = diffusers.DiTTransformer2DModel(
        sample_size=size,
        patch_size=2,
        in_channels=3,
        num_attention_heads=heads,
        attention_head_dim=32,
        num_layers=layers,
        num_embeds_ada_norm=1,
    )
    return UnlabelledDiT(net)


MODELS: dict[str, tuple[int, Callable[[int], nn.Module]]] = {
    "toy": (8, lambda size: make_unet(size, (8, 8), 1, 4)),
    "UNet 0.45 M, 16 px": (16, lambda size: make_unet(size, (16, 32, 48), 1, 8)),
    "UNet 0.46 M, 16 px, two levels": (16, lambda size: make_unet(size, (32, 48), 1, 8)),
    "UNet 1.6 M, 16 px": (16, lambda size: make_unet(size, (48, 96), 1, 8)),
    "UNet 1.6 M, 32 px": (32, lambda size: make_unet(size, (48, 96), 1, 8)),
    "DiT 1.4 M, 16 px": (16, lambda size: make_dit(size, 4, 4)),
    "UNet 16 M, 32 px": (32, lambda size: make_unet(size, (64, 128, 256), 2, 32)),
    "UNet 36 M, 32 px": (32, lambda size: make_unet(size, (128, 256, 256, 256), 2, 32)),
}
"""Name to size in pixels and what makes the network of that size."""


def make_network(name: str) -> nn.Module:
    """Make a network with random weights, none of them zero."""
    size, make = MODELS[name]
    return make(size).eval()


def save_case(file: Path, name: str, batch_size: int, query_batch_size: int) -> None:
    """Make the weights and inputs of a case and write them, so that all processes have the same."""
    torch.manual_seed(0)
    model = make_network(name)
    count, size = query_batch_size + NUM_QUERIES, MODELS[name][0]
    tensors = {f"weights.{key}": value.contiguous() for key, value in model.state_dict().items()}
    tensors |= {
        "noisy": torch.randn(count, 3, size, size),
        "timesteps": torch.randint(0, NUM_TIMESTEPS, (count,)),
        "target": torch.randn(count, 3, size, size),
    }
    save_file(tensors, file, {"name": name, "batch_size": str(batch_size)})


def load_case(file: Path, device: str) -> Case:
    """Load what :func:`save_case` wrote."""
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        about = opened.metadata()
    tensors = load_file(file, device)
    model = make_network(about["name"])
    model.load_state_dict({key.removeprefix("weights."): v for key, v in tensors.items() if key.startswith("weights.")})
    inputs = Inputs(tensors["noisy"], tensors["timesteps"], tensors["target"])
    return Case(about["name"], model.to(device), inputs, int(about["batch_size"]))


def predict(model: nn.Module, noisy: Tensor, timesteps: Tensor) -> Tensor:
    """Run the network."""
    return model(noisy, timesteps, return_dict=False)[0]


def sample_losses(model: nn.Module, inputs: Inputs) -> Tensor:
    """Mean squared error of each sample."""
    return (predict(model, inputs.noisy, inputs.timesteps) - inputs.target).square().flatten(1).mean(1)


def plain_pass(case: Case, inputs: Inputs) -> None:
    """Run the forward and backward pass of a training step: the unit in which costs are given."""
    sample_losses(case.model, inputs).sum().backward()
    for parameter in case.parameters.values():
        parameter.grad = None


def flat_gradient(case: Case, inputs: Inputs) -> Tensor:
    """Gradient of the summed loss, as one vector."""
    gradients = torch.autograd.grad(sample_losses(case.model, inputs).sum(), list(case.parameters.values()))
    return torch.cat([gradient.flatten() for gradient in gradients])


def each_gradient(case: Case, inputs: Inputs) -> Tensor:
    """Gradient of each sample, one at a time."""
    return torch.stack([flat_gradient(case, inputs[k : k + 1]) for k in range(len(inputs))])
