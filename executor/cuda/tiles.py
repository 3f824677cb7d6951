"""What attention shares: the tiles of scores that it works through, their masks, and products by head.

A tile is a block of queries, of all heads and sequences, by the keys that any of them can see: with a causal mask and
ascending positions that is all but half of the work. Scores are computed by batched products of cuBLAS over the heads,
straight from the strided views of a packed buffer, and one kernel per tile turns them into probabilities.

Nobody else's fused attention is called: CuPy 14 has no binding of cuDNN (https://docs.cupy.dev/en/latest/upgrade.html),
whose frontend is a package of its own, and Triton's launcher finds device and stream through PyTorch. Our own, in
`executor.cuda.flash`, takes 16-bit heads, and none of the scratch memory below.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import cupy
import numpy as np

from executor.cuda import cublas
from executor.cuda.indices import on_device, on_host
from executor.cuda.launch import arithmetic, row_threads
from executor.reference.arrays import Floats, Ints
from executor.reference.dropout import threshold_of
from executor.reference.masking import Masking

TILE_BYTES = 512 << 20
"""Scratch memory that one tile may take: enough that launches cost little, beside the gigabytes of activations."""

_GRANULE = 64  # keys and queries of a tile are multiples: tensor cores and 16-byte accesses ask for 8
_CAUSAL_BLOCKS = 8  # tiles along the queries where a mask lets each see fewer keys: (n + 1) / 2n of the work is left
_FEWEST_ROWS = 128  # below this a product over a tile does not fill the device


class Span(NamedTuple):
    """Queries first .. last by keys start .. stop of a tile."""

    first: int
    last: int
    start: int
    stop: int


@dataclass
class Seen:
    """What a `Masking` says, on the device; made once per call."""

    masking: Masking
    kv_heads: tuple[int, ...]
    back: int
    ahead: int
    q_positions: Any
    k_positions: Any
    known: tuple[Ints, Ints]  # positions of queries and keys on the host
    dropout: tuple[Any, ...]  # threshold, 1 / (1 - rate), key, samples and head_ids

    @classmethod
    def of(cls, masking: Masking) -> Seen:
        """Upload what is not on the device yet."""
        rate, (back, ahead) = masking.rate, masking.reach
        return cls(
            masking=masking,
            kv_heads=tuple(on_host(masking.kv_index).tolist()),
            back=back,
            ahead=ahead,
            q_positions=on_device(masking.q_positions, np.int32),
            k_positions=on_device(masking.k_positions, np.int32),
            known=(on_host(masking.q_positions), on_host(masking.k_positions)),
            dropout=(
                threshold_of(rate), 1.0 / (1.0 - rate), masking.key, on_device(masking.samples),
                on_device(masking.head_ids),
            ),
        )  # fmt: skip

    def arguments(self, span: Span) -> tuple[Any, ...]:
        """SCORES_PARAMETERS of softmax.cu."""
        return (
            span.stop - span.start, span.first, self.q_positions.size, self.back, self.ahead, self.q_positions,
            self.k_positions[span.start :], self.masking.limited, *self.dropout,
        )  # fmt: skip

    def spans(self, rows: int, *, from_first_key: bool = False) -> Iterator[Span]:
        """Tiles of at most `rows` queries by the keys that they may see; stop = start where they see none.

        Args:
            rows: most queries of a tile.
            from_first_key: keys that come before the first visible one belong to the tile too.
        """
        queries, keys = self.q_positions.size, self.k_positions.size
        for first in range(0, queries, rows):
            last = min(first + rows, queries)
            start, stop = self._visible(first, last) if self.masking.limited else (0, keys)
            yield Span(first, last, 0 if from_first_key else start, stop)

    def _visible(self, first: int, last: int) -> tuple[int, int]:
        """First and one past the last key that a query of a block may see, widened to whole granules."""
        mine, theirs = self.known[0][first:last], self.known[1]
        seen = np.flatnonzero((theirs >= mine.min() - self.back) & (theirs <= mine.max() + self.ahead))
        if seen.size == 0:
            return 0, 0
        start, stop = int(seen[0]), int(seen[-1]) + 1
        return start - start % _GRANULE, min(stop + -stop % _GRANULE, theirs.size)


def tile_rows(batch: int, heads: int, queries: int, keys: int, dtype: np.dtype[Any], limited: bool) -> int:
    """Queries of a tile, a function of shapes alone."""
    row_bytes = batch * heads * keys * 2 * (arithmetic(dtype).itemsize + dtype.itemsize)
    rows = TILE_BYTES // max(1, row_bytes)
    if limited:
        rows = min(rows, max(_FEWEST_ROWS, -(-queries // _CAUSAL_BLOCKS)))
    return max(1, min(queries, rows - rows % _GRANULE if rows > _GRANULE else rows))


def tile(batch: int, heads: int, span: Span, dtype: np.dtype[Any]) -> Any:
    """Uninitialised scores [batch, heads, queries, keys] of a tile."""
    return cupy.empty((batch, heads, span.last - span.first, span.stop - span.start), dtype)


def in_place_or_new(x: Floats, dtype: np.dtype[Any]) -> Floats:
    """Room like a C-contiguous x for elements of this type: x itself where it is of that type already."""
    room: Floats = x if x.dtype == dtype else cupy.empty(x.shape, dtype)
    return room


def strides(x: Floats) -> tuple[int, int]:
    """Elements from one head to the next and from one row to the next of [batch, heads, rows, keys]."""
    assert x.shape[0] == 1 or x.strides[0] == x.shape[1] * x.strides[1], "sequences follow each other like heads"
    return x.strides[1] // x.itemsize, x.strides[2] // x.itemsize


def score_block(keys: int, dtype: np.dtype[Any]) -> tuple[int]:
    """Threads for one row of scores."""
    return (row_threads(keys, dtype),)


# ---- products by head ------------------------------------------------------------------------------------------------


class HeadBatch(NamedTuple):
    """Query heads and the key-value heads that they read, both in arithmetic progression: one batched product."""

    queries: slice
    kv: slice
    size: int


@functools.lru_cache(maxsize=64)
def head_batches(kv_heads: tuple[int, ...], distinct: bool) -> tuple[HeadBatch, ...]:
    """Cut (query head, key-value head) pairs into few batches.

    Args:
        kv_heads: the key-value head of each query head.
        distinct: no two pairs of a batch may share a key-value head, because the product adds to its gradient.
    """
    in_rounds: dict[int, list[tuple[int, int]]] = {}
    for query, source in enumerate(kv_heads):
        in_rounds.setdefault(kv_heads[:query].count(source), []).append((query, source))
    rounds = [run for pairs in in_rounds.values() for run in _runs(sorted(pairs, key=lambda pair: pair[1]), 1)]
    shared = _runs(list(enumerate(kv_heads)), 0)
    chosen = rounds if distinct or len(rounds) < len(shared) else shared
    return tuple(map(_batch, chosen))


def _runs(pairs: list[tuple[int, int]], least_step: int) -> list[list[tuple[int, int]]]:
    """Maximal arithmetic progressions of neighbours; query heads ascend, key-value heads by at least a step."""
    runs: list[list[tuple[int, int]]] = []
    for pair in pairs:
        run = runs[-1] if runs else []
        step = (pair[0] - run[-1][0], pair[1] - run[-1][1]) if run else (0, 0)
        fits = bool(run) and step[0] > 0 and step[1] >= least_step
        if fits and (len(run) == 1 or step == (run[1][0] - run[0][0], run[1][1] - run[0][1])):
            run.append(pair)
        else:
            runs.append([pair])
    return runs


def _batch(run: list[tuple[int, int]]) -> HeadBatch:
    first, last = run[0], run[-1]
    step = (run[1][0] - first[0], run[1][1] - first[1]) if len(run) > 1 else (1, 1)
    kv = slice(first[1], last[1] + 1, step[1]) if step[1] else slice(first[1], first[1] + 1)
    return HeadBatch(slice(first[0], last[0] + 1, step[0]), kv, len(run))


def by_head(x: Floats) -> Floats:
    """View [S, B, heads, d] as [B, heads, S, d]."""
    return x.transpose(1, 2, 0, 3)


def multiply(
    a: Floats, b: Floats, out: Floats, kv_heads: tuple[int, ...], kv: str, *, transpose_a: bool = False,
    transpose_b: bool = False, alpha: float = 1.0, accumulate: bool = False,
) -> None:  # fmt: skip
    """Multiply matrices of every sequence and query head: out = alpha op(a) op(b), or added to out.

    Args:
        a: [B, heads, ...], by query head.
        b: [B, heads, ...], by query or key-value head.
        out: [B, heads, ...], by query or key-value head.
        kv_heads: the key-value head of each query head.
        kv: "b" or "out", which of the two goes by key-value head.
        transpose_a: see `executor.cuda.cublas.gemm`, like transpose_b, alpha and accumulate.
        transpose_b: see transpose_a.
        alpha: see transpose_a.
        accumulate: see transpose_a.
    """
    flags: dict[str, Any] = {
        "transpose_a": transpose_a, "transpose_b": transpose_b, "alpha": alpha, "accumulate": accumulate,
    }  # fmt: skip
    batches = head_batches(kv_heads, distinct=kv == "out")
    if len(batches) * a.shape[0] > len(kv_heads):  # a batch over the sequences of each head takes fewer calls
        for query, source in enumerate(kv_heads):
            pair = (source, query) if kv == "b" else (query, source)
            cublas.gemm_batched(a[:, query], b[:, pair[0]], out[:, pair[1]], **flags)
        return
    for sequence in range(a.shape[0]):
        for batch in batches:
            second, target = (batch.kv, batch.queries) if kv == "b" else (batch.queries, batch.kv)
            factor = b[sequence, second]
            if factor.shape[0] != batch.size:
                factor = cupy.broadcast_to(factor, (batch.size, *factor.shape[1:]))
            cublas.gemm_batched(a[sequence, batch.queries], factor, out[sequence, target], **flags)
