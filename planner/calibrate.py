"""Calibrate: refine the figures of a machine's profile from runs, measured operators against predicted ones.

Every key of a measurement belongs to one figure of the profile: a kernel kind, a product's shape, an attention
implementation, a collective on a group size. A figure moves by the ratio of measured to predicted seconds, the weighted
median over all keys, rank classes and runs that it prices, where a key took its median call (a call that the operating
system interrupted takes a thousand times as long, and says nothing), and only as far as its calls carry:
`ratio ** (n / (n + PRIOR_CALLS))`. Nothing but figures changes, so that every other plan is
predicted by what this run taught. Pipeline messages are left alone: what a rank measures of one is mostly waiting.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median_low
from typing import NamedTuple

import msgspec
import numpy as np

from planner.compare import OVERHEAD, compare, decompose
from planner.cost.figures import Figure, attach_provenance, figure_of, figure_text, scaled, value_of
from planner.cost.price import FREE, MESSAGES, SCALARS, Pricer
from planner.errors import MachineError
from planner.machine import Machine
from planner.plan import Plan
from planner.predict import predict
from planner.program import Task, lower
from planner.trace import Measurement

PRIOR_CALLS = 2.0
"""Calls that the profile's own figure counts for beside those of the runs."""

LEAST_SHARE = 1e-3
"""Figures that take a smaller share of the measured work stay as they are: clocks and noise are all they hold."""

ROUNDS = 3
"""A roofline does not scale with one of its two sides; the second and third round take up what is left."""


class Change(msgspec.Struct, frozen=True, kw_only=True):
    """One figure, before and after.

    Attributes:
        figure: Its dotted path in the profile.
        ratio: Measured over predicted seconds, weighted median over its keys.
        applied: The factor on the seconds that the figure now predicts.
        before: Its value where it is one number.
        after: The same after calibration.
        predicted_seconds: Work per step that it priced, mean over rank classes, summed over keys and runs.
        measured_seconds: What that took.
        calls: How often it ran.
    """

    figure: str
    ratio: float
    applied: float
    before: float | None
    after: float | None
    predicted_seconds: float
    measured_seconds: float
    calls: int


class RunError(msgspec.Struct, frozen=True, kw_only=True):
    """How one run is predicted before and after: step and operator errors, fractions of the measured."""

    plan_hash: str
    measured_seconds: float
    before_seconds: float
    after_seconds: float
    before_operator_mape: float | None
    after_operator_mape: float | None


@dataclass(frozen=True)
class Calibration:
    """The refined profile, what changed in it, and how well it now predicts the runs."""

    machine: Machine
    changes: tuple[Change, ...]
    runs: tuple[RunError, ...]


class Observation(NamedTuple):
    """What one rank class spent under one key in a step."""

    run: int
    task: Task
    calls: int
    rank: int
    uniform: bool  # whether all calls ask for the same work
    measured_seconds: float


@dataclass
class _Pool:
    """All observations of one figure."""

    observations: list[Observation]
    predicted: list[float]

    @property
    def calls(self) -> int:
        return sum(each.calls for each in self.observations)

    @property
    def measured_seconds(self) -> float:
        return sum(each.measured_seconds for each in self.observations)

    @property
    def ratio(self) -> float:
        """Weighted median of measured over predicted, by predicted seconds."""
        ratios = np.array([o.measured_seconds for o in self.observations]) / np.array(self.predicted)
        return weighted_median(ratios.tolist(), self.predicted)


def calibrate(machine: Machine, runs: Sequence[Measurement], today: str) -> Calibration:
    """Return the machine with its figures moved towards what runs on it took.

    Args:
        machine: The profile to refine.
        runs: Measurements of plans on this machine.
        today: Date for the provenance, as 2026-01-31.

    Raises:
        MachineError: the runs hold nothing that the profile's figures price.
    """
    seen = [each for number, run in enumerate(runs) for each in observations(number, run)]
    plans = [run.plan for run in runs]
    first = _pools(machine, plans, seen)
    if not first:
        raise MachineError("the measurements hold no operator that this profile prices; run a plan of at least a layer")
    total = sum(pool.measured_seconds for pool in first.values())
    chosen = {f: pool for f, pool in first.items() if pool.measured_seconds >= LEAST_SHARE * total}
    wanted = {figure: pool.ratio ** _trust(pool) for figure, pool in chosen.items()}
    refined = machine
    for _ in range(ROUNDS):
        pools = _pools(refined, plans, seen)
        for figure, pool in pools.items():
            if figure in wanted:
                # Seconds predicted now over those at first say how much of the way is already gone.
                done = sum(pool.predicted) / sum(chosen[figure].predicted)
                refined = scaled(refined, figure, wanted[figure] / done)
    refined = _with_overhead(refined, runs)
    changes = [_change(machine, refined, figure, pool, wanted[figure]) for figure, pool in chosen.items()]
    changes += _overhead_changes(machine, refined)
    note = f"calibrated {today} on {len(runs)} run(s) ({', '.join(run.plan_hash for run in runs)})"
    errors = tuple(_run_error(machine, refined, run) for run in runs)
    by_size = sorted(changes, key=lambda each: -abs(each.measured_seconds - each.predicted_seconds))
    return Calibration(attach_provenance(refined, note, list(chosen)), tuple(by_size), errors)


