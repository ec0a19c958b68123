r"""Noise as a pure function of a key, so that it is never stored and never depends on a batch.

A *noise key* is 64 bits: the BLAKE2b hash of (seed, stream, side, sample id, position, draw, occurrence). It keys a
Philox 4x64 counter-based generator (Salmon et al. 2011), whose raw words are used as follows.

    word 0      uniform that gives the timestep of a training visit
    word 1      uniform that gives its flip
    word 2      second uniform of a timestep that is not drawn uniformly
    word 3      spare
    word 4...   pairs of uniforms, each pair two normals by the Box-Muller transform in float64, rounded to float32

Only the generator's *raw* words are used: NumPy promises never to change them, while it may change how it makes normals
of them. Normals are made for one sample at a time; a longer noise begins with the values of a shorter one.
"""

import hashlib
import math
from collections.abc import Iterable
from typing import Literal

import numpy as np
from jaxtyping import Float32, Float64, UInt64
from numpy import ndarray

Stream = Literal["record", "grid", "trajectory", "order", "subset", "measure", "word"]
Side = Literal["train", "query"]

_NUM_SCALARS = 4


def noise_key(
    seed: int, stream: Stream, side: Side, sample_id: str, position: int, draw: int = 0, occurrence: int = 0
) -> int:
    """Name one draw of noise by what it is for.

    Args:
        seed: Seed of the training run or of the query grid.
        stream: What the draw serves: a recorded visit, a grid of timesteps, a sampler's trajectory, an order, who is in
            a subset of the training set, the measuring of a retrained model, or the vector of a word.
        side: Whether the sample is a training sample or a query.
        sample_id: Stable id of the sample.
        position: Optimizer step of a recorded visit (from 1); timestep of a grid point or trajectory.
        draw: Counts draws at one position.
        occurrence: Counts appearances of the same sample in one optimizer step.

    Returns:
        An integer in 0..2^64-1.

    Example:
        >>> noise_key(0, "grid", "query", "cat.png", 250, draw=3)
        6543371754176593845
    """
    # The id comes last and the other fields hold no blank, so no two tuples share a text.
    text = f"{seed} {stream} {side} {position} {draw} {occurrence} {sample_id}"
    digest = hashlib.blake2b(text.encode(), digest_size=8, person=b"whence-noise-1").digest()
    return int.from_bytes(digest, "little")


def visit_key(seed: int, sample_id: str, step: int, rank: int, occurrence: int) -> int:
    """Give the noise key of a visit; a sample that several processes see in one step has another noise in each."""
    return noise_key(seed, "record", "train", sample_id, step, occurrence=(rank << 16) + occurrence)


def scalar_draws(key: int) -> Float64[ndarray, " scalar"]:
    """Give the four uniforms in [0, 1) that go with a key: timestep, flip, again timestep, and a spare one."""
    return _uniforms(key, _NUM_SCALARS)


def drawn_timestep(key: int, num_timesteps: int) -> int:
    """Give the timestep in 0..num_timesteps-1 that a key draws, uniformly."""
    return int(scalar_draws(key)[0] * num_timesteps)


def derived_key(key: int, purpose: Literal["offset", "perturbation", "posterior", "dropped"]) -> int:
    """Name a second draw of an event: shift of its noise, input perturbation, sample of a VAE, withheld caption."""
    digest = hashlib.blake2b(f"{int(key)} {purpose}".encode(), digest_size=8, person=b"whence-noise-2").digest()
    return int.from_bytes(digest, "little")


def drawn_flip(key: int) -> bool:
    """Tell whether a key draws a flip; half of all keys do."""
    return bool(scalar_draws(key)[1] < 0.5)


def is_withheld(key: int, probability: float) -> bool:
    """Tell whether a key withholds the caption or label of its visit."""
    return bool(scalar_draws(derived_key(key, "dropped"))[0] < probability)


def normals(key: int, shape: tuple[int, ...]) -> Float32[ndarray, "*shape"]:
    """Draw independent standard normals.

    Args:
        key: The noise key.
        shape: Shape of one sample's noise, without a batch axis.

    Returns:
        Noise rounded from float64. The same on every machine, but for the rounding of one value in about 10^8 where
        the C library's logarithm and sine differ in their last bit.

    Example:
        >>> normals(7, (2, 2))
        array([[-0.13685097, -0.39271408],
               [-0.60916084, -0.5761016 ]], dtype=float32)
    """
    count = math.prod(shape)
    num_pairs = (count + 1) // 2
    uniforms = _uniforms(key, _NUM_SCALARS + 2 * num_pairs)[_NUM_SCALARS:]
    radius = np.sqrt(-2.0 * np.log(1.0 - uniforms[0::2]))  # 1 - u lies in (0, 1]
    angle = 2.0 * np.pi * uniforms[1::2]
    pairs = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)
    return pairs.reshape(-1)[:count].reshape(shape).astype(np.float32)


def normals_of_keys(
    keys: Iterable[int] | UInt64[ndarray, " event"], shape: tuple[int, ...]
) -> Float32[ndarray, "event *shape"]:
    """Draw one sample's noise for each key and stack them along a new first axis."""
    noise = [normals(int(key), shape) for key in keys]
    return np.stack(noise) if noise else np.empty((0, *shape), np.float32)


def draw_latents(
    mean: Float32[ndarray, "event *shape"],
    deviation: Float32[ndarray, "event *shape"],
    keys: Iterable[int] | UInt64[ndarray, " event"],
) -> Float32[ndarray, "event *shape"]:
    """Draw from normal distributions, such as the posterior of a VAE, by the noise keys of the events.

    Args:
        mean: Mean of each number.
        deviation: Its standard deviation.
        keys: Noise keys; what is drawn has nothing in common with their noise.

    Returns:
        float32.
    """
    drawn = normals_of_keys([derived_key(int(key), "posterior") for key in keys], mean.shape[1:])
    return (mean + deviation * drawn).astype(np.float32)


def keyed_order(seed: int, position: int, num_items: int) -> ndarray:
    """Give a random order of ``num_items`` items, a pure function of (seed, position).

    Returns:
        A permutation of 0..num_items-1.

    Example:
        >>> sorted(keyed_order(seed=3, position=0, num_items=4).tolist())
        [0, 1, 2, 3]
    """
    words = _raw_words(noise_key(seed, "order", "train", "", position), num_items)
    return np.argsort(words, kind="stable")


def _uniforms(key: int, count: int) -> Float64[ndarray, " word"]:
    """Turn raw words into uniforms in [0, 1) with 53 bits each."""
    return (_raw_words(key, count) >> np.uint64(11)) * 2.0**-53


def _raw_words(key: int, count: int) -> ndarray:
    return np.random.Philox(key=key).random_raw(count)
