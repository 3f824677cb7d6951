"""Matrix product into a given buffer, on the device."""

from __future__ import annotations

from executor.cuda import cublas
from executor.reference.arrays import Floats


def matmul(
    a: Floats,
    b: Floats,
    out: Floats,
    *,
    transpose_a: bool = False,
    transpose_b: bool = False,
    accumulate: bool = False,
) -> None:
    """See `executor.reference.matmul.matmul`; out may be float32 where a and b have 16 bits."""
    cublas.gemm(a, b, out, transpose_a=transpose_a, transpose_b=transpose_b, accumulate=accumulate)
