"""Copy engines: what copies between a device and pinned host memory take, one rank alone and all at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import NamedTuple

import numpy as np

from executor.comm import Communicator
from executor.device.cuda import CudaDevice

SIZES = (1 << 12, 1 << 16, 1 << 20, 1 << 23, 1 << 26)
QUICK_SIZES = (1 << 12, 1 << 20, 1 << 24)
REPEATS = 6


@dataclass(frozen=True)
class Copies:
    """Copies each way, by size; seconds are of the host, from asking for a copy to knowing that it has passed."""

    sizes_bytes: tuple[int, ...]
    to_host_seconds: tuple[float, ...]
    to_device_seconds: tuple[float, ...]
    together_bytes_per_second: float | None = None

    @property
    def latency_seconds(self) -> float:
        """Of the smallest copy."""
        return (self.to_host_seconds[0] + self.to_device_seconds[0]) / 2

    def bytes_per_second(self, seconds: Sequence[float]) -> float:
        """Bandwidth of the largest copy one way, its latency apart."""
        return self.sizes_bytes[-1] / max(seconds[-1] - seconds[0], 1e-9)


class _Buffers(NamedTuple):
    """Device and pinned memory of one size."""

    device: np.ndarray[tuple[int], np.dtype[np.uint8]]
    pinned: np.ndarray[tuple[int], np.dtype[np.uint8]]


def time_copies(device: CudaDevice, sizes: Sequence[int]) -> Copies:
    """Time copies of one rank alone."""
    out, back = [], []
    for nbytes in sizes:
        room = device.pinned.take(nbytes)
        buffers = _Buffers(device.empty((nbytes,), np.dtype(np.uint8)), room[:nbytes])
        buffers.device[...] = 1
        out.append(min(_to_host(device, buffers) for _ in range(REPEATS)))
        back.append(min(_to_device(device, buffers) for _ in range(REPEATS)))
        device.pinned.give(room)
    return Copies(tuple(sizes), tuple(out), tuple(back))


def together_bytes_per_second(comm: Communicator, device: CudaDevice, nbytes: int) -> float:
    """What the copies of all ranks reach at the same time; collective."""
    buffers = _Buffers(device.empty((nbytes,), np.dtype(np.uint8)), device.pinned.take(nbytes)[:nbytes])
    buffers.device[...] = 1
    slowest = []
    for _ in range(REPEATS):
        comm.world.barrier()
        elapsed = np.array([_to_host(device, buffers)])
        comm.world.all_reduce(elapsed, "max", key="profile")
        slowest.append(float(elapsed[0]))
    return comm.size * nbytes / min(slowest)


def _to_host(device: CudaDevice, buffers: _Buffers) -> float:
    device.synchronise()
    begun = perf_counter()
    device.fork(device.to_host)
    device.copy_to_host(buffers.device, buffers.pinned)
    device.event(device.to_host).synchronize()
    return perf_counter() - begun


def _to_device(device: CudaDevice, buffers: _Buffers) -> float:
    device.synchronise()
    begun = perf_counter()
    device.fork(device.from_host)
    device.copy_from_host(buffers.pinned, buffers.device)
    passed = device.event(device.from_host)
    passed.synchronize()
    elapsed = perf_counter() - begun
    device.join(passed)
    return elapsed
