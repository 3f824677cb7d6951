"""Token embedding, and learned positions with token type and dropout."""

from __future__ import annotations

from typing import Any

import numpy as np

from executor.fused.compile import kernel
from executor.fused.dropout import fill_mask, row_key
from executor.fused.rows import BLOCK_ROWS, add_to, copy_to, vector_or_empty, vector_or_zeros
from executor.reference.arrays import Floats, Ints, as_rows
from executor.reference.dropout import threshold_of


@kernel("void(int64[::1], T[:, ::1], int64, T[:, ::1])")
def _embedding_forward(ids: Any, table: Any, first_row: Any, out: Any) -> None:
    for t in range(ids.size):
        row = ids[t] - first_row
        if 0 <= row < table.shape[0]:
            for j in range(out.shape[1]):
                out[t, j] = table[row, j]
        else:
            for j in range(out.shape[1]):
                out[t, j] = 0


def embedding_forward(ids: Ints, table: Floats, first_row: int, out: Floats) -> None:
    """See `executor.reference.embedding.embedding_forward`."""
    _embedding_forward[table.dtype](ids.reshape(-1), table, first_row, as_rows(out))


@kernel("void(int64[::1], T[:, ::1], T[:, ::1], int64)")
def _embedding_backward(ids: Any, dout: Any, dtable: Any, first_row: Any) -> None:
    for t in range(ids.size):
        row = ids[t] - first_row
        if 0 <= row < dtable.shape[0]:
            for j in range(dout.shape[1]):
                dtable[row, j] += dout[t, j]


def embedding_backward(ids: Ints, dout: Floats, dtable: Floats, first_row: int) -> None:
    """See `executor.reference.embedding.embedding_backward`."""
    _embedding_backward[dtable.dtype](ids.reshape(-1), as_rows(dout), dtable, first_row)


_DROPOUT = (
    "uint32, T, uint64, int64[::1], int64[::1], uint32"  # threshold, scale, key, samples, positions, first column
)


@kernel(f"void(T[:, ::1], T[:, ::1], int64, T[::1], {_DROPOUT}, T[:, ::1])")
def _add_positions_forward(
    x: Any, table: Any, first_row: Any, type_row: Any, threshold: Any, scale: Any, key: Any, samples: Any,
    positions: Any, first_column: Any, out: Any,
) -> None:  # fmt: skip
    mask, nothing = np.ones(x.shape[1], x.dtype), np.zeros(x.shape[1], x.dtype)
    result = np.empty(x.shape[1], x.dtype)
    for t in range(x.shape[0]):
        s, b = divmod(t, samples.size)
        if threshold > 0:
            fill_mask(mask, row_key(key, samples[b], positions[s], 0), threshold, scale, first_column)
        row = positions[s] - first_row
        position = table[row] if 0 <= row < table.shape[0] else nothing
        for j in range(x.shape[1]):
            result[j] = mask[j] * (x[t, j] + position[j] + type_row[j])
        copy_to(out[t], result)


def _table_or_empty(table: Floats | None, like: Floats) -> Floats:
    return np.empty((0, like.shape[-1]), like.dtype) if table is None else table


def add_positions_forward(
    x: Floats,
    positions: Ints,
    table: Floats | None,
    type_row: Floats | None,
    rate: float,
    key: int,
    samples: Ints,
    out: Floats,
    *,
    first_row: int = 0,
    first_column: int = 0,
) -> None:
    """See `executor.reference.embedding.add_positions_forward`."""
    dropout = (threshold_of(rate), 1.0 / (1.0 - rate), np.uint64(key), samples, positions, first_column)
    _add_positions_forward[x.dtype](
        as_rows(x), _table_or_empty(table, x), first_row, vector_or_zeros(type_row, x), *dropout, as_rows(out)
    )


@kernel(f"void(T[:, ::1], T[:, ::1], int64, T[::1], {_DROPOUT}, T[:, ::1])")
def _add_positions_backward(
    dout: Any, dtable: Any, first_row: Any, dtype_row: Any, threshold: Any, scale: Any, key: Any, samples: Any,
    positions: Any, first_column: Any, dx: Any,
) -> None:  # fmt: skip
    width = dout.shape[1]
    mask, part = np.ones(width, dout.dtype), np.zeros(width, dout.dtype)
    part_type, result = np.zeros(width, dout.dtype), np.empty(width, dout.dtype)
    for s in range(positions.size):
        for b in range(samples.size):
            t = s * samples.size + b
            if threshold > 0:
                fill_mask(mask, row_key(key, samples[b], positions[s], 0), threshold, scale, first_column)
            for j in range(width):
                result[j] = mask[j] * dout[t, j]
                part[j] += result[j]
            copy_to(dx[t], result)
        for j in range(dtype_row.size):
            part_type[j] += part[j]
        row = positions[s] - first_row
        if 0 <= row < dtable.shape[0]:
            for j in range(width):
                dtable[row, j] += part[j]
        for j in range(width):
            part[j] = 0
        if dtype_row.size > 0 and s % BLOCK_ROWS == BLOCK_ROWS - 1:
            add_to(dtype_row, part_type)
    if dtype_row.size > 0:
        add_to(dtype_row, part_type)


def add_positions_backward(
    dout: Floats,
    positions: Ints,
    dtable: Floats | None,
    dtype_row: Floats | None,
    rate: float,
    key: int,
    samples: Ints,
    dx: Floats,
    *,
    first_row: int = 0,
    first_column: int = 0,
) -> None:
    """See `executor.reference.embedding.add_positions_backward`."""
    dropout = (threshold_of(rate), 1.0 / (1.0 - rate), np.uint64(key), samples, positions, first_column)
    _add_positions_backward[dx.dtype](
        as_rows(dout), _table_or_empty(dtable, dx), first_row, vector_or_empty(dtype_row, dx), *dropout, as_rows(dx)
    )
