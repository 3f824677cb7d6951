"""Activation functions with bias, plain and gated, on the device."""

from __future__ import annotations

from executor.cuda.launch import add_columns, launch, partials_for, walk
from executor.reference.arrays import Activation, Floats, as_rows

KINDS = {"gelu": 0, "gelu_tanh": 1, "relu": 2, "silu": 3}


def _number_of(kind: Activation) -> int:
    try:
        return KINDS[kind]
    except KeyError:
        raise ValueError(f"activation {kind!r} is unknown; use gelu, gelu_tanh, relu or silu") from None


def activation_forward(x: Floats, bias: Floats | None, kind: Activation, out: Floats, derivative: Floats) -> None:
    """See `executor.reference.activation.activation_forward`."""
    rows, width = as_rows(x).shape
    number = _number_of(kind)
    if x.size:
        grid, block = walk(rows, width, x.dtype)
        arguments = (x, bias, number, out, derivative, rows, width)
        launch("activation", "activation_forward", x.dtype, grid, block, *arguments)


def activation_backward(dy: Floats, derivative: Floats, dx: Floats, dbias: Floats | None) -> None:
    """See `executor.reference.activation.activation_backward`."""
    rows, width = as_rows(dy).shape
    if dy.size:
        grid, block = walk(rows, width, dy.dtype)
        partials = partials_for(grid, width, dy.dtype, dbias)
        arguments = (dy, derivative, dx, partials, rows, width)
        launch("activation", "activation_backward", dy.dtype, grid, block, *arguments)
        add_columns(partials, dbias, dy.dtype)


def gated_forward(x: Floats, bias: Floats | None, kind: Activation, out: Floats) -> None:
    """See `executor.reference.activation.gated_forward`."""
    rows, width = as_rows(out).shape
    number = _number_of(kind)
    if x.size:
        grid, block = walk(rows, width, x.dtype)
        launch("activation", "gated_forward", x.dtype, grid, block, x, bias, number, out, rows, width)


def gated_backward(
    dy: Floats, x: Floats, bias: Floats | None, kind: Activation, dx: Floats, dbias: Floats | None
) -> None:
    """See `executor.reference.activation.gated_backward`."""
    rows, width = as_rows(dy).shape
    number = _number_of(kind)
    if x.size:
        grid, block = walk(rows, width, x.dtype)
        partials = partials_for(grid, 2 * width, x.dtype, dbias)
        arguments = (dy, x, bias, number, dx, partials, rows, width)
        launch("activation", "gated_backward", x.dtype, grid, block, *arguments)
        add_columns(partials, dbias, x.dtype)
