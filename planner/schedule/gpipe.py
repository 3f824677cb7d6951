"""GPipe: all forwards, then all backwards (Huang et al. 2019, arXiv 1811.06965, figure 2c)."""

from __future__ import annotations

from planner.schedule.instructions import Instruction, Schedule, loop_placement


def gpipe(num_ranks: int, num_micro_batches: int) -> Schedule:
    """Return GPipe's schedule: bubble ratio (p-1)/m, m micro-batches in flight on every rank.

    Backwards run in the order of the forwards, as in torch.distributed.pipelining, so that weight gradients add up in
    the order of the sequential run.
    """
    programs = tuple(
        tuple(Instruction(rank, op, micro_batch) for op in "FB" for micro_batch in range(num_micro_batches))
        for rank in range(num_ranks)
    )
    return Schedule("gpipe", num_ranks, num_ranks, num_micro_batches, loop_placement(num_ranks, num_ranks), programs)
