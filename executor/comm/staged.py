"""Device arrays over a host transport: device -> pinned host memory -> MPI -> pinned host memory -> device.

MPI is given host memory, so several ranks may share a GPU and any MPI library will do. What a call reads is copied out
on the device's stream `to_host`, what it wrote is copied in on `from_host`; the host waits for the event of that copy
and for nothing else. A collective is carried out whole on the host, by whichever algorithm, as on a CPU.

MPI calls must start in the program's order, the same on all ranks of a group, though copies end at times of their own.
So calls whose operands are on their way out wait in one queue, `StagingQueue`, and leave it in order: when somebody
polls, or all of them before the host blocks in MPI (`flush`), for a peer may be waiting for one of them. `flush` waits
for copies and kernels of this device alone, never for a peer.

A long message is cut into chunks, so that one chunk is copied while the one before it is sent: for n bytes over a copy
engine of bandwidth b and a link of bandwidth w the two take about n / min(b, w) instead of n / b + n / w.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from executor.comm.algorithms import parts_of
from executor.comm.base import DONE, Array, Begin, Channel, InFlight, ReduceOp, Request
from executor.comm.buffers import is_device_array
from executor.device.base import Event
from executor.device.cuda import CudaDevice

CHUNK_BYTES = 4 << 20
"""Large enough that a copy's latency (some 10 microseconds) is lost in its time on PCIe (some 100)."""


MOST_RETURNING = 8
"""Requests whose last copy in may be under way before the host waits for the oldest: pinned memory is bounded."""


@dataclass
class Stage:
    """One MPI call of a request: what must be copied out before it, and what it leaves to copy in."""

    start: Callable[[], Request]
    copied: Event | None
    landings: list[tuple[Array, Array]]  # (pinned, device)
    request: Request | None = None
    landed: bool = False


class StagingQueue:
    """The staged calls of one rank that MPI has not been given yet, in the program's order.

    Args:
        device: whose arrays travel.
    """

    def __init__(self, device: CudaDevice) -> None:
        self.device = device
        self._waiting: deque[Stage] = deque()
        self._returning: deque[tuple[Event, list[Array]]] = deque()

    def put(self, stage: Stage) -> None:
        """Queue a call."""
        self._waiting.append(stage)

    def post(self) -> None:
        """Give MPI the calls whose operands have arrived on the host, in order."""
        while self._waiting and (self._waiting[0].copied is None or self._waiting[0].copied.done):
            self._start(self._waiting.popleft())

    def flush(self) -> None:
        """Give MPI all calls, waiting for their operands."""
        while self._waiting:
            stage = self._waiting.popleft()
            if stage.copied is not None:
                stage.copied.synchronize()
            self._start(stage)

    def _start(self, stage: Stage) -> None:
        stage.request = stage.start()

    def room(self, like: Array) -> Array:
        """Pinned memory for a flat device array's bytes, seen as its type."""
        if len(self._returning) > MOST_RETURNING:
            self._returning[0][0].synchronize()
        while self._returning and self._returning[0][0].done:
            for buffer in self._returning.popleft()[1]:
                self.device.pinned.give(buffer)
        return self.device.pinned.take(like.nbytes)

    def give_back(self, buffers: list[Array], after: Event | None) -> None:
        """Return pinned memory when an event has passed."""
        if after is None:
            for buffer in buffers:
                self.device.pinned.give(buffer)
        else:
            self._returning.append((after, buffers))


