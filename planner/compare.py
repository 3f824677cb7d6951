"""Compare: one join of two records of a plan, by operator, collective, rank and cause.

A rank's step is its spans on the compute stream and what lies between them. So, meaned over ranks,

    step = compute + communication + waiting for slower ranks + bubble + overhead

holds in every record, overhead being the step less all spans (in a measurement also what the traced step differs from
the median step by, so that it can be negative). The error of the step is the sum of the errors of the terms: the
contributions below add up to it exactly. An error is (predicted - measured) / measured, a fraction; `error_seconds` is
predicted - measured, so that a negative one says that the prediction was too low.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Literal, NamedTuple

import msgspec

from planner.errors import DataError
from planner.trace import Prediction, Record, is_communication, is_pipeline_wait

Cause = Literal["compute", "collective", "transfer", "waiting", "bubble", "overhead"]
Pair = Literal["prediction and measurement", "two predictions", "two measurements"]

LARGEST = 3
"""How many contributions are told in a sentence each."""


class Figure(msgspec.Struct, frozen=True, kw_only=True):
    """One figure of both records; None for an error relative to nothing."""

    name: str
    predicted: float
    measured: float
    error: float | None


class OperatorError(msgspec.Struct, frozen=True, kw_only=True):
    """One key: seconds of work per step, mean over ranks; None where a record does not have the key."""

    key: str
    predicted_seconds: float | None
    measured_seconds: float | None
    error: float | None
    predicted_bytes: int
    measured_bytes: int


class Contribution(msgspec.Struct, frozen=True, kw_only=True):
    """One term of the step's error, to which all `error_seconds` add up; `share` is of the measured step."""

    cause: Cause
    name: str
    predicted_seconds: float
    measured_seconds: float
    error_seconds: float
    share: float


class RankError(msgspec.Struct, frozen=True, kw_only=True):
    """Busy seconds of one rank in the step."""

    rank: int
    predicted_seconds: float
    measured_seconds: float
    error: float | None


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """Two records side by side; with two of one kind the first stands as predicted, the second as measured.

    Attributes:
        pair: Which kinds were compared.
        plan_hashes: Of the first and the second record; different only for two of one kind.
        machines: Names of the machines of both.
        figures: step_seconds, compute_seconds, communication_seconds, wait_seconds, bubble_seconds, overhead_seconds
            (means over ranks), bubble_fraction, peak_bytes (largest over ranks).
        within_interval: Whether the measured step lies in the prediction's 80% interval.
        contributions: All terms of the step's error, largest first.
        operators: Every key of either record, most measured seconds first.
        ranks: Every rank.
        slowest_rank: The rank with most busy seconds, measured.
        rank_spread: (most - least busy seconds) / mean, measured.
    """

    pair: Pair
    plan_hashes: tuple[str, str]
    machines: tuple[str, str]
    figures: tuple[Figure, ...]
    within_interval: bool | None
    contributions: tuple[Contribution, ...]
    operators: tuple[OperatorError, ...]
    ranks: tuple[RankError, ...]
    slowest_rank: int
    rank_spread: float

    def figure(self, name: str) -> Figure:
        """Return one of the figures by name."""
        return next(figure for figure in self.figures if figure.name == name)

    @property
    def largest(self) -> tuple[Contribution, ...]:
        """The contributions worth a sentence each."""
        return tuple(term for term in self.contributions if term.error_seconds)[:LARGEST]


class Term(NamedTuple):
    """What a span's seconds are booked under."""

    cause: Cause
    name: str


OVERHEAD = Term("overhead", "between operators")
BUBBLE = Term("bubble", "pipeline bubble")


