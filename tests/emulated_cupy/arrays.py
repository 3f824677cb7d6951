"""Arrays in device memory. They are no NumPy arrays, as CuPy's are not: what is not here, the executor may not use.

An array holds a NumPy array and shows of it what `cupy.ndarray` has. NumPy's functions reach it by the two protocols
that CuPy implements, and only those functions and arguments that CuPy 14 has (read in its sources, and compared with
the package by `test_device_comm` where it is installed). Everything else, `np.asarray` above all, is refused.
"""

from __future__ import annotations

import operator
from types import SimpleNamespace

import numpy as np

from emulated_cupy.memory import Allocation, poison
from emulated_cupy.streams import current_stream

FUNCTIONS = {
    "array_split": (), "concatenate": ("axis", "out"), "copyto": (), "may_share_memory": (), "moveaxis": (),
    "split": ("axis",), "sum": ("axis", "dtype", "out"), "swapaxes": (), "stack": ("axis", "out"),
}  # fmt: skip
"""NumPy's functions that the executor calls on device arrays, and their named arguments: CuPy has all of these."""

UFUNCS = ("add", "subtract", "multiply", "maximum", "minimum", "sqrt", "square")
"""The same of universal functions, which CuPy has for every type including bfloat16; `out` is all they take here."""

VIEWS = ("array_split", "may_share_memory", "moveaxis", "split", "swapaxes")


class MixedArraysError(TypeError):
    """Arrays of host and device in one call."""


class ndarray:  # noqa: N801 - CuPy's name
    """An array in device memory; every operation on it is one of the current stream."""

    __array_priority__ = 100
    __slots__ = ("__weakref__", "_array", "allocation")
    __eq__ = __ne__ = __hash__ = None  # CuPy compares element by element, which nobody means

    def __init__(self, array, allocation):
        self._array, self.allocation = array, allocation

    # ---- what it is ----------------------------------------------------------------------------------------------

    shape, dtype, size, nbytes, itemsize, ndim, strides = (
        property(operator.attrgetter(f"_array.{name}"))
        for name in ("shape", "dtype", "size", "nbytes", "itemsize", "ndim", "strides")
    )

    @property
    def flags(self):
        """CuPy knows no `writeable`."""
        flags = self._array.flags
        return SimpleNamespace(c_contiguous=flags.c_contiguous, f_contiguous=flags.f_contiguous)

    @property
    def data(self):
        return SimpleNamespace(ptr=self._array.ctypes.data)

    @property
    def __cuda_array_interface__(self):
        strides = None if self._array.flags.c_contiguous else self.strides
        place = (self._array.ctypes.data if self.size else 0, False)
        described = {"shape": self.shape, "typestr": self.dtype.str, "descr": self.dtype.descr, "strides": strides}
        return described | {"data": place, "version": 3, "stream": current_stream().ptr}

    def __len__(self):
        return len(self._array)

    def __array__(self, *_, **__):
        raise TypeError("Implicit conversion to a NumPy array is not allowed. Please use `.get()`.")

    # ---- views ---------------------------------------------------------------------------------------------------

    def _seen_as(self, array):
        return ndarray(array, self.allocation)

    def reshape(self, *shape):
        """A view where there is one, else a copy, as in NumPy."""
        result = self._array.reshape(*shape)
        if result.size and not np.may_share_memory(result, self._array):
            touch((self,))
            return fresh(result)
        return self._seen_as(result)

    def transpose(self, *axes):
        return self._seen_as(self._array.transpose(*axes))

    def view(self, dtype):
        return self._seen_as(self._array.view(dtype))

    def __getitem__(self, index):
        parts = index if isinstance(index, tuple) else (index,)
        require_device("indexing", parts, {})
        result = self._array[plain_all(index)]
        if any(isinstance(part, ndarray) for part in parts):
            touch((self, *parts))
            return fresh(result)
        if not isinstance(result, np.ndarray):  # one element: of no dimensions, and still this memory
            result = self._array[(*parts, ...)]
        return self._seen_as(result)

    # ---- operations ----------------------------------------------------------------------------------------------

    def __array_ufunc__(self, ufunc, method, *inputs, out=None, **named):
        if method != "__call__" or ufunc.__name__ not in UFUNCS or named:
            raise NotImplementedError(f"numpy.{ufunc.__name__}.{method} with {sorted(named)} on device arrays")
        require_device(ufunc.__name__, (*inputs, *(out or ())), {})
        touch(inputs, out or ())
        if out is None:
            return fresh(ufunc(*map(plain, inputs)))
        ufunc(*map(plain, inputs), out=tuple(map(plain, out)))
        return out[0]

    def __array_function__(self, function, _, arguments, named):
        name = function.__name__
        if name not in FUNCTIONS or not set(named) <= set(FUNCTIONS[name]):
            raise NotImplementedError(f"numpy.{name} with {sorted(named)} on device arrays")
        require_device(name, arguments, named)
        if name in VIEWS:
            result = function(*plain_all(arguments), **named)
            return [self._seen_as(each) for each in result] if isinstance(result, list) else (
                self._seen_as(result) if isinstance(result, np.ndarray) else result
            )  # fmt: skip
        target = named.get("out", arguments[0] if name == "copyto" else None)
        touch(leaves(arguments), () if target is None else (target,))
        result = function(*plain_all(arguments), **{key: plain(value) for key, value in named.items()})
        return target if target is not None else fresh(result)

    def __setitem__(self, index, value):
        require_device("assignment", (value, *(index if isinstance(index, tuple) else (index,))), {})
        touch((value,), (self,))
        self._array[plain_all(index)] = plain(value)

    def copy(self):
        touch((self,))
        return fresh(self._array.copy())

    def astype(self, dtype):
        touch((self,))
        return fresh(self._array.astype(dtype))

    def sum(self, axis=None, dtype=None, out=None):
        touch((self,), () if out is None else (out,))
        result = self._array.sum(axis, dtype, plain(out))
        return fresh(result) if out is None else out

    # ---- host ----------------------------------------------------------------------------------------------------

    def get(self, stream=None, order="C", out=None, blocking=True):
        """CuPy's copy to the host: of contiguous arrays on the stream given, late unless `blocking`."""
        stream = stream or current_stream()
        target = np.empty(self.shape, self.dtype) if out is None else out
        if type(target) is not np.ndarray or target.dtype != self.dtype or target.shape != self.shape:
            raise TypeError(f"cannot get {self.dtype} {self.shape} into {type(target).__name__}")
        if out is not None and not self._array.flags.c_contiguous:
            raise RuntimeError("a copy on the compute stream would come before this one")
        source = self._array
        stream.enqueue(lambda: np.copyto(target, source), reads=(self,))
        if blocking:
            stream.synchronize()
        return target

    def set(self, values, stream=None):
        """CuPy's copy from the host."""
        if type(values) is not np.ndarray or values.dtype != self.dtype or values.shape != self.shape:
            raise TypeError(f"cannot set {self.dtype} {self.shape} from {type(values).__name__} {values.shape}")
        if not self._array.flags.c_contiguous:
            raise RuntimeError("Cannot set to non-contiguous array")
        target = self._array
        (stream or current_stream()).enqueue(lambda: np.copyto(target, values), writes=(self,))

    def item(self):
        current_stream().synchronize()
        touch((self,))
        return self._array.item()

    def __float__(self):
        return float(self.item())

    def __int__(self):
        return int(self.item())

    def __bool__(self):
        return bool(self.item())


