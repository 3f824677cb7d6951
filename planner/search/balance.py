"""Balance: layers over stages and sequences over replicas, so that the slowest finishes as early as can be.

Ranks may have different speeds (`Machine.relative_speeds`): a stage runs at the pace of its slowest rank, and a replica
at that of the stage that falls behind its share most. Giving each next item to whoever finishes it earliest is exact
for equal items (list scheduling on uniform machines, Horowitz & Sahni 1976, section 2).
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from planner.machine import Machine
from planner.mesh import Coordinate, Mesh
from planner.schedule.instructions import loop_placement, v_placement

V_SCHEDULES = ("zb-v", "v-half", "v-min", "dualpipe-v")
"""Schedules that lay a rank's second stage mirrored, the last stage on the first rank."""


def balance(
    layers: int,
    stages: int,
    layer_seconds: float,
    first_seconds: float,
    last_seconds: float,
    speeds: Sequence[float] | None = None,
) -> tuple[int, ...]:
    """Layers per stage that minimise the slowest stage, the embedding on the first and the head on the last.

    Greedy and exact: each layer goes to the stage that finishes earliest with it; ties to the middle stages.

    Args:
        layers: Of the model; at least one for each stage.
        stages: Pipeline stages.
        layer_seconds: Of one layer on a rank of speed 1.
        first_seconds: Of what the first stage has besides.
        last_seconds: Of what the last stage has besides.
        speeds: Of the stages; None for all equal.
    """
    pace = (1.0,) * stages if speeds is None else speeds
    extra = [0.0] * stages
    extra[0] += first_seconds
    extra[-1] += last_seconds
    counts = [1] * stages
    for _ in range(layers - stages):
        ends = [((counts[i] + 1) * layer_seconds + extra[i]) / pace[i] for i in range(stages)]
        counts[min(range(stages), key=lambda i: (ends[i], i in (0, stages - 1)))] += 1
    return tuple(counts)


def split_batch(size: int, speeds: Sequence[float]) -> tuple[int, ...]:
    """Sequences of each replica, at least one, so that the last replica ends as early as can be.

    Args:
        size: Sequences of a step; at least as many as replicas.
        speeds: Of the replicas.
    """
    counts = [1] * len(speeds)
    ends = [(2 / speed, place) for place, speed in enumerate(speeds)]
    heapq.heapify(ends)
    for _ in range(size - len(speeds)):
        _, place = heapq.heappop(ends)
        counts[place] += 1
        heapq.heappush(ends, ((counts[place] + 1) / speeds[place], place))
    return tuple(counts)


def position_speeds(machine: Machine, mesh: Mesh) -> tuple[float, ...]:
    """Return the speed of each pipeline position: that of its slowest rank."""
    return tuple(
        min(machine.relative_speed(mesh.rank(at)) for at in _ranks(mesh, pp=position)) for position in range(mesh.pp)
    )


def stage_speeds(machine: Machine, mesh: Mesh, schedule: str, chunks: int) -> tuple[float, ...]:
    """Return the speed of each stage: that of the pipeline position whose ranks hold it."""
    place = v_placement if schedule in V_SCHEDULES else loop_placement
    at_position = position_speeds(machine, mesh)
    return tuple(at_position[position] for position in place(mesh.pp * chunks, mesh.pp))


def replica_speeds(machine: Machine, mesh: Mesh) -> tuple[float, ...]:
    """Return the speed of each replica relative to a pipeline whose layers are split by `position_speeds`."""
    usual = position_speeds(machine, mesh)
    return tuple(
        min(machine.relative_speed(mesh.rank(at)) / usual[at.pp] for at in _ranks(mesh, dp=replica))
        for replica in range(mesh.dp)
    )


def _ranks(mesh: Mesh, *, pp: int | None = None, dp: int | None = None) -> list[Coordinate]:
    return [at for at in mesh.coordinates() if pp in (None, at.pp) and dp in (None, at.dp)]
