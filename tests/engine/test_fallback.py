"""Parameters that no layer kind covers, against the batch-of-one reference."""

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize

from engine.contract import batch_of_one, loss
from engine.small_models import Model, check, check_equal, gather, inputs
from whence.engine.capture import Capture
from whence.errors import UnsupportedModelError

# --- layers that are replayed


class Scaled(nn.Linear):
    """A subclass that computes something else."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input).sin()


class Gamma(nn.Module):
    """A layer of someone's own, with a child that holds no parameter."""

    def __init__(self):
        super().__init__()
        self.gamma, self.unused = nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(2))
        self.activation = nn.SiLU()

    def forward(self, hidden: Tensor) -> Tensor:
        return self.activation(hidden) * self.gamma


class LowRank(nn.Module):
    """A parametrisation with parameters of its own."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(3, 1)), nn.Parameter(torch.randn(1, 3))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.up @ self.down


def running_norm() -> nn.Module:
    norm: Any = nn.BatchNorm1d(3).eval()
    nn.init.normal_(norm.weight)
    norm.running_mean.normal_()
    norm.running_var.uniform_(1, 2)
    return norm


def low_rank(frozen: bool) -> nn.Module:
    layer = nn.Linear(3, 3).requires_grad_(not frozen)
    parametrize.register_parametrization(layer, "weight", LowRank())
    return layer


def fine(width: int, out: int) -> dict[str, nn.Module]:
    return {"first": nn.Linear(width, width), "last": nn.Linear(width, out)}


REPLAYED: dict[str, Callable[[], nn.Module]] = {
    "subclass": lambda: Scaled(3, 3),
    "own": Gamma,
    "prelu": lambda: nn.PReLU(3),
    "batch normalisation in evaluation": running_norm,
    "weight norm": lambda: parametrizations.weight_norm(nn.Linear(3, 3)),
    "orthogonal": lambda: parametrizations.orthogonal(nn.Linear(3, 3)),
    "low rank": lambda: low_rank(frozen=False),
    "low rank on a frozen weight": lambda: low_rank(frozen=True),
    "layer norm in float32": lambda: diffusers.models.normalization.FP32LayerNorm(3),
    "two of them": lambda: nn.Sequential(Gamma(), Scaled(3, 3)),
}


@pytest.mark.parametrize("name", list(REPLAYED))
@pytest.mark.parametrize("num_units", [4, 2])
def test_layers_of_unknown_kinds_are_replayed(name: str, num_units: int):
    model = Model(lambda m, x: m.last(m.middle(m.middle(m.first(x)).tanh())), middle=REPLAYED[name](), **fine(3, 2))
    data = inputs(4, 3)
    capture = Capture(model)  # without a warning
    assert not capture.uncovered
    float32 = name == "layer norm in float32"
    check_equal(gather(model, data, num_units), batch_of_one(model, data, num_units), rtol=1e-5 if float32 else 1e-9)
    if not float32:
        check(model, data)


def test_a_replayed_layer_may_take_indices_or_tokens():
    class Doubled(nn.Embedding):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    model = Model(lambda m, x: m.last(m.table(x.long().clamp(0, 4))).sum(1), table=Doubled(5, 3), last=Scaled(3, 2))
    data = 3 * inputs(4, 6).abs()
    check_equal(gather(model, data, 2), batch_of_one(model, data, 2))


def test_a_replayed_layer_that_no_output_uses_has_no_gradient():
    model = Model(lambda m, x: (m.middle(x), m.last(x))[1], middle=Gamma(), last=nn.Linear(3, 2))
    data = inputs(4, 3)
    found = gather(model, data, 4)
    assert not found["middle.gamma"].any()
    check_equal({"last.weight": found["last.weight"]}, {"last.weight": batch_of_last(model, data)})


def batch_of_last(model: nn.Module, data: Tensor) -> Tensor:
    model.middle.requires_grad_(False)
    return batch_of_one(model, data, len(data))["last.weight"]


# --- what only the whole model can tell


def table(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape))


def attention(m: Any, x: Tensor) -> Tensor:
    tokens = m.first(x)[:, None] * torch.tensor([1.0, -0.5, 2.0], dtype=x.dtype)[:, None]
    return m.last(m.middle(tokens, tokens, tokens, need_weights=False)[0].flatten(1))


def tokens_first(m: Any, x: Tensor) -> Tensor:
    tokens = x.unflatten(1, (3, 1)).transpose(0, 1)  # token, event, feature
    return m.middle(tokens.expand(-1, -1, 2)).transpose(0, 1).flatten(1) + m.last(m.first(x))


class Shift(nn.Module):
    def __init__(self):
        super().__init__()
        self.shift = table(3)

    def forward(self) -> Tensor:
        return self.shift


def tied() -> dict[str, nn.Module]:
    layers = {"middle": nn.Linear(3, 3), **fine(3, 2)}
    layers["middle"].weight = layers["first"].weight
    return layers


def hooked() -> nn.Module:
    layer = Scaled(3, 3)
    layer.register_forward_pre_hook(lambda layer, args: (args[0].cos(),))
    return layer


MIDDLE = ["middle.weight", "middle.bias"]


def middle_and_last(middle: nn.Module) -> dict[str, nn.Module]:
    return {"middle": middle, "last": nn.Linear(3, 2)}


Run = Callable[..., Tensor]
WHOLE: dict[str, tuple[Run, Callable[[], dict[str, Any]], list[str]]] = {
    "table that is no broadcast": (
        lambda m, x: m.last(F.linear(x, m.table)),
        lambda: {"table": table(3, 3), "last": nn.Linear(3, 2)},
        ["table"],
    ),
    "table that is repeated": (
        lambda m, x: m.last(torch.cat([x, m.table[None].repeat(len(x), 1)], dim=1)),
        lambda: {"table": table(3), "last": nn.Linear(6, 2)},
        ["table"],
    ),
    "one tensor twice": (
        lambda m, x: m.last(x) * m.one + m.two,
        lambda: dict.fromkeys(["one", "two"], table(2)) | {"last": nn.Linear(3, 2)},
        ["one"],
    ),
    "attention": (
        attention,
        lambda: {
            "middle": nn.MultiheadAttention(3, 1, batch_first=True),
            "first": nn.Linear(3, 3),
            "last": nn.Linear(9, 2),
        },
        [f"middle.{name}" for name in ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")],
    ),
    "tied": (lambda m, x: m.last(m.middle(m.first(x)).cos()), tied, ["middle.weight"]),
    "tokens first": (
        tokens_first,
        lambda: {"middle": nn.Linear(2, 2), "first": nn.Linear(3, 3), "last": nn.Linear(3, 6)},
        MIDDLE,
    ),
    "one row for all": (
        lambda m, x: m.last(m.first(x) + m.middle(m.constant.detach()[None])),
        lambda: {"constant": table(3).requires_grad_(False), "middle": nn.Linear(3, 3), **fine(3, 2)},
        MIDDLE,
    ),
    "one row and rows": (
        lambda m, x: m.last(m.middle(x).tanh() + m.middle(torch.ones_like(x[:1]))),
        lambda: middle_and_last(nn.Linear(3, 3)),
        MIDDLE,
    ),
    "twice the events": (
        lambda m, x: m.last(m.middle(torch.cat([x, 0 * x])).sin().unflatten(0, (2, -1)).sum(0)),
        lambda: middle_and_last(nn.Linear(3, 3)),
        MIDDLE,
    ),
    "weight of another": (
        lambda m, x: m.last(F.linear(x, m.middle.weight).sin()),
        lambda: middle_and_last(nn.Linear(3, 3)),
        MIDDLE,
    ),
    "without arguments": (lambda m, x: m.last(x * m.middle()), lambda: middle_and_last(Shift()), ["middle.shift"]),
    "two inputs": (
        lambda m, x: m.last(m.middle(x, x.sin())),
        lambda: middle_and_last(nn.Bilinear(3, 3, 3)),
        MIDDLE,
    ),
    "hooked by someone else": (lambda m, x: m.last(m.middle(x)), lambda: middle_and_last(hooked()), MIDDLE),
}
FOUND_IN_A_PASS = {
    "table that is no broadcast": "given to linear, which is no broadcast over the events",
    "table that is repeated": "with a copy for each event the model does not run",
    "tokens first": "saw a batch of 3, not of 4 events",
    "one row for all": "saw a batch of 1, not of 4 events",
    "one row and rows": "saw a batch of 1, not of 4 events",
    "twice the events": "saw a batch of 8, not of 4 events",
    "weight of another": "used without a call of its layer",
    "without arguments": "its Shift does not make one tensor of one",
    "two inputs": "its Bilinear does not make one tensor of one",
    "attention": "given to multi_head_attention_forward",
}


@pytest.mark.filterwarnings("ignore:The gradients of")
@pytest.mark.parametrize("name", list(WHOLE))
@pytest.mark.parametrize("num_units", [4, 2])
def test_the_whole_model_is_run_for_uncovered_parameters(name: str, num_units: int):
    run, make, uncovered = WHOLE[name]
    model = Model(run, **make())
    data = inputs(4, 3)
    check_equal(gather(model, data, num_units), batch_of_one(model, data, num_units))
    check(model, data)
    capture = Capture(model)
    for _ in range(2):  # what the first pass finds the second knows
        capture.run(lambda some: loss(model(data[some])), 4, num_units, [])
        assert set(capture.uncovered) == set(uncovered)


@pytest.mark.parametrize("name", list(FOUND_IN_A_PASS))
def test_what_a_pass_finds_is_told_once(name: str):
    run, make, uncovered = WHOLE[name]
    model, data = Model(run, **make()), inputs(4, 3)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        capture = Capture(model)
        for _ in range(2):
            capture.run(lambda some: loss(model(data[some])), 4, 4, [])
    assert FOUND_IN_A_PASS[name] in str(told[-1].message)
    for parameter in uncovered:
        assert sum(f"{parameter} (" in str(warning.message) for warning in told) == 1


def test_the_warning_says_what_it_costs():
    with pytest.warns(UserWarning, match=r"of 1 parameters are .* once more for each sample .* exact and slow: middle"):
        Capture(Model(lambda m, x: m.last(x), **tied()))


@pytest.mark.parametrize(("patterns", "sizes"), [("*", [6, 2, 2, 2]), ("middle.weight", [2, 2, 2]), ("last.*", [6])])
def test_one_pass_is_made_for_each_unit_and_none_without_need(patterns: str, sizes: list[int]):
    seen = []
    model = Model(lambda m, x: (seen.append(len(x)), m.last(m.middle(m.first(x)).cos()))[1], **tied())
    data = inputs(6, 3)
    with nullcontext() if patterns == "last.*" else pytest.warns(UserWarning, match="once more"):
        capture = Capture(model, [patterns])
    capture.run(lambda some: loss(model(data[some])), 6, 3, [])
    assert seen == sizes


def test_a_layer_that_is_never_used_is_looked_at_once():
    seen = []

    def run(m: Any, x: Tensor) -> Tensor:
        seen.append(len(x))
        return m.last(x)

    model = Model(run, idle=nn.Linear(3, 3), last=nn.Linear(3, 2))
    data = inputs(4, 3)
    capture = Capture(model)
    for _ in range(2):
        capture.run(lambda some: loss(model(data[some])), 4, 4, [])
    assert seen == [4, 1, 4]
    assert not capture.uncovered


@pytest.mark.filterwarnings("ignore:The gradients of")
def test_the_check_finds_samples_that_are_mixed_where_each_runs_alone():
    def run(m: Any, x: Tensor) -> Tensor:
        return F.linear(x - x.mean(0), m.table).tanh() + m.last(x)

    model = Model(run, table=table(3, 3), last=nn.Linear(3, 3))
    with pytest.raises(
        UnsupportedModelError, match="depends on the other samples of its batch, for 3 parameters: table"
    ):
        check(model, inputs(4, 3))
