"""The pass over a batch, with hooks that bring each layer's input and output gradient to where gradients are made.

Four traps are handled here. Parameters are frozen while the hooks are on, or autograd would form their gradients
anyway. Every captured output is made to require a gradient, or a layer fed by a constant (a time embedding) would yield
none. All calls of one layer are joined before anything is made of them. And inputs are kept the way autograd keeps
them, so that gradient checkpointing frees and recomputes them, and a change in place is noticed.
"""

import warnings
from abc import ABC, abstractmethod
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from functools import cache, partial
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from whence.engine._base import AbstractLayerFactors, Call
from whence.engine.coverage import LAYER_KINDS, find_coverage
from whence.engine.fallback import MaterialisedFactors, find_used, gradients_by_unit
from whence.engine.tables import EventTable, event_tables
from whence.errors import ConfigError, UnsupportedModelError, check_choice

Outputs = Callable[[slice], Float[Tensor, " event"]]
"""Makes a forward pass of some events of a batch, and gives one number per event."""

Uncovered = Literal["exact", "refuse"]
"""What is done with parameters that belong to no layer of a kind that can be captured.

exact       their gradients are taken by running the whole model again for each unit
refuse      an error lists them
"""

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class AbstractSink(ABC):
    """What consumes the layers' gradients, each layer once per backward pass."""

    @abstractmethod
    def consume(self, factors: AbstractLayerFactors, names: dict[str, str]) -> None:
        """Take one layer; ``names`` maps its own parameter names to those in the model."""

    def finish(self) -> None:  # noqa: B027 -- most sinks keep nothing back
        """End a pass, when all layers have been consumed."""


