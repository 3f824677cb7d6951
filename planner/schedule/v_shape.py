"""Schedules over a V of two model chunks per rank: ZB-V, V-Half and V-Min.

ZB-V is from Qi et al. 2024 (arXiv 2401.10241, section 6). V-Half and V-Min are from Qi et al. 2024b, "Pipeline
parallelism with controllable memory" (arXiv 2405.15362): they repeat a building block, the slots of one micro-batch's
F, F, I and I on each rank, six slots later for every micro-batch. How long the block is sets the memory; W goes into
free slots.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from planner.errors import ScheduleError
from planner.schedule.durations import UNIT, Durations
from planner.schedule.instructions import Instruction, Schedule, v_placement

Block = tuple[int, int, int, int]
"""Slots of micro-batch 0 on one rank: F of the first chunk, F of the second, I of the second, I of the first."""

_PERIOD = 6  # slots that one micro-batch takes on each rank: F, I and W of two chunks


def zb_v(num_ranks: int, num_micro_batches: int) -> Schedule:
    """Return ZB-V: no span bubble if F = I = W, at most 2p chunks in flight on every rank.

    The pattern needs 2p - 1 micro-batches; with fewer, the steps of those that do not exist are left out.
    """
    programs = []
    for rank in range(num_ranks):
        program = _zb_v_program(rank, num_ranks, max(num_micro_batches, 2 * num_ranks - 1))
        programs.append(tuple(step for step in program if step.micro_batch < num_micro_batches))
    place = v_placement(2 * num_ranks, num_ranks)
    return Schedule("zb-v", 2 * num_ranks, num_ranks, num_micro_batches, place, tuple(programs))


def v_half(num_ranks: int, num_micro_batches: int, durations: Durations = UNIT) -> Schedule:
    """Return V-Half: about half of 1F1B's memory, 2 ((p+2)//2) chunks until W on every rank."""
    p, shift = num_ranks, 3 if num_ranks % 2 == 0 else 0
    blocks = [(2 * r, 3 * p - r - 2, 3 * p + shift + 2 * r - 1, 6 * p + shift - r - 2) for r in range(p)]
    return _best_squeeze("v-half", blocks, num_micro_batches, durations, memory_limit=2 * ((p + 2) // 2))


def v_min(num_ranks: int, num_micro_batches: int, durations: Durations = UNIT) -> Schedule:
    """Return V-Min: about a third of 1F1B's memory, 2 ((p+4)//3) chunks until W on every rank."""
    p, shift = num_ranks, 2 if num_ranks % 3 == 0 else 0
    blocks = [(r, 2 * p - r - 1, 2 * p + shift + r, 4 * p + shift - r - 1) for r in range(p)]
    return _best_squeeze("v-min", blocks, num_micro_batches, durations, memory_limit=2 * ((p + 4) // 3))


def _zb_v_program(rank: int, num_ranks: int, num_micro_batches: int) -> list[Instruction]:
    """Return one rank of ZB-V: fill both arms of the V, then F I W on each arm in turn, then drain."""
    stages = rank, 2 * num_ranks - 1 - rank
    below = num_ranks - rank  # ranks from here to the turn of the V, this one included
    count = {(op, arm): 0 for op in "FIW" for arm in (0, 1)}
    program: list[Instruction] = []

    def run(ops: str, arm: int) -> None:
        for op in ops:
            program.append(Instruction(stages[arm], op, count[op, arm]))
            count[op, arm] += 1

    for _ in range(2 * below - 1):
        run("F", 0)
    for _ in range(rank):
        run("F", 1)
        run("F", 0)
    for _ in range(below):
        run("FIW", 1)
    while count["F", 1] < num_micro_batches:
        if count["F", 0] < num_micro_batches:
            run("F", 0)
        run("IW", 0)
        run("FIW", 1)
    for _ in range(rank):
        run("I", 0)
        run("I", 1)
    for _ in range(below):
        run("IW", 0)
    for arm in (1, 0):
        run("W" * (count["I", arm] - count["W", arm]), arm)
    return program


class _Step(NamedTuple):
    """An instruction and its slot in the repeated building block."""

    slot: int
    op: str
    stage: int
    micro_batch: int


def _repeat(block: Block, stages: tuple[int, int], num_micro_batches: int) -> list[_Step]:
    """Return a rank's steps in slot order: the block once per period, each W in the first free slot after its I."""
    kinds = (("F", stages[0]), ("F", stages[1]), ("I", stages[1]), ("I", stages[0]))
    steps = sorted(
        _Step(slot + _PERIOD * micro_batch, op, stage, micro_batch)
        for slot, (op, stage) in zip(block, kinds, strict=True)
        for micro_batch in range(num_micro_batches)
    )
    taken = {step.slot for step in steps}
    assert len(taken) == len(steps), "the slots of a block differ modulo the period"
    weights, slot = [], 0
    for step in steps:
        if step.op == "I":
            slot = max(slot, step.slot) + 1
            while slot in taken:
                slot += 1
            weights.append(step._replace(slot=slot, op="W"))
    return sorted(steps + weights)


def _best_squeeze(
    name: str, blocks: Sequence[Block], num_micro_batches: int, durations: Durations, memory_limit: int
) -> Schedule:
    """Return the shortest schedule (by the largest span of a rank) over several bounds of the steady state."""
    ranks = len(blocks)
    first_drain, last_fill = blocks[0][3], blocks[0][0] + _PERIOD * (num_micro_batches - 1)
    bounds = [(first_drain, last_fill), (first_drain + _PERIOD * ranks, last_fill), (0, math.inf), (0, last_fill)]
    squeezed = [_Squeeze(blocks, num_micro_batches, durations, memory_limit, *bound).run() for bound in bounds]
    _, programs = min(squeezed, key=lambda result: result[0])
    place = v_placement(2 * ranks, ranks)
    return Schedule(name, 2 * ranks, ranks, num_micro_batches, place, tuple(map(tuple, programs)))


class _Squeeze:
    """Runs repeated blocks as early as durations allow, out of order before and after the steady state.

    In the steady state [first, last], in slots, each rank keeps the order of the slots. Before and after it, a rank
    takes the first F or I of that phase that can start now, a W if there is none, and waits for a message otherwise.
    A forward is taken early only if memory then suffices for all it overtakes, which rules deadlock out: whatever a
    rank has taken early, it can go on in slot order.
    """

    def __init__(
        self,
        blocks: Sequence[Block],
        num_micro_batches: int,
        durations: Durations,
        memory_limit: int,
        first: float,
        last: float,
    ) -> None:
        ranks = len(blocks)
        self.num_stages, self.memory_limit = 2 * ranks, memory_limit
        self.place = v_placement(self.num_stages, ranks)
        self.seconds = {op: durations.of(op, self.num_stages) for op in "FIW"}
        transfer = durations.transfer_seconds(self.num_stages)
        self.wire = [durations.latency_seconds + occupied for occupied in transfer]
        self.phase: Callable[[int], int] = lambda slot: 0 if slot < first else 1 if slot <= last else 2
        self.queue = [
            _repeat(block, (rank, self.num_stages - 1 - rank), num_micro_batches) for rank, block in enumerate(blocks)
        ]
        self.ready = {("F", 0, micro_batch): 0.0 for micro_batch in range(num_micro_batches)}
        self.clock, self.held = [0.0] * ranks, [0] * ranks
        self.began: list[float | None] = [None] * ranks
        self.programs: list[list[Instruction]] = [[] for _ in range(ranks)]

    def run(self) -> tuple[float, list[list[Instruction]]]:
        """Return the largest span of a rank, seconds, and the programs."""
        events = [(0.0, rank) for rank in range(len(self.queue))]
        while events:
            now, rank = heapq.heappop(events)
            if not self.queue[rank] or self.clock[rank] > now:
                continue
            pick, arrival = self._choose(rank, now)
            if pick is not None:
                for event in self._start(rank, self.queue[rank].pop(pick), now):
                    heapq.heappush(events, event)
            elif arrival < math.inf:
                heapq.heappush(events, (arrival, rank))
        if any(self.queue):
            raise ScheduleError(f"no V schedule of {len(self.queue)} ranks fits {self.memory_limit} activations")
        spans = [end - (began or 0.0) for end, began in zip(self.clock, self.began, strict=True)]
        return max(spans), self.programs

    def _choose(self, rank: int, now: float) -> tuple[int | None, float]:
        """Return the index of the step to start now, or None and when the next message that helps arrives."""
        queue = self.queue[rank]
        phase = self.phase(queue[0].slot)
        held = most = self.held[rank]
        weight, arrival = None, math.inf
        for index, step in enumerate(queue):
            if self.phase(step.slot) != phase or (phase == 1 and index):
                break
            ready = self.ready.get(step[1:], math.inf)
            if step.op == "W" and phase != 1:
                if ready <= now and weight is None:
                    weight = index
            elif step.op != "F" or most < self.memory_limit:
                if ready <= now:
                    return index, now
                arrival = min(arrival, ready)
            held += {"F": 1, "I": 0, "W": -1}[step.op]
            most = max(most, held)
        return weight, arrival

    def _start(self, rank: int, step: _Step, now: float) -> list[tuple[float, int]]:
        """Start a step; return the (time, rank) at which ranks should look again."""
        _, op, stage, micro_batch = step
        end = now + self.seconds[op][stage]
        self.programs[rank].append(Instruction(stage, op, micro_batch))
        self.clock[rank] = end
        if self.began[rank] is None:
            self.began[rank] = now
        self.held[rank] += {"F": 1, "I": 0, "W": -1}[op]
        if op == "I":
            self.ready["W", stage, micro_batch] = end
        events = [(end, rank)]
        if op == "F" and stage + 1 == self.num_stages:
            self.ready["I", stage, micro_batch] = end
        elif op == "F" or (op == "I" and stage):
            target = stage + 1 if op == "F" else stage - 1
            owner = self.place[target]
            arrival = end + (self.wire[stage] if owner != rank else 0.0)
            self.ready[op, target, micro_batch] = arrival
            events.append((arrival, owner))
        return events
