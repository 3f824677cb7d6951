"""The array types that kernels take."""

from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

Floats: TypeAlias = npt.NDArray[np.floating[Any]]
"""float32 or float64; all floating arrays of one call have the same dtype."""

Ints: TypeAlias = npt.NDArray[np.int64]

Activation: TypeAlias = Literal["gelu", "gelu_tanh", "relu", "silu"]

ALIGNMENT = 64  # bytes: one cache line, one AVX-512 register


def aligned_bytes(nbytes: int) -> npt.NDArray[np.uint8]:
    """Return uninitialised host memory that begins on a cache line."""
    space = np.empty(nbytes + ALIGNMENT, np.uint8)
    start = -space.ctypes.data % ALIGNMENT
    return space[start : start + nbytes]


def as_rows(x: Floats) -> Floats:
    """View a C-contiguous [..., N] array as [T, N] rows."""
    assert x.flags.c_contiguous, "kernels work in place: a view, never a copy"
    return x if x.ndim == 2 else x.reshape(-1, x.shape[-1])