def weighted_median(values: Sequence[float], weights: Sequence[float]) -> float:
    """Return the value at which half of the weight is reached; between two values at exactly half, their mean."""
    order = sorted(zip(values, weights, strict=True))
    half = sum(weights) / 2
    reached = 0.0
    for place, (value, weight) in enumerate(order):
        reached += weight
        if math.isclose(reached, half) and place + 1 < len(order):
            return math.sqrt(value * order[place + 1][0])
        if reached > half:
            return value
    return order[-1][0]


def _trust(pool: _Pool) -> float:
    return pool.calls / (pool.calls + PRIOR_CALLS)


def observations(run: int, measurement: Measurement) -> list[Observation]:
    """Return what each rank class of a measurement spent under each key that a figure of a profile prices."""
    spent: dict[tuple[int, str], list[float]] = defaultdict(list)
    for span in measurement.spans():
        if span.kind == "work":
            spent[span.rank, span.key].append(span.seconds)
    found = []
    for members in measurement.rank_classes:
        for key, (task, calls, uniform) in _tasks_by_key(measurement.plan, members[0]).items():
            each = [seconds for rank in members for seconds in spent[rank, key]]
            if each:  # disturbances only ever add, so that of two calls the shorter stands
                found.append(Observation(run, task, calls, members[0], uniform, median_low(each) * calls))
    return found


def _tasks_by_key(plan: Plan, rank: int) -> dict[str, tuple[Task, int, bool]]:
    """The first task of each key of a rank's step, how often it runs, and whether always on the same work."""
    found: dict[str, tuple[Task, int, bool]] = {}
    for step in lower(plan, rank).steps:
        for task in step.tasks:
            if task.kind in FREE or task.kind in MESSAGES or task.kind in SCALARS or task.stream != "compute":
                continue
            known = found.get(task.key)
            same = known is None or (known[2] and known[0].work == task.work)
            found[task.key] = (task if known is None else known[0], (known[1] if known else 0) + 1, same)
    return found


def _pools(machine: Machine, plans: Sequence[Plan], seen: Sequence[Observation]) -> dict[Figure, _Pool]:
    """The observations by figure, each with what the machine predicts of it."""
    pricers = [Pricer(plan, machine) for plan in plans]
    pools: dict[Figure, _Pool] = defaultdict(lambda: _Pool([], []))
    for each in seen:
        pricer = pricers[each.run]
        at = pricer.plan.mesh.coordinate(each.rank)
        figure = figure_of(pricer, each.task, at)
        if figure is None or not each.uniform:
            continue
        seconds = pricer.seconds(each.task, at) * each.calls
        if each.task.axis is None and machine.device.gemm_samples:
            # The executor's spans leave out the interpreter's time between two tasks, which measured profiles price.
            seconds -= machine.overheads.dispatch_seconds * each.calls
        if seconds > 0:
            pools[figure].observations.append(each)
            pools[figure].predicted.append(seconds)
    return pools


# ---- time between operators ------------------------------------------------------------------------------------------


def _with_overhead(machine: Machine, runs: Sequence[Measurement]) -> Machine:
    """The machine with the time between operators as measured: per task where the profile has it so, else per step."""
    between = [max(0.0, decompose(run)[OVERHEAD]) for run in runs]
    if not machine.device.gemm_samples:
        seconds = float(np.median(between))
        return machine.with_figures({"overheads.step_seconds": seconds})
    tasks = [_mean_tasks(run) for run in runs]
    less = machine.overheads.step_seconds
    each = [max(0.0, seconds - less) / count for seconds, count in zip(between, tasks, strict=True) if count]
    return machine.with_figures({"overheads.dispatch_seconds": float(np.median(each))}) if each else machine


def _mean_tasks(run: Measurement) -> float:
    """Spans of work on the compute stream of a rank in the representative step."""
    return sum(span.kind == "work" and span.stream == "compute" for span in run.spans()) / run.plan.mesh.world_size


def _overhead_changes(before: Machine, after: Machine) -> list[Change]:
    found = []
    for name in ("step_seconds", "dispatch_seconds"):
        old, new = getattr(before.overheads, name), getattr(after.overheads, name)
        if old != new:
            ratio = new / old if old else math.inf
            found.append(
                Change(
                    figure=f"overheads.{name}", ratio=ratio, applied=ratio, before=old, after=new,
                    predicted_seconds=old, measured_seconds=new, calls=1,
                )
            )  # fmt: skip
    return found


# ---- what changed ----------------------------------------------------------------------------------------------------


def _change(before: Machine, after: Machine, figure: Figure, pool: _Pool, wanted: float) -> Change:
    return Change(
        figure=figure_text(figure),
        ratio=pool.ratio,
        applied=wanted,
        before=value_of(before, figure),
        after=value_of(after, figure),
        predicted_seconds=sum(pool.predicted),
        measured_seconds=pool.measured_seconds,
        calls=pool.calls,
    )


def _run_error(before: Machine, after: Machine, run: Measurement) -> RunError:
    old, new = (predict(run.plan, machine) for machine in (before, after))
    errors = []
    for prediction in (old, new):
        rows = compare(prediction, run).operators
        found = [abs(each.error) for each in rows if each.error is not None and each.measured_seconds]
        errors.append(float(np.mean(found)) if found else None)
    return RunError(
        plan_hash=run.plan_hash,
        measured_seconds=run.step_seconds,
        before_seconds=old.step_seconds,
        after_seconds=new.step_seconds,
        before_operator_mape=errors[0],
        after_operator_mape=errors[1],
    )
