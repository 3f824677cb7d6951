"""A prediction or measurement: its figures, where the time goes, its operators."""

from __future__ import annotations

from typing import Any

import msgspec
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from planner.compare import breakdown, key_seconds
from planner.report.suggestion import plan_text
from planner.report.tables import new_table
from planner.report.timeline import RecordTimelines
from planner.report.units import bytes_text, count_text, flops_text, percent_text, rate_text, seconds_text
from planner.trace import Measurement, Prediction, Record

MAX_OPERATORS = 40
"""Rows of the operators table; the rest is summed in a last one."""


def record_title(record: Record, path: str) -> str:
    """Return what a record is, for people."""
    kind = "predicted" if isinstance(record, Prediction) else "measured"
    return f"{kind} on {record.machine.name} ({path})"


def record_document(record: Record) -> dict[str, Any]:
    """Return the record with where its time goes, as JSON that `planner compare` and `show` read like the file."""
    return dict(msgspec.to_builtins(msgspec.structs.replace(record, breakdown_seconds=breakdown(record))))


def record_view(record: Record, path: str) -> RenderableType:
    """Return figures, operators and timeline of one record."""
    title = record_title(record, path)
    return Group(_figures(record, title), Text(), _operators(record), Text(), RecordTimelines([title], [record]))


def _figures(record: Record, title: str) -> Table:
    table = new_table(title, header=False)
    table.add_row("plan", f"{record.plan_hash}: {plan_text(record.plan)}")
    table.add_row("step", _step_text(record))
    table.add_row("tokens/s", rate_text(record.tokens_per_second))
    peak = f"{flops_text(record.machine.peak_flops_per_second)} {record.machine.precision}"
    table.add_row("MFU", f"{percent_text(record.mfu)} of {peak} a rank")
    places = breakdown(record)
    told = (f"{place} {percent_text(s / record.step_seconds)}" for place, s in places.items() if s)
    table.add_row("time goes to", ", ".join(told))
    mean, most = record.exposed_communication_seconds, record.exposed_communication_seconds_max
    table.add_row("exposed communication", f"{seconds_text(mean)} mean over ranks, {seconds_text(most)} at most")
    fullest = max(range(len(record.peak_bytes)), key=record.peak_bytes.__getitem__)
    parts = (f"{part} {bytes_text(sizes[fullest])}" for part, sizes in record.peak_parts.items() if sizes[fullest])
    table.add_row("peak memory", f"{bytes_text(record.peak_bytes[fullest])} on rank {fullest}: {', '.join(parts)}")
    if isinstance(record, Measurement) and record.losses:
        first, last = record.losses[0], record.losses[-1]
        table.add_row("loss", f"{_loss(first)} at first, {_loss(last)} after {len(record.losses)} steps")
        if record.loss_scales:
            skipped = f"{len(record.skipped_steps)} of {len(record.losses)} steps skipped"
            table.add_row("loss scale", f"{record.loss_scales[-1]:g} in the last step, {skipped}")
    if isinstance(record, Prediction):
        for warning in record.warnings:
            table.add_row("warning", warning)
    return table


def _step_text(record: Record) -> str:
    text = seconds_text(record.step_seconds)
    if isinstance(record, Prediction):
        return f"{text} (80% between {seconds_text(record.low_seconds)} and {seconds_text(record.high_seconds)})"
    if isinstance(record, Measurement) and record.steps:
        low, high = seconds_text(min(record.steps)), seconds_text(max(record.steps))
        return f"{text}, median of {len(record.steps)} steps between {low} and {high}"
    return text


def _operators(record: Record) -> Table:
    table = new_table("operators, per step")
    table.add_column("key", no_wrap=True)
    for name in ("calls", "seconds, mean over ranks", "of the step", "payload"):
        table.add_column(name, justify="right")
    seconds = key_seconds(record)
    keys = sorted(seconds, key=lambda key: -seconds[key])
    for key in keys[:MAX_OPERATORS]:
        time = record.operators[key]
        share = percent_text(seconds[key] / record.step_seconds)
        payload = bytes_text(time.bytes) if time.bytes else ""
        table.add_row(key, count_text(time.count), seconds_text(seconds[key]), share, payload)
    if rest := keys[MAX_OPERATORS:]:
        total = sum(seconds[key] for key in rest)
        table.add_row(f"{len(rest)} more", "", seconds_text(total), percent_text(total / record.step_seconds), "")
    return table


def _loss(value: float | None) -> str:
    """A loss in words; one that overflowed is none."""
    return "not a number" if value is None else f"{value:.4f}"
