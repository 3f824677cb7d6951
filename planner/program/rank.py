"""One rank's program: the schedule's instructions expanded into tasks, with transfers, reductions and the update."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Literal

from planner.graph import Operator, build_graph
from planner.mesh import Coordinate
from planner.model import ModelSpec
from planner.placement import Placement
from planner.plan import Plan
from planner.program.backward import StageBackward
from planner.program.liveness import needed, with_frees
from planner.program.stage import Layouts, StageForward, generic
from planner.program.tasks import Buffer, Task, Work
from planner.program.units import Unit, make_unit
from planner.program.update import MASTER_BYTES, sum_over_tp, tied, unit_task, update_tasks
from planner.schedule import Instruction, Schedule, generate
from planner.schedule.grid import from_csv
from planner.shard import offsets
from planner.trace import axis_classes

ITEM_BYTES = {"float64": 8, "float32": 4, "tf32": 4, "float16": 2, "bfloat16": 2, "fp8": 2}
"""Bytes of an activation; fp8 products read converted copies, their results stay in 16 bits."""

BACKWARD_OPS = ("B", "I", "W")


def reduced_item_bytes(precision: str, transport: str) -> int:
    """Bytes of an element of a partial activation while it is summed over ranks: MPI sums no 16 bits, NCCL does."""
    item = ITEM_BYTES[precision]
    return item if transport == "nccl" else max(MASTER_BYTES, item)


@dataclass(frozen=True, slots=True)
class Step:
    """A run of tasks that belongs to one instruction: F, B, I, W, a transfer, or U (after the last backward)."""

    stage: int
    op: str
    micro_batch: int
    tasks: tuple[Task, ...]


@dataclass(slots=True)
class StageSegments:
    """The tasks of a stage for one micro-batch size, by op, and its buffers."""

    buffers: dict[str, Buffer]
    tasks: dict[str, dict[str, tuple[Task, ...]]]  # op -> block -> tasks
    input: str | None
    output: str | None
    input_gradient: str | None
    kept: set[str]  # roots that a later segment still needs after they were sent


@dataclass(slots=True)
class Program:
    """Everything one rank does in a step, in order."""

    plan: Plan
    at: Coordinate
    schedule: Schedule
    units: tuple[Unit, ...]  # in the order in which the backward pass finishes them
    steps: list[Step] = field(default_factory=list)
    segments: dict[tuple[int, int], StageSegments] = field(default_factory=dict)  # by stage, micro-batch size
    micro_batches: tuple[int, ...] = ()


@lru_cache(maxsize=8)
def blocks(model: ModelSpec) -> dict[str, list[Operator]]:
    """The operators of every block, in model order."""
    found: dict[str, list[Operator]] = {}
    for _, node in build_graph(model).nodes(data=True):
        found.setdefault(node["block"], []).append(node["operator"])
    return found


def stage_blocks(plan: Plan, stage: int) -> list[str]:
    """Names of the blocks of a stage: the embedding is on the first, the head on the last."""
    starts = offsets(plan.stage_layers)
    names = [f"layers.{i}" for i in range(starts[stage], starts[stage + 1])]
    first = ["embedding"] if stage == 0 else []
    return first + names + (["head"] if stage == plan.num_stages - 1 else [])


def make_schedule(plan: Plan, replica: int) -> Schedule:
    """The pipeline schedule of one replica: generated from the recipe, or read from its explicit instructions."""
    recipe, micro_batches = plan.schedule, len(plan.micro_batches(replica))
    if recipe.programs is not None:
        return from_csv("\n".join(recipe.programs), name=recipe.name, num_micro_batches=micro_batches)
    return generate(
        recipe.name,
        num_ranks=plan.mesh.pp,
        num_micro_batches=micro_batches,
        num_model_chunks=recipe.num_model_chunks,
        forward_only=plan.forward_only,
    )


def boundary(plan: Plan, stage: int) -> str:
    """The tensor that leaves a stage: the output of its last layer."""
    return blocks(plan.model)[stage_blocks(plan, stage)[-1]][-1].outputs[-1].name


def stage_input_layouts(plan: Plan, stage: int, forward: StageForward) -> Layouts:
    """The layout in which the stage before leaves its output, the signature of its last operator."""
    producer = blocks(plan.model)[stage_blocks(plan, stage - 1)[-1]][-1]
    return {axis: forward.signature(producer, axis).outputs[-1] for axis in forward.axes}


def lower_stage(plan: Plan, at: Coordinate, stage: int, batch: int, *, split: bool) -> StageSegments:
    """Lay out one stage's forward and backward passes for a micro-batch of `batch` sequences."""
    placement = Placement(plan, at, batch)
    axis_sizes = {axis: plan.mesh.size(axis) for axis in ("dp", "cp", "tp")}
    precision = plan.training.precision
    reduced = reduced_item_bytes(precision, plan.transport)
    forward = StageForward(plan, stage, placement, axis_sizes, ITEM_BYTES[precision], reduced)
    source = boundary(plan, stage - 1) if stage else None
    output = boundary(plan, stage) if stage < plan.num_stages - 1 else None
    if source:
        forward.enter(source, ("seq", "batch", "hidden"), stage_input_layouts(plan, stage, forward))
    names = stage_blocks(plan, stage)
    for name in names:
        forward.run(name, blocks(plan.model)[name])
    segments: dict[str, dict[str, list[Task]]] = {"F": forward.tasks}
    sent: str | None = None
    live: dict[str, set[str]] = {"F": {output} if output else set()}
    if not plan.forward_only:
        backward = StageBackward(forward, split=split)
        if output:
            backward.leave(output)
        for name in reversed(names):
            backward.run(name, blocks(plan.model)[name])
        sent = backward.gradient(source) if source else None
        if split:
            for op in ("I", "W"):
                segments[op] = {b: [t for t in tasks if t.phase == op] for b, tasks in backward.tasks.items()}
        else:
            segments["B"] = backward.tasks
        live |= {op: ({sent} if sent and op != "W" else set()) for op in BACKWARD_OPS}
    later = [task for op in BACKWARD_OPS for tasks in segments.get(op, {}).values() for task in tasks]
    weights = [task for tasks in segments.get("W", {}).values() for task in tasks]
    kept = {f"F:{root}" for root in needed(later, forward.buffers)} | {
        f"I:{root}" for root in needed(weights, forward.buffers)
    }
    return StageSegments(forward.buffers, _freed(segments, forward.buffers, live), source, output, sent, kept)


