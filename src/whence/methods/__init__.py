"""Every method as a declaration in one frame; see :mod:`whence.methods.frame`."""

from whence.errors import ConfigError
from whence.methods.baselines import PIXELS, RANDOM
from whence.methods.frame import Baseline, GradientPlan, Grid, Method, Replay
from whence.methods.tracin import GRAD_COS, GRAD_DOT, RETRAC, TRACIN

__all__ = [
    "GRAD_COS",
    "GRAD_DOT",
    "METHODS",
    "PIXELS",
    "RANDOM",
    "RETRAC",
    "TRACIN",
    "Baseline",
    "GradientPlan",
    "Grid",
    "Method",
    "Replay",
    "method_by_name",
]

METHODS: dict[str, Method | Baseline] = {m.name: m for m in (TRACIN, RETRAC, GRAD_DOT, GRAD_COS, PIXELS, RANDOM)}


def method_by_name(name: str) -> Method | Baseline:
    """Look a method up.

    Raises:
        ConfigError: If there is none of that name; the known ones are listed.
    """
    if name not in METHODS:
        raise ConfigError(f"Unknown method {name!r}; known are {', '.join(METHODS)}.")
    return METHODS[name]
