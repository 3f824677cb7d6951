"""Each task kind bound to its kernel: fetch arrays, index data and dropout by global position, call the kernel.

A binding is a function of the rank's step context and one task. It allocates nothing; the runtime has made room for
what the task writes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from executor import kernels
from executor.random import derive_key
from executor.state import UnitState
from planner.placement import Placement
from planner.plan import Plan
from planner.program.tasks import Task
from planner.shard import shared_kv_heads

Array = NDArray[Any]
Ints = NDArray[np.int64]


@dataclass
class MicroBatch:
    """Arrays of one micro-batch on one stage, by buffer name, and the blocks that hold them, by root."""

    samples: Ints  # indices in the step's global batch
    batch: int
    arrays: dict[str, Array] = field(default_factory=dict)
    blocks: dict[str, Any] = field(default_factory=dict)


@dataclass
class Context:
    """What the bindings of one rank share."""

    plan: Plan
    placement: Placement
    units: dict[str, UnitState]  # by parameter name
    dtype: np.dtype[Any]
    ends: tuple[int, int]  # pipeline ranks of the first and the last stage
    step: int = 0
    loss_scale: float = 0.0  # 1 / number of counted tokens in the global batch
    loss: float = 0.0
    keys: dict[tuple[int, str], int] = field(default_factory=dict)
    _index: dict[tuple[str, tuple[str, ...]], Ints] = field(default_factory=dict)
    _rotary: dict[tuple[float, tuple[str, ...]], tuple[Array, Array]] = field(default_factory=dict)

    def index(self, unit: str, axes: tuple[str, ...]) -> Ints:
        """Global indices of this rank's part of a dimension."""
        found = self._index.get((unit, axes))
        if found is None:
            found = self._index[unit, axes] = self.placement.index(unit, axes)
        return found

    def rows(self, task: Task) -> Ints:
        """Global positions of the rows that a task works on."""
        return self.index("seq", task.attributes["where"]["seq"])

    def dropout_key(self, name: str) -> int:
        """Key of an operator's dropout mask in this step."""
        key = self.keys.get((self.step, name))
        if key is None:
            if self.keys and next(iter(self.keys))[0] != self.step:
                self.keys.clear()
            key = self.keys[self.step, name] = derive_key(self.plan.training.seed, "dropout", self.step, name)
        return key

    @property
    def rate(self) -> float:
        """Dropout rate; evaluation keeps everything."""
        return 0.0 if self.plan.forward_only else self.plan.training.dropout

    def value(self, task: Task, suffix: str) -> Array | None:
        """The task's parameter with this last name, or None."""
        for name in task.parameters:
            if name.endswith(suffix):
                unit = self.units[name]
                return unit.view(unit.whole, unit.slots[name])
        return None

    def need(self, task: Task, suffix: str) -> Array:
        """The same where the operator always has one."""
        value = self.value(task, suffix)
        assert value is not None, f"{task.key} has no parameter {suffix}"
        return value

    def gradient(self, task: Task, suffix: str) -> Array | None:
        """A gradient that the kernel adds to; zeroed before its first use in the step."""
        for name in task.gradients:
            if name.endswith(suffix):
                array, held = self.units[name].gradient_of(name)
                if not held:
                    array[...] = 0
                return array
        return None

    def rotary(self, task: Task) -> tuple[Array | None, Array | None]:
        """Cosines and sines [S, head_dim/2] of this rank's positions (Su et al. 2021, arXiv:2104.09864)."""
        theta = task.attributes["theta"]
        if theta is None:
            return None, None
        axes = task.attributes["where"]["seq"]
        if (theta, axes) not in self._rotary:
            half = self.plan.model.head_dim // 2
            angles = np.outer(self.rows(task), theta ** (-np.arange(half) / half))
            self._rotary[theta, axes] = (np.cos(angles).astype(self.dtype), np.sin(angles).astype(self.dtype))
        return self._rotary[theta, axes]


Binding = Callable[[Context, MicroBatch, Task], None]
BINDINGS: dict[str, Binding] = {}


def binding(kind: str) -> Callable[[Binding], Binding]:
    """Register the binding of a task kind."""

    def register(function: Binding) -> Binding:
        BINDINGS[kind] = function
        return function

    return register


def _flat(array: Array) -> Array:
    """Tokens as rows."""
    return array.reshape(-1, array.shape[-1])


# ---- linear layers ---------------------------------------------------------------------------------------------------


