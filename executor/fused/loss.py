"""Softmax cross-entropy over a vocabulary that may be split by columns over ranks."""

from __future__ import annotations

from typing import Any

import numpy as np

from executor.fused.compile import kernel
from executor.fused.maths import exp, larger
from executor.fused.rows import BLOCK_ROWS, add_to, vector_or_empty, vector_or_zeros
from executor.reference import loss as reference
from executor.reference.arrays import Floats, Ints

cross_entropy_loss = reference.cross_entropy_loss  # a few numbers per token: NumPy is fast enough


@kernel("void(T[:, ::1], T[::1], T[::1])")
def _cross_entropy_max(logits: Any, bias: Any, out_max: Any) -> None:
    for t in range(logits.shape[0]):
        largest = logits.dtype.type(-np.inf)
        for j in range(logits.shape[1]):
            value = logits[t, j] + bias[j]
            logits[t, j] = value
            largest = larger(value, largest)
        out_max[t] = largest


def cross_entropy_max(logits: Floats, bias: Floats | None, out_max: Floats) -> None:
    """See `executor.reference.loss.cross_entropy_max`."""
    _cross_entropy_max[logits.dtype](logits, vector_or_zeros(bias, logits), out_max)


@kernel("void(T[:, ::1], T[::1], int64[::1], int64, T[:, ::1])")
def _cross_entropy_sum(logits: Any, row_max: Any, targets: Any, first_column: Any, stats: Any) -> None:
    for t in range(logits.shape[0]):
        column = targets[t] - first_column
        stats[t, 1] = logits[t, column] - row_max[t] if 0 <= column < logits.shape[1] else 0
        total = logits.dtype.type(0.0)
        for j in range(logits.shape[1]):
            e = exp(logits[t, j] - row_max[t])
            logits[t, j] = e
            total += e
        stats[t, 0] = total


def cross_entropy_sum(logits: Floats, row_max: Floats, targets: Ints, first_column: int, stats: Floats) -> None:
    """See `executor.reference.loss.cross_entropy_sum`."""
    _cross_entropy_sum[logits.dtype](logits, row_max, targets, first_column, stats)


@kernel("void(T[:, ::1], T[:, ::1], int64[::1], int64, T[::1], T, T[::1])")
def _cross_entropy_backward(
    exp_logits: Any, stats: Any, targets: Any, first_column: Any, weights: Any, scale: Any, dbias: Any
) -> None:
    rows, width = exp_logits.shape
    part = np.zeros(dbias.size, exp_logits.dtype)
    for start in range(0, rows, BLOCK_ROWS):
        for t in range(start, min(start + BLOCK_ROWS, rows)):
            weight = weights[t] * scale
            if weight == 0:
                for j in range(width):
                    exp_logits[t, j] = 0
                continue
            factor = weight / stats[t, 0]
            for j in range(width):
                exp_logits[t, j] *= factor
            column = targets[t] - first_column
            if 0 <= column < width:
                exp_logits[t, column] -= weight
            for j in range(part.size):
                part[j] += exp_logits[t, j]
        add_to(dbias, part)


def cross_entropy_backward(
    exp_logits: Floats,
    stats: Floats,
    targets: Ints,
    first_column: int,
    weights: Floats,
    scale: float,
    dbias: Floats | None = None,
) -> None:
    """See `executor.reference.loss.cross_entropy_backward`."""
    dbias = vector_or_empty(dbias, exp_logits)
    _cross_entropy_backward[exp_logits.dtype](exp_logits, stats, targets, first_column, weights, scale, dbias)
