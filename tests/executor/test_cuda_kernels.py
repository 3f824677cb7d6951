"""Every CUDA kernel beside its readable reference: on a GPU where there is one, else run on the CPU by an emulation."""

from __future__ import annotations

import inspect
from typing import Any

import cuda_on_cpu
import numpy as np
import pytest
from cuda_cases import ALL_DTYPES, BFLOAT16, DTYPES, KEY, REFERENCE, Guarded, Maker, both, close, wide
from cuda_on_cpu import backend as backends

from executor import kernels as table
from executor.reference import dropout as reference_dropout

by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
by_every_dtype = pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
# Odd; 16-byte accesses in every type; several blocks of single elements; several of 16 bytes in float64.
by_width = pytest.mark.parametrize("width", [1, 37, 40, 700, 1056])


@pytest.fixture(scope="module")
def backend() -> Any:
    found = backends.best()
    if found is None:
        pytest.skip("no GPU, and no g++ to emulate one")
    return found


@pytest.fixture(params=["many blocks", "few blocks"])
def blocks(request: Any, backend: Any, monkeypatch: Any) -> None:
    """Few blocks make each thread walk down many rows."""
    if request.param == "few blocks":
        monkeypatch.setattr(backend.module("launch"), "MOST_BLOCKS", 3)
        monkeypatch.setattr(backend.module("optimizer"), "MOST_BLOCKS", 3)


def test_the_table_has_every_function_of_the_others_with_the_same_parameters(backend):
    names = [name for name in table.__all__ if inspect.isfunction(getattr(table, name))]
    assert len(names) > 30
    for name in names:
        ours, theirs = (inspect.signature(f) for f in (getattr(backend.kernels, name), REFERENCE[name]))
        assert [(p.name, p.kind, p.default) for p in ours.parameters.values()] == [
            (p.name, p.kind, p.default) for p in theirs.parameters.values()
        ]


@by_every_dtype
@by_width
@pytest.mark.parametrize("kind", ["gelu", "gelu_tanh", "relu", "silu"])
def test_activations(backend, dtype, width, kind):
    make, rows = Maker(dtype, width), 11
    for biased in (True, False):
        bias = make(width) if biased else None
        x = make(rows, width) * dtype.type(3)
        both(backend, "activation_forward", x, bias, kind, make(rows, width), make(rows, width), slack=2)
        dbias = make.wide(width) if biased else None
        both(backend, "activation_backward", make(rows, width), make(rows, width), x, dbias, slack=4)
        bias, gates = (make(2 * width) if biased else None), make(rows, 2 * width)
        both(backend, "gated_forward", gates, bias, kind, make(rows, width), slack=2)
        dbias, dx = (make.wide(2 * width) if biased else None), make(rows, 2 * width)
        both(backend, "gated_backward", make(rows, width), gates, bias, kind, dx, dbias, slack=4)


def test_an_unknown_activation_is_refused(backend):
    x = backend.upload(np.zeros((2, 4), np.float32))
    with pytest.raises(ValueError, match="use gelu, gelu_tanh, relu or silu"):
        backend.kernels.activation_forward(x, None, "swish", x, x)


def test_a_type_without_kernels_is_refused(backend):
    x = backend.upload(np.zeros((2, 4), np.int16))
    with pytest.raises(TypeError, match="no CUDA kernels for arrays of int16; use float32, float64"):
        backend.kernels.activation_forward(x, None, "relu", x, x)


@by_dtype
@by_width
@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_norms_and_residuals(backend, blocks, dtype, width, rms, rate):
    S, B, H = 7, 3, width
    make = Maker(dtype, width)
    x, residual, dy, extra = (make(S, B, H) for _ in range(4))
    gamma, beta, bias = make(H), (None if rms else make(H)), (None if rms else make(H))
    stats = (None if rms else make.wide(S * B), np.abs(make.wide(S * B)))
    grads = (make.wide(H), None if rms else make.wide(H))
    both(backend, "norm_forward", x, gamma, beta, 1e-5, make(S, B, H), *stats, rms, slack=4)
    for accumulate in (False, True):
        both(backend, "norm_backward", dy, x, gamma, *stats, make(S, B, H), *grads, rms, accumulate, slack=8)
    dropout = (rate, KEY, np.arange(5, 5 + B), np.arange(S)[::-1].copy())
    both(backend, "dropout_residual_forward", x, bias, residual, *dropout, make(S, B, H), first_column=3)
    both(backend, "dropout_residual_backward", dy, *dropout, make(S, B, H), grads[1], first_column=3, slack=4)
    outs, norm = (make(S, B, H), make(S, B, H)), (gamma, beta, 1e-2)
    if width > 1 or rms:  # a layer norm of one column is 0 / 0 but for rounding
        both(backend, "residual_norm_forward", x, bias, residual, *dropout, *norm, *outs, *stats, rms, slack=16)
    for other in (None, extra):
        args = (dy, other, x, *dropout, gamma, *stats, *outs, grads[1], grads[0], grads[1], rms)
        both(backend, "residual_norm_backward", *args, slack=8)


