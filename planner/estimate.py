"""Closed-form step time and memory of many candidates at once, from the same tasks and formulas as a prediction.

One layer, the embedding and the head are laid out once per *structure* (which axes exist, sequence parallel, kind of
context parallelism, recomputation) with sizes that are arrays over candidates; their tasks are the nodes that
`planner.predict` replays, priced by the same functions. The pipeline is a closed form (Narayanan et al. 2021, §2.2; Qi
et al. 2024, arXiv:2401.10241, table 1), so an estimate orders candidates and the replay decides among the best.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from planner.cost import oversubscription_factor, p2p_seconds
from planner.graph import Operator, split_unit
from planner.machine import Machine
from planner.model import ModelSpec
from planner.placement import Count, fixed_size
from planner.plan import ContextKind, Recompute, Training, distinct_operators, standard_layouts
from planner.price import COLLECTIVES, FREE, MESSAGES, Place, compute_seconds, group_seconds
from planner.program.backward import StageBackward
from planner.program.liveness import needed
from planner.program.rank import ITEM_BYTES, blocks
from planner.program.stage import StageForward
from planner.program.tasks import Task, Work

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Structure:
    """What decides which tasks exist; sizes do not. Stands in for a plan while its tasks are laid out."""

    model: ModelSpec
    training: Training
    tp: bool  # whether the axis has more than one rank
    cp: int  # its size: ring attention has one task per rank of the ring
    sequence_parallel: bool
    cp_kind: ContextKind
    recompute: Recompute
    attention: str = "plain"
    forward_only: bool = False

    @cached_property
    def layouts(self) -> dict[str, dict[str, str]]:
        """The usual signatures of every operator."""
        return standard_layouts(
            distinct_operators(self.model), sequence_parallel=self.sequence_parallel, cp_kind=self.cp_kind
        )


@dataclass(frozen=True)
class ArraySizes:
    """Largest local sizes over ranks, for arrays of tensor-parallel sizes and micro-batches."""

    model: ModelSpec
    tp: Ints
    cp: int
    batch: Ints

    def size(self, dim: str, axes: Collection[str]) -> Count:
        """Local extent of `dim` on the rank that has most of it."""
        model = self.model
        parts: Any = (self.tp if "tp" in axes else 1) * (self.cp if "cp" in axes else 1)
        heads = -(-model.heads // parts)
        kv_heads = -(-heads // (model.heads // model.kv_heads))
        sizes: dict[str, Any] = {
            "batch": self.batch,
            "seq": -(-model.seq_len // parts),
            "heads": heads,
            "kv_heads": kv_heads,
            "qk_heads": heads + kv_heads,
            "qkv": (heads + 2 * kv_heads) * model.head_dim,
            "attended": heads * model.head_dim,
            "ffn": -(-model.ffn_hidden // parts),
            "gate_up": 2 * -(-model.ffn_hidden // parts),
            "vocab": -(-model.vocab // parts),
        }
        return sizes[dim] if dim in sizes else fixed_size(model, dim)

    def extents(self, dim: str, axes: Collection[str], axis: str) -> tuple[int, ...]:
        """Peers' extents are an executor's concern."""
        return ()

    def ring_extent(self, dim: str, step: int) -> Count:
        """Every block of the ring has the largest part's size."""
        return self.size(dim, ("cp",))


@dataclass
class BlockCost:
    """One block of a structure over arrays of sizes: seconds by op, bytes saved and scratch, parameters."""

    forward_seconds: Floats
    input_seconds: Floats
    weight_seconds: Floats
    saved_bytes: Floats
    scratch_bytes: Floats
    parameters: Floats

    def __add__(self, other: BlockCost) -> BlockCost:
        """Blocks that run one after the other; scratch is reused."""
        merged = {f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)}
        merged["scratch_bytes"] = np.maximum(self.scratch_bytes, other.scratch_bytes)
        return BlockCost(**merged)

    def __mul__(self, count: Any) -> BlockCost:
        """`count` equal blocks."""
        merged = {f.name: getattr(self, f.name) * count for f in fields(self)}
        merged["scratch_bytes"] = self.scratch_bytes
        return BlockCost(**merged)

    def take(self, index: Ints) -> BlockCost:
        """Costs of some entries, by index."""
        return BlockCost(**{f.name: getattr(self, f.name)[index] for f in fields(self)})

    @property
    def backward_seconds(self) -> Floats:
        """Full backward pass."""
        return self.input_seconds + self.weight_seconds


