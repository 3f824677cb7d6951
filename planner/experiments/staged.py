"""The staged-MPI experiment: one attention block over 1, 2, 4 GPUs whose K and V pass through host memory.

The sequence of a block (hidden 5,120, 4,096 positions, batch 4, float32) is split over p GPUs, and before attention
each gathers the whole of K and of V: GPU -> CPU -> MPI -> CPU -> GPU. Published: 0.947, 0.816 and 1.010 s.

Compute is 1/p of that of one GPU. A gather of n bytes copies n/p from each device and n to each, and MPI moves
(p-1)/p n to each rank, which reads and writes it: (p+1) n + 2 (p-1) n = (3p-1) n pass through the host's memory, more
with every GPU. So two figures describe the node: the rate of its products, which the time of one GPU shows, and what
its host's memory carries, which the other two times show twice over.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from planner.cost.price import COLLECTIVES, Pricer
from planner.cost.staging import staged_seconds
from planner.experiments.experiment import Case, Experiment, Records, Row, Sizes, block_of, block_seconds
from planner.machine import Machine, Transport
from planner.mesh import Coordinate, Mesh
from planner.model import ModelSpec
from planner.plan import Plan, Training, make_plan
from planner.predict import predict
from planner.program import lower
from planner.trace import Record, is_communication

PUBLISHED_SECONDS = {1: 0.947, 2: 0.816, 4: 1.010}
"""Seconds of the block by number of GPUs."""

STATED_GATHER_SECONDS = (5e-3, 15e-3)
"""What the same source says that one all-gather takes; its table contradicts it."""

GATHERS = 2  # of K and of V
ITEM_BYTES = 4  # float32
PROFILE = "staged-mpi-node"
GPUS = tuple(PUBLISHED_SECONDS)
ELSEWHERE: tuple[Transport, ...] = ("cuda-aware", "nccl")

_RATES = ("device.gemm.default.fraction", "device.batched_gemm.fraction")
_COPIES = "transports.staged.staging.shared_bandwidth_bytes_per_second"
_MESSAGES = "transports.staged.link_in_host.shared_bandwidth_bytes_per_second"
FITTED_FIGURES = 2


def staged_attention(sizes: Sizes) -> Experiment:
    """One attention block over 1, 2, 4 GPUs through host memory, beside published times, CUDA-aware MPI and NCCL."""
    model, batch = _model(sizes), sizes.batch(4)
    cases = [Case(_label(p, "staged"), _plan(model, batch, p, "staged")) for p in GPUS]
    for transport in ELSEWHERE:
        cases += [Case(_label(p, transport), _plan(model, batch, p, transport)) for p in GPUS if p > 1]
    classic = not sizes.model and batch == 4
    published = {_label(p, "staged"): {"published": seconds} for p, seconds in PUBLISHED_SECONDS.items()}
    columns = {"seconds": "seconds", "compute": "seconds", "communication": "seconds", "speedup": "x"}
    return Experiment(
        "staged-attention",
        f"one attention block split over the sequence, K and V all-gathered: {model.name}, batch {batch}, float32",
        tuple(cases), _rows, columns, "seconds",
        references=published if classic else {},
        note=contradiction() if classic else "",
        machine=PROFILE,
        explain=lambda records, machine: explanation(records, machine, classic=classic),
    )  # fmt: skip


def _model(sizes: Sizes) -> ModelSpec:
    return sizes.spec(layers=1, hidden=5120, heads=40, seq_len=4096)


def _label(gpus: int, transport: str) -> str:
    return f"{gpus} GPU{'s' if gpus > 1 else ''}, {transport}"


def _plan(model: ModelSpec, batch: int, gpus: int, transport: str) -> Plan:
    return make_plan(
        model, Mesh(cp=gpus), global_batch_size=batch, micro_batch_size=batch, forward_only=True,
        transport=transport, training=Training(precision="float32"),
    )  # fmt: skip


def _rows(records: Records) -> list[Row]:
    """Seconds of the attention block; the rest of the step is not what was published."""
    alone = records.get(_label(1, "staged"))
    rows = []
    for name, record in records.items():
        seconds, moving = block_seconds(record)["attention"], communication_seconds(record)
        figures = {"seconds": seconds, "compute": seconds - moving, "communication": moving}
        if alone is not None:
            figures["speedup"] = block_seconds(alone)["attention"] / seconds
        rows.append(Row(name, figures))
    return rows


def communication_seconds(record: Record) -> float:
    """Return the seconds that a rank communicates in the attention block, mean over ranks."""
    spans = [s for s in record.spans() if block_of(s.key) == "attention" and is_communication(s.key)]
    return sum(span.seconds for span in spans) / record.plan.mesh.world_size


# ---- the fit ---------------------------------------------------------------------------------------------------------


def fit_node(machine: Machine) -> Machine:
    """Return the node with its two figures fitted on the three published times, by least squares of their logarithms.

    Not `planner.published.fit`: its rows are whole training steps, and three times carry no more than two figures. One
    fraction of the peak serves all products; MPI's share of the host's memory is half of what copies have of it, for a
    byte that MPI moves is read and written. One degree of freedom is left.
    """
    from scipy.optimize import least_squares  # noqa: PLC0415 - a third of a second that no other experiment needs

    def off(logs: NDArray[np.float64]) -> list[float]:
        return list(residuals(_with_figures(machine, *np.exp(logs))).values())

    solved = least_squares(off, np.log([machine.figure(_RATES[0]), machine.figure(_COPIES)]))
    return _with_figures(machine, *np.exp(solved.x))


def _with_figures(machine: Machine, fraction: float, copies: float) -> Machine:
    rates = dict.fromkeys(_RATES, float(fraction))
    return machine.with_figures(rates | {_COPIES: float(copies), _MESSAGES: float(copies) / 2})


def residuals(machine: Machine) -> dict[int, float]:
    """Return log(predicted / published) by number of GPUs."""
    model = _model(Sizes())
    predicted = {p: block_seconds(predict(_plan(model, 4, p, "staged"), machine))["attention"] for p in GPUS}
    return {p: float(np.log(predicted[p] / PUBLISHED_SECONDS[p])) for p in GPUS}


# ---- in words --------------------------------------------------------------------------------------------------------


def implied_gather_seconds(gpus: int) -> float:
    """Return what the published times leave for one all-gather: the step less its share of one GPU's, over K and V."""
    return (PUBLISHED_SECONDS[gpus] - PUBLISHED_SECONDS[1] / gpus) / GATHERS


