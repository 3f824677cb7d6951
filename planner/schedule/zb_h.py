"""The handcrafted zero-bubble schedules ZB-H1 and ZB-H2 (Qi et al. 2024, arXiv 2401.10241, section 2 and figure 3)."""

from __future__ import annotations

from planner.schedule.instructions import Instruction, Schedule, loop_placement


def zb_h1(num_ranks: int, num_micro_batches: int) -> Schedule:
    """Return ZB-H1: span bubble (p-1)(F+I-W), 1F1B's memory: p activations until W on every rank."""
    return _handcrafted("zb-h1", num_ranks, num_micro_batches, [(num_ranks - rank, rank) for rank in range(num_ranks)])


def zb_h2(num_ranks: int, num_micro_batches: int) -> Schedule:
    """Return ZB-H2: span bubble (p-1)(F+I-2W), none if F = I = W, for 2p activations until W on every rank."""
    phases = [(2 * (num_ranks - rank) - 1, 2 * rank) for rank in range(num_ranks)]
    return _handcrafted("zb-h2", num_ranks, num_micro_batches, phases)


def _handcrafted(name: str, num_ranks: int, num_micro_batches: int, phases: list[tuple[int, int]]) -> Schedule:
    programs = tuple(
        _program(rank, num_micro_batches, warm_up, weight_lag) for rank, (warm_up, weight_lag) in enumerate(phases)
    )
    place = loop_placement(num_ranks, num_ranks)
    return Schedule(name, num_ranks, num_ranks, num_micro_batches, place, programs)


def _program(rank: int, num_micro_batches: int, warm_up: int, weight_lag: int) -> tuple[Instruction, ...]:
    """Return warm_up forwards, then I and F in turn, each W weight_lag backwards after its I."""
    program = [Instruction(rank, "F", micro_batch) for micro_batch in range(min(warm_up, num_micro_batches))]
    for backward in range(num_micro_batches):
        program.append(Instruction(rank, "I", backward))
        if backward >= weight_lag:
            program.append(Instruction(rank, "W", backward - weight_lag))
        if backward + warm_up < num_micro_batches:
            program.append(Instruction(rank, "F", backward + warm_up))
    first = max(0, num_micro_batches - weight_lag)
    program += [Instruction(rank, "W", micro_batch) for micro_batch in range(first, num_micro_batches)]
    return tuple(program)
