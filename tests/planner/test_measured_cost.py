"""What a measured profile adds to the cost formulas: interpolation, own figures per kernel, fixed algorithms."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest

from planner import Machine, Mesh, load_machine, make_plan, predict, with_sizes
from planner.cost.algorithms import fix_collectives, measured_algorithms
from planner.cost.communication import collective_seconds
from planner.cost.compute import gemm_seconds
from planner.cost.measured import concurrent_factor, gemm_error, measured_seconds
from planner.cost.price import Pricer, compute_seconds, launches
from planner.machine import (
    AttentionFigures,
    GemmCurve,
    GemmForm,
    GemmSample,
    KernelFigures,
    MeasuredCollective,
    MeasuredRegime,
    PrecisionFigures,
    dump_machine,
)
from planner.mesh import Coordinate
from planner.plan import Training
from planner.program import Task, Work, lower

GENERIC = load_machine("cpu-generic")
FORMS: tuple[GemmForm, ...] = ("forward", "backward_input", "backward_weight")
SHAPES = [(256, 512, 512), (512, 512, 512), (512, 2048, 512), (1024, 512, 2048)]


def regime(latency: float, per_byte: float, end: float | None = None) -> MeasuredRegime:
    return MeasuredRegime(up_to_bytes=end, latency_seconds=latency, seconds_per_byte=per_byte)


def collective(operation: str, algorithm: str, *regimes: MeasuredRegime, size: int = 2) -> MeasuredCollective:
    return MeasuredCollective(operation=operation, group_size=size, algorithm=algorithm, regimes=regimes)  # type: ignore[arg-type]


def machine(factor: float = 1.3, **device: object) -> Machine:
    """The generic machine with products `factor` times slower than its curve, one norm and attention of its own."""
    samples = tuple(
        GemmSample(form=form, m=m, n=n, k=k, seconds=factor * float(gemm_seconds(GENERIC, m, n, k)))
        for form in FORMS
        for m, n, k in SHAPES
    )
    figures: dict[str, object] = {
        "gemm_samples": samples,
        "kernels": {
            "norm": KernelFigures(regimes=(regime(5e-6, 1e-10, 1e6), regime(1e-5, 2e-10)), concurrent_slowdown=1.5),
            "gradient_norm": KernelFigures(regimes=(regime(1e-5, 1e-10),)),
        },
        "attention": {
            "attention_plain": AttentionFigures(call_seconds=1e-5, pair_seconds=1e-9, multiply_add_seconds=1e-11),
            "attention_blocked": AttentionFigures(pair_seconds=1e-9, product_seconds=1e-6),
        },
    }
    changed = msgspec.structs.replace(GENERIC.device, **(figures | device))
    host = msgspec.structs.replace(GENERIC.host, concurrent_gemm_slowdown=1.2)
    return msgspec.structs.replace(GENERIC, device=changed, host=host)


def test_products_near_samples_take_their_error_and_far_ones_the_formula() -> None:
    slow = machine(1.3)
    assert gemm_error(slow, "forward", 512, 512, 512) == pytest.approx(1.3, rel=0.02)
    assert gemm_error(slow, "backward_weight", 512, 600, 512) == pytest.approx(1.3, rel=0.02)
    assert gemm_error(slow, "forward", 2**20, 2, 2**16) == pytest.approx(1.0, abs=1e-6)
    work = Work(m=512, n=512, k=512, elements=512 * 512, bytes=1)
    alone = float(gemm_seconds(slow, 512, 512, 512))
    expected = alone * float(gemm_error(slow, "forward", 512, 512, 512)) + slow.overheads.dispatch_seconds
    assert measured_seconds(slow, "linear.forward", work, "float32") == pytest.approx(expected)


def test_forms_of_a_product_keep_their_own_error() -> None:
    sample = machine().device.gemm_samples
    changed = tuple(
        msgspec.structs.replace(each, seconds=each.seconds * (2 if each.form == "backward_weight" else 1))
        for each in sample
    )
    uneven = machine(gemm_samples=changed)
    ratio = gemm_error(uneven, "backward_weight", 512, 512, 512) / gemm_error(uneven, "forward", 512, 512, 512)
    assert 1.2 < ratio <= 2.0


def test_kernels_follow_their_regimes_and_slow_each_other() -> None:
    profiled = machine()
    small = Work(elements=1000, bytes=100_000)
    large = Work(elements=10**6, bytes=10**8)
    gap = profiled.overheads.dispatch_seconds
    assert measured_seconds(profiled, "norm.forward", small, "float32") == pytest.approx(5e-6 + 1e-5 + gap)
    assert measured_seconds(profiled, "norm.forward", large, "float32") == pytest.approx(1e-5 + 2e-2 + gap)
    crowded = measured_seconds(profiled, "norm.forward", large, "float32", 1, 2)
    assert crowded == pytest.approx(1.5 * (1e-5 + 2e-2) + gap)
    assert concurrent_factor(profiled, 1.5, 1) == 1
    assert concurrent_factor(profiled, 1.5, 64) == 1.5
    norm = Work(elements=10**6, bytes=8)
    assert measured_seconds(profiled, "gradient_norm", norm, "float32") == pytest.approx(1e-5 + 4e-4 + gap)


def test_attention_has_terms_of_its_own_and_a_mask_only_saves_where_blocks_are_skipped() -> None:
    profiled = machine()
    work = Work(m=128, n=256, k=64, batch=16, elements=8 * 128 * 256, share=0.5)
    pairs, multiply_adds = 8 * 128 * 256, 128 * 256 * 64 * 16
    plain = measured_seconds(profiled, "attention_plain.forward", work, "float32")
    assert plain == pytest.approx(1e-5 + pairs * 1e-9 + multiply_adds * 1e-11 + profiled.overheads.dispatch_seconds)
    blocked = measured_seconds(profiled, "attention_blocked.forward", work, "float32")
    step = measured_seconds(profiled, "attention_step.forward", work, "float32")
    assert blocked == pytest.approx(0.5 * (pairs * 1e-9 + 16e-6) + profiled.overheads.dispatch_seconds)
    assert step == blocked
    double = measured_seconds(profiled, "attention_plain.forward", work, "float64")
    assert double is not None and plain is not None and 1.9 < double / plain < 2.0


def test_kinds_without_figures_are_left_to_the_formulas() -> None:
    profiled = machine()
    work = Work(elements=1000, bytes=100_000)
    assert measured_seconds(profiled, "gated.forward", work, "float32") is None
    task = Task("0.layer.gate.forward", "gated.forward", "gate", work=work)
    assert compute_seconds(profiled, task, "float32") > 0
    assert measured_seconds(GENERIC, "linear.forward", work, "float32") is None


def test_arrays_equal_scalars() -> None:
    profiled, rng = machine(), np.random.default_rng(0)
    m, n, k, ranks = (rng.integers(1, 4000, 50) for _ in range(4))
    work = Work(m=m, n=n, k=k, batch=1, elements=m * n, bytes=4 * m * n)
    for kind in ("linear.forward", "norm.forward", "attention_plain.forward"):
        many = measured_seconds(profiled, kind, work, "float32", 1, ranks)
        assert many is not None
        for i in range(0, 50, 7):
            one = Work(m=m[i], n=n[i], k=k[i], batch=1, elements=m[i] * n[i], bytes=4 * m[i] * n[i])
            assert measured_seconds(profiled, kind, one, "float32", 1, ranks[i]) == pytest.approx(many[i], rel=1e-12)


def with_collectives(*tables: MeasuredCollective) -> Machine:
    link = msgspec.structs.replace(GENERIC.link_in_host, measured=tables)
    return msgspec.structs.replace(machine(), link_in_host=link)


RIVALS = with_collectives(
    collective("all_reduce", "native", regime(2e-6, 8e-10)),
    collective("all_reduce", "ring", regime(3e-5, 2e-10)),
)


def test_of_measured_algorithms_the_named_or_else_the_fastest_counts() -> None:
    for nbytes, fastest in ((1e3, 2e-6 + 8e-7), (1e7, 3e-5 + 2e-3)):
        assert collective_seconds(RIVALS, "all_reduce", nbytes, 2) == pytest.approx(fastest)
    assert collective_seconds(RIVALS, "all_reduce", 1e7, 2, algorithm="native") == pytest.approx(2e-6 + 8e-3)
    assert measured_algorithms(RIVALS, "all_reduce") == ["native", "ring"]


@pytest.mark.parametrize(("hidden", "chosen"), [(64, {}), (512, {"tp.all_reduce": "ring"})])
def test_a_plan_gets_the_algorithm_that_its_own_messages_ask_for(hidden: int, chosen: dict[str, str]) -> None:
    spec = with_sizes(None, layers=2, hidden=hidden, heads=4, seq_len=64)
    plan = make_plan(spec, Mesh(tp=2), global_batch_size=1, micro_batch_size=1)
    fixed = fix_collectives(plan, RIVALS)
    assert fixed.collectives == chosen
    assert predict(fixed, RIVALS).step_seconds <= predict(plan, RIVALS).step_seconds
    assert fix_collectives(plan, GENERIC) == plan


def test_an_algorithm_that_no_plan_may_name_is_not_fixed() -> None:
    """A profile may time its library's own under any name, and ranks do not know that one."""
    timed = with_collectives(collective("all_reduce", "library", regime(1e-6, 1e-10)))
    plan = make_plan(with_sizes(None, layers=2), Mesh(tp=2), global_batch_size=1, micro_batch_size=1)
    assert measured_algorithms(timed, "all_reduce") == []
    assert fix_collectives(plan, timed) == plan