def test_outputs_may_be_inputs_where_the_contract_says_so(backend):
    make = Maker(np.dtype(np.float64))
    S, B, H = 5, 2, 24
    x, residual, dy, extra, gamma = *(make(S, B, H) for _ in range(4)), make(H)
    stats = (make(S * B), np.abs(make(S * B)))
    dropout = (0.3, KEY, np.arange(B), np.arange(S))
    both(backend, "residual_norm_forward", x, gamma, residual, *dropout, gamma, gamma, 1e-5, x, residual, *stats, False)
    both(backend, "residual_norm_forward", x, gamma, residual, *dropout, gamma, None, 1e-5, residual, x, *stats, False)
    grads = [make(H) for _ in range(3)]
    for dx, d_residual in ((dy, extra), (x, dy)):
        args = (dy, extra, residual, *dropout, gamma, *stats, dx, d_residual, *grads, False)
        both(backend, "residual_norm_backward", *args, slack=8)
    undropped = (0.0, *dropout[1:])
    args = (dy, extra, residual, *undropped, gamma, *stats, x, x, *grads, False)
    both(backend, "residual_norm_backward", *args, slack=8)
    both(backend, "norm_backward", dy, x, gamma, *stats, dy, *grads[:2], False, slack=8)
    both(backend, "norm_forward", x, gamma, gamma, 1e-5, x, *stats, False)
    for settings in (dropout, undropped):
        both(backend, "dropout_residual_backward", dy, *settings, dy, grads[0], slack=4)
    both(backend, "activation_forward", x, gamma, "gelu", residual, x)
    both(backend, "activation_backward", dy, x, dy, gamma)
    both(backend, "activation_backward", dy, x, x, gamma)


@by_dtype
@pytest.mark.parametrize("offset", [0, 1])
def test_arrays_may_start_anywhere(backend, dtype, offset):
    """At an odd address no 16-byte access is allowed, however the width divides."""
    make, S, B, H = Maker(dtype), 4, 2, 40
    stats = (make.wide(S * B), np.abs(make.wide(S * B)))
    x, out = make(S, B, H), make(S, B, H)
    both(backend, "activation_forward", x, make(H), "silu", out, make(S, B, H), offset=offset, slack=2)
    both(backend, "norm_forward", x, make(H), make(H), 1e-5, out, *stats, False, offset=offset, slack=4)
    both(backend, "cross_entropy_max", make(S, 59), make(59), make.wide(S), offset=offset)
    both(backend, "scale", make(301), 0.3, offset=offset)
    both(backend, "sum_of_squares", make(301), offset=offset)


@by_dtype
@by_width
def test_embedding_and_positions(backend, blocks, dtype, width):
    make = Maker(dtype, width)
    S, B, H = 9, 33, width
    ids, table_rows = np.random.default_rng(S).integers(0, 30, (S, B)), make(11, H)
    ids[:, 0] = 8  # one id that many tokens have
    both(backend, "embedding_forward", ids, table_rows, 7, make(S, B, H))
    both(backend, "embedding_backward", ids, make(S, B, H), make.wide(11, H), 7, slack=4)
    positions, samples = np.random.default_rng(B).permutation(S + 9)[:S], np.arange(B) + 3
    for rate, some, row in ((0.3, table_rows, make(H)), (0.0, table_rows, None), (0.3, None, make(H))):
        settings = (rate, KEY, samples)
        columns = {"first_row": 4, "first_column": 2}
        args = (make(S, B, H), positions, some, row, *settings, make(S, B, H))
        both(backend, "add_positions_forward", *args, **columns, slack=2)
        grads = (None if some is None else make.wide(11, H), None if row is None else make.wide(H))
        args = (make(S, B, H), positions, *grads, *settings, make(S, B, H))
        both(backend, "add_positions_backward", *args, **columns, slack=4)


