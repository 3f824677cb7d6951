"""generate: every schedule of the field by its name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from planner.errors import ScheduleError
from planner.schedule.check import check
from planner.schedule.dualpipe_v import dualpipe_v
from planner.schedule.durations import UNIT, Durations
from planner.schedule.gpipe import gpipe
from planner.schedule.instructions import Schedule
from planner.schedule.interleaved import interleaved, interleaved_zb, looped_bfs
from planner.schedule.one_f_one_b import one_f_one_b
from planner.schedule.v_shape import v_half, v_min, zb_v
from planner.schedule.words import Problem
from planner.schedule.zb_auto import ZB_2P_WEIGHT_SHARE, automatic
from planner.schedule.zb_h import zb_h1, zb_h2


@dataclass(frozen=True)
class _Request:
    num_ranks: int
    num_micro_batches: int
    num_model_chunks: int
    durations: Durations
    memory_limit: float | None


@dataclass(frozen=True)
class _Recipe:
    """How to make a schedule: its generator, and the model chunks per rank it is defined for (None: any)."""

    make: Callable[[_Request], Schedule]
    num_model_chunks: int | None = 1
    needs_durations: bool = False


def _zb_1p(r: _Request) -> Schedule:
    limit = r.num_ranks if r.memory_limit is None else r.memory_limit
    return automatic("zb-1p", Problem.of(r.num_ranks, r.num_micro_batches, r.durations, limit))


def _zb_2p(r: _Request) -> Schedule:
    limit = 2 * r.num_ranks if r.memory_limit is None else r.memory_limit
    share = ZB_2P_WEIGHT_SHARE
    return automatic("zb-2p", Problem.of(r.num_ranks, r.num_micro_batches, r.durations, limit, weight_share=share))


_RECIPES = {
    "gpipe": _Recipe(lambda r: gpipe(r.num_ranks, r.num_micro_batches)),
    "1f1b": _Recipe(lambda r: one_f_one_b(r.num_ranks, r.num_micro_batches)),
    "interleaved": _Recipe(lambda r: interleaved(r.num_ranks, r.num_micro_batches, r.num_model_chunks), None),
    "looped-bfs": _Recipe(lambda r: looped_bfs(r.num_ranks, r.num_micro_batches, r.num_model_chunks), None),
    "zb-h1": _Recipe(lambda r: zb_h1(r.num_ranks, r.num_micro_batches)),
    "zb-h2": _Recipe(lambda r: zb_h2(r.num_ranks, r.num_micro_batches)),
    "zb-1p": _Recipe(_zb_1p, needs_durations=True),
    "zb-2p": _Recipe(_zb_2p, needs_durations=True),
    "interleaved-zb": _Recipe(lambda r: interleaved_zb(r.num_ranks, r.num_micro_batches, r.num_model_chunks), None),
    "zb-v": _Recipe(lambda r: zb_v(r.num_ranks, r.num_micro_batches), 2),
    "v-half": _Recipe(lambda r: v_half(r.num_ranks, r.num_micro_batches, r.durations), 2, needs_durations=True),
    "v-min": _Recipe(lambda r: v_min(r.num_ranks, r.num_micro_batches, r.durations), 2, needs_durations=True),
    "dualpipe-v": _Recipe(lambda r: dualpipe_v(r.num_ranks, r.num_micro_batches), 2),
}

NAMES = tuple(_RECIPES)
"""The schedules that `generate` knows; `custom` ones come from CSV."""

DURATION_DEPENDENT = frozenset(name for name, recipe in _RECIPES.items() if recipe.needs_durations)
"""Schedules whose order follows from durations; a plan stores their instructions, not their recipe."""


def model_chunks(name: str) -> int | None:
    """Return how many model chunks per rank a schedule is defined for; None: any number.

    Raises:
        ScheduleError: an unknown name.
    """
    return _recipe(name).num_model_chunks


def generate(
    name: str,
    *,
    num_ranks: int,
    num_micro_batches: int,
    num_model_chunks: int = 1,
    durations: Durations | None = None,
    memory_limit: float | None = None,
    forward_only: bool = False,
) -> Schedule:
    """Return the schedule called `name`.

    Args:
        name: One of NAMES.
        num_ranks: Pipeline ranks.
        num_micro_batches: Micro-batches per step; any number, also fewer than ranks.
        num_model_chunks: Stages per rank; 2 for the V schedules and DualPipeV, 1 for those that know no chunks.
        durations: What the order of DURATION_DEPENDENT schedules is made for; None for F = I = W = 1.
        memory_limit: Activations a rank may hold, in model chunks: the limit that zb-1p (default p, counted until W)
            and zb-2p (default 2p, half of an activation kept from I until W) order under; for the others, a check
            from F until B or I. None for no limit beyond the schedule's own.
        forward_only: Only the forwards, in the order of the training schedule.

    Raises:
        ScheduleError: an unknown name, a number that the schedule is not defined for, or not enough memory.
    """
    recipe = _recipe(name)
    for what, value in (
        ("num_ranks", num_ranks),
        ("num_micro_batches", num_micro_batches),
        ("num_model_chunks", num_model_chunks),
    ):
        if value < 1:
            raise ScheduleError(f"{what} is {value}; give at least 1")
    if recipe.num_model_chunks not in (None, num_model_chunks):
        raise ScheduleError(
            f"{name} has {recipe.num_model_chunks} model chunk(s) per rank, not {num_model_chunks}; "
            f"set num_model_chunks={recipe.num_model_chunks} or choose another schedule"
        )
    request = _Request(num_ranks, num_micro_batches, num_model_chunks, durations or UNIT, memory_limit)
    schedule = recipe.make(request)
    if forward_only:
        return _forwards(schedule)
    if memory_limit is not None and name not in ("zb-1p", "zb-2p"):
        check(schedule, memory_limit=memory_limit)
    return schedule


def _recipe(name: str) -> _Recipe:
    if name not in _RECIPES:
        remedy = "; read it from CSV with from_csv" if name == "custom" else f"; choose one of {', '.join(NAMES)}"
        raise ScheduleError(f"{name!r} is not a schedule that can be generated{remedy}")
    return _RECIPES[name]


def _forwards(schedule: Schedule) -> Schedule:
    """Return the forwards of a schedule: leaving out steps that no forward needs keeps every order."""
    programs = tuple(
        tuple(part for step in program for part in step.flat() if part.op == "F") for program in schedule.programs
    )
    return replace(schedule, programs=programs)
