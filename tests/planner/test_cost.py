"""Cost formulas against closed forms, and as properties: monotone, free where nothing happens, arrays equal scalars."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.cost import communication, compute, sizes
from planner.cost.communication import p2p_seconds
from planner.errors import MachineError
from planner.machine import (
    Algorithm,
    Collective,
    KernelFigures,
    Machine,
    MeasuredCollective,
    MeasuredRegime,
    MemoryRegime,
    Overheads,
    load_machine,
)

OPERATIONS: list[Collective] = ["all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast"]
ALGORITHMS: list[Algorithm] = ["ring", "tree", "recursive_doubling", "halving_doubling", "hierarchical", "auto"]
ALPHA, B = 2e-6, 1e9  # in-host latency and bandwidth of the bare machine
NET_ALPHA, NET_CARD, NET_HOST = 10e-6, 1e8, 4e8


def bare() -> Machine:
    """Return a machine whose every efficiency is one and every overhead zero, so that closed forms are exact."""
    machine = load_machine("a100-80gb").with_figures(
        {
            "device.call_seconds": 0.0,
            "device.gemm.default.fraction": 1.0,
            "device.gemm.default.half_depth": 0.0,
            "device.gemm.default.misaligned_rate": 1.0,
            "link_in_host.latency_seconds": ALPHA,
            "link_in_host.bandwidth_bytes_per_second": B,
            "link_in_host.call_seconds": 0.0,
            "link_in_host.efficiency.default": 1.0,
            "link_between_hosts.latency_seconds": NET_ALPHA,
            "link_between_hosts.bandwidth_bytes_per_second": NET_CARD,
            "link_between_hosts.shared_bandwidth_bytes_per_second": NET_HOST,
            "link_between_hosts.call_seconds": 0.0,
            "link_between_hosts.efficiency.default": 1.0,
            "algorithms.default": "ring",
        }
    )
    curve = msgspec.structs.replace(machine.device.gemm["default"], tiles=())
    device = msgspec.structs.replace(machine.device, gemm={"default": curve})
    return msgspec.structs.replace(machine, device=device, overheads=Overheads(provenance="none in this test"))


BARE = bare()
REAL = [load_machine(name) for name in ("a100-80gb", "cpu-generic", "jean-zay-a100-80gb")]


@pytest.mark.parametrize("p", [2, 3, 8, 100])
def test_ring_closed_forms_on_one_tier(p: int) -> None:
    n = 1e7
    lap = (p - 1) / p * n / B + (p - 1) * ALPHA
    expected = {"all_reduce": 2 * lap, "all_gather": lap, "reduce_scatter": lap, "all_to_all": lap}
    for operation in OPERATIONS[:4]:
        assert communication.collective_seconds(BARE, operation, n, p) == pytest.approx(expected[operation])
    assert communication.collective_seconds(BARE, "broadcast", n, p) == pytest.approx((p - 1) * ALPHA + n / B)


@pytest.mark.parametrize(("p", "levels"), [(2, 1), (5, 3), (8, 3), (64, 6)])
def test_logarithmic_closed_forms_of_thakur(p: int, levels: int) -> None:
    n, share = 1e6, (p - 1) / p * 1e6 / B
    times: dict[str, Callable[[Collective], float]] = {
        name: lambda op, name=name: float(communication.collective_seconds(BARE, op, n, p, algorithm=name))  # type: ignore[misc]
        for name in ALGORITHMS
    }
    assert times["tree"]("all_reduce") == pytest.approx(2 * levels * ALPHA + 2 * n / B)
    assert times["recursive_doubling"]("all_reduce") == pytest.approx(levels * (ALPHA + n / B))
    assert times["halving_doubling"]("all_reduce") == pytest.approx(2 * levels * ALPHA + 2 * share)
    assert times["recursive_doubling"]("all_gather") == pytest.approx(levels * ALPHA + share)
    assert times["tree"]("all_to_all") == pytest.approx(levels * (ALPHA + n / 2 / B))
    assert times["halving_doubling"]("broadcast") == pytest.approx(2 * levels * ALPHA + 2 * share)
    for operation in OPERATIONS:
        assert times["auto"](operation) == pytest.approx(min(times[name](operation) for name in ALGORITHMS[:-1]))


def test_ring_across_hosts_is_bound_by_the_cards_that_the_group_can_use() -> None:
    n, p = 1e8, 8
    volume = 2 * (p - 1) / p * n
    latency = 2 * NET_ALPHA + (2 * (p - 1) - 2) * ALPHA  # two hosts: one network hop each way
    four = communication.collective_seconds(BARE, "all_reduce", n, p, 4)
    assert four == pytest.approx(latency + volume / NET_HOST)  # 4 ranks on a host drive its 4 cards
    shared = communication.collective_seconds(BARE, "all_reduce", n, p, 4, concurrent_groups=2)
    assert shared == pytest.approx(latency + volume / (NET_HOST / 2))
    alone = communication.collective_seconds(BARE, "all_reduce", n, p, 1)
    assert alone == pytest.approx(2 * (p - 1) * NET_ALPHA + volume / NET_CARD)  # one rank a host: one card
    crowd = communication.collective_seconds(BARE, "all_reduce", n, p, 1, concurrent_groups=8)
    assert crowd == pytest.approx(2 * (p - 1) * NET_ALPHA + volume / (NET_HOST / 8))


def test_hierarchical_all_reduce_is_three_phases() -> None:
    n, r, hosts = 1e8, 4, 3
    inside = (r - 1) * ALPHA + (r - 1) / r * n / B
    across = 2 * (hosts - 1) * NET_ALPHA + 2 * (hosts - 1) / hosts * (n / r) / (NET_HOST / r)
    found = communication.collective_seconds(BARE, "all_reduce", n, r * hosts, r, algorithm="hierarchical")
    assert found == pytest.approx(2 * inside + across)


def test_all_to_all_across_hosts_moves_every_rank_s_share() -> None:
    n, p, r = 1e8, 8, 4
    found = communication.collective_seconds(BARE, "all_to_all", n, p, r)
    latency = NET_ALPHA + (p - 1 - 1) * ALPHA
    assert found == pytest.approx(latency + r * n * (p - r) / p / NET_HOST)


@pytest.mark.parametrize("machine", [BARE, *REAL], ids=lambda machine: machine.name)
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_group_of_one_and_empty_payload_cost_nothing(
    machine: Machine, operation: Collective, algorithm: Algorithm
) -> None:
    assert communication.collective_seconds(machine, operation, 1e6, 1, algorithm=algorithm) == 0
    assert communication.collective_seconds(machine, operation, 0, 4, algorithm=algorithm) == 0
    assert p2p_seconds(machine, 0) == 0
    assert compute.gemm_seconds(machine, 0, 5, 5) == 0
    assert compute.kernel_seconds(machine, "norm", 0, 0) == 0


@given(
    machine=st.sampled_from([BARE, *REAL]),
    operation=st.sampled_from(OPERATIONS),
    algorithm=st.sampled_from(ALGORITHMS),
    p=st.integers(2, 64),
    r=st.integers(1, 8),
    concurrent=st.integers(1, 8),
    n=st.integers(1, 2**33),
    more=st.integers(1, 2**33),
    faster=st.floats(1, 10),
)
def test_collectives_are_monotone_in_size_bandwidth_and_sharing(
    machine: Machine,
    operation: Collective,
    algorithm: Algorithm,
    p: int,
    r: int,
    concurrent: int,
    n: int,
    more: int,
    faster: float,
) -> None:
    def seconds(on: Machine, size: int, sharing: int) -> float:
        return float(communication.collective_seconds(on, operation, size, p, r, algorithm, sharing))

    now = seconds(machine, n, concurrent)
    assert math.isfinite(now)
    assert now > 0
    assert seconds(machine, n + more, concurrent) >= now
    assert seconds(machine, n, concurrent + 1) >= now
    for link in ("link_in_host", "link_between_hosts"):
        paths = [f"{link}.bandwidth_bytes_per_second", f"{link}.shared_bandwidth_bytes_per_second"]
        have = [path for path in paths if getattr(getattr(machine, link), path.split(".")[1]) is not None]
        quicker = machine.with_figures({path: machine.figure(path) * faster for path in have})
        assert seconds(quicker, n, concurrent) <= now * (1 + 1e-12)


def norm_seconds(machine: Machine, elements: sizes.Size, moved_bytes: sizes.Size) -> sizes.Seconds:
    return compute.kernel_seconds(machine, "norm", elements, moved_bytes)


def test_arrays_equal_scalars_and_broadcast() -> None:
    rng = np.random.default_rng(0)
    machine = measured_machine()
    p, r = rng.integers(1, 33, 200), rng.integers(1, 9, 200)
    n, same = rng.integers(0, 10**8, 200), rng.random(200) < 0.5
    m, k = rng.integers(1, 5000, 200), rng.integers(1, 5000, 200)
    for on in (machine, *REAL):
        for operation in OPERATIONS:
            for algorithm in (None, *ALGORITHMS):
                many = communication.collective_seconds(on, operation, n, p, r, algorithm, r)
                for i in range(0, 200, 29):
                    args = n[i], int(p[i]), int(r[i]), algorithm, int(r[i])
                    assert communication.collective_seconds(on, operation, *args) == many[i]
        cases: list[tuple[Callable[..., sizes.Seconds], tuple[npt.NDArray[Any], ...]]] = [
            (p2p_seconds, (n, same, r)),
            (compute.gemm_seconds, (m, n, k, r)),
            (compute.traffic_seconds, (n, r)),
            (norm_seconds, (m, n)),
        ]
        for function, columns in cases:
            batch = function(on, *columns)
            assert batch.shape == (200,)
            assert [function(on, *(size[i] for size in columns)) for i in range(200)] == list(batch)
    table = compute.gemm_seconds(REAL[0], m[:, None], 128, k[None, :])
    assert table.shape == (200, 200)
    assert np.ndim(compute.gemm_seconds(REAL[0], 64, 64, 64)) == 0


def test_gemm_is_flops_over_peak_when_compute_bound() -> None:
    assert compute.gemm_seconds(BARE, 4096, 8192, 4096, 3, "float16") == pytest.approx(2 * 4096**2 * 8192 * 3 / 312e12)
    with_half = BARE.with_figures({"device.gemm.default.half_depth": 1000.0, "device.gemm.default.fraction": 0.5})
    long = compute.gemm_seconds(with_half, 8192, 8192, 1000, 1, "float16")
    assert long == pytest.approx(2 * 8192**2 * 1000 / 312e12 * 4)  # half of the peak, halved again at k = half_depth


def test_gemm_is_bytes_over_bandwidth_when_thin() -> None:
    moved = 4 * (1 * 8192 + 8192 * 8192 + 1 * 8192)
    assert compute.gemm_seconds(BARE, 1, 8192, 8192) == pytest.approx(moved / 2.039e12)
    assert compute.gemm_seconds(load_machine("h100-80gb"), 1, 8192, 8192, 1, "fp8") < compute.gemm_seconds(
        load_machine("h100-80gb"), 1, 8192, 8192, 1, "bfloat16"
    )


def test_gemm_waves_step_where_the_tiles_fill_the_device() -> None:
    curve = {"device.gemm.default.tiles": [{"rows": 128, "columns": 128}], "device.multiprocessors": 100}
    machine = BARE.with_figures(curve)  # type: ignore[arg-type]
    seconds = [
        float(compute.gemm_seconds(machine, rows * 128, 1280, 4096, 1, "float16")) for rows in (9, 10, 11, 20, 21)
    ]
    wave = 2 * 100 * 128 * 128 * 4096 / 312e12
    assert seconds == pytest.approx([wave, wave, 2 * wave, 2 * wave, 3 * wave])


def test_gemm_threads_follow_the_measured_speedup() -> None:
    cpu = REAL[1]
    one, two, three = (float(compute.gemm_seconds(cpu, 2048, 2048, 2048, threads=t)) for t in (1, 2, 3))
    call = cpu.device.call_seconds
    assert (one - call) / (two - call) == pytest.approx(1.9)
    assert three == two


@given(m=st.integers(1, 10**5), n=st.integers(1, 10**5), k=st.integers(1, 10**5), more=st.integers(1, 10**4))
def test_gemm_is_monotone_in_each_dimension(m: int, n: int, k: int, more: int) -> None:
    for machine in (BARE, *(real.with_figures({"device.gemm.default.misaligned_rate": 1.0}) for real in REAL)):
        now = compute.gemm_seconds(machine, m, n, k)
        larger = [(m + more, n, k), (m, n + more, k), (m, n, k + more)]
        assert all(compute.gemm_seconds(machine, *shape) >= now for shape in larger)
        assert compute.gemm_seconds(machine, m, n, k, 2) >= now


def test_unknown_precision_is_refused() -> None:
    with pytest.raises(MachineError, match="fp8"):
        compute.gemm_seconds(REAL[0], 8, 8, 8, 1, "fp8")


def test_fused_attention_closed_form_and_ratios() -> None:
    machine = BARE.with_figures({"device.attention_fraction.default": 0.5})
    machine = msgspec.structs.replace(
        machine, device=msgspec.structs.replace(machine.device, attention_backward_fraction={})
    )
    forward = compute.fused_attention_seconds(machine, 2, 16, 4096, 4096, 128, "bfloat16")
    assert forward == pytest.approx(4 * 2 * 16 * 4096 * 4096 * 128 / (312e12 * 0.5))
    causal = compute.fused_attention_seconds(machine, 2, 16, 4096, 4096, 128, "bfloat16", causal=True)
    backward = compute.fused_attention_seconds(machine, 2, 16, 4096, 4096, 128, "bfloat16", backward=True)
    assert causal == pytest.approx(forward / 2)
    assert backward == pytest.approx(forward * 2.5)
    decode = compute.fused_attention_seconds(machine, 2, 16, 1, 4096, 128, "bfloat16")
    assert decode == pytest.approx(2 * 16 * 128 * 2 * 4097 * 2 / 2.039e12)  # one query only streams K and V
    blank = msgspec.structs.replace(machine, device=msgspec.structs.replace(machine.device, attention_fraction={}))
    with pytest.raises(MachineError, match=r"device\.attention_fraction\.default"):
        compute.fused_attention_seconds(blank, 1, 1, 8, 8, 8)


def test_traffic_runs_at_the_level_that_holds_it_and_never_gets_faster_with_size() -> None:
    cpu = msgspec.structs.replace(
        REAL[1],
        device=msgspec.structs.replace(
            REAL[1].device,
            memory_bandwidth_bytes_per_second=1e9,
            memory_regimes=(
                MemoryRegime(up_to_bytes=1e6, bandwidth_bytes_per_second=4e9),
                MemoryRegime(up_to_bytes=1e7, bandwidth_bytes_per_second=2e9),
            ),
        ),
    )
    assert compute.traffic_seconds(cpu, np.array([1e6, 1e7, 1e8])) == pytest.approx([1e6 / 4e9, 1e7 / 2e9, 1e8 / 1e9])
    sizes = np.geomspace(1, 1e9, 2000)
    assert (np.diff(compute.traffic_seconds(cpu, sizes)) >= 0).all()


def test_ranks_of_a_host_share_its_memory_bandwidth_beyond_the_caches() -> None:
    cpu = REAL[1]  # 20 GB/s a core, 40 GB/s a host
    assert compute.traffic_seconds(cpu, 1e9, 2) == pytest.approx(1e9 / 20e9)
    assert compute.traffic_seconds(cpu, 1e9, 4) == pytest.approx(1e9 / 10e9)
    assert compute.traffic_seconds(cpu, 1e5, 4) == compute.traffic_seconds(cpu, 1e5, 1)


def test_kernels_by_kind() -> None:
    figures = {
        "norm": KernelFigures(seconds_per_element=1e-9, call_seconds=1e-6, calls=2),
        "norm_backward": KernelFigures(seconds_per_element=3e-9, call_seconds=0.0),
        "copy": KernelFigures(seconds_per_byte=1e-10),
        "default": KernelFigures(bandwidth_fraction=0.5),
    }
    machine = msgspec.structs.replace(BARE, device=msgspec.structs.replace(BARE.device, kernels=figures))
    assert compute.kernel_seconds(machine, "norm", 1e6, 0) == pytest.approx(1e-3 + 2e-6)
    assert compute.kernel_seconds(machine, "norm", 1e6, 0, "float64") == pytest.approx(2e-3 + 2e-6)
    assert compute.kernel_seconds(machine, "norm_backward", 1e6, 0) == pytest.approx(3e-3)
    assert compute.kernel_seconds(machine, "copy", 1, 1e6) == pytest.approx(1e-4)
    assert compute.kernel_seconds(machine, "copy_backward", 1, 1e6) == pytest.approx(1e-4)
    assert compute.kernel_seconds(machine, "dropout", 1, 1e9) == pytest.approx(1e9 / (2.039e12 / 2))
    nothing = msgspec.structs.replace(machine, device=msgspec.structs.replace(machine.device, kernels={}))
    assert compute.kernel_seconds(nothing, "dropout", 1, 1e9) == pytest.approx(1e9 / 2.039e12)


def test_dispatch_bounds_small_kernels_only() -> None:
    machine = BARE.with_figures({"overheads.dispatch_seconds": 1e-5})
    assert compute.dispatched_seconds(machine, np.array([1e-3, 1e-5]), 10) == pytest.approx([1e-3, 1e-4])


def test_smooth_queue_lies_between_the_maximum_and_the_sum() -> None:
    sharp = BARE.with_figures({"overheads.dispatch_seconds": 1e-5, "overheads.collective_dispatch_seconds": 4e-5})
    smooth = sharp.with_figures({"overheads.queue_sharpness": 2.0})
    device = np.array([0.0, 1e-5, 1.4e-4, 1e-2])
    hard, soft = (compute.dispatched_seconds(machine, device, 10, 1) for machine in (sharp, smooth))
    assert hard == pytest.approx([1.4e-4, 1.4e-4, 1.4e-4, 1e-2])
    assert soft == pytest.approx(np.hypot(device, 1.4e-4))
    assert compute.dispatched_seconds(smooth, 0.0, 0) == 0


def test_step_waits_for_the_slowest_of_many_hosts() -> None:
    machine = BARE.with_figures({"overheads.host_speed_sigma": 0.05})
    factors = compute.slowest_host_factor(machine, np.array([1, math.e**2, 64]))
    assert factors == pytest.approx([1, 1.1, 1 + 0.05 * math.sqrt(2 * math.log(64))])
    # Sampled: the mean maximum of normal draws stays below the bound and within a quarter of the excess.
    draws = np.random.default_rng(0).normal(1, 0.05, (4000, 64)).max(axis=1).mean()
    assert 0.75 * (factors[2] - 1) < draws - 1 < factors[2] - 1


def test_misaligned_shapes_run_at_their_own_rate() -> None:
    machine = BARE.with_figures({"device.gemm.default.misaligned_rate": 0.25})
    aligned = float(compute.gemm_seconds(machine, 4096, 4096, 4096, 1, "float16"))
    for shape in ((4097, 4096, 4096), (4096, 4100, 4096), (4096, 4096, 4092)):
        flops = math.prod(shape) / 4096**3
        assert compute.gemm_seconds(machine, *shape, 1, "float16") == pytest.approx(4 * aligned * flops)
    assert compute.gemm_seconds(machine, 4096, 4104, 4096, 1, "float16") < 2 * aligned
    assert compute.gemm_seconds(machine, 4096, 4100, 4096) < 1.1 * compute.gemm_seconds(machine, 4096, 4096, 4096)


def test_oversubscribed_cores_slow_everybody() -> None:
    cpu = REAL[1].with_figures({"host.cores": 2, "host.oversubscription_slowdown": 1.25})
    factors = compute.oversubscription_factor(cpu, np.array([1, 2, 4]), 1)
    assert factors == pytest.approx([1, 1, 2 * 1.25])
    assert compute.oversubscription_factor(cpu, 2, 2) == pytest.approx(2 * 1.25)


def test_messages_are_latency_plus_bytes_on_the_tier_they_use() -> None:
    assert p2p_seconds(BARE, 1e6) == pytest.approx(ALPHA + 1e6 / B)
    assert p2p_seconds(BARE, 1e6, same_host=False) == pytest.approx(NET_ALPHA + 1e6 / NET_CARD)
    assert p2p_seconds(BARE, 1e6, same_host=False, concurrent=8) == pytest.approx(NET_ALPHA + 1e6 / (NET_HOST / 8))
    both = p2p_seconds(BARE, 1e6, np.array([True, False]))
    assert both == pytest.approx([ALPHA + 1e6 / B, NET_ALPHA + 1e6 / NET_CARD])


def measured_machine() -> Machine:
    """Return the bare machine with an all-reduce and a send measured inside a host."""

    def table(operation: str, size: int, scale: float) -> MeasuredCollective:
        regimes = (
            MeasuredRegime(up_to_bytes=1e4, latency_seconds=1e-6 * scale, seconds_per_byte=1e-9 * scale),
            MeasuredRegime(latency_seconds=8e-6 * scale, seconds_per_byte=4e-10 * scale),
        )
        return MeasuredCollective(operation=operation, group_size=size, algorithm="library", regimes=regimes)  # type: ignore[arg-type]

    tables = (table("all_reduce", 4, 3.0), table("all_reduce", 2, 1.0), table("send", 2, 1.0))
    return msgspec.structs.replace(BARE, link_in_host=msgspec.structs.replace(BARE.link_in_host, measured=tables))


def test_measured_regimes_replace_the_formula_inside_the_tier_only() -> None:
    machine = measured_machine()

    def seconds(n: float, p: int, r: int | None = None, algorithm: Algorithm | None = None) -> float:
        return float(communication.collective_seconds(machine, "all_reduce", n, p, r, algorithm))

    assert seconds(1e3, 2) == pytest.approx(1e-6 + 1e-6)
    assert seconds(1e6, 2) == pytest.approx(8e-6 + 4e-4)
    assert seconds(1e4 + 1, 2) >= seconds(1e4, 2)  # the second regime alone would be faster than the first one's end
    assert seconds(1e6, 4) == pytest.approx(3 * seconds(1e6, 2))
    assert seconds(1e6, 3) == pytest.approx(2 * seconds(1e6, 2))  # halfway between the measured sizes
    assert seconds(1e6, 7) == pytest.approx(seconds(1e6, 4) * 2)  # proportional to p - 1 beyond them
    assert seconds(1e6, 4, 2) == communication.collective_seconds(BARE, "all_reduce", 1e6, 4, 2)
    assert seconds(1e6, 2, None, "ring") == communication.collective_seconds(BARE, "all_reduce", 1e6, 2)
    assert p2p_seconds(machine, 1e6) == pytest.approx(8e-6 + 4e-4)
    assert p2p_seconds(machine, 1e6, same_host=False) == p2p_seconds(BARE, 1e6, same_host=False)
