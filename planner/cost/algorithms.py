"""The algorithm of each collective of a plan, fixed from what the profile measured, never timed while training."""

from __future__ import annotations

from collections import defaultdict

import msgspec

from planner.admissible import ALGORITHMS
from planner.cost.price import COLLECTIVES, SCALARS, Place, Pricer, group_seconds, machine_of, measured_tables
from planner.machine import Machine
from planner.plan import Plan
from planner.program import Program, Shared, Task, lower

DEFAULT = "native"
"""What the executor runs where a plan says nothing: the MPI library's own."""

INSIDE = Place(2, 2, 1)
"""A group inside one host."""


def fix_collectives(plan: Plan, machine: Machine) -> Plan:
    """Return the plan with the algorithms that take its collectives the least time, by axis and operation.

    One algorithm serves all sizes of an operation on an axis, so the choice weighs every call of a step. Unchanged
    where the profile has no measured algorithms.
    """
    machine = machine_of(plan, machine)
    if not machine.link_in_host.measured or plan.mesh.world_size == 1:
        return plan
    totals: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    pricer, shared = Pricer(plan, machine), Shared()
    seconds: dict[tuple[object, ...], dict[str, float]] = {}
    for at in (at for at in plan.mesh.coordinates() if at.dp == at.cp == at.tp == 0):
        for task, count in _collectives(lower(plan, plan.mesh.rank(at), shared=shared)):
            operation = COLLECTIVES[task.kind]
            host = at.pp if pricer.ranks_per_host < plan.mesh.world_size else 0
            known = seconds.setdefault((task.kind, task.axis, task.work, host), {})
            if not known:  # layers repeat, so does what they send
                place = pricer.place(task, at)
                for algorithm in measured_algorithms(machine, operation, place):
                    known[algorithm] = float(group_seconds(machine, task, place, algorithm=algorithm))
            for algorithm, each in known.items():
                totals[f"{task.axis}.{operation}"][algorithm] += count * each
    fixed = {name: min(found, key=lambda each: found[each]) for name, found in totals.items() if found}
    chosen = {name: algorithm for name, algorithm in fixed.items() if algorithm != DEFAULT}
    return msgspec.structs.replace(plan, collectives=plan.collectives | chosen)


def _collectives(program: Program) -> list[tuple[Task, int]]:
    """The collectives of a rank's step and how often each runs; sums of a few bytes are always the library's."""
    found: dict[int, tuple[Task, int]] = {}
    for step in program.steps:
        for task in step.tasks:
            if task.kind in COLLECTIVES and task.kind not in SCALARS:
                found[id(task)] = (task, found.get(id(task), (task, 0))[1] + 1)
    return list(found.values())


def measured_algorithms(machine: Machine, operation: str, place: Place = INSIDE) -> list[str]:
    """Algorithms that the profile has timed for an operation on the link that a group crosses, and a plan may name."""
    timed = {table.algorithm for table in measured_tables(machine, place) if table.operation == operation}
    return sorted(timed & set(ALGORITHMS[operation]))
