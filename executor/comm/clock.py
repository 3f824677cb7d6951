"""Offsets between the clocks of ranks, so that spans of several hosts fit on one time line."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from executor.comm.base import CLOCK_TAG
from executor.comm.communicator import Communicator

ROUNDS = 32
"""Questions per rank, of which the one answered fastest counts."""


class ClockOffsets(NamedTuple):
    """What to add to each rank's clock to read rank 0's, and how far off that can be.

    Attributes:
        offset_seconds: float64 [ranks].
        uncertainty_seconds: float64 [ranks], half the shortest round trip.
    """

    offset_seconds: npt.NDArray[np.float64]
    uncertainty_seconds: npt.NDArray[np.float64]


class ClockWatch:
    """Offsets at the beginning and at the end of a run, and on the line between them: clocks drift apart.

    Attributes:
        before: offsets when the watch began; making one is collective over the job.
        after: offsets when it ended, None until then.
    """

    def __init__(self, comm: Communicator) -> None:
        self._comm = comm
        self.before, self._began = clock_offsets(comm), time.perf_counter()
        self.after: ClockOffsets | None = None
        self._ended = self._began

    def end(self) -> None:
        """Measure the offsets again; collective over the job."""
        self.after, self._ended = clock_offsets(self._comm), time.perf_counter()

    def offset_seconds(self, at: float) -> float:
        """What to add to this rank's clock at one of its times to read rank 0's."""
        assert self.after is not None, "the watch has ended"
        both = [float(each.offset_seconds[self._comm.rank]) for each in (self.before, self.after)]
        return float(np.interp(at, [self._began, self._ended], both))

    def note(self) -> dict[str, list[float]]:
        """What a measurement says about its clocks, in seconds by rank."""
        assert self.after is not None, "the watch has ended"
        uncertainty = np.maximum(self.before.uncertainty_seconds, self.after.uncertainty_seconds)
        return {
            "before_seconds": self.before.offset_seconds.tolist(),
            "after_seconds": self.after.offset_seconds.tolist(),
            "uncertainty_seconds": uncertainty.tolist(),
        }


def clock_offsets(comm: Communicator, *, clock: Callable[[], float] = time.perf_counter) -> ClockOffsets:
    """Estimate every rank's clock offset to rank 0; collective over the job.

    Each rank asks rank 0 for its time; the answer T belongs to some moment between asking at t0 and hearing at t1, so
    the offset is T − (t0 + t1)/2, off by at most (t1 − t0)/2. The round with the shortest trip is kept.
    Source: Cristian, "Probabilistic clock synchronization", Distributed Computing 3, 1989; NTP's filter (RFC 5905).

    Args:
        comm: the job.
        clock: this rank's clock, in seconds.

    Returns:
        Offsets and uncertainties of all ranks, the same on every rank.
    """
    table = np.zeros((comm.size, 2))
    if comm.size > 1:
        channel = comm.world.channel
        message = np.zeros(1)
        if comm.rank == 0:
            for peer in range(1, comm.size):
                for _ in range(ROUNDS):
                    channel.irecv(message, peer, CLOCK_TAG).wait()
                    message[0] = clock()
                    channel.isend(message, peer, CLOCK_TAG, synchronous=False).wait()
        else:
            best_trip = math.inf
            for _ in range(ROUNDS):
                asked = clock()
                channel.isend(message, 0, CLOCK_TAG, synchronous=False).wait()
                channel.irecv(message, 0, CLOCK_TAG).wait()
                heard = clock()
                if heard - asked < best_trip:
                    best_trip = heard - asked
                    table[comm.rank] = message[0] - (asked + heard) / 2, best_trip / 2
        channel.all_gather(None, table.reshape(-1), [2] * comm.size, blocking=True)
    return ClockOffsets(table[:, 0].copy(), table[:, 1].copy())
