"""Matrix products through BLAS, from Python and from inside other kernels."""

from __future__ import annotations

from typing import Any

from llvmlite import binding, ir  # type: ignore[import-untyped]
from numba import types
from numba.core import cgutils as untyped_cgutils

from executor.blas import gemm_addresses
from executor.fused.compile import helper, intrinsic, kernel
from executor.reference.arrays import Floats

cgutils: Any = untyped_cgutils

GEMM = {types.float32: "meshwright_sgemm", types.float64: "meshwright_dgemm"}
"""What compiled code calls NumPy's cblas_?gemm: cached kernels find it by name in every process."""

for _symbol, _address in zip(GEMM.values(), gemm_addresses() or (), strict=False):
    binding.add_symbol(_symbol, _address)

ROW_MAJOR, AS_STORED, TRANSPOSED = 101, 111, 112  # of cblas.h


@intrinsic  # type: ignore[untyped-decorator]
def _xgemm(
    typing_context: Any, ta: Any, tb: Any, m: Any, n: Any, k: Any, alpha: Any, a: Any, lda: Any, b: Any, ldb: Any,
    beta: Any, c: Any, ldc: Any,
) -> Any:  # fmt: skip
    """cblas_?gemm on row-major matrices.

    Sizes are passed as 64 bits whatever the library's integers are: one of 32 bits reads the low half of the same
    register or 8-byte stack slot (the calling conventions of x86-64 and AArch64 on Linux).
    """
    size = types.intp
    signature = types.void(types.boolean, types.boolean, size, size, size, c.dtype, a, size, b, size, c.dtype, c, size)

    def generate(context: Any, builder: Any, sig: Any, arguments: Any) -> Any:
        ta, tb, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc = arguments
        integer, pointer = ir.IntType(32), ir.IntType(8).as_pointer()

        def form(flag: Any) -> Any:
            return builder.select(builder.trunc(flag, ir.IntType(1)), integer(TRANSPOSED), integer(AS_STORED))

        def data(kind: Any, value: Any) -> Any:
            return builder.bitcast(context.make_array(kind)(context, builder, value).data, pointer)

        actual = [
            integer(ROW_MAJOR), form(ta), form(tb), m, n, k, alpha, data(sig.args[6], a), lda,
            data(sig.args[8], b), ldb, beta, data(sig.args[11], c), ldc,
        ]  # fmt: skip
        prototype = ir.FunctionType(ir.VoidType(), [value.type for value in actual])
        function = cgutils.get_or_insert_function(builder.module, prototype, GEMM[sig.args[11].dtype])
        builder.call(function, actual)
        return context.get_dummy_value()

    return signature, generate


@helper
def leading(x: Any) -> Any:
    """Elements from one row of x [M, N] to the next."""
    return max(x.strides[0] // x.itemsize, x.shape[1], 1)


@helper
def gemm(alpha: Any, a: Any, transpose_a: Any, b: Any, transpose_b: Any, beta: Any, out: Any) -> None:
    """Compute out = alpha op(a) op(b) + beta out."""
    m, n = out.shape
    k = a.shape[0] if transpose_a else a.shape[1]
    if m > 0 and n > 0:
        _xgemm(transpose_a, transpose_b, m, n, k, alpha, a, leading(a), b, leading(b), beta, out, leading(out))


@kernel("void(T[:, :], T[:, :], T[:, :], boolean, boolean, T)")
def _matmul(a: Any, b: Any, out: Any, transpose_a: Any, transpose_b: Any, beta: Any) -> None:
    gemm(out.dtype.type(1.0), a, transpose_a, b, transpose_b, beta, out)


def _adjacent(x: Floats) -> bool:
    return x.ndim == 2 and (x.shape[1] <= 1 or x.strides[1] == x.itemsize) and (x.shape[0] <= 1 or x.strides[0] >= 0)


def matmul(
    a: Floats,
    b: Floats,
    out: Floats,
    *,
    transpose_a: bool = False,
    transpose_b: bool = False,
    accumulate: bool = False,
) -> None:
    """See `executor.reference.matmul.matmul`."""
    rows, inner = a.shape[::-1] if transpose_a else a.shape
    inner_b, columns = b.shape[::-1] if transpose_b else b.shape
    if inner != inner_b or out.shape != (rows, columns):
        raise ValueError(f"matmul of [{rows}, {inner}] and [{inner_b}, {columns}] into {list(out.shape)}")
    assert _adjacent(a) and _adjacent(b) and _adjacent(out), "BLAS takes strided rows of adjacent elements"
    _matmul[out.dtype](a, b, out, transpose_a, transpose_b, 1.0 if accumulate else 0.0)
