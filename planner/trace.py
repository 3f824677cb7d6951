"""Spans, traces, and the two files that hold them: predictions and measurements, alike in every shared key.

Both roads end here. What the simulator foresaw and what the ranks recorded are lists of the same spans with the same
keys, reduced by the same functions to the same figures, so that comparing is one join.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec

from planner.admissible import COLLECTIVE_AXES
from planner.errors import DataError
from planner.files import SCHEMA, read_json, write_whole
from planner.plan import Plan
from planner.shard import offsets

PARTS = ("parameters", "gradients", "optimizer", "activations", "buffers")


class Span(NamedTuple):
    """Something a rank did, in seconds from the start of the step; waiting is a span of its own."""

    rank: int
    stream: str
    key: str
    start: float
    end: float
    kind: Literal["work", "wait"]

    @property
    def seconds(self) -> float:
        """Length of the span."""
        return self.end - self.start


class OperatorTime(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One key of a step: seconds of work by rank class, how often it ran on a rank, bytes handed to MPI."""

    seconds: list[float]
    count: int
    bytes: int = 0


class MachineNote(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which machine the figures are of, and the rate that the MFU divides by."""

    name: str
    precision: str
    peak_flops_per_second: float
    provenance: str = ""


class Record(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What predictions and measurements have in common; seconds, bytes and fractions throughout."""

    schema: int = SCHEMA
    version: str = ""
    plan_hash: str
    plan: Plan
    machine: MachineNote
    step_seconds: float
    tokens_per_second: float
    mfu: float
    bubble_fraction: float
    exposed_communication_seconds: float
    exposed_communication_seconds_max: float
    wait_seconds: float
    rank_seconds: list[float]  # busy seconds of each rank in the step, waiting left out
    peak_bytes: list[int]
    peak_parts: dict[str, list[int]]
    rank_classes: list[list[int]]
    operators: dict[str, OperatorTime]
    trace: list[tuple[int, str, str, float, float, str]]
    breakdown_seconds: dict[str, float] | msgspec.UnsetType = msgspec.UNSET  # in what commands print, computed anew

    def spans(self) -> list[Span]:
        """The spans of the representative step."""
        return [Span(*row) for row in self.trace]  # type: ignore[arg-type]


class Prediction(Record, kw_only=True, forbid_unknown_fields=True):
    """What the cost model expects of a plan; low and high bound 80% of outcomes."""

    kind: Literal["prediction"] = "prediction"
    low_seconds: float
    high_seconds: float
    warnings: list[str] = []


class Measurement(Record, kw_only=True, forbid_unknown_fields=True):
    """What a run of the plan took."""

    kind: Literal["measurement"] = "measurement"
    steps: list[float]
    losses: list[float | None]  # None where it was not a number
    gradient_norms: list[float | None]  # None where float16 overflowed
    resident_bytes: list[int]
    environment: dict[str, Any]
    loss_scales: list[float] = []  # of every step, in float16
    skipped_steps: list[int] = []  # numbers of the steps, warm-up included, in which float16 overflowed
    payload_bytes: dict[str, int] = {}  # bytes handed to MPI per step, by axis and operation, of rank 0


LONGEST_SECONDS = 1e12  # of a step: sums and ratios of times stay finite


def check_record(record: Record) -> None:
    """Raise unless the figures of a record that was read belong to its ranks and its plan, and are times.

    Raises:
        DataError: names the first field that does not fit.
    """
    world, classes = record.plan.mesh.world_size, len(record.rank_classes)
    if record.plan_hash != record.plan.hash:
        raise DataError(f"it says plan_hash {record.plan_hash} and holds the plan {record.plan.hash}: it was edited")
    if sorted(rank for ranks in record.rank_classes for rank in ranks) != list(range(world)):
        raise DataError(f"rank_classes do not name each of the {world} ranks once")
    if set(record.peak_parts) != set(PARTS):
        raise DataError(f"peak_parts has {', '.join(sorted(record.peak_parts))} and not {', '.join(PARTS)}")
    lengths: list[tuple[str, Sequence[float], int]] = [
        ("rank_seconds", record.rank_seconds, world),
        ("peak_bytes", record.peak_bytes, world),
        *((f"peak_parts.{name}", values, world) for name, values in record.peak_parts.items()),
    ]
    lengths += [(f"operators.{key}.seconds", each.seconds, classes) for key, each in record.operators.items()]
    for name, values, count in lengths:
        most = LONGEST_SECONDS if name.endswith("seconds") else math.inf
        if len(values) != count or not all(0 <= value <= most for value in values):
            raise DataError(f"{name} is not {count} figures of at least 0")
    if not 0 < record.step_seconds <= LONGEST_SECONDS:
        raise DataError(f"step_seconds={record.step_seconds} is no length of a step")
    for span in record.spans():
        if not 0 <= span.rank < world or not -LONGEST_SECONDS <= span.start <= span.end <= LONGEST_SECONDS:
            raise DataError(f"the trace's span {span.key} of rank {span.rank}, {span.start} to {span.end}, is none")


def dump_record(record: Record, path: Path) -> None:
    """Write a prediction or measurement, whole or not at all."""
    write_whole(path, msgspec.json.format(msgspec.json.encode(record), indent=1))


def load_prediction(path: Path) -> Prediction:
    """Read a prediction; errors as in `planner.files.read_json`."""
    return read_json(path, Prediction, "prediction")


def load_measurement(path: Path) -> Measurement:
    """Read a measurement; errors as in `planner.files.read_json`."""
    return read_json(path, Measurement, "measurement")


def axis_classes(plan: Plan) -> dict[str, list[Any]]:
    """What decides the work of each coordinate along "dp", "cp" and "tp": coordinates with equal values do equal work.

    Parts of equal size may still see different shares of an attention mask; only the zig-zag order makes those equal.
    """
    mesh, parts, model = plan.mesh, plan.parts, plan.model
    masked = plan.seq_order == "contiguous" and (model.causal or model.attention_window is not None)
    starts, group = offsets(parts.heads), model.heads // model.kv_heads
    tp = []
    for t in range(mesh.tp):
        kv_heads = (starts[t + 1] - 1) // group - starts[t] // group
        longer = tuple(size % mesh.tp > t for size in parts.seq) if plan.sequence_parallel else ()
        tp.append((parts.heads[t], kv_heads, parts.ffn[t], parts.vocab[t], longer))
    return {"dp": list(parts.batch), "cp": list(range(mesh.cp)) if masked else list(parts.seq), "tp": tp}


def rank_classes(plan: Plan) -> list[list[int]]:
    """Ranks that do equal work: same stages, same part sizes along every other axis."""
    along = axis_classes(plan)
    found: dict[tuple[Any, ...], list[int]] = defaultdict(list)
    for rank, at in enumerate(plan.mesh.coordinates()):
        found[at.pp, along["dp"][at.dp], along["cp"][at.cp], along["tp"][at.tp]].append(rank)
    return list(found.values())


# ---- what spans add up to --------------------------------------------------------------------------------------------


def is_communication(key: str) -> bool:
    """Whether a key names a collective or a transfer: those begin with a mesh axis, operators with a stage."""
    return key.partition(".")[0] in COLLECTIVE_AXES


def is_pipeline_wait(key: str) -> bool:
    """Whether waiting under this key is pipeline bubble: for a stage's input, or for the pipeline to drain."""
    return key.startswith(("pp.receive", "pp.tied_gradient_sum", "world.all_reduce.loss", "step.end"))


class Figures(NamedTuple):
    """The figures of a step that both files carry."""

    bubble_fraction: float
    exposed_mean_seconds: float
    exposed_max_seconds: float
    wait_seconds: float
    rank_seconds: list[float]


def figures(spans: Iterable[Span], ranks: Sequence[int], step_seconds: float) -> Figures:
    """Reduce the spans of one step: idle shares, exposed communication, waiting for slower ranks.

    Exposed communication is time that the compute stream spends in a collective or transfer, moving bytes. Waiting
    counts as bubble where it is for a pipeline input or the step's end, and as `wait_seconds` elsewhere (mean over
    ranks).
    """
    bubble = dict.fromkeys(ranks, 0.0)
    exposed = dict.fromkeys(ranks, 0.0)
    wait = dict.fromkeys(ranks, 0.0)
    busy = dict.fromkeys(ranks, 0.0)
    for span in spans:
        if span.stream != "compute":
            continue
        if span.kind == "work":
            busy[span.rank] += span.seconds
            if is_communication(span.key):
                exposed[span.rank] += span.seconds
        elif is_pipeline_wait(span.key):
            bubble[span.rank] += span.seconds
        else:
            wait[span.rank] += span.seconds
    count = len(ranks)
    return Figures(
        sum(bubble.values()) / (count * step_seconds) if step_seconds else 0.0,
        sum(exposed.values()) / count,
        max(exposed.values()),
        sum(wait.values()) / count,
        [busy[rank] for rank in ranks],
    )


def operator_times(
    spans: Iterable[Span], classes: Sequence[Sequence[int]], payloads: dict[str, int]
) -> dict[str, OperatorTime]:
    """Work seconds of one step by key: mean over the ranks of each class; waiting is left out."""
    class_of = {rank: index for index, ranks in enumerate(classes) for rank in ranks}
    seconds: dict[str, list[float]] = {}
    counts: dict[tuple[str, int], int] = defaultdict(int)
    present: dict[int, set[int]] = defaultdict(set)
    for span in spans:
        index = class_of[span.rank]
        present[index].add(span.rank)
        totals = seconds.setdefault(span.key, [0.0] * len(classes))
        if span.kind == "work":
            totals[index] += span.seconds
            counts[span.key, span.rank] += 1
    most: dict[str, int] = defaultdict(int)
    for (key, _), count in counts.items():
        most[key] = max(most[key], count)
    return {
        key: OperatorTime(
            seconds=[total / max(1, len(present[index])) for index, total in enumerate(totals)],
            count=most[key],
            bytes=payloads.get(key, 0),
        )
        for key, totals in seconds.items()
    }


def version_note() -> str:
    """The version that stands in every file written."""
    return version("meshwright")
