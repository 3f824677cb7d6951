"""The replay engine: when does every task run, if ranks follow their programs?

Theory of operation. A task occupies one stream of one rank. Streams are in order: a task starts after the one before
it in the table on the same (rank, stream). It also waits for its predecessors, each with a lag (a latency: time that
passes without occupying anything), and, when it belongs to a join, for the other members of the join: a collective
starts when its last member arrives. Start times are therefore the longest path through a graph, found in one pass in
topological order. The pass walks each stream as far as it can and parks it on the first predecessor that has not
ended, so that there is no heap, no event queue and no in-degree array: every task is visited once and every edge
a constant number of times. Where the pass cannot go on, the remaining tasks wait for each other: a deadlock.
"""

from __future__ import annotations

import gc
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from planner.errors import ScheduleError

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]


@dataclass(frozen=True)
class TaskTable:
    """Tasks as columns; row i of every column, and the edges indptr[i]:indptr[i + 1], are task i.

    Attributes:
        rank: (tasks,) int32.
        stream: (tasks,) int32; tasks on one (rank, stream) run in table order.
        seconds: (tasks,) float64, how long the task occupies its stream.
        indptr: (tasks + 1,) int64, compressed sparse rows of the predecessors.
        indices: (edges,) int64, the predecessors: tasks that must have ended.
        lag_seconds: (edges,) float64, the time that must pass after that end.
        join: (tasks,) int64; tasks with one id start together when the last is ready; -1 for none.
    """

    rank: NDArray[np.int32]
    stream: NDArray[np.int32]
    seconds: FloatArray
    indptr: IntArray
    indices: IntArray
    lag_seconds: FloatArray
    join: IntArray

    @classmethod
    def build(
        cls,
        rank: Sequence[int],
        seconds: Sequence[float],
        predecessors: Sequence[Sequence[tuple[int, float]]],
        *,
        stream: Sequence[int] | None = None,
        join: Sequence[int] | None = None,
    ) -> TaskTable:
        """Return a table from Python sequences; predecessors[i] lists (task, lag seconds) of task i."""
        count = len(rank)
        sizes = np.fromiter((len(edges) for edges in predecessors), np.int64, count)
        flat = [edge for edges in predecessors for edge in edges]
        return cls(
            rank=np.asarray(rank, np.int32),
            stream=np.zeros(count, np.int32) if stream is None else np.asarray(stream, np.int32),
            seconds=np.asarray(seconds, np.float64),
            indptr=np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)]),
            indices=np.fromiter((edge[0] for edge in flat), np.int64, len(flat)),
            lag_seconds=np.fromiter((edge[1] for edge in flat), np.float64, len(flat)),
            join=np.full(count, -1, np.int64) if join is None else np.asarray(join, np.int64),
        )

    def __len__(self) -> int:
        return len(self.rank)

    def stream_order(self) -> tuple[IntArray, IntArray]:
        """Return (order, bounds): the tasks of stream k are order[bounds[k]:bounds[k + 1]], in table order."""
        key = self.rank.astype(np.int64) * (int(self.stream.max(initial=0)) + 1) + self.stream
        order = np.argsort(key, kind="stable")
        breaks = np.flatnonzero(np.diff(key[order])) + 1
        return order, np.concatenate([[0], breaks, [len(key)]] if len(key) else [[0]]).astype(np.int64)


@dataclass(frozen=True)
class Replay:
    """When each task ran.

    Attributes:
        start: (tasks,) float64 seconds.
        end: (tasks,) float64 seconds, start + seconds.
        ready: (tasks,) float64 seconds, when its own stream was free and its own inputs had arrived. start - ready
            is the time spent waiting for the other members of a join, 0 without one.
    """

    start: FloatArray
    end: FloatArray
    ready: FloatArray

    @property
    def makespan_seconds(self) -> float:
        """The end of the last task; tasks start at 0."""
        return float(self.end.max(initial=0.0))


