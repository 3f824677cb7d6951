"""What every transport provides and every group operation uses: requests and channels."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
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
MAX_TAG = CLOCK_TAG

DTYPES = frozenset(np.dtype(name) for name in ("float32", "float64", "int32", "int64", "uint8", "uint64"))
UFUNCS: dict[str, np.ufunc] = {"sum": np.add, "max": np.maximum}


class CommunicationError(RuntimeError):
    """A communication call that is wrong on our side: buffers, groups or the order of calls do not fit together."""


class Request(Protocol):
    """An operation that was started; its buffers belong to it until `wait` returns or `test` is true."""

    def test(self) -> bool:
        """Make progress and return whether the operation has finished; may be called again after that."""

    def wait(self) -> None:
        """Return when the operation has finished; may be called again after that."""


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


class Transport(Protocol):
    """A way to reach the other ranks of the job."""

    rank: int
    size: int

    def channel(self, ranks: tuple[int, ...], axis: str) -> Channel:
        """Connect a group that contains this rank; every member calls, nobody else needs to."""


def offsets_of(counts: Sequence[int]) -> list[int]:
    """Return where each part starts: [0, c0, c0+c1, ..., total]."""
    offsets = [0]
    for count in counts:
        offsets.append(offsets[-1] + count)
    return offsets
