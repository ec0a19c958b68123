"""What a path must do at least, as a ratio to the plain pass.

A plain pass has three parts: the forward pass F, the backward signal S (gradients of activations), and the weight
gradients W, which cost a layer as much as its forward pass. torch counts all three and F alone; W is that part of F
which lies in convolutions and linear layers. What a path adds to F + S, in floating-point operations of a sample:

    rows               of each layer W and the products with both sides, or, where that is less, the products of both
                       factors with their side and with each other; W alone where a weight is sketched whole
    norms              of each layer W, or, where that is less, the products of all pairs of positions,
                       ‖G^T A‖² = sum((A A^T) * (G G^T))
    rows and norms     the cheaper of: W and the products with both sides; rows from factors, and norms
    dots               W + 2 P K, with K vectors of P parameters
    query side         W + 2 P R H / D, with R sums of the H halves of D draws
    all gradients      W

The *operations bound* is F + S and that, over the plain pass; normalisations, activations and attention's softmax are
left out, so no path reaches it, nor does the plain pass. The *measured bound* takes F + S as measured with frozen
weights (the path ``signal alone``), operations at the rate of the plain pass, and adds that the gradients which a path
makes are written and read once (``traffic of gradients``).
"""

from dataclasses import dataclass
from math import prod

import torch
from models import Case, plain_pass, predict
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode


@dataclass(frozen=True)
class Work:
    """What a path does for a sample beside F + S."""

    operations: float
    made: float
    """Numbers of gradients that are made, in those of one whole gradient."""
    passes: int = 1
    """Passes over the sample; the operations are those of all."""


@dataclass(frozen=True)
class Operations:
    """Operations of one sample."""

    plain: float
    weights: float
    norms: Work
    rows: Work
    rows_and_norms: Work
    num_params: int

    def bound(self, work: Work) -> float:
        """Relate operations to those of the plain pass."""
        return (work.passes * (self.plain - self.weights) + work.operations) / self.plain

    def measured_bound(self, work: Work, signal: float, traffic: float) -> float:
        """Relate to the plain pass what ``bound`` leaves out too.

        Args:
            work: What is done.
            signal: Time of F + S, in plain passes.
            traffic: Time in which a gradient is written and read, in plain passes.
        """
        return work.passes * (signal + work.made * traffic) + work.operations / self.plain


@dataclass
class _Layer:
    """One layer of matrices."""

    name: str
    num_out: int
    num_inner: int
    positions: int

    @property
    def weight(self) -> float:
        return 2.0 * self.positions * self.num_out * self.num_inner

    @property
    def norm(self) -> Work:
        gram = 2.0 * self.positions**2 * (self.num_out + self.num_inner)
        return Work(min(self.weight, gram), self.num_out * self.num_inner * (self.weight <= gram))

    def rows(self, core: tuple[int, int] | None, with_norms: bool) -> Work:
        whole = self.num_out * self.num_inner
        if core is None:
            return Work(self.weight, whole)
        k_out, k_inner = core
        sides = 2.0 * self.num_out * k_inner * (self.num_inner + k_out)
        of_factors = 2.0 * self.positions * (self.num_inner * k_inner + self.num_out * k_out + k_out * k_inner)
        norm = self.norm if with_norms else Work(0, 0)
        forms = Work(self.weight + sides, whole), Work(of_factors + norm.operations, norm.made)
        return min(forms, key=lambda work: work.operations)


def count_operations(case: Case, cores: dict[str, tuple[int, int] | None]) -> Operations:
    """Count a plain pass, and what paths take, layer by layer.

    Args:
        case: What is run.
        cores: The core that a projection makes of each weight; None where it is left whole.
    """
    layers: list[_Layer] = []
    names = {module: name for name, module in case.model.named_modules()}

    def count_layer(layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        assert isinstance(layer, nn.Conv2d | nn.Linear)
        num_out, num_inner = len(layer.weight), prod(layer.weight.shape[1:])
        layers.append(_Layer(names[layer], num_out, num_inner, output.numel() // (len(args[0]) * num_out)))

    handles = [m.register_forward_hook(count_layer) for m in names if isinstance(m, nn.Conv2d | nn.Linear)]
    batch = case.train
    with torch.no_grad():
        predict(case.model, batch.noisy, batch.timesteps)
    for handle in handles:
        handle.remove()
    with FlopCounterMode(display=False) as counter:
        plain_pass(case, batch)

    def add_up(works: list[Work]) -> Work:
        return Work(sum(work.operations for work in works), sum(work.made for work in works) / case.num_params)

    return Operations(
        plain=counter.get_total_flops() / len(batch),
        weights=sum(layer.weight for layer in layers),
        norms=add_up([layer.norm for layer in layers]),
        rows=add_up([layer.rows(cores[f"{layer.name}.weight"], with_norms=False) for layer in layers]),
        rows_and_norms=add_up([layer.rows(cores[f"{layer.name}.weight"], with_norms=True) for layer in layers]),
        num_params=case.num_params,
    )
