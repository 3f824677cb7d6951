"""Optimizer updates in place on flat arrays, and the norms and scalings that gradient clipping needs."""

from __future__ import annotations

import math

import numpy as np

from executor.reference.arrays import Floats


def sgd(param: Floats, grad: Floats, lr: float, working: Floats | None = None) -> None:
    """Compute param -= lr · grad, both [N]; working, where there is one, is param rounded to its type."""
    param -= param.dtype.type(lr) * grad
    if working is not None:
        working[...] = param


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
    """One step of Adam with decoupled weight decay (Loshchilov & Hutter 2019, algorithm 2), in PyTorch's order.

    Args:
        param: [N], changed in place.
        grad: [N].
        m: running mean of the gradient [N], changed in place.
        v: running mean of its square [N], changed in place.
        lr: learning rate.
        beta1: decay of m.
        beta2: decay of v.
        epsilon: added to the bias-corrected root of v.
        weight_decay: param shrinks by lr · weight_decay.
        step: 1 for the first update.
        working: param rounded to this array's type [N], where a copy is kept for the kernels to read.
    """
    real = param.dtype.type
    param *= real(1.0 - lr * weight_decay)
    m += (grad - m) * real(1.0 - beta1)
    v *= real(beta2)
    v += real(1.0 - beta2) * grad * grad
    root = np.sqrt(v) * real(1.0 / math.sqrt(1.0 - beta2**step)) + real(epsilon)
    param -= real(lr / (1.0 - beta1**step)) * m / root
    if working is not None:
        working[...] = param


def sum_of_squares(grad: Floats) -> float:
    """Sum of the squares of a flat array, in float64."""
    wide = grad.astype(np.float64)
    return float(wide @ wide)


def scale(grad: Floats, factor: float) -> None:
    """Compute grad *= factor."""
    grad *= grad.dtype.type(factor)