@by_every_dtype
@pytest.mark.parametrize("V", [1, 37, 64, 1531])
@pytest.mark.parametrize("biased", [False, True])
def test_cross_entropy(backend, dtype, V, biased):
    T, first = 13, 20
    make = Maker(dtype, V)
    targets = np.random.default_rng(T).integers(0, max(80, V), T)
    weights = (np.arange(T) % 3).astype(wide(dtype))
    logits, row_max = make(T, V) * dtype.type(5), make.wide(T) + wide(dtype).type(15)
    bias = make(V) if biased else None
    both(backend, "cross_entropy_max", logits, bias, make.wide(T))
    both(backend, "cross_entropy_sum", logits, row_max, targets, first, make.wide(T, 2))
    stats = np.abs(make.wide(T, 2)) + wide(dtype).type(1)
    both(backend, "cross_entropy_loss", stats, weights)
    dbias = make.wide(V) if biased else None
    both(backend, "cross_entropy_backward", np.abs(logits), stats, targets, first, weights, 0.37, dbias, slack=4)


def test_tokens_of_weight_zero_give_exact_zeros_whatever_their_statistics(backend):
    logits = np.full((2, 9), np.inf, np.float32)
    stats, weights = np.zeros((2, 2), np.float32), np.zeros(2, np.float32)
    assert not both(backend, "cross_entropy_backward", logits, stats, np.zeros(2, int), 0, weights, 1.0)[0].any()
    both(backend, "cross_entropy_loss", stats, weights)


@by_dtype
@pytest.mark.parametrize("n", [0, 1, 300, 5001])
def test_optimizers(backend, blocks, dtype, n):
    make = Maker(wide(dtype), n)
    both(backend, "sgd", make(n), make(n), 0.1)
    settings = (1e-2, 0.9, 0.999, 1e-8, 0.1)
    for step in (1, 700):
        both(backend, "adamw", make(n), make(n), make(n), make(n) ** 2, *settings, step)
    narrow = Maker(dtype, n)
    both(backend, "sum_of_squares", narrow(n))
    both(backend, "scale", narrow(n), 0.3)


@pytest.mark.parametrize("dtype", [dtype for dtype in ALL_DTYPES if dtype.itemsize == 2], ids=str)
@pytest.mark.parametrize("offset", [0, 3])
def test_updates_write_the_working_copy_as_the_rounded_parameters(backend, dtype, offset):
    make, n = Maker(np.dtype(np.float32)), 515
    device = Guarded(backend, offset)
    state = [make(n), make(n), make(n), make(n) ** 2]
    copies, working = [a.copy() for a in state], np.zeros(n, dtype)
    settings = (1e-2, 0.9, 0.999, 1e-8, 0.1, 3)
    backend.kernels.adamw(*map(device, state), *settings, device(working))
    REFERENCE["adamw"](*copies, *settings)
    updated = backend.download(device(state[0]))
    close(updated, copies[0], np.dtype(np.float32), 1)
    np.testing.assert_array_equal(backend.download(device(working)), updated.astype(dtype))
    backend.kernels.sgd(device(state[0]), device(state[1]), 0.25, device(working))
    updated = backend.download(device(state[0]))
    np.testing.assert_array_equal(backend.download(device(working)), updated.astype(dtype))
    device.check_guards()


def test_the_sum_of_squares_is_finite_exactly_if_every_element_is(backend):
    for value in (3e38, np.inf, np.nan):
        grad = np.full(777, 3e38, np.float32)
        grad[500] = value
        total = float(backend.download(backend.kernels.sum_of_squares(backend.upload(grad))))
        assert np.isfinite(total) == np.isfinite(value)


