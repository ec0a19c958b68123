import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from engine.contract import Case, LayerContract, check_gradients

CASES = {
    "plain": Case(lambda: nn.Linear(3, 2), (3,)),
    "no bias": Case(lambda: nn.Linear(3, 2, bias=False), (3,)),
    "tokens": Case(lambda: nn.Linear(3, 2), (5, 3), again=lambda inputs: inputs[:, 1:].tanh()),
    "pixels": Case(lambda: nn.Linear(3, 4), (2, 3, 3), again=lambda inputs: inputs[:, :1]),
    "one feature": Case(lambda: nn.Linear(1, 1), (1,)),
}


class TestLinear(LayerContract):
    @pytest.fixture(params=list(CASES))
    def case(self, request: pytest.FixtureRequest):
        return CASES[request.param]


@settings(max_examples=20, deadline=None, derandomize=True, database=None)
@given(
    middle=st.lists(st.integers(1, 4), max_size=2),
    features=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    bias=st.booleans(),
    units=st.integers(1, 3),
    members=st.integers(1, 3),
)
def test_any_shape(middle: list[int], features: tuple[int, int], bias: bool, units: int, members: int):
    case = Case(lambda: nn.Linear(*features, bias=bias), (*middle, features[0]))
    check_gradients(case.build(), case.inputs(units * members), units)
