"""The NumPy kernels on emulated device arrays of any type: 16-bit ones are widened to float32 and rounded back."""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

import numpy as np
from emulated_cupy import ndarray
from emulated_cupy.kernels import reference_table


def table() -> Any:
    """A table of kernels that is quick to import and to run, with the name of the real one."""
    module = ModuleType("executor.cuda")
    for name, function in vars(reference_table()).items():
        setattr(module, name, _widened(function) if callable(function) else function)
    return module


def _widened(function: Any) -> Any:
    @functools.wraps(function)
    def call(*arguments: Any, **named: Any) -> Any:
        wide: dict[int, tuple[Any, Any]] = {}

        def widen(value: Any) -> Any:
            if not (isinstance(value, ndarray) and value.dtype.itemsize == 2):
                return value
            if id(value) not in wide:
                wide[id(value)] = (value, value.astype(np.float32))
            return wide[id(value)][1]

        result = function(*map(widen, arguments), **{key: widen(value) for key, value in named.items()})
        for narrow, changed in wide.values():
            narrow[...] = changed.astype(narrow.dtype)
        return result

    return call
