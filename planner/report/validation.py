"""The scoreboard of predictions against published measurements: table, JSON, and the log-log chart."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from math import ceil, floor, log10
from typing import Any

import msgspec
from rich.console import Group, RenderableType
from rich.text import Text

from planner.published.fit import Fit
from planner.published.validate import RowScore, Validation
from planner.report.tables import new_table

SIZE, LEFT, TOP, RIGHT = 560, 64, 24, 300
RADIUS = 2.6
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f3c8d", "#666666", "#b8a000", "#000000")
_STYLE = "text{font:12px 'Helvetica Neue',Arial,sans-serif;fill:#222}.title{font-weight:600}.tick{font-size:11px}"

_COLUMNS = (
    ("MAPE", "mape"),
    ("bias", "bias"),
    ("Spearman", "spearman"),
    ("regret", "regret_mean"),
    ("in 80%", "coverage_80"),
    ("memory", "memory_mape"),
    ("OOM", "oom_right"),
    ("baseline", "baseline_mape"),
)


def validation_document(found: Validation) -> dict[str, Any]:
    """Return the validation as JSON; shares and errors are fractions."""
    document: dict[str, Any] = msgspec.to_builtins(found)
    return document


def validation_view(found: Validation) -> RenderableType:
    """Return the scoreboard, then what was left out and why."""
    table = new_table("predicted against published measurements")
    table.add_column("source", no_wrap=True)
    table.add_column("rows", justify="right")
    for title, _ in _COLUMNS:
        table.add_column(title, justify="right", no_wrap=True)
    for source in found.sources:
        figures = (_figure(name, getattr(source, name)) for _, name in _COLUMNS)
        table.add_row(source.source, str(source.predicted), *figures)
    left_out = [f"{s.source} row {skip.row}: {skip.reason}" for s in found.sources for skip in s.skipped]
    lines = [*(f"skipped {line}" for line in left_out), *(f"note: {note}" for note in found.notes)]
    return Group(table, *(Text(line) for line in lines))


def _figure(name: str, value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.3f}" if name == "spearman" else f"{100 * value:.1f}%"


def fit_document(fit: Fit, path: str) -> dict[str, Any]:
    """Return what a fit did as JSON."""
    return {
        "machine": fit.machine.name,
        "file": path,
        "rows": len(fit.rows),
        "provenance": fit.machine.residuals.provenance,
        "step_log_sigma": fit.machine.residuals.step_log_sigma,
        "sources": [
            {"source": source, "rows": count, "mape": fitted, "held_out_mape": held}
            for source, count, fitted, held in fit.errors()
        ],
    }


def fit_view(fit: Fit, path: str) -> RenderableType:
    """Return the errors of a fit by source, on its own rows and on operating points it did not see."""
    table = new_table(f"{fit.machine.name}: {fit.machine.residuals.provenance}")
    for title in ("source", "rows", "MAPE", "held out"):
        table.add_column(title, justify="left" if title == "source" else "right", no_wrap=True)
    for source, count, fitted, held in fit.errors():
        table.add_row(source, str(count), f"{100 * fitted:.1f}%", "–" if held is None else f"{100 * held:.1f}%")
    return Group(table, Text(f"wrote {path}"))


def validation_svg(found: Validation) -> str:
    """Return predicted over measured seconds as a log-log chart, one colour a source."""
    rows = [row for row in found.rows if row.measured_seconds is not None]
    values = [row.predicted_seconds for row in rows] + [row.measured_seconds or 1.0 for row in rows]
    low, high = floor(log10(min(values))), ceil(log10(max(values)))
    high = max(high, low + 1)
    sources = [source.source for source in found.sources]
    parts = [*_frame(low, high), *_points(rows, sources, low, high), *_legend(found)]
    width, height = LEFT + SIZE + RIGHT, TOP + SIZE + 48
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}">\n'
        f'<style>{_STYLE}</style>\n<rect width="100%" height="100%" fill="white"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )


def _place(value: float, low: int, high: int) -> float:
    return (log10(value) - low) / (high - low) * SIZE


def _frame(low: int, high: int) -> Iterator[str]:
    """The axes, one grid line a decade, the diagonal and 10% either side."""
    bottom = TOP + SIZE
    for decade in range(low, high + 1):
        at = _place(10.0**decade, low, high)
        label = f"{10.0**decade:g} s"
        yield f'<line x1="{LEFT + at:.1f}" y1="{TOP}" x2="{LEFT + at:.1f}" y2="{bottom}" stroke="#ddd"/>'
        yield f'<line x1="{LEFT}" y1="{bottom - at:.1f}" x2="{LEFT + SIZE}" y2="{bottom - at:.1f}" stroke="#ddd"/>'
        yield f'<text class="tick" x="{LEFT + at:.1f}" y="{bottom + 16}" text-anchor="middle">{label}</text>'
        yield f'<text class="tick" x="{LEFT - 6}" y="{bottom - at + 4:.1f}" text-anchor="end">{label}</text>'
    shift = log10(1.1) / (high - low) * SIZE
    for offset, dash in ((0.0, "none"), (shift, "3 3"), (-shift, "3 3")):
        start, stop = max(0.0, -offset), SIZE - max(0.0, offset)
        yield (
            f'<line x1="{LEFT + start:.1f}" y1="{bottom - start - offset:.1f}" x2="{LEFT + stop:.1f}" '
            f'y2="{bottom - stop - offset:.1f}" stroke="#999" stroke-dasharray="{dash}"/>'
        )
    yield f'<text x="{LEFT + SIZE / 2}" y="{bottom + 36}" text-anchor="middle">measured step</text>'
    middle = TOP + SIZE / 2
    yield f'<text x="14" y="{middle}" text-anchor="middle" transform="rotate(-90 14 {middle})">predicted step</text>'


def _points(rows: Sequence[RowScore], sources: Sequence[str], low: int, high: int) -> Iterator[str]:
    for row in rows:
        x = LEFT + _place(row.measured_seconds or 1.0, low, high)
        y = TOP + SIZE - _place(row.predicted_seconds, low, high)
        colour = COLOURS[sources.index(row.source) % len(COLOURS)]
        times = f"measured {row.measured_seconds:.4g} s, predicted {row.predicted_seconds:.4g} s"
        label = f"{row.source} row {row.row}: {times}"
        yield (
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{RADIUS}" fill="{colour}" fill-opacity="0.65">'
            f"<title>{escape(label)}</title></circle>"
        )


def _legend(found: Validation) -> Iterator[str]:
    x = LEFT + SIZE + 20
    for index, source in enumerate(found.sources):
        y = TOP + 14 + 20 * index
        error = "–" if source.mape is None else f"{100 * source.mape:.1f}%"
        yield f'<circle cx="{x}" cy="{y - 4}" r="5" fill="{COLOURS[index % len(COLOURS)]}"/>'
        yield f'<text x="{x + 12}" y="{y}">{escape(source.source)}: {source.predicted} rows, {error}</text>'
    yield f'<text class="tick" x="{x}" y="{TOP + 24 + 20 * len(found.sources)}">dashed: 10% either side</text>'
