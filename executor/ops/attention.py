"""Bindings of attention: heads split and joined, plain, blocked and ring attention."""

from __future__ import annotations

import math

import numpy as np

from executor.ops.context import Array, Context, Ints, MicroBatch, binding, flat
from executor.reference.masking import Masking
from planner.placement import Placement
from planner.program.tasks import Task
from planner.shard import shared_kv_heads


def _heads(c: Context, task: Task) -> tuple[Ints, Ints, int]:
    """This rank's query heads, the local key-value head that each reads, and how many of those there are."""
    model, axes = c.plan.model, task.attributes["where"]["heads"]
    heads = c.index("heads", axes)
    first, last = shared_kv_heads(model.heads, model.kv_heads, int(heads[0]), int(heads[-1]) + 1)
    kv_index = c.constant(("kv_index", axes), lambda: heads // (model.heads // model.kv_heads) - first)
    return c.positions("heads", axes), kv_index, last - first


@binding("split_heads.forward")
def _split_heads_forward(c: Context, m: MicroBatch, task: Task) -> None:
    heads, _, kv_heads = _heads(c, task)
    cos, sin = c.rotary(task)
    before, rstd = _qk_saved(m, task.writes[3:])
    c.kernels.split_heads_forward(
        m.arrays[task.reads[0]], c.value(task, "split_heads.bias"), c.value(task, "q_gain"), c.value(task, "k_gain"),
        c.plan.model.norm_epsilon, cos, sin, len(heads), kv_heads, before, rstd,
    )  # fmt: skip


@binding("split_heads.backward")
def _split_heads_backward(c: Context, m: MicroBatch, task: Task) -> None:
    heads, _, kv_heads = _heads(c, task)
    packed = m.arrays[task.writes[0]]
    views = _views(packed, len(heads), kv_heads, c.plan.model.head_dim)
    for name, view in zip(task.reads[:3], views, strict=True):
        if not np.may_share_memory(m.arrays[name], packed):  # buffers are apart as wholes: bounds decide
            view[...] = m.arrays[name]
    cos, sin = c.rotary(task)
    before, rstd = _qk_saved(m, task.reads[3:])
    if cos is None and not task.gradients:
        return
    c.kernels.split_heads_backward(
        packed, before, rstd, c.value(task, "q_gain"), c.value(task, "k_gain"), cos, sin, len(heads), kv_heads,
        c.gradient(task, "split_heads.bias"), c.gradient(task, "q_gain"), c.gradient(task, "k_gain"),
    )  # fmt: skip


def _qk_saved(m: MicroBatch, names: tuple[str, ...]) -> tuple[Array | None, Array | None]:
    """Query and key heads before their norm [T, (heads + kv_heads) d] and 1/deviation [T, heads + kv_heads]."""
    if not names:
        return None, None
    before, rstd = (m.arrays[name] for name in names)
    seq, batch, heads, width = before.shape
    return before.reshape(seq * batch, heads * width), flat(rstd)


def _views(packed: Array, heads: int, kv_heads: int, width: int) -> tuple[Array, Array, Array]:
    """Queries, keys and values as [S, B, heads, d] views of packed columns."""
    s, b, _ = packed.shape
    q_end, k_end = heads * width, (heads + kv_heads) * width
    return (
        packed[..., :q_end].reshape(s, b, heads, width),
        packed[..., q_end:k_end].reshape(s, b, kv_heads, width),
        packed[..., k_end:].reshape(s, b, kv_heads, width),
    )


def view_of(packed: Array, selector: str, shape: tuple[int, ...]) -> Array:
    """The q, k or v view of a packed buffer; `shape` is the view's own [S, B, heads, d]."""
    width = shape[-1]
    kv_heads = shape[2]
    if selector == "q":
        return packed[..., : shape[2] * width].reshape(shape)
    end = packed.shape[-1] - (0 if selector == "v" else kv_heads * width)
    return packed[..., end - kv_heads * width : end].reshape(shape)


def _masking(c: Context, m: MicroBatch, task: Task, k_positions: Ints | None = None) -> Masking:
    """Which key each query sees and which probabilities are dropped."""
    heads, kv_index, _ = _heads(c, task)
    attributes = task.attributes
    where = attributes["where"]
    return Masking(
        scale=1.0 / math.sqrt(c.plan.model.head_dim),
        kv_index=kv_index,
        causal=attributes["causal"],
        window=attributes["window"],
        q_positions=c.positions("seq", where["seq"]),
        k_positions=c.positions("seq", where["key_seq"]) if k_positions is None else k_positions,
        rate=c.rate,
        key=c.dropout_key(task.name),
        samples=m.samples,
        head_ids=heads,
    )


def _by_head(c: Context, array: Array) -> Array:
    """Columns [S, B, heads·d] seen as [S, B, heads, d]."""
    width = c.plan.model.head_dim
    return array.reshape(*array.shape[:2], array.shape[-1] // width, width)


@binding("attention_plain.forward")
def _attention_forward(c: Context, m: MicroBatch, task: Task) -> None:
    q, k, v = (m.arrays[name] for name in task.reads)
    out, probabilities = (m.arrays[name] for name in task.writes)
    c.kernels.attention_forward(q, k, v, _masking(c, m, task), probabilities=probabilities, out=_by_head(c, out))


@binding("attention_plain.backward")
def _attention_backward(c: Context, m: MicroBatch, task: Task) -> None:
    dout, q, k, v, probabilities = (m.arrays[name] for name in task.reads)
    dq, dk, dv = (m.arrays[name] for name in task.writes)
    c.kernels.attention_backward(
        _by_head(c, dout), q, k, v, _masking(c, m, task), probabilities=probabilities, dq=dq, dk=dk, dv=dv
    )


@binding("attention_blocked.forward")
def _blocked_forward(c: Context, m: MicroBatch, task: Task) -> None:
    q, k, v = (m.arrays[name] for name in task.reads)
    out, logsumexp = (m.arrays[name] for name in task.writes)
    c.kernels.blocked_attention_forward(q, k, v, _masking(c, m, task), out=_by_head(c, out), logsumexp=logsumexp)


@binding("attention_blocked.backward")
def _blocked_backward(c: Context, m: MicroBatch, task: Task) -> None:
    dout, q, k, v, out, logsumexp = (m.arrays[name] for name in task.reads)
    dq, dk, dv = (m.arrays[name] for name in task.writes)
    c.kernels.blocked_attention_backward(
        _by_head(c, dout), q, k, v, _masking(c, m, task), out=_by_head(c, out), logsumexp=logsumexp,
        dq=dq, dk=dk, dv=dv,
    )  # fmt: skip


def _block_positions(c: Context, task: Task) -> Ints:
    """Global positions of the keys that have come here round the ring."""
    mesh, at = c.plan.mesh, c.placement.at
    origin = (at.cp - task.attributes["step"]) % mesh.cp
    return c.constant(("block", origin), lambda: Placement(c.plan, at._replace(cp=origin)).index("seq", ("cp",)))


@binding("attention_step.forward")
def _step_forward(c: Context, m: MicroBatch, task: Task) -> None:
    q, k, v = (m.arrays[name] for name in task.reads[:3])
    out, running_max, running_sum = (m.arrays[name] for name in task.writes)
    accumulator = _by_head(c, out)
    if task.attributes["step"] == 0:
        c.kernels.block_attention_start(accumulator, running_max, running_sum)
    c.kernels.block_attention_step(
        q, k, v, _masking(c, m, task, _block_positions(c, task)), out_accumulator=accumulator,
        running_max=running_max, running_sum=running_sum,
    )  # fmt: skip


@binding("attention_finish.forward")
def _finish_forward(c: Context, m: MicroBatch, task: Task) -> None:
    out, running_max, running_sum = (m.arrays[name] for name in task.reads)
    c.kernels.block_attention_finish(_by_head(c, out), running_max, running_sum, m.arrays[task.writes[1]])
    if task.writes[0] != task.reads[0]:  # summed in float32 beside an output of 16 bits
        m.arrays[task.writes[0]][...] = out


@binding("attention_delta.backward")
def _delta_backward(c: Context, m: MicroBatch, task: Task) -> None:
    dout, out = (m.arrays[name] for name in task.reads)
    c.kernels.attention_delta(_by_head(c, dout), _by_head(c, out), m.arrays[task.writes[0]])


@binding("attention_step.backward")
def _step_backward(c: Context, m: MicroBatch, task: Task) -> None:
    dout, q, k, v, logsumexp, delta = (m.arrays[name] for name in task.reads[:6])
    dq, dk, dv = (m.arrays[name] for name in task.writes)
    if task.attributes["step"] == 0:
        for gradient in (dq, dk, dv):
            gradient[...] = 0
    c.kernels.block_attention_step_backward(
        _by_head(c, dout), q, k, v, _masking(c, m, task, _block_positions(c, task)), logsumexp=logsumexp,
        delta=delta, dq=dq, dk=dk, dv=dv,
    )  # fmt: skip