@binding("linear.forward")
def _linear_forward(c: Context, m: MicroBatch, task: Task) -> None:
    x, y = (_flat(m.arrays[name]) for name in (task.reads[0], task.writes[0]))
    kernels.matmul(x, c.need(task, "weight"), y, transpose_b=task.attributes["transposed"])


@binding("linear.backward_input")
def _linear_backward_input(c: Context, m: MicroBatch, task: Task) -> None:
    dy, dx = (_flat(m.arrays[name]) for name in (task.reads[0], task.writes[0]))
    kernels.matmul(
        dy, c.need(task, "weight"), dx,
        transpose_b=not task.attributes["transposed"], accumulate=task.attributes["accumulate"],
    )  # fmt: skip


@binding("linear.backward_weight")
def _linear_backward_weight(c: Context, m: MicroBatch, task: Task) -> None:
    x, dy = (_flat(m.arrays[name]) for name in task.reads)
    gradient, held = c.units[task.gradients[0]].gradient_of(task.gradients[0])
    first, second = (dy, x) if task.attributes["transposed"] else (x, dy)
    kernels.matmul(first, second, gradient, transpose_a=True, accumulate=held)


@binding("bias.backward")
def _bias_backward(c: Context, m: MicroBatch, task: Task) -> None:
    gradient = c.gradient(task, "bias")
    assert gradient is not None
    gradient += _flat(m.arrays[task.reads[0]]).sum(axis=0)


# ---- embedding -------------------------------------------------------------------------------------------------------


def _first(c: Context, task: Task, unit: str) -> int:
    """Global index of the first column or row of this rank's contiguous part."""
    return c.placement.part(unit, task.attributes["where"][unit])[0][0]


@binding("embedding.forward")
def _embedding_forward(c: Context, m: MicroBatch, task: Task) -> None:
    first = _first(c, task, "vocab")
    kernels.embedding_forward(m.arrays["ids"], c.need(task, "weight"), first, m.arrays[task.writes[0]])


@binding("embedding.backward")
def _embedding_backward(c: Context, m: MicroBatch, task: Task) -> None:
    gradient = c.gradient(task, "weight")
    assert gradient is not None
    kernels.embedding_backward(m.arrays["ids"], m.arrays[task.reads[1]], gradient, _first(c, task, "vocab"))


def _type_row(table: Array | None) -> Array | None:
    """Every token has segment 0 in training here."""
    return None if table is None else table[0]


@binding("positions.forward")
def _positions_forward(c: Context, m: MicroBatch, task: Task) -> None:
    x, out = m.arrays[task.reads[0]], m.arrays[task.writes[0]]
    types = _type_row(c.value(task, "types.weight"))
    table, key = c.value(task, "positions.weight"), c.dropout_key(task.name)
    kernels.add_positions_forward(x, c.rows(task), table, types, c.rate, key, m.samples, out)


@binding("positions.backward")
def _positions_backward(c: Context, m: MicroBatch, task: Task) -> None:
    dout, dx = m.arrays[task.reads[0]], m.arrays[task.writes[0]]
    types = _type_row(c.gradient(task, "types.weight"))
    table, key = c.gradient(task, "positions.weight"), c.dropout_key(task.name)
    kernels.add_positions_backward(dout, c.rows(task), table, types, c.rate, key, m.samples, dx)


# ---- norms and residuals ---------------------------------------------------------------------------------------------


def _statistics(c: Context, m: MicroBatch, names: tuple[str, ...]) -> tuple[Array | None, Array]:
    """(mean, rstd) of a norm; RMSNorm has no mean."""
    arrays = [m.arrays[name].reshape(-1) for name in names]
    return (None, arrays[0]) if c.plan.model.norm == "rms" else (arrays[0], arrays[1])


@binding("norm.forward")
def _norm_forward(c: Context, m: MicroBatch, task: Task) -> None:
    out, *saved = task.writes
    mean, rstd = _statistics(c, m, tuple(saved))
    model = c.plan.model
    kernels.norm_forward(
        m.arrays[task.reads[0]], c.need(task, "gain"), c.value(task, ".bias"), model.norm_epsilon,
        m.arrays[out], mean, rstd, model.norm == "rms",
    )  # fmt: skip


