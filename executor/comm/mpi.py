"""The MPI transport, and how a job ends: the only module of the package that imports mpi4py.

Plain Python leaves the other ranks hanging when one raises. `run_under_mpi` ends the job at once: a traceback of the
rank that failed and `MPI_Abort` for our mistakes; for the user's mistakes one message and exit code 2.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
import time
import traceback
import zlib
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import mpi4py

# Only the main thread communicates; a lower thread level spares every call the library's locks.
mpi4py.rc.thread_level = "funneled"

import numpy as np  # noqa: E402
from mpi4py import MPI  # noqa: E402

from executor.comm.base import DONE, MAX_TAG, Array, CommunicationError, ReduceOp, Request  # noqa: E402
from executor.comm.communicator import Communicator  # noqa: E402
from planner.errors import MeshwrightError  # noqa: E402

_OPS = {"sum": MPI.SUM, "max": MPI.MAX}
_USER_ERROR = 2
_OWN_ERROR = 1
# Tag of the messages by which ranks that end early find one another; nothing else travels on COMM_WORLD itself.
_VERDICT_TAG = 1
_VERDICT_SECONDS = 1.5
_FINALIZE_SECONDS = 2.0

# The communicators of this process, for what a failing rank was doing last.
_communicators: list[Communicator] = []


class _Started:
    """A send or a collective under way.

    It keeps the buffers alive: mpi4py does not in every non-blocking call, and memory that is freed too early is soon
    another array's.
    """

    def __init__(self, request: MPI.Request, *buffers: object) -> None:
        self._request = request
        self._buffers: tuple[object, ...] = buffers

    def test(self) -> bool:
        if self._request.Test():
            self._buffers = ()
            return True
        return False

    def wait(self) -> None:
        self._request.Wait()
        self._buffers = ()


class _Receive:
    """A receive under way that insists on the full message: MPI accepts a shorter one without a word."""

    def __init__(self, request: MPI.Request, buffer: Array, source: str) -> None:
        self._request = request
        self._buffer = buffer  # kept alive until it is full
        self._source = source
        self._status = MPI.Status()
        self._checked = False

    def test(self) -> bool:
        if self._checked:
            return True
        if self._request.Test(self._status):
            self._check()
        return self._checked

    def wait(self) -> None:
        if not self._checked:
            self._request.Wait(self._status)
            self._check()

    def _check(self) -> None:
        self._checked = True
        arrived = self._status.Get_count(MPI.BYTE)
        if arrived != self._buffer.nbytes:
            raise CommunicationError(f"message from {self._source} has {arrived} bytes, expected {self._buffer.nbytes}")


class MpiChannel:
    """The operations of `base.Channel` over one MPI communicator.

    Args:
        comm: an intracommunicator of the group's members, in the group's order.
        crowded: whether ranks outnumber cores. MPI libraries wait by spinning, which then takes the core from the very
            rank that is waited for; so collectives are started and polled, giving the core away in between.
    """

    def __init__(self, comm: MPI.Intracomm, *, crowded: bool = False) -> None:
        self.rank = comm.Get_rank()
        self.size = comm.Get_size()
        self._comm = comm
        self._crowded = crowded

    def _end(self, request: Request, *, blocking: bool) -> Request:
        """Carry a started collective to its end if the caller asked for a blocking one."""
        if blocking:
            while not request.test():
                os.sched_yield()
        return request

    def isend(self, buffer: Array, peer: int, tag: int, *, synchronous: bool) -> Request:
        """Start a send."""
        return _Started((self._comm.Issend if synchronous else self._comm.Isend)(buffer, peer, tag), buffer)

    def irecv(self, buffer: Array, peer: int, tag: int) -> Request:
        """Start a receive."""
        return _Receive(self._comm.Irecv(buffer, peer, tag), buffer, f"position {peer}, tag {tag}")

    def all_reduce(self, buffer: Array, op: ReduceOp, *, blocking: bool) -> Request:
        """Reduce in place."""
        if blocking and not self._crowded:
            self._comm.Allreduce(MPI.IN_PLACE, buffer, _OPS[op])
            return DONE
        return self._end(_Started(self._comm.Iallreduce(MPI.IN_PLACE, buffer, _OPS[op]), buffer), blocking=blocking)

    def all_gather(self, send: Array | None, recv: Array, counts: Sequence[int], *, blocking: bool) -> Request:
        """Concatenate parts; equal parts by the fixed-size call, which libraries tune better."""
        source: Any = MPI.IN_PLACE if send is None else send
        if min(counts) == max(counts):
            if blocking and not self._crowded:
                self._comm.Allgather(source, recv)
                return DONE
            return self._end(_Started(self._comm.Iallgather(source, recv), send, recv), blocking=blocking)
        if blocking and not self._crowded:
            self._comm.Allgatherv(source, (recv, counts))
            return DONE
        return self._end(_Started(self._comm.Iallgatherv(source, (recv, counts)), send, recv), blocking=blocking)

    def reduce_scatter(
        self, send: Array, recv: Array, counts: Sequence[int], op: ReduceOp, *, blocking: bool
    ) -> Request:
        """Reduce and keep one part; never by Reduce_scatter_block, 9 times slower than all-reduce in Open MPI 5."""
        if blocking and not self._crowded:
            self._comm.Reduce_scatter(send, recv, counts, _OPS[op])
            return DONE
        started = self._comm.Ireduce_scatter(send, recv, counts, _OPS[op])
        return self._end(_Started(started, send, recv), blocking=blocking)

    def all_to_all(
        self, send: Array, recv: Array, send_counts: Sequence[int], recv_counts: Sequence[int], *, blocking: bool
    ) -> Request:
        """Exchange parts."""
        if blocking and not self._crowded:
            self._comm.Alltoallv((send, send_counts), (recv, recv_counts))
            return DONE
        started = self._comm.Ialltoallv((send, send_counts), (recv, recv_counts))
        return self._end(_Started(started, send, recv), blocking=blocking)

    def broadcast(self, buffer: Array, root: int, *, blocking: bool) -> Request:
        """Copy the root's buffer."""
        if blocking and not self._crowded:
            self._comm.Bcast(buffer, root)
            return DONE
        return self._end(_Started(self._comm.Ibcast(buffer, root), buffer), blocking=blocking)

    def barrier(self) -> None:
        """Meet the other ranks."""
        if self._crowded:
            self._end(_Started(self._comm.Ibarrier()), blocking=True)
        else:
            self._comm.Barrier()