def replay(table: TaskTable, describe: Callable[[int], str] = "task {}".format) -> Replay:
    """Return the earliest start and end of every task.

    Args:
        table: The tasks.
        describe: Names a task in an error message.

    Raises:
        ScheduleError: tasks that wait for each other.
    """
    order, bounds = table.stream_order()
    # The pass allocates no reference cycles, but a million live floats make each collector run slow.
    collecting = gc.isenabled()
    gc.disable()
    try:
        run = _Run(table, order, bounds)
        run.advance()
    finally:
        if collecting:
            gc.enable()
    heads = enumerate(zip(run.cursor, bounds[1:].tolist(), strict=True))
    if stuck := {stream: int(order[at]) for stream, (at, stop) in heads if at < stop}:
        end = np.empty(len(order))
        end[order] = run.end
        raise ScheduleError(_deadlock_message(table, end, stuck, describe))
    start, end, ready = np.empty(len(order)), np.empty(len(order)), np.empty(len(order))
    start[order], end[order] = run.start, run.end
    ready[order] = run.start
    for position, when in run.ready.items():
        ready[order[position]] = when
    return Replay(start, end, ready)


class _Run:
    """The pass over the streams. Tasks are numbered by stream here, so that a stream is a range of positions.

    All columns are lists: indexing a NumPy array makes a new scalar object each time, several times the cost.
    """

    def __init__(self, table: TaskTable, order: IntArray, bounds: IntArray) -> None:
        position = np.empty(len(order), np.int64)
        position[order] = np.arange(len(order))
        count = np.diff(table.indptr)
        source, first = position[table.indices], table.indptr[:-1]
        single, lag = np.where(count > 1, -2, -1), np.zeros(len(order))  # most tasks have one predecessor
        single[count == 1], lag[count == 1] = source[first[count == 1]], table.lag_seconds[first[count == 1]]
        self.single, self.lag = single[order].tolist(), lag[order].tolist()
        self.several = {
            int(position[task]): list(zip(source[a:b].tolist(), table.lag_seconds[a:b].tolist(), strict=True))
            for task in np.flatnonzero(count > 1).tolist()
            for a, b in [(table.indptr[task], table.indptr[task + 1])]
        }
        self.seconds, self.bounds = table.seconds[order].tolist(), bounds.tolist()
        self.join = {int(position[task]): int(table.join[task]) for task in np.flatnonzero(table.join >= 0).tolist()}
        self.missing = np.bincount(table.join[table.join >= 0]).tolist()  # per join, members not yet ready
        self.start, self.end = [0.0] * len(order), [-1.0] * len(order)  # an end of -1: not run
        self.ready: dict[int, float] = {}  # of members of joins; all others start when they are ready
        self.cursor, self.clock = self.bounds[:-1], [0.0] * (len(bounds) - 1)
        self.waiters: dict[int, list[int]] = {}  # task that has not ended -> streams parked on it
        self.parked: dict[int, list[int]] = defaultdict(list)  # join -> streams whose next task is a ready member

    def advance(self) -> None:
        """Walk all streams to the end or to a deadlock."""
        single, lag, seconds, join = self.single, self.lag, self.seconds, self.join
        start, end, waiters = self.start, self.end, self.waiters
        runnable = list(range(len(self.cursor) - 1, -1, -1))
        while runnable:
            stream = runnable.pop()
            at, stop, now = self.cursor[stream], self.bounds[stream + 1], self.clock[stream]
            while at < stop:
                predecessor = single[at]
                if predecessor >= 0:
                    begin = end[predecessor]
                    if begin >= 0.0:
                        begin += lag[at]
                        if begin < now:  # noqa: PLR1730 - max() would cost as much as all the rest
                            begin = now
                elif predecessor == -1:
                    begin = now
                else:
                    begin, predecessor = self._latest(at, now)
                if begin < 0.0:
                    waiters.setdefault(predecessor, []).append(stream)
                    break
                if join and at in join:
                    self.ready[at] = begin
                    break
                start[at] = begin
                end[at] = now = begin + seconds[at]
                if at in waiters:
                    runnable += waiters.pop(at)
                at += 1
            self.cursor[stream], self.clock[stream] = at, now
            if at < stop and at in self.ready:
                runnable += self._arrive(join[at], stream)

    def _latest(self, at: int, now: float) -> tuple[float, int]:
        """Return when the last of several predecessors lets a task start; or -1 and one that has not ended."""
        for predecessor, lag in self.several[at]:
            done = self.end[predecessor]
            if done < 0.0:
                return -1.0, predecessor
            now = max(now, done + lag)
        return now, -1

    def _arrive(self, join: int, stream: int) -> list[int]:
        """Park a stream at its member of a join; with the last one, start all, and return the streams to go on with."""
        self.missing[join] -= 1
        self.parked[join].append(stream)
        if self.missing[join]:
            return []
        streams = self.parked.pop(join)
        tasks = [self.cursor[member] for member in streams]
        begin = max(self.ready[task] for task in tasks)
        runnable: list[int] = []
        for member, task in zip(streams, tasks, strict=True):
            self.start[task] = begin
            self.end[task] = self.clock[member] = begin + self.seconds[task]
            self.cursor[member] += 1
            runnable += self.waiters.pop(task, ())
        return runnable + streams


