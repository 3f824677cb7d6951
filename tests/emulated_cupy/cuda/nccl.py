"""NCCL among ranks that are threads: late, in order, and as unforgiving as the real one.

An operation runs when all ranks of its communicator have enqueued theirs and each is next on its stream. Operations of
one communicator run in the order in which each rank gave them to it, whatever their streams.
"""

from __future__ import annotations

import ctypes
import itertools
import threading

import numpy as np

from emulated_cupy import memory, streams

available = True
NCCL_INT8, NCCL_UINT8, NCCL_INT32, NCCL_INT64, NCCL_UINT64, NCCL_FLOAT16, NCCL_FLOAT32, NCCL_FLOAT64, NCCL_BFLOAT16 = (
    0, 1, 2, 4, 5, 6, 7, 8, 9,
)  # fmt: skip
NCCL_SUM, NCCL_MAX = 0, 2
TYPES = {
    NCCL_UINT8: "u1", NCCL_INT32: "i4", NCCL_INT64: "i8", NCCL_UINT64: "u8", NCCL_FLOAT16: "f2", NCCL_FLOAT32: "f4",
    NCCL_FLOAT64: "f8",
}  # fmt: skip
_ids = itertools.count(1)
_worlds: dict[bytes, World] = {}
_group = threading.local()


def get_unique_id():
    return next(_ids).to_bytes(8, "little").ljust(128, b"\0")


class World:
    """What the members of a communicator share."""

    def __init__(self, size):
        self.size = size
        self.joined = 0
        self.calls = {}  # key -> {rank: Call}


class Call:
    """One rank's part in an operation; `item` is what stands in its stream's queue."""

    def __init__(self, world, key, rank, needed, arguments, carry_out):
        self.world, self.key, self.rank, self.needed = world, key, rank, needed
        self.arguments, self.carry_out, self.finished, self.item = arguments, carry_out, False, None
        self.previous = None  # the rank's call before this one on the same communicator


class Item:
    """A call, or a group of them, in a stream's queue."""

    def __init__(self, stream, calls):
        self.stream, self.calls = stream, calls
        for call in calls:
            call.item = self
        with streams.moved:
            self.place = stream.given
            for call in calls:
                call.world.calls.setdefault(call.key, {})[call.rank] = call
            stream.append(self)

    def is_next(self):
        if self.stream.run == self.place:
            return True
        return self.stream.advance(self.place)

    def __call__(self):
        tried = [call.finished or self._try(call) for call in self.calls]  # each of a group, whatever the others do
        return all(tried)

    @staticmethod
    def _try(call):
        parts = call.world.calls[call.key]
        if len(parts) < call.needed or not all(map(Item._comes_next, parts.values())):
            return False
        if not all(part is call or part.item.is_next() for part in parts.values()):
            return False
        call.carry_out({rank: part.arguments for rank, part in parts.items()})
        for part in parts.values():
            part.finished = True
        return True

    @staticmethod
    def _comes_next(call):
        """A communicator's operations run in the order given; one of another stream is made to run first."""
        before = call.previous
        if before is not None and not before.finished and before.item is not call.item:
            before.item.stream.advance(before.item.place + 1)
        return before is None or before.finished or before.item is call.item


def groupStart():
    _group.calls = []


def groupEnd():
    calls, _group.calls = _group.calls, None
    for stream in dict.fromkeys(stream for stream, _ in calls):
        _enqueue(stream, [call for own, call in calls if own is stream])


def _enqueue(stream, calls):
    used = [memory.find(pointer) for call in calls for pointer in call.reads + call.writes if pointer]
    assert None not in used, "NCCL was given an address outside the device's memory"
    if stream.is_current:
        stream.note(used)
    else:
        stream.require_order(used)
    Item(stream, calls)
    if stream.is_current:
        stream.force()
    else:
        stream.note_writes([memory.find(pointer) for call in calls for pointer in call.writes if pointer])


def _memory(pointer, count, kind):
    dtype = _dtype(kind)
    raw = (ctypes.c_ubyte * (count * dtype.itemsize)).from_address(pointer)
    return np.frombuffer(raw, dtype)


def _dtype(kind):
    if kind == NCCL_BFLOAT16:
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(TYPES[kind])


