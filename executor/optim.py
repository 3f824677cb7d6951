"""The update: learning-rate schedule, the gradient norm with every parameter counted once, AdamW and SGD on shards."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from executor.device import HOST, Device
from executor.state import UnitState
from planner.mesh import Coordinate
from planner.plan import Plan, Training
from planner.program.units import Slot
from planner.program.update import TIED, kv_shared
from planner.shard import offsets, shared_kv_heads


def learning_rate(training: Training, step: int) -> float:
    """Rate of update `step` (0 is the first): linear warm-up, then constant, linear or cosine decay to zero.

    Loshchilov & Hutter 2017 (arXiv:1608.03983) for the cosine.
    """
    if step < training.warmup_steps:
        return training.learning_rate * (step + 1) / training.warmup_steps
    if training.learning_rate_schedule == "constant":
        return training.learning_rate
    span = max(1, training.total_steps - training.warmup_steps)
    done = min(1.0, (step - training.warmup_steps) / span)
    left = 1.0 - done if training.learning_rate_schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
    return training.learning_rate * left


def update(unit: UnitState, training: Training, step: int) -> None:
    """Apply one optimizer step to the owned range; weight decay acts on matrices only."""
    rate, gradient, copy = learning_rate(training, step), unit.reduced(), unit.working_copy()
    for start, stop, decay in runs(unit):
        part = slice(start, stop)
        working = None if copy is None else copy[part]
        if training.optimizer == "sgd":
            unit.kernels.sgd(unit.shard[part], gradient[part], rate, working)
            continue
        first, second = unit.moments
        unit.kernels.adamw(
            unit.shard[part], gradient[part], first[part], second[part], rate, training.beta1, training.beta2,
            training.epsilon, training.weight_decay if decay else 0.0, step + 1, working,
        )  # fmt: skip


def unscale(units: Iterable[UnitState], scale: float) -> bool:
    """Divide the gradients that the optimizer will use by the loss scale; whether all of them are numbers.

    A power of two divides without rounding. A sum of squares in float64 is finite exactly if its float32 terms are.
    """
    device: Device = HOST
    total: Any = 0.0
    for unit in units:
        unit.scale_gradient(1.0 / scale)
        total += unit.kernels.sum_of_squares(unit.reduced())
        device = unit.arena.device
    return math.isfinite(device.number(total))


def runs(unit: UnitState) -> list[tuple[int, int, bool]]:
    """Maximal stretches of the owned range with the same weight decay."""
    merged: list[tuple[int, int, bool]] = []
    for slot, start, stop in unit.pieces():
        decay = slot.parameter.decay
        if merged and merged[-1][1] == start and merged[-1][2] == decay:
            merged[-1] = (merged[-1][0], stop, decay)
        else:
            merged.append((start, stop, decay))
    return merged


def squared_norm(units: list[UnitState], plan: Plan, at: Coordinate, is_second_copy: bool) -> Any:
    """This rank's share of the squared global gradient norm; over all ranks every parameter is counted once.

    Returns:
        A scalar of the units' device.
    """
    total: Any = 0.0
    for unit in units:
        if not plan.zero_stage and (at.dp or at.cp):
            continue  # replicas hold the same gradients
        gradient = unit.reduced()
        for slot, start, stop in unit.pieces():
            if (slot.replicated_tp and at.tp) or (slot.parameter.name == TIED and is_second_copy):
                continue
            part = gradient[start:stop]
            if plan.mesh.tp > 1 and kv_shared(plan) and "qkv" in slot.parameter.dims:
                first = unit.range[0] - slot.offset
                mask = _first_holder(plan, at, slot)[start + first : stop + first]
                # By index: a device would have to wait for the count of a mask.
                part = part[unit.arena.device.upload(np.flatnonzero(mask))]
            total += unit.kernels.sum_of_squares(part)
    return total


def _first_holder(plan: Plan, at: Coordinate, slot: Slot) -> NDArray[np.bool_]:
    """Which elements of a packed QKV parameter are not held by a lower rank of the tensor axis as well."""
    model, starts = plan.model, offsets(plan.parts.heads)
    first, last = shared_kv_heads(model.heads, model.kv_heads, starts[at.tp], starts[at.tp + 1])
    below = shared_kv_heads(model.heads, model.kv_heads, 0, starts[at.tp])[1] if at.tp else 0
    kv = np.repeat(np.arange(first, last) >= below, model.head_dim)
    queries = np.ones((starts[at.tp + 1] - starts[at.tp]) * model.head_dim, bool)
    columns = np.concatenate([queries, kv, kv])
    return np.broadcast_to(columns, (slot.size // columns.size, columns.size)).reshape(-1)
