"""A step replayed task by task: the programs of representative ranks, priced.

Ranks of one class do equal work, so a mesh is replayed on representatives: per axis one coordinate of each part size. A
collective still costs what its whole group costs; only waiting is decided among the representatives. On a small mesh
they stand for the others exactly, or, where links or speeds differ, every rank is replayed.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from itertools import product

from planner.cost.compute import early_reduction_seconds
from planner.cost.memory import Peak, peak_memory
from planner.cost.price import COLLECTIVES, Pricer, plan_over
from planner.errors import PlanError
from planner.machine import Machine
from planner.mesh import Coordinate, Mesh
from planner.plan import Plan
from planner.program import Program, Shared, Step, Task, lower
from planner.simulate import Replay, TaskTable, replay
from planner.trace import Figures, OperatorTime, Span, axis_classes, figures, operator_times

WHOLE_MESH_RANKS = 32
"""Meshes up to this size are reported rank by rank."""


def representatives(plan: Plan) -> list[Coordinate]:
    """One coordinate per part size along each axis, for every pipeline rank."""
    dp, cp, tp = (sorted(set(firsts)) for firsts in _firsts(plan))
    return [Coordinate(*at) for at in product(range(plan.mesh.pp), dp, cp, tp)]


def _representative_of(plan: Plan) -> dict[int, int]:
    """The rank that is replayed for each rank."""
    mesh, (dp, cp, tp) = plan.mesh, _firsts(plan)
    return {mesh.rank(at): mesh.rank(Coordinate(at.pp, dp[at.dp], cp[at.cp], tp[at.tp])) for at in mesh.coordinates()}


def _firsts(plan: Plan) -> tuple[list[int], ...]:
    """Along dp, cp and tp: for each coordinate the first whose work equals its own."""
    along = axis_classes(plan)
    return tuple([along[axis].index(work) for work in along[axis]] for axis in ("dp", "cp", "tp"))


@dataclass(slots=True)
class _Entry:
    """One task (or, coarsely, one instruction's worth of tasks) of the replay."""

    rank: int
    key: str
    stream: int
    seconds: float
    predecessors: list[tuple[int, float]]
    join: int
    kind: str
    label: str


@dataclass
class FineReplay:
    """The programs of the representatives, priced and replayed.

    Attributes:
        ranks: those with spans.
        copied: on a mesh reported whole, the rank whose spans each rank shares; empty where every rank has its own.
    """

    plan: Plan
    machine: Machine
    programs: dict[int, Program] = field(default_factory=dict)
    payloads: dict[str, int] = field(default_factory=dict)
    copied: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        plan = self.plan = plan_over(self.plan, self.machine)
        mesh = plan.mesh
        self.pricer = Pricer(plan, self.machine)
        whole = mesh.world_size <= WHOLE_MESH_RANKS
        # Ranks of a class take equal time only where their links and speeds are equal too.
        if whole and self.pricer.one_host and not self.machine.relative_speeds:
            self.copied = _representative_of(plan)
        places = mesh.coordinates() if whole and not self.copied else representatives(plan)
        replayed = [mesh.rank(at) for at in places]
        self.ranks = list(self.copied) or replayed
        shared: Shared = {}
        self.programs = {rank: lower(plan, rank, shared=shared) for rank in replayed}
        self.entries: list[_Entry] = []
        self._joins: dict[tuple[object, ...], int] = {}
        self._sent: dict[tuple[object, ...], tuple[int, float]] = {}  # the entry to wait for, time it still takes
        self._waiting: list[tuple[int, tuple[object, ...]]] = []
        for rank, program in self.programs.items():
            _Emitter(self, rank, program).run()
        for entry, message in self._waiting:
            if message not in self._sent:
                raise PlanError(f"the schedule never sends {message}; check it with 'planner schedule'")
            sender, blocked_seconds = self._sent[message]
            self.entries[entry].predecessors.append((sender, 0.0))
            self.entries[entry].seconds += blocked_seconds
        self.table = self._table()
        self.result: Replay = replay(self.table, lambda task: self.entries[task].key)

    @property
    def makespan_seconds(self) -> float:
        """When the last rank ends its step."""
        return self.result.makespan_seconds

    def join(self, group: tuple[object, ...]) -> int:
        """Number of a collective that all members start together."""
        return self._joins.setdefault(group, len(self._joins))

    def _table(self) -> TaskTable:
        entries = self.entries
        return TaskTable.build(
            rank=[e.rank for e in entries],
            seconds=[e.seconds for e in entries],
            predecessors=[e.predecessors for e in entries],
            stream=[e.stream for e in entries],
            join=[e.join for e in entries],
        )

    def peaks(self, classes: list[list[int]]) -> list[Peak]:
        """Peak memory of every rank class."""
        found = []
        for members in classes:
            rank = next((rank for rank in members if rank in self.programs), None)
            program = self.programs[rank] if rank is not None else lower(self.plan, members[0])
            found.append(peak_memory(program, self.machine.framework))
        return found

    def figures(self, spans: list[Span], step_seconds: float) -> Figures:
        """The figures of the step."""
        return figures(spans, self.ranks, step_seconds)

    def operators(self, spans: list[Span], kept: list[list[int]]) -> dict[str, OperatorTime]:
        """Work of one step by key, per rank class."""
        return operator_times(spans, kept, self.payloads)

    def spans(self) -> list[Span]:
        """Work and wait spans of every rank that has some, in its own order."""
        if not self.copied:
            return self._replayed_spans()
        by_rank: dict[int, list[Span]] = defaultdict(list)
        for span in self._replayed_spans():
            by_rank[span.rank].append(span)
        return [span._replace(rank=rank) for rank, source in self.copied.items() for span in by_rank[source]]

    def _replayed_spans(self) -> list[Span]:
        result, spans = self.result, []
        last: dict[tuple[int, int], float] = defaultdict(float)
        rows = zip(self.entries, result.start.tolist(), result.end.tolist(), strict=True)
        for entry, start, end in rows:
            lane = (entry.rank, entry.stream)
            begun = last[lane] if entry.stream == 0 else start
            if entry.kind == "gradient_wait":
                start = begun  # noqa: PLW2901 - the time in this wait is what the overlap did not hide
            if start > begun:
                spans.append(Span(entry.rank, entry.label, entry.key, begun, start, "wait"))
            if end > start:
                spans.append(Span(entry.rank, entry.label, entry.key, start, end, "work"))
            last[lane] = end
        return spans


COMPUTE_OPS = ("F", "B", "I", "W")
STREAMS = {"compute": 0, "data": 1}


@dataclass
class _Emitter:
    """Appends the entries of one rank's program in order."""

    replayed: FineReplay
    rank: int
    program: Program
    previous: int | None = None
    counts: dict[tuple[object, ...], int] = field(default_factory=lambda: defaultdict(int))
    first: dict[str, int] = field(default_factory=dict)  # lowest rank of this rank's group, by axis
    started: dict[str, int] = field(default_factory=dict)
    exposed: dict[str, float] = field(default_factory=dict)  # what is left of a reduction when it is waited for
    handed: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    priced: dict[int, tuple[list[float], float]] = field(default_factory=dict)

    def run(self) -> None:
        """Walk the steps."""
        for step in self.program.steps:
            seconds, host_seconds = self._seconds(step)
            for task, task_seconds in zip(step.tasks, seconds, strict=True):
                self._task(task, task_seconds)
            if host_seconds:
                way = "forward" if step.op == "F" else "backward"
                self._append(f"{step.stage}.host.dispatch.{way}", host_seconds, [], -1, "host")

    def _seconds(self, step: Step) -> tuple[list[float], float]:
        """Seconds of a step's tasks, and what the host adds; equal steps share their tasks and are priced once."""
        pricer, at = self.replayed.pricer, self.program.at
        key = id(step.tasks)
        if key not in self.priced:
            if step.op in COMPUTE_OPS:
                self.priced[key] = pricer.stretch(step.tasks, at, step.op)
            elif pricer.times_dispatch:
                self.priced[key] = pricer.stretch(step.tasks, at, "W")  # which adds nothing of a micro-batch
            else:
                self.priced[key] = ([pricer.seconds(task, at) for task in step.tasks], 0.0)
        return self.priced[key]

    def _task(self, task: Task, seconds: float) -> None:
        self._note(task)
        if task.kind == "send":
            self._send(task, seconds)
        elif task.kind == "receive":
            self._receive(task)
        elif task.kind == "gradient_start":
            self._start(task, seconds)
        elif task.kind == "gradient_wait":
            self._append(task.key, self.exposed.get(task.name, 0.0), [(self.started[task.name], 0.0)], -1, task.kind)
        elif seconds or task.axis:
            group = self._group(task)
            self._append(task.key, seconds, [], self.replayed.join(group) if group else -1, task.kind)

    def _note(self, task: Task) -> None:
        """Count what the rank hands to MPI; the busiest rank's total stands, as in a measurement."""
        if task.axis:
            self.handed[task.key] += int(task.work.bytes)
            self.replayed.payloads[task.key] = max(self.replayed.payloads.get(task.key, 0), self.handed[task.key])

    def _append(
        self,
        key: str,
        seconds: float,
        predecessors: list[tuple[int, float]],
        join: int,
        kind: str,
        stream: str = "compute",
    ) -> int:
        entries = self.replayed.entries
        entries.append(_Entry(self.rank, key, STREAMS[stream], seconds, predecessors, join, kind, stream))
        if stream == "compute":
            self.previous = len(entries) - 1
        return len(entries) - 1

    def _group(self, task: Task) -> tuple[object, ...] | None:
        """The collective's group and how many this group has begun before: what its members agree on."""
        if task.kind not in COLLECTIVES and task.kind != "ring_shift":
            return None
        mesh: Mesh = self.program.plan.mesh
        axis = task.axis or "world"
        if axis == "tie":
            group: tuple[int, ...] = (-1, self.program.at.dp, self.program.at.cp, self.program.at.tp)
        else:
            if mesh.size(axis) == 1:
                return None
            if axis not in self.first:
                self.first[axis] = mesh.group(axis, self.program.at)[0]
            group = (self.first[axis],)  # which tells groups of one axis apart
        lane = (axis, task.stream, group)
        self.counts[lane] += 1
        return (*lane, self.counts[lane])

    def _message(self, task: Task) -> tuple[object, ...]:
        at = self.program.at
        a = task.attributes
        return (a["from"], a["to"], a["micro_batch"], at.dp, at.cp, at.tp)

    def _send(self, task: Task, seconds: float) -> None:
        """The message travels on its own and the sender goes on at once; a blocking one takes the receiver's time."""
        replayed, message = self.replayed, self._message(task)
        if replayed.machine.framework.blocking_messages and self.previous is not None:
            replayed._sent[message] = (self.previous, seconds)
            return
        before = [] if self.previous is None else [(self.previous, 0.0)]
        entries = replayed.entries
        stream = 2 + 2 * int(task.attributes["to"]) + int(task.key.endswith("backward"))
        entries.append(_Entry(self.rank, task.key, stream, seconds, before, -1, "send", "pp"))
        replayed._sent[message] = (len(entries) - 1, 0.0)

    def _receive(self, task: Task) -> None:
        exchange = self.replayed.pricer.exchange
        entry = self._append(task.key, exchange, [], -1, "receive")
        self.replayed._waiting.append((entry, self._message(task)))

    def _start(self, task: Task, seconds: float) -> None:
        group = self._group(task)
        before = [] if self.previous is None else [(self.previous, 0.0)]
        join = self.replayed.join(group) if group else -1
        machine = self.replayed.machine
        if machine.device.kind == "cpu":
            self.exposed[task.name] = float(early_reduction_seconds(machine, seconds))
            seconds = 0.0  # the core that computes also moves the bytes: its share of them takes time in the wait
        self.started[task.name] = self._append(task.key, seconds, before, join, task.kind, "data")
