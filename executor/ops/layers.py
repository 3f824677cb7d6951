"""Bindings of linear layers, embeddings, norms, residuals and the feed-forward block."""

from __future__ import annotations

from executor.ops.context import Array, Context, MicroBatch, binding, first_index, flat
from planner.program.tasks import Task


@binding("linear.forward")
def _linear_forward(c: Context, m: MicroBatch, task: Task) -> None:
    x, y = (flat(m.arrays[name]) for name in (task.reads[0], task.writes[0]))
    c.kernels.matmul(x, c.need(task, "weight"), y, transpose_b=task.attributes["transposed"])


@binding("linear.backward_input")
def _linear_backward_input(c: Context, m: MicroBatch, task: Task) -> None:
    dy, dx = (flat(m.arrays[name]) for name in (task.reads[0], task.writes[0]))
    c.kernels.matmul(
        dy, c.need(task, "weight"), dx,
        transpose_b=not task.attributes["transposed"], accumulate=task.attributes["accumulate"],
    )  # fmt: skip


@binding("linear.backward_weight")
def _linear_backward_weight(c: Context, m: MicroBatch, task: Task) -> None:
    x, dy = (flat(m.arrays[name]) for name in task.reads)
    gradient, held = c.units[task.gradients[0]].gradient_of(task.gradients[0])
    first, second = (dy, x) if task.attributes["transposed"] else (x, dy)
    c.kernels.matmul(first, second, gradient, transpose_a=True, accumulate=held)


@binding("bias.backward")
def _bias_backward(c: Context, m: MicroBatch, task: Task) -> None:
    gradient = c.gradient(task, "bias")
    assert gradient is not None
    gradient += flat(m.arrays[task.reads[0]]).sum(axis=0, dtype=gradient.dtype)


@binding("embedding.forward")
def _embedding_forward(c: Context, m: MicroBatch, task: Task) -> None:
    first = first_index(c, task, "vocab")
    c.kernels.embedding_forward(m.arrays["ids"], c.need(task, "weight"), first, m.arrays[task.writes[0]])


@binding("embedding.backward")
def _embedding_backward(c: Context, m: MicroBatch, task: Task) -> None:
    gradient = c.gradient(task, "weight")
    assert gradient is not None
    c.kernels.embedding_backward(m.arrays["ids"], m.arrays[task.reads[1]], gradient, first_index(c, task, "vocab"))


def _type_row(table: Array | None) -> Array | None:
    """Every token has segment 0 in training here."""
    return None if table is None else table[0]


@binding("positions.forward")
def _positions_forward(c: Context, m: MicroBatch, task: Task) -> None:
    x, out = m.arrays[task.reads[0]], m.arrays[task.writes[0]]
    types = _type_row(c.value(task, "types.weight"))
    table, key = c.value(task, "positions.weight"), c.dropout_key(task.name)
    c.kernels.add_positions_forward(x, c.rows(task), table, types, c.rate, key, m.samples, out)


@binding("positions.backward")
def _positions_backward(c: Context, m: MicroBatch, task: Task) -> None:
    dout, dx = m.arrays[task.reads[0]], m.arrays[task.writes[0]]
    types = _type_row(c.gradient(task, "types.weight"))
    table, key = c.gradient(task, "positions.weight"), c.dropout_key(task.name)
    c.kernels.add_positions_backward(dout, c.rows(task), table, types, c.rate, key, m.samples, dx)


def _statistics(c: Context, m: MicroBatch, names: tuple[str, ...]) -> tuple[Array | None, Array]:
    """(mean, rstd) of a norm; RMSNorm has no mean."""
    arrays = [m.arrays[name].reshape(-1) for name in names]
    return (None, arrays[0]) if c.plan.model.norm == "rms" else (arrays[0], arrays[1])


@binding("norm.forward")
def _norm_forward(c: Context, m: MicroBatch, task: Task) -> None:
    out, *saved = task.writes
    mean, rstd = _statistics(c, m, tuple(saved))
    model = c.plan.model
    c.kernels.norm_forward(
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
    c.kernels.norm_backward(
        dy, x, c.need(task, "gain"), mean, rstd, m.arrays[task.writes[0]], dgain, c.gradient(task, ".bias"),
        c.plan.model.norm == "rms", accumulate_dx=task.attributes["accumulate"],
    )  # fmt: skip


@binding("residual.forward")
def _residual_forward(c: Context, m: MicroBatch, task: Task) -> None:
    x, residual = (m.arrays[name] for name in task.reads)
    c.kernels.dropout_residual_forward(
        x, c.value(task, "bias_in"), residual, c.rate, c.dropout_key(task.name), m.samples, c.rows(task),
        m.arrays[task.writes[0]],
    )  # fmt: skip


@binding("residual.backward")
def _residual_backward(c: Context, m: MicroBatch, task: Task) -> None:
    c.kernels.dropout_residual_backward(
        m.arrays[task.reads[0]], c.rate, c.dropout_key(task.name), m.samples, c.rows(task),
        m.arrays[task.writes[0]], c.gradient(task, "bias_in"),
    )  # fmt: skip


@binding("residual_norm.forward")
def _residual_norm_forward(c: Context, m: MicroBatch, task: Task) -> None:
    x, residual = (m.arrays[name] for name in task.reads)
    stream, normed, *saved = task.writes
    mean, rstd = _statistics(c, m, tuple(saved))
    model = c.plan.model
    c.kernels.residual_norm_forward(
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
    c.kernels.residual_norm_backward(
        d_normed, d_stream, stream, c.rate, c.dropout_key(task.name), m.samples, c.rows(task), c.need(task, "gain"),
        mean, rstd, m.arrays[task.writes[0]], m.arrays[task.writes[1]], c.gradient(task, "bias_in"), dgain,
        c.gradient(task, ".bias"), c.plan.model.norm == "rms",
    )  # fmt: skip


@binding("activation.forward")
def _activation_forward(c: Context, m: MicroBatch, task: Task) -> None:
    out, derivative = task.writes
    c.kernels.activation_forward(
        m.arrays[task.reads[0]], c.value(task, "bias"), task.attributes["activation"], m.arrays[out],
        m.arrays[derivative],
    )  # fmt: skip


@binding("activation.backward")
def _activation_backward(c: Context, m: MicroBatch, task: Task) -> None:
    dy, derivative = (m.arrays[name] for name in task.reads)
    c.kernels.activation_backward(dy, derivative, m.arrays[task.writes[0]], c.gradient(task, "bias"))


@binding("gated.forward")
def _gated_forward(c: Context, m: MicroBatch, task: Task) -> None:
    x, out = m.arrays[task.reads[0]], m.arrays[task.writes[0]]
    c.kernels.gated_forward(x, c.value(task, "bias"), task.attributes["activation"], out)


@binding("gated.backward")
def _gated_backward(c: Context, m: MicroBatch, task: Task) -> None:
    dy, x = (m.arrays[name] for name in task.reads)
    c.kernels.gated_backward(
        dy, x, c.value(task, "bias"), task.attributes["activation"], m.arrays[task.writes[0]], c.gradient(task, "bias")
    )
