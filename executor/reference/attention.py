"""Scaled dot-product attention, keeping the probabilities.

Shapes: q, out [Sq, B, h, d]; k, v [Sk, B, kv, d]; the last axis adjacent, the others with any stride, so that
views of a packed buffer pass without a copy. ``kv_index[i]`` is the k/v head that query head i reads (grouped-query
attention, Ainslie et al. 2023), given explicitly because a tensor-parallel shard may hold an uneven part of the heads.

Masks and dropout follow *global* positions, in any order: under context parallelism a rank holds scattered rows.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from executor.reference.arrays import Floats, Ints
from executor.reference.dropout import keep_mask, row_keys

UNLIMITED = 2**31 - 1


def reach(causal: bool, window: int | None) -> tuple[int, int]:
    """How far a query sees (backward, forward), in positions.

    A window w means distances below w if causal, and at most w / 2 on either side if not.
    """
    if window is None:
        return UNLIMITED, 0 if causal else UNLIMITED
    return (window - 1, 0) if causal else (window // 2, window // 2)


def visible(causal: bool, window: int | None, q_positions: Ints, k_positions: Ints) -> npt.NDArray[np.bool_]:
    """Which keys each query sees, [Sq, Sk]."""
    back, ahead = reach(causal, window)
    distance = k_positions[None, :] - q_positions[:, None]
    seen: npt.NDArray[np.bool_] = (distance >= -back) & (distance <= ahead)
    return seen


def probability_mask(
    rate: float, key: int, samples: Ints, head_ids: Ints, q_positions: Ints, k_positions: Ints, like: Floats
) -> Floats:
    """Dropout factors 0 or 1/(1 - rate) of the probabilities, [B, h, Sq, Sk]; the column is the key's position."""
    keys = row_keys(key, samples[:, None, None], q_positions[None, None, :], head_ids[None, :, None])
    kept = keep_mask(keys, k_positions, rate)
    return kept.astype(like.dtype) * like.dtype.type(1.0 / (1.0 - rate))


def attention_forward(
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
    probabilities: Floats,
    out: Floats,
) -> None:
    """Compute out = dropout(softmax(scale q kᵀ + mask)) v; a query that sees no key gives zeros.

    Args:
        q: queries [Sq, B, h, d].
        k: keys [Sk, B, kv, d].
        v: values [Sk, B, kv, d].
        scale: factor of the scores, usually 1 / sqrt(d).
        kv_index: k/v head of each query head [h].
        causal: a query sees no later position.
        window: attention window in positions, or None; see `reach`.
        q_positions: global positions [Sq].
        k_positions: global positions [Sk].
        rate: dropout rate of the probabilities, in [0, 1).
        key: 64-bit key of this dropout.
        samples: global index of each sequence [B].
        head_ids: global index of each query head [h].
        probabilities: [B, h, Sq, Sk], C-contiguous; written: the softmax before dropout.
        out: [Sq, B, h, d], written.
    """
    scores = np.einsum("ibhd,jbhd->bhij", q, k[:, :, kv_index]) * q.dtype.type(scale)
    scores = np.where(visible(causal, window, q_positions, k_positions), scores, -np.inf)
    largest = scores.max(axis=-1, keepdims=True, initial=-np.inf)
    probabilities[:] = np.exp(scores - np.where(np.isneginf(largest), 0, largest))
    total = probabilities.sum(axis=-1, keepdims=True)
    probabilities /= np.where(total == 0, 1, total)
    dropped = probabilities
    if rate > 0.0:
        dropped = dropped * probability_mask(rate, key, samples, head_ids, q_positions, k_positions, q)
    out[:] = np.einsum("bhij,jbhd->ibhd", dropped, v[:, :, kv_index])


def attention_backward(
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
    probabilities: Floats,
    dq: Floats,
    dk: Floats,
    dv: Floats,
) -> None:
    """Gradient of `attention_forward`; dq, dk and dv are overwritten (zero for a k/v head that no query reads).

    Args:
        dout: [Sq, B, h, d].
        q: as in the forward pass, like k to head_ids.
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
        probabilities: written by the forward pass.
        dq: like q, may be a view of a packed buffer.
        dk: like k.
        dv: like v.
    """
    d_probabilities = np.einsum("ibhd,jbhd->bhij", dout, v[:, :, kv_index])
    dropped = probabilities
    if rate > 0.0:
        mask = probability_mask(rate, key, samples, head_ids, q_positions, k_positions, q)
        dropped = probabilities * mask
        d_probabilities *= mask
    delta = (probabilities * d_probabilities).sum(axis=-1, keepdims=True)
    d_scores = probabilities * (d_probabilities - delta) * q.dtype.type(scale)
    dq[:] = np.einsum("bhij,jbhd->ibhd", d_scores, k[:, :, kv_index])
    dk[:] = 0
    dv[:] = 0
    for head, source in enumerate(kv_index):
        dk[:, :, source] += np.einsum("bij,ibd->jbd", d_scores[:, head], q[:, :, head])
        dv[:, :, source] += np.einsum("bij,ibd->jbd", dropped[:, head], dout[:, :, head])
