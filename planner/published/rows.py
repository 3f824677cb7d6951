"""Published measurements: rows of a CSV become plans and what was measured of them, or are skipped with a reason.

Conventions, by what the sources say of themselves (the CSV's columns do not hold them):

* Models with a gated feed-forward block are of the Llama family (RMS norm, rotary positions, no biases, untied head),
  the others of the GPT-2 family. Vocabularies are padded to a multiple of 128 tp, as Megatron-LM does.
* Layers that divide over the stages only with two more count the embedding and the head as one each, so that the first
  and the last stage hold one layer fewer (BigScience; Qi et al. 2024; torchtitan).
* Megatron's gradient reduction overlaps the backward pass where tp·pp <= 8 (Narayanan et al. 2021) and NeMo's always.
* Attention is one fused kernel where the source is younger than FlashAttention's adoption, else two products and a
  softmax.
* FSDP under a pipeline keeps parameters gathered and reduces gradients once (reshard_after_forward=False): ZeRO 1.
  Where they are not printed there are as many micro-batches as pipeline ranks, and an interleaved schedule has 2 chunks
  a rank (torchtitan's defaults).
* torchtitan's tensor parallelism is always sequence parallel, and its selective recomputation is full recomputation
  of which the machine's variant "selective" keeps some outputs.
* What only notes name (asynchronous tensor parallelism, eager execution, the software release, another site's devices)
  is a variant of the machine's profile.
* Schedules whose order depends on durations are generated for the durations that the datasheet predicts.
"""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import msgspec

from planner.cost.price import Pricer
from planner.cost.skeleton import Skeleton, unit_seconds
from planner.errors import DataError, MeshwrightError
from planner.machine import load_machine, machine_names
from planner.mesh import Mesh
from planner.model import ModelSpec
from planner.plan import Plan, ScheduleRecipe, Training, make_plan
from planner.schedule import Durations, generate
from planner.schedule.grid import to_csv
from planner.schedule.registry import DURATION_DEPENDENT, NAMES
from planner.shard import split_evenly

COLUMNS = (
    "source", "row", "machine", "gpus", "model", "layers", "hidden", "ffn_hidden", "gated_ffn", "heads", "kv_heads",
    "vocab", "seq_len", "tp", "cp", "pp", "num_model_chunks", "dp", "zero_stage", "micro_batch_size",
    "global_batch_size", "recompute", "sequence_parallel", "schedule", "precision", "step_seconds", "peak_memory_gib",
    "memory_kind", "notes",
)  # fmt: skip
"""The columns that a row needs; a file without them has another schema."""

ZERO_STAGES = {"": 0, "0": 0, "1": 1, "2": 2, "3": 3}
PRECISIONS = {"fp16": "float16", "bf16": "bfloat16", "fp8": "fp8", "fp32": "float32", "tf32": "tf32"}
OVERLAPPED_SOURCES = ("mlperf", "torchtitan")
SERIAL_SOURCES = ("vtrain", "bigscience", "simumax", "korthikanti", "zero_bubble")
FUSED_ATTENTION_SOURCES = ("mlperf", "torchtitan", "simumax")


@dataclass(frozen=True)
class PublishedRow:
    """One measured run: where it stands, the plan it ran, and what was measured.

    `measured_seconds` is None where memory ran out (`out_of_memory`). `memory_kind` is "nvidia-smi", "reserved" or
    "allocated".
    """

    source: str
    row: str
    machine: str
    devices_per_host: int | None
    plan: Plan
    measured_seconds: float | None
    measured_gib: float | None
    memory_kind: str
    out_of_memory: bool
    variants: tuple[str, ...]
    group: tuple[object, ...]


@dataclass(frozen=True)
class SkippedRow:
    """A row that cannot be predicted, and why."""

    source: str
    row: str
    reason: str


class _BadRowError(Exception):
    """The reason for which one row is skipped."""


