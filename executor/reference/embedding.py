"""Token embedding of a range of vocabulary rows, and learned positions with token type and dropout."""

from __future__ import annotations

import numpy as np

from executor.reference.arrays import Floats, Ints, as_rows
from executor.reference.dropout import token_mask


def embedding_forward(ids: Ints, table: Floats, first_row: int, out: Floats) -> None:
    """Look up rows of a vocabulary shard; ids of other shards give zeros, so that the shards' outputs add up.

    Args:
        ids: token ids [S, B].
        table: rows first_row, first_row + 1, ... of the whole table, [Vloc, H].
        first_row: token id of row 0.
        out: [S, B, H].
    """
    rows = ids.reshape(-1) - first_row
    here = (rows >= 0) & (rows < table.shape[0])
    as_rows(out)[:] = np.where(here[:, None], table[np.where(here, rows, 0)], 0) if table.shape[0] else 0


def embedding_backward(ids: Ints, dout: Floats, dtable: Floats, first_row: int) -> None:
    """Add each token's gradient to its row, in the order of the tokens (so the sum is the same run to run).

    Args:
        ids: [S, B].
        dout: [S, B, H].
        dtable: [Vloc, H], added to.
        first_row: token id of row 0.
    """
    rows = ids.reshape(-1) - first_row
    here = (rows >= 0) & (rows < dtable.shape[0])
    np.add.at(dtable, rows[here], as_rows(dout)[here])


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
    """Compute out = dropout(x + table[positions - first_row] + type_row).

    Args:
        x: [S, B, H].
        positions: global positions [S].
        table: learned positions [P, H] from first_row on, or None. A position outside them adds nothing.
        type_row: token-type row [H], or None.
        rate: dropout rate in [0, 1).
        key: 64-bit key of this dropout.
        samples: global index of each sequence [B].
        out: like x; may be x.
        first_row: position of the table's row 0.
        first_column: global index of column 0, where H is sharded.
    """
    target = as_rows(out)
    target[:] = as_rows(x)
    blocks = target.reshape(positions.size, -1, target.shape[1])
    if table is not None:
        here = (positions >= first_row) & (positions < first_row + table.shape[0])
        blocks[here] += table[positions[here] - first_row][:, None]
    if type_row is not None:
        target += type_row
    if rate > 0.0:
        target *= token_mask(rate, key, samples, positions, target.shape[1], target.dtype, first_column)


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
    """Gradient of `add_positions_forward`.

    Args:
        dout: [S, B, H].
        positions: as in the forward pass, like rate, key, samples, first_row and first_column.
        dtable: [P, H], added to, or None.
        dtype_row: [H], added to, or None.
        rate: see positions.
        key: see positions.
        samples: see positions.
        dx: written; may be dout.
        first_row: see positions.
        first_column: see positions.
    """
    target = as_rows(dx)
    target[:] = as_rows(dout)
    if rate > 0.0:
        target *= token_mask(rate, key, samples, positions, target.shape[1], target.dtype, first_column)
    if dtable is not None:
        here = (positions >= first_row) & (positions < first_row + dtable.shape[0])
        blocks = target.reshape(positions.size, -1, target.shape[1])
        np.add.at(dtable, positions[here] - first_row, blocks[here].sum(axis=1))
    if dtype_row is not None:
        dtype_row += target.sum(axis=0)
