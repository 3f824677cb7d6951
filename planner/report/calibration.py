"""What a calibration changed: the figures, and how the runs are predicted before and after."""

from __future__ import annotations

from typing import Any

import msgspec
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from planner.calibrate import Calibration, Change
from planner.compare import relative_error
from planner.report.tables import new_table
from planner.report.units import count_text, percent_text, seconds_text

MAX_FIGURES = 30
"""Rows of the table of figures; the JSON has all."""


def calibration_document(found: Calibration, path: str) -> dict[str, Any]:
    """Return a calibration as JSON."""
    return {
        "machine": found.machine.name,
        "file": path,
        "provenance": found.machine.device.provenance,
        "runs": msgspec.to_builtins(found.runs),
        "changes": msgspec.to_builtins(found.changes),
    }


def calibration_view(found: Calibration, path: str) -> RenderableType:
    """Return the tables of a calibration."""
    return Group(_runs(found), Text(), _figures(found), Text(f"wrote {path}"))


def _runs(found: Calibration) -> Table:
    table = new_table(f"{found.machine.name}: the runs, predicted before and after")
    table.add_column("plan")
    for name in ("measured", "before", "error", "after", "error", "operators, MAPE before", "after"):
        table.add_column(name, justify="right")
    for run in found.runs:
        measured = run.measured_seconds
        table.add_row(
            run.plan_hash,
            seconds_text(measured),
            seconds_text(run.before_seconds),
            percent_text(relative_error(run.before_seconds, measured), signed=True),
            seconds_text(run.after_seconds),
            percent_text(relative_error(run.after_seconds, measured), signed=True),
            percent_text(run.before_operator_mape),
            percent_text(run.after_operator_mape),
        )
    return table


def _figures(found: Calibration) -> Table:
    shown = found.changes[:MAX_FIGURES]
    rest = len(found.changes) - len(shown)
    table = new_table("figures, by how much they were wrong" + (f"; {rest} more" if rest else ""))
    table.add_column("figure", no_wrap=True)
    for name in ("predicted", "measured", "ratio", "calls", "seconds now", "before", "after"):
        table.add_column(name, justify="right")
    for each in shown:
        before, after = _value(each, each.before), _value(each, each.after)
        table.add_row(
            each.figure,
            seconds_text(each.predicted_seconds),
            seconds_text(each.measured_seconds),
            f"{each.ratio:.2f}",
            count_text(each.calls),
            f"×{each.applied:.2f}",
            before,
            after,
        )
    return table


def _value(change: Change, value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.3g}" if change.figure.endswith("fraction") or value > 1e3 else seconds_text(value)
