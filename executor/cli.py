"""The executor's command line: what every rank of `mpirun -n N executor ...` runs.

A command only notes what to do; it is done after parsing, under MPI, so that one rank's failure ends the job. Nothing
heavy is imported before BLAS has been told its threads: it reads them once, when NumPy is loaded.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Literal

import typer

THREAD_VARIABLES = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")
RANK_VARIABLES = ("PMI_RANK", "PMIX_RANK", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID")
INTERRUPTED = 130  # 128 + SIGINT
SILENT_SECONDS = 3.0
"""How long a rank that says nothing of its error stays: some launchers end all ranks at the first exit with a code."""

Job = Callable[[], int | None]

app = typer.Typer(
    add_completion=False, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False,
    help="Run plans for real, one process per rank: mpirun -n 2 executor run plan.json",
)  # fmt: skip
_jobs: list[Job] = []


PlanFile = Annotated[Path, typer.Argument(help="The plan, as written by planner.", show_default=False)]
DeviceOption = Annotated[Literal["cpu", "cuda"], typer.Option(help="Where ranks compute.")]
ParanoidOption = Annotated[
    bool, typer.Option("--paranoid", help="Compare every collective's fingerprint and replicated tensors over ranks.")
]
SynchronousOption = Annotated[
    bool, typer.Option("--synchronous-sends", help="Let no send end before its receive has begun.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]


def main() -> None:
    """Parse the command line; then run the command under MPI."""
    first = _is_first_rank()
    with contextlib.ExitStack() as stack:
        if not first:  # help and usage errors are the same on all ranks: one of them says it
            stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
            stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        try:
            app()
        except SystemExit as end:
            if end.code and not first:
                time.sleep(SILENT_SECONDS)
            if end.code or not _jobs:
                raise
    from executor.comm.mpi import run_under_mpi  # noqa: PLC0415 - starts MPI

    run_under_mpi(_jobs[0])


def _is_first_rank() -> bool:
    """Whether this process is rank 0, as far as its launcher has told it; MPI is not started for that."""
    told = next((os.environ[name] for name in RANK_VARIABLES if name in os.environ), "0")
    return told == "0"


def submit(job: Job, threads: int) -> None:
    """Keep a command's job for after parsing, and tell BLAS its threads before anything loads NumPy."""
    for name in THREAD_VARIABLES:
        os.environ[name] = str(threads)
    _jobs.append(lambda: _interruptible(job))


def _interruptible(job: Job) -> int | None:
    try:
        return job()
    except KeyboardInterrupt:
        raise SystemExit(INTERRUPTED) from None


def _peek_threads(plan_file: Path) -> int:
    """Threads per rank of a plan, 1 where the file does not say; whether it is a plan is judged later."""
    try:
        threads = json.loads(plan_file.read_bytes())["training"]["threads_per_rank"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return 1
    return threads if isinstance(threads, int) and threads > 0 else 1


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"meshwright {version('meshwright')}")
        raise typer.Exit


@app.callback()
def _options(
    _: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command("run", epilog="Example: mpirun -n 8 executor run plan.json --steps 20 -o measured.json")
def _run(
    plan_file: PlanFile,
    steps: Annotated[int, typer.Option(min=1, help="Timed steps, warm-up not included.")] = 10,
    warmup: Annotated[int, typer.Option(min=0, help="Steps before the timed ones.")] = 2,
    data: Annotated[
        str | None, typer.Option(help="A file of text, or 'synthetic'.", show_default="a text shipped with Python")
    ] = None,
    device: DeviceOption = "cpu",
    output: Annotated[Path, typer.Option("-o", "--output", help="Where to write the measurement.")] = Path(
        "measured.json"
    ),
    as_json: JsonOption = False,
    paranoid: ParanoidOption = False,
    synchronous_sends: SynchronousOption = False,
) -> None:
    """Train with a plan and measure it."""

    def job() -> None:
        from executor import commands, session  # noqa: PLC0415 - they load NumPy

        shared = commands.JobOptions(plan_file, device, as_json, paranoid, synchronous_sends)
        commands.run_plan(shared, session.RunOptions(steps, warmup, data, paranoid), output)

    submit(job, _peek_threads(plan_file))


@app.command("check", epilog="Example: mpirun -n 8 executor check plan.json --dtype float64")
def _check(
    plan_file: PlanFile,
    dtype: Annotated[
        Literal["float32", "float64", "tf32", "float16", "bfloat16"] | None,
        typer.Option(help="Precision of the plan's run.", show_default="the plan's, float32 for fp8"),
    ] = None,
    device: DeviceOption = "cpu",
    as_json: JsonOption = False,
    paranoid: ParanoidOption = False,
    synchronous_sends: SynchronousOption = False,
) -> None:
    """Compare loss, gradients and one update of a plan with one rank's; exit 1 where they differ."""

    def job() -> int:
        from executor import commands  # noqa: PLC0415 - loads NumPy

        shared = commands.JobOptions(plan_file, device, as_json, paranoid, synchronous_sends)
        return commands.check_plan(shared, dtype)

    submit(job, _peek_threads(plan_file))


@app.command("profile", epilog="Example: mpirun -n 2 executor profile --quick -o machine.toml")
def _profile(
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Where to write.", show_default="your cache folder")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="At most 15 seconds instead of 60; on CUDA 30 instead of 90.")
    ] = False,
    device: DeviceOption = "cpu",
    as_json: JsonOption = False,
) -> None:
    """Measure this machine as the executor uses it and write its profile."""

    def job() -> None:
        from executor import commands  # noqa: PLC0415 - loads NumPy

        commands.profile_machine(output, device, quick=quick, as_json=as_json)

    submit(job, 1)


if __name__ == "__main__":
    main()
