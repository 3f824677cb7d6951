"""Tiles of attention's operands: where BLAS and the cache want them, and how they get there.

Activations are [S, B, heads, d], so the rows of one head lie B · heads · d elements apart, often a multiple of 4 KiB:
they share a few sets of the cache and push each other out. Products on such rows take two to three times as long as on
adjacent ones. So the heads of a group, whose columns adjoin, are copied together into tiles of their own.
"""

from __future__ import annotations

import functools
import threading
from typing import Any

import numpy as np
import threadpoolctl
from llvmlite import ir  # type: ignore[import-untyped]
from numba import types

from executor.environment import AVX512_KERNELS
from executor.fused.compile import helper, intrinsic
from executor.fused.matmul import gemm
from executor.reference.arrays import Floats, Ints, aligned_bytes

_local = threading.local()

TILES = "int64, int64, int64, T[::1]"
"""Types of what kernels are told of tiles: queries and keys of one, heads of a group, scratch memory."""

GROUP_BYTES = 4 * 1024**2
"""What the operands of a group of heads may take. Tiles are read in order, so that those which leave the L2 cache come
back in time, and rows of many heads are copied faster than those of few."""

SMALL_PRODUCT = 1_000_000
"""Largest m·n·k for which OpenBLAS multiplies in place instead of packing both factors first."""

SMALL_TILE = (256, 128)
"""Most queries, and keys, of a tile where BLAS has kernels for small products."""

LANES = 8
"""Rows and columns that `transpose_to` exchanges in registers."""

LINE = 16
"""Elements by which tiles begin: a cache line of float32, two of float64."""


@functools.cache
def has_small_kernels() -> bool:
    """Whether BLAS has kernels for small products: OpenBLAS on AVX-512, which runs them on the calling thread."""
    found = [library for library in threadpoolctl.threadpool_info() if library["user_api"] == "blas"]
    return bool(found) and all(library.get("architecture") in AVX512_KERNELS for library in found)


