"""Fits: few physical figures from many observations, with what they leave unexplained.

All fits weigh relative errors: a task of a microsecond counts as much as one of a second, since a step holds as many
of the first as it takes to make up the second.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares, nnls

from planner.machine import AttentionFigures, GemmCurve, MeasuredRegime
from planner.machine.measured import attention_terms

Floats = NDArray[np.float64]

MAX_REGIMES = 3
CALL_SECONDS = 10e-6
"""Python around one attention kernel: its arguments checked and converted."""

TIMER_SIGMA = 0.01
"""Relative error of any timing: what no fit need be better than."""

ROBUST_PASSES = 5
OUTLIER = 0.1
"""Relative error from which an observation counts for less."""

REGIME_PARAMETERS = 4
"""A further regime is its latency, its bandwidth and its end, which is chosen among many and so counts twice."""


class LineFit(NamedTuple):
    """Regimes of latency plus bandwidth, and the spread of log(measured / fitted)."""

    regimes: tuple[MeasuredRegime, ...]
    log_sigma: float


def fit_regimes(sizes_bytes: Sequence[float], seconds: Sequence[float], *, max_regimes: int = MAX_REGIMES) -> LineFit:
    """Fit latency plus bandwidth in as many regimes as the data asks for (Hockney 1994, piecewise).

    Args:
        sizes_bytes: bytes of each observation.
        seconds: its time.
        max_regimes: most regimes; each needs two distinct sizes.

    Returns:
        Regimes that end between two measured sizes; the last goes on for ever.
    """
    x, y = np.asarray(sizes_bytes, float), np.asarray(seconds, float)
    distinct = np.unique(x)
    best: tuple[float, tuple[float, tuple[MeasuredRegime, ...]]] | None = None
    for count in range(1, max_regimes + 1):
        found = min(
            (_with_ends(x, y, ends) for ends in _divisions(distinct, count)), key=lambda fit: fit[0], default=None
        )
        if found is None:
            continue
        # Schwarz's criterion (1978): a regime must explain more than its own parameters would of noise.
        criterion = len(x) * np.log(found[0] / len(x) + TIMER_SIGMA**2) + count * REGIME_PARAMETERS * np.log(len(x))
        if best is None or criterion < best[0]:
            best = float(criterion), found
    assert best is not None, "there is always a single regime"
    error, regimes = best[1]
    return LineFit(regimes, float(np.sqrt(error / len(x))))


def _divisions(distinct: Floats, count: int) -> list[tuple[float, ...]]:
    """Ends of all regimes but the last: between sizes, at least two sizes in each regime."""
    if count == 1:
        return [()]
    between = range(2, len(distinct) - 1)
    chosen = (cut for cut in combinations(between, count - 1) if all(b - a >= 2 for a, b in pairwise(cut)))
    return [tuple(float(np.sqrt(distinct[i - 1] * distinct[i])) for i in cut) for cut in chosen]


def _with_ends(x: Floats, y: Floats, ends: tuple[float, ...]) -> tuple[float, tuple[MeasuredRegime, ...]]:
    """Squared log error and regimes of one division; non-negative latency and time per byte in each."""
    error, regimes, start = 0.0, [], 0.0
    for end in (*ends, np.inf):
        inside = (x > start) & (x <= end)
        latency, per_byte = _relative_nnls(np.stack([np.ones(inside.sum()), x[inside]], axis=1), y[inside])
        fitted = np.maximum(latency + per_byte * x[inside], 1e-12)
        error += float(np.square(np.log(y[inside] / fitted)).sum())
        regimes.append(
            MeasuredRegime(
                up_to_bytes=None if np.isinf(end) else float(end), latency_seconds=latency, seconds_per_byte=per_byte
            )
        )
        start = end
    return error, tuple(regimes)


def _relative_nnls(columns: Floats, seconds: Floats) -> list[float]:
    """Non-negative coefficients with small relative errors; one that stands out pulls less (Holland & Welsch 1977)."""
    scale = np.maximum(columns.max(axis=0), 1e-300)
    relative, weights = columns / scale / seconds[:, None], np.ones(len(seconds))
    for _ in range(ROBUST_PASSES):
        solution, _ = nnls(relative * weights[:, None], weights)
        weights = 1 / np.sqrt(1 + np.square((relative @ solution - 1) / OUTLIER))
    return [float(value) for value in solution / scale]


def evaluate(regimes: Sequence[MeasuredRegime], nbytes: float) -> float:
    """Seconds of fitted regimes at one size: `planner.cost.regimes_seconds` for one number."""
    seconds = 0.0
    for regime in regimes:
        end = regime.up_to_bytes or np.inf
        seconds = max(seconds, regime.latency_seconds + regime.seconds_per_byte * min(nbytes, end))
        if nbytes <= end:
            break
    return float(seconds)


def fit_excess(
    sizes_bytes: Sequence[float], seconds: Sequence[float], known_seconds: Sequence[float]
) -> MeasuredRegime:
    """Fit latency plus bandwidth to what times exceed known ones by, errors relative to the times."""
    x, y, known = (np.asarray(each, float) for each in (sizes_bytes, seconds, known_seconds))
    columns = np.stack([np.ones(len(x)), x / x.max()], axis=1) / y[:, None]
    target, weights = (y - known) / y, np.ones(len(x))
    for _ in range(ROBUST_PASSES):
        solution, _ = nnls(columns * weights[:, None], target * weights)
        weights = 1 / np.sqrt(1 + np.square((columns @ solution - target) / OUTLIER))
    return MeasuredRegime(latency_seconds=float(solution[0]), seconds_per_byte=float(solution[1] / x.max()))


class GemmFit(NamedTuple):
    """The smooth curve, seconds of one call, and the spread of log(measured / fitted)."""

    curve: GemmCurve
    call_seconds: float
    log_sigma: float


def fit_gemm(shapes: Sequence[tuple[int, int, int]], seconds: Sequence[float], peak_flops_per_second: float) -> GemmFit:
    """Fit `planner.cost.gemm_seconds`: 2 (m + hm)(n + hn)(k + hk) / (fraction · peak) + call.

    Args:
        shapes: (m, n, k) of each product.
        seconds: its time.
        peak_flops_per_second: the rate that `fraction` is relative to.
    """
    sizes, y = np.asarray(shapes, float), np.asarray(seconds, float)

    def curve(parameters: Floats) -> Floats:
        fraction, call, *halves = np.exp(parameters)
        result: Floats = 2.0 * np.prod(sizes + np.asarray(halves), axis=1) / (fraction * peak_flops_per_second) + call
        return result

    start = np.log([0.9, 5e-6, 4.0, 4.0, 16.0])
    low, high = np.log([0.02, 1e-7, 1e-3, 1e-3, 1e-3]), np.log([1.0, 1e-3, 512.0, 512.0, 512.0])

    def residuals(parameters: Floats) -> Floats:
        logs: Floats = np.log(curve(parameters) / y)
        return logs

    solved = least_squares(residuals, start, bounds=(low, high), loss="soft_l1", f_scale=0.1, x_scale=1.0)
    fraction, call, rows, columns, depth = (float(value) for value in np.exp(solved.x))
    fitted = GemmCurve(fraction=min(1.0, fraction), half_rows=rows, half_columns=columns, half_depth=depth)
    return GemmFit(fitted, call, float(np.std(np.log(curve(solved.x) / y))))


def fit_concurrent(
    alone_seconds: Sequence[float], together_seconds: Sequence[float], moved_bytes: Sequence[float]
) -> tuple[float, float]:
    """Fit seconds beside busy neighbours = seconds alone x slowdown + bytes x what sharing the memory bus adds.

    Returns:
        The slowdown, at least 1, and seconds per byte, at least 0; errors are relative to the time alone.
    """
    alone, together, moved = (np.asarray(each, float) for each in (alone_seconds, together_seconds, moved_bytes))
    columns = np.stack([np.ones(len(alone)), moved / moved.max() * alone.max() / alone], axis=1)
    target, weights = together / alone - 1, np.ones(len(alone))
    for _ in range(ROBUST_PASSES):
        solution, _ = nnls(columns * weights[:, None], target * weights)
        weights = 1 / np.sqrt(1 + np.square((columns @ solution - target) / OUTLIER))
    return 1.0 + float(solution[0]), float(solution[1] * alone.max() / moved.max())


def fit_threads(
    cores: int, counts: Sequence[int], seconds: Sequence[Sequence[float]]
) -> tuple[tuple[float, ...], float]:
    """Fit seconds on several threads = seconds on one / speedup + start, one speedup per count and one start.

    Args:
        cores: how many speedups to return.
        counts: numbers of threads, the first of them 1.
        seconds: of the same products on each.
    """
    alone, speedups, starts = np.asarray(seconds[0]), [1.0], [0.0]
    for count, several in zip(counts[1:], seconds[1:], strict=True):
        columns = np.stack([alone, np.ones(len(alone))], axis=1)
        share, start = _relative_nnls(columns, np.asarray(several))
        speedups.append(float(np.clip(1 / max(share, 1e-9), 1.0, count)))
        starts.append(start)
    # More threads slow a product down only where another process holds one of their cores.
    table = np.interp(range(1, cores + 1), counts, np.maximum.accumulate(speedups))
    return tuple(float(value) for value in table), float(np.mean(starts[1:] or [0.0]))


BELOW_LIMIT = 0.8
"""Share of the limit up to which scratch memory is taken to be in proportion to the pairs."""

ATTENTION_TERMS = 4
"""Terms of `AttentionFigures` that are fitted: fewer observations are left to pairs and multiply-adds."""


class AttentionFit(NamedTuple):
    """Figures of one attention kernel, and the spread of log(measured / fitted)."""

    figures: AttentionFigures
    log_sigma: float


def fit_attention(
    works: Sequence[Any], seconds: Sequence[float], *, call_seconds: float = CALL_SECONDS
) -> AttentionFit:
    """Fit the terms of `AttentionFigures` to tasks of one kind.

    Args:
        works: `planner.program.tasks.Work` of each task.
        seconds: its time.
        call_seconds: of one call, known beforehand.
    """
    y = np.asarray(seconds, float)
    # Fitted with the rest, the call would absorb what a few probes do not separate.
    y = np.maximum(y - call_seconds, 0.1 * y)
    columns = np.array([attention_terms(w.m, w.n, w.k, w.batch, w.elements) for w in works], float)
    columns[:, 0] = 0.0
    if len(np.unique(columns[:, 3] / np.maximum(columns[:, 2], 1))) < 2 or len(works) < ATTENTION_TERMS:
        columns[:, [1, 4]] = 0.0  # one width of head does not tell calls and copies from arithmetic
    values = _relative_nnls(columns, y)
    fitted = columns @ np.asarray(values)
    figures = AttentionFigures(
        call_seconds=call_seconds,
        product_seconds=values[1],
        pair_seconds=values[2],
        multiply_add_seconds=values[3],
        element_seconds=values[4],
    )
    return AttentionFit(figures, float(np.sqrt(np.mean(np.log(y / fitted) ** 2))))


def fit_scratch(pairs: Sequence[float], scratch_bytes: Sequence[float]) -> tuple[float, float]:
    """Bytes per query-key pair, and the limit, of what attention takes beside its tensors: min(rate · pairs, limit).

    The largest observation stands for the limit; the rate is that of the observations clearly below it, or the largest
    where there are none.
    """
    counts, taken = np.asarray(pairs, float), np.asarray(scratch_bytes, float)
    limit, rates = float(taken.max()), taken / counts
    below = taken < BELOW_LIMIT * limit
    return float(np.median(rates[below]) if below.any() else rates.max()), limit
