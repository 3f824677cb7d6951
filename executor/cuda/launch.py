"""Compiling the CUDA sources of this package and launching their kernels on the current stream.

A source is compiled by NVRTC once per process and combination of types; CuPy keeps the result on disk. Launches never
wait for the device.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import cupy
import numpy as np
import numpy.typing as npt

from executor.reference.arrays import Floats
from executor.reference.dropout import threshold_of

FOLDER = Path(__file__).parent
BLOCK_THREADS = 256  # MOST_THREADS of common.cuh
# Blocks that keep any current GPU busy (132 multiprocessors of 8 blocks on a Hopper). A constant, so that the order of
# sums, and with it every bit of a result, depends on shapes alone and not on the device.
MOST_BLOCKS = 1056
WARP = 32
_SECOND_STAGE = (32, 8)  # block of add_columns

_C_NAMES = {"float32": "float", "float64": "double", "float16": "float16", "bfloat16": "bfloat16"}


def arithmetic(dtype: npt.DTypeLike) -> np.dtype[Any]:
    """The type of registers and statistics: float64 for float64, else float32."""
    return np.dtype(np.float64) if np.dtype(dtype) == np.float64 else np.dtype(np.float32)


@functools.cache
def options(storage: np.dtype[Any], gradient: np.dtype[Any]) -> tuple[str, ...]:
    """The compiler's options for kernels of this storage type and this type of parameters' gradients.

    Raises:
        TypeError: a type that no kernel exists for.
    """
    try:
        names = [_C_NAMES[dtype.name] for dtype in (storage, gradient, arithmetic(storage))]
    except KeyError as missing:
        raise TypeError(f"no CUDA kernels for arrays of {missing.args[0]}; use {', '.join(_C_NAMES)}") from None
    return ("--std=c++17", *(f"-D{macro}={name}" for macro, name in zip(_MACROS, names, strict=True)))


_MACROS = ("STORAGE", "GRADIENT", "ARITHMETIC")


@functools.cache
def source(name: str) -> str:
    """The text of one source, with what all share in front."""
    files = ("common.cuh", *_HEADERS.get(name, ()), f"{name}.cu")
    return "\n".join((FOLDER / file).read_text(encoding="utf-8") for file in files)


_HEADERS = {
    "activation": ("activation.cuh",),
    "gated": ("activation.cuh",),
    "softmax": ("attention.cuh",),
    "flash_forward": ("attention.cuh", "mma.cuh"),
    "flash_backward": ("attention.cuh", "mma.cuh"),
}


@functools.cache
def _module(name: str, storage: np.dtype[Any], gradient: np.dtype[Any], macros: tuple[str, ...]) -> Any:
    return cupy.RawModule(code=source(name), options=(*options(storage, gradient), *macros))


@functools.cache
def _function(
    name: str, kernel: str, storage: np.dtype[Any], gradient: np.dtype[Any], macros: tuple[str, ...], shared_bytes: int
) -> Any:
    function = _module(name, storage, gradient, macros).get_function(kernel)
    if shared_bytes:
        function.max_dynamic_shared_size_bytes = shared_bytes  # beyond 48 KiB a kernel has to be told
    return function


def launch(
    name: str,
    kernel: str,
    storage: np.dtype[Any],
    grid: tuple[int, ...],
    block: tuple[int, ...],
    *arguments: Any,
    gradient: np.dtype[Any] | None = None,
    macros: tuple[str, ...] = (),
    shared_bytes: int = 0,
) -> None:
    """Launch a kernel on the current stream.

    Args:
        name: which source.
        kernel: which kernel of it.
        storage: element type of activations and parameters.
        grid: blocks along x, y and z.
        block: threads of a block along x, y and z.
        arguments: arrays, None for an absent one, int, bool and float; kernels take long long and double.
        gradient: element type of parameters' gradients where the kernel writes them; storage if not given.
        macros: more options to compile with.
        shared_bytes: shared memory per block beside what the kernel declares.
    """
    if min(grid) == 0:
        return  # an empty micro-batch, which CUDA would refuse
    given = tuple(0 if a is None else int(a) if isinstance(a, bool) else a for a in arguments)
    function = _function(name, kernel, storage, storage if gradient is None else gradient, macros, shared_bytes)
    function(grid, block, given, shared_mem=shared_bytes)


def ceil_div(a: int, b: int) -> int:
    """Smallest integer not below a / b."""
    return -(-a // b)


def power_of_two(least: int, most: int) -> int:
    """Smallest power of two that is at least `least`, but at most `most`, itself one."""
    return min(most, 1 << max(least - 1, 0).bit_length())


def vector_size(dtype: np.dtype[Any]) -> int:
    """Elements of one 16-byte access."""
    return 16 // dtype.itemsize


def row_threads(width: int, dtype: np.dtype[Any]) -> int:
    """Threads of a block that works on one row [width]: whole warps."""
    return power_of_two(max(WARP, ceil_div(width, vector_size(dtype))), BLOCK_THREADS)


def lanes_of(width: int, dtype: np.dtype[Any]) -> int:
    """Threads that share one short row [width], such as a head's."""
    return power_of_two(ceil_div(width, vector_size(dtype)), WARP)


