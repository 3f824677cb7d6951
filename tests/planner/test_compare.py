"""Comparing: the terms of a step add up to it, and a known error is found, named and sized."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from planner.compare import PLACES, breakdown, compare, decompose, key_seconds, relative_error
from planner.errors import DataError
from planner.machine import load_machine
from planner.mesh import Mesh
from planner.model import with_sizes
from planner.plan import Plan, make_plan
from planner.predict import predict
from planner.trace import Measurement, OperatorTime, Prediction, Span, figures, operator_times

MODEL = with_sizes(layers=4, hidden=64, heads=4, seq_len=32)


def _plan(**axes: int) -> Plan:
    return make_plan(MODEL, Mesh(**axes), global_batch_size=8, micro_batch_size=2)


def _predicted(**axes: int) -> Prediction:
    return predict(_plan(**axes), load_machine("cpu-generic"))


def _measured(prediction: Prediction, seconds: Callable[[Span], float] = lambda span: span.seconds) -> Measurement:
    """A run in which every span of the prediction took `seconds(span)`, back to back on each rank and stream."""
    spans: list[Span] = []
    clock: dict[tuple[int, str], float] = {}
    for span in prediction.spans():
        lane = span.rank, span.stream
        start = clock.get(lane, 0.0)
        clock[lane] = start + seconds(span)
        spans.append(span._replace(start=start, end=clock[lane]))
    overhead = prediction.step_seconds - max(row[4] for row in prediction.trace)
    step = max(clock.values()) + overhead
    ranks = sorted({span.rank for span in spans})
    figure = figures(spans, ranks, step)
    classes = [[rank] for rank in ranks]
    shared = {name: getattr(prediction, name) for name in ("plan", "plan_hash", "machine", "peak_bytes", "peak_parts")}
    return Measurement(
        **shared,
        step_seconds=step,
        tokens_per_second=1.0,
        mfu=0.1,
        bubble_fraction=figure.bubble_fraction,
        exposed_communication_seconds=figure.exposed_mean_seconds,
        exposed_communication_seconds_max=figure.exposed_max_seconds,
        wait_seconds=figure.wait_seconds,
        rank_seconds=figure.rank_seconds,
        rank_classes=classes,
        operators=operator_times(spans, classes, {}),
        trace=[tuple(span) for span in spans],
        steps=[step],
        losses=[5.0],
        gradient_norms=[1.0],
        resident_bytes=[1] * len(ranks),
        environment={},
    )


@pytest.mark.parametrize("axes", [{}, {"dp": 2}, {"tp": 2, "pp": 2}, {"cp": 2}, {"dp": 8}])
def test_the_terms_of_a_step_add_up_to_it(axes: dict[str, int]) -> None:
    prediction = _predicted(**axes)
    assert sum(decompose(prediction).values()) == pytest.approx(prediction.step_seconds, rel=1e-12)
    places = breakdown(prediction)
    assert tuple(places) == PLACES
    assert sum(places.values()) == pytest.approx(prediction.step_seconds, rel=1e-12)


def test_the_breakdown_agrees_with_the_figures_of_the_file() -> None:
    prediction = _predicted(tp=2, pp=2)
    places = breakdown(prediction)
    assert places["bubble"] / prediction.step_seconds == pytest.approx(prediction.bubble_fraction)
    assert places["waiting"] == pytest.approx(prediction.wait_seconds)
    exposed = sum(places[axis] for axis in ("tp", "cp", "dp", "pp"))
    assert exposed == pytest.approx(prediction.exposed_communication_seconds)
    assert places["tp"] > 0
    assert places["bubble"] > 0


def test_a_trace_of_representatives_stands_for_all_ranks() -> None:
    """On 64 ranks only some are in the trace: uneven classes must be weighted by their size."""
    plan = make_plan(MODEL, Mesh(dp=64), global_batch_size=96, micro_batch_size=1)
    prediction = predict(plan, load_machine("a100-80gb"))
    assert len({row[0] for row in prediction.trace}) < 64
    assert sum(breakdown(prediction).values()) == pytest.approx(prediction.step_seconds, rel=1e-12)
    # Half of the replicas have one sequence and half two; the mean is between, and not the plain mean of keys.
    mean = sum(prediction.rank_seconds) / 64
    places = breakdown(prediction)
    assert places["compute"] + places["dp"] == pytest.approx(mean)


def test_a_coarse_trace_of_one_rank_per_position_stands_for_all() -> None:
    """Classes of which no rank is in the trace are not lost, in the terms as in the keys."""
    prediction = _predicted(tp=2, pp=2)
    whole = breakdown(prediction), key_seconds(prediction)
    prediction.trace = [row for row in prediction.trace if row[0] in (0, 2)]
    prediction.rank_classes = [[0], [1], [2], [3]]
    for time in prediction.operators.values():
        first, last = time.seconds[0], time.seconds[-1]
        time.seconds[:] = [first, 0.0, last, 0.0]
    assert breakdown(prediction) == pytest.approx(whole[0])
    assert key_seconds(prediction) == pytest.approx(whole[1])


def test_equal_records_have_no_error() -> None:
    prediction = _predicted(dp=2)
    comparison = compare(prediction, _measured(prediction))
    assert comparison.figure("step_seconds").error == pytest.approx(0.0, abs=1e-9)
    assert all(abs(term.share) < 1e-9 for term in comparison.contributions)
    assert comparison.within_interval is True
    assert all(each.error is not None and abs(each.error) < 1e-9 for each in comparison.operators)


def test_a_slow_operator_is_named_first_with_its_seconds() -> None:
    prediction = _predicted(dp=2)
    slow = "layer.ffn_in.forward"
    comparison = compare(prediction, _measured(prediction, lambda s: s.seconds * (3 if s.key.endswith(slow) else 1)))
    lost = 2 * sum(s.seconds for s in prediction.spans() if s.key.endswith(slow) and s.rank == 0)
    first = comparison.largest[0]
    assert (first.cause, first.name) == ("compute", slow)
    assert first.error_seconds == pytest.approx(-lost)
    assert first.share == pytest.approx(-lost / comparison.figure("step_seconds").measured)
    (operator,) = (each for each in comparison.operators if each.key == f"0.{slow}")
    assert operator.error == pytest.approx(-2 / 3)


def test_contributions_add_up_to_the_error_of_the_step() -> None:
    prediction = _predicted(tp=2, pp=2)
    factors = {"forward": 1.5, "backward": 0.7, "update": 4.0}
    comparison = compare(
        prediction, _measured(prediction, lambda s: s.seconds * factors.get(s.key.rpartition(".")[2], 1.1))
    )
    step = comparison.figure("step_seconds")
    total = sum(term.error_seconds for term in comparison.contributions)
    assert total == pytest.approx(step.predicted - step.measured, rel=1e-9)
    sizes = [abs(term.error_seconds) for term in comparison.contributions]
    assert sizes == sorted(sizes, reverse=True)
    terms = {term.name for term in comparison.contributions if term.cause == "collective"}
    assert "tp.all_reduce" in terms


def test_waiting_and_communication_are_told_apart() -> None:
    """A late rank shows as waiting on the others, not as a slow collective."""
    prediction = _predicted(dp=2)
    measured = _measured(prediction)
    late = 0.5 * measured.step_seconds
    key, start = next((row[2], row[3]) for row in measured.trace if row[2].startswith("data."))
    rows = [(*row[:3], row[3] + late, row[4] + late, row[5]) if row[3] >= start else row for row in measured.trace]
    slow = "layer.qkv.forward"
    rows += [(0, "compute", key, start, start + late, "wait"), (1, "compute", f"0.{slow}", start, start + late, "work")]
    measured.trace, measured.step_seconds = rows, measured.step_seconds + late
    causes = {(term.cause, term.name): term.error_seconds for term in compare(prediction, measured).largest}
    waited = ("waiting", "data.gradient_all_reduce")
    assert causes == {waited: pytest.approx(-late / 2), ("compute", slow): pytest.approx(-late / 2)} | {
        cause: pytest.approx(0.0, abs=1e-9) for cause in causes if cause not in (waited, ("compute", slow))
    }


def test_the_slowest_rank_and_the_spread() -> None:
    prediction = _predicted(dp=4)
    comparison = compare(prediction, _measured(prediction, lambda s: s.seconds * (2 if s.rank == 2 else 1)))
    assert comparison.slowest_rank == 2
    assert comparison.rank_spread == pytest.approx(1 / 1.25, rel=1e-3)
    errors = {each.rank: each.error for each in comparison.ranks}
    assert errors[2] == pytest.approx(-0.5)
    assert errors[0] == pytest.approx(0.0, abs=1e-9)


def test_a_key_that_only_one_record_has_is_shown_without_an_error() -> None:
    prediction = _predicted(dp=2)
    measured = _measured(prediction)
    measured.operators["tp.new.thing.forward"] = OperatorTime(seconds=[1e-3, 3e-3], count=1, bytes=7)
    comparison = compare(prediction, measured)
    (only,) = (each for each in comparison.operators if each.key == "tp.new.thing.forward")
    assert (only.predicted_seconds, only.measured_seconds, only.error) == (None, pytest.approx(2e-3), None)


def test_either_order_of_prediction_and_measurement() -> None:
    prediction = _predicted(dp=2)
    measured = _measured(prediction, lambda s: 2 * s.seconds)
    assert compare(measured, prediction) == compare(prediction, measured)


def test_a_prediction_and_a_measurement_of_different_plans_are_refused() -> None:
    one, two = _predicted(dp=2), _predicted(tp=2)
    with pytest.raises(DataError, match=f"plan {one.plan_hash}.*plan {two.plan_hash}; predict the measured plan"):
        compare(one, _measured(two))


def test_two_predictions_compare_their_plans() -> None:
    one, two = _predicted(dp=2), _predicted(tp=2, pp=2)
    comparison = compare(one, two)
    assert comparison.pair == "two predictions"
    assert comparison.plan_hashes == (one.plan_hash, two.plan_hash)
    assert comparison.within_interval is None
    step = comparison.figure("step_seconds")
    assert (step.predicted, step.measured) == (one.step_seconds, two.step_seconds)
    total = sum(term.error_seconds for term in comparison.contributions)
    assert total == pytest.approx(one.step_seconds - two.step_seconds)
    assert compare(_measured(one), _measured(two)).pair == "two measurements"


def test_errors_against_nothing() -> None:
    assert relative_error(1.0, 0.0) is None
    assert relative_error(0.0, 0.0) == 0.0
    assert relative_error(1.0, 2.0) == -0.5
