"""Every layout trains the model that one rank trains: through the in-process communicator, in float64 to 1e-12."""

from collections import Counter

import msgspec
import numpy as np
import pytest
from equivalence_plans import describe, model, plan, plans, run_check, train
from hypothesis import HealthCheck, assume, given, note, settings

from executor import kernels
from planner.cost.memory import peak_memory
from planner.plan import ScheduleRecipe


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(plans())
def test_any_layout_equals_one_rank(candidate):
    assume(candidate is not None)
    note(describe(candidate))
    report = run_check(candidate)
    assert report.passed, f"{report.largest} in {describe(candidate)}"


def test_check_in_float32():
    candidate = plan(model("gpt"), dp=2, tp=2, pp=2, sequence_parallel=True, zero_stage=1)
    report = run_check(candidate, "float32")
    assert report.passed and report.limit == 1e-5
    # Single precision really was used: double would be closer by many digits.
    assert report.largest.difference > 1e-9


def test_forward_only_plans_give_the_same_loss():
    candidate = plan(model("gpt"), dp=2, tp=2, pp=2, forward_only=True, training={"dropout": 0.1})
    report = run_check(candidate)
    assert report.passed and {d.quantity for d in report.differences} == {"loss"}


@pytest.mark.parametrize(
    ("kernel", "argument", "quantity"),
    [("dropout_residual_backward", 5, "gradient"), ("adamw", 0, "update")],
)
def test_check_finds_one_wrong_element(monkeypatch, kernel, argument, quantity):
    """One element that is off by a millionth, once: the first call of a kernel is the distributed run's."""
    right, calls = getattr(kernels, kernel), Counter()

    def wrong(*arguments, **more):
        right(*arguments, **more)
        calls[kernel] += 1
        if calls[kernel] == 1:
            arguments[argument].reshape(-1)[0] += 1e-6

    monkeypatch.setattr(kernels, kernel, wrong)
    report = run_check(plan(model("gpt", tie_embeddings=False), pp=2, training={"clip_norm": None}))
    assert not report.passed
    assert report.largest.quantity == quantity, report.largest


# ---- bit for bit -----------------------------------------------------------------------------------------------------


def assert_bitwise_equal(first, second):
    """Losses, gradients and parameters of two runs are the same bits."""
    assert first.losses == second.losses
    for ours, theirs in zip(first.state, second.state, strict=True):
        assert ours.tensors.keys() == theirs.tensors.keys()
        for name, tensor in ours.tensors.items():
            assert np.array_equal(tensor, theirs.tensors[name]), name
        assert not any(ours.disagreement.values()), "copies on several ranks are the same bits"


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("axes", [{"dp": 2}, {"cp": 2, "tp": 2, "sequence_parallel": True}])
def test_zero_is_bitwise_plain_data_parallel(stage, axes):
    """With two replicas and one micro-batch each there is one order of summation."""
    plain = plan(model("gpt"), batch=4, micro=4, training={"clip_norm": None}, **axes)
    assert_bitwise_equal(train(plain, 3), train(msgspec.structs.replace(plain, zero_stage=stage), 3))


@pytest.mark.parametrize("recompute", ["selective", "full"])
@pytest.mark.parametrize("attention", ["plain", "blocked"])
def test_recomputation_changes_no_bit(recompute, attention):
    plain = plan(model("qwen3"), dp=1, tp=2, pp=2, attention=attention, sequence_parallel=True)
    assert_bitwise_equal(train(plain, 2), train(msgspec.structs.replace(plain, recompute=recompute), 2))


def test_a_plan_runs_the_same_twice():
    candidate = plan(model("bert"), dp=2, cp=2, tp=2, cp_kind="ring", zero_stage=2, batch=5)
    assert_bitwise_equal(train(candidate, 2), train(candidate, 2))


@pytest.mark.parametrize("overlap", [False, True])
def test_overlap_and_synchronous_sends_change_no_bit(overlap):
    candidate = plan(model("bert"), pp=2, dp=2, batch=8)
    changed = msgspec.structs.replace(candidate, overlap_gradients=overlap)
    assert_bitwise_equal(train(candidate, 2), train(changed, 2, synchronous_sends=True))


