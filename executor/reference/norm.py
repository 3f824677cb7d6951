"""Layer norm, RMS norm, and dropout with residual, apart and fused.

Layer norm (Ba, Kiros & Hinton 2016): y = (x - mean) · rstd · gamma + beta; RMS norm (Zhang & Sennrich 2019): the same
without mean and beta. The backward pass reads the *input* x with rstd (and mean) per row: one number or two per token
beside a tensor that the residual stream keeps anyway, and exact where gamma is 0, unlike forms that invert y.

Activations are sequence-first, [S, B, H] or [S · B, H], C-contiguous. Gradients of gamma, beta and bias are added to.
"""

from __future__ import annotations

import numpy as np

from executor.reference.arrays import Floats, Ints, as_rows
from executor.reference.dropout import token_mask


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
    """Normalise each row of x.

    Args:
        x: [..., H].
        gamma: gain [H].
        beta: shift [H] or None.
        epsilon: added to the variance (mean square if rms).
        out: like x; may be x.
        mean: [T], written; None if rms.
        rstd: [T], written: 1 / sqrt(variance + epsilon).
        rms: RMS norm instead of layer norm.
    """
    rows, target = as_rows(x), as_rows(out)
    if rms:
        centred = rows
    else:
        assert mean is not None
        mean[:] = rows.mean(axis=1)
        centred = rows - mean[:, None]
    rstd[:] = 1.0 / np.sqrt((centred * centred).mean(axis=1) + rows.dtype.type(epsilon))
    np.multiply(centred, rstd[:, None], out=target)
    target *= gamma
    if beta is not None:
        target += beta


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
    """Gradient of `norm_forward`: dx = rstd · (g - mean(g) - x̂ · mean(g · x̂)), g = dy · gamma; no mean(g) if rms.

    Args:
        dy: gradient of the output [..., H].
        x: the input of the forward pass.
        gamma: gain [H].
        mean: [T] from the forward pass; None if rms.
        rstd: [T] from the forward pass.
        dx: written, or added to if accumulate_dx; may be dy if not.
        dgamma: [H], added to.
        dbeta: [H], added to, or None.
        rms: RMS norm instead of layer norm.
        accumulate_dx: add to dx.
    """
    gradient, target = as_rows(dy), as_rows(dx)
    centred = as_rows(x) if mean is None or rms else as_rows(x) - mean[:, None]
    normed = centred * rstd[:, None]
    dgamma += (gradient * normed).sum(axis=0)
    if dbeta is not None:
        dbeta += gradient.sum(axis=0)
    g = gradient * gamma
    result = g - normed * (g * normed).mean(axis=1, keepdims=True)
    if not rms:
        result -= g.mean(axis=1, keepdims=True)
    result *= rstd[:, None]
    if accumulate_dx:
        target += result
    else:
        target[:] = result


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
    """Compute out = residual + dropout(x + bias).

    Args:
        x: [S, B, H].
        bias: [H] or None.
        residual: like x.
        rate: probability of dropping an element, in [0, 1).
        key: 64-bit key of this dropout.
        samples: global index of each sequence [B].
        positions: global position of each row [S].
        out: like x; may be x or residual.
        first_column: global index of column 0, where H is sharded.
    """
    rows = as_rows(x) if bias is None else as_rows(x) + bias
    if rate > 0.0:
        rows = rows * token_mask(rate, key, samples, positions, rows.shape[1], rows.dtype, first_column)
    np.add(as_rows(residual), rows, out=as_rows(out))


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
    """Gradient of `dropout_residual_forward` for x and bias; that for the residual is dout itself.

    Args:
        dout: [S, B, H].
        rate: as in the forward pass, like key, samples, positions and first_column.
        key: see rate.
        samples: see rate.
        positions: see rate.
        dx: written; may be dout, and with rate 0 costs nothing then.
        dbias: [H], added to, or None.
        first_column: see rate.
    """
    target = as_rows(dx)
    if rate > 0.0:
        mask = token_mask(rate, key, samples, positions, target.shape[1], target.dtype, first_column)
        np.multiply(as_rows(dout), mask, out=target)
    elif dx is not dout:
        target[:] = as_rows(dout)
    if dbias is not None:
        dbias += target.sum(axis=0)


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
    """Compute stream = residual + dropout(x + bias) and normed = norm(stream) in one pass.

    Arguments are those of `dropout_residual_forward` and `norm_forward`; stream_out may be x or residual, and
    normed_out may be x.
    """
    dropout_residual_forward(x, bias, residual, rate, key, samples, positions, stream_out)
    norm_forward(stream_out, gamma, beta, epsilon, normed_out, mean, rstd, rms)


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
    """Gradient of `residual_norm_forward`: d = norm'(d_normed) + d_stream; d_residual = d; dx = mask · d / (1 - rate).

    Args:
        d_normed: gradient of the normed output.
        d_stream: gradient that reached the stream on other ways, or None.
        stream: the stream saved by the forward pass.
        rate: as in the forward pass, like key, samples, positions, gamma, mean, rstd and rms.
        key: see rate.
        samples: see rate.
        positions: see rate.
        gamma: see rate.
        mean: see rate.
        rstd: see rate.
        dx: written; may be d_normed. With rate 0 it may be d_residual: the two are equal then.
        d_residual: written; may be d_stream, or d_normed where dx is not.
        dbias: [H], added to, or None.
        dgamma: [H], added to.
        dbeta: [H], added to, or None.
        rms: see rate.
    """
    other = None if d_stream is None else as_rows(d_stream).copy()
    norm_backward(d_normed, stream, gamma, mean, rstd, d_residual, dgamma, dbeta, rms)
    if other is not None:
        as_rows(d_residual)[:] += other
    dropout_residual_backward(d_residual, rate, key, samples, positions, dx, dbias)
