"""Plans over the whole product of options, tiny enough to run in a moment: drawn by Hypothesis, and a fixed list."""

from typing import NamedTuple

import numpy as np
from hypothesis import strategies as st

from executor.check import check
from executor.collect import TrainingState, collect
from executor.comm.loopback import run_loopback
from executor.data import Batches
from executor.runtime import Runtime
from planner.errors import PlanError
from planner.mesh import Mesh
from planner.model import ModelSpec
from planner.placement import Placement
from planner.plan import Plan, ScheduleRecipe, Training, make_plan
from planner.program import Program

BERT = {
    "layers": 4, "hidden": 16, "heads": 4, "kv_heads": 4, "head_dim": 4, "ffn_hidden": 22, "seq_len": 12, "vocab": 37,
    "max_positions": 16, "embedding_norm": True, "head_transform": True, "head_bias": True, "token_types": 2,
}  # fmt: skip
GPT = BERT | {
    "norm_position": "pre", "final_norm": True, "causal": True, "embedding_norm": False, "head_transform": False,
    "head_bias": False, "token_types": 0, "activation": "gelu_tanh",
}  # fmt: skip
LLAMA = GPT | {
    "positions": "rotary", "norm": "rms", "norm_bias": False, "gated_ffn": True, "activation": "silu", "kv_heads": 2,
    "qkv_bias": False, "out_bias": False, "ffn_bias": False, "tie_embeddings": False,
}  # fmt: skip
QWEN3 = LLAMA | {"qk_norm": True, "tie_embeddings": True}
MODERNBERT = LLAMA | {
    "causal": False, "kv_heads": 4, "norm": "layer", "embedding_norm": True, "first_attention_norm": False,
    "activation": "gelu", "attention_window": 6, "global_attention_every": 2, "rope_local_theta": 100.0,
    "head_transform": True, "head_transform_bias": False, "head_bias": True, "tie_embeddings": True,
}  # fmt: skip
MODELS = {"bert": BERT, "gpt": GPT, "llama": LLAMA, "qwen3": QWEN3, "modernbert": MODERNBERT}

CHUNKED = ("interleaved", "looped-bfs", "interleaved-zb", "zb-v", "v-half", "v-min", "dualpipe-v")
UNCHUNKED = ("gpipe", "1f1b", "zb-h1", "zb-h2", "zb-1p", "zb-2p")


def model(kind, **changes):
    """A tiny model of a family."""
    return ModelSpec(**(MODELS[kind] | changes))


def plan(spec, *, schedule="1f1b", chunks=1, batch=5, micro=2, training=None, **choices):
    """A plan of a tiny model; dropout and clipping on unless told otherwise."""
    axes = {axis: choices.pop(axis, 1) for axis in ("pp", "dp", "cp", "tp")}
    return make_plan(
        spec, Mesh(**axes), global_batch_size=batch, micro_batch_size=micro,
        schedule=ScheduleRecipe(name=schedule, num_model_chunks=chunks),
        training=Training(**({"clip_norm": 0.5, "precision": "float64"} | (training or {}))), **choices,
    )  # fmt: skip


def run_check(candidate: Plan, dtype="float64", *, synchronous_sends=True):
    """The check's report, through the loopback."""
    return run_loopback(
        candidate.mesh.world_size, lambda comm: check(candidate, comm, dtype), synchronous_sends=synchronous_sends
    )[0]


class Run(NamedTuple):
    """What some steps of training gave, as rank 0 sees it, and each rank's counters, peak and program."""

    losses: list[float]
    state: TrainingState | None
    tallies: list[dict]
    peaks: list[int]
    programs: list[Program]


def set_parameters(runtime: Runtime, value):
    """Overwrite every parameter by value(name, global indices of each dimension)."""
    placement = Placement(runtime.plan, runtime.at)
    for unit in runtime.units.values():
        flat = np.zeros(unit.unit.size, runtime.precision.master)
        for name, slot in unit.slots.items():
            at = np.ix_(*(placement.index(dim, slot.axes) for dim in slot.parameter.dims))
            unit.view(flat, slot)[...] = value(name, at)
        unit.set_parameters(flat)


