"""Seconds of the copies that a staged transport makes: GPU -> pinned host memory -> MPI -> pinned host memory -> GPU.

A collective of a staged transport, or a message too short to be cut into chunks, is the sum of four parts, one after
the other because MPI may read a buffer only when all of it has arrived:

    b_out / min(D/s, W/r) + l   +   T_MPI   +   b_sum / R   +   b_in / min(H/s, W/r) + l

with D and H the rates of a device's copy engines to and from the host, shared by the s ranks on the device; W what the
copies of the r ranks of a host reach together; l the latency of a copy; T_MPI the collective on host buffers as in
`planner.cost.communication`, and R the rate at which a core sums what a reduction brings it. This is the alpha-beta-
gamma model (Thakur, Rabenseifner & Gropp 2005) with copies that neither GPUDirect (cuda-aware MPI: Wang et
al. 2011, MVAPICH2-GPU, doi:10.1007/s00450-011-0171-3) nor NCCL makes.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from planner.cost.sizes import Seconds, Size
from planner.machine import Machine, Staging

_REDUCTIONS = ("all_reduce", "reduce_scatter")


class Staged(NamedTuple):
    """Seconds that staging adds to one collective or message, part by part."""

    to_host: Seconds | np.float64
    summed: Seconds | np.float64
    to_device: Seconds | np.float64

    @property
    def total(self) -> Seconds | np.float64:
        """All of them."""
        return self.to_host + self.summed + self.to_device


NOT_STAGED = Staged(*(np.float64(0.0),) * 3)


def staged_seconds(machine: Machine, operation: str, payload_bytes: Size, group_size: Size, ranks: Size) -> Staged:
    """Return what staging adds to a collective, or to a message (operation "send"), beside the MPI call.

    The copied bytes are MPI's buffers: a rank's send buffer to the host, its receive buffer to the device.

    Args:
        machine: the profile; one without staging adds nothing.
        operation: the collective, or "send".
        payload_bytes: see the conventions of `planner.cost.communication`.
        group_size: ranks in the group; a group of one copies nothing.
        ranks: ranks of one host that copy at once.
    """
    staging = machine.staging
    if staging is None:
        return NOT_STAGED
    moved = np.multiply(payload_bytes, np.greater(group_size, 1))
    share = np.divide(moved, group_size)
    sent = share if operation == "all_gather" else moved
    received = share if operation == "reduce_scatter" else moved
    on_device = np.ceil(np.divide(ranks, machine.host.devices))
    summed: Seconds = np.zeros(np.shape(moved))[()]
    if operation in _REDUCTIONS and staging.reduction_bytes_per_second is not None:
        # A ring sums (p-1)/p of the buffer on each rank, the least possible (Patarasu & Yuan 2009).
        summed = (moved - share) / staging.reduction_bytes_per_second
    return Staged(
        to_host=_copy_seconds(staging, staging.to_host_bytes_per_second, sent, on_device, ranks),
        summed=summed,
        to_device=_copy_seconds(staging, staging.to_device_bytes_per_second, received, on_device, ranks),
    )


def chunks(machine: Machine, payload_bytes: Size) -> Size:
    """Return into how many chunks a message is cut: one, and from two of the profile's chunk size on as many."""
    size = None if machine.staging is None else machine.staging.chunk_bytes
    if size is None:
        return 1
    return np.where(np.greater_equal(payload_bytes, 2 * size), np.divide(payload_bytes, size), 1.0)


def piped_seconds(copies: Staged, sent: Size, pieces: Size) -> Seconds:
    """Return the time of a message cut into chunks, given what one chunk's copies and its sending take.

    The first chunk passes all three stages, every further one adds the slowest: the pipeline of MVAPICH2-GPU (Wang et
    al. 2011). One chunk takes the sum.
    """
    slowest = np.maximum(np.maximum(copies.to_host, copies.to_device), sent)
    return np.asarray(copies.total + sent + np.subtract(pieces, 1) * slowest)


def _copy_seconds(
    staging: Staging, engine_bytes_per_second: float, nbytes: Size, sharing: Size, ranks: Size
) -> Seconds:
    """Return the time of one rank's copy while the others of its device and host copy too; none for no bytes."""
    rate = np.divide(engine_bytes_per_second, sharing)
    if staging.shared_bandwidth_bytes_per_second is not None:
        rate = np.minimum(rate, np.divide(staging.shared_bandwidth_bytes_per_second, ranks))
    return np.asarray(np.where(np.greater(nbytes, 0), staging.latency_seconds + nbytes / rate, 0.0))[()]
