"""Scaled dot-product attention, keeping the probabilities.

Shapes: q, out [Sq, B, h, d]; k, v [Sk, B, kv, d]; the last axis adjacent, the others with any stride, so that
views of a packed buffer pass without a copy. `Masking` says which of its h query heads reads which of the kv heads.
"""

from __future__ import annotations

import numpy as np

from executor.reference.arrays import Floats
from executor.reference.masking import Masking


def masked_scores(q: Floats, k: Floats, masking: Masking) -> Floats:
    """Scores scale q kᵀ of [Sq, B, h, d] and [Sk, B, kv, d], [B, h, Sq, Sk]; -inf where the query sees not the key."""
    scores = np.einsum("ibhd,jbhd->bhij", q, k[:, :, masking.kv_index]) * q.dtype.type(masking.scale)
    masked: Floats = np.where(masking.visible(), scores, -np.inf)
    return masked


def attention_forward(q: Floats, k: Floats, v: Floats, masking: Masking, probabilities: Floats, out: Floats) -> None:
    """Compute out = dropout(softmax(scale q kᵀ + mask)) v; a query that sees no key gives zeros.

    Args:
        q: queries [Sq, B, h, d].
        k: keys [Sk, B, kv, d].
        v: values [Sk, B, kv, d].
        masking: scale, mask and dropout.
        probabilities: [B, h, Sq, Sk], C-contiguous; written: the softmax before dropout.
        out: [Sq, B, h, d], written.
    """
    scores = masked_scores(q, k, masking)
    largest = scores.max(axis=-1, keepdims=True, initial=-np.inf)
    probabilities[:] = np.exp(scores - np.where(np.isneginf(largest), 0, largest))
    total = probabilities.sum(axis=-1, keepdims=True)
    probabilities /= np.where(total == 0, 1, total)
    dropped = probabilities if masking.rate == 0.0 else probabilities * masking.dropout_factors(q.dtype)
    out[:] = np.einsum("bhij,jbhd->ibhd", dropped, v[:, :, masking.kv_index])


def score_gradients(
    dout: Floats, v: Floats, masking: Masking, probabilities: Floats, delta: Floats | None
) -> tuple[Floats, Floats]:
    """Go back from the output's gradient to that of the scores.

    Args:
        dout: [Sq, B, h, d].
        v: [Sk, B, kv, d].
        masking: as in the forward pass.
        probabilities: before dropout [B, h, Sq, Sk].
        delta: Σ over all keys of probabilities times their gradients [B, h, Sq]; None where these are all keys.

    Returns:
        Gradient of q kᵀ, with the scale, and the probabilities after dropout, each [B, h, Sq, Sk].
    """
    dropped, d_probabilities = probabilities, np.einsum("ibhd,jbhd->bhij", dout, v[:, :, masking.kv_index])
    if masking.rate > 0.0:
        factors = masking.dropout_factors(dout.dtype)
        dropped = probabilities * factors
        d_probabilities *= factors
    if delta is None:
        delta = (probabilities * d_probabilities).sum(axis=-1)
    return probabilities * (d_probabilities - delta[..., None]) * dout.dtype.type(masking.scale), dropped


def add_key_value_gradients(
    d_scores: Floats, dropped: Floats, dout: Floats, q: Floats, masking: Masking, dk: Floats, dv: Floats
) -> None:
    """Add to dk and dv [Sk, B, kv, d] what comes of `score_gradients`."""
    for head, source in enumerate(masking.kv_index):
        dk[:, :, source] += np.einsum("bij,ibd->jbd", d_scores[:, head], q[:, :, head])
        dv[:, :, source] += np.einsum("bij,ibd->jbd", dropped[:, head], dout[:, :, head])


def attention_backward(
    dout: Floats, q: Floats, k: Floats, v: Floats, masking: Masking, probabilities: Floats, dq: Floats, dk: Floats,
    dv: Floats,
) -> None:  # fmt: skip
    """Gradient of `attention_forward`; dq, dk and dv are overwritten (zero for a k/v head that no query reads).

    Args:
        dout: [Sq, B, h, d].
        q: as in the forward pass, like k, v and masking.
        k: see q.
        v: see q.
        masking: see q.
        probabilities: written by the forward pass.
        dq: like q, may be a view of a packed buffer.
        dk: like k.
        dv: like v.
    """
    d_scores, dropped = score_gradients(dout, v, masking, probabilities, None)
    dq[:] = np.einsum("bhij,jbhd->ibhd", d_scores, k[:, :, masking.kv_index])
    dk[:] = 0
    dv[:] = 0
    add_key_value_gradients(d_scores, dropped, dout, q, masking, dk, dv)
