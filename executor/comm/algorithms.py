"""Collectives composed of other operations, for where a library's own is slow, and for the classic experiments.

Each algorithm is a generator: it starts messages, yields the request it needs finished, and goes on. Blocking calls run
it to its end; non-blocking ones advance it when tested. Every sum is taken in an order fixed by the ranks' positions,
never by arrival, so results repeat bit for bit. All sends are posted before anything is waited for, so that
synchronous (zero-buffer) sends cannot deadlock. A library's own collectives must start in the same order on all ranks,
and a rank reaches the later steps of a non-blocking algorithm in its own time: there, only the first step may be such
a collective.

Costs below are for n bytes, p ranks, latency α per message and β seconds per byte of one link (Thakur, Rabenseifner,
Gropp, "Optimization of Collective Communication Operations in MPICH", IJHPCA 19(1), 2005).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from executor.comm.base import (
    ALGORITHM_TAG,
    DONE,
    REDUCTIONS,
    UFUNCS,
    Array,
    Channel,
    ReduceOp,
    Request,
    Steps,
    offsets_of,
)


def host_block(num_bytes: int) -> npt.NDArray[np.uint8]:
    """Uninitialised host memory."""
    return np.empty(num_bytes, np.uint8)


class Exchange:
    """One running collective: messages under a tag of its own, and scratch memory.

    Args:
        channel: the group's channel.
        tag: distinguishes collectives in flight at the same time.
        synchronous: use synchronous sends.
        blocking: the caller waits, so native collectives inside may block too.
        pool: free scratch blocks of the group by capacity, reused by later collectives.
        allocate: makes a block of so many bytes where the operands are.
    """

    def __init__(
        self,
        channel: Channel,
        tag: int,
        *,
        synchronous: bool,
        blocking: bool,
        pool: list[npt.NDArray[np.uint8]],
        allocate: Callable[[int], npt.NDArray[np.uint8]] = host_block,
    ) -> None:
        self.channel = channel
        self.rank = channel.rank
        self.size = channel.size
        self.blocking = blocking
        self._tag = ALGORITHM_TAG + tag
        self._synchronous = synchronous
        self._pool = pool
        self._allocate = allocate
        self._taken: list[npt.NDArray[np.uint8]] = []

    def send(self, part: Array, peer: int) -> Request:
        """Start sending a part; empty parts are not sent, as the receiver knows."""
        return self.channel.isend(part, peer, self._tag, synchronous=self._synchronous) if part.size else DONE

    def receive(self, part: Array, peer: int) -> Request:
        """Start receiving a part."""
        return self.channel.irecv(part, peer, self._tag) if part.size else DONE

    def scratch(self, count: int, dtype: np.dtype[Any]) -> Array:
        """Take scratch memory for `count` elements, the smallest free block that is large enough."""
        num_bytes = max(count * dtype.itemsize, 1)
        fitting = [index for index, block in enumerate(self._pool) if block.size >= num_bytes]
        if fitting:
            block = self._pool.pop(min(fitting, key=lambda index: self._pool[index].size))
        else:
            block = self._allocate(num_bytes)
        self._taken.append(block)
        return block[: count * dtype.itemsize].view(dtype)

    def finish(self, steps: Steps) -> Steps:
        """Run an algorithm's steps, then give its scratch memory back."""
        yield from steps
        self._pool.extend(self._taken)
        self._taken.clear()


def parts_of(buffer: Array, counts: Sequence[int]) -> list[Array]:
    """Cut a flat buffer into views of the given numbers of elements."""
    return [buffer[start:end] for start, end in pairwise(offsets_of(counts))]


