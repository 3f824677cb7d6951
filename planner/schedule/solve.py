"""solve: the best order of F, I and W for measured durations and a memory limit, one stage per rank.

Small problems go to a mixed-integer linear program, the one of Qi et al. 2024 (arXiv 2401.10241, appendix G) with
their order of micro-batches (those of one kind run in order on each rank); larger ones to the search of `zb_auto`.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

from planner.schedule.durations import Durations
from planner.schedule.instructions import Schedule
from planner.schedule.words import Objective, Problem, Word, time_words, to_schedule
from planner.schedule.zb_auto import automatic

EXACT_BINARIES = 126
"""Order decisions up to which the linear program is tried: 2 ranks of 7 micro-batches, 4 ranks of 5."""

_PAIRS = (("F", "I"), ("F", "W"), ("I", "W"))


class Solution(NamedTuple):
    """An order and how good it is.

    Attributes:
        schedule: The order; named `custom`, as it is no other schedule.
        seconds: Its cost: the largest span of a rank, or the makespan.
        bound_seconds: No order that the problem allows costs less.
    """

    schedule: Schedule
    seconds: float
    bound_seconds: float


def solve(
    num_ranks: int,
    num_micro_batches: int,
    durations: Durations,
    memory_limit: float,
    *,
    weight_share: float = 1.0,
    objective: Objective = "makespan",
    time_limit_seconds: float = 20.0,
) -> Solution:
    """Return the best order found.

    Args:
        num_ranks: Pipeline ranks, one stage each.
        num_micro_batches: Micro-batches per step.
        durations: Of F, I and W per stage, and of messages.
        memory_limit: Activations a rank may hold, the one being computed included.
        weight_share: Share of an activation kept from I until W; 1 counts activations until W.
        objective: Minimise the makespan, or the largest span of a rank (what the zero-bubble papers minimise).
        time_limit_seconds: For the linear program; the heuristic's order stands if it finds none better in time.

    Raises:
        ScheduleError: the memory limit leaves no room for one activation.
    """
    problem = Problem.of(
        num_ranks, num_micro_batches, durations, memory_limit, weight_share=weight_share, objective=objective
    )
    found = automatic("custom", problem)
    words = [[step.op for step in program] for program in found.programs]
    cost, bound = time_words(problem, words).cost(problem), lower_bound_seconds(problem)
    binaries = len(_PAIRS) * num_ranks * num_micro_batches * (num_micro_batches - 1) // 2
    if binaries <= EXACT_BINARIES and cost > bound * (1 + 1e-9):
        better, proven = _Program(problem, cost).solve(time_limit_seconds)
        bound = max(bound, proven)
        if better is not None and (improved := time_words(problem, better).cost(problem)) < cost:
            words, cost = better, improved
    return Solution(to_schedule("custom", problem, words), cost, min(bound, cost))


def lower_bound_seconds(problem: Problem) -> float:
    """Return what no order undercuts: each rank's work, for the makespan after its first message can have arrived."""
    fill, bound = 0.0, 0.0
    for rank in range(problem.num_ranks):
        work = problem.num_micro_batches * sum(problem.seconds[op][rank] for op in "FIW")
        bound = max(bound, work + (fill if problem.objective == "makespan" else 0.0))
        fill += problem.seconds["F"][rank] + problem.latency_seconds
    return bound


