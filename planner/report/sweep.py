"""Scaling curves: a table in the terminal, and a figure of speedup and efficiency."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from planner.compare import PLACES, breakdown
from planner.report.chart import (
    COLOURS,
    MOST_TICKS,
    Scale,
    curve,
    grid_x,
    grid_y,
    legend,
    line,
    log_scale,
    log_ticks,
    page,
    text,
)
from planner.report.suggestion import MATTERS, PLACE_NAMES, choices_text, plan_text
from planner.report.tables import new_table
from planner.report.units import bytes_text, count_text, percent_text, rate_text, seconds_text
from planner.search.sweep import Point, Sweep

BAR = 24
"""Columns of the efficiency bars in the terminal."""


def sweep_document(found: Sweep) -> dict[str, Any]:
    """Return a sweep as JSON."""
    return {
        "scaling": "weak" if found.weak else "strong",
        "tokens": found.tokens,
        "dollars_per_hour": found.dollars_per_hour,
        "price_provenance": found.price_provenance,
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
        "transport": plan.transport,
        "breakdown_seconds": breakdown(prediction),
        "days": point.days,
        "dollars": point.dollars,
        "warnings": prediction.warnings,
    }


def sweep_view(found: Sweep, *, explain: bool = False) -> RenderableType:
    """Return the table of a sweep with a bar of efficiency per row, its price, what bounds each point, its warnings."""
    parts: list[RenderableType] = [_table(found)]
    parts += [Text(sentence) for sentence in bound_sentences(found)] if explain else []
    missing = [point for point in found.points if point.best is None]
    parts += [Text(f"{point.workers} workers: {point.reason}") for point in missing]
    if found.tokens is not None and found.dollars_per_hour is None:
        parts.append(Text("no price: the profile has no device.dollars_per_hour; give --dollars-per-hour"))
    elif found.tokens is not None and found.price_provenance:
        parts.append(Text(f"price: ${found.dollars_per_hour:.2f} a device and hour; {found.price_provenance}"))
    warnings = {warning for point in found.points if point.best for warning in point.best.prediction.warnings}
    parts += [Text(f"warning: {warning}") for warning in sorted(warnings)[:5]]
    return Group(*parts)


def bound_sentences(found: Sweep) -> Iterator[str]:
    """Yield what the step of every point is spent on, largest first."""
    for point in found.points:
        if point.best is not None:
            places, step = breakdown(point.best.prediction), point.best.prediction.step_seconds
            largest = sorted((p for p in PLACES if places[p] > MATTERS * step), key=lambda p: -places[p])
            told = ", ".join(f"{PLACE_NAMES[p]} {percent_text(places[p] / step)}" for p in largest)
            yield f"{count_text(point.workers)} workers: {told}"


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
    yield plan_text(plan)
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
IDEAL = "#999"


def sweep_svg(found: Sweep, title: str) -> str:
    """Return two panels over the number of workers: speedup beside the ideal; efficiency and MFU."""
    points = [point for point in found.points if point.best is not None]
    parts = [text(LEFT, 18, title, kind="title"), *_speedups(points), *_shares(points, LEFT + PANEL + GAP)]
    return page(LEFT + 2 * PANEL + GAP + 24, TOP + PANEL + BOTTOM, parts)


def _workers_axis(points: Sequence[Point], left: float) -> tuple[Scale, list[str]]:
    scale = log_scale([point.workers for point in points], left, PANEL)
    step = -(-len(points) // MOST_TICKS)
    ticks = [(float(point.workers), f"{point.workers:,}") for point in points[::step]]
    bottom = TOP + PANEL
    return scale, [
        *grid_x(scale, ticks, TOP, bottom),
        text(left + PANEL / 2, bottom + 36, "workers", anchor="middle"),
    ]


def _speedups(points: Sequence[Point]) -> Iterator[str]:
    base = points[0].workers
    across, parts = _workers_axis(points, LEFT)
    yield from parts
    values = [point.speedup or 1.0 for point in points]
    ideal = [point.workers / base for point in points]
    up = log_scale(values + ideal, TOP + PANEL, -PANEL)
    yield from grid_y(up, [(tick, f"{tick:g}") for tick in log_ticks(up)], LEFT, LEFT + PANEL)
    places = [across.at(point.workers) for point in points]
    yield line([(x, up.at(each)) for x, each in zip(places, ideal, strict=True)], IDEAL, "4 3")
    labels = [f"{point.workers:,} workers: {point.speedup:.2f}x" for point in points]
    yield from curve([(x, up.at(v), each) for x, v, each in zip(places, values, labels, strict=True)], COLOURS[0])
    yield text(LEFT + 8, TOP + 18, f"speedup over {base:,} workers; dashed: ideal")


def _shares(points: Sequence[Point], left: float) -> Iterator[str]:
    across, parts = _workers_axis(points, left)
    yield from parts
    top = max(1.0, *(point.efficiency or 0.0 for point in points))
    up = Scale(0.0, top, TOP + PANEL, -PANEL, log=False)
    yield from grid_y(up, [(tick / 100, f"{tick}%") for tick in range(0, 101, 20)], left, left + PANEL)
    series = {
        "efficiency": [point.efficiency or 0.0 for point in points],
        "MFU": [point.best.prediction.mfu if point.best else 0.0 for point in points],
    }
    for colour, (name, values) in zip(COLOURS, series.items(), strict=False):
        rows = zip(points, values, strict=True)
        yield from curve(
            [(across.at(p.workers), up.at(v), f"{p.workers:,} workers: {name} {v:.1%}") for p, v in rows], colour
        )
    yield from legend(list(series), left + 10, TOP + PANEL - 30)
