"""Gradients of every kernel: against central differences in float64, and against stored PyTorch results."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from executor import kernels

KEY = 0x0123456789ABCDEF
generator = np.random.default_rng(11)


def normal(*shape: int) -> np.ndarray:
    return generator.standard_normal(shape)


def check_gradients(
    forward: Callable[..., list[np.ndarray]], backward: Callable[..., list[np.ndarray]], *inputs: np.ndarray
) -> None:
    """For random directions v and cotangents w: d/de <w, f(x + e v)> = <f'(x)^T w, v>, one input at a time.

    Args:
        forward: outputs of inputs.
        backward: gradients of inputs, from the cotangents (a list) and the inputs.
        inputs: float64 arrays.
    """
    cotangents = [normal(*out.shape) for out in forward(*inputs)]
    gradients = backward(cotangents, *inputs)
    assert len(gradients) == len(inputs)
    for index, (x, gradient) in enumerate(zip(inputs, gradients, strict=True)):
        assert gradient.shape == x.shape
        for _ in range(3):
            direction, step = normal(*x.shape), 1e-6

            def at(sign: int, index: int = index, moved: np.ndarray = direction * step) -> float:
                changed = [y + sign * moved if i == index else y for i, y in enumerate(inputs)]
                return sum(float((w * out).sum()) for w, out in zip(cotangents, forward(*changed), strict=True))

            difference, exact = (at(1) - at(-1)) / (2 * step), float((gradient * direction).sum())
            assert difference == pytest.approx(exact, rel=2e-7, abs=2e-7 * np.linalg.norm(gradient))


S, B, H = 5, 3, 12
SAMPLES, POSITIONS = np.array([4, 0, 9]), np.array([3, 8, 0, 1, 6])


def dropout(rate: float) -> tuple[float, int, np.ndarray, np.ndarray]:
    return rate, KEY, SAMPLES, POSITIONS


@pytest.mark.parametrize("transpose_a", [False, True])
@pytest.mark.parametrize("transpose_b", [False, True])
def test_matmul(transpose_a, transpose_b):
    def forward(a, b):
        out = np.empty((4, 6))
        kernels.matmul(a, b, out, transpose_a=transpose_a, transpose_b=transpose_b)
        return [out]

    def backward(w, a, b):
        da, db = np.zeros_like(a), np.zeros_like(b)
        if transpose_a:
            kernels.matmul(b, w[0], da, transpose_a=transpose_b, transpose_b=True, accumulate=True)
        else:
            kernels.matmul(w[0], b, da, transpose_b=not transpose_b, accumulate=True)
        if transpose_b:
            kernels.matmul(w[0], a, db, transpose_a=True, transpose_b=transpose_a, accumulate=True)
        else:
            kernels.matmul(a, w[0], db, transpose_a=not transpose_a, accumulate=True)
        return [da, db]

    check_gradients(
        forward, backward, normal(*((7, 4) if transpose_a else (4, 7))), normal(*((6, 7) if transpose_b else (7, 6)))
    )


@pytest.mark.parametrize("rms", [False, True])
def test_norm(rms):
    def forward(x, gamma, beta):
        out, stats = np.empty_like(x), (None if rms else np.empty(S * B), np.empty(S * B))
        kernels.norm_forward(x, gamma, None if rms else beta, 1e-3, out, *stats, rms)
        forward.stats = stats
        return [out]

    def backward(w, x, gamma, beta):
        forward(x, gamma, beta)
        dx, dgamma, dbeta = np.empty_like(x), np.zeros(H), np.zeros(H)
        kernels.norm_backward(w[0], x, gamma, *forward.stats, dx, dgamma, None if rms else dbeta, rms)
        return [dx, dgamma, dbeta]

    check_gradients(forward, backward, normal(S, B, H), normal(H), normal(H))


@pytest.mark.parametrize("rate", [0.0, 0.4])
def test_dropout_residual(rate):
    def forward(x, bias, residual):
        out = np.empty_like(x)
        kernels.dropout_residual_forward(x, bias, residual, *dropout(rate), out)
        return [out]

    def backward(w, x, bias, residual):
        dx, dbias = np.empty_like(x), np.zeros(H)
        kernels.dropout_residual_backward(w[0], *dropout(rate), dx, dbias)
        return [dx, dbias, w[0]]

    check_gradients(forward, backward, normal(S, B, H), normal(H), normal(S, B, H))


@pytest.mark.parametrize("rate", [0.0, 0.4])
@pytest.mark.parametrize("rms", [False, True])
def test_residual_norm(rms, rate):
    def forward(x, bias, residual, gamma, beta):
        stream, normed = np.empty_like(x), np.empty_like(x)
        forward.stats = (None if rms else np.empty(S * B), np.empty(S * B))
        args = (gamma, None if rms else beta, 1e-3, stream, normed, *forward.stats, rms)
        kernels.residual_norm_forward(x, bias, residual, *dropout(rate), *args)
        return [stream, normed]

    def backward(w, x, bias, residual, gamma, beta):
        stream, _ = forward(x, bias, residual, gamma, beta)
        dx, d_residual, dbias, dgamma, dbeta = np.empty_like(x), np.empty_like(x), np.zeros(H), np.zeros(H), np.zeros(H)
        args = (*dropout(rate), gamma, *forward.stats, dx, d_residual, dbias, dgamma, None if rms else dbeta, rms)
        kernels.residual_norm_backward(w[1], w[0], stream, *args)
        return [dx, dbias, d_residual, dgamma, dbeta]

    check_gradients(forward, backward, normal(S, B, H), normal(H), normal(S, B, H), normal(H), normal(H))


@pytest.mark.parametrize("kind", ["gelu", "gelu_tanh", "relu", "silu"])
def test_activation(kind):
    def forward(x, bias):
        out = np.empty_like(x)
        kernels.activation_forward(x, bias, kind, out, np.empty_like(x))
        return [out]

    def backward(w, x, bias):
        derivative, dbias = x.copy(), np.zeros(H)
        kernels.activation_forward(derivative, bias, kind, np.empty_like(x), derivative)
        kernels.activation_backward(w[0], derivative, derivative, dbias)
        return [derivative, dbias]

    check_gradients(forward, backward, normal(9, H) * 2, normal(H))


@pytest.mark.parametrize("kind", ["gelu", "gelu_tanh", "relu", "silu"])
def test_gated(kind):
    def forward(x, bias):
        out = np.empty((9, H // 2))
        kernels.gated_forward(x, bias, kind, out)
        return [out]

    def backward(w, x, bias):
        dx, dbias = x.copy(), np.zeros(H)
        kernels.gated_backward(w[0], dx, bias, kind, dx, dbias)
        return [dx, dbias]

    check_gradients(forward, backward, normal(9, H) * 2, normal(H))


def test_embedding():
    ids = generator.integers(0, 9, (S, B))

    def forward(table):
        out = np.empty((S, B, H))
        kernels.embedding_forward(ids, table, 3, out)
        return [out]

    def backward(w, table):
        dtable = np.zeros_like(table)
        kernels.embedding_backward(ids, w[0], dtable, 3)
        return [dtable]

    check_gradients(forward, backward, normal(4, H))


@pytest.mark.parametrize("rate", [0.0, 0.4])
def test_add_positions(rate):
    def forward(x, table, type_row):
        out = np.empty_like(x)
        kernels.add_positions_forward(x, POSITIONS, table, type_row, rate, KEY, SAMPLES, out, first_row=1)
        return [out]

    def backward(w, x, table, type_row):
        dx, dtable, dtype_row = np.empty_like(x), np.zeros_like(table), np.zeros(H)
        kernels.add_positions_backward(w[0], POSITIONS, dtable, dtype_row, rate, KEY, SAMPLES, dx, first_row=1)
        return [dx, dtable, dtype_row]

    check_gradients(forward, backward, normal(S, B, H), normal(6, H), normal(H))


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("rotary", [False, True])
def test_split_heads(normed, rotary):
    heads, kv, d = 2, 1, 4
    angle = normal(S, d // 2)
    tables = (np.cos(angle), np.sin(angle)) if rotary else (None, None)
    saved = (np.empty((S * B, 12)), np.empty((S * B, 3))) if normed else (None, None)

    def forward(qkv, bias, q_gain, k_gain):
        out, gains = qkv.copy(), (q_gain, k_gain) if normed else (None, None)
        kernels.split_heads_forward(out, bias, *gains, 1e-3, *tables, heads, kv, *saved)
        return [out]

    def backward(w, qkv, bias, q_gain, k_gain):
        forward(qkv, bias, q_gain, k_gain)
        dqkv, totals, gains = w[0].copy(), [np.zeros(16), np.zeros(d), np.zeros(d)], (q_gain, k_gain)
        used, parts = (gains, totals[1:]) if normed else ((None, None), (None, None))
        kernels.split_heads_backward(dqkv, *saved, *used, *tables, heads, kv, totals[0], *parts)
        return [dqkv, *totals]

    check_gradients(forward, backward, normal(S, B, 16), normal(16), np.array([0.0, 1.5, -0.7, 1.0]), normal(4))


@pytest.mark.parametrize("blocked", [False, True])
@pytest.mark.parametrize("rate", [0.0, 0.4])
@pytest.mark.parametrize(("causal", "window"), [(False, None), (True, None), (True, 4), (False, 4)])
def test_attention(blocked, rate, causal, window):
    kv_index = np.array([0, 0, 1])
    mask = (kv_index, causal, window, POSITIONS, np.array([2, 0, 7, 5, 3, 1]))
    masking = kernels.Masking(0.6, *mask, rate, KEY, SAMPLES, np.arange(3))

    def forward(q, k, v):
        out = np.empty_like(q)
        if blocked:
            forward.saved = (out, np.empty((B, 3, S)))
            kernels.blocked_attention_forward(q, k, v, masking, *forward.saved)
        else:
            forward.saved = (np.empty((B, 3, S, 6)),)
            kernels.attention_forward(q, k, v, masking, *forward.saved, out)
        return [out]

    def backward(w, q, k, v):
        forward(q, k, v)
        gradients = [np.empty_like(q), np.empty_like(k), np.empty_like(v)]
        function = kernels.blocked_attention_backward if blocked else kernels.attention_backward
        function(w[0], q, k, v, masking, *forward.saved, *gradients)
        return gradients

    check_gradients(forward, backward, normal(S, B, 3, 4), normal(6, B, 2, 4), normal(6, B, 2, 4))


def cross_entropy(logits: np.ndarray, targets: np.ndarray, weights: np.ndarray) -> tuple[float, np.ndarray]:
    """Loss and gradient of an unsplit vocabulary."""
    work, row_max, stats = logits.copy(), np.empty(len(logits)), np.empty((len(logits), 2))
    kernels.cross_entropy_max(work, None, row_max)
    kernels.cross_entropy_sum(work, row_max, targets, 0, stats)
    kernels.cross_entropy_backward(work, stats, targets, 0, weights, 1.0)
    return kernels.cross_entropy_loss(stats, weights), work


def test_cross_entropy():
    targets, weights = generator.integers(0, 11, 8), np.array([1, 0, 2, 1, 0.5, 0, 1, 1.0])
    scale = normal(1)

    def forward(logits):
        return [np.array([cross_entropy(logits, targets, weights)[0]]) * scale]

    def backward(w, logits):
        return [cross_entropy(logits, targets, weights)[1] * w[0] * scale]

    check_gradients(forward, backward, normal(8, 11) * 3)


# Stored PyTorch results (tests/make_torch_values.py)

STORED = np.load(Path(__file__).parents[1] / "data" / "torch_values.npz")


def stored(name: str, *fields: str) -> Any:
    return tuple(np.ascontiguousarray(STORED[f"{name}.{field}"]) for field in fields)


def assert_equal(actual: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(actual, expected, rtol=0, atol=2e-14 * max(1.0, float(np.abs(expected).max())))


@pytest.mark.parametrize("kind", ["gelu", "gelu_tanh", "silu"])
def test_activation_equals_torch(kind):
    x, out, dout, dx = stored(kind, "x", "out", "dout", "d_x")
    ours, derivative = np.empty_like(x), 3 * x
    kernels.activation_forward(derivative, None, kind, ours, derivative)
    kernels.activation_backward(dout, derivative, derivative, None)
    assert_equal(ours, out)
    assert_equal(3 * derivative, dx)


def test_gated_equals_torch():
    x, out, dout, dx = stored("swiglu", "x", "out", "dout", "d_x")
    ours = np.empty_like(out)
    kernels.gated_forward(x, None, "silu", ours)
    kernels.gated_backward(dout, x, None, "silu", x, None)
    assert_equal(ours, out)
    assert_equal(x, dx)


@pytest.mark.parametrize(("name", "epsilon"), [("layer_norm", 1e-5), ("rms_norm", 1e-6)])
def test_norm_equals_torch(name, epsilon):
    rms = name == "rms_norm"
    x, gamma, out, dout, dx, expected = stored(name, "x", "gamma", "out", "dout", "d_x", "d_gamma")
    beta, expected_beta = (None, None) if rms else stored(name, "beta", "d_beta")
    ours, mean, rstd = np.empty_like(x), None if rms else np.empty(12), np.empty(12)
    kernels.norm_forward(x, gamma, beta, epsilon, ours, mean, rstd, rms)
    assert_equal(ours, out)
    dgamma, dbeta = np.zeros(24), None if rms else np.zeros(24)
    kernels.norm_backward(dout, x, gamma, mean, rstd, ours, dgamma, dbeta, rms)
    assert_equal(ours, dx)
    assert_equal(dgamma, expected)
    if dbeta is not None:
        assert_equal(dbeta, expected_beta)


def test_cross_entropy_equals_torch():
    x, targets, out, dout, dx = stored("cross_entropy", "x", "targets", "out", "dout", "d_x")
    loss, gradient = cross_entropy(4 * x, np.maximum(targets, 0), (targets >= 0).astype(np.float64))
    assert loss == pytest.approx(float(out.item()), rel=1e-14)
    assert_equal(4 * gradient * dout, dx)


@pytest.mark.parametrize("blocked", [False, True])
@pytest.mark.parametrize("name", ["attention", "attention_causal"])
def test_attention_equals_torch(name, blocked):
    q, k, v, out, dout, *expected = stored(name, "q", "k", "v", "out", "dout", "d_q", "d_k", "d_v")
    rows, sources = np.arange(10), np.repeat([0, 1], 3)
    dropout = (0.0, KEY, np.arange(2), np.arange(6))
    args = (q, k, v, kernels.Masking(8**-0.5, sources, name.endswith("causal"), None, rows, rows, *dropout))
    ours, gradients = np.empty_like(q), [np.empty_like(q), np.empty_like(k), np.empty_like(v)]
    if blocked:
        lse = np.empty((2, 6, 10))
        kernels.blocked_attention_forward(*args, ours, lse)
        kernels.blocked_attention_backward(dout, *args, ours, lse, *gradients)
    else:
        probabilities = np.empty((2, 6, 10, 10))
        kernels.attention_forward(*args, probabilities, ours)
        kernels.attention_backward(dout, *args, probabilities, *gradients)
    assert_equal(ours, out)
    for gradient, wanted in zip(gradients, expected, strict=True):
        assert_equal(gradient, wanted)


def test_rotary_equals_torch():
    x, angle, out, dout, dx = stored("rotary", "x", "angle", "out", "dout", "d_x")
    tables, none = (np.cos(angle), np.sin(angle)), (None, None)
    work = np.concatenate([x, x[:, :, :1]], axis=2).reshape(7, 2, 32)  # 2 query, 1 key head, 1 value head that stays
    kernels.split_heads_forward(work, None, *none, 0.0, *tables, 2, 1, *none)
    assert_equal(work.reshape(7, 2, 4, 8)[:, :, :3], out)
    assert_equal(work.reshape(7, 2, 4, 8)[:, :, 3], x[:, :, 0])
    work = np.concatenate([dout, dout[:, :, :1]], axis=2).reshape(7, 2, 32)
    kernels.split_heads_backward(work, *none, *none, *tables, 2, 1, None, *none)
    assert_equal(work.reshape(7, 2, 4, 8)[:, :, :3], dx)


def test_adamw_equals_torch():
    (param,) = stored("adamw", "start")
    m, v = np.zeros_like(param), np.zeros_like(param)
    for step in range(3):
        grad, expected = stored("adamw", f"grad{step}", f"param{step}")
        kernels.adamw(param, grad, m, v, 1e-2, 0.9, 0.95, 1e-8, 0.1, step + 1)
        assert_equal(param, expected)
