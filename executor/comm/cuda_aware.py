"""Device arrays given to MPI as they are: a CUDA-aware library reads and writes device memory itself.

MPI knows nothing of streams: it may read a buffer the moment it is called and write one until it says so. The host
therefore waits for the compute stream before every call, and a finished request needs no ordering on the device (Open
MPI and MPICH document both). That wait empties the device's queue, the price of this transport beside its copies.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from executor.comm.base import Array, Begin, Channel, InFlight, ReduceOp, Request
from executor.device.cuda import CudaDevice


class CudaAwareRequest(InFlight):
    """A request of the library; it begins and ends where the compute stream stands when the host starts and sees it."""

    def __init__(self, device: CudaDevice, request: Request) -> None:
        self._device, self._request = device, request
        self.began, self.ended = device.now(), None

    def test(self) -> bool:
        """Ask the library."""
        if not self._request.test():
            return False
        self._note_end()
        return True

    def wait(self) -> None:
        """Wait for the library."""
        self._request.wait()
        self._note_end()

    def _note_end(self) -> None:
        if self.ended is None:
            self.ended = self._device.now()


class CudaAwareChannel:
    """A group's channel for device arrays, over a channel whose library takes device pointers.

    Args:
        direct: the group's MPI channel.
        device: whose arrays travel.
    """

    def __init__(self, direct: Channel, device: CudaDevice) -> None:
        self.rank, self.size = direct.rank, direct.size
        self.scratch: list[Array] = []
        self._direct, self._device = direct, device

    def collective(self, operation: str, arguments: tuple[Any, ...], begin: Begin) -> Request:
        """Start it on this channel, whose every call waits for the compute stream first."""
        return CudaAwareRequest(self._device, begin(self, arguments))

    def isend(self, buffer: Array, peer: int, tag: int, *, synchronous: bool) -> Request:
        """Start a send."""
        self._device.compute.synchronize()
        return CudaAwareRequest(self._device, self._direct.isend(buffer, peer, tag, synchronous=synchronous))

    def irecv(self, buffer: Array, peer: int, tag: int) -> Request:
        """Start a receive, once no kernel uses the buffer any more."""
        self._device.compute.synchronize()
        return CudaAwareRequest(self._device, self._direct.irecv(buffer, peer, tag))

    def all_reduce(self, buffer: Array, op: ReduceOp, *, blocking: bool) -> Request:
        """Reduce in place."""
        self._device.compute.synchronize()
        return self._direct.all_reduce(buffer, op, blocking=blocking)

    def all_gather(self, send: Array | None, recv: Array, counts: Sequence[int], *, blocking: bool) -> Request:
        """Concatenate parts."""
        self._device.compute.synchronize()
        return self._direct.all_gather(send, recv, counts, blocking=blocking)

    def reduce_scatter(
        self, send: Array, recv: Array, counts: Sequence[int], op: ReduceOp, *, blocking: bool
    ) -> Request:
        """Reduce and keep one part."""
        self._device.compute.synchronize()
        return self._direct.reduce_scatter(send, recv, counts, op, blocking=blocking)

    def all_to_all(
        self, send: Array, recv: Array, send_counts: Sequence[int], recv_counts: Sequence[int], *, blocking: bool
    ) -> Request:
        """Exchange parts."""
        self._device.compute.synchronize()
        return self._direct.all_to_all(send, recv, send_counts, recv_counts, blocking=blocking)

    def broadcast(self, buffer: Array, root: int, *, blocking: bool) -> Request:
        """Copy the root's buffer."""
        self._device.compute.synchronize()
        return self._direct.broadcast(buffer, root, blocking=blocking)

    def barrier(self) -> None:
        """Meet the other ranks."""
        self._direct.barrier()
