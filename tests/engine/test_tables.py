"""Tables that are broadcast over the events, against the batch-of-one reference, without a pass of their own."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from engine.contract import batch_of_one, loss
from engine.small_models import Model, check, check_equal, gather, inputs
from whence.engine.capture import Capture
from whence.engine.tables import event_tables


class Block(nn.Module):
    """A table beside a layer, as in the blocks of PixArt and Sana."""

    def __init__(self):
        super().__init__()
        self.scale_shift_table, self.layer = nn.Parameter(torch.randn(2, 3)), nn.Linear(3, 3)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        scale, shift = (self.scale_shift_table[None] + time[:, None]).unbind(1)
        return self.layer(x) * scale + shift


def tokens(m: Any, x: Tensor) -> Tensor:
    """Three tokens of four features for each event."""
    return m.first(x).unflatten(1, (3, 4))


def twice(m: Any, x: Tensor) -> Tensor:
    return (tokens(m, x) * m.table[None] + m.table.unsqueeze(0)).sin()


def checkpointed(m: Any, x: Tensor) -> Tensor:
    return checkpoint(lambda y: (y + m.table[None]).sin() * m.table, tokens(m, x), use_reentrant=False)


def in_place(m: Any, x: Tensor) -> Tensor:
    y = tokens(m, x).sin()
    y += m.table
    return y.mul_(m.table)


USES: dict[str, tuple[tuple[int, ...], Callable[..., Tensor]]] = {
    "axis in front": ((3, 4), lambda m, x: tokens(m, x) + m.table[None]),
    "two axes in front": ((3, 4), lambda m, x: tokens(m, x)[:, None] * m.table[None, None]),
    "axis in front of dots": ((3, 4), lambda m, x: tokens(m, x) * m.table[None, ...]),
    "axis in front of parts": ((3, 6), lambda m, x: tokens(m, x) * m.table[None, :, 1:5]),
    "axis in front of a row": ((2, 4), lambda m, x: tokens(m, x) * m.table[None, None, 1] + m.table[None, None, 0]),
    "unsqueeze": ((3, 4), lambda m, x: tokens(m, x) * m.table.unsqueeze(0)),
    "unsqueeze by name": ((3, 4), lambda m, x: torch.unsqueeze(m.table, dim=0) - tokens(m, x)),
    "split afterwards": ((2, 4), lambda m, x: torch.mul(*(m.table[None] + x[:, :4][:, None]).chunk(2, dim=1))),
    "expand": ((1, 1, 4), lambda m, x: torch.cat([m.table.expand(len(x), -1, -1), tokens(m, x)], dim=1)),
    "expand to a size": ((1, 4), lambda m, x: torch.cat([m.table.expand((len(x), 4)), m.first(x)], dim=1)),
    "positions": ((1, 3, 4), lambda m, x: tokens(m, x) + m.table),
    "channels": ((4,), lambda m, x: m.table * tokens(m, x)),
    "scalar": ((), lambda m, x: tokens(m, x) * m.table),
    "difference": ((3, 4), lambda m, x: (tokens(m, x) - m.table) * (m.table - tokens(m, x).sin())),
    "quotient": ((3, 4), lambda m, x: m.table / tokens(m, x).exp()),
    "with numbers": ((3, 4), lambda m, x: (2 - 0.5 * m.table) * tokens(m, x) + 1 / (4 + m.table[None])),
    "cast": ((3, 4), lambda m, x: (tokens(m, x).float() + m.table.float()[None].to("cpu")).to(x.dtype)),
    "twice": ((3, 4), twice),
    "checkpointed": ((3, 4), checkpointed),
    "in place": ((3, 4), in_place),
    "its shape": ((3, 4), lambda m, x: tokens(m, x) + m.table[None].to(m.table.device) * len(m.table) / m.table.ndim),
    "never": ((3, 4), lambda m, x: tokens(m, x)),
    "in another module": ((3, 4), lambda m, x: m.block(tokens(m, x).mean(2), x[:, :3]) + 0 * m.table[None, 0, :3]),
}


@pytest.mark.parametrize("name", list(USES))
@pytest.mark.parametrize("num_units", [5, 1])
def test_each_event_has_a_copy(name: str, num_units: int):
    shape, run = USES[name]
    model = Model(run, table=nn.Parameter(torch.randn(shape)), first=nn.Linear(5, 12), block=Block())
    if name != "in another module":
        model.block.requires_grad_(False)
    data = inputs(5, 5)
    float32 = name == "cast"
    check_equal(gather(model, data, num_units), batch_of_one(model, data, num_units), rtol=1e-5 if float32 else 1e-9)
    capture = Capture(model, uncovered="refuse")
    capture.run(lambda some: loss(model(data[some])), 5, num_units, [])
    assert not capture.uncovered
    if not float32:
        check(model, data)


OTHER_USES: dict[str, Callable[..., Any]] = {
    "a product of matrices": lambda table, x: x @ table.T,
    "an index": lambda table, x: table[0] + x,
    "a copy of rows": lambda table, x: table.repeat(5, 1),
    "concatenation": lambda table, x: torch.cat([table, table]),
    "two tables": lambda table, x: table * table,
    "other sizes": lambda table, x: table + x[:3],
    "more axes than the other": lambda table, x: table + torch.ones(5),
    "another axis": lambda table, x: table.unsqueeze(1),
    "expand to other sizes": lambda table, x: table.expand(2, 3, 5),
    "stack": lambda table, x: torch.stack([table[None][0], table]),
    "by name": lambda table, x: torch.add(x[:3], other=table),
    "change": lambda table, x: table.mul_(1),
}


@pytest.mark.parametrize("name", list(OTHER_USES))
def test_other_uses_see_the_parameter_and_are_noticed(name: str):
    holder = Model(lambda m, x: x, table=nn.Parameter(torch.randn(3, 5)))
    x = inputs(5, 3, 5)
    want = OTHER_USES[name](holder.table.detach(), x)
    with event_tables({"table": (holder, "table")}, num_events=5) as tables:
        found = OTHER_USES[name](holder.table, x)
    assert tables["table"].other_uses
    assert torch.equal(found, want)
    assert type(found) is Tensor or name == "change"


def test_the_parameter_is_back_afterwards():
    model = Model(lambda m, x: m.first(x) * m.table, table=nn.Parameter(torch.randn(3)), first=nn.Linear(5, 3))
    parameter, before = model.table, dict(model.__dict__)
    gather(model, inputs(5, 5), 5)
    with pytest.raises(ZeroDivisionError):
        Capture(model).run(lambda some: 1 / 0, 5, 5, [])
    assert model.table is parameter and model.__dict__ == before
    assert list(model.state_dict()) == ["table", "first.weight", "first.bias"]


def test_copies_have_the_values_of_the_table():
    holder = Model(lambda m, x: x, table=nn.Parameter(torch.randn(1, 5)))
    parameter, x = holder.get_parameter("table"), inputs(4, 5)
    with event_tables({"table": (holder, "table")}, num_events=4):
        stand_in: Any = holder.table
        assert stand_in is not parameter
        assert torch.equal(stand_in, parameter) and stand_in.shape == (1, 5)
        assert torch.equal(stand_in + x, parameter + x)
