"""The functions of `executor.cuda.cublas` in NumPy, for arrays that live on the host."""

from __future__ import annotations

from typing import Any

import numpy as np

_tf32 = [False]


def allow_tf32(allowed: bool) -> None:
    """Round float32 operands to 10 mantissa bits from now on, or no longer."""
    _tf32[0] = allowed


def _operand(x: Any, transpose: bool) -> Any:
    """The matrix to multiply, in the type that the product accumulates in."""
    x = np.asarray(x).astype(np.float64 if x.dtype == np.float64 else np.float32)
    if _tf32[0] and x.dtype == np.float32:
        bits = x.view(np.uint32)
        x = ((bits + 0xFFF + (bits >> 13 & 1)) & np.uint32(0xFFFFE000)).view(np.float32)
    return np.swapaxes(x, -1, -2) if transpose else x


def gemm(
    a: Any, b: Any, out: Any, *, transpose_a: bool = False, transpose_b: bool = False, alpha: float = 1.0,
    accumulate: bool = False,
) -> None:  # fmt: skip
    """See `executor.cuda.cublas.gemm`."""
    assert a.dtype == b.dtype, f"a product of {a.dtype} and {b.dtype}"
    assert out.dtype == a.dtype or (a.itemsize == 2 and out.dtype == np.float32), f"{a.dtype} into {out.dtype}"
    left, right = _operand(a, transpose_a), _operand(b, transpose_b)
    if left.shape[-1] != right.shape[-2] or out.shape[-2:] != (left.shape[-2], right.shape[-1]):
        raise ValueError(f"matmul of {list(left.shape)} and {list(right.shape)} into {list(out.shape)}")
    product = (left @ right) * left.dtype.type(alpha)
    target = np.asarray(out)
    target[...] = (product + target.astype(product.dtype) if accumulate else product).astype(out.dtype)


def gemm_batched(a: Any, b: Any, out: Any, **flags: Any) -> None:
    """See `executor.cuda.cublas.gemm_batched`."""
    assert a.shape[0] == b.shape[0] == out.shape[0], "batches of one size"
    assert out.shape[0] <= 1 or out.strides[0] != 0, "results of a batch lie apart"
    gemm(a, b, out, **flags)
