"""Sums over units for DataInf against each unit's own gradient."""

import pytest
import torch
from torch import nn

from engine.contract import loss
from engine.small_models import Model, gather, inputs
from whence.engine.capture import Capture
from whence.engine.curvature_sinks import RankOneSink, SquaredLengthSink
from whence.engine.sinks import Layout


def model():
    """A convolution, one in groups, a normalisation, a linear layer and a bare parameter."""
    return Model(
        lambda m, x: m.last(m.norm(m.grouped(m.first(x)).tanh()).flatten(1)) * m.scale,
        first=nn.Conv2d(2, 4, 3, padding=1),
        grouped=nn.Conv2d(4, 4, 3, groups=2),
        norm=nn.GroupNorm(2, 4),
        last=nn.Linear(16, 3, bias=False),
        scale=nn.Parameter(torch.ones(3)),
    )


def run(model, data, num_units, sink, batches=1):
    capture = Capture(model)
    for some in data.chunk(batches):
        capture.run(lambda which, some=some: loss(model(some[which])), len(some), num_units // batches, [sink])


@pytest.mark.parametrize("batches", [1, 3])
def test_squared_lengths_are_added_up_by_parameter_and_kept_by_unit(batches):
    made, data = model(), inputs(12, 2, 4, 4)
    sink = SquaredLengthSink()
    run(made, data, 6, sink, batches)  # units of two events
    want = {name: g.flatten(1).square().sum(1) for name, g in gather(made, data, 6).items()}
    assert sink.totals == pytest.approx({name: float(lengths.sum()) for name, lengths in want.items()}, rel=1e-9)
    torch.testing.assert_close(sink.norm_squared, sum(want.values()))


@pytest.mark.parametrize("batches", [1, 3])
def test_rank_one_sums_are_those_of_each_unit(batches):
    made, data = model(), inputs(12, 2, 4, 4)
    layout = Layout.of(dict(made.named_parameters()))
    vectors, sums = inputs(2, layout.num_params), torch.zeros(2, layout.num_params).double()
    dampings = {name: 0.1 + k for k, name in enumerate(layout.spans)}
    run(made, data, 6, RankOneSink(layout, vectors, dampings, sums), batches)
    for name, gradients in gather(made, data, 6).items():
        want = 0
        for g in gradients.flatten(1):
            v = vectors[:, layout.spans[name]]
            want = want + torch.outer(v @ g / (dampings[name] + g @ g), g)
        torch.testing.assert_close(sums[:, layout.spans[name]], want, rtol=1e-9, atol=1e-11)
