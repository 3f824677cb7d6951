"""The links between hosts: groups of one rank of each, groups of all, and what a host sends with all its ranks.

Ranks that share a network card share what it carries, which no group alone shows; so the messages of all ranks of a
host at once are timed as well.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from executor.calibrate.exchanges import Timed, barrier_seconds, group_sizes, host_bytes_per_second, time_exchanges
from executor.comm import Communicator, ranks_by_host
from planner.errors import MachineError

Hosts = tuple[tuple[int, ...], ...]
"""The ranks of each host."""


@dataclass
class Between:
    """What was timed between hosts, as the ranks know it that took part.

    Attributes:
        exchanges: in groups of one rank of each host, and of all ranks.
        barrier_seconds: meeting of one rank of each host.
        host_bytes_per_second: what all ranks of a host together send to another.
    """

    exchanges: list[Timed] = field(default_factory=list)
    barrier_seconds: float = 0.0
    host_bytes_per_second: float | None = None


def equal_hosts(comm: Communicator) -> Hosts:
    """Return the ranks of each host; collective over the job.

    Raises:
        MachineError: hosts have unequal numbers of ranks, or do not hold them in order.
    """
    hosts = ranks_by_host(comm)
    if len({len(ranks) for ranks in hosts}) > 1 or [rank for ranks in hosts for rank in ranks] != [*range(comm.size)]:
        held = "; ".join(",".join(map(str, ranks)) for ranks in hosts)
        raise MachineError(
            f"the {len(hosts)} hosts hold the ranks {held}: a profile needs as many on each, in rank order; start a "
            "multiple of the hosts, placed by slot, as planner profile --hosts does"
        )
    return hosts


def time_between(
    comm: Communicator, hosts: Hosts, *, quick: bool, seconds: float, tell: Callable[[int], None],
    meet: Callable[[], None],
) -> Between:  # fmt: skip
    """Time the links between hosts; collective over the job, whose other ranks wait in `meet`.

    Args:
        comm: the job.
        hosts: from `equal_hosts`.
        quick: fewer message sizes.
        seconds: time to spend.
        tell: told how many ranks the next group has.
        meet: a barrier of the job that leaves the cores to others.
    """
    found, per_host = Between(), len(hosts[0])
    leaders = tuple(ranks[0] for ranks in hosts)
    groups = [(1, leaders[:size]) for size in group_sizes(len(hosts))]
    if len(hosts) > 1 and per_host > 1:
        groups.append((per_host, tuple(range(comm.size))))
    for on_host, ranks in groups:
        tell(len(ranks))
        if comm.rank in ranks:
            group = comm.group(ranks, "profile")
            found.exchanges += time_exchanges(group, quick=quick, seconds=seconds / len(groups), ranks_per_host=on_host)
            meeting = barrier_seconds(group)  # all of the group call, whether or not they have a figure already
            found.barrier_seconds = found.barrier_seconds or meeting
        meet()
    if len(hosts) > 1:
        pair = (*hosts[0], *hosts[1])
        if comm.rank in pair:
            found.host_bytes_per_second = host_bytes_per_second(comm.group(pair, "profile"))
        meet()
    return found
