"""What the executor uses of `cupy.cuda`."""

from __future__ import annotations

from emulated_cupy import memory
from emulated_cupy.streams import Event, Stream, current_stream, get_elapsed_time

__all__ = [
    "Device",
    "Event",
    "Stream",
    "alloc_pinned_memory",
    "get_current_stream",
    "get_elapsed_time",
    "memory",
    "runtime",
]

get_current_stream = current_stream


def alloc_pinned_memory(size):
    """Host memory: CuPy's pointer is no array, but shows its bytes, signed ones, as a buffer."""
    return memoryview(bytearray(size)).cast("b")


class Device:
    """One of the emulated devices."""

    def __init__(self, index=0):
        self.id = index

    def use(self):
        return self

    def synchronize(self):
        current_stream().synchronize()

    @property
    def pci_bus_id(self):
        return f"0000:{self.id:02x}:00.0"


class CUDARuntimeError(RuntimeError):
    """As CuPy's."""

    def __init__(self, status, text):
        super().__init__(text)
        self.status = status


class runtime:  # noqa: N801 - CuPy's name of the module
    """What this machine has; tests change it."""

    CUDARuntimeError = CUDARuntimeError
    devices = 1
    driver = 13000
    failure = None

    @classmethod
    def getDeviceCount(cls):
        if cls.failure is not None:
            raise cls.failure
        return cls.devices

    @classmethod
    def driverGetVersion(cls):
        return cls.driver

    @staticmethod
    def runtimeGetVersion():
        return 13000

    @staticmethod
    def getDevice():
        return 0

    @staticmethod
    def getDeviceProperties(_):
        return {"name": b"emulated device"}

    memGetInfo = staticmethod(memory.mem_info)  # noqa: N815
