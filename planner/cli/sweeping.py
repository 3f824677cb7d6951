"""The command that sweeps: scaling curves over workers, or a classic experiment."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from tempfile import TemporaryDirectory

from planner.cli.commands import SweepOptions
from planner.cli.frame import Answer, say
from planner.cli.planning import search_request
from planner.cli.running import Runner
from planner.errors import PlanError
from planner.experiments.classics import EXPERIMENTS, Sizes, experiment
from planner.experiments.experiment import conduct
from planner.options import ModelOptions
from planner.plan import write_whole
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
    return Answer(lambda: sweep_document(found), lambda: sweep_view(found))


WARMUP_STEPS = 1


def list_experiments() -> Answer:
    """Name the experiments."""
    lines = {name: (make.__doc__ or "").partition("\n")[0] for name, make in EXPERIMENTS.items()}
    return Answer(lambda: lines, lambda: "\n".join(f"{name:<20}{line}" for name, line in lines.items()))


def measure(options: SweepOptions, name: str) -> Answer:
    """Predict and run a classic experiment."""
    cores = usable_cores()
    ranks = cores if options.max_ranks is None else options.max_ranks
    for flag, value, least in (("steps", options.steps, 1), ("max-ranks", ranks, 0)):
        if value < least:
            raise PlanError(f"--{flag} {value} is too few; use at least {least}")
    if options.model is not None:
        raise PlanError(
            "--model goes with --workers; an experiment has its own model, whose sizes --hidden and others set"
        )
    sizes = {field.name: getattr(options, field.name) for field in fields(ModelOptions) if field.name in SIZES}
    given = {key: value for key, value in sizes.items() if value is not None}
    choice = machine_choice(options)
    found = experiment(name, Sizes(given, options.global_batch_size, cores))
    say(choice.sentence)
    runs = [case for case in found.cases if case.plan.mesh.world_size <= ranks]
    say(f"{len(found.cases)} plans, {len(runs)} of which run here on up to {ranks} ranks, {options.steps} steps each")
    with TemporaryDirectory() as scratch:
        runner = Runner(Path(scratch), options.steps, WARMUP_STEPS, "synthetic")
        run = runner.run if runs else None
        outcome = conduct(found, choice.machine, cores=cores, max_ranks=ranks, run=run)
    if options.svg:
        write_whole(Path(options.svg), experiment_svg(outcome).encode())
        say(f"wrote {options.svg}")
    return Answer(lambda: experiment_document(outcome), lambda: experiment_view(outcome))
