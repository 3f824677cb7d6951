"""Costs of one layer, the embedding and the head for many sizes at once, by the tasks and formulas of a prediction.

One layer, the embedding and the head are laid out once per *structure* (which axes exist, sequence parallel, kind of
context parallelism, recomputation) with sizes that are arrays over candidates; their tasks are the nodes that
`planner.predict` replays, priced by the same functions. `planner.search.candidates` joins them to whole steps.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from planner.admissible import ContextKind, distinct_operators
from planner.cost.communication import p2p_seconds
from planner.cost.compute import oversubscription_factor
from planner.cost.price import (
    COLLECTIVES,
    FREE,
    MESSAGES,
    Place,
    communicates,
    compute_seconds,
    group_seconds,
    launches,
    stretch_seconds,
    task_precision,
)
from planner.graph import Operator, split_unit
from planner.machine import Machine
from planner.model import ModelSpec
from planner.placement import Count, fixed_size
from planner.plan import Recompute, Training, standard_layouts
from planner.program.backward import StageBackward
from planner.program.liveness import needed
from planner.program.rank import ITEM_BYTES, blocks, reduced_item_bytes
from planner.program.stage import StageForward
from planner.program.tasks import Task
from planner.program.update import MIXED_PRECISIONS

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


RING_LAID_OUT = 2
"""Ranks of the ring that stands in for rings of every size."""


@dataclass(frozen=True)
class Structure:
    """What decides which tasks exist; sizes do not. Stands in for a plan while its tasks are laid out."""

    model: ModelSpec
    training: Training
    tp: bool  # whether the axis has more than one rank
    cp: bool
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
    """Largest local sizes over ranks, for arrays of tensor- and context-parallel sizes and micro-batches."""

    model: ModelSpec
    tp: Ints
    cp: int | Ints
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
    weight_bytes: Floats  # of what a split backward pass holds from I until W
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
    """Costs of the three kinds of blocks of a structure for arrays (tp, cp, micro-batch).

    A ring is laid out with two ranks; its steps and shifts count as often as a ring of the real size has them.
    """

    structure: Structure
    machine: Machine
    sizes: ArraySizes
    ranks_per_host: Ints

    def blocks(self) -> dict[str, BlockCost]:
        """Costs of "embedding", "layer" (mean over layers, which may differ in their attention window) and "head"."""
        structure, model = self.structure, self.structure.model
        axis_sizes = {"dp": 1, "cp": RING_LAID_OUT if structure.cp else 1, "tp": 2 if structure.tp else 1}
        item = ITEM_BYTES[structure.training.precision]
        reduced = reduced_item_bytes(structure.training.precision, self.machine.transport_in_use)
        forward = StageForward(structure, 0, self.sizes, axis_sizes, item, reduced)
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
        counted: set[str] = set()  # what one block's backward pass keeps, no other has to keep again
        costs = {name: self._block(forward, backward, name, graph[name], counted) for name in names}
        first, *rest = [costs[name] * share for name, share in chosen.items()]
        return {"embedding": costs["embedding"], "layer": sum(rest, first), "head": costs["head"]}

    @staticmethod
    def _distinct_layers(model: ModelSpec) -> dict[str, float]:
        """The first layer of each attention window, and the share of layers like it (at most layers 0 and 1)."""
        windows = [model.window(i) for i in range(model.layers)]
        return {f"layers.{windows.index(w)}": windows.count(w) / model.layers for w in dict.fromkeys(windows)}

    def _block(
        self, forward: StageForward, backward: StageBackward, name: str, members: list[Operator], counted: set[str]
    ) -> BlockCost:
        zero = np.zeros(np.shape(self.sizes.batch))
        ahead, back = forward.tasks[name], backward.tasks.get(name, [])
        roots = {root for root in needed(back, forward.buffers) if root in forward.dims} - counted
        kept = {root for root in roots if forward.buffers[root].category == "activations"}
        counted |= kept
        saved = sum((self._saved(forward, root) for root in kept), zero)
        return BlockCost(
            forward_seconds=zero + self._stretch(ahead, "F"),
            input_seconds=zero + self._stretch([task for task in back if task.phase != "W"], "I"),
            weight_seconds=zero + self._stretch([task for task in back if task.phase == "W"], "W"),
            saved_bytes=zero + saved,
            weight_bytes=zero + self._read_by_weights(forward, back),
            scratch_bytes=self._scratch(forward, back),
            parameters=zero + self._parameters(forward, members),
        )

    def _stretch(self, tasks: list[Task], op: str) -> Any:
        """Seconds of one block's part of an instruction; what is spent per micro-batch is added per stage."""
        del op
        own = sum((self._seconds(task) * self._times(task) for task in tasks), np.zeros(np.shape(self.sizes.batch)))
        precision = self.structure.training.precision
        kernels = sum(launches(self.machine, task, precision) for task in tasks if not communicates(task))
        collectives = sum(1 for task in tasks if task.kind in COLLECTIVES)
        return stretch_seconds(self.machine, own, 0.0, kernels, collectives, "W")

    def _times(self, task: Task) -> Any:
        """How often a ring of the real size has a task that one of two ranks has once."""
        ring = self.sizes.cp
        if task.kind.startswith("attention_step"):
            return ring / RING_LAID_OUT
        if task.kind == "ring_shift" and task.attributes.get("step") != RING_LAID_OUT:
            return np.subtract(ring, 1)
        return 1

    def _read_by_weights(self, forward: StageForward, back: list[Task]) -> Any:
        """Bytes of the inputs and output gradients that weight gradients read."""
        names = {n for task in back if task.phase == "W" for n in task.reads if n in forward.dims}
        return sum((forward.bytes_of(name) for name in names), np.zeros(np.shape(self.sizes.batch)))

    def _scratch(self, forward: StageForward, back: list[Task]) -> Any:
        """Most bytes that a backward pass makes itself and holds at once: gradients, and what it computes again."""
        buffers = forward.buffers
        last = {buffers[n].root: i for i, task in enumerate(back) for n in (*task.reads, *task.writes) if n in buffers}
        held = {buffers[root].root for root in needed(back, buffers)}
        live = highest = np.zeros(np.shape(self.sizes.batch))
        born: set[str] = set()
        for i, task in enumerate(back):
            for root in {buffers[n].root for n in task.writes if n in buffers} - held - born:
                if root in forward.dims:
                    born.add(root)
                    live = live + self._saved(forward, root)
            highest = np.maximum(highest, live)
            for root in [root for root in born if last[root] == i]:
                born.remove(root)
                live = live - self._saved(forward, root)
        return highest

    def _saved(self, forward: StageForward, root: str) -> Any:
        """Bytes of a saved buffer as the machine's framework keeps it; compare `planner.cost.memory`."""
        framework, nbytes = self.machine.framework, forward.bytes_of(root)
        if self.structure.training.precision not in MIXED_PRECISIONS or framework.parameter_bytes is None:
            return nbytes
        if root.endswith(".probabilities") and framework.probability_bytes:
            return nbytes * (framework.probability_bytes / forward.item_bytes)
        if root == "head.logits" and framework.logit_bytes:
            return nbytes * (framework.logit_bytes / forward.item_bytes)
        return nbytes

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
            mixed = training.precision in MIXED_PRECISIONS
            return group_seconds(self.machine, task, self._place(task.axis or "world"), mixed=mixed)
        if task.kind in MESSAGES:
            same_host = self.ranks_per_host > self.sizes.tp
            return p2p_seconds(self.machine, task.work.full_bytes, same_host, self.ranks_per_host)
        threads = training.threads_per_rank
        slow = oversubscription_factor(self.machine, self.ranks_per_host, threads)
        precision = task_precision(task, training.precision)
        return compute_seconds(self.machine, task, precision, threads, self.ranks_per_host) * slow

    def _place(self, axis: str) -> Place:
        """Groups fill hosts in rank order, tensor axis innermost."""
        stride = np.ones_like(self.sizes.tp) if axis == "tp" else self.sizes.tp
        size: Any = self.sizes.tp if axis == "tp" else self.sizes.cp
        on_host = np.clip(self.ranks_per_host // stride, 1, size)
        return Place(size, on_host, np.maximum(1, self.ranks_per_host // on_host))
