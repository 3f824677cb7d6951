"""Attention by tiles of queries and keys that stay in the L2 cache; BLAS for the products, no Sq × Sk matrix."""

from __future__ import annotations

from typing import Any

import numpy as np

from executor.fused.compile import helper, kernel
from executor.fused.dropout import row_key
from executor.fused.maths import exp
from executor.fused.matmul import gemm_by_rows, gemm_by_terms, has_small_kernels, rows_per_product, transpose_to
from executor.fused.softmax import MASKING, drop, exponentiate, hide, largest_of, masking_arguments, scratch
from executor.reference import blocked as reference
from executor.reference.arrays import Floats
from executor.reference.masking import Masking

OPEN_TILE = (512, 256)
"""Queries and keys of a tile: the shortest side is the inner dimension of a product, and BLAS wants that long."""

MASKED_TILE = (256, 256)
"""A mask hides whole tiles, and the more the smaller they are; below 256 the products slow down by more than that."""

SMALL_TILE = (120, 128)
"""Where BLAS has kernels for small products."""


def tiles_of(masked: bool, width: int) -> tuple[int, int, int]:
    """Queries and keys of a tile, and rows of it that BLAS multiplies at once."""
    queries, keys = SMALL_TILE if has_small_kernels() else (MASKED_TILE if masked else OPEN_TILE)
    return queries, keys, rows_per_product(queries, width, keys)


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


@kernel(f"void({_QKV}, {MASKING}, T[:, :, :, :], T[:, :, ::1], T[:, :, ::1], int64, int64, int64, T[::1])")
def _step(
    q: Any, k: Any, v: Any, scale: Any, kv_index: Any, q_positions: Any, k_positions: Any, back: Any, ahead: Any,
    threshold: Any, keep_scale: Any, key: Any, samples: Any, head_ids: Any, out: Any, running_max: Any,
    running_sum: Any, query_tile: Any, key_tile: Any, rows: Any, buffer: Any,
) -> None:  # fmt: skip
    real = q.dtype.type
    queries, keys, width = q.shape[0], k.shape[0], q.shape[3]
    for b in range(q.shape[1]):
        for head in range(q.shape[2]):
            source = kv_index[head]
            for j0 in range(0, keys, key_tile):
                j1 = min(j0 + key_tile, keys)
                columns = k_positions[j0:j1]
                k_across = buffer[: (j1 - j0) * width].reshape(width, j1 - j0)
                transpose_to(k[j0:j1, b, source], k_across)
                tiles = buffer[(j1 - j0) * width :]
                for i0 in range(0, queries, query_tile):
                    i1 = min(i0 + query_tile, queries)
                    cover = coverage(q_positions[i0:i1], columns, back, ahead)
                    if cover == 0:
                        continue
                    area = (i1 - i0) * (j1 - j0)
                    tile = tiles[:area].reshape(i1 - i0, j1 - j0)
                    gemm_by_rows(real(scale), q[i0:i1, b, head], k_across, real(0.0), tile, rows)
                    for i in range(i0, i1):
                        row = tile[i - i0]
                        if cover == 1:
                            hide(row, q_positions[i], columns, back, ahead)
                        before = running_max[b, head, i]
                        largest = max(before, largest_of(row))
                        rescale = exp(before - largest) if before != real(-np.inf) else real(0.0)
                        running_sum[b, head, i] = running_sum[b, head, i] * rescale + exponentiate(row, largest)
                        running_max[b, head, i] = largest
                        for c in range(out.shape[3]):
                            out[i, b, head, c] *= rescale
                    weights = tile
                    if threshold > 0:
                        weights = tiles[area : 2 * area].reshape(i1 - i0, j1 - j0)
                        for i in range(i0, i1):
                            row_hash = row_key(key, samples[b], q_positions[i], head_ids[head])
                            drop(tile[i - i0], weights[i - i0], row_hash, columns, threshold, keep_scale)
                    gemm_by_rows(real(1.0), weights, v[j0:j1, b, source], real(1.0), out[i0:i1, b, head], rows)


def block_attention_step(
    q: Floats, k: Floats, v: Floats, masking: Masking, out_accumulator: Floats, running_max: Floats, running_sum: Floats
) -> None:
    """See `executor.reference.blocked.block_attention_step`."""
    tiles = tiles_of(masking.limited, q.shape[3])
    buffer = scratch(q.dtype, (2 * tiles[0] + q.shape[3]) * tiles[1])
    _step[q.dtype](q, k, v, *masking_arguments(masking), out_accumulator, running_max, running_sum, *tiles, buffer)


@kernel("void(T[:, :, :, :], T[:, :, ::1], T[:, :, ::1], T[:, :, ::1])")
def _finish(out: Any, running_max: Any, running_sum: Any, logsumexp: Any) -> None:
    real = out.dtype.type
    for i in range(out.shape[0]):
        for b in range(out.shape[1]):
            for head in range(out.shape[2]):
                total = running_sum[b, head, i]
                if total == 0:
                    total = real(1.0)
                    logsumexp[b, head, i] = real(-np.inf)
                else:
                    logsumexp[b, head, i] = running_max[b, head, i] + np.log(total)
                inverse = real(1.0) / total
                for c in range(out.shape[3]):
                    out[i, b, head, c] *= inverse


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


