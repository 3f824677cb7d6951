"""A plan as tables: mesh, stages, layouts with the collectives they cost; and the algebra's own tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any

import msgspec
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from planner.collectives import Movement, layer_costs, linear_costs, operator_layouts, step_collectives
from planner.model import parameters
from planner.plan import Plan
from planner.program.rank import make_schedule
from planner.report.suggestion import choices_text, mesh_text, num_micro_batches
from planner.report.tables import new_table
from planner.report.units import bytes_text, count_text

TRANSPORT_WORDS = {
    "host": "MPI between CPU ranks",
    "staged": "GPU to pinned host memory, MPI, and back",
    "cuda-aware": "MPI on device buffers",
    "nccl": "NCCL, one GPU a rank",
}


def plan_document(plan: Plan) -> dict[str, Any]:
    """Return a plan with what follows from it as JSON."""
    return {
        "plan_hash": plan.hash,
        "plan": msgspec.to_builtins(plan),
        "parameters": parameters(plan.model).total,
        "num_micro_batches": num_micro_batches(plan),
        "layouts": [each._asdict() for each in operator_layouts(plan)],
        "step_collectives": {
            str(rank): [each._asdict() for each in step_collectives(plan, rank)] for rank in range(plan.mesh.pp)
        },
    }


def plan_view(plan: Plan) -> RenderableType:
    """Return the tables of a plan."""
    return Group(_facts(plan), Text(), _stages(plan), Text(), _layouts(plan), Text(), _collectives(plan))


def _facts(plan: Plan) -> Table:
    model, training = plan.model, plan.training
    table = new_table(f"plan {plan.hash}", header=False)
    sizes = f"{model.layers} layers, hidden {model.hidden}, {model.heads} heads, ffn {model.ffn_hidden}"
    rows = (
        ("model", f"{model.name}: {count_text(parameters(model).total)} parameters"),
        ("", f"{sizes}, sequences of {model.seq_len}, vocabulary {model.vocab}"),
        ("mesh", f"{mesh_text(plan)} ({plan.mesh.world_size} ranks)"),
        ("batch", f"{plan.global_batch_size} sequences: {_runs(plan.parts.batch)} over dp, micro-batches of "
         f"{plan.micro_batch_size}, at most {num_micro_batches(plan)} a replica"),
        ("choices", choices_text(plan)),
        ("transport", f"{plan.transport}: {TRANSPORT_WORDS[plan.transport]}"),
        ("training", f"{training.optimizer}, lr {training.learning_rate:g}, dropout {training.dropout:g}, "
         f"{training.precision}, seed {training.seed}, {training.threads_per_rank} threads a rank"),
    )  # fmt: skip
    for row in rows:
        table.add_row(*row)
    return table


def _runs(sizes: Sequence[int]) -> str:
    """Part sizes with equal neighbours together, as `3×2 + 1`."""
    runs = ((size, len(list(members))) for size, members in groupby(sizes))
    return " + ".join(f"{count}×{size}" if count > 1 else str(size) for size, count in runs)


def _stages(plan: Plan) -> Table:
    table = new_table("stages")
    for name in ("stage", "pipeline rank", "ranks", "layers"):
        table.add_column(name)
    placement = make_schedule(plan, 0).stage_to_rank
    per_stage = plan.mesh.world_size // plan.mesh.pp
    first = 0
    for stage, layers in enumerate(plan.stage_layers):
        rank = placement[stage]
        held = f"{first} to {first + layers - 1}" if layers > 1 else str(first)
        ends = [name for name, here in (("embedding", stage == 0), ("head", stage == plan.num_stages - 1)) if here]
        ranks = f"{rank * per_stage} to {(rank + 1) * per_stage - 1}" if per_stage > 1 else str(rank)
        table.add_row(str(stage), str(rank), ranks, ", ".join([f"layers {held}", *ends]))
        first += layers
    return table


def _layouts(plan: Plan) -> Table:
    axes = [axis for axis in ("dp", "cp", "tp") if plan.mesh.size(axis) > 1]
    title = "layouts, and what moves for them per micro-batch (bytes of the whole tensor)"
    table = new_table(title)
    for name in ("operator", *axes, "forward", "backward"):
        table.add_column(name)
    for each in operator_layouts(plan):
        chosen = (each.signatures[axis] for axis in axes)
        table.add_row(each.role, *chosen, movements_text(each.forward), movements_text(each.backward))
    return table


def movements_text(movements: Iterable[Movement]) -> str:
    """Return collectives of one kind and size together, as `2× tp.all_reduce 1.50 MiB`."""
    found: dict[tuple[str, int], int] = {}
    for each in movements:
        found[each.collective, each.full_bytes] = found.get((each.collective, each.full_bytes), 0) + 1
    return "\n".join(
        f"{f'{times}× ' if times > 1 else ''}{name} {bytes_text(size)}" for (name, size), times in found.items()
    )


def _collectives(plan: Plan) -> Table:
    table = new_table("handed to NCCL per step" if plan.transport == "nccl" else "handed to MPI per step")
    table.add_column("rank")
    table.add_column("key")
    table.add_column("calls", justify="right")
    table.add_column("payload", justify="right")
    per_stage = plan.mesh.world_size // plan.mesh.pp
    for position in range(plan.mesh.pp):
        for each in step_collectives(plan, position):
            table.add_row(str(position * per_stage), each.key, count_text(each.calls), bytes_text(each.payload_bytes))
    return table


# ---- the algebra -----------------------------------------------------------------------------------------------------


def algebra_document() -> dict[str, Any]:
    """Return the costs of one linear layer and of one encoder layer as JSON."""
    return {
        "kind": "algebra",
        "linear": [each._asdict() for each in linear_costs()],
        "layer": [each._asdict() for each in layer_costs()],
    }


def algebra_view() -> RenderableType:
    """Return the tables of what each way to split one linear layer, and one encoder layer, sends."""
    heading = "y[B,Cout] = x[B,Cin]·W on p ranks: elements a rank sends in ring collectives, (p-1)/p dropped"
    linear = new_table(heading)
    for name in ("choice", "forward", "backward", "gradient sync"):
        linear.add_column(name)
    for row in linear_costs():
        linear.add_row(row.choice, *map(_volume, (row.forward, row.backward, row.gradient_sync)))
    heading = (
        "one encoder layer: A activation [sequence, micro-batch, hidden], P parameters, Pn those of norms and biases"
    )
    layer = new_table(heading)
    for name in ("choice", "forward", "backward", "update"):
        layer.add_column(name)
    for each in layer_costs():
        layer.add_row(each.choice, *map(_collective_volumes, (each.forward, each.backward, each.update)))
    return Group(linear, Text(), layer)


def _volume(volumes: Mapping[str, float]) -> str:
    terms = (symbol if times == 1 else f"{times:g}·{symbol}" for symbol, times in volumes.items())
    return " + ".join(terms) or "0"


def _collective_volumes(collectives: Mapping[str, Mapping[str, float]]) -> str:
    return "\n".join(f"{name} {_volume(volumes)}" for name, volumes in collectives.items()) or "0"
