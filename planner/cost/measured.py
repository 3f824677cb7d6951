"""Seconds of operators on a machine that `planner profile` has timed: its figures interpolated, never looked up.

Matrix products follow the fitted curve, corrected by what was measured for shapes nearby; attention kernels the sum of
their own terms; memory-bound kernels latency plus bandwidth in the regime of the bytes they move. Far from anything
measured the physical formulas of `planner.cost` stand alone. Ranks that compute side by side slow each other by the
measured factors.

Figures are of float32. In another precision they are that precision's own where it was timed, and else float32's scaled
with the bytes (which on a CPU is what vector lanes do). On a GPU a task's time is the device's alone; what the host
takes to dispatch it is `dispatched_seconds`'.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from planner.cost.compute import gemm_seconds
from planner.cost.sizes import ELEMENT_BYTES, Seconds, Size, regimes_seconds
from planner.machine import AttentionFigures, Device, GemmForm, GemmSample, KernelFigures, Machine
from planner.machine.measured import attention_terms
from planner.program.tasks import Work

LENGTH = 0.4
"""Distance in log size over which the curve's error stays alike (a factor of 1.5 in one dimension)."""

OTHER_FORM = 0.5
"""Distance in the same measure between the three products of a linear layer."""

PRIOR_WEIGHT = 0.05
"""Weight of "no error" beside samples of weight 1 at distance 0."""

STEP_OF = {"attention_step": "attention_blocked"}
"""Kernels of a ring take as long as those of blocked attention, which share their inner loops."""


def measured_seconds(
    machine: Machine, kind: str, work: Work, precision: str, threads: Size = 1, ranks_per_host: Size = 1
) -> Seconds | None:
    """Return the time of an operator's task of a kind ("norm.backward"), or None where none of its kind was measured.

    Args:
        machine: the profile.
        kind: the task's kind.
        work: its sizes, numbers or arrays.
        precision: in which it computes.
        threads: threads of the rank.
        ranks_per_host: ranks at work on the host's cores.

    Returns:
        Seconds, on a CPU with the interpreter's time between two tasks, `overheads.dispatch_seconds`.
    """
    seconds = _operator_seconds(machine, kind, work, precision, threads, ranks_per_host)
    if seconds is None:
        return None
    between = machine.overheads.dispatch_seconds if machine.device.kind == "cpu" else 0.0
    return np.asarray(np.where(np.greater(work.elements, 0), seconds + between, 0.0))[()]


def measured_name(kind: str) -> str:
    """Return under which name the figures of a task's kind stand in a profile: "norm.backward" is "norm_backward"."""
    operator, _, way = kind.partition(".")
    return STEP_OF.get(operator, operator) + ("_backward" if way.startswith("backward") else "")


class TimedFigures(NamedTuple):
    """What was timed that serves a precision, and the precision that it is of."""

    kernels: Mapping[str, KernelFigures]
    attention: Mapping[str, AttentionFigures]
    attention_precision: str
    samples: tuple[GemmSample, ...]
    samples_precision: str

    @classmethod
    def of(cls, device: Device, precision: str) -> TimedFigures:
        """Of a device in a precision, float32's where it has none of its own."""
        own = next((figures for name, figures in device.precisions.items() if name == precision), None)
        if own is None:
            return cls(device.kernels, device.attention, "float32", device.gemm_samples, "float32")
        return cls(
            {**device.kernels, **own.kernels},
            own.attention or device.attention,
            precision if own.attention else "float32",
            own.gemm_samples or device.gemm_samples,
            precision if own.gemm_samples else "float32",
        )


def _operator_seconds(
    machine: Machine, kind: str, work: Work, precision: str, threads: Size, ranks_per_host: Size
) -> Seconds | None:
    """The task itself, by whichever figures its kind has."""
    timed = TimedFigures.of(machine.device, precision)
    operator, _, way = kind.partition(".")
    if operator == "linear":
        return _linear_seconds(machine, way, work, precision, threads, ranks_per_host) if timed.samples else None
    name = measured_name(kind)
    if name in timed.attention:
        visible = 1.0 if operator == "attention_plain" else work.share
        scale = ELEMENT_BYTES[precision] / ELEMENT_BYTES[timed.attention_precision]
        return _attention_seconds(machine, timed.attention[name], work, scale, ranks_per_host) * visible
    kernel = timed.kernels.get(name, timed.kernels.get("default"))
    if kernel is None or not kernel.regimes:
        return None
    slower = concurrent_factor(machine, kernel.concurrent_slowdown, ranks_per_host)
    # Parameters' gradients are float32 under 16-bit training too.
    gradient_bytes = np.multiply(work.elements, max(4, ELEMENT_BYTES[precision]))
    return regimes_seconds(kernel.regimes, gradient_bytes if operator == "gradient_norm" else work.bytes) * slower


