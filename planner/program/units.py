"""Units: the parameters of one block on one rank, flat in one buffer: gathered, reduced and sharded together."""

from __future__ import annotations

import math
from dataclasses import dataclass

from planner.graph import Operator, Parameter, split_unit
from planner.layout import AXES, Partial, Shard, signatures
from planner.placement import Placement
from planner.plan import Plan
from planner.shard import split_evenly


@dataclass(frozen=True, slots=True)
class Slot:
    """One parameter on this rank: its local shape, the axes that shard it, its place in the unit's flat buffer.

    `partial_tp` marks a gradient that still has to be summed over the tensor axis (a norm's gain under sequence
    parallelism), `replicated_tp` a parameter that every rank of the tensor axis holds whole.
    """

    parameter: Parameter
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    offset: int
    partial_tp: bool
    replicated_tp: bool

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Unit:
    """The parameters of one block; those with `partial_tp` come last, so their gradients are one region."""

    block: str
    slots: tuple[Slot, ...]
    size: int
    shard_sizes: tuple[int, ...]  # over the "data" group, for the ZeRO stages

    @property
    def partial_offset(self) -> int:
        """Where the region of `partial_tp` gradients starts."""
        return min((slot.offset for slot in self.slots if slot.partial_tp), default=self.size)


def _slot(plan: Plan, placement: Placement, operator: Operator, parameter: Parameter) -> Slot:
    """Lay one parameter out: sharded where its signature shards a dimension that it has, replicated elsewhere."""
    axes, partial_tp = [], False
    units = {split_unit(dim) for dim in parameter.dims}
    for axis in AXES:
        if plan.mesh.size(axis) == 1:
            continue
        signature = signatures(operator.kind, *operator.split)[plan.layouts[operator.role][axis]]
        layout = signature.parameters
        sharded = isinstance(layout, Shard) and layout.dim in units
        if sharded:
            axes.append(axis)
        elif axis == "tp":
            grads = signature.grad_parameters
            partial_tp = isinstance(grads, Partial) or (isinstance(grads, Shard) and grads.dim not in units)
    shape = tuple(placement.size(dim, tuple(axes)) for dim in parameter.dims)
    return Slot(parameter, shape, tuple(axes), 0, partial_tp, "tp" not in axes and plan.mesh.tp > 1)


def make_unit(plan: Plan, placement: Placement, block: str, block_operators: list[Operator], taken: set[str]) -> Unit:
    """The unit of a block; parameters in `taken` belong to another unit of the same rank (tied embeddings)."""
    slots = []
    for operator in block_operators:
        for parameter in operator.parameters:
            if parameter.name not in taken:
                taken.add(parameter.name)
                slots.append(_slot(plan, placement, operator, parameter))
    slots.sort(key=lambda slot: (slot.partial_tp, not slot.parameter.decay))
    placed, offset = [], 0
    for slot in slots:
        placed.append(Slot(slot.parameter, slot.shape, slot.axes, offset, slot.partial_tp, slot.replicated_tp))
        offset += slot.size
    return Unit(block, tuple(placed), offset, split_evenly(offset, plan.mesh.size("data")))
