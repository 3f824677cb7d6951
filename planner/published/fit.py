"""fit: figures of a machine's profile from published measurements, by robust nonlinear least squares.

Theory of operation. Every row becomes the skeleton of its plan. A round replays all of them with the present figures
and keeps, per row, how often each unit stands on the critical path: the makespan is the maximum of linear functions of
the units' seconds, and these counts are the one that holds here (its gradient, by Danskin's theorem). Least squares
then moves the figures under those counts; a few rounds suffice, because a critical path seldom changes.

Only figures that all rows of the machine share are moved, never one row, model or layout. Each starts from the profile
it extends and is drawn to that value by a log-normal prior, so that what the rows do not determine stays a datasheet's.
Rows with the same kernels (equal widths, tp and micro-batch) are one operating point, however many there are: each
point weighs the root of its rows, and cross-validation leaves whole points out.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares

from planner.cost.bulk import Bulk
from planner.cost.compute import slowest_host_factor
from planner.cost.footprint import footprint_bytes, process_groups, split_parts
from planner.cost.memory import pipeline_peaks
from planner.cost.skeleton import Skeleton
from planner.errors import DataError, MachineError
from planner.machine import Machine
from planner.published.figures import MEMORY_FIGURES, Figure, fittable
from planner.published.rows import PublishedRow

Floats = NDArray[np.float64]


LEAST_LOG_SIGMA = 0.02  # two sites with the same hosts and software differ by 1.5% (MLPerf 3.0, 768 GPUs)
ROUNDS = 4
FOLDS = 5
RANGED = {
    "model": ("hidden", "layers", "seq_len"),
    "mesh": ("pp", "dp", "cp", "tp"),
}


def _soft_l1(residuals: Floats) -> Floats:
    """The soft-L1 loss as a residual: grows like the root of an error beyond the scale (Charbonnier et al. 1994)."""
    return np.asarray(np.sign(residuals) * np.sqrt(2 * (np.sqrt(1 + residuals**2) - 1)))


def _cauchy(residuals: Floats) -> Floats:
    """Cauchy's loss as a residual: an error far beyond the scale hardly pulls at all (Black & Anandan 1996)."""
    return np.asarray(np.sign(residuals) * np.sqrt(np.log1p(residuals**2)))


class Loss(NamedTuple):
    """What turns relative errors into residuals, and the error at which a row's pull stops growing."""

    scale: float
    residual: Callable[[Floats], Floats]

    def __call__(self, errors: Floats) -> Floats:
        """Residuals of logarithmic errors."""
        return self.residual(errors / self.scale)


LOSSES = (Loss(0.03, _soft_l1), Loss(0.05, _cauchy))
"""Rows that scatter want the first; the second lets go of rows that ran something else than their columns say."""


@dataclass(frozen=True)
class Fit:
    """A machine with fitted figures, and how well it does on the rows it was fitted on and on rows left out."""

    machine: Machine
    rows: list[PublishedRow]
    predicted_seconds: Floats
    held_out_seconds: Floats  # each row by a fit that saw no row of its operating point; nan where not asked for

    def errors(self) -> list[tuple[str, int, float, float | None]]:
        """Per source: rows, mean absolute relative error as fitted, and held out (None where that was not asked)."""
        sources = np.array([row.source for row in self.rows])
        measured = np.array([row.measured_seconds for row in self.rows], float)
        found = []
        for source in dict.fromkeys(sources.tolist()):
            own = sources == source
            fitted = float(np.mean(np.abs(self.predicted_seconds[own] / measured[own] - 1)))
            held_out = float(np.mean(np.abs(self.held_out_seconds[own] / measured[own] - 1)))
            found.append((source, int(own.sum()), fitted, None if math.isnan(held_out) else held_out))
        return found


