r"""Kronecker-factored curvature (K-FAC, Martens and Grosse 2015; EK-FAC, George et al. 2018) and its damped inverse.

Of a layer with weight gradient W of out x in, the curvature is taken as G (x) A with G of out x out, A of in x in:

    (G (x) A) W = G W A,      G = U diag(g) U^T,  A = V diag(a) V^T,

and its damped inverse divides U^T W V by g_j a_k + d, entry by entry. EK-FAC puts the second moments of the gradients'
own entries in that basis in the place of g_j a_k. A bias is the last column of W. Parameters without factors are
divided by the mean square of their gradient, damped.

The damping of each layer is a multiple of the mean of what it is added to: curvature differs by orders of magnitude
from layer to layer. A layer whose gradients are rounding alone, as those of attention keys summed over positions, has a
curvature to match, which would blow them up; it is left out.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from whence.errors import ConfigError

NEGLIGIBLE = 100
"""Gradients of a root mean square below so many units of rounding of that over all parameters are rounding."""


@dataclass(frozen=True)
class KroneckerBlock:
    """The curvature of one layer, in its eigenvectors."""

    out_basis: Float[Tensor, "out out"]
    inner_basis: Float[Tensor, "inner inner"]
    eigenvalues: Float[Tensor, "out inner"]
    bias: str | None = None
    """Name of the bias, if the last of the inner side is one."""

    @classmethod
    def of(
        cls, out: Float[Tensor, "out out"], inner: Float[Tensor, "inner inner"], bias: str | None = None
    ) -> "KroneckerBlock":
        """Decompose the two factors, in float64."""
        (g, out_basis), (a, inner_basis) = (torch.linalg.eigh(m.double()) for m in (out, inner))
        eigenvalues = g.clamp(min=0)[:, None] * a.clamp(min=0)
        return cls(out_basis.to(out), inner_basis.to(out), eigenvalues.to(out), bias)

    def solve(self, gradients: Float[Tensor, "vector out inner"], damping: float) -> Float[Tensor, "vector out inner"]:
        """Multiply with the damped inverse."""
        damped = self.eigenvalues + damping * self.eigenvalues.mean()
        rotated = self.out_basis.T @ gradients @ self.inner_basis
        return self.out_basis @ (rotated / damped) @ self.inner_basis.T


@dataclass(frozen=True)
class KroneckerCurvature:
    """The curvature of all parameters."""

    blocks: dict[str, KroneckerBlock]
    """By the name of the weight."""
    squares: dict[str, Float[Tensor, "*shape"]]
    """Mean squares of the gradients of other parameters, by name."""

    def solve_(
        self, vectors: Float[Tensor, "vector param"], spans: Mapping[str, slice], damping: float
    ) -> Float[Tensor, "vector param"]:
        """Multiply vectors of all parameters with the damped inverse, in place.

        Args:
            vectors: What to multiply.
            spans: Where each parameter lies.
            damping: In multiples of the mean of each layer's eigenvalues.

        Returns:
            The vectors.

        Raises:
            ConfigError: If the curvature of a parameter is not known, or damping is not above 0.
        """
        if not damping > 0:
            raise ConfigError(
                f"damping must be above 0 with Kronecker factors, found {damping}: some of their eigenvalues are 0."
            )
        held = {*self.blocks, *self.squares, *(block.bias for block in self.blocks.values())}
        unknown = [name for name in spans if name not in held]
        if unknown:
            raise ConfigError(f"There is no curvature of {', '.join(unknown)}. Make it of the same parameters.")
        least = self._negligible_square
        for name, block in self.blocks.items():
            if block.eigenvalues.mean() <= least:
                for parameter in filter(None, [name, block.bias]):
                    vectors[:, spans[parameter]] = 0
                continue
            num_out, num_inner = block.eigenvalues.shape
            has_bias = block.bias is not None
            weight = vectors[:, spans[name]].unflatten(1, (num_out, num_inner - has_bias))
            bias = [vectors[:, spans[block.bias], None]] if block.bias is not None else []
            solved = block.solve(torch.cat([weight, *bias], dim=2), damping)
            vectors[:, spans[name]] = solved[..., : num_inner - has_bias].flatten(1)
            if block.bias is not None:
                vectors[:, spans[block.bias]] = solved[..., -1]
        for name, squares in self.squares.items():
            flat = squares.flatten()
            if flat.mean() <= least:
                vectors[:, spans[name]] = 0
            else:
                vectors[:, spans[name]] /= flat + damping * flat.mean()
        return vectors

    @property
    def _negligible_square(self) -> float:
        """Mean square below which a parameter's gradients are rounding."""
        of_all = [block.eigenvalues for block in self.blocks.values()] + list(self.squares.values())
        mean = sum(float(x.sum()) for x in of_all) / sum(x.numel() for x in of_all)
        return (NEGLIGIBLE * torch.finfo(of_all[0].dtype).eps) ** 2 * mean