def _operators():
    """Python's operators that the executor uses, by their universal functions."""
    for name in ("add", "subtract", "multiply"):
        short, function = {"subtract": "sub", "multiply": "mul"}.get(name, name), getattr(np, name)
        setattr(ndarray, f"__{short}__", lambda self, other, f=function: f(self, other))
        setattr(ndarray, f"__r{short}__", lambda self, other, f=function: f(other, self))
        setattr(ndarray, f"__i{short}__", lambda self, other, f=function: f(self, other, out=self))


_operators()


def plain(value):
    """The same memory as a NumPy array."""
    return value._array if isinstance(value, ndarray) else value


def plain_all(values):
    """The same for all arrays in nested tuples and lists."""
    if isinstance(values, (tuple, list)):
        make = getattr(type(values), "_make", type(values))  # a named tuple takes its fields apart
        return make(plain_all(value) for value in values)
    return plain(values)


def fresh(result):
    """A result as an array of its own; scalars are arrays of no dimensions, as in CuPy."""
    array = np.asarray(result)
    made = ndarray(array, Allocation(array.nbytes, array.ctypes.data))
    touch((), (made,))
    return made


def leaves(values):
    """All arrays in nested arguments."""
    for value in values.values() if isinstance(values, dict) else values:
        if isinstance(value, (tuple, list)):
            yield from leaves(value)
        elif isinstance(value, (np.ndarray, ndarray)):
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
    array = np.empty(shape, dtype)
    made = ndarray(array, Allocation(array.nbytes, array.ctypes.data))
    poison(made)
    return made


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
    array.set(np.ascontiguousarray(x).reshape(array.shape))
    return array


def asnumpy(x):
    return x.get() if isinstance(x, ndarray) else np.asarray(x)


def may_share_memory(a, b):
    return np.may_share_memory(plain(a), plain(b))


def broadcast_to(x, shape):
    """A view with strides of 0."""
    return ndarray(np.broadcast_to(x._array, shape), x.allocation)
