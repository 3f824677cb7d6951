"""Attention on the device beside the reference: strided views, masks, dropout, grouped heads, tiles and ring steps."""

from __future__ import annotations

from typing import Any

import cuda_on_cpu
import numpy as np
import pytest
from cuda_cases import ALL_DTYPES, BFLOAT16, DTYPES, KEY, REFERENCE, Maker, both, close, wide
from cuda_on_cpu import backend as backends
from hypothesis import given
from hypothesis import strategies as st

from executor.reference.masking import Masking

by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
# causal, window, dropout rate
CASES = [(False, None, 0.0), (False, None, 0.3), (True, None, 0.3), (True, 5, 0.0), (False, 6, 0.3), (True, 1, 0.0)]


@pytest.fixture(scope="module")
def backend() -> Any:
    found = backends.best()
    if found is None:
        pytest.skip("no GPU, and no g++ to emulate one")
    return found


# Tiles of scores that go through memory, one or many of them, or the kernels that keep scores to themselves.
WAYS = [(dtype, way) for dtype in DTYPES for way in ("one tile", "many tiles")]
WAYS += [(dtype, "fused") for dtype in ALL_DTYPES if dtype.itemsize == 2]
through_tiles = pytest.mark.parametrize(("dtype", "way"), WAYS[:-2], indirect=["way"], ids=str)
by_way = pytest.mark.parametrize(("dtype", "way"), WAYS, indirect=["way"], ids=str)


@pytest.fixture
def way(request: Any, backend: Any, monkeypatch: Any) -> str:
    monkeypatch.setattr(backend.module("flash"), "ENABLED", request.param == "fused")
    if request.param == "many tiles":
        module = backend.module("tiles")
        for name, value in {"TILE_BYTES": 20000, "_GRANULE": 8, "_FEWEST_ROWS": 8}.items():
            monkeypatch.setattr(module, name, value)
    return str(request.param)


def masking(Sq: int, Sk: int, B: int, causal: bool, window: int | None, rate: float, ordered: bool = False) -> Any:
    """5 query heads, uneven over 3 key-value heads; nobody reads the second."""
    shuffle = np.random.default_rng(Sk).permutation
    positions = [np.arange(n) if ordered else shuffle(max(Sq, Sk) + 3)[:n] for n in (Sq, Sk)]
    return Masking(
        0.4, np.array([0, 0, 2, 2, 0]), causal, window, *positions, rate, KEY, np.arange(B) + 9, np.arange(5) + 4
    )


@through_tiles
@pytest.mark.parametrize(("causal", "window", "rate"), CASES)
@pytest.mark.parametrize(("Sq", "Sk", "d"), [(1, 1, 1), (19, 37, 8), (40, 40, 5), (3, 530, 8)])
def test_plain_attention(backend, way, dtype, causal, window, rate, Sq, Sk, d):
    make, B = Maker(dtype, Sq), 2
    args = (make(Sq, B, 5, d), make(Sk, B, 3, d), make(Sk, B, 3, d), masking(Sq, Sk, B, causal, window, rate))
    probabilities = make(B, 5, Sq, Sk)
    both(backend, "attention_forward", *args, probabilities, make(Sq, B, 5, d), slack=4)
    grads = (make(Sq, B, 5, d), make(Sk, B, 3, d), make(Sk, B, 3, d))
    softmax = probabilities.astype(np.float64)
    exact = (*(x.astype(np.float64) for x in args[:3]), args[3])
    REFERENCE["attention_forward"](*exact, softmax, np.zeros((Sq, B, 5, d)))
    both(backend, "attention_backward", make(Sq, B, 5, d), *args, softmax.astype(dtype), *grads, slack=8)


