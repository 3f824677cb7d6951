"""The BLAS that NumPy multiplies with, as C functions that compiled kernels call.

SciPy brings a BLAS of its own, usually an older release. Kernels that called that one would run at another speed than
`np.matmul`, and with several threads the idle ones of one library would spin on the cores that the other's need.
"""

from __future__ import annotations

import ctypes
import functools
import importlib

SYMBOLS = ("scipy_cblas_{}gemm64_", "cblas_{}gemm64_", "scipy_cblas_{}gemm", "cblas_{}gemm")
"""How cblas_sgemm and cblas_dgemm are called: the wheels of NumPy and SciPy, builds with 64-bit integers, and the
standard's own names (MKL, BLIS, a distribution's OpenBLAS)."""

MODULES = ("numpy._core._multiarray_umath", "scipy.linalg.cython_blas")
"""Whose shared objects link to a BLAS; SciPy's serves a NumPy that was built without one."""


@functools.cache
def gemm_addresses() -> tuple[int, int] | None:
    """Addresses of cblas_sgemm and cblas_dgemm of the first module that has them; None where no module has."""
    for module in MODULES:
        library = ctypes.CDLL(str(importlib.import_module(module).__file__))
        for name in SYMBOLS:
            single, double = (_address(library, name.format(letter)) for letter in "sd")
            if single and double:
                return single, double
    return None


def _address(library: ctypes.CDLL, symbol: str) -> int | None:
    """Look a name up in a shared object and in the libraries that it links to."""
    try:
        return ctypes.cast(getattr(library, symbol), ctypes.c_void_p).value
    except AttributeError:
        return None