def compare(predicted: Record, measured: Record) -> Comparison:
    """Lay two records side by side and attribute the difference of their step times.

    A measurement and a prediction may come in either order. Two predictions, or two measurements, may be of different
    plans: then it is the plans that are compared, the first against the second.

    Raises:
        DataError: a prediction and a measurement of different plans.
    """
    if isinstance(measured, Prediction) and not isinstance(predicted, Prediction):
        predicted, measured = measured, predicted
    pair = _pair(predicted, measured)
    if predicted.plan_hash != measured.plan_hash and pair == "prediction and measurement":
        raise DataError(
            f"the prediction is of plan {predicted.plan_hash}, the measurement of plan {measured.plan_hash}; "
            "predict the measured plan with 'planner predict', or run the predicted one"
        )
    terms = decompose(predicted), decompose(measured)
    busy = measured.rank_seconds
    mean = sum(busy) / len(busy)
    return Comparison(
        pair=pair,
        plan_hashes=(predicted.plan_hash, measured.plan_hash),
        machines=(predicted.machine.name, measured.machine.name),
        figures=_figures(predicted, measured, terms),
        within_interval=_within(predicted, measured, pair),
        contributions=_contributions(*terms, measured.step_seconds),
        operators=_operators(predicted, measured),
        ranks=_ranks(predicted, measured),
        slowest_rank=max(range(len(busy)), key=busy.__getitem__),
        rank_spread=(max(busy) - min(busy)) / mean if mean else 0.0,
    )


def relative_error(predicted: float, measured: float) -> float | None:
    """Return (predicted - measured) / measured; 0 for 0 against 0, None for a figure against 0."""
    if measured:
        return (predicted - measured) / measured
    return None if predicted else 0.0


def decompose(record: Record) -> dict[Term, float]:
    """Return the seconds of each term of the step, mean over ranks; they add up to `step_seconds`.

    A rank class whose trace holds only some of its ranks is represented by them.
    """
    weight = rank_weights(record)
    by_key: dict[tuple[str, str], float] = defaultdict(float)  # a step has thousands of spans and few keys
    for rank, stream, key, start, end, kind in record.trace:
        if stream == "compute":
            by_key[key, kind] += (end - start) * weight.get(rank, 0.0)
    terms: dict[Term, float] = defaultdict(float)
    for (key, kind), seconds in by_key.items():
        terms[term_of(key, kind)] += seconds
    terms[OVERHEAD] = record.step_seconds - sum(terms.values())
    return dict(terms)


def term_of(key: str, kind: str) -> Term:
    """What a span on the compute stream is booked under: compute by operator, collectives by axis and kind."""
    axis, _, rest = key.partition(".")
    if kind == "wait":
        if is_pipeline_wait(key):
            return BUBBLE
        return Term("waiting", f"{axis}.{rest.partition('.')[0]}")
    if is_communication(key):
        return Term("transfer" if axis == "pp" else "collective", f"{axis}.{rest.partition('.')[0]}")
    return Term("compute", rest if axis.isdigit() else key)


PLACES = ("compute", "tp", "cp", "dp", "pp", "waiting", "bubble", "overhead")
"""Where the time of a step goes; an axis means exposed communication on it."""

_AXIS_PLACE = {"tp": "tp", "cp": "cp", "dp": "dp", "data": "dp", "world": "dp", "pp": "pp", "tie": "pp"}


def breakdown(record: Record) -> dict[str, float]:
    """Return the seconds of the step by place, mean over ranks; they add up to `step_seconds`."""
    places = dict.fromkeys(PLACES, 0.0)
    for term, seconds in decompose(record).items():
        moves = term.cause in ("collective", "transfer")
        places[_AXIS_PLACE[term.name.partition(".")[0]] if moves else term.cause] += seconds
    return places


def rank_weights(record: Record) -> dict[int, float]:
    """The share of all ranks that each rank of the trace stands for; they add up to 1.

    Ranks of a class are represented by those of it that are in the trace, a class of which none is by the traced ranks
    of its pipeline position (a coarse replay follows one rank per position).
    """
    mesh = record.plan.mesh
    traced = sorted({row[0] for row in record.trace})
    at_position: dict[int, list[int]] = defaultdict(list)
    for rank in traced:
        at_position[mesh.coordinate(rank).pp].append(rank)
    weights = dict.fromkeys(traced, 0.0)
    for ranks in record.rank_classes:
        own = [rank for rank in ranks if rank in weights]
        stand_ins = own or at_position[mesh.coordinate(ranks[0]).pp] or traced
        for rank in stand_ins:
            weights[rank] += len(ranks) / (mesh.world_size * len(stand_ins))
    return weights


