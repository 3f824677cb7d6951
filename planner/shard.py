"""Which indices of a dimension each part of a split holds.

One map, used for parameters, data, dropout masks, byte counts and checkpoints alike, so that no two of them can
disagree: even and uneven parts, the zig-zag order that balances causal attention over a ring (Brandon et al. 2023,
arXiv:2311.09431), packed query-key-value and gate-up columns, and key-value heads shared by several ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from planner.errors import PlanError

Order = Literal["contiguous", "zigzag"]
Ranges = tuple[tuple[int, int], ...]


def split_evenly(size: int, parts: int) -> tuple[int, ...]:
    """Part sizes that differ by one at most, larger ones first: 12 over 8 is 2,2,2,2,1,1,1,1."""
    quotient, remainder = divmod(size, parts)
    return tuple(quotient + (i < remainder) for i in range(parts))


def offsets(sizes: Sequence[int]) -> tuple[int, ...]:
    """Where each part starts, and the end of the last."""
    return (0, *accumulate(sizes))


def zigzag_sizes(size: int, parts: int) -> tuple[int, ...]:
    """Part sizes of the zig-zag order: part i holds chunks i and 2p−1−i of 2p even chunks."""
    chunks = split_evenly(size, 2 * parts)
    return tuple(chunks[i] + chunks[2 * parts - 1 - i] for i in range(parts))


def ranges(sizes: Sequence[int], part: int, order: Order = "contiguous") -> Ranges:
    """The index ranges that `part` holds, in the order in which it holds them.

    Raises:
        PlanError: the parts of the zig-zag order have other sizes than `zigzag_sizes`.
    """
    if order == "contiguous":
        starts = offsets(sizes)
        return ((starts[part], starts[part + 1]),)
    count = len(sizes)
    if tuple(sizes) != zigzag_sizes(sum(sizes), count):
        raise PlanError(f"parts {tuple(sizes)} are not the zig-zag parts {zigzag_sizes(sum(sizes), count)}")
    starts = offsets(split_evenly(sum(sizes), 2 * count))
    mirror = 2 * count - 1 - part
    return (starts[part], starts[part + 1]), (starts[mirror], starts[mirror + 1])


def indices(pieces: Ranges) -> NDArray[np.int64]:
    """All indices of a tuple of ranges, in order."""
    return np.concatenate([np.arange(start, stop, dtype=np.int64) for start, stop in pieces])


def within(pieces: Ranges, start: int, stop: int) -> Ranges:
    """The ranges that positions [start, stop) of a list of ranges cover: a split of a split."""
    found: list[tuple[int, int]] = []
    seen = 0
    for low, high in pieces:
        first, last = max(start - seen, 0), min(stop - seen, high - low)
        if first < last:
            found.append((low + first, low + last))
        seen += high - low
    return tuple(found)


def shared_kv_heads(heads: int, kv_heads: int, first_head: int, last_head: int) -> tuple[int, int]:
    """The range of key-value heads that query heads [first_head, last_head) read; heads/kv_heads share one each."""
    group = heads // kv_heads
    return first_head // group, (last_head - 1) // group + 1


def packed_qkv(heads: int, kv_heads: int, head_dim: int, head_range: tuple[int, int]) -> Ranges:
    """Columns of a packed [Q | K | V] projection that belong to a range of query heads."""
    kv_first, kv_last = shared_kv_heads(heads, kv_heads, *head_range)
    bases = (0, heads, heads + kv_heads)
    spans = (head_range, (kv_first, kv_last), (kv_first, kv_last))
    return tuple(
        ((base + first) * head_dim, (base + last) * head_dim) for base, (first, last) in zip(bases, spans, strict=True)
    )


def packed_pair(size: int, piece: tuple[int, int]) -> Ranges:
    """Columns of a packed [gate | up] projection that belong to a range of feed-forward units."""
    return piece, (size + piece[0], size + piece[1])
