"""A pipeline schedule and durations as tasks; bubbles, peaks and the critical path of its replay.

A message between ranks leaves when its producer (in a lowered schedule: its SEND) has run. It occupies the link
(source, destination, direction) for bytes / bandwidth, in the order of the sends, and arrives one latency later; what
needs it waits until then. Sends and receives never hold up the compute stream: receives are posted ahead, and a
RECV of a lowered schedule stands on the stream of its channel, so that a schedule and its lowering take the same time.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from operator import itemgetter
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from planner.schedule import Durations, Instruction, Schedule, check
from planner.schedule.instructions import COMPUTE_OPS, OVERLAP
from planner.simulate.engine import FloatArray, IntArray, Replay, TaskTable, critical_path, replay

_OPS = (
    *("F", "B", "I", "W", "OVERLAP_F_B", "SEND_F", "RECV_F", "SEND_B", "RECV_B"),
    *("UNSHARD", "RESHARD", "REDUCE_GRAD"),
)
_CODE = {op: code for code, op in enumerate(_OPS)}
BoolArray = NDArray[np.bool_]


@dataclass(frozen=True)
class Parts:
    """The instructions of a schedule as columns; a composite stands for its parts, which share its task.

    Tasks are numbered rank by rank, in program order. All columns are (parts,) int64.
    """

    task: IntArray
    stage: IntArray
    op: IntArray
    micro_batch: IntArray
    task_rank: IntArray  # (tasks,)

    @classmethod
    def of(cls, schedule: Schedule) -> Parts:
        """Return the columns of `schedule`."""
        steps = [step for program in schedule.programs for step in program]
        task_rank = np.repeat(np.arange(schedule.num_ranks), [len(program) for program in schedule.programs])
        count = len(steps)
        stage = np.fromiter(map(itemgetter(0), steps), np.int64, count)
        op = np.fromiter((_CODE[step[1]] for step in steps), np.int64, count)
        micro_batch = np.fromiter(map(itemgetter(2), steps), np.int64, count)
        task = np.arange(count)
        composites = np.flatnonzero(op == _CODE[OVERLAP]).tolist()
        if composites:
            plain = op != _CODE[OVERLAP]
            inner = [(index, *part[:3]) for index in composites for part in steps[index].parts]
            extra = np.array([(index, s, _CODE[o], b) for index, s, o, b in inner], np.int64).T
            columns = np.concatenate([np.stack([task, stage, op, micro_batch])[:, plain], extra], axis=1)
            task, stage, op, micro_batch = columns[:, np.argsort(columns[0], kind="stable")]
        return cls(task, stage, op, micro_batch, task_rank)


class Edges(NamedTuple):
    """Dependencies between instructions: all columns are (edges,) int64."""

    producer: IntArray  # task
    consumer: IntArray  # task
    way: IntArray  # 1: an activation to the next stage, -1: a gradient to the one before, 0: within a stage
    stage: IntArray  # of the producer

    def select(self, which: BoolArray | IntArray) -> Edges:
        """Return some of the edges, by mask or by index."""
        return Edges(*(column[which] for column in self))


def task_table(schedule: Schedule, durations: Durations) -> TaskTable:
    """Return the tasks of a schedule: one per instruction, rank by rank, then one per message that occupies a link.

    Raises:
        ScheduleError: the schedule cannot run, or the durations are for another number of stages.
    """
    parts = Parts.of(schedule)
    rank = parts.task_rank
    edges = _edges(schedule, parts)
    remote = rank[edges.producer] != rank[edges.consumer]
    if (edges.producer[~remote] >= edges.consumer[~remote]).any():
        check(schedule)  # names the cell
    seconds = _instruction_seconds(schedule, durations, parts)
    stream = np.zeros(len(rank), np.int64)
    messages = edges.select(remote)
    received = np.zeros(len(rank), bool)
    if schedule.is_lowered:
        received[parts.task[np.isin(parts.op, [_CODE["RECV_F"], _CODE["RECV_B"]])]] = True
        link = 2 * (schedule.num_ranks + rank[messages.producer]) + (messages.way < 0)
        stream[messages.consumer] = 1 + link
    # Within a rank the order of its program says enough, except about receives, which stand on other streams.
    local = edges.select(~remote & received[edges.producer])
    occupancy = np.array(durations.transfer_seconds(schedule.num_stages))[messages.stage]
    lag = np.full(len(messages.producer), durations.latency_seconds)
    before, after = messages.producer, messages.consumer
    if occupancy.any():
        order = np.argsort(before, kind="stable")  # of the sends
        before, after, way = before[order], after[order], messages.way[order]
        transfers = len(rank) + np.arange(len(order))
        stream = np.concatenate([stream, 1 + 2 * rank[after] + (way < 0)])
        rank = np.concatenate([rank, rank[before]])
        seconds = np.concatenate([seconds, occupancy[order]])
        lag = np.concatenate([np.zeros(len(order)), lag])
        before, after = np.concatenate([before, transfers]), np.concatenate([transfers, after])
    lag = np.concatenate([lag, np.zeros(len(local.producer))])
    before, after = np.concatenate([before, local.producer]), np.concatenate([after, local.consumer])
    return _table(rank, stream, seconds, before, after, lag)


def _edges(schedule: Schedule, parts: Parts) -> Edges:
    """Return every dependency; a producer that does not exist is the schedule's error."""
    width = int(parts.micro_batch.max(initial=-1)) + 1
    place = np.array(schedule.stage_to_rank, np.int64)

    def index(*ops: str) -> tuple[IntArray, IntArray]:
        """Return the table (stage + 1, micro-batch) -> task of these ops, -1 for none, and the indices of the parts."""
        at = np.flatnonzero(np.isin(parts.op, [_CODE[op] for op in ops]))
        table = np.full((schedule.num_stages + 2) * width, -1, np.int64)  # no stage comes before 0 or after the last
        table[(parts.stage[at] + 1) * width + parts.micro_batch[at]] = parts.task[at]
        return table, at

    forward, forwards = index("F")
    gradient, gradients = index("B", "I")
    _, weights = index("W")
    found = [(forward, gradients, 0), (gradient, weights, 0)]
    inner = {1: parts.stage > 0, -1: parts.stage < schedule.num_stages - 1}
    for way, source, consumers, send, receive in (
        (1, forward, forwards, "SEND_F", "RECV_F"),
        (-1, gradient, gradients, "SEND_B", "RECV_B"),
    ):
        needing = consumers[inner[way][consumers]]
        if schedule.is_lowered:
            crosses = place[parts.stage[needing]] != place[parts.stage[needing] - way]
            sent, posts = index(send)
            received, takes = index(receive)
            found += [(source, posts, 0), (sent, takes, way), (received, needing[crosses], 0)]
            needing = needing[~crosses]
        found.append((source, needing, way))
    ways = np.concatenate([np.full(len(at), way, np.int64) for _, at, way in found])
    at = np.concatenate([at for _, at, _ in found])
    stage = parts.stage[at] - ways
    key = (stage + 1) * width + parts.micro_batch[at]
    bounds = np.cumsum([0, *(len(each) for _, each, _ in found)]).tolist()
    spans = zip(found, pairwise(bounds), strict=True)
    producer = np.concatenate([table[key[first:stop]] for (table, _, _), (first, stop) in spans])
    if (producer < 0).any():
        check(schedule)  # names the cell that waits for ever
    return Edges(producer, parts.task[at], ways, stage)


