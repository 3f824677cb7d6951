"""validate: predict published measurements, and say how wrong the predictions are, source by source."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import numpy as np
from scipy.stats import spearmanr

from planner.cost.coarse import coarse_replay
from planner.cost.footprint import footprint_bytes, process_groups, split_parts
from planner.errors import DataError, MeshwrightError
from planner.machine import Machine, load_machine
from planner.model import forward_flops
from planner.plan import Plan
from planner.predict import NORMAL_80, whole_step_seconds
from planner.published.rows import PublishedRow, SkippedRow, read_published

GIB = 2.0**30


class RowScore(msgspec.Struct, frozen=True, kw_only=True):
    """One row: measured beside predicted, with the 80% interval."""

    source: str
    row: str
    measured_seconds: float | None
    predicted_seconds: float
    low_seconds: float
    high_seconds: float
    measured_gib: float | None
    predicted_gib: float | None


class Skip(msgspec.Struct, frozen=True, kw_only=True):
    """A row left out, and why."""

    row: str
    reason: str


class SourceScore(msgspec.Struct, frozen=True, kw_only=True):
    """How well one source is predicted; errors and shares are fractions, None where the rows do not say.

    `spearman` is the mean rank correlation over groups of at least three rows that share model, GPUs, sequence length
    and global batch; `regret` is the measured time of a group's row predicted fastest over its best, minus one.
    """

    source: str
    rows: int
    predicted: int
    skipped: list[Skip]
    mape: float | None
    median_ape: float | None
    bias: float | None
    spearman: float | None
    regret_mean: float | None
    regret_max: float | None
    coverage_80: float | None
    memory_mape: float | None
    oom_right: float | None
    oom_false: float | None  # share of the rows that ran, memory known, and are predicted as not fitting
    baseline_mape: float | None


class Validation(msgspec.Struct, frozen=True, kw_only=True):
    """All sources and rows; `notes` name files of other schemas."""

    sources: list[SourceScore]
    rows: list[RowScore]
    notes: list[str]


@dataclass
class _Predicted:
    """A published row with its prediction."""

    row: PublishedRow
    score: RowScore
    fits: bool
    baseline_shape: float  # hardware FLOPs over peak and GPUs, with the bubble: the one-parameter model at e = 1


@dataclass
class Predictor:
    """Predicts published rows; a plan that many rows ran is predicted once."""

    machines: dict[tuple[object, ...], Machine] = field(default_factory=dict)
    _steps: dict[tuple[object, ...], tuple[float, list[tuple[int, int]]]] = field(default_factory=dict)

    def machine(self, row: PublishedRow) -> Machine:
        """The row's machine, with the row's own number of devices per host, as its techniques use it."""
        key = (row.machine, row.devices_per_host, row.variants)
        if key not in self.machines:
            machine = load_machine(row.machine).variant(row.variants)
            if row.devices_per_host not in (None, machine.devices_per_host):
                machine = machine.with_figures({"host.devices": row.devices_per_host})
            self.machines[key] = machine
        return self.machines[key]

    def step(self, row: PublishedRow) -> tuple[float, list[tuple[int, int]]]:
        """Seconds of a step, and (state, activation) bytes at the peak of every pipeline rank if the row states memory.

        The seconds are those of `planner.predict` for the row's plan: one program, one pricing, one replay.
        """
        machine = self.machine(row)
        key = (row.plan.hash, row.machine, row.devices_per_host, row.variants, _states_memory(row))
        if key not in self._steps:
            replay = coarse_replay(row.plan, machine)
            peaks = replay.peaks([[rank] for rank in replay.ranks]) if _states_memory(row) else []
            parts = [split_parts(peak.parts) for peak in peaks]
            self._steps[key] = whole_step_seconds(row.plan, machine, replay.makespan_seconds), parts
        return self._steps[key]

    def predict(self, row: PublishedRow) -> _Predicted:
        """Predict one row.

        Raises:
            MeshwrightError: the plan or the machine lacks something.
        """
        machine = self.machine(row)
        seconds, peaks = self.step(row)
        width = math.exp(NORMAL_80 * machine.residuals.step_log_sigma)
        groups = process_groups(row.plan)

        def largest(kind: str) -> float:
            seen = (float(footprint_bytes(machine, state, held, groups, kind)) for state, held in peaks)
            return max(seen, default=0.0)

        score = RowScore(
            source=row.source,
            row=row.row,
            measured_seconds=row.measured_seconds,
            predicted_seconds=seconds,
            low_seconds=seconds / width,
            high_seconds=seconds * width,
            measured_gib=row.measured_gib,
            predicted_gib=largest(row.memory_kind) / GIB if peaks else None,
        )
        peak = machine.peak_flops_per_second(row.plan.training.precision)
        fits = largest("nvidia-smi") <= machine.device.memory_bytes
        return _Predicted(row, score, fits, _baseline_shape(row.plan) / (row.plan.mesh.world_size * peak))


def _states_memory(row: PublishedRow) -> bool:
    return row.measured_gib is not None or row.out_of_memory


def validate(paths: Sequence[Path], machine: str | None = None) -> Validation:
    """Predict the rows of CSV files and score them.

    Args:
        paths: files in the schema of `planner.published.rows.COLUMNS`; others are left out with a note.
        machine: profile for all rows; None for the one that each row names.

    Raises:
        DataError: nothing could be predicted.
    """
    predictor, notes = Predictor(), []
    predicted: dict[str, list[_Predicted]] = defaultdict(list)
    skipped: dict[str, list[SkippedRow]] = defaultdict(list)
    for path in paths:
        try:
            rows, bad = read_published(path, machine)
        except DataError as error:
            notes.append(str(error))
            continue
        for skip in bad:
            skipped[skip.source].append(skip)
        for row in rows:
            try:
                predicted[row.source].append(predictor.predict(row))
            except MeshwrightError as error:
                skipped[row.source].append(SkippedRow(row.source, row.row, str(error)))
    if not predicted:
        reasons = [f"row {each.row}: {each.reason}" for bad in skipped.values() for each in bad]
        msg = (
            f"nothing could be predicted ({'; '.join([*notes, *reasons][:3])}); correct these rows or give other files"
        )
        raise DataError(msg)
    names = list(dict.fromkeys([*predicted, *skipped]))
    sources = [_score(name, predicted[name], skipped[name]) for name in names]
    return Validation(sources=sources, rows=[each.score for name in names for each in predicted[name]], notes=notes)


def _score(source: str, rows: Sequence[_Predicted], skipped: Sequence[SkippedRow]) -> SourceScore:
    timed = [each for each in rows if each.row.measured_seconds is not None]
    error = np.array([each.score.predicted_seconds / (each.row.measured_seconds or 1) - 1 for each in timed])
    inside = [e.score.low_seconds <= (e.row.measured_seconds or 0) <= e.score.high_seconds for e in timed]
    weighed = [each.score for each in rows if each.row.measured_gib is not None]
    off = [abs((each.predicted_gib or 0) / (each.measured_gib or 1) - 1) for each in weighed]
    ran = [each.fits for each in rows if each.row.measured_gib is not None]
    regrets = list(_per_group(timed, 2, _regret))
    return SourceScore(
        source=source,
        rows=len(rows) + len(skipped),
        predicted=len(rows),
        skipped=[Skip(row=each.row, reason=each.reason) for each in skipped],
        mape=_mean(np.abs(error).tolist()),
        median_ape=float(np.median(np.abs(error))) if len(error) else None,
        bias=_mean(error.tolist()),
        spearman=_mean(list(_per_group(timed, 3, _spearman))),
        regret_mean=_mean(regrets),
        regret_max=max(regrets, default=None),
        coverage_80=_mean(inside),
        memory_mape=_mean(off),
        oom_right=_mean([not each.fits for each in rows if each.row.out_of_memory]),
        oom_false=_mean([not fits for fits in ran]),
        baseline_mape=_baseline_mape(timed),
    )


def _mean(values: Sequence[float]) -> float | None:
    finite = [float(value) for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else None


def _per_group(
    rows: Sequence[_Predicted], least: int, figure: Callable[[list[float], list[float]], float]
) -> Iterable[float]:
    """A figure of measured and predicted seconds of every group with enough rows."""
    groups: dict[tuple[object, ...], list[_Predicted]] = defaultdict(list)
    for each in rows:
        groups[each.row.group].append(each)
    for members in groups.values():
        if len(members) >= least:
            yield figure(
                [each.row.measured_seconds or 0.0 for each in members], [e.score.predicted_seconds for e in members]
            )


def _regret(measured: list[float], predicted: list[float]) -> float:
    return measured[int(np.argmin(predicted))] / min(measured) - 1


def _spearman(measured: list[float], predicted: list[float]) -> float:
    if len(set(measured)) == 1 or len(set(predicted)) == 1:
        return math.nan
    return float(spearmanr(measured, predicted).statistic)


def _baseline_shape(plan: Plan) -> float:
    """Hardware FLOPs of a step, stretched by the bubble (p - 1) / (v m) of an interleaved pipeline."""
    forward = forward_flops(plan.model)
    again = {"none": 0, "selective": forward.attention_flops}.get(
        plan.recompute, forward.linear_flops + forward.attention_flops
    )
    micro_batches = len(plan.micro_batches(0))
    bubble = (plan.mesh.pp - 1) / (plan.schedule.num_model_chunks * micro_batches)
    return (3 * forward.total_flops + again) * plan.global_batch_size * (1 + bubble)


def _baseline_mape(rows: Sequence[_Predicted]) -> float | None:
    """Error of the one-parameter model, its efficiency the median over these rows."""
    if not rows:
        return None
    measured = np.array([each.row.measured_seconds for each in rows], float)
    shape = np.array([each.baseline_shape for each in rows])
    return float(np.mean(np.abs(shape * np.median(measured / shape) / measured - 1)))