class MpiTransport:
    """This process's access to the job.

    Raises:
        CommunicationError: the MPI library offers fewer message tags than needed.
    """

    def __init__(self) -> None:
        world = MPI.COMM_WORLD
        self.rank = world.Get_rank()
        self.size = world.Get_size()
        on_host = world.Split_type(MPI.COMM_TYPE_SHARED)
        self._crowded = on_host.Get_size() > (os.cpu_count() or 1)
        on_host.Free()
        self.library = MPI.Get_library_version().split("\n")[0].split(",")[0].strip("\0 ")
        self.takes_device_pointers = _query_cuda_support()
        largest_tag = world.Get_attr(MPI.TAG_UB)
        if largest_tag is None or largest_tag < MAX_TAG:
            raise CommunicationError(f"this MPI library allows tags up to {largest_tag}; {MAX_TAG} are needed")

    def channel(self, ranks: tuple[int, ...], axis: str) -> MpiChannel:
        """Connect a group; only its members call."""
        world = MPI.COMM_WORLD
        group = world.Get_group().Incl(list(ranks))
        # The tag keeps apart groups that are made at the same time by different members.
        tag = zlib.crc32(repr((axis, ranks)).encode()) % 32768
        return MpiChannel(world.Create_group(group, tag), crowded=self._crowded)


def _query_cuda_support() -> bool:
    """Whether the library says that it takes device pointers.

    Open MPI and MPICH answer through the same extension, `int MPIX_Query_cuda_support(void)`, which a library without
    it does not have. MPI's own Python module depends on the library, or has loaded it for all.
    """
    for place in (None, MPI.__file__):
        try:
            query = ctypes.CDLL(place).MPIX_Query_cuda_support
        except (OSError, AttributeError):
            continue
        query.restype = ctypes.c_int
        return bool(query())
    return False


