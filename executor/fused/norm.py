"""Layer norm, RMS norm, dropout and residual: each row is read once and stays in the L1 cache until it is written."""

from __future__ import annotations

from typing import Any

import numpy as np

from executor.fused.compile import helper, kernel
from executor.fused.dropout import fill_mask, row_key
from executor.fused.rows import BLOCK_ROWS, add_to, copy_to, vector_or_empty, vector_or_zeros
from executor.reference.arrays import Floats, Ints, as_rows
from executor.reference.dropout import threshold_of


@helper
def normalise_row(x: Any, gamma: Any, beta: Any, epsilon: Any, rms: Any, out: Any) -> Any:
    """Normalise one row [H]; return its mean (0 if rms) and rstd. Two passes: no cancellation in the variance."""
    width = x.shape[0]
    mean = x.dtype.type(0.0)
    if not rms:
        for j in range(width):
            mean += x[j]
        mean /= x.dtype.type(width)
    square = x.dtype.type(0.0)
    for j in range(width):
        centred = x[j] - mean
        square += centred * centred
    rstd = x.dtype.type(1.0) / np.sqrt(square / x.dtype.type(width) + epsilon)
    for j in range(width):
        out[j] = (x[j] - mean) * rstd * gamma[j] + beta[j]
    return mean, rstd


@helper
def normalise_row_backward(
    dy: Any, x: Any, gamma: Any, mean: Any, rstd: Any, rms: Any, extra: Any, dx: Any, dgamma: Any
) -> None:
    """Compute dx = norm'(dy) + extra for one row, and dgamma += dy · x̂."""
    width = dy.shape[0]
    g_sum = dy.dtype.type(0.0)
    g_normed_sum = dy.dtype.type(0.0)
    for j in range(width):
        normed = (x[j] - mean) * rstd
        g = dy[j] * gamma[j]
        g_sum += g
        g_normed_sum += g * normed
        dgamma[j] += dy[j] * normed
    scale = rstd / dy.dtype.type(width)
    shift = dy.dtype.type(0.0) if rms else g_sum * scale
    slope = g_normed_sum * scale
    for j in range(width):
        normed = (x[j] - mean) * rstd
        dx[j] = dy[j] * gamma[j] * rstd - shift - normed * slope + extra[j]


@kernel("void(T[:, ::1], T[::1], T[::1], T, T[:, ::1], T[::1], T[::1], boolean)")
def _norm_forward(x: Any, gamma: Any, beta: Any, epsilon: Any, out: Any, mean: Any, rstd: Any, rms: Any) -> None:
    result = np.empty(x.shape[1], x.dtype)
    for t in range(x.shape[0]):
        row_mean, row_rstd = normalise_row(x[t], gamma, beta, epsilon, rms, result)
        copy_to(out[t], result)
        rstd[t] = row_rstd
        if not rms:
            mean[t] = row_mean


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
    beta, means = vector_or_zeros(beta, x), vector_or_empty(mean, x)
    _norm_forward[x.dtype](as_rows(x), gamma, beta, epsilon, as_rows(out), means, rstd, rms)


@kernel("void(T[:, ::1], T[:, ::1], T[::1], T[::1], T[::1], T[:, ::1], T[::1], T[::1], boolean, boolean)")
def _norm_backward(
    dy: Any, x: Any, gamma: Any, mean: Any, rstd: Any, dx: Any, dgamma: Any, dbeta: Any, rms: Any, accumulate: Any
) -> None:
    rows, width = x.shape
    part_gamma, part_beta = np.zeros(width, x.dtype), np.zeros(width, x.dtype)
    nothing, result = np.zeros(width, x.dtype), np.empty(width, x.dtype)
    for start in range(0, rows, BLOCK_ROWS):
        for t in range(start, min(start + BLOCK_ROWS, rows)):
            if dbeta.size > 0:
                for j in range(width):
                    part_beta[j] += dy[t, j]
            row_mean = x.dtype.type(0.0) if rms else mean[t]
            extra = dx[t] if accumulate else nothing
            normalise_row_backward(dy[t], x[t], gamma, row_mean, rstd[t], rms, extra, result, part_gamma)
            copy_to(dx[t], result)
        add_to(dgamma, part_gamma)
        if dbeta.size > 0:
            add_to(dbeta, part_beta)


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
    means, dbeta = vector_or_empty(mean, x), vector_or_empty(dbeta, x)
    _norm_backward[x.dtype](as_rows(dy), as_rows(x), gamma, means, rstd, as_rows(dx), dgamma, dbeta, rms, accumulate_dx)


