"""Hooks that bring each layer's input and output gradient to where per-unit gradients are made.

Three traps are handled here. Parameters are frozen while the hooks are on, or autograd would form their gradients
anyway. Every captured output is made to require a gradient, or a layer fed by a constant (a time embedding) would yield
none. And all calls of one layer are joined before anything is made of them.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from whence.engine._base import AbstractLayerFactors, Call
from whence.engine.conv import Conv2dFactors
from whence.engine.linear import LinearFactors
from whence.engine.norm import GroupNormFactors, LayerNormFactors
from whence.errors import ConfigError, UnsupportedModelError

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
        ConfigError: If no trainable parameter matches a pattern.
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
        idle = [pattern for pattern in patterns if not any(fnmatchcase(name, pattern) for name in self.parameters)]
        if idle or not self.parameters:
            trainable = [name for name, p in model.named_parameters() if p.requires_grad]
            raise ConfigError(
                f"No trainable parameter matches {', '.join(map(repr, idle or patterns))}. The model has "
                f"{len(trainable)} trainable parameters{_some(trainable)}."
            )
        self._layers = self._find_layers()
        self._pending: Counter[nn.Module] = Counter()
        self._consumed: set[nn.Module] = set()
        self._calls: dict[nn.Module, list[Call]] = defaultdict(list)
        self._num_events = 0
        self._num_units = 0
        self._sinks: Iterable[Sink] = ()

    @contextmanager
    def hooks(self) -> Iterator[None]:
        """Freeze the parameters and watch the layers; undo both at the end, also after an exception."""
        trainable = [p for p in self.model.parameters() if p.requires_grad]
        handles = [layer.register_forward_hook(self._after_forward, with_kwargs=True) for layer in self._layers]
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
                f"Per-sample gradients are known for {known}. Not covered: {'; '.join(unknown)}. Leave these out "
                "by naming the others with --parameters, by patterns such as 'down_blocks.*'."
            )
        return layers

    def _after_forward(
        self, layer: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any], output: Tensor
    ) -> Tensor | None:
        if not torch.is_grad_enabled():
            return None
        replaced = None
        if not output.requires_grad:
            # A copy: what follows may change it in place, which autograd forbids for a leaf.
            output = replaced = output.requires_grad_().clone()
        self._pending[layer] += 1
        inputs = (args[0] if args else kwargs["input"]).detach()
        output.register_hook(partial(self._after_backward, layer, inputs, inputs._version))
        return replaced

    def _after_backward(self, layer: nn.Module, inputs: Tensor, version: int, grads: Tensor) -> None:
        if inputs._version != version:
            raise UnsupportedModelError(
                f"The input of {self._name(layer)} was changed in place after the "
                "layer saw it, so its gradient is lost. Change a copy instead."
            )
        if len(inputs) != self._num_events:
            raise UnsupportedModelError(
                f"The events must be on the first axis of every layer's input, but {self._name(layer)} saw a batch of "
                f"{len(inputs)}, not of {self._num_events} events."
            )
        self._calls[layer].append((inputs, grads.detach()))
        self._pending[layer] -= 1
        if not self._pending[layer]:
            self._consume(layer)

    def _consume(self, layer: nn.Module) -> None:
        if layer in self._consumed:
            raise UnsupportedModelError(
                f"The backward pass calls {self._name(layer)} again after its other calls were done with. Use gradient "
                "checkpointing with use_reentrant=False, or none."
            )
        self._consumed.add(layer)
        with torch.no_grad():
            factors = LAYER_KINDS[type(layer)](layer, self._calls.pop(layer), self._num_units)
            for sink in self._sinks:
                sink.consume(factors, self._layers[layer])

    def _name(self, layer: nn.Module) -> str:
        return f"the layer of {', '.join(self._layers[layer].values())}"

    def _forget(self) -> None:
        self._pending.clear()
        self._consumed.clear()
        self._calls.clear()
        self._sinks = ()


class GradientCheck:
    """A sink that keeps what can be compared with autograd: the sum over all units, and some units' own gradients.

    Args:
        units: Which units' gradients are kept.
    """

    def __init__(self, units: Sequence[int] = ()):
        self.sums: dict[str, Tensor] = {}
        self.alone: dict[int, dict[str, Tensor]] = {unit: {} for unit in units}

    def consume(self, factors: AbstractLayerFactors, names: dict[str, str]) -> None:
        """Keep one layer's part."""
        for own, name in names.items():
            self.sums[name] = factors.gradients[own].sum(0)
            for unit, gradients in self.alone.items():
                gradients[name] = factors.gradients[own][unit].clone()


@torch.enable_grad()
def check_against_autograd(
    capture: Capture, outputs: Callable[[slice], Float[Tensor, " event"]], num_events: int, num_units: int
) -> None:
    """Compare the units' gradients with autograd's, parameter by parameter.

    Run on the first batch of every run: a model that does something unforeseen is refused before it is attributed. The
    sum over all units must be autograd's gradient of the batch; and those of the first and the last unit must be what
    they are when the unit goes through the model alone, which a model that mixes samples does not keep.

    Args:
        capture: The capture in use.
        outputs: Makes a forward pass of some of the events and gives one number per event.
        num_events: Events of the batch.
        num_units: Units of the batch.

    Raises:
        UnsupportedModelError: If a parameter's gradients differ; all of them are listed.
    """
    check = GradientCheck(units=sorted({0, num_units - 1}))
    with capture.hooks():
        capture.backward(outputs(slice(0, num_events)), num_units, [check])
    faults = _differences(capture, check.sums, outputs(slice(0, num_events)))
    if faults:
        raise UnsupportedModelError(
            f"Per-sample gradients do not add up to autograd's for {len(faults)} parameters{_some(faults)}. The model "
            "uses these outside their layer's own forward pass, or gives another result each time (dropout). Leave "
            "them out by naming the others with --parameters."
        )
    members = num_events // num_units
    for unit, gradients in check.alone.items():
        faults = _differences(capture, gradients, outputs(slice(unit * members, (unit + 1) * members)))
        if faults:
            raise UnsupportedModelError(
                f"The gradient of a sample depends on the other samples of its batch, for {len(faults)} parameters"
                f"{_some(faults)}. Per-sample gradients mean nothing where the model mixes samples (batch "
                "normalisation in training mode, a mean over the batch)."
            )


def _differences(capture: Capture, found: dict[str, Tensor], outputs: Float[Tensor, " event"]) -> list[str]:
    """Name the parameters whose gradient is not autograd's gradient of the sum of ``outputs``."""
    wanted = torch.autograd.grad(outputs.sum(), list(capture.parameters.values()), materialize_grads=True)
    total = sum(float(want.double().square().sum()) for want in wanted) ** 0.5
    # Rounding differs with the order of summation. A gradient that is zero in exact arithmetic (a key's bias under
    # softmax) is all rounding, hence the second term.
    relative, absolute = (1e-8, 1e-12) if wanted[0].dtype == torch.float64 else (1e-3, 1e-5)
    faults = []
    for name, want in zip(capture.parameters, wanted, strict=True):
        error = float((found.get(name, torch.zeros_like(want)) - want).double().norm())
        if not error <= relative * float(want.double().norm()) + absolute * total:
            faults.append(f"{name} (off by {error:.2g} of {float(want.norm()):.2g})")
    return faults


def _some(names: Sequence[str]) -> str:
    """List at most twenty names, after a colon."""
    return f": {', '.join(names[:20])}{', …' if len(names) > 20 else ''}" if names else ""
