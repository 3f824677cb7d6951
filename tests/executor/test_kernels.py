"""Every fused kernel against its readable reference, and the invariants of both."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import tracemalloc
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import executor.fused.activation as fused_activation
import executor.fused.attention as fused_attention
import executor.fused.blocked as fused_blocked
import executor.fused.embedding as fused_embedding
import executor.fused.heads as fused_heads
import executor.fused.loss as fused_loss
import executor.fused.matmul as fused_matmul
import executor.fused.norm as fused_norm
import executor.fused.optimizer as fused_optimizer
import executor.reference.activation as reference_activation
import executor.reference.attention as reference_attention
import executor.reference.blocked as reference_blocked
import executor.reference.dropout as reference_dropout
import executor.reference.embedding as reference_embedding
import executor.reference.heads as reference_heads
import executor.reference.loss as reference_loss
import executor.reference.matmul as reference_matmul
import executor.reference.norm as reference_norm
import executor.reference.optimizer as reference_optimizer
from executor.reference.masking import Masking

DTYPES = [np.float32, np.float64]
TOLERANCE = {np.dtype(np.float32): 2e-6, np.dtype(np.float64): 1e-13}
KEY = 0xDEADBEEFCAFEF00D


def arrays(seed: int, dtype: Any) -> Any:
    """A maker of normal arrays of the given shape."""
    generator = np.random.default_rng(seed)
    return lambda *shape: generator.standard_normal(shape).astype(dtype)


def assert_close(actual: np.ndarray, expected: np.ndarray, slack: float = 1.0) -> None:
    """Relative 2-norm, with the scale of the largest element: one absurd element cannot hide in a large tensor."""
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    tolerance = TOLERANCE[actual.dtype] * slack
    largest = max(float(np.abs(expected[np.isfinite(expected)]).max(initial=0)), 1.0)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=8 * tolerance * largest)


def copied(value: Any) -> Any:
    """A copy of an array, and of those that a masking has."""
    if isinstance(value, Masking):
        return Masking(*map(copied, value))
    return value.copy() if isinstance(value, np.ndarray) else value


def flat(args: list[Any]) -> list[Any]:
    """Arguments, with the fields of a masking in its place."""
    return [x for a in args for x in (a if isinstance(a, Masking) else (a,))]


def both(fused: ModuleType, reference: ModuleType, name: str, *args: Any, slack: float = 1.0, **kwargs: Any) -> None:
    """Run both forms on copies of the same arguments; every array must end up the same, inputs included."""
    ours, theirs = ([copied(a) for a in args] for _ in range(2))
    result = getattr(fused, name)(*ours, **kwargs)
    expected = getattr(reference, name)(*theirs, **kwargs)
    if expected is not None:
        assert result == pytest.approx(expected, rel=1e-6 if args[0].dtype == np.float32 else 1e-13)
    for mine, other in zip(flat(ours), flat(theirs), strict=True):
        if isinstance(mine, np.ndarray):
            if mine.dtype.kind == "f":
                assert_close(mine, other, slack)
            else:
                np.testing.assert_array_equal(mine, other)


sizes = st.integers(1, 37)
rates = st.sampled_from([0.0, 0.3])
flags = st.booleans()
dtypes = st.sampled_from(DTYPES)


@settings(deadline=None, max_examples=40)
@given(sizes, sizes, sizes, flags, flags, flags, dtypes)
def test_matmul_takes_strided_rows_transposes_and_accumulates(m, n, k, ta, tb, accumulate, dtype):
    make = arrays(m * 1000 + n, dtype)
    a = make(*((k, m) if ta else (m, k)))
    b = make(*((n, k) if tb else (k, n)))
    wide = make(m, n + 5)
    a_view, b_view = (np.concatenate([x, x], axis=1)[:, : x.shape[1]] for x in (a, b))
    expected = (a.T if ta else a) @ (b.T if tb else b) + (wide[:, 2 : 2 + n] if accumulate else 0)
    outside = wide[:, [0, 1, *range(2 + n, n + 5)]].copy()
    fused_matmul.matmul(a_view, b_view, wide[:, 2 : 2 + n], transpose_a=ta, transpose_b=tb, accumulate=accumulate)
    assert_close(wide[:, 2 : 2 + n], expected)
    np.testing.assert_array_equal(wide[:, [0, 1, *range(2 + n, n + 5)]], outside)


@pytest.mark.parametrize("module", [fused_matmul, reference_matmul])
def test_matmul_refuses_shapes_that_do_not_match(module):
    with pytest.raises(ValueError, match=r"\[2, 3\]|shape|dimension|mismatch"):
        module.matmul(np.zeros((2, 3)), np.zeros((4, 5)), np.zeros((2, 5)))


@settings(deadline=None, max_examples=25)
@given(sizes, sizes, sizes, rates, flags, flags, dtypes)
def test_norm_and_residual_equal_the_reference(S, B, H, rate, rms, biased, dtype):
    make = arrays(S * 100 + H, dtype)
    x, residual, dy, d_stream = (make(S, B, H) for _ in range(4))
    gamma, beta, bias = make(H), (make(H) if biased else None), (make(H) if biased else None)
    mean, rstd = (None if rms else np.zeros(S * B, dtype)), np.zeros(S * B, dtype)
    samples, positions = np.arange(5, 5 + B), np.arange(S)[::-1].copy()
    norm = (gamma, beta, 1e-5, np.zeros_like(x), mean, rstd, rms)
    both(fused_norm, reference_norm, "norm_forward", x, *norm)
    reference_norm.norm_forward(x, *norm)
    grads = (make(H), make(H) if biased else None)
    for accumulate in (False, True):
        args = (dy, x, gamma, mean, rstd, make(S, B, H), *grads, rms, accumulate)
        both(fused_norm, reference_norm, "norm_backward", *args, slack=50)
    dropout = (rate, KEY, samples, positions)
    both(
        fused_norm,
        reference_norm,
        "dropout_residual_forward",
        x,
        bias,
        residual,
        *dropout,
        np.zeros_like(x),
        first_column=3,
    )
    both(
        fused_norm,
        reference_norm,
        "dropout_residual_backward",
        dy,
        *dropout,
        np.zeros_like(x),
        grads[1],
        first_column=3,
        slack=4,
    )
    outs = (np.zeros_like(x), np.zeros_like(x))
    both(
        fused_norm,
        reference_norm,
        "residual_norm_forward",
        x,
        bias,
        residual,
        *dropout,
        gamma,
        beta,
        1e-5,
        *outs,
        mean,
        rstd,
        rms,
    )
    reference_norm.norm_forward(x, *norm)
    for extra in (None, d_stream):
        args = (dy, extra, x, *dropout, gamma, mean, rstd, *outs, grads[1], grads[0], grads[1], rms)
        both(fused_norm, reference_norm, "residual_norm_backward", *args, slack=50)


@settings(deadline=None, max_examples=25)
@given(sizes, sizes, st.sampled_from(["gelu", "gelu_tanh", "relu", "silu"]), flags, dtypes)
def test_activations_equal_the_reference(T, F, kind, biased, dtype):
    make = arrays(T * 100 + F, dtype)
    x, bias = make(T, F) * dtype(4), (make(F) if biased else None)
    both(fused_activation, reference_activation, "activation_forward", x, bias, kind, make(T, F), make(T, F))
    dbias = make(F) if biased else None
    both(fused_activation, reference_activation, "activation_backward", make(T, F), make(T, F), make(T, F), dbias)
    x, bias = make(T, 2 * F), (make(2 * F) if biased else None)
    both(fused_activation, reference_activation, "gated_forward", x, bias, kind, make(T, F))
    dbias = make(2 * F) if biased else None
    both(
        fused_activation,
        reference_activation,
        "gated_backward",
        make(T, F),
        x,
        bias,
        kind,
        make(T, 2 * F),
        dbias,
        slack=4,
    )


@settings(deadline=None, max_examples=25)
@given(sizes, sizes, sizes, rates, flags, dtypes)
def test_embedding_and_positions_equal_the_reference(S, B, H, rate, typed, dtype):
    make = arrays(S * 100 + H, dtype)
    ids = np.random.default_rng(S).integers(0, 30, (S, B))
    table = make(11, H)
    both(fused_embedding, reference_embedding, "embedding_forward", ids, table, 7, make(S, B, H))
    both(fused_embedding, reference_embedding, "embedding_backward", ids, make(S, B, H), table, 7, slack=4)
    positions, samples = np.random.default_rng(B).permutation(S + 9)[:S], np.arange(B) + 3
    row = make(H) if typed else None
    for some in (table, None):
        args = (make(S, B, H), positions, some, row, rate, KEY, samples, make(S, B, H))
        both(fused_embedding, reference_embedding, "add_positions_forward", *args, first_row=4, first_column=2)
        both(
            fused_embedding, reference_embedding, "add_positions_backward", *args, first_row=4, first_column=2, slack=8
        )


@settings(deadline=None, max_examples=25)
@given(sizes, sizes, st.integers(0, 40), flags, dtypes)
def test_cross_entropy_equals_the_reference(T, V, first, biased, dtype):
    make = arrays(T * 100 + V, dtype)
    targets = np.random.default_rng(T).integers(0, 80, T)
    weights = (np.arange(T) % 3).astype(dtype)
    logits, row_max = make(T, V) * dtype(5), make(T) + dtype(15)
    bias = make(V) if biased else None
    both(fused_loss, reference_loss, "cross_entropy_max", logits, bias, make(T))
    both(fused_loss, reference_loss, "cross_entropy_sum", logits, row_max, targets, first, make(T, 2))
    stats = np.abs(make(T, 2)) + dtype(1)
    both(fused_loss, reference_loss, "cross_entropy_loss", stats, weights)
    both(
        fused_loss,
        reference_loss,
        "cross_entropy_backward",
        np.abs(logits),
        stats,
        targets,
        first,
        weights,
        0.37,
        bias,
        slack=8,
    )


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 300), st.integers(1, 1000), dtypes)
def test_optimizers_equal_the_reference(n, step, dtype):
    make = arrays(n, dtype)
    both(fused_optimizer, reference_optimizer, "sgd", make(n), make(n), 0.1)
    args = (make(n), make(n), make(n), make(n) ** 2, 1e-2, 0.9, 0.999, 1e-8, 0.1, step)
    both(fused_optimizer, reference_optimizer, "adamw", *args)
    both(fused_optimizer, reference_optimizer, "sum_of_squares", make(n))
    both(fused_optimizer, reference_optimizer, "scale", make(n), 0.3)


@settings(deadline=None, max_examples=30)
@given(sizes, sizes, st.integers(1, 3), st.integers(1, 9), st.booleans(), st.sampled_from([None, 1, 5]), rates, dtypes)
def test_attention_equals_the_reference(Sq, Sk, B, d, causal, window, rate, dtype):
    make = arrays(Sq * 100 + Sk, dtype)
    heads, kv = 5, 3
    kv_index = np.array([0, 0, 2, 2, 0])  # uneven, and no query reads k/v head 1
    shuffle = np.random.default_rng(Sk).permutation
    mask = (kv_index, causal, window, shuffle(40)[:Sq], shuffle(40)[:Sk])
    dropout = (rate, KEY, np.arange(B) + 9, np.arange(heads) + 4)
    q, k, v = make(Sq, B, heads, d), make(Sk, B, kv, d), make(Sk, B, kv, d)
    probabilities = np.zeros((B, heads, Sq, Sk), dtype)
    args = (q, k, v, Masking(0.4, *mask, *dropout), probabilities)
    both(fused_attention, reference_attention, "attention_forward", *args, make(*q.shape), slack=4)
    reference_attention.attention_forward(*args, make(*q.shape))
    grads = (make(*q.shape), make(*k.shape), make(*v.shape))
    both(fused_attention, reference_attention, "attention_backward", make(*q.shape), *args, *grads, slack=8)


@settings(deadline=None, max_examples=25)
@given(sizes, sizes, st.integers(1, 3), st.booleans(), st.sampled_from([None, 1, 5]), rates, dtypes)
def test_attention_by_steps_equals_the_reference(Sq, Sk, B, causal, window, rate, dtype):
    make = arrays(Sq * 100 + Sk, dtype)
    heads, kv, d = 5, 3, 4
    shuffle = np.random.default_rng(Sk).permutation
    mask = (np.array([0, 0, 2, 2, 0]), causal, window, shuffle(40)[:Sq], shuffle(40)[:Sk])
    dropout = (rate, KEY, np.arange(B) + 9, np.arange(heads) + 4)
    q, k, v = make(Sq, B, heads, d), make(Sk, B, kv, d), make(Sk, B, kv, d)
    state = [make(*q.shape), make(B, heads, Sq), np.abs(make(B, heads, Sq)) + dtype(0.1)]
    state[0][0], state[1][..., 0], state[2][..., 0] = 0, -np.inf, 0  # a query that has seen no key yet
    args = (q, k, v, Masking(0.4, *mask, *dropout))
    both(fused_blocked, reference_blocked, "block_attention_step", *args, *state, slack=8)
    both(fused_blocked, reference_blocked, "block_attention_finish", *state, make(B, heads, Sq), slack=8)
    both(fused_blocked, reference_blocked, "attention_delta", make(*q.shape), make(*q.shape), make(B, heads, Sq))
    lse, grads = make(B, heads, Sq) + dtype(3), (make(*q.shape), make(*k.shape), make(*v.shape))
    lse[..., 0] = np.where(args[3].visible()[0].any(), 3, -np.inf)
    args = (make(*q.shape), *args, lse, make(B, heads, Sq), *grads)
    both(fused_blocked, reference_blocked, "block_attention_step_backward", *args, slack=16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("order", ["ascending", "zig-zag", "shuffled"])
@pytest.mark.parametrize(("causal", "window"), [(False, None), (True, None), (True, 200), (False, 300), (True, 1)])
@pytest.mark.parametrize("rate", [0.0, 0.2])
def test_blocked_attention_equals_plain_over_many_tiles(dtype, order, causal, window, rate):
    S, B, heads, kv, d = 1100, 1, 3, 2, 8
    make = arrays(7, dtype)
    positions = np.arange(S)
    if order == "zig-zag":  # a context-parallel rank's first and last chunk, then the rest
        positions = np.concatenate([positions[:275], positions[825:], positions[275:825]])
    elif order == "shuffled":
        positions = np.random.default_rng(1).permutation(S)
    mask = (np.array([0, 1, 1]), causal, window, positions, positions)
    dropout = (rate, KEY, np.arange(B) + 2, np.arange(heads))
    packed = make(S, B, heads + 2 * kv, d)
    q, k, v = np.split(packed, [heads, heads + kv], axis=2)  # strided views, as in the executor
    args, dout = (q, k, v, Masking(d**-0.5, *mask, *dropout)), make(S, B, heads, d)
    probabilities, lse = np.zeros((B, heads, S, S), dtype), np.zeros((B, heads, S), dtype)
    plain, blocked = make(S, B, heads, d), make(S, B, heads, d)
    fused_attention.attention_forward(*args, probabilities, plain)
    fused_blocked.blocked_attention_forward(*args, blocked, lse)
    assert_close(blocked, plain, 2)
    ours, theirs = make(*packed.shape), make(*packed.shape)
    fused_attention.attention_backward(dout, *args, probabilities, *np.split(theirs, [heads, heads + kv], axis=2))
    fused_blocked.blocked_attention_backward(dout, *args, blocked, lse, *np.split(ours, [heads, heads + kv], axis=2))
    assert_close(ours, theirs, 4)
    if dtype == np.float64 and order == "shuffled":
        reference = make(S, B, heads, d)
        reference_blocked.blocked_attention_forward(*args, reference, lse.copy())
        assert_close(blocked, reference)


@pytest.mark.parametrize("module", [fused_blocked, reference_blocked])
def test_ring_steps_in_any_order_give_the_whole_attention(module):
    S, B, heads, d, ranks = 96, 2, 2, 4, 4
    make = arrays(3, np.float64)
    q, k, v, dout = (make(S, B, heads, d) for _ in range(4))
    kv_index, samples, ids = np.arange(heads), np.arange(B), np.arange(heads)
    chunks = np.split(np.arange(S), 2 * ranks)
    rows = [np.concatenate([chunks[r], chunks[-1 - r]]) for r in range(ranks)]  # zig-zag: equal causal work

    def at(q_rows, k_rows):
        return Masking(0.5, kv_index, True, None, q_rows, k_rows, 0.25, KEY, samples, ids)

    everything = np.arange(S)
    whole, lse = np.zeros_like(q), np.zeros((B, heads, S))
    module.blocked_attention_forward(q, k, v, at(everything, everything), whole, lse)
    whole_grads = [np.zeros_like(q) for _ in range(3)]
    module.blocked_attention_backward(dout, q, k, v, at(everything, everything), whole, lse, *whole_grads)
    dq, dk, dv = (np.zeros_like(q) for _ in range(3))
    for rank, mine in enumerate(rows):
        out, top, total = np.empty_like(q[mine]), np.empty((B, heads, mine.size)), np.empty((B, heads, mine.size))
        module.block_attention_start(out, top, total)
        turns = [rows[(rank - turn) % ranks] for turn in range(ranks)]
        for theirs in turns:
            module.block_attention_step(q[mine], k[theirs], v[theirs], at(mine, theirs), out, top, total)
        module.block_attention_finish(out, top, total, top)
        np.testing.assert_allclose(out, whole[mine], atol=1e-13)
        np.testing.assert_allclose(top, lse[..., mine], atol=1e-13)
        delta, dq_mine = np.empty_like(top), np.zeros_like(out)
        module.attention_delta(dout[mine], out, delta)
        for theirs in turns:
            dk_part, dv_part = np.zeros((theirs.size, B, heads, d)), np.zeros((theirs.size, B, heads, d))
            args = (dout[mine], q[mine], k[theirs], v[theirs], at(mine, theirs), top, delta, dq_mine, dk_part, dv_part)
            module.block_attention_step_backward(*args)
            dk[theirs] += dk_part
            dv[theirs] += dv_part
        dq[mine] = dq_mine
    for ours, expected in zip((dq, dk, dv), whole_grads, strict=True):
        np.testing.assert_allclose(ours, expected, atol=1e-12)


def test_blocked_attention_needs_no_memory_that_grows_with_the_square_of_the_sequence():
    def peak_bytes(S):
        q = np.ones((S, 1, 1, 4), np.float32)
        zero, positions = np.zeros(1, int), (np.arange(S), np.arange(S))
        args = (q, q, q, Masking(0.5, zero, False, None, *positions, 0.0, KEY, zero, zero))
        out, lse = np.empty_like(q), np.empty((1, 1, S), np.float32)
        grads, sizes = [np.empty_like(q) for _ in range(3)], []

        def work():  # a thread of its own starts without scratch memory
            tracemalloc.start()
            fused_blocked.blocked_attention_forward(*args, out, lse)
            fused_blocked.blocked_attention_backward(out, *args, out, lse, *grads)
            sizes.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        return sizes[0]

    peak_bytes(8)  # compile
    small, large = peak_bytes(1024), peak_bytes(4096)
    assert large - small < 4096 * 100  # a few numbers per row; a matrix of scores would be 67 MB
    assert large > 4096 * 4  # and the measurement sees the scratch memory


@pytest.mark.parametrize("plain", [True, False])
def test_a_query_that_sees_no_key_gives_zeros_and_no_nan(plain):
    q, k, v = (np.ones((3, 1, 1, 2), np.float32) for _ in range(3))
    zero, positions = np.zeros(1, int), (np.array([0, 5, 9]), np.array([4, 5, 6]))
    args = (q, k, v, Masking(1.0, zero, True, None, *positions, 0.0, KEY, zero, zero))
    out, grads = np.full_like(q, 7), [np.full_like(q, 7) for _ in range(3)]
    if plain:
        saved = (np.full((1, 1, 3, 3), 7, np.float32),)
        fused_attention.attention_forward(*args, *saved, out)
        fused_attention.attention_backward(np.ones_like(q), *args, *saved, *grads)
    else:
        lse = np.zeros((1, 1, 3), np.float32)
        fused_blocked.blocked_attention_forward(*args, out, lse)
        fused_blocked.blocked_attention_backward(np.ones_like(q), *args, out, lse, *grads)
        assert lse[0, 0, 0] == -np.inf
    assert (out[0] == 0).all()
    np.testing.assert_allclose(out[1:], 1)
    assert (grads[0][0] == 0).all()
    assert all(np.isfinite(g).all() for g in grads)
    assert grads[2].sum() == pytest.approx(4)  # two seeing queries, two columns each


@settings(deadline=None, max_examples=25)
@given(sizes, st.integers(1, 3), st.integers(1, 3), st.integers(1, 9), flags, flags, flags, dtypes)
def test_split_heads_equals_the_reference(S, B, kv, half, biased, normed, rotary, dtype):
    make = arrays(S * 100 + half, dtype)
    heads, d = 2 * kv, 2 * half
    width = (heads + 2 * kv) * d
    bias, q_gain, k_gain = (make(width) if biased else None), *((make(d), make(d)) if normed else (None, None))
    angle = make(S, half)
    cos, sin = (np.cos(angle), np.sin(angle)) if rotary else (None, None)
    saved, rstd = (make(S * B, (heads + kv) * d), make(S * B, heads + kv)) if normed else (None, None)
    args = (make(S, B, width), bias, q_gain, k_gain, 1e-6, cos, sin, heads, kv, saved, rstd)
    both(fused_heads, reference_heads, "split_heads_forward", *args, slack=8)
    reference_heads.split_heads_forward(*args)
    totals = (make(width) if biased else None, *((make(d), make(d)) if normed else (None, None)))
    args = (make(S, B, width), saved, rstd, q_gain, k_gain, cos, sin, heads, kv, *totals)
    both(fused_heads, reference_heads, "split_heads_backward", *args, slack=50)


# Invariants


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**64 - 1), st.integers(0, 2**40), st.integers(0, 100), st.sampled_from([0.01, 0.5, 0.9]))
def test_dropout_masks_do_not_depend_on_the_layout(key, sample, column, rate):
    S, B, H = 12, 3, 40
    samples, positions = np.arange(B) + sample, np.arange(S)
    whole, ones = np.empty((S, B, H)), np.ones((S, B, H))
    dropout = (rate, key, samples, positions)
    fused_norm.dropout_residual_forward(ones, None, np.zeros_like(ones), *dropout, whole, first_column=column)
    expected = reference_dropout.token_mask(rate, key, samples, positions, H, whole.dtype, column)
    np.testing.assert_array_equal(whole.reshape(-1, H), expected)
    rows, some, part = np.array([7, 2, 11]), slice(1, 3), np.empty((3, 2, 15))
    fused_norm.dropout_residual_forward(
        np.ones_like(part), None, np.zeros_like(part), rate, key, samples[some], positions[rows], part,
        first_column=column + 20,
    )  # fmt: skip
    np.testing.assert_array_equal(part, whole[rows][:, some, 20:35])


def test_dropout_keeps_the_share_it_should_and_rows_columns_and_heads_are_independent():
    keys = reference_dropout.row_keys(KEY, np.arange(40)[:, None], np.arange(50)[None, :])
    kept = reference_dropout.keep_mask(keys.reshape(-1), np.arange(1000), 0.1)
    n = kept.size
    assert abs(kept.mean() - 0.9) < 5 * np.sqrt(0.09 / n)
    centred = kept - 0.9
    for other in (np.roll(centred, 1, axis=0), np.roll(centred, 1, axis=1), np.roll(centred, 50, axis=0)):
        assert abs((centred * other).mean()) < 5 * 0.09 / np.sqrt(n)
    heads = [
        reference_dropout.keep_mask(reference_dropout.row_keys(KEY, 3, 4, h), np.arange(9000), 0.5) for h in (0, 1)
    ]
    assert abs((heads[0] == heads[1]).mean() - 0.5) < 0.03


@pytest.mark.parametrize("rate", [-0.1, 1.0, 1.5])
def test_a_dropout_rate_outside_its_range_is_refused(rate):
    with pytest.raises(ValueError, match="below 1"):
        reference_dropout.threshold_of(rate)


def test_outputs_may_be_the_inputs_where_the_contract_says_so():
    make = arrays(1, np.float64)
    S, B, H = 5, 2, 24
    x, residual, dy, extra = (make(S, B, H) for _ in range(4))
    gamma, samples, positions = make(H), np.arange(B), np.arange(S)
    dropout, stats = (0.3, KEY, samples, positions), (np.empty(S * B), np.empty(S * B))
    stream, normed = np.empty_like(x), np.empty_like(x)
    fused_norm.residual_norm_forward(x, gamma, residual, *dropout, gamma, gamma, 1e-5, stream, normed, *stats, False)
    same = x.copy()
    fused_norm.residual_norm_forward(
        same, gamma, residual, *dropout, gamma, gamma, 1e-5, same, y := make(S, B, H), *stats, False
    )
    np.testing.assert_array_equal(same, stream)
    np.testing.assert_array_equal(y, normed)

    def backward(dy, extra, dx, d_residual, rate):
        grads = [np.zeros(H) for _ in range(3)]
        args = (rate, KEY, samples, positions, gamma, *stats, dx, d_residual, *grads, False)
        fused_norm.residual_norm_backward(dy, extra, stream, *args)
        return dx, d_residual, grads

    expected = backward(dy, extra, np.empty_like(x), np.empty_like(x), 0.3)
    mine, other = dy.copy(), extra.copy()
    for ours, theirs in zip(backward(mine, other, mine, other, 0.3), expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    expected = backward(dy, None, np.empty_like(x), np.empty_like(x), 0.0)
    mine = dy.copy()
    for ours, theirs in zip(backward(mine, None, mine, mine, 0.0), expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    out, slope, in_place = make(9, H), make(9, H), make(9, H)
    fused_activation.activation_forward(in_place, gamma, "gelu", out, slope)
    fused_activation.activation_forward(in_place, gamma, "gelu", again := make(9, H), in_place)
    np.testing.assert_array_equal(again, out)
    np.testing.assert_array_equal(in_place, slope)
    fused_activation.activation_backward(out, slope, expected := make(9, H), None)
    fused_activation.activation_backward(out, slope, slope, None)
    np.testing.assert_array_equal(slope, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gelu_is_exact_to_the_precision(dtype):
    x = np.concatenate([np.linspace(-40, 40, 40001), np.geomspace(1e-30, 1, 999)]).astype(dtype)[None]
    out, slope = np.empty_like(x), np.empty_like(x)
    fused_activation.activation_forward(x, None, "gelu", out, slope)
    exact, exact_slope = reference_activation.value_and_derivative(x.astype(np.float64), "gelu")
    limit = {np.float32: 2e-7, np.float64: 1.5e-15}[dtype]
    scale = np.maximum(1, np.abs(x))  # an error of one unit in the last place of a large x is not the kernel's
    assert (np.abs(out - exact) / scale).max() <= limit
    assert np.abs(slope - exact_slope).max() <= 2 * limit


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["gelu", "gelu_tanh", "relu", "silu"])
def test_activations_at_the_ends_of_the_range_and_nan(kind, dtype):
    x = np.array([[np.nan, np.inf, np.finfo(dtype).max, 100, -100, 0, -0.0]], dtype)
    out, slope = np.empty_like(x), np.empty_like(x)
    fused_activation.activation_forward(x, None, kind, out, slope)
    assert np.isnan(out[0, 0])
    assert out[0, 1] == np.inf
    np.testing.assert_allclose(out[0, 3:], [100, 0, 0, 0], atol=1e-30)
    np.testing.assert_allclose(slope[0, 3:], [1, 0, *([0.5, 0.5] if kind != "relu" else [0, 0])], atol=1e-30)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_overflow_reach_the_loss(dtype):
    logits = np.zeros((3, 20), dtype)
    logits[0, 3], logits[1, 4] = np.nan, 1e30
    row_max, stats = np.empty(3, dtype), np.empty((3, 2), dtype)
    fused_loss.cross_entropy_max(logits, None, row_max)
    fused_loss.cross_entropy_sum(logits, row_max, np.array([0, 4, 1]), 0, stats)
    assert np.isnan(stats[0, 0])
    np.testing.assert_allclose(stats[1:], [[1, 0], [20, 0]])
    assert fused_loss.cross_entropy_loss(stats, np.array([0, 1, 1], dtype)) == pytest.approx(np.log(20))


def test_a_vocabulary_in_shards_gives_the_loss_and_gradient_of_the_whole():
    make, T, V = arrays(5, np.float64), 17, 31
    logits, bias, weights = make(T, V) * 3, make(V), np.arange(T) % 2 * 1.5
    targets = np.random.default_rng(0).integers(0, V, T)

    def run(cuts):
        parts = [np.ascontiguousarray(p) for p in np.split(logits, cuts, axis=1)]
        firsts, biases = [0, *cuts], np.split(bias, cuts)
        tops, stats = np.empty((len(parts), T)), np.empty((len(parts), T, 2))
        for part, piece, top in zip(parts, biases, tops, strict=True):
            fused_loss.cross_entropy_max(part, piece, top)
        for part, first, stat in zip(parts, firsts, stats, strict=True):
            fused_loss.cross_entropy_sum(part, tops.max(axis=0), targets, first, stat)
        total = stats.sum(axis=0)
        dbias = [np.zeros(p.shape[1]) for p in parts]
        for part, first, grad in zip(parts, firsts, dbias, strict=True):
            fused_loss.cross_entropy_backward(part, total, targets, first, weights, 0.1, grad)
        return fused_loss.cross_entropy_loss(total, weights), np.concatenate(parts, axis=1), np.concatenate(dbias)

    for ours, expected in zip(run([4, 5, 20]), run([]), strict=True):
        np.testing.assert_allclose(ours, expected, atol=1e-13)


def test_kernels_refuse_other_dtypes_and_compile_once_for_all_shapes_and_strides():
    with pytest.raises(TypeError, match="float32 or float64, not float16"):
        fused_optimizer.sgd(np.zeros(3, np.float16), np.zeros(3, np.float16), 0.1)
    with pytest.raises(TypeError):
        fused_optimizer.sgd(np.zeros(3, np.float32), np.zeros(3, np.float64), 0.1)
    for n in (1, 7, 64):
        wide = np.ones((n, 2 * n), np.float32)
        fused_matmul.matmul(wide[:, :n], wide[:, n:], np.empty((n, n), np.float32))
    assert len(fused_matmul._matmul[np.dtype(np.float32)].signatures) == 1


def test_the_same_call_twice_is_bitwise_equal():
    make = arrays(2, np.float32)
    q, k, v = (make(130, 2, 2, 16) for _ in range(3))
    two, positions = np.arange(2), np.arange(130)
    args = (q, k, v, Masking(0.25, two, True, None, positions, positions, 0.1, KEY, two, two))
    results = []
    for _ in range(2):
        out, lse, grads = np.empty_like(q), np.empty((2, 2, 130), np.float32), [np.empty_like(q) for _ in range(3)]
        fused_blocked.blocked_attention_forward(*args, out, lse)
        fused_blocked.blocked_attention_backward(out, *args, out, lse, *grads)
        results.append([out, lse, *grads])
    for first, second in zip(*results, strict=True):
        np.testing.assert_array_equal(first, second)


PROBE = """
import numpy as np, executor.kernels as k
x = np.ones(4, np.float32); k.scale(x, 2.0)
print(k.FUSED, k.sgd.__module__, x[0])
"""


def test_the_environment_chooses_the_reference():
    def probe(**extra):
        command = [sys.executable, "-c", PROBE]
        return subprocess.run(
            command, env=os.environ | extra, capture_output=True, text=True, check=True
        ).stdout.split()

    assert probe(MESHWRIGHT_KERNELS="reference") == ["False", "executor.reference.optimizer", "2.0"]
    assert probe(MESHWRIGHT_KERNELS="") == ["True", "executor.fused.optimizer", "2.0"]


def test_ranks_that_start_together_compile_each_kernel_once(tmp_path):
    env = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", PROBE]
    ranks = [subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert all(rank.communicate()[0].startswith("True") and rank.returncode == 0 for rank in ranks)
    assert len(list(tmp_path.rglob("*.done"))) == 1
    assert len(list(tmp_path.rglob("*.nbc"))) == 1  # Numba numbers its files: a second compilation would add a second
