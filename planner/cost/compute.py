"""Seconds of operators on a machine: products, memory-bound kernels, launches, ranks that share a host.

Every argument that is a size may be an array; arguments broadcast, and a scalar call returns a scalar. No formula knows
a model or a plan. Times are those of one rank.
"""

from __future__ import annotations

import numpy as np

from planner.cost.sizes import ELEMENT_BYTES, Seconds, Size, if_any
from planner.errors import MachineError
from planner.machine import GemmCurve, Machine


def gemm_seconds(
    machine: Machine,
    m: Size,
    n: Size,
    k: Size,
    batch: Size = 1,
    precision: str = "float32",
    threads: Size = 1,
    curve: GemmCurve | None = None,
) -> Seconds:
    """Return the time of `batch` products [m, k] x [k, n].

    Roofline (Williams et al. 2009): the larger of arithmetic at the reached rate and traffic at memory bandwidth, plus
    one call and, on several threads, their start. The reached rate is `fraction` x peak, lowered by edges and start-up,
    (1 + half/size) in each dimension (Hockney & Jesshope's n_half), and by tile and wave quantization where the profile
    names tiles: the output is covered by whole tiles, and tiles run in whole waves of one per multiprocessor (NVIDIA,
    "Matrix Multiplication Background User's Guide"). The library takes the fastest tile. Dimensions that are not
    multiples of 16 bytes run at the profile's `misaligned_rate` (the same guide, section "Tensor Core Requirements").
    `curve` stands in for the profile's curve of the precision.

    Raises:
        MachineError: the machine has no peak for the precision.
    """
    curve = curve or machine.device.gemm.get(precision, machine.device.gemm["default"])
    rate = machine.peak_flops_per_second(precision) * curve.fraction * _thread_speedup(machine, threads)
    element = ELEMENT_BYTES[precision]
    arithmetic = _padded_flops(curve, machine.device.multiprocessors or 1, m, n, k, batch) / rate
    if curve.misaligned_rate < 1:
        odd = np.not_equal(np.remainder(m, 16 // element), 0) | np.not_equal(np.remainder(n, 16 // element), 0)
        odd = odd | np.not_equal(np.remainder(k, 16 // element), 0)
        arithmetic = np.where(odd, arithmetic / curve.misaligned_rate, arithmetic)
    moved = np.multiply(batch, (np.multiply(m, k) + np.multiply(k, n)) * element + np.multiply(m, n) * max(2, element))
    work = np.multiply(m, n) * np.multiply(k, batch)
    call = machine.device.call_seconds + np.where(np.greater(threads, 1), machine.host.thread_call_seconds, 0.0)
    return if_any(work, np.maximum(arithmetic, traffic_seconds(machine, moved)) + call)


def _padded_flops(curve: GemmCurve, multiprocessors: int, m: Size, n: Size, k: Size, batch: Size) -> Seconds:
    """Return the FLOPs that the product occupies the device for, at the rate of its best tile."""
    rows, columns, depth = (np.add(size, half) for size, half in _halves(curve, m, n, k))
    if not curve.tiles:
        return np.asarray(2.0 * rows * columns * depth * batch)
    options = []
    for tile in curve.tiles:
        tiles = np.ceil(np.divide(m, tile.rows)) * np.ceil(np.divide(n, tile.columns)) * batch
        waves = np.ceil(tiles / multiprocessors)
        area = waves * multiprocessors * (tile.rows + curve.half_rows) * (tile.columns + curve.half_columns)
        options.append(2.0 * area * depth / tile.relative_rate)
    return np.asarray(np.minimum.reduce(options))


def _halves(curve: GemmCurve, m: Size, n: Size, k: Size) -> tuple[tuple[Size, float], ...]:
    return (m, curve.half_rows), (n, curve.half_columns), (k, curve.half_depth)


def fused_attention_seconds(
    machine: Machine,
    batch: Size,
    heads: Size,
    query_length: Size,
    key_length: Size,
    head_dim: Size,
    precision: str = "float32",
    causal: bool = False,
    backward: bool = False,
) -> Seconds:
    """Return the time of one fused (flash) attention kernel over [batch, query_length, heads, head_dim].

    Forward 4 b a s t d FLOPs, backward 2.5 times that because the scores are recomputed, half of both under a causal
    mask (Dao 2023, arXiv 2307.08691, section 4.1), at the profile's own fraction of the peak; never faster than moving
    the inputs and outputs once.

    Raises:
        MachineError: the profile has no `device.attention_fraction`.
    """
    device = machine.device
    fractions = device.attention_fraction
    if backward and device.attention_backward_fraction:
        fractions = device.attention_backward_fraction
    fraction = fractions.get(precision, fractions.get("default"))
    if fraction is None:
        msg = (
            f"machine '{machine.name}' has no figure device.attention_fraction.default; "
            "add it to the profile or plan plain attention"
        )
        raise MachineError(msg)
    flops = 4.0 * np.multiply(batch, heads) * np.multiply(query_length, key_length) * head_dim
    flops = flops * (2.5 if backward else 1.0) * (0.5 if causal else 1.0)
    tensors = np.multiply(batch, heads) * head_dim * (2.0 * np.add(query_length, key_length))
    moved = tensors * ELEMENT_BYTES[precision] * (2 if backward else 1)
    arithmetic = flops / (machine.peak_flops_per_second(precision) * fraction)
    return if_any(flops, np.maximum(arithmetic, traffic_seconds(machine, moved)) + device.call_seconds)


def traffic_seconds(machine: Machine, moved_bytes: Size, ranks_per_host: Size = 1) -> Seconds:
    """Return the time to move bytes once through the memory level that holds them.

    Working sets up to a regime's size run at its bandwidth. Beyond the caches the ranks of a host share the host's
    memory bandwidth where the profile gives one (STREAM, McCalpin 1995). A larger set never takes less time: a regime
    starts where the one before it ends.
    """
    device, total = machine.device, machine.host.memory_bandwidth_bytes_per_second
    bandwidth: Size = device.memory_bandwidth_bytes_per_second
    if total is not None:
        bandwidth = np.minimum(bandwidth, np.divide(total, ranks_per_host))
    caches = sorted(device.memory_regimes, key=lambda regime: regime.up_to_bytes)
    levels = [(cache.up_to_bytes, cache.bandwidth_bytes_per_second) for cache in caches]
    seconds: Size = 0.0
    start = 0.0
    for end, rate in [*levels, (np.inf, bandwidth)]:
        here = np.maximum(seconds, np.minimum(moved_bytes, end) / rate)
        seconds = np.where(np.greater(moved_bytes, start), here, seconds)
        start = end
    return np.asarray(seconds)[()]


def kernel_seconds(
    machine: Machine,
    kind: str,
    elements: Size,
    moved_bytes: Size,
    precision: str = "float32",
    ranks_per_host: Size = 1,
) -> Seconds:
    """Return the time of a memory-bound operator of a kind.

    The larger of arithmetic (`elements` at the measured time per element) and traffic (`moved_bytes`, read and
    written), plus its calls. `norm_backward` without an entry takes that of `norm`, a kind without any takes "default",
    else pure traffic.
    """
    device = machine.device
    names = (kind, kind.removesuffix("_backward"), "default")
    figures = next((device.kernels[name] for name in names if name in device.kernels), None)
    if figures is None:
        return if_any(moved_bytes, traffic_seconds(machine, moved_bytes, ranks_per_host) + device.call_seconds)
    # Vector lanes hold half as many float64 as float32, so the arithmetic scales like the bytes.
    arithmetic = np.multiply(elements, figures.seconds_per_element * ELEMENT_BYTES[precision] / 4)
    if figures.seconds_per_byte is not None:
        traffic = np.multiply(moved_bytes, figures.seconds_per_byte)
    else:
        traffic = traffic_seconds(machine, moved_bytes, ranks_per_host) / figures.bandwidth_fraction
    call = device.call_seconds if figures.call_seconds is None else figures.call_seconds
    return if_any(np.add(elements, moved_bytes), np.maximum(arithmetic, traffic) + figures.calls * call)


def dispatched_seconds(machine: Machine, device_seconds: Size, kernels: Size, collectives: Size = 0) -> Seconds:
    """Return the time of a stretch of work whose kernels one host thread queues ahead of the device.

    The slower of the two sets the pace: the device's own time, or the host's time to dispatch every kernel and
    collective. Near the crossing the queue runs empty now and then, which the smooth maximum (a^q + b^q)^(1/q) with the
    profile's `queue_sharpness` q describes.
    """
    overheads = machine.overheads
    host = np.multiply(kernels, overheads.dispatch_seconds) + np.multiply(
        collectives, overheads.collective_dispatch_seconds
    )
    slower = np.maximum(device_seconds, host)
    if overheads.queue_sharpness is None:
        return np.asarray(slower)[()]
    ratio = np.minimum(device_seconds, host) / np.where(slower > 0, slower, 1.0)
    order = overheads.queue_sharpness
    return np.asarray(slower * (1 + ratio**order) ** (1 / order))[()]


def exposed_seconds(machine: Machine, communication_seconds: Size, compute_seconds: Size) -> Seconds:
    """Return what a stretch of work takes longer because of communication that may run beside it.

    Up to `overlap_fraction` of the communication hides behind the computation, which it slows by `overlap_slowdown`
    meanwhile (FSDP's prefetched gathers, Zhao et al. 2023, arXiv 2304.11277, section 3.3); the rest is exposed. On CPUs
    all of it is: a core that computes fetches nothing beside it.
    """
    if machine.device.kind == "cpu":
        return np.asarray(communication_seconds, np.float64)[()]
    overheads = machine.overheads
    hidden = np.minimum(np.multiply(communication_seconds, overheads.overlap_fraction), compute_seconds)
    return np.asarray(communication_seconds - hidden + hidden * (overheads.overlap_slowdown - 1))[()]


def early_reduction_seconds(machine: Machine, seconds: Size) -> Seconds:
    """Return what a gradient reduction that starts during the backward pass takes of a CPU rank's own time.

    The core that computes also moves the bytes, between its kernels, but waits less for its peers: a profile's
    `overlap_fraction` and `overlap_slowdown` say by how much that is cheaper or dearer than `seconds`, all at once.
    """
    overheads = machine.overheads
    return np.multiply(seconds, (1 - overheads.overlap_fraction) * overheads.overlap_slowdown)


def slowest_host_factor(machine: Machine, hosts: Size) -> Seconds:
    """Return by how much a step on several hosts is slower than on an average one, because it waits for the slowest.

    1 + sigma sqrt(2 ln hosts): the expected maximum of normal speeds, to leading order (Cramer 1946, section 28.6).
    """
    return np.asarray(1 + machine.overheads.host_speed_sigma * np.sqrt(2 * np.log(np.maximum(hosts, 1))))[()]


def oversubscription_factor(machine: Machine, ranks_per_host: Size, threads_per_rank: Size = 1) -> Seconds:
    """Return by how much computing slows when a host's ranks times threads outnumber its cores (1 when they do not).

    GPU ranks beyond one per device take turns on it as well.
    """
    load = np.multiply(ranks_per_host, threads_per_rank) / machine.host.cores
    slow = np.where(load > 1, load * machine.host.oversubscription_slowdown, 1.0)
    turns = np.ceil(np.divide(ranks_per_host, machine.host.devices)) if machine.device.kind == "gpu" else 1.0
    return np.asarray(np.maximum(slow, turns))[()]


def _thread_speedup(machine: Machine, threads: Size) -> Seconds:
    """Return the measured speedup of a matrix product on several threads (that of the most measured beyond them)."""
    table = np.asarray(machine.host.thread_speedup)
    index = np.clip(np.asarray(threads, dtype=np.int64) - 1, 0, len(table) - 1)
    return np.asarray(table[index])