def train(candidate: Plan, steps=1, *, data="synthetic", synchronous_sends=False, parameters=None):
    """Train through the loopback, from `parameters(name, indices)` if given."""

    def main(comm):
        seed = candidate.training.seed
        batches = Batches(data, candidate.model, candidate.global_batch_size, seed)
        runtime = Runtime(candidate, comm, batches)
        if parameters is not None:
            set_parameters(runtime, parameters)
        comm.counters.reset()
        losses = [runtime.run_step(step).loss for step in range(steps)]
        tallies = comm.counters.snapshot()
        state = None if candidate.forward_only else collect(runtime)
        return losses, state, tallies, runtime.arena.peak_bytes, runtime.program

    ranks = run_loopback(candidate.mesh.world_size, main, synchronous_sends=synchronous_sends)
    losses, state, *_ = ranks[0]
    assert all(rank[0] == losses for rank in ranks), "every rank knows the global loss"
    return Run(losses, state, [r[2] for r in ranks], [r[3] for r in ranks], [r[4] for r in ranks])


def describe(candidate: Plan):
    """The choices that make up a plan, for messages."""
    mesh, recipe = candidate.mesh, candidate.schedule
    return (
        f"{candidate.model.name} pp={mesh.pp} dp={mesh.dp} cp={mesh.cp} tp={mesh.tp} {candidate.cp_kind} "
        f"{candidate.attention} {recipe.name}x{recipe.num_model_chunks} sp={candidate.sequence_parallel} "
        f"zero={candidate.zero_stage} {candidate.recompute} overlap={candidate.overlap_gradients} "
        f"batch={candidate.parts.batch}/{candidate.micro_batch_size}"
    )


MESHES = [
    (pp, dp, cp, tp)
    for pp in (1, 2, 3, 4)
    for dp in (1, 2, 3, 4)
    for cp in (1, 2, 3)
    for tp in (1, 2, 3, 4)
    if 1 < pp * dp * cp * tp <= 8
]


@st.composite
def models(draw):
    """Any member of the five families, its sizes and variants changed."""
    kind = draw(st.sampled_from(sorted(MODELS)))
    heads, kv = draw(st.sampled_from([(4, 4), (4, 2), (4, 1), (6, 3), (5, 5), (6, 1)]))
    changes = {
        "name": kind, "heads": heads, "kv_heads": kv, "layers": draw(st.integers(2, 6)),
        "seq_len": draw(st.integers(8, 13)), "ffn_hidden": draw(st.integers(9, 18)), "vocab": draw(st.integers(11, 29)),
        "tie_embeddings": draw(st.booleans()),
    }  # fmt: skip
    if kind != "modernbert":
        changes["causal"] = draw(st.booleans())
        changes["attention_window"] = draw(st.sampled_from([None, None, 3, 20]))
    if not MODELS[kind].get("gated_ffn"):
        changes["activation"] = draw(st.sampled_from(["gelu", "gelu_tanh", "relu", "silu"]))
    return model(kind, **changes)


@st.composite
def plans(draw):
    """A valid plan on 2 to 8 ranks over every option; draws that make no sense together are thrown away."""
    pp, dp, cp, tp = draw(st.sampled_from(MESHES))
    chunked = pp > 1 and draw(st.booleans())
    name = draw(st.sampled_from(CHUNKED if chunked else UNCHUNKED))
    batch = draw(st.integers(dp, dp + 6))
    training = {
        "dropout": draw(st.sampled_from([0.0, 0.1, 0.3])),
        "clip_norm": draw(st.sampled_from([None, 0.3, 100.0])),
        "optimizer": draw(st.sampled_from(["adamw", "adamw", "sgd"])),
        "seed": draw(st.integers(0, 9)),
    }
    choices = {
        "cp_kind": draw(st.sampled_from(["allgather", "ring", "ulysses"])) if cp > 1 else "allgather",
        "attention": draw(st.sampled_from(["plain", "blocked"])),
        "sequence_parallel": tp > 1 and draw(st.booleans()),
        "zero_stage": draw(st.integers(0, 3)) if dp * cp > 1 else 0,
        "recompute": draw(st.sampled_from(["none", "selective", "full"])),
        "overlap_gradients": draw(st.booleans()),
    }
    try:
        return plan(
            draw(models()), schedule=name, chunks=2 if chunked else 1, batch=batch, micro=draw(st.integers(1, 3)),
            training=training, pp=pp, dp=dp, cp=cp, tp=tp, **choices,
        )  # fmt: skip
    except PlanError:
        return None


