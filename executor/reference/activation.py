"""Activation functions with bias, plain and gated.

Plain ones store the derivative in the forward pass, so that the backward pass is one multiplication.

GELU (Hendrycks & Gimpel 2016) in its exact erf form and its tanh form; SiLU and the gated unit (SwiGLU and its kin)
after Shazeer 2020, arXiv:2002.05202.
"""

from __future__ import annotations

import math

import numpy as np
from scipy.special import erf

from executor.reference.arrays import Activation, Floats, as_rows


def value_and_derivative(x: Floats, kind: Activation) -> tuple[Floats, Floats]:
    """f(x) and f'(x) in the dtype of x.

    Raises:
        ValueError: if kind is unknown.
    """
    one = x.dtype.type(1.0)
    if kind == "relu":
        return np.maximum(x, 0), (x > 0).astype(x.dtype)
    if kind == "gelu":
        below = (one + erf(x * x.dtype.type(math.sqrt(0.5)))) / x.dtype.type(2.0)
        density = np.exp(x * x * x.dtype.type(-0.5)) * x.dtype.type(1.0 / math.sqrt(2.0 * math.pi))
        return x * below, below + x * density
    if kind in ("silu", "gelu_tanh"):  # both are x · σ(u(x)): (1 + tanh(v)) / 2 = σ(2 v)
        if kind == "silu":
            u, du = x, np.ones_like(x)
        else:
            slope, cube = x.dtype.type(math.sqrt(8.0 / math.pi)), x.dtype.type(0.044715)
            u = slope * (x + cube * (x * x * x))
            du = slope * (one + x.dtype.type(3.0) * cube * (x * x))
        gate = one / (one + np.exp(np.clip(-u, -80, 80)))
        return x * gate, gate + x * gate * (one - gate) * du
    raise ValueError(f"activation {kind!r} is unknown; use gelu, gelu_tanh, relu or silu")


def activation_forward(x: Floats, bias: Floats | None, kind: Activation, out: Floats, derivative: Floats) -> None:
    """Compute out = f(x + bias) and derivative = f'(x + bias).

    Args:
        x: [..., F].
        bias: [F] or None.
        kind: which function.
        out: like x.
        derivative: like x; may be x itself.
    """
    biased = as_rows(x) if bias is None else as_rows(x) + bias
    as_rows(out)[:], as_rows(derivative)[:] = value_and_derivative(biased, kind)


def activation_backward(dy: Floats, derivative: Floats, dx: Floats, dbias: Floats | None) -> None:
    """Compute dx = dy · derivative, and dbias += column sums of dx.

    Args:
        dy: [..., F].
        derivative: from the forward pass.
        dx: written; may be dy or derivative.
        dbias: [F] or None.
    """
    np.multiply(as_rows(dy), as_rows(derivative), out=as_rows(dx))
    if dbias is not None:
        dbias += as_rows(dx).sum(axis=0)


def gated_forward(x: Floats, bias: Floats | None, kind: Activation, out: Floats) -> None:
    """Compute out = f(gate) · up.

    Args:
        x: gate and up side by side, [..., 2F]; kept for the backward pass.
        bias: [2F] or None; not added in place.
        kind: which function.
        out: [..., F].
    """
    biased = as_rows(x) if bias is None else as_rows(x) + bias
    gate, up = np.split(biased, 2, axis=1)
    np.multiply(value_and_derivative(gate, kind)[0], up, out=as_rows(out))


def gated_backward(
    dy: Floats, x: Floats, bias: Floats | None, kind: Activation, dx: Floats, dbias: Floats | None
) -> None:
    """Gradient of `gated_forward`; recomputes the activation from x, so that nothing but x is kept.

    Args:
        dy: [..., F].
        x: [..., 2F], as in the forward pass.
        bias: [2F] or None, as in the forward pass.
        kind: which function.
        dx: [..., 2F], written; may be x.
        dbias: [2F], added to, or None.
    """
    biased = as_rows(x) if bias is None else as_rows(x) + bias
    gate, up = np.split(biased, 2, axis=1)
    value, derivative = value_and_derivative(gate, kind)
    target, gradient = as_rows(dx), as_rows(dy)
    target[:] = np.concatenate([gradient * up * derivative, gradient * value], axis=1)
    if dbias is not None:
        dbias += target.sum(axis=0)
