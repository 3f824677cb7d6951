"""Scaled dot-product attention: a group of heads at a time in tiles of adjacent rows, BLAS for the products."""

from __future__ import annotations

from typing import Any

import numpy as np

from executor.fused.compile import helper, kernel
from executor.fused.dropout import row_key
from executor.fused.matmul import gemm
from executor.fused.softmax import MASKING, drop, exponentiate, hide, largest_of, masking_arguments
from executor.fused.tiles import (
    TILES,
    add_gradients,
    gather,
    gather_across,
    heads_of_group,
    multiply_across,
    scatter,
    scratch_for,
    span_of,
    take,
    tile_sizes,
    visits,
    zero_unread,
)
from executor.reference.arrays import Floats
from executor.reference.masking import UNLIMITED, Masking

SMALL_TILE_KEYS = 64
"""Where BLAS has kernels for small products: the rows of kept probabilities are as far apart as the keys are many,
and of 64 the cache holds enough."""


@helper
def soften(row: Any) -> None:
    """Replace scores by their softmax; zeros where all are -inf."""
    total = exponentiate(row, largest_of(row))
    inverse = row.dtype.type(1.0) / (total if total != 0 else row.dtype.type(1.0))
    for j in range(row.shape[0]):
        row[j] *= inverse


@kernel(f"void(T[:, :, :, :], T[:, :, :, :], T[:, :, :, :], {MASKING}, T[:, :, :, ::1], T[:, :, :, :], {TILES})")
def _attention_forward(
    q: Any, k: Any, v: Any, scale: Any, kv_index: Any, q_positions: Any, k_positions: Any, back: Any, ahead: Any,
    threshold: Any, keep_scale: Any, key: Any, samples: Any, head_ids: Any, probabilities: Any, out: Any,
    query_tile: Any, key_tile: Any, group: Any, buffer: Any,
) -> None:  # fmt: skip
    real = q.dtype.type
    queries, keys, heads, width = q.shape[0], k.shape[0], q.shape[2], q.shape[3]
    masked, key_tiles = back < UNLIMITED or ahead < UNLIMITED, -(-keys // key_tile)
    fresh = np.zeros(heads, np.bool_)
    for b in range(q.shape[1]):
        for h0 in range(0, heads, group):
            h1 = min(h0 + group, heads)
            s0, s1 = span_of(kv_index[h0:h1])
            q_rows, rest = take(buffer, h1 - h0, queries, width)
            out_rows, rest = take(rest, h1 - h0, queries, width)
            v_rows, rest = take(rest, s1 - s0, keys, width)
            k_across, rest = take(rest, (s1 - s0) * key_tiles, width, key_tile)
            dropped, _ = take(rest, 1, query_tile, keys)
            gather(q[:, b, h0:h1], q_rows)
            gather(v[:, b, s0:s1], v_rows)
            gather_across(k[:, b, s0:s1], k_across, key_tile)
            for head, i0, i1 in visits(h0, h1, queries, query_tile):
                source, p = kv_index[head] - s0, probabilities[b, head, i0:i1]
                q_tile, out_tile = q_rows[head - h0, i0:i1, :width], out_rows[head - h0, i0:i1, :width]
                multiply_across(real(scale), q_tile, k_across[source * key_tiles :], p, key_tile)
                for i in range(i0, i1):
                    if masked:
                        hide(p[i - i0], q_positions[i], k_positions, back, ahead)
                    soften(p[i - i0])
                    if threshold > 0:
                        row_hash = row_key(key, samples[b], q_positions[i], head_ids[head])
                        row = dropped[0, i - i0, :keys]
                        drop(p[i - i0], row, row_hash, k_positions, threshold, keep_scale)
                weights = dropped[0, : i1 - i0, :keys] if threshold > 0 else p[:, :keys]
                for j0 in range(0, keys, key_tile):
                    onto, v_tile = real(0.0) if j0 == 0 else real(1.0), v_rows[source, j0 : j0 + key_tile, :width]
                    gemm(real(1.0), weights[:, j0 : j0 + key_tile], False, v_tile, False, onto, out_tile)
            scatter(out_rows, out[:, b, h0:h1], fresh[h0:h1])


def attention_forward(q: Floats, k: Floats, v: Floats, masking: Masking, probabilities: Floats, out: Floats) -> None:
    """See `executor.reference.attention.attention_forward`."""
    queries, keys, width = q.shape[0], k.shape[0], q.shape[3]
    if keys == 0:
        out[...] = 0
        return
    query_tile, key_tile = tile_sizes(queries, keys, width, (queries, keys), SMALL_TILE_KEYS)
    group, span = heads_of_group(masking.kv_index, 2 * (queries + keys) * width * q.itemsize)
    buffer = scratch_for(
        q.dtype, *[(group, queries, width)] * 2, (span, keys, width), (span * -(-keys // key_tile), width, key_tile),
        (1, query_tile, keys),
    )  # fmt: skip
    tiles = (query_tile, key_tile, group, buffer)
    _attention_forward[q.dtype](q, k, v, *masking_arguments(masking), probabilities, out, *tiles)


@helper
def through_softmax(p: Any, d: Any) -> None:
    """Replace gradients d of probabilities p by those of their scores: p (d - Σ p d)."""
    delta = p.dtype.type(0.0)
    for j in range(p.shape[0]):
        delta += p[j] * d[j]
    for j in range(p.shape[0]):
        d[j] = p[j] * (d[j] - delta)


@helper
def through_rows(p: Any, tiles: Any, q_positions: Any, k_positions: Any, dropout: Any) -> None:
    """Make gradients of scores, in tiles[0], of those of (dropped) probabilities, which stay in tiles[1]."""
    threshold, keep_scale, key, sample, head_id = dropout
    for i in range(q_positions.shape[0]):
        d_row, row = tiles[0, i, : k_positions.shape[0]], tiles[1, i, : k_positions.shape[0]]
        if threshold > 0:
            row_hash = row_key(key, sample, q_positions[i], head_id)
            drop(d_row, row, row_hash, k_positions, threshold, keep_scale)
            d_row[:] = row
            drop(p[i], row, row_hash, k_positions, threshold, keep_scale)
        through_softmax(p[i], d_row)


@kernel(
    f"void(T[:, :, :, :], T[:, :, :, :], T[:, :, :, :], T[:, :, :, :], {MASKING}, T[:, :, :, ::1],"
    f" T[:, :, :, :], T[:, :, :, :], T[:, :, :, :], {TILES})"
)
def _attention_backward(
    dout: Any, q: Any, k: Any, v: Any, scale: Any, kv_index: Any, q_positions: Any, k_positions: Any, back: Any,
    ahead: Any, threshold: Any, keep_scale: Any, key: Any, samples: Any, head_ids: Any, probabilities: Any, dq: Any,
    dk: Any, dv: Any, query_tile: Any, key_tile: Any, group: Any, buffer: Any,
) -> None:  # fmt: skip
    real = q.dtype.type
    queries, keys, heads, width = q.shape[0], k.shape[0], q.shape[2], q.shape[3]
    one, key_tiles, fresh = real(1.0), -(-keys // key_tile), np.zeros(heads, np.bool_)
    for b in range(q.shape[1]):
        visited = np.zeros(k.shape[2], np.bool_)
        for h0 in range(0, heads, group):
            h1 = min(h0 + group, heads)
            s0, s1 = span_of(kv_index[h0:h1])
            q_rows, rest = take(buffer, h1 - h0, queries, width)
            dout_rows, rest = take(rest, h1 - h0, queries, width)
            dq_rows, rest = take(rest, h1 - h0, queries, width)
            k_rows, rest = take(rest, s1 - s0, keys, width)
            dk_rows, rest = take(rest, s1 - s0, keys, width)
            dv_rows, rest = take(rest, s1 - s0, keys, width)
            v_across, rest = take(rest, (s1 - s0) * key_tiles, width, key_tile)
            tiles, _ = take(rest, 2, query_tile, keys)
            gather(q[:, b, h0:h1], q_rows)
            gather(dout[:, b, h0:h1], dout_rows)
            gather(k[:, b, s0:s1], k_rows)
            gather_across(v[:, b, s0:s1], v_across, key_tile)
            for total in (dq_rows, dk_rows, dv_rows):
                total[:] = 0
            for head, i0, i1 in visits(h0, h1, queries, query_tile):
                source, p, d_scores = kv_index[head] - s0, probabilities[b, head, i0:i1], tiles[0, : i1 - i0, :keys]
                q_tile, dout_tile = q_rows[head - h0, i0:i1, :width], dout_rows[head - h0, i0:i1, :width]
                multiply_across(one, dout_tile, v_across[source * key_tiles :], d_scores, key_tile)
                dropout = (threshold, keep_scale, key, samples[b], head_ids[head])
                through_rows(p, tiles, q_positions[i0:i1], k_positions, dropout)
                dropped = tiles[1, : i1 - i0, :keys] if threshold > 0 else p[:, :keys]
                for j0 in range(0, keys, key_tile):
                    j1 = min(j0 + key_tile, keys)
                    add_gradients(
                        real(scale), dropped[:, j0:j1], d_scores[:, j0:j1], q_tile, dout_tile,
                        k_rows[source, j0:j1, :width], dq_rows[head - h0, i0:i1, :width],
                        dk_rows[source, j0:j1, :width], dv_rows[source, j0:j1, :width],
                    )  # fmt: skip
            scatter(dq_rows, dq[:, b, h0:h1], fresh[h0:h1])
            scatter(dk_rows, dk[:, b, s0:s1], visited[s0:s1])
            scatter(dv_rows, dv[:, b, s0:s1], visited[s0:s1])
            visited[s0:s1] = True
        zero_unread(visited, dk[:, b], dv[:, b])


def attention_backward(
    dout: Floats, q: Floats, k: Floats, v: Floats, masking: Masking, probabilities: Floats, dq: Floats, dk: Floats,
    dv: Floats,
) -> None:  # fmt: skip
    """See `executor.reference.attention.attention_backward`."""
    queries, keys, width = q.shape[0], k.shape[0], q.shape[3]
    if keys == 0:
        dq[...] = 0
        return
    query_tile, key_tile = tile_sizes(queries, keys, width, (queries, keys), SMALL_TILE_KEYS)
    group, span = heads_of_group(masking.kv_index, (3 * queries + 4 * keys) * width * q.itemsize)
    buffer = scratch_for(
        q.dtype, *[(group, queries, width)] * 3, *[(span, keys, width)] * 3,
        (span * -(-keys // key_tile), width, key_tile), (2, query_tile, keys),
    )  # fmt: skip
    tiles = (query_tile, key_tile, group, buffer)
    _attention_backward[q.dtype](dout, q, k, v, *masking_arguments(masking), probabilities, dq, dk, dv, *tiles)
