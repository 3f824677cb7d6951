"""suggest: enumerate, estimate all, replay the best, rank, explain what was rejected.

Every combination of axis sizes, micro-batch, model chunks, schedule, recomputation, ZeRO stage, sequence parallelism
and kind of context parallelism is a candidate. All are estimated at once by array formulas; as many of the best as fit
the time budget are lowered and replayed, and those decide.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from planner.cost.fine import WHOLE_MESH_RANKS
from planner.cost.footprint import device_bytes
from planner.errors import MeshwrightError, PlanError
from planner.machine import Machine
from planner.model import ModelSpec
from planner.plan import Plan, Training
from planner.predict import predict
from planner.search.space import Space
from planner.search.ties import by_preference
from planner.trace import Prediction

if TYPE_CHECKING:
    from planner.search.assign import Assignment

REPLAY_SPANS = 40_000
"""Spans to predict, under a second's work; a count and not a time, so that the answer does not depend on the load."""

LARGE_MESH_SPANS = 40_000  # what laying out a mesh beyond `WHOLE_MESH_RANKS` costs, in spans
ALWAYS_REPLAYED = 2
SPARE_REPLAYS = 6  # beyond the plans asked for: an estimate may put the best a few places down

WORTH_REPLAYING = 0.005
"""Share of a step that other signatures must promise to save: a replay would not bear out less."""


@dataclass(frozen=True)
class Ranked:
    """A plan and what it is predicted to take."""

    plan: Plan
    prediction: Prediction


@dataclass(frozen=True)
class Rejection:
    """Why candidates were left out, and how many."""

    reason: str
    count: int


@dataclass(frozen=True)
class Suggestion:
    """What the search found: plans from best to worst, and the bookkeeping behind them."""

    candidates: int
    feasible: int
    replayed: int
    seconds: float
    plans: list[Ranked]
    rejected: list[Rejection]
    notes: list[str]
    assignment: Assignment | None = None  # the optimal signatures of the fastest plan's operators on the tensor axis


def default_memory_limit(machine: Machine, workers: int) -> float:
    """The device's memory over the ranks that share it; on a CPU the host's over the ranks on it."""
    host = machine.host.memory_bytes
    if machine.device.kind == "cpu" and host is not None:
        return host / machine.ranks_per_host(workers)
    return machine.device.memory_bytes / machine.ranks_per_device(workers)


def suggest(
    model: ModelSpec,
    workers: int,
    machine: Machine,
    *,
    global_batch_size: int,
    micro_batch_size: int | None = None,
    training: Training | None = None,
    fixed: Mapping[str, Any] | None = None,
    top: int = 10,
    memory_limit_bytes: float | None = None,
    forward_only: bool = False,
) -> Suggestion:
    """Search all placements of a model on `workers` ranks and rank the best by predicted step time.

    Args:
        model: the model.
        workers: number of ranks.
        machine: the profile.
        global_batch_size: sequences per step over all ranks.
        micro_batch_size: sequences per forward pass; None searches.
        training: optimizer, dropout, precision.
        fixed: choices that are not searched, by name (tp, pp, dp, cp, schedule, num_model_chunks, recompute,
            zero_stage, sequence_parallel, cp_kind, attention).
        top: how many plans to return.
        memory_limit_bytes: per rank; None takes the machine's.
        forward_only: plan an evaluation instead of training.

    Raises:
        PlanError: no candidate is possible or fits; the message says what stands in the way.
    """
    started = time.perf_counter()
    limit = memory_limit_bytes or default_memory_limit(machine, workers)
    search = Space(
        model, workers, machine, global_batch_size, micro_batch_size, training or Training(), dict(fixed or {}), limit,
        forward_only,
    )  # fmt: skip
    search.estimate_all()
    ranked, replayed = _replay(search, top)
    ranked = _preferred(ranked, machine)
    assignment = None
    if ranked and ranked[0].plan.mesh.tp > 1:
        assignment, other = _assigned(ranked[0], machine)
        if other is not None and _needed_bytes(machine, other.plan, other.prediction) <= limit:
            ranked = _preferred([*ranked, other], machine)
    rejected = [Rejection(reason, count) for reason, count in search.rejected.most_common() if count]
    if not ranked:
        raise PlanError(_nothing_fits(search, workers))
    return Suggestion(
        candidates=search.candidates,
        feasible=search.candidates - search.rejected[search.memory_reason()],
        replayed=replayed,
        seconds=time.perf_counter() - started,
        plans=ranked[:top],
        rejected=rejected,
        notes=_notes(model, workers, machine),
        assignment=assignment,
    )


