"""Attention by blocks of keys, keeping no Sq × Sk matrix: one block's step, and whole sequences as a loop of steps.

The softmax is built up online (Rabe & Staats 2021, arXiv:2112.05682; Dao et al. 2022, arXiv:2205.14135): each query
keeps its largest score m, the sum l of exp(score - m), and the unnormalised output o; a new block rescales both by
exp(m_old - m_new). The backward pass rebuilds probabilities from logsumexp = m + log l and needs one number more per
query, delta = Σ dout · out (Dao 2023, arXiv:2307.08691, algorithm 2). Ring attention (Liu et al. 2023,
arXiv:2310.01889) takes the steps one by one, as the blocks come round.

Arguments q, k and v are those of `executor.reference.attention`.
"""

from __future__ import annotations

import numpy as np

from executor.reference.arrays import Floats
from executor.reference.attention import add_key_value_gradients, masked_scores, score_gradients
from executor.reference.masking import Masking

BLOCK_KEYS = 256
"""Keys of a block where whole sequences are at hand."""


def block_attention_start(out_accumulator: Floats, running_max: Floats, running_sum: Floats) -> None:
    """Prepare the state of no key seen: o = 0 [Sq, B, h, d], m = -inf and l = 0 [B, h, Sq]."""
    out_accumulator[:] = 0
    running_max[:] = -np.inf
    running_sum[:] = 0


def block_attention_step(
    q: Floats, k: Floats, v: Floats, masking: Masking, out_accumulator: Floats, running_max: Floats, running_sum: Floats
) -> None:
    """Let every query see one more block of keys and values.

    Args:
        q: queries [Sq, B, h, d].
        k: this block's keys [Sk, B, kv, d].
        v: this block's values [Sk, B, kv, d].
        masking: scale, mask and dropout, with the positions of this block's keys.
        out_accumulator: unnormalised output [Sq, B, h, d], updated.
        running_max: [B, h, Sq], updated.
        running_sum: [B, h, Sq], updated.
    """
    scores = masked_scores(q, k, masking)
    largest = np.maximum(running_max, scores.max(axis=-1, initial=-np.inf))
    shift = np.where(np.isneginf(largest), 0, largest)
    weights = np.exp(scores - shift[..., None])
    rescale = np.exp(running_max - shift)
    running_sum[:] = running_sum * rescale + weights.sum(axis=-1)
    running_max[:] = largest
    if masking.rate > 0.0:
        weights *= masking.dropout_factors(q.dtype)
    out_accumulator *= rescale.transpose(2, 0, 1)[..., None]
    out_accumulator += np.einsum("bhij,jbhd->ibhd", weights, v[:, :, masking.kv_index])


def block_attention_finish(
    out_accumulator: Floats, running_max: Floats, running_sum: Floats, logsumexp: Floats
) -> None:
    """Normalise the output in place; write logsumexp. A query that saw no key has output 0 and logsumexp -inf.

    Args:
        out_accumulator: [Sq, B, h, d], becomes the output.
        running_max: [B, h, Sq].
        running_sum: [B, h, Sq].
        logsumexp: [B, h, Sq], written; may be running_max or running_sum.
    """
    seen = running_sum > 0
    total = np.where(seen, running_sum, 1)
    out_accumulator /= total.transpose(2, 0, 1)[..., None]
    logsumexp[:] = np.where(seen, running_max + np.log(total), -np.inf)


def attention_delta(dout: Floats, out: Floats, delta: Floats) -> None:
    """Write delta = Σ over d of dout · out: [Sq, B, h, d] each to [B, h, Sq]."""
    delta[:] = np.einsum("ibhd,ibhd->bhi", dout, out)


def block_attention_step_backward(
    dout: Floats, q: Floats, k: Floats, v: Floats, masking: Masking, logsumexp: Floats, delta: Floats, dq: Floats,
    dk: Floats, dv: Floats,
) -> None:  # fmt: skip
    """Add what one block of keys and values contributes to dq, dk and dv.

    Args:
        dout: [Sq, B, h, d].
        q: as in the step, like k, v and masking.
        k: see q.
        v: see q.
        masking: see q.
        logsumexp: of the whole row, over all blocks [B, h, Sq].
        delta: from `attention_delta` [B, h, Sq].
        dq: [Sq, B, h, d], added to.
        dk: this block's [Sk, B, kv, d], added to.
        dv: this block's [Sk, B, kv, d], added to.
    """
    shift = np.where(np.isneginf(logsumexp), 0, logsumexp)
    probabilities = np.exp(masked_scores(q, k, masking) - shift[..., None])
    d_scores, dropped = score_gradients(dout, v, masking, probabilities, delta)
    dq += np.einsum("bhij,jbhd->ibhd", d_scores, k[:, :, masking.kv_index])
    add_key_value_gradients(d_scores, dropped, dout, q, masking, dk, dv)


def blocked_attention_forward(
    q: Floats, k: Floats, v: Floats, masking: Masking, out: Floats, logsumexp: Floats
) -> None:
    """Attention over whole sequences with memory linear in their length.

    Args are those of `block_attention_step` with all keys, out [Sq, B, h, d] and logsumexp [B, h, Sq], both written.
    """
    running_sum = np.empty_like(logsumexp)
    block_attention_start(out, logsumexp, running_sum)
    for j in range(0, k.shape[0], BLOCK_KEYS):
        block = slice(j, j + BLOCK_KEYS)
        block_attention_step(q, k[block], v[block], masking.of_keys(block), out, logsumexp, running_sum)
    block_attention_finish(out, logsumexp, running_sum, logsumexp)


def blocked_attention_backward(
    dout: Floats, q: Floats, k: Floats, v: Floats, masking: Masking, out: Floats, logsumexp: Floats, dq: Floats,
    dk: Floats, dv: Floats,
) -> None:  # fmt: skip
    """Gradient of `blocked_attention_forward`, from its out and logsumexp; dq, dk and dv are overwritten."""
    delta = np.empty_like(logsumexp)
    attention_delta(dout, out, delta)
    for gradient in (dq, dk, dv):
        gradient[:] = 0
    for j in range(0, k.shape[0], BLOCK_KEYS):
        block = slice(j, j + BLOCK_KEYS)
        keys = masking.of_keys(block)
        block_attention_step_backward(dout, q, k[block], v[block], keys, logsumexp, delta, dq, dk[block], dv[block])
