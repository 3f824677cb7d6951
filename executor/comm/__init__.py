"""Communication between the ranks of a job: one set of group operations over MPI or over threads of one process.

    base          requests, and the channel every transport implements
    record        counters, the log of recent calls
    communicator  what the executor starts from: groups by axis
    group         operations of a group: validated, counted, checked, each by a chosen algorithm
    calls         each collective validated: what it counts, what ranks must agree on
    buffers       validation of arrays and counts
    algorithms    collectives composed of others, where a library's own is slow
    paranoid      fingerprints of collectives and of replicated tensors, compared across ranks
    clock         offsets between the ranks' clocks
    hosts         which ranks share a host
    transports    how the arrays of a device travel: which of the next three, and what each needs
    staged        through pinned host memory and the host's channel
    cuda_aware    by an MPI library that takes device pointers
    nccl          by NCCL, on streams
    mpi           the MPI transport and the end of a job; the only module that imports mpi4py
    loopback      the in-process transport, ranks as threads
    fabric        where those threads meet, with exact deadlock detection

Everything but the two transports is imported here; `executor.comm.mpi` initialises MPI when imported.
"""

from executor.comm.algorithms import ALGORITHMS
from executor.comm.base import CommunicationError, InFlight, Request, wait_all
from executor.comm.clock import ClockOffsets, ClockWatch, clock_offsets
from executor.comm.communicator import Communicator
from executor.comm.group import Elapsed, Group
from executor.comm.hosts import ranks_by_host
from executor.comm.paranoid import hash_replicated
from executor.comm.record import Counters, Tally

__all__ = [
    "ALGORITHMS",
    "ClockOffsets",
    "ClockWatch",
    "CommunicationError",
    "Communicator",
    "Counters",
    "Elapsed",
    "Group",
    "InFlight",
    "Request",
    "Tally",
    "clock_offsets",
    "hash_replicated",
    "ranks_by_host",
    "wait_all",
]
