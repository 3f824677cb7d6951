"""Peak memory of a rank: the program's takes and frees, walked in order, as the executor's arena will see them."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field

from planner.plan import Plan
from planner.program import Program, Step, Task
from planner.program.liveness import needed
from planner.program.rank import ITEM_BYTES
from planner.program.tasks import Buffer
from planner.program.units import Unit
from planner.program.update import state_bytes, tied

PARTS = ("parameters", "gradients", "optimizer", "activations", "buffers")


@dataclass
class Peak:
    """Bytes at the moment of the largest sum, by part."""

    total_bytes: int = 0
    parts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(PARTS, 0))


@dataclass
class _Walk:
    """Live bytes and what they peaked at since the walk began."""

    live: Counter[str] = field(default_factory=Counter)
    peak: Counter[str] = field(default_factory=Counter)
    highest: int = 0

    def change(self, part: str, nbytes: int) -> None:
        self.live[part] += nbytes
        total = sum(self.live.values())
        if total > self.highest:
            self.highest, self.peak = total, Counter(self.live)


def state_parts(plan: Plan, unit: Unit, position: int) -> dict[str, int]:
    """Bytes that a unit holds throughout: parameters, gradients, optimizer state, sharded by the ZeRO stage.

    Rajbhandari et al. 2020 (arXiv:1910.02054), table 1.
    """
    item, stage = state_bytes(plan), plan.zero_stage
    owned = unit.shard_sizes[position] if stage else unit.size
    parts = {"parameters": (owned if stage == 3 else unit.size) * item}
    if plan.forward_only:
        return parts
    whole = unit.size * item if stage < 2 or tied(plan, unit) else 0
    parts["gradients"] = whole + (owned * item if stage else 0)
    parts["optimizer"] = (2 if plan.training.optimizer == "adamw" else 0) * owned * item
    return parts


def peak_memory(program: Program) -> Peak:
    """Walk a rank's program and return its peak; sends are taken to complete as soon as they are posted."""
    plan, at = program.plan, program.at
    position = at.dp * plan.mesh.cp + at.cp
    walk = _Walk()
    for unit in program.units:
        for part, nbytes in state_parts(plan, unit, position).items():
            walk.change(part, nbytes)
    units = {unit.block: unit for unit in program.units}
    known: dict[int, _Walk] = {}  # steps of equal micro-batches share their tasks
    for step in program.steps:
        key = id(step.tasks)
        if key not in known:
            known[key] = _step(program, step, units)
        inside = known[key]
        total = sum(walk.live.values()) + inside.highest
        if total > walk.highest:
            walk.highest, walk.peak = total, walk.live + inside.peak
        walk.live.update(inside.live)
    return Peak(walk.highest, {part: max(0, walk.peak[part]) for part in PARTS})


def _step(program: Program, step: Step, units: dict[str, Unit]) -> _Walk:
    """What one instruction's tasks add and free, relative to what was live before it."""
    walk = _Walk()
    buffers: dict[str, Buffer] = {}
    if step.op != "U":
        batch = program.micro_batches[step.micro_batch]
        buffers = program.segments[step.stage, batch].buffers
    held = needed(step.tasks, buffers) if buffers else set()
    gradient: set[str] = set()
    for task in step.tasks:
        for root in {buffers[name].root for name in task.writes if name in buffers}:
            if root not in held:
                walk.change(buffers[root].category, _bytes(buffers[root], program.plan))
            held.add(root)
        _unit_memory(program.plan, task, units, walk, gradient)
        if task.kind == "handoff":
            _hand_over(program.plan, task, buffers, walk)
            continue
        for root in task.frees:
            if root in buffers and buffers[root].dtype != "index":
                walk.change(buffers[root].category, -_bytes(buffers[root], program.plan))
            held.discard(root)
    return walk


def _hand_over(plan: Plan, task: Task, buffers: dict[str, Buffer], walk: _Walk) -> None:
    """The next stage on this rank holds the buffer too; where the giver keeps it, both will count it freed."""
    buffer = buffers[buffers[task.name].root]
    if not task.frees:
        walk.change(buffer.category, _bytes(buffer, plan))


def _unit_memory(plan: Plan, task: Task, units: dict[str, Unit], walk: _Walk, gradient: set[str]) -> None:
    """Units gathered for a while (ZeRO 3) and gradients that live only until they are scattered (ZeRO 2 and 3)."""
    if plan.zero_stage < 2:
        return
    item = state_bytes(plan)
    if task.kind in ("parameter_gather", "parameter_drop") and plan.zero_stage == 3:
        sign = 1 if task.kind == "parameter_gather" else -1
        walk.change("buffers", sign * units[task.name].size * item)
    for name in task.gradients:
        unit = next((u for u in units.values() if any(s.parameter.name == name for s in u.slots)), None)
        if unit and task.kind != "optimizer" and unit.block not in gradient and not tied(plan, unit):
            gradient.add(unit.block)
            walk.change("gradients", unit.size * item)
    if task.kind == "gradient_reduce_scatter" and task.name in gradient:
        gradient.discard(task.name)
        walk.change("gradients", -units[task.name].size * item)


def _bytes(buffer: Buffer, plan: Plan) -> int:
    """Bytes of a buffer; statistics are kept in float32 at least."""
    item = ITEM_BYTES[plan.training.precision]
    if buffer.dtype == "statistics":
        item = max(4, item)
    return math.prod(int(extent) for extent in buffer.shape) * item
