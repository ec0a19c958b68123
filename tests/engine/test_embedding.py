from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from engine.contract import Case, LayerContract, check_gradients


@dataclass(frozen=True)
class Lookup(Case):
    num_rows: int = 5

    def inputs(self, num_events: int, dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.randint(self.num_rows, (num_events, *self.shape), generator=torch.Generator().manual_seed(1))


def others(indices: Tensor) -> Tensor:
    return (indices + 2) % 5


CASES = {
    "labels": Lookup(lambda: nn.Embedding(5, 3), (), others),
    "tokens": Lookup(lambda: nn.Embedding(5, 3), (7,), lambda indices: others(indices)[:, 1:]),
    "table of tokens": Lookup(lambda: nn.Embedding(5, 2), (3, 4), others),
    "padding": Lookup(lambda: nn.Embedding(5, 3, padding_idx=1), (4,), others),
    "padding from the end": Lookup(lambda: nn.Embedding(5, 3, padding_idx=-1), (4,), others),
    "one row": Lookup(lambda: nn.Embedding(1, 3), (4,), lambda indices: indices, num_rows=1),
    "bounded": Lookup(lambda: nn.Embedding(5, 3, max_norm=1.0), (4,), others),
}


class TestEmbedding(LayerContract):
    @pytest.fixture(params=list(CASES))
    def case(self, request: pytest.FixtureRequest):
        return CASES[request.param]


@settings(max_examples=20, deadline=None, derandomize=True, database=None)
@given(
    tokens=st.lists(st.integers(1, 4), max_size=2),
    num_rows=st.integers(1, 6),
    features=st.integers(1, 4),
    padding=st.integers(-1, 0) | st.none(),
    units=st.integers(1, 3),
    members=st.integers(1, 3),
)
def test_any_shape(tokens: list[int], num_rows: int, features: int, padding: int | None, units: int, members: int):
    case = Lookup(lambda: nn.Embedding(num_rows, features, padding), tuple(tokens), num_rows=num_rows)
    check_gradients(case.build(), case.inputs(units * members), units)


def test_indices_of_another_type():
    case = CASES["tokens"]
    check_gradients(case.build(), case.inputs(4).int(), 2)
