"""From `--device` to a rank's device: what must be there, and which of a host's GPUs a rank takes."""

from __future__ import annotations

import importlib
import importlib.util
import os
from typing import Any

from executor.device.base import HOST, Device, DeviceKind
from executor.device.cuda import CudaDevice
from planner.errors import DataError

NO_DEVICE = (100, 101)  # cudaErrorNoDevice, cudaErrorInvalidDevice
OLD_DRIVER = 35  # cudaErrorInsufficientDriver


def open_device(kind: DeviceKind, local_rank: int = 0, *, cupy: Any = None, kernels: Any = None) -> Device:
    """The device that a rank computes on.

    Args:
        kind: "cpu" or "cuda".
        local_rank: position among the ranks of this host; ranks go round the host's GPUs.
        cupy: the CuPy module; imported where None.
        kernels: the table of kernels; the device's own where None.

    Raises:
        DataError: CUDA was asked for, and CuPy, the driver or a device is missing.
    """
    if kind == "cpu":
        return HOST
    module = import_cupy() if cupy is None else cupy
    return CudaDevice(module, local_rank % count_devices(module), kernels)


def import_cupy() -> Any:
    """CuPy.

    Raises:
        DataError: it is not installed, or cannot load CUDA's libraries.
    """
    if importlib.util.find_spec("cupy") is None:
        raise DataError(
            "device cuda is not available: CuPy (meshwright's gpu extra) is not installed; install the one of your "
            "CUDA version, cupy-cuda13x or cupy-cuda12x, or use --device cpu"
        )
    try:
        return importlib.import_module("cupy")
    except ImportError as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else "it says no more"
        raise DataError(
            f"device cuda is not available: CuPy is installed but cannot be loaded ({reason}); install the one of your "
            "CUDA version, cupy-cuda13x or cupy-cuda12x, or use --device cpu"
        ) from error


def count_devices(cupy: Any) -> int:
    """How many CUDA devices this process sees, at least one.

    Raises:
        DataError: none, no driver, or a driver older than CuPy's CUDA.
    """
    runtime = cupy.cuda.runtime
    reason = ""
    try:
        count = int(runtime.getDeviceCount())
    except runtime.CUDARuntimeError as error:
        count, reason = 0, _reason(runtime, error)
    if count:
        return count
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if not reason:
        reason = "the driver shows no device" + (
            f" under CUDA_VISIBLE_DEVICES={hidden!r}" if hidden is not None else ""
        )
    raise DataError(f"device cuda is not available: {reason}; use --device cpu")


def _reason(runtime: Any, error: Exception) -> str:
    """Why devices cannot be counted, in words."""
    status, needed = getattr(error, "status", None), int(runtime.runtimeGetVersion())
    try:
        driver = int(runtime.driverGetVersion())
    except runtime.CUDARuntimeError:
        driver = 0
    if driver == 0:
        return "no NVIDIA driver is installed here"
    if status == OLD_DRIVER or driver // 1000 < needed // 1000:
        return (
            f"the NVIDIA driver supports CUDA up to {_version(driver)} and this CuPy needs {_version(needed)}; update "
            f"the driver, or install cupy-cuda{driver // 1000}x"
        )
    if status in NO_DEVICE:
        return "the driver shows no device"
    return f"CUDA says {error}"


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"