@binding("norm.backward")
def _norm_backward(c: Context, m: MicroBatch, task: Task) -> None:
    count = 1 if c.plan.model.norm == "rms" else 2
    dy, x = m.arrays[task.reads[0]], m.arrays[task.reads[1]]
    mean, rstd = _statistics(c, m, task.reads[2 : 2 + count])
    dgain = c.gradient(task, "gain")
    assert dgain is not None
    kernels.norm_backward(
        dy, x, c.need(task, "gain"), mean, rstd, m.arrays[task.writes[0]], dgain, c.gradient(task, ".bias"),
        c.plan.model.norm == "rms", accumulate_dx=task.attributes["accumulate"],
    )  # fmt: skip


@binding("residual.forward")
def _residual_forward(c: Context, m: MicroBatch, task: Task) -> None:
    x, residual = (m.arrays[name] for name in task.reads)
    kernels.dropout_residual_forward(
        x, c.value(task, "bias_in"), residual, c.rate, c.dropout_key(task.name), m.samples, c.rows(task),
        m.arrays[task.writes[0]],
    )  # fmt: skip


@binding("residual.backward")
def _residual_backward(c: Context, m: MicroBatch, task: Task) -> None:
    kernels.dropout_residual_backward(
        m.arrays[task.reads[0]], c.rate, c.dropout_key(task.name), m.samples, c.rows(task),
        m.arrays[task.writes[0]], c.gradient(task, "bias_in"),
    )  # fmt: skip


@binding("residual_norm.forward")
def _residual_norm_forward(c: Context, m: MicroBatch, task: Task) -> None:
    x, residual = (m.arrays[name] for name in task.reads)
    stream, normed, *saved = task.writes
    mean, rstd = _statistics(c, m, tuple(saved))
    model = c.plan.model
    kernels.residual_norm_forward(
        x, c.value(task, "bias_in"), residual, c.rate, c.dropout_key(task.name), m.samples, c.rows(task),
        c.need(task, "gain"), c.value(task, ".bias"), model.norm_epsilon,
        m.arrays[stream], m.arrays[normed], mean, rstd, model.norm == "rms",
    )  # fmt: skip


@binding("residual_norm.backward")
def _residual_norm_backward(c: Context, m: MicroBatch, task: Task) -> None:
    count = 1 if c.plan.model.norm == "rms" else 2
    d_normed, stream = m.arrays[task.reads[0]], m.arrays[task.reads[1]]
    mean, rstd = _statistics(c, m, task.reads[2 : 2 + count])
    d_stream = m.arrays[task.reads[2 + count]] if task.attributes["has_stream_gradient"] else None
    dgain = c.gradient(task, "gain")
    assert dgain is not None
    kernels.residual_norm_backward(
        d_normed, d_stream, stream, c.rate, c.dropout_key(task.name), m.samples, c.rows(task), c.need(task, "gain"),
        mean, rstd, m.arrays[task.writes[0]], m.arrays[task.writes[1]], c.gradient(task, "bias_in"), dgain,
        c.gradient(task, ".bias"), c.plan.model.norm == "rms",
    )  # fmt: skip


# ---- feed-forward ----------------------------------------------------------------------------------------------------


@binding("activation.forward")
def _activation_forward(c: Context, m: MicroBatch, task: Task) -> None:
    out, derivative = task.writes
    kernels.activation_forward(
        m.arrays[task.reads[0]], c.value(task, "bias"), task.attributes["activation"], m.arrays[out],
        m.arrays[derivative],
    )  # fmt: skip


@binding("activation.backward")
def _activation_backward(c: Context, m: MicroBatch, task: Task) -> None:
    dy, derivative = (m.arrays[name] for name in task.reads)
    kernels.activation_backward(dy, derivative, m.arrays[task.writes[0]], c.gradient(task, "bias"))


@binding("gated.forward")
def _gated_forward(c: Context, m: MicroBatch, task: Task) -> None:
    x, out = m.arrays[task.reads[0]], m.arrays[task.writes[0]]
    kernels.gated_forward(x, c.value(task, "bias"), task.attributes["activation"], out)


@binding("gated.backward")
def _gated_backward(c: Context, m: MicroBatch, task: Task) -> None:
    dy, x = (m.arrays[name] for name in task.reads)
    kernels.gated_backward(
        dy, x, c.value(task, "bias"), task.attributes["activation"], m.arrays[task.writes[0]], c.gradient(task, "bias")
    )


# ---- attention -------------------------------------------------------------------------------------------------------


def _heads(c: Context, task: Task) -> tuple[Ints, Ints, int]:
    """This rank's query heads, the local key-value head that each reads, and how many of those there are."""
    model = c.plan.model
    heads = c.index("heads", task.attributes["where"]["heads"])
    first, last = shared_kv_heads(model.heads, model.kv_heads, int(heads[0]), int(heads[-1]) + 1)
    return heads, heads // (model.heads // model.kv_heads) - first, last - first