def _reduced(arrays, op):
    total = arrays[0].astype(np.float64 if arrays[0].dtype.kind in "fV" else arrays[0].dtype)
    for array in arrays[1:]:
        total = total + array if op == NCCL_SUM else np.maximum(total, array)
    return total.astype(arrays[0].dtype)


class NcclCommunicator:
    """CuPy's: `NcclCommunicator(ndev, commId, rank)` returns when all ranks have called."""

    def __init__(self, ndev, commId, rank):
        assert isinstance(commId, bytes) and len(commId) == 128, "a unique id is 128 bytes"
        with streams.moved:
            self.world = _worlds.setdefault(commId, World(ndev))
            self.world.joined += 1
            streams.moved.notify_all()
            if not streams.moved.wait_for(lambda: self.world.joined >= ndev, timeout=streams.WAIT_SECONDS):
                raise TimeoutError(f"only {self.world.joined} of {ndev} ranks make a communicator")
        self.rank, self.size = rank, ndev
        self.counts, self.last = {}, None

    def _call(self, kind, needed, arguments, carry_out, stream):
        number = self.counts[kind] = self.counts.get(kind, 0) + 1
        call = Call(self.world, (kind, number), self.rank, needed, arguments, carry_out)
        call.reads, call.writes = arguments[:1], arguments[1:]
        self._start(call, stream)

    def _start(self, call, stream):
        call.previous, self.last = self.last, call
        own = streams.streams_by_ptr[stream]
        if getattr(_group, "calls", None) is not None:
            _group.calls.append((own, call))
        else:
            _enqueue(own, [call])

    def allReduce(self, sendbuf, recvbuf, count, datatype, op, stream):
        def carry_out(parts):
            total = _reduced([_memory(a[0], count, datatype) for _, a in sorted(parts.items())], op)
            for _, target in parts.values():
                _memory(target, count, datatype)[...] = total

        self._call(("collective",), self.size, (sendbuf, recvbuf), carry_out, stream)

    def allGather(self, sendbuf, recvbuf, count, datatype, stream):
        def carry_out(parts):
            values = [_memory(a[0], count, datatype).copy() for _, a in sorted(parts.items())]
            for _, target in parts.values():
                _memory(target, count * self.size, datatype)[...] = np.concatenate(values)

        self._call(("collective",), self.size, (sendbuf, recvbuf), carry_out, stream)

    def reduceScatter(self, sendbuf, recvbuf, recvcount, datatype, op, stream):
        def carry_out(parts):
            wholes = [_memory(a[0], recvcount * self.size, datatype) for _, a in sorted(parts.items())]
            total = _reduced(wholes, op)
            for rank, (_, target) in parts.items():
                _memory(target, recvcount, datatype)[...] = total[rank * recvcount : (rank + 1) * recvcount]

        self._call(("collective",), self.size, (sendbuf, recvbuf), carry_out, stream)

    def broadcast(self, sendbuff, recvbuff, count, datatype, root, stream):
        def carry_out(parts):
            value = _memory(parts[root][0], count, datatype).copy()
            for _, target in parts.values():
                _memory(target, count, datatype)[...] = value

        self._call(("collective",), self.size, (sendbuff, recvbuff), carry_out, stream)

    def reduce(self, sendbuf, recvbuf, count, datatype, op, root, stream):
        def carry_out(parts):
            total = _reduced([_memory(a[0], count, datatype) for _, a in sorted(parts.items())], op)
            _memory(parts[root][1], count, datatype)[...] = total

        self._call(("collective",), self.size, (sendbuf, recvbuf), carry_out, stream)

    def send(self, sendbuf, count, datatype, peer, stream):
        self._message(self.rank, peer, "send", (sendbuf, count, datatype), stream)

    def recv(self, recvbuf, count, datatype, peer, stream):
        self._message(peer, self.rank, "recv", (recvbuf, count, datatype), stream)

    def _message(self, source, target, end, arguments, stream):
        def carry_out(parts):
            (sent, count, datatype), (received, room, _) = parts["send"], parts["recv"]
            assert count == room, f"a message of {count} elements into room for {room}"
            _memory(received, count, datatype)[...] = _memory(sent, count, datatype)

        number = self.counts[end, source, target] = self.counts.get((end, source, target), 0) + 1
        call = Call(self.world, ("message", source, target, number), end, 2, arguments, carry_out)
        call.reads, call.writes = (arguments[:1], ()) if end == "send" else ((), arguments[:1])
        self._start(call, stream)
