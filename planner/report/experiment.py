"""An experiment: predicted, measured and published figures side by side, as table and chart."""

from __future__ import annotations

from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from planner.experiments.experiment import Outcome, joined
from planner.report.chart import bars
from planner.report.tables import new_table
from planner.report.units import bytes_text, flops_text, percent_text, rate_text, seconds_text

SIDES = ("predicted", "measured", "own cores", "simulated", "ideal", "published")
_SHORT = {"predicted": "pred.", "measured": "meas.", "own cores": "own", "published": "publ.", "simulated": "sim."}

MOST_COLUMNS = 9
"""Figures in a row of a terminal of 120 columns."""


def figure_words(kind: str, value: float) -> str:
    """Return a figure of a kind of column in words."""
    if kind == "x":
        return f"{value:.2f}"
    if kind == "share":
        return percent_text(value)
    return {"seconds": seconds_text, "rate": rate_text, "flops": flops_text, "bytes": bytes_text}[kind](value)


def experiment_document(found: Outcome) -> dict[str, Any]:
    """Return an outcome as JSON."""
    return {
        "experiment": found.experiment.name,
        "title": found.experiment.title,
        "cores": found.cores,
        "measured": list(found.ran),
        "columns": found.experiment.columns,
        "rows": [{"label": label, "figures": figures} for label, figures in joined(found).items()],
        "notes": notes(found),
        "explanation": list(found.explanation),
    }


def notes(found: Outcome) -> list[str]:
    """Return what has to be known to read the table."""
    experiment = found.experiment
    said = [experiment.note] if experiment.note else []
    if experiment.machine is None and experiment.most_ranks > found.cores:
        said.append(
            f"up to {experiment.most_ranks} ranks share {found.cores} cores here and take turns: no speed-up is "
            "promised beyond the cores; 'own cores' predicts the same machine with a core for every rank"
        )
    missing = [case.name for case in experiment.cases if case.name not in found.ran]
    if found.ran and missing:
        said.append(f"not run, --max-ranks allows no more: {', '.join(missing)}")
    return said


def experiment_view(found: Outcome) -> RenderableType:
    """Return the table and notes of an outcome."""
    told = (Text(each) for each in found.explanation)
    return Group(_table(found), *told, *(Text(f"note: {each}") for each in notes(found)))


def _table(found: Outcome) -> Table:
    """Sides beside each other where they fit, else one line per side."""
    rows, columns = joined(found), found.experiment.columns
    shown = [
        (column, side)
        for column in columns
        for side in SIDES
        if any(side in figures.get(column, {}) for figures in rows.values())
    ]
    table = new_table(found.experiment.title)
    table.add_column("", no_wrap=True)
    if len(shown) > MOST_COLUMNS:
        return _long(table, rows, columns)
    for column, side in shown:
        table.add_column(f"{column}\n{_SHORT.get(side, side)}", justify="right", no_wrap=True)
    for label, figures in rows.items():
        cells = (_cell(figures, column, side, columns[column]) for column, side in shown)
        table.add_row(label, *cells)
    return table


def _long(table: Table, rows: dict[str, dict[str, dict[str, float]]], columns: dict[str, str]) -> Table:
    table.add_column("", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for label, figures in rows.items():
        sides = [side for side in SIDES if any(side in each for each in figures.values())]
        for place, side in enumerate(sides):
            cells = (_cell(figures, column, side, kind) for column, kind in columns.items())
            table.add_row("" if place else label, side, *cells)
    return table


def _cell(figures: dict[str, dict[str, float]], column: str, side: str, kind: str) -> str:
    value = figures.get(column, {}).get(side)
    return "–" if value is None else figure_words(kind, value)


def experiment_svg(found: Outcome) -> str:
    """Return the chart of an outcome: one group of bars a row, one bar a side."""
    column, rows = found.experiment.chart, joined(found)
    kind = found.experiment.columns[column]
    groups = []
    for label, figures in rows.items():
        values = figures.get(column, {})
        drawn = {side: (values[side], figure_words(kind, values[side])) for side in SIDES if side in values}
        groups += [(label, drawn)] if drawn else []
    return bars(f"{column}, {found.experiment.title}", groups)
