"""Parameters, gradients and optimizer state of one rank: flat per unit, sharded over data ranks as the plan says."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from executor.memory import Arena, Block
from executor.precision import Precision
from executor.random import derive_key, normal
from planner.placement import Placement, fixed_size
from planner.plan import Plan
from planner.program.units import Slot, Unit
from planner.program.update import tied
from planner.shard import offsets

Array = NDArray[np.floating[Any]]

INITIAL_STD = 0.02  # Devlin et al. 2019, Radford et al. 2019


class UnitState:
    """The flat buffers of one unit.

    `whole` is what kernels read and `shard` the owned range that the optimizer updates: a part of `whole`, or under
    mixed precision the float32 master copy, of which `whole` is the rounded working copy. `whole` and `gradient` are
    None while only the shard of them is held (ZeRO 3, ZeRO 2); `touched` tells which gradients of the step hold a value
    already, so that the first one overwrites rather than adds.
    """

    def __init__(self, plan: Plan, unit: Unit, arena: Arena, precision: Precision, position: int) -> None:
        self.plan, self.unit, self.arena, self.kernels = plan, unit, arena, arena.device.kernels
        self.working, self.dtype = precision.storage, precision.master
        self.has_master = precision.mixed and not plan.forward_only  # evaluation updates nothing
        starts = offsets(unit.shard_sizes)
        self.range = (starts[position], starts[position + 1]) if plan.zero_stage else (0, unit.size)
        self.slots = {slot.parameter.name: slot for slot in unit.slots}
        self.touched: set[str] = set()
        self.holds_shard = False  # gradient_shard holds the sum of earlier micro-batches
        self.keeps_whole = plan.zero_stage < 3
        self.keeps_gradient = plan.zero_stage < 2 or tied(plan, unit)
        self._blocks: dict[str, Block] = {}
        self.whole = self._new("whole", unit.size, "parameters", self.working) if self.keeps_whole else None
        if self.has_master:
            self.shard = self._new("shard", self.owned, "optimizer")
        elif self.whole is not None:
            self.shard = self.whole[slice(*self.range)]
        else:
            self.shard = self._new("shard", self.owned, "parameters", self.working)
        self.gradient: Array | None = None
        self.gradient_shard: Array | None = None
        self.moments: tuple[Array, ...] = ()
        if plan.forward_only:
            return
        if self.keeps_gradient:
            self.gradient = self._new("gradient", unit.size, "gradients")
        if plan.zero_stage:
            self.gradient_shard = self._new("gradient_shard", self.owned, "gradients")
        if plan.training.optimizer == "adamw":
            self.moments = tuple(self._new(name, self.owned, "optimizer") for name in ("m", "v"))
            for moment in self.moments:
                moment[:] = 0

    @property
    def owned(self) -> int:
        """Elements that this rank updates."""
        return self.range[1] - self.range[0]

    def _new(self, name: str, size: int, part: str, dtype: np.dtype[Any] | None = None) -> Array:
        what = f"{name} of {self.unit.block}"
        self._blocks[name], array = self.arena.array((size,), dtype or self.dtype, part, what)
        return array  # type: ignore[return-value]

    # ---- values ----------------------------------------------------------------------------------------------------

    def view(self, flat: Array | None, slot: Slot) -> Array:
        """A parameter's local array inside a flat buffer."""
        assert flat is not None, f"{slot.parameter.name} of {self.unit.block} is used while only its shard is held"
        return flat[slot.offset : slot.offset + slot.size].reshape(slot.shape)

    def initialise(self, placement: Placement, seed: int) -> None:
        """Fill the parameters; every element depends on (seed, name, global index) only."""
        flat = self.whole
        if flat is None or flat.dtype != self.dtype or not self.arena.device.is_host:
            flat = np.empty(self.unit.size, self.dtype)
        for slot in self.unit.slots:
            fill(self.view(flat, slot), slot, placement, seed)
        if flat is not self.whole:
            self.set_parameters(self.arena.device.upload(flat))

    def set_parameters(self, flat: Array) -> None:
        """Take the whole unit's parameters from a flat array."""
        self.shard[...] = flat[slice(*self.range)]
        if self.whole is not None:
            self.whole[...] = flat

    def working_copy(self) -> Array | None:
        """The owned range of the rounded copy, which an update writes too; None where the kernels read no copy."""
        return self.whole[slice(*self.range)] if self.has_master and self.whole is not None else None

    def gather_room(self) -> Array:
        """Room for the whole unit while it is gathered (ZeRO 3); the own shard is in its slot already."""
        if self.whole is None:
            self.whole = self._new("gathered", self.unit.size, "buffers", self.working)
            self.whole[slice(*self.range)] = self.shard
        return self.whole

    def drop(self) -> None:
        """Give the gathered unit back."""
        if not self.keeps_whole and "gathered" in self._blocks:
            self.whole = None
            self.arena.release(self._blocks.pop("gathered"))

    def gradient_of(self, name: str) -> tuple[Array, bool]:
        """A parameter's gradient and whether it already holds this step's (or micro-batch's) values."""
        if self.gradient is None:
            self.gradient = self._new("gradient", self.unit.size, "gradients")
            self.touched.clear()
        held = name in self.touched
        self.touched.add(name)
        return self.view(self.gradient, self.slots[name]), held

    def complete_gradient(self) -> Array:
        """The whole gradient, ready to be reduced: zero where no task has added to it since the last reduction.

        A backward pass that is split in two leaves some of a unit's gradients at I and the others at W, which need not
        fall between the same two reductions.
        """
        for name in self.slots:
            gradient, held = self.gradient_of(name)
            if not held:
                gradient[...] = 0
        assert self.gradient is not None, f"{self.unit.block} has no parameters to reduce"
        return self.gradient

    def begin_step(self) -> None:
        """Forget the last step's gradients."""
        self.touched.clear()
        self.holds_shard = False

    def scale_gradient(self, factor: float) -> None:
        """Scale the gradient that the optimizer will use."""
        self.kernels.scale(self.reduced(), factor)

    def finish_gradient(self) -> None:
        """After reducing into the shard: the whole gradient is not kept."""
        self.touched.clear()
        if not self.keeps_gradient:
            self.gradient = None
            self.arena.release(self._blocks.pop("gradient"))

    def reduced(self) -> Array:
        """The gradient of the owned range, reduced over data ranks."""
        result = self.gradient_shard if self.gradient_shard is not None else self.gradient
        assert result is not None
        return result

    def pieces(self) -> list[tuple[Slot, int, int]]:
        """Parameters that overlap the owned range, with start and stop inside it."""
        first, last = self.range
        found = []
        for slot in self.unit.slots:
            start, stop = max(slot.offset, first), min(slot.offset + slot.size, last)
            if start < stop:
                found.append((slot, start - first, stop - first))
        return found


def fill(out: Array, slot: Slot, placement: Placement, seed: int) -> None:
    """Initial values of one parameter's local part: normal(0, 0.02) matrices, zero biases, unit gains."""
    parameter = slot.parameter
    if parameter.init != "normal":
        out[...] = 0 if parameter.init == "zeros" else 1
        return
    shape = tuple(global_size(placement, dim) for dim in parameter.dims)
    parts = [placement.index(dim, slot.axes) for dim in parameter.dims]
    normal(derive_key(seed, "parameter", parameter.name), shape, parts, std=INITIAL_STD, dtype=out.dtype, out=out)


def global_size(placement: Placement, dim: str) -> int:
    """Extent of a parameter dimension before any split."""
    try:
        return fixed_size(placement.plan.model, dim)
    except KeyError:
        return placement.size(dim, ())
