"""Whether a schedule can run: happens-before, completeness, channel order, memory, no deadlock.

Channels are synchronous and have no buffer. A SEND is posted and never waited for, so it cannot block its rank; a
RECV (in a schedule without written-out communication: the compute step that needs the message) waits. Messages are
first-in first-out per (source rank, destination rank, direction), which is what MPI guarantees for one tag.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from typing import NoReturn

from planner.errors import ScheduleError
from planner.schedule.instructions import COMMUNICATION_OPS, COMPUTE_OPS, STAGE_OPS, Instruction, Schedule

Fact = tuple[str, int, int]
"""(what is done, stage, micro-batch): F, G (gradient of the input), W (of the weights), or a communication op."""

_GRID_COLUMNS_EACH_SIDE = 5
_PRODUCES = {"F": ("F",), "B": ("G", "W"), "I": ("G",), "W": ("W",)}


def check(schedule: Schedule, *, forward_only: bool = False, memory_limit: float | None = None) -> None:
    """Raise unless every rank can run its program to the end and the step is complete.

    Args:
        schedule: With or without written-out communication.
        forward_only: The step has forwards only; any backward is then an error.
        memory_limit: Activations, in model chunks from F until B or I, that a rank may hold at once.

    Raises:
        ScheduleError: names the rule broken and prints the grid with the bad cell marked, as in `>3B0<`.
    """
    _check_cells(schedule)
    _check_deadlock(schedule)
    _check_complete(schedule, forward_only=forward_only)
    _check_channels(schedule)
    if memory_limit is not None:
        if math.isnan(memory_limit):
            raise ScheduleError("memory limit of nan activations; give a number of at least 1")
        _check_memory(schedule, memory_limit)


def format_grid(schedule: Schedule, marked: tuple[int, int] | None = None) -> str:
    """Return the programs as a text grid, one row per rank; a marked (rank, position) shows as `>3B0<`.

    A long grid is cut to a few columns around the mark.
    """
    longest = max(map(len, schedule.programs), default=0)
    first, last = 0, longest
    if marked is not None:
        first = max(0, marked[1] - _GRID_COLUMNS_EACH_SIDE)
        last = min(longest, marked[1] + _GRID_COLUMNS_EACH_SIDE + 1)
    rows = [["step", *(str(step) for step in range(first, last))]]
    for rank, program in enumerate(schedule.programs):
        cells = [str(program[step]) if step < len(program) else "" for step in range(first, last)]
        if marked is not None and marked[0] == rank:
            cells[marked[1] - first] = f">{cells[marked[1] - first]}<"
        rows.append([f"rank {rank}", *cells])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def produced(step: Instruction) -> Iterator[Fact]:
    """Yield what is true once `step` has run."""
    for part in step.flat():
        for what in _PRODUCES.get(part.op, (part.op,)):
            yield what, part.stage, part.micro_batch


def required(step: Instruction, schedule: Schedule, *, lowered: bool) -> Iterator[Fact]:
    """Yield what must be true before `step` can run."""
    for part in step.flat():
        yield from _required_by_part(part, schedule, lowered=lowered)


def _required_by_part(part: Instruction, schedule: Schedule, *, lowered: bool) -> Iterator[Fact]:
    stage, op, micro_batch, _ = part
    place = schedule.stage_to_rank
    if op == "F" and stage > 0:
        remote = lowered and place[stage - 1] != place[stage]
        yield ("RECV_F", stage, micro_batch) if remote else ("F", stage - 1, micro_batch)
    elif op in ("B", "I"):
        yield "F", stage, micro_batch
        if stage < schedule.num_stages - 1:
            remote = lowered and place[stage + 1] != place[stage]
            yield ("RECV_B", stage, micro_batch) if remote else ("G", stage + 1, micro_batch)
    elif op in ("W", "SEND_B"):
        yield "G", stage, micro_batch
    elif op == "SEND_F":
        yield "F", stage, micro_batch
    elif op == "RECV_F":
        yield "SEND_F", stage - 1, micro_batch
    elif op == "RECV_B":
        yield "SEND_B", stage + 1, micro_batch


def _fail(schedule: Schedule, rank: int, position: int, message: str) -> NoReturn:
    raise ScheduleError(f"{schedule.name}: {message}\n{format_grid(schedule, (rank, position))}")


def _check_cells(schedule: Schedule) -> None:
    """Every op is known, stands on the rank of its stage and stands there once."""
    seen: set[Fact] = set()
    for rank, position, step in schedule.instructions():
        for part in step.flat():
            if part.op not in COMPUTE_OPS | COMMUNICATION_OPS | STAGE_OPS:
                _fail(schedule, rank, position, f"{part} has the unknown op {part.op!r}; use F, B, I, W")
            if not 0 <= part.stage < schedule.num_stages:
                _fail(
                    schedule, rank, position, f"{part} names stage {part.stage}; there are {schedule.num_stages} stages"
                )
            if (owner := schedule.stage_to_rank[part.stage]) != rank:
                _fail(schedule, rank, position, f"{part} is on rank {rank}, but stage {part.stage} is on rank {owner}")
        if step.op in COMMUNICATION_OPS:
            _check_neighbour(schedule, rank, position, step)
        for fact in () if step.op in STAGE_OPS else produced(step):
            if fact in seen:
                _fail(schedule, rank, position, f"{step} does again what was done before; run each step once")
            seen.add(fact)


def _check_neighbour(schedule: Schedule, rank: int, position: int, step: Instruction) -> None:
    """A message goes to, or comes from, a neighbouring stage on another rank."""
    near = step.stage + (1 if step.op in ("SEND_F", "RECV_B") else -1)
    if not 0 <= near < schedule.num_stages:
        _fail(schedule, rank, position, f"{step} has no stage at its other end; remove it")
    if schedule.stage_to_rank[near] == rank:
        _fail(schedule, rank, position, f"{step} would go from rank {rank} to itself; remove it")


def _check_deadlock(schedule: Schedule) -> None:
    """Run the programs without durations; whatever cannot be reached is a deadlock."""
    lowered = schedule.is_lowered
    done: set[Fact] = set()
    cursor = [0] * schedule.num_ranks
    waiters: dict[Fact, list[int]] = defaultdict(list)
    runnable = list(range(schedule.num_ranks))
    while runnable:
        rank = runnable.pop()
        program = schedule.programs[rank]
        while cursor[rank] < len(program):
            step = program[cursor[rank]]
            missing = next((fact for fact in required(step, schedule, lowered=lowered) if fact not in done), None)
            if missing is not None:
                waiters[missing].append(rank)
                break
            for fact in produced(step):
                done.add(fact)
                runnable.extend(waiters.pop(fact, ()))
            cursor[rank] += 1
    stuck = [rank for rank, program in enumerate(schedule.programs) if cursor[rank] < len(program)]
    if stuck:
        _fail_deadlock(schedule, cursor, {rank: fact for fact, ranks in waiters.items() for rank in ranks})


def _fail_deadlock(schedule: Schedule, cursor: list[int], missing: dict[int, Fact]) -> NoReturn:
    """Name the root of a deadlock: a step whose need nobody ever meets, else a step of the cycle of waits."""
    location = {fact: (rank, at) for rank, at, step in schedule.instructions() for fact in produced(step)}
    rank = min(missing)
    visited: list[int] = []
    while rank not in visited:
        visited.append(rank)
        fact = missing[rank]
        source = location.get(fact)
        step = schedule.programs[rank][cursor[rank]]
        if source is None:
            message = f"deadlock: rank {rank} waits forever at {step} for {_fact_text(fact)}, which no rank runs"
            _fail(schedule, rank, cursor[rank], f"{message}; add it before {step}")
        if source[0] == rank:
            message = f"deadlock: rank {rank} waits forever at {step} for {_fact_text(fact)}, which it runs only later"
            _fail(schedule, rank, cursor[rank], f"{message}, at step {source[1]}; move it before {step}")
        rank = source[0]
    cycle = visited[visited.index(rank) :]
    waits = ", ".join(f"rank {r} at {schedule.programs[r][cursor[r]]} for {_fact_text(missing[r])}" for r in cycle)
    _fail(schedule, rank, cursor[rank], f"deadlock: these wait for each other: {waits}; reorder one of them")


def _fact_text(fact: Fact) -> str:
    what, stage, micro_batch = fact
    return f"{stage}B{micro_batch} or {stage}I{micro_batch}" if what == "G" else f"{stage}{what}{micro_batch}"


def _check_complete(schedule: Schedule, *, forward_only: bool) -> None:
    """Every stage runs F, and B or I and W, of every micro-batch, and of no other."""
    wanted = ("F",) if forward_only else ("F", "G", "W")
    done: set[Fact] = set()
    for rank, position, step in schedule.instructions():
        for fact in () if step.op in STAGE_OPS else produced(step):
            if not 0 <= fact[2] < schedule.num_micro_batches:
                _fail(
                    schedule,
                    rank,
                    position,
                    f"{step} names a micro-batch beyond the {schedule.num_micro_batches} there are",
                )
            if forward_only and fact[0] in ("G", "W", "SEND_B", "RECV_B"):
                _fail(schedule, rank, position, f"{step} is a backward in a forward-only schedule; remove it")
            done.add(fact)
    for what in wanted:
        for stage, rank in enumerate(schedule.stage_to_rank):
            for micro_batch in range(schedule.num_micro_batches):
                if (what, stage, micro_batch) not in done:
                    _fail_incomplete(schedule, rank, (what, stage, micro_batch))


def _fail_incomplete(schedule: Schedule, rank: int, fact: Fact) -> NoReturn:
    what, stage, micro_batch = fact
    needed = {"F": "F", "G": "B (or I and W)", "W": "W"}[what]
    owner = {"F": "", "G": "F", "W": "I"}[what]
    message = f"stage {stage} never runs {needed} of micro-batch {micro_batch}; add it to rank {rank}"
    for position, step in enumerate(schedule.programs[rank]):
        if any(part[:3] == (stage, owner, micro_batch) for part in step.flat()):
            _fail(schedule, rank, position, message)
    raise ScheduleError(f"{schedule.name}: {message}\n{format_grid(schedule)}")


def _check_channels(schedule: Schedule) -> None:
    """Messages are taken in the order in which they are sent, per (source, destination, direction)."""
    lowered = schedule.is_lowered
    place, last = schedule.stage_to_rank, schedule.num_stages - 1
    send_ops = {"SEND_F": 1, "SEND_B": -1} if lowered else {"F": 1, "B": -1, "I": -1}
    receive_ops = {"RECV_F": 1, "RECV_B": -1} if lowered else {"F": 1, "B": -1, "I": -1}
    sent: dict[tuple[int, int, int], list[tuple[int, int]]] = defaultdict(list)
    for rank, _, step in schedule.instructions():
        for part in step.flat():
            if (way := send_ops.get(part.op)) is not None and 0 <= part.stage + way <= last:
                destination = place[part.stage + way]
                if destination != rank:
                    sent[rank, destination, way].append((part.stage + way, part.micro_batch))
    taken: dict[tuple[int, int, int], int] = defaultdict(int)
    for rank, position, step in schedule.instructions():
        for part in step.flat():
            if (way := receive_ops.get(part.op)) is None or not 0 <= part.stage - way <= last:
                continue
            source = place[part.stage - way]
            if source == rank:
                continue
            channel = (source, rank, way)
            stage, micro_batch = sent[channel][taken[channel]]
            if (stage, micro_batch) != (part.stage, part.micro_batch):
                message = (
                    f"{step} takes a message out of order: the next one that rank {source} sends to rank {rank} is "
                    f"for {stage}{'F' if way == 1 else 'B'}{micro_batch}; take messages in the order of their sends"
                )
                _fail(schedule, rank, position, message)
            taken[channel] += 1


def _check_memory(schedule: Schedule, memory_limit: float) -> None:
    """No rank holds more activations than the limit, and none frees what it does not hold."""
    for rank, program in enumerate(schedule.programs):
        held = 0
        for position, step in enumerate(program):
            ops = [part.op for part in step.flat()]
            held += ops.count("F")
            if held > memory_limit:
                message = f"rank {rank} holds {held} activations at {step}, more than the limit of {memory_limit:g}"
                _fail(schedule, rank, position, f"{message}; run a B or I before it")
            held -= ops.count("B") + ops.count("I")
            assert held >= 0, "happens-before was checked"
