"""Rows of attention scores: mask, maximum, exponentials and dropout, shared by plain and blocked attention."""

from __future__ import annotations

from typing import Any

import numpy as np

from executor.fused.compile import exact_helper, helper
from executor.fused.dropout import kept
from executor.fused.maths import exp, larger
from executor.reference.dropout import threshold_of
from executor.reference.masking import Masking

MASKING = "T, int64[::1], int32[::1], int32[::1], int64, int64, uint32, T, uint64, int64[::1], int64[::1]"
"""Types of what `masking_arguments` gives."""


def masking_arguments(masking: Masking) -> tuple[Any, ...]:
    """Scale, kv_index, q_positions, k_positions, back, ahead, threshold, 1 / (1 - rate), key, samples and head_ids.

    Positions of 32 bits compare twice as many at a time.
    """
    return (
        masking.scale, masking.kv_index, masking.q_positions.astype(np.int32), masking.k_positions.astype(np.int32),
        *masking.reach, threshold_of(masking.rate), 1.0 / (1.0 - masking.rate), np.uint64(masking.key),
        masking.samples, masking.head_ids,
    )  # fmt: skip


@helper
def largest_of(row: Any) -> Any:
    """Largest element, -inf if there is none. NaN need not show here; it does in the exponentials."""
    largest = row.dtype.type(-np.inf)
    for j in range(row.shape[0]):
        largest = larger(row[j], largest)
    return largest


@helper
def hide(row: Any, q_position: Any, k_positions: Any, back: Any, ahead: Any) -> None:
    """Write -inf into the scores [Sk] of the keys that the query does not see; positions are int32."""
    hidden = row.dtype.type(-np.inf)
    lowest, highest = np.int64(q_position) - back, np.int64(q_position) + ahead
    low = np.int32(max(lowest, -2147483648))
    high = np.int32(min(highest, 2147483647))
    for j in range(row.shape[0]):
        row[j] = row[j] if (k_positions[j] >= low) & (k_positions[j] <= high) else hidden


@helper
def exponentiate(row: Any, largest: Any) -> Any:
    """Replace scores by exp(score - largest); return their sum. A largest of -inf (no key seen) gives zeros."""
    total = row.dtype.type(0.0)
    shift = row.dtype.type(0.0) if largest == row.dtype.type(-np.inf) else largest
    for j in range(row.shape[0]):
        e = exp(row[j] - shift)
        row[j] = e
        total += e
    return total


@exact_helper
def drop(row: Any, out: Any, key: Any, k_positions: Any, threshold: Any, scale: Any) -> None:
    """Compute out = row · dropout factor, column by global key position (int32); out may not be row."""
    low, high = np.uint32(key & np.uint64(0xFFFFFFFF)), np.uint32(key >> np.uint64(32))
    zero = row.dtype.type(0.0)
    for j in range(row.shape[0]):
        out[j] = row[j] * (scale if kept(low, high, np.uint32(k_positions[j]), threshold) else zero)
