"""Which signatures an operator may be given on each axis, and which redistributions its tensors allow.

The algebra of `planner.layout` knows layouts; here it meets the tensors that a model really has. A split must be of a
dimension that the shard map splits, packed columns ([Q | K | V], [gate | up]) have no contiguous parts to gather or
scatter, a slice must be a view, and key-value heads that several ranks share cannot be counted once. Plans are checked
against these rules whenever they are made or loaded, and `planner.search.assign` chooses within them.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Literal, NamedTuple

import msgspec
import networkx as nx

from planner.errors import PlanError
from planner.graph import Operator, build_graph, operators, split_unit
from planner.layout import AXES, Collective, Layout, Shard, Signature, redistribution, signatures
from planner.model import ModelSpec

ALGORITHMS = {
    "all_reduce": ("native", "ring", "reduce_scatter_all_gather", "root"),
    "all_gather": ("native", "ring", "direct"),
    "reduce_scatter": ("native", "ring", "pairwise", "all_to_all", "all_reduce"),
    "all_to_all": ("native", "pairwise"),
    "broadcast": ("native", "linear", "scatter_all_gather"),
}
"""What a plan may name as the algorithm of a collective: the library's own (native), or one that the executor has."""

COLLECTIVE_AXES = ("tp", "cp", "dp", "data", "pp", "tie", "world")
"""Groups that collectives run in: the mesh axes, dp × cp, the two ends that share a tied weight, all ranks."""

ContextKind = Literal["allgather", "ring", "ulysses"]

ATTENTION_ON_CP: dict[ContextKind, str] = {"allgather": "allgather", "ring": "ring", "ulysses": "heads"}
"""The signature of the attention core on the context-parallel axis, by kind of context parallelism."""

SPLIT_ON_TP = ("seq", "heads", "ffn", "vocab")
"""The units that the shard map splits over the tensor axis."""

PACKED = ("qkv", "gate_up")
NEVER_ON_TP = {
    "embedding": ("seq",), "exp_sum": ("seq",), "loss": ("seq",),  # these read token ids, which tp holds whole
    "attention": ("seq", "ring", "allgather"),  # context parallelism has an axis of its own
}  # fmt: skip


IN_PLACE_BACKWARD = ("positions", "activation", "residual", "split_heads")
"""Kinds whose backward pass writes the input's gradient into the buffer of the output's."""


@lru_cache(maxsize=16)
def distinct_operators(model: ModelSpec) -> tuple[Operator, ...]:
    """One operator of each role; two layers show all of them (the first may lack a norm)."""
    return tuple({operator.role: operator for operator in operators(_short_graph(model))}.values())


@lru_cache(maxsize=16)
def _short_graph(model: ModelSpec) -> nx.DiGraph[str]:
    """The model cut to two layers."""
    return build_graph(msgspec.structs.replace(model, layers=min(model.layers, 2)))


class _Edge(NamedTuple):
    """A tensor between two roles: the producer's output and the consumer's input of it."""

    producer: str
    output: int
    consumer: str
    input: int
    dims: tuple[str, ...]
    in_place: tuple[bool, bool]


@lru_cache(maxsize=16)
def _edges(model: ModelSpec) -> tuple[_Edge, ...]:
    made: dict[str, tuple[Operator, int, tuple[str, ...]]] = {}
    found: dict[_Edge, None] = {}
    for operator in operators(_short_graph(model)):
        for i, name in enumerate(operator.inputs):
            if name in made:
                producer, output, dims = made[name]
                found[_Edge(producer.role, output, operator.role, i, dims, written_in_place(producer, operator, i))] = (
                    None
                )
        for k, tensor in enumerate(operator.outputs):
            made[tensor.name] = (operator, k, tensor.dims)
    return tuple(found)


def written_in_place(producer: Operator, consumer: Operator, i: int) -> tuple[bool, bool]:
    """Whether a tensor's buffer is written by its consumer, and its gradient's by its producer's backward pass."""
    written = any(t.alias_of == consumer.inputs[i] for t in (*consumer.outputs, *consumer.saved))
    return written, producer.kind in IN_PLACE_BACKWARD


@lru_cache(maxsize=512)
def admissible(kind: str, split: tuple[str, str], dims: tuple[str, ...]) -> tuple[Signature, ...]:
    """The signatures that an operator may be given on the tensor axis.

    Args:
        kind: the operator's kind.
        split: of a linear layer, the dimensions that column and row split.
        dims: of the operator's first output.
    """
    units = {split_unit(dim) for dim in dims}
    found = []
    for signature in signatures(kind, *split).values():
        layouts = (*signature.inputs, *signature.outputs, signature.parameters)
        split_dims = {layout.dim for layout in layouts if isinstance(layout, Shard)}
        made = {layout.dim for layout in signature.outputs if isinstance(layout, Shard)}
        never = NEVER_ON_TP.get(kind, ())
        if split_dims <= set(SPLIT_ON_TP) and (made <= units or not dims) and signature.name not in never:
            found.append(signature)
    return tuple(found)


def allowed(operator: Operator, axis: str, cp_kind: ContextKind) -> tuple[str, ...]:
    """Names of the signatures that an operator may be given on an axis."""
    if axis == "dp":
        return ("batch",)
    if axis == "cp":
        return (ATTENTION_ON_CP[cp_kind],) if operator.kind == "attention" else ("seq",)
    return tuple(s.name for s in admissible(operator.kind, operator.split, operator.outputs[0].dims))


