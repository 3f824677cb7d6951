"""What users may ask for: groups of options, each declared once, and the text forms that options take.

Each group is a frozen dataclass whose fields are options (name, type, help, default); a command's options are a class
that joins groups. `planner.resolve` says what they mean. Nothing heavy is imported here, so that help is fast.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any

from planner.errors import MachineError, MeshwrightError, PlanError

TRANSPORTS = ("host", "staged", "cuda-aware", "nccl")
PRECISIONS = ("float64", "float32", "tf32", "float16", "bfloat16", "fp8")
_BYTE_UNITS = {"B": 1, "kB": 1e3, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}
_BYTE_UNITS |= {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


def option(explanation: str, *flags: str, default: Any = None) -> Any:
    """Declare a field as an option; its flag is the field's name with dashes unless `flags` say otherwise."""
    return field(default=default, metadata={"help": explanation, "flags": flags})


def required(explanation: str) -> Any:
    """Declare a field as an option that must be given."""
    return field(metadata={"help": explanation})


def argument(explanation: str, metavar: str = "FILE", *, optional: bool = False) -> Any:
    """Declare a field as a positional argument."""
    metadata = {"help": explanation, "metavar": metavar, "argument": True}
    return field(default=None, metadata=metadata) if optional else field(metadata=metadata)


def one_of(what: str, value: str, allowed: tuple[str, ...], error: type[MeshwrightError] = PlanError) -> str:
    """Return `value` if it is allowed.

    Raises:
        MeshwrightError: of the class given, naming what is allowed.
    """
    if value not in allowed:
        raise error(f"--{what} {value} is not known; use one of {', '.join(allowed)}")
    return value


def parse_bytes(text: str, what: str = "--memory-limit") -> float:
    """Read a size such as `80GiB` or `1.5TB`, in bytes.

    Raises:
        MachineError: no positive number with a unit.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kKMGT]?i?B)", text.strip(), re.ASCII)
    if match is None or match[2] not in _BYTE_UNITS or not 0 < float(match[1]) < math.inf:
        raise MachineError(f"{what} {text!r} is not a positive size with a unit; write it like 80GiB or 16GB")
    return float(match[1]) * _BYTE_UNITS[match[2]]


def parse_fixed(text: str | None) -> dict[str, int | str]:
    """Read `tp=2,pp=4,schedule=1f1b` into a table; numbers become integers, names stay text.

    Raises:
        PlanError: an entry that is not KEY=VALUE, or a key given twice.
    """
    fixed: dict[str, int | str] = {}
    for entry in () if text is None else text.split(","):
        key, equals, value = (part.strip() for part in entry.partition("="))
        if not (key and equals and value):
            raise PlanError(f"--fix has the entry {entry!r}; write KEY=VALUE entries, as in --fix tp=2,pp=4")
        key = key.replace("-", "_")
        if key in fixed:
            raise PlanError(f"--fix names {key} twice; give one value")
        fixed[key] = int(value) if re.fullmatch(r"-?\d+", value, re.ASCII) else value
    return fixed


def parse_counts(text: str, what: str) -> tuple[int, ...]:
    """Read positive counts such as `4,4,3,3`.

    Raises:
        PlanError: an entry that is no positive integer.
    """
    entries = [entry.strip() for entry in text.split(",")]
    for entry in entries:
        if not re.fullmatch(r"[1-9]\d*", entry, re.ASCII):
            raise PlanError(f"{what} {text} has the entry {entry!r}; write positive integers, as in 4,4,3,3")
    return tuple(map(int, entries))


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Which model: a name or a config.json, and sizes that override its own."""

    model: str | None = option("Model name (see 'planner models') or path of a Hugging Face config.json.")
    layers: int | None = option("Transformer layers.")
    hidden: int | None = option("Width of the residual stream.")
    heads: int | None = option("Attention heads.")
    kv_heads: int | None = option("Key/value heads; the attention heads when --hidden or --heads is given.")
    ffn_hidden: int | None = option("Feed-forward width; 4·hidden when --hidden or --heads is given.")
    seq_len: int | None = option("Tokens per sequence.")
    vocab: int | None = option("Vocabulary entries.")
    causal: bool | None = option("Whether a token attends only to those before it.")
    gated_ffn: bool | None = option("Gated feed-forward (SwiGLU and its kin).")
    norm: str | None = option("layer or rms.")
    pre_norm: bool | None = option("Norm before each block, or after it.", "--pre-norm/--post-norm")
    positions: str | None = option("learned or rotary.")
    tie_embeddings: bool | None = option("Whether the output matrix is the token table.")


