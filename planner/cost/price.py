"""Seconds of every task of a program: which cost formula each task kind takes, on which group of which hosts.

The functions take tasks whose sizes are integers (one plan) or NumPy arrays (all candidates of a search), so a search
and a prediction cannot price the same node differently.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import cast

import msgspec
import numpy as np

from planner.cost.communication import collective_seconds, p2p_seconds
from planner.cost.compute import (
    dispatched_seconds,
    exposed_seconds,
    fused_attention_seconds,
    gemm_seconds,
    kernel_seconds,
    oversubscription_factor,
)
from planner.cost.framework import done_fraction, exposed_fraction
from planner.cost.measured import TimedFigures, measured_name, measured_seconds
from planner.cost.sizes import Flag, Seconds, Size
from planner.machine import Collective, Machine, MeasuredCollective, Transport
from planner.mesh import Coordinate
from planner.plan import Plan
from planner.program.tasks import Task, Work
from planner.program.update import MASTER_BYTES, MIXED_PRECISIONS, WORKING_BYTES

COLLECTIVES: dict[str, Collective] = {
    "all_reduce": "all_reduce",
    "gradient_all_reduce": "all_reduce",
    "gradient_start": "all_reduce",
    "gradient_sum": "all_reduce",
    "kv_gradient_sum": "all_reduce",
    "tied_gradient_sum": "all_reduce",
    "loss_sum": "all_reduce",
    "gradient_norm": "all_reduce",
    "overflow_max": "all_reduce",
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


OVERLAPPABLE = ("parameter_gather", "gradient_reduce_scatter")
"""Kinds that ZeRO puts between operators and that a framework may fetch ahead of, or finish behind, the compute."""

SCALARS = ("loss_sum", "gradient_norm", "overflow_max")
"""Sums of a few bytes over all ranks; NCCL takes a tree for them whatever it does with large buffers."""


@dataclass(frozen=True)
class Place:
    """Where a group sits: its size, how many of it share a host, and how many such groups share that host's links."""

    size: Size
    on_host: Size
    concurrent: Size


def task_precision(task: Task, precision: str) -> str:
    """Precision in which a task computes: the head stays in 16 bits when layers run in fp8.

    Micikevicius et al. 2022 (arXiv 2209.05433), section 3; Transformer Engine and torchtitan do the same.
    """
    return "bfloat16" if precision == "fp8" and ".head." in task.key else precision


def compute_seconds(
    machine: Machine, task: Task, precision: str, threads: Size = 1, ranks_per_host: Size = 1
) -> Seconds:
    """Seconds of an operator's task on a core or device of its own."""
    whole = _operator_seconds(machine, task, precision, threads, ranks_per_host)
    share = done_fraction(machine, task)
    return whole if share == 1 else np.asarray(share * whole)


def _operator_seconds(machine: Machine, task: Task, precision: str, threads: Size, ranks_per_host: Size) -> Seconds:
    work = task.work
    if machine.device.kind == "cpu" or machine.device.gemm_samples:
        measured = measured_seconds(machine, task.kind, work, precision, threads, ranks_per_host)
        if measured is not None:
            return measured
    kind, _, way = task.kind.partition(".")
    if kind == "linear":
        product = gemm_seconds(machine, work.m, work.n, work.k, work.batch, precision, threads)
        return product + _cast_seconds(machine, work, way) if precision == "fp8" else product
    if kind in ("attention_blocked", "attention_step") and machine.device.kind == "gpu":
        return _fused_attention_seconds(machine, work, precision, backward=way == "backward")
    if kind in ("attention_plain", "attention_blocked", "attention_step"):
        curve = machine.device.batched_gemm
        precision = "bfloat16" if precision == "fp8" else precision
        products = gemm_seconds(machine, work.m, work.n, work.k, work.batch, precision, threads, curve)
        name = "softmax_backward" if way == "backward" else "softmax"
        softmax = kernel_seconds(machine, name, work.elements, np.multiply(4, work.elements), precision, ranks_per_host)
        return np.asarray((products + softmax) * (1.0 if kind == "attention_plain" else work.share))
    name = f"{kind}_backward" if way.startswith("backward") else kind
    return kernel_seconds(machine, name, work.elements, work.bytes, precision, ranks_per_host)


