"""1F1B, also called PipeDream-Flush (Narayanan et al. 2021, arXiv 2006.09503; Fan et al. 2021 call it DAPPLE)."""

from __future__ import annotations

from planner.schedule.instructions import Instruction, Schedule, loop_placement


def one_f_one_b(num_ranks: int, num_micro_batches: int) -> Schedule:
    """Return 1F1B: GPipe's bubble ratio (p-1)/m with only min(m, p-r) micro-batches in flight on rank r."""
    programs = tuple(_program(rank, num_ranks, num_micro_batches) for rank in range(num_ranks))
    return Schedule("1f1b", num_ranks, num_ranks, num_micro_batches, loop_placement(num_ranks, num_ranks), programs)


def _program(rank: int, num_ranks: int, num_micro_batches: int) -> tuple[Instruction, ...]:
    warm_up = min(num_ranks - 1 - rank, num_micro_batches)
    program = [Instruction(rank, "F", micro_batch) for micro_batch in range(warm_up)]
    for backward in range(num_micro_batches):
        if (forward := backward + warm_up) < num_micro_batches:
            program.append(Instruction(rank, "F", forward))
        program.append(Instruction(rank, "B", backward))
    return tuple(program)
