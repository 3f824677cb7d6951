"""Group: ranks that communicate along one axis; counting, checking and the choice of algorithm."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from executor.comm.algorithms import COMPOSED, Exchange, host_block
from executor.comm.base import (
    DONE,
    NUM_INTERNAL_TAGS,
    NUM_USER_TAGS,
    Array,
    Channel,
    DeviceChannel,
    ReduceOp,
    Request,
    StepRequest,
    in_order,
)
from executor.comm.buffers import Place, copy_own, flat, is_device_array, require_apart
from executor.comm.calls import (
    CollectiveCall,
    all_gather_call,
    all_reduce_call,
    all_to_all_call,
    broadcast_call,
    reduce_scatter_call,
)
from executor.comm.paranoid import Guard
from executor.comm.record import Call, Record


class Elapsed(NamedTuple):
    """A blocking collective taken apart: waiting for the last rank to arrive, and moving bytes."""

    wait_seconds: float
    work_seconds: float


class Group:
    """Ranks that communicate along one axis.

    Buffers are C-contiguous arrays of any shape, of one of the types in `DTYPES`, in host memory or, all of a call, in
    that of the device that the communicator was given; counts are in elements of the
    flattened buffer and may be zero. `key` names the tensor in the counters and must be the same on all ranks of a
    collective. Operations starting with `i` return a Request; a group's collectives, blocking or not, must be started
    in the same order on all its ranks. On a group of one rank nothing reaches the transport and nothing is counted.

    Attributes:
        axis: the mesh axis.
        ranks: the members' numbers in the job.
        rank: this rank's position in the group; peers and roots are positions too.
        size: number of members.
    """

    def __init__(
        self,
        record: Record,
        channel: Channel | None,
        axis: str,
        ranks: tuple[int, ...],
        rank: int,
        device_channel: DeviceChannel | None = None,
    ) -> None:
        self.axis = axis
        self.ranks = ranks
        self.rank = rank
        self.size = len(ranks)
        self._record = record
        self._channel = channel
        self._device_channel = device_channel
        self._sequence = 0
        self._guard = Guard(channel, axis, ranks, record) if record.paranoid and channel is not None else None

    def __repr__(self) -> str:
        return f"Group({self.axis!r}, ranks={self.ranks}, rank={self.rank})"

    @property
    def channel(self) -> Channel:
        """The raw channel, neither checked nor counted; a group of one rank has none."""
        assert self._channel is not None, "a group of one rank communicates with nobody"
        return self._channel

    # Collectives

    def all_reduce(self, buffer: Array, op: ReduceOp = "sum", *, algorithm: str = "native", key: str = "") -> None:
        """Reduce elementwise over the group, in place, leaving the same result on every rank.

        Args:
            buffer: the addend, replaced by the result.
            op: "sum" or "max".
            algorithm: one of `ALGORITHMS["all_reduce"]`.
            key: the tensor's name in the counters.
        """
        self._run(all_reduce_call(self._place("all_reduce", key), buffer, op, algorithm), algorithm, blocking=True)

    def iall_reduce(self, buffer: Array, op: ReduceOp = "sum", *, algorithm: str = "native", key: str = "") -> Request:
        """Start `all_reduce`."""
        return self._run(
            all_reduce_call(self._place("all_reduce", key), buffer, op, algorithm), algorithm, blocking=False
        )

    def all_gather(
        self,
        send: Array | None,
        recv: Array,
        counts: Sequence[int] | None = None,
        *,
        algorithm: str = "native",
        key: str = "",
    ) -> None:
        """Concatenate the ranks' parts in recv, in the order of the group.

        Args:
            send: the own part; None, or the own slot of recv itself, gathers in place.
            recv: room for all parts.
            counts: elements of each rank's part; None means equal parts.
            algorithm: one of `ALGORITHMS["all_gather"]`.
            key: the tensor's name in the counters.
        """
        call = all_gather_call(self._place("all_gather", key), self.rank, send, recv, counts, algorithm)
        self._run(call, algorithm, blocking=True)

    def iall_gather(
        self,
        send: Array | None,
        recv: Array,
        counts: Sequence[int] | None = None,
        *,
        algorithm: str = "native",
        key: str = "",
    ) -> Request:
        """Start `all_gather`."""
        call = all_gather_call(self._place("all_gather", key), self.rank, send, recv, counts, algorithm)
        return self._run(call, algorithm, blocking=False)

    def reduce_scatter(
        self,
        send: Array,
        recv: Array,
        counts: Sequence[int] | None = None,
        op: ReduceOp = "sum",
        *,
        algorithm: str = "native",
        key: str = "",
    ) -> None:
        """Reduce elementwise over the group and leave each rank its part of the result.

        Args:
            send: the whole addend, not modified.
            recv: the own part of the result; must not overlap send.
            counts: elements of each rank's part; None means equal parts.
            op: "sum" or "max".
            algorithm: one of `ALGORITHMS["reduce_scatter"]`.
            key: the tensor's name in the counters.
        """
        call = reduce_scatter_call(self._place("reduce_scatter", key), self.rank, send, recv, counts, op, algorithm)
        self._run(call, algorithm, blocking=True)

    def ireduce_scatter(
        self,
        send: Array,
        recv: Array,
        counts: Sequence[int] | None = None,
        op: ReduceOp = "sum",
        *,
        algorithm: str = "native",
        key: str = "",
    ) -> Request:
        """Start `reduce_scatter`."""
        call = reduce_scatter_call(self._place("reduce_scatter", key), self.rank, send, recv, counts, op, algorithm)
        return self._run(call, algorithm, blocking=False)

    def all_to_all(
        self,
        send: Array,
        recv: Array,
        send_counts: Sequence[int] | None = None,
        recv_counts: Sequence[int] | None = None,
        *,
        algorithm: str = "native",
        key: str = "",
    ) -> None:
        """Send part i of `send` to rank i and receive part j of `recv` from rank j.

        Args:
            send: all outgoing parts, in the order of the group.
            recv: room for all incoming parts; must not overlap send.
            send_counts: elements for each rank; None means equal parts.
            recv_counts: elements from each rank; None means equal parts.
            algorithm: one of `ALGORITHMS["all_to_all"]`.
            key: the tensor's name in the counters.
        """
        place = self._place("all_to_all", key)
        call = all_to_all_call(place, self.rank, send, recv, send_counts, recv_counts, algorithm)
        self._run(call, algorithm, blocking=True)

    def iall_to_all(
        self,
        send: Array,
        recv: Array,
        send_counts: Sequence[int] | None = None,
        recv_counts: Sequence[int] | None = None,
        *,
        algorithm: str = "native",
        key: str = "",
    ) -> Request:
        """Start `all_to_all`."""
        place = self._place("all_to_all", key)
        call = all_to_all_call(place, self.rank, send, recv, send_counts, recv_counts, algorithm)
        return self._run(call, algorithm, blocking=False)

    def broadcast(self, buffer: Array, root: int = 0, *, algorithm: str = "native", key: str = "") -> None:
        """Copy the root's buffer into every rank's.

        Args:
            buffer: what the root sends and the others receive.
            root: the sender's position in the group.
            algorithm: one of `ALGORITHMS["broadcast"]`.
            key: the tensor's name in the counters.
        """
        call = broadcast_call(self._place("broadcast", key), self.rank, buffer, root, algorithm)
        self._run(call, algorithm, blocking=True)

    def barrier(self) -> None:
        """Return when every rank of the group has called."""
        if self.size > 1:
            self._announce("barrier", "", ()).wait()
            self._record.before_blocking()
            self.channel.barrier()

    # Work and wait apart

    def arrive(self) -> float:
        """Wait until all ranks of the group have called, and return how long that took, in seconds.

        A blocking collective makes all ranks take as long as the latest one. Called right before it, this measures the
        waiting alone, so that the collective's own time is the work. The cost is one barrier of empty messages
        (log2 p rounds), included in the returned seconds.
        """
        start = time.perf_counter()
        if self.size > 1:
            self._record.before_blocking()
            self.channel.barrier()
        return time.perf_counter() - start

    def timed(self, collective: Callable[[], None]) -> Elapsed:
        """Carry out a blocking collective of this group and return its wait and work seconds."""
        wait_seconds = self.arrive()
        start = time.perf_counter()
        collective()
        return Elapsed(wait_seconds, time.perf_counter() - start)

    # Messages

    def isend(
        self, buffer: Array, peer: int, tag: int = 0, *, key: str = "", synchronous: bool | None = None
    ) -> Request:
        """Start sending a buffer; messages of one (sender, receiver, tag) arrive in the order sent.

        Args:
            buffer: the message; not to be modified before the request has finished.
            peer: the receiver's position in the group.
            tag: in [0, 2^24).
            key: the tensor's name in the counters.
            synchronous: finish only after the receiver has arrived; None follows the communicator's setting.
        """
        data = self._message(buffer, peer, tag, "send", key)
        self._record.counters.add(self.axis, "send", key, data.nbytes)
        if synchronous is None:
            synchronous = self._record.synchronous_sends
        return self._channel_of(data).isend(data, peer, tag, synchronous=synchronous)

    def issend(self, buffer: Array, peer: int, tag: int = 0, *, key: str = "") -> Request:
        """Start a synchronous send: its request finishes only after the receiver has arrived."""
        return self.isend(buffer, peer, tag, key=key, synchronous=True)

    def irecv(self, buffer: Array, peer: int, tag: int = 0, *, key: str = "") -> Request:
        """Start receiving a message of exactly the buffer's bytes; a shorter or longer one is an error.

        Args:
            buffer: where the message goes; not to be touched before the request has finished.
            peer: the sender's position in the group.
            tag: in [0, 2^24).
            key: the tensor's name in the log.
        """
        data = self._message(buffer, peer, tag, "recv", key)
        return self._channel_of(data).irecv(data, peer, tag)

    def iring_shift(self, send: Array, recv: Array, shift: int = 1, tag: int = 0, *, key: str = "") -> Request:
        """Start sending to the rank `shift` positions on round the ring, and receiving from the one as far behind.

        Args:
            send: the outgoing block; must not overlap recv.
            recv: the incoming block; blocks of different ranks may differ in size.
            shift: positions, negative for backwards (the adjoint of a shift is the opposite shift).
            tag: in [0, 2^24).
            key: the tensor's name in the counters.
        """
        place = self._place("ring_shift", key)
        outward, inward = flat(send, place), flat(recv, place, written=True)
        if shift % self.size == 0:
            copy_own(outward, inward, place)
            return DONE
        require_apart(outward, inward, place)
        incoming = self.irecv(inward, (self.rank - shift) % self.size, tag, key=key)
        outgoing = self.isend(outward, (self.rank + shift) % self.size, tag, key=key)
        return StepRequest(in_order(incoming, outgoing))

    def ring_shift(self, send: Array, recv: Array, shift: int = 1, tag: int = 0, *, key: str = "") -> None:
        """Carry out `iring_shift`."""
        self.iring_shift(send, recv, shift, tag, key=key).wait()

    def gather_words(self, word: int) -> list[int]:
        """Return every rank's 64-bit word, uncounted: for checks of the program, not for its data."""
        words = np.zeros(self.size, np.uint64)
        words[self.rank] = word
        if self.size > 1:
            self._record.before_blocking()
            self.channel.all_gather(None, words, [1] * self.size, blocking=True)
        return [int(each) for each in words]

    # How a collective is validated and started

    def _run(self, call: CollectiveCall, algorithm: str, *, blocking: bool) -> Request:
        """Count and announce a validated collective, then start the library's own or a composed one."""
        if self.size == 1:
            return DONE
        operation = call.place.operation
        self._record.counters.add(self.axis, operation, call.place.key, call.payload_bytes)
        check = self._announce(operation, call.place.key, (*call.detail, algorithm))
        if blocking:
            check.wait()
        how = (operation, algorithm, self._sequence % NUM_INTERNAL_TAGS, blocking)
        if self._device_channel is not None and any(map(is_device_array, call.arguments[:2])):
            request = self._device_channel.collective(operation, call.arguments, partial(self._begin, *how))
        else:
            if blocking:
                self._record.before_blocking()
            request = self._begin(*how, self.channel, call.arguments)
        if blocking:
            request.wait()
        return request if check is DONE else StepRequest(in_order(check, request))

    def _begin(
        self, operation: str, algorithm: str, tag: int, blocking: bool, channel: Channel, arguments: tuple[Any, ...]
    ) -> Request:
        """Start a collective on a channel: the library's own, or a composed one."""
        if algorithm == "native":
            native: Callable[..., Request] = getattr(channel, operation)
            return native(*arguments, blocking=blocking)
        synchronous, on_device = self._record.synchronous_sends, channel is self._device_channel
        exchange = Exchange(
            channel,
            tag,
            synchronous=synchronous,
            blocking=blocking,
            pool=self._device_channel.scratch if self._device_channel and on_device else self._record.scratch,
            allocate=self._record.device.allocate if self._record.device and on_device else host_block,
        )
        return StepRequest(exchange.finish(COMPOSED[operation][algorithm](exchange, *arguments)))

    def _channel_of(self, data: Array) -> Channel:
        """The channel for a message: host arrays may be sent beside those of a device."""
        if self._device_channel is not None and is_device_array(data):
            return self._device_channel
        return self.channel

    def _announce(self, operation: str, key: str, detail: tuple[object, ...]) -> Request:
        """Log a collective; return the check that all ranks of the group start the same one."""
        self._sequence += 1
        self._record.log.append(Call(self.axis, operation, key, detail))
        if self._guard is None:
            return DONE
        return self._guard.start(self._sequence, (operation, key, *detail))

    def _message(self, buffer: Array, peer: int, tag: int, operation: str, key: str) -> Array:
        """Validate and log one end of a message."""
        place = self._place(operation, key)
        data = flat(buffer, place, written=operation == "recv")
        if not 0 <= peer < self.size or peer == self.rank:
            raise place.error(f"position {peer} is no other member")
        if not 0 <= tag < NUM_USER_TAGS:
            raise place.error(f"tag {tag} is outside [0, {NUM_USER_TAGS})")
        self._record.log.append(Call(self.axis, operation, key, (data.dtype.str, buffer.shape, f"peer {peer}")))
        return data

    def _place(self, operation: str, key: str) -> Place:
        return Place(self.axis, self.ranks, operation, key)
