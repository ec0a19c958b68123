"""Influence functions: the inverse curvature of the loss between two gradients of it."""

from dataclasses import replace

from whence.methods.frame import KroneckerInverse
from whence.methods.tracin import GRAD_DOT

EKFAC = replace(
    GRAD_DOT,
    name="ekfac",
    precondition=KroneckerInverse(kind="ekfac"),
    source="Mlodozeniec et al. 2025, arXiv:2410.13850; George et al. 2018, arXiv:1806.03884",
)
"""Influence by the Gauss-Newton matrix of the training loss in Kronecker factors, with corrected eigenvalues."""

KFAC = replace(
    EKFAC,
    name="kfac",
    precondition=KroneckerInverse(kind="kfac"),
    source="Mlodozeniec et al. 2025, arXiv:2410.13850; Martens and Grosse 2015, arXiv:1503.05671",
)
"""Influence by the Gauss-Newton matrix of the training loss in Kronecker factors."""
