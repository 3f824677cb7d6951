"""Mixed precision: 16-bit work on float32 masters, in every layout, with the bytes that the planner counts."""

import importlib.util
from collections import Counter

import msgspec
import numpy as np
import pytest
from equivalence_plans import describe, model, plan, plans, run_check, train
from hypothesis import HealthCheck, assume, given, note, settings
from hypothesis import strategies as st

from executor import kernels, optim, runtime
from executor.check import LIMITS, reference_plan
from executor.comm.loopback import run_loopback
from executor.data import Batches
from executor.precision import Precision
from executor.runtime import Runtime
from executor.session import hash_replicas
from planner.cost.memory import peak_memory
from planner.errors import PlanError
from planner.program import lower
from planner.program.rank import ITEM_BYTES, reduced_item_bytes
from planner.program.update import state_bytes, working_bytes

NARROW = ("bfloat16", "float16", "tf32")


def mixed(kind="gpt", precision="bfloat16", training=None, **choices):
    return plan(model(kind), training={"precision": precision} | (training or {}), **choices)


# ---- types -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transport", ["host", "staged", "cuda-aware", "nccl"])
@pytest.mark.parametrize("name", ["float64", "float32", *NARROW])
def test_types_have_the_sizes_that_the_planner_counts(name, transport):
    candidate = msgspec.structs.replace(mixed(precision=name), transport=transport)
    types = Precision.of(candidate, on_host=transport == "host")
    assert types.storage.itemsize == ITEM_BYTES[name] == working_bytes(candidate.training)
    assert types.master.itemsize == state_bytes(candidate)
    assert types.reduced.itemsize == reduced_item_bytes(name, transport)
    assert Precision.of(candidate).reduced.itemsize >= 4, "CPU ranks have MPI whatever the plan says"
    assert types.of_buffer("statistics") == types.master and types.of_buffer("compute") == types.storage


def test_mpi_sums_in_float32_and_nccl_in_16_bits():
    assert [reduced_item_bytes("bfloat16", t) for t in ("host", "staged", "cuda-aware", "nccl")] == [4, 4, 4, 2]


def test_fp8_is_for_the_planner_only():
    with pytest.raises(PlanError, match=r"fp8 is for predictions only.*--precision bfloat16"):
        Precision.of(mixed(precision="fp8"))


