"""Where ranks that are threads meet: messages and collectives in flight, deadlock detection, the first failure."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from executor.comm.base import UFUNCS, Array, CommunicationError, offsets_of


class RankAbortedError(Exception):
    """Raised in the other ranks when one rank has failed."""


class Pending:
    """One end of an operation, owned by a rank; `done` changes under the fabric's lock."""

    def __init__(self, fabric: Fabric, owner: int, what: str, buffer: Array | None = None) -> None:
        self.fabric = fabric
        self.owner = owner
        self.what = what
        self.buffer = buffer
        self.done = False

    def test(self) -> bool:
        """Return whether the operation has finished."""
        with self.fabric.lock:
            self.fabric.raise_if_failed()
            done = self.done
        if not done:
            time.sleep(0)  # let the thread that could finish it run
        return done

    def wait(self) -> None:
        """Wait for the operation, or for the failure or deadlock that prevents it."""
        with self.fabric.lock:
            self.fabric.block(self)


class Part(NamedTuple):
    """What one rank brings to a collective."""

    pending: Pending
    operation: str
    arguments: tuple[Any, ...]


class Fabric:
    """What the ranks share: messages and collectives in flight, who waits, and who failed first.

    Args:
        size: number of ranks.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.lock = threading.RLock()
        self.failure: tuple[int | None, BaseException] | None = None
        self._wake = [threading.Condition(self.lock) for _ in range(size)]
        self._alive = set(range(size))
        self._waiting: dict[int, Pending] = {}
        self._sends: dict[tuple[object, ...], deque[Pending]] = {}
        self._receives: dict[tuple[object, ...], deque[Pending]] = {}
        self._collectives: dict[tuple[object, ...], dict[int, Part]] = {}

    def raise_if_failed(self) -> None:
        """Raise RankAbortedError once any rank has failed."""
        if self.failure is not None:
            rank, error = self.failure
            where = "the job" if rank is None else f"rank {rank}"
            raise RankAbortedError(f"{where} failed: {type(error).__name__}: {error}")

    def fail(self, rank: int | None, error: BaseException) -> None:
        """Record the first failure and wake everybody."""
        with self.lock:
            if self.failure is None:
                self.failure = (rank, error)
            for condition in self._wake:
                condition.notify_all()

    def leave(self, rank: int) -> None:
        """Note that a rank has returned; those that wait for it now may wait for nothing."""
        with self.lock:
            self._alive.discard(rank)
            self._fail_if_deadlocked()

    def block(self, pending: Pending) -> None:
        """Wait, under the lock, until an operation is done."""
        rank = pending.owner
        while not pending.done:
            self.raise_if_failed()
            self._waiting[rank] = pending
            self._fail_if_deadlocked()
            if self.failure is None:
                self._wake[rank].wait()
            del self._waiting[rank]
        self.raise_if_failed()

    def post_send(self, mailbox: tuple[object, ...], send: Pending, *, synchronous: bool) -> None:
        """Hand a message to its receiver, or leave it until the receiver arrives."""
        assert send.buffer is not None
        with self.lock:
            self.raise_if_failed()
            receives = self._receives.get(mailbox)
            if receives:
                self._transfer(send, receives.popleft())
                return
            if not synchronous:
                send.buffer = send.buffer.copy()
                send.done = True
            self._sends.setdefault(mailbox, deque()).append(send)

    def post_receive(self, mailbox: tuple[object, ...], receive: Pending) -> None:
        """Take the oldest message of a mailbox, or wait in line for it."""
        with self.lock:
            self.raise_if_failed()
            sends = self._sends.get(mailbox)
            if sends:
                self._transfer(sends.popleft(), receive)
            else:
                self._receives.setdefault(mailbox, deque()).append(receive)

    def join_collective(self, meeting: tuple[object, ...], position: int, size: int, part: Part) -> None:
        """Bring one rank's part; the last one to arrive carries the collective out."""
        with self.lock:
            self.raise_if_failed()
            parts = self._collectives.setdefault(meeting, {})
            parts[position] = part
            if len(parts) < size:
                return
            del self._collectives[meeting]
            ordered = [parts[position] for position in range(size)]
            _carry_out(ordered)
            for each in ordered:
                self._finish(each.pending)

    def _transfer(self, send: Pending, receive: Pending) -> None:
        assert send.buffer is not None
        assert receive.buffer is not None
        if send.buffer.size != receive.buffer.size or send.buffer.dtype != receive.buffer.dtype:
            raise CommunicationError(
                f"{send.what} carries {send.buffer.size} elements of {send.buffer.dtype}, "
                f"{receive.what} expects {receive.buffer.size} of {receive.buffer.dtype}"
            )
        np.copyto(receive.buffer, send.buffer)
        self._finish(send)
        self._finish(receive)

    def _finish(self, pending: Pending) -> None:
        pending.done = True
        self._wake[pending.owner].notify_all()

    def _fail_if_deadlocked(self) -> None:
        """Fail the job if every living rank waits and nothing they wait for has happened."""
        if len(self._waiting) < len(self._alive) or not self._waiting:
            return
        if any(pending.done for pending in self._waiting.values()):
            return
        lines = [f"  rank {rank} waits for {pending.what}" for rank, pending in sorted(self._waiting.items())]
        ended = sorted(set(range(self.size)) - self._alive)
        lines += [f"  rank {rank} has returned" for rank in ended]
        self.fail(None, CommunicationError("deadlock: no rank can go on\n" + "\n".join(lines)))


