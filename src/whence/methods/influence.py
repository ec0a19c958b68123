"""Influence functions: the inverse curvature of the loss between two gradients of it.

The curvature is the Gauss-Newton matrix of the mean squared error, also of a model that was trained on absolute errors,
which have no curvature of their own; for DataInf it is the second moment of the gradients of the training loss itself.
"""

from dataclasses import replace

from whence.methods.frame import ConjugateGradientInverse, DataInfInverse, KroneckerInverse, LissaInverse
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

INFLUENCE_CG = replace(
    GRAD_DOT,
    name="influence-cg",
    precondition=ConjugateGradientInverse(),
    source="Koh and Liang 2017, arXiv:1703.04730; Martens 2010 (Gauss-Newton products)",
)
"""Influence by the whole Gauss-Newton matrix of the training loss, of some images, to the residual that is reported."""

LISSA = replace(
    INFLUENCE_CG,
    name="lissa",
    precondition=LissaInverse(),
    source="Agarwal, Bullins and Hazan 2017, arXiv:1602.03943; Koh and Liang 2017, arXiv:1703.04730",
)
"""Influence by the whole Gauss-Newton matrix of the training loss, by a cut off Neumann series over samples of it."""

DATAINF = replace(
    GRAD_DOT,
    name="datainf",
    precondition=DataInfInverse(),
    source="Kwon, Wu, Wu and Zou 2024, arXiv:2310.00902",
)
"""Influence by the mean of inverses of rank-one matrices; meant for few parameters, such as those of a LoRA."""
