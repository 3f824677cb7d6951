"""Kernels in float16, bfloat16 and tf32 on CPUs, which have none: the float32 kernels, with rounding around them.

Arguments stored in 16 bits are widened to float32, the kernel of the table at hand runs, and what it wrote is rounded
back into the caller's arrays: the arithmetic of a GPU kernel that reads and writes 16 bits and computes in float32.
tf32 rounds the operands of matrix products. Both are right and slow: only results mean something, timings do not.

Inside attention the probabilities never leave the kernel between the two products, so under tf32 they are not rounded;
q, k, v and the output's gradient are.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

from executor import kernels
from executor.precision import Array, Precision, round_to_tf32

WRITTEN: dict[str, tuple[str, ...]] = {
    "matmul": ("out",),
    "embedding_forward": ("out",),
    "embedding_backward": ("dtable",),
    "add_positions_forward": ("out",),
    "add_positions_backward": ("dtable", "dtype_row", "dx"),
    "norm_forward": ("out", "mean", "rstd"),
    "norm_backward": ("dx", "dgamma", "dbeta"),
    "dropout_residual_forward": ("out",),
    "dropout_residual_backward": ("dx", "dbias"),
    "residual_norm_forward": ("stream_out", "normed_out", "mean", "rstd"),
    "residual_norm_backward": ("dx", "d_residual", "dbias", "dgamma", "dbeta"),
    "activation_forward": ("out", "derivative"),
    "activation_backward": ("dx", "dbias"),
    "gated_forward": ("out",),
    "gated_backward": ("dx", "dbias"),
    "split_heads_forward": ("qkv", "saved", "rstd"),
    "split_heads_backward": ("dqkv", "dbias", "dq_gain", "dk_gain"),
    "attention_forward": ("probabilities", "out"),
    "attention_backward": ("dq", "dk", "dv"),
    "block_attention_start": ("out_accumulator", "running_max", "running_sum"),
    "block_attention_step": ("out_accumulator", "running_max", "running_sum"),
    "block_attention_finish": ("out_accumulator", "logsumexp"),
    "attention_delta": ("delta",),
    "block_attention_step_backward": ("dq", "dk", "dv"),
    "blocked_attention_forward": ("out", "logsumexp"),
    "blocked_attention_backward": ("dq", "dk", "dv"),
    "cross_entropy_max": ("logits", "out_max"),
    "cross_entropy_sum": ("logits", "stats"),
    "cross_entropy_loss": (),
    "cross_entropy_backward": ("exp_logits", "dbias"),
}
"""The arguments that each kernel of the model writes; the optimizer's only see float32."""

PRODUCTS: dict[str, tuple[str, ...]] = {
    "matmul": ("a", "b"),
    "attention_forward": ("q", "k", "v"),
    "attention_backward": ("dout", "q", "k", "v"),
    "block_attention_step": ("q", "k", "v"),
    "block_attention_step_backward": ("dout", "q", "k", "v"),
    "blocked_attention_forward": ("q", "k", "v"),
    "blocked_attention_backward": ("dout", "q", "k", "v"),
}
"""Operands of matrix products, by kernel: what tf32 rounds."""


def kernel_table(precision: Precision) -> Any:
    """The kernels that bindings call by name: those of this process, or their emulation of a lower precision."""
    if not precision.emulated:
        return kernels
    return _Tf32() if precision.name == "tf32" else _Narrow()


class _Emulated:
    """A table whose functions are made when first asked for; the kernel itself is looked up at every call."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name not in WRITTEN:
            raise AttributeError(f"no kernel {name} is emulated")
        function = self._wrap(name)
        setattr(self, name, function)
        return function

    def _wrap(self, name: str) -> Callable[..., Any]:
        raise NotImplementedError


class _Tf32(_Emulated):
    """Float32 kernels whose products read operands of 10 mantissa bits."""

    def _wrap(self, name: str) -> Callable[..., Any]:
        operands = PRODUCTS.get(name, ())

        def call(*arguments: Any, **named: Any) -> Any:
            bound = {**dict(zip(_parameters(name), arguments, strict=False)), **named}
            for operand in operands:
                bound[operand] = round_to_tf32(bound[operand])
            return getattr(kernels, name)(**bound)

        return call


class _Narrow(_Emulated):
    """Float32 kernels on arrays that are stored in 16 bits."""

    def _wrap(self, name: str) -> Callable[..., Any]:
        written = WRITTEN[name]

        def call(*arguments: Any, **named: Any) -> Any:
            bound = {**dict(zip(_parameters(name), arguments, strict=False)), **named}
            wide: dict[tuple[int, int], Array] = {}
            # A float16 out of range becomes an infinity, as on a GPU: the loss scaler looks for it.
            with np.errstate(over="ignore", invalid="ignore"):
                passed = {key: _widened(value, wide) for key, value in bound.items()}
                result = getattr(kernels, name)(**passed)
                for key in written:
                    target: Any = bound.get(key)
                    if _is_narrow(target):
                        target[...] = passed[key]
            return result

        return call


@cache
def _parameters(name: str) -> tuple[str, ...]:
    """The kernel's parameters in order; the same for both tables of kernels."""
    return tuple(inspect.signature(getattr(kernels, name)).parameters)


def _is_narrow(value: object) -> bool:
    return isinstance(value, np.ndarray) and value.dtype.itemsize == 2


def _widened(value: Any, wide: dict[tuple[int, int], Array]) -> Any:
    """A 16-bit array in float32; arguments that are one array stay one, since kernels may work in place."""
    if not _is_narrow(value):
        return value
    place = (value.__array_interface__["data"][0], value.size)
    if value.size and place in wide:
        return wide[place].reshape(value.shape)
    wide[place] = np.empty(value.size, np.float32).reshape(value.shape)  # else an empty array has strides of 0
    wide[place][...] = value
    return wide[place]
