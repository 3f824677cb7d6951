"""Instruction and Schedule: what each pipeline rank does, in which order, and the text both are written in.

The vocabulary and the text form (`2F0`: stage 2, forward, micro-batch 0) are those of torch.distributed.pipelining,
so that a schedule found here runs there and the other way round.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

from planner.errors import ScheduleError

COMPUTE_OPS = frozenset({"F", "B", "I", "W", "OVERLAP_F_B"})
COMMUNICATION_OPS = frozenset({"SEND_F", "RECV_F", "SEND_B", "RECV_B"})
STAGE_OPS = frozenset({"UNSHARD", "RESHARD", "REDUCE_GRAD"})  # once per stage: they name no micro-batch
OVERLAP = "OVERLAP_F_B"

_INSTRUCTION_TEXT = re.compile(
    r"(\d+)(?:(F|B|I|W|SEND_F|RECV_F|SEND_B|RECV_B)(\d+)|(UNSHARD|RESHARD|REDUCE_GRAD))", re.ASCII
)
_COMPOSITE_TEXT = re.compile(r"\(([^()]*)\)OVERLAP_F_B", re.ASCII)


class Instruction(NamedTuple):
    """One step of one pipeline rank.

    `op` is F (forward), B (full backward), I (backward for the input), W (backward for the weights; B = I + W), a
    communication or per-stage op of torch's lowered schedules, or OVERLAP_F_B: an atomic pair of a forward and a
    backward of two micro-batches, held in `parts` (its own stage and micro_batch are then -1).
    """

    stage: int
    op: str
    micro_batch: int = -1
    parts: tuple[Instruction, ...] = ()

    def __str__(self) -> str:
        """Return the text form, `2F0`, `3UNSHARD` or `(0F7;7B3)OVERLAP_F_B`."""
        if self.parts:
            return f"({';'.join(str(part) for part in self.parts)}){self.op}"
        return f"{self.stage}{self.op}{self.micro_batch if self.micro_batch >= 0 else ''}"

    def flat(self) -> tuple[Instruction, ...]:
        """Return the parts of a composite, or the instruction itself."""
        return self.parts or (self,)


def overlap(forward: Instruction, backward: Instruction) -> Instruction:
    """Return the composite that computes `forward` and `backward` together (DualPipe's F&B cell)."""
    return Instruction(-1, OVERLAP, -1, (forward, backward))


def parse_instruction(text: str) -> Instruction:
    """Read the text form of one instruction.

    Raises:
        ScheduleError: the text is not an instruction.
    """
    text = text.strip()
    if match := _INSTRUCTION_TEXT.fullmatch(text):
        stage, op, micro_batch, stage_op = match.groups()
        if stage_op:
            return Instruction(int(stage), stage_op)
        return Instruction(int(stage), op, int(micro_batch))
    if match := _COMPOSITE_TEXT.fullmatch(text):
        parts = tuple(parse_instruction(part) for part in match.group(1).split(";"))
        if [part.op for part in parts] != ["F", "B"]:
            raise ScheduleError(f"{text!r} must pair one F with one B, in this order, as in (0F7;7B3)OVERLAP_F_B")
        return overlap(*parts)
    raise ScheduleError(
        f"{text!r} is not a pipeline instruction; write stage, op, micro-batch as in 2F0, 2B0, 2I0, 2W0, 2SEND_F0, "
        "2UNSHARD, or a pair as in (0F7;7B3)OVERLAP_F_B"
    )


@dataclass(frozen=True)
class Schedule:
    """Who computes what in which order: one program per pipeline rank.

    Attributes:
        name: The generator's name, or `custom`.
        num_stages: Stages of the model, `num_ranks` times the model chunks per rank.
        num_ranks: Pipeline ranks.
        num_micro_batches: Micro-batches per step.
        stage_to_rank: The rank of each stage.
        programs: The instructions of each rank, in order.
    """

    name: str
    num_stages: int
    num_ranks: int
    num_micro_batches: int
    stage_to_rank: tuple[int, ...]
    programs: tuple[tuple[Instruction, ...], ...] = field(repr=False)

    def __post_init__(self) -> None:
        if len(self.stage_to_rank) != self.num_stages:
            raise ScheduleError(
                f"stage_to_rank names {len(self.stage_to_rank)} of {self.num_stages} stages; name each once"
            )
        if len(self.programs) != self.num_ranks:
            raise ScheduleError(
                f"the schedule has {len(self.programs)} programs for {self.num_ranks} ranks; give one program per rank"
            )
        if stray := [rank for rank in self.stage_to_rank if not 0 <= rank < self.num_ranks]:
            raise ScheduleError(f"stage_to_rank names rank {stray[0]}; ranks go from 0 to {self.num_ranks - 1}")

    @property
    def num_model_chunks(self) -> int:
        """The largest number of stages that one rank holds."""
        return max(self.stage_to_rank.count(rank) for rank in range(self.num_ranks))

    @cached_property
    def is_lowered(self) -> bool:
        """Whether sends and receives are written out."""
        return any(step.op in COMMUNICATION_OPS for program in self.programs for step in program)

    def instructions(self) -> Iterator[tuple[int, int, Instruction]]:
        """Yield (rank, position, instruction), rank by rank."""
        for rank, program in enumerate(self.programs):
            for position, step in enumerate(program):
                yield rank, position, step

    def stages_of(self, rank: int) -> tuple[int, ...]:
        """Return the stages that `rank` holds, in model order: its model chunks."""
        return tuple(stage for stage, owner in enumerate(self.stage_to_rank) if owner == rank)


def loop_placement(num_stages: int, num_ranks: int) -> tuple[int, ...]:
    """Return rank s mod p for every stage s (Narayanan et al. 2021, section 2.2)."""
    return tuple(stage % num_ranks for stage in range(num_stages))


def v_placement(num_stages: int, num_ranks: int) -> tuple[int, ...]:
    """Return the placement that turns back at each end: 0, 1, .., p-1, p-1, .., 1, 0 (Qi et al. 2024, section 6)."""
    period = [*range(num_ranks), *reversed(range(num_ranks))]
    return tuple(period[stage % (2 * num_ranks)] for stage in range(num_stages))