def _carry_out(parts: list[Part]) -> None:
    """Compute a collective for all its ranks, in rank order."""
    operations = [part.operation for part in parts]
    if len(set(operations)) > 1:
        calls = ", ".join(part.pending.what for part in parts)
        raise CommunicationError(f"ranks of one group started different collectives: {calls}")
    _COLLECTIVES[operations[0]]([part.arguments for part in parts])


def _require_equal(what: str, values: list[Any]) -> None:
    if any(value != values[0] for value in values):
        raise CommunicationError(f"ranks of one group disagree on {what}: {values}")


def _reduced(buffers: list[Array], op: str) -> Array:
    _require_equal("shape and type of a reduction", [(buffer.shape, buffer.dtype.str) for buffer in buffers])
    total = buffers[0].copy()
    for buffer in buffers[1:]:
        UFUNCS[op](total, buffer, out=total)
    return total


def _all_reduce(arguments: list[tuple[Any, ...]]) -> None:
    _require_equal("the reduction", [op for _, op in arguments])
    total = _reduced([buffer for buffer, _ in arguments], arguments[0][1])
    for buffer, _ in arguments:
        np.copyto(buffer, total)


def _all_gather(arguments: list[tuple[Any, ...]]) -> None:
    counts = arguments[0][2]
    _require_equal("the counts of an all-gather", [each for _, _, each in arguments])
    _require_equal("the type of an all-gather", [recv.dtype.str for _, recv, _ in arguments])
    offsets = offsets_of(counts)
    whole = arguments[0][1].copy()
    for rank, (send, recv, _) in enumerate(arguments):
        slot = slice(offsets[rank], offsets[rank + 1])
        whole[slot] = recv[slot] if send is None else send
    for _, recv, _ in arguments:
        np.copyto(recv, whole)


def _reduce_scatter(arguments: list[tuple[Any, ...]]) -> None:
    _require_equal("counts and reduction of a reduce-scatter", [each[2:] for each in arguments])
    total = _reduced([send for send, *_ in arguments], arguments[0][3])
    offsets = offsets_of(arguments[0][2])
    for rank, (_, recv, *_) in enumerate(arguments):
        np.copyto(recv, total[offsets[rank] : offsets[rank + 1]])


def _all_to_all(arguments: list[tuple[Any, ...]]) -> None:
    _require_equal("the type of an all-to-all", [send.dtype.str for send, *_ in arguments])
    leaving = [offsets_of(send_counts) for _, _, send_counts, _ in arguments]
    for rank, (_, recv, _, recv_counts) in enumerate(arguments):
        sent = [offsets[rank + 1] - offsets[rank] for offsets in leaving]
        _require_equal(f"what rank {rank} of the group receives in an all-to-all", [sent, list(recv_counts)])
        parts = [
            send[offsets[rank] : offsets[rank + 1]] for (send, *_), offsets in zip(arguments, leaving, strict=True)
        ]
        np.concatenate(parts, out=recv)


def _broadcast(arguments: list[tuple[Any, ...]]) -> None:
    _require_equal("the root of a broadcast", [root for _, root in arguments])
    _require_equal("shape and type of a broadcast", [(buffer.shape, buffer.dtype.str) for buffer, _ in arguments])
    source = arguments[arguments[0][1]][0]
    for buffer, _ in arguments:
        if buffer is not source:
            np.copyto(buffer, source)


def _barrier(arguments: list[tuple[Any, ...]]) -> None:
    """Nothing moves: meeting was the point."""


_COLLECTIVES: dict[str, Callable[[list[tuple[Any, ...]]], None]] = {
    "all_reduce": _all_reduce,
    "all_gather": _all_gather,
    "reduce_scatter": _reduce_scatter,
    "all_to_all": _all_to_all,
    "broadcast": _broadcast,
    "barrier": _barrier,
}