@by_dtype
@pytest.mark.parametrize(("heads", "kv", "d"), [(4, 2, 16), (3, 1, 6), (2, 2, 2), (5, 5, 80)])
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("rotary", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_split_heads(backend, blocks, dtype, heads, kv, d, normed, rotary, biased):
    S, B, width = 5, 3, (heads + 2 * kv) * d
    make = Maker(dtype, d)
    bias, gains = (make(width) if biased else None), ((make(d), make(d)) if normed else (None, None))
    angle = make.wide(S, d // 2)
    cos, sin = (np.cos(angle), np.sin(angle)) if rotary else (None, None)
    saved = (make(S * B, (heads + kv) * d), np.abs(make.wide(S * B, heads + kv))) if normed else (None, None)
    args = (make(S, B, width), bias, *gains, 1e-2, cos, sin, heads, kv, *saved)
    both(backend, "split_heads_forward", *args, slack=8)
    totals = (make.wide(width) if biased else None, *((make.wide(d), make.wide(d)) if normed else (None, None)))
    both(backend, "split_heads_backward", make(S, B, width), *saved, *gains, cos, sin, heads, kv, *totals, slack=16)


def test_heads_of_odd_width_have_biases_and_norms(backend):
    make, heads, d = Maker(np.dtype(np.float32)), 3, 5
    saved = (make(4, 2 * heads * d), np.abs(make(4, 2 * heads)))
    args = (make(2, 2, 3 * heads * d), make(3 * heads * d), make(d), make(d), 1e-5, None, None, heads, heads, *saved)
    both(backend, "split_heads_forward", *args, slack=8)
    args = (make(2, 2, 3 * heads * d), *saved, make(d), make(d), None, None, heads, heads, None, make(d), make(d))
    both(backend, "split_heads_backward", *args, slack=16)


# Dropout


@pytest.mark.parametrize("key", [1, KEY, 2**64 - 1])
@pytest.mark.parametrize("rate", [0.01, 0.5, 0.9])
@by_dtype
def test_dropout_masks_are_the_cpu_s_bit_for_bit(backend, dtype, key, rate):
    S, B, H, column = 6, 3, 41, 2**31
    samples, positions = np.array([2**40, 0, 77]), np.array([5, 1, 4, 2**30, 0, 9])
    ones, zeros = np.ones((S, B, H), dtype), np.zeros((S, B, H), dtype)
    expected = reference_dropout.token_mask(rate, key, samples, positions, H, np.dtype(np.float64), column)
    dropout = (rate, key, samples, positions)
    args = (backend.upload(ones), None, backend.upload(zeros), *dropout, out := backend.upload(zeros))
    backend.kernels.dropout_residual_forward(*args, first_column=column)
    backend.kernels.dropout_residual_backward(
        backend.upload(ones), *dropout, dx := backend.upload(zeros), None, first_column=column
    )
    backend.kernels.add_positions_forward(
        backend.upload(ones), positions, None, None, rate, key, samples, places := backend.upload(zeros),
        first_column=column,
    )  # fmt: skip
    for found in (out, dx, places):
        mask = backend.download(found).reshape(-1, H)
        np.testing.assert_array_equal(mask != 0, expected != 0)
        assert set(np.unique(mask)) <= {0, np.array(1 / (1 - rate)).astype(dtype)[()]}


# The same bits every time


@pytest.mark.parametrize("dtype", [np.dtype(np.float32), BFLOAT16], ids=str)
def test_results_are_the_same_bits_in_every_order_of_threads_and_blocks(backend, dtype, monkeypatch):
    if not backend.emulated:
        pytest.skip("a GPU chooses the order itself")
    monkeypatch.setattr(backend.module("launch"), "MOST_BLOCKS", 6)
    S, B, H, V = 40, 3, 328, 600

    def run(order: str) -> list[Any]:
        cuda_on_cpu.set_order(order)
        make, k, up = Maker(dtype), backend.kernels, backend.upload
        ids = np.random.default_rng(1).integers(0, 9, (S, B))
        x, dx, y, d2 = (up(make(S, B, H)) for _ in range(4))
        gamma, stats = up(make(H)), (up(make.wide(S * B)), up(np.abs(make.wide(S * B))))
        g = [up(np.zeros(H, wide(dtype))) for _ in range(6)]
        dtable, dropout = up(np.zeros((9, H), wide(dtype))), (0.2, KEY, np.arange(B), np.arange(S))
        k.residual_norm_forward(x, gamma, y, *dropout, gamma, gamma, 1e-5, y, dx, *stats, False)
        k.residual_norm_backward(x, None, y, *dropout, gamma, *stats, dx, d2, *g[:3], False)
        k.activation_backward(x, y, dx, g[3])
        k.embedding_backward(ids, x, dtable, 0)
        k.add_positions_backward(x, np.arange(S), up(np.zeros((S, H), wide(dtype))), g[4], *dropout[:3], dx)
        logits, row_max, token_stats = up(make(S * B, V)), up(make.wide(S * B)), up(make.wide(S * B, 2))
        weights = up(np.ones(S * B, wide(dtype)))
        k.cross_entropy_max(logits, None, row_max)
        k.cross_entropy_sum(logits, row_max, ids.reshape(-1), 0, token_stats)
        loss, squares = k.cross_entropy_loss(token_stats, weights), k.sum_of_squares(x.reshape(-1))
        results = [x, dx, y, d2, *stats, *g, dtable, logits, row_max, token_stats, loss, squares]
        return [backend.download(a).copy() for a in results]

    try:
        first, *others = [run(order) for order in cuda_on_cpu.ORDERS]
    finally:
        cuda_on_cpu.set_order("ascending")
    for other in others:
        for a, b in zip(first, other, strict=True):
            np.testing.assert_array_equal(a, b)
