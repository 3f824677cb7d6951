"""Attention that keeps no Sq × Sk matrix, over whole sequences or one block of keys after another, on the device.

See `executor.reference.blocked`. Over whole sequences a tile has all keys that its queries see, so that their softmax
is complete at once and nothing has to be rescaled. 16-bit heads go through `executor.cuda.flash` where they fit it.
"""

from __future__ import annotations

import cupy
import numpy as np

from executor.cuda import flash
from executor.cuda.gradients import KeyValueGradients, head_launch, head_strides
from executor.cuda.launch import arithmetic, launch, statistics
from executor.cuda.tiles import Seen, by_head, in_place_or_new, multiply, score_block, strides, tile, tile_rows
from executor.reference.arrays import Floats
from executor.reference.masking import Masking


def block_attention_start(out_accumulator: Floats, running_max: Floats, running_sum: Floats) -> None:
    """See `executor.reference.blocked.block_attention_start`."""
    out_accumulator[...] = 0
    running_max[...] = -np.inf
    running_sum[...] = 0


def block_attention_step(
    q: Floats, k: Floats, v: Floats, masking: Masking, out_accumulator: Floats, running_max: Floats, running_sum: Floats
) -> None:
    """See `executor.reference.blocked.block_attention_step`."""
    seen = Seen.of(masking)
    queries, batch, heads, _ = q.shape
    dtype, keys = q.dtype, k.shape[0]
    state = (statistics(running_max, dtype), statistics(running_sum, dtype))
    if flash.fits(q, k, v) and out_accumulator.dtype == arithmetic(dtype):
        flash.forward(q, k, v, seen, out_accumulator, state=state)
        return
    rescale = cupy.empty_like(running_max)
    for span in seen.spans(tile_rows(batch, heads, queries, keys, dtype, masking.limited)):
        if span.start == span.stop:
            continue  # these queries see none of these keys
        rows, columns = slice(span.first, span.last), slice(span.start, span.stop)
        scores = tile(batch, heads, span, arithmetic(dtype))
        multiply(
            by_head(q[rows]), by_head(k[columns]), scores, seen.kv_heads, "b", transpose_b=True, alpha=masking.scale
        )
        weights = in_place_or_new(scores, dtype)
        launch(
            "softmax", "softmax_step", dtype, (span.last - span.first, heads, batch),
            score_block(span.stop - span.start, dtype), scores, weights, *strides(scores), *state, rescale,
            *seen.arguments(span),
        )  # fmt: skip
        out = out_accumulator[rows]
        grid, block, sizes = head_launch(out)
        arguments = (out, *head_strides(out), rescale, span.first, queries, *sizes)
        launch("head_rows", "multiply_heads", out.dtype, grid, block, *arguments)
        multiply(weights, by_head(v[columns]), by_head(out), seen.kv_heads, "b", accumulate=True)


def block_attention_finish(
    out_accumulator: Floats, running_max: Floats, running_sum: Floats, logsumexp: Floats
) -> None:
    """See `executor.reference.blocked.block_attention_finish`."""
    dtype = out_accumulator.dtype
    if out_accumulator.size:
        grid, block, sizes = head_launch(out_accumulator)
        state = tuple(statistics(x, dtype) for x in (running_max, running_sum, logsumexp))
        arguments = (out_accumulator, *head_strides(out_accumulator), *state, *sizes)
        launch("head_rows", "finish_heads", dtype, grid, block, *arguments)


def attention_delta(dout: Floats, out: Floats, delta: Floats) -> None:
    """See `executor.reference.blocked.attention_delta`."""
    if dout.size:
        grid, block, sizes = head_launch(dout)
        arguments = (dout, *head_strides(dout), out, *head_strides(out), statistics(delta, dout.dtype), *sizes)
        launch("head_rows", "delta_heads", dout.dtype, grid, block, *arguments)


def block_attention_step_backward(
    dout: Floats, q: Floats, k: Floats, v: Floats, masking: Masking, logsumexp: Floats, delta: Floats, dq: Floats,
    dk: Floats, dv: Floats,
) -> None:  # fmt: skip
    """See `executor.reference.blocked.block_attention_step_backward`."""
    _backward(dout, q, k, v, Seen.of(masking), logsumexp, delta, dq, dk, dv, onto=True)


