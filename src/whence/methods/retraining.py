"""Methods that are made from retraining: what any cheaper method stands for, and has to be compared with."""

from whence.methods.frame import RetrainingMethod

EMPIRICAL_INFLUENCE = RetrainingMethod(
    name="empirical-influence",
    kind="difference",
    source="Feldman and Zhang 2020, arXiv:2008.03703; on diffusion models Zheng et al. 2024, arXiv:2311.00500",
)
"""Difference of the mean outputs of models trained without and with a sample."""

DATAMODELS = RetrainingMethod(
    name="datamodels",
    kind="ridge",
    penalties=tuple(10.0 ** (power / 2) for power in range(-6, 7)),
    source="Ilyas et al. 2022, arXiv:2202.00622; on diffusion models Zheng et al. 2024, arXiv:2311.00500",
)
"""Linear regression of the output on the members of the subset, with a ridge penalty."""
