"""Timelines as an SVG figure fit for a paper: one lane per rank, a shared time axis, a legend. No library needed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from math import floor, log10

from planner.report.phases import BUBBLE, PHASES, Phase, phase_of
from planner.report.timeline import thin
from planner.report.units import seconds_text
from planner.trace import Record, Span

WIDTH, LEFT, RIGHT, TOP = 960, 64, 24, 12
LANE, GAP, TITLE, AXIS, LEGEND = 18, 4, 26, 30, 22
TICKS = 8  # at most so many intervals on the time axis
LEAST_PIXELS = 0.25  # spans of one phase closer than this are drawn as one

_STYLE = "text{font:12px 'Helvetica Neue',Arial,sans-serif;fill:#222}.title{font-weight:600}.tick{font-size:11px}"


def timeline_svg(titles: Sequence[str], records: Sequence[Record]) -> str:
    """Return the figure: each record's ranks under its title, all on the scale of the longest step."""
    total = max(record.step_seconds for record in records)
    scale = (WIDTH - LEFT - RIGHT) / total
    lanes: list[str] = []
    used: set[Phase] = set()
    y = TOP
    for title, record in zip(titles, records, strict=True):
        label = f"{title}: {seconds_text(record.step_seconds)} a step"
        lanes.append(f'<text class="title" x="{LEFT}" y="{y + 15}">{escape(label)}</text>')
        y += TITLE
        for rank in thin(sorted({row[0] for row in record.trace})):
            lanes.append(f'<text x="{LEFT - 8}" y="{y + 13}" text-anchor="end">rank {rank}</text>')
            spans = [span for span in record.spans() if span.rank == rank and span.stream == "compute"]
            for phase, start, end in runs(spans, LEAST_PIXELS / scale):
                used.add(phase)
                lanes.append(_bar(phase, LEFT + start * scale, y, (end - start) * scale))
            y += LANE + GAP
    axis_top = y
    lanes += _axis(total, scale, axis_top)
    shown = [phase for phase in PHASES if phase in used]
    lanes += _legend(shown, axis_top + AXIS)
    rows = -(-len(shown) // 4)
    height = axis_top + AXIS + rows * LEGEND + TOP
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}">\n'
        f'<style>{_STYLE}</style>\n<rect width="100%" height="100%" fill="white"/>\n' + "\n".join(lanes) + "\n</svg>\n"
    )


def runs(spans: Sequence[Span], least_seconds: float) -> Iterator[tuple[Phase, float, float]]:
    """Yield (phase, start, end) with neighbours of one phase joined where less than `least_seconds` lies between."""
    current: tuple[Phase, float, float] | None = None
    for span in sorted(spans, key=lambda each: each.start):
        phase = phase_of(span)
        if current is not None and current[0] == phase and span.start - current[2] <= least_seconds:
            current = (phase, current[1], max(current[2], span.end))
            continue
        if current is not None:
            yield current
        current = (phase, span.start, span.end)
    if current is not None:
        yield current


def _bar(phase: Phase, x: float, y: float, width: float) -> str:
    height = LANE if phase is not BUBBLE else LANE / 2
    top = y if phase is not BUBBLE else y + LANE / 4
    return (
        f'<rect x="{x:.2f}" y="{top:g}" width="{max(width, LEAST_PIXELS):.2f}" height="{height:g}" '
        f'fill="{phase.colour}"/>'
    )


def tick_seconds(total_seconds: float) -> float:
    """Return the distance between ticks: 1, 2 or 5 times a power of ten, at most TICKS of them."""
    rough = total_seconds / TICKS
    power = 10.0 ** floor(log10(rough))
    return next(step * power for step in (1, 2, 5, 10) if step * power >= rough * (1 - 1e-9))


def _axis(total: float, scale: float, y: float) -> Iterator[str]:
    yield f'<line x1="{LEFT}" y1="{y}" x2="{LEFT + total * scale:.2f}" y2="{y}" stroke="#222"/>'
    step = tick_seconds(total)
    for index in range(int(total / step * (1 + 1e-9)) + 1):
        x = LEFT + index * step * scale
        yield f'<line x1="{x:.2f}" y1="{y}" x2="{x:.2f}" y2="{y + 4}" stroke="#222"/>'
        yield f'<text class="tick" x="{x:.2f}" y="{y + 17}" text-anchor="middle">{seconds_text(index * step)}</text>'


def _legend(phases: Sequence[Phase], y: float) -> Iterator[str]:
    column = (WIDTH - LEFT - RIGHT) / 4
    for index, phase in enumerate(phases):
        x, top = LEFT + index % 4 * column, y + index // 4 * LEGEND
        yield f'<rect x="{x:g}" y="{top:g}" width="14" height="14" fill="{phase.colour}"/>'
        yield f'<text x="{x + 20:g}" y="{top + 12:g}">{escape(phase.name)}</text>'
