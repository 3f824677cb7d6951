"""`executor.cuda` for a test: on a GPU where CuPy finds one, else on the CPU through this package."""

from __future__ import annotations

import contextlib
import functools
import importlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

import executor
from cuda_on_cpu import blas
from cuda_on_cpu.module import EmulatedModule, available

PACKAGE = "executor.cuda"
POISON = 0x7B  # every byte of uninitialised memory: an odd, large number in every type


@dataclass(frozen=True)
class Backend:
    """The kernels with what a test needs to feed them.

    Attributes:
        kernels: the package `executor.cuda`.
        upload: from a NumPy array to one of the device.
        download: the way back.
        emulated: whether this is the CPU.
    """

    kernels: Any
    upload: Callable[[Any], Any]
    download: Callable[[Any], Any]
    emulated: bool

    def module(self, name: str) -> Any:
        """A module of the package."""
        return getattr(self.kernels, name)


class DeviceArray(np.ndarray):
    """An array that counts as the device's: what would make the host wait for the device is refused."""

    def _refuse(self, *_: Any) -> Any:
        raise AssertionError("a kernel's Python side waits for the device")

    __float__ = __int__ = __bool__ = __index__ = item = tolist = _refuse


def _empty(shape: Any, dtype: Any) -> Any:
    array = np.empty(shape, dtype).view(DeviceArray)
    array.reshape(-1).view(np.uint8)[...] = POISON
    return array


def _upload(array: Any) -> Any:
    return np.array(array).view(DeviceArray)


def _cupy() -> ModuleType:
    """The calls of CuPy that the kernels use, over NumPy."""
    module = ModuleType("cupy")
    calls = {
        "ndarray": DeviceArray,
        "RawModule": lambda *, code, options: EmulatedModule(code, options),
        "empty": _empty,
        "empty_like": lambda x: _empty(x.shape, x.dtype),
        "zeros": lambda shape, dtype: _upload(np.zeros(shape, dtype)),
        "asarray": _upload,
        "asnumpy": np.asarray,
        "broadcast_to": lambda x, shape: np.broadcast_to(x, shape, subok=True),
        "may_share_memory": np.may_share_memory,
    }
    for name, call in calls.items():
        setattr(module, name, call)
    return module


@contextlib.contextmanager
def _replaced(modules: dict[str, Any]) -> Iterator[None]:
    """Put modules in place of the real ones and forget afterwards everything imported on top of them."""
    hidden = {name: sys.modules.pop(name) for name in list(sys.modules) if name.startswith((PACKAGE, "cupy"))}
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name in [name for name in sys.modules if name.startswith((PACKAGE, "cupy"))]:
            del sys.modules[name]
        sys.modules.update(hidden)
        executor.__dict__.pop("cuda", None)  # the import left the package there


def emulated() -> Backend:
    """The kernels over NumPy arrays, compiled by g++."""
    with _replaced({"cupy": _cupy(), f"{PACKAGE}.cublas": blas}):
        package = importlib.import_module(PACKAGE)
        package.cublas = blas
    return Backend(package, _upload, np.asarray, True)


def on_gpu() -> Backend | None:
    """The kernels on this machine's GPU, or None."""
    try:
        import cupy

        if cupy.cuda.runtime.getDeviceCount() == 0:
            return None
    except Exception:  # no CuPy, no driver, no device: CuPy raises a type of its own for each
        return None
    return Backend(importlib.import_module(PACKAGE), cupy.asarray, cupy.asnumpy, False)


@functools.cache
def best() -> Backend | None:
    """The GPU, else the emulation, else None where there is no compiler."""
    return on_gpu() or (emulated() if available() else None)