def fixed_plans():
    """Forty plans for real MPI, by number of ranks: every option at least twice, in combinations."""
    named = {
        "bert dp2": plan(model("bert"), dp=2),
        "gpt tp2 sequence parallel": plan(model("gpt"), tp=2, sequence_parallel=True, recompute="selective"),
        "llama pp2": plan(model("llama"), pp=2),
        "bert pp2 tied": plan(model("bert"), pp=2, schedule="zb-h1"),
        "gpt cp2 ring": plan(model("gpt"), cp=2, cp_kind="ring"),
        "llama cp2 gathered": plan(model("llama", seq_len=11), cp=2, attention="blocked"),
        "bert cp2 heads for sequence": plan(model("bert"), cp=2, cp_kind="ulysses"),
        "gpt zero 3": plan(model("gpt"), dp=2, zero_stage=3, recompute="full"),
        "modernbert zero 1": plan(model("modernbert"), dp=2, zero_stage=1, overlap_gradients=True),
        "qwen3 dualpipe-v": plan(model("qwen3"), pp=2, schedule="dualpipe-v", chunks=2, batch=9),
        "gpt interleaved": plan(model("gpt"), pp=2, schedule="interleaved", chunks=2, batch=8),
        "bert forward only": plan(model("bert"), pp=2, forward_only=True),
        "llama tp3 uneven heads": plan(model("llama"), tp=3),
        "gpt dp3 uneven batch": plan(model("gpt"), dp=3, zero_stage=2, batch=5, micro=1),
        "bert pp3 uneven layers": plan(model("bert", layers=5), pp=3, stage_layers=(1, 2, 2), schedule="zb-h2"),
        "gpt cp3 ring uneven": plan(model("gpt", seq_len=13), cp=3, cp_kind="ring"),
        "modernbert cp3": plan(model("modernbert", seq_len=13), cp=3, attention="blocked"),
        "gpt window ring": plan(model("gpt", attention_window=4, seq_len=13), cp=3, cp_kind="ring", recompute="full"),
        "bert dp2 tp2": plan(model("bert"), dp=2, tp=2, batch=7),
        "gpt dp2 pp2": plan(model("gpt"), dp=2, pp=2, batch=7, overlap_gradients=True),
        "llama tp4 one kv head": plan(model("llama", kv_heads=1), tp=4, sequence_parallel=True),
        "qwen3 tp2 cp2": plan(model("qwen3"), tp=2, cp=2, cp_kind="ring", sequence_parallel=True),
        "gpt cp2 dp2 zero 2": plan(model("gpt"), cp=2, dp=2, zero_stage=2),
        "bert pp4": plan(model("bert"), pp=4, schedule="gpipe", batch=9),
        "gpt pp2 tp2 zb-v": plan(model("gpt"), pp=2, tp=2, schedule="zb-v", chunks=2, batch=8),
        "llama pp2 cp2 gathered": plan(model("llama"), pp=2, cp=2, attention="blocked", recompute="full"),
        "bert cp2 tp2 heads for sequence": plan(model("bert"), cp=2, tp=2, cp_kind="ulysses"),
        "gpt sgd": plan(model("gpt"), dp=2, tp=2, training={"optimizer": "sgd", "learning_rate": 0.1}),
        "modernbert dp2 pp2 v-half": plan(model("modernbert"), dp=2, pp=2, schedule="v-half", chunks=2, batch=9),
        "gpt zero 3 pipeline": plan(model("gpt"), dp=2, pp=2, zero_stage=3, schedule="zb-h1", batch=7),
        "llama dp3 tp2": plan(model("llama"), dp=3, tp=2, zero_stage=1, batch=7, sequence_parallel=True),
        "bert pp3 tp2": plan(model("bert"), pp=3, tp=2, schedule="zb-1p", batch=8),
        "gpt cp3 tp2": plan(model("gpt"), cp=3, tp=2, cp_kind="ring", attention="plain"),
        "six heads over four": plan(model("gpt", heads=6, kv_heads=3), tp=4),
        "all axes llama": plan(model("llama"), dp=2, cp=2, tp=2, cp_kind="ring", sequence_parallel=True, zero_stage=1),
        "all axes gpt": plan(model("gpt"), pp=2, cp=2, tp=2, sequence_parallel=True, recompute="selective"),
        "all axes bert": plan(model("bert"), pp=2, dp=2, tp=2, zero_stage=2, schedule="interleaved", chunks=2, batch=7),
        "dp8 uneven": plan(model("bert"), dp=8, batch=11, zero_stage=3, micro=1),
        "pp8 v-shape": plan(model("gpt", layers=8), pp=4, tp=2, schedule="v-min", chunks=2, batch=9),
        "eight ranks qwen3": plan(model("qwen3"), pp=2, dp=2, cp=2, cp_kind="ring", schedule="zb-h2", batch=7),
    }  # fmt: skip
    by_size = {}
    for name, candidate in named.items():
        by_size.setdefault(candidate.mesh.world_size, {})[name] = candidate
    return by_size
