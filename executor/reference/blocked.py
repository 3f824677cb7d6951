"""Attention by blocks of keys, keeping no Sq × Sk matrix: one block's step, and whole sequences as a loop of steps.

The softmax is built up online (Rabe & Staats 2021, arXiv:2112.05682; Dao et al. 2022, arXiv:2205.14135): each query
keeps its largest score m, the sum l of exp(score - m), and the unnormalised output o; a new block rescales both by
exp(m_old - m_new). The backward pass rebuilds probabilities from logsumexp = m + log l and needs one number more per
query, delta = Σ dout · out (Dao 2023, arXiv:2307.08691, algorithm 2). Ring attention (Liu et al. 2023,
arXiv:2310.01889) takes the steps one by one, as the blocks come round.

Arguments q to head_ids are those of `executor.reference.attention`.
"""

from __future__ import annotations

import numpy as np

from executor.reference.arrays import Floats, Ints
from executor.reference.attention import probability_mask, visible


def block_attention_start(out_accumulator: Floats, running_max: Floats, running_sum: Floats) -> None:
    """Prepare the state of no key seen: o = 0 [Sq, B, h, d], m = -inf and l = 0 [B, h, Sq]."""
    out_accumulator[:] = 0
    running_max[:] = -np.inf
    running_sum[:] = 0


def block_attention_step(
    q: Floats,
    k: Floats,
    v: Floats,
    scale: float,
    kv_index: Ints,
    causal: bool,
    window: int | None,
    q_positions: Ints,
    k_positions: Ints,
    rate: float,
    key: int,
    samples: Ints,
    head_ids: Ints,
    out_accumulator: Floats,
    running_max: Floats,
    running_sum: Floats,
) -> None:
    """Let every query see one more block of keys and values.

    Args:
        q: queries [Sq, B, h, d].
        k: this block's keys [Sk, B, kv, d].
        v: this block's values [Sk, B, kv, d].
        scale: see `executor.reference.attention.attention_forward`, like the arguments down to head_ids.
        kv_index: see scale.
        causal: see scale.
        window: see scale.
        q_positions: see scale.
        k_positions: global positions of this block [Sk].
        rate: see scale.
        key: see scale.
        samples: see scale.
        head_ids: see scale.
        out_accumulator: unnormalised output [Sq, B, h, d], updated.
        running_max: [B, h, Sq], updated.
        running_sum: [B, h, Sq], updated.
    """
    scores = np.einsum("ibhd,jbhd->bhij", q, k[:, :, kv_index]) * q.dtype.type(scale)
    scores = np.where(visible(causal, window, q_positions, k_positions), scores, -np.inf)
    largest = np.maximum(running_max, scores.max(axis=-1, initial=-np.inf))
    shift = np.where(np.isneginf(largest), 0, largest)
    weights = np.exp(scores - shift[..., None])
    rescale = np.exp(running_max - shift)
    running_sum[:] = running_sum * rescale + weights.sum(axis=-1)
    running_max[:] = largest
    if rate > 0.0:
        weights *= probability_mask(rate, key, samples, head_ids, q_positions, k_positions, q)
    out_accumulator *= rescale.transpose(2, 0, 1)[..., None]
    out_accumulator += np.einsum("bhij,jbhd->ibhd", weights, v[:, :, kv_index])


def block_attention_finish(
    out_accumulator: Floats, running_max: Floats, running_sum: Floats, logsumexp: Floats
) -> None:
    """Normalise the output in place; write logsumexp. A query that saw no key has output 0 and logsumexp -inf.

    Args:
        out_accumulator: [Sq, B, h, d], becomes the output.
        running_max: [B, h, Sq].
        running_sum: [B, h, Sq].
        logsumexp: [B, h, Sq], written; may be running_max.
    """
    seen = running_sum > 0
    total = np.where(seen, running_sum, 1)
    out_accumulator /= total.transpose(2, 0, 1)[..., None]
    logsumexp[:] = np.where(seen, running_max + np.log(total), -np.inf)


def attention_delta(dout: Floats, out: Floats, delta: Floats) -> None:
    """Write delta = Σ over d of dout · out: [Sq, B, h, d] each to [B, h, Sq]."""
    delta[:] = np.einsum("ibhd,ibhd->bhi", dout, out)


