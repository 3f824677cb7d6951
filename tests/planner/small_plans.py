"""Small models of every family and small plans over the options, for the tests of the planner's core."""

import math
from itertools import product

import msgspec
from hypothesis import strategies as st

from planner.mesh import Mesh
from planner.model import ModelSpec
from planner.plan import ScheduleRecipe, Training, make_plan
from planner.program import lower

BERT = ModelSpec(
    name="small-bert", layers=4, hidden=24, heads=6, kv_heads=6, head_dim=4, ffn_hidden=36, seq_len=16, vocab=50,
    max_positions=20, token_types=2, embedding_norm=True, head_bias=True, head_transform=True,
)  # fmt: skip
GPT = msgspec.structs.replace(
    BERT, name="small-gpt", causal=True, norm_position="pre", final_norm=True, embedding_norm=False, token_types=0,
    head_bias=False, head_transform=False,
)  # fmt: skip
LLAMA = msgspec.structs.replace(
    GPT, name="small-llama", kv_heads=2, gated_ffn=True, activation="silu", norm="rms", norm_bias=False,
    positions="rotary", qkv_bias=False, out_bias=False, ffn_bias=False, tie_embeddings=False,
)  # fmt: skip
QWEN3 = msgspec.structs.replace(LLAMA, name="small-qwen3", qk_norm=True, tie_embeddings=True)
MODELS = {spec.name: spec for spec in (BERT, GPT, LLAMA, QWEN3)}

CHUNKED = ("interleaved", "looped-bfs", "interleaved-zb", "zb-v", "v-half", "v-min", "dualpipe-v")
UNCHUNKED = ("gpipe", "1f1b", "zb-h1", "zb-h2", "zb-1p", "zb-2p")


def plan(spec=BERT, *, schedule="1f1b", chunks=1, batch=8, micro=1, training=None, **choices):
    """A plan of a small model; axes by their names."""
    axes = {axis: choices.pop(axis, 1) for axis in ("pp", "dp", "cp", "tp")}
    return make_plan(
        spec, Mesh(**axes), global_batch_size=batch, micro_batch_size=micro,
        schedule=ScheduleRecipe(name=schedule, num_model_chunks=chunks),
        training=Training(**(training or {})), **choices,
    )  # fmt: skip


def programs(candidate):
    """The programs of all ranks."""
    return [lower(candidate, rank) for rank in range(candidate.mesh.world_size)]


def tasks_of(program):
    """All tasks of a rank, in order."""
    return [task for step in program.steps for task in step.tasks]


MESHES = [
    axes for axes in product((1, 2, 3, 4), (1, 2, 3), (1, 2, 3), (1, 2, 3, 4)) if math.prod(axes) <= 8
]  # pp, dp, cp, tp  # fmt: skip


@st.composite
def plans(draw):
    """Plans over the product of the options on up to eight ranks."""
    pp, dp, cp, tp = draw(st.sampled_from(MESHES))
    chunked = pp > 1 and draw(st.booleans())
    name = draw(st.sampled_from(CHUNKED if chunked else UNCHUNKED)) if pp > 1 else "1f1b"
    layers = draw(st.integers(pp * 2 if chunked else max(pp, 2), 8))
    spec = msgspec.structs.replace(draw(st.sampled_from(list(MODELS.values()))), layers=layers)
    kinds = ["allgather", "ring"] + (["ulysses"] if spec.kv_heads % (tp * cp) == 0 else [])
    cp_kind = draw(st.sampled_from(kinds)) if cp > 1 else "allgather"
    training = {
        "dropout": draw(st.sampled_from([0.0, 0.1])),
        "clip_norm": draw(st.sampled_from([None, 1.0])),
        "optimizer": draw(st.sampled_from(["adamw", "sgd"])),
    }
    return plan(
        spec, schedule=name, chunks=2 if chunked else 1, batch=draw(st.integers(dp, 9)), micro=draw(st.integers(1, 3)),
        pp=pp, dp=dp, cp=cp, tp=tp, cp_kind=cp_kind, training=training,
        sequence_parallel=tp > 1 and draw(st.booleans()),
        recompute=draw(st.sampled_from(["none", "selective", "full"])),
        zero_stage=draw(st.integers(0, 3)) if dp * cp > 1 else 0,
        attention="plain" if cp_kind == "ring" else draw(st.sampled_from(["plain", "blocked"])),
        overlap_gradients=dp * cp > 1 and draw(st.booleans()),
    )  # fmt: skip
