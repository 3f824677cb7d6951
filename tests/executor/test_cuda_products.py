"""Matrix products of the CUDA kernels: what cuBLAS is asked for, on a library that does what its manual says."""

from __future__ import annotations

import ctypes
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from cuda_cases import ALL_DTYPES, BFLOAT16, Maker, close, wide
from cuda_on_cpu import backend as backends
from cuda_on_cpu import blas
from hypothesis import given, settings
from hypothesis import strategies as st

import executor

TYPES = {0: np.dtype(np.float32), 1: np.dtype(np.float64), 2: np.dtype(np.float16), 14: BFLOAT16}
COMPUTE = {68: np.float32, 77: np.float32, 70: np.float64}  # cublasComputeType_t: 32F, 32F_FAST_TF32, 64F


def matrix(address: int, dtype: np.dtype[Any], rows: int, columns: int, leading: int) -> Any:
    """The column-major matrix at an address."""
    assert leading >= max(1, rows), "cuBLAS refuses a leading dimension below the rows"
    room = (ctypes.c_uint8 * (((columns - 1) * leading + rows) * dtype.itemsize)).from_address(address)
    flat = np.frombuffer(room, dtype)
    return np.lib.stride_tricks.as_strided(flat, (rows, columns), (dtype.itemsize, leading * dtype.itemsize))


class Library(ModuleType):
    """cublasGemmEx and cublasGemmStridedBatchedEx on host memory, column-major as in their manual."""

    CUBLAS_COMPUTE_32F, CUBLAS_COMPUTE_32F_FAST_TF32, CUBLAS_COMPUTE_64F, CUBLAS_GEMM_DEFAULT = 68, 77, 70, -1
    calls: list[int]

    def gemmEx(
        self, handle, ta, tb, m, n, k, alpha, a, a_type, lda, b, b_type, ldb, beta, c, c_type, ldc, compute, algo
    ):
        """Compute C = alpha op(A) op(B) + beta C."""
        assert (handle, algo) == (4711, -1)
        self.calls.append(compute)
        wide_type = np.dtype(COMPUTE[compute])
        first = matrix(a, TYPES[a_type], *((k, m) if ta else (m, k)), lda).astype(wide_type)
        second = matrix(b, TYPES[b_type], *((n, k) if tb else (k, n)), ldb).astype(wide_type)
        out = matrix(c, TYPES[c_type], m, n, ldc)
        factor, onto = (
            wide_type.type(np.ctypeslib.as_array(ctypes.cast(x, ctypes.POINTER(kind)), (1,))[0])
            for kind in [ctypes.c_double if compute == 70 else ctypes.c_float]
            for x in (alpha, beta)
        )
        product = factor * ((first.T if ta else first) @ (second.T if tb else second))
        out[...] = (product + onto * out.astype(wide_type) if onto else product).astype(out.dtype)

    def gemmStridedBatchedEx(
        self, handle, ta, tb, m, n, k, alpha, a, a_type, lda, stride_a, b, b_type, ldb, stride_b, beta, c, c_type, ldc,
        stride_c, count, compute, algo,
    ):  # fmt: skip
        """One product per matrix of the batch."""
        for i in range(count):
            places = [
                at + i * stride * TYPES[kind].itemsize
                for at, stride, kind in ((a, stride_a, a_type), (b, stride_b, b_type), (c, stride_c, c_type))
            ]
            self.gemmEx(
                handle, ta, tb, m, n, k, alpha, places[0], a_type, lda, places[1], b_type, ldb, beta, places[2],
                c_type, ldc, compute, algo,
            )  # fmt: skip


@pytest.fixture(scope="module")
def products() -> Any:
    """`executor.cuda.cublas` itself, over that library."""
    library = Library("cupy_backends.cuda.libs.cublas")
    library.calls = []
    device, runtime = ModuleType("cupy.cuda.device"), ModuleType("cupy.cuda.runtime")
    device.get_cublas_handle = lambda: 4711
    runtime.CUDA_R_32F, runtime.CUDA_R_64F, runtime.CUDA_R_16F, runtime.CUDA_R_16BF = 0, 1, 2, 14
    cuda, libs = ModuleType("cupy.cuda"), ModuleType("cupy_backends.cuda.libs")
    cuda.device, cuda.runtime, libs.cublas = device, runtime, library
    fakes = {"cupy": ModuleType("cupy"), "cupy.cuda": cuda, "cupy_backends": ModuleType("cupy_backends")}
    fakes |= {"cupy_backends.cuda": ModuleType("cupy_backends.cuda"), "cupy_backends.cuda.libs": libs}
    path = Path(executor.__file__).parent / "cuda" / "cublas.py"
    spec = importlib.util.spec_from_file_location("cublas_under_test", path)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        for name, fake in fakes.items():
            patch.setitem(sys.modules, name, fake)
        spec.loader.exec_module(module)
    module.address = lambda array: array.ctypes.data
    module.library = library
    return module


