"""What the ranks of a host share: cores, memory, threads; and how much they slow each other."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from time import perf_counter

import numpy as np
import threadpoolctl

from executor.calibrate.probes import Probe, run_probe

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


def thread_speedup(cores: int, probe: Probe, seconds: float) -> tuple[float, ...]:
    """Speed of a probe's matrix products on 1, 2, ... threads relative to one; the other ranks must be idle.

    Powers of two are timed, the rest lies between. The fastest run counts: a thread that waits for another process's
    turn holds up all.
    """
    counts = sorted({2**i for i in range(cores.bit_length()) if 2**i <= cores} | {cores})
    fastest = []
    with all_cores():
        for threads in counts:
            with threadpoolctl.threadpool_limits(threads):
                found = run_probe(probe, perf_counter() + seconds / len(counts), threads).observations
            products = [each for each in found if each.kind.startswith("linear")]
            fastest.append(sum(each.count * min(elapsed for elapsed, _ in each.samples) for each in products))
    # More threads slow a product down only where another process holds one of their cores.
    speedups = np.maximum.accumulate(np.clip(fastest[0] / np.asarray(fastest), 1.0, counts))
    return tuple(float(value) for value in np.interp(range(1, cores + 1), counts, speedups))


@contextmanager
def rival() -> Iterator[None]:
    """Another process that computes on this rank's core."""
    process = subprocess.Popen([sys.executable, "-S", "-c", "while True: pass"])
    try:
        yield
    finally:
        process.kill()
        process.wait()
