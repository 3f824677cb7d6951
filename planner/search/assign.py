"""The cheapest signature of every operator on the tensor axis, as an optimum rather than an assumption.

A mixed-integer programme over one repeated layer and the two ends of the model: a binary per operator and signature,
and per tensor one binary for each redistribution that some chosen pair of producer and consumers asks for, forward and
backward. Consumers that need the same layout share one redistribution. Costs are those of `planner.cost.price`, so what
is minimised is the seconds of a forward and backward pass (after Alpa's intra-operator pass: Zheng et al. 2022,
arXiv:2201.12023, §4.2). Solved by HiGHS through scipy.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field, replace

import msgspec
import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

from planner.admissible import admissible, transition, weight_layouts, written_in_place
from planner.cost.compute import oversubscription_factor
from planner.cost.price import COLLECTIVES, FREE, Place, compute_seconds, group_seconds
from planner.errors import PlanError
from planner.graph import Operator, split_unit
from planner.layout import Layout, Partial, Shard, Signature
from planner.machine import Machine
from planner.model import ModelSpec
from planner.plan import Plan
from planner.program.backward import StageBackward
from planner.program.rank import ITEM_BYTES, blocks, reduced_item_bytes
from planner.program.stage import EXTERNAL, StageForward
from planner.program.tasks import Task, Work
from planner.program.update import state_bytes, update_bytes
from planner.search.estimate import ArraySizes, Structure

Row = tuple[list[int], list[float], float, float]
"""A constraint: columns, their coefficients, lower and upper bound."""

LAYER = "layers.1"
"""The repeated layer: the second, because a model's first may lack a norm."""


@dataclass(frozen=True)
class Assignment:
    """The optimum: signature by operator role on the tensor axis, its seconds and those of the usual choice."""

    signatures: dict[str, str]
    seconds: float
    usual_seconds: float

    @property
    def is_usual(self) -> bool:
        """Whether the usual signatures are as cheap (to rounding)."""
        return self.usual_seconds <= self.seconds * (1 + 1e-9)


@dataclass
class _Node:
    """An operator, how often it runs, and the signatures that its dimensions admit."""

    operator: Operator
    weight: float
    choices: list[Signature]
    seconds: list[float] = field(default_factory=list)


@dataclass
class _Tensor:
    """A tensor's producer output and all its consumers, with how often each transition happens."""

    dims: tuple[str, ...]
    producer: int
    output: int
    consumers: list[tuple[int, int]]
    weight: float


def best_signatures(plan: Plan, machine: Machine) -> Assignment:
    """Find the cheapest signatures on the tensor axis for the sizes of a plan.

    Raises:
        PlanError: the plan has no tensor axis to assign, or no assignment is possible.
    """
    if plan.mesh.tp == 1:
        raise PlanError("tp=1 leaves nothing to assign; use a plan with tp>=2")
    return _Problem(plan, machine).solve()