sizes = st.integers(1, 9)


def operand(make: Any, batch: tuple[int, ...], rows: int, columns: int, transpose: bool, spare: int) -> Any:
    """A matrix or its transpose as a view with strided rows."""
    rows, columns = (columns, rows) if transpose else (rows, columns)
    return make(*batch, rows, columns + spare)[..., :columns]


@settings(deadline=None, max_examples=60)
@given(
    sizes, sizes, st.integers(0, 9), *[st.booleans()] * 3, st.integers(0, 3), st.sampled_from(ALL_DTYPES), st.booleans()
)
def test_products_of_row_major_views(products, m, n, k, ta, tb, accumulate, spare, dtype, widen):
    make = Maker(dtype, m * 100 + n)
    a, b = operand(make, (), m, k, ta, spare), operand(make, (), k, n, tb, spare)
    frame = (make.wide if widen else make)(m, n + spare)
    out, outside = frame[:, :n], frame[:, n:].copy()
    expected = 0.5 * (a.T if ta else a).astype(wide(dtype)) @ (b.T if tb else b).astype(wide(dtype))
    expected = expected + out.astype(wide(dtype)) if accumulate else expected
    products.gemm(a, b, out, transpose_a=ta, transpose_b=tb, alpha=0.5, accumulate=accumulate)
    close(out, expected, out.dtype, 2)
    np.testing.assert_array_equal(frame[:, n:], outside)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 4), sizes, sizes, sizes, *[st.booleans()] * 4, st.sampled_from(ALL_DTYPES))
def test_batched_products_over_heads_of_a_packed_buffer(products, heads, m, n, k, ta, tb, accumulate, shared, dtype):
    """Operands lie [S, heads, d]: the heads are a batch without a copy; one of them may serve all."""
    make = Maker(dtype, m * 100 + n)

    def by_head(rows: int, columns: int, transpose: bool) -> Any:
        rows, columns = (columns, rows) if transpose else (rows, columns)
        return make(rows, heads + 2, columns).transpose(1, 0, 2)[1 : heads + 1]

    a, b, out = by_head(m, k, ta), by_head(k, n, tb), make.wide(heads, m, n)
    if shared and heads:
        b = np.broadcast_to(b[:1], b.shape)
    flags = {"transpose_a": ta, "transpose_b": tb, "alpha": -2.0, "accumulate": accumulate}
    expected = out.copy()
    blas.gemm_batched(a, b, expected, **flags)
    products.gemm_batched(a, b, out, **flags)
    close(out, expected, out.dtype, 2)


def test_tf32_is_asked_for_by_float32_products_only_and_only_if_allowed(products):
    one = {dtype: np.ones((1, 1), dtype) for dtype in ALL_DTYPES}
    asked = {}
    for allowed in (False, True):
        products.allow_tf32(allowed)
        for dtype, x in one.items():
            products.library.calls.clear()
            products.gemm(x, x, x.copy())
            asked[allowed, dtype.name] = products.library.calls[0]
    products.allow_tf32(False)
    assert asked[True, "float32"] == 77
    assert asked[False, "float32"] == asked[True, "bfloat16"] == asked[True, "float16"] == 68
    assert asked[True, "float64"] == 70


def test_shapes_that_do_not_match_are_refused(products):
    with pytest.raises(ValueError, match=r"matmul of \[2, 3\] and \[4, 5\] into \[2, 5\]"):
        products.gemm(np.zeros((2, 3)), np.zeros((4, 5)), np.zeros((2, 5)))


def test_the_numpy_forms_have_the_same_parameters(products):
    import inspect

    assert inspect.signature(products.gemm).replace(return_annotation=None).parameters.keys() == (
        inspect.signature(blas.gemm).parameters.keys()
    )


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize("ta", [False, True])
@pytest.mark.parametrize("tb", [False, True])
def test_matmul_of_the_kernel_table(dtype, ta, tb):
    """On a GPU this is cuBLAS itself; weight gradients of 16-bit operands go into float32."""
    backend = backends.best()
    if backend is None:
        pytest.skip("no GPU, and no g++ to emulate one")
    make, m, n, k = Maker(dtype), 33, 20, 17
    a, b = make(*((k, m) if ta else (m, k))), make(*((n, k) if tb else (k, n)))
    for out in (make(m, n), make.wide(m, n)):
        for accumulate in (False, True):
            expected = (a.T if ta else a).astype(np.float64) @ (b.T if tb else b).astype(np.float64)
            expected = expected + out.astype(np.float64) if accumulate else expected
            result = backend.upload(out)
            backend.kernels.matmul(
                backend.upload(a), backend.upload(b), result, transpose_a=ta, transpose_b=tb, accumulate=accumulate
            )
            close(backend.download(result), expected, out.dtype, 4)
