"""What one rank keeps about its communication: counters, a log of recent calls, settings its groups share."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from executor.comm.staged import StagingQueue
    from executor.device import Device

NUM_LOGGED_CALLS = 8


class Call(NamedTuple):
    """One entry of a rank's ring log of recent calls."""

    axis: str
    operation: str
    key: str
    detail: tuple[object, ...]

    def __str__(self) -> str:
        """Return the call as it appears in error messages."""
        detail = ", ".join(str(item) for item in self.detail)
        return (
            f"{self.axis}.{self.operation}({self.key!r}, {detail})"
            if self.key
            else (f"{self.axis}.{self.operation}({detail})")
        )


class Tally(NamedTuple):
    """How often an operation was called on this rank and how many payload bytes it handed over."""

    calls: int
    payload_bytes: int


class Counters:
    """Calls and payload bytes of this rank by (axis, operation, tensor key).

    Payload bytes are this rank's contribution as the caller passed it, whatever algorithm carries it:

        all_reduce      the whole buffer
        all_gather      the own part
        reduce_scatter  the whole send buffer
        all_to_all      the whole send buffer, the part for this rank included
        broadcast       the buffer at the root, 0 elsewhere
        send            the message, counted by the sender only (a ring shift is one send)

    Barriers, fingerprints and clock messages carry no payload and are not counted; neither is anything on a group of
    one rank.
    """

    def __init__(self) -> None:
        self._entries: dict[tuple[str, str, str], list[int]] = {}

    def add(self, axis: str, operation: str, key: str, payload_bytes: int) -> None:
        """Count one call."""
        entry = self._entries.get((axis, operation, key))
        if entry is None:
            self._entries[axis, operation, key] = [1, payload_bytes]
        else:
            entry[0] += 1
            entry[1] += payload_bytes

    def snapshot(self) -> dict[tuple[str, str, str], Tally]:
        """Return a copy of all tallies."""
        return {name: Tally(*entry) for name, entry in self._entries.items()}

    def payload_bytes(self, *, axis: str | None = None, operation: str | None = None, key: str | None = None) -> int:
        """Return the sum of payload bytes over the entries that match; None matches all."""
        wanted = (axis, operation, key)
        return sum(
            entry[1]
            for name, entry in self._entries.items()
            if all(want in (None, have) for want, have in zip(wanted, name, strict=True))
        )

    def reset(self) -> None:
        """Forget everything counted."""
        self._entries.clear()


@dataclass
class Record:
    """State that all groups of a rank share.

    Attributes:
        synchronous_sends: every send finishes only after its receiver has arrived.
        paranoid: compare a fingerprint of every collective across its group first.
        paranoid_timeout_seconds: how long the others may take to arrive at a collective.
        counters: calls and payload bytes.
        log: the last calls, oldest first.
        last_heard: the last calls heard of each other rank in fingerprint records, as text.
        scratch: free blocks of memory for composed algorithms.
        device: whose arrays may be communicated; None for host arrays only.
        staging: calls that MPI has not been given yet, where device arrays are staged.
    """

    synchronous_sends: bool
    paranoid: bool
    paranoid_timeout_seconds: float
    counters: Counters = field(default_factory=Counters)
    log: deque[Call] = field(default_factory=lambda: deque(maxlen=NUM_LOGGED_CALLS))
    last_heard: dict[int, str] = field(default_factory=dict)
    scratch: list[npt.NDArray[np.uint8]] = field(default_factory=list)
    device: Device | None = None
    staging: StagingQueue | None = None

    def before_blocking(self) -> None:
        """Call before the host blocks in MPI: a peer may wait for a call that is still being staged."""
        if self.staging is not None:
            self.staging.flush()

    def recent_calls(self) -> list[str]:
        """Return the last few communication calls, oldest first."""
        return [str(call) for call in self.log]
