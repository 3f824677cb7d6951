"""Attention by tiles of queries and keys that stay in the L2 cache; BLAS for the products, no Sq × Sk matrix."""

from __future__ import annotations

from typing import Any

import numpy as np

from executor.fused.compile import helper, kernel
from executor.fused.dropout import row_key
from executor.fused.maths import exp
from executor.fused.matmul import gemm
from executor.fused.softmax import MASKING, drop, exponentiate, hide, largest_of, masking_arguments
from executor.fused.tiles import (
    TILES,
    add_gradients,
    gather,
    gather_across,
    heads_of_group,
    scatter,
    scratch_for,
    span_of,
    take,
    tile_sizes,
    visits,
    zero_unread,
)
from executor.reference import blocked as reference
from executor.reference.arrays import Floats
from executor.reference.masking import Masking

OPEN_TILE = (512, 256)
"""Queries and keys of a tile: the shortest side is the inner dimension of a product, and BLAS wants that long."""

MASKED_TILE = (256, 256)
"""A mask hides whole tiles, and the more the smaller they are; below 256 the products slow down by more than that."""

block_attention_start = reference.block_attention_start  # three fills

_QKV = "T[:, :, :, :], T[:, :, :, :], T[:, :, :, :]"


@helper
def coverage(q_positions: Any, k_positions: Any, back: Any, ahead: Any) -> Any:
    """Whether a tile is wholly hidden (0), cut by the mask (1) or wholly visible (2)."""
    nearest, farthest = np.int64(k_positions.min()), np.int64(k_positions.max())
    first, last = np.int64(q_positions.min()), np.int64(q_positions.max())
    if nearest - last > ahead or first - farthest > back:
        return 0
    return 2 if farthest - first <= ahead and last - nearest <= back else 1


@helper
def normalise(row: Any, largest: Any, total: Any) -> Any:
    """Divide a query's weighted values [d] by their weights' sum; return logsumexp, -inf if it saw no key."""
    real = row.dtype.type
    if total == 0:
        return real(-np.inf)
    inverse = real(1.0) / total
    for c in range(row.shape[0]):
        row[c] *= inverse
    return largest + np.log(total)


@helper
def attend_rows(
    scores: Any, last: Any, cover: Any, out: Any, running_max: Any, running_sum: Any, q_positions: Any, columns: Any,
    reach: Any, dropout: Any,
) -> None:  # fmt: skip
    """Replace scores of queries and a tile of keys by (dropped) weights, in the array `last`; rescale what they had."""
    real = out.dtype.type
    threshold, keep_scale, key, sample, head_id = dropout
    for i in range(q_positions.shape[0]):
        row = scores[0, i, : columns.shape[0]]
        if cover == 1:
            hide(row, q_positions[i], columns, *reach)
        before = running_max[i]
        largest = max(before, largest_of(row))
        if largest > before:
            rescale = exp(before - largest) if before != real(-np.inf) else real(0.0)
            running_max[i] = largest
            running_sum[i] *= rescale
            for c in range(out.shape[1]):
                out[i, c] *= rescale
        running_sum[i] += exponentiate(row, largest)
        if threshold > 0:
            row_hash = row_key(key, sample, q_positions[i], head_id)
            drop(row, scores[last, i, : columns.shape[0]], row_hash, columns, threshold, keep_scale)