def contradiction() -> str:
    """Return how the source's own statement about its all-gathers contradicts its table."""
    model = _model(Sizes())
    full = 4 * model.seq_len * model.hidden * ITEM_BYTES
    low, high = STATED_GATHER_SECONDS
    implied = ", ".join(
        f"{implied_gather_seconds(p) * 1e3:.0f} ms at {p} ({(p - 1) / p * full / implied_gather_seconds(p) / 1e9:.2f} "
        "GB/s to each GPU)"
        for p in GPUS
        if p > 1
    )
    needed = [(p - 1) / p * full / seconds / 1e9 for p in GPUS if p > 1 for seconds in STATED_GATHER_SECONDS]
    said = f"{low * 1e3:.0f} to {high * 1e3:.0f} ms"
    return (
        f"the source says that an all-gather takes {said}, and its table says otherwise: K or V is {full / 1e6:.0f} MB "
        f"in float32, and the times published leave {implied}; {said} would be {min(needed):.0f} to "
        f"{max(needed):.0f} GB/s, more than this staging can carry. Profile {PROFILE} is fitted to "
        "the times"
    )


class _Parts(NamedTuple):
    """Seconds of a rank's collectives in a step: copies from the device, MPI, copies to it."""

    to_host: float
    mpi: float
    to_device: float