@by_way
@pytest.mark.parametrize(("causal", "window", "rate"), CASES)
@pytest.mark.parametrize(("Sq", "Sk"), [(21, 40), (3, 530)])
def test_block_steps(backend, way, dtype, causal, window, rate, Sq, Sk):
    make, B, d = Maker(dtype, 3), 2, 8
    args = (make(Sq, B, 5, d), make(Sk, B, 3, d), make(Sk, B, 3, d), masking(Sq, Sk, B, causal, window, rate))
    outs = {x.dtype: x for x in (make(Sq, B, 5, d), make.wide(Sq, B, 5, d))}
    for out in outs.values():  # a ring sums in float32 beside an output of 16 bits
        state = [out, make.wide(B, 5, Sq), np.abs(make.wide(B, 5, Sq)) + wide(dtype).type(0.1)]
        out[0], state[1][..., 0], state[2][..., 0] = 0, -np.inf, 0  # a query that has seen no key yet
        both(backend, "block_attention_start", *state)
        both(backend, "block_attention_step", *args, *state, slack=8)
        for logsumexp in (make.wide(B, 5, Sq), *state[1:]):
            both(backend, "block_attention_finish", *state, logsumexp, slack=4)
    both(backend, "attention_delta", make(Sq, B, 5, d), make(Sq, B, 5, d), make.wide(B, 5, Sq), slack=2)
    logsumexp, delta = make.wide(B, 5, Sq) + wide(dtype).type(3), make.wide(B, 5, Sq)
    logsumexp[..., ~args[3].visible().any(axis=1)] = -np.inf
    grads = (make(Sq, B, 5, d), make(Sk, B, 3, d), make(Sk, B, 3, d))
    both(backend, "block_attention_step_backward", make(Sq, B, 5, d), *args, logsumexp, delta, *grads, slack=8)


@by_way
@pytest.mark.parametrize(("causal", "window", "rate"), CASES)
def test_blocked_attention_over_views_of_a_packed_buffer(backend, way, dtype, causal, window, rate):
    make, S, B, d, ordered = Maker(dtype, 5), 61, 2, 8, causal and rate > 0
    packed, dout = make(S, B, 11, d), make(S, B, 5, d)
    seen = masking(S, S, B, causal, window, rate, ordered)
    device, host = backend.upload(packed), packed.astype(wide(dtype))
    parts, host_parts = (np.split(x, [5, 8], axis=2) for x in (device, host))
    out, lse = backend.upload(make(S, B, 5, d)), backend.upload(make.wide(B, 5, S))
    expected, expected_lse = np.zeros(dout.shape, wide(dtype)), np.zeros((B, 5, S), wide(dtype))
    backend.kernels.blocked_attention_forward(*parts, seen, out, lse)
    REFERENCE["blocked_attention_forward"](*host_parts, seen, expected, expected_lse)
    close(backend.download(out), expected, dtype, 4)
    close(backend.download(lse), expected_lse, wide(dtype), 4)
    ours, theirs = backend.upload(make(S, B, 11, d)), np.zeros(packed.shape, wide(dtype))
    grads, expected_grads = (np.split(x, [5, 8], axis=2) for x in (ours, theirs))
    backend.kernels.blocked_attention_backward(backend.upload(dout), *parts, seen, out, lse, *grads)
    REFERENCE["blocked_attention_backward"](
        dout.astype(wide(dtype)), *host_parts, seen, expected, expected_lse, *expected_grads
    )
    close(backend.download(ours), theirs, dtype, 8)


@by_way
def test_ring_steps_over_zig_zag_chunks_give_the_whole_attention(backend, way, dtype):
    S, B, heads, d, ranks = 96, 2, 5, 8, 4
    make, up, k = Maker(dtype, 3), backend.upload, backend.kernels
    q, dout, keys, values = make(S, B, heads, d), make(S, B, heads, d), make(S, B, 3, d), make(S, B, 3, d)
    chunks = np.split(np.arange(S), 2 * ranks)
    rows = [np.concatenate([chunks[r], chunks[-1 - r]]) for r in range(ranks)]

    def at(mine: Any, theirs: Any) -> Any:
        return Masking(
            0.5, np.array([0, 0, 2, 2, 0]), True, None, mine, theirs, 0.25, KEY, np.arange(B), np.arange(heads)
        )

    everything = np.arange(S)
    wide_inputs = [x.astype(wide(dtype)) for x in (q, keys, values)]
    expected, lse = np.zeros(q.shape, wide(dtype)), np.zeros((B, heads, S), wide(dtype))
    REFERENCE["blocked_attention_forward"](*wide_inputs, at(everything, everything), expected, lse)
    whole = [np.zeros(x.shape, wide(dtype)) for x in (q, keys, values)]
    REFERENCE["blocked_attention_backward"](
        dout.astype(wide(dtype)), *wide_inputs, at(everything, everything), expected, lse, *whole
    )
    sums = [np.zeros(x.shape, wide(dtype)) for x in (q, keys, values)]
    for rank, mine in enumerate(rows):
        out, top = up(make.wide(mine.size, B, heads, d)), up(make.wide(B, heads, mine.size))
        total, delta = up(make.wide(B, heads, mine.size)), up(make.wide(B, heads, mine.size))
        k.block_attention_start(out, top, total)
        turns = [rows[(rank - turn) % ranks] for turn in range(ranks)]
        for theirs in turns:
            k.block_attention_step(up(q[mine]), up(keys[theirs]), up(values[theirs]), at(mine, theirs), out, top, total)
        k.block_attention_finish(out, top, total, top)
        close(backend.download(out), expected[mine], dtype, 8)
        close(backend.download(top), lse[..., mine], wide(dtype), 8)
        k.attention_delta(up(dout[mine]), up(backend.download(out).astype(dtype)), delta)
        dq = up(np.zeros_like(q[mine]))
        for theirs in turns:
            parts = [up(np.zeros_like(x[theirs])) for x in (keys, values)]
            inputs = (up(dout[mine]), up(q[mine]), up(keys[theirs]), up(values[theirs]))
            k.block_attention_step_backward(*inputs, at(mine, theirs), top, delta, dq, *parts)
            for total_gradient, part in zip(sums[1:], parts, strict=True):
                total_gradient[theirs] += backend.download(part).astype(wide(dtype))
        sums[0][mine] = backend.download(dq).astype(wide(dtype))
    for ours, theirs in zip(sums, whole, strict=True):
        close(ours, theirs, dtype, 16)


