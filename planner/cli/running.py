"""The commands that start MPI: run, profile."""

from __future__ import annotations

import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from planner.cli.commands import ProfileOptions, RunOptions
from planner.cli.frame import INTERNAL_ERROR, Answer, say
from planner.compare import compare
from planner.documents import load_record
from planner.errors import DataError, MeshwrightError, PlanError
from planner.launch import (
    INTERRUPTED,
    find_executor,
    find_launcher,
    is_root,
    launch,
    launch_command,
    launch_environment,
    parse_hosts,
)
from planner.machine import load_machine, user_profile_path
from planner.options import one_of
from planner.plan import Plan, dump_plan, load_plan
from planner.predict import predict
from planner.report.comparison import comparison_document, comparison_view
from planner.report.lists import machine_document, machine_view
from planner.report.units import seconds_text
from planner.resolve import machine_choice, usable_cores
from planner.trace import Measurement, Prediction, load_measurement, load_prediction

DEVICES = ("cpu", "cuda")
CUDA_PROFILE = "machine-cuda.toml"
"""Name of the profile of this machine's GPUs, beside that of its cores."""

RANKS_ON_GPUS = 4
"""Enough for groups of two sizes, whether they share a GPU or have one each."""


def run_plan(options: RunOptions) -> Answer:
    """Run a plan on this machine, then compare with its prediction."""
    for name, value, least in (("steps", options.steps, 1), ("warmup", options.warmup, 0)):
        if value < least:
            raise PlanError(f"--{name} {value} is too few; use at least {least}")
    path, out = Path(options.plan), Path(options.out)
    plan, hosts = load_plan(path), parse_hosts(options.hosts)
    if not out.parent.is_dir():
        raise DataError(f"-o {out}: there is no folder {out.parent}; make it first, or name another")
    program = [*find_executor(), "run", str(path), "--steps", str(options.steps), "--warmup", str(options.warmup)]
    program += ["-o", str(out)]
    for flag, text in (("--data", options.data), ("--device", options.device)):
        program += [flag, text] if text is not None else []
    prediction = _prediction(plan, path, options)
    steps = options.steps + options.warmup
    say(
        f"{steps} steps on {plan.mesh.world_size} ranks: about {seconds_text(prediction.step_seconds * steps)} and the "
        f"start of the ranks, by the prediction for {prediction.machine.name}"
    )
    status = _launch(program, plan.mesh.world_size, plan.training.threads_per_rank, out, hosts)
    if status:
        return Answer(lambda: {"status": status}, str, status)
    comparison = compare(prediction, load_record(out))
    return Answer(lambda: comparison_document(comparison), lambda: comparison_view(comparison))


def _prediction(plan: Plan, path: Path, options: RunOptions) -> Prediction:
    """The prediction beside the plan, if it is of this plan and no machine is named; else a new one."""
    beside = path.with_name("predicted.json")
    if options.machine is None and beside.is_file():
        with suppress(MeshwrightError):
            found = load_prediction(beside)
            if found.plan_hash == plan.hash:
                say(f"prediction: {beside}")
                return found
    choice = machine_choice(options)
    say(choice.sentence)
    return predict(plan, choice.machine)


def _launch(program: list[str], ranks: int, threads_per_rank: int, out: Path, hosts: tuple[str, ...]) -> int:
    """Start mpirun; return its status as ours: the user's error, our own, or an interruption."""
    command = launch_command(
        find_launcher(), ranks, program, threads_per_rank=threads_per_rank, cores=usable_cores(), root=is_root(),
        hosts=hosts,
    )  # fmt: skip
    say(" ".join(command))
    status = launch(command, launch_environment(threads_per_rank), stdout=sys.stderr)
    if status:
        out.with_name(f".{out.name}.writing").unlink(missing_ok=True)
        say(
            "planner: the run was ended; nothing was written"
            if status == INTERRUPTED
            else f"planner: mpirun exited with status {status}"
        )
    return status if status in (0, 2, INTERRUPTED) else INTERNAL_ERROR


@dataclass(frozen=True)
class Runner:
    """Runs plans for a few steps each, for commands that run many.

    Attributes:
        folder: Where plans and measurements are kept meanwhile.
        steps: Timed steps of a run.
        warmup: Steps before them.
        data: Text to train on, or synthetic; None for the default text.
    """

    folder: Path
    steps: int
    warmup: int
    data: str | None = None

    def run(self, place: int, plan: Plan, number: int) -> Measurement:
        """Run a plan.

        Raises:
            DataError: the run failed; its own message stands on stderr.
        """
        path, out = self.folder / f"plan-{place}.json", self.folder / f"measured-{place}-{number}.json"
        dump_plan(plan, path)
        program = [*find_executor(), "run", str(path), "--steps", str(self.steps), "--warmup", str(self.warmup)]
        program += ["-o", str(out), *([] if self.data is None else ["--data", self.data])]
        ranks, threads = plan.mesh.world_size, plan.training.threads_per_rank
        cores = usable_cores()
        command = launch_command(find_launcher(), ranks, program, threads_per_rank=threads, cores=cores, root=is_root())
        with (self.folder / "output.txt").open("w+", encoding="utf-8") as output:
            status = launch(command, launch_environment(threads), stdout=output, stderr=output)
            if status == INTERRUPTED:
                raise KeyboardInterrupt
            if status:
                output.seek(0)
                told = " / ".join(output.read().strip().splitlines()[-3:]) or "no message"
                raise DataError(
                    f"plan {place + 1} on {ranks} ranks ended with status {status}: {told}; "
                    "run it alone with 'planner run' to see more"
                )
        return load_measurement(out)


def profile_machine(options: ProfileOptions) -> Answer:
    """Measure this machine and write its profile where predictions look for it; of its GPUs one beside it."""
    one_of("device", options.device, DEVICES, DataError)
    hosts, on_gpus = parse_hosts(options.hosts), options.device == "cuda"
    count = max(1, len(hosts))
    usual = RANKS_ON_GPUS if on_gpus else max(2, usable_cores() * count)
    ranks = usual if options.workers is None else options.workers
    if ranks < count or ranks % count:
        raise PlanError(
            f"--workers {ranks} is too few; use at least 1" if count == 1 else
            f"--workers {ranks} does not put as many ranks on each of {count} hosts; use a multiple of {count}"
        )  # fmt: skip
    home = user_profile_path()
    out = (home.with_name(CUDA_PROFILE) if on_gpus else home) if options.out is None else Path(options.out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"cannot make {out.parent}: {error.strerror}; choose a writable file with -o") from None
    program = [*find_executor(), "profile", "-o", str(out), *(["--quick"] if options.quick else [])]
    program += ["--device", "cuda"] if on_gpus else []
    what = f"{count} hosts" if hosts else "this machine's GPUs" if on_gpus else "this machine"
    quick, whole = ("at most 30 s", "up to 90 s") if on_gpus else ("at most 15 s", "up to a minute")
    say(f"measuring {what} with {ranks} ranks: {quick if options.quick else whole}")
    status = _launch(program, ranks, 1, out, hosts)
    if status:
        return Answer(lambda: {"status": status}, str, status)
    machine = load_machine(out)
    return Answer(lambda: machine_document(machine, str(out)), lambda: machine_view(machine, str(out)))
