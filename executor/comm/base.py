"""What every transport provides and every group operation uses: requests and channels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

Array: TypeAlias = npt.NDArray[Any]
ReduceOp: TypeAlias = Literal["sum", "max"]

# Tags below this one are the caller's; the steps of composed algorithms and fingerprints use those above.
NUM_USER_TAGS = 1 << 24
NUM_INTERNAL_TAGS = 1 << 12
ALGORITHM_TAG = NUM_USER_TAGS
FINGERPRINT_TAG = NUM_USER_TAGS + NUM_INTERNAL_TAGS
CLOCK_TAG = NUM_USER_TAGS + 2 * NUM_INTERNAL_TAGS
LANE_TAG = CLOCK_TAG + 1
MAX_TAG = LANE_TAG

DTYPES = frozenset(np.dtype(name) for name in ("float32", "float64", "int32", "int64", "uint8", "uint16", "uint64"))
UFUNCS: dict[str, np.ufunc] = {"sum": np.add, "max": np.maximum}
REDUCTIONS: dict[str, Callable[..., Any]] = {"sum": np.sum, "max": np.max}
"""The same along an axis; functions, because CuPy's arrays answer no methods of NumPy's ufuncs."""


class CommunicationError(RuntimeError):
    """A communication call that is wrong on our side: buffers, groups or the order of calls do not fit together."""


class Request(Protocol):
    """An operation that was started; its buffers belong to it until `wait` returns or `test` is true."""

    def test(self) -> bool:
        """Make progress and return whether the operation has finished; may be called again after that."""

    def wait(self) -> None:
        """Return when the operation has finished; may be called again after that."""


class InFlight:
    """A request that runs on streams of a device; when it began and ended there, for the step's spans.

    On a device `test` is true only when the host has seen the operation's end; `wait` returns as soon as the host has
    done its part, with the compute stream put behind the operation.

    Attributes:
        began: mark on the device's time line.
        ended: the same; None until the end has been enqueued.
        waits_on_device: `wait` never blocks the host, because the operation needs nothing of it.
    """

    began: Any = None
    ended: Any = None
    waits_on_device = False

    def test(self) -> bool:
        """As in `Request`."""
        raise NotImplementedError

    def wait(self) -> None:
        """As in `Request`."""
        raise NotImplementedError


class _Done:
    """A request that has nothing to do."""

    def test(self) -> bool:
        return True

    def wait(self) -> None:
        return


DONE: Request = _Done()
Steps: TypeAlias = Iterator[Request]


class StepRequest:
    """An operation of several steps: an iterator that starts a step and yields the request it then needs finished.

    The first steps, up to the first unfinished request, run at once, so that every rank has posted its messages when
    the call that made the request returns.
    """

    def __init__(self, steps: Steps) -> None:
        self._steps = steps
        self._current: Request | None = DONE
        self.test()

    def test(self) -> bool:
        """Advance as far as finished requests allow."""
        while self._current is not None:
            if not self._current.test():
                return False
            self._current = next(self._steps, None)
        return True

    def wait(self) -> None:
        """Carry out the remaining steps."""
        while self._current is not None:
            self._current.wait()
            self._current = next(self._steps, None)


def in_order(*requests: Request) -> Steps:
    """Steps that finish requests one after the other, all of them already started."""
    yield from requests


def wait_all(requests: Iterable[Request]) -> None:
    """Finish every request."""
    for request in requests:
        request.wait()


class Channel(Protocol):
    """The raw operations of one transport among the ranks of one group, on flat C-contiguous arrays.

    Callers have validated every argument. Peers and roots are positions in the group. Collectives with `blocking`
    return a finished request; the others must be started in the same order on every rank of the group.
    """

    rank: int
    size: int

    def isend(self, buffer: Array, peer: int, tag: int, *, synchronous: bool) -> Request:
        """Start a send; synchronous: it does not finish before the receiver has arrived."""

    def irecv(self, buffer: Array, peer: int, tag: int) -> Request:
        """Start a receive of exactly `buffer.nbytes` bytes."""

    def all_reduce(self, buffer: Array, op: ReduceOp, *, blocking: bool) -> Request:
        """Reduce elementwise over the group, in place."""

    def all_gather(self, send: Array | None, recv: Array, counts: Sequence[int], *, blocking: bool) -> Request:
        """Concatenate the ranks' parts; send=None: the own part already lies in its slot of recv."""

    def reduce_scatter(
        self, send: Array, recv: Array, counts: Sequence[int], op: ReduceOp, *, blocking: bool
    ) -> Request:
        """Reduce elementwise and leave part `rank` of the result in recv."""

    def all_to_all(
        self, send: Array, recv: Array, send_counts: Sequence[int], recv_counts: Sequence[int], *, blocking: bool
    ) -> Request:
        """Send part i of `send` to rank i."""

    def broadcast(self, buffer: Array, root: int, *, blocking: bool) -> Request:
        """Copy the root's buffer to all."""

    def barrier(self) -> None:
        """Return when every rank of the group has called."""


class DeviceChannel(Channel, Protocol):
    """A group's channel for arrays in device memory, beside the one for host memory.

    Attributes:
        scratch: free blocks of device memory for composed algorithms.
    """

    scratch: list[Array]

    def collective(self, operation: str, arguments: tuple[Any, ...], begin: Begin) -> Request:
        """Carry out a validated collective on device arrays; `begin` starts it on a channel and its arguments."""


Begin: TypeAlias = Callable[[Channel, tuple[Any, ...]], Request]
"""Starts a collective, native or composed, on a channel."""


class Transport(Protocol):
    """A way to reach the other ranks of the job.

    Attributes:
        takes_device_pointers: channels take arrays in device memory (CUDA-aware MPI).
        library: its name and version, for messages.
    """

    rank: int
    size: int
    takes_device_pointers: bool
    library: str

    def channel(self, ranks: tuple[int, ...], axis: str) -> Channel:
        """Connect a group that contains this rank; every member calls, nobody else needs to."""


def offsets_of(counts: Sequence[int]) -> list[int]:
    """Return where each part starts: [0, c0, c0+c1, ..., total]."""
    offsets = [0]
    for count in counts:
        offsets.append(offsets[-1] + count)
    return offsets
