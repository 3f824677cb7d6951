"""Arrays in device memory: NumPy's, which refuse to meet arrays in host memory."""

from __future__ import annotations

import numpy as np

from emulated_cupy.memory import Allocation, poison
from emulated_cupy.streams import current_stream


class MixedArraysError(TypeError):
    """Arrays of host and device in one call."""


class _Pointer:
    def __init__(self, ptr):
        self.ptr = ptr


class ndarray(np.ndarray):  # noqa: N801 - CuPy's name
    """An array in device memory; every operation on it is one of the current stream."""

    allocation: Allocation | None = None

    def __array_finalize__(self, source):
        self.allocation = getattr(source, "allocation", None)

    @property
    def data(self):
        return _Pointer(self.ctypes.data)

    @property
    def __cuda_array_interface__(self):
        return {"shape": self.shape, "typestr": self.dtype.str, "data": (self.ctypes.data, False), "version": 3}

    def __array_ufunc__(self, ufunc, method, *inputs, out=None, **named):
        require_device(ufunc.__name__, (*inputs, *(out or ())), named)
        touch(inputs, out or ())
        outs = {} if out is None else {"out": tuple(plain(x) for x in out)}
        result = getattr(ufunc, method)(*(plain(x) for x in inputs), **outs, **{k: plain(v) for k, v in named.items()})
        if out is not None:
            return out[0] if len(out) == 1 else out
        return fresh(result)

    def __array_function__(self, function, _, arguments, named):
        require_device(function.__name__, arguments, named)
        target = named.get("out")
        touch(leaves(arguments), [x for x in leaves(named) if x is not target], () if target is None else (target,))
        if function in (np.copyto,):
            touch((), (arguments[0],))
        if function is np.broadcast_to:
            named = named | {"subok": True}
        if function in (*VIEWS, np.broadcast_to):
            return super().__array_function__(function, (type(self),), arguments, named)
        result = function(*plain_all(arguments), **{k: plain_all(v) for k, v in named.items()})
        return target if target is not None else fresh(result)

    def __setitem__(self, index, value):
        require_device("assignment", (value, *(index if isinstance(index, tuple) else (index,))), {})
        touch((value,), (self,))
        plain(self)[plain_all(index)] = plain(value)

    def __getitem__(self, index):
        require_device("indexing", index if isinstance(index, tuple) else (index,), {})
        result = super().__getitem__(plain_all(index))
        if not isinstance(result, np.ndarray):
            touch((self,))
            return fresh(result)
        if result.size and not np.may_share_memory(plain(self), plain(result)):
            touch((self,))
            return fresh(plain(result))
        return result

    def copy(self, order="C"):
        touch((self,))
        return fresh(plain(self).copy(order))

    def astype(self, dtype, order="K", copy=True):
        if not copy and self.dtype == dtype:
            return self
        touch((self,))
        return fresh(plain(self).astype(dtype, order))

    def get(self, stream=None, order="C", out=None, blocking=True):
        """CuPy's copy to the host: of contiguous arrays on the stream given, late unless `blocking`."""
        stream = stream or current_stream()
        target = np.empty(self.shape, self.dtype) if out is None else out
        if type(target) is not np.ndarray or target.dtype != self.dtype or target.shape != self.shape:
            raise TypeError(f"cannot get {self.dtype} {self.shape} into {type(target).__name__}")
        source = plain(self)
        stream.enqueue(lambda: np.copyto(target, source), reads=(self,))
        if blocking:
            stream.synchronize()
        return target

    def set(self, values, stream=None):
        """CuPy's copy from the host."""
        if type(values) is not np.ndarray or values.dtype != self.dtype or values.shape != self.shape:
            raise TypeError(f"cannot set {self.dtype} {self.shape} from {type(values).__name__} {values.shape}")
        if not self.flags.c_contiguous:
            raise RuntimeError("Cannot set to non-contiguous array")
        target = plain(self)
        (stream or current_stream()).enqueue(lambda: np.copyto(target, values), writes=(self,))

    def _scalar(self):
        current_stream().synchronize()
        touch((self,))
        return plain(self).item()

    item = _scalar

    def __float__(self):
        return float(self._scalar())

    def __int__(self):
        return int(self._scalar())

    def __bool__(self):
        return bool(self._scalar())

    __index__ = __int__


VIEWS = (np.moveaxis, np.split, np.array_split, np.swapaxes, np.transpose, np.reshape, np.may_share_memory,
         np.shares_memory, np.shape, np.ndim, np.size)  # fmt: skip


def plain(value):
    """The same memory without this class."""
    return np.ndarray.view(value, np.ndarray) if isinstance(value, ndarray) else value


def plain_all(values):
    """The same for all arrays in nested tuples and lists."""
    if isinstance(values, (tuple, list)):
        make = getattr(type(values), "_make", type(values))  # a named tuple takes its fields apart
        return make(plain_all(value) for value in values)
    return plain(values)


def fresh(result):
    """A result as an array of its own; scalars are arrays of no dimensions, as in CuPy."""
    if isinstance(result, tuple):
        return tuple(fresh(part) for part in result)
    if not isinstance(result, (np.ndarray, np.generic)):
        return result
    array = np.asarray(result).view(ndarray)
    array.allocation = Allocation(array.nbytes, array.ctypes.data)
    touch((), (array,))
    return array


def leaves(values):
    """All arrays in nested arguments."""
    for value in values.values() if isinstance(values, dict) else values:
        if isinstance(value, (tuple, list)):
            yield from leaves(value)
        elif isinstance(value, np.ndarray):
            yield value


def require_device(what, arguments, named):
    """Refuse arrays in host memory beside one in device memory."""
    for array in (*leaves(arguments), *leaves(named)):
        if not isinstance(array, ndarray):
            raise MixedArraysError(
                f"{what}: an array of {array.dtype} {array.shape} in host memory among device arrays"
            )


def touch(*groups):
    """Note an operation of the current stream on arrays, which must be its to touch."""
    current_stream().note([x.allocation for group in groups for x in group if isinstance(x, ndarray)])


def empty(shape, dtype=float):
    """Uninitialised memory: poison."""
    array = np.empty(shape, dtype).view(ndarray)
    array.allocation = Allocation(array.nbytes, array.ctypes.data)
    poison(array)
    return array


def empty_like(x):
    return empty(x.shape, x.dtype)


def zeros(shape, dtype=float):
    array = empty(shape, dtype)
    array[...] = 0
    return array


def asarray(x):
    if isinstance(x, ndarray):
        return x
    array = empty(np.shape(x), np.asarray(x).dtype)
    array.set(np.ascontiguousarray(x))
    return array


def asnumpy(x):
    return x.get() if isinstance(x, ndarray) else np.asarray(x)
