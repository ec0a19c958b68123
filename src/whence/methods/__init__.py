"""Every method as a declaration in one frame; see :mod:`whence.methods.frame`."""

from whence.errors import ConfigError
from whence.methods.baselines import PIXELS, RANDOM
from whence.methods.frame import (
    AdamInverse,
    Baseline,
    GradientPlan,
    Grid,
    KroneckerInverse,
    Method,
    Replay,
    RetrainingMethod,
    RidgeInverse,
)
from whence.methods.influence import EKFAC, KFAC
from whence.methods.retraining import DATAMODELS, EMPIRICAL_INFLUENCE
from whence.methods.tracin import GAS, GRAD_COS, GRAD_DOT, RETRAC, RETRAC_ADAM, TRACIN, TRACIN_ADAM, TRACIN_CP
from whence.methods.trak import D_TRAK, DAS, DAS_SIGNED, RELATIF, RELATIF_L, RENORMALISED, TRAK

__all__ = [
    "AdamInverse",
    "DAS",
    "DAS_SIGNED",
    "DATAMODELS",
    "D_TRAK",
    "EKFAC",
    "EMPIRICAL_INFLUENCE",
    "GAS",
    "GRAD_COS",
    "GRAD_DOT",
    "KFAC",
    "METHODS",
    "PIXELS",
    "RANDOM",
    "RELATIF",
    "RELATIF_L",
    "RENORMALISED",
    "RETRAC",
    "RETRAC_ADAM",
    "TRACIN",
    "TRACIN_ADAM",
    "TRACIN_CP",
    "TRAK",
    "Baseline",
    "GradientPlan",
    "Grid",
    "KroneckerInverse",
    "Method",
    "Replay",
    "RetrainingMethod",
    "RidgeInverse",
    "method_by_name",
]

_ALL = (
    *(TRACIN, RETRAC, TRACIN_ADAM, RETRAC_ADAM, TRACIN_CP, GRAD_DOT, GRAD_COS, GAS),
    *(TRAK, D_TRAK, DAS, DAS_SIGNED, RELATIF, RELATIF_L, RENORMALISED),
    *(KFAC, EKFAC),
    *(EMPIRICAL_INFLUENCE, DATAMODELS),
    *(PIXELS, RANDOM),
)
METHODS: dict[str, Method | Baseline | RetrainingMethod] = {method.name: method for method in _ALL}
"""Every method by its name."""


def method_by_name(name: str) -> Method | Baseline | RetrainingMethod:
    """Look a method up.

    Raises:
        ConfigError: If there is none of that name; the known ones are listed.
    """
    if name not in METHODS:
        raise ConfigError(f"Unknown method {name!r}; known are {', '.join(METHODS)}.")
    return METHODS[name]
