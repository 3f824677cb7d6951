"""What options mean: a ModelSpec, a Machine, a Training, a Plan."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import msgspec

from planner.cost.algorithms import fix_collectives
from planner.cost.price import Pricer
from planner.errors import DataError, ModelError, PlanError, ScheduleError
from planner.machine import GENERIC_PROFILE, Machine, Transport, load_machine, machine_names, user_profile_path
from planner.mesh import Coordinate, Mesh
from planner.model import ModelSpec, with_sizes
from planner.model.huggingface import from_huggingface
from planner.model.presets import preset
from planner.options import (
    PRECISIONS,
    TRANSPORTS,
    BatchOptions,
    LayoutOptions,
    MachineOptions,
    ModelOptions,
    TrainingOptions,
    TransportOptions,
    one_of,
    parse_counts,
)
from planner.plan import Plan, ScheduleRecipe, Training, make_plan
from planner.program.rank import lower_stage
from planner.schedule import DURATION_DEPENDENT, NAMES, Durations, from_csv, generate, model_chunks, to_csv

MICRO_BATCHES_PER_STAGE = 4
"""`auto` in a plan by hand: micro-batches per pipeline rank at most, a bubble of (p-1)/(5p-1), below a fifth."""


SHORTEST_SECONDS, LONGEST_SECONDS = 1e-15, 1e12
"""Of a step of a schedule that takes time at all: sums and ratios of durations stay finite."""


def model_spec(options: ModelOptions) -> ModelSpec:
    """Return the model.

    Raises:
        ModelError: an unknown name, an unreadable config.json, or sizes that contradict each other.
    """
    norm, positions = options.norm, options.positions
    return with_sizes(
        None if options.model is None else _named_model(options.model),
        layers=options.layers,
        hidden=options.hidden,
        heads=options.heads,
        kv_heads=options.kv_heads,
        ffn_hidden=options.ffn_hidden,
        seq_len=options.seq_len,
        vocab=options.vocab,
        causal=options.causal,
        gated_ffn=options.gated_ffn,
        norm=norm and one_of("norm", norm, ("layer", "rms"), ModelError),  # type: ignore[arg-type]
        norm_position=None if options.pre_norm is None else "pre" if options.pre_norm else "post",
        positions=positions  # type: ignore[arg-type]
        and one_of("positions", positions, ("learned", "rotary"), ModelError),
        tie_embeddings=options.tie_embeddings,
    )


def _named_model(name: str) -> ModelSpec:
    is_file = name.endswith(".json") or "/" in name or Path(name).is_dir()
    return from_huggingface(name) if is_file else preset(name)


class MachineChoice(NamedTuple):
    """The machine that a prediction is for, and how it was chosen."""

    machine: Machine
    origin: Literal["measured", "generic", "named"]
    path: str

    @property
    def sentence(self) -> str:
        """Which profile this is, for people; on GPUs also over which transport."""
        name = self.machine.name
        over = f", over {self.machine.transport_in_use}" if self.machine.device.kind == "gpu" else ""
        return {
            "measured": f"machine {name}: measured on this machine ({self.path}){over}",
            "generic": f"machine {name}: shipped generic figures ({self.path}); 'planner profile' measures this one",
            "named": f"machine {name} ({self.path}){over}",
        }[self.origin]


def machine_choice(options: MachineOptions) -> MachineChoice:
    """Return the machine and where its figures come from.

    Raises:
        MachineError: no such profile, or a malformed one.
    """
    name = options.machine
    if name is None:
        measured = user_profile_path()
        if measured.is_file():
            return MachineChoice(load_machine(measured), "measured", str(measured))
        return MachineChoice(load_machine(GENERIC_PROFILE), "generic", shipped_path(GENERIC_PROFILE))
    machine = load_machine(name)
    if name in machine_names():
        return MachineChoice(machine, "named", shipped_path(name))
    return MachineChoice(machine, "named", name if Path(name).is_file() else "datasheet words")


def with_transport(choice: MachineChoice, options: TransportOptions, workers: int) -> MachineChoice:
    """Return the choice with its machine over the transport asked for; that of plans made on it.

    When none is asked for it is the machine's own, save that ranks which share a GPU are staged: NCCL takes one each.

    Raises:
        PlanError: no such transport, or one that this kind of device, or ranks sharing a GPU, cannot use.
        MachineError: the profile has no figures for it.
    """
    machine = choice.machine
    per_device = machine.ranks_per_device(workers)
    wanted = options.transport or ("staged" if per_device > 1 else machine.transport_in_use)
    transport = cast(Transport, one_of("transport", wanted, TRANSPORTS))
    if not machine.suits(transport):
        ranks, usable = ("CPU", "host") if machine.device.kind == "cpu" else ("GPU", "staged, cuda-aware or nccl")
        raise PlanError(f"--transport {transport}: machine {machine.name} has {ranks} ranks; use {usable}")
    if transport == "nccl" and per_device > 1:
        raise PlanError(
            f"--transport nccl takes one rank per GPU, and {per_device} share one of {machine.name}; "
            f"use at most {machine.host.devices} workers a host, or --transport staged"
        )
    return choice._replace(machine=machine.over(transport))


def shipped_path(name: str) -> str:
    """Return where a shipped profile lies."""
    with as_file(files("profiles") / f"{name}.toml") as path:
        return str(path)


def global_batch_size(options: BatchOptions, workers: int) -> int:
    """Return the sequences per step.

    Raises:
        PlanError: not positive.
    """
    size = 2 * workers if options.global_batch_size is None else options.global_batch_size
    if size < 1:
        raise PlanError(f"--global-batch-size {size} is no batch; use at least 1")
    return size


def micro_batch_size(options: BatchOptions) -> int | None:
    """Return the sequences per forward pass, None for auto.

    Raises:
        PlanError: neither a positive integer nor auto.
    """
    text = options.micro_batch_size
    if text == "auto":
        return None
    if not re.fullmatch(r"[1-9]\d*", text, re.ASCII):
        raise PlanError(f"--micro-batch-size {text!r} is no size; give a positive integer or auto")
    return int(text)


def training(options: TrainingOptions, choice: MachineChoice, workers: int) -> Training:
    """Return the training settings for `workers` ranks on a machine.

    Raises:
        PlanError: a setting outside its range.
        MachineError: the machine has no figure for the precision.
    """
    machine, threads = choice.machine, options.threads_per_rank
    precision = options.precision or ("bfloat16" if machine.device.kind == "gpu" else "float32")
    one_of("precision", precision, PRECISIONS)
    machine.peak_flops_per_second(precision)
    for name, value in (("lr", options.lr), ("clip-norm", options.clip_norm)):
        if value is not None and not math.isfinite(value):
            raise PlanError(f"--{name} {value} is not finite; give a finite number")
    return Training(
        optimizer=one_of("optimizer", options.optimizer, ("adamw", "sgd")),  # type: ignore[arg-type]
        learning_rate=options.lr,
        dropout=options.dropout,
        clip_norm=options.clip_norm,
        precision=precision,  # type: ignore[arg-type]
        seed=options.seed,
        threads_per_rank=default_threads(choice, workers) if threads is None else threads,
    )


_FIXED_NUMBERS = {"dp": 1, "tp": 1, "pp": 1, "cp": 1, "num_model_chunks": 1, "zero_stage": 0}  # and the least
_FIXED_NAMES = {
    "schedule": tuple(name for name in NAMES if name not in DURATION_DEPENDENT),
    "recompute": ("none", "selective", "full"),
    "cp_kind": ("allgather", "ring", "ulysses"),
    "attention": ("plain", "blocked"),
}
_FIXED_FLAGS = {"true": True, "false": False, "1": True, "0": False}


def fixed_choices(entries: Mapping[str, int | str]) -> dict[str, int | str]:
    """Return the choices of `--fix` under the names that the search knows, each checked.

    `chunks` and `zero` stand for num_model_chunks and zero_stage, as in the options of a plan by hand.

    Raises:
        PlanError: an unknown name, or a value that it cannot have.
    """
    fixed: dict[str, int | str] = {}
    for given, value in entries.items():
        key = {"chunks": "num_model_chunks", "zero": "zero_stage"}.get(given, given)
        if key in _FIXED_NUMBERS:
            most = 3 if key == "zero_stage" else math.inf
            if not isinstance(value, int) or not _FIXED_NUMBERS[key] <= value <= most:
                limits = "0, 1, 2 or 3" if key == "zero_stage" else f"an integer of at least {_FIXED_NUMBERS[key]}"
                raise PlanError(f"--fix {given}={value} is out of range; use {limits}")
            fixed[key] = value
        elif key in _FIXED_NAMES:
            fixed[key] = one_of(f"fix {key}", str(value), _FIXED_NAMES[key])
        elif key == "sequence_parallel":
            fixed[key] = _FIXED_FLAGS[one_of(f"fix {key}", str(value).lower(), tuple(_FIXED_FLAGS))]
        else:
            known = (*_FIXED_NUMBERS, *_FIXED_NAMES, "sequence_parallel")
            raise PlanError(f"--fix {given} is not a choice of the search; use one of {', '.join(known)}")
    return fixed


def usable_cores() -> int:
    """Return the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_threads(choice: MachineChoice, workers: int) -> int:
    """Return a host's cores over its ranks, at least 1: of this machine, or of the CPU machine that was named."""
    if choice.machine.device.kind == "gpu":
        return 1
    cores = choice.machine.host.cores if choice.origin == "named" else usable_cores()
    return max(1, cores // choice.machine.ranks_per_host(workers))


def world_size(options: LayoutOptions) -> int:
    """Return the ranks of a plan by hand.

    Raises:
        PlanError: an axis size below 1, or a product that is not the number of workers asked for.
    """
    mesh = Mesh(pp=options.pp, dp=options.dp, cp=options.cp, tp=options.tp)
    if options.workers not in (None, mesh.world_size):
        raise PlanError(
            f"dp={mesh.dp} · tp={mesh.tp} · pp={mesh.pp} · cp={mesh.cp} is {mesh.world_size} ranks and --workers is "
            f"{options.workers}; make the product of the axes the number of workers"
        )
    return mesh.world_size


def hand_plan(
    options: LayoutOptions, model: ModelSpec, batch: BatchOptions, settings: Training, machine: Machine
) -> Plan:
    """Return the checked plan.

    Raises:
        PlanError: the combination cannot be carried out.
        ScheduleError: the schedule is not defined for these sizes.
    """
    size = global_batch_size(batch, world_size(options))
    mesh = Mesh(pp=options.pp, dp=options.dp, cp=options.cp, tp=options.tp)
    if options.zero not in (0, 1, 2, 3):
        raise PlanError(f"--zero {options.zero} is no ZeRO stage; use 0, 1, 2 or 3")
    most = MICRO_BATCHES_PER_STAGE * mesh.pp if mesh.pp > 1 else 1
    arguments: dict[str, Any] = {
        "global_batch_size": size,
        "micro_batch_size": micro_batch_size(batch) or math.ceil(math.ceil(size / mesh.dp) / most),
        "stage_layers": None if options.stage_layers is None else parse_counts(options.stage_layers, "--stage-layers"),
        "recompute": one_of("recompute", options.recompute, ("none", "selective", "full")),
        "zero_stage": options.zero,
        "sequence_parallel": options.sequence_parallel,
        "cp_kind": one_of("cp-kind", options.cp_kind, ("allgather", "ring", "ulysses")),
        "attention": one_of("attention", options.attention, ("plain", "blocked")),
        "overlap_gradients": options.overlap_gradients,
        "forward_only": options.forward_only,
        "transport": machine.transport_in_use,
        "training": settings,
    }
    recipe = _recipe(options)
    if recipe.name in DURATION_DEPENDENT:
        draft = make_plan(model, mesh, schedule=_draft(recipe), **arguments)
        recipe = timed_recipe(draft, recipe, machine)
    return fix_collectives(make_plan(model, mesh, schedule=recipe, **arguments), machine)


def _recipe(options: LayoutOptions) -> ScheduleRecipe:
    name = one_of("schedule", options.schedule, (*NAMES, "custom"), ScheduleError)
    if (name == "custom") != (options.schedule_csv is not None):
        raise ScheduleError("--schedule custom and --schedule-csv FILE belong together; give both or neither")
    if options.schedule_csv is not None:
        text = read_text(options.schedule_csv, "schedule")
        rows = tuple(row for row in text.splitlines() if row.strip())
        return ScheduleRecipe(name=name, num_model_chunks=from_csv(text).num_model_chunks, programs=rows)
    if options.chunks is not None and options.chunks < 1:
        raise PlanError(f"--chunks {options.chunks} is no number of stages per rank; use at least 1")
    usual = model_chunks(name) or 2
    return ScheduleRecipe(name=name, num_model_chunks=usual if options.chunks is None else options.chunks)


def _draft(recipe: ScheduleRecipe) -> ScheduleRecipe:
    """The recipe of a schedule with the same stages that needs no durations, to price the stages by."""
    name = "1f1b" if recipe.num_model_chunks == 1 else "interleaved"
    return ScheduleRecipe(name=name, num_model_chunks=recipe.num_model_chunks)


def stage_durations(plan: Plan, machine: Machine) -> Durations:
    """Return the seconds of F, I and W of one micro-batch on every stage, priced on a machine."""
    pricer, at = Pricer(plan, machine), Coordinate(0, 0, 0, 0)
    seconds: dict[str, list[float]] = {"F": [], "I": [], "W": []}
    for stage in range(plan.num_stages):
        segments = lower_stage(plan, at, stage, plan.micro_batches(0)[0], split=True)
        for op, found in seconds.items():
            tasks = (task for tasks in segments.tasks.get(op, {}).values() for task in tasks)
            found.append(sum(pricer.seconds(task, at) for task in tasks))
    return Durations(seconds["F"], seconds["I"], seconds["W"])


def timed_recipe(draft: Plan, recipe: ScheduleRecipe, machine: Machine) -> ScheduleRecipe:
    """Return the recipe with its explicit instructions, ordered for what the stages of `draft` cost on a machine.

    Raises:
        PlanError: replicas have different numbers of micro-batches, which one set of instructions cannot serve.
        ScheduleError: the schedule is not defined for these sizes.
    """
    counts = {len(draft.micro_batches(replica)) for replica in range(draft.mesh.dp)}
    if len(counts) > 1:
        raise PlanError(
            f"schedule {recipe.name} is one list of instructions, and replicas have {min(counts)} or {max(counts)} "
            "micro-batches; choose a global batch that dp times the micro-batch divides, or schedule 1f1b"
        )
    schedule = generate(
        recipe.name,
        num_ranks=draft.mesh.pp,
        num_micro_batches=counts.pop(),
        num_model_chunks=recipe.num_model_chunks,
        durations=None if draft.forward_only else stage_durations(draft, machine),
        forward_only=draft.forward_only,
    )
    return msgspec.structs.replace(recipe, programs=tuple(to_csv(schedule).splitlines()))


def parse_durations(text: str | None) -> Durations:
    """Read `F=1,I=1,W=1,comm=0`; B, I, W and comm default as in `Durations.from_keys`.

    Raises:
        ScheduleError: an entry that is not KEY=SECONDS, an unknown key, or a negative figure.
    """
    keys: dict[str, float] = {}
    for entry in () if text is None else text.split(","):
        key, _, value = (part.strip() for part in entry.partition("="))
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if not math.isfinite(number) or key in keys:
            raise ScheduleError(
                f"--durations {text} has the entry {entry!r}; write each of F, I, W, B and comm once, as in F=1,B=2"
            )
        if number and not SHORTEST_SECONDS <= abs(number) <= LONGEST_SECONDS:
            raise ScheduleError(
                f"--durations {text}: {entry} is out of range; give 0, or {SHORTEST_SECONDS:g} to {LONGEST_SECONDS:g}"
            )
        keys[key] = number
    return Durations.from_keys(keys)


def read_text(path: str, what: str) -> str:
    """Read a text file.

    Raises:
        DataError: there is no such file, or it is no text.
    """
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"cannot read {what} file {path}: {error.strerror}; name an existing file") from None
    except UnicodeDecodeError:
        raise DataError(f"{what} file {path} is not UTF-8 text; name a text file") from None
