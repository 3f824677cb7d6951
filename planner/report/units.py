"""Figures as people read them; the only place where seconds become milliseconds and bytes gibibytes."""

from __future__ import annotations

import math


def seconds_text(seconds: float) -> str:
    """Return a duration with three significant digits, such as `12.3 ms` or `4.05 s`."""
    size = abs(seconds)
    if size >= 1000:
        return f"{seconds:.0f} s"
    if size >= 1:
        return f"{_three(seconds)} s"
    if size >= 1e-3:
        return f"{_three(seconds * 1e3)} ms"
    return f"{_three(seconds * 1e6)} µs" if size else "0"


def bytes_text(size: float) -> str:
    """Return a size with three significant digits in binary units, such as `1.50 GiB`."""
    for unit, scale in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size >= scale:
            return f"{_three(size / scale)} {unit}"
    return f"{size:.0f} B" if size else "0"


def percent_text(fraction: float | None, *, signed: bool = False) -> str:
    """Return a fraction as a percentage; a dash for none."""
    if fraction is None:
        return "–"
    if not math.isfinite(fraction):
        return "∞"
    sign = "+" if signed else ""
    digits = 0 if abs(fraction) >= 9.995 else 1
    return f"{fraction * 100:{sign}.{digits}f}%".replace("-", "−")


def rate_text(per_second: float) -> str:
    """Return a rate such as `12.3 k`."""
    for unit, scale in ((" M", 1e6), (" k", 1e3)):
        if per_second >= scale:
            return f"{_three(per_second / scale)}{unit}"
    return _three(per_second)


def flops_text(flops_per_second: float) -> str:
    """Return a rate of floating-point operations, such as `312 TFLOP/s`."""
    for unit, scale in (("P", 1e15), ("T", 1e12), ("G", 1e9)):
        if flops_per_second >= scale:
            return f"{_three(flops_per_second / scale)} {unit}FLOP/s"
    return f"{_three(flops_per_second / 1e6)} MFLOP/s"


def count_text(count: int) -> str:
    """Return a count with thin groups of three digits."""
    return f"{count:,}"


def _three(value: float) -> str:
    """Three significant digits, never in exponential form."""
    size = abs(value)
    digits = 2 if size < 9.995 else 1 if size < 99.95 else 0
    return f"{value:.{digits}f}".replace("-", "−")