@kernel(
    f"void(T[:, :, :, :], {_QKV}, {MASKING}, T[:, :, ::1], T[:, :, ::1], T[:, :, :, :], T[:, :, :, :],"
    " T[:, :, :, :], int64, int64, int64, T[::1])"
)
def _step_backward(
    dout: Any, q: Any, k: Any, v: Any, scale: Any, kv_index: Any, q_positions: Any, k_positions: Any, back: Any,
    ahead: Any, threshold: Any, keep_scale: Any, key: Any, samples: Any, head_ids: Any, logsumexp: Any, delta: Any,
    dq: Any, dk: Any, dv: Any, query_tile: Any, key_tile: Any, rows: Any,
    buffer: Any,
) -> None:  # fmt: skip
    real = q.dtype.type
    queries, keys, width = q.shape[0], k.shape[0], q.shape[3]
    one = real(1.0)
    for b in range(q.shape[1]):
        for head in range(q.shape[2]):
            source = kv_index[head]
            for j0 in range(0, keys, key_tile):
                j1 = min(j0 + key_tile, keys)
                columns = k_positions[j0:j1]
                across = (j1 - j0) * width
                k_across = buffer[:across].reshape(width, j1 - j0)
                v_across = buffer[across : 2 * across].reshape(width, j1 - j0)
                transpose_to(k[j0:j1, b, source], k_across)
                transpose_to(v[j0:j1, b, source], v_across)
                tiles = buffer[2 * across :]
                for i0 in range(0, queries, query_tile):
                    i1 = min(i0 + query_tile, queries)
                    cover = coverage(q_positions[i0:i1], columns, back, ahead)
                    if cover == 0:
                        continue
                    area = (i1 - i0) * (j1 - j0)
                    tile = tiles[:area].reshape(i1 - i0, j1 - j0)
                    d_tile = tiles[area : 2 * area].reshape(i1 - i0, j1 - j0)
                    spare = tiles[2 * area : 2 * area + j1 - j0]
                    gemm_by_rows(real(scale), q[i0:i1, b, head], k_across, real(0.0), tile, rows)
                    gemm_by_rows(one, dout[i0:i1, b, head], v_across, real(0.0), d_tile, rows)
                    for i in range(i0, i1):
                        row, d_row = tile[i - i0], d_tile[i - i0]
                        if cover == 1:
                            hide(row, q_positions[i], columns, back, ahead)
                        row_hash = row_key(key, samples[b], q_positions[i], head_ids[head])
                        if threshold > 0:
                            drop(d_row, spare, row_hash, columns, threshold, keep_scale)
                            d_row[:] = spare
                        rebuild(row, d_row, logsumexp[b, head, i], delta[b, head, i])
                        if threshold > 0:
                            drop(row, spare, row_hash, columns, threshold, keep_scale)
                            row[:] = spare
                    gemm_by_terms(one, tile, dout[i0:i1, b, head], one, dv[j0:j1, b, source], rows)
                    gemm_by_rows(real(scale), d_tile, k[j0:j1, b, source], one, dq[i0:i1, b, head], rows)
                    gemm_by_terms(real(scale), d_tile, q[i0:i1, b, head], one, dk[j0:j1, b, source], rows)


def block_attention_step_backward(
    dout: Floats, q: Floats, k: Floats, v: Floats, masking: Masking, logsumexp: Floats, delta: Floats, dq: Floats,
    dk: Floats, dv: Floats,
) -> None:  # fmt: skip
    """See `executor.reference.blocked.block_attention_step_backward`."""
    tiles = tiles_of(masking.limited, q.shape[3])
    buffer = scratch(q.dtype, (2 * tiles[0] + 2 * q.shape[3] + 1) * tiles[1])
    _step_backward[q.dtype](dout, q, k, v, *masking_arguments(masking), logsumexp, delta, dq, dk, dv, *tiles, buffer)


def blocked_attention_forward(
    q: Floats, k: Floats, v: Floats, masking: Masking, out: Floats, logsumexp: Floats
) -> None:
    """See `executor.reference.blocked.blocked_attention_forward`."""
    running_sum = np.empty_like(logsumexp)
    block_attention_start(out, logsumexp, running_sum)
    block_attention_step(q, k, v, masking, out, logsumexp, running_sum)
    block_attention_finish(out, logsumexp, running_sum, logsumexp)


def blocked_attention_backward(
    dout: Floats, q: Floats, k: Floats, v: Floats, masking: Masking, out: Floats, logsumexp: Floats, dq: Floats,
    dk: Floats, dv: Floats,
) -> None:  # fmt: skip
    """See `executor.reference.blocked.blocked_attention_backward`."""
    delta = np.empty_like(logsumexp)
    attention_delta(dout, out, delta)
    for gradient in (dq, dk, dv):
        gradient[...] = 0
    block_attention_step_backward(dout, q, k, v, masking, logsumexp, delta, dq, dk, dv)
