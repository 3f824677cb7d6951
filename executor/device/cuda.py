"""A CUDA device through CuPy: memory, copies, streams and events of one rank; the rules are the package's docstring.

Only calls of CuPy that are listed in its reference are used, and CuPy itself is given, not imported: the tests give a
NumPy-backed emulation that refuses what CuPy refuses and checks the rules.
"""

from __future__ import annotations

import importlib
import math
from collections import deque
from collections.abc import Sequence
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from executor.device.base import Array, DeviceKind, DeviceMemoryError, DeviceNote, Event, Mark

MAX_AHEAD = 4
"""Instructions by which the host may lead its own compute stream: enough to hide every launch, few enough that sends
which nobody has seen complete do not fill the memory."""


LARGE_UPLOAD_BYTES = 16 << 20
"""What only initial parameters exceed: not worth pinned memory that nothing would use again."""


class CudaDevice:
    """One CUDA device as one rank uses it.

    Args:
        cupy: the module.
        index: number of the device among those visible.
        kernels: the table of kernels; `executor.cuda` where None.

    Attributes:
        compute: the stream of all kernels; current in the thread that made the device.
        to_host: the stream of copies to pinned host memory.
        from_host: the stream of copies from it.
        pinned: pinned host buffers, to be taken and given back.
    """

    kind: DeviceKind = "cuda"
    is_host = False

    def __init__(self, cupy: Any, index: int, kernels: Any = None) -> None:
        self.cupy, self.index = cupy, index
        cupy.cuda.Device(index).use()
        if kernels is None:
            import executor.cuda as kernels  # type: ignore[no-redef,unused-ignore]  # noqa: PLC0415 - imports CuPy
        self.kernels = kernels
        self.compute, self.to_host, self.from_host = (cupy.cuda.Stream(non_blocking=True) for _ in range(3))
        self.compute.use()
        self.pinned = PinnedPool(cupy)
        self.held: dict[str, int] = {}
        self._uploads: deque[tuple[Event, NDArray[np.uint8]]] = deque()
        self._ends: deque[Event] = deque()
        self._marks: list[Any] = []  # events of the step, to be used again by the next
        self._marked = 0
        self._origin: tuple[Any, float] | None = None

    # ---- memory ----------------------------------------------------------------------------------------------------

    def allocate(self, nbytes: int) -> Array:
        """Bytes from CuPy's pool, which aligns to 512."""
        return self.empty((nbytes,), np.dtype(np.uint8))

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        """An uninitialised array from CuPy's pool; `DeviceMemoryError` where there is no room."""
        try:
            array: Array = self.cupy.empty(shape, dtype)
        except self.cupy.cuda.memory.OutOfMemoryError as error:
            raise DeviceMemoryError(math.prod(shape) * dtype.itemsize) from error
        return array

    def upload(self, array: NDArray[Any]) -> Array:
        """A host array's values, from pinned memory on the compute stream; the host waits for large ones only."""
        array = np.ascontiguousarray(array)
        target = self.empty(array.shape, array.dtype)
        if not array.nbytes:
            return target
        if array.nbytes > LARGE_UPLOAD_BYTES:
            self._store(target, array)
            return target
        while self._uploads and self._uploads[0][0].done:
            self.pinned.give(self._uploads.popleft()[1])
        room = self.pinned.take(array.nbytes)
        source = room[: array.nbytes].view(array.dtype).reshape(array.shape)
        source[...] = array
        target.set(source, stream=self.compute)  # type: ignore[attr-defined]
        self._uploads.append((self.event(self.compute), room))
        return target

    def download(self, array: Array) -> NDArray[Any]:
        """A copy on the host, after the compute stream."""
        result: NDArray[Any] = array.get(stream=self.compute)  # type: ignore[attr-defined]
        return result

    def _store(self, array: Array, values: NDArray[Any]) -> None:
        """Copy host values in; waits, since the values may be anywhere in host memory."""
        array.set(np.ascontiguousarray(values), stream=self.compute)  # type: ignore[attr-defined]
        self.compute.synchronize()

    def number(self, value: Any) -> float:
        """A scalar of the compute stream."""
        return float(value)

    def peak_bytes(self) -> int:
        """Bytes that CuPy's pool holds, which never shrinks here."""
        return int(self.cupy.get_default_memory_pool().total_bytes())

    def release_unused(self) -> None:
        """Empty CuPy's pool of blocks that no array uses, after everything enqueued on them."""
        self.synchronise()
        self.cupy.get_default_memory_pool().free_all_blocks()

    def use_precision(self, name: str) -> None:
        """Tell cuBLAS whether tf32 will do; tables of kernels without cuBLAS have nothing to tell."""
        products = getattr(self.kernels, "cublas", None)
        if products is not None:
            products.allow_tf32(name == "tf32")

    def free_bytes(self) -> tuple[int, int]:
        """Free and total bytes of the device, all processes counted."""
        free, total = self.cupy.cuda.runtime.memGetInfo()
        return int(free), int(total)

    # ---- streams ---------------------------------------------------------------------------------------------------

    def stream(self) -> Any:
        """A stream of its own."""
        return self.cupy.cuda.Stream(non_blocking=True)

    def event(self, stream: Any, *, timing: bool = False) -> Event:
        """An event behind everything that a stream was given so far."""
        event: Event = stream.record(self.cupy.cuda.Event(disable_timing=not timing))
        return event

    def fork(self, stream: Any) -> None:
        """Let a stream start behind the compute stream (rule 2)."""
        stream.wait_event(self.event(self.compute))

    def join(self, event: Event) -> None:
        """Let the compute stream wait for another's event (rule 3)."""
        self.compute.wait_event(event)

    def copy_to_host(self, source: Array, target: NDArray[np.uint8]) -> None:
        """Enqueue a copy of contiguous device bytes to pinned memory on `to_host`; the stream has been forked."""
        source.get(stream=self.to_host, out=target.view(source.dtype).reshape(source.shape), blocking=False)  # type: ignore[attr-defined]

    def copy_from_host(self, source: NDArray[np.uint8], target: Array) -> None:
        """Enqueue a copy of pinned bytes to contiguous device memory on `from_host`; the stream has been forked."""
        target.set(source.view(target.dtype).reshape(target.shape), stream=self.from_host)  # type: ignore[attr-defined]

    def synchronise(self) -> None:
        """Wait for the compute stream and the copies to the host."""
        self.compute.synchronize()
        self.to_host.synchronize()

    # ---- time ------------------------------------------------------------------------------------------------------

    def now(self) -> Mark:
        """An event on the compute stream."""
        return self.mark(self.compute)

    def mark(self, stream: Any) -> Mark:
        """A timed event on a stream."""
        if self._marked == len(self._marks):
            self._marks.append(self.cupy.cuda.Event())
        event = self._marks[self._marked]
        self._marked += 1
        stream.record(event)
        return event

    def begin_step(self) -> float:
        """Wait for everything before, so that the step's clock and the device's have one origin."""
        self.synchronise()
        self._ends.clear()
        self._marked = 0
        started = perf_counter()
        self._origin = (self.mark(self.compute), started)
        return started

    def seconds(self, marks: Sequence[Mark]) -> list[float]:
        """Events as readings of perf_counter: the step's beginning plus what passed on the device since."""
        assert self._origin is not None, "a step has begun"
        origin, started = self._origin
        elapsed = self.cupy.cuda.get_elapsed_time
        if marks:
            self.cupy.cuda.Device(self.index).synchronize()
        return [started + elapsed(origin, mark) * 1e-3 for mark in marks]

    def end_instruction(self) -> None:
        """Stay at most `MAX_AHEAD` instructions before the compute stream."""
        self._ends.append(self.event(self.compute))
        if len(self._ends) > MAX_AHEAD:
            self._ends.popleft().synchronize()

    def note(self) -> DeviceNote:
        """Name, number, CUDA version and memory."""
        runtime = self.cupy.cuda.runtime
        name = runtime.getDeviceProperties(self.index)["name"]
        version = runtime.runtimeGetVersion()
        text = name.decode() if isinstance(name, bytes) else str(name)
        return DeviceNote(text, self.index, f"{version // 1000}.{version % 1000 // 10}", self.free_bytes()[1])

    def nccl(self) -> Any:
        """CuPy's module of NCCL, None where it finds no library."""
        module = importlib.import_module(f"{self.cupy.__name__}.cuda.nccl")
        return module if module.available else None

    def identity(self) -> str:
        """The device's place on the bus, by which two processes know that they share it."""
        return str(self.cupy.cuda.Device(self.index).pci_bus_id)


class PinnedPool:
    """Pinned host buffers, kept for the next use: pinning takes milliseconds."""

    def __init__(self, cupy: Any) -> None:
        self._cupy = cupy
        self._free: dict[int, list[NDArray[np.uint8]]] = {}
        self.reserved_bytes = 0

    def take(self, nbytes: int) -> NDArray[np.uint8]:
        """At least `nbytes` of pinned memory; sizes are powers of two, so that few serve all."""
        size = 1 << max(12, (nbytes - 1).bit_length())
        free = self._free.get(size)
        if free:
            return free.pop()
        self.reserved_bytes += size
        buffer: NDArray[np.uint8] = np.frombuffer(self._cupy.cuda.alloc_pinned_memory(size), np.uint8, size)
        return buffer

    def give(self, buffer: NDArray[np.uint8]) -> None:
        """Take a buffer back that nothing copies from or to any more."""
        self._free.setdefault(buffer.nbytes, []).append(buffer)
