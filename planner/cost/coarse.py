"""A step replayed instruction by instruction, for plans with too many tasks to replay one by one.

`PeriodicReplay` goes further where a step has many equal micro-batches: past the warm-up a schedule repeats itself, so
that every total is linear in the number of micro-batches, and two short replays give the line. The trace is then that
of the longer one, with all further periods as one span per key in its middle.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Literal

import msgspec

from planner.cost.memory import Peak, pipeline_peaks
from planner.cost.price import Pricer
from planner.cost.skeleton import COMPUTE_OPS, Skeleton, unit_seconds
from planner.machine import Machine
from planner.mesh import Coordinate
from planner.plan import Plan
from planner.trace import PARTS, Figures, OperatorTime, Span, figures


@dataclass
class CoarseReplay:
    """The replay of a plan's skeleton, in the terms that `planner.predict` reports.

    Ranks are those of the first data-, context- and tensor-parallel coordinate of each pipeline rank.
    """

    plan: Plan
    machine: Machine
    payloads: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.skeleton = Skeleton.of(self.plan, self.machine)
        self.seconds = unit_seconds(self.skeleton, self.machine)
        self.result = self.skeleton.replay(self.seconds)
        self.ranks = [self.plan.mesh.rank(Coordinate(p, 0, 0, 0)) for p in range(self.plan.mesh.pp)]

    @property
    def makespan_seconds(self) -> float:
        """When the last rank ends its step."""
        return self.result.makespan_seconds

    def figures(self, spans: list[Span], step_seconds: float) -> Figures:
        """The figures of the step."""
        return figures(spans, self.ranks, step_seconds)

    def spans(self) -> list[Span]:
        """One work span per instruction, message and reduction, and the waits between them."""
        found: list[Span] = []
        last: dict[tuple[int, int], float] = defaultdict(float)
        rows = zip(self.skeleton.entries, self.result.start.tolist(), self.result.end.tolist(), strict=True)
        for entry, start, end in rows:
            lane, rank = (entry.rank, entry.stream), self.ranks[entry.rank]
            stream = "compute" if entry.stream == 0 else "data" if entry.stream == 1 else "pp"
            begun = last[lane] if stream == "compute" else start
            if start > begun:
                found.append(Span(rank, stream, entry.label, begun, start, "wait"))
            if end > start:
                found.append(Span(rank, stream, entry.label, start, end, "work"))
            last[lane] = end
        return found

    def operators(self, spans: list[Span], kept: list[list[int]]) -> dict[str, OperatorTime]:
        """Work of one step by key: how often each stretch runs on a rank, times the seconds of its tasks."""
        del spans
        skeleton, pricer = self.skeleton, Pricer(self.plan, self.machine)
        runs: dict[int, dict[int, float]] = defaultdict(lambda: defaultdict(float))  # rank -> stretch -> times
        for entry in skeleton.entries:
            unit = skeleton.units[entry.unit] if entry.unit >= 0 else None
            if unit is not None and unit.kind in ("stretch", "run", "task") and unit.stretch >= 0:
                whole = len(skeleton.stretches[unit.stretch].tasks)
                part = 1.0 if unit.kind == "stretch" else (unit.last - unit.first) / whole
                runs[entry.rank][unit.stretch] += part
        stage_of = {rank: self.skeleton.schedule.stages_of(rank) for rank in range(self.plan.mesh.pp)}
        seconds: dict[str, list[float]] = {}
        counts: dict[str, int] = defaultdict(int)
        classes = {rank: i for i, members in enumerate(kept) for rank in members}
        for pipeline_rank, times in runs.items():
            own = dict(zip(stage_of[skeleton.representative[pipeline_rank]], stage_of[pipeline_rank], strict=True))
            where = classes[self.ranks[pipeline_rank]]
            on_rank: dict[str, int] = defaultdict(int)
            handed: dict[str, int] = defaultdict(int)
            for number, often in times.items():
                stretch = skeleton.stretches[number]
                priced = [pricer.seconds(task, stretch.at) for task in stretch.tasks]
                if stretch.op in COMPUTE_OPS:
                    priced, _ = pricer.stretch(stretch.tasks, stretch.at, stretch.op)
                for task, each in zip(stretch.tasks, priced, strict=True):
                    if not each:
                        continue
                    stage, _, rest = task.key.partition(".")
                    key = f"{own[int(stage)]}.{rest}" if stage.isdigit() else task.key
                    seconds.setdefault(key, [0.0] * len(kept))[where] += each * round(often)
                    on_rank[key] += round(often)
                    if task.axis:
                        handed[key] += int(task.work.bytes) * round(often)
                        self.payloads[key] = max(self.payloads.get(key, 0), handed[key])
            for key, count in on_rank.items():
                counts[key] = max(counts[key], count)
        return {
            key: OperatorTime(seconds=total, count=counts[key], bytes=self.payloads.get(key, 0))
            for key, total in seconds.items()
        }

    def peaks(self, classes: list[list[int]]) -> list[Peak]:
        """Peak memory of every rank class: that of the first coordinate of its pipeline rank."""
        by_rank = pipeline_peaks(self.skeleton, self.machine.framework)
        return [by_rank[self.plan.mesh.coordinate(members[0]).pp] for members in classes]


Kind = Literal["work", "wait"]

PERIODIC_INSTRUCTIONS = 20_000
"""Plans with more instructions than this are replayed by period where they can be."""


def short_plans(plan: Plan) -> tuple[Plan, Plan, int] | None:
    """Two plans with fewer micro-batches, and how often their difference lies between the second and the whole.

    None where a plan has few instructions, unequal micro-batches, or an order that was found for its durations.
    """
    count, pp, chunks = len(plan.micro_batches(0)), plan.mesh.pp, plan.schedule.num_model_chunks
    equal = len(set(plan.parts.batch)) == 1 and len(set(plan.micro_batches(0))) == 1
    if plan.schedule.programs is not None or not equal or 2 * count * pp * chunks <= PERIODIC_INSTRUCTIONS:
        return None
    # Interleaved schedules repeat after pp micro-batches; all are in their steady state after two pipelines' worth.
    period = pp if chunks > 1 else min(pp, 8)
    first = 2 * pp + (count - 2 * pp) % period
    times = (count - first) // period - 1
    if times < 1:
        return None
    return _with_micro_batches(plan, first), _with_micro_batches(plan, first + period), times


def _with_micro_batches(plan: Plan, count: int) -> Plan:
    """The same placement for a smaller batch."""
    batch = (count * plan.micro_batch_size,) * plan.mesh.dp
    parts = msgspec.structs.replace(plan.parts, batch=batch)
    return msgspec.structs.replace(plan, parts=parts, global_batch_size=sum(batch))


@dataclass
class PeriodicReplay:
    """A long step from two shorter ones: first + k · (second - first), for every total that a prediction reports."""

    first: CoarseReplay
    second: CoarseReplay
    times: int

    @property
    def ranks(self) -> list[int]:
        """Ranks that are replayed."""
        return self.second.ranks

    def _line(self, first: float, second: float) -> float:
        return second + (second - first) * self.times

    @property
    def makespan_seconds(self) -> float:
        """When the last rank ends its step."""
        return self._line(self.first.makespan_seconds, self.second.makespan_seconds)

    def spans(self) -> list[Span]:
        """The spans of the second replay, and in the middle of each rank's one span per key for all further periods."""
        shorter, longer = self.first.spans(), self.second.spans()
        gap = (self.second.makespan_seconds - self.first.makespan_seconds) * self.times
        found: list[Span] = []
        for rank in self.ranks:
            own = [span for span in longer if span.rank == rank]
            compute = [span for span in own if span.stream == "compute"]
            middle = self.second.makespan_seconds / 2
            cut = next((span.start for span in compute if span.start >= middle), middle)
            found += [span for span in own if span.start < cut]
            at = cut
            for (key, kind), seconds in self._repeated(shorter, compute, rank).items():
                found.append(Span(rank, "compute", key, at, at + seconds, kind))
                at += seconds
            later = (span for span in own if span.start >= cut)
            found += [span._replace(start=span.start + gap, end=span.end + gap) for span in later]
        return found

    def _repeated(self, shorter: list[Span], compute: list[Span], rank: int) -> dict[tuple[str, Kind], float]:
        """Seconds by key and kind that a rank's compute stream spends in all further periods together."""
        totals: dict[tuple[str, Kind], float] = defaultdict(float)
        for span in compute:
            totals[span.key, span.kind] += span.seconds
        for span in shorter:
            if span.rank == rank and span.stream == "compute":
                totals[span.key, span.kind] -= span.seconds
        return {what: seconds * self.times for what, seconds in totals.items() if seconds > 1e-12}

    def figures(self, spans: list[Span], step_seconds: float) -> Figures:
        """The figures of the whole step."""
        return figures(spans, self.ranks, step_seconds)

    def operators(self, spans: list[Span], kept: list[list[int]]) -> dict[str, OperatorTime]:
        """Work of the whole step by key, per rank class."""
        ones, twos = self.first.operators(spans, kept), self.second.operators(spans, kept)
        return {
            key: OperatorTime(
                seconds=[self._line(a, b) for a, b in zip(ones[key].seconds, two.seconds, strict=True)],
                count=round(self._line(ones[key].count, two.count)),
                bytes=round(self._line(ones[key].bytes, two.bytes)),
            )
            for key, two in twos.items()
        }

    def peaks(self, classes: list[list[int]]) -> list[Peak]:
        """Peak memory of every rank class; it grows with the micro-batches only under GPipe."""
        pairs = zip(self.first.peaks(classes), self.second.peaks(classes), strict=True)
        found = []
        for one, two in pairs:
            parts = {part: round(self._line(one.parts[part], two.parts[part])) for part in PARTS}
            found.append(Peak(sum(parts.values()), parts))
        return found


def coarse_replay(plan: Plan, machine: Machine) -> CoarseReplay | PeriodicReplay:
    """Replay a plan's step by instructions, and by periods where it is long."""
    short = short_plans(plan)
    if short is None:
        return CoarseReplay(plan, machine)
    first, second, times = short
    return PeriodicReplay(CoarseReplay(first, machine), CoarseReplay(second, machine), times)
