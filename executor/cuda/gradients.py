"""Gradients of keys and values, summed over tiles of queries."""

from __future__ import annotations

import cupy

from executor.cuda.launch import BLOCK_THREADS, arithmetic, ceil_div, lanes_of, launch
from executor.cuda.tiles import Span, by_head, multiply
from executor.reference.arrays import Floats


def head_launch(x: Floats) -> tuple[tuple[int], tuple[int], tuple[int, ...]]:
    """Grid, block and ROWS_PARAMETERS of head_rows.cu for an array [S, B, heads, d]."""
    seq, batch, heads, width = x.shape
    lanes = lanes_of(width, x.dtype)
    return (ceil_div(seq * batch * heads * lanes, BLOCK_THREADS),), (BLOCK_THREADS,), (seq, batch, heads, width, lanes)


def head_strides(x: Floats) -> tuple[int, int, int]:
    """Elements from one position, sequence and head to the next."""
    assert x.shape[3] <= 1 or x.strides[3] == x.itemsize, "the elements of a head are adjacent"
    s, b, h = (stride // x.itemsize for stride in x.strides[:3])
    return s, b, h


class KeyValueGradients:
    """Sums of the tiles' contributions to dk and dv [Sk, B, kv, d]: in float32 where those have 16 bits.

    Args:
        dk: gradient of the keys.
        dv: gradient of the values.
        onto: add to what the two hold, instead of overwriting it.
    """

    def __init__(self, dk: Floats, dv: Floats, *, onto: bool) -> None:
        self._targets, self._onto = (dk, dv), onto
        wide = arithmetic(dk.dtype)
        self._narrow = wide != dk.dtype
        self._sums = tuple(cupy.zeros(x.shape, wide) for x in self._targets) if self._narrow else self._targets
        if not onto and not self._narrow:
            for target in self._targets:
                target[...] = 0

    def add(
        self, span: Span, d_scores: Floats, weights: Floats, q: Floats, dout: Floats, kv_heads: tuple[int, ...],
        scale: float,
    ) -> None:  # fmt: skip
        """Add a tile's part: dk += scale d_scoresᵀ q, dv += weightsᵀ dout.

        Args:
            span: which tile.
            d_scores: [B, heads, queries, keys].
            weights: probabilities after dropout, like d_scores.
            q: [B, heads, queries, d].
            dout: like q.
            kv_heads: key-value head of each query head.
            scale: factor of the scores.
        """
        dk, dv = (by_head(x[span.start : span.stop]) for x in self._sums)
        multiply(d_scores, q, dk, kv_heads, "out", transpose_a=True, alpha=scale, accumulate=True)
        multiply(weights, dout, dv, kv_heads, "out", transpose_a=True, accumulate=True)

    def finish(self) -> None:
        """Write the sums where they belong."""
        if not self._narrow:
            return
        for target, total in zip(self._targets, self._sums, strict=True):
            if target.size:
                grid, block, sizes = head_launch(target)
                arguments = (target, *head_strides(target), total, self._onto, *sizes)
                launch("head_rows", "narrow_heads", target.dtype, grid, block, *arguments)
