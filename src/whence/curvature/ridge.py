r"""Ridge regression on projected gradients, for every damping from one eigendecomposition.

    score(i, q) = <psi_q, (Phi^T Phi + d I)^-1 phi_i>

with one row phi_i of Phi for each training sample, psi_q that of a query and d the damping (TRAK: Park et al. 2023,
arXiv:2303.14186). The same scores, (Phi Phi^T + d I)^-1 Phi psi_q, are the coefficients of the ridge regression of
psi_q on the training gradients. So the smaller of the two matrices is decomposed: width x width, or sample x sample.

The damping has no meaning without the scale of the rows, so it is given as a multiple of the mean eigenvalue.
Generalised cross-validation can choose it, with each training gradient in turn in the place of a query that the others
have to explain; queries themselves have no part in it.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from whence.errors import ConfigError

DAMPINGS = tuple(10.0 ** (quarter / 4) for quarter in range(-32, 17))
"""What is tried, in multiples of the mean eigenvalue: 1e-8 to 1e4."""

_NEGLIGIBLE = 1e-12
"""Eigenvalues below this share of the largest are rounding."""

Blocks = Callable[[], Iterable[Float[Tensor, "sample width"]]]
"""Gives all rows, some at a time; again at every call."""


@dataclass(frozen=True)
class Leverages:
    """How training samples sit among all of them, at one damping."""

    leverage: Float64[Tensor, " sample"]
    """h = phi^T (Phi^T Phi + d I)^-1 phi, in [0, 1)."""
    length: Float64[Tensor, " sample"]
    """Length of (Phi^T Phi + d I)^-1 phi."""


@dataclass(frozen=True)
class DampingChoice:
    """A damping, and what it was chosen among."""

    chosen: float
    """In multiples of the mean eigenvalue."""
    dampings: tuple[float, ...]
    """What was tried."""
    errors: tuple[float, ...]
    """The generalised cross-validation error of each, with each training gradient at length 1."""

    @property
    def at_edge(self) -> bool:
        """Whether a damping beyond those that were tried might be better."""
        return self.chosen in (self.dampings[0], self.dampings[-1])


@dataclass(frozen=True)
class Ridge:
    """The eigenvectors of Phi^T Phi whose eigenvalues are not zero."""

    eigenvalues: Float64[Tensor, " rank"]
    basis: Float64[Tensor, "width rank"]
    width: int
    num_samples: int

    @classmethod
    def of(cls, blocks: Blocks, num_samples: int, width: int) -> "Ridge":
        """Decompose the smaller of Phi^T Phi and Phi Phi^T.

        Args:
            blocks: The rows of Phi.
            num_samples: How many there are.
            width: Numbers in a row.

        Returns:
            The decomposition, in float64.

        Raises:
            ConfigError: If the blocks hold another number of rows.
        """
        found = 0
        if num_samples <= width:
            rows = [block.double() for block in blocks()]
            phi = torch.cat(rows) if rows else torch.zeros(0, width, dtype=torch.float64)
            found = len(phi)
            eigenvalues, vectors = torch.linalg.eigh(phi @ phi.T)
            kept = _not_negligible(eigenvalues)
            basis = phi.T @ (vectors[:, kept] / eigenvalues[kept].sqrt())
        else:
            gram = torch.zeros(width, width, dtype=torch.float64)
            for block in blocks():
                gram.addmm_(block.double().T, block.double())
                found += len(block)
            eigenvalues, vectors = torch.linalg.eigh(gram)
            kept = _not_negligible(eigenvalues)
            basis = vectors[:, kept]
        if found != num_samples:
            raise ConfigError(f"The blocks must hold {num_samples} rows, found {found}.")
        return cls(eigenvalues[kept], basis, width, num_samples)

    @property
    def mean_eigenvalue(self) -> float:
        """Mean over those eigenvalues that need not be zero: as many as samples, or as numbers in a row."""
        return float(self.eigenvalues.sum()) / max(1, min(self.width, self.num_samples))

    def solve(self, vectors: Float[Tensor, "vector width"], damping: float) -> Float[Tensor, "vector width"]:
        """Multiply with (Phi^T Phi + d I)^-1, but for what is orthogonal to every row of Phi.

        That part has no product with any phi_i. At a damping of 0, this is the pseudo-inverse.

        Args:
            vectors: What to multiply.
            damping: In multiples of the mean eigenvalue.

        Returns:
            The products, in the type of the vectors.
        """
        coordinates = vectors.double() @ self.basis
        return ((coordinates * self._inverse(damping)) @ self.basis.T).to(vectors)

    def leverages(self, rows: Float[Tensor, "sample width"], damping: float) -> Leverages:
        """Say how samples, which are rows of Phi, sit among all of them."""
        squares, inverse = (rows.double() @ self.basis).square(), self._inverse(damping)
        return Leverages(squares @ inverse, (squares @ inverse.square()).sqrt())

    def choose_damping(self, blocks: Blocks, dampings: tuple[float, ...] = DAMPINGS) -> DampingChoice:
        r"""Choose the damping by generalised cross-validation (Golub, Heath, Wahba 1979).

        Each training gradient is explained by all others. Of one, phi, with H the hat matrix of the ridge regression on
        the others and K numbers in a row, the error is

            K ‖(I - H) phi‖² / tr(I - H)² / ‖phi‖².

        Args:
            blocks: The rows of Phi.
            dampings: What to try, in multiples of the mean eigenvalue.

        Returns:
            The damping of the smallest mean error.
        """
        # With G = Phi^T Phi + d I and one row less, G' = G - phi phi^T, I - H = d G'^-1, and by Sherman and Morrison
        #   G'^-1 phi = G^-1 phi / (1 - h)        tr G'^-1 = tr G^-1 + ‖G^-1 phi‖² / (1 - h).
        # d cancels. Of the K eigenvalues of G^-1, those outside the span of Phi are 1 / d.
        if not len(self.eigenvalues):
            return DampingChoice(1.0, (1.0,), (1.0,))
        tried = torch.tensor(dampings, dtype=torch.float64)
        absolute = tried * self.mean_eigenvalue
        inverse = 1 / (self.eigenvalues[:, None] + absolute)  # rank, damping
        trace = inverse.sum(0) + (self.width - len(self.eigenvalues)) / absolute
        errors, num_rows = torch.zeros_like(tried), 0
        for block in blocks():
            squares = (block.double() @ self.basis).square()
            lengths = squares.sum(1)
            squares = squares[lengths > 0]
            left = 1 - squares @ inverse  # sample, damping
            length = squares @ inverse.square()
            error = self.width * (length / left.square()) / (trace + length / left).square()
            errors += (error / lengths[lengths > 0, None]).sum(0)
            num_rows += len(squares)
        errors /= num_rows
        return DampingChoice(dampings[int(errors.argmin())], dampings, tuple(errors.tolist()))

    def _inverse(self, damping: float) -> Float64[Tensor, " rank"]:
        return 1 / (self.eigenvalues + damping * self.mean_eigenvalue)


def _not_negligible(eigenvalues: Float64[Tensor, " number"]) -> Tensor:
    return eigenvalues > _NEGLIGIBLE * eigenvalues.max() if len(eigenvalues) else eigenvalues > 0
