"""Device memory: allocations counted, limited, filled with a pattern that no one can mistake for a value."""

from __future__ import annotations

import threading
import weakref

import numpy as np

POISON = 0x7B  # every byte of uninitialised memory: an odd, large number in every type
_lock = threading.Lock()
_places: dict[int, tuple[int, weakref.ref]] = {}
_state = {"used": 0, "peak": 0, "limit": 2**62}


class OutOfMemoryError(MemoryError):
    """As CuPy's."""


class Allocation:
    """One piece of device memory; arrays that are views of it share this object.

    Attributes:
        last_compute: number of the last operation of a compute stream on it.
        writers: (stream, number) of other streams' writes that no compute stream has waited for.
    """

    def __init__(self, nbytes, start=0):
        with _lock:
            if _state["used"] + nbytes > _state["limit"]:
                raise OutOfMemoryError(
                    f"Out of memory allocating {nbytes:,} bytes (allocated so far: {_state['used']:,})"
                )
            _state["used"] += nbytes
            _state["peak"] = max(_state["peak"], _state["used"])
            if nbytes:
                _places[start] = (start + nbytes, weakref.ref(self))
        self.last_compute = 0
        self.writers = []
        weakref.finalize(self, _free, nbytes)


def find(pointer):
    """The allocation that an address lies in; None for one that is no longer, or never was, device memory."""
    with _lock:
        for start, (stop, allocation) in _places.items():
            if start <= pointer < stop and allocation() is not None:
                return allocation()
    return None


def _free(nbytes):
    with _lock:
        _state["used"] -= nbytes


def set_limit(nbytes):
    """Give the device so much memory from now on; None: all it wants."""
    _state["limit"] = 2**62 if nbytes is None else nbytes


def poison(array):
    """Fill an array's memory with the pattern."""
    array._array.reshape(-1).view(np.uint8)[...] = POISON


class _Pool:
    def total_bytes(self):
        """The pool's high-water mark: CuPy's never shrinks by itself."""
        return _state["peak"]

    def used_bytes(self):
        return _state["used"]

    def free_all_blocks(self):
        """Give back what no array uses."""
        with _lock:
            _state["peak"] = _state["used"]


def get_default_memory_pool():
    """The pool's figures."""
    return _Pool()


def mem_info():
    """Free and total bytes."""
    return _state["limit"] - _state["used"], _state["limit"]
