"""Tuning: turns, drift taken out, ranks and regret, and which measurement is worth making next."""

import json
import math
import os
import subprocess
import sys

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from records import measurement_of
from small_plans import plan

from planner.machine import Residuals, load_machine
from planner.model import with_sizes
from planner.predict import predict
from planner.search.suggest import Ranked
from planner.search.tune import interleave, next_measurement, tune

MACHINE = load_machine("cpu-generic")
MODEL = with_sizes(layers=2, hidden=64, heads=4, seq_len=32)
RESIDUALS = Residuals(provenance="for the tests", kernel_log_sigma=0.1)
OUTSIDE = dict(os.environ)


def _ranked(*seconds):
    """Plans predicted to take so many seconds."""
    one = plan(MODEL, batch=2, micro=2)
    prediction = predict(one, MACHINE)
    return [Ranked(one, msgspec.structs.replace(prediction, step_seconds=each)) for each in seconds]


def test_plans_take_turns():
    order = []

    def run(place, candidate, number):
        order.append((place, number))
        return measurement_of(candidate, MACHINE)

    plans = [plan(MODEL, batch=2, micro=2), plan(MODEL, batch=4, micro=2), plan(MODEL, batch=6, micro=2)]
    found = interleave(plans, 2, run)
    assert order == [(0, 0), (1, 0), (2, 0), (0, 1), (1, 1), (2, 1)]
    assert [[each.plan_hash for each in rounds] for rounds in found] == [[each.hash] * 2 for each in plans]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(0.5, 2.0), min_size=2, max_size=5), st.data())
def test_drift_that_all_plans_share_changes_no_rank(effects, data):
    rounds = data.draw(st.integers(2, 4))
    drift = data.draw(st.lists(st.floats(0.2, 5.0), min_size=rounds, max_size=rounds))
    plans = _ranked(*range(1, len(effects) + 1))
    steady = tune(plans, [[effect] * rounds for effect in effects], RESIDUALS)
    drifting = tune(plans, [[effect * pace for pace in drift] for effect in effects], RESIDUALS)
    paces = [
        {each.place: each.measured_seconds / min(t.measured_seconds for t in found.tuned) for each in found.tuned}
        for found in (steady, drifting)
    ]
    assert paces[1] == pytest.approx(paces[0], rel=1e-9)
    assert drifting.noise == pytest.approx(0.0, abs=1e-6)
    assert drifting.drift == pytest.approx(max(drift) / min(drift) - 1, rel=1e-6)


def test_ranks_regret_and_correlation():
    found = tune(_ranked(1.0, 2.0, 3.0), [[1.2, 1.2], [1.0, 1.0], [3.0, 3.0]], RESIDUALS)
    assert [(each.place, each.measured_rank) for each in found.tuned] == [(1, 1), (0, 2), (2, 3)]
    assert found.regret == pytest.approx(0.2)
    assert [each.regret for each in found.tuned] == pytest.approx([0.0, 0.2, 2.0])
    assert found.spearman == pytest.approx(0.5)
    assert found.bias == pytest.approx(1.0)
    assert all(each.low_seconds < each.measured_seconds < each.high_seconds for each in found.tuned)


def test_noise_widens_the_intervals():
    steady = tune(_ranked(1.0, 2.0), [[1.0, 1.0], [2.0, 2.0]], RESIDUALS).tuned[0]
    noisy = tune(_ranked(1.0, 2.0), [[1.1, 0.9], [1.9, 2.1]], RESIDUALS).tuned[0]
    assert noisy.high_seconds / noisy.low_seconds > 1.05 > steady.high_seconds / steady.low_seconds
    assert tune(_ranked(1.0), [[1.0]], RESIDUALS).noise is None


def test_the_next_measurement_overlaps_with_the_best_most():
    # Machine twice as slow as predicted, the model exact but for 10%: plan 3 might be as fast as the best, plan 4 not.
    plans = _ranked(1.0, 1.2, 1.4, 1.05, 2.0)
    found = tune(plans, [[2.0] * 2, [2.64] * 2, [2.52] * 2], RESIDUALS)
    assert found.next_run is not None
    assert found.next_run.place == 3
    assert found.next_run.low_seconds < found.tuned[0].high_seconds
    expected = 1.05 * found.bias
    assert math.sqrt(found.next_run.low_seconds * found.next_run.high_seconds) == pytest.approx(expected)


def test_no_next_measurement_where_none_can_win():
    assert tune(_ranked(1.0, 1.1, 50.0), [[1.0] * 2, [1.1] * 2], RESIDUALS).next_run is None
    plans = _ranked(1.0, 1.1)
    everything = tune(plans, [[1.0] * 2, [1.1] * 2], RESIDUALS)
    assert next_measurement(plans, everything.tuned, RESIDUALS) is None


@pytest.mark.mpi
def test_tune_runs_plans_in_turns(tmp_path):
    sizes = ["--layers", "1", "--hidden", "32", "--heads", "2", "--seq-len", "16"]
    options = ["--workers", "2", *sizes, "--top", "2", "--steps", "2", "--rounds", "2", "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "planner", "tune", *options],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env=OUTSIDE,
        timeout=110,
    )
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert [each["measured_rank"] for each in document["plans"]] == [1, 2]
    assert sorted(each["predicted_rank"] for each in document["plans"]) == [1, 2]
    assert all(len(each["round_seconds"]) == 2 for each in document["plans"])
    assert document["plans"][0]["regret"] == 0.0
    files = [json.loads((tmp_path / name).read_text()) for name in ("plan.json", "measured.json")]
    assert files[1]["plan_hash"] == document["plans"][0]["plan_hash"]
    assert [each["kind"] for each in files] == ["plan", "measurement"]
