"""Peak memory of a rank: the program's takes and frees, walked in order, as the executor's arena will see them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from planner.machine import Framework
from planner.plan import Plan
from planner.program import Program, Step, Task
from planner.program.liveness import needed
from planner.program.rank import ITEM_BYTES
from planner.program.tasks import Buffer
from planner.program.units import Unit
from planner.program.update import MIXED_PRECISIONS, state_bytes, tied, working_bytes
from planner.trace import PARTS

if TYPE_CHECKING:
    from planner.cost.skeleton import Skeleton


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


@dataclass(frozen=True)
class Stored:
    """Bytes per parameter that the program which trains keeps: of itself, its gradient, its optimizer state."""

    parameter: float
    gradient: float
    optimizer: float
    probability: float  # per attention probability
    logit: float
    framed: bool = False  # as a framework keeps them in 16 bits or fp8, not as our executor does
    placeholder: float = 0.0  # per element of every distinct shape of weight
    kept: Mapping[str, float] = field(default_factory=dict)  # share of outputs kept under recomputation, by kind

    @classmethod
    def of(cls, plan: Plan, framework: Framework | None = None) -> Stored:
        """What a plan keeps under a framework; None for our executor."""
        item = state_bytes(plan)
        moments = (2 if plan.training.optimizer == "adamw" else 0) * item
        compute = ITEM_BYTES[plan.training.precision]
        if framework is None or plan.training.precision not in MIXED_PRECISIONS or framework.parameter_bytes is None:
            working = working_bytes(plan.training)
            master = item if working < item and not plan.forward_only else 0
            return cls(working, item, moments + master, compute, compute)
        gradient = framework.gradient_bytes or item
        return cls(
            framework.parameter_bytes,
            gradient + framework.accumulated_gradient_bytes.get(plan.training.precision, 0.0),
            framework.optimizer_bytes or moments,
            framework.probability_bytes or compute,
            framework.logit_bytes or compute,
            framed=True,
            placeholder=framework.parameter_bytes if framework.placeholder_gradients else 0.0,
            kept={kind: 1 - share for kind, share in framework.recomputed_fraction.items()},
        )


def state_parts(plan: Plan, unit: Unit, position: int, stored: Stored | None = None) -> dict[str, int]:
    """Bytes that a unit holds throughout: parameters, gradients, optimizer state, sharded by the ZeRO stage.

    Rajbhandari et al. 2020 (arXiv:1910.02054), table 1.
    """
    stored, stage = stored or Stored.of(plan), plan.zero_stage
    owned = unit.shard_sizes[position] if stage else unit.size
    if stored.framed:
        return _framed_state_parts(plan, unit, owned, stored)
    item = state_bytes(plan)
    kept = unit.size if stage < 3 else owned
    if stage == 3 and stored.parameter < item and not plan.forward_only:
        kept = 0  # the working copy is rounded from the master parameters whenever a unit is gathered
    parts = {"parameters": int(kept * stored.parameter)}
    if plan.forward_only:
        return parts
    whole = unit.size * item if stage < 2 or tied(plan, unit) else 0
    parts["gradients"] = whole + (owned * item if stage else 0)
    parts["optimizer"] = int(owned * stored.optimizer)
    return parts


def _framed_state_parts(plan: Plan, unit: Unit, owned: int, stored: Stored) -> dict[str, int]:
    """State under mixed precision: 16-bit parameters and gradients beside sharded master parameters and moments."""
    stage = plan.zero_stage
    parts = {"parameters": int((owned if stage == 3 else unit.size) * stored.parameter)}
    if plan.forward_only:
        return parts
    parts["gradients"] = int((owned if stage >= 2 and not tied(plan, unit) else unit.size) * stored.gradient)
    parts["optimizer"] = int(owned * stored.optimizer)
    return parts


def _standing(program: Program, stored: Stored) -> _Walk:
    """What a rank holds before its first instruction."""
    plan, at = program.plan, program.at
    position = at.dp * plan.mesh.cp + at.cp
    walk = _Walk()
    for unit in program.units:
        for part, nbytes in state_parts(plan, unit, position, stored).items():
            walk.change(part, nbytes)
    if not plan.forward_only:
        walk.change("gradients", _placeholder_bytes(program, stored))
    return walk


def _placeholder_bytes(program: Program, stored: Stored) -> int:
    """Bytes that stand for the layers' weight gradients where a kernel has added them to the sums already.

    Autograd wants a gradient of every weight; Transformer Engine hands out one cached tensor per distinct shape.
    """
    slots = [slot for unit in program.units if unit.block.startswith("layers") for slot in unit.slots]
    shapes = {slot.shape for slot in slots if len(slot.shape) > 1}
    return int(sum(math.prod(shape) for shape in shapes) * stored.placeholder)


def peak_memory(program: Program, framework: Framework | None = None) -> Peak:
    """Walk a rank's program and return its peak; sends are taken to complete as soon as they are posted."""
    plan = program.plan
    stored = Stored.of(plan, framework)
    walk = _standing(program, stored)
    units = _by_name(program.units)
    known: dict[tuple[int, frozenset[str]], tuple[_Walk, frozenset[str]]] = {}  # equal micro-batches share their tasks
    gradients: frozenset[str] = frozenset()
    for step in program.steps:
        key = (id(step.tasks), gradients)
        if key not in known:
            known[key] = _step(program, step, units, stored, gradients)
        inside, gradients = known[key]
        total = sum(walk.live.values()) + inside.highest
        if total > walk.highest:
            walk.highest, walk.peak = total, walk.live + inside.peak
        walk.live.update(inside.live)
    return Peak(walk.highest, {part: max(0, walk.peak[part]) for part in PARTS})


