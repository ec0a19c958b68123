"""The contract of a projection, and the sides that kinds with a core have in common."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from jaxtyping import Float
from numpy import ndarray
from torch import Tensor

from whence.errors import ConfigError
from whence.projections._random import normals, table_key

_WRAPPERS = {"module", "_orig_mod", "base_model"}
"""What DataParallel, torch.compile and PEFT put into the names of parameters."""


@cache
def canonical_name(name: str) -> str:
    """Strip what wrappers put into a parameter's name, so that a wrapped model has the projection of a bare one.

    Returns:
        The name without the parts ``module``, ``_orig_mod`` and ``base_model``, wherever they stand.

    Example:
        >>> canonical_name("module._orig_mod.conv_in.weight")
        'conv_in.weight'
    """
    *path, own = name.split(".")
    return ".".join([*(part for part in path if part not in _WRAPPERS), own])


@dataclass(frozen=True)
class Sides:
    r"""The two random matrices that shrink a gradient G of out x in to its core, out^T G inner.

    Their entries are normal with variance 1/k_out and 1/k_inner. Given G with singular values s, the squared length of
    the core has the relative variance

        2 / (r k_out) + 2 / (r k_inner) + 2 / (k_out k_inner) (1 + 1/r),    r = (\sum s^2)^2 / \sum s^4,

    where an identity counts as an infinite k. r is the number of singular values if they are equal, and 1 at least.
    """

    # Why: rotate G to diag(s). With W = out^T diag(s)^2 out, the columns of the core are k_inner independent normals
    # with covariance W / k_inner, so that given W the sum of their squares has mean tr(W) and variance
    # 2 tr(W^2) / k_inner. With S2 = sum s^2 and S4 = sum s^4, W = sum_a s_a^2 o_a o_a^T over the rows o_a of out has
    # E tr(W^2) = S4 (1 + 1/k_out) + S2^2 / k_out and Var tr(W) = 2 S4 / k_out. Add both variances, divide by S2^2.

    out: Float[Tensor, "out k_out"] | None
    """None is the identity: there are few outputs already."""
    inner: Float[Tensor, "in k_inner"] | None
    """None is the identity: each output has few weights already."""

    def core(self, gradients: Float[Tensor, "unit *shape"]) -> Float[Tensor, "unit k_out k_inner"]:
        """Shrink gradients that were made whole: first the inner side, in one product over all units and outputs."""
        core = gradients.flatten(2)
        if self.inner is not None:
            core = core @ self.inner
        return core if self.out is None else self.out.mT @ core


@dataclass(frozen=True)
class Space:
    """What a projection of any kind is made of, and what follows from it. Names are canonical."""

    shapes: dict[str, tuple[int, ...]]
    seed: int
    side: int | None
    """Width of a side; None for a kind that leaves gradients whole."""
    direct: frozenset[str]
    whole: int
    """Matrices of at most so many numbers have no core."""
    device: torch.device
    dtype: torch.dtype

    def matrix_shape(self, name: str) -> tuple[int, int]:
        """(out, in) of a parameter that is no vector."""
        out, *inner = self.shapes[name]
        return out, math.prod(inner)

    def core_shape(self, name: str) -> tuple[int, int] | None:
        """(k_out, k_inner) of a parameter's core; None where its gradient stays whole."""
        if self.side is None or len(self.shapes[name]) < 2 or name in self.direct:
            return None
        out, inner = self.matrix_shape(name)
        core = min(out, self.side), min(inner, self.side)
        return core if core != (out, inner) and out * inner > self.whole else None

    def num_left(self, name: str) -> int:
        """Numbers in a parameter's core, or in its gradient where that stays whole."""
        return math.prod(self.core_shape(name) or self.shapes[name])

    def key(self, role: str, name: str) -> int:
        """Name the random table that has this role for a parameter."""
        return table_key(self.seed, role, name)

    def tensor(self, table: ndarray) -> Tensor:
        """Bring a table to the working type, on the CPU, and then to the device."""
        return torch.from_numpy(table).to(self.dtype).to(self.device)


