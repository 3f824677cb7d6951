"""Schedules over looped stages: interleaved 1F1B, interleaved zero-bubble and looped breadth-first."""

from __future__ import annotations

from planner.schedule.instructions import Instruction, Schedule, loop_placement

Position = tuple[int, int]
"""(model chunk, micro-batch)"""


def interleaved(num_ranks: int, num_micro_batches: int, num_model_chunks: int) -> Schedule:
    """Return interleaved 1F1B: bubble ratio (p-1)/(v m) when p divides m (Narayanan et al. 2021, arXiv 2104.04473).

    For other m, the micro-batches go in max(1, m // p) rounds of sizes that differ by at most one, larger rounds
    first: with rounds of one size this is torch's flexible interleaved 1F1B, which knows no others.
    """
    programs = []
    for rank in range(num_ranks):
        first_round = _rounds(num_ranks, num_micro_batches)[0]
        warm_up = (num_model_chunks - 1) * first_round + 2 * (num_ranks - 1 - rank)
        programs.append(_one_forward_one_backward(rank, num_ranks, num_micro_batches, num_model_chunks, warm_up, None))
    return _looped("interleaved", programs, num_micro_batches, num_model_chunks)


def interleaved_zb(num_ranks: int, num_micro_batches: int, num_model_chunks: int) -> Schedule:
    """Return the interleaved zero-bubble schedule of torch: W of rank r lags r backwards (Qi et al. 2024, 2401.10241).

    Splitting the backward halves the time a gradient needs to climb one rank, so that the warm-up of 1F1B suffices.
    """
    programs = []
    for rank in range(num_ranks):
        first_round = _rounds(num_ranks, num_micro_batches)[0]
        warm_up = (num_model_chunks - 1) * first_round + num_ranks - 1 - rank
        programs.append(_one_forward_one_backward(rank, num_ranks, num_micro_batches, num_model_chunks, warm_up, rank))
    return _looped("interleaved-zb", programs, num_micro_batches, num_model_chunks)


def looped_bfs(num_ranks: int, num_micro_batches: int, num_model_chunks: int) -> Schedule:
    """Return looped breadth-first: all micro-batches through one chunk before the next (Lamy-Poirier 2023, 2211.05953).

    Backwards run in reverse order, as in torch.distributed.pipelining.
    """
    programs = []
    for rank in range(num_ranks):
        order = [(chunk, micro_batch) for chunk in range(num_model_chunks) for micro_batch in range(num_micro_batches)]
        program = [Instruction(chunk * num_ranks + rank, "F", micro_batch) for chunk, micro_batch in order]
        program += [Instruction(chunk * num_ranks + rank, "B", micro_batch) for chunk, micro_batch in order[::-1]]
        programs.append(program)
    return _looped("looped-bfs", programs, num_micro_batches, num_model_chunks)


def _rounds(num_ranks: int, num_micro_batches: int) -> list[int]:
    """Return how many micro-batches each round takes through all chunks."""
    count = max(1, num_micro_batches // num_ranks)
    size, larger = divmod(num_micro_batches, count)
    return [size + 1] * larger + [size] * (count - larger)


def _order(num_ranks: int, num_micro_batches: int, num_model_chunks: int, *, backward: bool) -> list[Position]:
    """Return the order of a rank's forwards or backwards: round by round, chunk by chunk."""
    chunks = range(num_model_chunks)
    order: list[Position] = []
    first = 0
    for size in _rounds(num_ranks, num_micro_batches):
        for chunk in reversed(chunks) if backward else chunks:
            order += [(chunk, micro_batch) for micro_batch in range(first, first + size)]
        first += size
    return order


def _one_forward_one_backward(
    rank: int, num_ranks: int, num_micro_batches: int, num_model_chunks: int, warm_up: int, weight_lag: int | None
) -> list[Instruction]:
    """Return warm_up forwards, then forwards and backwards in turn; with a weight_lag, W runs that many I later."""
    forwards = _order(num_ranks, num_micro_batches, num_model_chunks, backward=False)
    backwards = _order(num_ranks, num_micro_batches, num_model_chunks, backward=True)

    def step(op: str, at: Position) -> Instruction:
        return Instruction(at[0] * num_ranks + rank, op, at[1])

    warm_up = min(warm_up, len(forwards))
    program = [step("F", at) for at in forwards[:warm_up]]
    for index, at in enumerate(backwards):
        if index + warm_up < len(forwards):
            program.append(step("F", forwards[index + warm_up]))
        program.append(step("B" if weight_lag is None else "I", at))
        if weight_lag is not None and index >= weight_lag:
            program.append(step("W", backwards[index - weight_lag]))
    if weight_lag:
        program += [step("W", at) for at in backwards[-weight_lag:]]
    return program


def _looped(name: str, programs: list[list[Instruction]], num_micro_batches: int, num_model_chunks: int) -> Schedule:
    num_ranks = len(programs)
    num_stages = num_ranks * num_model_chunks
    place = loop_placement(num_stages, num_ranks)
    return Schedule(name, num_stages, num_ranks, num_micro_batches, place, tuple(map(tuple, programs)))
