"""Scaled dot-product attention that keeps the probabilities, on the device."""

from __future__ import annotations

import cupy

from executor.cuda.gradients import KeyValueGradients
from executor.cuda.launch import arithmetic, launch
from executor.cuda.tiles import Seen, by_head, in_place_or_new, multiply, score_block, strides, tile, tile_rows
from executor.reference.arrays import Floats
from executor.reference.masking import Masking


def attention_forward(q: Floats, k: Floats, v: Floats, masking: Masking, probabilities: Floats, out: Floats) -> None:
    """See `executor.reference.attention.attention_forward`."""
    seen = Seen.of(masking)
    queries, batch, heads, _ = q.shape
    dtype, keys = q.dtype, k.shape[0]
    for span in seen.spans(tile_rows(batch, heads, queries, keys, dtype, masking.limited), from_first_key=True):
        rows = slice(span.first, span.last)
        kept = probabilities[:, :, rows, : span.stop]
        if span.stop == 0:
            probabilities[:, :, rows] = 0
            out[rows] = 0
            continue
        wide = probabilities.dtype == arithmetic(dtype)
        scores = kept if wide and masking.rate == 0.0 else tile(batch, heads, span, arithmetic(dtype))
        multiply(
            by_head(q[rows]), by_head(k[: span.stop]), scores, seen.kv_heads, "b", transpose_b=True, alpha=masking.scale
        )
        dropped = None if masking.rate == 0.0 else in_place_or_new(scores, dtype)
        launch(
            "softmax", "softmax_forward", dtype, (span.last - span.first, heads, batch), score_block(span.stop, dtype),
            scores, *strides(scores), kept, *strides(kept), keys, dropped, None, *seen.arguments(span),
        )  # fmt: skip
        weights = kept if dropped is None else dropped
        multiply(weights, by_head(v[: span.stop]), by_head(out[rows]), seen.kv_heads, "b")


def attention_backward(
    dout: Floats, q: Floats, k: Floats, v: Floats, masking: Masking, probabilities: Floats, dq: Floats, dk: Floats,
    dv: Floats,
) -> None:  # fmt: skip
    """See `executor.reference.attention.attention_backward`."""
    seen = Seen.of(masking)
    queries, batch, heads, _ = q.shape
    dtype, keys = q.dtype, k.shape[0]
    gradients = KeyValueGradients(dk, dv, onto=False)
    for span in seen.spans(tile_rows(batch, heads, queries, keys, dtype, masking.limited), from_first_key=True):
        rows = slice(span.first, span.last)
        if span.stop == 0:
            dq[rows] = 0
            continue
        kept = probabilities[:, :, rows, : span.stop]
        d_probabilities = tile(batch, heads, span, arithmetic(dtype))
        dout_rows = by_head(dout[rows])
        multiply(dout_rows, by_head(v[: span.stop]), d_probabilities, seen.kv_heads, "b", transpose_b=True)
        d_scores = in_place_or_new(d_probabilities, dtype)
        dropped = None if masking.rate == 0.0 else cupy.empty(d_scores.shape, dtype)
        launch(
            "softmax", "softmax_backward", dtype, (span.last - span.first, heads, batch), score_block(span.stop, dtype),
            kept, *strides(kept), d_probabilities, *strides(d_probabilities), d_scores, dropped,
            *seen.arguments(span),
        )  # fmt: skip
        multiply(d_scores, by_head(k[: span.stop]), by_head(dq[rows]), seen.kv_heads, "b", alpha=masking.scale)
        weights = kept if dropped is None else dropped
        gradients.add(span, d_scores, weights, by_head(q[rows]), dout_rows, seen.kv_heads, masking.scale)
    gradients.finish()
