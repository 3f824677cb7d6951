"""Ranks of different speeds: layers and batch split unevenly, predicted and on real ranks of which one is slow."""

from itertools import product

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.machine import load_machine
from planner.mesh import Mesh
from planner.model import with_sizes
from planner.predict import predict
from planner.search.balance import balance, position_speeds, replica_speeds, split_batch, stage_speeds
from planner.search.suggest import suggest

MACHINE = load_machine("cpu-generic")
TWO = msgspec.structs.replace(MACHINE, host=msgspec.structs.replace(MACHINE.host, cores=2, devices=2))
MODEL = with_sizes(layers=6, hidden=256, heads=4, seq_len=64)
SPEEDS = st.lists(st.sampled_from([0.25, 0.4, 0.5, 0.75, 1.0]), min_size=1, max_size=3)


def _parts(size, count):
    """Every way to split a size into positive parts."""
    if count == 1:
        return [(size,)]
    return [(first, *rest) for first in range(1, size - count + 2) for rest in _parts(size - first, count - 1)]


@settings(max_examples=60, deadline=None)
@given(SPEEDS, st.integers(3, 12))
def test_batches_are_split_as_well_as_can_be(speeds, size):
    found = split_batch(size, speeds)
    best = min(max(n / s for n, s in zip(parts, speeds, strict=True)) for parts in _parts(size, len(speeds)))
    assert sum(found) == size
    assert min(found) >= 1
    assert max(n / s for n, s in zip(found, speeds, strict=True)) == pytest.approx(best)


@settings(max_examples=60, deadline=None)
@given(SPEEDS, st.integers(3, 10), st.floats(0, 3), st.floats(0, 3))
def test_layers_are_placed_as_well_as_can_be(speeds, layers, first, last):
    def slowest(parts):
        ends = [float(n) for n in parts]
        ends[0] += first
        ends[-1] += last
        return max(end / speed for end, speed in zip(ends, speeds, strict=True))

    found = balance(layers, len(speeds), 1.0, first, last, speeds)
    assert sum(found) == layers
    assert slowest(found) == pytest.approx(min(slowest(parts) for parts in _parts(layers, len(speeds))))


def test_equal_speeds_change_nothing():
    assert split_batch(10, (1.0, 1.0, 1.0)) in {(4, 3, 3), (3, 4, 3), (3, 3, 4)}
    for layers, stages in product((4, 7, 12), (2, 3, 4)):
        usual = balance(layers, stages, 1.0, 0.5, 1.5)
        assert balance(layers, stages, 1.0, 0.5, 1.5, (1.0,) * stages) == usual


def test_a_stage_is_as_fast_as_its_slowest_rank():
    mesh = Mesh(pp=2, dp=2)  # ranks 0 and 1 hold the first position, 2 and 3 the second
    machine = msgspec.structs.replace(MACHINE, relative_speeds=(1.0, 0.8, 1.0, 0.5))
    assert position_speeds(machine, mesh) == (0.8, 0.5)
    assert stage_speeds(machine, mesh, "interleaved", 2) == (0.8, 0.5, 0.8, 0.5)
    assert stage_speeds(machine, mesh, "zb-v", 2) == (0.8, 0.5, 0.5, 0.8)
    # Replica 0 has ranks 0 and 2, faster than the layers allow for by 1/0.8 and 1/0.5; replica 1 sets the pace.
    assert replica_speeds(machine, mesh) == pytest.approx((1.25, 1.0))


@pytest.mark.parametrize(
    ("axis", "taken"), [("dp", lambda plan: plan.parts.batch), ("pp", lambda plan: plan.stage_layers)]
)
def test_a_slow_rank_gets_less_and_the_step_gains(axis, taken):
    slow = msgspec.structs.replace(TWO, relative_speeds=(1.0, 0.5))
    even = suggest(MODEL, 2, TWO, global_batch_size=12, fixed={axis: 2}, top=1).plans[0].plan
    found = suggest(MODEL, 2, slow, global_batch_size=12, fixed={axis: 2}, top=1).plans[0]
    more, less = taken(found.plan)
    assert more >= 2 * less
    assert len(set(taken(even))) == 1
    # Of 6 + 6 at half speed 12 units of time remain, of 8 + 4 only 8.
    gain = predict(even, slow).step_seconds / found.prediction.step_seconds
    assert 1.3 < gain < 1.6


@pytest.mark.mpi
@pytest.mark.parametrize("axis", ["dp", "pp"])
def test_the_gain_is_real(launch_slow_rank, axis):
    """One rank busy twice as long again after all it computes: even and balanced plans in turns."""
    found = launch_slow_rank(axis)
    print(axis, found)
    assert found["predicted_gain"] > 1.3
    assert found["measured_gain"] > 1.15


def test_a_slow_rank_is_the_busiest_in_the_prediction():
    slow = msgspec.structs.replace(TWO, relative_speeds=(1.0, 0.5))
    even = suggest(MODEL, 2, TWO, global_batch_size=12, fixed={"dp": 2}, top=1).plans[0].plan
    fast, late = predict(even, slow).rank_seconds
    assert late > 1.8 * fast
    first, second = predict(even, TWO).rank_seconds
    assert first == pytest.approx(second)
