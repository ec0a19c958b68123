import pytest
import torch
from torch import Tensor

from projections.contract import (
    NUM_NUMBERS,
    SIDE,
    Gradients,
    ProjectionContract,
    check_variance,
    flat,
    project,
    random_gradients,
    sketch_variance,
)
from whence.projections import make_projection


def two_sided_variance(x: Tensor, y: Tensor, k_out: float, k_inner: float) -> Tensor:
    """Variance of the inner product of two cores; an identity counts as an infinite k.

    With Z = y x^T, given P = out out^T: the product is sum_q i_q^T N i_q over the columns of inner, N = x^T P y, with
    mean tr N and variance (tr N^2 + tr N N^T) / k_inner. E tr(P A P B) = tr(A B) + (tr(A^T B) + tr A tr B) / k_out.
    """
    z, a, b = y @ x.T, y @ y.T, x @ x.T
    from_out = ((z @ z).trace() + (z @ z.T).trace()) / k_out
    squared = (z @ z).trace() + ((z.T @ z).trace() + z.trace() ** 2) / k_out
    crossed = (a @ b).trace() + ((a.T @ b).trace() + a.trace() * b.trace()) / k_out
    return from_out + (squared + crossed) / k_inner


def all_pairs(values: Tensor, k_out: float, k_inner: float) -> Tensor:
    x, y = values.flatten(2)
    return torch.stack([two_sided_variance(a, b, k_out, k_inner) for a, b in [(x, x), (x, y), (y, y)]])


def cores_variance(gradients: Gradients) -> Tensor:
    """Variance of the products of all cores of the contract's parameters, as their sides are independent."""
    return (
        all_pairs(gradients["conv.weight"], SIDE, SIDE)
        + all_pairs(gradients["linear.weight"], torch.inf, SIDE)
        + all_pairs(gradients["tall.weight"], SIDE, torch.inf)
    )


class TestIdentity(ProjectionContract):
    kind = "identity"
    width = None
    own_spans = True
    num_seeds = 3
    golden = [1.0, 2.0, 3.0]

    def expected_variance(self, gradients: Gradients) -> Tensor:
        return torch.zeros(3, dtype=torch.float64)

    def test_lays_gradients_end_to_end(self):
        gradients = random_gradients()
        projection = self.make(width=NUM_NUMBERS)
        assert projection.width == NUM_NUMBERS
        assert torch.equal(project(projection, gradients), flat(gradients))


class TestTwoSided(ProjectionContract):
    kind = "two_sided"
    width = None
    own_spans = True
    num_seeds = 2500
    golden = [-0.5387869006814152, 0.5847052201199983, -1.282935606279891]

    def expected_variance(self, gradients: Gradients) -> Tensor:
        return cores_variance(gradients) + sketch_variance([gradients["time.weight"].flatten(1)], SIDE**2)

    def test_lays_out_cores_and_small_gradients(self):
        assert self.make(width=67).width == 16 + 12 + 8 + 8 + 16 + 6 + 1
        values = random_gradients()["small.weight"]
        rows = project(self.make(), {"small.weight": values})
        assert torch.equal(rows[:, 36:44], values.flatten(1))


@pytest.mark.parametrize("rank", [1, 3, 12])
def test_relative_variance_of_a_core(rank: int):
    side = 8
    gradient = torch.zeros(1, 12, 20, dtype=torch.float64)
    gradient[0, range(rank), range(rank)] = rank**-0.5
    squared_lengths = []
    for seed in range(2000):
        sides = make_projection("two_sided", {"w": (12, 20)}, side=side, seed=seed, dtype=torch.float64).sides("w")
        assert sides is not None
        squared_lengths.append(sides.core(gradient).square().sum())
    relative = 4 / (rank * side) + 2 / side**2 * (1 + 1 / rank)
    check_variance(torch.stack(squared_lengths)[:, None], torch.ones(1), torch.tensor([relative]))
    matrix = gradient[0]
    assert two_sided_variance(matrix, matrix, side, side).item() == pytest.approx(relative)
