"""What a framework overlaps, keeps or computes again: each figure changes the tasks that it names, by its formula."""

from pathlib import Path

import numpy as np
import pytest

from planner.cost.bulk import Bulk
from planner.cost.framework import done_fraction
from planner.cost.memory import peak_memory, pipeline_peaks
from planner.cost.price import Place, compute_seconds, group_seconds
from planner.cost.skeleton import Skeleton, unit_seconds
from planner.errors import MachineError
from planner.machine import load_machine, machine_names
from planner.mesh import Coordinate, Mesh
from planner.model.presets import PRESETS
from planner.plan import Training, make_plan
from planner.program import Task, Work, lower
from planner.published.rows import read_published
from planner.published.validate import Predictor

PUBLISHED = Path(__file__).parents[1] / "data" / "published"
H100 = load_machine("h100-80gb")
LINEAR = Work(m=8192, n=4096, k=2048)


def with_framework(**figures):
    return H100.with_figures({f"framework.{name}": value for name, value in figures.items()})


def task(kind, key="0.layer.qkv.recompute", **work):
    axis = "tp" if kind in ("all_gather", "reduce_scatter") else None
    return Task(key, kind, "", axis=axis, work=Work(**work) if work else LINEAR)


def test_a_policy_that_saves_outputs_computes_a_share_of_them_again():
    machine = with_framework(recomputed_fraction={"linear": 0.5, "attention": 0.0})
    whole = compute_seconds(H100, task("linear.forward"), "bfloat16")
    assert compute_seconds(machine, task("linear.forward"), "bfloat16") == pytest.approx(0.5 * whole)
    forward = task("linear.forward", "0.layer.qkv.forward")
    assert compute_seconds(machine, forward, "bfloat16") == whole
    assert done_fraction(machine, task("attention_blocked.forward")) == 0
    assert done_fraction(machine, task("norm.forward")) == 1
    early = with_framework(recompute_stops_early=True)
    assert compute_seconds(early, task("linear.forward", "0.layer.ffn_out.recompute"), "bfloat16") == 0
    assert compute_seconds(early, task("linear.forward"), "bfloat16") == whole


def test_asynchronous_tensor_parallelism_hides_its_share_of_gathers_and_scatters_only():
    machine, place = with_framework(hidden_tp_fraction=0.6), Place(8, 8, 1)
    for kind in ("all_gather", "reduce_scatter", "all_reduce"):
        plain = group_seconds(H100, Task("", kind, "", axis="tp", work=Work(full_bytes=1e8)), place)
        other = group_seconds(machine, Task("", kind, "", axis="tp", work=Work(full_bytes=1e8)), place)
        along_cp = group_seconds(machine, Task("", kind, "", axis="cp", work=Work(full_bytes=1e8)), place)
        assert other == pytest.approx(plain if kind == "all_reduce" else 0.4 * plain)
        assert along_cp == plain


def test_the_gather_of_updated_parameters_hides_its_share():
    machine, place = with_framework(hidden_parameter_gather=0.75), Place(16, 1, 8)
    gather = Task("", "parameter_all_gather", "", axis="data", work=Work(full_bytes=1e9))
    assert group_seconds(machine, gather, place) == pytest.approx(0.25 * group_seconds(H100, gather, place))


def test_fp8_products_cast_their_activations_once():
    """Forward casts the input, backward the output's gradient; the weight gradient finds both."""
    slow = H100.with_figures({"device.kernels.cast.bandwidth_fraction": 0.3})
    bandwidth = H100.device.memory_bandwidth_bytes_per_second
    expected = 4.0 * LINEAR.m * LINEAR.k / bandwidth * (1 / 0.3 - 1 / 0.6)
    for way, share in (("forward", 1), ("backward_input", 1), ("backward_weight", 0)):
        kind = task(f"linear.{way}", f"0.layer.qkv.{way}")
        more = compute_seconds(slow, kind, "fp8") - compute_seconds(H100, kind, "fp8")
        assert more == pytest.approx(share * expected, rel=1e-9, abs=1e-15)


def fp8_plan(**choices):
    mesh = choices.pop("mesh", Mesh(pp=2, dp=2, tp=2))
    defaults = {"global_batch_size": 8, "micro_batch_size": 1, "attention": "blocked", "recompute": "full"}
    defaults |= {"sequence_parallel": mesh.tp > 1, "training": Training(precision="fp8")}
    return make_plan(PRESETS["llama3-8b"].spec, mesh, **(defaults | choices))


