"""Dropout masks as a pure function of (key, sample, position, head, column), never of the layout.

A 64-bit SplitMix chain (Steele, Lea & Flood 2014, "Fast splittable pseudorandom number generators") hashes what names a
row; the 32-bit finaliser of MurmurHash3 (Appleby 2011) mixes the column into it. Both are counter-based: any rank
computes any element of the mask from global indices alone, so every layout drops the same elements.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from executor.reference.arrays import Floats, Ints

GOLDEN_64 = 0x9E3779B97F4A7C15  # 2^64 / golden ratio, the increment of SplitMix64
GOLDEN_32 = 0x9E3779B1


def splitmix64(state: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Output function of SplitMix64 for the given states (any shape)."""
    z = state + np.uint64(GOLDEN_64)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def row_keys(
    key: int | np.uint64, samples: Ints | int, positions: Ints | int, heads: Ints | int = 0
) -> npt.NDArray[np.uint64]:
    """64-bit key of each row of a mask.

    Args:
        key: derived from the seed, the step and the name of the dropout.
        samples: global index of the sequence within the batch.
        positions: global position within the sequence.
        heads: global attention head; 0 where the tensor has no heads.

    Returns:
        Keys in the broadcast shape of samples, positions and heads.
    """
    state = np.asarray(key, dtype=np.uint64).reshape(1)
    for index in (samples, positions, heads):
        state = splitmix64(state ^ np.asarray(index).astype(np.uint64))
    return state.reshape(np.broadcast_shapes(np.shape(samples), np.shape(positions), np.shape(heads)))


def threshold_of(rate: float) -> int:
    """Elements whose 32-bit hash is below this are dropped: floor(rate · 2^32).

    Raises:
        ValueError: if rate is not in [0, 1).
    """
    if not 0.0 <= rate < 1.0:
        raise ValueError(f"dropout rate {rate} is outside [0, 1); use a rate of at least 0 and below 1")
    return int(rate * 2**32)


def keep_mask(keys: npt.NDArray[np.uint64], columns: Ints, rate: float) -> npt.NDArray[np.bool_]:
    """Which elements survive.

    Args:
        keys: row keys, any shape.
        columns: global column indices [C], each below 2^32.
        rate: probability of dropping.

    Returns:
        Boolean array of shape keys.shape + (C,).
    """
    low = (keys & np.uint64(0xFFFFFFFF)).astype(np.uint32)[..., None]
    high = (keys >> np.uint64(32)).astype(np.uint32)[..., None]
    h = columns.astype(np.uint32) * np.uint32(GOLDEN_32) + low
    h = (h ^ (h >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    h = ((h ^ high) ^ (h >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    kept: npt.NDArray[np.bool_] = (h ^ (h >> np.uint32(16))) >= np.uint32(threshold_of(rate))
    return kept


def token_mask(
    rate: float, key: int, samples: Ints, positions: Ints, columns: int, dtype: np.dtype[np.floating], first_column: int
) -> Floats:
    """Factor 0 or 1/(1 - rate) of every element of a sequence-first activation.

    Returns:
        [S · B, columns] for positions [S] and samples [B].
    """
    keys = row_keys(key, samples[None, :], positions[:, None]).reshape(-1)
    kept = keep_mask(keys, np.arange(first_column, first_column + columns), rate)
    mask: Floats = kept.astype(dtype) * dtype.type(1.0 / (1.0 - rate))
    return mask
