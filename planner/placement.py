"""What one rank holds: the part of every dimension, as sizes and as index ranges.

Shapes, byte counts, parameter slices, data rows and dropout counters are all derived from here, so the planner's
numbers and the executor's arrays cannot disagree.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from planner.graph import split_unit
from planner.mesh import Coordinate
from planner.model import ModelSpec
from planner.plan import Plan
from planner.shard import (
    Ranges,
    indices,
    offsets,
    packed_pair,
    packed_qkv,
    ranges,
    shared_kv_heads,
    split_evenly,
    within,
)

Count = int | NDArray[np.int64]
"""A size: an int for one plan, an array for many candidates at once."""


class Sizes(Protocol):
    """Local sizes of named dimensions, given the axes over which each is sharded."""

    def size(self, dim: str, axes: Collection[str]) -> Count:
        """Local extent of `dim` when it is sharded over `axes`."""

    def extents(self, dim: str, axes: Collection[str], axis: str) -> tuple[int, ...]:
        """The same for every peer along `axis`, in order; empty where sizes are arrays over candidates."""

    def ring_extent(self, dim: str, step: int) -> Count:
        """Extent of the part of `dim` that has come here after `step` shifts round the context-parallel ring."""


def fixed_size(model: ModelSpec, dim: str) -> int:
    """Extent of a dimension that is never split."""
    return {
        "hidden": model.hidden,
        "head_dim": model.head_dim,
        "positions": model.max_positions,
        "types": model.token_types,
        "two": 2,
    }[dim]


@dataclass(frozen=True)
class Placement:
    """The parts that the rank at `at` holds under `plan`; `batch` is the size of the micro-batch in hand."""

    plan: Plan
    at: Coordinate
    batch: int = 1

    def part(self, unit: str, axes: Collection[str], at: Coordinate | None = None) -> Ranges:
        """Index ranges of a splittable unit ("seq", "heads", "ffn", "vocab") over `axes`, in the order held."""
        at = at or self.at
        plan, parts = self.plan, self.plan.parts
        if unit == "seq":
            held = ranges(parts.seq, at.cp, plan.seq_order) if "cp" in axes else self._whole_seq()
            return self._inner(held, plan.mesh.tp, at.tp) if "tp" in axes else held
        sizes: tuple[int, ...] = getattr(parts, unit)
        held = ranges(sizes, at.tp) if "tp" in axes else ((0, sum(sizes)),)
        return self._inner(held, plan.mesh.cp, at.cp) if "cp" in axes else held

    def _whole_seq(self) -> Ranges:
        """All positions in the order in which gathering over cp leaves them."""
        plan = self.plan
        return tuple(piece for c in range(plan.mesh.cp) for piece in ranges(plan.parts.seq, c, plan.seq_order))

    @staticmethod
    def _inner(held: Ranges, parts: int, part: int) -> Ranges:
        starts = offsets(split_evenly(sum(stop - start for start, stop in held), parts))
        return within(held, starts[part], starts[part + 1])

    def pieces(self, dim: str, axes: Collection[str], at: Coordinate | None = None) -> Ranges:
        """Global index ranges of any parameter dimension when its unit is sharded over `axes`."""
        model, unit = self.plan.model, split_unit(dim)
        if unit not in ("seq", "heads", "ffn", "vocab"):
            return ((0, fixed_size(model, dim)),)
        held = self.part(unit, axes, at)
        if dim == unit:
            return held
        ((first, last),) = held if unit != "seq" else (held[0],)
        match dim:
            case "qkv":
                return packed_qkv(model.heads, model.kv_heads, model.head_dim, (first, last))
            case "attended":
                return ((first * model.head_dim, last * model.head_dim),)
            case "kv_heads":
                return (shared_kv_heads(model.heads, model.kv_heads, first, last),)
            case "gate_up":
                return packed_pair(model.ffn_hidden, (first, last))
        return held

    def size(self, dim: str, axes: Collection[str]) -> int:
        """Local extent of `dim` when its unit is sharded over `axes` ("batch" is the micro-batch in hand)."""
        if dim == "batch":
            return self.batch
        if dim == "qk_heads":
            return self.size("heads", axes) + self.size("kv_heads", axes)
        return sum(stop - start for start, stop in self.pieces(dim, axes))

    def extents(self, dim: str, axes: Collection[str], axis: str) -> tuple[int, ...]:
        """Extents of `dim` for every peer along `axis`."""
        peers = (self.at._replace(**{axis: i}) for i in range(self.plan.mesh.size(axis)))
        return tuple(Placement(self.plan, peer, self.batch).size(dim, axes) for peer in peers)

    def ring_extent(self, dim: str, step: int) -> int:
        """Extent of the context-parallel part that `step` shifts have brought here."""
        origin = (self.at.cp - step) % self.plan.mesh.cp
        return Placement(self.plan, self.at._replace(cp=origin), self.batch).size(dim, ("cp",))

    def index(self, dim: str, axes: Collection[str]) -> NDArray[np.int64]:
        """Global indices of the local extent, in the order held."""
        return indices(self.pieces(dim, axes))
