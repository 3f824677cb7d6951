"""Bulk: the units of many skeletons priced at once, by the same formulas as one plan, over arrays of distinct tasks.

Every distinct task of all plans is priced once; sparse matrices of counts add tasks up to stretches. So one evaluation
of a machine over hundreds of plans takes milliseconds, which is what fitting a machine needs.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from planner.cost.framework import done_fraction
from planner.cost.price import (
    COLLECTIVES,
    FREE,
    MESSAGES,
    OVERLAPPABLE,
    Place,
    Pricer,
    communicates,
    compute_seconds,
    group_seconds,
    launches,
    message_seconds,
    stretch_seconds,
    task_precision,
)
from planner.cost.skeleton import COMPUTE_OPS, Skeleton
from planner.machine import Machine
from planner.mesh import Coordinate
from planner.program import Task, Work
from planner.program.update import MIXED_PRECISIONS

Floats = NDArray[np.float64]
Sparse = Any  # scipy's sparse matrices have no useful static type
WORK_FIELDS = ("m", "n", "k", "batch", "elements", "bytes", "full_bytes", "share")


class _Formula(NamedTuple):
    """Which formula prices a task, and everything of it that is no array."""

    family: str  # "compute", "group", "message"
    kind: str
    precision: str
    threads: int
    flag: bool
    axis: str | None = None
    key: str = ""  # of a task that computes again, whose price depends on whose output it makes


@dataclass
class _Column:
    """Distinct tasks of one formula: a number of each and the rows of their sizes."""

    numbers: list[int]
    rows: list[tuple[float, ...]]


class Bulk:
    """The units of several skeletons on machines that differ in their fitted figures only.

    The machine given here decides what the skeletons' topology did: hosts, framework, kernels and their launches.
    """

    def __init__(self, skeletons: Sequence[Skeleton], machine: Machine) -> None:
        self.machine = machine
        self._numbers: dict[Hashable, int] = {}
        self._columns: dict[_Formula, _Column] = defaultdict(lambda: _Column([], []))
        self._ops: list[str] = []
        self._kernels: list[float] = []
        self._collectives: list[float] = []
        own = _Counts()
        fetched = _Counts()
        exact = _Counts()  # units that are sums of tasks
        self.offsets = np.cumsum([0, *(len(s.units) for s in skeletons)])
        self._nonlinear: list[tuple[int, int, bool]] = []  # unit, stretch, whether its runs are to be subtracted
        self._exchange: list[int] = []
        for skeleton, offset in zip(skeletons, self.offsets[:-1].tolist(), strict=True):
            self._add(skeleton, offset, own, fetched, exact)
        tasks, stretches = len(self._numbers), len(self._ops)
        self._own = own.matrix(stretches, tasks)
        self._fetched = fetched.matrix(stretches, tasks)
        self._exact = exact.matrix(int(self.offsets[-1]), tasks)
        self._units = np.array([unit for unit, _, _ in self._nonlinear], np.int64)
        self._of = np.array([stretch for _, stretch, _ in self._nonlinear], np.int64)
        self._less = np.array([less for _, _, less in self._nonlinear], float)
        self._kernel_counts, self._collective_counts = np.array(self._kernels), np.array(self._collectives)
        self._starts_late = np.array([op == "W" for op in self._ops])

    def _add(self, skeleton: Skeleton, offset: int, own: _Counts, fetched: _Counts, exact: _Counts) -> None:
        pricer = Pricer(skeleton.plan, self.machine)
        first = len(self._ops)
        numbers: list[list[int]] = []
        for stretch in skeleton.stretches:
            row = len(self._ops)
            found = [self._number(task, stretch.at, pricer) for task in stretch.tasks]
            numbers.append(found)
            inside = [(t, n) for t, n in zip(stretch.tasks, found, strict=True) if t.kind != "gradient_start"]
            for task, number in inside:
                if number >= 0:
                    (fetched if task.kind in OVERLAPPABLE else own).add(row, number)
            self._ops.append(stretch.op)
            self._kernels.append(sum(launches(self.machine, t) for t, _ in inside if not communicates(t)))
            self._collectives.append(sum(1 for t, n in inside if n >= 0 and communicates(t)))
        for i, unit in enumerate(skeleton.units, start=offset):
            if unit.kind == "message":
                if unit.stretch == -2:
                    self._exchange.append(i)
                else:
                    exact.add(i, self._message(unit.first, bool(unit.last), pricer))
            elif unit.kind in ("stretch", "host") and skeleton.stretches[unit.stretch].op in COMPUTE_OPS:
                self._nonlinear.append((i, first + unit.stretch, unit.kind == "host"))
            else:
                for number in numbers[unit.stretch][unit.first : unit.last or None]:
                    if number >= 0:
                        exact.add(i, number)

    def _intern(self, formula: _Formula, sizes: tuple[float, ...]) -> int:
        key = (formula, sizes)
        if key not in self._numbers:
            self._numbers[key] = len(self._numbers)
            self._columns[formula].numbers.append(self._numbers[key])
            self._columns[formula].rows.append(sizes)
        return self._numbers[key]

    def _number(self, task: Task, at: Coordinate, pricer: Pricer) -> int:
        """The number of a distinct task; -1 for one that takes no time."""
        plan, work = pricer.plan, task.work
        if task.kind in FREE or not done_fraction(self.machine, task):
            return -1
        if task.kind in COLLECTIVES:
            place = pricer.place(task, at)
            if plan.mesh.world_size == 1 or place.size == 1:
                return -1
            mixed = pricer.precision in MIXED_PRECISIONS
            scattered = task.kind == "gradient_start" and plan.zero_stage > 0
            formula = _Formula("group", task.kind, "mixed" if mixed else "", 0, scattered, task.axis, _again(task))
            return self._intern(
                formula, (float(work.full_bytes), float(place.size), float(place.on_host), float(place.concurrent))
            )
        if task.kind in MESSAGES:
            mesh, rank = plan.mesh, plan.mesh.rank(at)
            peer = mesh.rank(at._replace(cp=(at.cp + 1) % mesh.cp))
            same = rank // pricer.ranks_per_host == peer // pricer.ranks_per_host
            formula = _Formula("message", "", "", 0, False)
            return self._intern(formula, (float(work.full_bytes), float(same), float(pricer.ranks_per_host), 1.0))
        precision = task_precision(task, pricer.precision)
        formula = _Formula("compute", task.kind, precision, plan.training.threads_per_rank, False, key=_again(task))
        return self._intern(formula, tuple(float(getattr(work, name)) for name in WORK_FIELDS))

    def _message(self, payload_bytes: int, same: bool, pricer: Pricer) -> int:
        whole = pricer.plan.mesh.tp > 1 and not pricer.plan.sequence_parallel
        tp = min(pricer.plan.mesh.tp, pricer.ranks_per_host)
        formula = _Formula("message", "", "", 0, whole)
        return self._intern(formula, (float(payload_bytes), float(same), float(pricer.ranks_per_host), float(tp)))

    def task_seconds(self, machine: Machine) -> Floats:
        """Seconds of every distinct task."""
        found = np.zeros(len(self._numbers))
        for formula, column in self._columns.items():
            table = np.array(column.rows).T
            if formula.family == "compute":
                task = Task(formula.key, formula.kind, "", work=Work(*table))
                seconds = compute_seconds(machine, task, formula.precision, formula.threads)
            elif formula.family == "group":
                work = Work(full_bytes=table[0])
                task = Task(formula.key, formula.kind, "", axis=formula.axis, work=work)
                place = Place(*table[1:])
                seconds = group_seconds(
                    machine, task, place, scattered=formula.flag, mixed=formula.precision == "mixed"
                )
            else:
                seconds = message_seconds(
                    machine, table[0], table[1].astype(bool), table[2], table[3], whole=formula.flag
                )
            found[column.numbers] = seconds
        return found

    def unit_seconds(self, machine: Machine) -> Floats:
        """Seconds of every unit of every skeleton, one skeleton after the other."""
        tasks = self.task_seconds(machine)
        found = np.asarray(self._exact @ tasks)
        own, fetched = self._own @ tasks, self._fetched @ tasks
        whole = np.asarray(stretch_seconds(machine, own, fetched, self._kernel_counts, self._collective_counts, "W"))
        around = np.asarray(stretch_seconds(machine, own, fetched, self._kernel_counts, self._collective_counts, "F"))
        total = np.where(self._starts_late, whole, around)
        found[self._units] = total[self._of] - self._less * own[self._of]
        found[self._exchange] = machine.overheads.exchange_seconds
        return found


def _again(task: Task) -> str:
    return "." + task.key.partition(".")[2] if task.key.endswith(".recompute") else ""


class _Counts:
    """How often each column counts towards each row, gathered one by one."""

    def __init__(self) -> None:
        self.rows: list[int] = []
        self.columns: list[int] = []

    def add(self, row: int, column: int) -> None:
        """Count a column once more."""
        self.rows.append(row)
        self.columns.append(column)

    def matrix(self, rows: int, columns: int) -> Sparse:
        """The counts as a sparse matrix; equal places add up."""
        ones = np.ones(len(self.rows))
        return sparse.csr_matrix((ones, (self.rows, self.columns)), shape=(rows, columns))
