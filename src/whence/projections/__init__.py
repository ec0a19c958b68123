"""Seeded random projections: per-unit gradients of many parameters become one row of fixed width.

A projection is linear, and keeps inner products in expectation over seeds: E <row(x), row(y)> = <x, y>. Kinds differ
in speed and in the variance around that:

| kind | each parameter's gradient | variance |
|---|---|---|
| ``two_sided_sketch`` | shrinks from both sides to a small core; a row sketches all cores | of both steps |
| ``two_sided`` | shrinks from both sides to a small core, a span of its own in the row | ``Sides`` |
| ``sketch`` | is sketched whole to a row that all share | ``SketchProjection`` |
| ``gaussian``, ``rademacher`` | is multiplied with a dense random matrix: for reference | ``DenseProjection`` |
| ``identity`` | is a span of its own in the row | none |

A gradient (unit, out, ...) of a weight is taken as a matrix out x in, ``in`` being the numbers that make one output:
those of a row of a linear layer, of a filter of a convolution. Vectors have no sides. A gradient known to be of rank
one (of a layer on the time embedding) is not shrunk from two sides either, as that is where it is least exact; nor, by
default, is a small one before a sketch.

All that is random is a pure function of (seed, role, :func:`canonical_name`): the order of parameters does not matter,
nor which others there are. Per-unit gradients are made in ``engine``; rows are kept by the stored way to a score.
"""

from collections.abc import Collection, Mapping

import torch

from whence.config import ProjectionKind
from whence.errors import ConfigError, check_choice
from whence.projections._base import AbstractProjection, Sides, Space, canonical_name
from whence.projections.dense import DenseProjection
from whence.projections.sketch import SketchProjection
from whence.projections.spans import SpanProjection

__all__ = ["AbstractProjection", "ProjectionKind", "Sides", "canonical_name", "make_projection"]


_CORES_LEFT_WHOLE = 32
"""benchmarks/projections.py: without these, the error of scores levels off four times as high."""


def make_projection(
    kind: ProjectionKind,
    shapes: Mapping[str, tuple[int, ...]],
    *,
    width: int | None = None,
    side: int = 32,
    seed: int,
    direct: Collection[str] = (),
    whole: int | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> AbstractProjection:
    """Make a projection for the parameters of a model.

    Args:
        kind: How gradients are projected; the table stands at the top of this module.
        shapes: Shape of each parameter. Its order is that of the spans, in kinds that give each a span of its own.
        width: Numbers in a row. Not needed for ``identity`` and ``two_sided``, where it follows from the shapes.
        side: Two-sided kinds shrink a side of a gradient to this, and leave a smaller one as it is.
        seed: Seed of all that is random.
        direct: Parameters whose gradients have rank one. Two-sided kinds leave them whole until they are sketched.
        whole: Matrices of at most so many numbers are left whole too. Default: none of ``two_sided``; those of 32 cores
            of ``two_sided_sketch``. Gradients of convolutions are close to rank one, and in small layers at full
            resolution, where most of their length lies, they cost little more than their cores.
        device: Where rows and gradients are.
        dtype: Type of the rows; gradients are brought to it.

    Returns:
        The projection, which makes its random tables as it goes.

    Raises:
        ConfigError: If the kind is unknown, a size is below 1, the width is missing or contradicts the shapes, a
            direct parameter has no shape, or two names differ only by what wrappers add.

    Example:
        >>> projection = make_projection("sketch", {"weight": (2, 3), "bias": (2,)}, width=4, seed=0)
        >>> rows = torch.zeros(1, projection.width)
        >>> projection.add(rows, "weight", torch.tensor([[[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]]))
        >>> projection.add(rows, "bias", torch.tensor([[10.0, 20.0]]))
        >>> rows
        tensor([[ 3.,  1., 27., -2.]])
    """
    check_choice("projection kind", kind, ProjectionKind)
    for what, size in {"width": width, "side": side}.items():
        if size is not None and size < 1:
            raise ConfigError(f"The {what} of a projection must be at least 1; found {size}.")
    if whole is None:
        whole = _CORES_LEFT_WHOLE * side**2 if kind == "two_sided_sketch" else 0
    space = Space(
        shapes=_canonical_shapes(shapes),
        seed=seed,
        side=side if kind in ("two_sided", "two_sided_sketch") else None,
        direct=frozenset(map(canonical_name, direct)),
        whole=whole,
        device=torch.device(device),
        dtype=dtype,
    )
    if unknown := sorted(space.direct - space.shapes.keys()):
        raise ConfigError(f"Direct parameters must be among the shapes; these are not: {', '.join(unknown)}.")
    if kind == "identity" or kind == "two_sided":
        projection = SpanProjection(space)
        if width not in (None, projection.width):
            raise ConfigError(
                f"The width of {kind!r} follows from the parameters and is {projection.width}; found {width}. Leave it "
                "out, or choose a kind that sketches to a given width."
            )
        return projection
    if width is None:
        raise ConfigError(f"The projection {kind!r} needs a width; found none. Say how long a row is, such as 4096.")
    if kind == "sketch" or kind == "two_sided_sketch":
        return SketchProjection(space, width)
    return DenseProjection(space, width, kind)


def _canonical_shapes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    names = [canonical_name(name) for name in shapes]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(
            "Names must differ by more than what wrappers add (module, _orig_mod, base_model); more than one "
            f"parameter is called {', '.join(twice)}. Rename the modules, or project the models one by one."
        )
    return dict(zip(names, map(tuple, shapes.values()), strict=True))
