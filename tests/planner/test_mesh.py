"""Ranks and coordinates, the groups along an axis, the hosts that they span, and the ways to factor a world."""

import math
from itertools import pairwise, product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.errors import PlanError
from planner.mesh import MOST_RANKS, Coordinate, Mesh, factorizations

AXES = ("pp", "dp", "cp", "tp")
MESHES = st.builds(Mesh, pp=st.integers(1, 4), dp=st.integers(1, 4), cp=st.integers(1, 4), tp=st.integers(1, 4))


@given(MESHES)
def test_ranks_and_coordinates_are_a_bijection(mesh):
    assert mesh.world_size == math.prod(mesh.size(axis) for axis in AXES)
    coordinates = list(mesh.coordinates())
    assert sorted(coordinates) == [Coordinate(*at) for at in product(*(range(mesh.size(axis)) for axis in AXES))]
    assert [mesh.rank(at) for at in coordinates] == list(range(mesh.world_size))


@given(MESHES)
def test_the_tensor_axis_varies_fastest(mesh):
    """Equal to lexicographic order over (pp, dp, cp, tp): tensor-parallel peers are neighbours."""
    assert list(mesh.coordinates()) == sorted(mesh.coordinates())


@given(MESHES, st.data())
def test_groups_partition_the_mesh(mesh, data):
    axis = data.draw(st.sampled_from([*AXES, "data", "world"]))
    groups = {mesh.group(axis, at) for at in mesh.coordinates()}
    assert sorted(rank for group in groups for rank in group) == list(range(mesh.world_size))
    for group in groups:
        assert len(group) == mesh.size(axis)
        assert len({b - a for a, b in pairwise(group)} | {mesh.stride(axis)}) == 1
        fixed = {"data": {"pp", "tp"}, "world": set()}.get(axis, set(AXES) - {axis})
        for name in fixed:
            assert len({getattr(mesh.coordinate(rank), name) for rank in group}) == 1


def test_the_data_group_orders_replicas_before_context():
    """A rank's place in the joint group is dp·CP + cp: what decides which shard of a ZeRO unit it owns."""
    mesh = Mesh(pp=2, dp=3, cp=2, tp=2)
    for at in mesh.coordinates():
        assert mesh.group("data", at).index(mesh.rank(at)) == at.dp * mesh.cp + at.cp


@pytest.mark.parametrize(
    ("group", "per_host", "hosts"), [((0, 1, 2, 3), 4, 1), ((0, 4, 8, 12), 4, 4), ((2, 3, 4, 5), 4, 2), ((5,), 2, 1)]
)
def test_hosts_are_filled_in_rank_order(group, per_host, hosts):
    assert Mesh(dp=16).hosts(group, per_host) == hosts


@pytest.mark.parametrize("rank", [-1, 8])
def test_a_rank_outside_the_mesh_is_refused(rank):
    with pytest.raises(PlanError, match=rf"rank {rank} is outside the mesh of 8 ranks; use 0\.\.7"):
        Mesh(dp=2, tp=4).coordinate(rank)


def test_more_ranks_than_can_be_planned_for_are_refused():
    assert Mesh(dp=2**10, tp=2**10).world_size == MOST_RANKS
    with pytest.raises(PlanError, match="2097152 ranks exceed the 1048576 that can be planned for; use fewer workers"):
        Mesh(dp=2**10, tp=2**11)


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("size", [0, -2])
def test_an_empty_axis_is_refused(axis, size):
    with pytest.raises(PlanError, match=rf"{axis}={size} is not an axis size; use {axis}>=1"):
        Mesh(**{axis: size})


@given(st.integers(1, 200), st.integers(1, 4))
def test_factorizations_are_all_ordered_products(world, axes):
    found = factorizations(world, axes)
    divisors = [d for d in range(1, world + 1) if world % d == 0]

    def count(rest, left):
        return 1 if left == 1 else sum(count(rest // d, left - 1) for d in divisors if rest % d == 0)

    assert all(math.prod(factors) == world for factors in found)
    assert len(found) == len(set(found)) == count(world, axes)
