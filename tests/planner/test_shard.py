"""The shard map: parts that partition, splits of splits, packed columns, shared heads, and placements."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.errors import PlanError
from planner.mesh import Mesh
from planner.model import ModelSpec
from planner.placement import Placement
from planner.plan import make_plan
from planner.shard import (
    indices,
    offsets,
    packed_pair,
    packed_qkv,
    ranges,
    shared_kv_heads,
    split_evenly,
    within,
    zigzag_sizes,
)


@given(st.integers(0, 500), st.integers(1, 40))
def test_even_parts_differ_by_one_at_most(size, parts):
    sizes = split_evenly(size, parts)
    assert len(sizes) == parts
    assert sum(sizes) == size
    assert max(sizes) - min(sizes) <= 1
    assert list(sizes) == sorted(sizes, reverse=True)


def test_twelve_heads_over_eight_ranks():
    assert split_evenly(12, 8) == (2, 2, 2, 2, 1, 1, 1, 1)


@given(st.lists(st.integers(0, 40), min_size=1, max_size=12), st.sampled_from(["contiguous", "zigzag"]))
def test_parts_partition_the_indices(uneven, order):
    size, parts = sum(uneven), len(uneven)
    sizes = zigzag_sizes(size, parts) if order == "zigzag" else tuple(uneven)
    held = [indices(ranges(sizes, part, order)) for part in range(parts)]
    assert [len(h) for h in held] == list(sizes)
    assert sorted(np.concatenate(held)) == list(range(size))


@pytest.mark.parametrize("parts", [1, 2, 3, 4, 8])
def test_zigzag_balances_a_causal_mask(parts):
    """Where 2p divides the sequence every rank has the same number of visible pairs; contiguous parts do not."""
    size = 2 * parts * 6

    def pairs(order):
        sizes = zigzag_sizes(size, parts) if order == "zigzag" else split_evenly(size, parts)
        return [int((indices(ranges(sizes, part, order)) + 1).sum()) for part in range(parts)]

    assert len(set(pairs("zigzag"))) == 1
    assert sum(pairs("zigzag")) == sum(pairs("contiguous")) == size * (size + 1) // 2
    if parts > 1:
        assert max(pairs("contiguous")) > 1.4 * size * (size + 1) / 2 / parts


def test_other_parts_are_no_zigzag():
    with pytest.raises(PlanError, match=r"parts \(5, 3\) are not the zig-zag parts \(4, 4\)"):
        ranges((5, 3), 0, "zigzag")


@given(st.lists(st.integers(0, 9), min_size=2, max_size=8), st.data())
def test_a_split_of_a_split_takes_positions(lengths, data):
    starts = offsets([2 * length for length in lengths])  # pieces with gaps between them
    pieces = tuple((start, start + length) for start, length in zip(starts, lengths, strict=False) if length)
    flat = [i for start, stop in pieces for i in range(start, stop)]
    first = data.draw(st.integers(0, len(flat)))
    last = data.draw(st.integers(first, len(flat)))
    found = within(pieces, first, last)
    assert [i for start, stop in found for i in range(start, stop)] == flat[first:last]


# ---- packed and shared -----------------------------------------------------------------------------------------------

HEADS = st.sampled_from([(4, 4), (8, 2), (12, 12), (6, 3), (8, 1), (15, 5), (12, 4)])


@given(HEADS, st.integers(1, 12), st.integers(1, 5))
def test_packed_columns_hold_each_query_head_once_and_the_keys_it_reads(counts, parts, head_dim):
    heads, kv_heads = counts
    parts = min(parts, heads)
    starts = offsets(split_evenly(heads, parts))
    seen = []
    for part in range(parts):
        span = (starts[part], starts[part + 1])
        q, k, v = packed_qkv(heads, kv_heads, head_dim, span)
        seen += range(*q)
        mine = {head * kv_heads // heads for head in range(*span)}  # the key-value head that each query head reads
        base = heads * head_dim
        assert set(range(*k)) == {base + head * head_dim + i for head in mine for i in range(head_dim)}
        assert [x + kv_heads * head_dim for x in k] == list(v)
        assert shared_kv_heads(heads, kv_heads, *span) == (min(mine), max(mine) + 1)
    assert seen == list(range(heads * head_dim))


@given(st.integers(2, 60), st.integers(1, 8))
def test_packed_gate_and_up_columns_pair(size, parts):
    parts = min(parts, size)
    starts = offsets(split_evenly(size, parts))
    columns = []
    for part in range(parts):
        gate, up = packed_pair(size, (starts[part], starts[part + 1]))
        assert [x + size for x in gate] == list(up)
        columns += [*range(*gate), *range(*up)]
    assert sorted(columns) == list(range(2 * size))


# ---- what a rank holds under a plan ----------------------------------------------------------------------------------


def spec(**changes):
    sizes = {
        "layers": 4, "hidden": 24, "heads": 6, "kv_heads": 3, "head_dim": 4, "ffn_hidden": 23, "seq_len": 29,
        "vocab": 31, "max_positions": 32, "gated_ffn": True,
    }  # fmt: skip
    return ModelSpec(**(sizes | changes))


@st.composite
def placements(draw):
    mesh = Mesh(cp=draw(st.integers(1, 4)), tp=draw(st.integers(1, 6)), dp=draw(st.integers(1, 3)))
    plan = make_plan(
        spec(causal=draw(st.booleans())), mesh, global_batch_size=7, micro_batch_size=2,
        sequence_parallel=mesh.tp > 1 and mesh.cp * mesh.tp <= 14 and draw(st.booleans()),
    )  # fmt: skip
    return [Placement(plan, at, 2) for at in mesh.coordinates() if at.dp == 0]


SHARDED = [("seq", ("cp",)), ("seq", ("cp", "tp")), ("heads", ("tp",)), ("ffn", ("tp",)), ("vocab", ("tp",))]


@settings(deadline=None)
@given(placements(), st.sampled_from(SHARDED))
def test_the_parts_of_all_ranks_partition_a_dimension(ranks, sharded):
    """Over the axes that shard it, peers hold each index once; along the others they hold the same."""
    dim, axes = sharded
    owned = {}
    for rank in ranks:
        coordinate = tuple(getattr(rank.at, axis) for axis in axes)
        held = rank.index(dim, axes).tolist()
        assert rank.size(dim, axes) == len(held)
        assert owned.setdefault(coordinate, held) == held
    total = {"seq": 29, "heads": 6, "ffn": 23, "vocab": 31}[dim]
    assert sorted(i for held in owned.values() for i in held) == list(range(total))


def test_ulysses_splits_heads_over_both_axes():
    plan = make_plan(
        spec(heads=12, kv_heads=6), Mesh(cp=3, tp=2), global_batch_size=1, micro_batch_size=1, cp_kind="ulysses"
    )
    held = [Placement(plan, at).index("heads", ("cp", "tp")).tolist() for at in plan.mesh.coordinates()]
    assert sorted(i for part in held for i in part) == list(range(12))
    assert {len(h) for h in held} == {2}
    assert {Placement(plan, at).size("kv_heads", ("cp", "tp")) for at in plan.mesh.coordinates()} == {1}


@settings(deadline=None)
@given(placements())
def test_packed_and_shared_sizes_follow_the_heads(ranks):
    for rank in ranks:
        heads = rank.size("heads", ("tp",))
        kv = rank.size("kv_heads", ("tp",))
        assert rank.size("qkv", ("tp",)) == (heads + 2 * kv) * 4
        assert rank.size("attended", ("tp",)) == heads * 4
        assert rank.size("qk_heads", ("tp",)) == heads + kv
        assert rank.size("gate_up", ("tp",)) == 2 * rank.size("ffn", ("tp",))
        assert rank.size("batch", ()) == 2
        peers = rank.extents("qkv", ("tp",), "tp")
        assert peers[rank.at.tp] == rank.size("qkv", ("tp",))
        if rank.plan.mesh.cp > 1:
            back = rank.at._replace(cp=(rank.at.cp - 1) % rank.plan.mesh.cp)
            assert rank.ring_extent("seq", 1) == Placement(rank.plan, back).size("seq", ("cp",))


@settings(deadline=None)
@given(placements())
def test_gathering_over_the_tensor_axis_restores_a_context_part(ranks):
    """Sequence parallelism splits each context part in order, so that concatenating over tp gives it back."""
    by_cp = {}
    for rank in ranks:
        by_cp.setdefault(rank.at.cp, []).append(rank)
    for members in by_cp.values():
        joined = np.concatenate([rank.index("seq", ("cp", "tp")) for rank in members])
        np.testing.assert_array_equal(joined, members[0].index("seq", ("cp",)))
