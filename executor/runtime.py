"""One rank: interpret its Program, task by task, and record when each began and ended.

The runtime decides nothing. It makes room for what a task writes, calls the binding of its kind, gives back what dies
with it, and notes the time; which task, in which order, on which buffers, is the program's.
"""

from __future__ import annotations

from dataclasses import dataclass
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np

from executor.comm import Communicator
from executor.data import Batches
from executor.memory import Arena
from executor.ops import BINDINGS, Context, MicroBatch, view_of
from executor.optim import squared_norm, update
from executor.state import UnitState
from executor.transfers import Transfers
from planner.placement import Placement
from planner.plan import Plan
from planner.program import Program, Step, Task, lower
from planner.shard import offsets


class Span(NamedTuple):
    """When a task ran on this rank, in seconds of its own clock; `wait` is the leading part spent waiting."""

    key: str
    stream: str
    start: float
    end: float
    wait: float


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one training step gave on this rank; the loss and gradient norm are the global ones.

    `started` is the reading of this rank's clock (perf_counter) at the step's beginning.
    """

    loss: float
    gradient_norm: float
    started: float
    seconds: float
    spans: list[Span]


REDISTRIBUTIONS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "slice", "ring_shift")
UNIT_TASKS = (
    "gradient_sum", "kv_gradient_sum", "tied_gradient_sum", "gradient_all_reduce", "gradient_start", "gradient_wait",
    "gradient_reduce_scatter", "parameter_gather", "parameter_all_gather", "loss_sum",
)  # fmt: skip


class Runtime:
    """The training state of one rank and the interpreter of its program.

    Args:
        plan: what to run.
        comm: this rank's communicator; its size must be the plan's.
        batches: the data.
        dtype: float32 or float64.
        measure_wait: record waiting for the latest rank apart from moving bytes (one barrier per collective).
    """

    def __init__(
        self, plan: Plan, comm: Communicator, batches: Batches, dtype: np.dtype[Any], *, measure_wait: bool = True
    ) -> None:
        self.plan, self.comm, self.batches, self.dtype = plan, comm, batches, dtype
        self.at = plan.mesh.coordinate(comm.rank)
        self.program: Program = lower(plan, comm.rank)
        self.arena = Arena()
        placement = Placement(plan, self.at)
        position = self.at.dp * plan.mesh.cp + self.at.cp
        self.units = {u.block: UnitState(plan, u, self.arena, dtype, position) for u in self.program.units}
        for unit in self.units.values():
            unit.initialise(placement, plan.training.seed)
        by_parameter = {name: unit for unit in self.units.values() for name in unit.slots}
        ranks = self.program.schedule.stage_to_rank
        self.context = Context(plan, placement, by_parameter, dtype, ends=(ranks[0], ranks[-1]))
        self.transfers = Transfers(comm, self.context, self.arena, self.units, measure_wait)
        self.micro_batches: dict[tuple[int, int], MicroBatch] = {}
        self.spans: list[Span] = []
        self.record = True
        self._positions = placement.index("seq", ("cp",) if plan.mesh.cp > 1 else ())
        starts = offsets(plan.parts.batch)
        self._samples = np.arange(starts[self.at.dp], starts[self.at.dp + 1])
        self._first = offsets(self.program.micro_batches)

    def run_step(self, step: int) -> StepResult:
        """Run one step of training (or evaluation) and return its global loss and gradient norm."""
        context, transfers = self.context, self.transfers
        context.step, context.loss = step, 0.0
        context.loss_scale = self.batches.loss_scale(step)
        self.spans = []
        for unit in self.units.values():
            unit.begin_step()
        started = perf_counter()
        for part in self.program.steps:
            if part.op == "F" and part.stage in (0, self.plan.num_stages - 1):
                self._load(part, self._micro_batch(part))
            for task in part.tasks:
                begun = perf_counter()
                transfers.wait_seconds = 0.0
                self._run(part, task)
                if self.record:
                    self.spans.append(Span(task.key, task.stream, begun, perf_counter(), transfers.wait_seconds))
            if transfers.pending or transfers.reductions:
                transfers.progress()
        transfers.finish()
        seconds = perf_counter() - started
        return StepResult(transfers.loss, transfers.gradient_norm, started, seconds, self.spans)

    def _run(self, part: Step, task: Task) -> None:
        kind = task.kind
        if part.op == "U" or kind in UNIT_TASKS or kind == "parameter_drop":
            self._run_on_unit(task)
            return
        m = self._micro_batch(part)
        for name in task.writes:
            if name not in m.arrays and kind != "slice":
                self._make(part, m, name)
        function = BINDINGS.get(kind)
        if function is not None:
            function(self.context, m, task)
        elif kind in REDISTRIBUTIONS:
            getattr(self.transfers, kind)(m, task)
        else:
            self._transfer(part, m, task)
        for root in task.frees:
            self._release(part, m, root)
        if self.transfers.reductions:
            self.transfers.progress()

    # ---- buffers of a micro-batch ------------------------------------------------------------------------------------

    def _micro_batch(self, part: Step) -> MicroBatch:
        key = (part.stage, part.micro_batch)
        if key not in self.micro_batches:
            start, stop = self._first[part.micro_batch], self._first[part.micro_batch + 1]
            self.micro_batches[key] = MicroBatch(self._samples[start:stop], stop - start)
        return self.micro_batches[key]

    def _load(self, part: Step, m: MicroBatch) -> None:
        """The data of the stages that read it: ids at the embedding, targets and weights at the loss."""
        found = self.batches.batch(self.context.step, m.samples, self._positions)
        if part.stage == 0:
            m.arrays["ids"] = found.ids.astype(np.int64)
        if part.stage == self.plan.num_stages - 1:
            m.arrays["targets"] = found.targets.astype(np.int64)
            m.arrays["weights"] = found.weights.astype(self.dtype)

    def _make(self, part: Step, m: MicroBatch, name: str) -> None:
        """Give a name its array: a fresh block for a root, a view for anything else."""
        buffers = self.program.segments[part.stage, m.batch].buffers
        buffer = buffers[name]
        if buffer.root not in m.blocks:
            root = buffers[buffer.root]
            block, array = self.arena.array(_ints(root.shape), self.dtype, root.category)
            m.blocks[buffer.root], m.arrays[buffer.root] = block, array
        whole = m.arrays[buffer.root]
        if name != buffer.root:
            shape = _ints(buffer.shape)
            m.arrays[name] = view_of(whole, buffer.selector, shape) if buffer.selector else whole.reshape(shape)

    def _release(self, part: Step, m: MicroBatch, root: str) -> None:
        """The micro-batch needs a root and all its views no longer."""
        buffers = self.program.segments[part.stage, m.batch].buffers
        for name in [name for name in m.arrays if buffers[name].root == root]:
            del m.arrays[name]
        block = m.blocks.pop(root, None)
        if block is not None:
            self.arena.release(block)
        if not m.arrays:
            del self.micro_batches[part.stage, part.micro_batch]

    def _transfer(self, part: Step, m: MicroBatch, task: Task) -> None:
        name = task.name
        slot = (part.stage, part.micro_batch, name)
        match task.kind:
            case "send":
                self.transfers.send(m, task, self._root(part, m, name))
            case "post_receive":
                self.transfers.post_receive(m, task, slot)
            case "receive":
                self.transfers.receive(slot)
            case "handoff":
                self._hand_over(part, m, task)
            case _:
                raise AssertionError(f"no binding for task kind {task.kind}")

    def _root(self, part: Step, m: MicroBatch, name: str) -> str:
        return self.program.segments[part.stage, m.batch].buffers[name].root

    def _hand_over(self, part: Step, m: MicroBatch, task: Task) -> None:
        """Both stages are on this rank: the next one holds the same block."""
        target = self._micro_batch(Step(task.attributes["to"], part.op, part.micro_batch, ()))
        block = m.blocks[self._root(part, m, task.name)]
        block.holders += 1
        target.arrays[task.name], target.blocks[task.name] = m.arrays[task.name], block

    # ---- parameters --------------------------------------------------------------------------------------------------

    def _run_on_unit(self, task: Task) -> None:
        transfers = self.transfers
        if task.kind in UNIT_TASKS:
            getattr(transfers, task.kind)(task)
        elif task.kind == "parameter_drop":
            self.units[task.name].drop()
        elif task.kind == "gradient_norm":
            second = self.at.pp == self.context.ends[1] != self.context.ends[0]
            transfers.squared_norm(task, squared_norm(list(self.units.values()), self.plan, self.at, second))
        elif task.kind == "gradient_clip":
            self._clip()
        elif task.kind == "optimizer":
            update(self.units[task.name], self.plan.training, self.context.step)
        else:
            raise AssertionError(f"no binding for task kind {task.kind}")

    def _clip(self) -> None:
        """Scale all gradients down to the clipping norm (Pascanu et al. 2013), in place."""
        limit = self.plan.training.clip_norm
        assert limit is not None
        norm = self.transfers.gradient_norm
        if norm > limit:
            for unit in self.units.values():
                unit.scale_gradient(limit / norm)


def _ints(shape: tuple[Any, ...]) -> tuple[int, ...]:
    return tuple(int(extent) for extent in shape)
