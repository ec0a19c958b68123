"""What a path must compute at least, in floating-point operations, as a ratio to those of the plain pass.

A plain pass has three parts: the forward pass F, the backward signal S (gradients of activations), and the weight
gradients W, which cost a layer as much as its forward pass. torch counts all three and F alone; W is that part of F
which lies in convolutions and linear layers. What is more in a path:

    rows               F + S            the projections of both factors, and the product of these, are not counted: with
                                        32 a side, a few hundredths of W for a layer of 256 channels, more for fewer
    norms              F + S + N        N: of each layer W, or, where that is less, the products of all pairs of
                                        positions, ‖G^T A‖² = sum((A A^T) * (G G^T))
    rows and norms     F + S + N
    dots               F + S + W + 2 P K        a sample, with K vectors of P parameters; once more for each turn
    query side         F + S + W + 2 P R H / D  a sample, with R sums of the H halves of D draws
    all gradients      F + S + W

Normalisations, activations, attention's softmax and all memory traffic are left out, so no path reaches its bound, nor
does the plain pass: a path of as many operations as the plain pass has the bound 1.
"""

from dataclasses import dataclass

import torch
from models import Case, plain_pass, predict
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode


@dataclass(frozen=True)
class Operations:
    """Operations of one sample."""

    plain: float
    weights: float
    norms: float
    num_params: int

    @property
    def signal(self) -> float:
        """Of the forward pass and the backward signal."""
        return self.plain - self.weights

    def bound(self, extra: float) -> float:
        """Relate signal and something more to the plain pass."""
        return (self.signal + extra) / self.plain


def count_operations(case: Case) -> Operations:
    """Count a plain pass, and what norms take, layer by layer."""
    weights, norms, batch = [], [], case.train

    def count_layer(layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        inputs = args[0]
        assert isinstance(layer, nn.Conv2d | nn.Linear)
        num_out, num_inner = len(layer.weight), layer.weight[0].numel()
        positions = output.numel() // (len(inputs) * num_out)
        weights.append(2 * positions * num_out * num_inner)
        norms.append(min(weights[-1], 2 * positions**2 * (num_out + num_inner)))

    layers = [m for m in case.model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    handles = [layer.register_forward_hook(count_layer) for layer in layers]
    with torch.no_grad():
        predict(case.model, batch.noisy, batch.timesteps)
    for handle in handles:
        handle.remove()
    with FlopCounterMode(display=False) as counter:
        plain_pass(case, batch)
    return Operations(counter.get_total_flops() / len(batch), sum(weights), sum(norms), case.num_params)
