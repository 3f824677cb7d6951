"""Sweep: the best plan at each of many numbers of workers, as scaling curves.

Strong scaling keeps the global batch, weak scaling keeps the batch per worker (Amdahl 1967; Gustafson 1988). Either way
speedup is the ratio of tokens per second to the smallest number of workers that can hold the model, and efficiency is
that speedup over the ratio of workers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec

from planner.errors import MeshwrightError, PlanError
from planner.search.request import SearchRequest
from planner.search.suggest import Ranked

SECONDS_PER_HOUR, HOURS_PER_DAY = 3600.0, 24.0


class Point(msgspec.Struct, frozen=True, kw_only=True):
    """One number of workers.

    Attributes:
        workers: Number of ranks.
        global_batch_size: Sequences per step.
        best: The best plan; None where nothing fits.
        speedup: Tokens per second over those of the smallest number of workers that fits.
        efficiency: Speedup over the ratio of workers.
        days: To train on the token budget; None without one.
        dollars: What those days cost; None where the profile has no price.
        reason: Why there is no plan.
    """

    workers: int
    global_batch_size: int
    best: Ranked | None
    speedup: float | None = None
    efficiency: float | None = None
    days: float | None = None
    dollars: float | None = None
    reason: str = ""


@dataclass(frozen=True)
class Sweep:
    """All points, fewest workers first."""

    weak: bool
    points: tuple[Point, ...]
    tokens: float | None
    dollars_per_hour: float | None
    price_provenance: str = ""


def parse_workers(text: str) -> tuple[int, ...]:
    """Read `8..16384` (the ends and the powers of two between), or a list such as `8,12,16`.

    Raises:
        PlanError: no such range or list, or one without a positive number.
    """
    match = re.fullmatch(r"([1-9]\d*)\.\.([1-9]\d*)", text.strip(), re.ASCII)
    if match is not None:
        low, high = int(match[1]), int(match[2])
        if low > high:
            raise PlanError(f"--workers {text} runs backwards; write the smaller number first, as in 8..16384")
        powers = {2**power for power in range(high.bit_length() + 1)}
        return tuple(sorted({low, high} | {count for count in powers if low < count < high}))
    entries = [entry.strip() for entry in text.split(",")]
    if not all(re.fullmatch(r"[1-9]\d*", entry, re.ASCII) for entry in entries):
        raise PlanError(f"--workers {text} is no range or list of positive numbers; write 8..16384 or 8,12,16")
    return tuple(sorted(set(map(int, entries))))


def sweep(
    request: SearchRequest,
    workers: Sequence[int],
    *,
    weak: bool = False,
    tokens: float | None = None,
    dollars_per_hour: float | None = None,
    told: Callable[[int], None] | None = None,
) -> Sweep:
    """Search at each number of workers.

    Args:
        request: What is asked; its batch is that of all points (strong) or of the first (weak).
        workers: Numbers of ranks, ascending.
        weak: Keep the batch per worker.
        tokens: Budget for days and price.
        dollars_per_hour: Price of one device; None takes the profile's.
        told: Is told of each number before it is searched.

    Raises:
        PlanError: the token budget or price is not positive, or nothing fits on any number of workers.
    """
    for name, value, such in (("tokens", tokens, "300e9"), ("dollars-per-hour", dollars_per_hour, "2.5")):
        if value is not None and not 0 < value < float("inf"):
            raise PlanError(f"--{name} {value:g} is out of range; use a positive number, such as {such}")
    answers: list[tuple[int, int, Ranked | str]] = []
    for count in workers:
        if told is not None:
            told(count)
        size = request.global_batch_size
        size = max(1, round(size * count / workers[0])) if weak else size
        try:
            found: Ranked | str = request.but(workers=count, global_batch_size=size, top=1).ask().plans[0]
        except MeshwrightError as error:
            found = str(error)
        answers.append((count, size, found))
    price = dollars_per_hour or request.machine.device.dollars_per_hour
    points = _points(answers, tokens, price)
    if all(point.best is None for point in points):
        raise PlanError(f"nothing fits on any of {', '.join(map(str, workers))} workers: {points[-1].reason}")
    origin = "given" if dollars_per_hour is not None else request.machine.device.price_provenance
    return Sweep(weak, points, tokens, price, origin if price is not None else "")


def _points(
    answers: Sequence[tuple[int, int, Ranked | str]], tokens: float | None, price: float | None
) -> tuple[Point, ...]:
    base: tuple[int, float] | None = None
    points = []
    for count, size, found in answers:
        if isinstance(found, str):
            points.append(Point(workers=count, global_batch_size=size, best=None, reason=found))
            continue
        rate = found.prediction.tokens_per_second
        base = base or (count, rate)
        speedup = rate / base[1]
        days = None if tokens is None else tokens / rate / SECONDS_PER_HOUR / HOURS_PER_DAY
        points.append(
            Point(
                workers=count,
                global_batch_size=size,
                best=found,
                speedup=speedup,
                efficiency=speedup * base[0] / count,
                days=days,
                dollars=None if days is None or price is None else days * HOURS_PER_DAY * count * price,
            )
        )
    return tuple(points)
