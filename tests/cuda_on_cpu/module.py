"""`cupy.RawModule` for a machine without a GPU: CUDA C++ compiled by g++ and run on NumPy arrays, for tests only."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
KERNEL = re.compile(r"__global__\s+void\s+(?:__launch_bounds__\([^)]*\)\s+)?(\w+)\s*\(")
ORDERS = ("ascending", "descending", "scattered")
DEFAULT_SHARED_BYTES = 48 << 10  # beyond, a kernel's attribute has to be set (CUDA C++ programming guide, 9.0)
COMPILER = "g++"
FLAGS = (
    "-std=c++20",
    "-O1",
    "-fPIC",
    "-shared",
    "-fno-strict-aliasing",
    "-ffp-contract=off",
    "-U_FORTIFY_SOURCE",
    "-Wl,-Bsymbolic",
    "-w",
)

_lock = threading.Lock()
_order = [0]


class LaunchError(RuntimeError):
    """A launch that a GPU would refuse or leave undefined."""


def available() -> bool:
    """Whether the compiler is here."""
    return shutil.which(COMPILER) is not None


def set_order(order: str) -> None:
    """Choose in which order blocks and threads take their turns: a kernel without races does not care."""
    _order[0] = ORDERS.index(order)


def _cache() -> Path:
    """Compiled code outlives the process: one folder of the user's, keyed by content."""
    folder = Path(tempfile.gettempdir()) / f"meshwright-cuda-on-cpu-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


def _build(name: str, text: str, flags: Sequence[str]) -> Path:
    """Compile once; a second process that compiles the same meanwhile does no harm."""
    header = (HERE / "device.h").read_text()
    digest = hashlib.blake2b("\0".join([*FLAGS, *flags, header, text]).encode(), digest_size=12).hexdigest()
    library = _cache() / f"{name}-{digest}.so"
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=_cache()) as work:
            source, made = Path(work) / f"{name}.cpp", Path(work) / "made.so"
            source.write_text(text)
            command = [COMPILER, *FLAGS, f"-I{HERE}", *flags, str(source), "-o", str(made)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise LaunchError(f"{COMPILER} refuses the kernels:\n{done.stderr}")
            made.replace(library)
    return library


@functools.cache
def _runtime() -> ctypes.CDLL:
    """The scheduler, whose symbols every module uses."""
    return ctypes.CDLL(str(_build("runtime", (HERE / "runtime.cpp").read_text(), ())), mode=ctypes.RTLD_GLOBAL)


class EmulatedModule:
    """Kernels of one source, compiled when the first is asked for.

    Args:
        code: CUDA C++ whose kernels are `extern "C"` and take pointers, long long, unsigned long long and double.
        options: the compiler's; macro definitions and include folders are used, the rest is for NVRTC.
    """

    def __init__(self, code: str, options: Sequence[str] = ()) -> None:
        self.names = KERNEL.findall(code)
        self._flags = [option for option in options if option.startswith(("-D", "-I"))]
        self._text = '#include "device.h"\n' + code + "\n" + "\n".join(map(_trampoline, self.names))
        self._library: ctypes.CDLL | None = None

    def compile(self) -> None:
        """Compile and load now."""
        _runtime()
        if self._library is None:
            self._library = ctypes.CDLL(str(_build("kernels", self._text, self._flags)))

    def get_function(self, name: str) -> EmulatedKernel:
        """A kernel by name.

        Raises:
            LaunchError: the source has no such kernel.
        """
        self.compile()
        if name not in self.names:
            raise LaunchError(f"no kernel {name}; the source has {', '.join(self.names)}")
        return EmulatedKernel(name, self._library)


def _trampoline(name: str) -> str:
    return (
        f'extern "C" const char* launch_{name}(const unsigned* grid, const unsigned* block, unsigned shared_bytes,'
        " void** arguments, int order) {"
        f" return emulation::start({name}, grid, block, shared_bytes, arguments, order); }}\n"
        f'extern "C" const char* signature_{name}() {{ return emulation::signature({name}); }}'
    )


class EmulatedKernel:
    """One kernel, called as `cupy.RawKernel` is: `kernel(grid, block, args)`."""

    def __init__(self, name: str, library: Any) -> None:
        self.name = name
        self.max_dynamic_shared_size_bytes = DEFAULT_SHARED_BYTES
        self._launch = getattr(library, f"launch_{name}")
        self._launch.restype = ctypes.c_char_p
        signature = getattr(library, f"signature_{name}")
        signature.restype = ctypes.c_char_p
        self.signature: str = signature().decode()

    def __call__(
        self, grid: tuple[int, ...], block: tuple[int, ...], args: Sequence[Any], *, shared_mem: int = 0
    ) -> None:
        """Run every thread of every block; return when all have ended.

        Raises:
            TypeError: a grid or a block that is no tuple, as CuPy has it.
            LaunchError: wrong number or types of arguments, or a launch that a GPU leaves undefined.
        """
        if not (type(grid) is tuple and type(block) is tuple):
            raise TypeError(f"{self.name}: grid and block are tuples, not {grid!r} and {block!r}")
        if shared_mem > self.max_dynamic_shared_size_bytes:
            raise LaunchError(
                f"{self.name}: {shared_mem} bytes of shared memory, where max_dynamic_shared_size_bytes is "
                f"{self.max_dynamic_shared_size_bytes}"
            )
        if len(args) != len(self.signature):
            raise LaunchError(f"{self.name} takes {len(self.signature)} arguments, {len(args)} given")
        cells = [self._cell(*pair) for pair in zip(self.signature, args, strict=True)]
        pointers = (ctypes.c_void_p * len(cells))(*(ctypes.addressof(cell) for cell in cells))
        sizes = [(ctypes.c_uint * 3)(*(*size, 1, 1)[:3]) for size in (grid, block)]
        if min(*sizes[0], *sizes[1]) < 1:
            raise LaunchError(f"{self.name}: grid {grid} and block {block} must be at least 1 everywhere")
        with _lock:
            trouble = self._launch(*sizes, shared_mem, pointers, _order[0])
        if trouble:
            raise LaunchError(f"{self.name}: {trouble.decode()}")

    def _cell(self, kind: str, value: Any) -> Any:
        """What the launch puts where the parameter is read: CuPy passes 8 bytes of an array's address or a number."""
        match kind, value:
            case "p", np.ndarray():
                return ctypes.c_void_p(value.ctypes.data)
            case "p", 0:
                return ctypes.c_void_p(0)
            case "d", float() if type(value) in (float, np.float64):
                return ctypes.c_double(value)
            case "q", int() | np.int64() if not isinstance(value, bool) and -(2**63) <= value < 2**63:
                return ctypes.c_longlong(int(value))
            case "Q", int() | np.uint64() if not isinstance(value, bool) and 0 <= value < 2**64:
                return ctypes.c_ulonglong(int(value))
        raise LaunchError(f"{self.name} has a parameter of kind {kind!r}, given {type(value).__name__} {value!r}")
