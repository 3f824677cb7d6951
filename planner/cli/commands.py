"""Every command: its options, its example, and where its work is done. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from planner.options import (
    BatchOptions,
    HostOptions,
    LayoutOptions,
    MachineOptions,
    ModelOptions,
    TrainingOptions,
    TransportOptions,
    argument,
    option,
    required,
)


class Command(NamedTuple):
    """One command of the planner."""

    name: str
    summary: str
    example: str
    options: type
    work: str  # module:function, loaded when the command runs


@dataclass(frozen=True, kw_only=True)
class SearchOptions(TrainingOptions, BatchOptions, TransportOptions, MachineOptions, ModelOptions):
    """What a search is asked, whoever asks it."""

    fix: str | None = option(
        "Choices that are not searched: KEY=VALUE of the axes and options of a plan, as tp=2,pp=4."
    )
    memory_limit: str | None = option("Memory of a rank, such as 80GiB; when left out the machine's.")
    forward_only: bool = option("Plan an evaluation: no backward pass.", default=False)


@dataclass(frozen=True, kw_only=True)
class SuggestOptions(SearchOptions):
    """Options of `planner suggest`."""

    workers: int = required("Number of ranks to plan for.")
    top: int = option("How many plans to show.", default=10)
    explain: bool = option(
        "Say what bounds the winner and what would change it: searches again on half and double the network bandwidth, "
        "memory and batch.",
        default=False,
    )
    out: str = option("Folder for plan.json and predicted.json.", "-o", "--out", default=".")


@dataclass(frozen=True, kw_only=True)
class TuneOptions(SearchOptions):
    """Options of `planner tune`."""

    workers: int = required("Number of ranks to plan for.")
    top: int = option("How many plans to run.", default=5)
    steps: int = option("Timed steps of each plan in each round.", default=5)
    rounds: int = option("How often the plans take turns.", default=2)
    data: str | None = option("Text to train on, or synthetic; a text that every Python has when left out.")
    out: str = option(
        "Folder for plan.json, predicted.json and measured.json of the winner.", "-o", "--out", default="."
    )


@dataclass(frozen=True, kw_only=True)
class SweepOptions(SearchOptions):
    """Options of `planner sweep`."""

    workers: str | None = option("Numbers of ranks: 8..16384 for the powers of two between, or a list such as 8,12,16.")
    weak: bool = option("Let the batch grow with the workers, or keep it.", "--weak/--strong", default=False)
    tokens: float | None = option("Tokens to train on, such as 300e9, for days and price.")
    dollars_per_hour: float | None = option("Price of one device; the profile's when left out.")
    svg: str | None = option("Write the curves, or the experiment's chart, as an SVG figure.")
    measure: str | None = option("Run a classic experiment, predicted and measured side by side; 'list' names them.")
    steps: int = option("With --measure: timed steps of each plan.", default=5)
    max_ranks: int | None = option(
        "With --measure: run plans of up to so many ranks, predict the others; the cores of this machine when left out."
    )
    explain: bool = option("Say what bounds every point, or why an experiment comes out as it does.", default=False)


@dataclass(frozen=True, kw_only=True)
class PlanOptions(LayoutOptions, TrainingOptions, BatchOptions, TransportOptions, MachineOptions, ModelOptions):
    """Options of `planner plan`."""

    out: str = option("File to write.", "-o", "--out", default="plan.json")


@dataclass(frozen=True, kw_only=True)
class PredictOptions(MachineOptions):
    """Options of `planner predict`."""

    plan: str = argument("The plan.", "PLAN")
    out: str | None = option("File to write; predicted.json when left out.", "-o", "--out")


@dataclass(frozen=True, kw_only=True)
class ShowOptions:
    """Options of `planner show`."""

    first: str | None = argument("A plan, prediction or measurement.", "[FILE]", optional=True)
    second: str | None = argument("Another one, shown below it on one time scale.", "[FILE]", optional=True)
    trace: str | None = option("Write the spans as a Chrome/Perfetto trace.")
    svg: str | None = option("Write the timelines as an SVG figure.")
    algebra: bool = option("Show which collectives each choice of layouts costs.", default=False)


@dataclass(frozen=True, kw_only=True)
class CompareOptions:
    """Options of `planner compare`."""

    predicted: str = argument("A prediction, or the first of two of a kind.", "PREDICTED")
    measured: str = argument("A measurement, or the second of two of a kind.", "MEASURED")
    html: str | None = option("Write a self-contained page with both timelines one above the other.")


@dataclass(frozen=True, kw_only=True)
class CalibrateOptions(MachineOptions):
    """Options of `planner calibrate`."""

    files: list[str] = argument("Measurements that 'planner run' wrote.", "MEASURED...")  # noqa: RUF009
    out: str | None = option(
        "File to write; when left out the profile's own file, or NAME-calibrated.toml for a shipped one.", "-o", "--out"
    )


@dataclass(frozen=True, kw_only=True)
class ProfileOptions(HostOptions):
    """Options of `planner profile`."""

    workers: int | None = option(
        "Ranks to measure with; when left out one per core of the hosts, at least 2, and 4 with --device cuda."
    )
    quick: bool = option("At most 15 s, 30 s with --device cuda: fewer sizes and repeats.", default=False)
    device: str = option("cpu, or cuda for the GPUs of this machine.", default="cpu")
    out: str | None = option(
        "File to write; when left out machine.toml in your cache folder, machine-cuda.toml with --device cuda.",
        "-o",
        "--out",
    )


@dataclass(frozen=True, kw_only=True)
class ScheduleOptions:
    """Options of `planner schedule`."""

    name: str = argument(
        "gpipe, 1f1b, interleaved, looped-bfs, zb-h1, zb-h2, zb-1p, zb-2p, interleaved-zb, zb-v, v-half, v-min, "
        "dualpipe-v; custom for the shortest order of F, I and W under the durations and memory limit, solved to the "
        "proven optimum where small; or a CSV file for one's own.",
        "NAME",
    )
    stages: int | None = option("Pipeline stages; as many as ranks, times the chunks of the schedule, when left out.")
    ranks: int | None = option("Pipeline ranks; as many as stages, over the chunks of the schedule, when left out.")
    micro_batches: int | None = option("Micro-batches per step.")
    csv: bool = option("Print the instructions as CSV, one row per rank.", default=False)
    durations: str | None = option("Durations F, I, W, B and comm, as in F=1,I=1,W=1,comm=0.")
    memory_limit: float | None = option("Activations that a rank may hold, in model chunks.")


@dataclass(frozen=True, kw_only=True)
class RunOptions(HostOptions, MachineOptions):
    """Options of `planner run`."""

    plan: str = argument("The plan.", "PLAN")
    steps: int = option("Timed steps.", default=10)
    warmup: int = option("Steps before the timed ones.", default=2)
    data: str | None = option("Text to train on, or synthetic; a text that every Python has when left out.")
    device: str | None = option("cpu or cuda.")
    out: str = option("File to write.", "-o", "--out", default="measured.json")


@dataclass(frozen=True, kw_only=True)
class ValidateOptions:
    """Options of `planner validate`."""

    files: list[str] = argument("CSV files of published measurements.", "CSV...")  # noqa: RUF009
    machine: str | None = option("Profile for all rows; when left out the one that each row names.")
    svg: str | None = option("Write predicted over measured as a log-log SVG chart.")


@dataclass(frozen=True, kw_only=True)
class FitOptions:
    """Options of `planner fit`."""

    files: list[str] = argument("CSV files of published measurements.", "CSV...")  # noqa: RUF009
    machine: str | None = option("Profile whose figures are fitted, by name or file.")
    quick: bool = option("Leave the cross-validation out.", default=False)
    out: str | None = option("File to write; the profile's own file, or NAME.toml, when left out.", "-o", "--out")


@dataclass(frozen=True, kw_only=True)
class NoOptions:
    """A command without options."""


COMMANDS = (
    Command(
        "suggest",
        "Search all ways to split a model over workers; rank, explain, write plan.json and predicted.json.",
        "planner suggest --workers 8 --layers 12",
        SuggestOptions,
        "planner.cli.planning:suggest_plans",
    ),
    Command(
        "plan",
        "Make a plan by hand, without search. Axes not given are 1.",
        "planner plan --dp 2 --tp 2 --layers 4 --global-batch-size 8 -o plan.json",
        PlanOptions,
        "planner.cli.planning:plan_by_hand",
    ),
    Command(
        "predict",
        "Predict what a plan costs on a machine.",
        "planner predict plan.json --machine a100-80gb -o predicted.json",
        PredictOptions,
        "planner.cli.planning:predict_plan",
    ),
    Command(
        "show",
        "Show a plan, prediction or measurement: tables and a timeline; two files one over the other.",
        "planner show predicted.json measured.json --svg timeline.svg\nplanner show --algebra",
        ShowOptions,
        "planner.cli.viewing:show_files",
    ),
    Command(
        "compare",
        "Lay a prediction beside a measurement: where it was right, where it was wrong, and why.",
        "planner compare predicted.json measured.json --html comparison.html",
        CompareOptions,
        "planner.cli.viewing:compare_files",
    ),
    Command(
        "calibrate",
        "Refine a machine's profile from a run: its figures, as measured against as predicted.",
        "planner calibrate measured.json --machine profile.toml",
        CalibrateOptions,
        "planner.cli.tuning:calibrate_machine",
    ),
    Command(
        "tune",
        "Run the best plans of a search in turns, and rank them by what they take.",
        "planner tune --workers 2 --layers 2 --hidden 128 --heads 4 --top 3",
        TuneOptions,
        "planner.cli.tuning:tune_plans",
    ),
    Command(
        "sweep",
        "Draw scaling curves over numbers of workers, or measure a classic experiment.",
        "planner sweep --workers 256..1024 --model gpt3-175b --machine a100-80gb --tokens 3e11\n"
        "planner sweep --measure layer-blocks",
        SweepOptions,
        "planner.cli.sweeping:sweep",
    ),
    Command(
        "profile",
        "Measure this machine under MPI and write its profile.",
        "planner profile --quick",
        ProfileOptions,
        "planner.cli.running:profile_machine",
    ),
    Command(
        "schedule",
        "Print and simulate one pipeline schedule.",
        "planner schedule 1f1b --stages 4 --ranks 4 --micro-batches 8 --durations F=1,B=2",
        ScheduleOptions,
        "planner.cli.viewing:show_schedule",
    ),
    Command(
        "run",
        "Run a plan under mpirun with the flags that fit, then compare.",
        "planner run plan.json --steps 20",
        RunOptions,
        "planner.cli.running:run_plan",
    ),
    Command(
        "validate",
        "Predict published measurements and print how wrong the predictions are, source by source.",
        "planner validate measurements.csv --svg validation.svg",
        ValidateOptions,
        "planner.cli.validating:validate_files",
    ),
    Command(
        "fit",
        "Fit the figures of a machine's profile on published measurements.",
        "planner fit measurements.csv --machine profile.toml",
        FitOptions,
        "planner.cli.validating:fit_files",
    ),
    Command(
        "models",
        "List the models known by name.",
        "planner models",
        NoOptions,
        "planner.cli.viewing:list_models",
    ),
    Command(
        "machines",
        "List the machine profiles known by name.",
        "planner machines",
        NoOptions,
        "planner.cli.viewing:list_machines",
    ),
)
