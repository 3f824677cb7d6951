"""Predictions: closed forms of a pipeline, what may not change a prediction, and the two replays against each other."""

from collections import defaultdict
from importlib import import_module

import msgspec
import pytest
from hypothesis import given, settings
from small_plans import BERT, GPT, LLAMA, plan, plans

from planner.cost import fine
from planner.cost.fine import representatives
from planner.machine import load_machine
from planner.model import model_flops
from planner.predict import predict
from planner.trace import rank_classes

module = import_module("planner.predict")  # the package's attribute of that name is the function
CPU = load_machine("cpu-generic")


def without_overheads(machine):
    """A machine on which communication and everything around kernels is free."""
    overheads = msgspec.structs.replace(
        machine.overheads, dispatch_seconds=0.0, step_seconds=0.0, exchange_seconds=0.0, micro_batch_seconds=0.0,
        collective_dispatch_seconds=0.0,
    )  # fmt: skip
    links = {
        name: msgspec.structs.replace(
            getattr(machine, name), latency_seconds=1e-15, bandwidth_bytes_per_second=1e30, call_seconds=0.0,
            shared_bandwidth_bytes_per_second=None,
        )
        for name in ("link_in_host", "link_between_hosts")
    }  # fmt: skip
    host = msgspec.structs.replace(machine.host, cores=1024, devices=1024)
    return msgspec.structs.replace(machine, overheads=overheads, host=host, **links)


FREE = without_overheads(CPU)


def faster(machine, *, compute=1.0, network=1.0):
    """The machine with `compute` times its rates and `network` times its bandwidth (and shorter latencies)."""
    device = machine.device
    kernels = {
        name: msgspec.structs.replace(k, seconds_per_element=k.seconds_per_element / compute)
        for name, k in device.kernels.items()
    }
    device = msgspec.structs.replace(
        device,
        peak_flops_per_second={p: f * compute for p, f in device.peak_flops_per_second.items()},
        memory_regimes=tuple(
            msgspec.structs.replace(r, bandwidth_bytes_per_second=r.bandwidth_bytes_per_second * compute)
            for r in device.memory_regimes
        ),
        call_seconds=device.call_seconds / compute,
        kernels=kernels,
    )
    links = {}
    for name in ("link_in_host", "link_between_hosts"):
        link = getattr(machine, name)
        shared = link.shared_bandwidth_bytes_per_second
        links[name] = msgspec.structs.replace(
            link, bandwidth_bytes_per_second=link.bandwidth_bytes_per_second * network,
            shared_bandwidth_bytes_per_second=shared and shared * network,
        )  # fmt: skip
    host = msgspec.structs.replace(
        machine.host, memory_bandwidth_bytes_per_second=machine.host.memory_bandwidth_bytes_per_second * compute
    )
    return msgspec.structs.replace(machine, device=device, host=host, **links)


# ---- closed forms ----------------------------------------------------------------------------------------------------


# Thick layers make the embedding and the head negligible; untied, so that no sum joins the two ends.
THICK = msgspec.structs.replace(
    BERT, layers=8, hidden=256, heads=4, kv_heads=4, head_dim=64, ffn_hidden=4096, vocab=8, tie_embeddings=False,
    head_transform=False,
)  # fmt: skip


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
@pytest.mark.parametrize(("pp", "count"), [(2, 2), (2, 7), (4, 4), (4, 9), (8, 16)])
def test_the_bubble_of_equal_stages(schedule, pp, count):
    """(p-1)/(m+p-1) of all rank-seconds with free communication (Narayanan et al. 2021, §2.2), the update left out."""
    found = predict(plan(THICK, pp=pp, schedule=schedule, batch=count, training={"dropout": 0.0}), FREE)
    update = max(o.seconds[1] for key, o in found.operators.items() if key == "update.layer.adamw.update")
    idle = found.bubble_fraction * found.step_seconds
    assert idle / (found.step_seconds - update) == pytest.approx((pp - 1) / (count + pp - 1), rel=0.03)


