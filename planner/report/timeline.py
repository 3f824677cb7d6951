"""Timelines in the terminal: one row per rank, one cell per stretch of time, coloured by what fills most of it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from planner.report.phases import PHASES, Phase, phase_of
from planner.report.units import seconds_text
from planner.simulate import ScheduleReplay
from planner.trace import Record, Span

MAX_RANKS = 32
"""Rows of one timeline; more ranks than that are thinned out evenly, and the title says so."""

_OP_PHASE = {"F": 0, "B": 1, "I": 1, "W": 2, "OVERLAP_F_B": 1}


class RecordTimelines:
    """One record's timeline, or several one over the other on the same scale."""

    def __init__(self, titles: Sequence[str], records: Sequence[Record]) -> None:
        self.titles, self.records = titles, records

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield the rows, then the axis and the legend."""
        total = max(record.step_seconds for record in self.records)
        label = 2 + max((len(f"rank {row[0]}") for record in self.records for row in record.trace), default=6)
        width = max(20, options.max_width - label)
        used: dict[Phase, None] = {}
        for title, record in zip(self.titles, self.records, strict=True):
            ranks = sorted({row[0] for row in record.trace})
            shown = thin(ranks)
            note = "" if len(shown) == record.plan.mesh.world_size else f"; ranks {', '.join(map(str, shown))}"
            yield Text(f"{title}: {seconds_text(record.step_seconds)} a step{note}", style="bold")
            spans: dict[int, list[Span]] = defaultdict(list)
            for span in record.spans():
                if span.stream == "compute":
                    spans[span.rank].append(span)
            for rank in shown:
                cells = fill(spans[rank], total, width)
                used |= dict.fromkeys(cell for cell in cells if cell is not None)
                yield Text(f"rank {rank}".ljust(label)) + _row(cells)
        yield Text(" " * label) + _axis(total, width)
        yield from legend([phase for phase in PHASES if phase in used], options.max_width)


def thin(ranks: Sequence[int]) -> list[int]:
    """Return at most MAX_RANKS of the ranks, evenly spread, first and last among them."""
    if len(ranks) <= MAX_RANKS:
        return list(ranks)
    step = (len(ranks) - 1) / (MAX_RANKS - 1)
    return [ranks[round(index * step)] for index in range(MAX_RANKS)]


def fill(spans: Sequence[Span], total_seconds: float, width: int) -> list[Phase | None]:
    """Return for each of `width` cells the phase that fills most of it; None where nothing runs."""
    cover: list[dict[Phase, float]] = [{} for _ in range(width)]
    scale = width / total_seconds if total_seconds else 0.0
    for span in spans:
        phase, start, end = phase_of(span), span.start * scale, span.end * scale
        for cell in range(max(0, int(start)), min(width, int(end) + 1)):
            share = min(end, cell + 1) - max(start, cell)
            if share > 0:
                cover[cell][phase] = cover[cell].get(phase, 0.0) + share
    return [max(cell, key=cell.__getitem__) if cell else None for cell in cover]


def _row(cells: Sequence[Phase | None]) -> Text:
    row = Text()
    for cell in cells:
        row.append(*((" ", "") if cell is None else (cell.letter, f"black on {cell.colour}")))
    return row


def _axis(total_seconds: float, width: int) -> Text:
    right = seconds_text(total_seconds)
    return Text("0" + right.rjust(width - 1), style="dim")


def legend(phases: Sequence[Phase], width: int) -> Iterator[Text]:
    """Yield lines with the letters and colours used and their names, no entry broken over two lines."""
    line = Text()
    for phase in phases:
        entry = Text(f" {phase.letter} ", f"black on {phase.colour}") + Text(f" {phase.name}   ", "")
        if line and len(line) + len(entry) > width:
            yield line
            line = Text()
        line += entry
    yield line


class ScheduleTimeline:
    """A replayed schedule as the papers draw it: a cell per unit of time, the micro-batch number in it."""

    def __init__(self, replay: ScheduleReplay) -> None:
        self.replay = replay

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield one row per rank."""
        replay = self.replay
        total = replay.makespan_seconds
        label = 2 + len(f"rank {replay.schedule.num_ranks - 1}")
        width = options.max_width - label
        shortest = min((s for s in replay.table.seconds[: replay.num_instructions] if s > 0), default=1.0)
        digits = len(str(max(0, replay.schedule.num_micro_batches - 1)))
        roomy = (digits + 1) / shortest  # columns per second at which the shortest cell holds its letter and number
        scale = min(roomy, width / total) if total else 0.0
        used: dict[Phase, None] = {}
        for rank in range(replay.schedule.num_ranks):
            yield Text(f"rank {rank}".ljust(label)) + self._row(rank, scale, used)
        yield from legend([phase for phase in PHASES if phase in used], options.max_width)

    def _row(self, rank: int, scale: float, used: dict[Phase, None]) -> Text:
        replay, row = self.replay, Text()
        chunks = replay.schedule.stages_of(rank)
        steps = zip(replay.schedule.programs[rank], replay.start_seconds(rank), replay.end_seconds(rank), strict=True)
        for step, start, end in steps:
            first, last = round(start * scale), round(end * scale)
            if last <= first or step.op not in _OP_PHASE:
                continue
            row.append(" " * (first - len(row)))
            phase = PHASES[_OP_PHASE[step.op]]
            used[phase] = None
            part = step.flat()[0]
            text = f"{'X' if step.parts else step.op}{part.micro_batch}"
            # Cells of the second and later model chunks of a rank are underlined.
            style = f"{'underline ' if part.stage != chunks[0] else ''}black on {phase.colour}"
            row.append(text[: last - first].ljust(last - first), style)
        return row
