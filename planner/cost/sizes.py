"""Sizes and seconds as the cost formulas take them: numbers or NumPy arrays alike, and what every formula shares."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from planner.machine import MeasuredRegime

Size: TypeAlias = float | npt.NDArray[Any]
Flag: TypeAlias = bool | npt.NDArray[np.bool_]
Seconds: TypeAlias = npt.NDArray[np.float64]  # of the broadcast shape; a NumPy scalar for scalar arguments

ELEMENT_BYTES = {"float64": 8, "float32": 4, "tf32": 4, "float16": 2, "bfloat16": 2, "fp8": 1}


def regimes_seconds(regimes: tuple[MeasuredRegime, ...], n: Size) -> Seconds:
    """Return latency plus bandwidth of the regime of a size, never less than the end of the regimes before it."""
    seconds = np.zeros(np.shape(n))
    start = 0.0
    for regime in sorted(regimes, key=lambda item: item.up_to_bytes or np.inf):
        end = regime.up_to_bytes or np.inf
        here = regime.latency_seconds + regime.seconds_per_byte * np.minimum(n, end)
        seconds = np.where(np.greater(n, start), np.maximum(seconds, here), seconds)
        start = end
    return np.asarray(seconds)


def if_any(work: Size, seconds: Size) -> Seconds:
    """Return the seconds where there is work, zero elsewhere: nothing is called for nothing."""
    return np.asarray(np.where(np.greater(work, 0), seconds, 0.0))[()]
