"""Which ranks of a job share a host."""

from __future__ import annotations

import platform
import zlib

from executor.comm.communicator import Communicator


def ranks_by_host(comm: Communicator) -> tuple[tuple[int, ...], ...]:
    """Return the ranks of each host, hosts in the order of their first ranks; collective over the job.

    Processes with one host name are on one host.
    """
    hosts: dict[int, list[int]] = {}
    for rank, name in enumerate(comm.world.gather_words(zlib.crc32(platform.node().encode()))):
        hosts.setdefault(name, []).append(rank)
    return tuple(map(tuple, hosts.values()))
