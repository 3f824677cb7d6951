"""Activation functions with bias, plain and gated: value and derivative in one vectorised pass."""

from __future__ import annotations

from typing import Any

import numpy as np

from executor.fused.compile import exact_helper, kernel
from executor.fused.maths import exp, normal
from executor.fused.rows import BLOCK_ROWS, add_to, copy_to, vector_or_empty, vector_or_zeros
from executor.reference.arrays import Activation, Floats, as_rows

KINDS = {"gelu": 0, "gelu_tanh": 1, "relu": 2, "silu": 3}


def _number_of(kind: Activation) -> int:
    try:
        return KINDS[kind]
    except KeyError:
        raise ValueError(f"activation {kind!r} is unknown; use gelu, gelu_tanh, relu or silu") from None


@exact_helper
def gelu(x: Any) -> Any:
    """X Φ(x) and its derivative Φ(x) + x φ(x)."""
    below, moment = normal(x)
    return x * below, below + (moment if x > 0 else -moment)


@exact_helper
def gelu_tanh(x: Any) -> Any:
    """X σ(u) and its derivative, u = sqrt(8 / π) (x + 0.044715 x³): the tanh form, as (1 + tanh(v)) / 2 = σ(2 v)."""
    real = type(x)
    one = real(1.0)
    square = x * x
    u = x * (real(1.5957691216057308) + real(0.07135481627260025) * square)
    du = real(1.5957691216057308) + real(0.21406444881780074) * square
    gate = one / (one + exp(-u))
    return x * gate, gate + x * gate * (one - gate) * du


@exact_helper
def relu(x: Any) -> Any:
    """max(x, 0) and its derivative, 0 at 0."""
    real = type(x)
    return (x if not x <= 0 else real(0.0)), (real(1.0) if x > 0 else real(0.0))


@exact_helper
def silu(x: Any) -> Any:
    """X σ(x) and its derivative."""
    one = type(x)(1.0)
    gate = one / (one + exp(-x))
    return x * gate, gate + x * gate * (one - gate)


@kernel("void(T[:, ::1], T[::1], int64, T[:, ::1], T[:, ::1])")
def _activation_forward(x: Any, bias: Any, kind: Any, out: Any, derivative: Any) -> None:
    slope = np.empty(x.shape[1], x.dtype)
    for t in range(x.shape[0]):
        if kind == 0:
            for j in range(x.shape[1]):
                out[t, j], slope[j] = gelu(x[t, j] + bias[j])
        elif kind == 1:
            for j in range(x.shape[1]):
                out[t, j], slope[j] = gelu_tanh(x[t, j] + bias[j])
        elif kind == 2:
            for j in range(x.shape[1]):
                out[t, j], slope[j] = relu(x[t, j] + bias[j])
        else:
            for j in range(x.shape[1]):
                out[t, j], slope[j] = silu(x[t, j] + bias[j])
        copy_to(derivative[t], slope)


def activation_forward(x: Floats, bias: Floats | None, kind: Activation, out: Floats, derivative: Floats) -> None:
    """See `executor.reference.activation.activation_forward`."""
    rows, bias = as_rows(x), vector_or_zeros(bias, x)
    _activation_forward[x.dtype](rows, bias, _number_of(kind), as_rows(out), as_rows(derivative))


@kernel("void(T[:, ::1], T[:, ::1], T[:, ::1], T[::1])")
def _activation_backward(dy: Any, derivative: Any, dx: Any, dbias: Any) -> None:
    rows, width = dy.shape
    part, result = np.zeros(dbias.size, dy.dtype), np.empty(width, dy.dtype)
    for start in range(0, rows, BLOCK_ROWS):
        for t in range(start, min(start + BLOCK_ROWS, rows)):
            for j in range(width):
                result[j] = dy[t, j] * derivative[t, j]
            copy_to(dx[t], result)
            for j in range(part.size):
                part[j] += result[j]
        add_to(dbias, part)


