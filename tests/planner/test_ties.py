"""Ties: plans that the model cannot tell apart, and the one with most memory headroom first."""

import json

import msgspec
import pytest
from small_plans import plan

from planner.cli import frame
from planner.machine import Residuals, load_machine
from planner.model import with_sizes
from planner.predict import predict
from planner.search.explain import choices, faster_link, network, variations
from planner.search.request import SearchRequest
from planner.search.ties import by_preference, count_ties, ties

MACHINE = load_machine("cpu-generic")
GPU = load_machine("a100-80gb")
MODEL = with_sizes(layers=4, hidden=128, heads=4, seq_len=64)
RESIDUALS = Residuals(provenance="for the tests", kernel_log_sigma=0.1, collective_log_sigma=0.2)
BASE = predict(plan(MODEL, dp=2, batch=4, micro=2), MACHINE)


def _stretched(factor, peak=100):
    """The prediction with its step between operators longer, and another peak."""
    return msgspec.structs.replace(BASE, step_seconds=BASE.step_seconds * factor, peak_bytes=[peak, peak])


def test_a_plan_ties_with_itself_and_not_with_one_far_off():
    # Two runs of one plan: 80% of their differences lie within 1.28 · √2 · 0.3% = 0.54%.
    assert ties(BASE, [BASE, _stretched(1.0053), _stretched(1.0056)], RESIDUALS) == [True, True, False]
    # All of the difference is in one term: its figure would have to be wrong tenfold for the order to turn.
    assert ties(BASE, [_stretched(1.05), _stretched(1.5)], RESIDUALS) == [False, False]


def test_terms_that_cancel_may_hide_the_order():
    """Less of one term and more of another: what is left is small beside what either may be wrong by."""
    rows = BASE.trace
    change, longer = 0.01 * BASE.step_seconds, 0.007 * BASE.step_seconds
    first = next(row for row in rows if "ffn_in.forward" in row[2])
    second = next(row for row in rows if "qkv.forward" in row[2])
    moved = [
        (*row[:4], row[4] - change, row[5]) if row is first
        else (*row[:4], row[4] + change + longer, row[5]) if row is second
        else row
        for row in rows
    ]  # fmt: skip
    other = msgspec.structs.replace(BASE, trace=moved, step_seconds=BASE.step_seconds + longer)
    sure, doubtful = (msgspec.structs.replace(RESIDUALS, kernel_log_sigma=sigma) for sigma in (0.1, 0.5))
    assert ties(BASE, [other], sure) == [False]
    assert ties(BASE, [other], doubtful) == [True]


def test_among_ties_headroom_decides_and_beyond_them_time():
    plans = [
        _stretched(1.0, 300),
        _stretched(1.001, 100),
        _stretched(1.002, 200),
        _stretched(2.0, 1),
        _stretched(1.6, 9),
    ]
    order = by_preference(plans, RESIDUALS)
    assert order == [1, 2, 0, 4, 3]
    assert count_ties([plans[place] for place in order], RESIDUALS) == 3
    assert by_preference([], RESIDUALS) == []
    assert count_ties([], RESIDUALS) == 0


# ---- what would change the answer ------------------------------------------------------------------------------------


def test_the_network_is_the_link_that_the_ranks_depend_on():
    assert network(GPU, 1) is None
    assert network(GPU, GPU.devices_per_host) == "link_in_host"
    assert network(GPU, GPU.devices_per_host + 1) == "link_between_hosts"
    assert network(MACHINE, 64) == "link_in_host"


def test_a_faster_link_moves_twice_the_bytes_at_the_same_latency():
    faster = faster_link(GPU, "link_between_hosts", 2.0).link_between_hosts
    before = GPU.link_between_hosts
    assert faster.bandwidth_bytes_per_second == 2 * before.bandwidth_bytes_per_second
    assert faster.latency_seconds == before.latency_seconds
    assert faster_link(GPU, "link_between_hosts", 2.0).link_in_host == GPU.link_in_host


@pytest.fixture(scope="module")
def answered():
    request = SearchRequest(
        model=MODEL, workers=4, machine=MACHINE, global_batch_size=8, fixed={"recompute": "none"}, top=3
    )
    found = request.ask()
    return found, list(variations(request, found))


def test_each_thing_is_halved_and_doubled(answered):
    found, changes = answered
    asked = [(each.what, each.factor) for each in changes]
    assert asked == [(what, factor) for what in ("network", "memory", "batch") for factor in (0.5, 2.0)]
    best = found.plans[0]
    for each in changes:
        assert each.best is not None
        assert each.same == (choices(each.best.plan) == choices(best.plan))
        if each.what == "batch":
            assert each.best.plan.global_batch_size == best.plan.global_batch_size * each.factor
            assert each.kept_seconds is None
        else:
            assert each.kept_seconds is not None
    slower, faster = changes[:2]
    assert slower.kept_seconds >= best.prediction.step_seconds * (1 - 1e-9) >= faster.kept_seconds * (1 - 2e-9)


def test_too_little_memory_is_a_reason_not_an_error():
    request = SearchRequest(model=MODEL, workers=2, machine=MACHINE, global_batch_size=4, top=1)
    found = request.ask()
    tight = request.but(memory_limit_bytes=1.2 * min(found.plans[0].prediction.peak_bytes) / 4)
    half = next(each for each in variations(tight, found) if (each.what, each.factor) == ("memory", 0.5))
    assert half.best is None
    assert "memory" in half.reason
    assert half.kept_seconds is None


# ---- the command -----------------------------------------------------------------------------------------------------


def test_suggest_marks_ties_warns_outside_the_range_and_explains(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "120")
    (tmp_path / "fitted.toml").write_text(
        'extends = "cpu-generic"\nname = "fitted"\n[residuals.ranges]\nhidden = [512.0, 1024.0]\n', encoding="utf-8"
    )
    options = "--workers 2 --layers 2 --hidden 64 --heads 4 --seq-len 32 --machine fitted.toml --fix recompute=none"
    assert frame.run(f"suggest {options} --explain --json".split()) == 0
    document = json.loads(capsys.readouterr().out)
    plans = document["plans"]
    assert all(plan["low_seconds"] < plan["step_seconds"] < plan["high_seconds"] for plan in plans)
    assert all(any("hidden < 512" in warning for warning in plan["warnings"]) for plan in plans)
    tied_plans = [plan for plan in plans if plan["tie"]]
    assert tied_plans == plans[: len(tied_plans)]
    assert len(tied_plans) != 1
    if tied_plans:
        assert plans[0]["peak_bytes"] == min(plan["peak_bytes"] for plan in tied_plans)
    explanation = document["explanation"]
    assert [each["what"] for each in explanation["variations"]] == ["network"] * 2 + ["memory"] * 2 + ["batch"] * 2
    assert explanation["bounds"]
    assert explanation["runner_up"].startswith("#1 (")
    assert frame.run(f"suggest {options} --explain".split()) == 0
    shown = capsys.readouterr().out
    assert "warning: no measurement with hidden < 512" in " ".join(shown.split())
    assert "double the memory limit" in shown