def walk(rows: int, width: int, dtype: np.dtype[Any]) -> tuple[tuple[int, int], tuple[int, int]]:
    """Grid and block of a kernel whose threads own columns of [rows, width] and walk down the rows."""
    across = power_of_two(ceil_div(width, vector_size(dtype)), BLOCK_THREADS)
    down = power_of_two(rows, BLOCK_THREADS // across)
    columns = max(1, min(MOST_BLOCKS, ceil_div(width, across * vector_size(dtype))))
    return (columns, max(1, min(ceil_div(rows, down), MOST_BLOCKS // columns))), (across, down)


def partials_for(grid: tuple[int, int], width: int, dtype: np.dtype[Any], wanted: Floats | None) -> Any:
    """Room for one sum per column and block, [grid y, width], where a gradient is wanted."""
    return None if wanted is None else cupy.empty((grid[1], width), arithmetic(dtype))


def add_columns(partials: Any, total: Floats | None, dtype: np.dtype[Any]) -> None:
    """Add the columns' sums over partials [..., N], in a fixed order, to total [N]; nothing where that is absent."""
    if total is None or total.size == 0:
        return
    width = total.size
    grid = (ceil_div(width, _SECOND_STAGE[0]),)
    count = partials.size // width
    launch("columns", "add_columns", dtype, grid, _SECOND_STAGE, partials, count, width, total, gradient=total.dtype)


def add_column_sums(x: Floats, total: Floats | None) -> None:
    """Compute total += sum of x [rows, width] over its rows; nothing where total is absent."""
    if total is None or x.size == 0:
        return
    rows, width = x.shape
    grid, block = walk(rows, width, x.dtype)
    partials = partials_for(grid, width, x.dtype, total)
    launch("columns", "column_sums", x.dtype, grid, block, x, partials, rows, width)
    add_columns(partials, total, x.dtype)


def statistics(array: Floats, dtype: np.dtype[Any]) -> Floats:
    """Check that an array of per-row statistics has the arithmetic type of tensors of `dtype`, and return it."""
    assert array.dtype == arithmetic(dtype), f"statistics of {dtype} tensors are {arithmetic(dtype)}, not {array.dtype}"
    assert array.flags.c_contiguous, "statistics are C-contiguous"
    return array


def dropout_arguments(rate: float, key: int, samples: Any, positions: Any, first_column: int) -> tuple[Any, ...]:
    """DROPOUT_PARAMETERS of common.cuh; samples [B] and positions [S] are on the device."""
    return threshold_of(rate), 1.0 / (1.0 - rate), int(key), samples, positions, samples.size, first_column
