"""Compiling kernels: explicit signatures, one compilation per machine, a cache that cannot go stale."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar, cast

import numba
import numpy as np
from llvmlite import binding  # type: ignore[import-untyped]
from numba import extending

try:
    import fcntl
except ImportError:  # not a POSIX system: ranks may compile the same kernel side by side, which is slow but right
    fcntl = None  # type: ignore[assignment]

F = TypeVar("F", bound=Callable[..., Any])

EXACT = {"contract"}
"""Fused multiply-add only: for code whose rounding is part of the algorithm (exp)."""

REASSOCIATE = {"contract", "reassoc", "nsz", "arcp"}
"""Sums may be reordered, so that reductions vectorise; NaN and infinity keep their meaning."""


def cache_folder() -> Path:
    """Folder of compiled kernels: in the user's cache, one per version of the sources, Numba and processor.

    Numba checks only the file of the kernel itself for changes; hashing all of them covers shared helpers too.
    """
    digest = hashlib.sha256(f"{numba.__version__} {binding.get_host_cpu_name()}".encode())
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    base = os.environ.get("NUMBA_CACHE_DIR") or os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(base) / "meshwright" / f"kernels-{digest.hexdigest()[:16]}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:  # a read-only home: keep the kernels for as long as the machine keeps its temporary files
        folder = Path(tempfile.gettempdir()) / f"meshwright-{os.getuid()}" / folder.name
        folder.mkdir(parents=True, exist_ok=True)
    return folder


CACHE_FOLDER = cache_folder()

settings: Any = numba.config


def widest_vectors() -> str:
    """Features of this processor, with vectors as wide as it has.

    For Intel's first AVX-512 processors LLVM keeps to half that width, since 512-bit code lowers their clock; here the
    matrix products between the kernels have lowered it already.
    """
    features: str = binding.get_host_cpu_features().flatten()
    return f"{features},-prefer-256-bit" if "+avx512f" in features.split(",") else features


if settings.CPU_FEATURES is None:
    settings.CPU_FEATURES = widest_vectors()

_one_thread = threading.Lock()
intrinsic: Any = extending.intrinsic
"""Numba's decorator for functions that write machine code themselves; its stubs do not know their call signature."""


@contextlib.contextmanager
def _sole_compiler(done: Path) -> Iterator[None]:
    """Let one process compile while its neighbours wait; no lock once the kernel is known to be cached."""
    if fcntl is None or done.exists():
        yield
        return
    with done.with_suffix(".lock").open("w") as lock:
        with contextlib.suppress(OSError):  # some network file systems have no locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
        done.touch()


class Kernel:
    """A function compiled for float32 and float64, each on first use: ``kernel[array.dtype](...)``.

    The signature is explicit and further compilation is off, so no shape, stride or caller recompiles anything and a
    wrong dtype is a TypeError.
    """

    def __init__(self, function: Callable[..., Any], signature: str, fastmath: set[str]) -> None:
        self.function = function
        self.signature = signature
        self.fastmath = fastmath
        self.compiled: dict[np.dtype[Any], Callable[..., Any]] = {}

    def __getitem__(self, dtype: np.dtype[Any]) -> Callable[..., Any]:
        """Return the machine code for this dtype."""
        try:
            return self.compiled[dtype]
        except KeyError:
            return self._compile(dtype)

    def _compile(self, dtype: np.dtype[Any]) -> Callable[..., Any]:
        if dtype.name not in {"float32", "float64"}:
            raise TypeError(f"kernels compute in float32 or float64, not {dtype.name}; cast the arrays first")
        signature = self.signature.replace("T", dtype.name)
        name = f"{self.function.__module__}.{self.function.__name__}-{dtype.name}"
        with _one_thread:  # in-process ranks are threads, and Numba's cache folder is a global setting
            previous, settings.CACHE_DIR = settings.CACHE_DIR, str(CACHE_FOLDER)
            try:
                if dtype not in self.compiled:
                    with _sole_compiler(CACHE_FOLDER / f"{name}.done"):
                        options: dict[str, Any] = {
                            "cache": True,
                            "nogil": True,
                            "fastmath": self.fastmath,
                            "error_model": "numpy",
                        }
                        self.compiled[dtype] = numba.njit([signature], **options)(self.function)
            finally:
                settings.CACHE_DIR = previous
        return self.compiled[dtype]


def kernel(signature: str, fastmath: set[str] = REASSOCIATE) -> Callable[[Callable[..., Any]], Kernel]:
    """Make a `Kernel` of a function; T in the signature stands for the floating-point type.

    Arrays written T[:, ::1] are C-contiguous; T[:, :] also takes a strided leading dimension.
    """

    def decorate(function: Callable[..., Any]) -> Kernel:
        return Kernel(function, signature, fastmath)

    return decorate


def helper(function: F) -> F:
    """Compile a function into each kernel that calls it; inlined, since a loop with a call does not vectorise."""
    compiled: Any = numba.njit(fastmath=REASSOCIATE, error_model="numpy", forceinline=True)(function)
    return cast(F, compiled)


def exact_helper(function: F) -> F:
    """Compile a function into each kernel that calls it, keeping the order of its operations."""
    compiled: Any = numba.njit(fastmath=EXACT, error_model="numpy", forceinline=True)(function)
    return cast(F, compiled)