@by_way
@pytest.mark.parametrize("plain", [True, False])
def test_a_query_that_sees_no_key_gives_zeros_and_no_nan(backend, way, dtype, plain):
    q, k, v, dout = (np.ones((3, 1, 1, 2), dtype) for _ in range(4))
    zero, positions = np.zeros(1, int), (np.array([0, 5, 9]), np.array([4, 5, 6]))
    args = (q, k, v, Masking(1.0, zero, True, None, *positions, 0.0, KEY, zero, zero))
    out, grads = np.full_like(q, 7), [np.full_like(q, 7) for _ in range(3)]
    if plain:
        saved = np.full((1, 1, 3, 3), 7, dtype)
        *_, saved, out = both(backend, "attention_forward", *args, saved, out)
        grads = both(backend, "attention_backward", dout, *args, saved, *grads)[-3:]
    else:
        lse = np.zeros((1, 1, 3), wide(dtype))
        *_, out, lse = both(backend, "blocked_attention_forward", *args, out, lse)
        assert lse[0, 0, 0] == -np.inf
        grads = both(backend, "blocked_attention_backward", dout, *args, out, lse, *grads)[-3:]
    assert (out[0] == 0).all()
    assert (grads[0][0] == 0).all()
    assert all(np.isfinite(g.astype(np.float32)).all() for g in grads)


@by_way
def test_queries_of_which_none_sees_a_key_change_nothing(backend, way, dtype):
    make, S, B, d = Maker(dtype), 24, 2, 8
    inputs = (make(S, B, 5, d), make(S, B, 3, d), make(S, B, 3, d))
    mask = (np.array([0, 0, 2, 2, 0]), True, None, np.arange(S), np.arange(S) + S)
    args = (*inputs, Masking(0.4, *mask, 0.3, KEY, np.arange(B), np.arange(5)))
    both(backend, "block_attention_step", *args, make(S, B, 5, d), make.wide(B, 5, S), np.abs(make.wide(B, 5, S)))
    stats = (np.full((B, 5, S), -np.inf, wide(dtype)), make.wide(B, 5, S))
    both(backend, "block_attention_step_backward", make(S, B, 5, d), *args, *stats, *inputs)
    both(backend, "blocked_attention_forward", *args, make(S, B, 5, d), make.wide(B, 5, S))
    both(backend, "attention_forward", *args, make(B, 5, S, S), make(S, B, 5, d))
    grads = (make(S, B, 5, d), make(S, B, 3, d), make(S, B, 3, d))
    both(backend, "attention_backward", make(S, B, 5, d), *args, np.zeros((B, 5, S, S), dtype), *grads)
    both(backend, "blocked_attention_backward", make(S, B, 5, d), *args, make(S, B, 5, d), stats[0], *grads)