@pytest.mark.parametrize("name", ["gpipe", "1f1b", "zb-h1", "zb-h2", "zb-1p"])
def test_pipeline_is_bitwise_the_sequential_run(name):
    """Every schedule here adds the weight gradients of micro-batches in the order of their numbers, as one rank does.

    A receive buffer reused while a layer still holds it trains later stages wrongly by little; this finds it.
    """
    spec = model("bert", tie_embeddings=False)
    pipelined = plan(spec, pp=4, batch=9, schedule=name, training={"clip_norm": None})
    alone = plan(spec, batch=9, training={"clip_norm": None})
    assert_bitwise_equal(train(pipelined, 2, synchronous_sends=True), train(alone, 2))


# ---- what is counted -------------------------------------------------------------------------------------------------

COUNTED = [
    plan(model("gpt"), dp=3, tp=2, batch=7, sequence_parallel=True),
    plan(model("llama"), pp=2, cp=2, tp=2, cp_kind="ring"),
    plan(model("llama", kv_heads=1), tp=4, pp=2, sequence_parallel=True, recompute="full"),
    plan(model("bert", seq_len=11), cp=3, dp=2, zero_stage=1),
    plan(model("gpt"), cp=2, dp=2, cp_kind="ulysses", zero_stage=2),
    plan(model("gpt", seq_len=11), cp=2, tp=2, dp=2, zero_stage=3, sequence_parallel=True),
    plan(model("bert"), pp=2, dp=2, tp=2, overlap_gradients=True, batch=7),
    plan(model("bert"), pp=2, dp=2, schedule="interleaved", chunks=2, zero_stage=2, batch=7),
]


@pytest.mark.parametrize("candidate", COUNTED, ids=describe)
def test_counted_bytes_are_the_programs_bytes(candidate):
    """Payload handed to MPI equals the bytes that the planner prices, per rank and key."""
    run = train(candidate)
    for program, tallies in zip(run.programs, run.tallies, strict=True):
        predicted, counted = Counter(), Counter()
        for step in program.steps:
            for task in step.tasks:
                silent = task.kind in ("slice", "receive", "post_receive", "handoff")
                if task.axis and not silent:
                    predicted[task.key] += int(task.work.bytes)
        for (_, _, key), tally in tallies.items():
            counted[key] += tally.payload_bytes
        assert {k: v for k, v in counted.items() if v} == {k: v for k, v in predicted.items() if v}, program.at


@pytest.mark.parametrize("candidate", COUNTED, ids=describe)
def test_counted_peak_is_near_the_planners(candidate):
    run = train(candidate, 2)
    for program, peak in zip(run.programs, run.peaks, strict=True):
        predicted = peak_memory(program).total_bytes
        assert peak == pytest.approx(predicted, rel=0.03), (program.at, peak / predicted)


# ---- training --------------------------------------------------------------------------------------------------------


def byte_model(**changes):
    """A small masked-language model of bytes."""
    return model("bert", vocab=260, **({"layers": 2, "ffn_hidden": 32, "seq_len": 16} | changes))


def test_loss_curves_of_layouts_agree_over_200_steps_and_fall():
    """On the default text, dropout on; 200 steps of so small a model take the loss from ln 260 to that of letters."""
    training = {"clip_norm": None, "learning_rate": 1e-2}
    layouts = [{}, {"dp": 2}, {"tp": 2}, {"pp": 2}]
    curves = [
        train(plan(byte_model(), batch=6, micro=3, training=training, **axes), 200, data=None).losses
        for axes in layouts
    ]
    for curve in curves[1:]:
        np.testing.assert_allclose(curve, curves[0], rtol=1e-9)
    assert curves[0][0] == pytest.approx(np.log(260), abs=0.1)
    assert np.mean(curves[0][-20:]) < 0.65 * curves[0][0]


def test_learning_rate_schedule_and_clipping_are_the_same_in_every_layout():
    training = {"clip_norm": 0.2, "learning_rate_schedule": "cosine", "warmup_steps": 3, "total_steps": 8}
    spec = model("llama")
    alone = train(plan(spec, training=training), 8)
    spread = train(plan(spec, dp=2, tp=2, pp=2, zero_stage=3, training=training), 8)
    np.testing.assert_allclose(spread.losses, alone.losses, rtol=1e-11)


def test_custom_schedule_from_explicit_instructions():
    """A plan may carry its instructions: here GPipe with the backwards in reverse order of the forwards."""
    rows = ("0F0,0F1,0F2,0B2,0B1,0B0", "1F0,1F1,1F2,1B2,1B1,1B0")
    candidate = plan(model("gpt"), pp=2)
    recipe = ScheduleRecipe(name="custom", programs=rows)
    report = run_check(msgspec.structs.replace(candidate, schedule=recipe))
    assert report.passed, report.largest
