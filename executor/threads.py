"""Threads of the numerical libraries in this process."""

from __future__ import annotations

import functools

import threadpoolctl


def use_threads(count: int) -> None:
    """Give every numerical library loaded so far this many threads."""
    threadpoolctl.threadpool_limits(count)
    blas_threads.cache_clear()


@functools.cache
def blas_threads() -> int:
    """Threads of the widest BLAS here (NumPy and SciPy each bring a library, with threads of its own)."""
    found = [library for library in threadpoolctl.threadpool_info() if library["user_api"] == "blas"]
    return max((library["num_threads"] for library in found), default=1)