def block_attention_step_backward(
    dout: Floats,
    q: Floats,
    k: Floats,
    v: Floats,
    scale: float,
    kv_index: Ints,
    causal: bool,
    window: int | None,
    q_positions: Ints,
    k_positions: Ints,
    rate: float,
    key: int,
    samples: Ints,
    head_ids: Ints,
    logsumexp: Floats,
    delta: Floats,
    dq: Floats,
    dk: Floats,
    dv: Floats,
) -> None:
    """Add what one block of keys and values contributes to dq, dk and dv.

    Args:
        dout: [Sq, B, h, d].
        q: as in the step, like k to head_ids.
        k: see q.
        v: see q.
        scale: see q.
        kv_index: see q.
        causal: see q.
        window: see q.
        q_positions: see q.
        k_positions: see q.
        rate: see q.
        key: see q.
        samples: see q.
        head_ids: see q.
        logsumexp: of the whole row, over all blocks [B, h, Sq].
        delta: from `attention_delta` [B, h, Sq].
        dq: [Sq, B, h, d], added to.
        dk: this block's [Sk, B, kv, d], added to.
        dv: this block's [Sk, B, kv, d], added to.
    """
    scores = np.einsum("ibhd,jbhd->bhij", q, k[:, :, kv_index]) * q.dtype.type(scale)
    scores = np.where(visible(causal, window, q_positions, k_positions), scores, -np.inf)
    probabilities = np.exp(scores - np.where(np.isneginf(logsumexp), 0, logsumexp)[..., None])
    d_probabilities = np.einsum("ibhd,jbhd->bhij", dout, v[:, :, kv_index])
    dropped = probabilities
    if rate > 0.0:
        mask = probability_mask(rate, key, samples, head_ids, q_positions, k_positions, q)
        dropped = probabilities * mask
        d_probabilities *= mask
    d_scores = probabilities * (d_probabilities - delta[..., None]) * q.dtype.type(scale)
    dq += np.einsum("bhij,jbhd->ibhd", d_scores, k[:, :, kv_index])
    for head, source in enumerate(kv_index):
        dk[:, :, source] += np.einsum("bij,ibd->jbd", d_scores[:, head], q[:, :, head])
        dv[:, :, source] += np.einsum("bij,ibd->jbd", dropped[:, head], dout[:, :, head])


def blocked_attention_forward(
    q: Floats,
    k: Floats,
    v: Floats,
    scale: float,
    kv_index: Ints,
    causal: bool,
    window: int | None,
    q_positions: Ints,
    k_positions: Ints,
    rate: float,
    key: int,
    samples: Ints,
    head_ids: Ints,
    out: Floats,
    logsumexp: Floats,
) -> None:
    """Attention over whole sequences with memory linear in their length.

    Args are those of `block_attention_step` with all keys, out [Sq, B, h, d] and logsumexp [B, h, Sq], both written.
    """
    running_sum = np.empty_like(logsumexp)
    block_attention_start(out, logsumexp, running_sum)
    for j in range(0, k.shape[0], 256):
        block, seen = slice(j, j + 256), (causal, window, q_positions)
        block_attention_step(
            q, k[block], v[block], scale, kv_index, *seen, k_positions[block], rate, key, samples, head_ids, out,
            logsumexp, running_sum,
        )  # fmt: skip
    block_attention_finish(out, logsumexp, running_sum, logsumexp)


def blocked_attention_backward(
    dout: Floats,
    q: Floats,
    k: Floats,
    v: Floats,
    scale: float,
    kv_index: Ints,
    causal: bool,
    window: int | None,
    q_positions: Ints,
    k_positions: Ints,
    rate: float,
    key: int,
    samples: Ints,
    head_ids: Ints,
    out: Floats,
    logsumexp: Floats,
    dq: Floats,
    dk: Floats,
    dv: Floats,
) -> None:
    """Gradient of `blocked_attention_forward`, from its out and logsumexp; dq, dk and dv are overwritten."""
    delta = np.empty_like(logsumexp)
    attention_delta(dout, out, delta)
    for gradient in (dq, dk, dv):
        gradient[:] = 0
    for j in range(0, k.shape[0], 256):
        block, seen = slice(j, j + 256), (causal, window, q_positions)
        block_attention_step_backward(
            dout, q, k[block], v[block], scale, kv_index, *seen, k_positions[block], rate, key, samples, head_ids,
            logsumexp, delta, dq, dk[block], dv[block],
        )  # fmt: skip
