"""What a rank does for each command: load the plan, connect, work, and on rank 0 say how it went."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec

from executor.check import DType, check, with_dtype
from executor.comm import Communicator
from executor.comm.mpi import mpi_communicator
from executor.device import open_device
from executor.device.base import DeviceKind
from executor.device.cuda import CudaDevice
from executor.device.exhausted import told_of_memory
from executor.environment import slow_blas
from executor.kernels import FUSED
from executor.precision import Precision
from executor.session import (
    Progress,
    RunOptions,
    local_rank,
    open_rank_device,
    require_runnable,
    require_writable,
    run,
    set_threads,
)
from planner.machine import Machine, dump_machine, user_profile_path
from planner.plan import Plan, load_plan
from planner.trace import dump_record


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
    device: DeviceKind = "cpu"
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
    plan, comm = load_plan(job.plan_file), job.connect()
    require_writable(comm, output)
    require_runnable(plan, comm)
    if job.device == "cpu":
        warn_of_emulation(plan, comm)
    device = open_rank_device(job.device, plan, comm)
    with _progress(comm, options) as progress, told_of_memory(job.plan_file, plan, comm.rank, device):
        measured = run(plan, comm, options, progress, device)
    if measured is None:
        return
    dump_record(measured, output)
    if device.is_host:
        warn_of_slow_kernels()
    from executor.report import show_measurement  # noqa: PLC0415 - rich is for rank 0 only

    show_measurement(measured, str(output))
    if job.as_json:
        figures = msgspec.to_builtins(measured)
        for bulky in ("plan", "trace"):
            del figures[bulky]
        print(json.dumps(figures | {"output": str(output)}))


def warn_of_emulation(plan: Plan, comm: Communicator) -> None:
    """Say on stderr, once, that CPU kernels only imitate the plan's precision."""
    precision = Precision.of(plan)
    if precision.emulated and comm.rank == 0:
        print(
            f"warning: CPUs do not compute in {precision.name}: it is emulated by float32 kernels with rounding around "
            "them; results are right, times mean nothing",
            file=sys.stderr,
        )


def warn_of_slow_kernels() -> None:
    """Say on stderr what makes this process slower than the machine: BLAS kernels below the processor's, no Numba."""
    if complaint := slow_blas():
        print(f"warning: {complaint}", file=sys.stderr)
    if not FUSED:
        print(
            "warning: the plain NumPy kernels ran, which are slower; the fused ones need numba and a NumPy with BLAS",
            file=sys.stderr,
        )


def check_plan(job: JobOptions, dtype: DType | None) -> int:
    """Compare a plan with one rank; the exit code, the same on all ranks.

    Raises:
        MeshwrightError: the plan or the number of ranks will not do.
    """
    plan = load_plan(job.plan_file)
    precision: DType = dtype or ("float32" if plan.training.precision == "fp8" else plan.training.precision)
    comm = job.connect()
    require_runnable(with_dtype(plan, precision), comm)
    set_threads(plan)
    if job.device == "cpu":
        warn_of_emulation(with_dtype(plan, precision), comm)
    device = open_rank_device(job.device, plan, comm)
    with told_of_memory(job.plan_file, plan, comm.rank, device):
        report = check(plan, comm, precision, device)
    failed = 0
    if report is not None:
        failed = int(not report.passed)
        if job.as_json:
            print(msgspec.json.encode(report).decode())
        else:
            from executor.report import show_check  # noqa: PLC0415 - rich is for rank 0 only

            show_check(report)
    return max(comm.world.gather_words(failed))


def profile_machine(output: Path | None, device: DeviceKind = "cpu", *, quick: bool, as_json: bool) -> None:
    """Measure this machine, or its CUDA devices, and write its profile.

    Raises:
        MeshwrightError: no such device, or the file cannot be written.
    """
    comm = mpi_communicator()
    usual = user_profile_path()
    path = output or (usual if device == "cpu" else usual.with_name("machine-cuda.toml"))
    if output is None and comm.rank == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
    require_writable(comm, path)
    with _survey_progress(comm) as report:
        machine = _surveyed(comm, device, quick, report)
    if machine is None:
        return
    dump_machine(machine, path)
    print(f"wrote {path}", file=sys.stderr)
    if as_json:
        print(json.dumps({"output": str(path), "name": machine.name, "provenance": machine.device.provenance}))


def _surveyed(
    comm: Communicator, kind: DeviceKind, quick: bool, report: Callable[[str, float], None] | None
) -> Machine | None:
    """The machine as the survey of its kind of device finds it, on rank 0."""
    if kind == "cpu":
        from executor.calibrate import profile  # noqa: PLC0415 - loads SciPy

        return profile(comm, quick, report)
    device = open_device(kind, local_rank(comm))
    from executor.calibrate.device_survey import QUICK, Effort, profile_devices  # noqa: PLC0415 - loads SciPy

    assert isinstance(device, CudaDevice)
    comm.use_device(device, "staged")
    return profile_devices(comm, device, QUICK if quick else Effort(), report)


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
