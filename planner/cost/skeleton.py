"""Skeleton: a plan's step as one task per pipeline instruction, each distinct instruction laid out once.

Theory of operation. Ranks of a pipeline repeat a few instructions: F or B of a stage on a micro-batch of some size, and
stages with equal layers are alike. So one short program per kind of pipeline rank holds every distinct list of tasks
(a *stretch*); the schedule says how often and in which order they run. A table of tasks refers to *units*, quantities
to be priced: the seconds of a stretch (or of the runs between the gradient reductions that start inside it), of a
message, of one reduction. The table's topology does not depend on any fitted figure, so that a fit replays the same
table with new seconds, and linearises the step time in the units on its critical path.

Where ranks of a tensor- or data-parallel group do equal work this replay equals the fine one of `planner.predict`,
task by task; with uneven parts it follows the first coordinate of each axis, which holds the largest parts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from planner.cost.price import FREE, Pricer, plan_over
from planner.machine import Machine
from planner.mesh import Coordinate
from planner.plan import Plan
from planner.program import Program, Step, Task, lower
from planner.program.rank import make_schedule
from planner.schedule import Instruction, Schedule
from planner.simulate import Replay, TaskTable, critical_path, replay

COMPUTE_OPS = "FBIW"
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Stretch:
    """The tasks of one distinct instruction, or of the update (op "U"), on a rank at `at`."""

    op: str
    at: Coordinate
    tasks: tuple[Task, ...]

    @cached_property
    def runs(self) -> list[tuple[int, int]]:
        """Ranges of tasks between those that start a gradient reduction; one range where none does."""
        starts = [i for i, task in enumerate(self.tasks) if task.kind == "gradient_start"]
        edges = [0, *(edge for i in starts for edge in (i, i + 1)), len(self.tasks)]
        return list(zip(edges[::2], edges[1::2], strict=True))


class Unit(NamedTuple):
    """One quantity to price: what it is of, and where in it.

    `kind` is "stretch" (all of it), "run" (tasks first to last of it), "host" (what dispatch adds to its runs), "task"
    (the one at `first`), or "message" (of `first` bytes, inside a host if `last`).
    """

    kind: str
    stretch: int = -1
    first: int = 0
    last: int = 0


class Entry(NamedTuple):
    """One row of the table."""

    rank: int
    stream: int
    unit: int
    label: str
    predecessors: tuple[int, ...]


@dataclass
class Skeleton:
    """The distinct stretches and units of a plan's step, and the table of entries that refer to them."""

    plan: Plan
    schedule: Schedule
    stretches: list[Stretch] = field(default_factory=list)
    units: list[Unit] = field(default_factory=list)
    entries: list[Entry] = field(default_factory=list)
    programs: dict[int, Program] = field(default_factory=dict)  # short programs of the representative pipeline ranks
    representative: dict[int, int] = field(default_factory=dict)  # pipeline rank -> the one whose program it shares

    def instructions(self, rank: int) -> Iterator[Instruction]:
        """The compute instructions of a pipeline rank, whole backwards split where the stage's others are."""
        parts = [p for step in self.schedule.programs[rank] for p in step.flat() if p.op in COMPUTE_OPS]
        split = {p.stage for p in parts if p.op in "IW"}
        for part in parts:
            if part.op == "B" and part.stage in split:
                yield from (part._replace(op="I"), part._replace(op="W"))
            else:
                yield part

    @classmethod
    def of(cls, plan: Plan, machine: Machine) -> Skeleton:
        """Lay out the distinct stretches of a plan and the table of its step on a machine.

        Of the machine only facts matter: ranks per host, transport, and whether messages block.
        """
        plan = plan_over(plan, machine)
        skeleton = cls(plan, make_schedule(plan, 0))
        _Builder(skeleton, Pricer(plan, machine)).run()
        return skeleton

    @cached_property
    def table(self) -> TaskTable:
        """The entries as a table without seconds."""
        return TaskTable.build(
            rank=[entry.rank for entry in self.entries],
            seconds=np.zeros(len(self.entries)).tolist(),
            predecessors=[[(p, 0.0) for p in entry.predecessors] for entry in self.entries],
            stream=[entry.stream for entry in self.entries],
        )

    @cached_property
    def unit_of_entry(self) -> NDArray[np.int64]:
        """The unit of every entry, -1 for those that only wait."""
        return np.array([entry.unit for entry in self.entries], np.int64)

    def replay(self, unit_seconds: Floats) -> Replay:
        """Replay the step with seconds per unit."""
        padded = np.append(unit_seconds, 0.0)
        return replay(replace(self.table, seconds=padded[self.unit_of_entry]), lambda i: self.entries[i].label)

    def critical_counts(self, unit_seconds: Floats) -> tuple[float, Floats]:
        """The makespan, and how often each unit stands on its critical path: counts @ unit_seconds is the makespan."""
        table = replace(self.table, seconds=np.append(unit_seconds, 0.0)[self.unit_of_entry])
        result = replay(table)
        path = self.unit_of_entry[critical_path(table, result)]
        return result.makespan_seconds, np.bincount(path[path >= 0], minlength=len(self.units)).astype(float)


