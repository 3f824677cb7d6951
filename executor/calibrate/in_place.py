"""Collectives as a training step meets them: between its tasks, operands out of cache, parts copied into place.

Timed alone, over and over, a collective finds its buffers, its scratch memory and its code in cache. What it takes
beyond that time inside a step is measured here on small plans of all ranks and kept as latency plus bandwidth.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import msgspec
import numpy as np

from executor.calibrate.exchanges import LOWER_QUARTILE, Timed
from executor.comm import Communicator
from executor.data import Batches
from executor.runtime import Runtime
from planner.mesh import Mesh
from planner.model import ModelSpec, with_sizes
from planner.plan import Plan, Training, make_plan

OPERATION_OF = {
    "all_reduce": "all_reduce",
    "gradient_all_reduce": "all_reduce",
    "all_gather": "all_gather",
    "parameter_all_gather": "all_gather",
    "reduce_scatter": "reduce_scatter",
    "gradient_reduce_scatter": "reduce_scatter",
    "ring_shift": "send",
    "send": "exchange",
    "post_receive": "exchange",
}
"""What each task kind is measured for; "exchange" is what both ends of a pipeline message spend on its two calls."""

TYPICAL_BYTES = 1 << 18
"""The size at which the algorithms for these plans are chosen."""

WARMUP_STEPS = 2
LEAST_STEPS, MAX_STEPS = 3, 16
HEAD_DIM = 32
LARGE = (512, 128)
"""Hidden size and tokens of a sequence whose activations, a MiB and more, come from memory when they are sent."""

ESSENTIAL = 2
"""So many of the sizes are run even when the time is used up."""

EARLY = (384, 64)
"""Hidden size and tokens of the only sequence of a rank: its gradients take about as long to sum as to compute."""

EARLY_PAIRS = 24
"""At most so many steps, each with its rival, tell what a reduction costs that starts early."""


@dataclass(frozen=True)
class InPlace:
    """One collective of a step: its whole bytes, its time there, and which algorithm ran."""

    operation: str
    algorithm: str
    full_bytes: int
    seconds: float


def fastest_algorithms(timed: Sequence[Timed], nbytes: float = TYPICAL_BYTES) -> dict[str, str]:
    """The best algorithm of each collective for messages of that size."""
    best: dict[str, tuple[float, str]] = {}
    for each in timed:
        seconds = float(np.interp(nbytes, each.sizes_bytes, each.seconds))
        if each.operation != "send" and seconds < best.get(each.operation, (np.inf, ""))[0]:
            best[each.operation] = seconds, each.algorithm
    return {operation: algorithm for operation, (_, algorithm) in best.items()}


def plans(ranks: int, algorithms: Mapping[str, str]) -> list[Plan]:
    """Small plans that put every rank on one axis, and as many more whose tensors outgrow a core's own cache."""
    return [
        make_plan(
            _model(ranks, hidden, seq_len, 2 if mesh.pp == 1 else ranks), mesh,
            global_batch_size=4 * mesh.dp * mesh.pp,  # a micro-batch for every stage
            micro_batch_size=4, collectives=dict(algorithms), **options,
        )
        for hidden, seq_len in ((128, 64), (320, 64), LARGE)
        for mesh, options in _axes(ranks)
        if (hidden, seq_len) != LARGE or mesh.tp * mesh.cp > 1
    ]  # fmt: skip


def _axes(ranks: int) -> list[tuple[Mesh, dict[str, Any]]]:
    return [
        (Mesh(tp=ranks), {}),
        (Mesh(tp=ranks), {"sequence_parallel": True}),
        (Mesh(dp=ranks), {"zero_stage": 1}),
        (Mesh(cp=ranks), {}),
        (Mesh(cp=ranks), {"cp_kind": "ring"}),
        (Mesh(pp=ranks), {}),
    ]


