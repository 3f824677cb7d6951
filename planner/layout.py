"""Layouts of tensors on a mesh axis, the redistributions between them, and what each operator can compute in.

A tensor on one mesh axis is `Shard(dim)`, `Replicate()` or `Partial(op)`: the terms of PyTorch's DTensor. An operator
kind lists *signatures*: layouts of its inputs, outputs, parameters and of all their gradients in which it computes
without communication. Where a producer's layout differs from what its consumer needs, the pair alone decides the
redistribution, forward and backward apart (Xu et al. 2021, GSPMD, arXiv:2105.04663; Shoeybi et al. 2019,
Megatron-LM, arXiv:1909.08053, whose f and g operators come out of the table below).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal

from planner.errors import PlanError

AXES = ("dp", "cp", "tp")  # the axes on which tensors are laid out; pp splits the graph itself


@dataclass(frozen=True, slots=True)
class Shard:
    """Each rank of the axis holds a part of the dimension `dim`."""

    dim: str

    def __str__(self) -> str:
        return f"Shard({self.dim})"


@dataclass(frozen=True, slots=True)
class Replicate:
    """Every rank of the axis holds the same values."""

    def __str__(self) -> str:
        return "Replicate"


@dataclass(frozen=True, slots=True)
class Partial:
    """The value is the reduction, not yet taken, of what the ranks hold."""

    op: Literal["sum", "max"] = "sum"

    def __str__(self) -> str:
        return f"Partial({self.op})"


Layout = Shard | Replicate | Partial
Collective = Literal["all_reduce", "reduce_scatter", "all_gather", "all_to_all", "slice"]
R, P = Replicate(), Partial()


def redistribution(source: Layout, target: Layout) -> Collective | None:
    """The one collective that turns `source` into `target` on an axis; None where nothing moves.

    Raises:
        PlanError: the pair has no redistribution (nothing turns values into a reduction not yet taken).
    """
    if source == target:
        return None
    match source, target:
        case Partial(), Replicate():
            return "all_reduce"
        case Partial("sum"), Shard():
            return "reduce_scatter"
        case Shard(), Replicate():
            return "all_gather"
        case Shard(), Shard():
            return "all_to_all"
        case Replicate(), Shard():
            return "slice"
    raise PlanError(f"no redistribution leads from {source} to {target}; choose another signature for the consumer")


@dataclass(frozen=True, slots=True)
class Signature:
    """Layouts on one axis in which an operator computes without communication.

    `inputs` and `outputs` are the layouts that the forward pass needs and leaves; `grad_outputs` is what the backward
    pass needs of the outputs' gradients, `grad_inputs` what it leaves for the inputs. `parameters` and
    `grad_parameters` name the same for each parameter by its short name; "*" stands for all others.
    """

    name: str
    inputs: tuple[Layout, ...]
    outputs: tuple[Layout, ...]
    grad_inputs: tuple[Layout, ...]
    grad_outputs: tuple[Layout, ...]
    parameters: Layout = R
    grad_parameters: Layout = R


def _same(name: str, layout: Layout, inputs: int, outputs: int, parameters: Layout, grads: Layout) -> Signature:
    """An operator that works position by position: every tensor and gradient has one layout."""
    return Signature(
        name, (layout,) * inputs, (layout,) * outputs, (layout,) * inputs, (layout,) * outputs, parameters, grads
    )


def _tokenwise(inputs: int, outputs: int) -> list[Signature]:
    """Signatures of anything that treats tokens one by one: replicated, or split over batch or sequence."""
    return [
        _same("replicate", R, inputs, outputs, R, R),
        _same("batch", Shard("batch"), inputs, outputs, R, P),
        _same("seq", Shard("seq"), inputs, outputs, R, P),
    ]


def _linear(in_dim: str, out_dim: str) -> list[Signature]:
    """The five ways to compute y = x·W on one axis; "column" and "row" are Megatron's names (Shoeybi et al. 2019)."""
    column, row = Shard(out_dim), Shard(in_dim)
    return [
        *_tokenwise(1, 1),
        Signature("column", (R,), (column,), (P,), (column,), column, column),
        Signature("row", (row,), (P,), (row,), (R,), row, row),
    ]


def _attention() -> list[Signature]:
    heads, seq = Shard("heads"), Shard("seq")
    return [
        _same("replicate", R, 3, 1, R, R),
        _same("batch", Shard("batch"), 3, 1, R, P),
        _same("heads", heads, 3, 1, R, R),
        # each rank's own queries against all keys and values (context parallel by all-gather)
        Signature("allgather", (seq, R, R), (seq,), (seq, P, P), (seq,)),
        # keys and values stay sharded; the implementation passes them round (Liu et al. 2023, arXiv:2310.01889)
        _same("ring", seq, 3, 1, R, R),
    ]


def _cross_entropy() -> dict[str, list[Signature]]:
    """The three operators of a vocabulary-parallel cross-entropy; logits are never gathered."""
    vocab = Shard("vocab")
    over_tokens: list[tuple[str, Layout, Layout]] = [
        ("replicate", R, R),
        ("batch", Shard("batch"), P),
        ("seq", Shard("seq"), P),
    ]
    top: list[Signature] = []
    total: list[Signature] = []
    loss: list[Signature] = []
    for name, layout, scalar in over_tokens:
        grads = R if name == "replicate" else P
        top.append(Signature(name, (layout,), (layout, layout), (layout,), (layout, R), R, grads))
        total.append(Signature(name, (layout, layout), (layout, layout), (layout, R), (layout, R)))
        loss.append(Signature(name, (layout, layout), (scalar,), (layout, R), (R,), R, grads))
    top.append(Signature("vocab", (vocab,), (vocab, Partial("max")), (vocab,), (vocab, R), vocab, vocab))
    total.append(Signature("vocab", (vocab, R), (vocab, P), (vocab, R), (vocab, R)))
    loss.append(Signature("vocab", (vocab, R), (R,), (vocab, R), (R,), vocab, vocab))
    return {"logits_max": top, "exp_sum": total, "loss": loss}


@cache
def signatures(kind: str, in_dim: str = "hidden", out_dim: str = "hidden") -> dict[str, Signature]:
    """The signatures of an operator kind by name; `in_dim`, `out_dim` are the split dimensions of a linear layer.

    Raises:
        PlanError: the kind is unknown.
    """
    tables: dict[str, list[Signature]] = {
        "linear": _linear(in_dim, out_dim),
        "embedding": [
            *_tokenwise(1, 1),
            Signature("vocab", (R,), (P,), (R,), (R,), Shard("vocab"), Shard("vocab")),
        ],
        "positions": _tokenwise(1, 1),
        "norm": _tokenwise(1, 1),
        "residual": _tokenwise(2, 1),
        "residual_norm": _tokenwise(2, 2),
        "activation": [*_tokenwise(1, 1), _same("ffn", Shard("ffn"), 1, 1, Shard("ffn"), Shard("ffn"))],
        "gated": [*_tokenwise(1, 1), _same("ffn", Shard("ffn"), 1, 1, Shard("ffn"), Shard("ffn"))],
        "split_heads": [*_tokenwise(1, 3), _same("heads", Shard("heads"), 1, 3, Shard("heads"), Shard("heads"))],
        "attention": _attention(),
        **_cross_entropy(),
    }
    if kind not in tables:
        raise PlanError(f"operator kind {kind!r} has no signatures; known kinds are {', '.join(sorted(tables))}")
    return {signature.name: signature for signature in tables[kind]}
