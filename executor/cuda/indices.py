"""Index arrays on the device: ids, samples, positions, heads.

The executor's index arrays are small and most are constant over a run. Kernels take them from the host or the device;
those of the host are uploaded once per array object, and kept as long as that object lives. An array given here must
not change afterwards. An upload is ordered on the stream of its first use: all kernels run on one stream.
"""

from __future__ import annotations

import weakref
from typing import Any

import cupy
import numpy as np

from executor.reference.arrays import Ints

_uploaded: dict[tuple[int, str], tuple[Any, Any]] = {}  # by identity and type: who it was made from, the copy


def is_on_device(array: Any) -> bool:
    """Whether an array is the device's."""
    return isinstance(array, cupy.ndarray)


def on_device(array: Ints, dtype: type[np.integer[Any]] = np.int64) -> Any:
    """The array on the current device, contiguous and of this type."""
    if is_on_device(array) and array.dtype == dtype:
        return array
    place = (id(array), np.dtype(dtype).name)
    found = _uploaded.get(place)
    if found is not None and found[0]() is array:
        return found[1]
    copy: Any = array.astype(dtype) if is_on_device(array) else cupy.asarray(np.ascontiguousarray(array, dtype=dtype))
    _uploaded[place] = (weakref.ref(array, lambda _: _uploaded.pop(place, None)), copy)
    return copy


def on_host(array: Ints) -> Ints:
    """The array on the host. One that lives on the device is fetched when first seen, the only wait for the device."""
    if not is_on_device(array):
        return array
    place = (id(array), "host")
    found = _uploaded.get(place)
    if found is None or found[0]() is not array:
        copy = cupy.asnumpy(array)
        found = _uploaded[place] = (weakref.ref(array, lambda _: _uploaded.pop(place, None)), copy)
    result: Ints = found[1]
    return result
