"""Ties: which plans the cost model cannot tell apart, and which of those to prefer.

A prediction's interval is about its absolute time. Two plans for one model, batch and machine are priced from the same
figures, so that most of that error is common to both and cancels in their difference. What is left are the terms in
which they differ: a term's error is the residual of its figure times the seconds by which the plans differ in it, terms
are independent of each other, and two runs of even the same plan lie `RUN_LOG_SIGMA` apart.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from planner.compare import decompose
from planner.machine import Residuals
from planner.predict import NORMAL_80
from planner.trace import Prediction

RUN_LOG_SIGMA = 0.003
"""Spread of log step time between two runs of one plan on a quiet machine."""


def gap_sigma_seconds(first: Prediction, second: Prediction, residuals: Residuals) -> float:
    """Return the standard deviation of the error in the difference of two plans' step times."""
    ours, theirs = decompose(first), decompose(second)
    square = 2 * (RUN_LOG_SIGMA * first.step_seconds) ** 2
    for term in dict.fromkeys((*ours, *theirs)):
        moves = term.cause in ("collective", "transfer", "waiting")
        sigma = residuals.collective_log_sigma if moves else residuals.kernel_log_sigma
        square += (sigma * (theirs.get(term, 0.0) - ours.get(term, 0.0))) ** 2
    return math.sqrt(square)


def tied(best: Prediction, other: Prediction, residuals: Residuals) -> bool:
    """Whether zero lies in the 80% interval of the difference of two plans' step times."""
    gap = abs(other.step_seconds - best.step_seconds)
    return gap <= NORMAL_80 * gap_sigma_seconds(best, other, residuals)


def count_ties(predictions: Sequence[Prediction], residuals: Residuals) -> int:
    """Return how many of the first predictions tie with the fastest of them; at least 1 of any."""
    if not predictions:
        return 0
    fastest = min(predictions, key=lambda each: each.step_seconds)
    count = 0
    while count < len(predictions) and tied(fastest, predictions[count], residuals):
        count += 1
    return count


def by_preference(predictions: Sequence[Prediction], residuals: Residuals) -> list[int]:
    """Return the places of predictions from best to worst.

    Those that tie with the fastest come first, the one with most memory headroom leading; the others follow by time.
    """
    if not predictions:
        return []
    fastest = min(predictions, key=lambda each: (each.step_seconds, max(each.peak_bytes)))

    def preference(place: int) -> tuple[bool, float, float]:
        each = predictions[place]
        peak, seconds = max(each.peak_bytes), each.step_seconds
        return (False, peak, seconds) if tied(fastest, each, residuals) else (True, seconds, peak)

    return sorted(range(len(predictions)), key=preference)
