"""What a choice of layouts costs in collectives: of one linear layer in symbols, of a plan's operators in bytes.

Both come out of the algebra: the signatures of an operator and the redistribution between the layout that arrives and
the one that it needs, forward and backward each from its own pair. Volumes are what a rank sends in ring collectives
with the factor (p-1)/p dropped: an all-reduce of n moves 2n, an all-gather or reduce-scatter n.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection
from typing import Any, NamedTuple

from planner.layout import Layout, Partial, Replicate, Shard, Signature, redistribution, signatures
from planner.mesh import Coordinate, Mesh
from planner.model import with_sizes
from planner.plan import Plan, make_plan
from planner.program import Task, lower
from planner.program.rank import lower_stage

RING_VOLUME = {None: 0, "slice": 0, "all_gather": 1, "reduce_scatter": 1, "all_reduce": 2, "all_to_all": 1}
"""Volumes sent per volume of the whole tensor, (p-1)/p dropped; an all-to-all sends 1/p of that."""

X, Y, W = "B·Cin", "B·Cout", "Cout·Cin"


class LinearCost(NamedTuple):
    """Volumes that a rank sends for y[B, Cout] = x[B, Cin]·W; each a count of elements by symbol."""

    choice: str
    forward: dict[str, int]
    backward: dict[str, int]
    gradient_sync: dict[str, int]


class _Linear(NamedTuple):
    """A signature among its neighbours: the layouts in which they leave x and take y, and those of dx and dy."""

    choice: str
    signature: str
    x: Layout
    y: Layout
    dx: Layout
    dy: Layout


_BATCH, _IN, _OUT, _WHOLE = Shard("batch"), Shard("cin"), Shard("cout"), Replicate()
# A row of column layers leaves x split as their own outputs are; a row layer hands y whole to what follows it.
_CHOICES = (
    _Linear("data parallel", "batch", _BATCH, _BATCH, _BATCH, _BATCH),
    _Linear("partition output", "column", _IN, _OUT, _IN, _OUT),
    _Linear("reduce output", "row", _IN, _WHOLE, _IN, _WHOLE),
)


def linear_costs() -> list[LinearCost]:
    """Return the costs of the ways to split one linear layer, and of not splitting it.

    In naive model parallelism layers lie on different ranks and one works at a time: a layer's rank sends y on, and dx
    back.
    """
    rows = [_linear_cost(each, signatures("linear", "cin", "cout")[each.signature]) for each in _CHOICES]
    return [*rows, LinearCost("naive model parallelism", {Y: 1}, {X: 1}, {})]


def _linear_cost(chosen: _Linear, signature: Signature) -> LinearCost:
    forward = _moved((chosen.x, signature.inputs[0], X), (signature.outputs[0], chosen.y, Y))
    backward = _moved((chosen.dy, signature.grad_outputs[0], Y), (signature.grad_inputs[0], chosen.dx, X))
    held, summed = signature.grad_parameters, signature.parameters
    sync = _moved((held, summed, W)) if isinstance(held, Partial) else {}
    return LinearCost(chosen.choice, forward, backward, sync)


def _moved(*edges: tuple[Layout, Layout, str]) -> dict[str, int]:
    """Add up the volumes of redistributions (source, target, symbol of the tensor)."""
    volumes: dict[str, int] = defaultdict(int)
    for source, target, symbol in edges:
        volumes[symbol] += RING_VOLUME[redistribution(source, target)]
    return {symbol: volume for symbol, volume in volumes.items() if volume}


class Movement(NamedTuple):
    """One collective that an operator needs, per micro-batch: bytes of the whole tensor over all ranks of the axis."""

    collective: str  # axis.kind
    tensor: str
    full_bytes: int
    payload_bytes: int  # what this rank hands to MPI


class OperatorLayout(NamedTuple):
    """How one operator is laid out, and what moves for it in each direction, on rank 0 of its stage."""

    role: str
    signatures: dict[str, str]  # by axis
    forward: tuple[Movement, ...]
    backward: tuple[Movement, ...]


class StepCollective(NamedTuple):
    """All collectives of one key in a step of the first rank of a stage."""

    key: str
    calls: int
    payload_bytes: int


def operator_layouts(plan: Plan) -> list[OperatorLayout]:
    """Return the operators of the embedding, of one layer and of the head, in order, with their collectives.

    A collective belongs to the operator that reads its result.
    """
    moved: dict[str, dict[str, list[Movement]]] = defaultdict(lambda: {"forward": [], "backward": []})
    for stage in sorted({0, min(1, plan.num_stages - 1), plan.num_stages - 1}):
        at = Coordinate(stage % plan.mesh.pp, 0, 0, 0)
        segments = lower_stage(plan, at, stage, plan.micro_batches(0)[0], split=False)
        for op, way in (("F", "forward"), ("B", "backward")):
            tasks = [task for tasks in segments.tasks.get(op, {}).values() for task in tasks]
            found: dict[str, list[Movement]] = defaultdict(list)  # by operator
            for at_task, task in enumerate(tasks):
                if task.axis and task.kind != "slice":
                    found[_consumer(at_task, tasks, plan.layouts).name].append(_movement(task))
            roles = {task.name: _role(task) for task in tasks if _role(task) in plan.layouts}
            for name, movements in found.items():
                # All layers move the same, save that the first and last of a stage may miss a neighbour.
                if len(movements) > len(moved[roles[name]][way]):
                    moved[roles[name]][way] = movements
    return [
        OperatorLayout(role, dict(chosen), *(tuple(moved[role][way]) for way in ("forward", "backward")))
        for role, chosen in plan.layouts.items()
    ]


def _movement(task: Task) -> Movement:
    axis, kind, tensor = task.key.split(".", 2)
    return Movement(
        f"{axis}.{kind}", tensor.rpartition(".")[0] or tensor, int(task.work.full_bytes), int(task.work.bytes)
    )


def _consumer(at: int, tasks: list[Task], roles: Collection[str]) -> Task:
    """The first operator after a collective that reads its result, else the last one before it.

    Sums of gradients on the way, and further collectives, pass the result on.
    """
    results = set(tasks[at].writes)
    for later in tasks[at + 1 :]:
        if results & set(later.reads):
            if _role(later) in roles:
                return later
            results |= set(later.writes)
    return next(each for each in reversed(tasks[:at]) if _role(each) in roles)


def _role(task: Task) -> str:
    return ".".join(task.key.split(".")[1:3])


def step_collectives(plan: Plan, stage: int = 0) -> list[StepCollective]:
    """Return what the first rank of a pipeline position hands to MPI in one step, by key, in order of first use."""
    program = lower(plan, plan.mesh.rank(Coordinate(stage, 0, 0, 0)))
    counts: dict[str, list[int]] = {}
    for step in program.steps:
        for task in step.tasks:
            if task.axis and int(task.work.bytes) and task.kind not in _NOT_SENT:
                entry = counts.setdefault(task.key, [0, 0])
                entry[0] += 1
                entry[1] += int(task.work.bytes)
    return [StepCollective(key, calls, payload) for key, (calls, payload) in counts.items()]


_NOT_SENT = ("slice", "parameter_drop", "gradient_wait", "receive", "post_receive", "handoff")


# ---- one encoder layer -----------------------------------------------------------------------------------------------

ACTIVATION, SHARE, PARAMETERS, NORMS = "A", "A/p", "P", "Pn"

_LAYER_CHOICES: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("data parallel", "dp", {}),
    ("data parallel, ZeRO 1", "dp", {"zero_stage": 1}),
    ("data parallel, ZeRO 2", "dp", {"zero_stage": 2}),
    ("data parallel, ZeRO 3", "dp", {"zero_stage": 3}),
    ("tensor parallel", "tp", {}),
    ("tensor and sequence parallel", "tp", {"sequence_parallel": True}),
    ("context parallel, all-gather", "cp", {"cp_kind": "allgather"}),
    ("context parallel, ring", "cp", {"cp_kind": "ring"}),
    ("context parallel, Ulysses", "cp", {"cp_kind": "ulysses"}),
)

_UNIT_VOLUME = {
    "gradient_all_reduce": 2,
    "gradient_reduce_scatter": 1,
    "parameter_gather": 1,
    "parameter_all_gather": 1,
    "gradient_sum": 2,
}


class LayerCost(NamedTuple):
    """What one layer sends per micro-batch (forward, backward) and per step (update), by collective and symbol.

    A is the activation [sequence, micro-batch, hidden], P the layer's parameters on the rank, Pn those of its norms
    and biases that the tensor axis does not shard; (p-1)/p is dropped.
    """

    choice: str
    forward: dict[str, dict[str, float]]
    backward: dict[str, dict[str, float]]
    update: dict[str, dict[str, float]]


def layer_costs() -> list[LayerCost]:
    """Return what each choice of layouts costs one encoder layer, read off the plans that it makes on two ranks."""
    return [_layer_cost(choice, axis, options, ranks=2) for choice, axis, options in _LAYER_CHOICES]


def _layer_cost(choice: str, axis: str, options: dict[str, Any], ranks: int) -> LayerCost:
    model = with_sizes(layers=2)
    micro = 1 if axis == "dp" else ranks
    plan = make_plan(model, Mesh(**{axis: ranks}), global_batch_size=ranks, micro_batch_size=micro, **options)
    activation_bytes = model.seq_len * plan.micro_batch_size * model.hidden * 4
    ways: dict[str, dict[str, dict[str, float]]] = {"forward": {}, "backward": {}, "update": {}}
    inside = [each for each in operator_layouts(plan) if each.role.startswith("layer.")]
    for way in ("forward", "backward"):
        moves: list[Movement] = [move for each in inside for move in getattr(each, way)]
        times = Counter(move.tensor for move in moves)
        for move in moves:
            volume = _layer_volume(move, activation_bytes, ranks, times[move.tensor])
            _add(ways[way], move.collective, *volume)
    for each in step_collectives(plan):
        unit_axis, kind, block, way = each.key.split(".")[:4] if each.key.count(".") == 3 else ("", "", "", "")
        if block == "layer" and kind in _UNIT_VOLUME:
            symbol = NORMS if kind == "gradient_sum" else PARAMETERS
            _add(ways[way], f"{unit_axis}.{kind}", symbol, _UNIT_VOLUME[kind] * each.calls / model.layers)
    return LayerCost(choice, ways["forward"], ways["backward"], ways["update"])


def _layer_volume(move: Movement, activation_bytes: int, ranks: int, times: int) -> tuple[str, float]:
    """The volume that a rank sends for one collective, in activations or in a rank's share of one."""
    kind = move.collective.partition(".")[2]
    if kind == "all_to_all":
        return SHARE, move.payload_bytes * ranks / activation_bytes
    if kind == "ring_shift":  # each moves a p-th; p of them go all the way round, p-1 leave out the rank's own
        return ACTIVATION, move.payload_bytes / activation_bytes * ranks / times
    return ACTIVATION, RING_VOLUME[kind] * move.full_bytes / activation_bytes


def _add(way: dict[str, dict[str, float]], collective: str, symbol: str, volume: float) -> None:
    volumes = way.setdefault(collective, {})
    volumes[symbol] = volumes.get(symbol, 0.0) + volume
