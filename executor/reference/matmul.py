"""Matrix product into a given buffer."""

from __future__ import annotations

import numpy as np

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
    """Compute out = op(a) op(b), or out += op(a) op(b).

    Args:
        a: [M, K], or [K, M] if transpose_a. Rows may be strided, elements of a row are adjacent.
        b: [K, N], or [N, K] if transpose_b.
        out: [M, N]; may not overlap a or b.
        transpose_a: use the transpose of a.
        transpose_b: use the transpose of b.
        accumulate: add to out instead of overwriting it.
    """
    left, right = (a.T if transpose_a else a), (b.T if transpose_b else b)
    if accumulate:
        out += left @ right
    else:
        np.matmul(left, right, out=out)
