"""ZB-1p and ZB-2p: the order of F, I and W found from durations and a memory limit (Qi et al. 2024, arXiv 2401.10241).

Theory of operation. A rank's program is a word over F, I and W; each letter's micro-batches run in order. The word's
skeleton, its F and I, is a number of warm-up forwards and then I and F in turn. W may run any time after its I: it
fills gaps. `_fill` walks a skeleton and puts a W wherever one fits before the next F or I can start, wherever memory
asks for one, and wherever waiting would take the rank's idle time over an allowance; a W that does not fit delays F
or I, and with them other ranks. `automatic` tries warm-up slopes (1 is ZB-H1's, 2 is ZB-H2's) and allowances, keeps
the best, and then takes W off the critical path where that helps (`_delay_weights`).
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import NamedTuple

from planner.errors import ScheduleError
from planner.schedule.instructions import Schedule
from planner.schedule.words import OrderedRank, Problem, Timing, Word, time_words, to_schedule, walk
from planner.schedule.zb_h import zb_h1, zb_h2

ZB_2P_WEIGHT_SHARE = 0.5
"""Share of an activation kept from I until W when ZB-2p counts memory.

The paper keeps 32 of 34 + 5 a s / h units (its equation for M_W over M_B), 0.37 to 0.43 for its models; one half is
more careful. ZB-1p keeps all of it, so that it fits wherever 1F1B does.
"""

_SLOPES = (1.0, 1.5, 2.0, 2.5)  # warm-up forwards per rank of distance from the loss
_EXTRA_FORWARDS = (0, 1, 2)  # on the first rank, fewer on those after it; messages take the time of a few forwards
_ALLOWANCES = (0.5, 1.0, 1.5, 2.0, 4.0, math.inf)  # in W of the rank
_REORDERED_INSTRUCTIONS = 200  # schedules up to this size are also improved by moving single instructions
_LOCAL_SEARCH_INSTRUCTIONS = 1_000_000  # replayed by the local search, whatever the size of the schedule


def automatic(name: str, problem: Problem) -> Schedule:
    """Return the best order found; never worse than ZB-H1 or ZB-H2 where these fit the memory limit."""
    candidates = list(_handcrafted(problem))
    plain = []
    for shape in _shapes(problem):
        with suppress(ScheduleError):  # bursts that wait for each other: another shape will do
            plain.append((_fill(problem, shape, 0.0, growing=False), shape))
    plain.sort(key=lambda pair: pair[0].key(problem))
    candidates += [timing for timing, _ in plain]
    for _, shape in plain[:3]:
        for allowance in _ALLOWANCES:
            candidates += [_fill(problem, shape, allowance, growing=growing) for growing in (False, True)]
    candidates.sort(key=lambda timing: timing.key(problem))
    improved = [_delay_weights(problem, timing) for timing in candidates[:2]]
    if sum(map(len, candidates[0].words)) <= _REORDERED_INSTRUCTIONS:
        improved = [_reorder(problem, timing) for timing in [*improved, *_distinct(candidates[2:], 4)]]
    best = min(improved, key=lambda timing: timing.key(problem))
    return to_schedule(name, problem, best.words)


def _handcrafted(problem: Problem) -> Iterator[Timing]:
    for generator in (zb_h1, zb_h2):
        schedule = generator(problem.num_ranks, problem.num_micro_batches)
        words = [[step.op for step in program] for program in schedule.programs]
        if all(map(problem.fits, words)):
            yield time_words(problem, words)


class _Shape(NamedTuple):
    """The skeletons of all ranks: forwards before the first I, per rank, and how many I and F then follow in turn."""

    warm_up: tuple[int, ...]
    burst: int


def _shapes(problem: Problem) -> list[_Shape]:
    """Return shapes to try: warm-up forwards that fall by a slope from rank to rank, or as many as time allows."""
    ranks = problem.num_ranks
    most = max(1, min(problem.num_micro_batches, math.floor(problem.memory_limit + 1e-9)))
    warm_ups = {_timed_warm_up(problem, most, late=late) for late in (False, True)}
    for slope in _SLOPES:
        for extra in _EXTRA_FORWARDS:
            more = (extra / (ranks - 1) if ranks > 1 else 0.0) + slope
            warm_ups.add(tuple(min(most, 1 + math.floor((ranks - 1 - rank) * more + 0.5)) for rank in range(ranks)))
    # Memory for fewer micro-batches than ranks leaves the pipeline half empty: rounds of as many as fit then do better.
    bursts = (1, most) if most < ranks else (1,)
    return [_Shape(warm_up, burst) for warm_up in sorted(warm_ups) for burst in bursts]


def _timed_warm_up(problem: Problem, most: int, *, late: bool) -> tuple[int, ...]:
    """Return as many forwards as fit (late: just do not fit) before the first I can start."""
    forward, backward = problem.seconds["F"], problem.seconds["I"]
    latency = problem.latency_seconds
    arrival = sum(forward) + (problem.num_ranks - 1) * latency  # of what the first I needs
    warm_up = [1]
    arrival += backward[-1] + latency
    for rank in range(problem.num_ranks - 2, -1, -1):
        first = sum(forward[:rank]) + rank * latency
        room = (arrival - first) / forward[rank] if forward[rank] > 0.0 else math.inf
        count = most if math.isinf(room) else math.ceil(room) if late else math.floor(room)
        warm_up.append(min(most, max(count, warm_up[-1])))
        arrival = max(arrival, first + warm_up[-1] * forward[rank]) + backward[rank] + latency
    return tuple(reversed(warm_up))


def _skeleton(warm_up: int, burst: int, num_micro_batches: int) -> Word:
    """Return warm_up forwards, then I and F in turn, `burst` of each (at most warm_up) at a time."""
    word = ["F"] * warm_up
    forwards = warm_up
    for first in range(0, num_micro_batches, burst):
        backwards = min(burst, num_micro_batches - first)
        more = min(burst, num_micro_batches - forwards)
        word += ["I"] * backwards + ["F"] * more
        forwards += more
    return word


def _fill(problem: Problem, shape: _Shape, allowance: float, *, growing: bool) -> Timing:
    """Walk the skeletons of a shape and fill their gaps with W.

    Args:
        problem: What to order.
        shape: The skeletons.
        allowance: Idle time, in W of the rank, up to which it waits for an F or I rather than delay it by a W.
        growing: The allowance grows with the micro-batches done, from nothing.
    """
    skeletons = [_skeleton(count, min(shape.burst, count), problem.num_micro_batches) for count in shape.warm_up]
    return walk([_FillingRank(problem, rank, word, allowance, growing) for rank, word in enumerate(skeletons)])


class _FillingRank(OrderedRank):
    """A rank whose skeleton holds F and I only; it decides where its W go."""

    def __init__(self, problem: Problem, rank: int, skeleton: Word, allowance: float, growing: bool) -> None:
        super().__init__(problem, rank, skeleton)
        self.allowance = math.inf if math.isinf(allowance) else allowance * self.seconds["W"]
        self.growing = growing
        self.idle = 0.0

    def pending(self) -> bool:
        """Return whether a W can run."""
        return len(self.ends["W"]) < len(self.ends["I"])

    def prepare(self, op: str, arrival: float) -> None:
        """Run the W that memory asks for before an F, those that fit, and one that does not if idling costs more."""
        weight, done = self.seconds["W"], len(self.ends["I"])
        if op == "F":
            room = self.problem.memory_limit - 1.0 + 1e-9
            share = self.problem.weight_share
            in_flight = len(self.ends["F"]) - done
            while self.pending() and in_flight + share * (done - len(self.ends["W"])) > room:
                self.run("W")
        while self.pending() and self.clock + weight <= arrival:
            self.run("W")
        gap = arrival - self.clock
        if gap <= 0.0 or not self.starts:
            return
        progress = (done + 1) / self.problem.num_micro_batches if self.growing else 1.0
        if self.pending() and self.idle + gap > self.allowance * progress:
            self.run("W")
            gap = arrival - self.clock
        self.idle += max(0.0, gap)

    def finish(self) -> None:
        """Run the W that are left."""
        while self.pending():
            self.run("W")


def _delay_weights(problem: Problem, timing: Timing) -> Timing:
    """Move W that stand on the critical path behind the F or I after them, as long as the cost does not grow.

    Moves that leave the cost as it is count too: of several critical paths, each must give way before the cost falls.
    """
    best, current = timing, timing
    budget = max(20, _LOCAL_SEARCH_INSTRUCTIONS // sum(map(len, timing.words)))
    while budget:
        moves = _critical_weights(problem, current)
        for chosen in [moves] if len(moves) == 1 else [moves, *([move] for move in moves)]:
            budget -= 1
            if (moved := _swap(problem, current, chosen)) and moved.cost(problem) <= current.cost(problem) * (
                1 + 1e-12
            ):
                current = moved
                break
            if not budget:
                break
        else:
            break
        best = min(best, current, key=lambda each: each.key(problem))
    return best


def _swap(problem: Problem, timing: Timing, moves: Sequence[tuple[int, int]]) -> Timing | None:
    """Return the timing after swapping each (rank, position) with the op after it; None if memory forbids it."""
    words = list(timing.words)
    for rank, at in moves:
        word = words[rank] = words[rank].copy()
        word[at], word[at + 1] = word[at + 1], word[at]
    ranks = {rank for rank, _ in moves}
    if not ranks or not all(problem.fits(words[rank]) for rank in ranks):
        return None
    return time_words(problem, words)


def _distinct(candidates: Sequence[Timing], count: int) -> list[Timing]:
    """Return the first `count` candidates that differ in their order of F and I."""
    found: dict[str, Timing] = {}
    for timing in candidates:
        skeleton = "|".join("".join(op for op in word if op != "W") for word in timing.words)
        found.setdefault(skeleton, timing)
        if len(found) == count:
            break
    return list(found.values())


def _reorder(problem: Problem, timing: Timing) -> Timing:
    """Move single instructions a few places earlier or later, as long as that makes the order better."""
    best, best_key = timing, timing.key(problem)
    improved = True
    while improved:
        improved = False
        for words in _neighbours(problem, best.words):
            try:
                moved = time_words(problem, words)
            except ScheduleError:
                continue  # ranks would wait for each other
            if (key := moved.key(problem)) < best_key:
                best, best_key, improved = moved, key, True
                break
    return best


def _neighbours(problem: Problem, words: list[Word]) -> Iterator[list[Word]]:
    """Yield the words with one instruction moved up to four places past others of another kind."""
    for rank, word in enumerate(words):
        for at, op in enumerate(word):
            for to in (*range(at - 4, at), *range(at + 1, at + 5)):
                if not 0 <= to < len(word) or word[to] == op:
                    continue
                moved = word[:at] + word[at + 1 :]
                moved.insert(to, op)
                if _is_legal(moved) and problem.fits(moved):
                    yield [*words[:rank], moved, *words[rank + 1 :]]


def _is_legal(word: Word) -> bool:
    """Return whether each I follows its F and each W its I."""
    count = {"F": 0, "I": 0, "W": 0}
    for op in word:
        count[op] += 1
        if not count["F"] >= count["I"] >= count["W"]:
            return False
    return True


def _critical_weights(problem: Problem, timing: Timing) -> list[tuple[int, int]]:
    """Return the (rank, position) of each W on the critical path that an F or I follows on its rank, last first."""
    spans = [
        end - (starts[0] if problem.objective == "span" else 0.0)
        for end, starts in zip(timing.ends, timing.starts, strict=True)
    ]
    rank = spans.index(max(spans))
    where = [{op: [at for at, o in enumerate(word) if o == op] for op in "FI"} for word in timing.words]
    at = len(timing.words[rank]) - 1
    found = []
    while at > 0:
        word, starts = timing.words[rank], timing.starts[rank]
        op = word[at]
        if starts[at - 1] + problem.seconds[word[at - 1]][rank] >= starts[at]:
            at -= 1
            if word[at] == "W" and op != "W":
                found.append((rank, at))
            continue
        index = bisect_left(where[rank][op], at)
        rank += -1 if op == "F" else 1
        at = where[rank][op][index]
    return found
