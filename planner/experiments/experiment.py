"""Experiments: the classic questions of parallel training, each a value: plans, and what is read off their records.

An experiment holds its cases (named plans) and one function that reads rows of figures off records of them. Predictions
and measurements are records alike, so that the same function reads both sides. Where ranks outnumber the cores a third
side is predicted, with a core for every rank: what the machine at hand cannot show.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import msgspec

from planner.compare import rank_weights
from planner.machine import Machine
from planner.model import ModelSpec, with_sizes
from planner.plan import Plan
from planner.predict import predict
from planner.trace import Record, is_communication

Records = Mapping[str, Record]


@dataclass(frozen=True)
class Sizes:
    """What overrides an experiment's own sizes; the classic ones when left out."""

    model: Mapping[str, Any] = field(default_factory=dict)
    global_batch_size: int | None = None
    cores: int = 1

    def spec(self, **usual: Any) -> ModelSpec:
        """The experiment's model."""
        given = {key: value for key, value in self.model.items() if value is not None}
        return with_sizes(**(usual | given))

    def batch(self, usual: int) -> int:
        """The experiment's global batch."""
        return usual if self.global_batch_size is None else self.global_batch_size


class Row(NamedTuple):
    """One line of an experiment: what it is of, and its figures by column."""

    label: str
    figures: dict[str, float]


class Case(NamedTuple):
    """One plan of an experiment."""

    name: str
    plan: Plan


@dataclass(frozen=True)
class Experiment:
    """Plans, and how rows are read off their records.

    Attributes:
        name: How the command line calls it.
        title: What it asks.
        cases: The plans, cheapest first.
        read: Rows of the cases at hand; those whose cases are missing are left out.
        columns: Columns in order, with the kind of figure: "x" (a factor), "share", "seconds", "rate" or "flops".
        references: Rows that do not depend on a machine: published or ideal figures by column.
        simulate: Further rows from formulas, for more ranks than are lowered; given the predictions and the machine.
        chart: Column that the chart shows.
        note: What has to be known to read the table.
        machine: The profile that the experiment is about, for which it is predicted and never run here; None for any.
        explain: Says why it comes out as it does; given the predictions and the machine.
    """

    name: str
    title: str
    cases: tuple[Case, ...]
    read: Callable[[Records], list[Row]]
    columns: dict[str, str]
    chart: str
    references: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    simulate: Callable[[Records, Machine], list[Row]] | None = None
    note: str = ""
    machine: str | None = None
    explain: Callable[[Records, Machine], list[str]] | None = None

    @property
    def most_ranks(self) -> int:
        """Ranks of its largest plan."""
        return max(case.plan.mesh.world_size for case in self.cases)


@dataclass(frozen=True)
class Outcome:
    """An experiment's rows: predicted for the machine, measured, and predicted with a core for every rank."""

    experiment: Experiment
    cores: int
    predicted: list[Row]
    measured: list[Row]
    unshared: list[Row]
    simulated: list[Row]
    ran: tuple[str, ...]
    explanation: tuple[str, ...] = ()


def conduct(
    experiment: Experiment,
    machine: Machine,
    *,
    cores: int,
    max_ranks: int,
    run: Callable[[int, Plan, int], Record] | None,
    explain: bool = False,
) -> Outcome:
    """Predict all cases of an experiment, run those of at most `max_ranks` ranks, and read both.

    Args:
        experiment: What to conduct.
        machine: The profile for the predictions.
        cores: Of the machine that runs.
        max_ranks: Largest plan that is run.
        run: Runs (place, plan, round) and returns its measurement; None predicts only.
        explain: Whether to say why.
    """
    predicted = {case.name: predict(case.plan, machine) for case in experiment.cases}
    measured = {
        case.name: run(place, case.plan, 0)
        for place, case in enumerate(experiment.cases)
        if run is not None and case.plan.mesh.world_size <= max_ranks
    }
    unshared: list[Row] = []
    own = with_cores(machine, experiment.most_ranks)
    if own is not machine:
        unshared = experiment.read({case.name: predict(case.plan, own) for case in experiment.cases})
    simulated = [] if experiment.simulate is None else experiment.simulate(predicted, machine)
    rows = experiment.read(predicted)
    told = experiment.explain(predicted, machine) if explain and experiment.explain is not None else ()
    return Outcome(
        experiment, cores, rows, experiment.read(measured), unshared, simulated, tuple(measured), tuple(told)
    )


