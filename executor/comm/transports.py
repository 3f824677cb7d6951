"""How the arrays of a device travel between ranks, and what each way needs: `staged`, `cuda-aware`, `nccl`."""

from __future__ import annotations

import platform
import zlib
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

from executor.comm.base import Channel, DeviceChannel
from executor.comm.cuda_aware import CudaAwareChannel
from executor.comm.nccl import NcclChannel
from executor.comm.staged import StagedChannel, StagingQueue
from executor.device.cuda import CudaDevice
from planner.errors import DataError, PlanError

if TYPE_CHECKING:
    from executor.comm.communicator import Communicator

Carrier: TypeAlias = Callable[[Channel, str], DeviceChannel]
"""Makes a group's channel for device arrays of its channel for host arrays and its axis; collective over the group."""

_STAGED_REMEDY = "plan with --transport staged, which copies through host memory and works everywhere"


def open_transport(transport: str, device: CudaDevice, comm: Communicator) -> tuple[Carrier, StagingQueue | None]:
    """Prepare a transport; collective over the job, and refused by all ranks alike.

    Args:
        transport: the plan's.
        device: this rank's.
        comm: the job.

    Returns:
        What connects groups, and the queue to flush before the host blocks in MPI, if there is one.

    Raises:
        PlanError: `host`, whose ranks compute on CPUs; NCCL with two ranks on one GPU.
        DataError: the MPI library takes no device pointers; CuPy has no NCCL.
    """
    if transport == "staged":
        queue = StagingQueue(device)
        return lambda channel, _: StagedChannel(channel, queue), queue
    if transport == "cuda-aware":
        _require_cuda_aware(comm)
        return lambda channel, _: CudaAwareChannel(channel, device), None
    if transport == "nccl":
        _require_nccl(device, comm)
        return lambda channel, axis: NcclChannel(channel, device, axis), None
    raise PlanError(
        f"the plan's transport is {transport}, which moves host memory only, and its ranks compute on GPUs; plan with "
        "--transport nccl (one GPU per rank) or --transport staged, or run with --device cpu"
    )


def _require_cuda_aware(comm: Communicator) -> None:
    """Refuse where one rank's library cannot read device memory; calling it all the same would crash the job."""
    if not all(comm.world.gather_words(comm.takes_device_pointers)):
        raise DataError(
            f"transport cuda-aware needs an MPI library that takes device pointers, and {comm.library} does not say "
            "that it does (MPIX_Query_cuda_support); use an Open MPI or MPICH built with CUDA (MPICH also wants "
            f"MPIR_CVAR_ENABLE_GPU=1), or {_STAGED_REMEDY}"
        )


def _require_nccl(device: CudaDevice, comm: Communicator) -> None:
    """Refuse ranks that share a GPU before NCCL, which would hang or end with an internal error."""
    if not all(comm.world.gather_words(device.nccl() is not None)):
        raise DataError(
            "transport nccl needs NCCL, which CuPy does not find here; install nvidia-nccl-cu13 (or -cu12), or "
            f"{_STAGED_REMEDY}"
        )
    place = zlib.crc32(f"{platform.node()} {device.identity()}".encode())
    ranks_on: dict[int, list[int]] = {}
    for rank, word in enumerate(comm.world.gather_words(place)):
        ranks_on.setdefault(word, []).append(rank)
    shared = [ranks for ranks in ranks_on.values() if len(ranks) > 1]
    if shared:
        names = ", ".join(map(str, shared[0]))
        raise PlanError(
            f"transport nccl needs one GPU per rank, and ranks {names} share one ({comm.size} ranks on {len(ranks_on)} "
            f"GPUs); start as many ranks as there are GPUs, or {_STAGED_REMEDY}"
        )