def test_the_plan_s_algorithm_is_the_one_that_is_priced() -> None:
    spec = with_sizes(None, layers=2, hidden=512, heads=4, seq_len=64)
    plan = make_plan(spec, Mesh(tp=2), global_batch_size=1, micro_batch_size=1)
    task = next(t for step in lower(plan, 0).steps for t in step.tasks if t.kind == "all_reduce")
    at, nbytes = Coordinate(0, 0, 0, 0), task.work.full_bytes
    assert Pricer(plan, RIVALS).seconds(task, at) == pytest.approx(2e-6 + 8e-10 * nbytes)
    ring = msgspec.structs.replace(plan, collectives={"all_reduce": "ring"})
    assert Pricer(ring, RIVALS).seconds(task, at) == pytest.approx(3e-5 + 2e-10 * nbytes)
    unknown = msgspec.structs.replace(plan, collectives={"all_reduce": "root"})
    assert Pricer(unknown, RIVALS).seconds(task, at) > 0


def test_a_measured_machine_survives_its_file(tmp_path: object) -> None:
    path = f"{tmp_path}/machine.toml"
    dump_machine(RIVALS, path)
    assert load_machine(path) == RIVALS


def test_on_a_cpu_a_reduction_started_early_still_takes_its_time() -> None:
    spec = with_sizes(None, layers=4, hidden=256, heads=4, seq_len=64)
    plan = make_plan(spec, Mesh(dp=2), global_batch_size=4, micro_batch_size=2)
    early = msgspec.structs.replace(plan, overlap_gradients=True)
    blocking = predict(plan, RIVALS).step_seconds
    assert RIVALS.overheads.overlap_fraction == 0
    neutral = RIVALS.with_figures({"overheads.overlap_slowdown": 1.0})
    assert predict(early, neutral).step_seconds == pytest.approx(blocking, rel=0.02)
    slower = RIVALS.with_figures({"overheads.overlap_slowdown": 2.0})
    assert predict(early, slower).step_seconds > 1.02 * blocking
    hiding = neutral.with_figures({"overheads.overlap_fraction": 1.0})
    assert predict(early, hiding).step_seconds < 0.99 * blocking


