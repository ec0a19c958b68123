"""Which parameters are taken from which layer, and which from none.

They are covered by a layer
    of a known kind     an exact class of ``LAYER_KINDS``: from inputs and output gradients, at the speed of training
    that is replayed    any other whose children hold no chosen parameter: it is run again by itself, unit by unit

or as a table of a module that has layers of its own, of which each event is given a copy; or they are uncovered, and
the whole model is run again, unit by unit: parameters of several layers, weights that another module reads.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from diffusers.models import normalization
from torch import nn
from torch.nn.utils import parametrize

from whence.engine._base import AbstractLayerFactors, Call
from whence.engine.conv import ConvFactors
from whence.engine.embedding import EmbeddingFactors
from whence.engine.fallback import ReplayedFactors
from whence.engine.linear import LinearFactors
from whence.engine.norm import DiffusersRMSNormFactors, GroupNormFactors, LayerNormFactors, RMSNormFactors
from whence.engine.tables import Place

LAYER_KINDS: dict[type[nn.Module], type[AbstractLayerFactors]] = {
    nn.Linear: LinearFactors,
    nn.Conv1d: ConvFactors,
    nn.Conv2d: ConvFactors,
    nn.Conv3d: ConvFactors,
    nn.ConvTranspose1d: ConvFactors,
    nn.ConvTranspose2d: ConvFactors,
    nn.ConvTranspose3d: ConvFactors,
    nn.GroupNorm: GroupNormFactors,
    nn.LayerNorm: LayerNormFactors,
    nn.RMSNorm: RMSNormFactors,
    normalization.RMSNorm: DiffusersRMSNormFactors,
    nn.Embedding: EmbeddingFactors,
}
"""Layers whose per-unit gradients are known. Matched by exact class: a subclass may compute something else."""


@dataclass(frozen=True)
class CoveredLayer:
    """How the gradients of one layer are made."""

    kind: Callable[[nn.Module, list[Call], int], AbstractLayerFactors]
    names: dict[str, str]
    """The chosen parameters, from the layer's own name to that in the model."""
    replayed: bool
    wanted: tuple[str, ...] = ()
    """What the kind can use of the layer's own node in autograd's graph."""


@dataclass(frozen=True)
class Coverage:
    """How the gradients of all chosen parameters are made."""

    layers: dict[nn.Module, CoveredLayer]
    tables: dict[str, Place]
    """By the name in the model."""
    uncovered: dict[str, str]
    """The reason, by the name in the model."""


def find_coverage(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> Coverage:
    """Find what the chosen parameters belong to.

    Args:
        model: The model.
        parameters: The chosen ones, by their name in the model.

    Returns:
        Layers and tables, and the parameters that are neither.
    """
    chosen = {id(p): name for name, p in parameters.items()}
    holders = _find_holders(model, chosen)
    users: dict[str, list[str]] = {name: [] for name in parameters}
    for path, (module, names) in holders.items():
        for name in names.values():
            users[name].append(f"{type(module).__name__} at {path or 'the top'}")
    coverage = Coverage({}, {}, {name: f"shared by {' and '.join(of)}" for name, of in users.items() if len(of) > 1})
    for module, names in holders.values():
        alone = {own: name for own, name in names.items() if name not in coverage.uncovered}
        if not alone:
            continue
        if type(module) in LAYER_KINDS and alone.keys() <= {"weight", "bias"}:
            kind = LAYER_KINDS[type(module)]
            coverage.layers[module] = CoveredLayer(kind, alone, replayed=False, wanted=kind.wanted)
        elif _can_be_replayed(module, names, chosen):
            coverage.layers[module] = CoveredLayer(partial(ReplayedFactors, names=list(alone)), alone, replayed=True)
        else:
            for own, name in alone.items():
                if "." in own:
                    coverage.uncovered[name] = f"of {users[name][0]}"
                else:
                    coverage.tables[name] = (module, own)
    return coverage


def _find_holders(model: nn.Module, chosen: Mapping[int, str]) -> dict[str, tuple[nn.Module, dict[str, str]]]:
    """Find the modules that compute with chosen parameters, by path, with their own names of them."""
    holders: dict[str, tuple[nn.Module, dict[str, str]]] = {}
    parts_of_others: set[nn.Module] = set()
    for path, module in model.named_modules():
        if module in parts_of_others:
            continue
        own = dict(module.named_parameters(recurse=False, remove_duplicate=False))
        if parametrize.is_parametrized(module):
            # The originals of a parametrised weight lie in a child of the layer that computes with it.
            parametrizations = module.get_submodule("parametrizations")
            parts_of_others |= set(parametrizations.modules())
            own |= {f"parametrizations.{key}": p for key, p in parametrizations.named_parameters()}
        names = {key: chosen[id(p)] for key, p in own.items() if id(p) in chosen}
        if names:
            holders[path] = (module, names)
    return holders


def _can_be_replayed(module: nn.Module, names: Mapping[str, str], chosen: Mapping[int, str]) -> bool:
    """Say whether calling the module by itself is all that its parameters do."""
    # A hook of someone else may change what goes in or comes out, and would do so again.
    hooked = bool(module._forward_pre_hooks or module._forward_hooks)  # noqa: SLF001
    below = {chosen[id(p)] for p in module.parameters() if id(p) in chosen}
    return not hooked and below == set(names.values())
