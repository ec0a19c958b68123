"""Random tables as pure functions of a key, drawn on the CPU so that every device has the same.

Only the *raw* words of a Philox 4x64 generator are used, which NumPy promises never to change.

    signs       bit j of the words, lowest first, tells whether number j is negated
    uniforms    the upper 53 bits of one word each
    normals     pairs of uniforms, each pair two normals by the Box-Muller transform in float64

A longer table begins with the values of a shorter one.
"""

import hashlib
import math

import numpy as np
from jaxtyping import Float64
from numpy import ndarray


def table_key(seed: int, role: str, name: str) -> int:
    """Name one table by what it is for: a role, and a parameter by its canonical name."""
    # The name comes last and neither of the others holds a line break, so no two tables share a text.
    text = f"{seed}\n{role}\n{name}"
    digest = hashlib.blake2b(text.encode(), digest_size=8, person=b"whence-project-1").digest()
    return int.from_bytes(digest, "little")


def signs(key: int, count: int) -> Float64[ndarray, " number"]:
    """Draw numbers that are 1 or -1."""
    words = _raw_words(key, math.ceil(count / 64)).astype("<u8")
    bits = np.unpackbits(words.view(np.uint8), count=count, bitorder="little")
    return 1.0 - 2.0 * bits


def uniforms(key: int, count: int) -> Float64[ndarray, " number"]:
    """Draw uniforms in [0, 1)."""
    return (_raw_words(key, count) >> np.uint64(11)) * 2.0**-53


def normals(key: int, count: int) -> Float64[ndarray, " number"]:
    """Draw standard normals."""
    draws = uniforms(key, 2 * math.ceil(count / 2))
    radius = np.sqrt(-2.0 * np.log(1.0 - draws[0::2]))  # 1 - u lies in (0, 1]
    angle = 2.0 * np.pi * draws[1::2]
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).reshape(-1)[:count]


def _raw_words(key: int, count: int) -> ndarray:
    return np.random.Philox(key=key).random_raw(count)