def unit_seconds(skeleton: Skeleton, machine: Machine) -> Floats:
    """Seconds of every unit of one skeleton, task by task, as `planner.predict` prices them."""
    pricer = Pricer(skeleton.plan, machine)
    priced = [pricer.stretch(s.tasks, s.at, s.op) if s.op in COMPUTE_OPS else None for s in skeleton.stretches]
    found = np.zeros(len(skeleton.units))
    for i, unit in enumerate(skeleton.units):
        if unit.kind == "message":
            found[i] = pricer.message(unit.first, bool(unit.last)) if unit.stretch == -1 else pricer.exchange
            continue
        stretch, inside = skeleton.stretches[unit.stretch], priced[unit.stretch]
        seconds, host = inside or ([pricer.seconds(task, stretch.at) for task in stretch.tasks], 0.0)
        if unit.kind == "stretch":
            found[i] = sum(seconds) + host
        elif unit.kind == "host":
            found[i] = host
        else:
            found[i] = sum(seconds[unit.first : unit.last])
    return found


class _Builder:
    """Fills a skeleton: short programs, units, entries in each rank's order."""

    def __init__(self, skeleton: Skeleton, pricer: Pricer) -> None:
        self.skeleton, self.plan, self.pricer = skeleton, skeleton.plan, pricer
        self.schedule = skeleton.schedule
        self.blocking = pricer.machine.framework.blocking_messages
        self.ids: dict[tuple[str, int, int, int], int] = {}
        self.sizes = self.plan.micro_batches(0)
        self.hosts = [
            self.plan.mesh.rank(Coordinate(r, 0, 0, 0)) // pricer.ranks_per_host for r in range(skeleton.plan.mesh.pp)
        ]
        self.known: dict[tuple[int, int, str, int, bool], int] = {}  # -> stretch
        self.updates: dict[int, int] = {}
        self.payload: dict[tuple[int, int, str, int], int] = {}  # (representative, chunk, op, size) -> bytes sent
        self.previous: dict[int, int] = {}
        self.sent: dict[tuple[int, int, str], tuple[int, int]] = {}  # (stage, micro-batch, way) -> entry, unit
        self.started: dict[tuple[int, str], int] = {}
        self.programs = [list(skeleton.instructions(rank)) for rank in range(self.plan.mesh.pp)]
        self.chunk = {s: i for r in range(self.plan.mesh.pp) for i, s in enumerate(self.schedule.stages_of(r))}

    def run(self) -> None:
        """Lower the representatives, then walk all programs together as their messages allow."""
        for rank in range(self.plan.mesh.pp):
            self._represent(rank)
        order = _interleave(self.programs, self.schedule)
        last = {}
        for rank, program in enumerate(self.programs):
            for position, part in enumerate(program):
                if part.op in "BW":
                    last[rank, part.stage] = position
        for rank, position in order:
            part = self.programs[rank][position]
            self._instruction(rank, part, last.get((rank, part.stage)) == position)
        self._update()

    # ---- stretches ---------------------------------------------------------------------------------------------------

    def _represent(self, rank: int) -> None:
        skeleton, plan = self.skeleton, self.plan
        signature = self._signature(rank)
        for other, same in skeleton.representative.items():
            if other == same and self._signature(other) == signature:
                skeleton.representative[rank] = other
                return
        skeleton.representative[rank] = rank
        count = len(plan.micro_batches(0))
        short = tuple(
            tuple(p for step in program for p in step.flat() if p.op in COMPUTE_OPS and p.micro_batch in (0, count - 1))
            for program in self.schedule.programs
        )
        at = Coordinate(rank, 0, 0, 0)
        program = lower(plan, plan.mesh.rank(at), replace(self.schedule, programs=short))
        skeleton.programs[rank] = program
        final = {(s.stage, s.op): i for i, s in enumerate(program.steps) if s.op in ("B", "W")}
        for i, step in enumerate(program.steps):
            self._learn(rank, step, program, is_last=final.get((step.stage, step.op)) == i)

    def _signature(self, rank: int) -> tuple[object, ...]:
        """What decides the tasks of a pipeline rank, and where its groups stand within hosts."""
        plan, stages = self.plan, self.schedule.stages_of(rank)
        starts = np.cumsum((0, *plan.stage_layers))
        windows = tuple(
            tuple((plan.model.window(i), plan.model.has_attention_norm(i)) for i in range(starts[s], starts[s + 1]))
            for s in stages
        )
        ends = tuple((s == 0, s == plan.num_stages - 1) for s in stages)
        offset = plan.mesh.rank(Coordinate(rank, 0, 0, 0)) % self.pricer.ranks_per_host
        neighbours = tuple(
            self.schedule.stage_to_rank[o] == rank for s in stages for o in (s - 1, s + 1) if 0 <= o < plan.num_stages
        )
        return (windows, ends, offset, neighbours)

    def _learn(self, rank: int, step: Step, program: Program, *, is_last: bool) -> None:
        if step.op == "U":
            self.updates[rank] = self._stretch("U", program, step.tasks)
            return
        size = program.micro_batches[step.micro_batch]
        chunk = self.chunk[step.stage]
        if step.op in COMPUTE_OPS:
            self.known[rank, chunk, step.op, size, is_last] = self._stretch(step.op, program, step.tasks)
        for task in step.tasks:
            if task.kind == "send":
                way = "F" if task.attributes["to"] > task.attributes["from"] else "B"
                self.payload[rank, chunk, way, size] = int(task.work.full_bytes)

    def _stretch(self, op: str, program: Program, tasks: tuple[Task, ...]) -> int:
        self.skeleton.stretches.append(Stretch(op, program.at, tasks))
        return len(self.skeleton.stretches) - 1

    # ---- entries -----------------------------------------------------------------------------------------------------

    def _unit(self, kind: str, stretch: int = -1, first: int = 0, last: int = 0) -> int:
        found = self.ids.get((kind, stretch, first, last))
        if found is None:
            found = self.ids[kind, stretch, first, last] = len(self.skeleton.units)
            self.skeleton.units.append(Unit(kind, stretch, first, last))
        return found

    def _append(self, rank: int, unit: int, label: str, *predecessors: int, stream: int = 0) -> int:
        entries = self.skeleton.entries
        entries.append(Entry(rank, stream, unit, label, predecessors))
        if stream == 0:
            self.previous[rank] = len(entries) - 1
        return len(entries) - 1

    def _instruction(self, rank: int, part: Instruction, is_last: bool) -> None:
        self._receive(rank, part)
        same, chunk = self.skeleton.representative[rank], self.chunk[part.stage]
        size = self.sizes[part.micro_batch]
        found = self.known.get((same, chunk, part.op, size, is_last))
        if found is None:
            found = self.known[same, chunk, part.op, size, not is_last]
        self._emit(rank, found, f"{part.stage}.{part.op}")
        self._send(rank, part, size)

    def _emit(self, rank: int, number: int, label: str) -> None:
        stretch = self.skeleton.stretches[number]
        runs = stretch.runs
        if len(runs) == 1:
            self._append(rank, self._unit("stretch", number), label)
            return
        for first, last in runs:
            if last > first:
                self._append(rank, self._unit("run", number, first, last), label)
            if last < len(stretch.tasks):
                task, before = stretch.tasks[last], self.previous[rank]
                unit = self._unit("task", number, last, last + 1)
                self.started[rank, task.name] = self._append(rank, unit, task.key, before, stream=1)
        self._append(rank, self._unit("host", number), f"{label}.host")

    def _peer(self, rank: int, part: Instruction, step: int) -> int | None:
        """The pipeline rank of the neighbouring stage, None where there is none or it is this rank's own."""
        stage = part.stage + step
        if not 0 <= stage < self.plan.num_stages or self.schedule.stage_to_rank[stage] == rank:
            return None
        return self.schedule.stage_to_rank[stage]

    def _send(self, rank: int, part: Instruction, size: int) -> None:
        way, step = ("F", 1) if part.op == "F" else ("B", -1)
        peer = self._peer(rank, part, step)
        if peer is None or part.op == "W":
            return
        payload = self.payload[self.skeleton.representative[rank], self.chunk[part.stage], way, size]
        unit = self._unit("message", -1, payload, int(self.hosts[rank] == self.hosts[peer]))
        entry = self.previous[rank]
        if not self.blocking:
            stream = 2 + 2 * (part.stage + step) + (step < 0)
            entry = self._append(rank, unit, f"pp.send.{way}", entry, stream=stream)
        self.sent[part.stage + step, part.micro_batch, way] = (entry, unit)

    def _receive(self, rank: int, part: Instruction) -> None:
        way, step = ("F", -1) if part.op == "F" else ("B", 1)
        if part.op == "W" or self._peer(rank, part, step) is None:
            return
        entry, unit = self.sent[part.stage, part.micro_batch, way]
        if self.blocking:
            self._append(rank, unit, f"pp.receive.{way}", entry)
            self._append(rank, self._unit("message", -2), f"pp.receive.{way}")
        else:
            self._append(rank, self._unit("message", -2), f"pp.receive.{way}", entry)

    def _update(self) -> None:
        """What follows the last backward; tasks that join ranks wait for all their members."""
        ranks = range(self.plan.mesh.pp)
        updates = [self.updates[self.skeleton.representative[rank]] for rank in ranks]
        cursors = [0] * len(updates)
        tasks = [self.skeleton.stretches[number].tasks for number in updates]
        while any(cursors[r] < len(tasks[r]) for r in ranks):
            for rank in ranks:
                cursors[rank] = self._until_join(rank, updates[rank], tasks[rank], cursors[rank])
            waiting = [r for r in ranks if cursors[r] < len(tasks[r])]
            ties = [r for r in waiting if tasks[r][cursors[r]].axis == "tie"]
            members = ties or waiting
            before = [self.previous[r] for r in members if r in self.previous]
            for rank in members:
                self._append(rank, self._unit("task", updates[rank], cursors[rank], cursors[rank] + 1),
                             tasks[rank][cursors[rank]].key, *before)  # fmt: skip
                cursors[rank] += 1

    def _until_join(self, rank: int, number: int, tasks: tuple[Task, ...], cursor: int) -> int:
        """Append a rank's update up to the next task that several pipeline ranks begin together."""
        first = cursor
        while cursor < len(tasks) and tasks[cursor].axis not in ("tie", "world"):
            if tasks[cursor].kind == "gradient_wait":
                self._run(rank, number, first, cursor)
                self._append(rank, -1, tasks[cursor].key, self.started[rank, tasks[cursor].name])
                first = cursor + 1
            cursor += 1
        self._run(rank, number, first, cursor)
        return cursor

    def _run(self, rank: int, number: int, first: int, last: int) -> None:
        if any(task.kind not in FREE for task in self.skeleton.stretches[number].tasks[first:last]):
            self._append(rank, self._unit("run", number, first, last), "update")


def _interleave(programs: list[list[Instruction]], schedule: Schedule) -> list[tuple[int, int]]:
    """An order of all instructions in which every message is sent before it is received: (rank, position) pairs."""
    done: set[tuple[int, int, str]] = set()
    cursor = [0] * len(programs)
    order: list[tuple[int, int]] = []
    total, final = sum(map(len, programs)), schedule.num_stages - 1
    while len(order) < total:
        before = len(order)
        for rank, program in enumerate(programs):
            at = cursor[rank]
            while at < len(program):
                stage, op, micro_batch = program[at][:3]
                if op == "F" and stage and (stage - 1, micro_batch, "F") not in done:
                    break
                if op in "BI" and stage < final and (stage + 1, micro_batch, "B") not in done:
                    break
                done.add((stage, micro_batch, "B" if op == "I" else op))
                order.append((rank, at))
                at += 1
            cursor[rank] = at
        assert len(order) > before, "the schedule deadlocks; planner.schedule.check refuses such schedules"
    return order
