"""Optimizer updates in place on flat arrays of the device, and the norms and scalings that gradient clipping needs.

An update writes the copy of the parameters in 16 bits that the kernels read in the same pass.
"""

from __future__ import annotations

import math
from typing import Any

import cupy
import numpy as np

from executor.cuda.launch import BLOCK_THREADS, MOST_BLOCKS, arithmetic, ceil_div, launch, vector_size
from executor.reference.arrays import Floats


def _grid(size: int, dtype: np.dtype[Any]) -> tuple[int]:
    return (max(1, min(MOST_BLOCKS, ceil_div(size, BLOCK_THREADS * vector_size(dtype)))),)


def sgd(param: Floats, grad: Floats, lr: float, working: Floats | None = None) -> None:
    """See `executor.reference.optimizer.sgd`."""
    dtype = _storage(param, grad, working)
    if param.size:
        arguments = (param, grad, float(lr), working, param.size)
        launch("optimizer", "sgd", dtype, _grid(param.size, param.dtype), (BLOCK_THREADS,), *arguments)


def _storage(param: Floats, grad: Floats, working: Floats | None) -> np.dtype[Any]:
    """The type to compile for: that of the working copy, which also settles the type of the state."""
    dtype = param.dtype if working is None else working.dtype
    assert param.dtype == grad.dtype == arithmetic(dtype), "parameters and gradients are float32, or float64"
    return dtype


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
    dtype = _storage(param, grad, working)
    root_scale, rate = 1.0 / math.sqrt(1.0 - beta2**step), lr / (1.0 - beta1**step)
    constants = (1.0 - lr * weight_decay, 1.0 - beta1, beta2, 1.0 - beta2, root_scale, rate, epsilon)
    if param.size:
        arguments = (param, grad, m, v, *map(float, constants), working, param.size)
        launch("optimizer", "adamw", dtype, _grid(param.size, param.dtype), (BLOCK_THREADS,), *arguments)


def sum_of_squares(grad: Floats) -> Any:
    """See `executor.reference.optimizer.sum_of_squares`.

    Returns:
        A float64 array of no dimensions on the device, so that nobody waits: it adds like a number, and `float` fetches
        it. It is finite exactly if every element is: the squares of float32 do not overflow float64.
    """
    grid = _grid(grad.size, grad.dtype)
    partials, total = cupy.empty(grid, np.float64), cupy.empty((), np.float64)
    launch("optimizer", "sum_of_squares", grad.dtype, grid, (BLOCK_THREADS,), grad, partials, grad.size)
    launch("optimizer", "sum_partials", grad.dtype, (1,), (BLOCK_THREADS,), partials, grid[0], total)
    return total


def scale(grad: Floats, factor: float) -> None:
    """See `executor.reference.optimizer.scale`."""
    if grad.size:
        arguments = (grad, float(factor), grad.size)
        launch("optimizer", "scale", grad.dtype, _grid(grad.size, grad.dtype), (BLOCK_THREADS,), *arguments)
