"""The command that sweeps: scaling curves over workers, or a classic experiment."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from planner.cli.commands import SweepOptions
from planner.cli.frame import Answer, say
from planner.cli.planning import search_request
from planner.cli.running import Runner
from planner.errors import PlanError
from planner.experiments.classics import EXPERIMENTS, experiment
from planner.experiments.experiment import Experiment, Sizes, conduct
from planner.files import write_whole
from planner.options import ModelOptions
from planner.report.experiment import experiment_document, experiment_svg, experiment_view
from planner.report.sweep import sweep_document, sweep_svg, sweep_view
from planner.resolve import machine_choice, usable_cores
from planner.search.sweep import parse_workers
from planner.search.sweep import sweep as sweep_workers

SIZES = ("layers", "hidden", "heads", "ffn_hidden", "seq_len", "vocab")
"""Sizes of an experiment's model that options may set."""


def sweep(options: SweepOptions) -> Answer:
    """Draw scaling curves, or run an experiment where one is named."""
    if options.measure is not None:
        return list_experiments() if options.measure == "list" else measure(options, options.measure)
    if options.workers is None:
        raise PlanError("--workers is missing; give a range such as 8..1024, or --measure EXPERIMENT")
    workers = parse_workers(options.workers)
    # A batch that was not named suits the most workers of strong scaling, and the fewest of weak scaling.
    choice, request = search_request(options, workers[0] if options.weak else workers[-1], 1)
    say(choice.sentence)
    found = sweep_workers(
        request,
        workers,
        weak=options.weak,
        tokens=options.tokens,
        dollars_per_hour=options.dollars_per_hour,
        told=lambda count: say(f"searching plans for {count} workers"),
    )
    if options.svg:
        kind = "weak" if options.weak else "strong"
        title = f"{request.model.name} on {choice.machine.name}: {kind} scaling"
        write_whole(Path(options.svg), sweep_svg(found, title).encode())
        say(f"wrote {options.svg}")
    return Answer(lambda: sweep_document(found), lambda: sweep_view(found, explain=options.explain))


WARMUP_STEPS = 1


def list_experiments() -> Answer:
    """Name the experiments."""
    lines = {name: (make.__doc__ or "").partition("\n")[0] for name, make in EXPERIMENTS.items()}
    return Answer(lambda: lines, lambda: "\n".join(f"{name:<20}{line}" for name, line in lines.items()))


def measure(options: SweepOptions, name: str) -> Answer:
    """Predict a classic experiment, and run what of it can run here."""
    cores = usable_cores()
    ranks = cores if options.max_ranks is None else options.max_ranks
    for flag, value, least in (("steps", options.steps, 1), ("max-ranks", ranks, 0)):
        if value < least:
            raise PlanError(f"--{flag} {value} is too few; use at least {least}")
    found = _experiment(options, name, cores)
    own = options.machine is None and found.machine is not None
    choice = machine_choice(replace(options, machine=found.machine) if own else options)
    if found.machine is not None and choice.machine.device.kind == "cpu":
        raise PlanError(
            f"{name} is about GPUs, and machine {choice.machine.name} has none; "
            f"leave --machine out for {found.machine}, or name one with GPUs"
        )
    say(choice.sentence)
    runs = [case for case in found.cases if case.plan.mesh.world_size <= ranks and found.machine is None]
    here = f"{len(runs)} of which run here on up to {ranks} ranks, {options.steps} steps each"
    say(f"{len(found.cases)} plans, {here if runs else 'none of which runs here'}")
    with TemporaryDirectory() as scratch:
        runner = Runner(Path(scratch), options.steps, WARMUP_STEPS, "synthetic")
        run, most = (runner.run, ranks) if runs else (None, 0)
        outcome = conduct(found, choice.machine, cores=cores, max_ranks=most, run=run, explain=options.explain)
    if options.svg:
        write_whole(Path(options.svg), experiment_svg(outcome).encode())
        say(f"wrote {options.svg}")
    return Answer(lambda: experiment_document(outcome), lambda: experiment_view(outcome))


def _experiment(options: SweepOptions, name: str, cores: int) -> Experiment:
    """The experiment of the sizes asked for.

    Raises:
        PlanError: no such experiment, or an option that says nothing about it.
    """
    if options.model is not None:
        raise PlanError(
            "--model goes with --workers; an experiment has its own model, whose sizes --hidden and others set"
        )
    if options.transport is not None:
        raise PlanError(f"--transport {options.transport} goes with --workers; an experiment's plans have their own")
    sizes = {field.name: getattr(options, field.name) for field in fields(ModelOptions) if field.name in SIZES}
    given = {key: value for key, value in sizes.items() if value is not None}
    found = experiment(name, Sizes(given, options.global_batch_size, cores))
    if options.explain and found.explain is None:
        explained = ", ".join(each for each in EXPERIMENTS if experiment(each, Sizes()).explain is not None)
        raise PlanError(
            f"--explain has nothing to say about {name}; it explains {explained}, and sweeps over --workers"
        )
    return found
