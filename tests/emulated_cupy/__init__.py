"""CuPy for a machine without a GPU: the calls that the executor makes, over NumPy, for tests only.

This is no backend and is never offered to users: it is slow, and what it is for is to refuse. It refuses

* arrays of host and device in one call, in either direction, as CuPy does, and every function of NumPy, method and
  attribute that CuPy has not or the executor has no need of (`arrays`);
* a stream that touches memory which the compute stream used after the last event that the stream waited for, and a
  compute stream that touches what another stream writes without having waited for it (`streams`);
* more memory than it was given (`memory.set_limit`).

Streams other than the thread's current one are *late*: what they were given runs only when somebody waits for it, so
that a missing wait, or memory given back too early, shows up as wrong numbers. NCCL (`cuda.nccl`) joins ranks that are
threads.

`kernels` makes the tables of kernels that go with it.
"""

from __future__ import annotations

from emulated_cupy import cuda, memory
from emulated_cupy.arrays import (
    MixedArraysError,
    asarray,
    asnumpy,
    broadcast_to,
    empty,
    empty_like,
    may_share_memory,
    ndarray,
    zeros,
)
from emulated_cupy.cuda import nccl as _nccl  # noqa: F401 - as `import cupy.cuda.nccl` leaves it
from emulated_cupy.memory import get_default_memory_pool
from emulated_cupy.streams import RaceError

__all__ = [
    "MixedArraysError",
    "RaceError",
    "asarray",
    "asnumpy",
    "broadcast_to",
    "cuda",
    "empty",
    "empty_like",
    "get_default_memory_pool",
    "memory",
    "may_share_memory",
    "ndarray",
    "zeros",
]


def RawModule(*, code: str, options: tuple[str, ...] = ()):
    """The CUDA sources, compiled by g++ and run on this memory."""
    from cuda_on_cpu import EmulatedModule

    from emulated_cupy.kernels import Traced

    return Traced(EmulatedModule(code, options))
