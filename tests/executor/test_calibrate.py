"""Calibration: fits recover what made the data, probes time every task, disturbed runs do not count, a survey works."""

from __future__ import annotations

import json
import math
import os
import subprocess
from dataclasses import replace
from time import perf_counter

import msgspec
import numpy as np
import pytest

from executor.calibrate.assemble import Survey, concurrent_products, concurrent_slowdowns, figure_name, machine_of
from executor.calibrate.exchanges import (
    ALWAYS_BYTES,
    OPERATIONS,
    QUICK_SIZES,
    Timed,
    barrier_seconds,
    group_sizes,
    time_exchanges,
)
from executor.calibrate.fit import fit_attention, fit_concurrent, fit_excess, fit_gemm, fit_regimes, fit_threads
from executor.calibrate.in_place import OPERATION_OF, early_plan, fastest_algorithms, plans
from executor.calibrate.probes import LEAST_STEPS, Observation, Probe, ProbeResult, is_stable, run_probe
from executor.calibrate.survey import PROBES, QUICK_PROBES
from executor.comm import ALGORITHMS, Communicator
from executor.comm.loopback import run_loopback
from planner import Mesh, load_machine, make_plan, predict, with_sizes
from planner.cost.compute import early_reduction_seconds, gemm_seconds
from planner.cost.measured import measured_seconds
from planner.cost.price import Place, group_seconds
from planner.cost.sizes import regimes_seconds
from planner.launch import find_executor, find_launcher, is_root, launch_command, launch_environment
from planner.machine import AttentionFigures, dump_machine
from planner.machine.measured import attention_terms
from planner.program import Task, Work, lower

TINY = Probe(32, 16, 2, layers=1, head_dim=16)


@pytest.fixture(scope="module")
def tiny() -> ProbeResult:
    return run_probe(TINY, perf_counter())


# ---- fits ------------------------------------------------------------------------------------------------------------


def test_regimes_recover_latency_and_bandwidth_on_both_sides_of_a_break() -> None:
    sizes = [2.0**i for i in range(8, 26)]
    true = [5e-6 + 1e-10 * n if n <= 2**17 else 4e-5 + 4e-10 * n for n in sizes]
    fit = fit_regimes(sizes, true)
    assert fit.log_sigma < 0.01
    assert [len(fit.regimes), fit.regimes[0].up_to_bytes and 2**17 < fit.regimes[0].up_to_bytes < 2**18] == [2, True]
    assert fit.regimes[0].seconds_per_byte == pytest.approx(1e-10, rel=0.02)
    assert fit.regimes[1].seconds_per_byte == pytest.approx(4e-10, rel=0.02)
    np.testing.assert_allclose(regimes_seconds(fit.regimes, np.array(sizes)), true, rtol=0.02)


def test_one_line_needs_one_regime_and_the_residual_is_the_noise() -> None:
    rng = np.random.default_rng(0)
    sizes = np.geomspace(1e3, 1e7, 20)
    fits = [fit_regimes(list(sizes), list((1e-5 + 2e-10 * sizes) * np.exp(rng.normal(0, 0.1, 20)))) for _ in range(20)]
    assert np.mean([len(fit.regimes) == 1 for fit in fits]) >= 0.8
    assert np.median([fit.log_sigma for fit in fits]) == pytest.approx(0.1, rel=0.2)
    assert np.median([fit.regimes[-1].seconds_per_byte for fit in fits]) == pytest.approx(2e-10, rel=0.1)


def test_a_single_size_gives_a_single_regime_through_it() -> None:
    fit = fit_regimes([1e4, 1e4], [2e-5, 2e-5])
    assert regimes_seconds(fit.regimes, 1e4) == pytest.approx(2e-5)


