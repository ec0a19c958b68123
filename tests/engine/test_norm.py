from typing import cast

import pytest
from diffusers.models import normalization
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from engine.contract import Case, LayerContract, capture_factors, check_gradients

GROUP_NORMS = {
    "image": Case(lambda: nn.GroupNorm(2, 4), (4, 3, 2), again=lambda inputs: inputs[..., 1:]),
    "vector": Case(lambda: nn.GroupNorm(2, 6), (6,)),
    "sequence": Case(lambda: nn.GroupNorm(1, 4, eps=0.1), (4, 5), again=lambda inputs: inputs[..., 1:].exp()),
    "one channel a group": Case(lambda: nn.GroupNorm(3, 3), (3, 2, 2)),
    "no bias": Case(lambda: without_bias(nn.GroupNorm(2, 4)), (4, 3)),
}

LAYER_NORMS = {
    "vector": Case(lambda: nn.LayerNorm(4), (4,)),
    "tokens": Case(lambda: nn.LayerNorm(4, eps=0.1), (3, 4), again=lambda inputs: inputs[:, 1:].exp()),
    "two axes": Case(lambda: nn.LayerNorm([3, 4]), (2, 3, 4)),
    "no bias": Case(lambda: nn.LayerNorm(4, bias=False), (3, 4)),
}

RMS_NORMS = {
    "vector": Case(lambda: nn.RMSNorm(4), (4,)),
    "tokens": Case(lambda: nn.RMSNorm(4, eps=0.1), (3, 4), again=lambda inputs: inputs[:, 1:].exp()),
    "heads": Case(lambda: nn.RMSNorm(4, eps=1e-6), (2, 3, 4)),
    "two axes": Case(lambda: nn.RMSNorm([3, 4]), (2, 3, 4)),
}

DIFFUSERS_RMS_NORMS = {
    "vector": Case(lambda: normalization.RMSNorm(4, eps=1e-6), (4,)),
    "tokens": Case(lambda: normalization.RMSNorm(4, eps=0.1), (3, 4), again=lambda inputs: inputs[:, 1:].exp()),
    "bias": Case(lambda: normalization.RMSNorm(4, eps=1e-6, bias=True), (2, 3, 4)),
    "two axes": Case(lambda: normalization.RMSNorm((3, 4), eps=1e-6), (2, 3, 4)),
}


def without_bias(norm: nn.GroupNorm) -> nn.GroupNorm:
    norm.bias = None
    return norm


class TestGroupNorm(LayerContract):
    @pytest.fixture(params=list(GROUP_NORMS))
    def case(self, request: pytest.FixtureRequest):
        return GROUP_NORMS[request.param]


class TestLayerNorm(LayerContract):
    @pytest.fixture(params=list(LAYER_NORMS))
    def case(self, request: pytest.FixtureRequest):
        return LAYER_NORMS[request.param]


class TestRMSNorm(LayerContract):
    @pytest.fixture(params=list(RMS_NORMS))
    def case(self, request: pytest.FixtureRequest):
        return RMS_NORMS[request.param]


class TestDiffusersRMSNorm(LayerContract):
    @pytest.fixture(params=list(DIFFUSERS_RMS_NORMS))
    def case(self, request: pytest.FixtureRequest):
        return DIFFUSERS_RMS_NORMS[request.param]


@pytest.mark.parametrize(
    "norm",
    [
        nn.GroupNorm(2, 4, affine=False),
        nn.LayerNorm(4, elementwise_affine=False),
        nn.RMSNorm(4, elementwise_affine=False),
        normalization.RMSNorm(4, eps=1e-6, elementwise_affine=False),
    ],
    ids=lambda norm: type(norm).__name__,
)
def test_a_norm_without_parameters_is_passed_through(norm: nn.Module):
    model = nn.Sequential(nn.Linear(4, 4), norm).double()
    check_gradients(model, Case(nn.Identity, (4,)).inputs(3), 3)


class FirstAddsOne(nn.Module):
    """A norm of something that requires a gradient, as in a network, so that autograd saves its statistics."""

    def __init__(self, norm: nn.GroupNorm, checkpointed: bool):
        super().__init__()
        self.norm = norm
        self.checkpointed = checkpointed

    def forward(self, inputs: Tensor) -> Tensor:
        inputs = inputs.requires_grad_() + 1
        return checkpoint(self.norm, inputs, use_reentrant=False) if self.checkpointed else self.norm(inputs)


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("num_units", [4, 2])
def test_group_norm_uses_the_statistics_of_the_forward_pass(checkpointed: bool, num_units: int):
    case = GROUP_NORMS["image"]
    model = FirstAddsOne(cast(nn.GroupNorm, case.build()), checkpointed)
    factors, _ = capture_factors(model, case.inputs(4), num_units)
    # Checkpointing hands out what it recomputes once, to the backward pass.
    assert [saved is None for saved in factors.saved] == [checkpointed]
    check_gradients(model, case.inputs(4), num_units)


@settings(max_examples=15, deadline=None, derandomize=True, database=None)
@given(
    groups=st.integers(1, 3),
    of_each=st.integers(2, 3),
    positions=st.lists(st.integers(1, 4), max_size=3),
    units=st.integers(1, 3),
    members=st.integers(1, 2),
)
def test_group_norm_of_any_shape(groups: int, of_each: int, positions: list[int], units: int, members: int):
    channels = groups * of_each
    case = Case(lambda: nn.GroupNorm(groups, channels), (channels, *positions))
    check_gradients(case.build(), case.inputs(units * members), units)


@settings(max_examples=15, deadline=None, derandomize=True, database=None)
@given(
    middle=st.lists(st.integers(1, 4), max_size=2),
    normalised=st.lists(st.integers(2, 4), min_size=1, max_size=2),
    units=st.integers(1, 3),
    members=st.integers(1, 2),
)
def test_layer_norm_of_any_shape(middle: list[int], normalised: list[int], units: int, members: int):
    case = Case(lambda: nn.LayerNorm(normalised), (*middle, *normalised))
    check_gradients(case.build(), case.inputs(units * members), units)
