"""The commands that hold predictions against published measurements: validate, fit."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

from planner.cli.commands import FitOptions, ValidateOptions
from planner.cli.frame import Answer, say
from planner.errors import DataError, MachineError
from planner.files import write_whole
from planner.machine import base_profile, dump_machine, load_machine, machine_names
from planner.published.fit import fit_machine, with_priors
from planner.published.rows import PublishedRow, read_published
from planner.published.validate import validate
from planner.report.validation import (
    fit_document,
    fit_view,
    validation_document,
    validation_svg,
    validation_view,
)


def validate_files(options: ValidateOptions) -> Answer:
    """Predict published rows, score them, and draw them where asked."""
    found = validate([Path(path) for path in options.files], options.machine)
    for note in found.notes:
        say(f"skipped {note}")
    if options.svg:
        write_whole(Path(options.svg), validation_svg(found).encode())
        say(f"wrote {options.svg}")
    return Answer(lambda: validation_document(found), lambda: validation_view(found))


def fit_files(options: FitOptions) -> Answer:
    """Fit a machine's figures on the rows that name it, and write its profile."""
    if options.machine is None:
        raise MachineError("--machine is missing; name the profile whose figures are to be fitted")
    machine, base = load_machine(options.machine), base_profile(options.machine)
    start = machine if base is None else with_priors(machine, load_machine(base))
    paths = [Path(path) for path in options.files]
    rows: list[PublishedRow] = []
    used: list[str] = []
    for path in paths:
        try:
            found, skipped = read_published(path)
        except DataError as error:
            say(f"skipped {error}")
            continue
        own = [row for row in found if row.machine == machine.name]
        say(f"{path.name}: {len(own)} rows of {machine.name}, {len(found) - len(own)} of others, {len(skipped)} bad")
        rows += own
        used += [path.name] if own else []
    today = datetime.now(UTC).date().isoformat()
    fit = fit_machine(start, rows, used, today, cross_validate=not options.quick)
    out = options.out or (options.machine if options.machine not in machine_names() else f"{machine.name}.toml")
    dump_machine(fit.machine, out, extends=base)
    return Answer(lambda: fit_document(fit, out), lambda: fit_view(fit, out))
