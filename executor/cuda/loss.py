"""Softmax cross-entropy over a vocabulary that may be split by columns over ranks, on the device."""

from __future__ import annotations

from typing import Any

import cupy
import numpy as np

from executor.cuda.indices import on_device
from executor.cuda.launch import BLOCK_THREADS, add_column_sums, arithmetic, launch, row_threads, statistics
from executor.reference.arrays import Floats, Ints


def cross_entropy_max(logits: Floats, bias: Floats | None, out_max: Floats) -> None:
    """See `executor.reference.loss.cross_entropy_max`."""
    rows, width = logits.shape
    if rows:
        block = (row_threads(width, logits.dtype),)
        arguments = (logits, bias, statistics(out_max, logits.dtype), width)
        launch("loss", "cross_entropy_max", logits.dtype, (rows,), block, *arguments)


def cross_entropy_sum(logits: Floats, row_max: Floats, targets: Ints, first_column: int, stats: Floats) -> None:
    """See `executor.reference.loss.cross_entropy_sum`."""
    rows, width = logits.shape
    if rows:
        block = (row_threads(width, logits.dtype),)
        outputs = (statistics(stats, logits.dtype), width)
        arguments = (logits, statistics(row_max, logits.dtype), on_device(targets), first_column, *outputs)
        launch("loss", "cross_entropy_sum", logits.dtype, (rows,), block, *arguments)


def cross_entropy_loss(stats: Floats, weights: Floats) -> Any:
    """See `executor.reference.loss.cross_entropy_loss`.

    Returns:
        A float64 array of no dimensions on the device, so that nobody waits: it adds and multiplies like a number, and
        `float` fetches it.
    """
    loss = cupy.empty((), np.float64)
    arguments = (statistics(stats, stats.dtype), _wide(weights, stats.dtype), loss, weights.size)
    launch("loss", "cross_entropy_loss", stats.dtype, (1,), (BLOCK_THREADS,), *arguments)
    return loss


def _wide(weights: Floats, dtype: np.dtype[Any]) -> Floats:
    """The tokens' weights in the arithmetic type."""
    wanted = arithmetic(dtype)
    return weights if weights.dtype == wanted else weights.astype(wanted)


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
    rows, width = exp_logits.shape
    if exp_logits.size:
        block = (row_threads(width, exp_logits.dtype),)
        inputs = (statistics(stats, exp_logits.dtype), on_device(targets), first_column)
        arguments = (exp_logits, *inputs, _wide(weights, exp_logits.dtype), float(scale), width)
        launch("loss", "cross_entropy_backward", exp_logits.dtype, (rows,), block, *arguments)
        add_column_sums(exp_logits, dbias)
