"""What follows the last backward: gradients summed over ranks, clipped, applied; parameters gathered; the loss."""

from __future__ import annotations

from typing import TYPE_CHECKING

from planner.plan import Plan, Training
from planner.program.tasks import Task, Work
from planner.program.units import Unit
from planner.shard import offsets, shared_kv_heads

if TYPE_CHECKING:
    from planner.program.rank import Program

TIED = "embedding.tokens.weight"
MASTER_BYTES = 4  # parameters, gradients and optimizer state are kept in float32
WORKING_BYTES = 2  # under mixed precision kernels read a copy of the parameters in 16 bits
MIXED_PRECISIONS = ("float16", "bfloat16", "fp8")


def state_bytes(plan: Plan) -> int:
    """Bytes of one master parameter, gradient or moment."""
    return 8 if plan.training.precision == "float64" else MASTER_BYTES


def working_bytes(training: Training) -> int:
    """Bytes of one parameter as kernels read it and as ZeRO gathers it."""
    if training.precision in MIXED_PRECISIONS:
        return WORKING_BYTES
    return 8 if training.precision == "float64" else MASTER_BYTES


def tied(plan: Plan, unit: Unit) -> bool:
    """Whether the unit holds one of two copies of a weight shared by the first and the last stage."""
    return plan.model.tie_embeddings and plan.num_stages > 1 and any(s.parameter.name == TIED for s in unit.slots)


def kv_shared(plan: Plan) -> bool:
    """Whether some key-value head is held by several ranks of the tensor axis."""
    starts = offsets(plan.parts.heads)
    ranges = [
        shared_kv_heads(plan.model.heads, plan.model.kv_heads, starts[i], starts[i + 1]) for i in range(plan.mesh.tp)
    ]
    return any(ranges[i][1] > ranges[i + 1][0] for i in range(plan.mesh.tp - 1))


def unit_task(plan: Plan, unit: Unit, position: int, kind: str, phase: str) -> Task:
    """A task on a whole unit's flat buffer along the joint data axis, for the rank at `position` of it."""
    gathers = kind in ("parameter_gather", "parameter_all_gather")
    item = working_bytes(plan.training) if gathers else state_bytes(plan)
    total = unit.size * item
    payload = unit.shard_sizes[position] * item if gathers else total
    if kind in ("parameter_drop", "gradient_wait"):  # nothing is handed over that was not counted at the start
        payload = 0
    way = "forward" if phase == "F" else ("update" if phase == "U" else "backward")
    return Task(
        f"data.{kind}.{_generic(unit.block)}.{way}", kind, unit.block, phase, axis="data",
        stream="data" if kind == "gradient_start" else "compute",
        work=Work(bytes=payload, full_bytes=total, elements=unit.size),
    )  # fmt: skip


def _generic(block: str) -> str:
    return block.split(".", maxsplit=1)[0].replace("layers", "layer")


def sum_over_tp(plan: Plan, unit: Unit) -> list[Task]:
    """Gradients that the tensor axis still holds in parts: norms under sequence parallelism, shared K and V heads."""
    tasks, item = [], state_bytes(plan)
    count = unit.size - unit.partial_offset
    block = _generic(unit.block)
    if count:
        work = Work(bytes=count * item, full_bytes=count * item, elements=count)
        tasks.append(Task(f"tp.gradient_sum.{block}.update", "gradient_sum", unit.block, "U", axis="tp", work=work))
    by_heads = any("tp" in slot.axes for slot in unit.slots if slot.parameter.name.endswith(".qkv.weight"))
    if by_heads and kv_shared(plan):
        model = plan.model
        columns = 2 * model.kv_heads * model.head_dim
        rows = model.hidden + (1 if model.qkv_bias else 0)
        work = Work(bytes=columns * rows * item, full_bytes=columns * rows * item, elements=columns * rows)
        tasks.append(
            Task(f"tp.kv_gradient_sum.{block}.update", "kv_gradient_sum", unit.block, "U", axis="tp", work=work)
        )
    return tasks