def _cast_seconds(machine: Machine, work: Work, way: str) -> Seconds:
    """Seconds to scale and convert the activations of an fp8 product: 2 bytes read, 1 written and 1 for the transpose.

    The input is cast ahead of the forward product and the output's gradient ahead of the first backward one; the weight
    gradient finds both. Weights are cast once a step, or one rank's shard of them (Transformer Engine's cached weights;
    torchtitan's gathers in fp8), which is left out.
    """
    elements = np.multiply(work.m, work.k) * (way != "backward_weight")
    return kernel_seconds(machine, "cast", elements, 4.0 * elements, "bfloat16")


def _fused_attention_seconds(machine: Machine, work: Work, precision: str, *, backward: bool) -> Seconds:
    """Seconds of a fused kernel whose Work counts products: `fused_attention_seconds` with 2 forward, 5 backward.

    fp8 training keeps attention in 16 bits.
    """
    precision = "bfloat16" if precision == "fp8" else precision
    products = 5 if backward else 2
    # One "batch" of heads: the formula only uses the product batch x heads and the share of visible pairs.
    heads = np.multiply(work.batch, work.share) / products
    return fused_attention_seconds(machine, heads, 1, work.m, work.n, work.k, precision, backward=backward)


def launches(machine: Machine, task: Task, precision: str = "float32") -> int:
    """Number of kernels that the host dispatches for an operator's task; calls of its kind as in the profile."""
    kind, _, way = task.kind.partition(".")
    timed = TimedFigures.of(machine.device, precision)
    kernels = timed.kernels
    if kind == "linear":
        return kernels["linear"].calls if "linear" in kernels else 1
    products = 0
    if kind.startswith("attention"):
        figures = timed.attention.get(measured_name(task.kind))
        if figures is not None:
            return figures.calls
        if kind != "attention_plain" and machine.device.kind == "gpu":
            return 1
        kind, products = "softmax", 4 if way == "backward" else 2
    names = (f"{kind}_backward" if way.startswith("backward") else kind, kind, "default")
    return products + next((kernels[name].calls for name in names if name in kernels), 1)


def group_seconds(
    machine: Machine, task: Task, place: Place, *, scattered: bool = False, mixed: bool = False,
    algorithm: str | None = None,
) -> Seconds:  # fmt: skip
    """Seconds of a collective's task.

    Args:
        machine: the profile.
        task: the collective.
        place: where its group sits.
        scattered: an early gradient reduction goes into shards (ZeRO).
        mixed: 16-bit or fp8 training, where the framework's own gradient and parameter bytes apply.
        algorithm: the one that the plan fixed, where the profile has measured them; None for the machine's choice.
    """
    operation = COLLECTIVES[task.kind]
    if task.kind == "gradient_start" and scattered:
        operation = "reduce_scatter"
    if task.kind in SCALARS and machine.algorithm(operation) == "ring":
        algorithm = "tree"
    payload = np.multiply(task.work.full_bytes, stored_fraction(machine, task.kind) if mixed else 1.0)
    seconds = collective_seconds(machine, operation, payload, place.size, place.on_host, algorithm, place.concurrent)
    seconds = seconds * exposed_fraction(machine, task, operation)
    extra = machine.link_in_host.in_place.get(operation)
    if extra is None or task.kind in SCALARS:
        return seconds
    added = extra.latency_seconds + np.multiply(extra.seconds_per_byte, payload)
    return np.asarray(np.where(np.greater(seconds, 0), seconds + added, 0.0))[()]


def stored_fraction(machine: Machine, kind: str) -> float:
    """Bytes of a parameter or gradient as the framework sends it, over the program's 2 and 4."""
    framework = machine.framework
    if kind in ("parameter_gather", "parameter_all_gather"):
        return (framework.parameter_bytes or WORKING_BYTES) / WORKING_BYTES
    stored = framework.gradient_bytes if "gradient" in kind and kind not in SCALARS else None
    return 1.0 if stored is None else stored / MASTER_BYTES


def message_seconds(
    machine: Machine, payload_bytes: Size, same_host: Flag, concurrent: Size, tp: Size = 1, *, whole: bool = True
) -> Seconds:
    """Seconds of a pipeline message of one rank; `whole` if every rank of the tensor axis holds all of it.

    A scattering framework sends each rank's 1/tp of a whole tensor to another host and gathers it there over NVLink
    (Narayanan et al. 2021, section 4.1).
    """
    plain = p2p_seconds(machine, payload_bytes, same_host, concurrent)
    if not (machine.framework.scattered_messages and whole):
        return plain
    part = p2p_seconds(machine, np.divide(payload_bytes, tp), same_host, concurrent)
    gather = collective_seconds(machine, "all_gather", payload_bytes, tp)
    return np.asarray(np.where(same_host, plain, part + gather))[()]


