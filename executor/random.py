"""Random numbers addressed by (key, global index), so that no value depends on how a tensor is laid out.

A stream is a key; element `i` of the stream is a pure function of (key, i). A rank that owns a slice of a parameter
computes the indices of its elements in the whole tensor and gets exactly the values that one rank holding everything
would get. The generator is SplitMix64 used as a counter-based hash, `mix(offset + gamma·(i + 1))` modulo 2^64, with
offset and odd gamma both derived from the key, so that two streams differ in their step as well as in their start.

Source: Steele, Lea, Flood, "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014; the mixing constants are
Stafford's variant 13, as in java.util.SplittableRandom.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from scipy.special import ndtr, ndtri

Array: TypeAlias = npt.NDArray[Any]
Words: TypeAlias = npt.NDArray[np.uint64]
Indices: TypeAlias = "slice | range | Sequence[int] | npt.NDArray[np.integer[Any]]"

_WORD = 2**64
_GOLDEN_GAMMA = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB
# Elements drawn at a time: two 64-bit work arrays of this length stay inside a second-level cache.
_CHUNK_ELEMENTS = 1 << 15


def derive_key(seed: int, *parts: str | int) -> int:
    """Name a stream: a 64-bit key from the run's seed and any path of names and numbers.

    Args:
        seed: the run's seed.
        parts: what the stream is for, such as ("stage3.qkv.weight",) or ("dropout", layer, step).

    Returns:
        An integer in [0, 2^64), the same on every platform, Python version and rank.
    """
    digest = hashlib.blake2b(digest_size=8)
    for part in (seed, *parts):
        # A type tag and a length keep ("ab", "c") apart from ("a", "bc") and 1 from "1".
        text = f"{'i' if isinstance(part, int) else 's'}{part}".encode()
        digest.update(len(text).to_bytes(8, "little") + text)
    return int.from_bytes(digest.digest(), "little")


def stream_constants(key: int) -> tuple[int, int]:
    """Return (offset, gamma) of a stream: element i is `mix(offset + gamma·(i + 1) mod 2^64)`.

    Compiled kernels that draw their own numbers (fused dropout) start from these two words.
    """
    offset = _mix_word(key)
    gamma = _mix_word(key + _GOLDEN_GAMMA) | 1
    # Few bit changes between neighbours make a weak step (Steele et al. 2014, section 5).
    if (gamma ^ (gamma >> 1)).bit_count() < 24:
        gamma ^= 0xAAAAAAAAAAAAAAAA
    return offset, gamma


def bits_at(key: int, indices: npt.ArrayLike) -> Words:
    """Return the 64-bit words of a stream at given element indices.

    Args:
        key: the stream, from `derive_key`.
        indices: element numbers, any shape, at least 0.

    Returns:
        Words of the same shape, uniform over [0, 2^64).
    """
    offset, gamma = stream_constants(key)
    words = np.array(indices, dtype=np.uint64)
    words *= np.uint64(gamma)
    words += np.uint64((offset + gamma) % _WORD)
    _mix(words, np.empty_like(words))
    return words


def normal(
    key: int,
    shape: Sequence[int],
    indices: Sequence[Indices] | None = None,
    *,
    std: float = 1.0,
    truncation: float | None = None,
    dtype: npt.DTypeLike = np.float32,
    out: Array | None = None,
) -> Array:
    """Draw part of a tensor of normal numbers of mean 0, by inversion in float64.

    Args:
        key: the stream, from `derive_key`.
        shape: shape of the whole tensor.
        indices: for each dimension the global indices wanted; None means the whole tensor.
        std: standard deviation (of the normal before truncation).
        truncation: None, or keep only |x| < truncation·std (BERT initialises with 2).
        dtype: float32 or float64.
        out: C-contiguous array of the part's shape to write into.

    Returns:
        The part, equal to the same part cut out of the whole tensor.
    """
    part, chunks = _open_part(key, shape, indices, dtype, out)
    low = 0.0 if truncation is None else float(ndtr(-truncation))
    for block, words in chunks:
        values = _unit_interval(words)
        if low:
            values *= 1.0 - 2.0 * low
            values += low
        ndtri(values, out=values)
        values *= std
        block[...] = values
    return part


def _open_part(
    key: int, shape: Sequence[int], indices: Sequence[Indices] | None, dtype: npt.DTypeLike, out: Array | None
) -> tuple[Array, Iterator[tuple[Array, Words]]]:
    """Return the output array and an iterator over (block of it, words of that block)."""
    axes = _index_arrays(shape, indices)
    part_shape = tuple(axis.size for axis in axes)
    if out is None:
        out = np.empty(part_shape, dtype)
    if out.shape != part_shape or not out.flags.c_contiguous:
        raise ValueError(f"out has shape {out.shape}; the part needs a C-contiguous array of shape {part_shape}")
    return out, _chunks(key, shape, axes, out)


def _index_arrays(shape: Sequence[int], indices: Sequence[Indices] | None) -> list[Words]:
    """Turn slices, ranges and sequences into one array of global indices per dimension."""
    if indices is None:
        indices = [slice(None)] * len(shape)
    if len(indices) != len(shape):
        raise ValueError(f"{len(indices)} index sets for a tensor of {len(shape)} dimensions")
    axes = []
    for dim, (size, wanted) in enumerate(zip(shape, indices, strict=True)):
        chosen: Any = range(size)[wanted] if isinstance(wanted, slice) else wanted
        axis = np.asarray(chosen, dtype=np.int64).reshape(-1)
        if axis.size and not 0 <= axis.min() <= axis.max() < size:
            raise IndexError(f"indices {axis.min()}..{axis.max()} of dimension {dim} leave [0, {size})")
        axes.append(axis.astype(np.uint64))
    return axes


def _chunks(key: int, shape: Sequence[int], axes: Sequence[Words], out: Array) -> Iterator[tuple[Array, Words]]:
    """Walk the part as a matrix (all leading dimensions by the last) in blocks that fit the cache.

    The stream's position is linear in the index, offset + gamma·(1 + Σ stride_d·i_d), so rows and columns are
    multiplied by gamma once and each element costs one addition.
    """
    offset, gamma = stream_constants(key)
    rows = np.array([(offset + gamma) % _WORD], dtype=np.uint64)
    for dim, axis in enumerate(axes[:-1]):
        stride = math.prod(shape[dim + 1 :])
        rows = (rows[:, None] + axis * np.uint64(gamma * stride % _WORD)).reshape(-1)
    columns = axes[-1] * np.uint64(gamma) if axes else np.zeros(1, np.uint64)
    matrix = out.reshape(rows.size, columns.size)
    width = min(max(columns.size, 1), _CHUNK_ELEMENTS)
    height = max(1, _CHUNK_ELEMENTS // width)
    work = np.empty((2, height * width), np.uint64)
    for top in range(0, rows.size, height):
        for left in range(0, columns.size, width):
            block = matrix[top : top + height, left : left + width]
            words = work[0, : block.size].reshape(block.shape)
            np.add(rows[top : top + height, None], columns[None, left : left + width], out=words)
            _mix(words, work[1, : block.size].reshape(block.shape))
            yield block, words


def _mix(words: Words, scratch: Words) -> None:
    """Mix words in place (Stafford's variant 13 of the MurmurHash3 finaliser)."""
    for shift, factor in ((30, _MIX_1), (27, _MIX_2)):
        np.right_shift(words, np.uint64(shift), out=scratch)
        np.bitwise_xor(words, scratch, out=words)
        np.multiply(words, np.uint64(factor), out=words)
    np.right_shift(words, np.uint64(31), out=scratch)
    np.bitwise_xor(words, scratch, out=words)


def _mix_word(word: int) -> int:
    """`_mix` of one Python integer, modulo 2^64."""
    word %= _WORD
    word = (word ^ (word >> 30)) * _MIX_1 % _WORD
    word = (word ^ (word >> 27)) * _MIX_2 % _WORD
    return word ^ (word >> 31)


def _unit_interval(words: Words) -> npt.NDArray[np.float64]:
    """Map words to (k + 1/2)·2^-52, never 0 or 1, reusing their memory.

    52 bits and not 53: with 53 the largest value would round to 1 and its normal quantile to infinity.
    """
    np.right_shift(words, np.uint64(12), out=words)
    values = words.view(np.float64)
    np.copyto(values, words, casting="unsafe")
    values += 0.5
    values *= 2.0**-52
    return values