@dataclass
class StagedRequest(InFlight):
    """MPI calls on pinned copies of device arrays, and the copies around them."""

    queue: StagingQueue
    free: Event  # behind it the device arrays to be written are no longer used by earlier kernels
    stages: list[Stage] = field(default_factory=list)
    rooms: list[Array] = field(default_factory=list)
    sources: list[Array] = field(default_factory=list)  # kept alive: freed, they would be the next allocation's memory
    began: Any = None
    ended: Any = None
    _arrived: Event | None = None
    _closed: bool = False

    def copy_out(self, source: Array, target: Array) -> None:
        """Enqueue a copy to pinned memory."""
        device = self.queue.device
        if self.began is None:
            device.to_host.wait_event(self.free)
            self.began = device.mark(device.to_host)
        device.copy_to_host(source, target)
        self.sources.append(source)

    def copied(self) -> Event:
        """An event behind the copies enqueued so far."""
        device = self.queue.device
        self.ended = device.mark(device.to_host)
        return device.event(device.to_host)

    def test(self) -> bool:
        """Post what is ready, land what has come; true when the last copy has passed."""
        if self._closed:
            return True
        self.queue.post()
        for stage in self.stages:
            if stage.request is None or not stage.request.test():
                return False
            self._land(stage)
        if self._arrived is not None and not self._arrived.done:
            return False
        self._close(None)
        return True

    def wait(self) -> None:
        """Wait for MPI; the compute stream then waits for the copies in."""
        if self._closed:
            return
        self.queue.flush()
        for stage in self.stages:
            assert stage.request is not None
            stage.request.wait()
            self._land(stage)
        if self._arrived is not None:
            self.queue.device.join(self._arrived)
        self._close(self._arrived)

    def _land(self, stage: Stage) -> None:
        """Enqueue the copies in of a call that has finished."""
        if stage.landed:
            return
        stage.landed = True
        device = self.queue.device
        for source, target in stage.landings:
            if self._arrived is None:
                device.from_host.wait_event(self.free)
                self.began = self.began or device.mark(device.from_host)
            device.copy_from_host(source, target)
            self._arrived = device.event(device.from_host)
        if stage.landings and stage is self.stages[-1]:
            self.ended = device.mark(device.from_host)

    def _close(self, after: Event | None) -> None:
        self._closed = True
        self.queue.give_back(self.rooms, after)
        self.rooms, self.sources = [], []


