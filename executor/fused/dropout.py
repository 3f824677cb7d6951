"""The dropout masks of `executor.reference.dropout`, bit for bit, inside other kernels."""

from __future__ import annotations

from typing import Any

import numpy as np

from executor.fused.compile import exact_helper
from executor.reference.dropout import GOLDEN_32, GOLDEN_64


@exact_helper
def splitmix64(state: Any) -> Any:
    """Output function of SplitMix64."""
    z = state + np.uint64(GOLDEN_64)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


@exact_helper
def row_key(key: Any, sample: Any, position: Any, head: Any) -> Any:
    """64-bit key of one row of a mask."""
    state = splitmix64(np.uint64(key) ^ np.uint64(sample))
    state = splitmix64(state ^ np.uint64(position))
    return splitmix64(state ^ np.uint64(head))


@exact_helper
def kept(low: Any, high: Any, column: Any, threshold: Any) -> Any:
    """Whether the element of this (32-bit) column survives; low and high are the halves of the row key."""
    h = np.uint32(column * np.uint32(GOLDEN_32) + low)
    h = np.uint32((h ^ (h >> np.uint32(16))) * np.uint32(0x85EBCA6B))
    h = np.uint32(((h ^ high) ^ (h >> np.uint32(13))) * np.uint32(0xC2B2AE35))
    return np.uint32(h ^ (h >> np.uint32(16))) >= threshold


@exact_helper
def fill_mask(mask: Any, key: Any, threshold: Any, scale: Any, first_column: Any) -> None:
    """Write 0 or scale into mask [C]: a row that stays in the L1 cache keeps the callers' loops free of branches."""
    low, high = np.uint32(key & np.uint64(0xFFFFFFFF)), np.uint32(key >> np.uint64(32))
    zero = mask.dtype.type(0.0)
    for j in range(mask.shape[0]):
        column = np.uint32(np.uint32(j) + first_column)
        mask[j] = scale if kept(low, high, column, threshold) else zero
