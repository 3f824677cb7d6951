"""The replay engine: closed forms, joins, lags, deadlocks, and a naive interpreter as the reference."""

import gc
import math
from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.errors import ScheduleError
from planner.schedule import Durations, from_csv, generate, lower_communication
from planner.simulate import Replay, TaskTable, critical_path, replay, replay_schedule


@st.composite
def tables(draw: st.DrawFn) -> TaskTable:
    """Random tables without cycles: edges and joins go forward in a hidden order that every stream follows."""
    count = draw(st.integers(0, 24))
    ranks = draw(st.lists(st.integers(0, 3), min_size=count, max_size=count))
    streams = draw(st.lists(st.integers(0, 1), min_size=count, max_size=count))
    seconds = draw(st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.5]), min_size=count, max_size=count))
    edges = [
        draw(st.lists(st.tuples(st.integers(0, task - 1), st.sampled_from([0.0, 0.25, 3.0])), max_size=3))
        if task
        else []
        for task in range(count)
    ]
    join = [-1] * count
    level = [0] * count  # a join needs members that do not depend on each other
    used: dict[tuple[int, int], int] = {}
    for task in range(count):
        level[task] = 1 + max([level[p] for p, _ in edges[task]] + [used.get((ranks[task], streams[task]), 0)])
        used[ranks[task], streams[task]] = level[task]
    for number, tasks in enumerate(by_level(level)):
        if draw(st.booleans()):
            for task in tasks:
                join[task] = number
    return TaskTable.build(ranks, seconds, edges, stream=streams, join=join)


def by_level(level: list[int]) -> list[list[int]]:
    groups: dict[int, list[int]] = defaultdict(list)
    for task, each in enumerate(level):
        groups[each].append(task)
    return list(groups.values())


def naive(table: TaskTable) -> Replay:
    """Relax every constraint until nothing moves: the longest path by fixed point."""
    count = len(table)
    ready, start = np.zeros(count), np.zeros(count)
    while True:
        new_ready, new_start = np.zeros(count), np.zeros(count)
        last: dict[tuple[int, int], int] = {}
        for task in range(count):
            key = (int(table.rank[task]), int(table.stream[task]))
            when = start[last[key]] + table.seconds[last[key]] if key in last else 0.0
            for edge in range(table.indptr[task], table.indptr[task + 1]):
                before = table.indices[edge]
                when = max(when, start[before] + table.seconds[before] + table.lag_seconds[edge])
            new_ready[task] = when
            last[key] = task
        for task in range(count):
            members = [task] if table.join[task] < 0 else np.flatnonzero(table.join == table.join[task])
            new_start[task] = max(new_ready[member] for member in members)
        if (new_ready == ready).all() and (new_start == start).all():
            return Replay(start, start + table.seconds, ready)
        ready, start = new_ready, new_start


@settings(max_examples=300, deadline=None)
@given(tables())
def test_replay_equals_the_naive_longest_path(table: TaskTable) -> None:
    fast, slow = replay(table), naive(table)
    assert fast.start.tolist() == slow.start.tolist()
    assert fast.end.tolist() == slow.end.tolist()
    assert fast.ready.tolist() == slow.ready.tolist()


@settings(max_examples=200, deadline=None)
@given(tables())
def test_critical_path_explains_the_makespan(table: TaskTable) -> None:
    result = replay(table)
    path = critical_path(table, result)
    assert bool(path) == bool(len(table))
    if path:
        assert result.end[path[-1]] == result.makespan_seconds
        assert result.start[path[0]] == 0.0
        assert (np.diff(result.start[path]) >= 0).all()
    # No slack: one second more on any task of the path is one second more in all (a member of a join, which others
    # only wait for to start, may have slack in its end).
    for task in path:
        if table.join[task] >= 0:
            continue
        seconds = table.seconds.copy()
        seconds[task] += 1.0
        longer = TaskTable(
            table.rank, table.stream, seconds, table.indptr, table.indices, table.lag_seconds, table.join
        )
        assert replay(longer).makespan_seconds == pytest.approx(result.makespan_seconds + 1.0)


def test_lag_delays_without_occupying() -> None:
    table = TaskTable.build([0, 0, 1, 1], [1.0, 1.0, 1.0, 1.0], [[], [], [(0, 5.0)], [(1, 5.0)]])
    assert replay(table).start.tolist() == [0.0, 1.0, 6.0, 7.0]


def test_a_join_starts_when_its_last_member_is_ready() -> None:
    table = TaskTable.build([0, 0, 1], [2.0, 3.0, 1.0], [[], [], []], join=[-1, 7, 7])
    result = replay(table)
    assert result.start.tolist() == [0.0, 2.0, 2.0]
    assert result.end.tolist() == [2.0, 5.0, 3.0]
    assert (result.start - result.ready).tolist() == [0.0, 0.0, 2.0]
    assert critical_path(table, result) == [0, 1]


def test_streams_of_a_rank_run_beside_each_other() -> None:
    table = TaskTable.build([0, 0, 0], [4.0, 1.0, 1.0], [[], [], [(1, 0.0)]], stream=[0, 1, 1])
    assert replay(table).end.tolist() == [4.0, 1.0, 2.0]


