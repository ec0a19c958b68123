"""Every method as a declaration in one frame; see :mod:`whence.methods.frame`."""

from whence.errors import ConfigError
from whence.methods.baselines import (
    CLIP,
    CLIP_DOT,
    EMBEDDINGS,
    EMBEDDINGS_DOT,
    PIXELS,
    PIXELS_DOT,
    RANDOM,
    VAE,
    VAE_DOT,
)
from whence.methods.frame import (
    AdamInverse,
    AntitheticGrid,
    Baseline,
    ConjugateGradientInverse,
    DataInfInverse,
    GradientPlan,
    Grid,
    KroneckerInverse,
    LissaInverse,
    Method,
    Replay,
    RetrainingMethod,
    RidgeInverse,
    Trajectory,
)
from whence.methods.influence import DATAINF, EKFAC, INFLUENCE_CG, KFAC, LISSA
from whence.methods.retraining import DATAMODELS, EMPIRICAL_INFLUENCE
from whence.methods.tracin import (
    GAS,
    GRAD_COS,
    GRAD_DOT,
    MATCHED_COS,
    MATCHED_DOT,
    RETRAC,
    RETRAC_ADAM,
    RETRAC_MATCHED,
    TRACIN,
    TRACIN_ADAM,
    TRACIN_CP,
)
from whence.methods.trak import D_TRAK, DAS, DAS_SIGNED, JOURNEY_TRAK, RELATIF, RELATIF_L, RENORMALISED, TRAK

__all__ = [
    "AdamInverse",
    "AntitheticGrid",
    "CLIP",
    "CLIP_DOT",
    "DAS",
    "DATAINF",
    "DAS_SIGNED",
    "DATAMODELS",
    "D_TRAK",
    "EKFAC",
    "EMBEDDINGS",
    "EMBEDDINGS_DOT",
    "EMPIRICAL_INFLUENCE",
    "GAS",
    "GRAD_COS",
    "GRAD_DOT",
    "INFLUENCE_CG",
    "JOURNEY_TRAK",
    "KFAC",
    "LISSA",
    "MATCHED_COS",
    "MATCHED_DOT",
    "METHODS",
    "PIXELS",
    "PIXELS_DOT",
    "RANDOM",
    "RELATIF",
    "RELATIF_L",
    "RENORMALISED",
    "RETRAC",
    "RETRAC_ADAM",
    "RETRAC_MATCHED",
    "TRACIN",
    "TRACIN_ADAM",
    "TRACIN_CP",
    "TRAK",
    "VAE",
    "VAE_DOT",
    "Baseline",
    "ConjugateGradientInverse",
    "DataInfInverse",
    "GradientPlan",
    "Grid",
    "KroneckerInverse",
    "LissaInverse",
    "Method",
    "Replay",
    "RetrainingMethod",
    "RidgeInverse",
    "Trajectory",
    "method_by_name",
]

_ALL = (
    *(TRACIN, RETRAC, TRACIN_ADAM, RETRAC_ADAM, TRACIN_CP, GRAD_DOT, GRAD_COS, GAS),
    *(MATCHED_COS, MATCHED_DOT, RETRAC_MATCHED),
    *(TRAK, JOURNEY_TRAK, D_TRAK, DAS, DAS_SIGNED, RELATIF, RELATIF_L, RENORMALISED),
    *(KFAC, EKFAC, INFLUENCE_CG, LISSA, DATAINF),
    *(EMPIRICAL_INFLUENCE, DATAMODELS),
    *(PIXELS, PIXELS_DOT, VAE, VAE_DOT, CLIP, CLIP_DOT, EMBEDDINGS, EMBEDDINGS_DOT, RANDOM),
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
