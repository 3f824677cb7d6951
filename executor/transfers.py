"""Task kinds that communicate: redistributions, ring shifts, pipeline messages, gradient and parameter collectives.

Tensors are sequence-first, so sharding over the sequence splits the leading dimension and MPI takes and fills the
buffers in place; any other dimension is moved to the front first. Before a blocking collective the ranks wait for each
other (`Group.arrive`), so that waiting for a slower rank and moving bytes are recorded apart. The type in which
each of them travels is in the table of `executor.precision`.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from executor.comm import Communicator, Group, InFlight, Request
from executor.comm.base import ReduceOp
from executor.device import Flight
from executor.memory import Arena, Block
from executor.ops import Context, MicroBatch
from executor.precision import as_moved
from executor.state import UnitState
from planner.program.tasks import Task
from planner.program.update import TIED
from planner.shard import offsets

Array = NDArray[Any]


@dataclass
class Pending:
    """A message or reduction under way, and the block to give back when it has finished."""

    request: Request
    block: Block | None = None


@dataclass
class Transfers:
    """Communication of one rank.

    Attributes:
        wait_seconds: how long the last blocking collective waited for its latest member.
        received: requests of posted receives by (stage, micro-batch, tensor).
        pending: sends that have not completed.
        reductions: gradient reductions started early, by block.
        flights: a device's operations on streams of their own in this step, by task; None where a task had none.
    """

    comm: Communicator
    context: Context
    arena: Arena
    units: dict[str, UnitState]  # by block
    measure_wait: bool = True
    wait_seconds: float = 0.0
    received: dict[tuple[int, int, str], Request] = field(default_factory=dict)
    pending: list[Pending] = field(default_factory=list)
    reductions: dict[str, Request] = field(default_factory=dict)
    flights: list[Flight | None] = field(default_factory=list)
    loss: float = 0.0
    gradient_norm: float = 0.0
    overflow: bool = False  # some rank's gradient of this step is not a number
    _groups: dict[str, Group] = field(default_factory=dict)
    _rooms: dict[tuple[str, np.dtype[Any]], Array] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Make all groups now, in the same order on every rank."""
        plan, at = self.context.plan, self.context.placement.at
        wanted = [(axis, plan.mesh.group(axis, at)) for axis in ("tp", "cp", "dp", "data", "pp", "world")]
        ends = self.context.tied_ranks()
        if ends:
            wanted.append(("tie", ends))
        made = self.comm.create_groups(wanted)
        self._groups = {axis: made[axis, tuple(ranks)] for axis, ranks in wanted}

    def group(self, task: Task) -> Group:
        """The group of a task's axis."""
        assert task.axis is not None
        return self._groups[task.axis]

    def algorithm(self, group: Group, operation: str) -> str:
        """The algorithm that the plan fixed for an operation on an axis ("native" unless it names another)."""
        chosen = self.context.plan.collectives
        return chosen.get(f"{group.axis}.{operation}", chosen.get(operation, "native"))

    def arrive(self, group: Group) -> None:
        """Wait for the group's latest member, timed apart from the bytes that follow."""
        if self.measure_wait and not self.arena.device.is_host:
            self.arena.device.synchronise()  # what this rank still computes is no waiting
        self.wait_seconds = group.arrive() if self.measure_wait else 0.0

    def progress(self) -> None:
        """Let MPI move what is under way, and give back the buffers of finished sends."""
        if self.pending:
            self.pending = [one for one in self.pending if not self._done(one)]
        for request in self.reductions.values():
            request.test()

    def _done(self, one: Pending) -> bool:
        if not one.request.test():
            return False
        if one.block is not None:
            self.arena.release(one.block)
        return True

    def _note_flight(self, request: Request) -> None:
        """Keep when an operation on a stream of its own began and ends; on the host it is the task's own time."""
        if not self.arena.device.is_host:
            self.flights.append(request if isinstance(request, InFlight) else None)

    def finish(self) -> None:
        """Wait for all sends of the step."""
        for one in self.pending:
            one.request.wait()
        self.progress()

    def _room(self, use: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        """An uninitialised array for the length of one transfer; its memory is kept for the next of the same use."""
        size = math.prod(shape)
        room = self._rooms.get((use, dtype))
        if room is None or room.size < size:
            room = self._rooms[use, dtype] = self.arena.device.empty((size,), dtype)
        return room[:size].reshape(shape)

    def _packed(self, use: str, array: Array) -> Array:
        """The array itself if it is contiguous, as MPI needs it; otherwise a copy in a room."""
        if array.flags.c_contiguous:
            return array
        copy = self._room(use, array.shape, array.dtype)
        copy[...] = array
        return copy

    # ---- redistributions of tensors ----------------------------------------------------------------------------------

    def _reducible(self, array: Array) -> Array:
        """The array itself in a type that its transport can sum, else room for a wider copy of it."""
        wide = self.context.precision.reduced
        return array if array.dtype.itemsize >= wide.itemsize else self._room("reduced", array.shape, wide)

    def all_reduce(self, m: MicroBatch, task: Task) -> None:
        """Partial to Replicate, in place."""
        group, buffer = self.group(task), m.arrays[task.reads[0]]
        summed = self._reducible(buffer)
        if summed is not buffer:
            summed[...] = buffer
        self.arrive(group)
        algorithm = self.algorithm(group, "all_reduce")
        group.all_reduce(summed, task.attributes["op"], algorithm=algorithm, key=task.key)
        if summed is not buffer:
            buffer[...] = summed

    def all_gather(self, m: MicroBatch, task: Task) -> None:
        """Shard to Replicate."""
        group, (source, target) = self.group(task), (m.arrays[task.reads[0]], m.arrays[task.writes[0]])
        dim, extents = task.attributes["source"]
        algorithm = self.algorithm(group, "all_gather")
        if dim == 0:
            counts = _counts(extents, source)
            start = offsets(extents)[group.rank]
            target[start : start + extents[group.rank]] = source
            self.arrive(group)
            group.all_gather(None, as_moved(target), counts, algorithm=algorithm, key=task.key)
            return
        front = self._packed("sent", np.moveaxis(source, dim, 0))
        whole = self._room("received", (sum(extents), *front.shape[1:]), front.dtype)
        self.arrive(group)
        group.all_gather(as_moved(front), as_moved(whole), _counts(extents, front), algorithm=algorithm, key=task.key)
        target[...] = np.moveaxis(whole, 0, dim)

    def reduce_scatter(self, m: MicroBatch, task: Task) -> None:
        """Partial to Shard."""
        group, (source, target) = self.group(task), (m.arrays[task.reads[0]], m.arrays[task.writes[0]])
        dim, extents = task.attributes["target"]
        algorithm = self.algorithm(group, "reduce_scatter")
        front = np.moveaxis(source, dim, 0)
        summed = self._reducible(front)
        if summed is not front:
            summed[...] = front
        summed = self._packed("sent", summed)
        in_place = dim == 0 and target.dtype == summed.dtype
        part = target if in_place else self._room("received", (extents[group.rank], *summed.shape[1:]), summed.dtype)
        self.arrive(group)
        group.reduce_scatter(summed, part, _counts(extents, summed), algorithm=algorithm, key=task.key)
        if not in_place:
            target[...] = np.moveaxis(part, 0, dim)

    def all_to_all(self, m: MicroBatch, task: Task) -> None:
        """Shard of one dimension to Shard of another (heads for sequence: Jacobs et al. 2023, arXiv:2309.14509)."""
        group, (source, target) = self.group(task), (m.arrays[task.reads[0]], m.arrays[task.writes[0]])
        gathered, held = task.attributes["source"]  # the dimension that becomes whole, and every peer's part of it
        split, wanted = task.attributes["target"]  # the dimension that is cut, and what every peer gets of it
        pieces = np.split(source, offsets(wanted)[1:-1], axis=split)
        send = self._room("sent", (source.size,), source.dtype)
        for piece, room in zip(pieces, np.split(send, offsets([p.size for p in pieces])[1:-1]), strict=True):
            room.reshape(piece.shape)[...] = piece
        shapes = []
        for extent in held:
            shape = list(target.shape)
            shape[gathered] = extent
            shapes.append(tuple(shape))
        counts = [math.prod(shape) for shape in shapes]
        received = self._room("received", (sum(counts),), source.dtype)
        self.arrive(group)
        group.all_to_all(
            as_moved(send), as_moved(received), [piece.size for piece in pieces], counts,
            algorithm=self.algorithm(group, "all_to_all"), key=task.key,
        )  # fmt: skip
        parts = np.split(received, offsets(counts)[1:-1])
        np.concatenate(
            [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)], axis=gathered, out=target
        )

    def slice(self, m: MicroBatch, task: Task) -> None:
        """Replicate to Shard: a view, nothing moves."""
        group, (dim, extents) = self.group(task), task.attributes["target"]
        start = offsets(extents)[group.rank]
        index = [slice(None)] * dim + [slice(start, start + extents[group.rank])]
        m.arrays[task.writes[0]] = m.arrays[task.reads[0]][tuple(index)]

    def ring_shift(self, m: MicroBatch, task: Task) -> None:
        """Pass blocks to the next rank of the context-parallel ring and take those of the one before."""
        group = self.group(task)
        self.wait_seconds = 0.0
        requests = []
        for tag, (sent, received) in enumerate(zip(task.reads, task.writes, strict=True)):
            block = as_moved(self._packed(f"sent {tag}", m.arrays[sent]))
            requests.append(group.iring_shift(block, as_moved(m.arrays[received]), 1, tag, key=task.key))
        for request in requests:
            request.wait()

    # ---- pipeline ----------------------------------------------------------------------------------------------------

    def _tag(self, task: Task) -> int:
        way = task.key.endswith("backward")
        stages = self.context.plan.num_stages
        return int((task.attributes["micro_batch"] * stages + task.attributes["to"]) * 2 + way)

    def _peer(self, task: Task) -> int:
        return self._groups["pp"].ranks.index(task.attributes["peer"])

    def send(self, m: MicroBatch, task: Task, root: str) -> None:
        """Post a send and never wait; the block is given back when it has completed."""
        block = m.blocks[root]
        block.holders += 1
        message = as_moved(m.arrays[task.reads[0]])
        request = self._groups["pp"].isend(message, self._peer(task), self._tag(task), key=task.key)
        self._note_flight(request)
        self.pending.append(Pending(request, block))

    def post_receive(self, m: MicroBatch, task: Task, slot: tuple[int, int, str]) -> None:
        """Post a receive ahead of its use."""
        buffer = as_moved(m.arrays[task.writes[0]])
        self.received[slot] = self._groups["pp"].irecv(buffer, self._peer(task), self._tag(task), key=task.key)

    def receive(self, slot: tuple[int, int, str]) -> None:
        """Wait for a posted receive, letting other messages move meanwhile."""
        request, begun = self.received.pop(slot), perf_counter()
        if isinstance(request, InFlight) and request.waits_on_device:
            request.wait()
            self.wait_seconds = math.inf  # all of the task is waiting, as long as the device's time line says
            return
        while not request.test():
            self.progress()
            os.sched_yield()  # the sender may be waiting for this very core
        request.wait()  # on a device: the compute stream goes behind the copy
        self.wait_seconds = math.inf if isinstance(request, InFlight) else perf_counter() - begun

    # ---- gradients and parameters ------------------------------------------------------------------------------------

    def gradient_sum(self, task: Task) -> None:
        """Gradients that the tensor axis holds in parts (norms under sequence parallelism)."""
        unit, group = self.units[task.name], self.group(task)
        region = unit.complete_gradient()[unit.unit.partial_offset :]
        self.arrive(group)
        group.all_reduce(region, algorithm=self.algorithm(group, "all_reduce"), key=task.key)

    def kv_gradient_sum(self, task: Task) -> None:
        """Sum the gradients of key-value heads that several ranks hold, through one buffer of all such heads."""
        unit, group, model = self.units[task.name], self.group(task), self.context.plan.model
        width = model.kv_heads * model.head_dim
        mine = self.context.kv_columns()
        for suffix in ("qkv.weight", "split_heads.bias"):
            found = [name for name in unit.slots if name.endswith(suffix)]
            if not found:
                continue
            local = unit.view(unit.complete_gradient(), unit.slots[found[0]])
            local = local.reshape(-1, local.shape[-1])
            half = mine.stop - mine.start
            keys = local[:, -2 * half : -half]
            values = local[:, -half:]
            everyone = self._room("sent", (local.shape[0], 2, width), local.dtype)
            everyone[...] = 0
            everyone[:, 0, mine], everyone[:, 1, mine] = keys, values
            self.arrive(group)
            group.all_reduce(everyone, algorithm=self.algorithm(group, "all_reduce"), key=task.key)
            keys[...], values[...] = everyone[:, 0, mine], everyone[:, 1, mine]

    def tied_gradient_sum(self, task: Task) -> None:
        """Sum the two copies' gradients of a weight that the first and last stage share."""
        group = self.group(task)
        unit = next(unit for unit in self.units.values() if TIED in unit.slots)
        self.arrive(group)
        gradient = unit.view(unit.complete_gradient(), unit.slots[TIED])
        group.all_reduce(gradient, algorithm=self.algorithm(group, "all_reduce"), key=task.key)

    def gradient_all_reduce(self, task: Task) -> None:
        """Data parallel: sum a unit's gradients over replicas."""
        unit, group = self.units[task.name], self.group(task)
        gradient = unit.complete_gradient()
        self.arrive(group)
        group.all_reduce(gradient, algorithm=self.algorithm(group, "all_reduce"), key=task.key)
        unit.finish_gradient()

    def gradient_start(self, task: Task) -> None:
        """The same, started while the backward pass goes on."""
        unit, group = self.units[task.name], self.group(task)
        gradient = unit.complete_gradient()
        if self.context.plan.zero_stage:
            assert unit.gradient_shard is not None
            self.reductions[task.name] = group.ireduce_scatter(
                gradient, unit.gradient_shard, unit.unit.shard_sizes,
                algorithm=self.algorithm(group, "reduce_scatter"), key=task.key,
            )  # fmt: skip
        else:
            self.reductions[task.name] = group.iall_reduce(
                gradient, algorithm=self.algorithm(group, "all_reduce"), key=task.key
            )
        self._note_flight(self.reductions[task.name])

    def gradient_wait(self, task: Task) -> None:
        """Wait for a reduction started early."""
        self.wait_seconds = 0.0
        self.reductions.pop(task.name).wait()
        self.units[task.name].finish_gradient()

    def gradient_reduce_scatter(self, task: Task) -> None:
        """ZeRO (Rajbhandari et al. 2020): each rank keeps the sum of its own shard, over micro-batches too."""
        unit, group = self.units[task.name], self.group(task)
        assert unit.gradient_shard is not None
        gradient = unit.complete_gradient()
        repeated = task.phase != "U"
        held = repeated and unit.holds_shard
        block, part = self.arena.array((unit.owned,), unit.dtype, "buffers") if held else (None, unit.gradient_shard)
        self.arrive(group)
        algorithm = self.algorithm(group, "reduce_scatter")
        group.reduce_scatter(gradient, part, unit.unit.shard_sizes, algorithm=algorithm, key=task.key)
        if block is not None:
            np.add(unit.gradient_shard, part, out=unit.gradient_shard)
            self.arena.release(block)
        unit.holds_shard = repeated
        unit.finish_gradient()

    def parameter_gather(self, task: Task) -> None:
        """ZeRO 3: gather a unit's parameters before use."""
        unit, group = self.units[task.name], self.group(task)
        self._gather(unit, group, unit.gather_room(), task)

    def parameter_all_gather(self, task: Task) -> None:
        """ZeRO 1 and 2: gather the updated shards."""
        unit, group = self.units[task.name], self.group(task)
        assert unit.whole is not None
        self._gather(unit, group, unit.whole, task)

    def _gather(self, unit: UnitState, group: Group, whole: Array, task: Task) -> None:
        self.arrive(group)
        algorithm = self.algorithm(group, "all_gather")
        group.all_gather(None, as_moved(whole), unit.unit.shard_sizes, algorithm=algorithm, key=task.key)

    # ---- scalars -----------------------------------------------------------------------------------------------------

    def _over_ranks(self, task: Task, own: float, op: ReduceOp = "sum") -> float:
        """A number of every rank's, reduced."""
        total, group = np.array([own]), self.group(task)
        self.arrive(group)
        group.all_reduce(total, op, key=task.key)
        return float(total[0])

    def loss_sum(self, task: Task) -> None:
        """The loss of the whole global batch, on every rank."""
        self.loss = self._over_ranks(task, self.arena.device.number(self.context.loss))

    def overflow_max(self, task: Task, finite: bool) -> None:
        """Whether any rank found a gradient that is not a number; all ranks learn the same."""
        self.overflow = bool(self._over_ranks(task, 0.0 if finite else 1.0, "max"))

    def squared_norm(self, task: Task, local: Any) -> None:
        """The global gradient norm from every rank's own share of the squares, a scalar of the device."""
        self.gradient_norm = math.sqrt(self._over_ranks(task, self.arena.device.number(local)))


def _counts(extents: tuple[int, ...], array: Array) -> list[int]:
    """Elements of each peer's part along the leading dimension."""
    return [extent * math.prod(array.shape[1:]) for extent in extents]