def test_bfloat16_without_its_package_is_one_message(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(PlanError, match=r"bfloat16 needs the package ml_dtypes.*install meshwright's mpi extra"):
        Precision.of(mixed())
    assert Precision.of(mixed(precision="float16")).mixed


# ---- every layout equals one rank ------------------------------------------------------------------------------------

LAYOUTS = [
    mixed("bert", dp=2), mixed(dp=2, zero_stage=1), mixed("bert", dp=3, zero_stage=2, micro=1),
    mixed("llama", dp=2, zero_stage=3, recompute="full"), mixed(tp=2, sequence_parallel=True, recompute="selective"),
    mixed("llama", tp=3, pp=2), mixed("bert", pp=2, schedule="zb-h1"), mixed("gpt", cp=2, cp_kind="ring"),
    mixed("bert", cp=2, cp_kind="ulysses"), mixed("qwen3", tp=2, cp=2, cp_kind="ring", sequence_parallel=True),
    mixed("modernbert", dp=2, pp=2, schedule="v-half", chunks=2, batch=9),
    mixed(pp=2, dp=2, tp=2, zero_stage=2, overlap_gradients=True, attention="blocked"),
    mixed("llama", cp=2, dp=2, zero_stage=3, attention="blocked"),
    mixed("bert", dp=2, training={"optimizer": "sgd", "learning_rate": 0.1}),
]  # fmt: skip


@pytest.mark.parametrize("candidate", LAYOUTS, ids=describe)
def test_bfloat16_in_every_layout_equals_one_rank_in_float32(candidate):
    report = run_check(candidate, "bfloat16")
    assert report.passed and report.limit == 2e-2, report.largest
    exact = [one for one in report.differences if one.quantity in ("update", "copies")]
    assert exact and all(one.limit == 1e-5 and one.difference <= 1e-5 for one in exact)
    gradients = [one.difference for one in report.differences if one.quantity == "gradient"]
    assert max(gradients) > 1e-4, "16 bits really were used: float32 would be closer"


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(plans(), st.sampled_from(["float16", "tf32"]))
def test_any_layout_in_float16_and_tf32_equals_one_rank_in_float32(candidate, precision):
    """ReLU is left out: rounding takes an element across its kink now and then, and the gradient jumps with it."""
    assume(candidate is not None and candidate.model.activation != "relu")
    note(describe(candidate))
    report = run_check(candidate, precision)
    assert report.passed, f"{report.largest} in {describe(candidate)}"


def test_forward_only_plans_keep_16_bits_alone():
    candidate = mixed(dp=2, tp=2, pp=2, forward_only=True)
    assert run_check(candidate, "bfloat16").passed


def test_the_reference_of_a_narrow_precision_is_float32():
    for name, wanted in (("bfloat16", "float32"), ("tf32", "float32"), ("float32", "float32"), ("float64", "float64")):
        assert reference_plan(mixed(precision=name)).training.precision == wanted


@pytest.mark.parametrize("precision", NARROW)
def test_check_finds_an_error_twice_its_limit(monkeypatch, precision):
    """The derivative of a feed-forward block that is off by twice the limit, on all ranks and micro-batches alike."""
    right = kernels.activation_backward

    def wrong(dy, derivative, dx, dbias):
        derivative *= np.float32(1 + 2.5 * LIMITS[precision].difference)
        right(dy, derivative, dx, dbias)

    passed = run_check(mixed(dp=2), precision).passed
    monkeypatch.setattr(kernels, "activation_backward", wrong)
    # The reference runs the same kernel in the same process, so the fault is planted in low precision only.
    monkeypatch.setattr(runtime, "kernel_table", only_here(runtime.kernel_table, "activation_backward", right))
    report = run_check(mixed(dp=2), precision)
    assert passed and not report.passed
    assert report.largest.quantity == "gradient", report.largest


def only_here(table, name, right):
    """A table for float32 in which a kernel is the right one, whatever others get."""

    class Right:
        def __getattr__(self, attribute):
            return right if attribute == name else getattr(kernels, attribute)

    return lambda precision: table(precision) if precision.emulated else Right()


def test_check_finds_a_loss_scale_left_in(monkeypatch):
    """What comparing with one rank in float16 could not see: both would be 65536 times too large."""
    monkeypatch.setattr(optim.UnitState, "scale_gradient", lambda self, factor: None)
    report = run_check(mixed(training={"clip_norm": None}), "float16")
    assert not report.passed and report.largest.difference > 1e4


# ---- bit for bit -----------------------------------------------------------------------------------------------------


def assert_same_bits(first, second):
    assert first.losses == second.losses
    for ours, theirs in zip(first.state, second.state, strict=True):
        for name, tensor in ours.tensors.items():
            assert np.array_equal(tensor, theirs.tensors[name]), name
        assert not any(ours.disagreement.values())


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("axes", [{"dp": 2}, {"cp": 2, "tp": 2, "sequence_parallel": True}])
def test_zero_is_bitwise_plain_data_parallel(stage, axes, precision):
    """Masters updated in shards and gathered in 16 bits train as masters that every rank has."""
    plain = mixed(precision=precision, batch=4, micro=4, training={"clip_norm": None}, **axes)
    assert_same_bits(train(plain, 3), train(msgspec.structs.replace(plain, zero_stage=stage), 3))


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputation_changes_no_bit(recompute):
    plain = mixed("qwen3", tp=2, pp=2, sequence_parallel=True)
    assert_same_bits(train(plain, 2), train(msgspec.structs.replace(plain, recompute=recompute), 2))


def test_a_pipeline_is_bitwise_the_sequential_run():
    spec, training = model("bert", tie_embeddings=False), {"clip_norm": None, "precision": "bfloat16"}
    pipelined = plan(spec, pp=4, batch=9, schedule="zb-h1", training=training)
    assert_same_bits(train(pipelined, 2, synchronous_sends=True), train(plan(spec, batch=9, training=training), 2))


# ---- master weights --------------------------------------------------------------------------------------------------


def parameters_of(candidate, steps):
    """Every rank's (working, master, owned range) by unit after some steps, replicas compared on the way."""

    def main(comm):
        batches = Batches("synthetic", candidate.model, candidate.global_batch_size, candidate.training.seed)
        rank = Runtime(candidate, comm, batches)
        for step in range(steps):
            rank.run_step(step)
            hash_replicas(rank)
        return [(unit.whole, unit.shard, unit.range) for unit in rank.units.values()]

    return run_loopback(candidate.mesh.world_size, main)


@pytest.mark.parametrize("choices", [{}, {"dp": 2}, {"dp": 2, "zero_stage": 1}, {"dp": 2, "tp": 2, "zero_stage": 2}])
def test_the_working_copy_is_the_rounded_master(choices):
    for units in parameters_of(mixed(**choices), 3):
        for working, master, owned in units:
            assert master.dtype == np.float32 and working.dtype.itemsize == 2
            np.testing.assert_array_equal(working[slice(*owned)], master.astype(working.dtype))
            assert (master != master.astype(working.dtype)).mean() > 0.9, "masters keep more than 16 bits"


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_updates_below_half_a_unit_of_16_bits_are_not_lost(precision):
    """Gains start at 1, where the spacing below is 2^-8 in bfloat16 and 2^-11 in float16; steps are a tenth of it.

    Each alone rounds back to 1, so a working copy that was updated itself would never move.
    """
    half_spacing = 2.0 ** -{"bfloat16": 9, "float16": 12}[precision]
    training = {"learning_rate": half_spacing / 10, "clip_norm": None, "weight_decay": 0.0}
    found = {}
    for name in (precision, "float32"):
        state = train(mixed("llama", precision=name, training=training, batch=4), 30).state
        gains = {key: value for key, value in state.parameters.tensors.items() if key.endswith("gain")}
        found[name] = np.concatenate([gains[key].ravel() for key in sorted(gains)]) - 1
    assert np.abs(found[precision]).max() > 1.5 * half_spacing, "thirty small steps add up"
    moved = np.linalg.norm(found["float32"])
    assert np.linalg.norm(found[precision] - found["float32"]) < 0.2 * moved
    assert np.abs(found[precision]).min() < half_spacing  # some went to and fro: not mere drift


# ---- training --------------------------------------------------------------------------------------------------------


def test_80_steps_follow_the_float32_loss_curve():
    """A small masked-language model of bytes, on text, in 16 bits and several layouts: 0.2% of the loss at most."""
    spec = model("bert", vocab=260, layers=2, ffn_hidden=32, seq_len=16)
    training = {"clip_norm": None, "learning_rate": 1e-2}

    def curve(precision, **axes):
        candidate = plan(spec, batch=6, micro=3, training=training | {"precision": precision}, **axes)
        return np.array(train(candidate, 80, data=None).losses)

    wanted = curve("float32")
    assert wanted[-20:].mean() < 0.65 * wanted[0]
    for precision, axes, limit in (
        ("bfloat16", {}, 5e-3), ("bfloat16", {"dp": 2, "zero_stage": 2, "tp": 2}, 5e-3), ("float16", {"pp": 2}, 1e-3),
        ("tf32", {}, 1e-3),
    ):  # fmt: skip
        found = curve(precision, **axes)
        np.testing.assert_allclose(found, wanted, rtol=limit, err_msg=f"{precision} {axes}")
        assert not np.array_equal(found, wanted)


# ---- bytes -----------------------------------------------------------------------------------------------------------

COUNTED = [
    mixed(dp=3, tp=2, batch=7, sequence_parallel=True), mixed("llama", pp=2, cp=2, tp=2, cp_kind="ring"),
    mixed("bert", cp=3, dp=2, zero_stage=1), mixed(cp=2, dp=2, cp_kind="ulysses", zero_stage=2),
    mixed(cp=2, tp=2, dp=2, zero_stage=3, sequence_parallel=True), mixed("bert", pp=2, dp=2, tp=2, batch=7),
    mixed("bert", precision="float16", pp=2, dp=2, tp=2, zero_stage=1),
    mixed("llama", precision="tf32", tp=2, recompute="full"),
]  # fmt: skip


@pytest.mark.parametrize("candidate", COUNTED, ids=describe)
def test_counted_bytes_and_peaks_are_the_programs(candidate):
    """Payloads handed to MPI, per rank and key, and the arena's peak, to the byte."""
    run = train(candidate)
    for program, tallies, peak in zip(run.programs, run.tallies, run.peaks, strict=True):
        predicted, counted = Counter(), Counter()
        for step in program.steps:
            for task in step.tasks:
                if task.axis and task.kind not in ("slice", "receive", "post_receive", "handoff"):
                    predicted[task.key] += int(task.work.bytes)
        for (_, _, key), tally in tallies.items():
            counted[key] += tally.payload_bytes
        assert {k: v for k, v in counted.items() if v} == {k: v for k, v in predicted.items() if v}, program.at
        assert peak == peak_memory(program).total_bytes, program.at
    wanted = "world.all_reduce.overflow.update"
    assert (wanted in counted) == (candidate.training.precision == "float16")


MEMORY = [
    {}, {"dp": 2}, {"tp": 4}, {"pp": 2}, {"cp": 2, "cp_kind": "ring"}, {"tp": 2, "sequence_parallel": True},
    {"recompute": "full"}, {"attention": "blocked"}, {"dp": 2, "zero_stage": 1}, {"dp": 2, "zero_stage": 2},
    {"dp": 2, "zero_stage": 3}, {"dp": 2, "pp": 2, "zero_stage": 3, "schedule": "zb-h2"},
    {"pp": 2, "schedule": "zb-v", "chunks": 2}, {"dp": 2, "pp": 2, "forward_only": True},
]  # fmt: skip


@pytest.mark.parametrize("choices", MEMORY, ids=str)
def test_the_predicted_peak_is_the_arenas(choices):
    run = train(mixed(batch=8, **choices), 2)
    assert run.peaks == [peak_memory(program).total_bytes for program in run.programs]


@pytest.mark.parametrize(("stage", "bytes_each"), [(0, 18), (1, 2 + 5 + 3), (2, 2 + 1 + 3), (3, 0 + 1 + 3)])
def test_state_by_zero_stage(stage, bytes_each):
    """Over four ranks: 2 bytes of working copy, 4 of gradient, 12 of master and moments.

    Rajbhandari et al. 2020 (arXiv:1910.02054), section 3.1, where gradients have 2 bytes; here they are float32. Stage
    1 reduces the whole gradient into a shard of its own; at stage 3 no working copy is kept: units are rounded from
    their masters when they are gathered.
    """
    spec = model("llama", hidden=32, head_dim=8, kv_heads=4, ffn_hidden=64, vocab=64)
    candidate = plan(spec, dp=4, batch=4, zero_stage=stage, training={"precision": "bfloat16"})
    batches = Batches("synthetic", spec, 4, 0)
    ranks = run_loopback(4, lambda comm: sum(Runtime(candidate, comm, batches).arena.live.values()))
    count = sum(unit.size for unit in lower(candidate, 0).units)
    assert ranks[0] == bytes_each * count
