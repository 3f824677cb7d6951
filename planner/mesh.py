"""Mesh(pp, dp, cp, tp): ranks and coordinates, the groups along an axis, and which hosts a group spans."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import msgspec

from planner.errors import PlanError

MOST_RANKS = 2**20
"""Ten times the largest training runs; every rank has an entry in the files, so that there has to be a limit."""

JOINT = {"data": ("dp", "cp"), "world": ("pp", "dp", "cp", "tp")}
"""Groups along several axes at once."""


class Coordinate(NamedTuple):
    """Where a rank stands on the mesh."""

    pp: int
    dp: int
    cp: int
    tp: int


class Mesh(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Axis sizes; rank = ((pp·DP + dp)·CP + cp)·TP + tp, so the tensor axis varies fastest and stays inside a host."""

    pp: int = 1
    dp: int = 1
    cp: int = 1
    tp: int = 1

    def __post_init__(self) -> None:
        for axis in ("pp", "dp", "cp", "tp"):
            if getattr(self, axis) < 1:
                raise PlanError(f"{axis}={getattr(self, axis)} is not an axis size; use {axis}>=1")
        check_world_size(self.world_size)

    @property
    def world_size(self) -> int:
        """Number of ranks, pp·dp·cp·tp."""
        return self.pp * self.dp * self.cp * self.tp

    def size(self, axis: str) -> int:
        """Number of ranks along `axis`, or in one of the joint groups "data" (dp × cp) and "world"."""
        if axis == "data":
            return self.dp * self.cp
        return self.world_size if axis == "world" else int(getattr(self, axis))

    def rank(self, at: Coordinate) -> int:
        """The rank at a coordinate."""
        return ((at.pp * self.dp + at.dp) * self.cp + at.cp) * self.tp + at.tp

    def coordinate(self, rank: int) -> Coordinate:
        """The coordinate of a rank.

        Raises:
            PlanError: the rank is outside the mesh.
        """
        if not 0 <= rank < self.world_size:
            raise PlanError(f"rank {rank} is outside the mesh of {self.world_size} ranks; use 0..{self.world_size - 1}")
        rest, tp = divmod(rank, self.tp)
        rest, cp = divmod(rest, self.cp)
        pp, dp = divmod(rest, self.dp)
        return Coordinate(pp, dp, cp, tp)

    def coordinates(self) -> Iterator[Coordinate]:
        """All coordinates in rank order."""
        return (self.coordinate(rank) for rank in range(self.world_size))

    def group(self, axis: str, at: Coordinate) -> tuple[int, ...]:
        """Ranks that differ from `at` along `axis` only, in order; "data" joins dp and cp, "world" joins all."""
        first = self.rank(at._replace(**dict.fromkeys(JOINT.get(axis, (axis,)), 0)))
        stride = self.stride(axis)
        return tuple(range(first, first + self.size(axis) * stride, stride))

    def stride(self, axis: str) -> int:
        """Distance in ranks between neighbours along `axis`."""
        return {"tp": 1, "cp": self.tp, "data": self.tp, "dp": self.tp * self.cp, "world": 1}.get(
            axis, self.tp * self.cp * self.dp
        )

    def hosts(self, group: tuple[int, ...], ranks_per_host: int) -> int:
        """How many hosts a group of ranks spans when hosts are filled in rank order."""
        return len({rank // ranks_per_host for rank in group})


def check_world_size(ranks: int) -> None:
    """Raise where there are more ranks than can be planned for.

    Raises:
        PlanError: names the number and the limit.
    """
    if ranks > MOST_RANKS:
        raise PlanError(f"{ranks} ranks exceed the {MOST_RANKS} that can be planned for; use fewer workers")


def factorizations(world_size: int, axes: int) -> list[tuple[int, ...]]:
    """All ways to write `world_size` as an ordered product of `axes` factors."""
    if axes == 1:
        return [(world_size,)]
    divisors = [d for d in range(1, math.isqrt(world_size) + 1) if world_size % d == 0]
    divisors += [world_size // d for d in reversed(divisors) if d * d != world_size]
    return [(d, *rest) for d in divisors for rest in factorizations(world_size // d, axes - 1)]