@kernel(f"void({_QKV}, {MASKING}, T[:, :, :, :], T[:, :, ::1], T[:, :, ::1], boolean, {TILES})")
def _step(
    q: Any, k: Any, v: Any, scale: Any, kv_index: Any, q_positions: Any, k_positions: Any, back: Any, ahead: Any,
    threshold: Any, keep_scale: Any, key: Any, samples: Any, head_ids: Any, out: Any, running_max: Any,
    running_sum: Any, whole: Any, query_tile: Any, key_tile: Any, group: Any, buffer: Any,
) -> None:  # fmt: skip
    real = q.dtype.type
    queries, keys, heads, width = q.shape[0], k.shape[0], q.shape[2], q.shape[3]
    one, last, fresh = real(1.0), 1 if threshold > 0 else 0, np.zeros(heads, np.bool_)
    for b in range(q.shape[1]):
        for h0 in range(0, heads, group):
            h1 = min(h0 + group, heads)
            s0, s1 = span_of(kv_index[h0:h1])
            q_rows, rest = take(buffer, h1 - h0, queries, width)
            out_rows, rest = take(rest, h1 - h0, queries, width)
            v_rows, rest = take(rest, s1 - s0, key_tile, width)
            k_across, rest = take(rest, s1 - s0, width, key_tile)
            scores, _ = take(rest, 2, query_tile, key_tile)
            gather(q[:, b, h0:h1], q_rows)
            if whole:
                out_rows[:] = 0
                running_max[b, h0:h1] = -np.inf
                running_sum[b, h0:h1] = 0
            else:
                gather(out[:, b, h0:h1], out_rows)
            for j0 in range(0, keys, key_tile):
                j1 = min(j0 + key_tile, keys)
                columns = k_positions[j0:j1]
                gather(v[j0:j1, b, s0:s1], v_rows)
                gather_across(k[j0:j1, b, s0:s1], k_across, key_tile)
                for head, i0, i1 in visits(h0, h1, queries, query_tile):
                    source = kv_index[head] - s0
                    cover = coverage(q_positions[i0:i1], columns, back, ahead)
                    if cover == 0:
                        continue
                    q_tile, out_tile = q_rows[head - h0, i0:i1, :width], out_rows[head - h0, i0:i1, :width]
                    k_tile = k_across[source, :, : j1 - j0]
                    gemm(real(scale), q_tile, False, k_tile, False, real(0.0), scores[0, : i1 - i0, : j1 - j0])
                    attend_rows(
                        scores, last, cover, out_tile, running_max[b, head, i0:i1], running_sum[b, head, i0:i1],
                        q_positions[i0:i1], columns, (back, ahead),
                        (threshold, keep_scale, key, samples[b], head_ids[head]),
                    )  # fmt: skip
                    weights, v_tile = scores[last, : i1 - i0, : j1 - j0], v_rows[source, : j1 - j0, :width]
                    gemm(one, weights, False, v_tile, False, one, out_tile)
            if whole:
                for head in range(h0, h1):
                    for i in range(queries):
                        row, largest = out_rows[head - h0, i, :width], running_max[b, head, i]
                        running_max[b, head, i] = normalise(row, largest, running_sum[b, head, i])
            scatter(out_rows, out[:, b, h0:h1], fresh[h0:h1])


def _attend(
    q: Floats, k: Floats, v: Floats, masking: Masking, out: Floats, running_max: Floats, running_sum: Floats,
    whole: bool,
) -> None:  # fmt: skip
    """One step, or with `whole` all there is to do: the state is prepared and finished, running_max holds logsumexp."""
    queries, keys, width = q.shape[0], k.shape[0], q.shape[3]
    query_tile, key_tile = tile_sizes(queries, keys, width, MASKED_TILE if masking.limited else OPEN_TILE)
    group, span = heads_of_group(masking.kv_index, 2 * (queries + key_tile) * width * q.itemsize)
    buffer = scratch_for(
        q.dtype, *[(group, queries, width)] * 2, (span, key_tile, width), (span, width, key_tile),
        (2, query_tile, key_tile),
    )  # fmt: skip
    tiles = (query_tile, key_tile, group, buffer)
    _step[q.dtype](q, k, v, *masking_arguments(masking), out, running_max, running_sum, whole, *tiles)


def block_attention_step(
    q: Floats, k: Floats, v: Floats, masking: Masking, out_accumulator: Floats, running_max: Floats, running_sum: Floats
) -> None:
    """See `executor.reference.blocked.block_attention_step`."""
    _attend(q, k, v, masking, out_accumulator, running_max, running_sum, whole=False)


@kernel("void(T[:, :, :, :], T[:, :, ::1], T[:, :, ::1], T[:, :, ::1])")
def _finish(out: Any, running_max: Any, running_sum: Any, logsumexp: Any) -> None:
    for i in range(out.shape[0]):
        for b in range(out.shape[1]):
            for head in range(out.shape[2]):
                largest, total = running_max[b, head, i], running_sum[b, head, i]
                logsumexp[b, head, i] = normalise(out[i, b, head], largest, total)


def block_attention_finish(
    out_accumulator: Floats, running_max: Floats, running_sum: Floats, logsumexp: Floats
) -> None:
    """See `executor.reference.blocked.block_attention_finish`."""
    _finish[logsumexp.dtype](out_accumulator, running_max, running_sum, logsumexp)