def test_the_gemm_curve_is_recovered() -> None:
    machine = load_machine("cpu-generic").with_figures(
        {
            "device.gemm.default.half_rows": 20.0,
            "device.gemm.default.half_columns": 8.0,
            "device.gemm.default.half_depth": 40.0,
            "device.gemm.default.fraction": 0.7,
            "device.call_seconds": 1e-5,
            "device.memory_bandwidth_bytes_per_second": 1e15,
        }
    )
    machine = msgspec.structs.replace(machine, device=msgspec.structs.replace(machine.device, memory_regimes=()))
    shapes = [(m, n, k) for m in (32, 128, 1024) for n in (64, 512, 2048) for k in (64, 512, 2048)]
    seconds = [float(gemm_seconds(machine, *shape)) for shape in shapes]
    fit = fit_gemm(shapes, seconds, machine.peak_flops_per_second("float32"))
    assert fit.log_sigma < 1e-3
    assert fit.curve.fraction == pytest.approx(0.7, rel=0.01)
    halves = (fit.curve.half_rows, fit.curve.half_columns, fit.curve.half_depth)
    assert halves == pytest.approx((20, 8, 40), rel=0.05)
    assert fit.call_seconds == pytest.approx(1e-5, rel=0.05)


def test_attention_terms_predict_unseen_shapes() -> None:
    def work(queries: int, keys: int, width: int, batch: int) -> Work:
        return Work(m=queries, n=keys, k=width, batch=2 * batch, elements=queries * keys * batch)

    true = AttentionFigures(
        call_seconds=1e-5, product_seconds=1e-6, pair_seconds=5e-10, multiply_add_seconds=2e-11, element_seconds=1e-10
    )

    def seconds(each: Work) -> float:
        terms = attention_terms(each.m, each.n, each.k, each.batch, each.elements)
        return float(
            sum(getattr(true, name) * term for name, term in zip(true.__struct_fields__[:5], terms, strict=True))
        )

    seen = [work(s, s, d, b) for s in (64, 128, 512) for d in (32, 64) for b in (4, 16)]
    fit = fit_attention(seen, [seconds(each) for each in seen])
    assert fit.log_sigma < 1e-3
    assert fit.figures.multiply_add_seconds == pytest.approx(2e-11, rel=0.02)
    assert fit.figures.pair_seconds == pytest.approx(5e-10, rel=0.02)


# ---- probes ----------------------------------------------------------------------------------------------------------


def test_a_probe_times_every_task_and_together_they_are_the_step(tiny: ProbeResult) -> None:
    kinds = {each.kind for each in tiny.observations}
    assert {"linear.forward", "linear.backward_input", "linear.backward_weight", "attention_plain.backward"} <= kinds
    assert {"residual_norm.forward", "residual_norm.backward", "optimizer", "embedding.forward"} <= kinds
    assert len(tiny.step_seconds) >= LEAST_STEPS
    elapsed = sum(s for each in tiny.observations for s, _ in each.samples)
    assert elapsed <= sum(tiny.step_seconds)
    assert elapsed >= 0.5 * sum(tiny.step_seconds)
    assert all(math.isfinite(each.seconds) and each.seconds > 0 for each in tiny.observations)
    assert 0 < tiny.gap_seconds < tiny.load_seconds


def test_a_share_of_a_model_has_the_shapes_of_a_tensor_parallel_rank() -> None:
    spec = Probe(512, 64, 1, share=0.5).spec()
    assert (spec.hidden, spec.heads, spec.head_dim, spec.ffn_hidden) == (512, 4, 64, 1024)
    grouped = Probe(512, 64, 1, share=0.5, sizes={"kv_heads": 2}).spec()
    assert (grouped.heads, grouped.kv_heads) == (4, 1)


@pytest.mark.parametrize("probe", [*PROBES, *QUICK_PROBES], ids=str)
def test_every_probe_is_a_plan(probe: Probe) -> None:
    assert probe.plan().mesh.world_size == 1


def test_runs_that_lost_the_core_do_not_count() -> None:
    clean, preempted = (1.0e-3, 0.999e-3), (5.0e-3, 1.1e-3)
    mostly = Observation("norm.forward", Work(), (preempted, clean, preempted, preempted), 1)
    assert mostly.seconds == 1.0e-3
    always = Observation("norm.forward", Work(), (preempted, (9.0e-3, 1.3e-3), (4e-3, 1.2e-3)), 1)
    assert always.seconds == pytest.approx(1.15e-3)  # the lower quartile of the processor time


