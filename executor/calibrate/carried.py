"""Collectives and messages of device arrays over NCCL or a CUDA-aware MPI, where there is one, with a GPU per rank.

What a staged transport takes follows from MPI on host memory (`exchanges`) and the copy engines (`copies`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import perf_counter
from typing import Any

import numpy as np

from executor.calibrate.exchanges import LOWER_QUARTILE, OPERATIONS, Timed, group_sizes
from executor.comm import Communicator, Group
from executor.device.cuda import CudaDevice
from planner.errors import MeshwrightError

SIZES = tuple(8 ** (i + 3) for i in range(7))  # 512 B to 128 MiB
QUICK_SIZES = SIZES[::3]
REPEATS = 6
DIRECT = ("nccl", "cuda-aware")
MESSAGE_AXIS = "pp"
"""Of whose groups neighbours send each other messages over NCCL."""


def time_direct(
    comm: Communicator, device: CudaDevice, sizes: Sequence[int], seconds: float
) -> tuple[dict[str, list[Timed]], list[str]]:
    """Time each transport that carries device memory itself; collective.

    Args:
        comm: all ranks.
        device: this rank's.
        sizes: of messages, in bytes.
        seconds: time to spend on each transport; larger messages are left out when it is used up.

    Returns:
        What was timed by transport, and a line for each one that is not available here.
    """
    found: dict[str, list[Timed]] = {}
    remarks = []
    for name in DIRECT if comm.size > 1 else ():
        try:
            comm.use_device(device, name)
        except MeshwrightError:
            remarks.append(f"no {name} here")
            continue
        timed: list[Timed] = []
        for size in group_sizes(comm.size):
            if comm.rank < size:
                alone = comm.subset(range(size))  # whose groups are this transport's, and no other's
                alone.use_device(device, name)
                timed += _time_group(alone.group(range(size), MESSAGE_AXIS), device, sizes, seconds)
            comm.world.barrier()
        found[name] = timed
    return found, remarks


def _time_group(group: Group, device: CudaDevice, sizes: Sequence[int], seconds: float) -> list[Timed]:
    """Every operation on one group."""
    deadline = perf_counter() + seconds
    kept = [Timed(operation, group.size, "native", [], []) for operation in OPERATIONS]
    kept.append(Timed("send", group.size, "library", [], []))
    for nbytes in sizes:
        late = np.array([float(perf_counter() > deadline)])
        group.all_reduce(late, "max", key="profile")
        if late[0] and len(kept[0].sizes_bytes) >= 2:
            break
        elements = max(1, nbytes // 4 // group.size) * group.size
        for each in kept:
            call = _message(group, device, elements) if each.operation == "send" else _call(
                group, device, each.operation, elements
            )  # fmt: skip
            each.sizes_bytes.append(4 * elements)
            each.seconds.append(_typical(group, device, call) / (2 if each.operation == "send" else 1))
    return kept


def _array(device: CudaDevice, elements: int) -> Any:
    array = device.empty((elements,), np.dtype(np.float32))
    array[...] = 0.0
    return array


def _call(group: Group, device: CudaDevice, operation: str, elements: int) -> Callable[[], object]:
    """A collective on `elements` float32 in all."""
    whole, other, part = (_array(device, n) for n in (elements, elements, elements // group.size))
    calls: dict[str, Callable[[], object]] = {
        "all_reduce": lambda: group.all_reduce(whole, key="profile"),
        "all_gather": lambda: group.all_gather(None, whole, key="profile"),
        "reduce_scatter": lambda: group.reduce_scatter(whole, part, key="profile"),
        "all_to_all": lambda: group.all_to_all(whole, other, key="profile"),
        "broadcast": lambda: group.broadcast(whole, key="profile"),
    }
    return calls[operation]


def _message(group: Group, device: CudaDevice, elements: int) -> Callable[[], object]:
    """A message from the first rank to the second and its answer."""
    buffer, answer = _array(device, elements), _array(device, elements)
    ends = (0, 1)
    peer = 1 - group.rank

    def call() -> None:
        for turn in ends if group.rank in ends else ():
            if group.rank == turn:
                group.isend(buffer, peer, key="profile").wait()
            else:
                group.irecv(answer, peer, key="profile").wait()

    return call


def _typical(group: Group, device: CudaDevice, call: Callable[[], object]) -> float:
    """Lower quartile over repeats of the mean over ranks, the device's work included."""
    own = []
    for _ in range(REPEATS):
        device.synchronise()
        group.arrive()
        begun = perf_counter()
        call()
        device.synchronise()
        own.append(perf_counter() - begun)
    means = np.asarray(own[1:])
    group.all_reduce(means, key="profile")
    return float(np.quantile(means / group.size, LOWER_QUARTILE))
