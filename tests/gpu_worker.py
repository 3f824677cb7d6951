"""What `gpu.py` runs on the GPU, in processes of its own: `gpu_worker.py compile|check|measure|step ...`.

compile CASES      one process: compile the kernels of every plan of CASES
check CASES OUT    under mpirun: compare every plan of CASES with one rank on the host; a JSON line of each to OUT
measure CASES OUT  one process: the step time and memory of every one-rank plan of CASES; a JSON line of each to OUT
step PLAN          one process: print `ready {...}`, then for each line on stdin the seconds of one step

CASES is a JSON list of {name, plan, dtype}; a plan is the path of its file. Whatever OUT has already is left out, so
that a job that ended early can be started again without the case that ended it.
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

from executor.calibrate.device_probes import TimedRuntime
from executor.check import check
from executor.device import Device, open_device
from executor.measure import gemm_flops_per_second
from executor.session import load_kernels, open_rank_device
from planner.model import model_flops
from planner.plan import load_plan

WARMUP_STEPS, STEPS = 3, 8


def remaining(cases: Path, out: Path) -> Iterator[dict[str, Any]]:
    """The cases that have no line in `out` yet; each gets one that it was begun, before it is."""
    begun = {json.loads(line)["name"] for line in out.read_text().splitlines()} if out.is_file() else set()
    return (case for case in json.loads(cases.read_text()) if case["name"] not in begun)


def note(out: Path, **content: Any) -> None:
    """Append a line."""
    with out.open("a") as file:
        file.write(json.dumps(content) + "\n")


def compile_all(cases: Path) -> int:
    """Launch every kernel of every plan once, on few elements."""
    device = open_device("cuda")
    for case in json.loads(cases.read_text()):
        load_kernels(load_plan(Path(case["plan"])), device)
    device.synchronise()
    return 0


def check_all(cases: Path, out: Path) -> int:
    """Check every plan, over one communicator and device."""
    from executor.comm.mpi import mpi_communicator  # the other commands work without an MPI

    comm = mpi_communicator()
    device: Device | None = None
    todo = list(remaining(cases, out))
    comm.world.barrier()  # nobody writes before all have read
    for case in todo:
        plan = load_plan(Path(case["plan"]))
        if comm.rank == 0:
            note(out, name=case["name"], state="begun")
        device = device or open_rank_device("cuda", plan, comm)
        report = check(plan, comm, case["dtype"], device)
        if report is not None:
            note(
                out, name=case["name"], state="done", dtype=case["dtype"], passed=report.passed, limit=report.limit,
                gradient=max(one.difference for one in report.differences if one.quantity == "gradient"),
                worst=f"{report.largest.quantity} of {report.largest.tensor}: {report.largest.difference:.2e}",
            )  # fmt: skip
        device.release_unused()
    return 0


def measure_all(cases: Path, out: Path) -> int:
    """Step time, the arena's peak and what the pool holds, of every one-rank plan."""
    device = open_device("cuda")
    for case in remaining(cases, out):
        note(out, name=case["name"], state="begun")
        plan = load_plan(Path(case["plan"]))
        load_kernels(plan, device)
        gc.collect()
        device.release_unused()
        before = device.peak_bytes()
        runtime = TimedRuntime(plan, device)
        seconds = [runtime.run_step(number).seconds for number in range(WARMUP_STEPS + STEPS)][WARMUP_STEPS:]
        note(
            out, name=case["name"], state="done", step_seconds=median(seconds), steps=seconds,
            arena_bytes=runtime.arena.peak_bytes, pool_bytes=device.peak_bytes() - before,
        )  # fmt: skip
        del runtime
    return 0


def serve_steps(path: Path) -> int:
    """One step for each line on stdin."""
    plan, device = load_plan(path), open_device("cuda")
    load_kernels(plan, device)
    runtime = TimedRuntime(plan, device)
    count = 0
    for _ in range(WARMUP_STEPS):
        runtime.run_step(count)
        count += 1
    rate = gemm_flops_per_second(runtime.precision.storage, device)
    flops = model_flops(plan.model) * plan.global_batch_size
    facts = {"gemm_flops_per_second": rate, "step_flops": flops, "peak_bytes": runtime.arena.peak_bytes}
    print("ready", json.dumps(facts), flush=True)
    for _ in sys.stdin:
        print(runtime.run_step(count).seconds, flush=True)
        count += 1
    return 0


def main() -> int:
    """Do what the command line says; under MPI what needs it."""
    what, *paths = sys.argv[1:]
    if what == "check":
        from executor.comm.mpi import run_under_mpi

        run_under_mpi(lambda: check_all(Path(paths[0]), Path(paths[1])))
        return 0
    if what == "compile":
        return compile_all(Path(paths[0]))
    if what == "measure":
        return measure_all(Path(paths[0]), Path(paths[1]))
    return serve_steps(Path(paths[0]))


if __name__ == "__main__":
    raise SystemExit(main())
