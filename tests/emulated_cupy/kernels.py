"""Tables of kernels over emulated device arrays: the NumPy reference, fast, and the CUDA sources themselves, slow."""

from __future__ import annotations

import functools
import importlib
import inspect
from types import SimpleNamespace

from cuda_on_cpu import blas
from cuda_on_cpu.backend import PACKAGE, _replaced

from emulated_cupy.arrays import fresh, leaves, plain, plain_all, require_device, touch
from executor import kernels


def _on_device(function):
    """A function of plain arrays as one operation of the current stream on device arrays."""

    @functools.wraps(function)
    def call(*arguments, **named):
        require_device(function.__name__, arguments, named)
        touch(list(leaves(arguments)), list(leaves(named)))
        result = function(*plain_all(arguments), **{key: plain_all(value) for key, value in named.items()})
        return fresh(result) if isinstance(result, float) else result

    return call


def reference_table():
    """`executor.reference` on device arrays; every array must be there."""
    table = SimpleNamespace(__name__="executor.reference")
    for name in kernels.__all__:
        function = getattr(kernels, name)
        if inspect.isfunction(function):
            module = importlib.import_module(function.__module__.replace("executor.fused", "executor.reference"))
            setattr(table, name, _on_device(getattr(module, name)))
    return table


def cuda_table():
    """`executor.cuda`, its sources compiled by g++ and its products taken by NumPy."""
    import emulated_cupy

    products = SimpleNamespace(
        gemm=_on_device(blas.gemm), gemm_batched=_on_device(blas.gemm_batched), allow_tf32=blas.allow_tf32
    )
    modules = {"cupy": emulated_cupy, "cupy.cuda": emulated_cupy.cuda, f"{PACKAGE}.cublas": products}
    with _replaced(modules):
        package = importlib.import_module(PACKAGE)
        package.cublas = products
    return package


class Traced:
    """A module whose kernels are operations of the current stream."""

    def __init__(self, module):
        self._module = module

    def get_function(self, name):
        return TracedKernel(self._module.get_function(name))


class TracedKernel:
    """One of them."""

    def __init__(self, kernel):
        self._kernel = kernel

    @property
    def max_dynamic_shared_size_bytes(self):
        return self._kernel.max_dynamic_shared_size_bytes

    @max_dynamic_shared_size_bytes.setter
    def max_dynamic_shared_size_bytes(self, nbytes):
        self._kernel.max_dynamic_shared_size_bytes = nbytes

    def __call__(self, grid, block, args, *, shared_mem=0):
        require_device(self._kernel.name, args, {})
        touch(list(leaves(args)))
        self._kernel(grid, block, tuple(plain(each) for each in args), shared_mem=shared_mem)
