"""Attention whose scores never leave the multiprocessor, on tensor cores: for 16-bit heads of up to 128 elements.

One kernel forward and two backward, whatever the batch, the heads and the mask; `executor.cuda.blocked` takes tiles of
scores through memory where these do not fit.
"""

from __future__ import annotations

from typing import Any

from executor.cuda.gradients import head_strides
from executor.cuda.indices import on_device
from executor.cuda.launch import ceil_div, launch, statistics
from executor.cuda.tiles import Seen
from executor.reference.arrays import Floats

ENABLED = True
"""Whether `fits` may say yes: to measure one way against the other."""

_THREADS = 128
_ROWS = 64  # ROWS of flash_forward.cu and flash_backward.cu: rows that a block owns
_OTHERS = 32  # OTHERS of flash_backward.cu
_MOST_WIDTH = 128  # beyond, the accumulators do not fit the registers
_GRANULE = 16  # columns of a tensor core's operand


def fits(*arrays: Floats) -> bool:
    """Whether arrays [S, B, heads, d] suit the kernels: 16-bit elements, and rows of whole 16-byte pieces."""
    width = arrays[0].shape[3]
    return ENABLED and width % 8 == 0 and width <= _MOST_WIDTH and all(map(_is_aligned, arrays))


def _is_aligned(x: Floats) -> bool:
    return x.itemsize == 2 and x.size > 0 and all(stride % 16 == 0 for stride in x.strides[:3])


def _padded(width: int) -> int:
    return ceil_div(width, _GRANULE) * _GRANULE


def _macros(width: int) -> tuple[str, ...]:
    return (f"-DHEAD_DIM={_padded(width)}",)


def _shared(seen: Seen, q: Floats, k: Floats) -> tuple[Any, ...]:
    """ATTENTION_PARAMETERS of mma.cuh."""
    masking = seen.masking
    return (
        on_device(masking.kv_index), float(masking.scale), q.shape[0], k.shape[0], q.shape[3], seen.back, seen.ahead,
        seen.q_positions, seen.k_positions, masking.limited, *seen.dropout,
    )  # fmt: skip


def forward(
    q: Floats,
    k: Floats,
    v: Floats,
    seen: Seen,
    out: Floats,
    *,
    state: tuple[Floats, Floats] | None = None,
    logsumexp: Floats | None = None,
) -> None:
    """Attention over all keys, or over one of several blocks of keys.

    Args:
        q: [Sq, B, h, d].
        k: [Sk, B, kv, d].
        v: [Sk, B, kv, d].
        seen: scale, mask and dropout.
        out: [Sq, B, h, d], written; with a state, the unnormalised output so far, float32, updated.
        state: running maximum and sum [B, h, Sq], updated; None for all keys at once.
        logsumexp: [B, h, Sq], written; exactly one of the two is given.
    """
    assert (state is None) != (logsumexp is None), "a step has a state, the whole has a log-sum-exp"
    queries, batch, heads, width = q.shape
    places = [value for x in (q, k, v) for value in (x, *head_strides(x))]
    outputs = (None, out) if state else (out, None)
    rows = [None if x is None else statistics(x, q.dtype) for x in (*(state or (None, None)), logsumexp)]
    launch(
        "flash_forward", "flash_forward", q.dtype, (ceil_div(queries, _ROWS), heads, batch), (_THREADS,), *places,
        *outputs, *head_strides(out), *rows, *_shared(seen, q, k), macros=_macros(width),
    )  # fmt: skip


def backward(
    dout: Floats,
    q: Floats,
    k: Floats,
    v: Floats,
    seen: Seen,
    logsumexp: Floats,
    delta: Floats,
    dq: Floats,
    dk: Floats,
    dv: Floats,
    *,
    onto: bool,
) -> None:
    """Gradients from logsumexp and delta [B, h, Sq], added to dq, dk and dv if `onto`, else written there."""
    queries, batch, heads, width = q.shape
    keys, kv_heads = k.shape[0], k.shape[2]
    inputs = [value for x in (dout, q, k, v) for value in (x, *head_strides(x))]
    rows = (statistics(logsumexp, q.dtype), statistics(delta, q.dtype), onto)
    shared, macros = _shared(seen, q, k), _macros(width)
    launch(
        "flash_backward", "flash_backward_queries", q.dtype, (ceil_div(queries, _ROWS), heads, batch), (_THREADS,),
        *inputs, dq, *head_strides(dq), *rows, *shared, macros=macros,
    )  # fmt: skip
    tiles_bytes = (2 * _ROWS + 4 * _OTHERS) * (_padded(width) + 8) * q.itemsize
    launch(
        "flash_backward", "flash_backward_keys", q.dtype, (ceil_div(keys, _ROWS), kv_heads, batch), (_THREADS,),
        *inputs, dk, *head_strides(dk), dv, *head_strides(dv), *rows, heads, *shared, macros=macros,
        shared_bytes=tiles_bytes,
    )  # fmt: skip
