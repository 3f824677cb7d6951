"""Softmax cross-entropy over a vocabulary that may be split by columns over ranks.

In four steps, with two reductions between them (Shoeybi et al. 2019, arXiv:1909.08053, section 3): `cross_entropy_max`,
max over ranks, `cross_entropy_sum`, sum of the statistics over ranks, then loss and gradient without communication.
"""

from __future__ import annotations

import numpy as np

from executor.reference.arrays import Floats, Ints


def cross_entropy_max(logits: Floats, bias: Floats | None, out_max: Floats) -> None:
    """Add bias to the logits in place; write the maximum of each row.

    Args:
        logits: [T, Vloc], changed in place.
        bias: [Vloc] or None.
        out_max: [T]; -inf where Vloc is 0.
    """
    if bias is not None:
        logits += bias
    out_max[:] = logits.max(axis=1, initial=-np.inf)


def cross_entropy_sum(logits: Floats, row_max: Floats, targets: Ints, first_column: int, stats: Floats) -> None:
    """Replace logits by exp(logits - row_max) in place, and write this shard's statistics.

    Args:
        logits: [T, Vloc], changed in place.
        row_max: maximum over the whole vocabulary [T].
        targets: token ids [T]; one outside this shard contributes 0.
        first_column: token id of column 0.
        stats: [T, 2]: the sum of the exponentials; the target's logit minus row_max, or 0 if another shard owns it.
            Both add up over shards.
    """
    logits -= row_max[:, None]
    columns = targets - first_column
    rows = np.flatnonzero((columns >= 0) & (columns < logits.shape[1]))
    stats[:, 1] = 0
    stats[rows, 1] = logits[rows, columns[rows]]
    np.exp(logits, out=logits)
    stats[:, 0] = logits.sum(axis=1)


def cross_entropy_loss(stats: Floats, weights: Floats) -> float:
    """Sum over tokens of weight · (log of the sum - target), in float64; tokens of weight 0 are ignored.

    Args:
        stats: [T, 2], summed over shards.
        weights: [T].
    """
    used = weights != 0
    total, target = stats[used, 0].astype(np.float64), stats[used, 1].astype(np.float64)
    return float((weights[used] * (np.log(total) - target)).sum())


def cross_entropy_backward(
    exp_logits: Floats,
    stats: Floats,
    targets: Ints,
    first_column: int,
    weights: Floats,
    scale: float,
    dbias: Floats | None = None,
) -> None:
    """Replace exp_logits in place by the gradient, weight · scale · (softmax - onehot).

    Args:
        exp_logits: [T, Vloc] from `cross_entropy_sum`, changed in place.
        stats: [T, 2], summed over shards.
        targets: token ids [T].
        first_column: token id of column 0.
        weights: [T]; rows of weight 0 give exact zeros.
        scale: one over the count of weighted tokens in the global batch.
        dbias: [Vloc], added to, or None.
    """
    used = weights != 0
    factor = np.where(used, weights * exp_logits.dtype.type(scale), 0)
    exp_logits[~used] = 0
    exp_logits *= np.divide(factor, stats[:, 0], out=np.zeros_like(factor), where=used)[:, None]
    columns = targets - first_column
    rows = np.flatnonzero(used & (columns >= 0) & (columns < exp_logits.shape[1]))
    exp_logits[rows, columns[rows]] -= factor[rows]
    if dbias is not None:
        dbias += exp_logits.sum(axis=0)