_DROPOUT = "uint32, T, uint64, int64[::1], int64[::1]"  # threshold, 1 / (1 - rate), key, samples, positions


@kernel(f"void(T[:, ::1], T[::1], T[:, ::1], {_DROPOUT}, uint32, T[:, ::1])")
def _dropout_residual_forward(
    x: Any, bias: Any, residual: Any, threshold: Any, scale: Any, key: Any, samples: Any, positions: Any,
    first_column: Any, out: Any,
) -> None:  # fmt: skip
    mask, result = np.ones(x.shape[1], x.dtype), np.empty(x.shape[1], x.dtype)
    for t in range(x.shape[0]):
        if threshold > 0:
            s, b = divmod(t, samples.size)
            fill_mask(mask, row_key(key, samples[b], positions[s], 0), threshold, scale, first_column)
        for j in range(x.shape[1]):
            result[j] = residual[t, j] + mask[j] * (x[t, j] + bias[j])
        copy_to(out[t], result)


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
    rows, bias = as_rows(x), vector_or_zeros(bias, x)
    dropout = (threshold_of(rate), 1.0 / (1.0 - rate), np.uint64(key), samples, positions)
    _dropout_residual_forward[x.dtype](rows, bias, as_rows(residual), *dropout, first_column, as_rows(out))


@kernel(f"void(T[:, ::1], {_DROPOUT}, uint32, boolean, T[:, ::1], T[::1])")
def _dropout_residual_backward(
    dout: Any, threshold: Any, scale: Any, key: Any, samples: Any, positions: Any, first_column: Any, in_place: Any,
    dx: Any, dbias: Any,
) -> None:  # fmt: skip
    rows, width = dout.shape
    mask, part, result = np.ones(width, dout.dtype), np.zeros(width, dout.dtype), np.empty(width, dout.dtype)
    for start in range(0, rows, BLOCK_ROWS):
        for t in range(start, min(start + BLOCK_ROWS, rows)):
            if threshold > 0:
                s, b = divmod(t, samples.size)
                fill_mask(mask, row_key(key, samples[b], positions[s], 0), threshold, scale, first_column)
            if threshold > 0 or not in_place:
                for j in range(width):
                    result[j] = mask[j] * dout[t, j]
                copy_to(dx[t], result)
            if dbias.size > 0:
                for j in range(width):
                    part[j] += dx[t, j]
        if dbias.size > 0:
            add_to(dbias, part)


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
    in_place = dx.ctypes.data == dout.ctypes.data if dx is not dout else True
    if in_place and rate == 0.0 and dbias is None:
        return
    dropout = (threshold_of(rate), 1.0 / (1.0 - rate), np.uint64(key), samples, positions)
    _dropout_residual_backward[dx.dtype](
        as_rows(dout), *dropout, first_column, in_place, as_rows(dx), vector_or_empty(dbias, dx)
    )


