"""Tiles of attention: what is copied comes back, products stay small, and every grouping gives the same gradients."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import executor.fused.attention as fused_attention
import executor.fused.blocked as fused_blocked
import executor.reference.attention as reference_attention
from executor.fused import tiles
from executor.reference.masking import Masking

sizes = st.integers(1, 37)
dtypes = st.sampled_from([np.float32, np.float64])


@numba.njit  # type: ignore[untyped-decorator]
def transpose(x: Any, out: Any) -> None:
    tiles.transpose_to(x, out)


@numba.njit  # type: ignore[untyped-decorator]
def there_and_back(x: Any, buffer: Any, across: Any, tile: Any, out: Any, onto: Any) -> None:
    rows, _ = tiles.take(buffer, x.shape[1], x.shape[0], x.shape[2])
    tiles.gather(x, rows)
    tiles.gather_across(x, across, tile)
    tiles.scatter(rows, out, onto)


def normal(seed: int, dtype: Any, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


@settings(deadline=None, max_examples=40)
@given(sizes, sizes, dtypes)
def test_transposes_of_any_shape_and_row_distance(n, m, dtype):
    x = normal(n, dtype, n, m + 5)[:, 2 : 2 + m]
    room = np.full((m + 2, n + 3), 7, dtype)
    transpose(x, room[1:-1, 1:-2])
    np.testing.assert_array_equal(room[1:-1, 1:-2], x.T)
    room[1:-1, 1:-2] = 7
    assert (room == 7).all()  # nothing around it was touched


@settings(deadline=None, max_examples=40)
@given(sizes, st.integers(1, 5), st.sampled_from([1, 3, 8, 64, 128]), st.integers(1, 40), dtypes)
def test_heads_are_copied_into_tiles_and_back(n, heads, width, tile, dtype):
    x = normal(n, dtype, n, 2, heads + 2, width)[:, 1, 1 : 1 + heads]
    parts = -(-n // tile)
    buffer = tiles.scratch_for(np.dtype(dtype), (heads, n, width))
    assert buffer.ctypes.data % 64 == 0
    across, out = np.zeros((heads * parts, width, tile + 2), dtype), np.ones((n, 3, heads, width), dtype)
    onto = np.arange(heads) % 2 == 1
    there_and_back(x, buffer, across, tile, out[:, 1], onto)
    np.testing.assert_array_equal(out[:, 1], x + onto[:, None].astype(dtype))
    assert (out[:, [0, 2]] == 1).all()
    for head in range(heads):
        for part in range(parts):
            rows = x[part * tile : (part + 1) * tile, head]
            np.testing.assert_array_equal(across[head * parts + part][:, : len(rows)], rows.T)


@given(st.integers(0, 5000), st.integers(0, 5000), st.sampled_from([8, 32, 64, 80, 128, 256]))
def test_tiles_are_products_that_blas_need_not_pack(queries, keys, width):
    rows, columns = tiles.tile_sizes(queries, keys, width, (512, 256))
    assert rows >= 1
    assert columns >= 1
    if tiles.has_small_kernels() and width <= 128:
        assert rows * columns * width <= max(tiles.SMALL_PRODUCT, tiles.LANES * columns * width)
    elif not tiles.has_small_kernels():
        assert (rows, columns) == (max(1, min(queries, 512)), max(1, min(keys, 256)))


@pytest.mark.parametrize("small", [True, False])
@pytest.mark.parametrize("group_bytes", [1, 3000, 2**22])  # one head at a time, two, all
@pytest.mark.parametrize(("causal", "rate"), [(False, 0.0), (True, 0.3)])
def test_groups_of_heads_that_share_keys_give_the_gradients_of_the_reference(
    monkeypatch, small, group_bytes, causal, rate
):
    monkeypatch.setattr(tiles, "GROUP_BYTES", group_bytes)
    monkeypatch.setattr(tiles, "has_small_kernels", lambda: small)
    S, B, heads, kv, d = 300, 2, 5, 4, 4
    kv_index = np.array([1, 1, 3, 3, 1])  # shared within groups and across them; no query reads 0 and 2
    places = np.random.default_rng(0).permutation(S)
    mask = Masking(0.5, kv_index, causal, None, places, places, rate, 99, np.arange(B), np.arange(heads))
    q, k, v = (normal(i, np.float64, S, B, n, d) for i, n in enumerate((heads, kv, kv)))
    dout, p, lse = normal(3, np.float64, *q.shape), np.empty((B, heads, S, S)), np.empty((B, heads, S))
    expected = [np.empty_like(x) for x in (q, q, k, v)]
    reference_attention.attention_forward(q, k, v, mask, p, expected[0])
    reference_attention.attention_backward(dout, q, k, v, mask, p, *expected[1:])
    for plain in (True, False):
        found = [np.full_like(x, np.nan) for x in expected]
        if plain:
            fused_attention.attention_forward(q, k, v, mask, p, found[0])
            fused_attention.attention_backward(dout, q, k, v, mask, p, *found[1:])
        else:
            fused_blocked.blocked_attention_forward(q, k, v, mask, found[0], lse)
            fused_blocked.blocked_attention_backward(dout, q, k, v, mask, found[0], lse, *found[1:])
        for ours, theirs in zip(found, expected, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=2e-13)
