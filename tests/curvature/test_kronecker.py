import pytest
import torch
from torch import Tensor, nn

from whence.curvature.kronecker import KroneckerBlock, KroneckerCurvature
from whence.engine.capture import Capture
from whence.engine.curvature_sinks import CovarianceSink, SecondMomentSink
from whence.errors import ConfigError


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def covariance(size: int, seed: int) -> Tensor:
    rows = random(2 * size, size, seed=seed)
    return rows.T @ rows


def test_a_block_is_the_inverse_of_the_damped_kronecker_product():
    out, inner, gradients = covariance(3, 1), covariance(4, 2), random(5, 3, 4, seed=3)
    block = KroneckerBlock.of(out, inner)
    matrix = torch.kron(out, inner)  # of flattened rows
    damping = 0.1 * float(torch.diagonal(matrix).mean())
    want = torch.linalg.solve(matrix + damping * torch.eye(12).double(), gradients.flatten(1).T).T
    torch.testing.assert_close(block.solve(gradients, 0.1).flatten(1), want)


def test_all_parameters_are_solved_where_they_lie():
    block = KroneckerBlock.of(covariance(2, 1), covariance(4, 2), bias="a.bias")
    curvature = KroneckerCurvature({"a.weight": block}, {"b.scale": torch.tensor([1.0, 3.0]).double()})
    spans = {"b.scale": slice(0, 2), "a.bias": slice(2, 4), "a.weight": slice(4, 10)}
    vectors = random(3, 10)
    whole = torch.cat([vectors[:, 4:].unflatten(1, (2, 3)), vectors[:, 2:4, None]], dim=2)
    want = block.solve(whole, 0.5)
    scale = vectors[:, :2] / torch.tensor([2.0, 4.0])
    found = curvature.solve_(vectors.clone(), spans, 0.5)
    torch.testing.assert_close(found[:, :2], scale)
    torch.testing.assert_close(found[:, 2:4], want[..., -1])
    torch.testing.assert_close(found[:, 4:], want[..., :-1].flatten(1))


def test_refusals():
    curvature = KroneckerCurvature({}, {"a": torch.ones(2).double()})
    with pytest.raises(ConfigError, match=r"damping must be above 0 with Kronecker factors, found 0.0"):
        curvature.solve_(random(1, 2), {"a": slice(0, 2)}, 0.0)
    with pytest.raises(ConfigError, match="no curvature of b, c"):
        curvature.solve_(random(1, 4), {"a": slice(0, 2), "b": slice(2, 3), "c": slice(3, 4)}, 0.1)


def run(model: nn.Module, data: Tensor, *sinks) -> None:
    """Give the sinks gradients of each output alone, whose second moment is exact."""
    capture = Capture(model)
    for k in range(model(data[:1]).flatten(1).shape[1]):
        outputs = lambda some, k=k: model(data[some]).flatten(1)[:, k]  # noqa: E731
        capture.run(outputs, len(data), len(data), sinks)


def gauss_newton(model: nn.Module, data: Tensor) -> Tensor:
    """Mean over events of J^T J, over weight and bias of each output, the bias last."""
    total = torch.zeros(())
    for event in range(len(data)):
        for value in model(data[event : event + 1]).flatten():
            weight, bias = torch.autograd.grad(value, list(model.parameters()), retain_graph=True)
            row = torch.cat([weight.flatten(1), bias[:, None]], dim=1).flatten()
            total = total + torch.outer(row, row)
    return total / len(data)


def blocks_of(sink: CovarianceSink, num_events: int) -> KroneckerBlock:
    ((_, found),) = sink.covariances.items()
    num_inner = found.inner[-1, -1]  # positions of all events
    return KroneckerBlock.of(found.out / num_events, found.inner / num_inner, found.bias)


def test_it_is_exact_for_one_linear_layer():
    model, data = nn.Linear(4, 3).double(), random(6, 4)
    sink = CovarianceSink()
    run(model, data, sink)
    block = blocks_of(sink, len(data))
    matrix = gauss_newton(model, data)
    gradients = random(2, 3, 5, seed=5)
    damping = 0.2 * float(torch.diagonal(matrix).mean())
    want = torch.linalg.solve(matrix + damping * torch.eye(15).double(), gradients.flatten(1).T).T
    torch.testing.assert_close(block.solve(gradients, 0.2).flatten(1), want)
    assert block.bias == "bias"


@pytest.mark.parametrize("reduce", [False, True])
def test_second_moments_are_those_of_the_rotated_gradients(reduce):
    model, data = nn.Conv2d(2, 3, 3, padding=1).double(), random(4, 2, 4, 4)
    first = CovarianceSink(reduce=reduce)
    run(model, data, first)
    block = blocks_of(first, len(data))
    second = SecondMomentSink({"weight": (block.out_basis, block.inner_basis)})
    run(model, data, second)
    matrix = gauss_newton(model, data)
    basis = torch.kron(block.out_basis, block.inner_basis)
    torch.testing.assert_close(second.squares["weight"].flatten() / len(data), torch.diagonal(basis.T @ matrix @ basis))


def test_reduced_factors_are_exact_where_all_positions_see_the_same():
    """Then the gradient of an event is the sum of its output gradients times the one input."""
    model, data = nn.Conv1d(2, 3, 1).double(), random(5, 2, 1).expand(5, 2, 4)
    sink = CovarianceSink(reduce=True)
    run(model, data, sink)
    block = blocks_of(sink, len(data))
    eigenvalues = torch.linalg.eigvalsh(gauss_newton(model, data))
    torch.testing.assert_close(block.eigenvalues.flatten().sort().values, eigenvalues, rtol=1e-8, atol=1e-10)


def test_other_parameters_have_mean_squares():
    model = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2), nn.GroupNorm(2, 4)).double()
    sink = CovarianceSink()
    run(model, random(3, 4, 3, 3), sink)
    assert not sink.covariances
    assert {name: squares.shape for name, squares in sink.squares.items()} == {
        name: p.shape for name, p in model.named_parameters()
    }


def test_a_layer_whose_gradients_are_rounding_is_left_out():
    tiny = covariance(2, 1) * 1e-30  # eps of float64 is 2e-16
    blocks = {
        "keys.weight": KroneckerBlock.of(tiny, covariance(3, 2)),
        "a.weight": KroneckerBlock.of(covariance(2, 3), covariance(3, 4)),
    }
    curvature = KroneckerCurvature(blocks, {"idle": torch.zeros(2).double()})
    spans = {"keys.weight": slice(0, 6), "a.weight": slice(6, 12), "idle": slice(12, 14)}
    vectors = random(3, 14)
    want = blocks["a.weight"].solve(vectors[:, 6:12].unflatten(1, (2, 3)), 0.1).flatten(1)
    found = curvature.solve_(vectors.clone(), spans, 0.1)
    torch.testing.assert_close(found[:, 6:12], want)
    assert not found[:, :6].any() and not found[:, 12:].any()
