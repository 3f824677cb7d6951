"""What a rank does for each command: load the plan, connect, work, and on rank 0 say how it went."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from executor.check import DType, check, with_dtype
from executor.comm import Communicator
from executor.comm.mpi import mpi_communicator
from executor.environment import slow_blas
from executor.kernels import FUSED
from executor.session import Progress, RunOptions, require_device, require_runnable, require_writable, run, set_threads
from planner.machine import dump_machine, user_profile_path
from planner.plan import load_plan
from planner.trace import dump_record

if TYPE_CHECKING:
    from executor.session import Device


@dataclass(frozen=True)
class JobOptions:
    """What all commands share.

    Attributes:
        plan_file: the plan.
        device: where ranks compute.
        as_json: print one JSON document on stdout.
        paranoid: compare fingerprints of collectives over ranks.
        synchronous_sends: let no send end before its receive has begun.
    """

    plan_file: Path
    device: Device = "cpu"
    as_json: bool = False
    paranoid: bool = False
    synchronous_sends: bool = False

    def connect(self) -> Communicator:
        """Return this rank's communicator."""
        return mpi_communicator(synchronous_sends=self.synchronous_sends, paranoid=self.paranoid)


def run_plan(job: JobOptions, options: RunOptions, output: Path) -> None:
    """Train with a plan, write and show the measurement.

    Raises:
        MeshwrightError: the plan, the data, the output file or the number of ranks will not do.
    """
    require_device(job.device)
    plan, comm = load_plan(job.plan_file), job.connect()
    require_writable(comm, output)
    with _progress(comm, options) as progress:
        measured = run(plan, comm, options, progress)
    if measured is None:
        return
    dump_record(measured, output)
    warn_of_slow_kernels()
    from executor.report import show_measurement  # noqa: PLC0415 - rich is for rank 0 only

    show_measurement(measured, str(output))
    if job.as_json:
        figures = msgspec.to_builtins(measured)
        for bulky in ("plan", "trace"):
            del figures[bulky]
        print(json.dumps(figures | {"output": str(output)}))


def warn_of_slow_kernels() -> None:
    """Say on stderr what makes this process slower than the machine: BLAS kernels below the processor's, no Numba."""
    if complaint := slow_blas():
        print(f"warning: {complaint}", file=sys.stderr)
    if not FUSED:
        print(
            "warning: the plain NumPy kernels ran, which are slower; install numba for the fused ones", file=sys.stderr
        )


def check_plan(job: JobOptions, dtype: DType | None) -> int:
    """Compare a plan with one rank; the exit code, the same on all ranks.

    Raises:
        MeshwrightError: the plan or the number of ranks will not do.
    """
    require_device(job.device)
    plan = load_plan(job.plan_file)
    precision: DType = dtype or ("float64" if plan.training.precision == "float64" else "float32")
    comm = job.connect()
    require_runnable(with_dtype(plan, precision), comm)
    set_threads(plan)
    report = check(plan, comm, precision)
    failed = 0
    if report is not None:
        failed = int(not report.passed)
        if job.as_json:
            print(msgspec.json.encode(report).decode())
        else:
            from executor.report import show_check  # noqa: PLC0415 - rich is for rank 0 only

            show_check(report)
    return max(comm.world.gather_words(failed))


def profile_machine(output: Path | None, *, quick: bool, as_json: bool) -> None:
    """Measure this machine and write its profile.

    Raises:
        MeshwrightError: the file cannot be written.
    """
    from executor.calibrate import profile  # noqa: PLC0415 - loads SciPy

    comm = mpi_communicator()
    path = user_profile_path() if output is None else output
    if output is None and comm.rank == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
    require_writable(comm, path)
    with _survey_progress(comm) as report:
        machine = profile(comm, quick, report)
    if machine is None:
        return
    dump_machine(machine, path)
    print(f"wrote {path}", file=sys.stderr)
    if as_json:
        print(json.dumps({"output": str(path), "name": machine.name, "provenance": machine.device.provenance}))


@contextlib.contextmanager
def _survey_progress(comm: Communicator) -> Iterator[Callable[[str, float], None] | None]:
    """The survey's progress on rank 0, nothing elsewhere."""
    if comm.rank:
        yield None
        return
    from executor.report import SurveyProgress  # noqa: PLC0415 - only rank 0 loads rich

    with SurveyProgress() as progress:
        yield progress.tell


@contextlib.contextmanager
def _progress(comm: Communicator, options: RunOptions) -> Iterator[Progress | None]:
    """The progress bar on rank 0, nothing elsewhere."""
    if comm.rank:
        yield None
        return
    from executor.report import TrainingProgress  # noqa: PLC0415 - rich is for rank 0 only

    with TrainingProgress(options.steps, options.warmup) as progress:
        yield progress
