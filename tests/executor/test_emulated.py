"""Emulated kernels: rounding as the formats define it, around float32 kernels, into what these write and no more."""

import functools
import math

import numpy as np
import pytest
from equivalence_plans import model, plan, train
from hypothesis import given
from hypothesis import strategies as st

from executor import emulated, kernels
from executor.emulated import PRODUCTS, WRITTEN, kernel_table
from executor.precision import Precision, round_to_tf32

OPTIMIZER = {"adamw", "sgd", "scale", "sum_of_squares"}  # read and write float32 only
NOT_FUNCTIONS = {"FUSED", "Activation", "Floats", "Ints", "Masking"}


def table(name):
    return kernel_table(Precision.of(plan(model("gpt"), training={"precision": name})))


def test_every_kernel_of_the_model_is_emulated():
    assert set(WRITTEN) == set(kernels.__all__) - OPTIMIZER - NOT_FUNCTIONS
    assert PRODUCTS.keys() <= WRITTEN.keys()
    assert table("float32") is kernels and table("float64") is kernels
    with pytest.raises(AttributeError, match="no kernel adamw is emulated"):
        table("bfloat16").adamw  # noqa: B018


# ---- tf32 ------------------------------------------------------------------------------------------------------------


def nearest_tf32(value):
    """By the definition: 11 significant bits, ties to even (Python's round)."""
    exponent = max(math.frexp(value)[1], -125)  # subnormals of float32 keep their fixed point
    return math.ldexp(round(math.ldexp(value, 11 - exponent)), exponent - 11)


@given(st.floats(width=32, allow_nan=False, allow_infinity=False).filter(lambda x: abs(x) < 3.3e38))
def test_tf32_rounds_to_nearest_even(value):
    assert float(round_to_tf32(np.array([value], np.float32))[0]) == nearest_tf32(value)


def test_tf32_keeps_what_is_no_number_and_shapes():
    odd = np.array([[np.inf, -np.inf, np.nan], [0.0, -0.0, 1.0]], np.float32)
    np.testing.assert_array_equal(round_to_tf32(odd), odd)
    assert round_to_tf32(np.zeros((0, 4), np.float32)).shape == (0, 4)
    assert round_to_tf32(odd.T).flags.c_contiguous


def test_a_tf32_product_reads_rounded_operands_and_sums_in_float32():
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal(shape).astype(np.float32) for shape in ((7, 33), (33, 5)))
    out = np.empty((7, 5), np.float32)
    table("tf32").matmul(a, b, out)
    exact = round_to_tf32(a).astype(np.float64) @ round_to_tf32(b).astype(np.float64)
    np.testing.assert_allclose(out, exact, rtol=1e-5, atol=1e-6)
    assert np.abs(out - a.astype(np.float64) @ b).max() > 1e-4, "rounding shows"


# ---- 16 bits ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_products_round_once_and_weight_gradients_not_at_all(name):
    storage = Precision.of(plan(model("gpt"), training={"precision": name})).storage
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal(shape).astype(storage) for shape in ((6, 64), (64, 6)))
    exact = a.astype(np.float64) @ b.astype(np.float64)
    out, wide = np.empty((6, 6), storage), np.zeros((6, 6), np.float32)
    table(name).matmul(a, b, out)
    unit = 2.0 ** -{"float16": 11, "bfloat16": 8}[name]
    assert (np.abs(out.astype(np.float64) - exact) <= 1.01 * unit * np.abs(exact) + 1e-5).all()
    table(name).matmul(a, b, wide, accumulate=True)
    np.testing.assert_allclose(wide, exact, rtol=1e-5, atol=1e-5)


def test_float16_beyond_its_range_becomes_infinite_without_a_warning():
    half = np.dtype("float16")
    a, out = np.full((1, 8), 200.0, half), np.empty((1, 1), half)
    table("float16").matmul(a, a.T.copy(), out)
    assert np.isposinf(out).all()


def test_arguments_that_are_one_array_stay_one(monkeypatch):
    """In place: the activation's derivative takes the place of its input."""
    seen = []

    def fake(x, bias, kind, out, derivative):
        seen.append((np.shares_memory(x, derivative), np.shares_memory(x, out)))
        out[:], derivative[:] = x + 1, 7

    monkeypatch.setattr(kernels, "activation_forward", fake)
    monkeypatch.setattr(emulated, "_parameters", lambda name: ("x", "bias", "kind", "out", "derivative"))
    x, out = np.ones((2, 3), np.float16), np.empty((2, 3), np.float16)
    table("float16").activation_forward(x, None, "gelu", out, x.reshape(2, 3))
    assert seen == [(True, False)]
    assert (out == 2).all() and (x == 7).all()


class Watched:
    """The table of kernels, noting which arguments each call changes."""

    def __init__(self):
        self.changed = {}

    def __getattr__(self, name):
        right = getattr(kernels, name)

        @functools.wraps(right)
        def call(**named):
            before = {key: value.copy() for key, value in named.items() if isinstance(value, np.ndarray)}
            result = right(**named)
            written = [named[key] for key in WRITTEN[name] if named.get(key) is not None]
            found = self.changed.setdefault(name, set())
            for key, old in before.items():
                same = np.array_equal(old, named[key], equal_nan=True)
                if not same and (key in WRITTEN[name] or not any(np.shares_memory(named[key], w) for w in written)):
                    found.add(key)
            return result

        return call


EVERY_KERNEL = [
    plan(model("bert"), tp=2, training={"precision": "bfloat16"}),
    plan(model("gpt"), cp=2, cp_kind="ring", training={"precision": "bfloat16"}),
    plan(model("qwen3"), attention="blocked", training={"precision": "bfloat16"}),
]


def test_kernels_write_what_the_table_says_and_nothing_else(monkeypatch):
    """What a kernel writes and the table leaves out would be lost, being written to a widened copy."""
    watched = Watched()
    monkeypatch.setattr(emulated, "kernels", watched)
    for candidate in EVERY_KERNEL:
        train(candidate)
    assert watched.changed.keys() == WRITTEN.keys(), "every kernel ran"
    for name, changed in watched.changed.items():
        assert changed <= set(WRITTEN[name]), f"{name} also writes {changed - set(WRITTEN[name])}"
        assert changed or name == "cross_entropy_loss", f"{name} changed nothing"
