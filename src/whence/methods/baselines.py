"""Scores that need no model: what any method has to beat."""

from whence.methods.frame import Baseline

PIXELS = Baseline(name="pixels", kind="pixels", source="cosine of the pixels in [-1, 1]")
"""Cosine of raw pixels."""

RANDOM = Baseline(name="random", kind="random", source="independent normal scores")
"""No information at all."""
