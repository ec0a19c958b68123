import pytest
import torch
from torch import Tensor

from whence.curvature.ridge import DAMPINGS, Ridge
from whence.errors import ConfigError

WIDE, TALL = (7, 12), (40, 6)


def make_rows(shape: tuple[int, int], seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    spread = torch.logspace(0, -2, shape[1], dtype=torch.float64)
    return torch.randn(shape, generator=generator, dtype=torch.float64) * spread


def ridge_of(rows: Tensor) -> Ridge:
    return Ridge.of(lambda: rows.split(5), *rows.shape)


@pytest.mark.parametrize("shape", [WIDE, TALL])
@pytest.mark.parametrize("damping", [1e-4, 0.1, 10.0])
def test_scores_are_those_of_the_inverse(shape, damping):
    rows, queries = make_rows(shape), make_rows((3, shape[1]), seed=1)
    ridge = ridge_of(rows)
    absolute = damping * ridge.mean_eigenvalue
    inverse = torch.linalg.inv(rows.T @ rows + absolute * torch.eye(shape[1]).double())
    torch.testing.assert_close(ridge.solve(queries, damping) @ rows.T, queries @ inverse @ rows.T)
    found = ridge.leverages(rows, damping)
    torch.testing.assert_close(found.leverage, torch.einsum("nk,kl,nl->n", rows, inverse, rows))
    torch.testing.assert_close(found.length, (rows @ inverse).norm(dim=1))


def test_the_mean_eigenvalue_is_the_trace_over_what_can_differ_from_zero():
    for shape in (WIDE, TALL):
        rows = make_rows(shape)
        assert ridge_of(rows).mean_eigenvalue == pytest.approx(float(rows.square().sum()) / min(shape))


@pytest.mark.parametrize("shape", [WIDE, TALL])
def test_primal_is_dual(shape):
    rows, queries = make_rows(shape), make_rows((3, shape[1]), seed=1)
    # Padded with zeros, wide rows are decomposed sample by sample; repeated zeros samples, width by width.
    other = torch.cat([rows, torch.zeros(50, shape[1]).double()]) if shape == WIDE else rows
    padded = torch.cat([rows, torch.zeros(len(rows), 60).double()], dim=1) if shape == TALL else rows
    damping = 0.3
    absolute = damping * ridge_of(rows).mean_eigenvalue
    want = ridge_of(rows).solve(queries, damping)
    for rows_now in (other, padded):
        ridge = ridge_of(rows_now)
        width = rows_now.shape[1]
        queries_now = torch.cat([queries, torch.zeros(3, width - shape[1]).double()], dim=1)
        found = ridge.solve(queries_now, absolute / ridge.mean_eigenvalue)
        torch.testing.assert_close(found[:, : shape[1]] @ rows.T, want @ rows.T)


def test_much_damping_leaves_the_inner_product():
    rows, queries = make_rows(TALL), make_rows((3, 6), seed=1)
    ridge = ridge_of(rows)
    scores = ridge.solve(queries, 1e9) @ rows.T * (1e9 * ridge.mean_eigenvalue)
    torch.testing.assert_close(scores, queries @ rows.T, rtol=1e-6, atol=1e-7)


def test_no_damping_gives_least_squares():
    rows, query = make_rows(WIDE), make_rows((1, 12), seed=1)
    scores = ridge_of(rows).solve(query, 0.0) @ rows.T
    want = torch.linalg.lstsq(rows.T, query.T).solution.T
    torch.testing.assert_close(scores, want)


def test_rows_of_a_lower_rank_need_no_damping():
    rows = make_rows((20, 3)) @ make_rows((3, 8), seed=2)
    ridge = ridge_of(rows)
    assert len(ridge.eigenvalues) == 3
    query = rows[:1] * 2
    torch.testing.assert_close(ridge.solve(query, 0.0), query @ torch.linalg.pinv(rows.T @ rows))


def explicit_error(rows: Tensor, damping: float) -> float:
    """The error of generalised cross-validation, from one regression for each row."""
    errors, identity = [], torch.eye(rows.shape[1]).double()
    for left_out in range(len(rows)):
        others, target = torch.cat([rows[:left_out], rows[left_out + 1 :]]), rows[left_out]
        residual = identity - others.T @ torch.linalg.inv(others @ others.T + damping * torch.eye(len(others))) @ others
        error = len(target) * (residual @ target).square().sum() / residual.trace().square()
        errors.append(float(error / target.square().sum()))
    return sum(errors) / len(errors)


@pytest.mark.parametrize("shape", [WIDE, TALL])
def test_errors_are_those_of_a_regression_for_each_left_out_row(shape):
    rows = make_rows(shape)
    ridge, tried = ridge_of(rows), (1e-3, 1e-1, 1.0, 30.0)
    choice = ridge.choose_damping(lambda: rows.split(3), tried)
    want = [explicit_error(rows, damping * ridge.mean_eigenvalue) for damping in tried]
    assert choice.errors == pytest.approx(want)
    assert choice.chosen == tried[want.index(min(want))]
    assert choice.at_edge == (choice.chosen in (1e-3, 30.0))


def test_the_damping_follows_the_noise():
    """Rows of rank 3 and noise: the more of it, the more damping."""
    clean = make_rows((30, 3)) @ make_rows((3, 40), seed=2)
    chosen = []
    for noise in (0.01, 0.1, 0.5):
        rows = clean + noise * torch.randn(30, 40, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        chosen.append(ridge_of(rows).choose_damping(lambda rows=rows: [rows]).chosen)
    assert chosen == sorted(chosen) and chosen[0] < chosen[-1]


def test_the_scale_of_the_rows_does_not_matter():
    rows = make_rows(TALL)
    one, other = (ridge_of(r).choose_damping(lambda r=r: [r]) for r in (rows, 1e-4 * rows))
    assert one.chosen == other.chosen and one.dampings == DAMPINGS
    assert one.errors == pytest.approx(other.errors)


def test_rows_of_zeros():
    rows = torch.zeros(4, 6)
    ridge = ridge_of(rows)
    assert ridge.choose_damping(lambda: [rows]).chosen == 1.0
    assert (ridge.solve(make_rows((2, 6)), 1.0) == 0).all()
    with_one = torch.cat([rows.double(), make_rows((3, 6))])
    choice = ridge_of(with_one).choose_damping(lambda: [with_one], (0.1, 1.0))
    assert all(error == error for error in choice.errors)


def test_blocks_must_hold_all_rows():
    rows = make_rows(TALL)
    with pytest.raises(ConfigError, match="must hold 40 rows, found 39"):
        Ridge.of(lambda: [rows[:-1]], *rows.shape)