@binding("split_heads.forward")
def _split_heads_forward(c: Context, m: MicroBatch, task: Task) -> None:
    heads, _, kv_heads = _heads(c, task)
    cos, sin = c.rotary(task)
    before, rstd = _qk_saved(m, task.writes[3:])
    kernels.split_heads_forward(
        m.arrays[task.reads[0]], c.value(task, "split_heads.bias"), c.value(task, "q_gain"), c.value(task, "k_gain"),
        c.plan.model.norm_epsilon, cos, sin, len(heads), kv_heads, before, rstd,
    )  # fmt: skip


@binding("split_heads.backward")
def _split_heads_backward(c: Context, m: MicroBatch, task: Task) -> None:
    heads, _, kv_heads = _heads(c, task)
    packed = m.arrays[task.writes[0]]
    views = _views(packed, len(heads), kv_heads, c.plan.model.head_dim)
    for name, view in zip(task.reads[:3], views, strict=True):
        if not np.shares_memory(m.arrays[name], packed):
            view[...] = m.arrays[name]
    cos, sin = c.rotary(task)
    before, rstd = _qk_saved(m, task.reads[3:])
    if cos is None and not task.gradients:
        return
    kernels.split_heads_backward(
        packed, before, rstd, c.value(task, "q_gain"), c.value(task, "k_gain"), cos, sin, len(heads), kv_heads,
        c.gradient(task, "split_heads.bias"), c.gradient(task, "q_gain"), c.gradient(task, "k_gain"),
    )  # fmt: skip


def _qk_saved(m: MicroBatch, names: tuple[str, ...]) -> tuple[Array | None, Array | None]:
    """Query and key heads before their norm [T, (heads + kv_heads) d] and 1/deviation [T, heads + kv_heads]."""
    if not names:
        return None, None
    before, rstd = (m.arrays[name] for name in names)
    seq, batch, heads, width = before.shape
    return before.reshape(seq * batch, heads * width), _flat(rstd)


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


def _masking(c: Context, m: MicroBatch, task: Task, k_positions: Ints | None = None) -> dict[str, Any]:
    """Arguments that say which key each query sees and which probabilities are dropped."""
    heads, kv_index, _ = _heads(c, task)
    where = task.attributes["where"]
    return {
        "scale": 1.0 / math.sqrt(c.plan.model.head_dim),
        "kv_index": kv_index,
        "causal": task.attributes["causal"],
        "window": task.attributes["window"],
        "q_positions": c.index("seq", where["seq"]),
        "k_positions": c.index("seq", where["key_seq"]) if k_positions is None else k_positions,
        "rate": c.rate,
        "key": c.dropout_key(task.name),
        "samples": m.samples,
        "head_ids": heads,
    }


