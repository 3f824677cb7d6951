"""Scaled dot-product attention: BLAS for the products, one head at a time so that its scores stay in the L2 cache."""

from __future__ import annotations

from typing import Any

import numpy as np

from executor.fused.compile import kernel
from executor.fused.dropout import row_key
from executor.fused.matmul import gemm_by_rows, gemm_by_terms, rows_per_product, transpose_to
from executor.fused.softmax import MASKING, drop, exponentiate, hide, largest_of, masking_arguments, scratch
from executor.reference.arrays import Floats
from executor.reference.masking import UNLIMITED, Masking


@kernel(f"void(T[:, :, :, :], T[:, :, :, :], T[:, :, :, :], {MASKING}, T[:, :, :, ::1], T[:, :, :, :], T[::1], int64)")
def _attention_forward(
    q: Any, k: Any, v: Any, scale: Any, kv_index: Any, q_positions: Any, k_positions: Any, back: Any, ahead: Any,
    threshold: Any, keep_scale: Any, key: Any, samples: Any, head_ids: Any, probabilities: Any, out: Any, buffer: Any,
    rows: Any,
) -> None:  # fmt: skip
    real = q.dtype.type
    queries, keys, width = q.shape[0], k.shape[0], q.shape[3]
    keys_across = buffer[: keys * width].reshape(width, keys)
    spare = buffer[keys * width :]
    masked = back < UNLIMITED or ahead < UNLIMITED
    for b in range(q.shape[1]):
        for head in range(q.shape[2]):
            p, source = probabilities[b, head], kv_index[head]
            transpose_to(k[:, b, source], keys_across)
            gemm_by_rows(real(scale), q[:, b, head], keys_across, real(0.0), p, rows)
            for i in range(queries):
                row = p[i]
                if masked:
                    hide(row, q_positions[i], k_positions, back, ahead)
                total = exponentiate(row, largest_of(row))
                inverse = real(1.0) / (total if total != 0 else real(1.0))
                for j in range(keys):
                    row[j] *= inverse
            weights = p
            if threshold > 0:
                weights = spare[: queries * keys].reshape(queries, keys)
                for i in range(queries):
                    row_hash = row_key(key, samples[b], q_positions[i], head_ids[head])
                    drop(p[i], weights[i], row_hash, k_positions, threshold, keep_scale)
            gemm_by_rows(real(1.0), weights, v[:, b, source], real(0.0), out[:, b, head], rows)


def attention_forward(q: Floats, k: Floats, v: Floats, masking: Masking, probabilities: Floats, out: Floats) -> None:
    """See `executor.reference.attention.attention_forward`."""
    queries, keys, width = q.shape[0], k.shape[0], q.shape[3]
    buffer = scratch(q.dtype, keys * width + (queries * keys if masking.rate > 0.0 else 0))
    rows = rows_per_product(queries, width, keys)
    _attention_forward[q.dtype](q, k, v, *masking_arguments(masking), probabilities, out, buffer, rows)


@kernel(
    f"void(T[:, :, :, :], T[:, :, :, :], T[:, :, :, :], T[:, :, :, :], {MASKING}, T[:, :, :, ::1],"
    " T[:, :, :, :], T[:, :, :, :], T[:, :, :, :], T[::1], int64)"
)
def _attention_backward(
    dout: Any, q: Any, k: Any, v: Any, scale: Any, kv_index: Any, q_positions: Any, k_positions: Any, back: Any,
    ahead: Any, threshold: Any, keep_scale: Any, key: Any, samples: Any, head_ids: Any, probabilities: Any, dq: Any,
    dk: Any, dv: Any, buffer: Any, rows: Any,
) -> None:  # fmt: skip
    real = q.dtype.type
    queries, keys, width = q.shape[0], k.shape[0], q.shape[3]
    values_across = buffer[: keys * width].reshape(width, keys)
    tiles = buffer[keys * width :]
    d_scores = tiles[: queries * keys].reshape(queries, keys)
    weights = tiles[queries * keys : 2 * queries * keys]
    for b in range(q.shape[1]):
        visited = np.zeros(k.shape[2], np.bool_)
        for head in range(q.shape[2]):
            p, source = probabilities[b, head], kv_index[head]
            onto = real(1.0) if visited[source] else real(0.0)
            visited[source] = True
            transpose_to(v[:, b, source], values_across)
            gemm_by_rows(real(1.0), dout[:, b, head], values_across, real(0.0), d_scores, rows)
            dropped = p
            if threshold > 0:
                dropped = weights.reshape(queries, keys)
                for i in range(queries):
                    row_hash = row_key(key, samples[b], q_positions[i], head_ids[head])
                    drop(d_scores[i], dropped[i], row_hash, k_positions, threshold, keep_scale)
                    for j in range(keys):
                        d_scores[i, j] = dropped[i, j]
                    drop(p[i], dropped[i], row_hash, k_positions, threshold, keep_scale)
            gemm_by_terms(real(1.0), dropped, dout[:, b, head], onto, dv[:, b, source], rows)
            for i in range(queries):
                delta = real(0.0)
                for j in range(keys):
                    delta += p[i, j] * d_scores[i, j]
                for j in range(keys):
                    d_scores[i, j] = p[i, j] * (d_scores[i, j] - delta)
            gemm_by_rows(real(scale), d_scores, k[:, b, source], real(0.0), dq[:, b, head], rows)
            gemm_by_terms(real(scale), d_scores, q[:, b, head], onto, dk[:, b, source], rows)
        for source in range(k.shape[2]):
            if not visited[source]:
                dk[:, b, source] = 0
                dv[:, b, source] = 0


def attention_backward(
    dout: Floats, q: Floats, k: Floats, v: Floats, masking: Masking, probabilities: Floats, dq: Floats, dk: Floats,
    dv: Floats,
) -> None:  # fmt: skip
    """See `executor.reference.attention.attention_backward`."""
    queries, keys, width = q.shape[0], k.shape[0], q.shape[3]
    buffer = scratch(q.dtype, keys * width + 2 * queries * keys)
    rows = rows_per_product(queries, width, keys)
    _attention_backward[q.dtype](dout, q, k, v, *masking_arguments(masking), probabilities, dq, dk, dv, buffer, rows)