def pipeline_peaks(skeleton: Skeleton, framework: Framework | None = None) -> list[Peak]:
    """Peaks of the first coordinate of every pipeline rank, from the skeleton's short programs.

    What each distinct instruction adds, frees and needs in between is walked once; the schedule's order then gives the
    peak by cumulative sums. Equal to `peak_memory` of the whole program.
    """
    stored = Stored.of(skeleton.plan, framework)
    ledgers = {rank: _Ledger.of(skeleton, rank, stored) for rank in set(skeleton.representative.values())}
    found: dict[tuple[int, tuple[tuple[int, str, int], ...]], Peak] = {}
    peaks = []
    sizes = skeleton.plan.micro_batches(0)
    chunk = {s: i for r in range(skeleton.plan.mesh.pp) for i, s in enumerate(skeleton.schedule.stages_of(r))}
    for rank in range(skeleton.plan.mesh.pp):
        same = skeleton.representative[rank]
        order = tuple((chunk[part.stage], part.op, sizes[part.micro_batch]) for part in skeleton.instructions(rank))
        if (same, order) not in found:
            found[same, order] = ledgers[same].peak(order)
        peaks.append(found[same, order])
    return peaks


@dataclass
class _Ledger:
    """Per distinct instruction (chunk, op, size): bytes by part that its receive, its tasks and its send leave behind.

    Columns are PARTS; `peaks` has the peak inside the tasks, relative to their beginning. `I*` and `W*` find gradients
    that an earlier I has left for a W to reduce.
    """

    standing: NDArray[np.int64]
    update: _Walk
    received: dict[tuple[int, str, int], NDArray[np.int64]]
    computed: dict[tuple[int, str, int], NDArray[np.int64]]
    sent: dict[tuple[int, str, int], NDArray[np.int64]]
    peaks: dict[tuple[int, str, int], tuple[int, NDArray[np.int64]]]

    @classmethod
    def of(cls, skeleton: Skeleton, rank: int, stored: Stored) -> _Ledger:
        """The ledger of a representative's short program."""
        program = skeleton.programs[rank]
        units = _by_name(program.units)
        ledger = cls(_row(_standing(program, stored).live), _Walk(), {}, {}, {}, {})
        stages = skeleton.schedule.stages_of(rank)
        left: dict[int, frozenset[str]] = {}
        for step in program.steps:
            walk, gradients = _step(program, step, units, stored)
            if step.op == "U":
                ledger.update = walk
                continue
            key = (stages.index(step.stage), step.op.rpartition("_")[2], program.micro_batches[step.micro_batch])
            if step.op == "I" and gradients:
                left[step.stage] = gradients
            if step.op in ("I", "W") and step.stage in left:
                after, _ = _step(program, step, units, stored, left[step.stage])
                again = (key[0], f"{step.op}*", key[2])
                ledger.computed[again], ledger.peaks[again] = _row(after.live), (after.highest, _row(after.peak))
            if step.op.startswith("RECV_"):
                before = ledger.received.get(key, np.zeros(len(PARTS), np.int64))
                ledger.received[key] = np.maximum(before, _row(walk.live))
            elif step.op.startswith("SEND_"):
                ledger.sent[key] = _row(walk.live)
            else:
                ledger.computed[key], ledger.peaks[key] = _row(walk.live), (walk.highest, _row(walk.peak))
        return ledger

    def peak(self, order: Sequence[tuple[int, str, int]]) -> Peak:
        """The largest sum while the instructions run in an order; each receive is posted one instruction ahead."""
        none = np.zeros(len(PARTS), np.int64)
        order = self._marked(order)
        keys = list(dict.fromkeys(order))
        index = np.array([keys.index(key) for key in order])
        plain = [(chunk, op.rstrip("*"), size) for chunk, op, size in keys]
        received = np.array([self.received.get(key, none) for key in plain])[index]
        sent = [self.sent.get(key, none) for key in plain]
        kept = np.array([self.computed[key] + away for key, away in zip(keys, sent, strict=True)])[index]
        inside = np.array([self.peaks[key][1] for key in keys])[index]
        highest = np.array([self.peaks[key][0] for key in keys])[index]
        posted = np.cumsum(received, axis=0)
        before = self.standing + np.cumsum(kept, axis=0) - kept + np.concatenate([posted[1:], posted[-1:]])
        total = before.sum(axis=1) + highest
        at = int(total.argmax())
        end = self.standing + kept.sum(axis=0) + posted[-1]
        best = before[at] + inside[at]
        if int(end.sum()) + self.update.highest > total[at]:
            best = end + _row(self.update.peak)
        return Peak(int(best.sum()), {part: max(0, int(n)) for part, n in zip(PARTS, best, strict=True)})

    def _marked(self, order: Sequence[tuple[int, str, int]]) -> Sequence[tuple[int, str, int]]:
        """The order with I* and W* where gradients have been left."""
        if not any(op.endswith("*") for _, op, _ in self.computed):
            return order
        marked, left = [], set()
        for chunk, op, size in order:
            again = (chunk, f"{op}*", size)
            marked.append(again if chunk in left and again in self.computed else (chunk, op, size))
            if op == "I":
                left.add(chunk)
            elif op == "W":
                left.discard(chunk)
        return marked


