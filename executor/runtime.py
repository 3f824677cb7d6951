"""One rank: interpret its Program, task by task, and record when each began and ended.

The runtime decides nothing. It makes room for what a task writes, calls the binding of its kind, gives back what dies
with it, and notes the time; which task, in which order, on which buffers, is the program's.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np

from executor.comm import Communicator
from executor.data import Batches
from executor.device import HOST, Device, Flight
from executor.emulated import kernel_table
from executor.memory import Arena
from executor.ops import BINDINGS, Context, MicroBatch, view_of
from executor.optim import squared_norm, unscale, update
from executor.precision import Precision
from executor.scaling import LossScaler
from executor.state import UnitState
from executor.transfers import Transfers
from planner.placement import Placement
from planner.plan import Plan
from planner.program import Program, Step, Task, lower
from planner.shard import offsets


class Span(NamedTuple):
    """When a task ran on this rank, in seconds of its own clock; `wait` is the leading part spent waiting.

    While a step runs on a device, start and end are marks on the device's time line.
    """

    key: str
    stream: str
    start: float
    end: float
    wait: float


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one training step gave on this rank; the loss and gradient norm are the global ones.

    `started` is the reading of this rank's clock (perf_counter) at the step's beginning. `loss_scale` is what float16
    multiplied the loss gradient by; `skipped` that it overflowed, so that nothing was updated and the norm means
    nothing.
    """

    loss: float
    gradient_norm: float
    started: float
    seconds: float
    spans: list[Span]
    loss_scale: float = 1.0
    skipped: bool = False


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
        measure_wait: record waiting for the latest rank apart from moving bytes (one barrier per collective); on a
            device only where MPI moves them, since NCCL's kernels wait on the device.
        device: where this rank computes; `comm` reaches it (`Communicator.use_device`).

    Raises:
        DeviceMemoryError: the device has no room, here or in a step.
    """

    def __init__(
        self, plan: Plan, comm: Communicator, batches: Batches, *, measure_wait: bool = True, device: Device = HOST
    ) -> None:
        self.plan, self.comm, self.batches, self.device = plan, comm, batches, device
        self.precision = Precision.of(plan, on_host=device.is_host)
        device.use_precision(self.precision.name)
        self.scaler = LossScaler() if self.precision.scales_loss and not plan.forward_only else None
        self.at = plan.mesh.coordinate(comm.rank)
        self.program: Program = lower(plan, comm.rank)
        self.arena = Arena(device)
        placement = Placement(plan, self.at)
        position = self.at.dp * plan.mesh.cp + self.at.cp
        self.units = {u.block: UnitState(plan, u, self.arena, self.precision, position) for u in self.program.units}
        for unit in self.units.values():
            self._initialise(unit, placement)
        by_parameter = {name: unit for unit in self.units.values() for name in unit.slots}
        ranks = self.program.schedule.stage_to_rank
        table = kernel_table(self.precision) if device.is_host else device.kernels
        ends = (ranks[0], ranks[-1])
        self.context = Context(plan, placement, by_parameter, self.precision, table, ends, device)
        self.transfers = Transfers(comm, self.context, self.arena, self.units, measure_wait)
        self.micro_batches: dict[tuple[int, int], MicroBatch] = {}
        self.spans: list[Span] = []
        self.record = True
        self.skipped: list[int] = []  # steps that changed nothing because float16 overflowed
        self._finite = True  # this rank's gradients of the step are all numbers
        self._positions = placement.index("seq", ("cp",) if plan.mesh.cp > 1 else ())
        starts = offsets(plan.parts.batch)
        self._first_sample = starts[self.at.dp]
        self._samples = device.upload(np.arange(self._first_sample, starts[self.at.dp + 1]))
        self._first = offsets(self.program.micro_batches)

    def _initialise(self, unit: UnitState, placement: Placement) -> None:
        """Give a unit its first parameters; probes, which time and do not train, take quicker ones."""
        unit.initialise(placement, self.plan.training.seed)

    def run_step(self, step: int) -> StepResult:
        """Run one step of training (or evaluation) and return its global loss and gradient norm."""
        context, transfers = self.context, self.transfers
        context.step, context.loss = step, 0.0
        context.loss_scale = self.batches.loss_scale(step)
        context.gradient_scale = scale = self.scaler.scale if self.scaler else 1.0
        transfers.overflow, transfers.flights = False, []
        self.spans = []
        for unit in self.units.values():
            unit.begin_step()
        device = self.device
        now, started = device.now, device.begin_step()
        with self._overflows_expected():
            for part in self.program.steps:
                if part.op == "F" and part.stage in (0, self.plan.num_stages - 1):
                    self._load(part, self._micro_batch(part))
                for task in part.tasks:
                    begun = now()
                    transfers.wait_seconds = 0.0
                    self._run(part, task)
                    if self.record:
                        self.spans.append(Span(task.key, task.stream, begun, now(), transfers.wait_seconds))
                if transfers.pending:
                    device.end_instruction()
                if transfers.pending or transfers.reductions:
                    transfers.progress()
        transfers.finish()
        device.synchronise()
        seconds = perf_counter() - started
        if self.scaler is not None:
            self.scaler.update(step, overflow=transfers.overflow)
            if transfers.overflow:
                self.skipped.append(step)
        if not device.is_host:
            self._resolve_spans()
        skipped = transfers.overflow
        return StepResult(transfers.loss, transfers.gradient_norm, started, seconds, self.spans, scale, skipped)

    def _overflows_expected(self) -> AbstractContextManager[object]:
        """The loss scaler answers overflows; where there is none, NumPy's warnings are worth seeing."""
        return nullcontext() if self.scaler is None else np.errstate(over="ignore", invalid="ignore")

    def _resolve_spans(self) -> None:
        """Read the step's events: spans in this process's seconds, those of other streams by their own events."""
        flights = iter(self.transfers.flights)
        ends = [(one.start, one.end) if one.stream == "compute" else _moments(next(flights), one) for one in self.spans]
        seconds = self.device.seconds([mark for pair in ends for mark in pair])
        pairs = zip(seconds[::2], seconds[1::2], strict=True)
        self.spans = [
            one._replace(start=start, end=end, wait=min(one.wait, end - start))
            for one, (start, end) in zip(self.spans, pairs, strict=True)
        ]

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
        first = self._first_sample + self._first[part.micro_batch]
        found = self.batches.batch(self.context.step, range(first, first + m.batch), self._positions)
        if part.stage == 0:
            m.arrays["ids"] = self.device.upload(found.ids.astype(np.int64))
        if part.stage == self.plan.num_stages - 1:
            m.arrays["targets"] = self.device.upload(found.targets.astype(np.int64))
            m.arrays["weights"] = self.device.upload(found.weights.astype(self.precision.master))

    def _make(self, part: Step, m: MicroBatch, name: str) -> None:
        """Give a name its array: a fresh block for a root, a view for anything else."""
        buffers = self.program.segments[part.stage, m.batch].buffers
        buffer = buffers[name]
        if buffer.root not in m.blocks:
            root = buffers[buffer.root]
            dtype = self.precision.of_buffer(root.dtype)
            block, array = self.arena.array(_ints(root.shape), dtype, root.category, buffer.root)
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
        elif task.kind == "gradient_unscale":
            self._finite = unscale(self.units.values(), self.context.gradient_scale)
        elif task.kind == "overflow_max":
            transfers.overflow_max(task, self._finite)
        elif transfers.overflow:
            assert task.kind in ("gradient_clip", "optimizer"), task.kind  # the step is skipped
        elif task.kind == "gradient_clip":
            self._clip()
        elif task.kind == "optimizer":
            done = self.context.step - sum(step < self.context.step for step in self.skipped)
            update(self.units[task.name], self.plan.training, done)
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


def _moments(flight: Flight | None, span: Span) -> tuple[Any, Any]:
    """When an operation on another stream began and ended; the span's own marks where nothing was in flight."""
    return (span.start, span.end) if flight is None else (flight.began, flight.ended)


def _ints(shape: tuple[Any, ...]) -> tuple[int, ...]:
    return tuple(int(extent) for extent in shape)