class StagedChannel:
    """A group's channel for device arrays, over its channel for host arrays.

    Args:
        host: the group's channel for host arrays.
        queue: the rank's.
    """

    def __init__(self, host: Channel, queue: StagingQueue) -> None:
        self.rank, self.size = host.rank, host.size
        self.scratch: list[Array] = []  # composed algorithms run on the host
        self._host, self._queue = host, queue

    def collective(self, operation: str, arguments: tuple[Any, ...], begin: Begin) -> Request:
        """Copy the operands out, carry the collective out on the host, copy the results in."""
        request = self._request()
        pinned = {id(array): self._mirror(request, array) for array in arguments if is_device_array(array)}
        on_host = tuple(pinned.get(id(argument), argument) for argument in arguments)
        reads, writes = OPERANDS[operation](self.rank, arguments), RESULTS[operation](self.rank, arguments)
        host_reads, host_writes = OPERANDS[operation](self.rank, on_host), RESULTS[operation](self.rank, on_host)
        for source, target in zip(reads, host_reads, strict=True):
            if source.size:
                request.copy_out(source, target)
        landings = [(s, t) for s, t in zip(host_writes, writes, strict=True) if t.size]
        stage = Stage(partial(begin, self._host, on_host), request.copied(), landings)
        request.stages.append(stage)
        self._queue.put(stage)
        return request

    def isend(self, buffer: Array, peer: int, tag: int, *, synchronous: bool) -> Request:
        """Copy a message out, chunk by chunk, and send each when it has come."""
        request = self._request()
        mirror = self._mirror(request, buffer)
        for part, pinned in zip(_chunks(buffer), _chunks(mirror), strict=True):
            if part.size:
                request.copy_out(part, pinned)
            start = partial(self._host.isend, pinned, peer, tag, synchronous=synchronous)
            stage = Stage(start, request.copied(), [])
            request.stages.append(stage)
            self._queue.put(stage)
        self._queue.post()
        return request

    def irecv(self, buffer: Array, peer: int, tag: int) -> Request:
        """Receive a message's chunks and copy each in."""
        request = self._request()
        mirror = self._mirror(request, buffer)
        for part, pinned in zip(_chunks(buffer), _chunks(mirror), strict=True):
            landings = [(pinned, part)] if part.size else []
            request.stages.append(Stage(_started, None, landings, self._host.irecv(pinned, peer, tag)))
        return request

    def all_reduce(self, buffer: Array, op: ReduceOp, *, blocking: bool) -> Request:
        """Reduce in place."""
        return self._native("all_reduce", (buffer, op), blocking)

    def all_gather(self, send: Array | None, recv: Array, counts: Sequence[int], *, blocking: bool) -> Request:
        """Concatenate parts."""
        return self._native("all_gather", (send, recv, counts), blocking)

    def reduce_scatter(
        self, send: Array, recv: Array, counts: Sequence[int], op: ReduceOp, *, blocking: bool
    ) -> Request:
        """Reduce and keep one part."""
        return self._native("reduce_scatter", (send, recv, counts, op), blocking)

    def all_to_all(
        self, send: Array, recv: Array, send_counts: Sequence[int], recv_counts: Sequence[int], *, blocking: bool
    ) -> Request:
        """Exchange parts."""
        return self._native("all_to_all", (send, recv, send_counts, recv_counts), blocking)

    def broadcast(self, buffer: Array, root: int, *, blocking: bool) -> Request:
        """Copy the root's buffer."""
        return self._native("broadcast", (buffer, root), blocking)

    def barrier(self) -> None:
        """Meet the other ranks."""
        self._queue.flush()
        self._host.barrier()

    def _native(self, operation: str, arguments: tuple[Any, ...], blocking: bool) -> Request:
        def begin(channel: Channel, on_host: tuple[Any, ...]) -> Request:
            started: Request = getattr(channel, operation)(*on_host, blocking=blocking)
            return started

        request = self.collective(operation, arguments, begin)
        if blocking:
            request.wait()
        return request

    def _request(self) -> StagedRequest:
        device = self._queue.device
        return StagedRequest(self._queue, device.event(device.compute))

    def _mirror(self, request: StagedRequest, array: Array) -> Array:
        """Pinned memory shaped and typed as a flat device array."""
        room = self._queue.room(array)
        request.rooms.append(room)
        return room[: array.nbytes].view(array.dtype)


def _started() -> Request:
    """Starts nothing: a receive is posted at once, having nothing to wait for."""
    return DONE


def _chunks(buffer: Array) -> list[Array]:
    """A flat message cut where that pays: into pieces of CHUNK_BYTES, from two of them on."""
    if buffer.nbytes < 2 * CHUNK_BYTES:
        return [buffer]
    step = CHUNK_BYTES // buffer.dtype.itemsize
    return [buffer[start : start + step] for start in range(0, buffer.size, step)]


def _gathered(rank: int, arguments: tuple[Any, ...]) -> list[Array]:
    """The own part of an all-gather: a buffer of its own, or its slot. Composed algorithms take no such buffer."""
    *part, whole, counts = arguments
    return [part[0] if part and part[0] is not None else parts_of(whole, counts)[rank]]


Arguments = tuple[Any, ...]
OPERANDS: dict[str, Callable[[int, Arguments], list[Array]]] = {
    "all_reduce": lambda _, a: [a[0]],
    "all_gather": _gathered,
    "reduce_scatter": lambda _, a: [a[0]],
    "all_to_all": lambda _, a: [a[0]],
    "broadcast": lambda rank, a: [a[0]] if rank == a[1] else [],
}
"""What a rank's part in a collective reads, of its arguments as `executor.comm.calls` lists them."""

RESULTS: dict[str, Callable[[int, Arguments], list[Array]]] = {
    "all_reduce": lambda _, a: [a[0]],
    "all_gather": lambda _, a: [a[-2]],
    "reduce_scatter": lambda _, a: [a[1]],
    "all_to_all": lambda _, a: [a[1]],
    "broadcast": lambda rank, a: [] if rank == a[1] else [a[0]],
}
"""What it writes."""