@dataclass(frozen=True, kw_only=True)
class MachineOptions:
    """On which machine."""

    machine: str | None = option(
        "Profile name (see 'planner machines'), file, or datasheet words such as "
        "'a100-80gb,per-host=8,network=200GB/s'; when left out, the profile measured here, else a generic one."
    )


@dataclass(frozen=True, kw_only=True)
class TransportOptions:
    """How tensors travel between ranks."""

    transport: str | None = option(
        f"{', '.join(TRANSPORTS)}: MPI between CPU ranks; between GPU ranks MPI on copies in host memory, MPI on "
        "device buffers, or NCCL; when left out, the machine's own (host on CPUs, nccl on GPUs)."
    )


@dataclass(frozen=True, kw_only=True)
class HostOptions:
    """Where ranks are started."""

    hosts: str | None = option(
        "Hosts that take equal blocks of ranks, such as node1,node2, or a file with one a line, reached by ssh and "
        "sharing this folder; when left out, this machine."
    )


@dataclass(frozen=True, kw_only=True)
class BatchOptions:
    """How many sequences a step has, and a forward pass."""

    global_batch_size: int | None = option("Sequences per step over all ranks; 2 per worker when left out.")
    micro_batch_size: str = option("Sequences per forward pass, or auto.", default="auto")


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """How each step updates the parameters."""

    optimizer: str = option("adamw or sgd.", default="adamw")
    lr: float = option("Learning rate.", default=1e-3)
    dropout: float = option("Dropout probability.", default=0.1)
    clip_norm: float | None = option("Largest global gradient norm; no clipping when left out.")
    precision: str | None = option(f"{', '.join(PRECISIONS)}; when left out float32, on GPU machines bfloat16.")
    seed: int = option("Seed of parameters, data order and dropout.", default=0)
    threads_per_rank: int | None = option("Threads of each rank; cores over ranks when left out.")


@dataclass(frozen=True, kw_only=True)
class LayoutOptions:
    """A plan by hand: the mesh and every choice on it. Axes not given are 1."""

    dp: int = option("Data-parallel ranks.", default=1)
    tp: int = option("Tensor-parallel ranks.", default=1)
    pp: int = option("Pipeline ranks.", default=1)
    cp: int = option("Context-parallel ranks.", default=1)
    workers: int | None = option("Ranks in all, to be checked against dp·tp·pp·cp.")
    schedule: str = option("Pipeline schedule (see 'planner schedule --help').", default="1f1b")
    schedule_csv: str | None = option("File with the instructions of --schedule custom, one row per pipeline rank.")
    chunks: int | None = option("Stages per pipeline rank; what the schedule asks for when left out.")
    recompute: str = option("none, selective or full.", default="none")
    zero: int = option("ZeRO stage, 0 to 3.", default=0)
    sequence_parallel: bool = option("Shard norms, dropout and residuals over the tensor axis.", default=False)
    cp_kind: str = option("allgather, ring or ulysses.", default="allgather")
    attention: str = option("plain or blocked.", default="plain")
    overlap_gradients: bool = option("Start gradient reductions while the backward pass runs.", default=False)
    stage_layers: str | None = option("Layers of each stage, such as 4,4,3,3; even when left out.")
    forward_only: bool = option("Evaluate only: no backward pass.", default=False)