def _attention_seconds(
    machine: Machine, figures: AttentionFigures, work: Work, scale: float, ranks_per_host: Size
) -> Seconds:
    """Attention over all pairs, from the terms of its kernel; `scale` of those that move or compute elements."""
    call, products, *terms = attention_terms(work.m, work.n, work.k, work.batch, work.elements)
    by_element = (figures.pair_seconds, figures.multiply_add_seconds, figures.element_seconds)
    seconds = sum(np.multiply(each, count) for each, count in zip(by_element, terms, strict=True))
    seconds = seconds * scale
    seconds = seconds + figures.call_seconds * call + figures.product_seconds * products
    return np.asarray(seconds * concurrent_factor(machine, figures.concurrent_slowdown, ranks_per_host))


def concurrent_factor(machine: Machine, slowdown: float, ranks_per_host: Size) -> Seconds:
    """Return by how much ranks slow one another: `slowdown` with a rank on every core, 1 alone, linear between."""
    return np.asarray(1 + (slowdown - 1) * crowding(machine, ranks_per_host))[()]


def crowding(machine: Machine, ranks_per_host: Size) -> Seconds:
    """Return the share of the other cores that compute: 0 alone, 1 with a rank on every core."""
    return np.asarray(np.clip(np.subtract(ranks_per_host, 1) / max(1, machine.host.cores - 1), 0.0, 1.0))[()]


def _linear_seconds(
    machine: Machine, form: str, work: Work, precision: str, threads: Size, ranks_per_host: Size
) -> Seconds:
    """One of the three products of a linear layer."""
    host = machine.host
    alone = gemm_seconds(machine, work.m, work.n, work.k, work.batch, precision, threads)
    error = gemm_error(machine, form, work.m, work.n, work.k, precision)
    slower = concurrent_factor(machine, host.concurrent_gemm_slowdown, ranks_per_host)
    operands = np.multiply(work.m, work.k) + np.multiply(work.k, work.n) + np.multiply(work.m, work.n)
    moved = np.multiply(work.batch, operands) * ELEMENT_BYTES[precision]
    shared = moved * host.concurrent_gemm_seconds_per_byte * crowding(machine, ranks_per_host)
    return np.asarray(alone * error * slower + shared)


def gemm_error(machine: Machine, form: str, m: Size, n: Size, k: Size, precision: str = "float32") -> Seconds:
    """Return measured over formula for a product, by kernel smoothing in log size (Nadaraya 1964, Watson 1964)."""
    timed = TimedFigures.of(machine.device, precision)
    samples = timed.samples
    sizes, forms = _sample_columns(samples)
    log_sizes = np.log(sizes)
    formula = gemm_seconds(machine, sizes[:, 0], sizes[:, 1], sizes[:, 2], precision=timed.samples_precision)
    log_ratios = np.log([sample.seconds for sample in samples]) - np.log(formula)
    query = np.stack(np.broadcast_arrays(*(np.log(np.maximum(size, 1)) for size in (m, n, k))), axis=-1)
    squared = np.square(query[..., None, :] - log_sizes).sum(axis=-1)
    squared = squared + np.where([form == each for each in forms], 0.0, OTHER_FORM**2)
    weights = np.exp(-squared / (2 * LENGTH**2))
    return np.asarray(np.exp(weights @ log_ratios / (weights.sum(axis=-1) + PRIOR_WEIGHT)))[()]


@lru_cache(maxsize=8)
def _sample_columns(samples: tuple[GemmSample, ...]) -> tuple[npt.NDArray[np.float64], tuple[GemmForm, ...]]:
    """Sizes [samples, 3] and forms."""
    sizes = np.array([(sample.m, sample.n, sample.k) for sample in samples], float)
    return sizes, tuple(sample.form for sample in samples)
