"""Print how long the planner takes to start and to suggest: whole processes, best and median of several.

    python tests/bench_startup.py [REPEATS]

Not a test: a busy machine is no mistake of the program.
"""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time

CASES = (
    (("--help",), 0.3),
    (("suggest", "--workers", "8", "--layers", "12"), 1.5),
)


def process_seconds(arguments: tuple[str, ...], folder: str) -> tuple[float, float]:
    """Run the planner once; its wall-clock and its CPU seconds."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "planner", *arguments],
        cwd=folder,
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
    )
    wall, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    """Measure and print every case."""
    repeats = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    for arguments, goal_seconds in CASES:
        with tempfile.TemporaryDirectory() as folder:
            process_seconds(arguments, folder)  # compiles bytecode, warms the file cache
            runs = [process_seconds(arguments, folder) for _ in range(repeats)]
        walls, cpus = zip(*runs, strict=True)
        print(
            f"planner {' '.join(arguments)}: wall {min(walls):.3f} s best, {statistics.median(walls):.3f} s median; "
            f"process time {min(cpus):.3f} s best, {statistics.median(cpus):.3f} s median; goal {goal_seconds} s: "
            f"{'met' if min(cpus) <= goal_seconds else 'missed'}"
        )


if __name__ == "__main__":
    main()
