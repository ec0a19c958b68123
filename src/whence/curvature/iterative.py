r"""Solutions of (G + d I) x = v where G is known by its products alone: conjugate gradients, LiSSA, power iteration.

Every function takes several right-hand sides at once, one a row. G is symmetric and has no negative eigenvalue, as a
Gauss-Newton matrix; d is above 0.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from whence.errors import NumericsError

Multiply = Callable[[Float[Tensor, "vector param"]], Float[Tensor, "vector param"]]
"""Multiplies each row with G; what it gives is its caller's to change."""

_COLUMNS_AT_ONCE = 2**20


@dataclass(frozen=True)
class Solution:
    """What an iteration has reached."""

    vectors: Float[Tensor, "vector param"]
    residuals: Float64[Tensor, " vector"]
    """Length of v - (G + d I) x over that of v, from a product of its own; 0 where v is 0."""
    iterations: int


def conjugate_gradient(
    multiply: Multiply, right: Float[Tensor, "vector param"], damping: float, *, tolerance: float, max_iterations: int
) -> Solution:
    """Solve by conjugate gradients (Hestenes and Stiefel 1952), each row with steps of its own.

    A row that has reached the tolerance takes part in no further product. The iteration enlarges rounding, once it has
    found the largest eigenvalues: products in another order lead to another solution within the tolerance.

    Args:
        multiply: Multiplies with G.
        right: Right-hand sides v.
        damping: d.
        tolerance: Relative residual at which a row is done.
        max_iterations: Products at most, before the one for the residual.

    Returns:
        The solutions, whether or not they reached the tolerance.

    Raises:
        NumericsError: If a product is not finite.
    """
    solution, residual = torch.zeros_like(right), right.clone()
    direction = right.clone()
    rho = row_dots(residual, residual)
    goal = tolerance**2 * rho
    iterations = 0
    while iterations < max_iterations and (active := torch.nonzero(rho > goal)[:, 0]).numel():
        # Whole tensors, but where some rows are done: a selection of rows is a copy.
        some = slice(None) if len(active) == len(right) else active
        along = direction[some]
        product = multiply(along).add_(along, alpha=damping)
        curvature = row_dots(along, product)
        _check_finite(curvature, "A product with the Gauss-Newton matrix")
        step = (rho[some] / curvature)[:, None].to(right)
        solution[some] += step * along
        residual[some] -= product.mul_(step)
        fresh = row_dots(residual[some], residual[some])
        direction[some] = along.mul((fresh / rho[some])[:, None].to(right)).add_(residual[some])
        rho[some] = fresh
        iterations += 1
    return Solution(solution, relative_residuals(multiply, solution, right, damping), iterations)


def lissa(
    multiply: Callable[[Float[Tensor, "vector param"], int], Float[Tensor, "vector param"]],
    right: Float[Tensor, "vector param"],
    damping: float,
    *,
    scale: float,
    depth: int,
) -> Float[Tensor, "vector param"]:
    """Sum the first terms of the Neumann series of the inverse (LiSSA; Agarwal, Bullins and Hazan 2017).

        h_0 = v,   h_j = v + h_{j-1} - (G_j + d I) h_{j-1} / scale,   x = h_depth / scale

    With one matrix G for all G_j, x = sum_{j <= depth} (I - (G + d I) / scale)^j v / scale: what depth + 1 steps of
    gradient descent of learning rate 1 / scale make of x^T (G + d I) x / 2 - v^T x from x = 0.

    Args:
        multiply: Multiplies with G_j, an estimate of G; j counts from 0.
        right: Right-hand sides v.
        damping: d.
        scale: Above the largest eigenvalue of G + d I, or the series diverges.
        depth: Steps.

    Returns:
        x.

    Raises:
        NumericsError: If it diverges.
    """
    found, lengths = right.clone(), row_dots(right, right).sqrt()
    for step in range(depth):
        product = multiply(found, step).add_(found, alpha=damping)
        found.add_(right).sub_(product.div_(scale))
        # As long as no G_j + d I has an eigenvalue above 2 scale, a step lengthens h by no more than |v|.
        bound = 2 * (step + 2) * lengths
        now = row_dots(found, found).sqrt()
        if not bool((now <= bound).all()):
            worst = float((now / lengths.clamp(min=torch.finfo(torch.float64).tiny)).max())
            raise NumericsError(
                f"LiSSA diverges: after {step + 1} of {depth} steps a vector is {worst:.3g} times as long as at first. "
                f"Its scale, {scale:.3g}, must exceed the largest eigenvalue; estimate it with more power_iterations, "
                "or take more events_per_step."
            )
    return found.div_(scale)


def largest_eigenvalue(multiply: Multiply, start: Float[Tensor, " param"], iterations: int) -> float:
    """Estimate the largest eigenvalue of G by power iteration, from below.

    Args:
        multiply: Multiplies with G.
        start: Where it begins.
        iterations: Products.

    Returns:
        The length of G u, for the u of length 1 that the products before lead to; 0 where a product is 0.

    Raises:
        NumericsError: If a product is not finite.
    """
    vector, length = start[None] / torch.linalg.vector_norm(start), 0.0
    for _ in range(iterations):
        vector = multiply(vector)
        lengths = row_dots(vector, vector).sqrt()
        _check_finite(lengths, "A product with the Gauss-Newton matrix")
        length = float(lengths)
        if length == 0:
            return 0.0
        vector /= length
    return length


def relative_residuals(
    multiply: Multiply, solution: Float[Tensor, "vector param"], right: Float[Tensor, "vector param"], damping: float
) -> Float64[Tensor, " vector"]:
    """Give the length of v - (G + d I) x over that of v; 0 where v is 0."""
    left = multiply(solution).add_(solution, alpha=damping).sub_(right)
    lengths = row_dots(right, right)
    return torch.where(lengths > 0, row_dots(left, left) / lengths, 0.0).sqrt()


def row_dots(one: Float[Tensor, "vector param"], other: Float[Tensor, "vector param"]) -> Float64[Tensor, " vector"]:
    """Multiply row by row, in float64 and without a copy of them all."""
    total = torch.zeros(len(one), dtype=torch.float64, device=one.device)
    for a, b in zip(one.split(_COLUMNS_AT_ONCE, dim=1), other.split(_COLUMNS_AT_ONCE, dim=1), strict=True):
        total += (a.double() * b.double()).sum(1)
    return total


def _check_finite(numbers: Float64[Tensor, " vector"], what: str) -> None:
    if not all(map(math.isfinite, numbers.tolist())):
        raise NumericsError(f"{what} is not finite. Look at the checkpoint's weights, or leave it out.")