def test_stability_is_of_the_median() -> None:
    assert is_stable([1.0, 1.01, 0.99, 1.0])
    assert is_stable([1.0, 1.01, 0.99, 1.0, 1.0, 7.0])  # one disturbed step says nothing about the median
    assert not is_stable([1.0, 1.5, 0.7, 2.0])


# ---- from a survey to a machine --------------------------------------------------------------------------------------


def survey_of(*probes: ProbeResult, together: tuple[ProbeResult, ...] = ()) -> Survey:
    survey = Survey(
        ranks=2,
        cores=2,
        memory_bytes=8e9,
        resident_bytes=1e8,
        peak_flops_per_second={"float32": 1e11, "float64": 5e10},
    )
    survey.alone, survey.together = list(probes), list(together)
    survey.exchanges = [
        Timed("all_reduce", 2, "native", [64, 4096, 65536], [4e-6, 6e-6, 5e-5]),
        Timed("send", 2, "library", [64, 4096, 65536], [3e-6, 4e-6, 2e-5]),
    ]
    return survey


def test_a_machine_made_of_one_probe_prices_each_of_its_tasks_by_figures_of_its_own(
    tiny: ProbeResult, tmp_path: object
) -> None:
    machine = machine_of(survey_of(tiny))
    for each in tiny.observations:
        if each.kind == "loss_sum":
            continue
        named = each.kind.startswith("linear") or figure_name(each.kind) in {
            *machine.device.kernels, *machine.device.attention
        }  # fmt: skip
        assert named, each.kind
        found = measured_seconds(machine, each.kind, each.work, "float32")
        assert found is not None
        assert 0.3 < float(found) / each.seconds < 3.0, each.kind
    path = f"{tmp_path}/machine.toml"
    dump_machine(machine, path)
    assert load_machine(path) == machine
    plan = TINY.plan()
    compute = sum(each.seconds * each.count for each in tiny.observations)
    assert predict(plan, machine).step_seconds == pytest.approx(compute, rel=0.5)


def test_slowdown_beside_others_is_scaled_to_as_many_ranks_as_cores(tiny: ProbeResult) -> None:
    def with_seconds(factor: float) -> ProbeResult:
        """The probe without the noise of its runs, every task taking `factor` times as long."""
        found = [
            Observation(o.kind, o.work, ((factor * o.seconds, factor * o.seconds),), o.count) for o in tiny.observations
        ]
        return replace(tiny, observations=found)

    survey = survey_of(with_seconds(1.0), together=(with_seconds(1.5),))
    assert concurrent_slowdowns(survey)["norm"] == pytest.approx(1.5, rel=0.1)
    assert concurrent_products(survey) == pytest.approx((1.5, 0.0), rel=0.1)
    survey.cores = 3  # two ranks on three cores: one neighbour of two
    assert concurrent_slowdowns(survey)["norm"] == pytest.approx(2.0, rel=0.1)
    assert concurrent_products(survey) == pytest.approx((2.0, 0.0), rel=0.1)
    survey.together = []
    assert concurrent_slowdowns(survey) == {}
    assert concurrent_products(survey) == (1.0, 0.0)


def test_what_neighbours_and_a_shared_memory_bus_add_to_products_is_told_apart() -> None:
    alone = [1e-4, 2e-4, 1e-3, 4e-3, 1e-4]
    moved = [1e6, 1e5, 1e7, 4e6, 4e6]
    together = [1.05 * seconds + 3e-12 * each for seconds, each in zip(alone, moved, strict=True)]
    slowdown, seconds_per_byte = fit_concurrent(alone, together, moved)
    assert slowdown == pytest.approx(1.05, abs=1e-3)
    assert seconds_per_byte == pytest.approx(3e-12, rel=0.02)
    assert fit_concurrent(alone, [0.9 * each for each in alone], moved) == (1.0, 0.0)


