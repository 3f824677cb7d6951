"""DualPipeV: two micro-batches flow in opposite directions through a V, forward of one over backward of the other.

DeepSeek-AI 2024 (arXiv 2412.19437) and its DualPipe repository; Sea AI Lab's cut-in-half variant of DualPipe.
"""

from __future__ import annotations

from collections import Counter, deque

from planner.schedule.instructions import Instruction, Schedule, overlap, v_placement


def dualpipe_v(num_ranks: int, num_micro_batches: int) -> Schedule:
    """Return DualPipeV: bubble (p-1)(F&B + B - 3W), at most 2p + 1 chunks in flight on each of the p ranks.

    The pattern needs 2p micro-batches; with fewer, the cells of those that do not exist are left out, which
    keeps every order and thus cannot deadlock.
    """
    programs = []
    for rank in range(num_ranks):
        program = _Program(rank, num_ranks)
        program.fill(max(num_micro_batches, 2 * num_ranks))
        programs.append(tuple(_existing(program.steps, num_micro_batches)))
    place = v_placement(2 * num_ranks, num_ranks)
    return Schedule("dualpipe-v", 2 * num_ranks, num_ranks, num_micro_batches, place, tuple(programs))


def _existing(steps: list[Instruction], num_micro_batches: int) -> list[Instruction]:
    kept = []
    for step in steps:
        parts = [part for part in step.flat() if part.micro_batch < num_micro_batches]
        kept += [step] if len(parts) == len(step.flat()) else parts
    return kept


class _Program:
    """One rank's program in the making: the next micro-batch of each (stage, op), and the W not yet run."""

    def __init__(self, rank: int, num_ranks: int) -> None:
        self.rank, self.num_ranks = rank, num_ranks
        self.down, self.up = rank, 2 * num_ranks - 1 - rank  # the rank's stages on the two arms of the V
        self.steps: list[Instruction] = []
        self._next: Counter[tuple[int, str]] = Counter()
        self._weights: deque[Instruction] = deque()

    def fill(self, num_micro_batches: int) -> None:
        """Write the eight phases of the pattern."""
        below = self.num_ranks - 1 - self.rank  # ranks between this one and the turn of the V
        for _ in range(2 * below):
            self._add("F", self.down)
        for _ in range(self.rank + 1):
            self._add("F", self.down)
            self._add("F", self.up)
        for _ in range(below):
            self._add("I", self.up)
            self._add_weight()
            self._add("F", self.up)
        for turn in range(num_micro_batches - 2 * self.num_ranks + self.rank + 1):
            if turn == 0 and below == 0:  # apart: the loss rank starts its first backward sooner
                self._add("F", self.down)
                self._add("B", self.up)
            else:
                self._add_overlap(self.down, self.up)
            self._add_overlap(self.up, self.down)
        for _ in range(below):
            self._add("B", self.up)
            self._add_overlap(self.up, self.down)
        for turn in range(2 * (self.rank + 1)):  # the second half splits its backwards, to fill the drain with W
            self._add("I" if turn > self.rank else "B", self.down if turn % 2 else self.up)
        for _ in range(below):
            self._add_weight()
            self._add("I", self.down)
        for _ in range(self.rank + 1):
            self._add_weight()

    def _take(self, op: str, stage: int) -> Instruction:
        key = (stage, "F" if op == "F" else "backward")
        step = Instruction(stage, op, self._next[key])
        self._next[key] += 1
        return step

    def _add(self, op: str, stage: int) -> None:
        step = self._take(op, stage)
        self.steps.append(step)
        if op == "I":
            self._weights.append(step._replace(op="W"))

    def _add_weight(self) -> None:
        if self._weights:
            self.steps.append(self._weights.popleft())

    def _add_overlap(self, forward_stage: int, backward_stage: int) -> None:
        self.steps.append(overlap(self._take("F", forward_stage), self._take("B", backward_stage)))