def _row(parts: Counter[str]) -> NDArray[np.int64]:
    return np.array([parts[part] for part in PARTS], np.int64)


def _step(
    program: Program, step: Step, units: dict[str, Unit], stored: Stored, gradients: frozenset[str] = frozenset()
) -> tuple[_Walk, frozenset[str]]:
    """What one instruction's tasks add and free, relative to what was live before it.

    `gradients` names the units whose whole gradient an I has left for a later W to reduce (ZeRO 2 and 3); the second
    result those that are left after this instruction.
    """
    walk = _Walk()
    buffers: dict[str, Buffer] = {}
    if step.op != "U":
        batch = program.micro_batches[step.micro_batch]
        buffers = program.segments[step.stage, batch].buffers
    held = needed(step.tasks, buffers) if buffers else set()
    gradient = set(gradients)
    for task in step.tasks:
        for root in {buffers[name].root for name in task.writes if name in buffers}:
            if root not in held:
                walk.change(buffers[root].category, _bytes(buffers[root], program.plan, stored))
            held.add(root)
        _unit_memory(program.plan, task, units, walk, gradient, stored)
        if stored.placeholder and task.kind == "linear.backward_weight" and ".head." in task.key:
            nbytes = int(task.work.m * task.work.n * stored.placeholder)  # made anew by the output layer each time
            walk.change("gradients", nbytes)
            walk.change("gradients", -nbytes)
        if stored.kept and program.plan.recompute == "full":
            _kept(program.plan, task, step.op, buffers, walk, stored)
        if task.kind == "handoff":
            _hand_over(program.plan, task, buffers, walk, stored)
            continue
        for root in task.frees:
            if root in buffers and buffers[root].dtype != "index":
                walk.change(buffers[root].category, -_bytes(buffers[root], program.plan, stored))
            held.discard(root)
    return walk, frozenset(gradient)


