"""Token embedding of a range of vocabulary rows, and learned positions, on the device."""

from __future__ import annotations

from executor.cuda.indices import on_device
from executor.cuda.launch import (
    add_columns,
    ceil_div,
    dropout_arguments,
    launch,
    partials_for,
    row_threads,
    vector_size,
    walk,
)
from executor.reference.arrays import Floats, Ints, as_rows


def embedding_forward(ids: Ints, table: Floats, first_row: int, out: Floats) -> None:
    """See `executor.reference.embedding.embedding_forward`."""
    rows, width = as_rows(out).shape
    if out.size:
        grid, block = walk(rows, width, out.dtype)
        arguments = (on_device(ids), table, first_row, table.shape[0], out, rows, width)
        launch("embedding", "embedding_forward", out.dtype, grid, block, *arguments)


def embedding_backward(ids: Ints, dout: Floats, dtable: Floats, first_row: int) -> None:
    """See `executor.reference.embedding.embedding_backward`."""
    rows, width = as_rows(dout).shape
    if dout.size and dtable.size:
        threads = row_threads(width, dout.dtype)
        grid = (dtable.shape[0], min(ceil_div(width, threads * vector_size(dout.dtype)), 65535))
        arguments = (on_device(ids), dout, dtable, first_row, rows, width)
        launch(
            "embedding", "embedding_backward", dout.dtype, grid, (threads,), *arguments, gradient=dtable.dtype
        )  # fmt: skip


def _rows_of(table: Floats | None) -> int:
    return 0 if table is None else table.shape[0]


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
    rows, width = as_rows(x).shape
    if x.size:
        dropout = dropout_arguments(rate, key, on_device(samples), on_device(positions), first_column)
        grid, block = walk(rows, width, x.dtype)
        arguments = (x, table, type_row, first_row, _rows_of(table), *dropout, out, rows, width)
        launch("embedding", "add_positions_forward", x.dtype, grid, block, *arguments)


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
    """See `executor.reference.embedding.add_positions_backward`; the positions are distinct."""
    width = as_rows(dout).shape[1]
    if dout.size == 0:
        return
    seq = positions.size
    dropout = dropout_arguments(rate, key, on_device(samples), on_device(positions), first_column)
    grid, block = walk(seq, width, dout.dtype)
    partials = partials_for(grid, width, dout.dtype, dtype_row)
    arguments = (dout, dtable, partials, first_row, _rows_of(dtable), *dropout, dx, seq, width)
    gradient = dout.dtype if dtable is None else dtable.dtype
    launch("embedding", "add_positions_backward", dout.dtype, grid, block, *arguments, gradient=gradient)
    add_columns(partials, dtype_row, dout.dtype)
