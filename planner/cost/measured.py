"""Seconds of operators on a machine that `planner profile` has timed: its figures interpolated, never looked up.

Matrix products follow the fitted curve, corrected by what was measured for shapes nearby; attention kernels the sum of
their own terms; memory-bound kernels latency plus bandwidth in the regime of the bytes they move. Far from anything
measured the physical formulas of `planner.cost` stand alone. Ranks that compute side by side slow each other by the
measured factors.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt

from planner.cost.compute import gemm_seconds
from planner.cost.sizes import ELEMENT_BYTES, Seconds, Size, regimes_seconds
from planner.machine import AttentionFigures, GemmForm, GemmSample, Machine
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
        precision: in which it computes; measured figures are of float32 and scale with the bytes.
        threads: threads of the rank.
        ranks_per_host: ranks at work on the host's cores.

    Returns:
        Seconds with the interpreter's time between two tasks, `overheads.dispatch_seconds`.
    """
    seconds = _operator_seconds(machine, kind, work, precision, threads, ranks_per_host)
    if seconds is None:
        return None
    return np.asarray(np.where(np.greater(work.elements, 0), seconds + machine.overheads.dispatch_seconds, 0.0))[()]


def _operator_seconds(
    machine: Machine, kind: str, work: Work, precision: str, threads: Size, ranks_per_host: Size
) -> Seconds | None:
    """The task itself, by whichever figures its kind has."""
    device = machine.device
    operator, _, way = kind.partition(".")
    if operator == "linear":
        return _linear_seconds(machine, way, work, precision, threads, ranks_per_host) if device.gemm_samples else None
    name = STEP_OF.get(operator, operator) + ("_backward" if way.startswith("backward") else "")
    if name in device.attention:
        visible = 1.0 if operator == "attention_plain" else work.share
        return _attention_seconds(machine, device.attention[name], work, precision, ranks_per_host) * visible
    kernel = device.kernels.get(name, device.kernels.get("default"))
    if kernel is None or not kernel.regimes:
        return None
    slower = concurrent_factor(machine, kernel.concurrent_slowdown, ranks_per_host)
    moved = np.multiply(work.elements, ELEMENT_BYTES[precision]) if operator == "gradient_norm" else work.bytes
    return regimes_seconds(kernel.regimes, moved) * slower


def _attention_seconds(
    machine: Machine, figures: AttentionFigures, work: Work, precision: str, ranks_per_host: Size
) -> Seconds:
    """Attention over all pairs, from the terms of its kernel."""
    call, products, *terms = attention_terms(work.m, work.n, work.k, work.batch, work.elements)
    by_element = (figures.pair_seconds, figures.multiply_add_seconds, figures.element_seconds)
    seconds = sum(np.multiply(each, count) for each, count in zip(by_element, terms, strict=True))
    seconds = seconds * ELEMENT_BYTES[precision] / ELEMENT_BYTES["float32"]
    seconds = seconds + figures.call_seconds * call + figures.product_seconds * products
    return np.asarray(seconds * concurrent_factor(machine, figures.concurrent_slowdown, ranks_per_host))


def concurrent_factor(machine: Machine, slowdown: float, ranks_per_host: Size) -> Seconds:
    """Return by how much ranks slow one another: `slowdown` with a rank on every core, 1 alone, linear between."""
    others = np.clip(np.subtract(ranks_per_host, 1) / max(1, machine.host.cores - 1), 0.0, 1.0)
    return np.asarray(1 + (slowdown - 1) * others)[()]


def _linear_seconds(
    machine: Machine, form: str, work: Work, precision: str, threads: Size, ranks_per_host: Size
) -> Seconds:
    """One of the three products of a linear layer."""
    alone = gemm_seconds(machine, work.m, work.n, work.k, work.batch, precision, threads)
    error = gemm_error(machine, form, work.m, work.n, work.k)
    return alone * error * concurrent_factor(machine, machine.host.concurrent_gemm_slowdown, ranks_per_host)


def gemm_error(machine: Machine, form: str, m: Size, n: Size, k: Size) -> Seconds:
    """Return measured over formula for a product, by kernel smoothing in log size (Nadaraya 1964, Watson 1964)."""
    samples = machine.device.gemm_samples
    sizes, forms = _sample_columns(samples)
    log_sizes = np.log(sizes)
    formula = gemm_seconds(machine, sizes[:, 0], sizes[:, 1], sizes[:, 2])
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
