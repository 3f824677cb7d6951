"""A collective, validated: what it counts, what all ranks must agree on, what its algorithm gets.

On a group of one rank the functions here also do the whole work, which is to copy the own part where it belongs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from executor.comm.algorithms import ALGORITHMS, parts_of
from executor.comm.base import UFUNCS, Array, ReduceOp
from executor.comm.buffers import Place, address, copy_own, flat, full_counts, require_apart, require_match


class CollectiveCall(NamedTuple):
    """One rank's part in a collective.

    Attributes:
        place: group, operation and tensor key.
        payload_bytes: this rank's contribution, as `Counters` defines it.
        detail: shape, type and more that must be equal on all ranks.
        arguments: of the channel's operation or the composed algorithm.
    """

    place: Place
    payload_bytes: int
    detail: tuple[object, ...]
    arguments: tuple[Any, ...]


def all_reduce_call(place: Place, buffer: Array, op: ReduceOp, algorithm: str) -> CollectiveCall:
    """Validate an all-reduce; arguments as in `Group.all_reduce`."""
    _require_known(place, algorithm, op)
    data = flat(buffer, place, written=True)
    return CollectiveCall(place, data.nbytes, (op, data.dtype.str, buffer.shape), (data, op))


def all_gather_call(
    place: Place, rank: int, send: Array | None, recv: Array, counts: Sequence[int] | None, algorithm: str
) -> CollectiveCall:
    """Validate an all-gather; arguments as in `Group.all_gather`.

    Composed algorithms gather in place, so a send buffer outside recv is copied into its slot first.
    """
    _require_known(place, algorithm)
    whole = flat(recv, place, written=True)
    counts = full_counts(counts, whole.size, place)
    slot = parts_of(whole, counts)[rank]
    part: Array | None = None
    if send is not None:
        part = flat(send, place)
        require_match(part, slot, place)
        if address(part) == address(slot):
            part = None
        else:
            require_apart(part, whole, place)
    composed = algorithm != "native"
    if part is not None and (composed or len(counts) == 1):
        np.copyto(slot, part)
    arguments = (whole, counts) if composed else (part, whole, counts)
    return CollectiveCall(place, slot.nbytes, (whole.dtype.str, tuple(counts)), arguments)


def reduce_scatter_call(
    place: Place, rank: int, send: Array, recv: Array, counts: Sequence[int] | None, op: ReduceOp, algorithm: str
) -> CollectiveCall:
    """Validate a reduce-scatter; arguments as in `Group.reduce_scatter`."""
    _require_known(place, algorithm, op)
    whole, part = flat(send, place), flat(recv, place, written=True)
    counts = full_counts(counts, whole.size, place)
    require_match(parts_of(whole, counts)[rank], part, place)
    if len(counts) == 1:
        copy_own(whole, part, place)
    else:
        require_apart(whole, part, place)
    return CollectiveCall(place, whole.nbytes, (op, whole.dtype.str, tuple(counts)), (whole, part, counts, op))


def all_to_all_call(
    place: Place,
    rank: int,
    send: Array,
    recv: Array,
    send_counts: Sequence[int] | None,
    recv_counts: Sequence[int] | None,
    algorithm: str,
) -> CollectiveCall:
    """Validate an all-to-all; arguments as in `Group.all_to_all`.

    Counts differ between ranks, so nothing but the type must agree.
    """
    _require_known(place, algorithm)
    outgoing, incoming = flat(send, place), flat(recv, place, written=True)
    send_counts = full_counts(send_counts, outgoing.size, place)
    recv_counts = full_counts(recv_counts, incoming.size, place)
    require_match(parts_of(outgoing, send_counts)[rank], parts_of(incoming, recv_counts)[rank], place)
    if len(send_counts) == 1:
        copy_own(outgoing, incoming, place)
    else:
        require_apart(outgoing, incoming, place)
    arguments = (outgoing, incoming, send_counts, recv_counts)
    return CollectiveCall(place, outgoing.nbytes, (outgoing.dtype.str,), arguments)


def broadcast_call(place: Place, rank: int, buffer: Array, root: int, algorithm: str) -> CollectiveCall:
    """Validate a broadcast; arguments as in `Group.broadcast`."""
    _require_known(place, algorithm)
    data = flat(buffer, place, written=rank != root)
    if not 0 <= root < len(place.ranks):
        raise place.error(f"root {root} is outside the group")
    return CollectiveCall(place, data.nbytes if rank == root else 0, (data.dtype.str, buffer.shape, root), (data, root))


def _require_known(place: Place, algorithm: str, op: str | None = None) -> None:
    """Refuse algorithms and reductions that do not exist."""
    if algorithm not in ALGORITHMS[place.operation]:
        raise place.error(f"no algorithm {algorithm!r}; use one of {ALGORITHMS[place.operation]}")
    if op is not None and op not in UFUNCS:
        raise place.error(f"no reduction {op!r}; use one of {tuple(UFUNCS)}")
