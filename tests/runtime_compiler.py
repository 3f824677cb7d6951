"""NVRTC, CUDA's run-time compiler, called as CuPy 14 calls it: it needs no GPU, only its library or its wheel."""

from __future__ import annotations

import ctypes
import ctypes.util
import re
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from typing import NamedTuple

PACKAGES = ("nvidia-cuda-nvrtc", "nvidia-cuda-nvrtc-cu12")
CUPY_OPTIONS = ("-ftz=true", "--device-as-default-execution-space")
ENTRY = re.compile(
    r"entry function '(\w+)' for.*?(?:(\d+) bytes spill stores.*?)?Used (\d+) registers([^\n]*)", re.DOTALL
)


class Usage(NamedTuple):
    """What a kernel takes, by ptxas."""

    registers: int  # per thread
    shared_bytes: int  # per block, static
    spilled_bytes: int  # per thread


def load() -> ctypes.CDLL | None:
    """The library, of a wheel or the system's; None where there is none."""
    places = [ctypes.util.find_library("nvrtc")]
    for package in PACKAGES:
        try:
            found = files(package) or []
        except PackageNotFoundError:
            continue
        places += [str(each.locate()) for each in found if re.fullmatch(r"libnvrtc\.so\.\d+", each.name)]
    for place in filter(None, reversed(places)):
        try:
            for builtins in Path(place).parent.glob("libnvrtc-builtins.so.*"):
                ctypes.CDLL(str(builtins))  # which the library opens by name
            return ctypes.CDLL(place)
        except OSError:
            continue
    return None


def compile_source(library: ctypes.CDLL, source: str, options: Sequence[str], architecture: str) -> dict[str, Usage]:
    """Compile to machine code.

    Raises:
        ValueError: the compiler refuses the source or warns of it.
    """
    words = [*options, *CUPY_OPTIONS, f"-arch={architecture}", "--ptxas-options=-v"]
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    library.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernels.cu", 0, None, None)
    given = (ctypes.c_char_p * len(words))(*(word.encode() for word in words))
    status = library.nvrtcCompileProgram(program, len(words), given)
    library.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    text = ctypes.create_string_buffer(size.value)
    library.nvrtcGetProgramLog(program, text)
    library.nvrtcDestroyProgram(ctypes.byref(program))
    said = text.value.decode()
    if status or "warning" in said:
        raise ValueError(said)
    return {
        name: Usage(int(registers), _shared(rest), int(spilled or 0))
        for name, spilled, registers, rest in ENTRY.findall(said)
    }


def _shared(used: str) -> int:
    found = re.search(r"(\d+) bytes smem", used)
    return int(found[1]) if found else 0
