"""Validation before every call: MPI sees an address, a count and a type, and believes all three."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from executor.comm.base import DTYPES, Array, CommunicationError

NARROW = ("float16", "bfloat16")
"""Types that NCCL sums and MPI does not know."""


class Place(NamedTuple):
    """The call being validated, for error messages."""

    axis: str
    ranks: tuple[int, ...]
    operation: str
    key: str

    def error(self, problem: str) -> CommunicationError:
        """Return the error to raise."""
        return CommunicationError(f"{self.operation} {self.key!r} on group {self.axis!r} {self.ranks}: {problem}")


def flat(buffer: Array, place: Place, *, written: bool = False) -> Array:
    """Return a buffer as a flat view.

    Raises:
        CommunicationError: not a C-contiguous array of one of `DTYPES` (in device memory also of 16-bit floating point,
            which NCCL sums), or read-only and `written`.
    """
    if not (isinstance(buffer, np.ndarray) and buffer.dtype in DTYPES) and not _is_known_on_device(buffer):
        kind = getattr(buffer, "dtype", type(buffer).__name__)
        names = ", ".join(sorted(dtype.name for dtype in DTYPES))
        raise place.error(f"buffer of {kind}, not an array of {names}")
    if not buffer.flags.c_contiguous:
        raise place.error(f"buffer of shape {buffer.shape} and strides {buffer.strides} is not C-contiguous")
    if written and not getattr(buffer.flags, "writeable", True):  # device arrays have no such flag
        raise place.error("the buffer to write is read-only")
    return buffer.reshape(-1)


def _is_known_on_device(buffer: Array) -> bool:
    return is_device_array(buffer) and (buffer.dtype in DTYPES or buffer.dtype.name in NARROW)


def full_counts(counts: Sequence[int] | None, total: int, place: Place) -> list[int]:
    """Return element counts per rank; None stands for equal parts.

    Raises:
        CommunicationError: the counts do not add up to `total` elements over the group.
    """
    size = len(place.ranks)
    if counts is None:
        if total % size:
            raise place.error(f"{total} elements do not divide into {size} equal parts; pass counts")
        return [total // size] * size
    counts = [int(count) for count in counts]
    if len(counts) != size or min(counts) < 0 or sum(counts) != total:
        raise place.error(f"counts {counts} do not split a buffer of {total} elements over {size} ranks")
    return counts


def require_match(source: Array, target: Array, place: Place) -> None:
    """Check that a rank's own part fits where it goes.

    Raises:
        CommunicationError: types or numbers of elements differ.
    """
    if source.dtype != target.dtype or source.size != target.size:
        raise place.error(
            f"the own part goes out as {source.size} elements of {source.dtype} "
            f"and comes in as {target.size} of {target.dtype}"
        )


def require_apart(send: Array, recv: Array, place: Place) -> None:
    """Check that two contiguous buffers do not overlap.

    Raises:
        CommunicationError: they do.
    """
    if send.size and recv.size and np.may_share_memory(send, recv):
        raise place.error("send and receive buffers overlap")


def copy_own(source: Array, target: Array, place: Place) -> None:
    """Carry out an operation of one rank: nothing is communicated, but the data still ends up where it belongs."""
    require_match(source, target, place)
    if address(source) != address(target):
        np.copyto(target, source)


def address(buffer: Array) -> int:
    """Return where a buffer's memory starts."""
    if is_device_array(buffer):
        return int(buffer.__cuda_array_interface__["data"][0])  # type: ignore[attr-defined]
    return int(buffer.__array_interface__["data"][0])


def is_device_array(buffer: object) -> bool:
    """Return whether an array lies in device memory."""
    return hasattr(buffer, "__cuda_array_interface__")