@pytest.mark.parametrize(
    ("ranks", "edges", "join", "tasks"),
    [
        ([0, 1, 0, 1], [[], [(2, 0.0)], [(3, 0.0)], []], [-1] * 4, "task 2 (rank 0) -> task 1 (rank 1) -> task 2"),
        ([0, 0, 1, 1], [[], [], [], []], [0, 1, 1, 0], "task 0 (rank 0) -> task 2 (rank 1) -> task 0"),
        ([0, 0], [[], []], [0, 0], "task 0 (rank 0) -> task 0"),
        ([0, 1, 0], [[], [(2, 0.0)], []], [-1, 3, -1], ""),
        ([0], [[(0, 0.0)]], [-1], "task 0 (rank 0) -> task 0"),
    ],
)
def test_deadlocks_name_their_tasks(
    ranks: list[int], edges: list[list[tuple[int, float]]], join: list[int], tasks: str
) -> None:
    table = TaskTable.build(ranks, [1.0] * len(ranks), edges, join=join)
    if not tasks:  # a join of one waits for nobody
        assert replay(table).makespan_seconds == 3.0
        return
    with pytest.raises(ScheduleError, match="deadlock: these tasks wait for each other") as caught:
        replay(table)
    assert tasks in str(caught.value)
    assert gc.isenabled()


def test_the_empty_table() -> None:
    table = TaskTable.build([], [], [])
    result = replay(table)
    assert result.makespan_seconds == 0.0
    assert critical_path(table, result) == []


def test_messages_queue_on_their_link() -> None:
    """Two ranks, forwards only: the transfers take longer than the forwards, so that the link is the bottleneck."""
    schedule = from_csv("0F0,0F1,0F2\n1F0,1F1,1F2\n")
    durations = Durations(1.0, latency_seconds=0.5, message_bytes=6.0, bytes_per_second=2.0)
    result = replay_schedule(schedule, durations)
    assert result.start_seconds(1).tolist() == [4.5, 7.5, 10.5]  # 1 + 3 + 0.5, then one transfer apart
    fast = replay_schedule(schedule, Durations(1.0, latency_seconds=0.5, message_bytes=6.0))
    assert fast.start_seconds(1).tolist() == [1.5, 2.5, 3.5]


def test_links_are_apart_by_direction_and_destination() -> None:
    schedule = generate("zb-v", num_ranks=3, num_micro_batches=6, num_model_chunks=2)
    slow = replay_schedule(schedule, Durations(message_bytes=1.0, bytes_per_second=2.0))
    streams = {(r, s) for r, s in zip(slow.table.rank.tolist(), slow.table.stream.tolist(), strict=True) if s}
    # Rank 0 and 2 have one neighbour, rank 1 two; each sends forwards and gradients.
    assert len(streams) == 2 * (1 + 2 + 1)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5), st.integers(1, 9), st.floats(0.5, 2.0))
def test_more_bandwidth_never_slows_a_schedule(p: int, m: int, factor: float) -> None:
    schedule = lower_communication(generate("1f1b", num_ranks=p, num_micro_batches=m))
    slow, fast = sorted((1.0, factor))
    makespans = [
        replay_schedule(schedule, Durations(message_bytes=1.0, bytes_per_second=rate)).makespan_seconds
        for rate in (slow, fast, math.inf)
    ]
    assert makespans == sorted(makespans, reverse=True)


def test_uneven_stages_run_at_the_pace_of_the_slowest() -> None:
    result = replay_schedule(generate("1f1b", num_ranks=3, num_micro_batches=50), Durations([1, 3, 1], [1, 3, 1], 0.0))
    assert result.busy_seconds.tolist() == [100.0, 300.0, 100.0]
    assert result.makespan_seconds == pytest.approx(1 + 300 + 1)
    assert result.bubble_fraction == pytest.approx(1 - 500 / 3 / 302)
    with pytest.raises(ScheduleError, match="forward_seconds has 3 figures for 2 stages"):
        replay_schedule(generate("1f1b", num_ranks=2, num_micro_batches=2), Durations([1, 3, 1]))


def test_overlap_factor_shortens_composites_only() -> None:
    schedule = generate("dualpipe-v", num_ranks=2, num_micro_batches=8, num_model_chunks=2)
    plain = replay_schedule(schedule, Durations())
    half = replay_schedule(schedule, Durations(overlap_factor=0.5))
    composites = sum(bool(step.parts) for program in schedule.programs for step in program)
    assert plain.busy_seconds.sum() - half.busy_seconds.sum() == pytest.approx(composites * 1.5)


def test_critical_path_of_1f1b_goes_down_and_up_the_pipeline() -> None:
    result = replay_schedule(generate("1f1b", num_ranks=4, num_micro_batches=4))
    path = [str(step) for _, step in result.critical_path()]
    assert path[:4] == ["0F0", "1F0", "2F0", "3F0"]
    assert path[-4:] == ["3B3", "2B3", "1B3", "0B3"]
    assert sum({"F": 1, "B": 2}[step.op] for _, step in result.critical_path()) == result.makespan_seconds


def test_schedules_that_cannot_run_print_their_grid() -> None:
    with pytest.raises(ScheduleError, match=r">1B0<"):
        replay_schedule(from_csv("0F0,0B0\n1B0,1F0\n"))
    with pytest.raises(ScheduleError, match=r">0B0<"):
        replay_schedule(from_csv("0F0,0B0\n1F0\n"))


def test_duration_keys_of_the_command_line() -> None:
    assert Durations.from_keys({"F": 2, "B": 3}).of("I", 1) == [1.5]
    assert Durations.from_keys({"I": 2, "W": 1}).of("B", 2) == [3.0, 3.0]
    assert Durations.from_keys({"comm": 0.25}).latency_seconds == 0.25
    with pytest.raises(ScheduleError, match="unknown duration 'Q'; the keys are F, I, W, B and comm"):
        Durations.from_keys({"Q": 1})
    with pytest.raises(ScheduleError, match="forward_seconds is -1"):
        Durations.from_keys({"F": -1})
    with pytest.raises(ScheduleError, match="bytes_per_second is 0"):
        Durations(message_bytes=1.0, bytes_per_second=0.0)