def stretch_seconds(
    machine: Machine, own_seconds: Size, overlappable_seconds: Size, kernels: Size, collectives: Size, op: str
) -> Seconds:
    """Seconds of one instruction (F, B, I or W of a stage on one micro-batch): a stretch that the host queues ahead.

    Device time is the operators' and the exposed collectives'; the host's dispatch may be slower. F, B and I each carry
    half of what the framework adds to a micro-batch.
    """
    device = own_seconds + exposed_seconds(machine, overlappable_seconds, own_seconds)
    around = 0.0 if op == "W" else machine.overheads.micro_batch_seconds / 2
    return dispatched_seconds(machine, device, kernels, collectives) + around


def machine_of(plan: Plan, machine: Machine) -> Machine:
    """Return the machine over the transport that the plan names.

    A plan for the other kind of device is priced as this kind's ranks would carry it out, over the transport in use.

    Raises:
        MachineError: the profile has no figures for the transport.
    """
    transport = cast(Transport, plan.transport)
    return machine.over(transport) if machine.suits(transport) else machine


def plan_over(plan: Plan, machine: Machine) -> Plan:
    """Return the plan as a machine's ranks would carry it out, whose transport decides in which type sums travel."""
    if machine.suits(cast(Transport, plan.transport)):
        return plan
    return msgspec.structs.replace(plan, transport=machine.transport_in_use)