class _Program:
    """The linear program: a start per op, and for each pair of a rank that could go either way, which is first.

    The k-th F precedes the k-th I, and that the k-th W; so only pairs whose first kind has the larger index are open.
    """

    def __init__(self, problem: Problem, cost: float) -> None:
        self.problem, self.cost = problem, cost
        ranks, m = problem.num_ranks, problem.num_micro_batches
        kinds = [(op, rank, k) for op in "FIW" for rank in range(ranks) for k in range(m)]
        self.start = {key: column for column, key in enumerate(kinds)}
        opens = [
            (first, second, rank, i, j)
            for first, second in _PAIRS
            for rank in range(ranks)
            for i in range(m)
            for j in range(i)
        ]
        self.before = {key: len(kinds) + column for column, key in enumerate(opens)}
        self.total = len(kinds) + len(opens)
        self.horizon = sum(sum(problem.seconds[op]) for op in "FIW") * m + 2 * ranks * problem.latency_seconds
        self.rows: list[dict[int, float]] = []  # each at least its entry of `least`
        self.least: list[float] = []
        self._order()
        self._memory()
        self._objective()

    def solve(self, time_limit_seconds: float) -> tuple[list[Word] | None, float]:
        """Return the best words found, if any, and a bound on the cost."""
        entries = [(row, column, value) for row, terms in enumerate(self.rows) for column, value in terms.items()]
        row, column, value = map(np.array, zip(*entries, strict=True))
        matrix = coo_array((value, (row, column)), shape=(len(self.rows), self.total + 1)).tocsr()
        binary = np.zeros(self.total + 1, np.int64)
        binary[len(self.start) : self.total] = 1
        upper = np.where(binary == 1, 1.0, self.horizon)
        upper[self.total] = self.cost
        objective = np.zeros(self.total + 1)
        objective[self.total] = 1.0
        result = milp(
            objective,
            integrality=binary,
            bounds=Bounds(np.zeros(self.total + 1), upper),
            constraints=LinearConstraint(matrix, np.array(self.least), np.inf),
            options={"time_limit": time_limit_seconds, "mip_rel_gap": 1e-6},
        )
        bound = float(result.mip_dual_bound) if result.mip_dual_bound is not None else 0.0
        return (None if result.x is None else self._words(result.x)), bound

    def _words(self, solution: NDArray[np.float64]) -> list[Word]:
        words = []
        for rank in range(self.problem.num_ranks):
            # Ties of zero-length ops are broken as the program must: F, I, W of one micro-batch in this order.
            keys = [key for key in self.start if key[1] == rank]
            keys.sort(key=lambda key: (round(solution[self.start[key]] / self.horizon, 9), key[2], "FIW".index(key[0])))
            words.append([key[0] for key in keys])
        return words

    def _after(self, later: int, earlier: int, seconds: float) -> None:
        self.rows.append({later: 1.0, earlier: -1.0})
        self.least.append(seconds)

    def _order(self) -> None:
        """Data dependencies, the order within a kind, and one of the two orders for each open pair."""
        problem, start = self.problem, self.start
        seconds, latency = problem.seconds, problem.latency_seconds
        for (op, rank, k), column in start.items():
            if k:
                self._after(column, start[op, rank, k - 1], seconds[op][rank])
            if op == "F" and rank:
                self._after(column, start["F", rank - 1, k], seconds["F"][rank - 1] + latency)
            elif op == "I":
                self._after(column, start["F", rank, k], seconds["F"][rank])
                if rank + 1 < problem.num_ranks:
                    self._after(column, start["I", rank + 1, k], seconds["I"][rank + 1] + latency)
            elif op == "W":
                self._after(column, start["I", rank, k], seconds["I"][rank])
        for (first, second, rank, i, j), column in self.before.items():
            a, b = start[first, rank, i], start[second, rank, j]
            self.rows += [{b: 1.0, a: -1.0, column: -self.horizon}, {a: 1.0, b: -1.0, column: self.horizon}]
            self.least += [seconds[first][rank] - self.horizon, seconds[second][rank]]
            for near in ((first, second, rank, i - 1, j), (first, second, rank, i, j + 1)):
                if near in self.before:  # what comes before a later one comes before this, too
                    self.rows.append({self.before[near]: 1.0, column: -1.0})
                    self.least.append(0.0)

    def _memory(self) -> None:
        """When F i starts, i are begun, and each I and W not before it has been run."""
        share = self.problem.weight_share
        for rank in range(self.problem.num_ranks):
            for i in range(self.problem.num_micro_batches):
                row = {self.before["F", "I", rank, i, j]: share - 1.0 for j in range(i)}
                row |= {self.before["F", "W", rank, i, j]: -share for j in range(i)}
                self.rows.append(row)
                self.least.append(1.0 - self.problem.memory_limit)

    def _objective(self) -> None:
        """The cost is at least each rank's end, less its start if it is the span, and at least its work after it."""
        m, cost = self.problem.num_micro_batches, self.total
        for rank in range(self.problem.num_ranks):
            first, last = self.start["F", rank, 0], self.start["W", rank, m - 1]
            work = m * sum(self.problem.seconds[op][rank] for op in "FIW")
            self._after(last, first, work - self.problem.seconds["W"][rank])
            self.rows.append({cost: 1.0, last: -1.0} | ({first: 1.0} if self.problem.objective == "span" else {}))
            self.least.append(self.problem.seconds["W"][rank])
