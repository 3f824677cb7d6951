"""Ties: which plans the cost model cannot tell apart, and which of those to prefer.

A prediction's interval is about its absolute time. Two plans for one model, batch and machine are priced from the same
figures, so that most of that error is common to both and cancels in their difference. What is left are the terms in
which they differ: a term's error is the residual of its figure times the seconds by which the plans differ in it, terms
are independent of each other, and two runs of even the same plan lie `RUN_LOG_SIGMA` apart.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from planner.compare import Term, decompose
from planner.machine import Residuals
from planner.predict import NORMAL_80
from planner.trace import Prediction

RUN_LOG_SIGMA = 0.003
"""Spread of log step time between two runs of one plan on a quiet machine."""

FAR = 0.1
"""Plans whose steps lie further apart than this share are no ties, whatever terms cancel in them."""

Terms = Mapping[Term, float]


def _sigma(ours: Terms, theirs: Terms, step_seconds: float, residuals: Residuals) -> float:
    """Return the standard deviation, in seconds, of the error in the difference of two plans' step times."""
    square = 2 * (RUN_LOG_SIGMA * step_seconds) ** 2
    for term in dict.fromkeys((*ours, *theirs)):
        moves = term.cause in ("collective", "transfer", "waiting")
        sigma = residuals.collective_log_sigma if moves else residuals.kernel_log_sigma
        square += (sigma * (theirs.get(term, 0.0) - ours.get(term, 0.0))) ** 2
    return math.sqrt(square)


def ties(best: Prediction, others: Sequence[Prediction], residuals: Residuals) -> list[bool]:
    """Return for each plan whether zero lies in the 80% interval of the difference of its step time and the best's."""
    near = [other is not best and abs(other.step_seconds / best.step_seconds - 1) <= FAR for other in others]
    ours = decompose(best) if any(near) else {}  # long traces take a while
    return [
        other is best
        or (
            close
            and abs(other.step_seconds - best.step_seconds)
            <= NORMAL_80 * _sigma(ours, decompose(other), best.step_seconds, residuals)
        )
        for close, other in zip(near, others, strict=True)
    ]


def count_ties(predictions: Sequence[Prediction], residuals: Residuals) -> int:
    """Return how many of the first predictions tie with the fastest of them; at least 1 of any."""
    if not predictions:
        return 0
    found = ties(min(predictions, key=lambda each: each.step_seconds), predictions, residuals)
    return next((place for place, tied in enumerate(found) if not tied), len(found))


def by_preference(predictions: Sequence[Prediction], residuals: Residuals) -> list[int]:
    """Return the places of predictions from best to worst.

    Those that tie with the fastest come first, the one with most memory headroom leading; the others follow by time.
    """
    if not predictions:
        return []
    fastest = min(predictions, key=lambda each: (each.step_seconds, max(each.peak_bytes)))
    tied = ties(fastest, predictions, residuals)

    def preference(place: int) -> tuple[bool, float, float]:
        peak, seconds = max(predictions[place].peak_bytes), predictions[place].step_seconds
        return (False, peak, seconds) if tied[place] else (True, seconds, peak)

    return sorted(range(len(predictions)), key=preference)