@dataclass
class Pricer:
    """Prices the tasks of one plan on one machine, over the plan's transport; equal work is priced once."""

    plan: Plan
    machine: Machine
    _seconds: dict[tuple[object, ...], float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Ranks fill hosts in order."""
        plan = self.plan
        machine = self.machine = machine_of(plan, self.machine)
        world = plan.mesh.world_size
        self.ranks_per_host = machine.ranks_per_host(world)
        self.one_host = world <= self.ranks_per_host
        self.precision = plan.training.precision
        self.slowdown = float(oversubscription_factor(machine, self.ranks_per_host, plan.training.threads_per_rank))

    def seconds(self, task: Task, at: Coordinate) -> float:
        """Seconds of work of a task on the rank at `at`; waiting for others is the simulator's."""
        if task.kind in FREE:
            return 0.0
        place = 0 if self.one_host and not self.machine.relative_speeds else self.plan.mesh.rank(at)
        # A rank with several model chunks may send to two neighbours, of which one sits on its own host.
        again = task.key.partition(".")[2] if task.key.endswith(".recompute") else ""
        key = (task.kind, task.axis, task.work, place, ".head." in task.key, again, task.attributes.get("peer"))
        known = self._seconds.get(key)
        if known is None:
            known = self._seconds[key] = self._price(task, at)
        return known

    def stretch(self, tasks: tuple[Task, ...], at: Coordinate, op: str) -> tuple[list[float], float]:
        """Seconds of each task of an instruction, as far as nothing hides them, and the host's time beyond their sum.

        Gradient reductions that start on a stream of their own are priced whole and left out of the sum.
        """
        seconds = [self.seconds(task, at) for task in tasks]
        inside = [(task, s) for task, s in zip(tasks, seconds, strict=True) if task.kind != "gradient_start"]
        fetched = sum(s for task, s in inside if task.kind in OVERLAPPABLE)
        own = sum(s for _, s in inside) - fetched
        kernels = sum(launches(self.machine, task, self.precision) for task, _ in inside if not communicates(task))
        collectives = sum(1 for task, s in inside if s and communicates(task))
        total = float(stretch_seconds(self.machine, own, fetched, kernels, collectives, op))
        exposed = float(exposed_seconds(self.machine, fetched, own))
        if fetched:
            share = exposed / fetched
            seconds = [s * share if t.kind in OVERLAPPABLE else s for t, s in zip(tasks, seconds, strict=True)]
        return seconds, max(0.0, total - own - exposed)

    def _price(self, task: Task, at: Coordinate) -> float:
        if task.kind in COLLECTIVES:
            own = self._own_part(task)
            if self.plan.mesh.world_size == 1:
                return own
            scattered, mixed = self.plan.zero_stage > 0, self.precision in MIXED_PRECISIONS
            place = self.place(task, at)
            chosen = self._algorithm(task, place)
            moved = group_seconds(self.machine, task, place, scattered=scattered, mixed=mixed, algorithm=chosen)
            return own + float(moved)
        if task.kind in MESSAGES:
            return self._message(task, at)
        threads = self.plan.training.threads_per_rank
        precision = task_precision(task, self.precision)
        alone = float(compute_seconds(self.machine, task, precision, threads, self.ranks_per_host))
        return alone * self.slowdown / self.machine.relative_speed(self.plan.mesh.rank(at))

    def _own_part(self, task: Task) -> float:
        """Seconds that a rank computes inside a collective's task: its own share of the gradient norm, where timed."""
        if task.kind != "gradient_norm" or task.kind not in self.machine.device.kernels:
            return 0.0
        seconds = compute_seconds(self.machine, task, self.precision, 1, self.ranks_per_host)
        return float(seconds) * self.slowdown

    def _algorithm(self, task: Task, place: Place) -> str | None:
        """The algorithm that the executor will use, where they were timed one by one."""
        measured = measured_tables(self.machine, place)
        if not measured:
            return None
        operation, fixed = COLLECTIVES[task.kind], self.plan.collectives
        chosen = fixed.get(f"{task.axis}.{operation}", fixed.get(operation, "native"))
        chosen = "native" if task.kind in SCALARS else chosen
        known = any(t.operation == operation and t.algorithm == chosen for t in measured)
        return chosen if known else None

    def place(self, task: Task, at: Coordinate) -> Place:
        """Where the group of a collective sits that the rank at `at` takes part in."""
        mesh, axis = self.plan.mesh, task.axis or "world"
        if axis == "tie":
            ranks: tuple[int, ...] = (mesh.rank(at._replace(pp=0)), mesh.rank(at._replace(pp=mesh.pp - 1)))
        else:
            ranks = mesh.group(axis, at)
        on_host = int(np.ceil(len(ranks) / mesh.hosts(ranks, self.ranks_per_host)))
        return Place(len(ranks), on_host, max(1, self.ranks_per_host // on_host))

    def _message(self, task: Task, at: Coordinate) -> float:
        mesh, rank = self.plan.mesh, self.plan.mesh.rank(at)
        neighbour = mesh.rank(at._replace(cp=(at.cp + 1) % mesh.cp))
        peer = int(task.attributes.get("peer", neighbour))
        same = rank // self.ranks_per_host == peer // self.ranks_per_host
        if task.kind != "send":
            seconds = float(p2p_seconds(self.machine, task.work.full_bytes, same, self.ranks_per_host))
            extra = self.machine.link_in_host.in_place.get("send")
            if extra is None or not seconds:
                return seconds
            return seconds + extra.latency_seconds + extra.seconds_per_byte * float(task.work.full_bytes)
        return self.message(task.work.full_bytes, same)

    @property
    def times_dispatch(self) -> bool:
        """Whether the host's time per task was timed on the machine's GPU, so that updates can be bound by it too."""
        return self.machine.device.kind == "gpu" and bool(self.machine.device.gemm_samples)

    @property
    def exchange(self) -> float:
        """Host time of receiving one message."""
        return self.machine.overheads.exchange_seconds

    def message(self, payload_bytes: Size, same_host: bool) -> float:
        """Seconds of one message between pipeline stages."""
        whole = self.plan.mesh.tp > 1 and not self.plan.sequence_parallel
        tp = min(self.plan.mesh.tp, self.ranks_per_host)
        return float(message_seconds(self.machine, payload_bytes, same_host, self.ranks_per_host, tp, whole=whole))


def measured_tables(machine: Machine, place: Place) -> tuple[MeasuredCollective, ...]:
    """What was timed of the link that a group crosses: the one inside a host, or the one between hosts."""
    inside = place.on_host >= place.size
    return machine.link_in_host.measured if inside else machine.link_between_hosts.measured


def communicates(task: Task) -> bool:
    """Whether a task is a collective or a message rather than an operator."""
    return task.kind in COLLECTIVES or task.kind in MESSAGES
