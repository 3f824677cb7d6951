"""The Device protocol, and the host: NumPy arrays, one time line, nothing to order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import perf_counter
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from executor import kernels
from executor.reference.arrays import aligned_bytes

Array: TypeAlias = NDArray[Any]
"""An array of the device at hand: numpy.ndarray on the host, cupy.ndarray on a CUDA device."""

DeviceKind = Literal["cpu", "cuda"]
Mark: TypeAlias = Any
"""A moment on a device's time line, read by `Device.seconds`."""


class DeviceMemoryError(MemoryError):
    """A device has no room for an allocation.

    Attributes:
        nbytes: what was asked for.
        what: the array, "" where the device does not know it.
    """

    def __init__(self, nbytes: int, what: str = "") -> None:
        super().__init__(f"no room for {nbytes} bytes{' of ' + what if what else ''}")
        self.nbytes, self.what = nbytes, what


class Event(Protocol):
    """A point in a stream's order; CuPy's Event has these names."""

    @property
    def done(self) -> bool:
        """Whether the stream has passed the point."""

    def synchronize(self) -> None:
        """Return when it has."""


class Flight(Protocol):
    """An operation on a stream of its own, with the moments at which it began and ended there."""

    began: Mark
    ended: Mark


class DeviceNote(NamedTuple):
    """What a measurement says about the device."""

    name: str
    number: int  # among those that the rank sees
    runtime: str  # CUDA's version, "" on the host
    total_bytes: int


class Device(Protocol):
    """Memory, copies and time of one rank's device.

    Attributes:
        kind: "cpu" or "cuda".
        is_host: arrays are host memory; nothing is copied and nothing needs ordering.
        kernels: the table of kernels over its arrays: the names of `executor.kernels`.
        held: live bytes of the rank's newest arena on it, by part, for messages.
    """

    kind: DeviceKind
    is_host: bool
    kernels: Any
    held: dict[str, int]

    def allocate(self, nbytes: int) -> Array:
        """Uninitialised bytes, aligned to a cache line; `DeviceMemoryError` where there is no room."""

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        """An uninitialised array that no arena counts."""

    def upload(self, array: NDArray[Any]) -> Array:
        """A host array's values on the device; the host may change its array afterwards."""

    def download(self, array: Array) -> NDArray[Any]:
        """An array's values on the host, after waiting for what writes them."""

    def number(self, value: Any) -> float:
        """A scalar as a host float, after waiting for what computes it."""

    def now(self) -> Mark:
        """The moment that the compute stream reaches here."""

    def seconds(self, marks: Sequence[Mark]) -> list[float]:
        """Moments as readings of this process's clock (perf_counter), after waiting for them."""

    def begin_step(self) -> float:
        """Start a step's time line; the reading of this process's clock at its beginning."""

    def end_instruction(self) -> None:
        """Note the end of an instruction; waits where the host is too far ahead of the device."""

    def synchronise(self) -> None:
        """Wait for everything enqueued."""

    def peak_bytes(self) -> int:
        """High-water mark of the device memory that this process took from the driver; 0 on the host."""

    def release_unused(self) -> None:
        """Give memory that no array uses back to the driver."""

    def use_precision(self, name: str) -> None:
        """Set how products of float32 operands are taken: "tf32" allows rounding them."""

    def free_bytes(self) -> tuple[int, int]:
        """Free and total bytes of its memory; zeros on the host."""

    def note(self) -> DeviceNote:
        """What the device is."""


class HostDevice:
    """The host's memory and its one time line."""

    kind: DeviceKind = "cpu"
    is_host = True
    kernels: Any = kernels
    held: dict[str, int] = {}  # noqa: RUF012 - the host's is never told
    now: Callable[[], float] = staticmethod(perf_counter)

    def allocate(self, nbytes: int) -> Array:
        """Aligned bytes."""
        return aligned_bytes(nbytes)

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        """An uninitialised array."""
        return np.empty(shape, dtype)

    def upload(self, array: NDArray[Any]) -> Array:
        """The array itself."""
        return array

    def download(self, array: Array) -> NDArray[Any]:
        """The array itself."""
        return array

    def number(self, value: Any) -> float:
        """As a float."""
        return float(value)

    def seconds(self, marks: Sequence[Mark]) -> list[float]:
        """The clock's readings are the marks."""
        return list(marks)

    def begin_step(self) -> float:
        """Now."""
        return perf_counter()

    def end_instruction(self) -> None:
        """The host is where the program is."""

    def synchronise(self) -> None:
        """Nothing is under way."""

    def peak_bytes(self) -> int:
        """The host's memory is measured as the process's own."""
        return 0

    def release_unused(self) -> None:
        """The host's allocator does what it does."""

    def use_precision(self, name: str) -> None:
        """The host has no other products; `executor.emulated` rounds for it."""

    def free_bytes(self) -> tuple[int, int]:
        """The host's memory is the system's to give."""
        return 0, 0

    def note(self) -> DeviceNote:
        """Nothing beyond what the environment says."""
        return DeviceNote("", 0, "", 0)


HOST = HostDevice()