def _pair(first: Record, second: Record) -> Pair:
    kinds = isinstance(first, Prediction), isinstance(second, Prediction)
    if all(kinds):
        return "two predictions"
    return "prediction and measurement" if any(kinds) else "two measurements"


def _within(predicted: Record, measured: Record, pair: Pair) -> bool | None:
    if pair != "prediction and measurement" or not isinstance(predicted, Prediction):
        return None
    return predicted.low_seconds <= measured.step_seconds <= predicted.high_seconds


def _figures(
    predicted: Record, measured: Record, terms: tuple[dict[Term, float], dict[Term, float]]
) -> tuple[Figure, ...]:
    def total(which: int, *causes: Cause) -> float:
        return sum(seconds for term, seconds in terms[which].items() if term.cause in causes)

    pairs: list[tuple[str, float, float]] = [("step_seconds", predicted.step_seconds, measured.step_seconds)]
    named: tuple[tuple[str, tuple[Cause, ...]], ...] = (
        ("compute_seconds", ("compute",)),
        ("communication_seconds", ("collective", "transfer")),
        ("wait_seconds", ("waiting",)),
        ("bubble_seconds", ("bubble",)),
        ("overhead_seconds", ("overhead",)),
    )
    pairs += [(name, total(0, *causes), total(1, *causes)) for name, causes in named]
    pairs.append(("bubble_fraction", predicted.bubble_fraction, measured.bubble_fraction))
    pairs.append(("peak_bytes", max(predicted.peak_bytes, default=0), max(measured.peak_bytes, default=0)))
    return tuple(
        Figure(name=name, predicted=first, measured=second, error=relative_error(first, second))
        for name, first, second in pairs
    )


def _contributions(
    predicted: dict[Term, float], measured: dict[Term, float], step_seconds: float
) -> tuple[Contribution, ...]:
    found = []
    for term in dict.fromkeys((*predicted, *measured)):
        first, second = predicted.get(term, 0.0), measured.get(term, 0.0)
        found.append(
            Contribution(
                cause=term.cause,
                name=term.name,
                predicted_seconds=first,
                measured_seconds=second,
                error_seconds=first - second,
                share=(first - second) / step_seconds if step_seconds else 0.0,
            )
        )
    return tuple(sorted(found, key=lambda term: -abs(term.error_seconds)))


def _operators(predicted: Record, measured: Record) -> tuple[OperatorError, ...]:
    seconds = key_seconds(predicted), key_seconds(measured)
    payload = [{key: time.bytes for key, time in record.operators.items()} for record in (predicted, measured)]
    found = []
    for key in dict.fromkeys((*seconds[0], *seconds[1])):
        first, second = seconds[0].get(key), seconds[1].get(key)
        found.append(
            OperatorError(
                key=key,
                predicted_seconds=first,
                measured_seconds=second,
                error=None if first is None or second is None else relative_error(first, second),
                predicted_bytes=payload[0].get(key, 0),
                measured_bytes=payload[1].get(key, 0),
            )
        )
    return tuple(sorted(found, key=lambda each: -max(each.measured_seconds or 0.0, each.predicted_seconds or 0.0)))


def key_seconds(record: Record) -> dict[str, float]:
    """Return the seconds of work of every key, mean over all ranks, each class represented as in `decompose`."""
    weights = rank_weights(record)
    shares = [sum(weights.get(rank, 0.0) for rank in ranks) for ranks in record.rank_classes]
    return {
        key: sum(seconds * share for seconds, share in zip(time.seconds, shares, strict=True))
        for key, time in record.operators.items()
    }


def _ranks(predicted: Record, measured: Record) -> tuple[RankError, ...]:
    """Both records' ranks; two plans may have different numbers of them, and only common ranks are paired."""
    rows: Iterable[tuple[float, float]] = zip(predicted.rank_seconds, measured.rank_seconds, strict=False)
    return tuple(
        RankError(rank=rank, predicted_seconds=first, measured_seconds=second, error=relative_error(first, second))
        for rank, (first, second) in enumerate(rows)
    )
