"""Pipeline schedules as values: instructions, their text and CSV form, checks, and one module per family of generators.

Theory of operation. A schedule is one program per pipeline rank, a tuple of instructions `(stage, op, micro_batch)`.
Generators are pure functions of ranks, micro-batches and model chunks, some also of durations and a memory limit.
`check` says whether a schedule, ours or a user's, can run; `lower_communication` writes out its sends and receives.
SEND posts and never waits, RECV waits, messages are first-in first-out per (source, destination, direction).
"""

from planner.schedule.check import check, format_grid
from planner.schedule.durations import UNIT, Durations
from planner.schedule.grid import from_csv, to_csv
from planner.schedule.instructions import (
    Instruction,
    Schedule,
    loop_placement,
    overlap,
    parse_instruction,
    v_placement,
)
from planner.schedule.lower import lower_communication
from planner.schedule.registry import DURATION_DEPENDENT, NAMES, generate, model_chunks

__all__ = [
    "DURATION_DEPENDENT",
    "NAMES",
    "UNIT",
    "Durations",
    "Instruction",
    "Schedule",
    "check",
    "format_grid",
    "from_csv",
    "generate",
    "loop_placement",
    "lower_communication",
    "model_chunks",
    "overlap",
    "parse_instruction",
    "to_csv",
    "v_placement",
]
