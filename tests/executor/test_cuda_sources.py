"""The CUDA sources compile for the hardware they are meant for, and the emulation that tests them sees mistakes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cuda_on_cpu
import numpy as np
import pytest
import runtime_compiler as nvrtc
from cuda_cases import ALL_DTYPES, wide
from cuda_on_cpu import EmulatedModule, LaunchError
from cuda_on_cpu import backend as backends

import executor

FOLDER = Path(executor.__file__).parent / "cuda"
SOURCES = sorted(path.stem for path in FOLDER.glob("*.cu"))
needs_compiler = pytest.mark.skipif(not cuda_on_cpu.available(), reason="no g++ to emulate a GPU with")


def macros_for(name: str) -> tuple[str, ...]:
    """What a source wants to be told beside its types."""
    return {"activation": ("-DACTIVATION=GELU",), "gated": ("-DACTIVATION=SILU",)}.get(
        name, ("-DHEAD_DIM=128",) if name.startswith("flash") else ()
    )


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_every_source_compiles_and_its_kernels_can_be_launched(architecture):
    """By the compiler and with the options that CuPy uses; each source in one of the four types in turn."""
    compiler = nvrtc.load()
    if compiler is None:
        pytest.skip("no NVRTC here: pip install nvidia-cuda-nvrtc")
    launch = backends.emulated().module("launch")
    found: dict[str, nvrtc.Usage] = {}
    for number, name in enumerate(SOURCES):
        dtype = ALL_DTYPES[-1 - number % 2 if name.startswith("flash") else number % len(ALL_DTYPES)]
        options = (*launch.options(dtype, wide(dtype)), *macros_for(name))
        found |= nvrtc.compile_source(compiler, launch.source(name), options, architecture)
    assert set(found) == {kernel for name in SOURCES for kernel in kernels_of(name)}
    for kernel, usage in found.items():
        threads = 128 if kernel.startswith("flash") else launch.BLOCK_THREADS
        assert usage.registers * threads <= 65536, f"{kernel}: {usage.registers} registers of {threads} threads"
        assert usage.shared_bytes <= 48 << 10, f"{kernel}: {usage.shared_bytes} bytes of shared memory"
        assert usage.spilled_bytes <= 64, f"{kernel}: {usage.spilled_bytes} bytes do not fit the registers"
    assert len(SOURCES) >= 9


def kernels_of(name: str) -> list[str]:
    found: list[str] = cuda_on_cpu.module.KERNEL.findall((FOLDER / f"{name}.cu").read_text())
    return found


def test_kernels_are_told_of_the_shared_memory_that_they_take(monkeypatch):
    launch, launches = backends.emulated().module("launch"), []

    class Kernel:
        max_dynamic_shared_size_bytes = 0

        def __call__(self, grid: Any, block: Any, args: Any, *, shared_mem: int) -> None:
            launches.append((args, shared_mem, self.max_dynamic_shared_size_bytes))

    class Module:
        def __init__(self, *, code: str, options: tuple[str, ...]) -> None:
            assert "-DHEAD_DIM=16" in options

        def get_function(self, name: str) -> Kernel:
            return Kernel()

    monkeypatch.setattr(launch.cupy, "RawModule", Module)
    dtype = ALL_DTYPES[2]
    arguments = (True, None, 3, 0.5)
    launch.launch("flash_backward", "k", dtype, (1,), (1,), *arguments, macros=("-DHEAD_DIM=16",), shared_bytes=99000)
    assert launches == [((1, 0, 3, 0.5), 99000, 99000)]
    assert type(launches[0][0][0]) is int  # CuPy passes a bool as one byte, and the kernel reads eight


def test_every_source_has_its_python_side_and_no_atomics():
    used = "".join(path.read_text() for path in FOLDER.glob("*.py"))
    for name in SOURCES:
        text = (FOLDER / f"{name}.cu").read_text()
        assert "atomic" not in text, f"{name}: the order of atomic additions changes from run to run"
        assert f'"{name}",' in used, f"nobody compiles {name}.cu"
        for kernel in kernels_of(name):
            assert f'"{kernel}"' in used, f"nobody launches {kernel}"


# The emulation


def kernel(code: str, name: str = "k") -> Any:
    return EmulatedModule(code).get_function(name)


@needs_compiler
def test_threads_know_their_place_and_share_memory():
    k = kernel("""
        extern "C" __global__ void k(const double* x, double* sums) {
            __shared__ double parts[64];
            int thread = threadIdx.y * blockDim.x + threadIdx.x;
            parts[thread] = x[(blockIdx.y * gridDim.x + blockIdx.x) * 64 + thread];
            __syncthreads();
            if (thread == 0) for (int i = 1; i < 64; i++) parts[0] += parts[i];
            __syncthreads();
            if (thread == 63) sums[blockIdx.y * gridDim.x + blockIdx.x] = parts[0];
        }""")
    x, sums = np.arange(6 * 64.0), np.zeros(6)
    k((3, 2), (16, 4), (x, sums))
    np.testing.assert_array_equal(sums, x.reshape(6, 64).sum(axis=1))


@needs_compiler
def test_lanes_exchange_values_and_vote():
    k = kernel("""
        extern "C" __global__ void k(const double* x, double* out, long long* votes) {
            double value = x[threadIdx.x];
            for (int mask = 16; mask; mask /= 2) value += __shfl_xor_sync(0xffffffffu, value, mask);
            out[threadIdx.x] = value + __shfl_sync(0xffffffffu, x[threadIdx.x], 3);
            votes[threadIdx.x] = __ballot_sync(0xffffffffu, x[threadIdx.x] > 20);
        }""")
    x, out, votes = np.arange(64.0), np.zeros(64), np.zeros(64, np.int64)
    k((1,), (64,), (x, out, votes))
    assert out.tolist() == [496 + 3] * 32 + [496 + 32 * 32 + 35] * 32
    assert votes.tolist() == [sum(1 << i for i in range(21, 32))] * 32 + [2**32 - 1] * 32


@needs_compiler
@pytest.mark.parametrize(
    ("body", "trouble"),
    [
        ("if (threadIdx.x < 7) __syncthreads();", "barrier that others have passed by"),
        ("if (threadIdx.x < 7) return; __shfl_xor_sync(0xffffffffu, 1, 1);", "barrier that others have passed by"),
        ("if (threadIdx.x < 32) __syncthreads(); else __syncwarp();", "barrier that others have passed by"),
    ],
)
def test_barriers_that_not_all_reach_are_reported(body, trouble):
    k = kernel(f'extern "C" __global__ void k() {{ {body} }}')
    with pytest.raises(LaunchError, match=trouble):
        k((1,), (64,), ())
    kernel('extern "C" __global__ void k() { __syncthreads(); }')((2,), (64,), ())  # and the next launch works


@needs_compiler
def test_an_exchange_in_less_than_a_warp_is_reported():
    with pytest.raises(LaunchError, match="fewer than 32 threads"):
        kernel('extern "C" __global__ void k() { __shfl_xor_sync(0xffffffffu, 1, 1); }')((1,), (20,), ())


@needs_compiler
def test_a_missing_barrier_shows_in_another_order():
    code = """
        extern "C" __global__ void k(double* out) {
            __shared__ double before[64];
            before[threadIdx.x] = 0;
            __syncthreads();
            before[threadIdx.x] = threadIdx.x + 1;
            BARRIER
            out[threadIdx.x] = before[63 - threadIdx.x];
        }"""

    def results(barrier: str) -> list[list[float]]:
        k, found = kernel(code.replace("BARRIER", barrier)), []
        for order in cuda_on_cpu.ORDERS:
            out = np.zeros(64)
            cuda_on_cpu.set_order(order)
            k((1,), (64,), (out,))
            found.append(out.tolist())
        cuda_on_cpu.set_order("ascending")
        return found

    right = results("__syncthreads();")
    assert right[0] == right[1] == right[2] == list(range(64, 0, -1))
    wrong = results("")
    assert wrong[0] != wrong[1]


@needs_compiler
@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((), "takes 2 arguments, 0 given"),
        ((np.zeros(1), 1.0), "kind 'q', given float"),
        ((np.zeros(1), True), "kind 'q', given bool"),
        ((np.zeros(1), np.int32(1)), "kind 'q', given int32"),
        ((3, 1), "kind 'p', given int"),
    ],
)
def test_arguments_that_a_gpu_would_misread_are_refused(args, message):
    with pytest.raises(LaunchError, match=message):
        kernel('extern "C" __global__ void k(double* x, long long n) {}')((1,), (1,), args)


@needs_compiler
def test_shared_memory_beyond_what_was_asked_for_is_reported():
    code = """
        extern "C" __global__ void k(long long at) {
            char* room = (char*)emulation::dynamic_shared();
            room[at] = 1;
        }"""
    kernel(code)((1,), (1,), (99,), shared_mem=100)
    with pytest.raises(LaunchError, match="beyond the shared memory"):
        kernel(code)((1,), (1,), (100,), shared_mem=100)
    with pytest.raises(LaunchError, match="where max_dynamic_shared_size_bytes is 49152"):
        kernel(code)((1,), (1,), (0,), shared_mem=50_000)
    told = kernel(code)
    told.max_dynamic_shared_size_bytes = 300_000
    told((1,), (1,), (0,), shared_mem=50_000)
    with pytest.raises(LaunchError, match="at most 227 KiB"):
        told((1,), (1,), (0,), shared_mem=300_000)
    with pytest.raises(TypeError, match="grid and block are tuples"):
        told([1], (1,), (0,))


@needs_compiler
def test_launches_that_a_gpu_refuses_are_refused():
    k = kernel('extern "C" __global__ void k() {}')
    for grid, block in (((1,), (1025,)), ((1, 65536), (1,)), ((0,), (1,))):
        with pytest.raises(LaunchError):
            k(grid, block, ())
    with pytest.raises(LaunchError, match="no kernel nobody; the source has k"):
        EmulatedModule('extern "C" __global__ void k() {}').get_function("nobody")


@needs_compiler
@pytest.mark.parametrize("dtype", [dtype for dtype in ALL_DTYPES if dtype.itemsize == 2], ids=str)
def test_sixteen_bit_types_round_as_numpy_does(dtype):
    launch = backends.emulated().module("launch")
    code = (
        launch.source("columns")
        + """
        extern "C" __global__ void round_trip(const float* x, T* y, float* z) {
            narrow(x[blockIdx.x], y[blockIdx.x]);
            z[blockIdx.x] = widen(y[blockIdx.x]);
        }"""
    )
    k = EmulatedModule(code, launch.options(dtype, wide(dtype))).get_function("round_trip")
    bits = np.random.default_rng(0).integers(0, 2**32, 4000, dtype=np.uint32)
    x = np.concatenate([bits.view(np.float32), np.float32([0, -0.0, np.inf, -np.inf, 65504, 65520, 1e-8, 3.4e38])])
    y, z = np.zeros(x.size, dtype), np.zeros(x.size, np.float32)
    k((x.size,), (1,), (x, y, z))
    with np.errstate(over="ignore", invalid="ignore"):
        expected = x.astype(dtype)
    numbers = ~np.isnan(x)
    np.testing.assert_array_equal(y.view(np.uint16)[numbers], expected.view(np.uint16)[numbers])
    assert np.isnan(y.astype(np.float32)[~numbers]).all()
    np.testing.assert_array_equal(z, y.astype(np.float32))