# ---- a GPU's figures: by precision, and host time apart --------------------------------------------------------------


def on_gpu() -> Machine:
    """A GPU whose products, norms and attention were timed in float32 and, at half the time, in bfloat16."""
    base = load_machine("h100-80gb")
    curves = {"default": GemmCurve(fraction=0.5), "bfloat16": GemmCurve(fraction=0.5)}
    peaks = base.device.peak_flops_per_second | {"float32": 50e12, "bfloat16": 800e12}
    device = msgspec.structs.replace(base.device, gemm=curves, peak_flops_per_second=peaks, call_seconds=0.0)
    plain = msgspec.structs.replace(base, device=device)

    def samples(precision: str, factor: float) -> tuple[GemmSample, ...]:
        return tuple(
            GemmSample(
                form=form, m=m, n=n, k=k, seconds=factor * float(gemm_seconds(plain, m, n, k, precision=precision))
            )
            for form in FORMS
            for m, n, k in SHAPES
        )

    device = msgspec.structs.replace(
        device,
        gemm_samples=samples("float32", 1.2),
        attention={
            name: AttentionFigures(pair_seconds=scale * 2e-12, calls=calls)
            for name, scale, calls in (("attention_plain", 1.0, 4), ("attention_plain_backward", 2.0, 9))
        },
        kernels={
            "default": KernelFigures(regimes=(regime(4e-6, 1e-12),)),
            "norm": KernelFigures(regimes=(regime(4e-6, 2e-12),), calls=2),
            "linear": KernelFigures(calls=3),
        },
        precisions={
            "bfloat16": PrecisionFigures(
                gemm_samples=samples("bfloat16", 1.5),
                attention={"attention_plain": AttentionFigures(pair_seconds=1e-12)},
                kernels={"norm": KernelFigures(regimes=(regime(3e-6, 1e-12),))},
            )
        },
    )
    changed = msgspec.structs.replace(base.overheads, dispatch_seconds=5e-6)
    return msgspec.structs.replace(base, device=device, overheads=changed)


