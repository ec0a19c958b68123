import gc
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from engine.contract import Case, capture_factors, loss, new_lengths
from whence.engine.capture import AbstractSink, Capture
from whence.engine.sinks import DotSink, GatherSink, Layout, ProjectSink
from whence.projections import ProjectionKind, make_projection


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(12, 2), nn.LayerNorm(2)).double()


@pytest.fixture
def data():
    return torch.randn(4, 2, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def run(
    model: nn.Module, data: Tensor, num_units: int, make: Callable[[Layout], Any], patterns: Sequence[str] = ("*",)
):
    capture = Capture(model, patterns)
    sink = make(Layout.of(capture.parameters))
    capture.run(lambda some: loss(model(data[some])), len(data), num_units, [sink])
    return sink


def test_a_layout_lays_parameters_end_to_end(model: nn.Module):
    layout = Layout.of(dict(model.named_parameters()))
    assert layout.spans == {
        "0.weight": slice(0, 54),
        "0.bias": slice(54, 57),
        "2.weight": slice(57, 81),
        "2.bias": slice(81, 83),
        "3.weight": slice(83, 85),
        "3.bias": slice(85, 87),
    }
    assert layout.num_params == 87
    assert Layout.of({}) == Layout({}, 0)


def test_runs_of_a_layout(model: nn.Module):
    layout = Layout.of(dict(model.named_parameters()))
    assert layout.runs(["3.bias", "0.bias", "2.bias", "3.weight"]) == [
        (["0.bias"], slice(54, 57)),
        (["2.bias", "3.weight", "3.bias"], slice(81, 87)),
    ]
    assert layout.runs([]) == []


@pytest.mark.parametrize("num_vectors", [1, 3, 100])  # of many vectors no copies are made
@pytest.mark.parametrize("patterns", [("*",), ("*.weight",)])
def test_dots_of_many_small_parameters(num_vectors: int, patterns: tuple[str, ...]):
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(20, 20) for _ in range(30))).double()
    data = torch.randn(4, 20, dtype=torch.float64)
    rows = run(model, data, 4, lambda layout: GatherSink(layout, data.new_zeros(4, layout.num_params)), patterns).rows
    vectors = torch.randn(num_vectors, rows.shape[1], dtype=torch.float64)
    sink = run(model, data, 4, lambda layout: DotSink(layout, vectors, 4), patterns)
    torch.testing.assert_close(sink.dots, rows @ vectors.T, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(sink.norm_squared, rows.square().sum(1), rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("num_vectors", [1, 30])
def test_dots_over_many_numbers_are_as_exact_as_float32_is(num_vectors: int):
    torch.manual_seed(0)
    model = nn.ModuleList(nn.Linear(30, 30, bias=False) for _ in range(300))
    data = torch.randn(2, 30)

    def outputs(some: slice) -> Tensor:
        return torch.stack([layer(data[some]).square().sum(1) for layer in model]).sum(0)

    capture = Capture(model)
    layout = Layout.of(capture.parameters)
    gathered = GatherSink(layout, torch.zeros(2, layout.num_params))
    capture.run(outputs, 2, 2, [gathered])
    vectors = gathered.rows[:1].repeat(num_vectors, 1)  # all terms have one sign, so that errors add up
    sink = DotSink(layout, vectors, 2)
    capture.run(outputs, 2, 2, [sink])
    length = float(vectors[0].double().norm())
    assert abs(float(sink.dots[0, 0]) - length**2) < 1e-6 * length**2


@pytest.mark.parametrize("kind", ["dots", "rows"])
def test_a_sink_that_is_let_go_is_freed_at_once(model: nn.Module, data: Tensor, kind: str):
    # It holds whole gradients, and Python's search for cycles, which counts objects, may be a long time off.
    def make(layout: Layout) -> AbstractSink:
        if kind == "dots":
            return DotSink(layout, data.new_zeros(1, layout.num_params), 4)
        shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        return ProjectSink(make_projection("identity", shapes, seed=0), data.new_empty(4, layout.num_params))

    gc.disable()
    try:
        sink = weakref.ref(run(model, data, 4, make))
        assert sink() is None
    finally:
        gc.enable()


def test_gathered_rows_are_in_the_order_of_the_parameters(model: nn.Module, data: Tensor):
    sink = run(model, data, 4, lambda layout: GatherSink(layout, data.new_zeros(4, layout.num_params)))
    for event in range(4):
        want = torch.autograd.grad(loss(model(data[event : event + 1]))[0], list(model.parameters()))
        torch.testing.assert_close(sink.rows[event], torch.cat([w.flatten() for w in want]), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("units_per_group", [1, 2, 4])
def test_gathered_lengths_are_those_of_the_rows_and_of_their_groups(
    model: nn.Module, data: Tensor, units_per_group: int
):
    sink = run(model, data, 4, lambda layout: GatherSink(layout, data.new_zeros(4, layout.num_params), units_per_group))
    groups = sink.rows.unflatten(0, (-1, units_per_group)).sum(1)
    torch.testing.assert_close(sink.unit_norm_squared, sink.rows.square().sum(1), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(sink.group_norm_squared, groups.square().sum(1), rtol=1e-10, atol=1e-10)


def test_what_was_in_the_rows_is_lost(data: Tensor):
    class HalfUsed(nn.Module):
        def __init__(self):
            super().__init__()
            self.idle, self.used = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, inputs: Tensor) -> Tensor:
            return self.used(inputs[:, :, 0, 0])

    sink = run(HalfUsed().double(), data, 4, lambda layout: GatherSink(layout, data.new_ones(4, layout.num_params)))
    assert (sink.rows[:, sink.layout.spans["idle.weight"]] == 0).all()


@pytest.mark.parametrize("patterns", [("*",), ("*.bias",)])
@pytest.mark.parametrize("num_units", [4, 2, 1])
def test_products_and_norms_are_those_of_gathered_rows(
    model: nn.Module, data: Tensor, num_units: int, patterns: Sequence[str]
):
    rows = run(
        model,
        data,
        num_units,
        lambda layout: GatherSink(layout, data.new_zeros(num_units, layout.num_params)),
        patterns,
    ).rows
    vectors = torch.randn(5, rows.shape[1], dtype=torch.float64)
    sink = run(model, data, num_units, lambda layout: DotSink(layout, vectors, num_units), patterns)
    torch.testing.assert_close(sink.dots, rows @ vectors.T, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(sink.norm_squared, rows.square().sum(1), rtol=1e-10, atol=1e-10)


def test_without_vectors_there_are_norms_only(model: nn.Module, data: Tensor, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("whence.engine._base.AbstractLayerFactors.dot", lambda *a: pytest.fail("a product was taken"))
    sink = run(model, data, 4, lambda layout: DotSink(layout, torch.zeros(0, 87, dtype=torch.float64), 4))
    assert sink.dots.shape == (4, 0)
    assert (sink.norm_squared > 0).all()


@pytest.mark.parametrize("kind", ["two_sided_sketch", "two_sided", "sketch", "gaussian", "identity"])
@pytest.mark.parametrize("num_units", [4, 2])
def test_projected_rows_are_projections_of_gathered_rows(
    model: nn.Module, data: Tensor, num_units: int, kind: ProjectionKind
):
    gathered = run(
        model, data, num_units, lambda layout: GatherSink(layout, data.new_zeros(num_units, layout.num_params))
    )
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    width = None if kind in ("identity", "two_sided") else 12
    projection = make_projection(kind, shapes, width=width, side=2, whole=0, seed=3, dtype=torch.float64)
    want = data.new_zeros(num_units, projection.width)
    for name, span in gathered.layout.spans.items():
        projection.add(want, name, gathered.rows[:, span].unflatten(1, shapes[name]))
    for with_norms in (True, False):
        rows = data.new_ones(num_units, projection.width)
        sink = ProjectSink(projection, rows, with_norms=with_norms)
        run(model, data, num_units, lambda _, made=sink: made)
        torch.testing.assert_close(rows, want, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(sink.norm_squared, gathered.unit_norm_squared * with_norms, rtol=1e-10, atol=1e-10)


def test_several_sinks_share_one_pass(model: nn.Module, data: Tensor, monkeypatch: pytest.MonkeyPatch):
    count = []
    original = Capture._consume
    monkeypatch.setattr(Capture, "_consume", lambda self, layer: (count.append(layer), original(self, layer)))
    capture = Capture(model)
    layout = Layout.of(capture.parameters)
    gather = GatherSink(layout, data.new_zeros(4, layout.num_params))
    dots = DotSink(layout, torch.ones(1, 87, dtype=torch.float64), 4)
    assert isinstance(gather, AbstractSink) and isinstance(dots, AbstractSink)
    capture.run(lambda some: loss(model(data[some])), 4, 4, [gather, dots])
    assert len(count) == len(set(count)) == 3
    torch.testing.assert_close(dots.dots[:, 0], gather.rows.sum(1), rtol=1e-10, atol=1e-10)


def test_norms_in_float32_do_not_lose_digits_in_large_layers():
    case = Case(lambda: nn.Linear(1500, 1500, bias=False), (1500,))
    factors, _ = capture_factors(case.build(torch.float32), case.inputs(1, torch.float32), 1)
    exact = factors.gradients["weight"].double().square().sum()
    # Two million squares: added one after another in float32 they would be off by 1e-4.
    lengths = new_lengths(factors)
    factors.measure(["weight"], lengths)
    assert lengths.sum().item() == pytest.approx(exact.item(), rel=1e-6)
