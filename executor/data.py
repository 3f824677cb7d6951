"""Batches of language-model tokens, each element a function of (seed, step, sample, position).

Every rank asks for the samples and positions it works on and gets the slice of the global batch: no rank reads for
another, no batch is scattered, and the order of the data does not depend on the layout.

Text is bytes: token ids 0 to 255 are bytes, then PAD, MASK, CLS and SEP. A sequence is `seq_len` consecutive bytes of
the source that start at a random offset; CLS and SEP are reserved but not inserted, because cutting sequences out of
running text has no sentence boundaries to mark. Synthetic tokens are uniform over the vocabulary; their mask token is
the vocabulary's last id, which the data then never contains, so vocabularies smaller than the bytes work too.

Masked language models follow BERT (Devlin et al. 2019, section 3.1): each position is selected with probability 0.15;
of the selected, 80% become MASK, 10% a random token, 10% stay. Causal models predict the next token everywhere.
"""

from __future__ import annotations

import pydoc_data.topics
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from executor.random import Words, bits_at, derive_key
from planner.errors import DataError
from planner.model import BYTE_VOCAB, MASK, NUM_BYTES, ModelSpec

SELECT_PROBABILITY = 0.15
# Of one uniform draw in [0, 1): below the first bound MASK, below the second a random token, below 0.15 unchanged.
_MASK_BELOW = SELECT_PROBABILITY * 0.8
_REPLACE_BELOW = SELECT_PROBABILITY * 0.9


class Batch(NamedTuple):
    """Part of a global batch, sequence first.

    Attributes:
        ids: what the model reads, int32 [positions, samples].
        targets: what it should predict, int32 [positions, samples]; the original token where nothing is predicted.
        weights: 1 where the loss counts and 0 elsewhere, float32 [positions, samples].
    """

    ids: npt.NDArray[np.int32]
    targets: npt.NDArray[np.int32]
    weights: npt.NDArray[np.float32]


class Source(Protocol):
    """Where tokens come from: ordinary tokens are 0 .. num_tokens-1, `mask_id` marks a hidden one."""

    num_tokens: int
    mask_id: int

    def tokens(self, sequence: Words, positions: Words) -> npt.NDArray[np.int32]:
        """Return tokens [positions, sequences] of sequences numbered from the start of training."""


class ByteSource:
    """Sequences cut from a byte string at random offsets.

    Args:
        data: the bytes, uint8 [n].
        seq_len: tokens of a sequence; one more byte must follow it, the last causal target.
        vocab: the model's vocabulary.
        seed: the run's seed.
        name: what to call the source in errors.

    Raises:
        DataError: the vocabulary does not hold the bytes and special tokens, or the text is too short.
    """

    num_tokens = NUM_BYTES
    mask_id = MASK

    def __init__(self, data: npt.NDArray[np.uint8], *, seq_len: int, vocab: int, seed: int, name: str) -> None:
        if vocab < BYTE_VOCAB:
            raise DataError(
                f"vocab={vocab} is below {BYTE_VOCAB}, the 256 bytes and 4 special tokens of text data; "
                f"use vocab>={BYTE_VOCAB} or synthetic data"
            )
        if data.size < seq_len + 1:
            raise DataError(
                f"{name} has {data.size} bytes, fewer than the {seq_len + 1} of one sequence of seq_len={seq_len} "
                "and its next token; use a longer text or a shorter seq_len"
            )
        self._data = data
        self._num_offsets = data.size - seq_len
        self._key = derive_key(seed, "data", "offset")

    def tokens(self, sequence: Words, positions: Words) -> npt.NDArray[np.int32]:
        """Return tokens [positions, sequences]."""
        start = bits_at(self._key, sequence) % np.uint64(self._num_offsets)
        return self._data[positions[:, None] + start].astype(np.int32)


class SyntheticSource:
    """Uniform random tokens.

    Args:
        seq_len: tokens of a sequence.
        vocab: the model's vocabulary; at least 2, because the last id is the mask.
        seed: the run's seed.

    Raises:
        DataError: a vocabulary of one token.
    """

    def __init__(self, *, seq_len: int, vocab: int, seed: int) -> None:
        if vocab < 2:
            raise DataError(f"vocab={vocab} leaves no token beside the mask; use vocab>=2")
        self.num_tokens = vocab - 1
        self.mask_id = vocab - 1
        self._stride = seq_len + 1
        self._key = derive_key(seed, "data", "synthetic")

    def tokens(self, sequence: Words, positions: Words) -> npt.NDArray[np.int32]:
        """Return tokens [positions, sequences]."""
        index = sequence * np.uint64(self._stride) + positions[:, None]
        return (bits_at(self._key, index) % np.uint64(self.num_tokens)).astype(np.int32)