def seconds_in(profiled: Machine, kind: str, work: Work, precision: str) -> float:
    found = measured_seconds(profiled, kind, work, precision)
    assert found is not None
    return float(found)


def test_a_precision_takes_its_own_figures_and_float32_s_where_it_has_none() -> None:
    gpu = on_gpu()
    norm, other = (Work(elements=10**6, bytes=2 * 10**6) for _ in range(2))
    assert seconds_in(gpu, "norm.forward", norm, "float32") == pytest.approx(4e-6 + 4e-6)
    assert seconds_in(gpu, "norm.forward", norm, "bfloat16") == pytest.approx(3e-6 + 2e-6)
    assert seconds_in(gpu, "gated.forward", other, "bfloat16") == pytest.approx(4e-6 + 2e-6)
    pairs = Work(m=512, n=512, k=64, batch=32, elements=16 * 512 * 512)
    forward = {name: seconds_in(gpu, "attention_plain.forward", pairs, name) for name in ("float32", "bfloat16")}
    assert forward["bfloat16"] == pytest.approx(forward["float32"] / 2)
    product = Work(m=512, n=512, k=512, elements=512 * 512, bytes=1)
    for precision, factor in (("float32", 1.2), ("bfloat16", 1.5)):
        formula = float(gemm_seconds(gpu, 512, 512, 512, precision=precision))
        assert seconds_in(gpu, "linear.forward", product, precision) == pytest.approx(factor * formula, rel=0.02)
    untimed = float(gemm_seconds(gpu, 512, 512, 512, precision="float16"))  # float32's error on its own curve
    assert seconds_in(gpu, "linear.forward", product, "float16") == pytest.approx(1.2 * untimed, rel=0.02)


def test_gradients_of_16_bit_training_are_float32_in_the_norm_too() -> None:
    gpu, work = on_gpu(), Work(elements=10**6, bytes=8)
    assert seconds_in(gpu, "gradient_norm", work, "bfloat16") == seconds_in(gpu, "gradient_norm", work, "float32")
    assert seconds_in(gpu, "gradient_norm", work, "float32") == pytest.approx(4e-6 + 4e-6)


def test_a_gpu_s_task_is_the_device_s_time_and_its_launches_are_the_host_s() -> None:
    gpu = on_gpu()
    kinds = ("linear.forward", "attention_plain.forward", "attention_plain.backward", "norm.forward", "gated.forward")
    tasks = [Task("0.layer.a.forward", kind, "a", work=Work(m=8, n=8, k=8, elements=64, bytes=256)) for kind in kinds]
    assert [launches(gpu, task) for task in tasks] == [3, 4, 9, 2, 1]
    slower = msgspec.structs.replace(gpu, overheads=msgspec.structs.replace(gpu.overheads, dispatch_seconds=1.0))
    assert [float(compute_seconds(slower, task, "float32")) for task in tasks] == [
        float(compute_seconds(gpu, task, "float32")) for task in tasks
    ]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_step_of_small_kernels_is_bound_by_the_host_and_one_of_large_ones_by_the_device(precision: str) -> None:
    gpu = on_gpu()

    def step(hidden: int, seq: int, dispatch: float) -> float:
        spec = with_sizes(None, layers=2, hidden=hidden, heads=hidden // 64, seq_len=seq)
        plan = make_plan(
            spec, Mesh(), global_batch_size=8, micro_batch_size=8, training=Training(precision=precision),
            transport="nccl",
        )  # fmt: skip
        machine = gpu.with_figures({"overheads.dispatch_seconds": dispatch})
        return predict(plan, machine).step_seconds

    small, large = (128, 64), (4096, 1024)
    first, second, third = (step(*small, dispatch) for dispatch in (1e-4, 2e-4, 3e-4))
    assert third - second == pytest.approx(second - first)
    assert second - first > 50 * 1e-4  # launches of a step
    assert step(*large, 1e-6) == pytest.approx(step(*large, 2e-6))
    assert step(*small, 1e-9) < step(*small, 1e-4) / 3


def test_profiles_with_precisions_are_written_and_read_back(tmp_path: Path) -> None:
    gpu = on_gpu()
    dump_machine(gpu, tmp_path / "gpu.toml")
    assert load_machine(tmp_path / "gpu.toml") == gpu
