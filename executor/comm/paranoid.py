"""Checks across ranks that catch a wrong order of collectives, a missing rank and a replica that drifted.

Two ranks that enter different collectives exchange the wrong bytes, or wait for each other for ever. Before each
collective the ranks of its group therefore exchange a record: a 64-bit fingerprint of the call and the sender's last
calls as text. The records travel as separate messages, so that after the time-out it is known who has not arrived, and
every rank that did arrive comes to the same verdict from the same records.
"""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from executor.comm.base import FINGERPRINT_TAG, NUM_INTERNAL_TAGS, Array, Channel, CommunicationError, Request
from executor.comm.record import Record

if TYPE_CHECKING:
    from executor.comm.group import Group

_RECORD_BYTES = 1024
_FINGERPRINT_BYTES = 8


class Guard:
    """Compares the fingerprints of a group's collectives.

    Args:
        channel: the group's channel.
        axis: the group's axis, for messages.
        ranks: the members' numbers in the job.
        record: this rank's log, what it heard of others, and the time-out.
    """

    def __init__(self, channel: Channel, axis: str, ranks: tuple[int, ...], record: Record) -> None:
        self.channel = channel
        self.axis = axis
        self.ranks = ranks
        self.record = record

    def start(self, sequence: int, call: tuple[object, ...]) -> Request:
        """Send this rank's record of a collective to the group; the request finishes when all agree.

        Args:
            sequence: number of the collective in its group.
            call: operation, tensor key, shape, type: everything that must be equal on all ranks.

        Returns:
            A request whose `test` or `wait` raises CommunicationError on a mismatch or after the time-out.
        """
        identity = repr((self.axis, self.ranks, sequence, call)).encode()
        fingerprint = hashlib.blake2b(identity, digest_size=_FINGERPRINT_BYTES).digest()
        # Newest first: what does not fit the record is the oldest.
        text = "; before that ".join(reversed(self.record.recent_calls())).encode()
        record = (fingerprint + f"#{sequence} ".encode() + text)[:_RECORD_BYTES].ljust(_RECORD_BYTES, b"\0")
        return _Check(self, sequence, np.frombuffer(record, np.uint8).copy())


class _Check:
    """One exchange of records."""

    def __init__(self, guard: Guard, sequence: int, record: npt.NDArray[np.uint8]) -> None:
        channel = guard.channel
        tag = FINGERPRINT_TAG + sequence % NUM_INTERNAL_TAGS
        self._guard = guard
        self._records = np.zeros((channel.size, _RECORD_BYTES), np.uint8)
        self._records[channel.rank] = record
        others = [peer for peer in range(channel.size) if peer != channel.rank]
        self._receives = {peer: channel.irecv(self._records[peer], peer, tag) for peer in others}
        self._sends = [channel.isend(self._records[channel.rank], peer, tag, synchronous=False) for peer in others]
        self._deadline = time.monotonic() + guard.record.paranoid_timeout_seconds

    def test(self) -> bool:
        """Return whether all records have come and agree."""
        for peer in [peer for peer, request in self._receives.items() if request.test()]:
            del self._receives[peer]
            self._guard.record.last_heard[self._guard.ranks[peer]] = self._text(peer)
        if not self._receives:
            self._compare()
            self._sends = [request for request in self._sends if not request.test()]
            return not self._sends
        if time.monotonic() > self._deadline:
            raise CommunicationError(self._describe_missing())
        return False

    def wait(self) -> None:
        """Poll until all records have come, so that the time-out applies."""
        self._guard.record.before_blocking()  # who has not arrived may be waiting for a message of this rank's
        while not self.test():
            time.sleep(0)  # another rank may need this core to arrive

    def _text(self, peer: int) -> str:
        return bytes(self._records[peer, _FINGERPRINT_BYTES:]).rstrip(b"\0").decode(errors="replace")

    def _compare(self) -> None:
        prints = [bytes(record[:_FINGERPRINT_BYTES]) for record in self._records]
        if len(set(prints)) == 1:
            return
        ranks = self._guard.ranks
        odd = _odd_positions(prints)
        usual = next(position for position in range(len(prints)) if position not in odd or len(odd) == len(prints))
        lines = [
            f"{_name_odd(ranks, odd)} started another collective than the rest of group {self._guard.axis!r} {ranks}"
        ]
        lines += [f"  rank {ranks[position]}: {self._text(position)}" for position in sorted({usual, *odd})]
        raise CommunicationError("\n".join(lines))

    def _describe_missing(self) -> str:
        guard = self._guard
        missing = [guard.ranks[peer] for peer in self._receives]
        lines = [
            f"{_name_ranks(missing)} did not arrive at a collective of group {guard.axis!r} {guard.ranks} "
            f"within {guard.record.paranoid_timeout_seconds:g} seconds",
            f"  rank {guard.ranks[guard.channel.rank]} is at {self._text(guard.channel.rank)}",
        ]
        lines += [
            f"  rank {rank} was last heard at {guard.record.last_heard.get(rank, 'no collective')}" for rank in missing
        ]
        return "\n".join(lines)


def hash_replicated(array: Array, group: Group, key: str = "") -> None:
    """Check that a replicated tensor is bitwise equal on all ranks of a group.

    Args:
        array: the replica, any layout in memory.
        group: the ranks that should hold the same.
        key: the tensor's name, for the message.

    Raises:
        CommunicationError: the replicas differ; names the odd rank.
    """
    digest = hashlib.blake2b(repr((array.dtype.str, array.shape)).encode(), digest_size=8)
    digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    words = group.gather_words(int.from_bytes(digest.digest(), "little"))
    if len(set(words)) > 1:
        hashes = ", ".join(f"rank {rank}: {word:016x}" for rank, word in zip(group.ranks, words, strict=True))
        raise CommunicationError(
            f"replicated tensor {key!r} of group {group.axis!r} differs on "
            f"{_name_odd(group.ranks, _odd_positions(words))} ({hashes})"
        )


def _odd_positions(values: Sequence[object]) -> list[int]:
    """Return the positions that differ from the majority; all of them where there is none."""
    value, count = Counter(values).most_common(1)[0]
    if 2 * count <= len(values):
        return list(range(len(values)))
    return [position for position, other in enumerate(values) if other != value]


def _name_odd(ranks: Sequence[int], odd: Sequence[int]) -> str:
    if len(odd) == len(ranks):
        return f"one of {_name_ranks(ranks)} (no majority)"
    return _name_ranks([ranks[position] for position in odd])


def _name_ranks(ranks: Sequence[int]) -> str:
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, ranks))
