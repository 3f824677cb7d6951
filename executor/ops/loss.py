"""Bindings of the loss over a vocabulary that may be sharded, and of sums of tensors."""

from __future__ import annotations

import numpy as np

from executor.ops.context import Context, MicroBatch, binding, first_index, flat
from planner.program.tasks import Task


@binding("logits_max.forward")
def _logits_max(c: Context, m: MicroBatch, task: Task) -> None:
    logits, largest = flat(m.arrays[task.reads[0]]), m.arrays[task.writes[1]]
    c.kernels.cross_entropy_max(logits, c.value(task, "bias"), largest.reshape(-1))


@binding("exp_sum.forward")
def _exp_sum(c: Context, m: MicroBatch, task: Task) -> None:
    logits, largest = flat(m.arrays[task.reads[0]]), m.arrays[task.reads[1]].reshape(-1)
    stats = flat(m.arrays[task.writes[1]])
    c.kernels.cross_entropy_sum(logits, largest, m.arrays["targets"].reshape(-1), first_index(c, task, "vocab"), stats)


@binding("loss.forward")
def _loss_forward(c: Context, m: MicroBatch, task: Task) -> None:
    stats = flat(m.arrays[task.reads[1]])
    total = c.kernels.cross_entropy_loss(stats, m.arrays["weights"].reshape(-1))
    if c.placement.at.tp == 0:  # every rank of the tensor axis holds the same sum; it counts once
        c.loss += total * c.loss_scale


@binding("loss.backward")
def _loss_backward(c: Context, m: MicroBatch, task: Task) -> None:
    exp, stats = flat(m.arrays[task.reads[0]]), flat(m.arrays[task.reads[1]])
    targets, weights = m.arrays["targets"].reshape(-1), m.arrays["weights"].reshape(-1)
    scale = c.loss_scale * c.gradient_scale
    c.kernels.cross_entropy_backward(exp, stats, targets, first_index(c, task, "vocab"), weights, scale)


@binding("add")
def _add(_: Context, m: MicroBatch, task: Task) -> None:
    into, other = (m.arrays[name] for name in task.reads)
    np.add(into, other, out=into)