def test_the_start_of_threads_is_told_from_their_speed() -> None:
    alone = [5e-5, 2e-4, 1e-3, 2e-2]
    twice, fourfold = ([each / speed + 2e-5 for each in alone] for speed in (1.9, 3.4))
    table, start = fit_threads(4, [1, 2, 4], [alone, twice, fourfold])
    assert table == pytest.approx((1.0, 1.9, 2.65, 3.4), rel=1e-3)
    assert start == pytest.approx(2e-5, rel=1e-2)
    assert fit_threads(1, [1], [alone]) == ((1.0,), 0.0)


# ---- communication ---------------------------------------------------------------------------------------------------


def test_group_sizes_are_powers_of_two_and_the_whole() -> None:
    assert [group_sizes(n) for n in (1, 2, 3, 6, 8)] == [[], [2], [2, 3], [2, 4, 6], [2, 4, 8]]


@pytest.mark.parametrize("ranks", [2, 3])
def test_every_collective_is_timed_by_every_algorithm_that_is_not_hopeless(ranks: int) -> None:
    def main(comm: Communicator) -> tuple[list[Timed], float]:
        found = time_exchanges(comm.world, quick=True, seconds=0.0)
        return found, barrier_seconds(comm.world)

    results = run_loopback(ranks, main)
    first, barrier = results[0]
    assert barrier > 0
    for other, _ in results[1:]:
        assert [(t.operation, t.algorithm, t.seconds) for t in other] == [
            (t.operation, t.algorithm, t.seconds) for t in first
        ]
    for operation in OPERATIONS:
        names = {each.algorithm for each in first if each.operation == operation}
        assert "native" in names
        assert names <= set(ALGORITHMS[operation])
    assert [each.algorithm for each in first if each.operation == "send"] == ["library"]
    for each in first:
        assert len(each.sizes_bytes) == sum(size <= ALWAYS_BYTES for size in QUICK_SIZES)  # the time was used up
        assert min(each.seconds) > 0
        assert each.measured().group_size == ranks


def test_a_smaller_message_never_takes_longer() -> None:
    timed = Timed("all_gather", 2, "native", [64, 256, 1024, 4096], [5e-6, 9e-4, 5e-6, 6e-6])
    assert timed.fit().log_sigma < 0.2
    assert regimes_seconds(timed.measured().regimes, 256) < 1e-5


@pytest.mark.parametrize("ranks", [2, 3])
def test_the_plans_for_collectives_inside_steps_have_all_of_them_in_several_sizes(ranks: int) -> None:
    sizes: dict[str, set[int]] = {operation: set() for operation in OPERATION_OF.values()}
    for plan in plans(ranks, {"all_reduce": "ring"}):
        assert plan.mesh.world_size == ranks
        assert plan.collectives == {"all_reduce": "ring"}
        tasks = [task for step in lower(plan, 0).steps for task in step.tasks if task.kind in OPERATION_OF]
        assert tasks
        for task in tasks:
            sizes[OPERATION_OF[task.kind]].add(int(task.work.full_bytes))
    for operation in ("all_reduce", "all_gather", "reduce_scatter", "send"):
        known = sorted(sizes[operation] - {0})
        assert known[-1] > 2 * known[0], operation  # a range that tells latency from bandwidth
    assert sizes["exchange"]


