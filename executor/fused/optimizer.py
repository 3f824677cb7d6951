"""Optimizer updates: each array is read once and written once."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from executor.fused.compile import EXACT, kernel
from executor.reference.arrays import Floats


@kernel("void(T[::1], T[::1], T)", EXACT)
def _sgd(param: Any, grad: Any, lr: Any) -> None:
    for i in range(param.size):
        param[i] -= lr * grad[i]


def sgd(param: Floats, grad: Floats, lr: float, working: Floats | None = None) -> None:
    """See `executor.reference.optimizer.sgd`."""
    _sgd[param.dtype](param, grad, lr)
    if working is not None:  # Numba has no bfloat16
        working[...] = param


@kernel("void(T[::1], T[::1], T[::1], T[::1], T, T, T, T, T, T, T)", EXACT)
def _adamw(
    param: Any, grad: Any, m: Any, v: Any, shrink: Any, rise1: Any, beta2: Any, rise2: Any, root_scale: Any, rate: Any,
    epsilon: Any,
) -> None:  # fmt: skip
    for i in range(param.size):
        g = grad[i]
        mean = m[i] + (g - m[i]) * rise1
        square = v[i] * beta2 + rise2 * g * g
        m[i] = mean
        v[i] = square
        param[i] = param[i] * shrink - rate * mean / (np.sqrt(square) * root_scale + epsilon)


def adamw(
    param: Floats,
    grad: Floats,
    m: Floats,
    v: Floats,
    lr: float,
    beta1: float,
    beta2: float,
    epsilon: float,
    weight_decay: float,
    step: int,
    working: Floats | None = None,
) -> None:
    """See `executor.reference.optimizer.adamw`."""
    root_scale, rate = 1.0 / math.sqrt(1.0 - beta2**step), lr / (1.0 - beta1**step)
    shrink = 1.0 - lr * weight_decay
    _adamw[param.dtype](param, grad, m, v, shrink, 1.0 - beta1, beta2, 1.0 - beta2, root_scale, rate, epsilon)
    if working is not None:
        working[...] = param


@kernel("float64(T[::1])")
def _sum_of_squares(grad: Any) -> Any:
    total = 0.0
    for i in range(grad.size):
        total += np.float64(grad[i]) * np.float64(grad[i])
    return total


def sum_of_squares(grad: Floats) -> float:
    """See `executor.reference.optimizer.sum_of_squares`."""
    return float(_sum_of_squares[grad.dtype](grad))


@kernel("void(T[::1], T)", EXACT)
def _scale(grad: Any, factor: Any) -> None:
    for i in range(grad.size):
        grad[i] *= factor


def scale(grad: Floats, factor: float) -> None:
    """See `executor.reference.optimizer.scale`."""
    _scale[grad.dtype](grad, factor)
