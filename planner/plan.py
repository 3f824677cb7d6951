"""Plan: one complete, validated decision about how to train a model on a mesh; JSON in and out."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import msgspec

from planner.admissible import ATTENTION_ON_CP, ContextKind, check_collectives, check_layouts, distinct_operators
from planner.errors import PlanError
from planner.files import SCHEMA, read_json, write_whole
from planner.graph import Operator
from planner.layout import AXES
from planner.machine import Transport
from planner.mesh import Mesh
from planner.model import ModelSpec
from planner.schedule import check, from_csv, model_chunks
from planner.shard import split_evenly, zigzag_sizes

MOST_THREADS = 2**12
MOST_MICRO_BATCHES = 2**16  # of a replica: a schedule has instructions for each
MOST_ELEMENTS = 2**56  # of a tensor: 64 bits count its bytes, and those of a few together

Recompute = Literal["none", "selective", "full"]
Precision = Literal["float64", "float32", "tf32", "float16", "bfloat16", "fp8"]


class Training(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How each step updates the parameters."""

    optimizer: Literal["adamw", "sgd"] = "adamw"
    learning_rate: float = 1e-3
    learning_rate_schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = 0
    total_steps: int = 1000  # where a linear or cosine schedule reaches zero
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    weight_decay: float = 0.01
    dropout: float = 0.1
    clip_norm: float | None = None
    precision: Precision = "float32"
    seed: int = 0
    threads_per_rank: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.dropout < 1:
            raise PlanError(f"dropout={self.dropout} is not a probability below 1; use 0 <= dropout < 1")
        if self.learning_rate < 0:
            raise PlanError(f"lr={self.learning_rate} is negative; use lr>=0")
        if self.clip_norm is not None and self.clip_norm <= 0:
            raise PlanError(f"clip-norm={self.clip_norm} is not positive; leave it out for no clipping")
        if not 1 <= self.threads_per_rank <= MOST_THREADS:
            raise PlanError(f"threads-per-rank={self.threads_per_rank}; use at least 1 and at most {MOST_THREADS}")
        for name, beta in (("beta1", self.beta1), ("beta2", self.beta2)):
            if not 0 <= beta < 1:
                raise PlanError(f"{name}={beta} forgets nothing or never settles; use 0 <= {name} < 1")
        if self.epsilon <= 0 or self.weight_decay < 0:
            raise PlanError(
                f"epsilon={self.epsilon}, weight_decay={self.weight_decay}; use epsilon > 0 and weight_decay >= 0"
            )
        if self.warmup_steps < 0 or self.total_steps < 1:
            raise PlanError(
                f"warmup_steps={self.warmup_steps}, total_steps={self.total_steps}; use warmup >= 0 and total >= 1"
            )