def _instruction_seconds(schedule: Schedule, durations: Durations, parts: Parts) -> FloatArray:
    """Return the (tasks,) seconds of each instruction; communication and stage ops take none on this stream."""
    by_op = np.zeros((len(_OPS), schedule.num_stages))
    for op in ("F", "B", "I", "W"):
        by_op[_CODE[op]] = durations.of(op, schedule.num_stages)
    each = by_op[parts.op, parts.stage]
    count = len(parts.task_rank)
    seconds = np.zeros(count)
    np.add.at(seconds, parts.task, each)
    seconds[np.bincount(parts.task, minlength=count) > 1] *= durations.overlap_factor
    return seconds


def _table(
    rank: IntArray, stream: IntArray, seconds: FloatArray, producer: IntArray, consumer: IntArray, lag: FloatArray
) -> TaskTable:
    order = np.argsort(consumer, kind="stable")
    return TaskTable(
        rank=rank.astype(np.int32),
        stream=stream.astype(np.int32),
        seconds=seconds,
        indptr=np.concatenate([[0], np.cumsum(np.bincount(consumer, minlength=len(rank)))]).astype(np.int64),
        indices=producer[order],
        lag_seconds=lag[order],
        join=np.full(len(rank), -1, np.int64),
    )


@dataclass(frozen=True)
class ScheduleReplay:
    """When each instruction of a schedule ran, and what follows from it.

    Attributes:
        schedule: What was replayed.
        table: Its tasks: the instructions rank by rank, then messages that occupy links.
        result: Start and end of every task, seconds.
    """

    schedule: Schedule
    table: TaskTable
    result: Replay

    @property
    def num_instructions(self) -> int:
        """Instructions of all ranks; the tasks after them are messages."""
        return sum(map(len, self.schedule.programs))

    @cached_property
    def bounds(self) -> list[int]:
        """Return where each rank's instructions begin, and where the last ends: (ranks + 1)."""
        return [0, *accumulate(map(len, self.schedule.programs))]

    def start_seconds(self, rank: int) -> FloatArray:
        """Return the start of each instruction of `rank`, in program order."""
        return self.result.start[self.bounds[rank] : self.bounds[rank + 1]]

    def end_seconds(self, rank: int) -> FloatArray:
        """Return the end of each instruction of `rank`, in program order."""
        return self.result.end[self.bounds[rank] : self.bounds[rank + 1]]

    @property
    def makespan_seconds(self) -> float:
        """From the start of the first instruction to the end of the last of any rank."""
        return float(self.result.end[: self.num_instructions].max(initial=0.0))

    @cached_property
    def busy_seconds(self) -> FloatArray:
        """Return the (ranks,) seconds each rank computes."""
        count = self.num_instructions
        busy = np.zeros(self.schedule.num_ranks)
        np.add.at(busy, self.table.rank[:count], self.table.seconds[:count])
        return busy

    @cached_property
    def span_seconds(self) -> FloatArray:
        """Return the (ranks,) seconds from each rank's first computation to the end of its last."""
        spans = np.zeros(self.schedule.num_ranks)
        for rank, program in enumerate(self.schedule.programs):
            at = [index for index, step in enumerate(program) if step.op in COMPUTE_OPS]
            if at:
                spans[rank] = self.end_seconds(rank)[at[-1]] - self.start_seconds(rank)[at[0]]
        return spans

    @property
    def ideal_seconds(self) -> float:
        """What the step would take without a bubble: the mean over ranks of the time they compute."""
        return float(self.busy_seconds.mean())

    @property
    def bubble_fraction(self) -> float:
        """Idle share of all rank-seconds; (p-1)/(m+p-1) for 1F1B with equal stages."""
        return 1.0 - self.ideal_seconds / self.makespan_seconds if self.makespan_seconds else 0.0

    @property
    def bubble_ratio(self) -> float:
        """(makespan - ideal) / ideal; (p-1)/m for 1F1B with equal stages (Narayanan et al. 2021)."""
        return (self.makespan_seconds - self.ideal_seconds) / self.ideal_seconds if self.ideal_seconds else 0.0

    @property
    def span_bubble_ratio(self) -> float:
        """Largest over ranks of (last end - first start - busy), over ideal (Qi et al. 2024)."""
        return float((self.span_seconds - self.busy_seconds).max()) / self.ideal_seconds if self.ideal_seconds else 0.0

    @cached_property
    def peak_in_flight(self) -> list[int]:
        """Most activations held on each rank, in model chunks, from F until B or I."""
        return self._peaks("I")

    @cached_property
    def peak_until_w(self) -> list[int]:
        """Most activations held on each rank, in model chunks, from F until B or W."""
        return self._peaks("W")

    def _peaks(self, freed_by: str) -> list[int]:
        change = {"F": 1, "B": -1, freed_by: -1}
        peaks = []
        for program in self.schedule.programs:
            # Within a composite the forward's activations come to life before the backward's are freed.
            changes = (change.get(part.op, 0) for step in program for part in step.flat())
            peaks.append(max(accumulate(changes), default=0))
        return peaks

    def critical_path(self) -> list[tuple[int, Instruction]]:
        """Return the (rank, instruction) that set the makespan, first to last; messages between them are left out."""
        steps = [step for program in self.schedule.programs for step in program]
        path = (task for task in critical_path(self.table, self.result) if task < len(steps))
        return [(int(self.table.rank[task]), steps[task]) for task in path]


def replay_schedule(schedule: Schedule, durations: Durations | None = None) -> ScheduleReplay:
    """Replay a schedule, compute-only or lowered, against durations (default: F = I = W = 1, no communication).

    Raises:
        ScheduleError: the schedule cannot run, or the durations are for another number of stages.
    """
    table = task_table(schedule, durations or Durations())
    names = [step for program in schedule.programs for step in program]
    return ScheduleReplay(schedule, table, replay(table, lambda task: str(names[task] if task < len(names) else task)))
