"""A comparison as one page: both timelines on one scale, zoomable, and what the error is made of.

The page is self-contained: styles, script and data are in it, and it loads nothing. The script is in page.js and the
styles in page.css beside this module; here are the data and the tables.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from importlib.resources import files
from typing import Any

import msgspec

from planner.compare import Comparison, Contribution
from planner.report.comparison import contribution_sentence, labels, sentences, spread_sentence
from planner.report.phases import PHASES, phase_of
from planner.report.timeline import thin
from planner.report.units import bytes_text, percent_text, seconds_text
from planner.trace import Record

MAX_OPERATORS = 60
"""Rows of the operators table."""

MAX_SPANS = 200_000
"""Spans of one record; of a longer trace the shortest are left out, and the page says so."""


def comparison_page(comparison: Comparison, first: Record, second: Record) -> str:
    """Return the page as HTML.

    Args:
        comparison: Of the two records.
        first: The one that stands as predicted.
        second: The one that stands as measured.
    """
    names = labels(comparison)
    data = {
        "phases": [{"name": phase.name, "colour": phase.colour} for phase in PHASES],
        "records": [_record(name, record) for name, record in zip(names, (first, second), strict=True)],
    }
    # "</" would end the script element inside a string; "<\/" is the same string to JavaScript.
    encoded = msgspec.json.encode(data).decode().replace("</", "<\\/")
    style, script = (_resource(name) for name in ("page.css", "page.js"))
    title = f"plan {comparison.plan_hashes[0]}: {names[0]} and {names[1]}"
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n"
        + "\n".join(_body(comparison, title, (first, second)))
        + f'\n<script type="application/json" id="data">{encoded}</script>\n'
        + f"<script>\n{script}</script>\n</body>\n</html>\n"
    )


def _resource(name: str) -> str:
    return files("planner.report").joinpath(name).read_text(encoding="utf-8")


def _record(name: str, record: Record) -> dict[str, Any]:
    """One record's spans, keys numbered: [lane, start, end, phase, key, waits]; lanes are streams of ranks."""
    shown = set(thin(sorted({row[0] for row in record.trace})))
    spans = [span for span in record.spans() if span.rank in shown]
    left_out = max(0, len(spans) - MAX_SPANS)
    if left_out:
        spans = sorted(sorted(spans, key=lambda span: -span.seconds)[:MAX_SPANS], key=lambda span: span.start)
    streams = sorted(
        {(span.rank, span.stream) for span in spans}, key=lambda lane: (lane[0], lane[1] != "compute", lane)
    )
    lanes = {lane: number for number, lane in enumerate(streams)}
    keys = {key: number for number, key in enumerate(dict.fromkeys(span.key for span in spans))}
    phases = {phase: number for number, phase in enumerate(PHASES)}
    rows = [
        (
            lanes[span.rank, span.stream],
            round(span.start, 9),
            round(span.end, 9),
            phases[phase_of(span)],
            keys[span.key],
            int(span.kind == "wait"),
        )
        for span in spans
    ]
    return {
        "name": f"{name} on {record.machine.name}",
        "step": record.step_seconds,
        "lanes": [{"rank": rank, "stream": stream} for rank, stream in streams],
        "keys": list(keys),
        "spans": sorted(rows),
        "leftOut": left_out,
    }


def _body(comparison: Comparison, title: str, records: tuple[Record, Record]) -> Iterator[str]:
    yield f"<h1>{escape(title)}</h1>"
    yield f"<p>{escape(_machines(comparison, records))}</p>"
    verdict, *largest = sentences(comparison)
    yield f"<p><strong>{escape(verdict)}</strong></p>"
    yield '<ol class="largest">'
    yield from (f"<li>{escape(each.partition('. ')[2])}</li>" for each in largest)
    yield "</ol>"
    yield f"<p>{escape(spread_sentence(comparison))}</p>"
    yield "<h2>Timelines</h2>"
    yield (
        '<p class="hint">Scroll to zoom, drag to pan, double-click for the whole step; hover for key and seconds. '
        "With the keyboard: + − ← → 0.</p>"
    )
    yield '<div id="legend"></div>'
    yield '<div id="frame"><canvas id="timeline" tabindex="0" aria-label="timelines of both records"></canvas>'
    yield '<div id="tip" hidden></div></div>'
    yield "<h2>What the step's error is made of</h2>"
    yield from _contributions(comparison)
    yield "<h2>Figures</h2>"
    yield from _figures(comparison)
    yield "<h2>Operators</h2>"
    yield from _operators(comparison)


def _machines(comparison: Comparison, records: tuple[Record, Record]) -> str:
    model, mesh = records[0].plan.model, records[0].plan.mesh
    axes = " ".join(f"{axis}={mesh.size(axis)}" for axis in ("dp", "tp", "pp", "cp"))
    first, second = labels(comparison)
    return f"{model.name}, {axes}; {first}: {comparison.machines[0]}; {second}: {comparison.machines[1]}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """A table whose first column is text; cells are HTML already."""
    yield "<table><thead><tr>" + "".join(f"<th>{escape(name)}</th>" for name in head) + "</tr></thead><tbody>"
    yield from ("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    yield "</tbody></table>"


def _contributions(comparison: Comparison) -> Iterator[str]:
    widest = max((abs(term.error_seconds) for term in comparison.contributions), default=0.0)
    rows = []
    for term in comparison.contributions:
        if term.predicted_seconds or term.measured_seconds:
            name = escape(f"{term.cause}: {term.name}")
            rows.append(
                (
                    f'<span title="{escape(contribution_sentence(term, comparison))}">{name}</span>',
                    seconds_text(term.predicted_seconds),
                    seconds_text(term.measured_seconds),
                    seconds_text(term.error_seconds),
                    percent_text(term.share, signed=True),
                    _bar(term, widest),
                )
            )
    yield from _table(("term", *labels(comparison), "error", "of the step", ""), rows)


def _bar(term: Contribution, widest: float) -> str:
    """A bar to the left for what was predicted too low, to the right for too high."""
    width = 100 * abs(term.error_seconds) / widest if widest else 0.0
    side = "low" if term.error_seconds < 0 else "high"
    return f'<div class="bar {side}"><i style="width:{width:.1f}%"></i></div>'


def _figures(comparison: Comparison) -> Iterator[str]:
    rows = []
    for figure in comparison.figures:
        if figure.name.endswith("_seconds"):
            values = seconds_text(figure.predicted), seconds_text(figure.measured)
        elif figure.name.endswith("_fraction"):
            values = percent_text(figure.predicted), percent_text(figure.measured)
        else:
            values = bytes_text(figure.predicted), bytes_text(figure.measured)
        name = figure.name.rpartition("_")[0].replace("_", " ")
        rows.append((escape(name), *values, percent_text(figure.error, signed=True)))
    yield from _table(("per step, mean over ranks", *labels(comparison), "error"), rows)


def _operators(comparison: Comparison) -> Iterator[str]:
    rows = []
    for each in comparison.operators[:MAX_OPERATORS]:
        values = (each.predicted_seconds, each.measured_seconds)
        cells = ("–" if value is None else seconds_text(value) for value in values)
        rows.append((f"<code>{escape(each.key)}</code>", *cells, percent_text(each.error, signed=True)))
    yield from _table(("key", *labels(comparison), "error"), rows)
    if rest := len(comparison.operators) - len(rows):
        yield f"<p>{rest} more keys are in the JSON of <code>planner compare --json</code>.</p>"
