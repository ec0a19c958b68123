"""What the check of the first batch lets through, and what it names."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine.contract import loss
from engine.small_models import Model, check, inputs, two_layers
from whence.engine.capture import Capture
from whence.engine.check import check_against_autograd
from whence.errors import UnsupportedModelError


def test_the_check_passes_on_a_plain_model():
    check(two_layers(), inputs(4, 3))
    check(two_layers(), inputs(1, 3))


def test_the_check_names_weights_used_outside_their_layer():
    model = Model(
        lambda m, x: m.last(m.first(x)) + F.linear(x, m.first.weight), first=nn.Linear(3, 3), last=nn.Linear(3, 3)
    )
    with pytest.raises(
        UnsupportedModelError, match=r"do not add up to autograd's for 1 parameters: first\.weight \(off"
    ):
        check(model, inputs(4, 3))


def test_the_check_finds_dropout():
    model = Model(lambda m, x: m.last(F.dropout(x)), last=nn.Linear(3, 3))
    with pytest.raises(UnsupportedModelError, match="another result each time"):
        check(model, inputs(8, 3))


MIXES = {
    "mean before the layers": lambda m, x: m.last((x - x.mean(0)).tanh()),
    "mean between the layers": lambda m, x: m.last((m.first(x) - m.first(x).mean(0)).tanh()),
    "mean after the layers": lambda m, x: (m.last(x) - m.last(x).mean(0)).tanh(),
    "first event": lambda m, x: m.last((x - x[:1]).cos()),
    "last event": lambda m, x: m.last((x - x[-1:]).cos()),
    "neighbour": lambda m, x: m.last(x.roll(1, 0).cos()),
    "running sum": lambda m, x: m.last(x.cumsum(0).cos()),
    "batch normalisation": lambda m, x: m.last(F.layer_norm(x.T, x.T.shape[1:]).T) if len(x) > 1 else m.last(x),
}


@pytest.mark.parametrize("name", list(MIXES))
def test_the_check_finds_samples_that_are_mixed(name: str):
    model = Model(MIXES[name], first=nn.Linear(3, 3).requires_grad_(False), last=nn.Linear(3, 3))
    with pytest.raises(
        UnsupportedModelError, match=r"depends on the other samples of its batch, for \d parameters: last"
    ):
        check(model, inputs(4, 3))


def test_the_check_in_float32_passes_and_fails():
    model = two_layers().float()
    data = inputs(4, 3).float()
    check(model, data)
    model.run = lambda m, x: m.last((m.first(x) - 0.1 * m.first(x).mean(0)).tanh())
    with pytest.raises(UnsupportedModelError, match="depends on the other samples"):
        check(model, data)


# --- arithmetic


def deep(width: int = 32) -> nn.Sequential:
    layers = [nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.LayerNorm(width)) for _ in range(8)]
    return nn.Sequential(*layers, nn.Linear(width, 4))


def autocast_outputs(model: nn.Module, data: Tensor, dtype: torch.dtype):
    def outputs(some: slice) -> Tensor:
        with torch.autocast("cpu", dtype):
            return loss(model(data[some]).float())

    return outputs


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_under_autocast_have_the_type_of_the_parameters(dtype: torch.dtype):
    model, data = deep(), torch.randn(6, 5, 32)
    outputs = autocast_outputs(model, data, dtype)
    capture = Capture(model)
    check_against_autograd(capture, outputs, 6, 3)
    assert capture.arithmetic is dtype


def test_the_check_under_autocast_still_finds_samples_that_are_mixed():
    model, data = deep(), torch.randn(6, 5, 32)
    model[3].register_forward_pre_hook(lambda layer, args: (args[0] - 0.5 * args[0].mean(0),))
    with pytest.raises(UnsupportedModelError, match="depends on the other samples"):
        check_against_autograd(Capture(model), autocast_outputs(model, data, torch.bfloat16), 6, 6)
