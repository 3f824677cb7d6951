"""What happens to the packed projection of queries, keys and values before attention, in place.

A row of qkv holds heads · d query elements, kv_heads · d of keys and kv_heads · d of values. Bias on all of it; then,
on each query and key head, RMS norm with a gain (Qwen3) and rotary positions (Su et al. 2021, arXiv:2104.09864) in the
half-split form of GPT-NeoX and Hugging Face Llama: element i pairs with i + d / 2.
"""

from __future__ import annotations

import numpy as np

from executor.reference.arrays import Floats, as_rows


def _rotate(heads: Floats, cos: Floats, sin: Floats) -> None:
    """Rotate [S, B, n, d] in place; a rotation by the negative angle is the inverse and the gradient."""
    first, second = np.split(heads, 2, axis=-1)
    c, s = cos[:, None, None, :], sin[:, None, None, :]
    heads[:] = np.concatenate([first * c - second * s, second * c + first * s], axis=-1)


def split_heads_forward(
    qkv: Floats,
    bias: Floats | None,
    q_gain: Floats | None,
    k_gain: Floats | None,
    epsilon: float,
    cos: Floats | None,
    sin: Floats | None,
    heads: int,
    kv_heads: int,
    saved: Floats | None,
    rstd: Floats | None,
) -> None:
    """Add the bias, normalise and rotate, in place.

    Args:
        qkv: [S, B, (heads + 2 kv_heads) d], changed in place.
        bias: [(heads + 2 kv_heads) d] or None.
        q_gain: [d] or None: no norm of queries and keys.
        k_gain: [d], None exactly if q_gain is.
        epsilon: added to the mean square.
        cos: cosines at the rows' positions [S, d / 2], or None: no rotation.
        sin: like cos.
        heads: query heads in this shard.
        kv_heads: key/value heads in this shard.
        saved: [S · B, (heads + kv_heads) d], written: queries and keys before the norm; None without norm. Kept rather
            than recovered from the result, which a gain of 0 would make impossible.
        rstd: [S · B, heads + kv_heads], written; None without norm.
    """
    rows = as_rows(qkv)
    if bias is not None:
        rows += bias
    width = rows.shape[1] // (heads + 2 * kv_heads)
    both = rows.reshape(*qkv.shape[:2], heads + 2 * kv_heads, width)[:, :, : heads + kv_heads]
    if q_gain is not None and k_gain is not None:
        assert saved is not None
        assert rstd is not None
        saved.reshape(both.shape)[:] = both
        rstd.reshape(both.shape[:-1])[:] = 1.0 / np.sqrt((both * both).mean(axis=-1) + rows.dtype.type(epsilon))
        both *= rstd.reshape(both.shape[:-1])[..., None]
        both[:, :, :heads] *= q_gain
        both[:, :, heads:] *= k_gain
    if cos is not None and sin is not None:
        _rotate(both, cos, sin)


def split_heads_backward(
    dqkv: Floats,
    saved: Floats | None,
    rstd: Floats | None,
    q_gain: Floats | None,
    k_gain: Floats | None,
    cos: Floats | None,
    sin: Floats | None,
    heads: int,
    kv_heads: int,
    dbias: Floats | None,
    dq_gain: Floats | None,
    dk_gain: Floats | None,
) -> None:
    """Gradient of `split_heads_forward`, in place.

    Args:
        dqkv: gradient of the result [S, B, (heads + 2 kv_heads) d]; becomes that of the input.
        saved: from the forward pass, or None without norm.
        rstd: from the forward pass, or None without norm.
        q_gain: as in the forward pass, like k_gain, cos, sin, heads and kv_heads.
        k_gain: see q_gain.
        cos: see q_gain.
        sin: see q_gain.
        heads: see q_gain.
        kv_heads: see q_gain.
        dbias: [(heads + 2 kv_heads) d], added to, or None.
        dq_gain: [d], added to, or None without norm.
        dk_gain: [d], added to, or None without norm.
    """
    rows = as_rows(dqkv)
    width = rows.shape[1] // (heads + 2 * kv_heads)
    both = rows.reshape(*dqkv.shape[:2], heads + 2 * kv_heads, width)[:, :, : heads + kv_heads]
    if cos is not None and sin is not None:
        _rotate(both, cos, -sin)
    if saved is not None and rstd is not None and q_gain is not None and k_gain is not None:
        inverse = rstd.reshape(both.shape[:-1])[..., None]
        normed = saved.reshape(both.shape) * inverse
        if dq_gain is not None and dk_gain is not None:
            dq_gain += (both * normed)[:, :, :heads].sum(axis=(0, 1, 2))
            dk_gain += (both * normed)[:, :, heads:].sum(axis=(0, 1, 2))
        both[:, :, :heads] *= q_gain
        both[:, :, heads:] *= k_gain
        both[:] = (both - normed * (both * normed).mean(axis=-1, keepdims=True)) * inverse
    if dbias is not None:
        dbias += rows.sum(axis=0)
