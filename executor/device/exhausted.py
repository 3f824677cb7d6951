"""Out of device memory, in words: which array, how large, what is held, what the plan was predicted to need."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from executor.device.base import Device, DeviceMemoryError
from planner.errors import DataError, MeshwrightError
from planner.plan import Plan
from planner.trace import load_prediction

GIB = 2**30
PREDICTION = "predicted.json"
"""Where `planner suggest` and `planner plan` leave a plan's prediction: beside it."""


@contextmanager
def told_of_memory(plan_file: Path, plan: Plan, rank: int, device: Device) -> Iterator[None]:
    """Turn a lack of device memory into the user's error.

    Raises:
        DataError: the block ran out of memory on a device; CuPy's own errors, of a kernel's scratch, count too.
    """
    try:
        yield
    except MemoryError as error:
        if device.is_host:
            raise
        raise DataError(exhausted(error, predicted_peak_bytes(plan_file, plan, rank), rank, device)) from error


def exhausted(error: MemoryError, predicted_bytes: int | None, rank: int, device: Device) -> str:
    """The message: value, limit, remedy."""
    held = {part: nbytes for part, nbytes in device.held.items() if nbytes}
    parts = ", ".join(f"{part} {_size(nbytes)}" for part, nbytes in held.items()) or "nothing yet"
    if isinstance(error, DeviceMemoryError):
        wanted = f"{error.what or 'a buffer on its way'} needs {_size(error.nbytes)}"
    else:
        wanted = f"a kernel needs scratch memory ({error})"
    wanted += f", beside the {_size(sum(held.values()))} that rank {rank} holds ({parts})"
    free, total = device.free_bytes()
    predicted = (
        "run planner predict for the plan's predicted peak"
        if predicted_bytes is None
        else f"the plan was predicted to peak at {_size(predicted_bytes)} on this rank"
    )
    return (
        f"out of device memory: {wanted}; the device has {_size(free)} of {_size(total)} free, with what other ranks "
        f"and programs on it hold; {predicted}. Use a smaller --micro-batch-size, --recompute full, --zero 3, or "
        "more GPUs"
    )


def predicted_peak_bytes(plan_file: Path, plan: Plan, rank: int) -> int | None:
    """The peak that the prediction beside the plan gives for a rank; None where there is none for this plan."""
    with suppress(MeshwrightError):
        prediction = load_prediction(plan_file.with_name(PREDICTION))
        if prediction.plan_hash == plan.hash and rank < len(prediction.peak_bytes):
            return prediction.peak_bytes[rank]
    return None


def _size(nbytes: int) -> str:
    """A number of bytes for people."""
    if nbytes < 2**20:
        return f"{nbytes} bytes"
    return f"{nbytes / GIB:.2f} GiB" if nbytes >= GIB // 10 else f"{nbytes / 2**20:.1f} MiB"