@by_dtype
def test_dropped_probabilities_are_those_of_the_cpu_bit_for_bit(backend, dtype):
    """Keys that all score alike and values that are unit vectors: the output shows which probabilities are left."""
    S, B, rate = 24, 2, 0.5
    q, kv = np.zeros((S, B, 2, S), dtype), np.zeros((S, B, 1, S), dtype)
    v = np.broadcast_to(np.eye(S, dtype=np.float32)[:, None, None], kv.shape).astype(dtype)
    positions, samples, heads = np.random.default_rng(1).permutation(S), np.array([2**40, 3]), np.array([7, 2])
    turned = positions[::-1].copy()
    seen = Masking(1.0, np.zeros(2, int), False, None, positions, turned, rate, KEY, samples, heads)
    expected = np.zeros(q.shape)
    REFERENCE["attention_forward"](*(x.astype(np.float64) for x in (q, kv, v)), seen, np.zeros((B, 2, S, S)), expected)
    up, out = backend.upload, backend.upload(np.ones_like(q))
    backend.kernels.blocked_attention_forward(up(q), up(kv), up(v), seen, out, up(np.zeros((B, 2, S), wide(dtype))))
    np.testing.assert_array_equal(backend.download(out) != 0, expected != 0)
    assert 0.3 < (expected == 0).mean() < 0.7


@pytest.mark.parametrize("fused", [False, True])
def test_attention_gives_the_same_bits_in_every_order(backend, fused, monkeypatch):
    monkeypatch.setattr(backend.module("flash"), "ENABLED", fused)
    if not backend.emulated:
        pytest.skip("a GPU chooses the order itself")
    S, B, d = 33, 2, 8

    def run(order: str) -> list[Any]:
        cuda_on_cpu.set_order(order)
        make, up = Maker(BFLOAT16), backend.upload
        inputs = tuple(up(make(S, B, heads, d)) for heads in (5, 3, 3))
        out, lse = up(make(S, B, 5, d)), up(make.wide(B, 5, S))
        args = (*inputs, masking(S, S, B, True, None, 0.2))
        backend.kernels.blocked_attention_forward(*args, out, lse)
        grads = [up(make(*x.shape)) for x in inputs]
        backend.kernels.blocked_attention_backward(up(make(S, B, 5, d)), *args, out, lse, *grads)
        return [backend.download(a).copy() for a in (out, lse, *grads)]

    try:
        first, *others = [run(order) for order in cuda_on_cpu.ORDERS]
    finally:
        cuda_on_cpu.set_order("ascending")
    for other in others:
        for a, b in zip(first, other, strict=True):
            np.testing.assert_array_equal(a, b)


# Fused


def compare_fused(
    backend: Any, dtype: Any, Sq: int, Sk: int, d: int, seen: Masking, heads: tuple[int, int], B: int
) -> None:
    make, kv = Maker(dtype, d), heads[1]
    inputs, narrow = (make(Sq, B, heads[0], d), make(Sk, B, kv, d), make(Sk, B, kv, d)), wide(dtype)
    exact = tuple(x.astype(narrow) for x in inputs)
    out, lse = np.zeros((Sq, B, heads[0], d), narrow), np.zeros((B, heads[0], Sq), narrow)
    found = both(backend, "blocked_attention_forward", *inputs, seen, make(*out.shape), make.wide(*lse.shape), slack=4)
    REFERENCE["blocked_attention_forward"](*exact, seen, out, lse)
    close(found[-1], lse, np.dtype(np.float32), 4)
    grads, dout = [make(*x.shape) for x in inputs], make(*out.shape)
    both(backend, "blocked_attention_backward", dout, *inputs, seen, out.astype(dtype), lse, *grads, slack=8)


@pytest.mark.parametrize("dtype", [dtype for dtype in ALL_DTYPES if dtype.itemsize == 2], ids=str)
@pytest.mark.parametrize(
    ("causal", "window", "ordered"), [(False, None, False), (True, None, True), (True, 50, True), (False, 90, False)]
)
def test_fused_attention_over_many_tiles_of_grouped_heads(backend, dtype, causal, window, ordered):
    seen = masking(140, 140, 1, causal, window, 0.2, ordered)._replace(scale=0.3)
    compare_fused(backend, dtype, 140, 140, 16, seen, (5, 3), 1)


@pytest.mark.parametrize(("Sq", "Sk", "d"), [(1, 1, 8), (70, 33, 40), (64, 128, 64), (33, 65, 128), (129, 64, 72)])
def test_fused_attention_of_any_size(backend, Sq, Sk, d):
    assert backend.module("flash").fits(backend.upload(np.zeros((Sq, 1, 2, d), BFLOAT16)))
    positions = (np.arange(Sq) + max(0, Sk - Sq), np.arange(Sk))
    for causal, rate in ((False, 0.0), (True, 0.25)):
        seen = Masking(d**-0.5, np.array([0, 1]), causal, None, *positions, rate, KEY, np.arange(1), np.arange(2))
        compare_fused(backend, BFLOAT16, Sq, Sk, d, seen, (2, 2), 1)


