"""The BLAS behind compiled kernels: NumPy's own, found by name; SciPy's where NumPy has none."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from executor.fused.matmul import matmul

ALONE = """
import executor.blas as blas
blas.MODULES = {modules!r}
import numpy as np
from executor.fused.matmul import matmul
a, b = (np.random.default_rng(i).standard_normal((70, 70)).astype({dtype!r}) for i in range(2))
out = np.ones_like(a)
matmul(a, b, out, transpose_b=True, accumulate=True)
print(np.abs(out - (1 + a @ b.T)).max())
"""


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", [(120, 128, 64), (300, 513, 257)])  # a small product, and one that is packed
def test_kernels_multiply_with_the_library_of_numpy(dtype, shape):
    m, n, k = shape
    generator = np.random.default_rng(3)
    a, b = generator.standard_normal((k, m)).astype(dtype), generator.standard_normal((k, n)).astype(dtype)
    out = np.empty((m, n), dtype)
    matmul(a, b, out, transpose_a=True)
    np.testing.assert_array_equal(out, a.T @ b)  # bit for bit: the same routine on the same operands


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_library_with_32_bit_integers_serves_too(dtype):
    code = ALONE.format(modules=("scipy.linalg.cython_blas",), dtype=dtype)
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert float(said) < {"float32": 1e-4, "float64": 1e-12}[dtype]


def test_without_a_blas_the_readable_kernels_run():
    code = "import executor.blas as b; b.MODULES = (); from executor import kernels; print(kernels.FUSED)"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.split() == ["False"]
