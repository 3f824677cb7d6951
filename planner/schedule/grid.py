"""CSV grids of schedules in the form of torch.distributed.pipelining: one row per rank, an empty cell for idle."""

from __future__ import annotations

import csv
import io

from planner.errors import ScheduleError
from planner.schedule.instructions import Instruction, Schedule, parse_instruction


def from_csv(text: str, *, name: str = "custom", num_micro_batches: int | None = None) -> Schedule:
    """Read a schedule, compute-only or with written-out communication; idle cells are dropped.

    Stages, their ranks and (unless given) the number of micro-batches follow from the cells; `check` tells whether
    the result can run.

    Args:
        text: The CSV.
        name: The name of the schedule.
        num_micro_batches: Micro-batches per step; None for the largest index plus one.

    Raises:
        ScheduleError: no CSV, a cell that is no instruction (with its place), a stage on two ranks or on none.
    """
    programs = []
    try:
        rows = [row for row in csv.reader(io.StringIO(text)) if row]
    except csv.Error as error:
        raise ScheduleError(f"the schedule is not CSV: {error}; write one row per rank, as in 0F0,0B0") from None
    for rank, row in enumerate(rows):
        program = []
        for column, cell in enumerate(row):
            if cell.strip():
                try:
                    program.append(parse_instruction(cell))
                except ScheduleError as error:
                    raise ScheduleError(f"row {rank + 1}, column {column + 1}: {error}") from None
        programs.append(tuple(program))
    place = _placement(programs)
    parts = [part for program in programs for step in program for part in step.flat()]
    if num_micro_batches is None:
        num_micro_batches = 1 + max((part.micro_batch for part in parts), default=-1)
    return Schedule(name, len(place), len(rows), num_micro_batches, place, tuple(programs))


def to_csv(schedule: Schedule) -> str:
    """Return the programs as CSV, one row per rank, without idle cells; `from_csv` reads it back."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    for program in schedule.programs:
        writer.writerow([str(step) for step in program])
    return out.getvalue()


def _placement(programs: list[tuple[Instruction, ...]]) -> tuple[int, ...]:
    owner: dict[int, int] = {}
    for rank, program in enumerate(programs):
        for step in program:
            for part in step.flat():
                if owner.setdefault(part.stage, rank) != rank:
                    raise ScheduleError(
                        f"{part} is on rank {rank}, but rank {owner[part.stage]} runs stage {part.stage}; keep it there"
                    )
    if not owner:
        raise ScheduleError("the CSV holds no instruction; write one row per rank, as in 0F0,0B0")
    if missing := sorted(set(range(max(owner) + 1)) - set(owner)):
        raise ScheduleError(f"no rank runs stage {missing[0]}, but one runs stage {max(owner)}; number stages from 0")
    return tuple(owner[stage] for stage in range(len(owner)))