@kernel(
    f"void(T[:, ::1], T[::1], T[:, ::1], {_DROPOUT}, T[::1], T[::1], T, T[:, ::1], T[:, ::1], T[::1], T[::1], boolean)"
)
def _residual_norm_forward(
    x: Any, bias: Any, residual: Any, threshold: Any, scale: Any, key: Any, samples: Any, positions: Any, gamma: Any,
    beta: Any, epsilon: Any, stream: Any, normed: Any, mean: Any, rstd: Any, rms: Any,
) -> None:  # fmt: skip
    mask, result = np.ones(x.shape[1], x.dtype), np.empty(x.shape[1], x.dtype)
    for t in range(x.shape[0]):
        if threshold > 0:
            s, b = divmod(t, samples.size)
            fill_mask(mask, row_key(key, samples[b], positions[s], 0), threshold, scale, np.uint32(0))
        for j in range(x.shape[1]):
            result[j] = residual[t, j] + mask[j] * (x[t, j] + bias[j])
        copy_to(stream[t], result)
        row_mean, row_rstd = normalise_row(result, gamma, beta, epsilon, rms, normed[t])
        rstd[t] = row_rstd
        if not rms:
            mean[t] = row_mean


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
    rows, bias, beta = as_rows(x), vector_or_zeros(bias, x), vector_or_zeros(beta, x)
    dropout = (threshold_of(rate), 1.0 / (1.0 - rate), np.uint64(key), samples, positions)
    outputs = (as_rows(stream_out), as_rows(normed_out), vector_or_empty(mean, x), rstd, rms)
    _residual_norm_forward[x.dtype](rows, bias, as_rows(residual), *dropout, gamma, beta, epsilon, *outputs)


@kernel(
    f"void(T[:, ::1], T[:, ::1], boolean, T[:, ::1], {_DROPOUT}, T[::1], T[::1], T[::1], T[:, ::1], T[:, ::1], boolean,"
    " T[::1], T[::1], T[::1], boolean)"
)
def _residual_norm_backward(
    d_normed: Any, d_stream: Any, has_d_stream: Any, stream: Any, threshold: Any, scale: Any, key: Any, samples: Any,
    positions: Any, gamma: Any, mean: Any, rstd: Any, dx: Any, d_residual: Any, same: Any, dbias: Any, dgamma: Any,
    dbeta: Any, rms: Any,
) -> None:  # fmt: skip
    rows, width = stream.shape
    mask, nothing = np.ones(width, stream.dtype), np.zeros(width, stream.dtype)
    part_bias, part_gamma = np.zeros(width, stream.dtype), np.zeros(width, stream.dtype)
    part_beta, result = np.zeros(width, stream.dtype), np.empty(width, stream.dtype)
    for start in range(0, rows, BLOCK_ROWS):
        for t in range(start, min(start + BLOCK_ROWS, rows)):
            if dbeta.size > 0:
                for j in range(width):
                    part_beta[j] += d_normed[t, j]
            row_mean = stream.dtype.type(0.0) if rms else mean[t]
            extra = d_stream[t] if has_d_stream else nothing
            normalise_row_backward(d_normed[t], stream[t], gamma, row_mean, rstd[t], rms, extra, result, part_gamma)
            copy_to(d_residual[t], result)
            if threshold > 0:
                s, b = divmod(t, samples.size)
                fill_mask(mask, row_key(key, samples[b], positions[s], 0), threshold, scale, np.uint32(0))
            if not same:
                for j in range(width):
                    result[j] *= mask[j]
                copy_to(dx[t], result)
            if dbias.size > 0:
                for j in range(width):
                    part_bias[j] += result[j]
        add_to(dgamma, part_gamma)
        if dbeta.size > 0:
            add_to(dbeta, part_beta)
        if dbias.size > 0:
            add_to(dbias, part_bias)


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
    rows = as_rows(stream)
    same = dx is d_residual or dx.ctypes.data == d_residual.ctypes.data
    assert not (same and rate > 0.0), "with dropout, dx and d_residual differ"
    dropout = (threshold_of(rate), 1.0 / (1.0 - rate), np.uint64(key), samples, positions)
    _residual_norm_backward[stream.dtype](
        as_rows(d_normed), rows if d_stream is None else as_rows(d_stream), d_stream is not None, rows, *dropout,
        gamma, vector_or_empty(mean, stream), rstd, as_rows(dx), as_rows(d_residual), same,
        vector_or_empty(dbias, stream), dgamma, vector_or_empty(dbeta, stream), rms,
    )  # fmt: skip
