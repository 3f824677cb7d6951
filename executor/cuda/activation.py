"""Activation functions with bias, plain and gated, on the device."""

from __future__ import annotations

from executor.cuda.launch import add_columns, launch, partials_for, walk
from executor.reference.arrays import Activation, Floats, as_rows

KINDS = ("gelu", "gelu_tanh", "relu", "silu")


def macros_of(kind: Activation) -> tuple[str]:
    """The option that tells activation.cuh which function to compile.

    Raises:
        ValueError: no such function.
    """
    if kind not in KINDS:
        raise ValueError(f"activation {kind!r} is unknown; use gelu, gelu_tanh, relu or silu")
    return (f"-DACTIVATION={kind.upper()}",)


def activation_forward(x: Floats, bias: Floats | None, kind: Activation, out: Floats, derivative: Floats) -> None:
    """See `executor.reference.activation.activation_forward`."""
    rows, width = as_rows(x).shape
    macros = macros_of(kind)
    if x.size:
        grid, block = walk(rows, width, x.dtype)
        arguments = (x, bias, out, derivative, rows, width)
        launch("activation", "activation_forward", x.dtype, grid, block, *arguments, macros=macros)


def activation_backward(dy: Floats, derivative: Floats, dx: Floats, dbias: Floats | None) -> None:
    """See `executor.reference.activation.activation_backward`."""
    rows, width = as_rows(dy).shape
    if dy.size:
        grid, block = walk(rows, width, dy.dtype)
        partials = partials_for(grid, width, dy.dtype, dbias)
        arguments = (dy, derivative, dx, partials, rows, width)
        launch("activation_backward", "activation_backward", dy.dtype, grid, block, *arguments)
        add_columns(partials, dbias, dy.dtype)


def gated_forward(x: Floats, bias: Floats | None, kind: Activation, out: Floats) -> None:
    """See `executor.reference.activation.gated_forward`."""
    rows, width = as_rows(out).shape
    macros = macros_of(kind)
    if x.size:
        grid, block = walk(rows, width, x.dtype)
        launch("gated", "gated_forward", x.dtype, grid, block, x, bias, out, rows, width, macros=macros)


def gated_backward(
    dy: Floats, x: Floats, bias: Floats | None, kind: Activation, dx: Floats, dbias: Floats | None
) -> None:
    """See `executor.reference.activation.gated_backward`."""
    rows, width = as_rows(dy).shape
    macros = macros_of(kind)
    if x.size:
        grid, block = walk(rows, width, x.dtype)
        partials = partials_for(grid, 2 * width, x.dtype, dbias)
        arguments = (dy, x, bias, dx, partials, rows, width)
        launch("gated", "gated_backward", x.dtype, grid, block, *arguments, macros=macros)
        add_columns(partials, dbias, x.dtype)