@dataclass
class StructureCosts:
    """Costs of the three kinds of blocks of a structure for arrays (tp, micro-batch)."""

    structure: Structure
    machine: Machine
    sizes: ArraySizes
    ranks_per_host: Ints

    def blocks(self) -> dict[str, BlockCost]:
        """Costs of "embedding", "layer" (mean over layers, which may differ in their attention window) and "head"."""
        structure, model = self.structure, self.structure.model
        axis_sizes = {"dp": 1, "cp": structure.cp, "tp": 2 if structure.tp else 1}
        item = ITEM_BYTES[structure.training.precision]
        forward = StageForward(structure, 0, self.sizes, axis_sizes, item)
        chosen = self._distinct_layers(model)
        names = ["embedding", *chosen, "head"]
        graph = blocks(model)
        for name in names:
            if name == "head" and model.layers > len(chosen):
                stream = graph[f"layers.{model.layers - 1}"][-1].outputs[-1].name
                last = graph[names[-2]][-1].outputs[-1].name
                forward.enter(stream, forward.dims[last], forward.layouts[last])
            forward.run(name, graph[name])
        backward = StageBackward(forward, split=False)
        if not structure.forward_only:
            backward.run("head", graph["head"])
            if model.layers > len(chosen):
                backward.leave(graph[names[-2]][-1].outputs[-1].name)
            for name in reversed(names[:-1]):
                backward.run(name, graph[name])
        costs = {name: self._block(forward, backward, name, graph[name]) for name in names}
        first, *rest = [costs[name] * share for name, share in chosen.items()]
        return {"embedding": costs["embedding"], "layer": sum(rest, first), "head": costs["head"]}

    @staticmethod
    def _distinct_layers(model: ModelSpec) -> dict[str, float]:
        """The first layer of each attention window, and the share of layers like it (at most layers 0 and 1)."""
        windows = [model.window(i) for i in range(model.layers)]
        return {f"layers.{windows.index(w)}": windows.count(w) / model.layers for w in dict.fromkeys(windows)}

    def _block(self, forward: StageForward, backward: StageBackward, name: str, members: list[Operator]) -> BlockCost:
        shape = np.shape(self.sizes.batch)
        ahead, back = forward.tasks[name], backward.tasks.get(name, [])
        zero = np.zeros(shape)
        roots = needed(back, forward.buffers)
        own = {forward.buffers[n].root for task in ahead for n in task.writes}
        saved = sum((forward.bytes_of(root) for root in roots & own), zero)
        alive = [n for task in back for n in task.writes if forward.buffers[n].root == n]
        scratch = max((forward.bytes_of(n) for n in alive), key=np.max, default=zero)
        return BlockCost(
            forward_seconds=zero + sum(self._seconds(task) for task in ahead),
            input_seconds=zero + sum(self._seconds(task) for task in back if task.phase != "W"),
            weight_seconds=zero + sum(self._seconds(task) for task in back if task.phase == "W"),
            saved_bytes=zero + saved,
            scratch_bytes=zero + 3 * scratch,
            parameters=zero + self._parameters(forward, members),
        )

    def _parameters(self, forward: StageForward, members: list[Operator]) -> Any:
        total: Any = 0
        for operator in members:
            for parameter in operator.parameters:
                layouts = {axis: forward.signature(operator, axis).parameters for axis in forward.axes}
                count: Any = 1
                for dim in parameter.dims:
                    count = count * self.sizes.size(dim, forward.sharding(split_unit(dim), layouts))
                total = total + count
        return total

    def _seconds(self, task: Task) -> Any:
        if task.kind in FREE:
            return 0.0
        training = self.structure.training
        if task.kind in COLLECTIVES:
            return group_seconds(self.machine, task, self._place(task.axis or "world"))
        if task.kind in MESSAGES:
            crosses = self.ranks_per_host > self.sizes.tp
            return p2p_seconds(self.machine, task.work.full_bytes, crosses, self.ranks_per_host)
        threads = training.threads_per_rank
        slow = oversubscription_factor(self.machine, self.ranks_per_host, threads)
        return compute_seconds(self.machine, task, training.precision, threads, self.ranks_per_host) * slow

    def _place(self, axis: str) -> Place:
        """Groups fill hosts in rank order, tensor axis innermost."""
        stride = np.ones_like(self.sizes.tp) if axis == "tp" else self.sizes.tp
        size: Any = self.sizes.tp if axis == "tp" else self.structure.cp
        on_host = np.clip(self.ranks_per_host // stride, 1, size)
        return Place(size, on_host, np.maximum(1, self.ranks_per_host // on_host))


@dataclass
class Candidates:
    """Columns over candidates of one structure and schedule; sizes of axes, micro-batch, chunks."""

    pp: Ints
    dp: Ints
    tp: Ints
    micro_batch: Ints
    chunks: Ints
    zero: Ints


def step_seconds(
    costs: dict[str, BlockCost], at: Candidates, machine: Machine, structure: Structure, schedule: str,
    global_batch: int, ranks_per_host: Ints,
) -> tuple[Floats, Floats]:  # fmt: skip
    """Step seconds and peak bytes per rank of candidates, by the closed forms of their schedule.

    `costs` hold one entry per candidate. The slowest stage sets the pace; warm-up and cool-down add what the other
    stages take; gradient reduction and the update follow the last backward.
    """
    model, training = structure.model, structure.training
    replica = -(-global_batch // at.dp)
    count = -(-replica // at.micro_batch)
    stages = at.pp * at.chunks
    per_stage = -(-model.layers // stages)
    layer, embedding, head = costs["layer"], costs["embedding"], costs["head"]
    whole = {name: c.forward_seconds + c.backward_seconds for name, c in costs.items()}
    busiest = _balanced(model.layers, at.pp, whole["layer"], whole["embedding"], whole["head"])
    total = model.layers * whole["layer"] + whole["embedding"] + whole["head"]
    split = model.layers * layer.weight_seconds / at.pp
    item = ITEM_BYTES[training.precision]
    sequence = -(-model.seq_len // (structure.cp * (at.tp if structure.sequence_parallel else 1)))
    message = p2p_seconds(
        machine, at.micro_batch * sequence * model.hidden * item, at.pp * at.tp <= ranks_per_host, ranks_per_host
    )
    ways = 1 if structure.forward_only else 2
    fill = np.where(at.pp > 1, (total - busiest) / at.chunks, 0.0)
    if schedule.startswith("zb"):
        fill = np.maximum(0.0, fill - (at.pp - 1) * split)
    transfers = np.where(stages > 1, ways * (stages - 1 + (at.chunks - 1) * count) * message, 0.0)
    seconds = count * busiest + fill + transfers
    parameters = per_stage * at.chunks * layer.parameters + np.maximum(embedding.parameters, head.parameters)
    if not structure.forward_only:
        seconds = seconds + _update_seconds(machine, structure, at, parameters, count, ranks_per_host)
    seconds = seconds + machine.overheads.step_seconds
    return seconds, _memory(structure, at, costs, parameters, per_stage, count, schedule)


def _balanced(layers: int, pp: Ints, layer: Floats, first: Floats, last: Floats) -> Floats:
    """Seconds of the slowest stage when whole layers are placed to even out the embedding and the head."""
    even = (layers * layer + first + last) / pp
    extra = np.maximum(first, last)
    with_extra = extra + layer * np.maximum(1, np.floor((even - extra) / layer))
    return np.where(
        pp > 1, np.maximum(np.maximum(even, with_extra), layer * np.ceil(even / layer - 1e-9) * (extra < layer)), even
    )


def _update_seconds(
    machine: Machine, structure: Structure, at: Candidates, parameters: Floats, count: Ints, ranks_per_host: Ints
) -> Floats:
    """Gradient reduction over data ranks, sharded or not, and the optimizer."""
    training, group = structure.training, at.dp * structure.cp
    state = 8 if training.precision == "float64" else 4
    size = (parameters * state).astype(np.int64)
    stride = at.tp
    on_host = np.clip(ranks_per_host // stride, 1, group)
    place = Place(group, on_host, np.maximum(1, ranks_per_host // on_host))

    def collective(kind: str) -> Any:
        return group_seconds(machine, Task("", kind, "", axis="data", work=Work(bytes=size, full_bytes=size)), place)

    scatter, gather = collective("gradient_reduce_scatter"), collective("parameter_gather")
    reduction = np.select(
        [at.zero == 0, at.zero == 1, at.zero == 2],
        [collective("gradient_all_reduce"), scatter + gather, count * scatter + gather],
        count * (scatter + 2 * gather),
    )
    owned = np.where(at.zero > 0, parameters / group, parameters)
    streams = 7 if training.optimizer == "adamw" else 3
    task = Task("", "optimizer", "", work=Work(elements=owned, bytes=streams * owned * state))
    threads = training.threads_per_rank
    slow = oversubscription_factor(machine, ranks_per_host, threads)
    update = compute_seconds(machine, task, training.precision, threads, ranks_per_host) * slow
    return np.asarray(np.where(group > 1, reduction, 0.0) + update)


def _memory(
    structure: Structure, at: Candidates, costs: dict[str, BlockCost], parameters: Floats, per_stage: Ints,
    count: Ints, schedule: str,
) -> Floats:  # fmt: skip
    """Peak bytes of the fullest rank: state by ZeRO stage, micro-batches in flight, scratch of one backward pass."""
    training, group = structure.training, at.dp * structure.cp
    state = 8 if training.precision == "float64" else 4
    moments = 2 if training.optimizer == "adamw" else 0
    sharded = np.where(at.zero > 0, 1.0 / group, 1.0)
    whole = np.where(at.zero == 3, 1.0 / group, 1.0) + np.where(at.zero >= 2, 1.0 / group, 1.0) + moments * sharded
    if structure.forward_only:
        whole = np.ones_like(sharded)
    layer, embedding, head = costs["layer"], costs["embedding"], costs["head"]
    flight = count * at.chunks if schedule == "gpipe" else np.minimum(count * at.chunks, at.pp * at.chunks + at.pp - 1)
    flight = np.where(at.chunks == 1, np.minimum(count, at.pp if schedule != "gpipe" else count), flight)
    if structure.forward_only:
        flight = np.ones_like(count)
    first = flight * (per_stage * layer.saved_bytes) + np.minimum(flight, at.pp) * embedding.saved_bytes
    last = per_stage * layer.saved_bytes * np.maximum(1, flight - at.pp + 1) + head.saved_bytes
    activations = np.where(at.pp > 1, np.maximum(first, last), first + head.saved_bytes)
    scratch = np.maximum(layer.scratch_bytes, np.where(at.pp > 1, 0, head.scratch_bytes))
    return np.asarray(parameters * state * whole + activations + scratch)