def _tie(program: Program) -> list[Task]:
    """Sum the two copies' gradients of a tied embedding (Shoeybi et al. 2019, §3)."""
    plan, pp = program.plan, program.schedule.stage_to_rank
    if not plan.model.tie_embeddings or pp[0] == pp[-1] or program.at.pp not in (pp[0], pp[-1]):
        return []
    (slot,) = [slot for unit in program.units for slot in unit.slots if slot.parameter.name == TIED]
    total = slot.size * state_bytes(plan)
    work = Work(bytes=total, full_bytes=total, elements=slot.size)
    return [Task("pp.tied_gradient_sum.embedding.update", "tied_gradient_sum", TIED, "U", axis="tie", work=work)]


def update_tasks(program: Program) -> list[Task]:
    """The tasks after the last backward instruction, in order."""
    plan = program.plan
    position = program.at.dp * plan.mesh.cp + program.at.cp
    loss = Task("world.all_reduce.loss.update", "loss_sum", "loss", "U", axis="world", work=Work(bytes=8, full_bytes=8))
    if plan.forward_only:
        return [loss]
    tasks: list[Task] = []
    data = plan.mesh.size("data") > 1
    early = {u.block for u in program.units if data and not tied(plan, u)}
    scattered = early if plan.zero_stage >= 2 else set()  # reduced micro-batch by micro-batch already
    started = early if plan.zero_stage < 2 and plan.overlap_gradients else set()
    for unit in program.units:
        if unit.block not in started | scattered:
            tasks += sum_over_tp(plan, unit)
    tasks += _tie(program)
    for unit in program.units:
        if not data or not unit.size or unit.block in scattered:
            continue
        kind = "gradient_all_reduce" if plan.zero_stage == 0 else "gradient_reduce_scatter"
        tasks.append(unit_task(plan, unit, position, "gradient_wait" if unit.block in started else kind, "U"))
    if plan.training.precision == "float16":
        tasks += _unscale(program)
    if plan.training.clip_norm is not None:
        tasks += _clip(program)
    for unit in program.units:
        if not unit.size:
            continue
        tasks.append(_optimizer(program, unit))
        if data and plan.zero_stage in (1, 2):
            tasks.append(unit_task(plan, unit, position, "parameter_all_gather", "U"))
    return [*tasks, loss]


def _owned(program: Program, unit: Unit) -> int:
    """Elements of the unit that this rank updates."""
    plan, at = program.plan, program.at
    return unit.shard_sizes[at.dp * plan.mesh.cp + at.cp] if plan.zero_stage else unit.size


def _unscale(program: Program) -> list[Task]:
    """Gradients over the loss scale, and whether any rank's have overflowed, which skips the update on all.

    Micikevicius et al. 2018 (arXiv:1710.03740), section 3.2.
    """
    elements = sum(_owned(program, unit) for unit in program.units)
    streams = 3  # read and written to unscale, read to check
    return [
        Task("update.unscale.gradients.update", "gradient_unscale", "gradients", "U",
             work=Work(elements=elements, bytes=streams * elements * state_bytes(program.plan))),
        Task("world.all_reduce.overflow.update", "overflow_max", "gradients", "U", axis="world",
             work=Work(bytes=8, full_bytes=8)),
    ]  # fmt: skip


def _clip(program: Program) -> list[Task]:
    """Global gradient norm (Pascanu et al. 2013): one sum over all ranks, every parameter counted once."""
    elements = sum(_owned(program, unit) for unit in program.units)
    item = state_bytes(program.plan)
    return [
        Task("world.all_reduce.gradient_norm.update", "gradient_norm", "gradients", "U", axis="world",
             work=Work(bytes=8, full_bytes=8, elements=elements)),
        Task("update.clip.gradients.update", "gradient_clip", "gradients", "U",
             work=Work(elements=elements, bytes=2 * elements * item)),
    ]  # fmt: skip


def _optimizer(program: Program, unit: Unit) -> Task:
    elements, plan = _owned(program, unit), program.plan
    return Task(
        f"update.{_generic(unit.block)}.{plan.training.optimizer}.update", "optimizer", unit.block, "U",
        gradients=(unit.block,), work=Work(elements=elements, bytes=elements * update_bytes(plan.training)),
    )  # fmt: skip


def update_bytes(training: Training) -> int:
    """Bytes that the update of one parameter reads and writes: state, and the rounded copy under mixed precision."""
    streams = 7 if training.optimizer == "adamw" else 3
    state = 8 if training.precision == "float64" else MASTER_BYTES
    return streams * state + (WORKING_BYTES if training.precision in MIXED_PRECISIONS else 0)