def _freed(
    segments: dict[str, dict[str, list[Task]]], buffers: dict[str, Buffer], live: dict[str, set[str]]
) -> dict[str, dict[str, tuple[Task, ...]]]:
    """Add what each task frees, keeping the division into blocks."""
    ops = [op for op in ("F", "B", "I", "W") if op in segments]
    flat = [[task for tasks in segments[op].values() for task in tasks] for op in ops]
    result: dict[str, dict[str, tuple[Task, ...]]] = {}
    for op, tasks in zip(ops, with_frees(flat, buffers, [live[op] for op in ops]), strict=True):
        result[op], position = {}, 0
        for block, members in segments[op].items():
            result[op][block] = tasks[position : position + len(members)]
            position += len(members)
    return result


Shared = dict[tuple[object, ...], StageSegments]
"""Segments laid out before, by what decides them: ranks that do equal work have equal ones."""


def lower(plan: Plan, rank: int, schedule: Schedule | None = None, shared: Shared | None = None) -> Program:
    """The program of one rank; `shared` lets several ranks of one plan share the segments that are equal.

    Raises:
        PlanError: the layouts need a redistribution that does not exist.
        ScheduleError: the schedule cannot be generated for these sizes.
    """
    at = plan.mesh.coordinate(rank)
    schedule = schedule or make_schedule(plan, at.dp)
    stages = schedule.stages_of(at.pp)
    taken: set[str] = set()
    units = [
        make_unit(plan, Placement(plan, at), name, blocks(plan.model)[name], taken)
        for stage in stages
        for name in stage_blocks(plan, stage)
    ]
    program = Program(plan, at, schedule, tuple(reversed(units)), micro_batches=plan.micro_batches(at.dp))
    _Lowering(program, {} if shared is None else shared).run()
    return program


