"""Spans as a trace file of Chrome and Perfetto: a process group per record, a thread per rank and stream."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from planner.report.phases import phase_of
from planner.trace import Record


def trace_events(titles: Sequence[str], records: Sequence[Record]) -> dict[str, Any]:
    """Return the document of the Trace Event Format (complete events, times in microseconds)."""
    events: list[dict[str, Any]] = []
    for process, (title, record) in enumerate(zip(titles, records, strict=True)):
        events.append(_name("process_name", title, process, 0))
        events.append(
            {"ph": "M", "name": "process_sort_index", "pid": process, "tid": 0, "args": {"sort_index": process}}
        )
        lanes: dict[tuple[int, str], int] = {}
        for rank, stream in sorted({(row[0], row[1]) for row in record.trace}):
            lanes[rank, stream] = len(lanes)
            name = f"rank {rank}" if stream == "compute" else f"rank {rank}, {stream}"
            events.append(_name("thread_name", name, process, lanes[rank, stream]))
        events += [
            {
                "ph": "X",
                "name": span.key,
                "cat": f"{span.kind},{phase_of(span).name}",
                "pid": process,
                "tid": lanes[span.rank, span.stream],
                "ts": span.start * 1e6,
                "dur": span.seconds * 1e6,
                "args": {"kind": span.kind},
            }
            for span in record.spans()
        ]
    return {"displayTimeUnit": "ms", "traceEvents": events}


def _name(what: str, name: str, process: int, thread: int) -> dict[str, Any]:
    return {"ph": "M", "name": what, "pid": process, "tid": thread, "args": {"name": name}}