def test_a_step_of_one_rank_is_the_sum_of_its_work():
    found = predict(plan(batch=6, micro=2), CPU)
    assert sum(o.seconds[0] for o in found.operators.values()) == pytest.approx(found.rank_seconds[0], rel=1e-9)
    assert found.rank_seconds[0] + CPU.overheads.step_seconds == pytest.approx(found.step_seconds, rel=1e-9)
    assert found.bubble_fraction == 0
    assert found.exposed_communication_seconds == 0


def test_figures_follow_from_the_step():
    candidate = plan(dp=2, tp=2, batch=8)
    found = predict(candidate, CPU)
    peak = CPU.peak_flops_per_second("float32")
    assert found.tokens_per_second == pytest.approx(8 * BERT.seq_len / found.step_seconds)
    assert found.mfu == pytest.approx(model_flops(BERT) * 8 / (found.step_seconds * 4 * peak))
    assert found.low_seconds < found.step_seconds < found.high_seconds
    assert found.low_seconds * found.high_seconds == pytest.approx(found.step_seconds**2)
    assert found.plan_hash == candidate.hash
    assert len(found.peak_bytes) == len(found.rank_seconds) == 4


def test_forward_only_has_no_backward_and_less_memory():
    both, ahead = (predict(plan(THICK, pp=2, schedule="gpipe", forward_only=f), CPU) for f in (False, True))
    assert not [key for key in ahead.operators if "backward" in key or "optimizer" in key or "adamw" in key]
    assert ahead.step_seconds < both.step_seconds / 2
    assert max(ahead.peak_bytes) < max(both.peak_bytes) / 3


# ---- what may not change a prediction --------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(plans())
def test_more_bandwidth_never_slows(candidate):
    slow, fast = predict(candidate, CPU), predict(candidate, faster(CPU, network=4.0))
    assert fast.step_seconds <= slow.step_seconds * (1 + 1e-9)


@settings(max_examples=15, deadline=None)
@given(plans())
def test_twice_the_speed_halves_the_work(candidate):
    """With free communication every second scales; the order of events stays."""
    slow, fast = predict(candidate, FREE), predict(candidate, faster(FREE, compute=2.0))
    assert fast.step_seconds == pytest.approx(slow.step_seconds / 2, rel=1e-6)


@pytest.mark.parametrize(
    "choices",
    [
        {"cp_kind": "ring"},
        {"cp_kind": "ulysses"},
        {"overlap_gradients": True},
        {"schedule": "gpipe"},
    ],
    ids=str,
)
def test_what_concerns_an_axis_of_one_rank_changes_nothing(choices):
    base, same = predict(plan(batch=4), CPU), predict(plan(batch=4, **choices), CPU)
    if "schedule" in choices:  # holds more micro-batches, takes as long
        assert same.step_seconds == pytest.approx(base.step_seconds, rel=1e-12)
        return
    assert same.step_seconds == base.step_seconds
    assert same.peak_bytes == base.peak_bytes
    assert same.operators == base.operators


def test_interleaving_shortens_the_bubble():
    """(p-1)/(v·m): half the bubble with two chunks."""
    one = predict(plan(THICK, pp=4, batch=8), FREE)
    two = predict(plan(THICK, pp=4, batch=8, schedule="interleaved", chunks=2), FREE)
    idle = [found.bubble_fraction * found.step_seconds for found in (one, two)]
    assert idle[1] == pytest.approx(idle[0] / 2, rel=0.1)


# ---- the two replays, and the representatives ------------------------------------------------------------------------

COARSE = [
    {}, {"pp": 2}, {"pp": 4, "batch": 12}, {"pp": 2, "dp": 2}, {"pp": 2, "tp": 2, "sequence_parallel": True}, {"cp": 2},
    {"pp": 2, "schedule": "gpipe"}, {"pp": 2, "schedule": "interleaved", "chunks": 2}, {"pp": 2, "schedule": "zb-h1"},
    {"pp": 2, "schedule": "zb-v", "chunks": 2}, {"dp": 2, "zero_stage": 1}, {"dp": 2, "zero_stage": 2},
    {"dp": 2, "pp": 2, "zero_stage": 3}, {"pp": 2, "recompute": "full"},
    {"spec": GPT, "cp": 2, "cp_kind": "ring", "pp": 2},
    {"spec": LLAMA, "tp": 2, "pp": 2, "dp": 2}, {"pp": 2, "micro": 3},
]  # fmt: skip