def read_published(path: Path, machine: str | None = None) -> tuple[list[PublishedRow], list[SkippedRow]]:
    """Read the rows of one CSV.

    Args:
        path: the file.
        machine: the machine that all rows are predicted on; None for the one that each row names.

    Raises:
        DataError: the file cannot be read, or has another schema.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        msg = f"{path}: cannot be read ({error}); give a CSV file of published measurements"
        raise DataError(msg) from error
    reader = csv.DictReader(text.splitlines())
    try:
        table = list(reader)
    except csv.Error as error:
        raise DataError(f"{path}: is not CSV ({error}); give a CSV file of published measurements") from None
    missing = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
    if missing:
        msg = f"{path.name}: another schema, without the columns {', '.join(missing)}; see INTERFACE for the columns"
        raise DataError(msg)
    rows: list[PublishedRow] = []
    skipped: list[SkippedRow] = []
    for number, cells in enumerate(table):
        source = (cells.get("source") or path.stem).strip()
        name = (cells.get("row") or str(number)).strip()
        try:
            rows.append(_read_row(source, name, cells, machine))
        except (_BadRowError, MeshwrightError) as error:
            skipped.append(SkippedRow(source, name, str(error)))
    return rows, skipped


def _read_row(source: str, name: str, cells: dict[str, Any], machine: str | None) -> PublishedRow:
    if None in cells or None in cells.values():
        raise _BadRowError("the row has another number of cells than the header")
    chosen = machine or cells["machine"].strip()
    if machine is None and chosen not in machine_names():
        raise _BadRowError(f"unknown machine '{chosen}'; 'planner machines' lists the profiles, --machine names one")
    gpus = _integer(cells, "gpus")
    mesh = Mesh(**{axis: _integer(cells, axis) for axis in ("pp", "dp", "cp", "tp")})
    if mesh.world_size != gpus:
        raise _BadRowError(f"tp·pp·cp·dp = {mesh.world_size} is not the {gpus} GPUs")
    out_of_memory = cells["peak_memory_gib"].strip().upper() == "OOM"
    seconds = _positive(cells, "step_seconds")
    if seconds is None and not out_of_memory:
        raise _BadRowError("step_seconds is empty")
    per_host = cells.get("gpus_per_node") or ""
    plan = _plan(source, cells, mesh)
    return PublishedRow(
        source=source,
        row=name,
        machine=chosen,
        devices_per_host=_integer(cells, "gpus_per_node") if per_host.strip() else None,
        plan=plan,
        measured_seconds=seconds,
        measured_gib=None if out_of_memory else _positive(cells, "peak_memory_gib"),
        memory_kind=_memory_kind(cells["memory_kind"]),
        out_of_memory=out_of_memory,
        variants=_variants(source, cells),
        group=(msgspec.structs.replace(plan.model, name="", vocab=1), gpus, plan.global_batch_size),
    )


def _variants(source: str, cells: dict[str, Any]) -> tuple[str, ...]:
    """The techniques that a row's notes name, as variants of its machine's profile."""
    notes = cells["notes"].lower()
    if source.startswith("mlperf"):
        return ("ngc23-09",) if "ngc23.09" in notes else ()
    if not source.startswith("torchtitan"):
        return ()
    asynchronous = "async tp" in notes or "+asynctp" in notes
    compiled = asynchronous or "compile" in notes or "asynctp doc" in notes or "fp8" in cells["precision"]
    named = {
        "async-tp": asynchronous,
        "eager": not compiled,
        "selective": cells["recompute"].strip() == "selective",
        "whitefiber": "whitefiber" in notes,
    }
    return tuple(name for name, applies in named.items() if applies)


def _memory_kind(text: str) -> str:
    return next((kind for kind in ("nvidia-smi", "reserved") if kind in text), "allocated")


def _integer(cells: dict[str, Any], key: str, default: int | None = None, least: int = 1) -> int:
    text = cells[key].strip()
    if not text and default is not None:
        return default
    try:
        value = float(text)
    except ValueError:
        raise _BadRowError(f"{key} is '{text}', not a number") from None
    if not math.isfinite(value) or value != int(value) or value < least:
        raise _BadRowError(f"{key} is {text}, not an integer of at least {least}")
    return int(value)


def _positive(cells: dict[str, Any], key: str) -> float | None:
    """A positive figure; None for an empty cell."""
    text = cells[key].strip()
    if not text:
        return None
    try:
        value = float(text)
    except ValueError:
        raise _BadRowError(f"{key} is '{text}', not a number") from None
    if not (math.isfinite(value) and value > 0):
        raise _BadRowError(f"{key} is {text}, not a positive number")
    return value


def _one_of(cells: dict[str, Any], key: str, allowed: dict[str, Any]) -> Any:
    text = cells[key].strip()
    if text not in allowed:
        raise _BadRowError(f"{key} is '{text}'; known are {', '.join(filter(None, allowed))}")
    return allowed[text]


def _model(cells: dict[str, Any], tp: int) -> ModelSpec:
    hidden, heads, seq_len = (_integer(cells, key) for key in ("hidden", "heads", "seq_len"))
    if hidden % heads:
        raise _BadRowError(f"hidden={hidden} does not divide over heads={heads}")
    llama = bool(_integer(cells, "gated_ffn", 0, 0))
    unit = 128 * tp
    return ModelSpec(
        name=cells["model"].strip() or "custom",
        layers=_integer(cells, "layers"),
        hidden=hidden,
        heads=heads,
        kv_heads=_integer(cells, "kv_heads", heads),
        head_dim=hidden // heads,
        ffn_hidden=_integer(cells, "ffn_hidden", 4 * hidden),
        seq_len=seq_len,
        vocab=-(-_integer(cells, "vocab") // unit) * unit,
        causal=True,
        gated_ffn=llama,
        activation="silu" if llama else "gelu",
        norm="rms" if llama else "layer",
        norm_bias=not llama,
        norm_position="pre",
        norm_epsilon=1e-5,
        final_norm=True,
        positions="rotary" if llama else "learned",
        max_positions=seq_len,
        qkv_bias=not llama,
        out_bias=not llama,
        ffn_bias=not llama,
        tie_embeddings=not llama,
    )


def stage_layers(layers: int, stages: int) -> tuple[int, ...]:
    """Layers per stage: even; or, if that takes two more layers, one fewer on the first and the last stage."""
    if layers % stages and (layers + 2) % stages == 0:
        each = (layers + 2) // stages
        return (each - 1, *(each,) * (stages - 2), each - 1)
    return split_evenly(layers, stages)


def _is(source: str, names: tuple[str, ...]) -> bool:
    return source.startswith(names)


def _default_micro_batch(cells: dict[str, Any], mesh: Mesh) -> int:
    """Sequences per micro-batch where the source does not print them: as many micro-batches as pipeline ranks."""
    return max(1, _integer(cells, "global_batch_size") // (mesh.dp * mesh.pp)) if mesh.pp > 1 else 1


def _plan(source: str, cells: dict[str, Any], mesh: Mesh) -> Plan:
    fsdp = _one_of(cells, "zero_stage", ZERO_STAGES) == 3 and mesh.pp > 1
    name = _one_of(cells, "schedule", {"": "1f1b", **{known: known for known in NAMES}})
    chunks = _integer(cells, "num_model_chunks", 1)
    if name == "interleaved" and chunks == 1:
        chunks = 2
    if mesh.pp == 1:
        name, chunks = "1f1b", 1
    if name in ("zb-v", "v-half", "v-min", "dualpipe-v"):
        chunks = 2
    model = _model(cells, mesh.tp)
    zero = _one_of(cells, "zero_stage", ZERO_STAGES) if mesh.dp * mesh.cp > 1 else 0
    torchtitan = source.startswith("torchtitan")
    recompute = _one_of(cells, "recompute", {key: key for key in ("none", "selective", "full")})
    overlapped = _is(source, OVERLAPPED_SOURCES) or (mesh.tp * mesh.pp <= 8 and not _is(source, SERIAL_SOURCES))
    choices: dict[str, Any] = {
        "global_batch_size": _integer(cells, "global_batch_size"),
        "micro_batch_size": _integer(cells, "micro_batch_size", _default_micro_batch(cells, mesh)),
        "stage_layers": stage_layers(model.layers, mesh.pp * chunks),
        "sequence_parallel": (bool(_integer(cells, "sequence_parallel", 0, 0)) or torchtitan) and mesh.tp > 1,
        "recompute": "full" if torchtitan and recompute == "selective" else recompute,
        "zero_stage": min(zero, 1) if fsdp else zero,
        "attention": "blocked" if _is(source, FUSED_ATTENTION_SOURCES) else "plain",
        "overlap_gradients": overlapped and mesh.dp * mesh.cp > 1,
        "training": Training(precision=_one_of(cells, "precision", PRECISIONS)),
    }
    return _scheduled(model, mesh, name, chunks, tuple(choices.items()))


@lru_cache(maxsize=256)
def _scheduled(model: ModelSpec, mesh: Mesh, name: str, chunks: int, choices: tuple[tuple[str, Any], ...]) -> Plan:
    if name not in DURATION_DEPENDENT:
        return make_plan(model, mesh, schedule=ScheduleRecipe(name=name, num_model_chunks=chunks), **dict(choices))
    proxy = "zb-v" if chunks == 2 else "zb-h1"
    plan = make_plan(model, mesh, schedule=ScheduleRecipe(name=proxy, num_model_chunks=chunks), **dict(choices))
    made = generate(
        name,
        num_ranks=mesh.pp,
        num_micro_batches=len(plan.micro_batches(0)),
        num_model_chunks=chunks,
        durations=_durations(plan),
    )
    recipe = ScheduleRecipe(name=name, num_model_chunks=chunks, programs=tuple(to_csv(made).splitlines()))
    return make_plan(model, mesh, schedule=recipe, **dict(choices))


def _durations(plan: Plan) -> Durations:
    """F, I and W of every stage and the time of a message, as the datasheet of an A100 predicts them."""
    machine = load_machine("a100-80gb")
    skeleton = Skeleton.of(plan, machine)
    seconds, pricer = unit_seconds(skeleton, machine), Pricer(plan, machine)
    stages: dict[str, list[float]] = {op: [0.0] * plan.num_stages for op in "FIW"}
    for entry in skeleton.entries:
        stage, _, op = entry.label.partition(".")
        if stage.isdigit() and op in stages:
            stages[op][int(stage)] = float(seconds[entry.unit])
    message = plan.micro_batch_size * plan.model.seq_len * plan.model.hidden * 2
    return Durations(
        forward_seconds=stages["F"],
        backward_input_seconds=stages["I"],
        backward_weight_seconds=stages["W"],
        latency_seconds=pricer.message(message, plan.mesh.world_size <= machine.devices_per_host),
    )