def _parts(plan: Plan, machine: Machine) -> _Parts:
    pricer, at = Pricer(plan, machine), Coordinate(0, 0, 0, 0)
    to_host = whole = to_device = 0.0
    for task in (task for step in lower(plan, 0).steps for task in step.tasks if block_of(task.key) == "attention"):
        if task.kind in COLLECTIVES:
            place, operation = pricer.place(task, at), COLLECTIVES[task.kind]
            ranks = np.multiply(place.on_host, place.concurrent)
            copies = staged_seconds(pricer.machine, operation, task.work.full_bytes, place.size, ranks)
            whole += pricer.seconds(task, at)
            to_host, to_device = to_host + float(copies.to_host), to_device + float(copies.to_device)
    return _Parts(to_host, whole - to_host - to_device, to_device)


def explanation(records: Records, machine: Machine, *, classic: bool) -> list[str]:
    """Return why two GPUs gain and four lose, what the copies cost, and what other transports would give."""
    staged = [records[_label(p, "staged")] for p in GPUS]
    rows = [row.figures for row in _rows({name: records[name] for name in (_label(p, "staged") for p in GPUS)})]

    def listed(column: str) -> str:
        return " -> ".join(f"{row[column] * 1e3:.0f}" for row in rows)

    told = [
        f"From 1 to 2 to 4 GPUs compute shrinks, {listed('compute')} ms, and communication grows, "
        f"{listed('communication')} ms: every GPU needs the whole of K and V. {_memory_sentence(machine)}",
    ]
    alone = rows[0]["seconds"]
    for record, row, gpus in zip(staged, rows, GPUS, strict=True):
        if gpus > 1:
            saved, cost = rows[0]["compute"] - row["compute"], row["communication"]
            out, mpi, back = (f"{seconds * 1e3:.0f} ms" for seconds in _parts(record.plan, machine))
            told.append(
                f"{gpus} GPUs {'gain' if cost < saved else 'lose'}: they save {saved * 1e3:.0f} ms of compute and "
                f"communicate {cost * 1e3:.0f} ms ({out} of copies to the host, {mpi} of MPI, {back} of copies back)."
            )
    for transport in ELSEWHERE:
        link = machine.over(transport).link_in_host
        times = {p: block_seconds(records[_label(p, transport)])["attention"] for p in GPUS if p > 1}
        words = " and ".join(f"{s * 1e3:.0f} ms ({alone / s:.2f}x) at {p}" for p, s in times.items())
        rate = f"{link.bandwidth_bytes_per_second / 1e9:.0f} GB/s a GPU"
        told.append(f"Over {transport} on the same node ({rate}) the block would take {words} GPUs.")
    if classic and machine.name == PROFILE:
        told.append(_fit_sentence(machine))
    return told


def _memory_sentence(machine: Machine) -> str:
    """What staging adds to that, where the host's memory is what limits it."""
    staging = machine.over("staged").staging
    memory = None if staging is None else staging.shared_bandwidth_bytes_per_second
    if staging is None or memory is None or memory / min(GPUS[1:]) > staging.to_device_bytes_per_second:
        return "Its copies go at the pace of each GPU's own copy engines."
    return (
        f"All of them draw it through one host's memory, which carries {memory / 1e9:.1f} GB/s: a gather of n bytes "
        "passes (3p-1) n through it, 5n at 2 GPUs and 11n at 4."
    )


def _fit_sentence(machine: Machine) -> str:
    off = residuals(machine)
    worst = max(off, key=lambda p: abs(off[p]))
    return (
        f"Profile {machine.name}: {FITTED_FIGURES} figures (the rate of products, the host's memory) fitted to "
        f"{len(GPUS)} times, {len(GPUS) - FITTED_FIGURES} degree of freedom left; largest residual "
        f"{np.expm1(off[worst]):+.1%}, at {worst} GPUs."
    )