def _by_head(c: Context, array: Array) -> Array:
    """Columns [S, B, heads·d] seen as [S, B, heads, d]."""
    width = c.plan.model.head_dim
    return array.reshape(*array.shape[:2], array.shape[-1] // width, width)


@binding("attention_plain.forward")
def _attention_forward(c: Context, m: MicroBatch, task: Task) -> None:
    q, k, v = (m.arrays[name] for name in task.reads)
    out, probabilities = (m.arrays[name] for name in task.writes)
    kernels.attention_forward(q, k, v, **_masking(c, m, task), probabilities=probabilities, out=_by_head(c, out))


@binding("attention_plain.backward")
def _attention_backward(c: Context, m: MicroBatch, task: Task) -> None:
    dout, q, k, v, probabilities = (m.arrays[name] for name in task.reads)
    dq, dk, dv = (m.arrays[name] for name in task.writes)
    kernels.attention_backward(
        _by_head(c, dout), q, k, v, **_masking(c, m, task), probabilities=probabilities, dq=dq, dk=dk, dv=dv
    )


@binding("attention_blocked.forward")
def _blocked_forward(c: Context, m: MicroBatch, task: Task) -> None:
    q, k, v = (m.arrays[name] for name in task.reads)
    out, logsumexp = (m.arrays[name] for name in task.writes)
    kernels.blocked_attention_forward(q, k, v, **_masking(c, m, task), out=_by_head(c, out), logsumexp=logsumexp)


@binding("attention_blocked.backward")
def _blocked_backward(c: Context, m: MicroBatch, task: Task) -> None:
    dout, q, k, v, out, logsumexp = (m.arrays[name] for name in task.reads)
    dq, dk, dv = (m.arrays[name] for name in task.writes)
    kernels.blocked_attention_backward(
        _by_head(c, dout), q, k, v, **_masking(c, m, task), out=_by_head(c, out), logsumexp=logsumexp,
        dq=dq, dk=dk, dv=dv,
    )  # fmt: skip


def _block_positions(c: Context, task: Task) -> Ints:
    """Global positions of the keys that have come here round the ring."""
    mesh, at = c.plan.mesh, c.placement.at
    origin = at._replace(cp=(at.cp - task.attributes["step"]) % mesh.cp)
    return Placement(c.plan, origin).index("seq", ("cp",))


@binding("attention_step.forward")
def _step_forward(c: Context, m: MicroBatch, task: Task) -> None:
    q, k, v = (m.arrays[name] for name in task.reads[:3])
    out, running_max, running_sum = (m.arrays[name] for name in task.writes)
    accumulator = _by_head(c, out)
    if task.attributes["step"] == 0:
        kernels.block_attention_start(accumulator, running_max, running_sum)
    kernels.block_attention_step(
        q, k, v, **_masking(c, m, task, _block_positions(c, task)), out_accumulator=accumulator,
        running_max=running_max, running_sum=running_sum,
    )  # fmt: skip


@binding("attention_finish.forward")
def _finish_forward(c: Context, m: MicroBatch, task: Task) -> None:
    out, running_max, running_sum = (m.arrays[name] for name in task.reads)
    kernels.block_attention_finish(_by_head(c, out), running_max, running_sum, m.arrays[task.writes[1]])


@binding("attention_delta.backward")
def _delta_backward(c: Context, m: MicroBatch, task: Task) -> None:
    dout, out = (m.arrays[name] for name in task.reads)
    kernels.attention_delta(_by_head(c, dout), _by_head(c, out), m.arrays[task.writes[0]])


@binding("attention_step.backward")
def _step_backward(c: Context, m: MicroBatch, task: Task) -> None:
    dout, q, k, v, logsumexp, delta = (m.arrays[name] for name in task.reads[:6])
    dq, dk, dv = (m.arrays[name] for name in task.writes)
    if task.attributes["step"] == 0:
        for gradient in (dq, dk, dv):
            gradient[...] = 0
    kernels.block_attention_step_backward(
        _by_head(c, dout), q, k, v, **_masking(c, m, task, _block_positions(c, task)), logsumexp=logsumexp,
        delta=delta, dq=dq, dk=dk, dv=dv,
    )  # fmt: skip


# ---- loss ------------------------------------------------------------------------------------------------------------


@binding("logits_max.forward")
def _logits_max(c: Context, m: MicroBatch, task: Task) -> None:
    logits, largest = _flat(m.arrays[task.reads[0]]), m.arrays[task.writes[1]]
    kernels.cross_entropy_max(logits, c.value(task, "bias"), largest.reshape(-1))


@binding("exp_sum.forward")
def _exp_sum(c: Context, m: MicroBatch, task: Task) -> None:
    logits, largest = _flat(m.arrays[task.reads[0]]), m.arrays[task.reads[1]].reshape(-1)
    stats = _flat(m.arrays[task.writes[1]])
    kernels.cross_entropy_sum(logits, largest, m.arrays["targets"].reshape(-1), _first(c, task, "vocab"), stats)


@binding("loss.forward")
def _loss_forward(c: Context, m: MicroBatch, task: Task) -> None:
    stats = _flat(m.arrays[task.reads[1]])
    total = kernels.cross_entropy_loss(stats, m.arrays["weights"].reshape(-1))
    if c.placement.at.tp == 0:  # every rank of the tensor axis holds the same sum; it counts once
        c.loss += total * c.loss_scale


@binding("loss.backward")
def _loss_backward(c: Context, m: MicroBatch, task: Task) -> None:
    exp, stats = _flat(m.arrays[task.reads[0]]), _flat(m.arrays[task.reads[1]])
    targets, weights = m.arrays["targets"].reshape(-1), m.arrays["weights"].reshape(-1)
    kernels.cross_entropy_backward(exp, stats, targets, _first(c, task, "vocab"), weights, c.loss_scale)


@binding("add")
def _add(_: Context, m: MicroBatch, task: Task) -> None:
    into, other = (m.arrays[name] for name in task.reads)
    np.add(into, other, out=into)
