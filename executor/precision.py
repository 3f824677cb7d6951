"""Precision: in which type each array of a rank is stored, and in which type sums over ranks travel.

Mixed precision (Micikevicius et al. 2018, arXiv:1710.03740, section 3; Megatron-LM's mixed-precision optimizer) keeps

| what                                                              | float16, bfloat16 | float32, tf32 | float64 |
| ----------------------------------------------------------------- | ----------------- | ------------- | ------- |
| activations and their gradients, the parameters that kernels read | 16 bits           | float32       | float64 |
| master parameters, gradients of parameters, moments               | float32           | float32       | float64 |
| statistics: means, deviations, maxima, log-sum-exp, the loss      | float32           | float32       | float64 |
| sums over ranks of partial activations (tensor parallel)          | float32 over MPI  | float32       | float64 |

MPI has no 16-bit floating-point sum, so partial activations are widened before they are summed and rounded after; NCCL
sums 16 bits as they are. What only moves (gathers, exchanges, messages) moves in its stored type. Gradients of
parameters are summed over replicas in float32 on every transport.

tf32 is float32 storage whose matrix products read operands rounded to 10 mantissa bits. fp8 is for the planner only.

This module is the only one that names these types: everything else asks a `Precision`.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from planner.errors import PlanError
from planner.plan import Plan

Array = NDArray[Any]
DType = np.dtype[Any]

TF32_MANTISSA_BITS = 10  # NVIDIA A100 Tensor Core GPU Architecture, 2020, table 2
EMULATED_ON_CPU = ("tf32", "float16", "bfloat16")


@dataclass(frozen=True)
class Precision:
    """The types of a training run.

    Attributes:
        name: as in the plan.
        storage: activations, their gradients, and the parameters that kernels read.
        master: the parameters that the optimizer updates, their gradients and moments, and all statistics.
        reduced: in which partial activations are summed over ranks.
    """

    name: str
    storage: DType
    master: DType
    reduced: DType

    @classmethod
    def of(cls, plan: Plan, *, on_host: bool = True) -> Precision:
        """The types that a plan asks for; on the host every transport is MPI.

        Raises:
            PlanError: fp8, which no kernel here computes in, or bfloat16 without the package that gives NumPy the type.
        """
        name = plan.training.precision
        if name == "fp8":
            raise PlanError(
                "precision fp8 is for predictions only: the executor has no fp8 kernels; plan with --precision bfloat16"
            )
        master = np.dtype("float64" if name == "float64" else "float32")
        storage = _bfloat16() if name == "bfloat16" else np.dtype("float16") if name == "float16" else master
        return cls(name, storage, master, storage if plan.transport == "nccl" and not on_host else master)

    @property
    def mixed(self) -> bool:
        """Whether kernels read a rounded copy of the parameters that the optimizer updates."""
        return self.storage != self.master

    @property
    def emulated(self) -> bool:
        """Whether CPU kernels only imitate the rounding of this precision, at no gain in speed."""
        return self.name in EMULATED_ON_CPU

    @property
    def scales_loss(self) -> bool:
        """Whether small gradients would vanish in `storage` without loss scaling: float16 has 5 exponent bits."""
        return self.name == "float16"

    def of_buffer(self, kind: str) -> DType:
        """The type of a program's buffer: "statistics", or "compute" for anything else."""
        return self.master if kind == "statistics" else self.storage


def _bfloat16() -> DType:
    """NumPy's extension type; CuPy takes the same one.

    Raises:
        PlanError: ml_dtypes is missing.
    """
    if importlib.util.find_spec("ml_dtypes") is None:
        raise PlanError(
            "precision bfloat16 needs the package ml_dtypes, NumPy having no such type; "
            "install meshwright's mpi extra or ml_dtypes, or plan with --precision float32"
        )
    import ml_dtypes  # noqa: PLC0415 - only runs in bfloat16 need it

    bfloat16: DType = np.dtype(ml_dtypes.bfloat16)
    return bfloat16


def as_moved(array: Array) -> Array:
    """A view of an array in a type that every transport moves: MPI knows no 16-bit floating-point type."""
    return array.view(np.uint16) if array.dtype.itemsize == 2 else array


def round_to_tf32(array: Array) -> Array:
    """A float32 array rounded to 10 mantissa bits, to nearest, ties to even; infinities and NaN stay what they are."""
    result = np.empty(array.size, np.float32).reshape(array.shape)  # else an empty array has strides of 0
    result[...] = array
    bits = result.view(np.uint32)
    numbers = np.isfinite(result)
    dropped = 23 - TF32_MANTISSA_BITS
    half_less_one, odd = np.uint32((1 << (dropped - 1)) - 1), (bits >> np.uint32(dropped)) & np.uint32(1)
    np.copyto(bits, (bits + half_less_one + odd) & ~np.uint32((1 << dropped) - 1), where=numbers)
    return result