def _replay(space: Space, top: int) -> tuple[list[Ranked], int]:
    """Replay the best estimates until enough fit: the plans that do, and how many were replayed."""
    ranked: list[Ranked] = []
    replayed = effort = 0
    too_large: dict[tuple[object, ...], float] = {}  # least estimate in a family that a replay found not to fit
    for group, row, update in space.best():
        enough = effort > REPLAY_SPANS and len(ranked) >= ALWAYS_REPLAYED
        if replayed >= top + SPARE_REPLAYS or enough:
            break
        family, needed = group.family(row), float(group.peak_bytes[row, group.updates.index(update)])
        if needed >= too_large.get(family, np.inf):
            space.rejected[space.memory_reason()] += 1
            continue
        replayed += 1
        try:
            plan = space.plan(group, row, update)
            prediction = predict(plan, space.machine)
        except MeshwrightError as error:
            space.rejected[str(error)] += 1
            continue
        effort += len(prediction.trace) + (LARGE_MESH_SPANS if space.workers > WHOLE_MESH_RANKS else 0)
        if _needed_bytes(space.machine, plan, prediction) > space.limit_bytes:
            space.rejected[space.memory_reason()] += 1
            too_large[family] = min(needed, too_large.get(family, np.inf))
            continue
        ranked.append(Ranked(plan, prediction))
    return ranked, replayed


def _preferred(ranked: list[Ranked], machine: Machine) -> list[Ranked]:
    """Plans from best to worst."""
    return [ranked[place] for place in by_preference([each.prediction for each in ranked], machine.residuals)]


def _assigned(best: Ranked, machine: Machine) -> tuple[Assignment, Ranked | None]:
    """The optimal signatures for a plan's sizes, and the plan with them where that is predicted to be faster."""
    from planner.search.assign import best_signatures  # noqa: PLC0415 - scipy takes a third of a second to load

    assignment = best_signatures(best.plan, machine)
    if assignment.usual_seconds - assignment.seconds < WORTH_REPLAYING * best.prediction.step_seconds:
        return assignment, None
    layouts = {role: names | {"tp": assignment.signatures[role]} for role, names in best.plan.layouts.items()}
    try:
        plan = msgspec.structs.replace(best.plan, layouts=layouts)
        prediction = predict(plan, machine)
    except MeshwrightError:
        return assignment, None  # too few positions for a sequence split, say
    return assignment, Ranked(plan, prediction) if prediction.step_seconds < best.prediction.step_seconds else None


def _needed_bytes(machine: Machine, plan: Plan, prediction: Prediction) -> float:
    """What the fullest rank takes of its device's memory."""
    parts = prediction.peak_parts
    ranks = {members[0] for members in prediction.rank_classes}
    return max(device_bytes(machine, plan, {name: values[rank] for name, values in parts.items()}) for rank in ranks)


def _nothing_fits(search: Space, workers: int) -> str:
    if not search.rejected:
        return f"no placement on {workers} workers has the fixed choices {dict(search.fixed)}; free one of them"
    reason, count = search.rejected.most_common(1)[0]
    return (
        f"none of the {search.candidates} candidates for {workers} workers is possible: {reason} ({count} times); "
        "use more workers, a smaller batch or model, or a larger --memory-limit"
    )


def _notes(model: ModelSpec, workers: int, machine: Machine) -> list[str]:
    """What the user should know about how sizes fit."""
    notes = []
    if model.heads % workers:
        relation = "fewer heads than workers: tp stops there" if workers > model.heads else "uneven shares are costed"
        notes.append(f"{model.heads} heads do not divide over {workers} workers: {relation}")
    per_host = machine.ranks_per_host(workers)
    if machine.device.kind == "cpu" and per_host > machine.host.cores:
        notes.append(
            f"{per_host} ranks share {machine.host.cores} cores of {machine.name}: "
            "they take turns, so no speed-up over fewer ranks is promised"
        )
    return notes