def _model(ranks: int, hidden: int, seq_len: int, layers: int) -> ModelSpec:
    heads = max(ranks, hidden // HEAD_DIM)
    return with_sizes(None, layers=layers, hidden=heads * HEAD_DIM, heads=heads, seq_len=max(seq_len, 2 * ranks))


def time_in_place(comm: Communicator, algorithms: Mapping[str, str], seconds: float) -> list[InPlace]:
    """Run the plans on all ranks; collective, every rank gets the result. The last are left out when time is up."""
    found: list[InPlace] = []
    ready = plans(comm.size, algorithms)
    begun = perf_counter()
    for position, plan in enumerate(ready):
        if position >= ESSENTIAL * len(_axes(comm.size)) and _any_late(comm, begun + seconds):
            break
        found += _time_plan(comm, plan, algorithms, begun + seconds * (position + 1) / len(ready))
    return found


def _any_late(comm: Communicator, deadline: float) -> bool:
    """Whether some rank's clock has passed the deadline, the same answer on all."""
    late = np.array([float(perf_counter() > deadline)])
    comm.world.all_reduce(late, "max", key="profile")
    return bool(late[0])


def _time_plan(comm: Communicator, plan: Plan, algorithms: Mapping[str, str], deadline: float) -> list[InPlace]:
    """The collectives of one plan."""
    batches = Batches("synthetic", plan.model, plan.global_batch_size, plan.training.seed)
    runtime = Runtime(plan, comm, batches)
    tasks = [task for part in runtime.program.steps for task in part.tasks]
    wanted = OPERATION_OF if plan.mesh.pp == 1 else ("send", "post_receive")
    chosen = [position for position, task in enumerate(tasks) if task.kind in wanted]
    runs: list[list[float]] = []
    for number in range(WARMUP_STEPS + MAX_STEPS):
        spans = runtime.run_step(number).spans
        if number >= WARMUP_STEPS:
            runs.append([spans[i].end - spans[i].start - spans[i].wait for i in chosen])
        if len(runs) >= LEAST_STEPS and _any_late(comm, deadline):
            break
    means = np.array(runs)
    if plan.mesh.pp == 1:  # pipeline ranks have different tasks: rank 0 speaks for itself
        comm.world.all_reduce(means, key="profile")
        means /= comm.size
    typical = np.quantile(means, LOWER_QUARTILE, axis=0)
    return [
        InPlace(operation, algorithms.get(operation, "library"), int(task.work.full_bytes), float(own))
        for task, own in zip((tasks[i] for i in chosen), typical, strict=True)
        if (operation := OPERATION_OF[task.kind]) == "exchange" or int(task.work.full_bytes)
    ]


def early_plan(ranks: int, algorithms: Mapping[str, str]) -> Plan:
    """A data-parallel plan whose gradients are large and quickly computed, every reduction waited for."""
    hidden, seq_len = EARLY
    return make_plan(
        _model(ranks, hidden, seq_len, layers=2), Mesh(dp=ranks),
        global_batch_size=ranks, micro_batch_size=1, collectives=dict(algorithms),
        training=Training(dropout=0.0, optimizer="sgd"),
    )  # fmt: skip


def early_reduction_cost(comm: Communicator, algorithms: Mapping[str, str], seconds: float) -> float:
    """What a reduction that starts while the backward pass goes on costs a step, over the bytes' time when waited for.

    Both plans run in turn. What the step without any reduction takes is the one's without its reductions and the
    waiting in them; the rest of the other's is the cost of starting early, waiting included. Below 1 it pays.
    Collective; every rank gets the result.
    """
    plan = early_plan(comm.size, algorithms)
    batches = Batches("synthetic", plan.model, plan.global_batch_size, plan.training.seed)
    early = msgspec.structs.replace(plan, overlap_gradients=True)
    waited, started = Runtime(plan, comm, batches), Runtime(early, comm, batches)
    tasks = [task for part in waited.program.steps for task in part.tasks]
    reductions = [position for position, task in enumerate(tasks) if task.kind == "gradient_all_reduce"]
    deadline, pairs = perf_counter() + seconds, []
    for number in range(WARMUP_STEPS + EARLY_PAIRS):
        result = waited.run_step(number)
        spans = [result.spans[i] for i in reductions]
        whole = sum(span.end - span.start for span in spans)
        pair = [started.run_step(number).seconds - result.seconds + whole, whole - sum(span.wait for span in spans)]
        if number >= WARMUP_STEPS:
            pairs.append(pair)
        if len(pairs) >= LEAST_STEPS and _any_late(comm, deadline):
            break
    found = np.array(pairs)
    comm.world.all_reduce(found, key="profile")
    cost, moved = np.median(found, axis=0)
    return max(0.0, float(cost / moved))
