"""Running a kernel of `executor.cuda` beside the reference on the same arguments, and comparing every array."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

import executor.reference.activation
import executor.reference.attention
import executor.reference.blocked
import executor.reference.embedding
import executor.reference.heads
import executor.reference.loss
import executor.reference.matmul
import executor.reference.norm
import executor.reference.optimizer
from executor.reference.masking import Masking

REFERENCE = {
    name: function
    for module in ("activation", "attention", "blocked", "embedding", "heads", "loss", "matmul", "norm", "optimizer")
    for name, function in vars(getattr(executor.reference, module)).items()
    if callable(function) and not name.startswith("_")
}
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = [np.dtype(np.float32), np.dtype(np.float64), BFLOAT16]
ALL_DTYPES = [*DTYPES, np.dtype(np.float16)]
KEY = 0xDEADBEEFCAFEF00D
# Of the largest element. 16 bits: half a unit in the last place, and a little for values that the reference, which
# keeps float32 throughout, has not rounded in between.
TOLERANCE = {"float32": 4e-6, "float64": 2e-13, "bfloat16": 2.0**-8, "float16": 2.0**-11}
GUARD = 64  # elements around every array that nobody may touch


def wide(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """The type of statistics and of parameters' gradients."""
    return np.dtype(np.float32) if dtype.itemsize == 2 else dtype


@dataclass
class Maker:
    """Normal arrays in the type of activations, or wide."""

    dtype: np.dtype[Any]
    seed: int = 0

    def __post_init__(self) -> None:
        self._generator = np.random.default_rng(self.seed)

    def __call__(self, *shape: int) -> Any:
        return self._generator.standard_normal(shape).astype(self.dtype)

    def wide(self, *shape: int) -> Any:
        return self._generator.standard_normal(shape).astype(wide(self.dtype))


class Guarded:
    """Device copies of arrays, each between guards; one copy where one array is given twice."""

    def __init__(self, backend: Any, offset: int = 0) -> None:
        self.backend, self.offset = backend, offset
        self._copies: dict[int, tuple[Any, Any, Any]] = {}

    def __call__(self, array: Any) -> Any:
        if isinstance(array, Masking):
            return Masking(*map(self, array))
        if not isinstance(array, np.ndarray):
            return array
        if id(array) not in self._copies:
            start = GUARD + self.offset
            frame = np.full(array.size + 2 * GUARD + self.offset, 77, array.dtype)
            frame[start : start + array.size] = array.reshape(-1)
            room = self.backend.upload(frame)
            self._copies[id(array)] = (array, room, room[start : start + array.size].reshape(array.shape))
        return self._copies[id(array)][2]

    def check_guards(self) -> None:
        for array, room, _ in self._copies.values():
            frame = self.backend.download(room)
            start = GUARD + self.offset
            assert (frame[:start] == 77).all(), "written before an array"
            assert (frame[start + array.size :] == 77).all(), "written beyond an array"


def close(actual: Any, expected: Any, dtype: np.dtype[Any], slack: float) -> None:
    """Within a tolerance of the largest element; infinities in the same places."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    finite = expected[np.isfinite(expected)]
    largest = max(float(np.abs(finite).max(initial=0)), 1.0)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=TOLERANCE[dtype.name] * slack * largest)


def _flat(args: Any) -> list[Any]:
    """Arguments, with the fields of a masking in its place."""
    return [x for a in args for x in (a if isinstance(a, Masking) else (a,))]


def _downloaded(backend: Any, ours: Any, given: Any) -> Any:
    if isinstance(given, Masking):
        return Masking(*(_downloaded(backend, *each) for each in zip(ours, given, strict=True)))
    return backend.download(ours) if isinstance(given, np.ndarray) else ours


def both(backend: Any, name: str, *args: Any, slack: float = 1.0, offset: int = 0, **kwargs: Any) -> list[Any]:
    """Run a kernel and the reference on copies; every array must end up the same, inputs included.

    The reference runs in float32 where the kernel has 16 bits. Returns the device's arrays on the host.
    """
    device = Guarded(backend, offset)
    ours = [device(a) for a in args]
    copies: dict[int, Any] = {}
    for a in _flat(args):
        if isinstance(a, np.ndarray) and id(a) not in copies:
            copies[id(a)] = a.astype(np.float32) if a.dtype.itemsize == 2 else a.copy()
    theirs = [
        Masking(*(copies.get(id(x), x) for x in a)) if isinstance(a, Masking) else copies.get(id(a), a) for a in args
    ]
    floats = [a.dtype for a in args if isinstance(a, np.ndarray) and a.dtype.kind != "i"]
    narrowest = min(floats, key=lambda dtype: dtype.itemsize)
    result = getattr(backend.kernels, name)(*ours, **kwargs)
    expected = REFERENCE[name](*theirs, **kwargs)
    if expected is not None:
        np.testing.assert_allclose(float(backend.download(result)), expected, rtol=TOLERANCE[narrowest.name])
    device.check_guards()
    found = [_downloaded(backend, a, given) for a, given in zip(ours, args, strict=True)]
    for mine, other, given in zip(*map(_flat, (found, theirs, args)), strict=True):
        if isinstance(given, np.ndarray) and given.dtype.kind == "i":
            np.testing.assert_array_equal(mine, other)
        elif isinstance(given, np.ndarray):
            assert mine.dtype == given.dtype
            close(mine, other, narrowest, slack)
    return found