@dataclass
class Problem:
    """Rows of one machine, laid out once; fitted on any subset of them."""

    machine: Machine
    rows: list[PublishedRow]
    loss: Loss = field(default_factory=lambda: LOSSES[0])

    @cached_property
    def distinct(self) -> tuple[list[Skeleton], NDArray[np.int64]]:
        """Skeletons of the distinct plans, technique by technique, and the one of each row."""
        plans = {(row.variants, row.plan.hash): row.plan for row in self.rows}
        place = {key: i for i, key in enumerate(sorted(plans))}
        skeletons = [Skeleton.of(plans[key], self.machine) for key in place]
        return skeletons, np.array([place[row.variants, row.plan.hash] for row in self.rows])

    @cached_property
    def bulks(self) -> list[tuple[tuple[str, ...], Bulk]]:
        """All units, by the variants of the machine that ran them."""
        of = dict(zip(self.distinct[1].tolist(), (row.variants for row in self.rows), strict=True))
        names = [of[i] for i in range(len(self.distinct[0]))]
        members = {name: [s for s, own in zip(self.distinct[0], names, strict=True) if own == name] for name in names}
        return [(name, Bulk(skeletons, self.machine.variant(name))) for name, skeletons in members.items()]

    @cached_property
    def offsets(self) -> list[int]:
        """Where the units of each skeleton begin, and where the last one's end."""
        return [0, *accumulate(len(skeleton.units) for skeleton in self.distinct[0])]

    def unit_seconds(self, machine: Machine) -> Floats:
        """Seconds of every unit, each on the machine as its row used it."""
        return np.concatenate([bulk.unit_seconds(machine.variant(names)) for names, bulk in self.bulks])

    @cached_property
    def measured(self) -> Floats:
        """Measured seconds of every row."""
        return np.array([row.measured_seconds for row in self.rows], float)

    @cached_property
    def points(self) -> list[tuple[object, ...]]:
        """The operating point of every row: what its kernels look like; its plan where all rows look alike."""
        points = [operating_point(row) for row in self.rows]
        return points if len(set(points)) >= FOLDS else [(row.plan.hash,) for row in self.rows]

    @cached_property
    def weights(self) -> Floats:
        """Of residuals: an operating point of n rows weighs sqrt(n) in the sum of squares."""
        count = Counter(self.points)
        return np.array([count[point] ** -0.25 for point in self.points])

    @cached_property
    def sensitive(self) -> list[Figure]:
        """The figures that move any row's prediction; the others stay as they are."""
        before, found = self.unit_seconds(self.machine), []
        for figure in fittable(self.machine):
            value = self.machine.figure(figure.path)
            other = self.machine.with_figures({figure.path: value * 0.9})
            fixed = other.overheads.step_seconds, other.overheads.host_speed_sigma
            same = fixed == (self.machine.overheads.step_seconds, self.machine.overheads.host_speed_sigma)
            if not same or not np.array_equal(before, self.unit_seconds(other)):
                found.append(figure)
        return found

    def around(self, machine: Machine, makespans: Floats) -> Floats:
        """Step seconds of every row from the makespans of the distinct plans."""
        of_row = makespans[self.distinct[1]]
        hosts = np.array([max(1, -(-row.plan.mesh.world_size // machine.devices_per_host)) for row in self.rows])
        return (of_row + machine.overheads.step_seconds) * slowest_host_factor(machine, hosts)

    def replayed(self, machine: Machine) -> tuple[Floats, list[Floats]]:
        """Exact makespans of the distinct plans, and the critical path's counts of each."""
        seconds, offsets = self.unit_seconds(machine), self.offsets
        found = [
            skeleton.critical_counts(seconds[first : first + len(skeleton.units)])
            for skeleton, first in zip(self.distinct[0], offsets[:-1], strict=True)
        ]
        return np.array([makespan for makespan, _ in found]), [counts for _, counts in found]

    def predict(self, machine: Machine) -> Floats:
        """Step seconds of every row."""
        return self.around(machine, self.replayed(machine)[0])

    def fit(self, use: NDArray[np.bool_], start: Machine | None = None, rounds: int = ROUNDS) -> Machine:
        """The machine with figures fitted on the rows in `use`."""
        figures = self.sensitive
        prior = np.log([self.machine.figure(figure.path) for figure in figures])
        widths = np.array([figure.log_sigma for figure in figures])
        upper = np.minimum(prior + 4 * widths, np.log([figure.largest for figure in figures]))
        lower, upper = prior - 4 * widths, np.maximum(upper, prior + 1e-6)
        current = start or self.machine
        at = np.clip(np.log([current.figure(figure.path) for figure in figures]), lower + 1e-9, upper - 1e-9)
        for _ in range(rounds):
            _, counts = self.replayed(self._with(figures, at))
            matrix = np.zeros((len(counts), self.offsets[-1]))
            for i, (row, first) in enumerate(zip(counts, self.offsets[:-1], strict=True)):
                matrix[i, first : first + len(row)] = row
            linear = _compressed(matrix)

            def residuals(x: Floats, linear: _Linear = linear) -> Floats:
                machine = self._with(figures, x)
                step = self.around(machine, linear.makespans(self.unit_seconds(machine)))
                off = (np.log(step / self.measured) * self.weights)[use]
                return np.concatenate([self.loss(off), (x - prior) / widths])

            solved = least_squares(
                residuals, at, bounds=(lower, upper), x_scale=np.minimum(widths, 0.5), max_nfev=25, ftol=1e-4, xtol=1e-4
            )
            moved, at = float(np.max(np.abs(solved.x - at))), solved.x
            if moved < 1e-3:
                break
        return self._with(figures, at)

    def _with(self, figures: Sequence[Figure], logs: Floats) -> Machine:
        values = {figure.path: float(np.exp(x)) for figure, x in zip(figures, logs, strict=True)}
        for path in list(values):
            values[path] = min(values[path], next(f.largest for f in figures if f.path == path))
        return self.machine.with_figures(values)


class _Linear(NamedTuple):
    """Makespans as counts of the units that any critical path holds."""

    units: NDArray[np.int64]
    counts: Floats

    def makespans(self, unit_seconds: Floats) -> Floats:
        """Makespan of every plan under the critical paths that were found."""
        return np.asarray(self.counts @ unit_seconds[self.units])


def _compressed(matrix: Floats) -> _Linear:
    units = np.flatnonzero(matrix.any(axis=0))
    return _Linear(units, matrix[:, units])


def operating_point(row: PublishedRow) -> tuple[object, ...]:
    """What the kernels of a row look like, whatever the number of layers, micro-batches and replicas."""
    model, plan = row.plan.model, row.plan
    return (
        row.source, model.hidden, model.ffn_hidden, model.heads, model.seq_len, plan.mesh.tp, plan.mesh.cp,
        plan.micro_batch_size, plan.recompute, plan.sequence_parallel, plan.training.precision,
    )  # fmt: skip


def with_priors(machine: Machine, base: Machine) -> Machine:
    """The machine with every figure that a fit moves back at its prior, mostly that of the profile it extends.

    So a fit repeated on its own result starts from the same priors and ends where it did.
    """
    typical = {figure.path: figure.typical for figure in fittable(machine)}
    changes: dict[str, object] = {path: value for path, value in typical.items() if value is not None}
    for path in [*typical, *(figure.path for figure in MEMORY_FIGURES)]:
        with suppress(MachineError):
            changes[path] = base.figure(path)
    return machine.with_figures(changes)


def fit_machine(
    machine: Machine, rows: Sequence[PublishedRow], files: Sequence[str], date: str, *, cross_validate: bool = True
) -> Fit:
    """Fit a machine's figures on rows.

    Args:
        machine: the profile to start from; its figures are the priors.
        rows: measured rows; those without a time are left out.
        files: names of the files that the rows come from, for the provenance.
        date: the day of the fit, for the provenance.
        cross_validate: also predict each operating point by a fit without it.

    Raises:
        DataError: fewer than three measured rows.
    """
    measured = [row for row in rows if row.measured_seconds is not None]
    if len(measured) < 3:
        msg = f"{len(measured)} measured rows for machine '{machine.name}'; a fit needs at least 3"
        raise DataError(msg)
    problem = Problem(machine, measured)
    fitted, held_out = _fitted(problem, LOSSES if cross_validate else LOSSES[:1], cross_validate=cross_validate)
    predicted = problem.predict(fitted)
    fitted = _with_memory_figures(problem, fitted)
    note = f"fitted on {', '.join(files)}, {len(measured)} rows, {date}"
    return Fit(_documented(machine, fitted, measured, predicted, held_out, note), measured, predicted, held_out)


def _fitted(problem: Problem, losses: Sequence[Loss], *, cross_validate: bool) -> tuple[Machine, Floats]:
    """The fit under the loss that does best on points left out, and its predictions of these."""
    tried: list[tuple[float, int, Machine, Floats]] = []
    for loss in losses:
        problem.loss = loss
        fitted = problem.fit(np.ones(len(problem.rows), bool))
        held_out = _cross_validated(problem, fitted) if cross_validate else np.full(len(problem.rows), np.nan)
        tried.append((float(np.mean(np.abs(held_out / problem.measured - 1))), len(tried), fitted, held_out))
    _, _, fitted, held_out = min(tried)
    return fitted, held_out


def _with_memory_figures(problem: Problem, machine: Machine) -> Machine:
    """The machine with its memory figures fitted on the rows that state memory; unchanged where none does."""
    place = problem.distinct[1]
    weighed = [(i, row) for i, row in enumerate(problem.rows) if row.measured_gib is not None]
    if not weighed:
        return machine
    frameworks = {int(place[i]): machine.variant(row.variants).framework for i, row in weighed}
    peaks = {
        i: np.array([split_parts(p.parts) for p in pipeline_peaks(problem.distinct[0][i], framework)]).T
        for i, framework in frameworks.items()
    }
    kinds = {row.memory_kind for _, row in weighed}
    figures = [
        each for each in MEMORY_FIGURES if each.kind in kinds or (each.kind == "reserved" and "nvidia-smi" in kinds)
    ]
    figures += [each for each in MEMORY_FIGURES if each.kind == "allocated" and each not in figures]
    start = np.log([machine.figure(each.path) for each in figures])
    widths = np.array([each.log_sigma for each in figures])

    def changed(x: Floats) -> Machine:
        return machine.with_figures({f.path: float(np.exp(v)) for f, v in zip(figures, x, strict=True)})

    def residuals(x: Floats) -> Floats:
        tried = changed(x)
        off = [
            float(np.max(_seen(tried, peaks[int(place[i])], row))) / ((row.measured_gib or 1) * 2.0**30)
            for i, row in weighed
        ]
        return np.concatenate([LOSSES[0](np.log(off)), (x - start) / widths])

    return changed(least_squares(residuals, start, x_scale=widths, max_nfev=50).x)


def _seen(machine: Machine, peaks: Floats, row: PublishedRow) -> Floats:
    """Bytes seen of every pipeline rank, given its (state, activation) bytes as rows of `peaks`."""
    seen = footprint_bytes(machine, peaks[0], peaks[1], process_groups(row.plan), row.memory_kind)
    return np.asarray(seen, float)


def _cross_validated(problem: Problem, start: Machine) -> Floats:
    """Predict every row by a fit that left its operating point out, in FOLDS folds of points."""
    points = sorted(set(problem.points), key=str)
    fold = {point: i % FOLDS for i, point in enumerate(points)}
    folds = np.array([fold[point] for point in problem.points])
    found = np.full(len(problem.rows), np.nan)
    for i in sorted(set(folds.tolist())):
        machine = problem.fit(folds != i, start, rounds=2)
        found[folds == i] = problem.predict(machine)[folds == i]
    return found


def _documented(
    before: Machine, fitted: Machine, rows: Sequence[PublishedRow], predicted: Floats, held_out: Floats, note: str
) -> Machine:
    """The fitted machine with provenance, spread and range of what it was fitted on."""
    reference = np.where(np.isfinite(held_out), held_out, predicted)
    off = np.log(np.array([row.measured_seconds for row in rows]) / reference)
    # The 80% half-width over the normal's: robust against single rows that no figure explains.
    sigma = float(np.quantile(np.abs(off), 0.8)) / 1.2815515655446004
    ranges: dict[str, tuple[float, float]] = {"world_size": _range([row.plan.mesh.world_size for row in rows])}
    for owner, names in RANGED.items():
        for name in names:
            ranges[name] = _range([getattr(getattr(row.plan, owner), name) for row in rows])
    changes: dict[str, object] = {
        "residuals.provenance": note,
        "residuals.step_log_sigma": round(max(sigma, LEAST_LOG_SIGMA), 4),
        "residuals.ranges": ranges,
    }
    for group in ("device", "link_in_host", "link_between_hosts", "overheads", "memory"):
        plain = before.figure_provenance(group).split("; figures fitted on ", maxsplit=1)[0]
        changes[f"{group}.provenance"] = f"{plain}; figures {note}"
    for path in [figure.path for figure in fittable(before)] + [figure.path for figure in MEMORY_FIGURES]:
        changes[path] = float(f"{fitted.figure(path):.4g}")
    return before.with_figures(changes)


def _range(values: Sequence[float]) -> tuple[float, float]:
    return float(min(values)), float(max(values))
