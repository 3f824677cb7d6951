"""Charts without a library: a log-log panel of curves, and grouped bars; SVG text fit for a paper."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from math import log10
from typing import NamedTuple

COLOURS = ("#4e79a7", "#f28e2b", "#59a14f", "#b07aa1", "#76b7b2", "#9c755f")
MOST_TICKS = 8
_STYLE = "text{font:12px 'Helvetica Neue',Arial,sans-serif;fill:#222}.tick{font-size:11px}.title{font-weight:600}"


class Scale(NamedTuple):
    """Maps values to pixels, from `start` over `length` (negative: upwards)."""

    low: float
    high: float
    start: float
    length: float
    log: bool

    def at(self, value: float) -> float:
        """Return the pixel of a value."""
        if self.log:
            return self.start + log10(value / self.low) / log10(self.high / self.low) * self.length
        return self.start + (value - self.low) / (self.high - self.low) * self.length


def log_scale(values: Sequence[float], start: float, length: float) -> Scale:
    """Return a logarithmic scale around positive values, a little wider than they are."""
    low, high = min(values), max(values)
    margin = (high / low) ** 0.04 if high > low else 2.0
    return Scale(low / margin, high * margin, start, length, log=True)


def log_ticks(scale: Scale) -> list[float]:
    """Return powers of two inside a scale, thinned to at most MOST_TICKS."""
    powers = [2.0**power for power in range(-40, 60) if scale.low <= 2.0**power <= scale.high]
    step = -(-len(powers) // MOST_TICKS) or 1
    return powers[::step]


def page(width: float, height: float, parts: Sequence[str]) -> str:
    """Return a whole SVG figure."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:g}" height="{height:g}" '
        f'viewBox="0 0 {width:g} {height:g}">\n<style>{_STYLE}</style>\n'
        '<rect width="100%" height="100%" fill="white"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )


def text(x: float, y: float, words: str, *, anchor: str = "start", kind: str = "") -> str:
    """Return a line of text; `kind` is "", "tick" or "title"."""
    attribute = f' class="{kind}"' if kind else ""
    return f'<text{attribute} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'


def grid_x(scale: Scale, ticks: Sequence[tuple[float, str]], top: float, bottom: float) -> Iterator[str]:
    """Yield vertical grid lines with their labels below."""
    for value, label in ticks:
        x = scale.at(value)
        yield f'<line x1="{x:.1f}" y1="{top:.1f}" x2="{x:.1f}" y2="{bottom:.1f}" stroke="#ddd"/>'
        yield text(x, bottom + 16, label, anchor="middle", kind="tick")


def grid_y(scale: Scale, ticks: Sequence[tuple[float, str]], left: float, right: float) -> Iterator[str]:
    """Yield horizontal grid lines with their labels at the left."""
    for value, label in ticks:
        y = scale.at(value)
        yield f'<line x1="{left:.1f}" y1="{y:.1f}" x2="{right:.1f}" y2="{y:.1f}" stroke="#ddd"/>'
        yield text(left - 6, y + 4, label, anchor="end", kind="tick")


def line(places: Sequence[tuple[float, float]], colour: str, dash: str = "none") -> str:
    """Return a line through pixels."""
    joined = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    return f'<polyline points="{joined}" fill="none" stroke="{colour}" stroke-width="2" stroke-dasharray="{dash}"/>'


def curve(places: Sequence[tuple[float, float, str]], colour: str) -> Iterator[str]:
    """Yield a line with a dot at each place, and what it says on hover."""
    yield line([(x, y) for x, y, _ in places], colour)
    for x, y, label in places:
        yield (f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"><title>{escape(label)}</title></circle>')


def legend(names: Sequence[str], x: float, y: float) -> Iterator[str]:
    """Yield a legend, one name below the other, colours in order."""
    for row, name in enumerate(names):
        at = y + 18 * row
        yield f'<rect x="{x:.1f}" y="{at - 10:.1f}" width="12" height="12" fill="{COLOURS[row % len(COLOURS)]}"/>'
        yield text(x + 18, at, name)


ROW, GAP, LABEL, BARS = 13, 12, 250, 460


def bars(title: str, groups: Sequence[tuple[str, dict[str, tuple[float, str]]]]) -> str:
    """Return grouped horizontal bars: (label, {series: (value, words)}), series coloured alike in every group.

    What follows a colon in the title stands on a line below it.
    """
    names = list(dict.fromkeys(name for _, values in groups for name in values))
    top = max((value for _, values in groups for value, _ in values.values()), default=0.0) or 1.0
    heading, _, rest = title.partition(": ")
    y, parts = 62.0, [text(16, 20, heading, kind="title"), text(16, 38, rest)]
    for label, values in groups:
        parts.append(text(LABEL - 8, y + ROW * max(1, len(values)) / 2 + 4, label, anchor="end"))
        for name, (value, words) in values.items():
            colour, width = COLOURS[names.index(name) % len(COLOURS)], max(0.5, value / top * BARS)
            parts.append(
                f'<rect x="{LABEL}" y="{y:.1f}" width="{width:.1f}" height="{ROW - 2}" fill="{colour}">'
                f"<title>{escape(f'{label}, {name}: {words}')}</title></rect>"
            )
            parts.append(text(LABEL + width + 5, y + ROW - 3, words, kind="tick"))
            y += ROW
        y += GAP
    parts += legend(names, LABEL, y + 14)
    return page(LABEL + BARS + 110, y + 24 + 18 * len(names), parts)
