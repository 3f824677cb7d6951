"""CUDA kernels on the CPU, so that a machine without a GPU can test them: slow, and never offered to users.

module    EmulatedModule(code, options).get_function(name)(grid, block, args), as cupy.RawModule, over NumPy arrays
device.h  what CUDA C++ gives a kernel, for a host compiler; runtime.cpp runs the threads of a block in turns
blas      the functions of executor.cuda.cublas in NumPy
backend   the package executor.cuda on a GPU, or on all this
"""

from cuda_on_cpu.module import ORDERS, EmulatedKernel, EmulatedModule, LaunchError, available, set_order

__all__ = ["ORDERS", "EmulatedKernel", "EmulatedModule", "LaunchError", "available", "set_order"]