class ScheduleRecipe(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Name of the generator; explicit instructions (CSV rows, one per pipeline rank) where it depends on durations."""

    name: str = "1f1b"
    num_model_chunks: int = 1
    programs: tuple[str, ...] | None = None


class Parts(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Explicit part sizes of every split dimension, in rank order along its axis."""

    batch: tuple[int, ...]  # sequences per step of each replica (dp)
    seq: tuple[int, ...]  # positions of each context-parallel rank (cp)
    heads: tuple[int, ...]  # query heads of each tensor-parallel rank (tp)
    ffn: tuple[int, ...]
    vocab: tuple[int, ...]


class Plan(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything the executor needs; built by `make_plan`, checked again whenever it is loaded."""

    schema: int = SCHEMA
    kind: Literal["plan"] = "plan"
    version: str = ""
    model: ModelSpec
    mesh: Mesh
    stage_layers: tuple[int, ...]
    schedule: ScheduleRecipe
    global_batch_size: int
    micro_batch_size: int
    sequence_parallel: bool = False
    cp_kind: ContextKind = "allgather"
    recompute: Recompute = "none"
    zero_stage: Literal[0, 1, 2, 3] = 0
    attention: Literal["plain", "blocked"] = "plain"
    layouts: dict[str, dict[str, str]]
    parts: Parts
    seq_order: Literal["contiguous", "zigzag"] = "contiguous"
    overlap_gradients: bool = False
    collectives: dict[str, str] = {}
    transport: Transport | Literal["mpi"] = "host"  # "mpi" is how files of old say "host"
    forward_only: bool = False
    training: Training = Training()

    def __post_init__(self) -> None:
        if self.transport == "mpi":
            msgspec.structs.force_setattr(self, "transport", "host")
        _check_sizes(self)
        _check_parts(self)
        _check_choices(self)
        _check_schedule(self)
        sizes = {axis: self.mesh.size(axis) for axis in AXES}
        check_layouts(self.model, sizes, self.layouts, self.cp_kind)
        check_collectives(self.collectives)

    @property
    def num_stages(self) -> int:
        """Pipeline stages, pp · num_model_chunks."""
        return self.mesh.pp * self.schedule.num_model_chunks

    @property
    def hash(self) -> str:
        """Content hash that predictions and measurements carry; the writing version does not enter it.

        The transport `host` enters under its old name, so that files written before the others keep their hash.
        """
        fields = msgspec.to_builtins(self) | {"version": ""}
        if self.transport == "host":
            fields["transport"] = "mpi"
        content = msgspec.json.encode(fields, order="sorted")
        return hashlib.sha256(content).hexdigest()[:16]

    def micro_batches(self, replica: int) -> tuple[int, ...]:
        """Sizes of the micro-batches of one replica; only the last may be smaller.

        ZeRO 2 and 3 have collectives over the replicas in every micro-batch, so that all replicas need as many: those
        with fewer take part with empty ones.
        """
        full, rest = divmod(self.parts.batch[replica], self.micro_batch_size)
        sizes = (self.micro_batch_size,) * full + ((rest,) if rest else ())
        if self.zero_stage < 2:
            return sizes
        return sizes + (0,) * (-(-max(self.parts.batch) // self.micro_batch_size) - len(sizes))


def _at_most(what: str, value: int, limit: int, of: str, remedy: str) -> None:
    if value > limit:
        raise PlanError(f"{what}={value} exceeds the {limit} {of}; {remedy}")


def _check_sizes(plan: Plan) -> None:
    model, mesh = plan.model, plan.mesh
    if plan.schema != SCHEMA:
        raise PlanError(f"plan schema {plan.schema} is not {SCHEMA}, the one this version reads; write the plan again")
    _at_most("tp", mesh.tp, model.heads, "attention heads", f"use tp<={model.heads} or put the factor on dp, cp or pp")
    _at_most("tp", mesh.tp, model.ffn_hidden, "feed-forward units", f"use tp<={model.ffn_hidden}")
    _at_most("tp", mesh.tp, model.vocab, "vocabulary entries", f"use tp<={model.vocab}")
    _at_most("stages", plan.num_stages, model.layers + 2, "blocks", "use a smaller pp or fewer model chunks")
    _at_most(
        "dp", mesh.dp, plan.global_batch_size, "sequences of the global batch",
        f"use dp<={plan.global_batch_size} or a larger --global-batch-size",
    )  # fmt: skip
    chunks = 2 * mesh.cp if plan.seq_order == "zigzag" else mesh.cp
    if plan.sequence_parallel:
        chunks = max(chunks, mesh.cp * mesh.tp)
    _at_most("sequence parts", chunks, model.seq_len, "positions", "use a smaller cp or tp, or a longer sequence")
    if plan.micro_batch_size < 1 or plan.global_batch_size < 1:
        raise PlanError(
            f"batch sizes {plan.global_batch_size} and {plan.micro_batch_size} must be positive; use at least 1"
        )
    widest = max(model.vocab, model.ffn_hidden, model.hidden, model.query_size, model.heads * model.seq_len)
    _at_most(
        "elements of a tensor", plan.micro_batch_size * model.seq_len * widest, MOST_ELEMENTS, "that can be counted",
        "use a smaller micro-batch or model",
    )  # fmt: skip
    # The embedding stands on the first stage and the head on the last, so these may be stages without layers.
    inner = plan.stage_layers[1:-1] if plan.num_stages > 1 else plan.stage_layers
    negative = min(plan.stage_layers, default=-1) < 0
    if len(plan.stage_layers) != plan.num_stages or negative or min(inner, default=1) < 1:
        raise PlanError(
            f"stage layers {plan.stage_layers} do not give each of the {plan.num_stages} stages at least one layer; "
            f"name {plan.num_stages} positive counts (the first and the last may be 0)"
        )
    if sum(plan.stage_layers) != model.layers:
        raise PlanError(
            f"stage layers {plan.stage_layers} add up to {sum(plan.stage_layers)}, the model has {model.layers}; "
            "correct the counts"
        )


def _check_parts(plan: Plan) -> None:
    model, mesh = plan.model, plan.mesh
    expected = {
        "batch": (mesh.dp, plan.global_batch_size),
        "seq": (mesh.cp, model.seq_len),
        "heads": (mesh.tp, model.heads),
        "ffn": (mesh.tp, model.ffn_hidden),
        "vocab": (mesh.tp, model.vocab),
    }
    for name, (count, total) in expected.items():
        sizes: tuple[int, ...] = getattr(plan.parts, name)
        if len(sizes) != count or sum(sizes) != total or min(sizes) < 1:
            raise PlanError(
                f"parts.{name}={list(sizes)} do not split {total} into {count} positive parts; "
                f"for example {list(split_evenly(total, count))}"
            )
    _at_most(
        "micro-batches", -(-max(plan.parts.batch) // plan.micro_batch_size), MOST_MICRO_BATCHES,
        "of a replica that a schedule may have", "use a larger --micro-batch-size",
    )  # fmt: skip
    on_tp = any(chosen.get("tp") == "seq" for chosen in plan.layouts.values())
    if on_tp and min(plan.parts.seq) < mesh.tp:
        raise PlanError(
            f"parts.seq={list(plan.parts.seq)} leave a rank fewer positions than tp={mesh.tp} splits them into; "
            f"use parts of at least {mesh.tp} positions"
        )
    if plan.seq_order == "zigzag" and plan.parts.seq != zigzag_sizes(model.seq_len, mesh.cp):
        raise PlanError(
            f"parts.seq={list(plan.parts.seq)} are not the zig-zag parts; "
            f"use {list(zigzag_sizes(model.seq_len, mesh.cp))} or seq_order 'contiguous'"
        )


def _check_choices(plan: Plan) -> None:
    model, mesh = plan.model, plan.mesh
    if plan.cp_kind == "ulysses" and mesh.cp > 1:
        narrowest = min(plan.parts.heads)
        _at_most("cp", mesh.cp, narrowest, f"heads that tp={mesh.tp} leaves a rank", "use cp_kind allgather or ring")
        if model.kv_heads % (mesh.tp * mesh.cp):
            raise PlanError(
                f"cp_kind ulysses cannot split {model.kv_heads} key-value heads over tp·cp={mesh.tp * mesh.cp} ranks; "
                "use cp_kind allgather or ring"
            )
    if plan.sequence_parallel and mesh.tp == 1:
        raise PlanError("sequence_parallel splits over the tensor axis and tp=1; use tp>=2 or leave it out")
    if plan.forward_only and (plan.zero_stage or plan.recompute != "none"):
        raise PlanError("a forward-only plan has no gradients to shard or recompute; use zero 0 and recompute none")
    if plan.zero_stage and mesh.dp * mesh.cp == 1:
        raise PlanError(f"zero={plan.zero_stage} shards over data parallel ranks and dp·cp=1; use dp>=2 or zero 0")
    if plan.attention == "blocked" and plan.cp_kind == "ring" and mesh.cp > 1:
        raise PlanError("ring attention is already blocked; use attention 'plain' with cp_kind ring")


def _check_schedule(plan: Plan) -> None:
    """The recipe is one that can be generated, or its explicit instructions are of this mesh and can run."""
    recipe, mesh = plan.schedule, plan.mesh
    if recipe.programs is None:
        chunks = model_chunks(recipe.name)
        if chunks not in (None, recipe.num_model_chunks):
            raise PlanError(
                f"{recipe.name} has {chunks} model chunk(s) per rank, not {recipe.num_model_chunks}; "
                f"use num_model_chunks={chunks} or another schedule"
            )
        return
    explicit = from_csv("\n".join(recipe.programs), name=recipe.name)
    if (explicit.num_ranks, explicit.num_stages) != (mesh.pp, plan.num_stages):
        raise PlanError(
            f"schedule.programs are of {explicit.num_ranks} ranks and {explicit.num_stages} stages, the plan has "
            f"pp={mesh.pp} and {plan.num_stages}; write the plan again with the schedule"
        )
    counts = {len(plan.micro_batches(plan.parts.batch.index(size))) for size in set(plan.parts.batch)}
    if counts != {explicit.num_micro_batches}:
        raise PlanError(
            f"schedule.programs are of {explicit.num_micro_batches} micro-batches, and replicas have "
            f"{' or '.join(map(str, sorted(counts)))}; write the plan again with the schedule"
        )
    check(explicit, forward_only=plan.forward_only)


TENSOR_SIGNATURES = {
    "embedding.tokens": "vocab",
    "layer.qkv": "column",
    "layer.split_heads": "heads",
    "layer.attention": "heads",
    "layer.attention_out": "row",
    "layer.ffn_in": "column",
    "layer.activation": "ffn",
    "layer.ffn_out": "row",
    "head.vocab": "column",
    "head.logits_max": "vocab",
    "head.exp_sum": "vocab",
    "head.loss": "vocab",
}
"""Megatron's tensor-parallel choice (Shoeybi et al. 2019); every other operator works token by token."""


def standard_layouts(
    model_operators: Iterable[Operator], *, sequence_parallel: bool, cp_kind: ContextKind
) -> dict[str, dict[str, str]]:
    """The field's usual signature of each operator on each axis; `planner.search.suggest` may find others."""
    layouts: dict[str, dict[str, str]] = {}
    for operator in model_operators:
        context = ATTENTION_ON_CP[cp_kind] if operator.kind == "attention" else "seq"
        tensor = TENSOR_SIGNATURES.get(operator.role, "seq" if sequence_parallel else "replicate")
        layouts[operator.role] = {"dp": "batch", "cp": context, "tp": tensor}
    return layouts


def make_plan(
    model: ModelSpec,
    mesh: Mesh,
    *,
    global_batch_size: int,
    micro_batch_size: int,
    schedule: ScheduleRecipe | None = None,
    stage_layers: tuple[int, ...] | None = None,
    sequence_parallel: bool = False,
    cp_kind: ContextKind = "allgather",
    parts: dict[str, tuple[int, ...]] | None = None,
    layouts: dict[str, dict[str, str]] | None = None,
    **choices: Any,
) -> Plan:
    """A plan with every size made explicit: even parts, the usual layouts, layers split evenly over stages.

    Raises:
        PlanError: the combination cannot be carried out; the message names value, limit and remedy.
    """
    schedule = schedule or ScheduleRecipe()
    stages = mesh.pp * schedule.num_model_chunks
    for what, count, limit, of, remedy in (
        ("dp", mesh.dp, global_batch_size, "sequences of the global batch", "use a larger --global-batch-size"),
        ("tp", mesh.tp, model.heads, "attention heads", f"use tp<={model.heads} or put the factor on dp, cp or pp"),
        ("cp", mesh.cp, model.seq_len, "positions", "use a smaller cp"),
        ("stages", 0 if stage_layers else stages, model.layers, "layers", "use a smaller pp or fewer model chunks"),
    ):
        _at_most(what, count, limit, of, remedy)
    zigzag = model.causal and mesh.cp > 1 and cp_kind != "ulysses" and model.seq_len >= 2 * mesh.cp
    even = {
        "batch": split_evenly(global_batch_size, mesh.dp),
        "seq": zigzag_sizes(model.seq_len, mesh.cp) if zigzag else split_evenly(model.seq_len, mesh.cp),
        "heads": split_evenly(model.heads, mesh.tp),
        "ffn": split_evenly(model.ffn_hidden, mesh.tp),
        "vocab": split_evenly(model.vocab, mesh.tp),
    }
    usual = standard_layouts(distinct_operators(model), sequence_parallel=sequence_parallel, cp_kind=cp_kind)
    return Plan(
        version=version("meshwright"),
        model=model,
        mesh=mesh,
        stage_layers=stage_layers or split_evenly(model.layers, stages),
        schedule=schedule,
        global_batch_size=global_batch_size,
        micro_batch_size=micro_batch_size,
        sequence_parallel=sequence_parallel,
        cp_kind=cp_kind,
        layouts={role: chosen | (layouts or {}).get(role, {}) for role, chosen in usual.items()},
        parts=Parts(**(even | (parts or {}))),
        seq_order="zigzag" if zigzag else "contiguous",
        **choices,
    )


def dump_plan(plan: Plan, path: Path) -> None:
    """Write a plan as indented JSON, whole or not at all."""
    write_whole(path, msgspec.json.format(msgspec.json.encode(plan), indent=2))


def load_plan(path: Path) -> Plan:
    """Read and check a plan.

    Raises:
        DataError: the file is missing, truncated, of another kind or has unknown or mistyped fields.
        PlanError: the plan is well formed and cannot be carried out.
    """
    return read_json(path, Plan, "plan")