def mpi_communicator(
    *, synchronous_sends: bool = False, paranoid: bool = False, paranoid_timeout_seconds: float = 30.0
) -> Communicator:
    """Return this process's communicator; collective over the job. Arguments as in `Communicator`."""
    comm = Communicator(
        MpiTransport(),
        synchronous_sends=synchronous_sends,
        paranoid=paranoid,
        paranoid_timeout_seconds=paranoid_timeout_seconds,
    )
    _communicators.append(comm)
    return comm


def library_version() -> str:
    """Return the MPI library's name and version, on one line."""
    return " ".join(MPI.Get_library_version().rstrip("\0").split("\n")[0].split())


def run_under_mpi(main: Callable[[], int | None]) -> NoReturn:
    """Run a rank's program and end the process so that no rank is ever left waiting.

    | `main` on this rank            | what happens                                                                  |
    | ------------------------------ | ----------------------------------------------------------------------------- |
    | returns None or 0              | exit code 0                                                                   |
    | returns another code, or       | if all ranks end early too, exit with the code; else after 1.5 seconds the    |
    | raises SystemExit with one     | job is aborted with it                                                        |
    | raises MeshwrightError         | the same with code 2; the lowest such rank prints "error: message"            |
    | raises anything else           | its traceback on stderr, headed by its rank, and the job is aborted with 1    |

    Args:
        main: the program of one rank.
    """
    code: int = 0
    message: str | None = None
    try:
        code = main() or 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        message = stop.code if isinstance(stop.code, str) else None
    except MeshwrightError as error:
        code, message = _USER_ERROR, f"error: {error}"
    except BaseException:  # whatever it is, the other ranks must not wait for this one
        _abort(_OWN_ERROR, _failure_report())
    if code != 0:
        _end_early(code, message)
    sys.stdout.flush()
    sys.stderr.flush()
    sys.exit(code)


def _failure_report() -> str:
    """Return the current exception's traceback, headed by the rank and followed by its last communication calls."""
    world = MPI.COMM_WORLD
    calls = [call for comm in _communicators for call in comm.recent_calls()]
    lines = ["last communication calls:", *(f"  {call}" for call in calls), ""] if calls else []
    return f"rank {world.Get_rank()} of {world.Get_size()}:\n{traceback.format_exc()}" + "\n".join(lines)


def _end_early(code: int, message: str | None) -> None:
    """Find out which ranks end early too; return if all do, else abort the job."""
    world = MPI.COMM_WORLD
    rank, size = world.Get_rank(), world.Get_size()
    others = [peer for peer in range(size) if peer != rank]
    codes = np.zeros(size, np.int64)
    codes[rank] = code
    sends = [world.Isend(codes[rank : rank + 1], peer, _VERDICT_TAG) for peer in others]
    receives = {peer: world.Irecv(codes[peer : peer + 1], peer, _VERDICT_TAG) for peer in others}
    deadline = time.monotonic() + _VERDICT_SECONDS
    while receives and time.monotonic() < deadline:
        receives = {peer: request for peer, request in receives.items() if not request.Test()}
        time.sleep(1e-3)
    ended = [peer for peer in range(size) if peer not in receives]
    if message is not None and rank == min(ended):
        print(message, file=sys.stderr, flush=True)
    if receives:
        # The rank that prints must not be cut off by another one's abort.
        time.sleep(0.0 if rank == min(ended) else 0.5)
        _abort(code, None)
    MPI.Request.Waitall(sends)
    world.Barrier()  # some launchers kill the job at the first exit with a code; the message is out by now
    # Messages that the error left unmatched can make finalizing wait for ever.
    watchdog = threading.Timer(_FINALIZE_SECONDS, os._exit, (code,))
    watchdog.daemon = True
    watchdog.start()
    MPI.Finalize()
    watchdog.cancel()


def _abort(code: int, message: str | None) -> NoReturn:
    """Print in one write, so that ranks do not interleave, and end all ranks."""
    if message is not None:
        sys.stdout.flush()
        sys.stderr.write(message)
        sys.stderr.flush()
        time.sleep(0.1)  # launchers drop output that is still in a pipe when the job is killed
    MPI.COMM_WORLD.Abort(code)
    os._exit(code)
