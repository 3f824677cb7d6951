"""Collectives as a training step meets them: between its tasks, operands out of cache, parts copied into place.

Timed alone, over and over, a collective finds its buffers, its scratch memory and its code in cache. What it takes
beyond that time inside a step is measured here on small plans of all ranks and kept as latency plus bandwidth.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import numpy as np

from executor.calibrate.exchanges import LOWER_QUARTILE, Timed
from executor.comm import Communicator
from executor.data import Batches
from executor.runtime import Runtime
from planner.mesh import Mesh
from planner.model import with_sizes
from planner.plan import Plan, make_plan

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
LEAST_STEPS, MAX_STEPS = 5, 16
HEAD_DIM = 32


@dataclass(frozen=True)
class InPlace:
    """One collective of a step: its whole bytes, its time there, and which algorithm ran."""

    operation: str
    algorithm: str
    full_bytes: int
    seconds: float


def fastest_algorithms(timed: Sequence[Timed]) -> dict[str, str]:
    """The best algorithm of each collective for messages of `TYPICAL_BYTES`."""
    best: dict[str, tuple[float, str]] = {}
    for each in timed:
        seconds = float(np.interp(TYPICAL_BYTES, each.sizes_bytes, each.seconds))
        if each.operation != "send" and seconds < best.get(each.operation, (np.inf, ""))[0]:
            best[each.operation] = seconds, each.algorithm
    return {operation: algorithm for operation, (_, algorithm) in best.items()}


def plans(ranks: int, algorithms: Mapping[str, str]) -> list[Plan]:
    """Small plans that put every rank on one axis."""
    axes: list[tuple[Mesh, dict[str, Any]]] = [
        (Mesh(tp=ranks), {}),
        (Mesh(tp=ranks), {"sequence_parallel": True}),
        (Mesh(dp=ranks), {"zero_stage": 1}),
        (Mesh(cp=ranks), {}),
        (Mesh(cp=ranks), {"cp_kind": "ring"}),
        (Mesh(pp=ranks), {}),
    ]
    found = []
    for hidden in (128, 320):
        heads = max(ranks, hidden // HEAD_DIM)
        spec = with_sizes(None, layers=max(2, ranks), hidden=heads * HEAD_DIM, heads=heads, seq_len=max(64, 2 * ranks))
        for mesh, options in axes:
            batch = 4 * mesh.dp * mesh.pp  # a micro-batch for every stage
            found.append(
                make_plan(
                    spec, mesh, global_batch_size=batch, micro_batch_size=4, collectives=dict(algorithms), **options
                )
            )
    return found


def time_in_place(comm: Communicator, algorithms: Mapping[str, str], seconds: float) -> list[InPlace]:
    """Run the plans on all ranks; collective, every rank gets the result."""
    found: list[InPlace] = []
    ready = plans(comm.size, algorithms)
    begun = perf_counter()
    for position, plan in enumerate(ready):
        found += _time_plan(comm, plan, algorithms, begun + seconds * (position + 1) / len(ready))
    return found


def _time_plan(comm: Communicator, plan: Plan, algorithms: Mapping[str, str], deadline: float) -> list[InPlace]:
    """The collectives of one plan."""
    batches = Batches("synthetic", plan.model, plan.global_batch_size, plan.training.seed)
    runtime = Runtime(plan, comm, batches, np.dtype(plan.training.precision))
    tasks = [task for part in runtime.program.steps for task in part.tasks]
    wanted = OPERATION_OF if plan.mesh.pp == 1 else ("send", "post_receive")
    chosen = [position for position, task in enumerate(tasks) if task.kind in wanted]
    runs: list[list[float]] = []
    for number in range(WARMUP_STEPS + MAX_STEPS):
        spans = runtime.run_step(number).spans
        if number >= WARMUP_STEPS:
            runs.append([spans[i].end - spans[i].start - spans[i].wait for i in chosen])
        late = np.array([float(perf_counter() > deadline)])
        comm.world.all_reduce(late, "max", key="profile")
        if late[0] and len(runs) >= LEAST_STEPS:
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