class AbstractProjection(ABC):
    """A map from the gradients of known parameters to rows; ``make_projection`` makes one.

    A kind gives :meth:`_add_flat`. Random tables are made when a parameter is first met, and kept.

    Args:
        space: The parameters, the seed, the side.
        width: Numbers in a row.
    """

    def __init__(self, space: Space, width: int):
        self.space = space
        self.width = width
        self.open_width = width
        """Numbers in an open row, to which parts may be added at less cost until :meth:`close` makes a row of it."""
        self._sides: dict[str, Sides | None] = {}
        self._known_names = {name: name for name in space.shapes}
        self._num_numbers = {name: math.prod(shape) for name, shape in space.shapes.items()}
        self._num_left = {name: space.num_left(name) for name in space.shapes}

    def add(self, rows: Float[Tensor, "unit width"], name: str, gradients: Float[Tensor, "unit *shape"]) -> None:
        """Add the projection of one parameter's gradients to rows, in place.

        Args:
            rows: What other parameters have added so far, or zeros; open rows are :attr:`open_width` wide.
            name: The parameter.
            gradients: Its whole gradient for each unit.

        Raises:
            ConfigError: If the projection was not made for this parameter, shape or width.
        """
        name = self._known(name)
        self._check_shapes(rows, name, gradients, self.space.shapes[name])
        gradients, sides = gradients.to(self.space.dtype), self.sides(name)
        left = gradients if sides is None else sides.core(gradients)
        self._add_flat(rows, name, left.reshape(left.shape[0], self._num_left[name]))

    def add_flat(
        self, rows: Float[Tensor, "unit width"], names: Sequence[str], flat: Float[Tensor, "unit number"]
    ) -> None:
        """Add what :meth:`add` would for the gradients of several parameters, flattened and side by side."""
        for name, gradients in zip(names, flat.split([self.num_numbers(name) for name in names], dim=1), strict=True):
            self.add(rows, name, gradients.unflatten(1, self.space.shapes[canonical_name(name)]))

    def close(self, opened: Float[Tensor, "unit place"], rows: Float[Tensor, "unit width"]) -> None:
        """Add open rows to rows, and make them zeros."""
        for start in range(0, self.open_width, self.width):  # what lies beyond the end goes on from the beginning
            rows += opened[:, start : start + self.width]
        opened.zero_()

    def num_numbers(self, name: str) -> int:
        """Count the numbers of a parameter.

        Raises:
            ConfigError: If the projection was not made for this parameter.
        """
        found = self._num_numbers.get(name)  # most names are canonical, and each parameter asks several times a pass
        return self._num_numbers[self._known(name)] if found is None else found

    def sides(self, name: str) -> Sides | None:
        """Give the sides of a parameter, to whoever can form the core without the gradient.

        Returns:
            None where the gradient stays whole: kinds without sides, vectors, parameters named as direct, small
            matrices, and those that no side would shrink.

        Raises:
            ConfigError: If the projection was not made for this parameter.
        """
        if name not in self._sides:  # not met yet, or not canonical
            name = self._known(name)
            if name not in self._sides:
                self._sides[name] = self._make_sides(name)
        return self._sides[name]

    def add_core(self, rows: Float[Tensor, "unit width"], name: str, core: Float[Tensor, "unit k_out k_inner"]) -> None:
        """Add what :meth:`add` would for gradients of which only the core, out^T G inner, was made.

        Raises:
            ConfigError: If the parameter has no sides, or the core or the rows have another shape.
        """
        name = self._known(name)
        shape = self.space.core_shape(name)
        if shape is None:
            raise ConfigError(f"{name} has no sides in this projection, and so no core. Add its whole gradients.")
        self._check_shapes(rows, name, core, shape)
        self._add_flat(rows, name, core.to(self.space.dtype).reshape(core.shape[0], self._num_left[name]))

    @abstractmethod
    def _add_flat(self, rows: Float[Tensor, "unit width"], name: str, flat: Float[Tensor, "unit number"]) -> None:
        """Add the projection of a parameter's core, or of its whole gradient, to rows."""

    def _make_sides(self, name: str) -> Sides | None:
        core = self.space.core_shape(name)
        if core is None:
            return None
        out, inner = self.space.matrix_shape(name)
        return Sides(self._side("out", name, out, core[0]), self._side("inner", name, inner, core[1]))

    def _side(self, role: str, name: str, count: int, width: int) -> Float[Tensor, "number width"] | None:
        if count == width:
            return None
        entries = normals(self.space.key(role, name), count * width) / math.sqrt(width)
        return self.space.tensor(entries.reshape(count, width))

    def _known(self, name: str) -> str:
        found = self._known_names.get(name)
        if found is not None:
            return found
        canonical = canonical_name(name)
        if canonical not in self.space.shapes:
            raise ConfigError(
                f"{name!r} is not among the {len(self.space.shapes)} parameters of this projection "
                f"({', '.join(list(self.space.shapes)[:3])}, ...). Make the projection with the shapes of all "
                "parameters whose gradients it is to see."
            )
        self._known_names[name] = canonical
        return canonical

    def _check_shapes(self, rows: Tensor, name: str, values: Tensor, shape: tuple[int, ...]) -> None:
        if values.shape[1:] != shape:
            raise ConfigError(
                f"What is added for {name} must have the shape {shape} for each unit; found "
                f"{tuple(values.shape[1:])}. Add what belongs to the model that the projection was made for."
            )
        if rows.shape[0] != values.shape[0] or rows.shape[1] not in (self.width, self.open_width):
            raise ConfigError(
                f"The rows of {len(values)} units must have the shape {(len(values), self.width)}; found "
                f"{tuple(rows.shape)}. Make them as wide as the projection."
            )
