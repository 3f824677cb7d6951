"""Arena: buffers are taken from and given back to a rank's own store, and every live byte is counted by part.

Allocation happens in the first step only; later steps find every size in the store. On a CUDA device the store belongs
to the compute stream: `executor.device` says what that asks of whoever releases a block.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from executor.device.base import HOST, Device, DeviceMemoryError
from executor.reference.arrays import ALIGNMENT
from planner.trace import PARTS

__all__ = ["ALIGNMENT", "PARTS", "Arena", "Block"]

SLACK = 1.25  # a free block serves a request if it is at most this much larger


@dataclass(slots=True)
class Block:
    """A piece of memory in use; `holders` count who still needs it (a micro-batch, a send under way)."""

    raw: NDArray[np.uint8]
    nbytes: int
    part: str
    holders: int = 1


class Arena:
    """The buffers of one rank.

    Args:
        device: where they are.

    Attributes:
        device: where they are.
        live: bytes in use by part.
        peak: the parts at the moment when their sum was largest.
    """

    def __init__(self, device: Device = HOST) -> None:
        self.device = device
        self._free: list[tuple[int, int]] = []  # (size, id), sorted
        self._store: dict[int, NDArray[np.uint8]] = {}
        self.live = dict.fromkeys(PARTS, 0)
        self.total_bytes = self.peak_bytes = self.reserved_bytes = 0
        self.peak = dict(self.live)
        if not device.is_host:
            device.held = self.live

    def take(self, nbytes: int, part: str) -> Block:
        """A block of at least `nbytes`, counted under `part` as exactly that many."""
        place = bisect_left(self._free, (nbytes, 0))
        if place < len(self._free) and self._free[place][0] <= max(SLACK * nbytes, nbytes + 4096):
            raw = self._store.pop(self._free.pop(place)[1])
        else:
            raw = self.device.allocate(nbytes)
            self.reserved_bytes += nbytes
        self._count(part, nbytes)
        return Block(raw, nbytes, part)

    def release(self, block: Block) -> None:
        """One holder needs the block no longer; the last one gives it back."""
        block.holders -= 1
        if block.holders == 0:
            self._count(block.part, -block.nbytes)
            insort(self._free, (block.raw.nbytes, id(block.raw)))
            self._store[id(block.raw)] = block.raw

    def _count(self, part: str, nbytes: int) -> None:
        self.live[part] += nbytes
        self.total_bytes += nbytes
        if self.total_bytes > self.peak_bytes:
            self.peak_bytes, self.peak = self.total_bytes, dict(self.live)

    def array(
        self, shape: tuple[int, ...], dtype: np.dtype[np.generic], part: str, what: str = ""
    ) -> tuple[Block, NDArray[np.generic]]:
        """A block seen as an uninitialised C-contiguous array.

        Raises:
            DeviceMemoryError: the device has no room; `what` names the array in it.
        """
        nbytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        try:
            block = self.take(nbytes, part)
        except DeviceMemoryError as error:
            raise DeviceMemoryError(nbytes, what) from error
        return block, block.raw[:nbytes].view(dtype).reshape(shape)