class _Lowering:
    """Walks the schedule of one rank and appends its steps."""

    def __init__(self, program: Program, shared: Shared) -> None:
        self.program, self.plan, self.at, self.shared = program, program.plan, program.at, shared
        self.position = program.at.dp * program.plan.mesh.cp + program.at.cp
        self.instructions = [
            part for step in program.schedule.programs[program.at.pp] for part in step.flat() if part.op in "FBIW"
        ]
        self.split = {i.stage for i in self.instructions if i.op in ("I", "W")}
        # DualPipe writes some backward passes of a stage whole and splits others: a whole one is I, then W at once.
        self.instructions = [
            part
            for whole in self.instructions
            for part in (
                (whole._replace(op="I"), whole._replace(op="W"))
                if whole.op == "B" and whole.stage in self.split
                else (whole,)
            )
        ]
        self.last: dict[int, int] = {}
        for position, instruction in enumerate(self.instructions):
            if instruction.op in ("B", "W"):
                self.last[instruction.stage] = position
        self.unit_of = {unit.block: unit for unit in program.units}
        self.expanded: dict[tuple[int, str, int, bool], tuple[Task, ...]] = {}

    def segments(self, stage: int, micro_batch: int) -> StageSegments:
        """The stage's tasks for this micro-batch's size, laid out once per size."""
        key = (stage, self.program.micro_batches[micro_batch])
        if key not in self.program.segments:
            split = stage in self.split
            place = (*self._class, *key, split)
            if place not in self.shared:
                self.shared[place] = lower_stage(self.plan, self.at, *key, split=split)
            self.program.segments[key] = self.shared[place]
        return self.program.segments[key]

    @cached_property
    def _class(self) -> tuple[object, ...]:
        """What of the coordinate decides a segment; uneven ring blocks come in an order of the rank's own."""
        along, parts = axis_classes(self.plan), self.plan.parts
        context = along["cp"][self.at.cp] if len(set(parts.seq)) == 1 else self.at.cp
        return context, along["tp"][self.at.tp]

    def run(self) -> None:
        """Append all steps of the rank."""
        for position, instruction in enumerate(self.instructions):
            if position == 0:
                self._post(instruction)
            if position + 1 < len(self.instructions):
                self._post(self.instructions[position + 1])
            self._receive(instruction)
            self._compute(position, instruction)
            self._send(instruction)
        self._append(-1, "U", -1, tuple(update_tasks(self.program)))

    def _append(self, stage: int, op: str, micro_batch: int, tasks: tuple[Task, ...]) -> None:
        if tasks:
            self.program.steps.append(Step(stage, op, micro_batch, tasks))

    def _compute(self, position: int, instruction: Instruction) -> None:
        segments = self.segments(instruction.stage, instruction.micro_batch)
        is_last = self.last.get(instruction.stage) == position
        size = self.program.micro_batches[instruction.micro_batch]
        key = (instruction.stage, instruction.op, size, is_last)
        if key not in self.expanded:
            blocks_of_op = segments.tasks[instruction.op].items()
            self.expanded[key] = tuple(
                task
                for block, members in blocks_of_op
                for task in self._around(block, members, instruction.op, is_last)
            )
        self._append(instruction.stage, instruction.op, instruction.micro_batch, self.expanded[key])

    def _around(self, block: str, members: tuple[Task, ...], op: str, is_last: bool) -> list[Task]:
        """A block's tasks with what ZeRO gathers before, drops and reduces after, and overlapped reductions."""
        plan, unit = self.plan, self.unit_of[block]
        tasks = list(members)
        if plan.mesh.size("data") == 1:
            return tasks
        if plan.zero_stage == 3 and members:
            used = [u for u in (unit, self._owner_of_tied(block)) if u is not None and u.size]
            before = [unit_task(plan, u, self.position, "parameter_gather", op) for u in used]
            tasks = [*before, *tasks, *(unit_task(plan, u, self.position, "parameter_drop", op) for u in used)]
        if not unit.size:
            return tasks
        if op in ("B", "W"):
            if plan.zero_stage >= 2 and not tied(plan, unit):
                tasks += [*sum_over_tp(plan, unit), unit_task(plan, unit, self.position, "gradient_reduce_scatter", op)]
            elif is_last and plan.overlap_gradients and not tied(plan, unit):
                tasks += [*sum_over_tp(plan, unit), unit_task(plan, unit, self.position, "gradient_start", op)]
        return tasks

    def _owner_of_tied(self, block: str) -> Unit | None:
        """The embedding's unit, if the head of this rank reads its weight from there."""
        if block != "head" or not self.plan.model.tie_embeddings:
            return None
        return self.unit_of.get("embedding")

    # ---- transfers -------------------------------------------------------------------------------------------------

    def _edge(self, instruction: Instruction, way: Literal["in", "out"]) -> tuple[str, int] | None:
        """The tensor that an instruction takes from or gives to a neighbouring stage, and that stage."""
        segments = self.segments(instruction.stage, instruction.micro_batch)
        if instruction.op == "F":
            name, other = (segments.input, -1) if way == "in" else (segments.output, 1)
        elif instruction.op in ("B", "I"):
            received = segments.output and f"{segments.output}.grad"
            name, other = (received, 1) if way == "in" else (segments.input_gradient, -1)
        else:
            return None
        return (name, instruction.stage + other) if name else None

    def _transfer(self, kind: str, instruction: Instruction, tensor: str, other: int, way: str) -> Task:
        peer = self.plan.mesh.rank(self.at._replace(pp=self.program.schedule.stage_to_rank[other]))
        segments = self.segments(instruction.stage, instruction.micro_batch)
        buffer = segments.buffers[tensor]
        count = 1
        for extent in buffer.shape:
            count = count * int(extent)
        payload = count * ITEM_BYTES[self.plan.training.precision]
        leaves = kind in ("send", "handoff")
        origin, target = (instruction.stage, other) if leaves else (other, instruction.stage)
        return Task(
            f"pp.{kind}.{generic(tensor.partition('.grad')[0])}.{way}", kind, tensor,
            stream="pp" if kind == "send" else "compute",
            reads=(tensor,) if leaves else (), writes=(tensor,) if kind == "post_receive" else (),
            frees=(buffer.root,) if leaves and f"{instruction.op}:{buffer.root}" not in segments.kept else (),
            axis="pp", attributes={"peer": peer, "from": origin, "to": target, "micro_batch": instruction.micro_batch},
            work=Work(bytes=payload, full_bytes=payload),
        )  # fmt: skip

    def _post(self, instruction: Instruction) -> None:
        self._receive(instruction, "post_receive")

    def _receive(self, instruction: Instruction, kind: str = "receive") -> None:
        found = self._edge(instruction, "in")
        if found is None or self.program.schedule.stage_to_rank[found[1]] == self.at.pp:
            return
        way = "forward" if instruction.op == "F" else "backward"
        task = self._transfer(kind, instruction, *found, way)
        self._append(instruction.stage, f"RECV_{instruction.op}", instruction.micro_batch, (task,))

    def _send(self, instruction: Instruction) -> None:
        found = self._edge(instruction, "out")
        if found is None:
            return
        local = self.program.schedule.stage_to_rank[found[1]] == self.at.pp
        way = "forward" if instruction.op == "F" else "backward"
        task = self._transfer("handoff" if local else "send", instruction, *found, way)
        self._append(instruction.stage, f"SEND_{instruction.op}", instruction.micro_batch, (task,))