class _Problem:
    """Costs of all choices, then the programme."""

    def __init__(self, plan: Plan, machine: Machine) -> None:
        self.plan, self.machine = plan, machine
        self.model = _short(plan.model)
        self.per_host = machine.ranks_per_host(plan.mesh.world_size)
        self.slowdown = oversubscription_factor(machine, self.per_host, plan.training.threads_per_rank)
        self.nodes = [self._node(o, name) for name, ops in self._blocks().items() for o in ops]
        self.tensors = self._tensors()
        for node in self.nodes:
            node.seconds = [self._operator_seconds(node.operator, s) for s in node.choices]

    def _blocks(self) -> dict[str, list[Operator]]:
        graph = blocks(self.model)
        return {name: graph[name] for name in ("embedding", LAYER, "head")}

    def _node(self, operator: Operator, block: str) -> _Node:
        weight = float(self.plan.model.layers) if block == LAYER else 1.0
        return _Node(operator, weight, list(admissible(operator.kind, operator.split, operator.outputs[0].dims)))

    def _tensors(self) -> list[_Tensor]:
        """Every tensor between the assigned operators; the layer's output feeds the layer again, and the head."""
        index = {node.operator.name: i for i, node in enumerate(self.nodes)}
        made: dict[str, tuple[int, int, tuple[str, ...]]] = {}
        for node in self.nodes:
            for k, tensor in enumerate(node.operator.outputs):
                made[tensor.name] = (index[node.operator.name], k, tensor.dims)
        layers = self.plan.model.layers
        last = f"layers.{self.model.layers - 1}.out"
        own_input, own_output = "layers.0.out", f"{LAYER}.out"
        readers: dict[str, list[tuple[int, int]]] = defaultdict(list)
        for node in self.nodes:
            for k, name in enumerate(node.operator.inputs):
                if name not in EXTERNAL:
                    readers[name].append((index[node.operator.name], k))
        first = next(name for name in ("embedding.normed", "embedding.sum") if name in made)
        result = [
            _Tensor(dims, producer, k, readers[name], self.nodes[producer].weight)
            for name, (producer, k, dims) in made.items()
            if readers[name] and name not in (own_output, first)
        ]
        producer, k, dims = made[own_output]
        result.append(_Tensor(dims, producer, k, readers[own_input], layers - 1))
        result.append(_Tensor(dims, producer, k, readers[last], 1))
        producer, k, dims = made[first]
        result.append(_Tensor(dims, producer, k, readers[own_input], 1))
        return result

    # ---- costs -------------------------------------------------------------------------------------------------------

    def _sizes(self) -> ArraySizes:
        mesh = self.plan.mesh
        return ArraySizes(self.model, np.array([mesh.tp]), mesh.cp, np.array([self.plan.micro_batch_size]))

    def _forward(self, operator: Operator | None = None, signature: Signature | None = None) -> StageForward:
        """A stage of nothing but the tensor axis, in which one operator has the signature in question."""
        plan = self.plan
        structure = Structure(
            self.model, plan.training, True, False, plan.sequence_parallel, "allgather", "none", plan.attention
        )
        if operator is not None and signature is not None:
            chosen = structure.layouts | {operator.role: structure.layouts[operator.role] | {"tp": signature.name}}
            object.__setattr__(structure, "layouts", chosen)
        axis_sizes = {"dp": 1, "cp": 1, "tp": plan.mesh.tp}
        precision = plan.training.precision
        reduced = reduced_item_bytes(precision, self.machine.transport_in_use)
        return StageForward(structure, 0, self._sizes(), axis_sizes, ITEM_BYTES[precision], reduced)

    def _seconds(self, tasks: list[Task]) -> float:
        training, total = self.plan.training, 0.0
        place = Place(self.plan.mesh.tp, min(self.plan.mesh.tp, self.per_host), 1)
        for task in tasks:
            if task.kind in FREE:
                continue
            if task.kind in COLLECTIVES:
                total += float(np.asarray(group_seconds(self.machine, task, place)).reshape(-1)[0])
            else:
                one = compute_seconds(self.machine, task, training.precision, training.threads_per_rank, self.per_host)
                total += float(np.asarray(one * self.slowdown).reshape(-1)[0])
        return total

    def _operator_seconds(self, operator: Operator, signature: Signature) -> float:
        """Compute of one operator, forward and backward, and the gradient sum that its parameters would need."""
        forward = self._forward(operator, signature)
        dims = {t.name: t.dims for node in self.nodes for t in node.operator.outputs}
        dims |= {
            "layers.0.out": ("seq", "batch", "hidden"),
            f"layers.{self.model.layers - 1}.out": ("seq", "batch", "hidden"),
        }
        inputs: dict[str, Layout] = {}
        for name, layout in zip(operator.inputs, signature.inputs, strict=True):
            inputs.setdefault(name, layout)
        for name, layout in inputs.items():
            if name not in EXTERNAL:
                forward.enter(name, dims[name], {"tp": layout})
        isolated = replace(operator, outputs=tuple(replace(t, alias_of=None) for t in operator.outputs))
        forward.run("layers.0", [isolated])
        backward = StageBackward(forward, split=False)
        for tensor in isolated.outputs:
            if tensor.dims and tensor.dims != ("seq", "batch") and not tensor.name.endswith("stats"):
                name = backward.leave(tensor.name)
                forward.layouts[name] = dict(forward.grad_layouts[tensor.name])
                backward.contributions[tensor.name][-1].layouts = dict(forward.grad_layouts[tensor.name])
        backward.run("layers.0", [isolated])
        tasks = [*forward.tasks["layers.0"], *backward.tasks["layers.0"]]
        return self._seconds(tasks) + self._parameter_seconds(operator, signature, forward)

    def _parameter_seconds(self, operator: Operator, signature: Signature, forward: StageForward) -> float:
        """What happens once a step: gradients that the axis holds in parts are summed, and the optimizer runs.

        Returns:
            Seconds per micro-batch, as everything else is counted.
        """
        total, item = 0.0, state_bytes(self.plan)
        each = update_bytes(self.plan.training)
        for parameter in operator.parameters:
            units = {split_unit(dim) for dim in parameter.dims}
            layout, grads = signature.parameters, signature.grad_parameters
            whole = not (isinstance(layout, Shard) and layout.dim in units)
            held = 1.0
            for dim in parameter.dims:
                axes = forward.sharding(split_unit(dim), {"tp": layout})
                held *= float(np.max(forward.sizes.size(dim, axes)))
            update = Work(elements=int(held), bytes=int(held * each))
            tasks = [Task("", "optimizer", "", work=update)]
            if whole and (isinstance(grads, Partial) or (isinstance(grads, Shard) and grads.dim not in units)):
                size = int(held * item)
                tasks.append(Task("", "gradient_sum", "", axis="tp", work=Work(bytes=size, full_bytes=size)))
            total += self._seconds(tasks)
        return total / max(1, len(self.plan.micro_batches(0)))

    def transition(
        self, dims: tuple[str, ...], source: Layout, target: Layout, *, in_place: bool = False
    ) -> float | None:
        """Seconds of a redistribution of a tensor; None where the executor has none."""
        try:
            collective = transition(self.model, dims, source, target, in_place=in_place)
        except PlanError:
            return None
        if collective is None:
            return 0.0
        forward = self._forward()
        forward.declare("t", dims, {"tp": source})
        tasks: list[Task] = []
        forward.redistribute("t", "t", "tp", target, tasks, "forward")
        return self._seconds(tasks)

    def pairs(
        self, tensor: _Tensor, consumer: int, k: int, source: Signature, sink: Signature
    ) -> tuple[tuple[Layout, Layout, bool, bool], ...]:
        """What a tensor has and needs, whether that is of its gradient, and whether the result is written in place."""
        written = written_in_place(self.nodes[tensor.producer].operator, self.nodes[consumer].operator, k)
        return (
            (source.outputs[tensor.output], sink.inputs[k], False, written[0]),
            (sink.grad_inputs[k], source.grad_outputs[tensor.output], True, written[1]),
        )

    # ---- the programme -----------------------------------------------------------------------------------------------

    def solve(self) -> Assignment:
        """Minimise and read the choice off; the usual choice is priced by the same costs."""
        first = np.cumsum([0, *(len(node.choices) for node in self.nodes)])
        cost = [node.weight * seconds for node in self.nodes for seconds in node.seconds]
        rows: list[Row] = []
        for i, node in enumerate(self.nodes):
            members = list(range(first[i], first[i + 1]))
            rows.append((members, [1.0] * len(node.choices), 1.0, 1.0))
        self._tie(first, rows)
        for tensor in self.tensors:
            self._transitions(tensor, first, cost, rows)
        binary = int(first[-1])
        matrix = _matrix(rows, len(cost))
        limits = LinearConstraint(matrix, [row[2] for row in rows], [row[3] for row in rows])
        scale = max(cost) or 1.0
        integrality = np.zeros(len(cost), dtype=np.int64)
        integrality[:binary] = 1
        found = milp(np.array(cost) / scale, constraints=limits, bounds=Bounds(0, 1), integrality=integrality)
        if found.x is None:
            raise PlanError(f"no assignment of signatures is possible on tp={self.plan.mesh.tp}: {found.message}")
        chosen = {
            node.operator.role: node.choices[int(np.argmax(found.x[first[i] : first[i + 1]]))].name
            for i, node in enumerate(self.nodes)
        }
        usual = self.evaluate({role: names["tp"] for role, names in self.plan.layouts.items()})
        return Assignment(chosen, float(found.fun) * scale, usual)

    def _tie(self, first: NDArray[np.int64], rows: list[Row]) -> None:
        """Operators that share a weight must leave it, and its gradient, in one layout."""
        owner = {p.name: i for i, node in reversed(list(enumerate(self.nodes))) for p in node.operator.parameters}
        for i, node in enumerate(self.nodes):
            for parameter in node.operator.parameters:
                other = owner[parameter.name]
                for a, mine in enumerate(node.choices if other != i else []):
                    for b, theirs in enumerate(self.nodes[other].choices):
                        if weight_layouts(mine) != weight_layouts(theirs):
                            rows.append(([int(first[i]) + a, int(first[other]) + b], [1.0, 1.0], -np.inf, 1.0))

    def _transitions(self, tensor: _Tensor, first: NDArray[np.int64], cost: list[float], rows: list[Row]) -> None:
        """One variable per source signature and target layout: 1 as soon as any consumer asks for that transition."""
        variables: dict[tuple[int, Layout, bool], int] = {}
        for i, source in enumerate(self.nodes[tensor.producer].choices):
            for consumer, k in tensor.consumers:
                for j, sink in enumerate(self.nodes[consumer].choices):
                    both = [int(first[tensor.producer]) + i, int(first[consumer]) + j]
                    for have, want, backward, in_place in self.pairs(tensor, consumer, k, source, sink):
                        seconds = self.transition(tensor.dims, have, want, in_place=in_place)
                        if seconds is None:
                            rows.append((both, [1.0, 1.0], -np.inf, 1.0))
                            break
                        if seconds:
                            target = (i, have if backward else want, backward)
                            if target not in variables:
                                variables[target] = len(cost)
                                cost.append(tensor.weight * seconds)
                            rows.append(([*both, variables[target]], [1.0, 1.0, -1.0], -np.inf, 1.0))

    def evaluate(self, chosen: dict[str, str]) -> float:
        """Seconds of one given assignment."""
        names = [[s.name for s in node.choices] for node in self.nodes]
        pick = [names[i].index(chosen[node.operator.role]) for i, node in enumerate(self.nodes)]
        total = sum(node.weight * node.seconds[p] for node, p in zip(self.nodes, pick, strict=True))
        for tensor in self.tensors:
            source = self.nodes[tensor.producer].choices[pick[tensor.producer]]
            seen: set[tuple[Layout, bool]] = set()
            for consumer, k in tensor.consumers:
                sink = self.nodes[consumer].choices[pick[consumer]]
                for have, want, backward, _ in self.pairs(tensor, consumer, k, source, sink):
                    target = (have if backward else want, backward)
                    if target not in seen:
                        seen.add(target)
                        total += tensor.weight * (self.transition(tensor.dims, have, want) or 0.0)
        return total


def _short(model: ModelSpec) -> ModelSpec:
    """The model with three layers: a first, the repeated one, and one that feeds the head."""
    return msgspec.structs.replace(model, layers=3)


def _matrix(rows: list[Row], columns: int) -> coo_array:
    """Constraint rows as a sparse matrix."""
    data = [value for row in rows for value in row[1]]
    row_index = [i for i, row in enumerate(rows) for _ in row[0]]
    column_index = [column for row in rows for column in row[0]]
    return coo_array((data, (row_index, column_index)), shape=(len(rows), columns))
