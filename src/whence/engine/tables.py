"""Tables of a module that has layers of its own: for the time of a pass each event has a copy.

Scale and shift tables, class tokens and learned positions are broadcast over the events. With the axis of the events in
front they give the same, and have a gradient for each event. Any other use is noticed, and left to the fallback.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

Place = tuple[nn.Module, str]
"""A module and the name that one of its parameters has there."""

_ELEMENTWISE = {"add", "sub", "mul", "div", "__rsub__", "__rtruediv__"}
_IN_PLACE = {"add_", "sub_", "mul_", "div_"}
_CASTS = {"to", "float", "double", "half", "bfloat16", "type_as"}


class EventTable(Tensor):
    """Stands for a parameter where a model reads it.

    What is broadcast over the events is made with a copy for each event, all else with the parameter as it is.
    """

    copies: Float[Tensor, "event *shape"]
    other_uses: list[str]
    """Functions that made something of the parameter as it is."""

    @classmethod
    def of(cls, table: Tensor, copies: Float[Tensor, "event *shape"], other_uses: list[str]) -> "EventTable":
        """Let copies stand for a table."""
        stand_in = table.detach().as_subclass(cls)
        stand_in.copies, stand_in.other_uses = copies, other_uses
        return stand_in

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Call a function of torch that was given a table."""
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():  # noqa: SLF001
            tables = list(_tables_in((args, *kwargs.values())))
            if len(tables) == 1 and any(x is tables[0] for x in args):
                result = _with_copies(func, tables[0], args, kwargs)
                if result is not None:
                    return result
            result = func(*args, **kwargs)
            if not isinstance(
                result, int | float | str | bool | torch.Size | torch.dtype | torch.device | torch.layout
            ):
                for table in tables:
                    table.other_uses.append(func.__name__)
            return result


@contextmanager
def event_tables(places: Mapping[str, Place], num_events: int) -> Iterator[dict[str, EventTable]]:
    """Put a copy for each event in the place of parameters, for a while.

    Args:
        places: Where the parameters are, by their name in the model.
        num_events: Events of the batch.

    Yields:
        What stands for the parameters; after the backward pass its copies have the gradients.
    """
    tables = {}
    for name, (module, own) in places.items():
        table = module.get_parameter(own).detach()
        tables[name] = EventTable.of(table, table.expand(num_events, *table.shape).requires_grad_(), [])
    try:
        for name, (module, own) in places.items():
            vars(module)[own] = tables[name]  # found before the parameter, which stays where it is
        yield tables
    finally:
        for module, own in places.values():
            vars(module).pop(own, None)


def _tables_in(value: Any) -> Iterator[EventTable]:
    if isinstance(value, EventTable):
        yield value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tables_in(part)


def _with_copies(func: Callable[..., Any], table: EventTable, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Do with the copies what is to be done with the table, or give None."""
    name, copies, num_axes = func.__name__, table.copies, table.dim()
    others = [x for x in args if x is not table]
    if name in _CASTS and args[0] is table:
        return EventTable.of(func(table, *others, **kwargs), func(copies, *others, **kwargs), table.other_uses)
    if name == "__getitem__" and args[0] is table:
        # table[None, ...] has an axis in front on which the events may lie.
        index = args[1] if isinstance(args[1], tuple) else (args[1],)
        return copies[(slice(None), *index[1:])] if index[0] is None else None
    if name == "unsqueeze" and (*others, *kwargs.values()) == (0,):
        return copies
    if name == "expand" and not kwargs and num_axes and len(table) == 1:
        sizes = others[0] if isinstance(others[0], Sequence) else others
        fits = len(sizes) == num_axes and sizes[0] == len(copies)
        return copies.squeeze(1).expand(*sizes) if fits else None
    if name in _ELEMENTWISE or (name in _IN_PLACE and args[0] is not table):
        return _elementwise(func, table, args, kwargs)
    return None


def _elementwise(func: Callable[..., Any], table: EventTable, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Combine the copies with something else, if that has the axis of the events."""
    (other,) = [x for x in args if x is not table]
    copies, num_axes = table.copies, table.dim()
    if not isinstance(other, Tensor) or other.dim() == 0:
        whole = [x if x is not table else copies for x in args]
        return EventTable.of(func(*args, **kwargs), func(*whole, **kwargs), table.other_uses)
    if len(other) != len(copies):
        return None
    if other.dim() > num_axes:
        copies = copies[(slice(None), *[None] * (other.dim() - 1 - num_axes))]
    elif other.dim() == num_axes and len(table) == 1:
        copies = copies.squeeze(1)
    else:
        return None
    return func(*[x if x is not table else copies for x in args], **kwargs)
