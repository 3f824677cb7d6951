"""Device arrays over NCCL, one GPU per rank: everything runs on streams, and the host waits for nothing.

A group has one NCCL communicator for its collectives. Blocking collectives run on the compute stream itself, in the
program's order, so that nothing has to be ordered; those started early run on a stream of the group's own.

A send occupies its stream until its receiver has come, so a message must not share a stream, nor a communicator (whose
operations run in the order in which they were given to it), with one that goes elsewhere: two ranks that send to each
other first would wait for ever. Each *lane*, an ordered pair of neighbours and a direction (the lowest bit of the tag:
forward or backward), has a communicator of two ranks and a stream on each. On a lane, messages are received in the
order in which they are sent, as the planner's schedules guarantee per source, destination and direction.

Making a communicator is collective over its members. Groups are made in one order on all ranks, the lanes of a group in
the order of their names, so no rank waits for one that is busy with another.

Parts of unequal size: NCCL gathers and scatters equal ones only, so an all-gather is a group of broadcasts and a
reduce-scatter a group of reductions, one for each part, which NCCL runs as one launch. What only moves, moves as bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from executor.comm.base import DONE, LANE_TAG, Array, Begin, Channel, CommunicationError, InFlight, ReduceOp, Request
from executor.comm.base import offsets_of as offsets
from executor.device.base import Event
from executor.device.cuda import CudaDevice

LANE_AXES = ("pp", "cp")
"""Axes along which neighbours send messages: pipeline stages, rings of context parallelism."""

ID_BYTES = 128  # NCCL_UNIQUE_ID_BYTES


class Lane(NamedTuple):
    """One direction between two neighbours."""

    communicator: Any
    stream: Any
    peer: int  # the other's rank in the communicator of two


class NcclRequest(InFlight):
    """An operation on a stream.

    It keeps its buffers alive: memory freed while another stream uses it would be the compute stream's next allocation.
    """

    waits_on_device = True

    def __init__(self, device: CudaDevice, began: Any, ended: Any, passed: Event, buffers: tuple[Array, ...]) -> None:
        self.began, self.ended = began, ended
        self._device, self._passed, self._buffers = device, passed, buffers

    def test(self) -> bool:
        """Whether the stream has passed the operation."""
        if not self._passed.done:
            return False
        self._buffers = ()
        return True

    def wait(self) -> None:
        """Put the compute stream behind the operation."""
        self._device.join(self._passed)
        self._buffers = ()


class NcclChannel:
    """A group's channel for device arrays.

    Args:
        host: the group's channel for host arrays, over which ids are spread.
        device: this rank's.
        axis: the mesh axis.
    """

    def __init__(self, host: Channel, device: CudaDevice, axis: str) -> None:
        self.rank, self.size = host.rank, host.size
        self.scratch: list[Array] = []
        self._host, self._device, self._nccl = host, device, device.nccl()
        unique = np.zeros(ID_BYTES, np.uint8)
        if self.rank == 0:
            unique[:] = np.frombuffer(self._nccl.get_unique_id(), np.uint8)
        host.broadcast(unique, 0, blocking=True)
        self._all = self._nccl.NcclCommunicator(self.size, unique.tobytes(), self.rank)
        self._side = device.stream()
        self._lanes = self._make_lanes() if axis in LANE_AXES else {}

    # ---- messages --------------------------------------------------------------------------------------------------

    def _make_lanes(self) -> dict[tuple[int, int, int], Lane]:
        """The lanes that this rank is an end of, by (source, destination, direction)."""
        pairs = {(rank, (rank + step) % self.size) for rank in range(self.size) for step in (1, -1)}
        lanes = {}
        for source, target in sorted(pair for pair in pairs if self.rank in pair):
            for way in (0, 1):
                lanes[source, target, way] = self._make_lane(source, target)
        return lanes

    def _make_lane(self, source: int, target: int) -> Lane:
        sends = self.rank == source
        unique = np.zeros(ID_BYTES, np.uint8)
        if sends:
            unique[:] = np.frombuffer(self._nccl.get_unique_id(), np.uint8)
            self._host.isend(unique, target, LANE_TAG, synchronous=False).wait()
        else:
            self._host.irecv(unique, source, LANE_TAG).wait()
        communicator = self._nccl.NcclCommunicator(2, unique.tobytes(), 0 if sends else 1)
        return Lane(communicator, self._device.stream(), 1 if sends else 0)

    def isend(self, buffer: Array, peer: int, tag: int, *, synchronous: bool) -> Request:
        """Send on the lane to a peer; every NCCL send is synchronous on its stream."""
        return self._message(self._lane(self.rank, peer, tag), buffer, "send")

    def irecv(self, buffer: Array, peer: int, tag: int) -> Request:
        """Receive on the lane from a peer."""
        return self._message(self._lane(peer, self.rank, tag), buffer, "recv")

    def _lane(self, source: int, target: int, tag: int) -> Lane:
        lane = self._lanes.get((source, target, tag & 1))
        if lane is None:
            raise CommunicationError(f"no NCCL lane from position {source} to {target}: they are no neighbours")
        return lane

    def _message(self, lane: Lane, buffer: Array, way: str) -> Request:
        device = self._device
        device.fork(lane.stream)
        began = device.mark(lane.stream)
        if buffer.nbytes:
            call = getattr(lane.communicator, way)
            call(_pointer(buffer), buffer.nbytes, self._nccl.NCCL_UINT8, lane.peer, lane.stream.ptr)
        ended = device.mark(lane.stream)
        return NcclRequest(device, began, ended, device.event(lane.stream), (buffer,))

    # ---- collectives -----------------------------------------------------------------------------------------------

    def collective(self, operation: str, arguments: tuple[Any, ...], begin: Begin) -> Request:
        """Start it on this channel."""
        return begin(self, arguments)

    def all_reduce(self, buffer: Array, op: ReduceOp, *, blocking: bool) -> Request:
        """Reduce in place."""
        place, kind, reduction = _pointer(buffer), self._type(buffer), self._op(op)

        def call(stream: int) -> None:
            self._all.allReduce(place, place, buffer.size, kind, reduction, stream)

        return self._run(call, buffer, blocking=blocking)

    def all_gather(self, send: Array | None, recv: Array, counts: Sequence[int], *, blocking: bool) -> Request:
        """Concatenate parts."""
        item, starts, target = recv.dtype.itemsize, offsets(counts), _pointer(recv)
        own = target + starts[self.rank] * item if send is None else _pointer(send)

        def call(stream: int) -> None:
            if min(counts) == max(counts):
                self._all.allGather(own, target, counts[0] * item, self._nccl.NCCL_UINT8, stream)
                return
            self._nccl.groupStart()
            for root, count in enumerate(counts):
                if count:
                    slot = target + starts[root] * item
                    source = own if root == self.rank else slot
                    self._all.broadcast(source, slot, count * item, self._nccl.NCCL_UINT8, root, stream)
            self._nccl.groupEnd()

        return self._run(call, recv if send is None else send, recv, blocking=blocking)

    def reduce_scatter(
        self, send: Array, recv: Array, counts: Sequence[int], op: ReduceOp, *, blocking: bool
    ) -> Request:
        """Reduce and keep one part."""
        item, starts, kind, reduction = send.dtype.itemsize, offsets(counts), self._type(send), self._op(op)
        source, target = _pointer(send), _pointer(recv)

        def call(stream: int) -> None:
            if min(counts) == max(counts):
                self._all.reduceScatter(source, target, counts[0], kind, reduction, stream)
                return
            self._nccl.groupStart()
            for root, count in enumerate(counts):
                if count:
                    part = source + starts[root] * item
                    self._all.reduce(part, target if root == self.rank else 0, count, kind, reduction, root, stream)
            self._nccl.groupEnd()

        return self._run(call, send, recv, blocking=blocking)

    def all_to_all(
        self, send: Array, recv: Array, send_counts: Sequence[int], recv_counts: Sequence[int], *, blocking: bool
    ) -> Request:
        """Exchange parts: a group of sends and receives, the one to itself included."""
        item, byte = send.dtype.itemsize, self._nccl.NCCL_UINT8
        outward, inward = offsets(send_counts), offsets(recv_counts)
        source, target = _pointer(send), _pointer(recv)

        def call(stream: int) -> None:
            self._nccl.groupStart()
            for peer in range(self.size):
                if send_counts[peer]:
                    self._all.send(source + outward[peer] * item, send_counts[peer] * item, byte, peer, stream)
                if recv_counts[peer]:
                    self._all.recv(target + inward[peer] * item, recv_counts[peer] * item, byte, peer, stream)
            self._nccl.groupEnd()

        return self._run(call, send, recv, blocking=blocking)

    def broadcast(self, buffer: Array, root: int, *, blocking: bool) -> Request:
        """Copy the root's buffer."""
        place, byte = _pointer(buffer), self._nccl.NCCL_UINT8

        def call(stream: int) -> None:
            self._all.broadcast(place, place, buffer.nbytes, byte, root, stream)

        return self._run(call, buffer, blocking=blocking)

    def barrier(self) -> None:
        """Meet the other ranks, on the hosts."""
        self._host.barrier()

    def _run(self, call: Callable[[int], None], *buffers: Array, blocking: bool) -> Request:
        """Enqueue a collective: on the compute stream, or beside it."""
        device = self._device
        if blocking:
            call(device.compute.ptr)
            return DONE
        device.fork(self._side)
        began = device.mark(self._side)
        call(self._side.ptr)
        ended = device.mark(self._side)
        return NcclRequest(device, began, ended, device.event(self._side), buffers)

    def _type(self, array: Array) -> int:
        """NCCL's name of a type that is summed."""
        nccl = self._nccl
        kinds = {
            "float64": nccl.NCCL_FLOAT64, "float32": nccl.NCCL_FLOAT32, "float16": nccl.NCCL_FLOAT16,
            "bfloat16": nccl.NCCL_BFLOAT16, "int32": nccl.NCCL_INT32, "int64": nccl.NCCL_INT64,
            "uint8": nccl.NCCL_UINT8, "uint64": nccl.NCCL_UINT64,
        }  # fmt: skip
        return int(kinds[array.dtype.name])

    def _op(self, op: ReduceOp) -> int:
        return int(self._nccl.NCCL_SUM if op == "sum" else self._nccl.NCCL_MAX)


def _pointer(array: Array) -> int:
    """Address of a contiguous device array."""
    return int(array.data.ptr)  # type: ignore[attr-defined]
