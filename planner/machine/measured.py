"""Figures of a profile that were timed rather than read from a datasheet: what the cost formulas interpolate."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

import msgspec

GemmForm: TypeAlias = Literal["forward", "backward_input", "backward_weight"]
"""x·W, dy·Wᵀ and xᵀ·dy: a library packs and accumulates them differently."""

_Positive: TypeAlias = Annotated[float, msgspec.Meta(gt=0)]
_NonNegative: TypeAlias = Annotated[float, msgspec.Meta(ge=0)]
_Count: TypeAlias = Annotated[int, msgspec.Meta(ge=1)]


class GemmSample(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Measured time of one matrix product [m, k] x [k, n] as a layer runs it, on a CPU on one thread."""

    form: GemmForm
    m: _Count
    n: _Count
    k: _Count
    seconds: _Positive


class AttentionFigures(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Cost of one implementation of attention in one direction, in one precision.

    `calls` counts, as for `KernelFigures`, what the host dispatches. The time is a sum over products (one [Sq, d] x
    [d, Sk] each, per sequence and head), query-key pairs (softmax, mask and dropout; each sequence and head once),
    multiply-adds of the products, and elements of queries and keys. A GPU's kernel may take scratch memory beside the
    tensors that the plan names, in proportion to the pairs up to a limit at which it works through them tile by tile.
    """

    call_seconds: _NonNegative = 0.0
    product_seconds: _NonNegative = 0.0
    pair_seconds: _NonNegative = 0.0
    multiply_add_seconds: _NonNegative = 0.0
    element_seconds: _NonNegative = 0.0
    concurrent_slowdown: Annotated[float, msgspec.Meta(ge=1)] = 1.0  # with as many ranks at work as there are cores
    calls: _Count = 1
    scratch_bytes_per_pair: _NonNegative = 0.0
    scratch_limit_bytes: _NonNegative = 0.0


def attention_terms(m: Any, n: Any, k: Any, batch: Any, elements: Any) -> tuple[Any, ...]:
    """Counts that `AttentionFigures` has seconds for, in its order.

    Args:
        m: queries; like all others a number or an array.
        n: keys.
        k: width of a head.
        batch: products, over sequences and heads.
        elements: query-key pairs, over sequences and heads.
    """
    return 1.0, batch, elements, m * n * k * batch, (m + n) * k * batch