def test_heads_that_do_not_fit_go_through_tiles(backend):
    fits, up = backend.module("flash").fits, backend.upload
    assert not fits(up(np.zeros((2, 1, 1, 8), np.float32)))
    assert not fits(up(np.zeros((2, 1, 1, 12), BFLOAT16)))
    assert not fits(up(np.zeros((2, 1, 1, 136), BFLOAT16)))
    assert not fits(up(np.zeros((2, 1, 1, 8 + 4), BFLOAT16))[..., :8])
    assert fits(up(np.zeros((2, 1, 3, 8), BFLOAT16)))


# Planning


@given(st.lists(st.integers(0, 5), min_size=1, max_size=12), st.booleans())
def test_batches_have_each_query_head_once_and_the_head_that_it_reads(kv_heads, distinct):
    backend = backends.best()
    if backend is None:
        pytest.skip("no GPU, and no g++ to emulate one")
    tiles = backend.module("tiles")
    found = []
    for batch in tiles.head_batches(tuple(kv_heads), distinct):
        queries = list(range(len(kv_heads))[batch.queries])
        sources = list(range(6)[batch.kv]) * (1 if batch.kv.stop - batch.kv.start > 1 else batch.size)
        assert len(queries) == len(sources) == batch.size
        assert not distinct or len(set(sources)) == batch.size
        found += zip(queries, sources, strict=True)
    assert sorted(found) == list(enumerate(kv_heads))


@pytest.mark.parametrize(
    ("kv_heads", "distinct", "calls"),
    [(range(32), True, 1), (np.repeat(range(8), 4), False, 4), (np.repeat(range(8), 4), True, 4), ([0] * 16, False, 1)],
)
def test_regular_heads_take_few_calls(backend, kv_heads, distinct, calls):
    assert len(backend.module("tiles").head_batches(tuple(int(i) for i in kv_heads), distinct)) == calls


def test_tiles_cover_what_is_visible_and_a_causal_mask_halves_the_work(backend):
    tiles, S = backend.module("tiles"), 4096
    for causal, window, share in ((False, None, 1.0), (True, None, 0.5625), (True, 512, 0.28)):
        positions, index = np.arange(S), np.arange(8)
        mask = Masking(1.0, index, causal, window, positions, positions, 0.0, KEY, np.arange(2), index)
        rows = tiles.tile_rows(2, 8, S, S, np.dtype(np.float32), mask.limited)
        covered = np.zeros((S, S), bool)
        for span in tiles.Seen.of(mask).spans(rows):
            covered[span.first : span.last, span.start : span.stop] = True
        assert covered[mask.visible()].all()
        assert covered.mean() <= share


@by_dtype
def test_scratch_memory_is_what_is_said_and_no_matrix_of_the_sequence_squared(backend, dtype, monkeypatch):
    monkeypatch.setattr(backend.module("flash"), "ENABLED", False)
    tiles, taken = backend.module("tiles"), []
    monkeypatch.setattr(tiles, "TILE_BYTES", 1 << 19)
    empty = tiles.cupy.empty
    S, B, d = 512, 1, 8
    make, up = Maker(dtype), backend.upload
    inputs = tuple(up(make(S, B, heads, d)) for heads in (5, 3, 3))
    args = (*inputs, masking(S, S, B, True, None, 0.0, ordered=True))
    out, lse = up(make(S, B, 5, d)), up(make.wide(B, 5, S))
    monkeypatch.setattr(tiles.cupy, "empty", lambda *a: taken.append(empty(*a).nbytes) or empty(*a))
    backend.kernels.blocked_attention_forward(*args, out, lse)
    item = wide(dtype).itemsize
    limit = 2 * (item + dtype.itemsize) * B * 5 * S * tiles.tile_rows(B, 5, S, S, dtype, True)  # scores, probabilities
    limit += (0 if dtype.itemsize == item else 2 * item * S * B * 3 * d) + 2 * item * B * 5 * S  # dk and dv, statistics
    assert limit < 1 << 20 < B * 5 * S * S
    tile_bytes = max(taken) * (1 if dtype == wide(dtype) else 1.5)
    assert tile_bytes <= limit
