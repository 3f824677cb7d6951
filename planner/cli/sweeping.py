"""The command that sweeps: scaling curves over workers, or a classic experiment."""

from __future__ import annotations

from pathlib import Path

from planner.cli.commands import SweepOptions
from planner.cli.frame import Answer, say
from planner.cli.planning import search_request
from planner.errors import PlanError
from planner.plan import write_whole
from planner.report.sweep import sweep_document, sweep_svg, sweep_view
from planner.sweep import parse_workers
from planner.sweep import sweep as sweep_workers


def sweep(options: SweepOptions) -> Answer:
    """Draw scaling curves, or run an experiment where one is named."""
    if options.measure is not None:
        raise PlanError("later")
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
