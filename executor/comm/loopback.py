"""Ranks as threads of one process: the same semantics as MPI, checked more strictly.

Messages and collectives meet in a `Fabric` under one lock. Because the fabric sees every rank, a deadlock is not a
time-out but a fact: as soon as every living rank waits for something that none of the others can bring about, all of
them end with a list of who waits for what. Collectives are computed in rank order by the last rank to arrive, after
checking that all ranks asked for the same.

An ordinary send copies its message at once, as an unlimited eager buffer would. A synchronous send hands over a
reference and copies when the receiver arrives, so a sender that overwrites its buffer too early shows up as wrong data.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from executor.comm.base import DONE, Array, CommunicationError, ReduceOp, Request
from executor.comm.communicator import Communicator
from executor.comm.fabric import Fabric, Part, Pending, RankAbortedError

Result = TypeVar("Result")


class LoopbackChannel:
    """The operations of `base.Channel` among threads.

    Args:
        fabric: what the ranks share.
        ranks: the group's members.
        rank: this rank's position.
        axis: the group's axis, which keeps apart groups of the same members.
    """

    def __init__(self, fabric: Fabric, ranks: tuple[int, ...], rank: int, axis: str) -> None:
        self.rank = rank
        self.size = len(ranks)
        self._fabric = fabric
        self._ranks = ranks
        self._axis = axis
        self._sequence = 0

    def isend(self, buffer: Array, peer: int, tag: int, *, synchronous: bool) -> Request:
        """Start a send."""
        send = self._pending(f"send to rank {self._ranks[peer]}, tag {tag}", buffer)
        self._fabric.post_send((self._axis, self._ranks, self.rank, peer, tag), send, synchronous=synchronous)
        return send

    def irecv(self, buffer: Array, peer: int, tag: int) -> Request:
        """Start a receive."""
        receive = self._pending(f"receive from rank {self._ranks[peer]}, tag {tag}", buffer)
        self._fabric.post_receive((self._axis, self._ranks, peer, self.rank, tag), receive)
        return receive

    def all_reduce(self, buffer: Array, op: ReduceOp, *, blocking: bool) -> Request:
        """Reduce in place."""
        return self._join("all_reduce", (buffer, op), blocking)

    def all_gather(self, send: Array | None, recv: Array, counts: Sequence[int], *, blocking: bool) -> Request:
        """Concatenate parts."""
        return self._join("all_gather", (send, recv, list(counts)), blocking)

    def reduce_scatter(
        self, send: Array, recv: Array, counts: Sequence[int], op: ReduceOp, *, blocking: bool
    ) -> Request:
        """Reduce and keep one part."""
        return self._join("reduce_scatter", (send, recv, list(counts), op), blocking)

    def all_to_all(
        self, send: Array, recv: Array, send_counts: Sequence[int], recv_counts: Sequence[int], *, blocking: bool
    ) -> Request:
        """Exchange parts."""
        return self._join("all_to_all", (send, recv, send_counts, recv_counts), blocking)

    def broadcast(self, buffer: Array, root: int, *, blocking: bool) -> Request:
        """Copy the root's buffer."""
        return self._join("broadcast", (buffer, root), blocking)

    def barrier(self) -> None:
        """Meet the other ranks."""
        self._join("barrier", (), blocking=True)

    def _pending(self, what: str, buffer: Array | None = None) -> Pending:
        return Pending(self._fabric, self._ranks[self.rank], f"{self._axis} {what}", buffer)

    def _join(self, operation: str, arguments: tuple[Any, ...], blocking: bool) -> Request:
        self._sequence += 1
        pending = self._pending(f"{operation} of ranks {self._ranks}, number {self._sequence}")
        meeting = (self._axis, self._ranks, self._sequence)
        self._fabric.join_collective(meeting, self.rank, self.size, Part(pending, operation, arguments))
        if blocking:
            pending.wait()
            return DONE
        return pending


class LoopbackTransport:
    """One rank's access to a fabric.

    Args:
        fabric: what the ranks share.
        rank: this rank.
    """

    takes_device_pointers = False
    library = "the in-process transport"

    def __init__(self, fabric: Fabric, rank: int) -> None:
        self.rank = rank
        self.size = fabric.size
        self._fabric = fabric

    def channel(self, ranks: tuple[int, ...], axis: str) -> LoopbackChannel:
        """Connect a group."""
        return LoopbackChannel(self._fabric, ranks, ranks.index(self.rank), axis)


def run_loopback(
    size: int,
    main: Callable[[Communicator], Result],
    *,
    synchronous_sends: bool = False,
    paranoid: bool = False,
    paranoid_timeout_seconds: float = 30.0,
    timeout_seconds: float = 60.0,
) -> list[Result]:
    """Run a program on ranks that are threads, and return what each rank returned.

    Args:
        size: number of ranks.
        main: the program; it gets its rank's communicator.
        synchronous_sends: as in `Communicator`.
        paranoid: as in `Communicator`.
        paranoid_timeout_seconds: as in `Communicator`.
        timeout_seconds: when to give up on ranks that compute for ever; waiting for ever is found without it.

    Raises:
        Exception: the first one that any rank raised, with a note saying which rank; the other ranks end with
            RankAbortedError at their next communication call.
        CommunicationError: the ranks deadlocked, or the time was up.
    """
    fabric = Fabric(size)
    results: dict[int, Result] = {}

    def run_rank(rank: int) -> None:
        try:
            comm = Communicator(
                LoopbackTransport(fabric, rank),
                synchronous_sends=synchronous_sends,
                paranoid=paranoid,
                paranoid_timeout_seconds=paranoid_timeout_seconds,
            )
            results[rank] = main(comm)
        except RankAbortedError:
            pass
        except BaseException as error:  # a rank's every end must reach the others
            fabric.fail(rank, error)
        finally:
            fabric.leave(rank)

    threads = [
        threading.Thread(target=run_rank, args=(rank,), name=f"rank {rank}", daemon=True) for rank in range(size)
    ]
    deadline = time.monotonic() + timeout_seconds
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    late = [rank for rank, thread in enumerate(threads) if thread.is_alive()]
    if late and fabric.failure is None:
        fabric.fail(None, CommunicationError(f"ranks {late} did not finish within {timeout_seconds:g} seconds"))
    if fabric.failure is not None:
        rank, error = fabric.failure
        if rank is not None:
            error.add_note(f"raised on rank {rank} of {size}")
        raise error
    return [results[rank] for rank in range(size)]
