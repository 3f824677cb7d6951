"""predict(plan, machine): lower, price, replay; the prediction carries the same keys as a measurement of the plan."""

from __future__ import annotations

import math

from planner.cost.coarse import coarse_replay
from planner.cost.compute import slowest_host_factor
from planner.cost.fine import WHOLE_MESH_RANKS, FineReplay, representatives
from planner.machine import Machine
from planner.model import model_flops
from planner.plan import Plan
from planner.trace import PARTS, MachineNote, Prediction, rank_classes, version_note

TASKS_PER_LAYER = 40  # forward and backward, with its collectives

FINE_TASKS = 60_000
"""Above so many tasks an instruction is replayed as one task; equal to the fine replay where nothing overlaps."""

NORMAL_80 = 1.2815515655446004  # half-width of a normal distribution's central 80%, in standard deviations


def predict(plan: Plan, machine: Machine) -> Prediction:
    """Predict one training step of a plan on a machine.

    Raises:
        PlanError: the plan cannot be lowered.
        MachineError: the profile lacks a needed figure.
    """
    replica = coarse_replay(plan, machine) if is_coarse(plan) else FineReplay(plan, machine)
    spans = replica.spans()
    step_seconds = whole_step_seconds(plan, machine, replica.makespan_seconds)
    classes = rank_classes(plan)
    ranks = replica.ranks
    figure = replica.figures(spans, step_seconds)
    replayed = set(ranks)
    kept = [[rank for rank in members if rank in replayed] for members in classes]
    peaks = replica.peaks(classes)
    width = math.exp(NORMAL_80 * machine.residuals.step_log_sigma)
    tokens = plan.global_batch_size * plan.model.seq_len
    peak_flops = machine.peak_flops_per_second(plan.training.precision)
    busy = dict(zip(ranks, figure.rank_seconds, strict=True))
    by_class = [busy[members[0]] if members else 0.0 for members in kept]
    rank_seconds = _expand(by_class, classes, plan.mesh.world_size)
    if machine.relative_speeds:  # ranks of a class do equal work, and may still differ in speed
        rank_seconds = [busy.get(rank, seconds) for rank, seconds in enumerate(rank_seconds)]
    return Prediction(
        version=version_note(),
        plan_hash=plan.hash,
        plan=plan,
        machine=MachineNote(
            name=machine.name,
            precision=plan.training.precision,
            peak_flops_per_second=peak_flops,
            provenance=machine.device.provenance,
        ),
        step_seconds=step_seconds,
        tokens_per_second=tokens / step_seconds,
        mfu=step_flops(plan) / (step_seconds * plan.mesh.world_size * peak_flops),
        bubble_fraction=figure.bubble_fraction,
        exposed_communication_seconds=figure.exposed_mean_seconds,
        exposed_communication_seconds_max=figure.exposed_max_seconds,
        wait_seconds=figure.wait_seconds,
        rank_seconds=rank_seconds,
        peak_bytes=_expand([peak.total_bytes for peak in peaks], classes, plan.mesh.world_size),
        peak_parts={
            part: _expand([peak.parts[part] for peak in peaks], classes, plan.mesh.world_size) for part in PARTS
        },
        rank_classes=classes,
        operators=replica.operators(spans, kept),
        trace=[(s.rank, s.stream, s.key, s.start, s.end, s.kind) for s in spans],
        low_seconds=step_seconds / width,
        high_seconds=step_seconds * width,
        warnings=outside_ranges(plan, machine),
    )


def whole_step_seconds(plan: Plan, machine: Machine, makespan_seconds: float) -> float:
    """A step's seconds: the replay, what the framework adds to a step, all at the pace of the slowest host."""
    world = plan.mesh.world_size
    hosts = -(-world // machine.ranks_per_host(world))
    return float((makespan_seconds + machine.overheads.step_seconds) * slowest_host_factor(machine, hosts))


def outside_ranges(plan: Plan, machine: Machine) -> list[str]:
    """What of a plan lies outside the range of the rows that the machine's figures were fitted on."""
    values = {
        "world_size": plan.mesh.world_size,
        "micro_batch_size": plan.micro_batch_size,
        **{axis: getattr(plan.mesh, axis) for axis in ("pp", "dp", "cp", "tp")},
        **{name: getattr(plan.model, name) for name in ("layers", "hidden", "heads", "seq_len", "vocab")},
    }
    found = []
    for name, (low, high) in machine.residuals.ranges.items():
        value = values.get(name)
        if value is not None and not low <= value <= high:
            side, limit = ("<", low) if value < low else (">", high)
            found.append(f"no measurement with {name} {side} {limit:g} stands behind this ({name}={value})")
    return found


def is_coarse(plan: Plan) -> bool:
    """Whether a plan has so many tasks that it is replayed instruction by instruction."""
    micro_batches = max(plan.parts.batch) // plan.micro_batch_size
    tasks = micro_batches * plan.model.layers * TASKS_PER_LAYER
    world = plan.mesh.world_size
    ranks = world if world <= WHOLE_MESH_RANKS else len(representatives(plan))
    return tasks * (ranks // plan.mesh.pp) > FINE_TASKS


def step_flops(plan: Plan) -> float:
    """Model FLOPs of one step: forward and backward, or the forward third of an evaluation step."""
    flops = model_flops(plan.model) * plan.global_batch_size
    return flops / 3 if plan.forward_only else flops


def _expand(values: list, classes: list[list[int]], world_size: int) -> list:  # type: ignore[type-arg]
    """A value per class as a value per rank."""
    result = [values[0]] * world_size
    for value, members in zip(values, classes, strict=True):
        for rank in members:
            result[rank] = value
    return result
