"""Batches: any rank's part is the part of the global batch, and masking follows BERT."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from executor.data import Batches
from planner.errors import DataError
from planner.model import BYTE_VOCAB, MASK, ModelSpec


def spec(**changes):
    numbers = {"layers": 1, "hidden": 8, "heads": 2, "kv_heads": 2, "head_dim": 4, "ffn_hidden": 32}
    return ModelSpec(**{**numbers, "seq_len": 64, "vocab": BYTE_VOCAB, **changes})


@given(
    source=st.sampled_from([None, "synthetic"]),
    causal=st.booleans(),
    step=st.integers(0, 10**6),
    samples=st.lists(st.integers(0, 9), max_size=6),
    positions=st.lists(st.integers(0, 63), max_size=8),
)
def test_any_part_equals_the_part_of_the_global_batch(source, causal, step, samples, positions):
    batches = Batches(source, spec(causal=causal), 10, seed=3)
    whole = batches.batch(step, range(10), range(64))
    part = batches.batch(step, samples, positions)
    for name in whole._fields:
        np.testing.assert_array_equal(getattr(part, name), getattr(whole, name)[np.ix_(positions, samples)])
    assert part.ids.dtype == part.targets.dtype == np.int32
    assert part.weights.dtype == np.float32
    assert batches.token_count(step) == whole.weights.sum()


def test_masking_follows_bert():
    batch = Batches(None, spec(seq_len=512), 512, seed=0).batch(0, range(512), range(512))
    total, selected = batch.ids.size, batch.weights > 0
    count = selected.sum()
    assert count == pytest.approx(0.15 * total, abs=5 * math.sqrt(0.15 * 0.85 * total))
    np.testing.assert_array_equal(batch.ids[~selected], batch.targets[~selected])
    masked = batch.ids[selected] == MASK
    assert masked.mean() == pytest.approx(0.8, abs=5 * math.sqrt(0.16 / count))
    rest = ~masked
    changed = (batch.ids[selected] != batch.targets[selected])[rest]
    # Half of the rest is random, and one in 256 random bytes is the old one.
    assert changed.mean() == pytest.approx(0.5 * 255 / 256, abs=5 * math.sqrt(0.25 / rest.sum()))
    assert batch.targets.max() < 256
    assert batch.ids[selected][rest].max() < 256
    assert len(np.unique(batch.ids[selected][rest])) == 256


def test_causal_targets_are_the_next_token(tmp_path):
    path = tmp_path / "corpus.bin"
    corpus = np.arange(1000) % 251
    path.write_bytes(corpus.astype(np.uint8).tobytes())
    batch = Batches(path, spec(causal=True), 4, seed=0).batch(5, range(4), range(64))
    np.testing.assert_array_equal(batch.ids[1:], batch.targets[:-1])
    np.testing.assert_array_equal((batch.ids + 1) % 251, batch.targets)
    assert (batch.weights == 1).all()


def test_last_offset_is_reachable_and_in_bounds(tmp_path):
    path = tmp_path / "tiny.bin"
    path.write_bytes(bytes(range(66)))  # two offsets for sequences of 64 tokens and their next one
    batch = Batches(path, spec(causal=True), 64, seed=0).batch(0, range(64), range(64))
    assert set(batch.ids[0]) == {0, 1}
    assert batch.targets.max() == 65


@pytest.mark.parametrize("source", [None, "synthetic"])
def test_steps_samples_and_seeds_differ(source):
    causal = spec(causal=True)
    batches = Batches(source, causal, 8, seed=0)
    first = batches.batch(0, range(8), range(64)).ids
    assert len(np.unique(first, axis=1).T) == 8
    assert not np.array_equal(first, batches.batch(1, range(8), range(64)).ids)
    assert not np.array_equal(first, Batches(source, causal, 8, seed=1).batch(0, range(8), range(64)).ids)


def test_the_number_of_a_sample_is_counted_from_the_start_of_training():
    """The same sequences in another batch size: step 3 of 4 samples is step 1 of 12 from sample 0 on."""
    small, large = (Batches(None, spec(), size, seed=0) for size in (4, 12))
    for name in ("ids", "targets", "weights"):
        np.testing.assert_array_equal(
            getattr(small.batch(3, range(4), range(64)), name), getattr(large.batch(1, range(4), range(64)), name)
        )


@pytest.mark.parametrize("vocab", [2, 37, 50_000])
def test_synthetic_tokens_stay_below_any_vocabulary(vocab):
    batch = Batches("synthetic", spec(vocab=vocab), 32, seed=0).batch(0, range(32), range(64))
    assert batch.targets.max() < vocab - 1
    assert batch.ids.max() == vocab - 1
    assert min(batch.ids.min(), batch.targets.min()) >= 0
    selected = batch.weights > 0
    assert (batch.ids[~selected] < vocab - 1).all()


def test_nothing_masked_gives_scale_zero():
    batches = Batches("synthetic", spec(seq_len=1), 1, seed=0)
    counts = [batches.token_count(step) for step in range(40)]
    assert set(counts) == {0, 1}
    assert batches.loss_scale(counts.index(0)) == 0.0
    assert batches.loss_scale(counts.index(1)) == 1.0


@pytest.mark.parametrize(
    ("prepare", "changes", "message"),
    [
        (lambda path: None, {}, "cannot read data file .*: No such file"),
        (lambda path: path.mkdir(), {}, "cannot read data file .*: Is a directory"),
        (lambda path: path.write_bytes(b""), {}, "has 0 bytes, fewer than the 65"),
        (lambda path: path.write_bytes(b"x" * 64), {}, "has 64 bytes, fewer than the 65"),
        (lambda path: path.write_bytes(b"x" * 99), {"vocab": 259}, "vocab=259 is below 260"),
    ],
)
def test_unusable_data_is_a_data_error(tmp_path, prepare, changes, message):
    path = tmp_path / "corpus"
    prepare(path)
    with pytest.raises(DataError, match=message):
        Batches(path, spec(**changes), 4, seed=0)


def test_indices_outside_the_batch_are_refused():
    batches = Batches("synthetic", spec(), 4, seed=0)
    with pytest.raises(IndexError, match=r"sample indices 4\.\.4 leave \[0, 4\)"):
        batches.batch(0, [4], [0])
    with pytest.raises(IndexError, match=r"position indices -1\.\.-1"):
        batches.batch(0, [0], [-1])
    with pytest.raises(DataError, match="vocab=1"):
        Batches("synthetic", spec(vocab=1), 4, seed=0)
