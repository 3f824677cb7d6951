"""One stage per rank, F, I and W apart: the problem of ordering them, orders as words, and when they run.

A rank's program is a word over F, I and W; the k-th letter of a kind is micro-batch k. `zb_auto` and `solve` search
for words; here they are timed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from planner.errors import ScheduleError
from planner.schedule.durations import Durations
from planner.schedule.instructions import Instruction, Schedule, loop_placement

Objective = Literal["span", "makespan"]
Word = list[str]


@dataclass(frozen=True)
class Problem:
    """What to order: seconds of F, I and W on each rank, the message time, and the memory limit.

    Attributes:
        num_micro_batches: Micro-batches per step.
        seconds: Seconds of "F", "I" and "W", one per rank each.
        latency_seconds: From the end of an F or I to its message's arrival on the next rank.
        memory_limit: Activations a rank may hold, the one being computed included.
        weight_share: Share of an activation kept from I until W; 1 counts activations until W.
        objective: Minimise the largest span of a rank (the paper's cost) or the makespan.
    """

    num_micro_batches: int
    seconds: dict[str, list[float]]
    latency_seconds: float
    memory_limit: float
    weight_share: float = 1.0
    objective: Objective = "span"

    @classmethod
    def of(
        cls,
        num_ranks: int,
        num_micro_batches: int,
        durations: Durations,
        memory_limit: float,
        *,
        weight_share: float = 1.0,
        objective: Objective = "span",
    ) -> Problem:
        """Return the problem of one stage per rank.

        Raises:
            ScheduleError: no micro-batch, or the memory limit leaves no room for one activation.
        """
        if num_micro_batches < 1:
            raise ScheduleError(f"num_micro_batches is {num_micro_batches}; give at least 1")
        if not 1 <= memory_limit < math.inf:
            raise ScheduleError(
                f"memory limit of {memory_limit:g} activations; a rank needs at least 1, and a finite number"
            )
        seconds = {op: durations.of(op, num_ranks) for op in ("F", "I", "W")}
        latency = durations.latency_seconds + max(durations.transfer_seconds(num_ranks))
        return cls(num_micro_batches, seconds, latency, memory_limit, weight_share, objective)

    @property
    def num_ranks(self) -> int:
        """Ranks, one stage each."""
        return len(self.seconds["F"])

    def fits(self, word: Word) -> bool:
        """Return whether a rank that runs `word` stays within the memory limit."""
        held = 0.0
        for op in word:
            held += {"F": 1.0, "I": self.weight_share - 1.0, "W": -self.weight_share}[op]
            if held > self.memory_limit + 1e-9:
                return False
        return True


@dataclass(frozen=True)
class Timing:
    """When everything runs; the k-th op of a kind on a rank is micro-batch k.

    Attributes:
        words: The order of each rank.
        starts: Start of each op of each rank, in the order of its word, seconds.
        ends: End of each rank's last op, seconds.
    """

    words: list[Word]
    starts: list[list[float]]
    ends: list[float]

    def cost(self, problem: Problem) -> float:
        """Return the seconds to minimise."""
        if problem.objective == "makespan":
            return max(self.ends)
        return max(end - start[0] for end, start in zip(self.ends, self.starts, strict=True))

    def key(self, problem: Problem) -> tuple[float, int, float]:
        """Return what candidates are compared by: the cost, then activations held until W, then the makespan."""
        return float(f"{self.cost(problem):.9g}"), max(map(_peak_until_w, self.words)), max(self.ends)


def to_schedule(name: str, problem: Problem, words: Sequence[Word]) -> Schedule:
    """Return the schedule in which rank r runs words[r]."""
    programs = []
    for rank, word in enumerate(words):
        count = {"F": 0, "I": 0, "W": 0}
        program = []
        for op in word:
            program.append(Instruction(rank, op, count[op]))
            count[op] += 1
        programs.append(tuple(program))
    ranks = problem.num_ranks
    return Schedule(name, ranks, ranks, problem.num_micro_batches, loop_placement(ranks, ranks), tuple(programs))


def _peak_until_w(word: Word) -> int:
    held = peak = 0
    for op in word:
        if op == "F":
            held += 1
            peak = max(peak, held)
        elif op == "W":
            held -= 1
    return peak


def time_words(problem: Problem, words: Sequence[Word]) -> Timing:
    """Return when everything runs if every rank keeps to its word.

    Raises:
        ScheduleError: ranks wait for each other.
    """
    return walk([OrderedRank(problem, rank, word) for rank, word in enumerate(words)])


def walk(ranks: Sequence[OrderedRank]) -> Timing:
    """Advance every rank as far as its neighbours' messages let it, until all are done.

    Raises:
        ScheduleError: ranks wait for each other.
    """
    todo = list(range(len(ranks)))
    while todo:
        rank = todo.pop()
        above = ranks[rank - 1].ends["F"] if rank else None
        below = ranks[rank + 1].ends["I"] if rank + 1 < len(ranks) else None
        if ranks[rank].advance(above, below):
            todo += [near for near in (rank - 1, rank + 1) if 0 <= near < len(ranks)]
    if any(each.position < len(each.skeleton) for each in ranks):
        raise ScheduleError("deadlock: these orders of F, I and W wait for each other")
    for each in ranks:
        each.finish()
    return Timing([each.word for each in ranks], [each.starts for each in ranks], [each.clock for each in ranks])


class OrderedRank:
    """One rank that keeps to its word, and when it did what."""

    def __init__(self, problem: Problem, rank: int, skeleton: Word) -> None:
        self.problem, self.skeleton, self.position = problem, skeleton, 0
        self.seconds = {op: problem.seconds[op][rank] for op in "FIW"}
        self.word: Word = []
        self.starts: list[float] = []
        self.ends: dict[str, list[float]] = {"F": [], "I": [], "W": []}
        self.clock = 0.0

    def advance(self, above: list[float] | None, below: list[float] | None) -> bool:
        """Run on until a message is missing; return whether anything ran.

        Args:
            above: Ends of F on the rank before this one; None for the first rank.
            below: Ends of I on the rank after this one; None for the last rank.
        """
        before = self.position
        latency = self.problem.latency_seconds
        forwards, backwards = self.ends["F"], self.ends["I"]
        while self.position < len(self.skeleton):
            op = self.skeleton[self.position]
            arrival = 0.0
            if op == "F" and above is not None:
                if len(above) <= len(forwards):
                    break
                arrival = above[len(forwards)] + latency
            elif op == "I":
                source, wire = (forwards, 0.0) if below is None else (below, latency)
                if len(source) <= len(backwards):
                    break
                arrival = source[len(backwards)] + wire
            self.prepare(op, arrival)
            self.run(op, arrival)
            self.position += 1
        return self.position > before

    def run(self, op: str, arrival: float = 0.0) -> None:
        """Run one op, not before `arrival`."""
        start = max(self.clock, arrival)
        self.word.append(op)
        self.starts.append(start)
        self.clock = start + self.seconds[op]
        self.ends[op].append(self.clock)

    def prepare(self, op: str, arrival: float) -> None:
        """Do what comes before the next op of the skeleton."""

    def finish(self) -> None:
        """Do what comes after the skeleton."""