def _backward(
    dout: Floats, q: Floats, k: Floats, v: Floats, seen: Seen, logsumexp: Floats, delta: Floats, dq: Floats,
    dk: Floats, dv: Floats, *, onto: bool,
) -> None:  # fmt: skip
    """Gradients from logsumexp and delta, added to dq, dk and dv if `onto`, else written there."""
    if flash.fits(dout, q, k, v, dq, dk, dv):
        flash.backward(dout, q, k, v, seen, logsumexp, delta, dq, dk, dv, onto=onto)
        return
    queries, batch, heads, _ = q.shape
    dtype, keys = q.dtype, k.shape[0]
    saved = (statistics(logsumexp, dtype), statistics(delta, dtype))
    gradients = KeyValueGradients(dk, dv, onto=onto)
    for span in seen.spans(tile_rows(batch, heads, queries, keys, dtype, seen.masking.limited)):
        rows, columns = slice(span.first, span.last), slice(span.start, span.stop)
        if span.start == span.stop:
            if not onto:
                dq[rows] = 0
            continue
        scores, d_probabilities = (tile(batch, heads, span, arithmetic(dtype)) for _ in range(2))
        q_rows, dout_rows, k_part = by_head(q[rows]), by_head(dout[rows]), by_head(k[columns])
        multiply(q_rows, k_part, scores, seen.kv_heads, "b", transpose_b=True, alpha=seen.masking.scale)
        multiply(dout_rows, by_head(v[columns]), d_probabilities, seen.kv_heads, "b", transpose_b=True)
        weights, d_scores = in_place_or_new(scores, dtype), in_place_or_new(d_probabilities, dtype)
        launch(
            "softmax", "softmax_rebuild", dtype, (span.last - span.first, heads, batch),
            score_block(span.stop - span.start, dtype), scores, d_probabilities, *strides(scores), *saved, weights,
            d_scores, *seen.arguments(span),
        )  # fmt: skip
        multiply(d_scores, k_part, by_head(dq[rows]), seen.kv_heads, "b", alpha=seen.masking.scale, accumulate=onto)
        gradients.add(span, d_scores, weights, q_rows, dout_rows, seen.kv_heads, seen.masking.scale)
    gradients.finish()


def blocked_attention_forward(
    q: Floats, k: Floats, v: Floats, masking: Masking, out: Floats, logsumexp: Floats
) -> None:
    """See `executor.reference.blocked.blocked_attention_forward`."""
    seen = Seen.of(masking)
    queries, batch, heads, _ = q.shape
    dtype, keys = q.dtype, k.shape[0]
    if flash.fits(q, k, v, out):
        flash.forward(q, k, v, seen, out, logsumexp=logsumexp)
        return
    for span in seen.spans(tile_rows(batch, heads, queries, keys, dtype, masking.limited)):
        rows, columns = slice(span.first, span.last), slice(span.start, span.stop)
        if span.start == span.stop:
            out[rows] = 0
            logsumexp[:, :, rows] = -np.inf
            continue
        scores = tile(batch, heads, span, arithmetic(dtype))
        multiply(
            by_head(q[rows]), by_head(k[columns]), scores, seen.kv_heads, "b", transpose_b=True, alpha=masking.scale
        )
        weights = in_place_or_new(scores, dtype)
        kept, dropped = (weights, None) if masking.rate == 0.0 else (None, weights)
        launch(
            "softmax", "softmax_forward", dtype, (span.last - span.first, heads, batch),
            score_block(span.stop - span.start, dtype), scores, *strides(scores), kept, *strides(weights),
            span.stop - span.start, dropped, statistics(logsumexp, dtype), *seen.arguments(span),
        )  # fmt: skip
        multiply(weights, by_head(v[columns]), by_head(out[rows]), seen.kv_heads, "b")


def blocked_attention_backward(
    dout: Floats, q: Floats, k: Floats, v: Floats, masking: Masking, out: Floats, logsumexp: Floats, dq: Floats,
    dk: Floats, dv: Floats,
) -> None:  # fmt: skip
    """See `executor.reference.blocked.blocked_attention_backward`."""
    seen = Seen.of(masking)
    delta = cupy.empty_like(logsumexp)
    attention_delta(dout, out, delta)
    _backward(dout, q, k, v, seen, logsumexp, delta, dq, dk, dv, onto=False)