def open_source(source: str | Path | None, spec: ModelSpec, seed: int) -> Source:
    """Open the training data.

    Args:
        source: None for the text shipped with Python (it differs between Python versions), "synthetic" for random
            tokens, else the path of a file of any bytes.
        spec: the model, for its seq_len and vocab.
        seed: the run's seed.

    Returns:
        The source of tokens.

    Raises:
        DataError: a file that cannot be read, a text shorter than one sequence, or a vocabulary too small for it.
    """
    if source == "synthetic":
        return SyntheticSource(seq_len=spec.seq_len, vocab=spec.vocab, seed=seed)
    if source is None:
        data, name = _default_text(), "the default text"
    else:
        data, name = _map_file(Path(source)), str(source)
    return ByteSource(data, seq_len=spec.seq_len, vocab=spec.vocab, seed=seed, name=name)


class Batches:
    """The sequence of global batches of a training run.

    Args:
        source: None, "synthetic" or a path, as in `open_source`.
        spec: the model, for its seq_len, vocab and causal.
        global_batch_size: sequences per step over all ranks.
        seed: the run's seed.

    Raises:
        DataError: as in `open_source`.
    """

    def __init__(self, source: str | Path | None, spec: ModelSpec, global_batch_size: int, seed: int) -> None:
        self._source = open_source(source, spec, seed)
        self._seq_len = spec.seq_len
        self._causal = spec.causal
        self._global_batch_size = global_batch_size
        self._mask_key = derive_key(seed, "data", "mask")
        self._replacement_key = derive_key(seed, "data", "replacement")
        self._counted_step, self._count = -1, 0

    def batch(self, step: int, samples: npt.ArrayLike | range, positions: npt.ArrayLike | range) -> Batch:
        """Return the part of one step's global batch at given samples and positions.

        Args:
            step: number of the step, from 0.
            samples: sample indices in the step, each in [0, global_batch_size).
            positions: positions in the sequence, each in [0, seq_len).

        Returns:
            Arrays [len(positions), len(samples)].
        """
        sample = _checked(samples, self._global_batch_size, "sample")
        position = _checked(positions, self._seq_len, "position")
        sequence = sample + np.uint64(step * self._global_batch_size)
        tokens = self._source.tokens(sequence, position)
        if self._causal:
            following = self._source.tokens(sequence, position + np.uint64(1))
            return Batch(tokens, following, np.ones(tokens.shape, np.float32))
        draw = self._mask_draw(sequence, position)
        ids = tokens.copy()
        ids[draw < _MASK_BELOW] = self._source.mask_id
        replaced = (draw >= _MASK_BELOW) & (draw < _REPLACE_BELOW)
        index = (sequence * np.uint64(self._seq_len) + position[:, None])[replaced]
        ids[replaced] = bits_at(self._replacement_key, index) % np.uint64(self._source.num_tokens)
        return Batch(ids, tokens, (draw < SELECT_PROBABILITY).astype(np.float32))

    def token_count(self, step: int) -> int:
        """Return how many tokens of the step's global batch the loss counts; no communication, 0 is possible."""
        if self._causal:
            return self._global_batch_size * self._seq_len
        if step != self._counted_step:
            sequence = np.arange(self._global_batch_size, dtype=np.uint64)
            sequence += np.uint64(step * self._global_batch_size)
            draw = self._mask_draw(sequence, np.arange(self._seq_len, dtype=np.uint64))
            self._counted_step, self._count = step, int(np.count_nonzero(draw < SELECT_PROBABILITY))
        return self._count

    def loss_scale(self, step: int) -> float:
        """Return the factor from summed token losses to the step's loss: 1 / token_count, or 0 if nothing counts."""
        count = self.token_count(step)
        return 1.0 / count if count else 0.0

    def _mask_draw(self, sequence: Words, position: Words) -> npt.NDArray[np.float64]:
        """Return one uniform number in [0, 1) per token [positions, samples]: its fate under masking."""
        index = sequence * np.uint64(self._seq_len) + position[:, None]
        return (bits_at(self._mask_key, index) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _checked(indices: npt.ArrayLike | Sequence[int], size: int, what: str) -> Words:
    """Return indices as uint64 [n], refusing those outside [0, size)."""
    array = np.asarray(indices, dtype=np.int64).reshape(-1)
    if array.size and not 0 <= array.min() <= array.max() < size:
        raise IndexError(f"{what} indices {array.min()}..{array.max()} leave [0, {size})")
    return array.astype(np.uint64)


def _default_text() -> npt.NDArray[np.uint8]:
    """Return the language reference that ships with Python as one text, topics in alphabetical order."""
    topics = pydoc_data.topics.topics
    return np.frombuffer("\n".join(topics[name] for name in sorted(topics)).encode(), np.uint8)


def _map_file(path: Path) -> npt.NDArray[np.uint8]:
    """Map a file's bytes into memory, read-only: a corpus need not fit."""
    try:
        if path.stat().st_size == 0:
            return np.empty(0, np.uint8)
        return np.memmap(path, np.uint8, mode="r")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(
            f"cannot read data file {path}: {reason}; give --data a readable file or 'synthetic'"
        ) from error