def _kept(plan: Plan, task: Task, op: str, buffers: dict[str, Buffer], walk: _Walk, stored: Stored) -> None:
    """Outputs that a framework's policy keeps although the plan computes them again: held from F until then."""
    layer, way = ".layer." in task.key, task.key.rpartition(".")[2]
    share = next((kept for kind, kept in stored.kept.items() if task.kind.startswith(kind)), 0.0)
    if share and layer and (op, way) in (("F", "forward"), ("B", "recompute"), ("I", "recompute")):
        roots = {buffers[name].root for name in task.writes if name in buffers}
        nbytes = sum(_bytes(buffers[root], plan, stored) for root in roots)
        walk.change("activations", int(share * nbytes) * (1 if op == "F" else -1))


def _hand_over(plan: Plan, task: Task, buffers: dict[str, Buffer], walk: _Walk, stored: Stored) -> None:
    """The next stage on this rank holds the buffer too; where the giver keeps it, both will count it freed."""
    buffer = buffers[buffers[task.name].root]
    if not task.frees:
        walk.change(buffer.category, _bytes(buffer, plan, stored))


def _by_name(units: Sequence[Unit]) -> dict[str, Unit]:
    """Units by the names of their blocks and of their parameters."""
    found = {unit.block: unit for unit in units}
    return found | {slot.parameter.name: unit for unit in units for slot in unit.slots}


def _unit_memory(
    plan: Plan, task: Task, units: dict[str, Unit], walk: _Walk, gradient: set[str], stored: Stored
) -> None:
    """Units gathered for a while (ZeRO 3) and gradients that live only until they are scattered (ZeRO 2 and 3)."""
    if plan.zero_stage < 2:
        return
    if task.kind in ("parameter_gather", "parameter_drop") and plan.zero_stage == 3:
        sign = 1 if task.kind == "parameter_gather" else -1
        walk.change("buffers", sign * int(units[task.name].size * stored.parameter))
    for name in task.gradients:
        unit = units.get(name)
        if unit and task.kind != "optimizer" and unit.block not in gradient and not tied(plan, unit):
            gradient.add(unit.block)
            walk.change("gradients", int(unit.size * stored.gradient))
    if task.kind == "gradient_reduce_scatter" and task.name in gradient:
        gradient.discard(task.name)
        walk.change("gradients", -int(units[task.name].size * stored.gradient))


def _bytes(buffer: Buffer, plan: Plan, stored: Stored) -> int:
    """Bytes of a buffer; statistics are kept in float32 at least.

    Where a framework keeps 5 bytes per attention probability and float32 logits, as Megatron-LM does (Korthikanti et
    al. 2022, eq. 1 and section 4.3), these count.
    """
    item: float = ITEM_BYTES[plan.training.precision]
    if buffer.dtype == "statistics":
        item = max(4, item)
    elif buffer.root.endswith(".probabilities"):
        item = stored.probability
    elif buffer.root == "head.logits":
        item = stored.logit
    return int(math.prod(int(extent) for extent in buffer.shape) * item)