def _deadlock_message(table: TaskTable, end: FloatArray, stuck: dict[int, int], describe: Callable[[int], str]) -> str:
    """Follow the waits of the stuck streams, {stream: its next task}, to a cycle and name its tasks."""
    order, bounds = table.stream_order()
    stream_of = np.empty(len(table), np.int64)
    stream_of[order] = np.repeat(np.arange(len(bounds) - 1), np.diff(bounds))
    ready_members = {task for task in stuck.values() if not _unfinished(table, task, end)}

    def blocker(task: int) -> int:
        """Return the stuck task that keeps `task`, itself the next one of its stream, from starting."""
        waits_for = _unfinished(table, task, end)
        if waits_for is None:
            others = np.flatnonzero(table.join == table.join[task]).tolist()
            waits_for = next((other for other in others if other not in ready_members), task)
        return stuck[int(stream_of[waits_for])]

    path = [next(iter(stuck.values()))]
    while (following := blocker(path[-1])) not in path:
        path.append(following)
    cycle = path[path.index(following) :]
    names = " -> ".join(f"{describe(task)} (rank {table.rank[task]})" for task in [*cycle, following])
    return f"deadlock: these tasks wait for each other: {names}; change the order of one of their ranks"


def _unfinished(table: TaskTable, task: int, end: FloatArray) -> int | None:
    """Return the first predecessor of `task` that has not ended."""
    for predecessor in table.indices[table.indptr[task] : table.indptr[task + 1]].tolist():
        if end[predecessor] < 0.0:
            return int(predecessor)
    return None


def critical_path(table: TaskTable, result: Replay) -> list[int]:
    """Return the tasks that set the makespan, first to last: a step gets shorter only if one of them does.

    Each task on it starts when the one before it ends (plus the lag of the edge), or, in a join, when the member that
    arrived last becomes ready; that member then stands on the path too.
    """
    if not len(table):
        return []
    order, bounds = table.stream_order()
    before = np.full(len(table), -1, np.int64)
    before[order[1:]] = order[:-1]
    before[order[bounds[:-1]]] = -1
    members: dict[int, list[int]] = defaultdict(list)
    for task in np.flatnonzero(table.join >= 0).tolist():
        members[int(table.join[task])].append(task)
    task = int(result.end.argmax())
    path = [task]
    while True:
        if result.start[task] > result.ready[task]:
            task = max(members[int(table.join[task])], key=lambda member: float(result.ready[member]))
            path.append(task)
        if (cause := _cause_of_ready(table, result, int(before[task]), task)) is None:
            return path[::-1]
        path.append(task := cause)


def _cause_of_ready(table: TaskTable, result: Replay, before: int, task: int) -> int | None:
    """Return the task whose end (plus lag) made `task` ready, the stream's own first; None at time 0."""
    ready = result.ready[task]
    if before >= 0 and result.end[before] >= ready:
        return before
    edges = range(int(table.indptr[task]), int(table.indptr[task + 1]))
    for edge in edges:
        predecessor = int(table.indices[edge])
        if result.end[predecessor] + table.lag_seconds[edge] >= ready:
            return predecessor
    return None
