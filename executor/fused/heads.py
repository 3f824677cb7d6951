"""Bias, query/key norm and rotary positions on the packed projection, in place and in one pass."""

from __future__ import annotations

from typing import Any

import numpy as np

from executor.fused.compile import helper, kernel
from executor.fused.norm import normalise_row, normalise_row_backward
from executor.fused.rows import BLOCK_ROWS, add_to, vector_or_empty
from executor.reference.arrays import Floats, as_rows


@helper
def rotate(head: Any, cos: Any, sin: Any, sign: Any, spare: Any) -> None:
    """Rotate one head [d] in place by the angles of its position, or back by them if sign is -1."""
    half = cos.shape[0]
    first, second = head[:half], head[half:]
    for i in range(half):
        spare[i] = first[i] * cos[i] - sign * sin[i] * second[i]
        spare[half + i] = second[i] * cos[i] + sign * sin[i] * first[i]
    for i in range(2 * half):
        head[i] = spare[i]


@kernel("void(T[:, ::1], T[::1], T[::1], T[::1], T, T[:, ::1], T[:, ::1], int64, int64, T[:, ::1], T[:, ::1], int64)")
def _split_heads_forward(
    qkv: Any, bias: Any, q_gain: Any, k_gain: Any, epsilon: Any, cos: Any, sin: Any, heads: Any, kv_heads: Any,
    saved: Any, rstd: Any, batch: Any,
) -> None:  # fmt: skip
    width = qkv.shape[1] // (heads + 2 * kv_heads)
    spare, nothing = np.empty(width, qkv.dtype), np.zeros(width, qkv.dtype)
    for t in range(qkv.shape[0]):
        for j in range(bias.size):
            qkv[t, j] += bias[j]
        for head in range(heads + kv_heads):
            x = qkv[t, head * width : (head + 1) * width]
            if q_gain.size > 0:
                before = saved[t, head * width : (head + 1) * width]
                for j in range(width):
                    before[j] = x[j]
                gain = q_gain if head < heads else k_gain
                rstd[t, head] = normalise_row(before, gain, nothing, epsilon, True, x)[1]
            if cos.shape[0] > 0:
                rotate(x, cos[t // batch], sin[t // batch], qkv.dtype.type(1.0), spare)


def _table_or_empty(table: Floats | None, like: Floats) -> Floats:
    return np.empty((0, 0), like.dtype) if table is None else table


def split_heads_forward(
    qkv: Floats,
    bias: Floats | None,
    q_gain: Floats | None,
    k_gain: Floats | None,
    epsilon: float,
    cos: Floats | None,
    sin: Floats | None,
    heads: int,
    kv_heads: int,
    saved: Floats | None,
    rstd: Floats | None,
) -> None:
    """See `executor.reference.heads.split_heads_forward`."""
    if bias is None and q_gain is None and cos is None:
        return
    gains = (vector_or_empty(q_gain, qkv), vector_or_empty(k_gain, qkv))
    tables = (_table_or_empty(cos, qkv), _table_or_empty(sin, qkv))
    kept = (_table_or_empty(saved, qkv), _table_or_empty(rstd, qkv))
    _split_heads_forward[qkv.dtype](
        as_rows(qkv), vector_or_empty(bias, qkv), *gains, epsilon, *tables, heads, kv_heads, *kept, qkv.shape[1]
    )


@kernel(
    "void(T[:, ::1], T[:, ::1], T[:, ::1], T[::1], T[::1], T[:, ::1], T[:, ::1], int64, int64, T[::1], T[::1], T[::1],"
    " int64)"
)
def _split_heads_backward(
    dqkv: Any, saved: Any, rstd: Any, q_gain: Any, k_gain: Any, cos: Any, sin: Any, heads: Any, kv_heads: Any,
    dbias: Any, dq_gain: Any, dk_gain: Any, batch: Any,
) -> None:  # fmt: skip
    rows, width = dqkv.shape[0], dqkv.shape[1] // (heads + 2 * kv_heads)
    spare, nothing = np.empty(width, dqkv.dtype), np.zeros(width, dqkv.dtype)
    part, part_q, part_k = np.zeros(dbias.size, dqkv.dtype), np.zeros(width, dqkv.dtype), np.zeros(width, dqkv.dtype)
    zero = dqkv.dtype.type(0.0)
    for start in range(0, rows, BLOCK_ROWS):
        for t in range(start, min(start + BLOCK_ROWS, rows)):
            for head in range(heads + kv_heads):
                dx = dqkv[t, head * width : (head + 1) * width]
                if cos.shape[0] > 0:
                    rotate(dx, cos[t // batch], sin[t // batch], dqkv.dtype.type(-1.0), spare)
                if q_gain.size > 0:
                    before = saved[t, head * width : (head + 1) * width]
                    gain, total = (q_gain, part_q) if head < heads else (k_gain, part_k)
                    normalise_row_backward(dx, before, gain, zero, rstd[t, head], True, nothing, spare, total)
                    for j in range(width):
                        dx[j] = spare[j]
            for j in range(part.size):
                part[j] += dqkv[t, j]
        add_to(dbias, part)
        if dq_gain.size > 0:
            add_to(dq_gain, part_q)
            add_to(dk_gain, part_k)


def split_heads_backward(
    dqkv: Floats,
    saved: Floats | None,
    rstd: Floats | None,
    q_gain: Floats | None,
    k_gain: Floats | None,
    cos: Floats | None,
    sin: Floats | None,
    heads: int,
    kv_heads: int,
    dbias: Floats | None,
    dq_gain: Floats | None,
    dk_gain: Floats | None,
) -> None:
    """See `executor.reference.heads.split_heads_backward`."""
    kept = (_table_or_empty(saved, dqkv), _table_or_empty(rstd, dqkv))
    gains = (vector_or_empty(q_gain, dqkv), vector_or_empty(k_gain, dqkv))
    tables = (_table_or_empty(cos, dqkv), _table_or_empty(sin, dqkv))
    totals = (vector_or_empty(dbias, dqkv), vector_or_empty(dq_gain, dqkv), vector_or_empty(dk_gain, dqkv))
    _split_heads_backward[dqkv.dtype](as_rows(dqkv), *kept, *gains, *tables, heads, kv_heads, *totals, dqkv.shape[1])
