"""Hooks that bring each layer's input and output gradient to where per-unit gradients are made.

Three traps are handled here. Parameters are frozen while the hooks are on, or autograd would form their gradients anyway.
Every captured output is made to require a gradient, or a layer fed by a constant (a time embedding) would yield none. And
all calls of one layer are joined before anything is made of them.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from functools import partial
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from whence.engine._base import AbstractLayerFactors, Call
from whence.engine.conv import Conv2dFactors
from whence.engine.linear import LinearFactors
from whence.engine.norm import GroupNormFactors, LayerNormFactors
from whence.errors import UnsupportedModelError

LAYER_KINDS: dict[type[nn.Module], type[AbstractLayerFactors]] = {
    nn.Linear: LinearFactors,
    nn.Conv2d: Conv2dFactors,
    nn.GroupNorm: GroupNormFactors,
    nn.LayerNorm: LayerNormFactors,
}
"""Layers whose per-unit gradients are known. Matched by exact class: a subclass may compute something else."""


@runtime_checkable
class Sink(Protocol):
    """What consumes the layers' gradients, each layer once per backward pass."""

    def consume(self, factors: AbstractLayerFactors, names: dict[str, str]) -> None:
        """Take one layer; ``names`` maps its own parameter names to those in the model."""
        ...


class Capture:
    """Takes per-unit gradients of a model's parameters.

    Args:
        model: The model; it is changed only inside :meth:`hooks`.
        patterns: Which parameters, by shell-style patterns over their names.

    Raises:
        UnsupportedModelError: If a chosen parameter belongs to no known layer kind; all of them are listed.

    Example:
        >>> model = nn.Linear(2, 1)
        >>> sink = GradientCheck()
        >>> capture = Capture(model)
        >>> with capture.hooks():
        ...     capture.backward(model(torch.ones(3, 2))[:, 0], num_units=3, sinks=[sink])
        >>> sink.sums["weight"]
        tensor([[3., 3.]])
    """

    def __init__(self, model: nn.Module, patterns: Sequence[str] = ("*",)):
        self.model = model
        self.parameters = {
            name: p
            for name, p in model.named_parameters()
            if p.requires_grad and any(fnmatchcase(name, pattern) for pattern in patterns)
        }
        self._layers = self._find_layers()
        self._pending: Counter[nn.Module] = Counter()
        self._calls: dict[nn.Module, list[Call]] = defaultdict(list)
        self._num_events = 0
        self._num_units = 0
        self._sinks: Iterable[Sink] = ()

    @contextmanager
    def hooks(self) -> Iterator[None]:
        """Freeze the parameters and watch the layers; undo both at the end, also after an exception."""
        trainable = [p for p in self.model.parameters() if p.requires_grad]
        handles = [layer.register_forward_hook(self._after_forward) for layer in self._layers]
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

    def backward(self, outputs: Float[Tensor, " event"], num_units: int, sinks: Iterable[Sink]) -> None:
        """Run the backward pass of ``outputs.sum()`` and hand every layer's gradients to the sinks.

        Args:
            outputs: One number per event of the forward pass just made.
            num_units: Units in which consecutive events are taken as one; must divide the number of events.
            sinks: What is wanted.
        """
        self._num_events, self._num_units, self._sinks = len(outputs), num_units, list(sinks)
        try:
            outputs.sum().backward()
            for layer in [layer for layer, calls in self._calls.items() if calls]:
                self._consume(layer)  # a call whose output the loss does not use gave no gradient
        finally:
            self._forget()

    def _find_layers(self) -> dict[nn.Module, dict[str, str]]:
        """Map each layer to the names of its chosen parameters: its own name to the name in the model."""
        name_of = {id(p): name for name, p in self.parameters.items()}
        layers: dict[nn.Module, dict[str, str]] = {}
        unknown = []
        for path, module in self.model.named_modules():
            own = {k: name_of[id(p)] for k, p in module.named_parameters(recurse=False) if id(p) in name_of}
            if any(name in names.values() for name in own.values() for names in layers.values()):
                # Norms of a gradient that comes from two layers do not add.
                unknown.append(f"{', '.join(own.values())}, shared with {type(module).__name__} at {path}")
            elif own and type(module) in LAYER_KINDS:
                layers[module] = own
            elif own:
                unknown.append(f"{', '.join(own.values())} of {type(module).__name__} at {path or 'the top'}")
        if unknown:
            known = ", ".join(kind.__name__ for kind in LAYER_KINDS)
            raise UnsupportedModelError(
                f"Per-sample gradients are known for {known}. Not covered: {'; '.join(unknown)}. Freeze these parameters "
                "(requires_grad_(False)) to attribute the others."
            )
        return layers

    def _after_forward(self, layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        if not torch.is_grad_enabled():
            return
        if not output.requires_grad:
            output.requires_grad_()
        self._pending[layer] += 1
        inputs = args[0].detach()
        output.register_hook(partial(self._after_backward, layer, inputs, inputs._version))

    def _after_backward(self, layer: nn.Module, inputs: Tensor, version: int, grads: Tensor) -> None:
        if inputs._version != version:
            raise UnsupportedModelError(
                f"The input of {self._layers[layer]} was changed in place after the layer saw it, so its gradient is lost."
            )
        if len(inputs) != self._num_events:
            raise UnsupportedModelError(
                f"The layer of {', '.join(self._layers[layer].values())} saw a batch of {len(inputs)}, not of "
                f"{self._num_events} events; the events must be on the first axis of every layer."
            )
        self._calls[layer].append((inputs, grads.detach()))
        self._pending[layer] -= 1
        if not self._pending[layer]:
            self._consume(layer)

    def _consume(self, layer: nn.Module) -> None:
        with torch.no_grad():
            factors = LAYER_KINDS[type(layer)](layer, self._calls.pop(layer), self._num_units)
            for sink in self._sinks:
                sink.consume(factors, self._layers[layer])

    def _forget(self) -> None:
        self._pending.clear()
        self._calls.clear()
        self._sinks = ()


class GradientCheck:
    """A sink that adds up the units' gradients, to be compared with those of autograd."""

    def __init__(self):
        self.sums: dict[str, Tensor] = {}

    def consume(self, factors: AbstractLayerFactors, names: dict[str, str]) -> None:
        """Add the layer's gradients over all units; a shared parameter may come from several layers."""
        for own, name in names.items():
            self.sums[name] = self.sums.get(name, 0) + factors.gradients[own].sum(0)


def check_against_autograd(capture: Capture, outputs: Callable[[], Float[Tensor, " event"]], num_units: int) -> None:
    """Compare the sum of the units' gradients with autograd's, parameter by parameter.

    Run on the first batch of every run: a model that does something unforeseen is refused before it is attributed.

    Args:
        capture: The capture in use.
        outputs: Makes a forward pass and gives one number per event.
        num_units: Units of the batch.

    Raises:
        UnsupportedModelError: If a parameter's gradients differ; all of them are listed.
    """
    check = GradientCheck()
    with capture.hooks(), torch.enable_grad():
        capture.backward(outputs(), num_units, [check])
    with torch.enable_grad():
        wanted = torch.autograd.grad(outputs().sum(), list(capture.parameters.values()), allow_unused=True)
    total = sum(float(w.double().square().sum()) for w in wanted if w is not None) ** 0.5
    # Rounding differs with the order of summation. A gradient that is zero in exact arithmetic (a key's bias under
    # softmax) is all rounding, hence the second term.
    relative, absolute = (1e-3, 1e-5) if next(iter(capture.parameters.values())).dtype != torch.float64 else (1e-8, 1e-12)
    faults = []
    for (name, parameter), want in zip(capture.parameters.items(), wanted, strict=True):
        want = torch.zeros_like(parameter) if want is None else want
        error = float((check.sums.get(name, torch.zeros_like(want)) - want).double().norm())
        if not error <= relative * float(want.double().norm()) + absolute * total:
            faults.append(f"{name} (off by {error:.2g} of {float(want.norm()):.2g})")
    if faults:
        raise UnsupportedModelError(
            f"Per-sample gradients do not add up to autograd's for {len(faults)} parameters: {', '.join(faults[:20])}. The "
            "model uses these outside their layer's own forward pass, or mixes samples of a batch. Freeze them "
            "(requires_grad_(False)) to attribute the others."
        )