class Capture:
    """Takes per-unit gradients of a model's parameters.

    Args:
        model: The model; it is changed only inside :meth:`run`.
        patterns: Which parameters, by shell-style patterns over their names.
        uncovered: What is done with parameters that belong to no layer that can be captured.

    Raises:
        ConfigError: If no trainable parameter matches a pattern.
        UnsupportedModelError: If parameters are uncovered, and these are refused; all of them are listed.

    Example:
        >>> from whence.engine.check import GradientCheck
        >>> model, inputs = nn.Linear(2, 1), torch.ones(3, 2)
        >>> sink = GradientCheck()
        >>> Capture(model).run(lambda some: model(inputs[some])[:, 0], num_events=3, num_units=3, sinks=[sink])
        >>> sink.sums["weight"]
        tensor([[3., 3.]])
    """

    def __init__(self, model: nn.Module, patterns: Sequence[str] = ("*",), uncovered: Uncovered = "exact"):
        check_choice("way with uncovered parameters", uncovered, Uncovered)
        self.model = model
        self.parameters = {
            name: p
            for name, p in model.named_parameters()
            if p.requires_grad and any(fnmatchcase(name, pattern) for pattern in patterns)
        }
        idle = [pattern for pattern in patterns if not any(fnmatchcase(name, pattern) for name in self.parameters)]
        if idle or not self.parameters:
            trainable = [name for name, p in model.named_parameters() if p.requires_grad]
            raise ConfigError(
                f"No trainable parameter matches {', '.join(map(repr, idle or patterns))}. The model has "
                f"{len(trainable)} trainable parameters{some_of(trainable)}."
            )
        self._all_parameters = list(model.parameters())
        self.arithmetic: torch.dtype = torch.float64
        """The coarsest type that an output gradient of the last pass had; not the parameters' under autocast."""
        coverage = find_coverage(model, self.parameters)
        self._layers, self._tables = coverage.layers, coverage.tables
        self.uncovered: dict[str, str] = coverage.uncovered
        """Parameters that are taken by running the whole model for each unit, with the reason; runs may add some."""
        self._dtypes = {
            layer: self.parameters[next(iter(how.names.values()))].dtype for layer, how in self._layers.items()
        }
        self._noted: set[str] = set()
        self._refuses = uncovered == "refuse"
        self._batch_norms = {module: path for path, module in model.named_modules() if isinstance(module, BATCH_NORMS)}
        self._were_used: set[str] = set()
        self._phase: Literal["off", "forward", "backward"] = "off"
        self._pending: Counter[nn.Module] = Counter()
        self._calls: dict[nn.Module, list[Call]] = defaultdict(list)
        self._saved: dict[nn.Module, list[tuple[Tensor, ...] | None]] = defaultdict(list)
        self._num_events = 0
        self._num_units = 0
        self._sinks: Sequence[AbstractSink] = ()
        self._note_uncovered()

    @contextmanager
    def _hooks(self) -> Iterator[None]:
        """Freeze the parameters and watch the layers; undo both at the end, also after an exception."""
        trainable = [p for p in self._all_parameters if p.requires_grad]
        # First of all hooks: another may change the output that this one must see.
        handles = [
            layer.register_forward_hook(self._after_forward, with_kwargs=True, prepend=True) for layer in self._layers
        ]
        handles += [layer.register_forward_hook(self._refuse_batch_statistics) for layer in self._batch_norms]
        try:
            for parameter in trainable:
                parameter.requires_grad_(False)
            yield
        finally:
            for handle in handles:
                handle.remove()
            for parameter in trainable:
                parameter.requires_grad_(True)
            self._forget()

    @torch.enable_grad()
    def run(self, outputs: Outputs, num_events: int, num_units: int, sinks: Iterable[AbstractSink]) -> None:
        """Take the gradients of ``outputs`` and hand those of every layer to the sinks.

        Args:
            outputs: Makes a forward pass of some events. It is called once for all of them and, where parameters are
                uncovered, once more for those of each unit.
            num_events: Events in the batch.
            num_units: Units in which consecutive events are taken as one; must divide the number of events.
            sinks: What is wanted.

        Raises:
            UnsupportedModelError: If the model mixes samples by batch normalisation, uses gradient checkpointing of
                the old kind, changes a layer's input in place, or has uncovered parameters and these are refused.
        """
        self._num_events, self._num_units, self._sinks = num_events, num_units, list(sinks)
        self.arithmetic = torch.float64
        with self._hooks():
            if self._layers or self._tables:
                self._run_all(outputs)
                self._find_bypassed(outputs)
                self._note_uncovered()  # ... that this pass brought to light
            if self.uncovered:
                self._run_by_unit(outputs)
            for sink in self._sinks:
                sink.finish()

    def _run_all(self, outputs: Outputs) -> None:
        """Run all events at once, for the layers and tables."""
        try:
            self._run_forward_and_backward(outputs)
        except RuntimeError as error:
            if self._phase != "forward" or not self._tables:
                raise
            # Where the reason is another, it fails again without them.
            self._uncover(self._tables, f"with a copy for each event the model does not run: {error}")
            self._tables = {}
            self._pending.clear()
            self._run_forward_and_backward(outputs)
        # Left are layers that are replayed, and those with a call whose output is not used and gave no gradient.
        with torch.no_grad():  # as in a backward pass
            for layer in list(self._calls):
                self._consume(layer)

    def _run_forward_and_backward(self, outputs: Outputs) -> None:
        with event_tables(self._tables, self._num_events) as tables:
            self._phase = "forward"
            values = outputs(slice(0, self._num_events))
            self._phase = "backward"
            if values.requires_grad:
                values.sum().backward()
            self._phase = "off"
        self._consume_tables(tables)

    def _run_by_unit(self, outputs: Outputs) -> None:
        """Run each unit by itself, for what is uncovered."""
        parameters = [self.parameters[name] for name in self.uncovered]
        rows = gradients_by_unit(parameters, lambda unit: outputs(self._events_of(unit)).sum(), self._num_units)
        gradients = dict(zip(self.uncovered, rows, strict=True))
        self._hand_over(MaterialisedFactors(self.model, gradients, self._num_units), {name: name for name in gradients})

    def _find_bypassed(self, outputs: Outputs) -> None:
        """Find what is never used as it should be though the outputs depend on it: another module reads it."""
        covered = [list(how.names.values()) for how in self._layers.values()] + [[name] for name in self._tables]
        silent = [names for names in covered if names[0] not in self._were_used]
        if silent:
            parameters = [self.parameters[name] for names in silent for name in names]
            found = iter(find_used(parameters, lambda: outputs(self._events_of(unit=0)).sum()))
            for names in silent:
                if any([next(found) for _ in names]):
                    self._uncover(names, "used without a call of its layer")
                self._were_used.update(names)  # one look at each is enough

    def _after_forward(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Tensor | None:
        if self._phase == "off" or not torch.is_grad_enabled():
            return None
        how = self._layers[layer]
        self._were_used.update(how.names.values())
        inputs = (*args, *kwargs.values())
        if how.replayed and not (len(inputs) == 1 and isinstance(inputs[0], Tensor) and isinstance(output, Tensor)):
            self._uncover_layer(layer, f"its {type(layer).__name__} does not make one tensor of one")
            return None
        replaced = None
        if not output.requires_grad:
            # A copy: what follows may change it in place, which autograd forbids for a leaf.
            output = replaced = output.detach().requires_grad_().clone()
        saved = _read_node(output, how.wanted) if how.wanted else None
        kept = _keep(inputs[0])  # in a recomputation too, where as many tensors must be kept as at first
        if self._phase == "backward":
            # Recomputed by checkpointing. The gradient goes to the output of the first time, unless it is of the old
            # kind, with a backward pass of its own.
            output.register_hook(partial(self._refuse_reentrant, layer))
        else:
            self._pending[layer] += 1
            output.register_hook(partial(self._after_backward, layer, [kept], saved))
        return replaced

    def _after_backward(
        self, layer: nn.Module, kept: list[Any], saved: tuple[Tensor, ...] | None, grads: Tensor
    ) -> None:
        if self._phase != "backward":
            return  # the model takes a gradient of its own in its forward pass
        try:
            inputs = kept.pop()._saved_other  # hooks live until the pass ends; what they kept is not to
        except RuntimeError as error:
            if "modified by an inplace operation" not in str(error):
                raise
            raise UnsupportedModelError(
                f"The input of {self._name(layer)} was changed in place after the layer saw it, so its gradient is "
                "lost. Change a copy instead."
            ) from error
        # Under autocast they are of a coarser type; what is made of them is not to be.
        if grads.dtype != self.arithmetic:
            self.arithmetic = max(self.arithmetic, grads.dtype, key=lambda dtype: torch.finfo(dtype).eps)
        how = self._layers[layer]
        dtype = self._dtypes[layer]
        if inputs.dtype != dtype and inputs.is_floating_point():
            inputs = inputs.to(dtype)
        self._calls[layer].append((inputs, grads.detach() if grads.dtype == dtype else grads.detach().to(dtype)))
        self._saved[layer].append(saved)
        self._pending[layer] -= 1
        if not self._pending[layer] and not how.replayed:
            self._consume(layer)

    def _refuse_reentrant(self, layer: nn.Module, grads: Tensor) -> None:
        raise UnsupportedModelError(
            f"The backward pass runs {self._name(layer)} and its backward pass once more. Use gradient checkpointing "
            "with use_reentrant=False, or none."
        )

    def _consume(self, layer: nn.Module) -> None:
        calls, saved, how = self._calls.pop(layer), self._saved.pop(layer), self._layers[layer]
        for call in calls:
            for tensor in call:
                size = tensor.shape[0] if tensor.ndim else 0
                if size != self._num_events:
                    self._uncover_layer(layer, f"its layer saw a batch of {size}, not of {self._num_events} events")
        if not (self.uncovered and self.uncovered.keys() & how.names.values()):
            factors = how.kind(layer, calls, self._num_units)
            factors.saved = saved
            self._hand_over(factors, how.names)

    def _consume_tables(self, tables: dict[str, EventTable]) -> None:
        gradients = {}
        for name, table in tables.items():
            if table.other_uses:
                self._uncover([name], f"given to {table.other_uses[0]}, which is no broadcast over the events")
            if table.other_uses or table.copies.grad is not None:
                self._were_used.add(name)
            if table.copies.grad is not None and name not in self.uncovered:
                gradients[name] = table.copies.grad.reshape(self._num_units, -1, *(table.shape or [1])).sum(1)
        if gradients:
            factors = MaterialisedFactors(self.model, gradients, self._num_units)
            self._hand_over(factors, {name: name for name in gradients})

    def _hand_over(self, factors: AbstractLayerFactors, names: dict[str, str]) -> None:
        for sink in self._sinks:
            sink.consume(factors, names)

    def _uncover_layer(self, layer: nn.Module, reason: str) -> None:
        self._uncover(self._layers[layer].names.values(), reason)

    def _uncover(self, names: Iterable[str], reason: str) -> None:
        self.uncovered |= dict.fromkeys(names, reason)

    def _note_uncovered(self) -> None:
        """Warn of parameters that were newly found to be uncovered, or refuse them."""
        news = [f"{name} ({reason})" for name, reason in self.uncovered.items() if name not in self._noted]
        if not news:
            return
        if self._refuses:
            known = ", ".join(dict.fromkeys(kind.__name__ for kind in LAYER_KINDS))
            raise UnsupportedModelError(
                f"Per-sample gradients are known for {known}, with the events on the first axis. Not covered"
                f"{some_of(news)}. Leave these out by naming the others with --parameters, by patterns such as "
                "'down_blocks.*'."
            )
        warnings.warn(
            f"The gradients of {len(news)} parameters are taken by running the whole model once more for each sample "
            f"of a batch, which is exact and slow{some_of(news)}. To spare it, leave them out by naming the others "
            "with --parameters.",
            stacklevel=3,
        )
        self._noted |= self.uncovered.keys()
        self._tables = {name: place for name, place in self._tables.items() if name not in self.uncovered}
        self._layers = {
            layer: how for layer, how in self._layers.items() if not self.uncovered.keys() & how.names.values()
        }

    def _refuse_batch_statistics(self, layer: Any, *_: Any) -> None:
        if layer.training or layer.running_mean is None:
            raise UnsupportedModelError(
                f"Per-sample gradients mean nothing where batch normalisation mixes the samples, as it does at "
                f"{self._batch_norms[layer]}. Put the model into evaluation mode with model.eval(), or use another "
                "normalisation."
            )

    def _events_of(self, unit: int) -> slice:
        members = self._num_events // self._num_units
        return slice(unit * members, (unit + 1) * members)

    def _name(self, layer: nn.Module) -> str:
        return f"the layer of {', '.join(self._layers[layer].names.values())}"

    def _forget(self) -> None:
        self._phase = "off"
        self._pending.clear()
        self._calls.clear()
        self._saved.clear()
        self._sinks = ()


def _keep(tensor: Tensor) -> Any:
    """Keep a tensor as a layer keeps its input, and return the node that has it, as ``_saved_other``.

    So it is checked for changes in place, and where gradient checkpointing is on it is freed and recomputed.

    Returns:
        The node of the graph.
    """
    # A product without elements computes nothing, and its node keeps both factors.
    return (_nothing(tensor.ndim, tensor.device) * tensor.detach()).grad_fn


@cache
def _nothing(num_axes: int, device: torch.device) -> Float[Tensor, "0 *one"]:
    """Give a tensor that makes a product with one of so many axes empty, and have a node."""
    return torch.empty(0, *[1] * num_axes, device=device, requires_grad=True)


def _read_node(output: Tensor, wanted: Sequence[str]) -> tuple[Tensor, ...] | None:
    """Read what the node of a layer's output has saved.

    Returns:
        None where it has no such thing, or something watches what is saved, as gradient checkpointing does, which hands
        out each tensor once.
    """
    # Without this function, which torch itself uses and does not document, there is no way to know.
    top_hooks = getattr(getattr(torch._C, "_autograd", None), "_top_saved_tensors_default_hooks", None)  # noqa: SLF001
    node = output.grad_fn
    if top_hooks is None or top_hooks(False) is not None or not hasattr(node, wanted[0]):
        return None
    # Detached: a hook of the node is not to hold the node.
    return tuple([getattr(node, name).detach() for name in wanted])


def some_of(names: Sequence[str]) -> str:
    """List at most twenty names, after a colon."""
    return f": {', '.join(names[:20])}{', …' if len(names) > 20 else ''}" if names else ""
