"""What row kernels share: stand-ins for absent vectors, and column sums that keep their precision."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from executor.fused.compile import helper
from executor.reference.arrays import Floats

BLOCK_ROWS = 64
"""Rows summed apart before they join a weight gradient: rounding grows with the block, not with the tokens."""


@functools.lru_cache(maxsize=256)
def _zeros(dtype: np.dtype[Any], size: int) -> Floats:
    return np.zeros(size, dtype)


def vector_or_zeros(vector: Floats | None, like: Floats) -> Floats:
    """Return the vector, or as many zeros as `like` has columns: adding them costs less than a branch."""
    return _zeros(like.dtype, like.shape[-1]) if vector is None else vector


def vector_or_empty(vector: Floats | None, like: Floats) -> Floats:
    """Return the vector, or an empty one, which tells a kernel not to write."""
    return _zeros(like.dtype, 0) if vector is None else vector


@helper
def copy_to(row: Any, result: Any) -> None:
    """Write a finished result row.

    Kernels whose output may be one of their inputs compute each row in a buffer of their own, which stays in the L1
    cache: a compiler that cannot tell arrays apart falls back to scalar code.
    """
    for j in range(row.shape[0]):
        row[j] = result[j]


@helper
def add_to(total: Any, part: Any) -> None:
    """Compute total += part, and part = 0."""
    for j in range(total.shape[0]):
        total[j] += part[j]
        part[j] = 0
