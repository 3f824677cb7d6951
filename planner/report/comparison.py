"""A comparison: figures side by side, the largest contributions in a sentence each, operators, ranks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from planner.compare import Comparison, Contribution, Figure
from planner.report.tables import new_table
from planner.report.units import bytes_text, percent_text, seconds_text

MAX_OPERATORS = 30
"""Rows of the operators table; the JSON has all."""

_NAMES = {
    "step_seconds": "step",
    "compute_seconds": "  compute",
    "communication_seconds": "  communication",
    "wait_seconds": "  waiting for slower ranks",
    "bubble_seconds": "  bubble",
    "overhead_seconds": "  overhead",
    "bubble_fraction": "bubble fraction",
    "peak_bytes": "peak memory",
}


def comparison_document(comparison: Comparison) -> dict[str, Any]:
    """Return a comparison as JSON, with its sentences."""
    return {**msgspec.to_builtins(comparison), "largest": list(sentences(comparison))}


def labels(comparison: Comparison) -> tuple[str, str]:
    """Return what the two columns are called."""
    return {
        "prediction and measurement": ("predicted", "measured"),
        "two predictions": ("predicted, first", "predicted, second"),
        "two measurements": ("measured, first", "measured, second"),
    }[comparison.pair]


def comparison_view(comparison: Comparison) -> RenderableType:
    """Return the tables and sentences of a comparison."""
    parts: list[RenderableType] = [_heading(comparison), _figures(comparison), Text()]
    parts += [Text(sentence) for sentence in sentences(comparison)]
    parts += [Text(spread_sentence(comparison)), Text(), _operators(comparison)]
    if len(comparison.ranks) > 1:
        parts += [Text(), _ranks(comparison)]
    return Group(*parts)


def _heading(comparison: Comparison) -> Text:
    first, second = comparison.plan_hashes
    machines = comparison.machines
    if comparison.pair == "prediction and measurement":
        return Text(f"plan {first}: predicted for {machines[0]}, measured on {machines[1]}", style="bold")
    plans = f"of plan {first}" if first == second else f"of different plans, {first} and {second}"
    return Text(f"{comparison.pair} {plans} ({machines[0]}, {machines[1]})", style="bold")


def _figures(comparison: Comparison) -> Table:
    table = new_table()
    table.add_column("per step, mean over ranks")
    for name in (*labels(comparison), "error"):
        table.add_column(name, justify="right")
    for figure in comparison.figures:
        first, second = _value(figure, figure.predicted), _value(figure, figure.measured)
        style = "bold" if figure.name == "step_seconds" else ""
        table.add_row(_NAMES[figure.name], first, second, percent_text(figure.error, signed=True), style=style)
    return table


def _value(figure: Figure, value: float) -> str:
    if figure.name.endswith("_seconds"):
        return seconds_text(value)
    return percent_text(value) if figure.name.endswith("_fraction") else bytes_text(value)


def sentences(comparison: Comparison) -> Iterator[str]:
    """Yield the verdict on the step, and a sentence for each of the largest contributions to its error."""
    step = comparison.figure("step_seconds")
    first, second = labels(comparison)
    yield (
        f"Step: {first} {seconds_text(step.predicted)}, {second} {seconds_text(step.measured)}: "
        f"{percent_text(step.error, signed=True)}{_interval(comparison)}."
    )
    for place, term in enumerate(comparison.largest, 1):
        yield f"{place}. {contribution_sentence(term, comparison)}"


def _interval(comparison: Comparison) -> str:
    if comparison.within_interval is None:
        return ""
    return f", {'within' if comparison.within_interval else 'outside'} the prediction's 80% interval"


_CAUSES = {
    "compute": "Computing {}",
    "collective": "Moving bytes in {}",
    "transfer": "Moving bytes in {}",
    "waiting": "Waiting for a slower rank in {}",
    "bubble": "Waiting in the {}",
    "overhead": "Time {}",
}


def contribution_sentence(term: Contribution, comparison: Comparison) -> str:
    """Return one contribution in words."""
    first, second = labels(comparison)
    what = _CAUSES[term.cause].format(term.name)
    took = f"{first} {seconds_text(term.predicted_seconds)}, {second} {seconds_text(term.measured_seconds)}"
    gap = seconds_text(abs(term.error_seconds))
    if comparison.pair == "prediction and measurement":
        way = "too low" if term.error_seconds < 0 else "too high"
        return f"{what}: {took}; the prediction is {gap} {way}, {percent_text(abs(term.share))} of the measured step."
    way = "more" if term.error_seconds < 0 else "less"
    return f"{what}: {took}; the second spends {gap} {way}, {percent_text(abs(term.share))} of its step."


def spread_sentence(comparison: Comparison) -> str:
    """Return which rank is slowest, and how far the ranks lie apart."""
    busiest = seconds_text(_busy(comparison))
    spread = percent_text(comparison.rank_spread)
    return f"Rank {comparison.slowest_rank} is the slowest: busy for {busiest}; ranks lie {spread} of the mean apart."


def _busy(comparison: Comparison) -> float:
    found = (each.measured_seconds for each in comparison.ranks if each.rank == comparison.slowest_rank)
    return next(found, 0.0)


def _operators(comparison: Comparison) -> Table:
    table = new_table("operators, seconds of work per step")
    table.add_column("key", no_wrap=True)
    for name in (*labels(comparison), "error"):
        table.add_column(name, justify="right")
    for each in comparison.operators[:MAX_OPERATORS]:
        first, second = each.predicted_seconds, each.measured_seconds
        cells = ("–" if value is None else seconds_text(value) for value in (first, second))
        table.add_row(each.key, *cells, percent_text(each.error, signed=True))
    if rest := comparison.operators[MAX_OPERATORS:]:
        first, second = sum(e.predicted_seconds or 0.0 for e in rest), sum(e.measured_seconds or 0.0 for e in rest)
        error = (first - second) / second if second else None
        table.add_row(f"{len(rest)} more", seconds_text(first), seconds_text(second), percent_text(error, signed=True))
    return table


def _ranks(comparison: Comparison) -> Table:
    table = new_table("ranks, busy seconds per step")
    table.add_column("rank", justify="right")
    for name in (*labels(comparison), "error"):
        table.add_column(name, justify="right")
    for each in comparison.ranks:
        slowest = " (slowest)" if each.rank == comparison.slowest_rank else ""
        cells = seconds_text(each.predicted_seconds), seconds_text(each.measured_seconds)
        table.add_row(f"{each.rank}{slowest}", *cells, percent_text(each.error, signed=True))
    return table
