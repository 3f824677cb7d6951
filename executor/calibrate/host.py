"""What the ranks of a host share: cores, memory, threads; and how much they slow each other."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from time import perf_counter

from executor.calibrate.fit import fit_threads
from executor.calibrate.probes import Probe, run_probe
from executor.threads import blas_threads, use_threads

CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def usable_cores() -> int:
    """Cores of this job: those of the launcher, since a bound rank sees its own only."""
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    cores = os.sched_getaffinity(0)
    with suppress(OSError):
        cores = cores | os.sched_getaffinity(os.getppid())
    return len(cores)


def memory_bytes() -> float:
    """Memory that processes here may use: the machine's, or the container's limit where that is lower."""
    total = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    for path in CGROUP_LIMITS:
        with suppress(OSError, ValueError):
            total = min(total, float(Path(path).read_text(encoding="ascii")))
    return total


@contextmanager
def all_cores() -> Iterator[None]:
    """Let this rank use every core of the launcher for a while."""
    if not hasattr(os, "sched_getaffinity"):
        yield
        return
    own = os.sched_getaffinity(0)
    with suppress(OSError):
        os.sched_setaffinity(0, own | os.sched_getaffinity(os.getppid()))
    try:
        yield
    finally:
        os.sched_setaffinity(0, own)


def thread_speedup(cores: int, probes: Sequence[Probe], seconds: float) -> tuple[tuple[float, ...], float]:
    """Speed of matrix products on 1, 2, ... threads relative to one, and what starting them takes.

    Powers of two are timed, the rest lies between. The other ranks must be idle. The fastest run of each product
    counts: a thread that waits for another process's turn holds up all.
    """
    counts = sorted({2**i for i in range(cores.bit_length()) if 2**i <= cores} | {cores})
    before = blas_threads()
    times: list[list[float]] = []
    with all_cores():
        for threads in counts:
            use_threads(threads)
            times.append([])
            for probe in probes:
                deadline = perf_counter() + seconds / (len(counts) * len(probes))
                found = run_probe(probe, deadline, threads).observations
                products = [each for each in found if each.kind.startswith("linear")]
                times[-1] += [min(elapsed for elapsed, _ in each.samples) for each in products]
    use_threads(before)
    return fit_threads(cores, counts, times)


@contextmanager
def rival() -> Iterator[None]:
    """Another process that computes on this rank's core."""
    process = subprocess.Popen([sys.executable, "-S", "-c", "while True: pass"])
    try:
        yield
    finally:
        process.kill()
        process.wait()
