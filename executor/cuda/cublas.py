"""Matrix products on the current stream through cuBLAS: the only module that calls it.

cuBLAS stores matrices by columns, so a row-major C-contiguous [M, N] is to it the transpose, [N, M]; the products here
compute outᵀ = op(b)ᵀ op(a)ᵀ and copy nothing. Products of 16-bit operands accumulate in float32 and may be stored in
16 bits or in float32; those of float32 run in float32, or in tf32 (mantissas of 10 bits; NVIDIA A100 whitepaper, 2020)
where `allow_tf32` says so. https://docs.nvidia.com/cuda/cublas/#cublasgemmex
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from cupy.cuda import device, runtime
from cupy_backends.cuda.libs import cublas

from executor.reference.arrays import Floats

_tf32 = [False]


def allow_tf32(allowed: bool) -> None:
    """Choose for the whole process whether products of float32 operands may round them to tf32."""
    _tf32[0] = allowed


def gemm(
    a: Floats,
    b: Floats,
    out: Floats,
    *,
    transpose_a: bool = False,
    transpose_b: bool = False,
    alpha: float = 1.0,
    accumulate: bool = False,
) -> None:
    """Compute out = alpha op(a) op(b), or out += alpha op(a) op(b).

    Args:
        a: [M, K], or [K, M] if transpose_a. Rows may be strided, elements of a row are adjacent.
        b: [K, N], or [N, K] if transpose_b; the type of a.
        out: [M, N]; the type of a, or float32 where that has 16 bits.
        transpose_a: use the transpose of a.
        transpose_b: use the transpose of b.
        alpha: factor of the product.
        accumulate: add to out.
    """
    m, k, n = _sizes(a.shape, b.shape, out.shape, transpose_a, transpose_b)
    if _is_empty(m, n, k, out, accumulate):
        return
    types, compute, scalars = _types(a, b, out)
    cublas.gemmEx(
        device.get_cublas_handle(), int(transpose_b), int(transpose_a), n, m, k, scalars(alpha),
        address(b), types[1], _leading(b), address(a), types[0], _leading(a), scalars(float(accumulate)),
        address(out), types[2], _leading(out), compute, cublas.CUBLAS_GEMM_DEFAULT,
    )  # fmt: skip


def gemm_batched(
    a: Floats,
    b: Floats,
    out: Floats,
    *,
    transpose_a: bool = False,
    transpose_b: bool = False,
    alpha: float = 1.0,
    accumulate: bool = False,
) -> None:
    """Compute `gemm` for each matrix of a batch: a, b and out have a first dimension more, with any stride.

    The stride of a and of b may be 0 (one matrix for the whole batch), not that of out.
    """
    count = out.shape[0]
    m, k, n = _sizes(a.shape[1:], b.shape[1:], out.shape[1:], transpose_a, transpose_b)
    assert a.shape[0] == b.shape[0] == count, "batches of one size"
    if count == 0 or _is_empty(m, n, k, out, accumulate):
        return
    types, compute, scalars = _types(a, b, out)
    cublas.gemmStridedBatchedEx(
        device.get_cublas_handle(), int(transpose_b), int(transpose_a), n, m, k, scalars(alpha),
        address(b), types[1], _leading(b), _batch_stride(b), address(a), types[0], _leading(a), _batch_stride(a),
        scalars(float(accumulate)), address(out), types[2], _leading(out), _batch_stride(out), count, compute,
        cublas.CUBLAS_GEMM_DEFAULT,
    )  # fmt: skip


def address(array: Any) -> int:
    """Where an array's first element lies on the device."""
    return int(array.data.ptr)


def _sizes(
    a: tuple[int, ...], b: tuple[int, ...], out: tuple[int, ...], transpose_a: bool, transpose_b: bool
) -> tuple[int, int, int]:
    """M, K and N of a product.

    Raises:
        ValueError: the shapes do not match.
    """
    m, k = a[::-1] if transpose_a else a
    inner, n = b[::-1] if transpose_b else b
    if inner != k or tuple(out) != (m, n):
        raise ValueError(f"matmul of [{m}, {k}] and [{inner}, {n}] into {list(out)}")
    return m, k, n


def _is_empty(m: int, n: int, k: int, out: Floats, accumulate: bool) -> bool:
    """Whether there is nothing to multiply; a sum of no terms is zero."""
    if m and n and k == 0 and not accumulate:
        out[...] = 0
    return 0 in (m, n, k)


def _leading(x: Floats) -> int:
    """Elements from one row of a matrix to the next; at least a row's length, whatever a single row's stride says."""
    assert x.shape[-1] <= 1 or x.strides[-1] == x.itemsize, "the elements of a row are adjacent"
    assert x.shape[-2] <= 1 or x.strides[-2] >= x.shape[-1] * x.itemsize, "rows do not overlap"
    step: int = x.strides[-2] // x.itemsize if x.shape[-2] > 1 else 0
    width: int = x.shape[-1]
    return max(step, width, 1)


def _batch_stride(x: Floats) -> int:
    return x.strides[0] // x.itemsize if x.shape[0] > 1 else 0


def _types(a: Floats, b: Floats, out: Floats) -> tuple[tuple[int, int, int], int, Any]:
    """The three types and the compute type by cuBLAS's names, and where it finds a number of that type."""
    assert a.dtype == b.dtype, f"a product of {a.dtype} and {b.dtype}"
    assert out.dtype == a.dtype or (a.itemsize == 2 and out.dtype == np.float32), f"{a.dtype} into {out.dtype}"
    names = (_type(a.dtype), _type(b.dtype), _type(out.dtype))
    if a.dtype == np.float64:
        return names, cublas.CUBLAS_COMPUTE_64F, _double
    fast = _tf32[0] and a.dtype == np.float32
    return names, cublas.CUBLAS_COMPUTE_32F_FAST_TF32 if fast else cublas.CUBLAS_COMPUTE_32F, _single


@functools.cache
def _type(dtype: np.dtype[Any]) -> int:
    names = {"float32": "CUDA_R_32F", "float64": "CUDA_R_64F", "float16": "CUDA_R_16F", "bfloat16": "CUDA_R_16BF"}
    return int(getattr(runtime, names[dtype.name]))


# cuBLAS reads factors from host memory during the call; these arrays live as long as the process.
@functools.cache
def _cell(value: float, name: str) -> Any:
    return np.array([value], name)


def _single(value: float) -> int:
    return int(_cell(value, "float32").ctypes.data)


def _double(value: float) -> int:
    return int(_cell(value, "float64").ctypes.data)