def test_what_a_step_adds_to_a_collective_is_recovered_and_priced() -> None:
    sizes = [4.0**i for i in range(4, 12)]
    known = [1e-5 + 1e-10 * size for size in sizes]
    seconds = [each + 4e-5 + 2e-10 * size for each, size in zip(known, sizes, strict=True)]
    seconds[3] *= 5  # somebody lost the core
    excess = fit_excess(sizes, seconds, known)
    assert excess.latency_seconds == pytest.approx(4e-5, rel=0.05)
    assert excess.seconds_per_byte == pytest.approx(2e-10, rel=0.05)
    generic = load_machine("cpu-generic")
    link = msgspec.structs.replace(generic.link_in_host, in_place={"all_reduce": excess})
    machine = msgspec.structs.replace(generic, link_in_host=link)
    task = Task("", "all_reduce", "", axis="tp", work=Work(bytes=10**6, full_bytes=10**6))
    place = Place(2, 2, 1)
    added = float(group_seconds(machine, task, place)) - float(group_seconds(generic, task, place))
    assert added == pytest.approx(4e-5 + 2e-4, rel=0.05)
    assert group_seconds(machine, task, Place(1, 1, 1)) == 0


def test_the_algorithm_for_a_survey_s_own_plans_is_the_fastest_of_middling_messages() -> None:
    slow = Timed("all_reduce", 2, "native", [2**10, 2**20], [1e-6, 1e-3])
    fast = Timed("all_reduce", 2, "ring", [2**10, 2**20], [2e-5, 2e-4])
    assert fastest_algorithms([slow, fast]) == {"all_reduce": "ring"}
    assert fastest_algorithms([slow, fast], 2**10) == {"all_reduce": "native"}


@pytest.mark.parametrize("cost", [0.0, 0.6, 1.0, 1.7])
def test_reductions_that_start_early_cost_what_was_measured(cost: float, tiny: ProbeResult) -> None:
    survey = survey_of(tiny)
    survey.early_reduction_cost = cost
    machine = machine_of(survey)
    assert float(early_reduction_seconds(machine, 2.0)) == pytest.approx(2 * cost)
    waited = early_plan(2, {})
    started = msgspec.structs.replace(waited, overlap_gradients=True)
    plain, early = predict(waited, machine), predict(started, machine)
    moved = sum(work.seconds[0] for key, work in plain.operators.items() if "gradient_all_reduce" in key)
    assert early.step_seconds - plain.step_seconds == pytest.approx((cost - 1) * moved, rel=0.05, abs=1e-5)
    gathered = msgspec.structs.replace(waited, zero_stage=3)  # nothing is fetched beside a core's own computation
    neutral = machine_of(survey_of(tiny))
    assert predict(gathered, machine).step_seconds == predict(gathered, neutral).step_seconds


# ---- all of it, under MPI --------------------------------------------------------------------------------------------


def test_a_quick_profile_of_this_machine_predicts_two_ranks(tmp_path: object) -> None:
    out = f"{tmp_path}/machine.toml"
    command = launch_command(
        find_launcher(), 2, [*find_executor(), "profile", "--quick", "--json", "-o", out],
        cores=os.cpu_count() or 1, root=is_root(),
    )  # fmt: skip
    done = subprocess.run(command, env=launch_environment(1), capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["output"] == out
    assert "100%" in done.stderr
    machine = load_machine(out)
    operations = {(table.operation, table.group_size) for table in machine.link_in_host.measured}
    assert operations == {(operation, 2) for operation in (*OPERATIONS, "send")}
    assert set(machine.link_in_host.in_place) == {"all_reduce", "all_gather", "reduce_scatter", "send"}
    assert machine.overheads.exchange_seconds > 0
    assert (1 - machine.overheads.overlap_fraction) * machine.overheads.overlap_slowdown != 1  # measured, not assumed
    assert set(machine.device.attention) >= {"attention_plain", "attention_plain_backward", "attention_blocked"}
    assert len(machine.host.thread_speedup) == machine.host.cores
    spec = with_sizes(None, layers=2, hidden=128, heads=4, seq_len=64)
    steps = {
        name: predict(make_plan(spec, mesh, global_batch_size=8, micro_batch_size=2), machine).step_seconds
        for name, mesh in (("one", Mesh()), ("dp", Mesh(dp=2)), ("tp", Mesh(tp=2)), ("pp", Mesh(pp=2)))
    }
    assert all(0.3 * steps["one"] < seconds < 10 * steps["one"] for seconds in steps.values())
