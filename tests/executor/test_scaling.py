"""The loss scaler as a state machine: every rank's scaler is the same function of the same verdicts."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from executor.scaling import GROWTH_INTERVAL, INITIAL_SCALE, MAXIMUM_SCALE, MINIMUM_SCALE, LossScaler
from planner.errors import DataError


def after(verdicts, **start):
    scaler = LossScaler(**start)
    for step, overflow in enumerate(verdicts):
        scaler.update(step, overflow=overflow)
    return scaler


def test_constants_are_those_of_the_field():
    """torch.amp.GradScaler(init_scale=2.**16, growth_interval=2000); Megatron-LM's --min-loss-scale 1.0."""
    assert (INITIAL_SCALE, GROWTH_INTERVAL, MINIMUM_SCALE) == (65536.0, 2000, 1.0)
    assert after([]).scale == INITIAL_SCALE


def test_the_scale_doubles_after_exactly_2000_good_steps():
    assert after([False] * 1999).scale == INITIAL_SCALE
    assert after([False] * 2000).scale == 2 * INITIAL_SCALE
    assert after([False] * 3999).scale == 2 * INITIAL_SCALE
    assert after([False] * 4000).scale == 4 * INITIAL_SCALE


def test_an_overflow_halves_and_starts_the_count_anew():
    scaler = after([False] * 1999 + [True])
    assert (scaler.scale, scaler.good_steps) == (INITIAL_SCALE / 2, 0)
    for step in range(1999):
        scaler.update(step, overflow=False)
    assert scaler.scale == INITIAL_SCALE / 2
    scaler.update(1999, overflow=False)
    assert scaler.scale == INITIAL_SCALE


def test_the_scale_reaches_one_and_no_less():
    scaler = after([True] * 16)
    assert scaler.scale == 1.0
    with pytest.raises(DataError, match=r"step 17 at loss scale 1, the smallest: .*--precision bfloat16"):
        scaler.update(16, overflow=True)
    assert after([True] * 16 + [False] * 2000).scale == 2.0


def test_the_scale_stays_a_float32():
    assert after([False] * 2000, scale=MAXIMUM_SCALE).scale == MAXIMUM_SCALE


runs = st.lists(st.tuples(st.booleans(), st.integers(1, 2500)), max_size=6)


@given(runs)
def test_any_history_keeps_the_invariants(history):
    """A power of two between 1 and 2^127, so that scaling and unscaling are exact."""
    scaler, overflows, doublings = LossScaler(), 0, 0
    for overflow, count in history:
        for _ in range(count):
            before = scaler.scale
            if overflow and before == MINIMUM_SCALE:
                break
            scaler.update(0, overflow=overflow)
            assert scaler.scale == (before / 2 if overflow else before) or (
                not overflow and scaler.scale == 2 * before and scaler.good_steps == 0
            )
            overflows += overflow
            doublings += scaler.scale > before
            assert math.frexp(scaler.scale)[0] == 0.5
            assert MINIMUM_SCALE <= scaler.scale <= MAXIMUM_SCALE
            assert scaler.good_steps < GROWTH_INTERVAL
    assert math.log2(scaler.scale) == 16 - overflows + doublings
