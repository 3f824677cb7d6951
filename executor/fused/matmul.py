"""Matrix products through BLAS, from Python and from inside other kernels."""

from __future__ import annotations

from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.core import cgutils as untyped_cgutils
from numba.np import linalg as untyped_linalg

from executor.fused.compile import helper, intrinsic, kernel
from executor.reference.arrays import Floats

cgutils: Any = untyped_cgutils
linalg: Any = untyped_linalg


@intrinsic  # type: ignore[untyped-decorator]
def _xgemm(
    typing_context: Any, ta: Any, tb: Any, m: Any, n: Any, k: Any, alpha: Any, a: Any, lda: Any, b: Any, ldb: Any,
    beta: Any, c: Any, ldc: Any,
) -> Any:  # fmt: skip
    """Column-major ?gemm of scipy.linalg.cython_blas, through the C function that Numba's own np.dot calls."""
    integer = types.intp
    signature = types.void(
        types.boolean, types.boolean, integer, integer, integer, c.dtype, a, integer, b, integer, c.dtype, c, integer
    )
    kind = ord("s") if c.dtype == types.float32 else ord("d")

    def generate(context: Any, builder: Any, sig: Any, arguments: Any) -> Any:
        linalg.ensure_blas()
        ta, tb, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc = arguments
        char, size, pointer = ir.IntType(8), cgutils.intp_t, ir.IntType(8).as_pointer()

        def letter(flag: Any) -> Any:
            return builder.select(builder.trunc(flag, ir.IntType(1)), char(ord("t")), char(ord("n")))

        def slot(value: Any) -> Any:
            return builder.bitcast(cgutils.alloca_once_value(builder, value), pointer)

        def data(kind: Any, value: Any) -> Any:
            return builder.bitcast(context.make_array(kind)(context, builder, value).data, pointer)

        function = cgutils.get_or_insert_function(
            builder.module,
            ir.FunctionType(
                ir.IntType(32),
                [char, char, char, size, size, size, pointer, pointer, size, pointer, size, pointer, pointer, size],
            ),
            "numba_xxgemm",
        )
        builder.call(
            function,
            [
                char(kind), letter(ta), letter(tb), m, n, k, slot(alpha), data(sig.args[6], a), lda,
                data(sig.args[8], b), ldb, slot(beta), data(sig.args[11], c), ldc,
            ],
        )  # fmt: skip
        return context.get_dummy_value()

    return signature, generate


@helper
def leading(x: Any) -> Any:
    """Elements from one row of x [M, N] to the next."""
    return max(x.strides[0] // x.itemsize, x.shape[1], 1)


@helper
def gemm(alpha: Any, a: Any, transpose_a: Any, b: Any, transpose_b: Any, beta: Any, out: Any) -> None:
    """Compute out = alpha op(a) op(b) + beta out, row-major: BLAS computes the transposed problem."""
    m, n = out.shape
    k = a.shape[0] if transpose_a else a.shape[1]
    if m > 0 and n > 0:
        _xgemm(transpose_b, transpose_a, n, m, k, alpha, b, leading(b), a, leading(a), beta, out, leading(out))


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
