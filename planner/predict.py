"""predict(plan, machine): lower, price, replay; the prediction carries the same keys as a measurement of the plan.

Ranks of one class do equal work, so a large mesh is replayed on representatives: per axis one coordinate of each part
size. A collective still costs what its whole group costs; only waiting is decided among the representatives.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, field
from itertools import product

from planner.cost.coarse import coarse_replay
from planner.cost.compute import early_reduction_seconds, slowest_host_factor
from planner.cost.memory import Peak, peak_memory
from planner.cost.price import COLLECTIVES, Pricer, plan_over
from planner.errors import PlanError
from planner.machine import Machine
from planner.mesh import Coordinate, Mesh
from planner.model import model_flops
from planner.plan import Plan
from planner.program import Program, Shared, Step, Task, lower
from planner.simulate import Replay, TaskTable, replay
from planner.trace import (
    PARTS,
    Figures,
    MachineNote,
    OperatorTime,
    Prediction,
    Span,
    axis_classes,
    figures,
    operator_times,
    rank_classes,
    version_note,
)

WHOLE_MESH_RANKS = 32
"""Meshes up to this size are replayed rank by rank."""

TASKS_PER_LAYER = 40  # forward and backward, with its collectives

FINE_TASKS = 60_000
"""Above so many tasks an instruction is replayed as one task; equal to the fine replay where nothing overlaps."""

NORMAL_80 = 1.2815515655446004  # half-width of a normal distribution's central 80%, in standard deviations


def predict(plan: Plan, machine: Machine) -> Prediction:
    """Predict one training step of a plan on a machine.

    Raises:
        PlanError: the plan cannot be lowered.
        MachineError: the profile lacks a needed figure.
    """
    replica = coarse_replay(plan, machine) if is_coarse(plan) else _Replayed(plan, machine)
    spans = replica.spans()
    step_seconds = whole_step_seconds(plan, machine, replica.makespan_seconds)
    classes = rank_classes(plan)
    ranks = replica.ranks
    figure = replica.figures(spans, step_seconds)
    replayed = set(ranks)
    kept = [[rank for rank in members if rank in replayed] for members in classes]
    peaks = replica.peaks(classes)
    width = math.exp(NORMAL_80 * machine.residuals.step_log_sigma)
    tokens = plan.global_batch_size * plan.model.seq_len
    peak_flops = machine.peak_flops_per_second(plan.training.precision)
    busy = dict(zip(ranks, figure.rank_seconds, strict=True))
    by_class = [busy[members[0]] if members else 0.0 for members in kept]
    rank_seconds = _expand(by_class, classes, plan.mesh.world_size)
    if machine.relative_speeds:  # ranks of a class do equal work, and may still differ in speed
        rank_seconds = [busy.get(rank, seconds) for rank, seconds in enumerate(rank_seconds)]
    return Prediction(
        version=version_note(),
        plan_hash=plan.hash,
        plan=plan,
        machine=MachineNote(
            name=machine.name,
            precision=plan.training.precision,
            peak_flops_per_second=peak_flops,
            provenance=machine.device.provenance,
        ),
        step_seconds=step_seconds,
        tokens_per_second=tokens / step_seconds,
        mfu=step_flops(plan) / (step_seconds * plan.mesh.world_size * peak_flops),
        bubble_fraction=figure.bubble_fraction,
        exposed_communication_seconds=figure.exposed_mean_seconds,
        exposed_communication_seconds_max=figure.exposed_max_seconds,
        wait_seconds=figure.wait_seconds,
        rank_seconds=rank_seconds,
        peak_bytes=_expand([peak.total_bytes for peak in peaks], classes, plan.mesh.world_size),
        peak_parts={
            part: _expand([peak.parts[part] for peak in peaks], classes, plan.mesh.world_size) for part in PARTS
        },
        rank_classes=classes,
        operators=replica.operators(spans, kept),
        trace=[(s.rank, s.stream, s.key, s.start, s.end, s.kind) for s in spans],
        low_seconds=step_seconds / width,
        high_seconds=step_seconds * width,
        warnings=outside_ranges(plan, machine),
    )


def whole_step_seconds(plan: Plan, machine: Machine, makespan_seconds: float) -> float:
    """A step's seconds: the replay, what the framework adds to a step, all at the pace of the slowest host."""
    world = plan.mesh.world_size
    hosts = -(-world // machine.ranks_per_host(world))
    return float((makespan_seconds + machine.overheads.step_seconds) * slowest_host_factor(machine, hosts))


def outside_ranges(plan: Plan, machine: Machine) -> list[str]:
    """What of a plan lies outside the range of the rows that the machine's figures were fitted on."""
    values = {
        "world_size": plan.mesh.world_size,
        "micro_batch_size": plan.micro_batch_size,
        **{axis: getattr(plan.mesh, axis) for axis in ("pp", "dp", "cp", "tp")},
        **{name: getattr(plan.model, name) for name in ("layers", "hidden", "heads", "seq_len", "vocab")},
    }
    found = []
    for name, (low, high) in machine.residuals.ranges.items():
        value = values.get(name)
        if value is not None and not low <= value <= high:
            side, limit = ("<", low) if value < low else (">", high)
            found.append(f"no measurement with {name} {side} {limit:g} stands behind this ({name}={value})")
    return found


def is_coarse(plan: Plan) -> bool:
    """Whether a plan has so many tasks that it is replayed instruction by instruction."""
    micro_batches = max(plan.parts.batch) // plan.micro_batch_size
    tasks = micro_batches * plan.model.layers * TASKS_PER_LAYER
    places = len(representatives(plan)) // plan.mesh.pp
    return tasks * places > FINE_TASKS


def step_flops(plan: Plan) -> float:
    """Model FLOPs of one step: forward and backward, or the forward third of an evaluation step."""
    flops = model_flops(plan.model) * plan.global_batch_size
    return flops / 3 if plan.forward_only else flops


def _expand(values: list, classes: list[list[int]], world_size: int) -> list:  # type: ignore[type-arg]
    """A value per class as a value per rank."""
    result = [values[0]] * world_size
    for value, members in zip(values, classes, strict=True):
        for rank in members:
            result[rank] = value
    return result


def representatives(plan: Plan) -> list[Coordinate]:
    """Coordinates to replay: all of a small mesh, else one per part size along each axis, for every pipeline rank."""
    mesh, along = plan.mesh, axis_classes(plan)
    if mesh.world_size <= WHOLE_MESH_RANKS:
        return list(mesh.coordinates())
    firsts = (_firsts(along[axis]) for axis in ("dp", "cp", "tp"))
    return [Coordinate(*at) for at in product(range(mesh.pp), *firsts)]


def _firsts(classes: list[object]) -> list[int]:
    """Index of the first of each class."""
    return sorted({value: i for i, value in reversed(list(enumerate(classes)))}.values())


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
class _Replayed:
    """The programs of the representatives, priced and replayed."""

    plan: Plan
    machine: Machine
    programs: dict[int, Program] = field(default_factory=dict)
    payloads: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        plan = self.plan = plan_over(self.plan, self.machine)
        mesh = plan.mesh
        self.pricer = Pricer(plan, self.machine)
        places = representatives(plan)
        self.ranks = [mesh.rank(at) for at in places]
        shared: Shared = {}
        self.programs = {rank: lower(plan, rank, shared=shared) for rank in self.ranks}
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
        """Work and wait spans of every representative, in its own order."""
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

    replayed: _Replayed
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
