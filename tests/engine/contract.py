"""What every layer kind must keep: its gradients are those of one event at a time."""

from collections.abc import Callable
from dataclasses import dataclass
from math import inf

import pytest
import torch
from torch import Tensor, nn

from whence.engine._base import AbstractLayerFactors, MatrixLayerFactors
from whence.engine._lengths import SquaredLengths
from whence.engine.capture import AbstractSink, Capture
from whence.projections import make_projection


@dataclass(frozen=True)
class Case:
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    """Of one event's input."""
    again: Callable[[Tensor], Tensor] = lambda inputs: 0.5 * inputs + 1
    """Makes the input of the layer's second call."""

    def build(self, dtype: torch.dtype = torch.float64) -> nn.Module:
        torch.manual_seed(0)
        layer = self.make().to(dtype)
        for parameter in layer.parameters():
            nn.init.normal_(parameter)  # the weights of a fresh normalisation are all 1
        return layer

    def inputs(self, num_events: int, dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.randn(num_events, *self.shape, generator=torch.Generator().manual_seed(1), dtype=dtype)


class KeepFactors(AbstractSink):
    """A sink that keeps the factors themselves, and counts how often it was called."""

    def __init__(self):
        self.found: list[tuple[AbstractLayerFactors, dict[str, str]]] = []

    def consume(self, factors: AbstractLayerFactors, names: dict[str, str]) -> None:
        self.found.append((factors, names))


class Twice(nn.Module):
    """Calls one layer twice, on inputs that may differ in size."""

    def __init__(self, layer: nn.Module, again: Callable[[Tensor], Tensor]):
        super().__init__()
        self.layer = layer
        self.again = again

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        return self.layer(inputs), self.layer(self.again(inputs))


def loss(outputs: Tensor | tuple[Tensor, ...]) -> Tensor:
    """One number per event that depends on every element in its own way."""
    if isinstance(outputs, tuple):
        return torch.stack([loss(part) for part in outputs]).sum(0)
    flat = outputs.flatten(1)
    return (flat * torch.arange(flat.shape[1], dtype=flat.dtype, device=flat.device).sin() + flat.square() / 7).sum(1)


def batch_of_one(model: nn.Module, inputs: Tensor, num_units: int) -> dict[str, Tensor]:
    """Each unit's gradient from autograd, one event at a time, added up over the unit's members."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    events = [
        torch.autograd.grad(loss(model(one[None]))[0], list(named.values()), materialize_grads=True) for one in inputs
    ]
    return {
        name: torch.stack([event[k] for event in events]).unflatten(0, (num_units, -1)).sum(1)
        for k, name in enumerate(named)
    }


def capture_factors(model: nn.Module, inputs: Tensor, num_units: int) -> tuple[AbstractLayerFactors, dict[str, str]]:
    """The factors of a model's only layer."""
    capture, sink = Capture(model), KeepFactors()
    capture.run(lambda some: loss(model(inputs[some])), len(inputs), num_units, [sink])
    (found,) = sink.found
    return found


def check_gradients(model: nn.Module, inputs: Tensor, num_units: int) -> None:
    """Compare what is materialised with the batch-of-one gradients, and norms and products with the former."""
    want = batch_of_one(model, inputs, num_units)
    factors, names = capture_factors(model, inputs, num_units)
    # A sum of some thousand products at most, each rounded to 6e-8 or 1e-16 of the largest.
    dtype = next(model.parameters()).dtype  # the inputs may be indices
    tolerance = 1e-4 if dtype == torch.float32 else 1e-11
    found = {names[own]: factors.materialise()[own] for own in names}
    assert found.keys() == want.keys()
    for name in want:
        atol = tolerance * float(want[name].abs().max())
        torch.testing.assert_close(found[name], want[name], rtol=tolerance, atol=atol)
    rows = torch.cat([found[names[own]].flatten(1) for own in names], dim=1)
    want_lengths = rows.double().square().sum(1)
    lengths = new_lengths(factors)
    factors.measure(list(names), lengths)
    torch.testing.assert_close(lengths.sum(), want_lengths, rtol=tolerance, atol=tolerance)
    vectors = torch.randn(3, rows.shape[1], generator=torch.Generator().manual_seed(2), dtype=dtype)
    widths = [found[names[own]][0].numel() for own in names]
    lengths = new_lengths(factors)
    dots = factors.dot(dict(zip(names, vectors.split(widths, dim=1), strict=True)), lengths)
    scale = float(rows.norm(dim=1).max() * vectors.norm(dim=1).max())
    torch.testing.assert_close(dots, rows @ vectors.T, rtol=0, atol=tolerance * scale)
    torch.testing.assert_close(lengths.sum(), want_lengths, rtol=tolerance, atol=tolerance)
    check_pieces(factors, found, names)
    for with_norms in (True, False):
        check_projected(factors, found, names, with_norms, tolerance)
    if isinstance(factors, MatrixLayerFactors):
        check_both_forms(factors, found, names, tolerance)


def new_lengths(factors: AbstractLayerFactors) -> SquaredLengths:
    """Squared lengths of nothing yet."""
    return SquaredLengths(factors.num_units, factors.device)


def check_pieces(factors: AbstractLayerFactors, found: dict[str, Tensor], names: dict[str, str]) -> None:
    """Pieces laid side by side are the gradients."""
    parts: dict[str, list[Tensor]] = {own: [] for own in names}
    for own, span, gradients in factors.pieces(names):
        assert (
            span == slice(sum(p.shape[1] for p in parts[own]), span.stop)
            and gradients.shape[1] == span.stop - span.start
        )
        parts[own].append(gradients)
    for own, name in names.items():
        torch.testing.assert_close(torch.cat(parts[own], dim=1), found[name].flatten(1))


def check_projected(
    factors: AbstractLayerFactors, found: dict[str, Tensor], names: dict[str, str], with_norms: bool, tolerance: float
) -> None:
    """Projected gradients are projections of the gradients."""
    shapes = {name: tuple(gradients.shape[1:]) for name, gradients in found.items()}
    dtype = next(iter(found.values())).dtype
    # Sides of two make small layers two-sided as well.
    projection = make_projection("two_sided_sketch", shapes, width=16, side=2, whole=0, seed=0, dtype=dtype)
    want, rows = (torch.zeros(factors.num_units, 16, dtype=dtype) for _ in range(2))
    for name, gradients in found.items():
        projection.add(want, name, gradients)
    lengths = new_lengths(factors)
    factors.project(projection, names, rows, lengths if with_norms else None)
    atol = 3 * tolerance * max(float(gradients.flatten(1).norm(dim=1).max()) for gradients in found.values())
    torch.testing.assert_close(rows, want, rtol=tolerance, atol=atol)
    want_lengths = torch.stack([g.flatten(1).double().square().sum(1) for g in found.values()]).sum(0)
    torch.testing.assert_close(lengths.sum(), want_lengths * with_norms, rtol=tolerance, atol=tolerance)


def check_both_forms(
    factors: MatrixLayerFactors, found: dict[str, Tensor], names: dict[str, str], tolerance: float
) -> None:
    """Norms and projections are the same by either way, whichever is cheaper."""
    if "weight" not in names:
        return
    weight = found[names["weight"]]
    if len(factors.calls) == 1 and factors.gram_cost < inf:
        lengths = weight.flatten(1).double().square().sum(1)
        torch.testing.assert_close(factors.gram_norm_squared().double(), lengths, rtol=tolerance, atol=tolerance)
    grouped = getattr(factors.layer, "groups", 1) > 1
    check_factors(factors, weight, tolerance)
    for pay in (True, False):
        # Two outputs at a time, and one way or the other.
        changed = {"_factors_pay": lambda *_, pay=pay, **__: pay} | ({} if grouped else {"outputs_at_once": 2})
        forced = type("Forced", (type(factors),), changed)(factors.layer, factors.calls, factors.num_units)
        check_pieces(forced, found, names)
        check_projected(forced, found, names, True, tolerance)


def check_factors(factors: MatrixLayerFactors, weight: Tensor, tolerance: float) -> None:
    """The weight gradient is G^T A, and the covariances are those of A and G."""
    groups = getattr(factors.layer, "groups", 1)
    products, inner, out = [], [], []
    for a, g in factors.factors():
        a, g = (x.unflatten(1, (groups, -1)) for x in (a, g))
        products.append((g.mT @ a).flatten(1, 2))
        inner.append(torch.einsum("egpi,egpj->ij", a, a))
        out.append(torch.einsum("egpi,egpj->ij", g, g))
    gradients = sum(products).unflatten(0, (factors.num_units, -1)).sum(1)
    atol = tolerance * float(weight.abs().max())
    torch.testing.assert_close(gradients.view_as(weight), weight, rtol=tolerance, atol=atol)
    found = factors.covariance(with_bias=False)
    for covariance, want in zip(found, (sum(inner), sum(out)), strict=True):
        torch.testing.assert_close(covariance, want, rtol=tolerance, atol=tolerance * float(want.abs().max()))
    with_ones, _ = factors.covariance(with_bias=True)
    ones = sum(a.flatten(0, 1).sum(0) for a, _ in factors.factors())
    torch.testing.assert_close(with_ones[:-1, -1], ones, rtol=tolerance, atol=tolerance * float(weight.abs().max() + 9))
    assert with_ones[-1, -1] == sum(a[..., 0].numel() for a, _ in factors.factors())


class LayerContract:
    """A subclass gives the fixture ``case``."""

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
    def test_gradients_are_those_of_one_event_at_a_time(self, case: Case, dtype: torch.dtype):
        check_gradients(case.build(dtype), case.inputs(3, dtype), num_units=3)

    @pytest.mark.parametrize("num_units", [1, 2, 4])
    def test_units_of_several_events_are_sums(self, case: Case, num_units: int):
        check_gradients(case.build(), case.inputs(4), num_units)

    def test_one_event_alone(self, case: Case):
        check_gradients(case.build(), case.inputs(1), num_units=1)

    @pytest.mark.parametrize("num_units", [4, 2])
    def test_two_calls_are_joined_before_the_norm(self, case: Case, num_units: int):
        check_gradients(Twice(case.build(), case.again), case.inputs(4), num_units)

    def test_each_parameter_alone(self, case: Case):
        for chosen, _ in case.build().named_parameters():
            layer = case.build()
            for name, parameter in layer.named_parameters():
                parameter.requires_grad_(name == chosen)
            check_gradients(layer, case.inputs(3), num_units=3)

    def test_inputs_in_another_memory_layout(self, case: Case):
        inputs = case.inputs(3)
        check_gradients(case.build(), inputs.transpose(0, -1).contiguous().transpose(0, -1), num_units=3)
