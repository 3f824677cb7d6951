"""Collectives and messages timed in place: through the executor's own groups, by every algorithm it knows.

As in a training step, the ranks first meet (`Group.arrive`) so that waiting stays out of the time, and the buffers were
just written. What a collective costs a step is the mean over its ranks, which is what a measurement records as well.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter

import numpy as np
from numpy.typing import NDArray

from executor.calibrate.fit import LineFit, fit_regimes
from executor.comm import ALGORITHMS, Group
from planner.machine import MeasuredCollective

Floats = NDArray[np.float64]

SIZES = tuple(4 ** (i + 3) for i in range(10))  # 64 B to 16 MiB
QUICK_SIZES = tuple(16 ** (i + 2) for i in range(5))  # 256 B to 16 MiB
OPERATIONS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast")
EVICTION = np.ones(1 << 20, np.float32)
"""Read before each call, as a layer's operands are: what the last call left in the core's own caches has to go."""

MIN_REPEATS, MAX_REPEATS = 5, 25
ENOUGH_SECONDS = 0.01
"""Time to spend on one size of one algorithm, between the least and the most repeats."""

LOWER_QUARTILE = 0.25

HOPELESS = 10.0
"""An algorithm this much slower than the best at `SETTLED_BYTES` or more is dropped."""

SETTLED_BYTES = 1 << 20
ALWAYS_BYTES = 1 << 20
"""Messages up to this size are timed even when the time is used up."""

HOST_BYTES = 1 << 20
"""Bytes of each of the messages that leave a host at once."""


@dataclass(frozen=True)
class Timed:
    """One operation on one group size by one algorithm, over message sizes."""

    operation: str
    group_size: int
    algorithm: str
    sizes_bytes: list[int]
    seconds: list[float]
    ranks_per_host: int = 1  # of a group that spans hosts

    def fit(self) -> LineFit:
        """Latency and bandwidth by regime."""
        # A smaller message takes no longer than a larger one; where it seems to, somebody lost the core.
        rising = np.minimum.accumulate(self.seconds[::-1])[::-1]
        return fit_regimes(self.sizes_bytes, list(rising))

    def measured(self) -> MeasuredCollective:
        """As the profile keeps it."""
        return MeasuredCollective(
            operation=self.operation,  # type: ignore[arg-type]
            group_size=self.group_size, algorithm=self.algorithm, ranks_per_host=self.ranks_per_host,
            regimes=self.fit().regimes,
        )  # fmt: skip


def group_sizes(ranks: int) -> list[int]:
    """Powers of two up to the number of ranks, and that number."""
    return sorted({2**i for i in range(1, ranks.bit_length()) if 2**i <= ranks} | ({ranks} if ranks > 1 else set()))


def time_exchanges(group: Group, *, quick: bool, seconds: float, ranks_per_host: int = 1) -> list[Timed]:
    """Time every collective and algorithm, and messages between the first and the last rank, of a group.

    Args:
        group: whose ranks all call.
        quick: fewer message sizes.
        seconds: time to spend; the largest messages are left out when it is used up.
        ranks_per_host: of a group that spans hosts.
    """
    deadline = perf_counter() + seconds
    alive = {(operation, name) for operation in OPERATIONS for name in ALGORITHMS[operation]} | {("send", "library")}
    timed = {each: Timed(each[0], group.size, each[1], [], [], ranks_per_host) for each in sorted(alive)}
    for nbytes in QUICK_SIZES if quick else SIZES:
        if nbytes > ALWAYS_BYTES and max(_means(group, [float(perf_counter() > deadline)])) > 0:
            break
        for operation in (*OPERATIONS, "send"):
            alive -= _time_size(group, [timed[each] for each in sorted(alive) if each[0] == operation], nbytes)
    return [each for key, each in timed.items() if key in alive]


def host_bytes_per_second(group: Group, nbytes: int = HOST_BYTES) -> float:
    """What the ranks of one host send to another together: all at once, each a message to a rank of its own.

    Args:
        group: the ranks of one host, then as many of the other.
        nbytes: bytes of each message.
    """
    senders = group.size // 2
    buffer = np.ones(nbytes // 4, np.float32)
    slowest = []
    for _ in range(MIN_REPEATS):
        group.arrive()
        begun = perf_counter()
        if group.rank < senders:
            group.isend(buffer, group.rank + senders, key="profile").wait()
        else:
            group.irecv(buffer, group.rank - senders, key="profile").wait()
        elapsed = np.array([perf_counter() - begun])
        group.all_reduce(elapsed, "max", key="profile")
        slowest.append(float(elapsed[0]))
    return senders * nbytes / float(np.median(slowest[1:]))


def barrier_seconds(group: Group) -> float:
    """What `Group.arrive` costs ranks that arrive together."""
    return _typical(group, lambda: None, group.arrive)


def _time_size(group: Group, rivals: list[Timed], nbytes: int) -> set[tuple[str, str]]:
    """Time the algorithms of one operation at one size; return those not worth timing at larger ones."""
    for each in rivals:
        elements = max(1, nbytes // 4 // group.size) * group.size
        if each.operation == "send":
            seconds = _message_seconds(group, nbytes)
        else:
            seconds = _typical(group, *_call(group, each.operation, each.algorithm, elements))
        each.sizes_bytes.append(4 * elements)
        each.seconds.append(seconds)
    best = min(each.seconds[-1] for each in rivals)
    return {
        (each.operation, each.algorithm)
        for each in rivals
        if each.seconds[-1] > HOPELESS * best and each.algorithm != "native" and nbytes >= SETTLED_BYTES
    }


def _call(group: Group, operation: str, algorithm: str, elements: int) -> tuple[Callable[[], None], Callable[[], None]]:
    """What comes before, and a call of the collective on `elements` float32 in all, as the executor makes it."""
    whole, other = np.zeros(elements, np.float32), np.zeros(elements, np.float32)
    part = np.zeros(elements // group.size, np.float32)

    def write() -> None:
        EVICTION.sum()
        whole[:] = 0.0  # the producer's last word: the buffer is in this core's cache as far as it fits

    def call() -> None:
        match operation:
            case "all_reduce":
                group.all_reduce(whole, algorithm=algorithm, key="profile")
            case "all_gather":
                group.all_gather(None, whole, algorithm=algorithm, key="profile")
            case "reduce_scatter":
                group.reduce_scatter(whole, part, algorithm=algorithm, key="profile")
            case "all_to_all":
                group.all_to_all(whole, other, algorithm=algorithm, key="profile")
            case _:
                group.broadcast(whole, algorithm=algorithm, key="profile")

    return write, call


def _typical(group: Group, prepare: Callable[[], object], call: Callable[[], object]) -> float:
    """Lower quartile over repeats of the mean over ranks: a rank that loses its core holds up all others.

    The number of repeats is agreed on from the first ones.
    """
    seconds: list[float] = []
    repeats = MIN_REPEATS
    while len(seconds) < repeats:
        prepare()
        group.arrive()
        begun = perf_counter()
        call()
        seconds.append(perf_counter() - begun)
        if len(seconds) == MIN_REPEATS:
            repeats = _enough_repeats(group, seconds)
    return float(np.quantile(_means(group, seconds[1:]), LOWER_QUARTILE))


def _enough_repeats(group: Group, seconds: Sequence[float]) -> int:
    """How often to time what took so long so far, the same on all ranks."""
    typical = max(_means(group, [float(np.median(seconds))]))
    return int(np.clip(ENOUGH_SECONDS / typical, MIN_REPEATS, MAX_REPEATS))


def _means(group: Group, own: Sequence[float]) -> Floats:
    """Mean over ranks of each of several numbers."""
    values = np.asarray(own, np.float64)
    group.all_reduce(values, key="profile")
    return values / group.size


def _message_seconds(group: Group, size: int) -> float:
    """Half of a round trip between the first and the last rank."""
    buffer, answer = np.ones(size // 4, np.float32), np.ones(size // 4, np.float32)
    repeats = MIN_REPEATS
    ends = (0, group.size - 1)
    peer = group.size - 1 - group.rank
    own: list[float] = []
    while len(own) < repeats:
        EVICTION.sum()
        buffer[:] = 1.0
        group.arrive()
        begun = perf_counter()
        for turn in ends if group.rank in ends else ():
            if group.rank == turn:
                group.isend(buffer, peer, key="profile").wait()
            else:
                request = group.irecv(answer, peer, key="profile")
                while not request.test():
                    pass
        # The last sender's own time ends when its message is buffered; only who asked knows the whole way.
        own.append((perf_counter() - begun) / 2 if group.rank == 0 else 0.0)
        if len(own) == MIN_REPEATS:
            repeats = _enough_repeats(group, own)
    return float(np.quantile(_means(group, own[1:]) * group.size, LOWER_QUARTILE))