def with_cores(machine: Machine, ranks: int) -> Machine:
    """Return a CPU machine with a core, and its share of memory bandwidth, for each of `ranks`; a GPU one as it is."""
    host = machine.host
    if machine.device.kind != "cpu" or ranks <= host.cores:
        return machine
    total = host.memory_bandwidth_bytes_per_second
    wider = msgspec.structs.replace(
        host,
        cores=ranks,
        devices=ranks,
        memory_bandwidth_bytes_per_second=None if total is None else total * ranks / host.cores,
    )
    return msgspec.structs.replace(machine, host=wider)


# ---- reading records -------------------------------------------------------------------------------------------------


def block_seconds(record: Record) -> dict[str, float]:
    """Return the seconds that a rank spends in the attention block and the feed-forward block, waiting included.

    Means over ranks. A collective belongs to the block whose output, or gradient of its input, it completes.
    """
    weights, total = rank_weights(record), {"attention": 0.0, "feed-forward": 0.0}
    for span in record.spans():
        block = block_of(span.key)
        if block is not None and span.stream == "compute":
            total[block] += span.seconds * weights[span.rank]
    return total


_FEED_FORWARD = ("ffn", "middle", "activation", "add")


def block_of(key: str) -> str | None:
    """Return the block of an encoder layer that a key belongs to, None outside layers."""
    parts = key.split(".")[2:] if is_communication(key) else key.split(".")[1:]
    if len(parts) < 2 or parts[-1] == "update":
        return None
    if parts[0] == "embedding" and is_communication(key) and parts[-1] == "backward":
        return "attention"  # the gradient of the first layer's input
    if parts[0] != "layer":
        return None
    return "feed-forward" if parts[1].startswith(_FEED_FORWARD) else "attention"


PHASES = ("forward", "backward", "update", "communication", "waiting")


def phase_shares(record: Record) -> dict[str, float]:
    """Return the share of the step that ranks spend in each phase, mean over ranks; the rest lies between operators."""
    weights, total = rank_weights(record), dict.fromkeys(PHASES, 0.0)
    for span in record.spans():
        if span.stream != "compute":
            continue
        way = span.key.rpartition(".")[2]
        if span.kind == "wait":
            phase = "waiting"
        elif is_communication(span.key):
            phase = "communication"
        else:
            phase = way if way in ("forward", "update") else "backward"
        total[phase] += span.seconds * weights[span.rank] / record.step_seconds
    return total


def flops_per_second(record: Record) -> float:
    """Model FLOP/s of all ranks together."""
    return record.mfu * record.machine.peak_flops_per_second * record.plan.mesh.world_size


# ---- both sides together ---------------------------------------------------------------------------------------------


def joined(outcome: Outcome) -> dict[str, dict[str, dict[str, float]]]:
    """Return an outcome as label -> column -> side -> figure, labels in order of first appearance."""
    table: dict[str, dict[str, dict[str, float]]] = defaultdict(lambda: defaultdict(dict))
    sides: Sequence[tuple[str, list[Row]]] = (
        ("predicted", outcome.predicted),
        ("measured", outcome.measured),
        ("own cores", outcome.unshared),
        ("simulated", outcome.simulated),
    )
    for side, rows in sides:
        for row in rows:
            for column, value in row.figures.items():
                table[row.label][column][side] = value
    for label, known in outcome.experiment.references.items():
        for side, value in known.items():
            table[label][outcome.experiment.chart][side] = value
    return {label: dict(columns) for label, columns in table.items()}