@pytest.mark.parametrize("choices", COARSE, ids=str)
def test_the_coarse_replay_is_the_fine_one(choices, monkeypatch):
    candidate = plan(**choices)
    fine = predict(candidate, CPU)
    monkeypatch.setattr(module, "FINE_TASKS", 0)
    coarse = predict(candidate, CPU)
    assert coarse.step_seconds == pytest.approx(fine.step_seconds, rel=1e-9)
    assert coarse.peak_bytes == fine.peak_bytes
    assert coarse.bubble_fraction == pytest.approx(fine.bubble_fraction, abs=0.01)


REPRESENTED = [
    {"dp": 4}, {"dp": 3, "batch": 8}, {"tp": 4}, {"tp": 3, "dp": 2}, {"cp": 4},
    {"cp": 3, "tp": 2, "sequence_parallel": True},
    {"pp": 2, "dp": 3, "batch": 7}, {"spec": LLAMA, "tp": 4}, {"spec": LLAMA, "tp": 5, "dp": 2}, {"spec": GPT, "cp": 3},
    {"dp": 2, "cp": 2, "zero_stage": 3}, {"pp": 2, "tp": 2, "dp": 2, "schedule": "zb-h1"},
    {"spec": GPT, "cp": 3, "cp_kind": "ulysses", "tp": 2}, {"dp": 4, "overlap_gradients": True},
]  # fmt: skip


@pytest.mark.parametrize("choices", REPRESENTED, ids=str)
def test_representatives_stand_for_the_whole_mesh(choices, monkeypatch):
    candidate = plan(**choices)
    world = candidate.mesh.world_size
    assert len(representatives(candidate)) < world
    whole = predict(candidate, msgspec.structs.replace(CPU, relative_speeds=(1.0,) * world))  # every rank for itself
    copied = predict(candidate, CPU)
    close = {"rel": 1e-6, "abs": 1e-8}  # shards of a sharded optimizer may differ by one element
    assert copied.step_seconds == pytest.approx(whole.step_seconds, **close)
    assert copied.rank_seconds == pytest.approx(whole.rank_seconds, **close)
    assert copied.bubble_fraction == pytest.approx(whole.bubble_fraction, abs=1e-6)
    assert copied.exposed_communication_seconds == pytest.approx(whole.exposed_communication_seconds, **close)
    assert copied.peak_bytes == whole.peak_bytes
    assert copied.operators.keys() == whole.operators.keys()
    assert _work(copied) == pytest.approx(_work(whole), **close)
    monkeypatch.setattr(fine, "WHOLE_MESH_RANKS", 0)
    few = predict(candidate, CPU)
    assert few.step_seconds == pytest.approx(copied.step_seconds, rel=1e-9)
    assert few.peak_bytes == copied.peak_bytes
    assert few.rank_seconds == pytest.approx(copied.rank_seconds, rel=1e-9)


def _work(prediction):
    """Seconds of work in the trace by rank and key."""
    found = defaultdict(float)
    for span in prediction.spans():
        if span.kind == "work":
            found[span.rank, span.key] += span.seconds
    return {key: seconds for key, seconds in found.items() if seconds > 1e-7}


@settings(max_examples=40, deadline=None)
@given(plans())
def test_every_class_of_ranks_has_a_representative(candidate):
    classes = rank_classes(candidate)
    assert sorted(rank for members in classes for rank in members) == list(range(candidate.mesh.world_size))
    kept = {candidate.mesh.rank(at) for at in representatives(candidate)}
    for members in classes:
        assert kept & set(members), f"no representative among {members}"


def test_a_large_mesh_costs_what_its_classes_cost():
    spec = msgspec.structs.replace(BERT, layers=16)
    candidate = plan(spec, pp=8, dp=256, tp=6, batch=2048, micro=1)
    found = predict(candidate, CPU)
    assert found.step_seconds > 0
    assert len(found.peak_bytes) == 8 * 256 * 6
    assert len(representatives(candidate)) == 8 * 2, "50 words over 6 ranks make two sizes"