@kernel("void(T[:, :, :, :], T[:, :, :, :], T[:, :, ::1])")
def _delta(dout: Any, out: Any, delta: Any) -> None:
    for i in range(out.shape[0]):
        for b in range(out.shape[1]):
            for head in range(out.shape[2]):
                total = out.dtype.type(0.0)
                for c in range(out.shape[3]):
                    total += dout[i, b, head, c] * out[i, b, head, c]
                delta[b, head, i] = total


def attention_delta(dout: Floats, out: Floats, delta: Floats) -> None:
    """See `executor.reference.blocked.attention_delta`."""
    _delta[delta.dtype](dout, out, delta)


@helper
def rebuild(row: Any, d_row: Any, logsumexp: Any, delta: Any) -> None:
    """Replace scores by probabilities, and gradients of (dropped) probabilities by those of scores."""
    shift = row.dtype.type(0.0) if logsumexp == row.dtype.type(-np.inf) else logsumexp
    for j in range(row.shape[0]):
        p = exp(row[j] - shift)
        row[j] = p
        d_row[j] = p * (d_row[j] - delta)


@helper
def rebuild_rows(
    scores: Any, spare: Any, cover: Any, logsumexp: Any, delta: Any, q_positions: Any, columns: Any, reach: Any,
    dropout: Any,
) -> None:  # fmt: skip
    """Make (dropped) weights and gradients of scores, in place, of the scores and gradients of (dropped) weights."""
    threshold, keep_scale, key, sample, head_id = dropout
    for i in range(q_positions.shape[0]):
        row, d_row = scores[0, i, : columns.shape[0]], scores[1, i, : columns.shape[0]]
        if cover == 1:
            hide(row, q_positions[i], columns, *reach)
        if threshold == 0:
            rebuild(row, d_row, logsumexp[i], delta[i])
            continue
        row_hash = row_key(key, sample, q_positions[i], head_id)
        drop(d_row, spare, row_hash, columns, threshold, keep_scale)
        d_row[:] = spare
        rebuild(row, d_row, logsumexp[i], delta[i])
        drop(row, spare, row_hash, columns, threshold, keep_scale)
        row[:] = spare


@kernel(
    f"void(T[:, :, :, :], {_QKV}, {MASKING}, T[:, :, ::1], T[:, :, ::1], T[:, :, :, :], T[:, :, :, :],"
    f" T[:, :, :, :], boolean, {TILES})"
)
def _step_backward(
    dout: Any, q: Any, k: Any, v: Any, scale: Any, kv_index: Any, q_positions: Any, k_positions: Any, back: Any,
    ahead: Any, threshold: Any, keep_scale: Any, key: Any, samples: Any, head_ids: Any, logsumexp: Any, delta: Any,
    dq: Any, dk: Any, dv: Any, add: Any, query_tile: Any, key_tile: Any, group: Any, buffer: Any,
) -> None:  # fmt: skip
    real = q.dtype.type
    queries, keys, heads, width = q.shape[0], k.shape[0], q.shape[2], q.shape[3]
    one, zero, onto = real(1.0), real(0.0), np.full(heads, add)
    for b in range(q.shape[1]):
        visited = np.full(k.shape[2], add)
        for h0 in range(0, heads, group):
            h1 = min(h0 + group, heads)
            s0, s1 = span_of(kv_index[h0:h1])
            q_rows, rest = take(buffer, h1 - h0, queries, width)
            dout_rows, rest = take(rest, h1 - h0, queries, width)
            dq_rows, rest = take(rest, h1 - h0, queries, width)
            k_rows, rest = take(rest, s1 - s0, key_tile, width)
            dk_rows, rest = take(rest, s1 - s0, key_tile, width)
            dv_rows, rest = take(rest, s1 - s0, key_tile, width)
            k_across, rest = take(rest, s1 - s0, width, key_tile)
            v_across, rest = take(rest, s1 - s0, width, key_tile)
            scores, spare = take(rest, 2, query_tile, key_tile)
            gather(q[:, b, h0:h1], q_rows)
            gather(dout[:, b, h0:h1], dout_rows)
            dq_rows[:] = 0
            for j0 in range(0, keys, key_tile):
                j1 = min(j0 + key_tile, keys)
                columns = k_positions[j0:j1]
                gather(k[j0:j1, b, s0:s1], k_rows)
                gather_across(k[j0:j1, b, s0:s1], k_across, key_tile)
                gather_across(v[j0:j1, b, s0:s1], v_across, key_tile)
                dk_rows[:] = 0
                dv_rows[:] = 0
                for head, i0, i1 in visits(h0, h1, queries, query_tile):
                    source = kv_index[head] - s0
                    cover = coverage(q_positions[i0:i1], columns, back, ahead)
                    if cover == 0:
                        continue
                    tile, d_tile = scores[0, : i1 - i0, : j1 - j0], scores[1, : i1 - i0, : j1 - j0]
                    q_tile, dout_tile = q_rows[head - h0, i0:i1, :width], dout_rows[head - h0, i0:i1, :width]
                    gemm(real(scale), q_tile, False, k_across[source, :, : j1 - j0], False, zero, tile)
                    gemm(one, dout_tile, False, v_across[source, :, : j1 - j0], False, zero, d_tile)
                    rebuild_rows(
                        scores, spare[: j1 - j0], cover, logsumexp[b, head, i0:i1], delta[b, head, i0:i1],
                        q_positions[i0:i1], columns, (back, ahead),
                        (threshold, keep_scale, key, samples[b], head_ids[head]),
                    )  # fmt: skip
                    add_gradients(
                        real(scale), tile, d_tile, q_tile, dout_tile, k_rows[source, : j1 - j0, :width],
                        dq_rows[head - h0, i0:i1, :width], dk_rows[source, : j1 - j0, :width],
                        dv_rows[source, : j1 - j0, :width],
                    )  # fmt: skip
                scatter(dk_rows, dk[j0:j1, b, s0:s1], visited[s0:s1])
                scatter(dv_rows, dv[j0:j1, b, s0:s1], visited[s0:s1])
            scatter(dq_rows, dq[:, b, h0:h1], onto[h0:h1])
            visited[s0:s1] = True
        zero_unread(visited, dk[:, b], dv[:, b])


