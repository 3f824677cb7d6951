"""Scaling curves: a table in the terminal, and a figure of speedup and efficiency."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from math import ceil, floor, log10
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from planner.report.suggestion import choices_text, mesh_text
from planner.report.tables import new_table
from planner.report.units import bytes_text, count_text, percent_text, rate_text, seconds_text
from planner.sweep import Point, Sweep

BAR = 24
"""Columns of the efficiency bars in the terminal."""


def sweep_document(found: Sweep) -> dict[str, Any]:
    """Return a sweep as JSON."""
    return {
        "scaling": "weak" if found.weak else "strong",
        "tokens": found.tokens,
        "dollars_per_hour": found.dollars_per_hour,
        "points": [_document(point) for point in found.points],
    }


def _document(point: Point) -> dict[str, Any]:
    common = {"workers": point.workers, "global_batch_size": point.global_batch_size, "reason": point.reason}
    if point.best is None:
        return common
    plan, prediction = point.best.plan, point.best.prediction
    return common | {
        "mesh": {axis: plan.mesh.size(axis) for axis in ("dp", "tp", "pp", "cp")},
        "choices": choices_text(plan),
        "micro_batch_size": plan.micro_batch_size,
        "step_seconds": prediction.step_seconds,
        "low_seconds": prediction.low_seconds,
        "high_seconds": prediction.high_seconds,
        "tokens_per_second": prediction.tokens_per_second,
        "speedup": point.speedup,
        "efficiency": point.efficiency,
        "mfu": prediction.mfu,
        "peak_bytes": max(prediction.peak_bytes),
        "days": point.days,
        "dollars": point.dollars,
        "warnings": prediction.warnings,
    }


def sweep_view(found: Sweep) -> RenderableType:
    """Return the table of a sweep with a bar of efficiency per row, and its warnings."""
    parts: list[RenderableType] = [_table(found)]
    missing = [point for point in found.points if point.best is None]
    parts += [Text(f"{point.workers} workers: {point.reason}") for point in missing]
    if found.tokens is not None and found.dollars_per_hour is None:
        parts.append(Text("no price: the profile has no device.dollars_per_hour; give --dollars-per-hour"))
    warnings = {warning for point in found.points if point.best for warning in point.best.prediction.warnings}
    parts += [Text(f"warning: {warning}") for warning in sorted(warnings)[:5]]
    return Group(*parts)


def _table(found: Sweep) -> Table:
    batches = {point.global_batch_size for point in found.points}
    kind = "weak scaling, the batch grows with the workers" if found.weak else f"strong scaling, batch {min(batches)}"
    table = new_table(kind)
    for name in ("workers", "batch") if found.weak else ("workers",):
        table.add_column(name, justify="right")
    table.add_column("best plan", min_width=20)
    names = ["step", "tokens/s", "MFU", "peak", "speedup", "efficiency"]
    names += ["days"] if found.tokens is not None else []
    names += ["price"] if any(point.dollars is not None for point in found.points) else []
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for point in found.points:
        if point.best is not None:
            table.add_row(*_cells(found, point, names))
    return table


def _cells(found: Sweep, point: Point, names: Sequence[str]) -> Iterator[str]:
    assert point.best is not None
    plan, prediction = point.best.plan, point.best.prediction
    yield count_text(point.workers)
    if found.weak:
        yield count_text(point.global_batch_size)
    yield f"{mesh_text(plan)}, {choices_text(plan)}".removesuffix(", –")
    yield seconds_text(prediction.step_seconds)
    yield rate_text(prediction.tokens_per_second)
    yield percent_text(prediction.mfu)
    yield bytes_text(max(prediction.peak_bytes))
    yield f"{point.speedup:.2f}"
    yield percent_text(point.efficiency)
    if "days" in names:
        yield f"{point.days:.3g}"
    if "price" in names:
        yield "–" if point.dollars is None else f"${point.dollars:,.0f}"
    yield "█" * min(BAR, round((point.efficiency or 0.0) * BAR))


# ---- the figure ------------------------------------------------------------------------------------------------------

PANEL, LEFT, GAP, TOP, BOTTOM = 360, 64, 88, 36, 64
SPEEDUP, EFFICIENCY, MFU, IDEAL = "#4e79a7", "#59a14f", "#f28e2b", "#999"
_STYLE = "text{font:12px 'Helvetica Neue',Arial,sans-serif;fill:#222}.tick{font-size:11px}.title{font-weight:600}"


def sweep_svg(found: Sweep, title: str) -> str:
    """Return two panels over the number of workers: speedup, log-log, beside the ideal; efficiency and MFU."""
    points = [point for point in found.points if point.best is not None]
    ends = _decades(point.workers for point in points)
    width, height = LEFT + 2 * PANEL + GAP + 24, TOP + PANEL + BOTTOM
    right = LEFT + PANEL + GAP
    parts = [f'<text class="title" x="{LEFT}" y="18">{escape(title)}</text>']
    parts += [*_speedups(points, ends), *_shares(points, ends, right)]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}">\n'
        f'<style>{_STYLE}</style>\n<rect width="100%" height="100%" fill="white"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )


def _decades(values: Any) -> tuple[int, int]:
    """The powers of ten around positive values, at least one apart."""
    found = list(values)
    low, high = floor(log10(min(found))), ceil(log10(max(found)))
    return low, max(high, low + 1)


def _place(value: float, ends: tuple[int, int]) -> float:
    return (log10(value) - ends[0]) / (ends[1] - ends[0]) * PANEL


def _axis_x(left: float, ends: tuple[int, int]) -> Iterator[str]:
    bottom = TOP + PANEL
    for decade in range(ends[0], ends[1] + 1):
        x = left + _place(10.0**decade, ends)
        yield f'<line x1="{x:.1f}" y1="{TOP}" x2="{x:.1f}" y2="{bottom}" stroke="#ddd"/>'
        yield f'<text class="tick" x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{10**decade:,}</text>'
    yield f'<text x="{left + PANEL / 2}" y="{bottom + 36}" text-anchor="middle">workers</text>'


def _speedups(points: Sequence[Point], ends: tuple[int, int]) -> Iterator[str]:
    bottom, base = TOP + PANEL, points[0].workers
    rows = [(point.workers, point.speedup or 1.0) for point in points]
    heights = _decades([speedup for _, speedup in rows] + [count / base for count, _ in rows])
    yield from _axis_x(LEFT, ends)
    for decade in range(heights[0], heights[1] + 1):
        y = bottom - _place(10.0**decade, heights)
        yield f'<line x1="{LEFT}" y1="{y:.1f}" x2="{LEFT + PANEL}" y2="{y:.1f}" stroke="#ddd"/>'
        yield f'<text class="tick" x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{10.0**decade:g}</text>'

    def at(count: float, value: float) -> tuple[float, float]:
        return LEFT + _place(count, ends), bottom - _place(value, heights)

    yield _line([at(count, count / base) for count, _ in rows], IDEAL, "4 3")
    yield from _curve([(*at(n, s), f"{n:,} workers: {s:.2f}x") for n, s in rows], SPEEDUP)
    yield f'<text x="{LEFT + 8}" y="{TOP + 18}">speedup over {base:,} workers; dashed: ideal</text>'


def _shares(points: Sequence[Point], ends: tuple[int, int], left: float) -> Iterator[str]:
    bottom = TOP + PANEL
    top = max(1.0, *(point.efficiency or 0.0 for point in points))
    yield from _axis_x(left, ends)
    for percent in range(0, 101, 20):
        y = bottom - percent / 100 / top * PANEL
        yield f'<line x1="{left}" y1="{y:.1f}" x2="{left + PANEL}" y2="{y:.1f}" stroke="#ddd"/>'
        yield f'<text class="tick" x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{percent}%</text>'
    series = (
        ("efficiency", EFFICIENCY, [point.efficiency or 0.0 for point in points]),
        ("MFU", MFU, [point.best.prediction.mfu if point.best else 0.0 for point in points]),
    )
    for row, (name, colour, values) in enumerate(series):
        drawn = [
            (left + _place(p.workers, ends), bottom - v / top * PANEL, f"{p.workers:,} workers: {name} {v:.1%}")
            for p, v in zip(points, values, strict=True)
        ]
        yield from _curve(drawn, colour)
        y = bottom - 30 + 18 * row
        yield f'<circle cx="{left + 14}" cy="{y - 4}" r="5" fill="{colour}"/>'
        yield f'<text x="{left + 26}" y="{y}">{name}</text>'


def _line(places: Sequence[tuple[float, float]], colour: str, dash: str = "none") -> str:
    joined = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    return f'<polyline points="{joined}" fill="none" stroke="{colour}" stroke-width="2" stroke-dasharray="{dash}"/>'


def _curve(places: Sequence[tuple[float, float, str]], colour: str) -> Iterator[str]:
    yield _line([(x, y) for x, y, _ in places], colour)
    for x, y, label in places:
        yield f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"><title>{escape(label)}</title></circle>'