def test_placeholder_gradients_take_one_tensor_per_distinct_weight():
    plan = fp8_plan()
    program = lower(plan, 0)
    plain, held = (peak_memory(program, with_framework(placeholder_gradients=on).framework) for on in (False, True))
    model, tp = plan.model, plan.mesh.tp
    qkv = (model.heads + 2 * model.kv_heads) * model.head_dim
    elements = model.hidden * (qkv + model.heads * model.head_dim + 3 * model.ffn_hidden) // tp
    assert held.total_bytes - plain.total_bytes == 2 * elements
    last = lower(plan, plan.mesh.rank(Coordinate(1, 0, 0, 0)))
    plain, held = (peak_memory(last, with_framework(placeholder_gradients=on).framework) for on in (False, True))
    assert 2 * elements <= held.total_bytes - plain.total_bytes <= 2 * (elements + model.vocab * model.hidden // tp)


@pytest.mark.parametrize("choices", [{}, {"mesh": Mesh(dp=2, tp=2), "zero_stage": 3}, {"mesh": Mesh(pp=4)}], ids=str)
def test_outputs_kept_under_recomputation_are_held_until_then(choices):
    plan = fp8_plan(**choices)
    machine = with_framework(recomputed_fraction={"linear": 0.5, "attention": 0.0}, placeholder_gradients=True)
    skeleton = Skeleton.of(plan, machine)
    peaks = pipeline_peaks(skeleton, machine.framework)
    for stage, peak in enumerate(peaks):
        program = lower(plan, plan.mesh.rank(Coordinate(stage, 0, 0, 0)))
        assert peak == peak_memory(program, machine.framework)
    without = pipeline_peaks(skeleton, with_framework(placeholder_gradients=True).framework)
    model, mesh = plan.model, plan.mesh
    qkv = (model.heads + 2 * model.kv_heads) * model.head_dim
    per_token = 0.5 * (qkv / mesh.tp + 2 * model.ffn_hidden / mesh.tp) + model.heads * model.head_dim / mesh.tp
    in_flight = min(mesh.pp, len(plan.micro_batches(0)))
    least = per_token * model.seq_len * plan.stage_layers[0] * in_flight * 0.9
    assert peaks[0].total_bytes - without[0].total_bytes > least  # fp8 activations take a byte each


def test_variants_replace_the_figures_that_they_name():
    machine = load_machine("torchtitan-h100-96gb")
    other = machine.variant(["async-tp", "unheard-of"])
    assert other.framework.hidden_tp_fraction == machine.figure("variants.async-tp.framework.hidden_tp_fraction") > 0
    assert other.device == machine.device
    assert machine.variant(["unheard-of"]) is machine
    with pytest.raises(MachineError, match="changed figures"):
        machine.with_figures({"variants": {"typo": {"framework": {"hidden": 1.0}}}}).variant(["typo"])


@pytest.mark.parametrize("name", machine_names())
def test_every_variant_of_a_shipped_profile_is_a_machine(name):
    machine = load_machine(name)
    for variant in machine.variants:
        assert machine.variant([variant]) != machine


def test_notes_name_the_variants_and_change_the_prediction():
    rows = {row.row: row for row in read_published(PUBLISHED / "torchtitan_llama3.csv")[0]}
    assert rows["1"].variants == ("selective",)
    assert rows["7"].variants == ("eager", "selective")
    assert rows["20"].variants == ()
    assert rows["21"].variants == ("async-tp",)
    assert rows["30"].variants == ("selective", "whitefiber")
    predictor = Predictor()
    vanilla, asynchronous = (predictor.predict(rows[name]).score.predicted_seconds for name in ("20", "21"))
    assert 0.7 * vanilla < asynchronous < 0.97 * vanilla
    assert rows["20"].plan.hash == rows["21"].plan.hash
    rounds = {row.row: row.variants for row in read_published(PUBLISHED / "mlperf_training_steps.csv")[0]}
    assert rounds["0"] == ()
    assert rounds["15"] == ("ngc23-09",)


def test_pipelines_whose_micro_batch_is_not_printed_have_one_per_rank():
    rows = {row.row: row.plan for row in read_published(PUBLISHED / "torchtitan_llama3.csv")[0]}
    assert rows["13"].micro_batch_size == 4
    assert len(rows["13"].micro_batches(0)) == len(rows["14"].micro_batches(0)) == 8


def test_recomputation_s_tasks_are_priced_alike_alone_and_in_bulk():
    machine = load_machine("torchtitan-h100-96gb").variant(["selective", "async-tp"])
    skeleton = Skeleton.of(fp8_plan(), machine)
    np.testing.assert_allclose(
        Bulk([skeleton], machine).unit_seconds(machine), unit_seconds(skeleton, machine), rtol=1e-9
    )
