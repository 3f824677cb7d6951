"""Bias, norm per head and rotary positions of packed queries, keys and values, on the device."""

from __future__ import annotations

from executor.cuda.launch import (
    BLOCK_THREADS,
    add_column_sums,
    add_columns,
    ceil_div,
    lanes_of,
    launch,
    partials_for,
    statistics,
    walk,
)
from executor.reference.arrays import Floats, as_rows


def _check(qkv: Floats, *tables: Floats | None) -> None:
    """Angles and statistics are of the arithmetic type."""
    for table in tables:
        if table is not None:
            statistics(table, qkv.dtype)


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
    """See `executor.reference.heads.split_heads_forward`."""
    tokens, columns = as_rows(qkv).shape
    changed = heads + kv_heads if bias is None else heads + 2 * kv_heads
    if qkv.size == 0 or (bias is None and q_gain is None and cos is None):
        return
    width, batch = columns // (heads + 2 * kv_heads), qkv.shape[1]
    lanes = lanes_of(ceil_div(width, 2), qkv.dtype)
    grid = (ceil_div(tokens * changed * lanes, BLOCK_THREADS),)
    _check(qkv, cos, sin, rstd)
    arguments = (qkv, bias, q_gain, k_gain, float(epsilon), cos, sin, saved, rstd)
    sizes = (batch, heads, kv_heads, width, tokens, changed, lanes)
    launch("heads", "split_heads_forward", qkv.dtype, grid, (BLOCK_THREADS,), *arguments, *sizes)


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
    """See `executor.reference.heads.split_heads_backward`."""
    tokens, columns = as_rows(dqkv).shape
    if dqkv.size == 0:
        return
    _check(dqkv, cos, sin, rstd)
    dtype, width, batch = dqkv.dtype, columns // (heads + 2 * kv_heads), dqkv.shape[1]
    if saved is not None and dq_gain is not None and dk_gain is not None:
        grid, block = walk(tokens, (heads + kv_heads) * ceil_div(width, 2), dtype)
        q_partials = partials_for(grid, heads * width, dtype, dq_gain)
        k_partials = partials_for(grid, kv_heads * width, dtype, dk_gain)
        sums = (q_partials, k_partials, batch, heads, kv_heads, width, tokens)
        launch("heads", "split_heads_gains", dtype, grid, block, dqkv, saved, rstd, cos, sin, *sums)
        # [blocks, heads · d] is [blocks · heads, d] in memory: the sum over heads is one over rows.
        add_columns(q_partials, dq_gain, dtype)
        add_columns(k_partials, dk_gain, dtype)
    if saved is not None or cos is not None:
        lanes = lanes_of(ceil_div(width, 2), dtype)
        grid_size = (ceil_div(tokens * (heads + kv_heads) * lanes, BLOCK_THREADS),)
        arguments = (dqkv, saved, rstd, q_gain, k_gain, cos, sin)
        sizes = (batch, heads, kv_heads, width, tokens, lanes)
        launch("heads", "split_heads_backward", dtype, grid_size, (BLOCK_THREADS,), *arguments, *sizes)
    add_column_sums(as_rows(dqkv), dbias)
