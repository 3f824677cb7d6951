"""suggest: nothing better is pruned, counts add up, fixed choices hold, and odd numbers of workers are explained."""

from functools import partial

import msgspec
import numpy as np
import pytest
from small_plans import BERT

from planner.errors import PlanError
from planner.machine import load_machine
from planner.model import with_sizes
from planner.plan import Training
from planner.predict import predict
from planner.search.balance import balance
from planner.search.space import Space
from planner.search.suggest import suggest

CPU, A100 = load_machine("cpu-generic"), load_machine("a100-80gb")


def searched(spec, workers, machine, batch, *, limit=1e15, micro=None, **fixed):
    """All candidates, estimated: how to make the plan of each, and its estimated seconds."""
    search = Space(spec, workers, machine, batch, micro, Training(), fixed, limit, False)
    search.estimate_all()
    for group in search.groups:
        for row in range(len(group.seconds)):
            for column, update in enumerate(group.updates):
                if np.isfinite(group.seconds[row, column]):
                    yield partial(search.plan, group, row, update), float(group.seconds[row, column])


SMALL = msgspec.structs.replace(BERT, hidden=96, heads=4, kv_heads=4, head_dim=24, ffn_hidden=384)


@pytest.mark.parametrize("workers", [2, 4])
def test_pruned_search_does_not_lose_to_predicting_every_candidate(workers):
    """The best of all predictions, to what the model can tell apart at all (half a percent)."""
    fixed = {"recompute": "none", "sequence_parallel": False, "cp": 1}
    best = min(predict(make(), CPU).step_seconds for make, _ in searched(SMALL, workers, CPU, 4, **fixed))
    found = suggest(SMALL, workers, CPU, global_batch_size=4, fixed=fixed)
    assert min(ranked.prediction.step_seconds for ranked in found.plans) <= best * 1.005


def test_suggestions_are_distinct_and_ranked():
    found = suggest(with_sizes(layers=12), 8, CPU, global_batch_size=32)
    assert found.plans
    assert len({ranked.plan.hash for ranked in found.plans}) == len(found.plans)
    for ranked in found.plans:
        assert ranked.plan.mesh.world_size == 8
        assert ranked.prediction.plan_hash == ranked.plan.hash
    assert found.feasible <= found.candidates
    assert found.replayed >= len(found.plans) - 1  # the assigned plan is none of the candidates


def test_candidates_are_counted_once_each():
    """Every candidate is another plan, and their number is what the suggestion says."""
    plans = [make().hash for make, _ in searched(SMALL, 2, CPU, 4)]
    assert len(plans) == len(set(plans))
    assert len(plans) == suggest(SMALL, 2, CPU, global_batch_size=4).candidates


def test_every_suggestion_fits_the_limit():
    limit = 450e6
    found = suggest(with_sizes(layers=12), 8, CPU, global_batch_size=32, memory_limit_bytes=limit)
    for ranked in found.plans:
        assert max(ranked.prediction.peak_bytes) <= limit
    assert any("more memory than the 0.4 GiB of a rank" in r.reason for r in found.rejected)


def test_nothing_fits():
    with pytest.raises(
        PlanError, match=r"none of the \d+ candidates .* more memory than .*; use more workers, a small"
    ):
        suggest(with_sizes(layers=12), 8, CPU, global_batch_size=32, memory_limit_bytes=1e6)


@pytest.mark.parametrize(
    "fixed",
    [{"tp": 2}, {"pp": 4, "schedule": "gpipe"}, {"dp": 8}, {"recompute": "full"}, {"zero_stage": 3},
     {"cp": 2, "cp_kind": "ring"},
     {"sequence_parallel": True}],
    ids=str,
)  # fmt: skip
def test_fixed_choices_hold(fixed):
    found = suggest(SMALL_12, 8, CPU, global_batch_size=16, fixed=fixed)
    for ranked in found.plans:
        plan = ranked.plan
        have = {axis: getattr(plan.mesh, axis) for axis in ("pp", "dp", "cp", "tp")} | {
            "schedule": plan.schedule.name, "recompute": plan.recompute, "zero_stage": plan.zero_stage,
            "cp_kind": plan.cp_kind, "sequence_parallel": plan.sequence_parallel,
        }  # fmt: skip
        assert fixed.items() <= have.items()


SMALL_12 = msgspec.structs.replace(BERT, layers=12, heads=12, kv_heads=12, head_dim=2)


def test_more_workers_than_heads():
    """16 workers, 12 heads: tp stays below, the rest goes elsewhere, and the user is told."""
    found = suggest(SMALL_12, 16, CPU, global_batch_size=16)
    assert found.plans[0].plan.mesh.world_size == 16
    assert all(ranked.plan.mesh.tp <= 12 for ranked in found.plans)
    assert any("12 heads do not divide over 16 workers: fewer heads than workers" in note for note in found.notes)
    assert any(r.reason == "tp above the 12 attention heads" and r.count >= 1 for r in found.rejected)


def test_heads_that_do_not_divide():
    found = suggest(SMALL_12, 8, CPU, global_batch_size=16, fixed={"tp": 8})
    assert found.plans[0].plan.parts.heads == (2, 2, 2, 2, 1, 1, 1, 1)
    assert any("12 heads do not divide over 8 workers: uneven shares are costed" in note for note in found.notes)


@pytest.mark.parametrize(("tp", "expected"), [(1, False), (2, True)])
def test_the_fastest_plans_signatures_are_assigned(tp, expected):
    found = suggest(SMALL, 2, CPU, global_batch_size=4, fixed={"tp": tp})
    assert (found.assignment is not None) == expected
    if found.assignment is not None:
        assert found.assignment.seconds <= found.assignment.usual_seconds * (1 + 1e-9)


def test_a_cheaper_assignment_competes():
    """Where messages cost far more than small products, computing everything everywhere wins and is suggested."""
    slow = msgspec.structs.replace(CPU, link_in_host=msgspec.structs.replace(CPU.link_in_host, latency_seconds=0.1))
    found = suggest(BERT, 2, slow, global_batch_size=4, fixed={"tp": 2})
    assert not found.assignment.is_usual
    best = found.plans[0].plan
    assert {role: names["tp"] for role, names in best.layouts.items()} == found.assignment.signatures


@pytest.mark.parametrize(("layers", "stages"), [(12, 4), (10, 4), (7, 3), (24, 8)])
@pytest.mark.parametrize(("first", "last"), [(0.0, 0.0), (0.3, 0.8), (0.1, 2.5)])
def test_layers_are_balanced_as_well_as_can_be(layers, stages, first, last):
    """Against every way to place them."""

    def slowest(counts):
        return max(c + (first if i == 0 else 0) + (last if i == stages - 1 else 0) for i, c in enumerate(counts))

    def ways(left, parts):
        if parts == 1:
            yield (left,)
            return
        for head in range(1, left - parts + 2):
            yield from ((head, *rest) for rest in ways(left - head, parts - 1))

    counts = balance(layers, stages, 1.0, first, last)
    assert sum(counts) == layers
    assert min(counts) >= 1
    if layers <= 12:
        assert slowest(counts) == pytest.approx(min(map(slowest, ways(layers, stages))))


def test_an_impossible_fixed_choice_is_named():
    with pytest.raises(PlanError, match="tp above the 4 attention heads"):
        suggest(SMALL, 8, CPU, global_batch_size=8, fixed={"tp": 8})
    with pytest.raises(PlanError, match=r"no placement on 8 workers has the fixed choices .*; free one of them"):
        suggest(SMALL, 8, CPU, global_batch_size=8, fixed={"tp": 3})