def _attend_backward(
    dout: Floats, q: Floats, k: Floats, v: Floats, masking: Masking, logsumexp: Floats, delta: Floats, dq: Floats,
    dk: Floats, dv: Floats, add: bool,
) -> None:  # fmt: skip
    """What these keys contribute to dq, dk and dv, added to them or in their place."""
    queries, keys, width = q.shape[0], k.shape[0], q.shape[3]
    query_tile, key_tile = tile_sizes(queries, keys, width, MASKED_TILE if masking.limited else OPEN_TILE)
    group, span = heads_of_group(masking.kv_index, (3 * queries + 5 * key_tile) * width * q.itemsize)
    buffer = scratch_for(
        q.dtype, *[(group, queries, width)] * 3, *[(span, key_tile, width)] * 3,
        *[(span, width, key_tile)] * 2, (2, query_tile, key_tile), (1, 1, key_tile),
    )  # fmt: skip
    tiles = (query_tile, key_tile, group, buffer)
    _step_backward[q.dtype](dout, q, k, v, *masking_arguments(masking), logsumexp, delta, dq, dk, dv, add, *tiles)


def block_attention_step_backward(
    dout: Floats, q: Floats, k: Floats, v: Floats, masking: Masking, logsumexp: Floats, delta: Floats, dq: Floats,
    dk: Floats, dv: Floats,
) -> None:  # fmt: skip
    """See `executor.reference.blocked.block_attention_step_backward`."""
    _attend_backward(dout, q, k, v, masking, logsumexp, delta, dq, dk, dv, add=True)


def blocked_attention_forward(
    q: Floats, k: Floats, v: Floats, masking: Masking, out: Floats, logsumexp: Floats
) -> None:
    """See `executor.reference.blocked.blocked_attention_forward`."""
    _attend(q, k, v, masking, out, logsumexp, np.empty_like(logsumexp), whole=True)


def blocked_attention_backward(
    dout: Floats, q: Floats, k: Floats, v: Floats, masking: Masking, out: Floats, logsumexp: Floats, dq: Floats,
    dk: Floats, dv: Floats,
) -> None:  # fmt: skip
    """See `executor.reference.blocked.blocked_attention_backward`."""
    delta = np.empty_like(logsumexp)
    attention_delta(dout, out, delta)
    _attend_backward(dout, q, k, v, masking, logsumexp, delta, dq, dk, dv, add=False)
