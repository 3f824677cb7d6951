"""Layer norm, RMS norm, and dropout with residual, apart and fused, on the device."""

from __future__ import annotations

from typing import Any

import cupy

from executor.cuda.indices import on_device
from executor.cuda.launch import (
    add_columns,
    arithmetic,
    dropout_arguments,
    launch,
    partials_for,
    row_threads,
    statistics,
    walk,
)
from executor.reference.arrays import Floats, Ints, as_rows

_NOTHING_DROPPED = (0, 1.0, 0, None, None, 1, 0)  # dropout_arguments of rate 0


def _mean(mean: Floats | None, x: Floats, rms: bool) -> Floats | None:
    return None if rms or mean is None else statistics(mean, x.dtype)


def norm_forward(
    x: Floats,
    gamma: Floats,
    beta: Floats | None,
    epsilon: float,
    out: Floats,
    mean: Floats | None,
    rstd: Floats,
    rms: bool,
) -> None:
    """See `executor.reference.norm.norm_forward`."""
    rows, width = as_rows(x).shape
    assert rms or mean is not None
    if x.size:
        outputs = (out, _mean(mean, x, rms), statistics(rstd, x.dtype), width, rms)
        block = (row_threads(width, x.dtype),)
        launch("norm", "norm_forward", x.dtype, (rows,), block, x, gamma, beta, float(epsilon), *outputs)


def norm_backward(
    dy: Floats,
    x: Floats,
    gamma: Floats,
    mean: Floats | None,
    rstd: Floats,
    dx: Floats,
    dgamma: Floats,
    dbeta: Floats | None,
    rms: bool,
    accumulate_dx: bool = False,
) -> None:
    """See `executor.reference.norm.norm_backward`."""
    extra = dx if accumulate_dx else None
    _backward(dy, extra, x, gamma, mean, rstd, dx, None, _NOTHING_DROPPED, None, dgamma, dbeta, rms)


def _backward(
    dy: Floats,
    extra: Floats | None,
    x: Floats,
    gamma: Floats,
    mean: Floats | None,
    rstd: Floats,
    d_stream: Floats,
    dx: Floats | None,
    dropout: tuple[Any, ...],
    dbias: Floats | None,
    dgamma: Floats,
    dbeta: Floats | None,
    rms: bool,
) -> None:
    """Write d_stream = norm'(dy) + extra, dx = dropout of it unless None; add to the parameters' gradients."""
    rows, width = as_rows(x).shape
    if x.size == 0:
        return
    centre, inverse = _mean(mean, x, rms), statistics(rstd, x.dtype)
    means = cupy.empty((rows, 2), arithmetic(x.dtype))
    row = (row_threads(width, x.dtype),)
    launch("norm", "norm_row_means", x.dtype, (rows,), row, dy, x, gamma, centre, inverse, means, width, rms)
    grid, block = walk(rows, width, x.dtype)
    totals = (dgamma, dbeta, dbias)
    partials = [partials_for(grid, width, x.dtype, total) for total in totals]
    arguments = (dy, extra, x, gamma, centre, inverse, means, d_stream, dx)
    launch(
        "norm", "norm_backward", x.dtype, grid, block, *arguments, *dropout, *partials, rows, width, rms
    )  # fmt: skip
    for partial, total in zip(partials, totals, strict=True):
        add_columns(partial, total, x.dtype)


def dropout_residual_forward(
    x: Floats,
    bias: Floats | None,
    residual: Floats,
    rate: float,
    key: int,
    samples: Ints,
    positions: Ints,
    out: Floats,
    *,
    first_column: int = 0,
) -> None:
    """See `executor.reference.norm.dropout_residual_forward`."""
    rows, width = as_rows(x).shape
    if x.size:
        dropout = dropout_arguments(rate, key, on_device(samples), on_device(positions), first_column)
        grid, block = walk(rows, width, x.dtype)
        arguments = (x, bias, residual, *dropout, out, rows, width)
        launch("norm", "dropout_residual_forward", x.dtype, grid, block, *arguments)


def dropout_residual_backward(
    dout: Floats,
    rate: float,
    key: int,
    samples: Ints,
    positions: Ints,
    dx: Floats,
    dbias: Floats | None,
    *,
    first_column: int = 0,
) -> None:
    """See `executor.reference.norm.dropout_residual_backward`."""
    rows, width = as_rows(dx).shape
    written = None if rate == 0.0 and _same(dx, dout) else dx
    if dx.size == 0 or (written is None and dbias is None):
        return
    dropout = dropout_arguments(rate, key, on_device(samples), on_device(positions), first_column)
    grid, block = walk(rows, width, dx.dtype)
    partials = partials_for(grid, width, dx.dtype, dbias)
    arguments = (dout, *dropout, written, partials, rows, width)
    launch("norm", "dropout_residual_backward", dx.dtype, grid, block, *arguments)
    add_columns(partials, dbias, dx.dtype)


def _same(a: Floats, b: Floats) -> bool:
    """Whether two arrays, which are one or lie apart, are one; this compares addresses on the host."""
    return a is b or bool(cupy.may_share_memory(a, b))


def residual_norm_forward(
    x: Floats,
    bias: Floats | None,
    residual: Floats,
    rate: float,
    key: int,
    samples: Ints,
    positions: Ints,
    gamma: Floats,
    beta: Floats | None,
    epsilon: float,
    stream_out: Floats,
    normed_out: Floats,
    mean: Floats | None,
    rstd: Floats,
    rms: bool,
) -> None:
    """See `executor.reference.norm.residual_norm_forward`."""
    rows, width = as_rows(x).shape
    assert rms or mean is not None
    if x.size:
        dropout = dropout_arguments(rate, key, on_device(samples), on_device(positions), 0)
        outputs = (stream_out, normed_out, _mean(mean, x, rms), statistics(rstd, x.dtype), width, rms)
        arguments = (x, bias, residual, *dropout, gamma, beta, float(epsilon), *outputs)
        launch("norm", "residual_norm_forward", x.dtype, (rows,), (row_threads(width, x.dtype),), *arguments)


def residual_norm_backward(
    d_normed: Floats,
    d_stream: Floats | None,
    stream: Floats,
    rate: float,
    key: int,
    samples: Ints,
    positions: Ints,
    gamma: Floats,
    mean: Floats | None,
    rstd: Floats,
    dx: Floats,
    d_residual: Floats,
    dbias: Floats | None,
    dgamma: Floats,
    dbeta: Floats | None,
    rms: bool,
) -> None:
    """See `executor.reference.norm.residual_norm_backward`."""
    same = _same(dx, d_residual)
    assert not (same and rate > 0.0), "with dropout, dx and d_residual differ"
    dropout = dropout_arguments(rate, key, on_device(samples), on_device(positions), 0)
    second = None if same else dx
    _backward(
        d_normed, d_stream, stream, gamma, mean, rstd, d_residual, second, dropout, dbias, dgamma, dbeta, rms
    )  # fmt: skip
