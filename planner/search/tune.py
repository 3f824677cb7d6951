"""Tune: the best plans of a search, run in turns, ranked again by what they take.

Machines drift: clocks fall as they warm, neighbours come and go. Plans therefore take turns, A B C A B C, and a round's
common slowness is taken out: in log seconds a run is its plan's effect plus its round's effect plus noise (a two-way
layout without interaction, Fisher 1925), and in a complete layout the least-squares effect of a plan is the mean of its
rounds. What the measured plans took against what was predicted also says how far to trust the predictions of the plans
that were not run, and so which of those is still worth a run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import msgspec
import numpy as np
from scipy.stats import spearmanr

from planner.machine import Residuals
from planner.plan import Plan
from planner.predict import NORMAL_80
from planner.search.suggest import Ranked
from planner.search.ties import RUN_LOG_SIGMA
from planner.trace import Measurement

Run = Callable[[int, Plan, int], Measurement]
"""(place, plan, round) -> what running it gave."""

LEAST_MEASURED_FOR_SPREAD = 3
"""Fewer runs than this say nothing of how the model errs from plan to plan."""


class Tuned(msgspec.Struct, frozen=True, kw_only=True):
    """One plan, as predicted and as measured.

    Attributes:
        place: Its place in the search's answer, 0 the best predicted.
        measured_rank: Its rank by measured time, from 1.
        predicted_seconds: Its step as predicted.
        measured_seconds: Its step with the drift of rounds taken out, at the pace of an average round.
        low_seconds: End of the 80% interval of that.
        high_seconds: Its other end.
        round_seconds: Median step of each round.
        regret: What running it costs over the best plan measured, as a fraction.
    """

    place: int
    measured_rank: int
    predicted_seconds: float
    measured_seconds: float
    low_seconds: float
    high_seconds: float
    round_seconds: list[float]
    regret: float


class NextRun(msgspec.Struct, frozen=True, kw_only=True):
    """The plan not yet run whose predicted interval overlaps that of the best most, in seconds."""

    place: int
    low_seconds: float
    high_seconds: float
    overlap_seconds: float


@dataclass(frozen=True)
class Tuning:
    """The plans that were run, best measured first, and what would be worth measuring next.

    Attributes:
        tuned: Every plan that was run.
        regret: Of the plan predicted best: its measured time over the best measured, minus one.
        spearman: Rank correlation of predicted and measured times; None for fewer than three plans.
        noise: Relative spread of one plan's runs once plan and round are taken out; None for one round.
        drift: Slowest round over the fastest, minus one.
        bias: Median of measured over predicted.
        next_run: Which further measurement would separate the rest best; None where none overlaps.
    """

    tuned: tuple[Tuned, ...]
    regret: float
    spearman: float | None
    noise: float | None
    drift: float
    bias: float
    next_run: NextRun | None


def interleave(plans: Sequence[Plan], rounds: int, run: Run) -> list[list[Measurement]]:
    """Run plans in turns; return the measurements [plan][round]."""
    found: list[list[Measurement]] = [[] for _ in plans]
    for number in range(rounds):
        for place, plan in enumerate(plans):
            found[place].append(run(place, plan, number))
    return found


def tune(plans: Sequence[Ranked], seconds: Sequence[Sequence[float]], residuals: Residuals) -> Tuning:
    """Rank plans by what they took.

    Args:
        plans: The search's answer; the first `len(seconds)` were run.
        seconds: Median step of each plan and round, [plans][rounds].
        residuals: Of the machine's profile, for plans that were not run.
    """
    log = np.log(np.asarray(seconds, float))
    effects, per_round = log.mean(axis=1), log.mean(axis=0)
    count, rounds = log.shape
    left = log - effects[:, None] - per_round[None, :] + log.mean()
    freedom = (count - 1) * (rounds - 1)
    noise = math.sqrt(float((left**2).sum()) / freedom) if freedom else None
    # The residual spread is known from few runs: never below what separates two runs of one plan.
    width = math.exp(NORMAL_80 * max(noise or 0.0, RUN_LOG_SIGMA) / math.sqrt(rounds))
    measured = np.exp(effects)
    best = float(measured.min())
    order = np.argsort(measured, kind="stable").tolist()
    tuned = tuple(
        Tuned(
            place=place,
            measured_rank=rank,
            predicted_seconds=plans[place].prediction.step_seconds,
            measured_seconds=float(measured[place]),
            low_seconds=float(measured[place]) / width,
            high_seconds=float(measured[place]) * width,
            round_seconds=list(seconds[place]),
            regret=float(measured[place]) / best - 1,
        )
        for rank, place in enumerate(order, 1)
    )
    predicted = [each.prediction.step_seconds for each in plans[:count]]
    foreseen = min(range(count), key=lambda place: (place != 0, predicted[place]))
    return Tuning(
        tuned=tuned,
        regret=float(measured[foreseen]) / best - 1,
        spearman=_rank_correlation(predicted, measured.tolist()),
        noise=noise,
        drift=float(np.exp(per_round.max() - per_round.min()) - 1),
        bias=median(m / p for m, p in zip(measured.tolist(), predicted, strict=True)),
        next_run=next_measurement(plans, tuned, residuals),
    )


def _rank_correlation(predicted: Sequence[float], measured: Sequence[float]) -> float | None:
    if len(predicted) < 3 or len(set(predicted)) < 2 or len(set(measured)) < 2:
        return None
    return float(spearmanr(predicted, measured).statistic)


def next_measurement(plans: Sequence[Ranked], tuned: Sequence[Tuned], residuals: Residuals) -> NextRun | None:
    """Return the plan not yet run whose interval overlaps that of the best measured plan most.

    Predictions are first brought to the pace that was measured (their common error), and their spread is that of the
    plans that were run around that pace; the kernels' residual where too few were run to tell.

    Args:
        plans: The search's answer.
        tuned: Those of them that were run, best first.
        residuals: Of the machine's profile.
    """
    logs = [math.log(each.measured_seconds / each.predicted_seconds) for each in tuned]
    pace = median(logs)
    enough = len(logs) >= LEAST_MEASURED_FOR_SPREAD
    sigma = float(np.std(logs, ddof=1)) if enough else residuals.kernel_log_sigma
    width = math.exp(NORMAL_80 * max(sigma, RUN_LOG_SIGMA))
    best, ran = tuned[0], {each.place for each in tuned}
    found: list[NextRun] = []
    for place, each in enumerate(plans):
        if place in ran:
            continue
        expected = each.prediction.step_seconds * math.exp(pace)
        low, high = expected / width, expected * width
        # What of the plan's interval is not clearly slower than the best: all of it that lies below the best's end.
        overlap = min(high, best.high_seconds) - low
        if overlap > 0:
            found.append(NextRun(place=place, low_seconds=low, high_seconds=high, overlap_seconds=overlap))
    return max(found, key=lambda each: each.overlap_seconds, default=None)