def tile_sizes(
    queries: int, keys: int, width: int, largest: tuple[int, int], keys_of_small: int = SMALL_TILE[1]
) -> tuple[int, int]:
    """Queries and keys of a tile, for products with an inner or outer dimension of `width`.

    Kernels for small products do not pack their factors, which takes a fifth of a product of 128 x 128 x 64; on
    aligned, adjacent rows they outrun large products. Where BLAS has none, tiles are as large as the caller allows.
    """
    if not has_small_kernels():
        return max(1, min(queries, largest[0])), max(1, min(keys, largest[1]))
    columns = max(1, min(keys, keys_of_small))
    most = min(SMALL_TILE[0], max(LANES, SMALL_PRODUCT // (columns * max(1, width)) // LANES * LANES))
    parts = max(1, -(-queries // most))
    return -(-queries // (parts * LANES)) * LANES if parts > 1 else max(1, queries), columns


def heads_of_group(kv_index: Ints, bytes_per_head: int) -> tuple[int, int]:
    """Query heads whose operands are copied together, and the key-value heads that they span at most."""
    heads = len(kv_index)
    group = max(1, min(heads, GROUP_BYTES // max(1, bytes_per_head)))
    spans = [kv_index[first : first + group] for first in range(0, heads, group)]
    return group, max((int(span.max() - span.min()) + 1 for span in spans), default=1)


@intrinsic  # type: ignore[untyped-decorator]
def _transpose_block(typing_context: Any, x: Any, i: Any, j: Any, out: Any) -> Any:
    """Compute out[j : j + 8, i : i + 8] = x[i : i + 8, j : j + 8]ᵀ; elements of a row are adjacent in both.

    Three rounds exchange the off-diagonal halves, quarters and eighths of pairs of rows.
    """
    signature = types.void(x, types.intp, types.intp, out)

    def generate(context: Any, builder: Any, sig: Any, arguments: Any) -> Any:
        source, target = (context.make_array(sig.args[n])(context, builder, arguments[n]) for n in (0, 3))
        row, column = arguments[1], arguments[2]
        element = context.get_data_type(sig.args[0].dtype)
        vector, bits = ir.VectorType(element, LANES), ir.IntType(32)
        size = row.type(context.get_abi_sizeof(element))

        def place(array: Any, first: Any, second: Any) -> Any:
            stride = builder.extract_value(array.strides, 0)
            offset = builder.add(builder.mul(first, stride), builder.mul(second, size))
            start = builder.bitcast(array.data, ir.IntType(8).as_pointer())
            return builder.bitcast(builder.gep(start, [offset]), vector.as_pointer())

        rows = []
        for lane in range(LANES):
            load = builder.load(place(source, builder.add(row, row.type(lane)), column))
            load.align = size.constant
            rows.append(load)
        for step in (1, 2, 4):
            upper = [lane if not lane & step else LANES + (lane ^ step) for lane in range(LANES)]
            lower = [lane ^ step if not lane & step else LANES + lane for lane in range(LANES)]
            for first in range(LANES):
                if not first & step:
                    pair = rows[first], rows[first | step]
                    for at, mask in ((first, upper), (first | step, lower)):
                        rows[at] = builder.shuffle_vector(*pair, ir.Constant(ir.VectorType(bits, LANES), mask))
        for lane in range(LANES):
            store = builder.store(rows[lane], place(target, builder.add(column, column.type(lane)), row))
            store.align = size.constant
        return context.get_dummy_value()

    return signature, generate


@helper
def transpose_to(x: Any, out: Any) -> None:
    """Compute out [d, n] = xᵀ of x [n, d], whose rows lie any distance apart; for tiles that fit the cache."""
    rows, columns = x.shape
    whole_rows, whole_columns = rows - rows % LANES, columns - columns % LANES
    for i in range(0, whole_rows, LANES):
        for j in range(0, whole_columns, LANES):
            _transpose_block(x, i, j, out)
    for i in range(rows):
        for j in range(whole_columns if i < whole_rows else 0, columns):
            out[j, i] = x[i, j]


def pitch_of(columns: int, itemsize: int) -> int:
    """Elements from row to row of a tile: rows a multiple of 512 bytes apart would share few sets of the L1 cache."""
    return columns + LINE if columns > 0 and columns * itemsize % 512 == 0 else columns


pitch = helper(pitch_of)  # in Python, calling this one would compile it in every process


@helper
def take(buffer: Any, parts: Any, rows: Any, columns: Any) -> Any:
    """The first part of a flat buffer as an array [parts, rows, pitch], and the rest of the buffer."""
    distance = pitch(columns, buffer.itemsize)
    size = parts * rows * distance
    return buffer[:size].reshape(parts, rows, distance), buffer[-(-size // LINE) * LINE :]


def scratch_for(dtype: np.dtype[Any], *shapes: tuple[int, int, int]) -> Floats:
    """Return a flat buffer from which arrays of these parts, rows and columns can be taken.

    The thread keeps it and every kernel reuses it. It begins on a cache line, and so do the arrays: loads that straddle
    two lines slow small products by a quarter.
    """
    sizes = (parts * rows * pitch_of(columns, dtype.itemsize) for parts, rows, columns in shapes)
    needed = sum(-(-size // LINE) * LINE for size in sizes)
    pool: dict[np.dtype[Any], Floats] = _local.__dict__.setdefault("pool", {})
    if dtype not in pool or pool[dtype].size < needed:
        pool[dtype] = aligned_bytes(needed * dtype.itemsize).view(dtype)
    return pool[dtype]


@helper
def gather(x: Any, out: Any) -> None:
    """Copy heads of x [n, g, d] into tiles out [g, n, ·]."""
    for i in range(x.shape[0]):
        for head in range(x.shape[1]):
            for c in range(x.shape[2]):
                out[head, i, c] = x[i, head, c]


@helper
def scatter(x: Any, out: Any, onto: Any) -> None:
    """Copy tiles x [g, n, ·] into heads of out [n, g, d]; add those whose flag in `onto` [g] is set."""
    for i in range(out.shape[0]):
        for head in range(out.shape[1]):
            if onto[head]:
                for c in range(out.shape[2]):
                    out[i, head, c] += x[head, i, c]
            else:
                for c in range(out.shape[2]):
                    out[i, head, c] = x[head, i, c]


@helper
def gather_across(x: Any, out: Any, tile: Any) -> None:
    """Copy heads of x [n, g, d], transposed: every `tile` rows of a head are a matrix of out [g · tiles, d, ·]."""
    rows, tiles = x.shape[0], -(-x.shape[0] // tile)
    for first in range(0, rows, tile):
        for i in range(first, min(first + tile, rows), LANES):
            end = min(i + LANES, first + tile, rows)
            for head in range(x.shape[1]):
                transpose_to(x[i:end, head], out[head * tiles + first // tile, :, i - first : end - first])


@helper
def multiply_across(alpha: Any, rows: Any, across: Any, out: Any, tile: Any) -> None:
    """Compute out [n, m] = alpha rows [n, d] · y, for the transposed tiles of y that `gather_across` made of m rows."""
    columns = out.shape[1]
    for first in range(0, columns, tile):
        last = min(first + tile, columns)
        y = across[first // tile, :, : last - first]
        gemm(alpha, rows, False, y, False, out.dtype.type(0.0), out[:, first:last])


@helper
def span_of(index: Any) -> Any:
    """The range [first, end) of key-value heads that some query heads read."""
    return index.min(), index.max() + np.int64(1)


@helper
def visits(h0: Any, h1: Any, queries: Any, tile: Any) -> Any:
    """Heads from h0 to h1, and the ranges of queries that make their tiles."""
    for head in range(h0, h1):
        for i0 in range(0, queries, tile):
            yield head, i0, min(i0 + tile, queries)


@helper
def add_gradients(
    scale: Any, weights: Any, d_scores: Any, q: Any, dout: Any, k: Any, dq: Any, dk: Any, dv: Any
) -> None:
    """Add what a tile of (dropped) weights and of gradients of scores contributes to dq, dk and dv."""
    one = dq.dtype.type(1.0)
    gemm(one, weights, True, dout, False, one, dv)
    gemm(scale, d_scores, True, q, False, one, dk)
    gemm(scale, d_scores, False, k, False, one, dq)


@helper
def zero_unread(read: Any, dk: Any, dv: Any) -> None:
    """Set gradients [S, heads, d] of the key-value heads that no query reads."""
    for source in range(dk.shape[1]):
        if not read[source]:
            dk[:, source] = 0
            dv[:, source] = 0