def transition(
    model: ModelSpec, dims: tuple[str, ...], source: Layout, target: Layout, axis: str = "tp", *, in_place: bool = False
) -> Collective | None:
    """The collective that redistributes a tensor of these dimensions; None where nothing moves.

    `in_place` says that the result's buffer is written by what reads it.

    Raises:
        PlanError: no collective does it, or none that can work on such a tensor.
    """
    collective = redistribution(source, target)
    if collective is None:
        return None
    for layout in (source, target):
        if not isinstance(layout, Shard):
            continue
        held = next((dim for dim in dims if split_unit(dim) == layout.dim), None)
        if held is None:
            raise PlanError(f"a tensor of ({', '.join(dims)}) has no {layout.dim} to split")
        if held in PACKED:
            raise PlanError(f"the packed columns of {held} have no contiguous parts for an {collective}")
        if collective == "slice" and held != dims[0]:
            raise PlanError(f"a slice along {held}, which is not the outermost dimension, is no view")
        if held == "kv_heads" and axis == "tp" and model.kv_heads != model.heads:
            raise PlanError("key-value heads may be shared by ranks of tp, so that their parts do not add up")
    if collective == "slice" and in_place:
        raise PlanError("a slice is a view of the whole, and what reads it writes it in place")
    return collective


def check_layouts(
    model: ModelSpec, sizes: Mapping[str, int], layouts: Mapping[str, Mapping[str, str]], cp_kind: ContextKind
) -> None:
    """Raise unless every operator has a signature on every axis, and every edge a redistribution each way.

    Args:
        model: the model.
        sizes: ranks along "dp", "cp" and "tp"; on an axis of one rank nothing moves.
        layouts: signature names by role and axis.
        cp_kind: the kind of context parallelism.

    Raises:
        PlanError: names the operator, its signature and those that are possible.
    """
    by_role = {operator.role: operator for operator in distinct_operators(model)}
    for role, chosen in layouts.items():
        if role not in by_role:
            raise PlanError(f"layouts name the operator {role!r}; the model has {', '.join(sorted(by_role))}")
        if unknown := sorted(set(chosen) - set(AXES)):
            raise PlanError(f"layouts.{role} names the axis {unknown[0]!r}; use {', '.join(AXES)}")
        if missing := sorted(set(AXES) - set(chosen)):
            raise PlanError(f"layouts.{role} lacks a signature on {missing[0]}; name one each for {', '.join(AXES)}")
        for axis, name in chosen.items():
            names = allowed(by_role[role], axis, cp_kind)
            if name not in names:
                raise PlanError(f"layouts.{role}.{axis}={name!r} is not possible; use {' or '.join(names)}")
    missing_roles = sorted(set(by_role) - set(layouts))
    if missing_roles:
        raise PlanError(f"layouts lack the operators {', '.join(missing_roles)}; write the plan again with the planner")
    for axis in (axis for axis in AXES if sizes[axis] > 1):
        chosen_on = {role: signatures(o.kind, *o.split)[layouts[role][axis]] for role, o in by_role.items()}
        if model.tie_embeddings:
            _check_tied(axis, chosen_on)
        _check_edges(model, axis, chosen_on)


def _check_edges(model: ModelSpec, axis: str, chosen: Mapping[str, Signature]) -> None:
    for edge in _edges(model):
        source, sink = chosen[edge.producer], chosen[edge.consumer]
        pairs = (
            (source.outputs[edge.output], sink.inputs[edge.input]),
            (sink.grad_inputs[edge.input], source.grad_outputs[edge.output]),
        )
        for (have, want), in_place in zip(pairs, edge.in_place, strict=True):
            try:
                transition(model, edge.dims, have, want, axis, in_place=in_place)
            except PlanError as error:
                raise PlanError(
                    f"layouts {edge.producer}.{axis}={source.name!r} and {edge.consumer}.{axis}={sink.name!r} do not "
                    f"go together: {error}; choose another signature for one of them"
                ) from None


def check_collectives(collectives: Mapping[str, str]) -> None:
    """Raise unless every entry names a collective, on one axis or on all, and an algorithm that it has.

    Args:
        collectives: algorithms by "axis.operation" or "operation".

    Raises:
        PlanError: names the entry and what is possible.
    """
    for name, algorithm in collectives.items():
        axis, dot, operation = name.rpartition(".")
        if operation not in ALGORITHMS or (dot and axis not in COLLECTIVE_AXES):
            raise PlanError(
                f"collectives name {name!r}, which is no collective; use {', '.join(ALGORITHMS)}, alone or after an "
                f"axis of {', '.join(COLLECTIVE_AXES)}, as in tp.all_reduce"
            )
        if algorithm not in ALGORITHMS[operation]:
            raise PlanError(f"collectives.{name}={algorithm!r} is not known; use {' or '.join(ALGORITHMS[operation])}")


def weight_layouts(signature: Signature) -> tuple[Layout, Layout]:
    """Layouts of an operator's parameters and of their gradients: equal for operators that share a weight."""
    return signature.parameters, signature.grad_parameters


def _check_tied(axis: str, chosen: Mapping[str, Signature]) -> None:
    """The embedding and the head, sharing a weight, must hold the same part of it and of its gradient."""
    first, last = chosen["embedding.tokens"], chosen["head.vocab"]
    if weight_layouts(first) != weight_layouts(last):
        raise PlanError(
            f"layouts embedding.tokens={first.name!r} and head.vocab={last.name!r} on {axis} keep their shared "
            "weight differently; use vocab with column or replicate with replicate"
        )