def even_counts(total: int, parts: int) -> list[int]:
    """Split a number of elements as evenly as possible, larger parts first."""
    return [total // parts + (part < total % parts) for part in range(parts)]


def reduce_scatter_ring(x: Exchange, send: Array, recv: Array, counts: Sequence[int], op: ReduceOp) -> Steps:
    """Pass partial results round the ring, adding the own part at each stop: (p−1)(α + βn/p)."""
    part = parts_of(send, counts)
    partials = [x.scratch(max(counts), send.dtype) for _ in range(2)]
    outgoing = part[x.rank - 1]
    for step in range(1, x.size):
        owner = (x.rank - step - 1) % x.size  # whose result the block arriving now is on its way to
        incoming = recv if owner == x.rank else partials[step % 2][: counts[owner]]
        requests = (x.receive(incoming, (x.rank - 1) % x.size), x.send(outgoing, (x.rank + 1) % x.size))
        yield from requests
        UFUNCS[op](incoming, part[owner], out=incoming)
        outgoing = incoming


def reduce_scatter_pairwise(x: Exchange, send: Array, recv: Array, counts: Sequence[int], op: ReduceOp) -> Steps:
    """Exchange parts with one partner per round and add what arrives: (p−1)(α + βn/p), no part is forwarded."""
    part = parts_of(send, counts)
    arriving = x.scratch(counts[x.rank], send.dtype)
    np.copyto(recv, part[x.rank])
    for distance in range(1, x.size):
        to, source = (x.rank + distance) % x.size, (x.rank - distance) % x.size
        requests = (x.receive(arriving, source), x.send(part[to], to))
        yield from requests
        UFUNCS[op](recv, arriving, out=recv)


def reduce_scatter_all_to_all(x: Exchange, send: Array, recv: Array, counts: Sequence[int], op: ReduceOp) -> Steps:
    """One all-to-all, then a local reduction in rank order: wins where a library's all-to-all is the fast one."""
    own = counts[x.rank]
    gathered = x.scratch(own * x.size, send.dtype)
    yield x.channel.all_to_all(send, gathered, counts, [own] * x.size, blocking=x.blocking)
    REDUCTIONS[op](gathered.reshape(x.size, own), axis=0, out=recv)


def reduce_scatter_all_reduce(x: Exchange, send: Array, recv: Array, counts: Sequence[int], op: ReduceOp) -> Steps:
    """All-reduce a copy and keep one part of it: twice the bytes, but all-reduce is what libraries tune best."""
    total = x.scratch(send.size, send.dtype)
    np.copyto(total, send)
    yield x.channel.all_reduce(total, op, blocking=x.blocking)
    np.copyto(recv, parts_of(total, counts)[x.rank])


def all_gather_ring(x: Exchange, recv: Array, counts: Sequence[int]) -> Steps:
    """Pass parts round the ring: (p−1)(α + βn/p)."""
    part = parts_of(recv, counts)
    for step in range(1, x.size):
        arriving, leaving = (x.rank - step) % x.size, (x.rank - step + 1) % x.size
        requests = (
            x.receive(part[arriving], (x.rank - 1) % x.size),
            x.send(part[leaving], (x.rank + 1) % x.size),
        )
        yield from requests


def all_gather_direct(x: Exchange, recv: Array, counts: Sequence[int]) -> Steps:
    """Post every message at once: α + (p−1)βn/p where ports allow, and the least waiting for late ranks."""
    part = parts_of(recv, counts)
    others = [(x.rank + distance) % x.size for distance in range(1, x.size)]
    requests = [x.receive(part[peer], peer) for peer in others]
    requests += [x.send(part[x.rank], peer) for peer in others]
    yield from requests


def all_reduce_ring(x: Exchange, buffer: Array, op: ReduceOp) -> Steps:
    """Ring reduce-scatter, then ring all-gather: 2(p−1)(α + βn/p) (Patarasuk and Yuan, JPDC 69(2), 2009)."""
    counts = even_counts(buffer.size, x.size)
    own = x.scratch(counts[x.rank], buffer.dtype)
    yield from reduce_scatter_ring(x, buffer, own, counts, op)
    np.copyto(parts_of(buffer, counts)[x.rank], own)
    yield from all_gather_ring(x, buffer, counts)


def all_reduce_scatter_gather(x: Exchange, buffer: Array, op: ReduceOp) -> Steps:
    """The library's reduce-scatter, then its all-gather (Rabenseifner's decomposition); non-blocking, then a ring."""
    counts = even_counts(buffer.size, x.size)
    own = x.scratch(counts[x.rank], buffer.dtype)
    yield x.channel.reduce_scatter(buffer, own, counts, op, blocking=x.blocking)
    np.copyto(parts_of(buffer, counts)[x.rank], own)
    if x.blocking:
        yield x.channel.all_gather(None, buffer, counts, blocking=True)
    else:
        yield from all_gather_ring(x, buffer, counts)


def all_reduce_root(x: Exchange, buffer: Array, op: ReduceOp) -> Steps:
    """Collect everything at rank 0 and send the result back: 2(p−1)(α + βn), the parameter server's cost."""
    if x.rank:
        yield x.send(buffer, 0)
        yield x.receive(buffer, 0)
        return
    arriving = x.scratch(buffer.size, buffer.dtype)
    for peer in range(1, x.size):
        yield x.receive(arriving, peer)
        UFUNCS[op](buffer, arriving, out=buffer)
    replies = [x.send(buffer, peer) for peer in range(1, x.size)]
    yield from replies


def all_to_all_pairwise(
    x: Exchange, send: Array, recv: Array, send_counts: Sequence[int], recv_counts: Sequence[int]
) -> Steps:
    """One partner per round: (p−1)(α + βn/p)."""
    outgoing, incoming = parts_of(send, send_counts), parts_of(recv, recv_counts)
    np.copyto(incoming[x.rank], outgoing[x.rank])
    for distance in range(1, x.size):
        to, source = (x.rank + distance) % x.size, (x.rank - distance) % x.size
        requests = (x.receive(incoming[source], source), x.send(outgoing[to], to))
        yield from requests


def broadcast_linear(x: Exchange, buffer: Array, root: int) -> Steps:
    """The root sends to each rank in turn: (p−1)(α + βn)."""
    if x.rank == root:
        requests = [x.send(buffer, peer) for peer in range(x.size) if peer != root]
    else:
        requests = [x.receive(buffer, root)]
    yield from requests


def broadcast_scatter_gather(x: Exchange, buffer: Array, root: int) -> Steps:
    """Scatter parts, then ring all-gather: 2(p−1)/p·βn for long messages (van de Geijn)."""
    counts = even_counts(buffer.size, x.size)
    part = parts_of(buffer, counts)
    if x.rank == root:
        requests = [x.send(part[peer], peer) for peer in range(x.size) if peer != root]
    else:
        requests = [x.receive(part[x.rank], root)]
    yield from requests
    yield from all_gather_ring(x, buffer, counts)


COMPOSED: dict[str, dict[str, Callable[..., Steps]]] = {
    "all_reduce": {
        "ring": all_reduce_ring,
        "reduce_scatter_all_gather": all_reduce_scatter_gather,
        "root": all_reduce_root,
    },
    "all_gather": {"ring": all_gather_ring, "direct": all_gather_direct},
    "reduce_scatter": {
        "ring": reduce_scatter_ring,
        "pairwise": reduce_scatter_pairwise,
        "all_to_all": reduce_scatter_all_to_all,
        "all_reduce": reduce_scatter_all_reduce,
    },
    "all_to_all": {"pairwise": all_to_all_pairwise},
    "broadcast": {"linear": broadcast_linear, "scatter_all_gather": broadcast_scatter_gather},
}

ALGORITHMS: dict[str, tuple[str, ...]] = {operation: ("native", *composed) for operation, composed in COMPOSED.items()}
