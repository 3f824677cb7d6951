"""The warning about BLAS kernels below what the processor offers."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest

from executor.environment import blas_complaint, processor_flags

AVX2 = frozenset({"avx2", "fma"})
AVX512 = AVX2 | {"avx512f", "avx512vl"}


def openblas(architecture: str | None) -> dict[str, Any]:
    return {"name": "openblas", "version": "0.3.31", "architecture": architecture}


@pytest.mark.parametrize(
    ("flags", "family"),
    [(AVX512, "SkylakeX"), (AVX512, "Cooperlake"), (AVX2, "Haswell"), (AVX2, "Zen"), (frozenset(), "Nehalem")],
)
def test_the_best_kernels_raise_no_complaint(flags: frozenset[str], family: str) -> None:
    assert blas_complaint(flags, [openblas(family)], None) is None


def test_a_library_that_does_not_say_raises_no_complaint() -> None:
    silent = [openblas(None), {"name": "mkl", "version": "2025", "architecture": None}]
    assert blas_complaint(AVX512, silent, None) is None


def test_a_forced_family_is_named_with_the_variable() -> None:
    assert blas_complaint(AVX512, [openblas("SkylakeX"), openblas("Haswell")], "Haswell") == (
        "openblas 0.3.31 runs its Haswell kernels and this processor has AVX-512: matrix products may take twice as "
        "long; unset OPENBLAS_CORETYPE, which is Haswell"
    )


def test_an_old_library_is_to_be_replaced() -> None:
    text = blas_complaint(AVX2, [openblas("Nehalem")], None)
    assert text is not None
    assert text.endswith("install current wheels of NumPy and SciPy")


@pytest.mark.skipif(not processor_flags() >= {"avx512f"}, reason="the processor has no AVX-512")
def test_a_real_process_on_haswell_kernels_complains() -> None:
    program = "import numpy; from executor.environment import slow_blas; print(slow_blas())"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60,
        env={**os.environ, "OPENBLAS_CORETYPE": "Haswell"},
    )  # fmt: skip
    assert "runs its Haswell kernels and this processor has AVX-512" in done.stdout