def activation_backward(dy: Floats, derivative: Floats, dx: Floats, dbias: Floats | None) -> None:
    """See `executor.reference.activation.activation_backward`."""
    _activation_backward[dy.dtype](as_rows(dy), as_rows(derivative), as_rows(dx), vector_or_empty(dbias, dy))


@kernel("void(T[:, ::1], T[::1], int64, T[:, ::1])")
def _gated_forward(x: Any, bias: Any, kind: Any, out: Any) -> None:
    rows, width = out.shape
    for t in range(rows):
        gate, up = x[t, :width], x[t, width:]
        gate_bias, up_bias = bias[:width], bias[width:]
        if kind == 0:
            for j in range(width):
                out[t, j] = gelu(gate[j] + gate_bias[j])[0] * (up[j] + up_bias[j])
        elif kind == 1:
            for j in range(width):
                out[t, j] = gelu_tanh(gate[j] + gate_bias[j])[0] * (up[j] + up_bias[j])
        elif kind == 2:
            for j in range(width):
                out[t, j] = relu(gate[j] + gate_bias[j])[0] * (up[j] + up_bias[j])
        else:
            for j in range(width):
                out[t, j] = silu(gate[j] + gate_bias[j])[0] * (up[j] + up_bias[j])


def gated_forward(x: Floats, bias: Floats | None, kind: Activation, out: Floats) -> None:
    """See `executor.reference.activation.gated_forward`."""
    _gated_forward[x.dtype](as_rows(x), vector_or_zeros(bias, x), _number_of(kind), as_rows(out))


@exact_helper
def _gated_slopes(gate: Any, up: Any, dy: Any, kind: Any) -> Any:
    """Gradients of f(gate) · up for gate and up."""
    if kind == 0:
        value, derivative = gelu(gate)
    elif kind == 1:
        value, derivative = gelu_tanh(gate)
    elif kind == 2:
        value, derivative = relu(gate)
    else:
        value, derivative = silu(gate)
    return dy * up * derivative, dy * value


@kernel("void(T[:, ::1], T[:, ::1], T[::1], int64, T[:, ::1], T[::1])")
def _gated_backward(dy: Any, x: Any, bias: Any, kind: Any, dx: Any, dbias: Any) -> None:
    rows, width = dy.shape
    part, result = np.zeros(dbias.size, dy.dtype), np.empty(2 * width, dy.dtype)
    dgate, dup = result[:width], result[width:]
    for start in range(0, rows, BLOCK_ROWS):
        for t in range(start, min(start + BLOCK_ROWS, rows)):
            gate, up = x[t, :width], x[t, width:]
            gate_bias, up_bias = bias[:width], bias[width:]
            if kind == 0:
                for j in range(width):
                    dgate[j], dup[j] = _gated_slopes(gate[j] + gate_bias[j], up[j] + up_bias[j], dy[t, j], 0)
            elif kind == 1:
                for j in range(width):
                    dgate[j], dup[j] = _gated_slopes(gate[j] + gate_bias[j], up[j] + up_bias[j], dy[t, j], 1)
            elif kind == 2:
                for j in range(width):
                    dgate[j], dup[j] = _gated_slopes(gate[j] + gate_bias[j], up[j] + up_bias[j], dy[t, j], 2)
            else:
                for j in range(width):
                    dgate[j], dup[j] = _gated_slopes(gate[j] + gate_bias[j], up[j] + up_bias[j], dy[t, j], 3)
            copy_to(dx[t], result)
            for j in range(part.size):
                part[j] += result[j]
        add_to(dbias, part)


def gated_backward(
    dy: Floats, x: Floats, bias: Floats | None, kind: Activation, dx: Floats, dbias: Floats | None
) -> None:
    """See `executor.reference.activation.gated_backward`."""
    bias, dbias = vector_or_zeros(bias, x), vector_or_empty(dbias, x)
    _gated_backward[x.dtype](as_rows(dy), as_rows(x), bias, _number_of(kind), as_rows(dx), dbias)
