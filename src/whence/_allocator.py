"""How the C library hands memory back to the system, which every gradient pass would otherwise pay for."""

import ctypes
import os
from functools import cache

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # numbers of mallopt's parameters, from malloc.h
_NEVER = 2**31 - 1
_LARGEST_KEPT = 2**25
"""Larger blocks always come from the system and go back to it; glibc allows no higher threshold."""


@cache
def keep_freed_memory() -> bool:
    """Let the process keep memory that it has freed, once and for all.

    A pass allocates and frees the same tensors as the one before it. glibc gives them back to the system in between,
    and each page costs a fault when it is next touched: up to a fifth of a pass, and half of one that makes the
    gradients of small layers. What is kept is the most that the process used at a time anyway.

    Returns:
        Whether it is so: False without glibc, and where the user has set a threshold of malloc's own.
    """
    if {"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"} & os.environ.keys():
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # not in macOS, musl and Windows
        return False
    return bool(mallopt(_MMAP_THRESHOLD, _LARGEST_KEPT) and mallopt(_TRIM_THRESHOLD, _NEVER))
