"""Models of a few layers, and their per-unit gradients by capture."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from engine.contract import loss
from whence.engine.capture import Capture
from whence.engine.check import check_against_autograd
from whence.engine.sinks import GatherSink, Layout


class Model(nn.Module):
    """Layers by name, and how they are called."""

    def __init__(self, run: Callable[..., Tensor], **layers: nn.Module | nn.Parameter):
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.run = run
        self.double()

    def forward(self, inputs: Tensor) -> Tensor:
        return self.run(self, inputs)


def inputs(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def gather(model: nn.Module, inputs: Tensor, num_units: int, patterns: tuple[str, ...] = ("*",)) -> dict[str, Tensor]:
    """Each unit's gradient by parameter."""
    capture = Capture(model, patterns)
    layout = Layout.of(capture.parameters)
    sink = GatherSink(layout, inputs.new_zeros(num_units, layout.num_params))
    capture.run(lambda some: loss(model(inputs[some])), len(inputs), num_units, [sink])
    return {
        name: sink.rows[:, layout.spans[name]].reshape(num_units, *p.shape) for name, p in capture.parameters.items()
    }


def check_equal(found: dict[str, Tensor], want: dict[str, Tensor], rtol: float = 1e-9) -> None:
    assert found.keys() == want.keys()
    for name in want:
        # float64: sums of at most some hundred products
        torch.testing.assert_close(found[name], want[name], rtol=rtol, atol=rtol / 100)


def check(model: nn.Module, inputs: Tensor) -> None:
    check_against_autograd(Capture(model), lambda some: loss(model(inputs[some])), len(inputs), len(inputs))


def warned(make: Callable[..., Any], *arguments: Any, match: str = "running the whole model once more") -> Any:
    with pytest.warns(UserWarning, match=match):
        return make(*arguments)


def two_layers() -> Any:
    return Model(lambda m, x: m.last(m.first(x).tanh()), first=nn.Linear(3, 4), last=nn.Linear(4, 2))
