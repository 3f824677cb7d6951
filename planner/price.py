"""Seconds of every task of a program: which cost formula each task kind takes, on which group of which hosts.

The functions take tasks whose sizes are integers (one plan) or NumPy arrays (all candidates of a search), so a search
and a prediction cannot price the same node differently.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from planner.cost import (
    Seconds,
    Size,
    collective_seconds,
    gemm_seconds,
    kernel_seconds,
    oversubscription_factor,
    p2p_seconds,
)
from planner.machine import Collective, Machine
from planner.mesh import Coordinate
from planner.plan import Plan
from planner.program.tasks import Task, Work

COLLECTIVES: dict[str, Collective] = {
    "all_reduce": "all_reduce",
    "gradient_all_reduce": "all_reduce",
    "gradient_start": "all_reduce",
    "gradient_sum": "all_reduce",
    "kv_gradient_sum": "all_reduce",
    "tied_gradient_sum": "all_reduce",
    "loss_sum": "all_reduce",
    "gradient_norm": "all_reduce",
    "all_gather": "all_gather",
    "parameter_gather": "all_gather",
    "parameter_all_gather": "all_gather",
    "reduce_scatter": "reduce_scatter",
    "gradient_reduce_scatter": "reduce_scatter",
    "all_to_all": "all_to_all",
}
"""The collective that a communicating task kind carries out."""

MESSAGES = ("send", "ring_shift")

FREE = ("slice", "parameter_drop", "gradient_wait", "receive", "post_receive", "handoff")
"""Kinds that take no time of their own: views, bookkeeping, waits for what another task does."""


@dataclass(frozen=True)
class Place:
    """Where a group sits: its size, how many of it share a host, and how many such groups share that host's links."""

    size: Size
    on_host: Size
    concurrent: Size


def compute_seconds(
    machine: Machine, task: Task, precision: str, threads: Size = 1, ranks_per_host: Size = 1
) -> Seconds:
    """Seconds of an operator's task on a core or device of its own."""
    work = task.work
    kind, _, way = task.kind.partition(".")
    if kind == "linear":
        return gemm_seconds(machine, work.m, work.n, work.k, work.batch, precision, threads)
    if kind in ("attention_plain", "attention_blocked", "attention_step"):
        products = gemm_seconds(machine, work.m, work.n, work.k, work.batch, precision, threads)
        name = "softmax_backward" if way == "backward" else "softmax"
        softmax = kernel_seconds(machine, name, work.elements, np.multiply(4, work.elements), precision, ranks_per_host)
        return np.asarray((products + softmax) * (1.0 if kind == "attention_plain" else work.share))
    name = f"{kind}_backward" if way.startswith("backward") else kind
    return kernel_seconds(machine, name, work.elements, work.bytes, precision, ranks_per_host)


def group_seconds(machine: Machine, task: Task, place: Place, *, scattered: bool = False) -> Seconds:
    """Seconds of a collective's task; `scattered` for an early gradient reduction into shards (ZeRO)."""
    operation = COLLECTIVES[task.kind]
    if task.kind == "gradient_start" and scattered:
        operation = "reduce_scatter"
    return collective_seconds(
        machine, operation, task.work.full_bytes, place.size, place.on_host, None, place.concurrent
    )


@dataclass
class Pricer:
    """Prices the tasks of one plan on one machine; equal work is priced once."""

    plan: Plan
    machine: Machine
    _seconds: dict[tuple[str, str | None, Work, int], float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Ranks fill hosts in order; a CPU profile describes one host, which takes them all."""
        plan, machine = self.plan, self.machine
        world = plan.mesh.world_size
        per_host = world if machine.device.kind == "cpu" else machine.devices_per_host
        self.ranks_per_host = min(world, per_host)
        self.one_host = world <= per_host
        self.precision = plan.training.precision
        self.slowdown = float(oversubscription_factor(machine, self.ranks_per_host, plan.training.threads_per_rank))

    def seconds(self, task: Task, at: Coordinate) -> float:
        """Seconds of work of a task on the rank at `at`; waiting for others is the simulator's."""
        if task.kind in FREE:
            return 0.0
        place = 0 if self.one_host and not self.machine.relative_speeds else self.plan.mesh.rank(at)
        key = (task.kind, task.axis, task.work, place)
        known = self._seconds.get(key)
        if known is None:
            known = self._seconds[key] = self._price(task, at)
        return known

    def _price(self, task: Task, at: Coordinate) -> float:
        if task.kind in COLLECTIVES:
            if self.plan.mesh.world_size == 1:
                return 0.0
            return float(group_seconds(self.machine, task, self._place(task, at), scattered=self.plan.zero_stage > 0))
        if task.kind in MESSAGES:
            return self._message(task, at)
        threads = self.plan.training.threads_per_rank
        alone = float(compute_seconds(self.machine, task, self.precision, threads, self.ranks_per_host))
        return alone * self.slowdown / self.machine.relative_speed(self.plan.mesh.rank(at))

    def _place(self, task: Task, at: Coordinate) -> Place:
        mesh, axis = self.plan.mesh, task.axis or "world"
        if axis == "tie":
            ranks = (mesh.rank(at._replace(pp=0)), mesh.rank(at._replace(pp=mesh.pp - 1)))
        else:
            ranks = mesh.group(axis, at)
        on_host = int(np.ceil(len(ranks) / mesh.hosts(ranks, self.ranks_per_host)))
        return Place(len(ranks), on_host, max(1, self.ranks_per_host // on_host))

    def _message(self, task: Task, at: Coordinate) -> float:
        mesh, rank = self.plan.mesh, self.plan.mesh.rank(at)
        neighbour = mesh.rank(at._replace(cp=(at.cp + 1) % mesh.cp))
        peer = int(task.attributes.get("peer", neighbour))
        same = rank // self.ranks_per_host == peer // self.ranks_per_host
        return float(p2p_seconds(self.machine, task.work.full_bytes, same, self.ranks_per_host))
