"""Iterative solutions against dense ones, in float64."""

import pytest
import torch
from torch import Tensor

from whence.curvature.iterative import conjugate_gradient, largest_eigenvalue, lissa, relative_residuals, row_dots
from whence.errors import NumericsError

EIGENVALUES = torch.logspace(-3, 2, 30, dtype=torch.float64)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def matrix():
    basis, _ = torch.linalg.qr(random(30, 30, seed=1))
    return basis @ torch.diag(EIGENVALUES) @ basis.T


def damped(matrix: Tensor, damping: float) -> Tensor:
    return matrix + damping * torch.eye(len(matrix)).double()


def test_conjugate_gradients_solve_every_row(matrix):
    right = random(4, 30, seed=2)
    right[1] *= 1e-9  # residuals are relative
    right[2] = 0
    found = conjugate_gradient(lambda v: v @ matrix, right, 0.5, tolerance=1e-11, max_iterations=200)
    want = torch.linalg.solve(damped(matrix, 0.5), right.T).T
    torch.testing.assert_close(found.vectors[1] * 1e9, want[1] * 1e9)
    torch.testing.assert_close(found.vectors, want)
    assert found.residuals.max() < 1e-10 and found.residuals[2] == 0 and found.iterations < 100


def test_rows_that_are_done_take_part_in_no_further_product(matrix):
    easy = torch.linalg.eigh(matrix).eigenvectors[:, 3]  # one step leads to it
    seen = []
    conjugate_gradient(
        lambda v: seen.append(len(v)) or v @ matrix,
        torch.stack([random(30), easy]),
        0.5,
        tolerance=1e-8,
        max_iterations=50,
    )
    assert seen[0] == 2 and set(seen[1:-1]) == {1} and seen[-1] == 2  # the last is for the residuals


def test_a_row_alone_has_the_solution_that_it_has_among_others(matrix):
    right = random(3, 30, seed=2)
    options = {"tolerance": 1e-3, "max_iterations": 100}
    together = conjugate_gradient(lambda v: v @ matrix, right, 0.1, **options).vectors
    for row in range(3):
        alone = conjugate_gradient(lambda v: v @ matrix, right[row : row + 1], 0.1, **options).vectors
        torch.testing.assert_close(alone[0], together[row], rtol=1e-9, atol=1e-12)


def test_the_residual_is_the_true_one_where_iterations_end(matrix):
    right = random(2, 30)
    found = conjugate_gradient(lambda v: v @ matrix, right, 1e-4, tolerance=1e-12, max_iterations=3)
    left = right - found.vectors @ damped(matrix, 1e-4)
    torch.testing.assert_close(found.residuals, left.norm(dim=1) / right.norm(dim=1))
    assert found.iterations == 3 and found.residuals.min() > 1e-3


def test_a_product_that_is_not_finite_is_refused():
    with pytest.raises(NumericsError, match="A product with the Gauss-Newton matrix is not finite"):
        conjugate_gradient(lambda v: v * float("nan"), random(1, 3), 1.0, tolerance=0.1, max_iterations=3)
    with pytest.raises(NumericsError, match="A product with the Gauss-Newton matrix is not finite"):
        largest_eigenvalue(lambda v: v * float("inf"), random(3), 2)


def test_a_large_damping_leaves_the_vector_over_it(matrix):
    right = random(2, 30)
    found = conjugate_gradient(lambda v: v @ matrix, right, 1e9, tolerance=1e-6, max_iterations=5)
    torch.testing.assert_close(found.vectors * 1e9, right, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("depth", [1, 7, 400])
def test_lissa_is_off_by_what_its_series_lacks(matrix, depth):
    """In the eigenvectors, x = (1 - (1 - a / scale)^(depth + 1)) v / a."""
    right, damping = random(3, 30, seed=4), 0.5
    scale = 1.1 * (float(EIGENVALUES.max()) + damping)
    found = lissa(lambda v, step: v @ matrix, right, damping, scale=scale, depth=depth)
    values, basis = torch.linalg.eigh(damped(matrix, damping))
    want = (right @ basis) * (1 - (1 - values / scale) ** (depth + 1)) / values @ basis.T
    torch.testing.assert_close(found, want, rtol=1e-10, atol=1e-12)
    exact = torch.linalg.solve(damped(matrix, damping), right.T).T
    lacking = ((right @ basis) * (1 - values / scale) ** (depth + 1) / values).norm(dim=1)
    torch.testing.assert_close((found - exact).norm(dim=1), lacking)


def test_lissa_is_gradient_descent_on_the_damped_quadratic_loss(matrix):
    """From 0, with weight decay as the damping and learning rate 1 / scale: depth + 1 steps of torch's own SGD."""
    right, scale, damping, depth = random(1, 30), 120.0, 0.3, 11
    theta = torch.nn.Parameter(torch.zeros(30).double())
    optimizer = torch.optim.SGD([theta], lr=1 / scale, weight_decay=damping)
    for _ in range(depth + 1):
        optimizer.zero_grad()
        (theta @ matrix @ theta / 2 - right[0] @ theta).backward()
        optimizer.step()
    found = lissa(lambda v, step: v @ matrix, right, damping, scale=scale, depth=depth)
    torch.testing.assert_close(found[0], theta.detach())


def test_lissa_that_diverges_is_refused(matrix):
    with pytest.raises(NumericsError, match=r"LiSSA diverges: after \d+ of 500 steps .* 40, must exceed the largest"):
        lissa(lambda v, step: v @ matrix, random(1, 30), 0.1, scale=40.0, depth=500)
    with pytest.raises(NumericsError, match="LiSSA diverges: after 1 of 5 steps"):
        lissa(lambda v, step: v * float("nan"), random(1, 30), 0.1, scale=200.0, depth=5)


def test_a_small_depth_does_not_hide_that_it_diverges():
    """One step at a scale that is far too small is already too long."""
    with pytest.raises(NumericsError, match="LiSSA diverges: after 1 of 1 steps"):
        lissa(lambda v, step: 1e3 * v, random(1, 5), 0.1, scale=1.0, depth=1)


def test_the_largest_eigenvalue_is_found_from_below(matrix):
    found = [largest_eigenvalue(lambda v: v @ matrix, random(30, seed=5), n) for n in (1, 5, 60)]
    assert found == sorted(found) and found[-1] == pytest.approx(100.0, rel=1e-6)
    assert largest_eigenvalue(lambda v: 0 * v, random(30), 5) == 0


def test_dots_and_residuals_in_float32_are_added_up_in_float64():
    ones = torch.full((1, 3_000_001), 0.1)
    assert float(row_dots(ones, ones)) == pytest.approx(float(ones[0, 0].double()) ** 2 * 3_000_001, rel=1e-12)
    assert float(relative_residuals(lambda v: 0.5 * v, ones, ones, 0.25)) == pytest.approx(0.25, rel=1e-6)
