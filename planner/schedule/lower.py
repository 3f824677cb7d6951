"""lower_communication: a compute schedule with its sends and receives written out, as torch does it.

A SEND follows the step that makes its message: it is posted and never waited for. Its RECV is put into the receiver's
program at that moment, so that the receives from any one rank stand in the order of its sends, and a message is
never taken before one that was sent earlier; both ends agree without tags, and synchronous sends cannot deadlock.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from planner.schedule.check import Fact, check, produced, required
from planner.schedule.instructions import Instruction, Schedule


class _Message(NamedTuple):
    send: Instruction
    receive: Instruction
    destination: int


def lower_communication(schedule: Schedule) -> Schedule:
    """Return the schedule with SEND_F, RECV_F, SEND_B and RECV_B between ranks.

    Ranks take turns, one instruction each if what it needs is there, as in torch; stages on the same rank exchange
    nothing. A lowered schedule is returned as it is.

    Raises:
        ScheduleError: the schedule cannot run.
    """
    if schedule.is_lowered:
        return schedule
    check(schedule, forward_only=_is_forward_only(schedule))
    lowered: list[list[Instruction]] = [[] for _ in schedule.programs]
    done: set[Fact] = set()
    cursor = [0] * schedule.num_ranks
    remaining = sum(map(len, schedule.programs))
    while remaining:
        for rank, program in enumerate(schedule.programs):
            if cursor[rank] == len(program):
                continue
            step = program[cursor[rank]]
            if not done.issuperset(required(step, schedule, lowered=False)):
                continue
            cursor[rank] += 1
            remaining -= 1
            done.update(produced(step))
            lowered[rank].append(step)
            for message in _messages(step, schedule):
                lowered[rank].append(message.send)
                lowered[message.destination].append(message.receive)
    return replace(schedule, programs=tuple(map(tuple, lowered)))


def _is_forward_only(schedule: Schedule) -> bool:
    return all(part.op not in "BIW" for _, _, step in schedule.instructions() for part in step.flat())


def _messages(step: Instruction, schedule: Schedule) -> list[_Message]:
    messages = []
    for part in step.flat():
        if part.op == "F":
            target, way = part.stage + 1, "F"
        elif part.op in "BI":
            target, way = part.stage - 1, "B"
        else:
            continue
        if not 0 <= target < schedule.num_stages:
            continue
        destination = schedule.stage_to_rank[target]
        if destination != schedule.stage_to_rank[part.stage]:
            send = Instruction(part.stage, f"SEND_{way}", part.micro_batch)
            messages.append(_Message(send, Instruction(target, f"RECV_{way}", part.micro_batch), destination))
    return messages
