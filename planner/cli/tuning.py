"""The commands that learn from runs: calibrate, tune."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory

from planner.calibrate import calibrate
from planner.cli.commands import CalibrateOptions, TuneOptions
from planner.cli.frame import Answer, say
from planner.cli.planning import search_request
from planner.cli.running import Runner
from planner.documents import load_record
from planner.errors import DataError, PlanError
from planner.files import output_folder
from planner.machine import base_profile, dump_machine, machine_names
from planner.plan import dump_plan
from planner.report.calibration import calibration_document, calibration_view
from planner.report.tuning import tuning_document, tuning_view
from planner.resolve import machine_choice, usable_cores
from planner.search.tune import interleave, tune
from planner.trace import Measurement, dump_record


def calibrate_machine(options: CalibrateOptions) -> Answer:
    """Refine a profile from measurements, and write it."""
    runs = [_measurement(path) for path in options.files]
    choice = machine_choice(options)
    say(choice.sentence)
    found = calibrate(choice.machine, runs, datetime.now(UTC).date().isoformat())
    shipped = options.machine in machine_names() or choice.origin == "generic" or not Path(choice.path).is_file()
    out = options.out or (f"{choice.machine.name}-calibrated.toml" if shipped else choice.path)
    dump_machine(found.machine, out, extends=None if options.machine is None else _base(choice.path))
    return Answer(lambda: calibration_document(found, out), lambda: calibration_view(found, out))


def _base(path: str) -> str | None:
    """The profile that a file extends; None for what stands alone or is no file."""
    return base_profile(path) if Path(path).is_file() else None


def _measurement(path: str) -> Measurement:
    record = load_record(Path(path))
    if not isinstance(record, Measurement):
        raise DataError(
            f"{path} is a prediction, and a profile is refined from runs; 'planner run' writes a measurement"
        )
    return record


RESERVE = 5
"""Plans beyond those that are run, among which the next measurement is looked for."""

WARMUP_STEPS = 1


def tune_plans(options: TuneOptions) -> Answer:
    """Search, run the best plans in turns, rank them by what they took, write the winner."""
    for name, value in (("steps", options.steps), ("rounds", options.rounds)):
        if value < 1:
            raise PlanError(f"--{name} {value} is too few; use at least 1")
    folder = output_folder(options.out)
    choice, request = search_request(options, options.workers, options.top)
    say(choice.sentence)
    plans = request.but(top=options.top + RESERVE).ask().plans
    chosen = [each.plan for each in plans[: options.top]]
    say(f"{options.rounds} rounds of {len(chosen)} plans, {options.steps} steps each, in turns")
    with TemporaryDirectory() as scratch:
        runner = Runner(Path(scratch), options.steps, WARMUP_STEPS, options.data)
        measured = interleave(chosen, options.rounds, runner.run)
    seconds = [[each.step_seconds for each in rounds] for rounds in measured]
    found = tune(plans, seconds, choice.machine.residuals)
    winner = found.tuned[0].place
    last = min(measured[winner], key=lambda each: each.step_seconds)
    dump_plan(plans[winner].plan, folder / "plan.json")
    dump_record(plans[winner].prediction, folder / "predicted.json")
    dump_record(last, folder / "measured.json")
    say(f"wrote {folder / 'plan.json'}, predicted.json and measured.json of the best plan measured")
    crowded = options.workers > usable_cores()
    return Answer(lambda: tuning_document(found, plans), lambda: tuning_view(found, plans, oversubscribed=crowded))
