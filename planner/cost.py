"""Seconds of operators and collectives on a machine: pure formulas over numbers or NumPy arrays alike.

Every argument that is a size may be an array; arguments broadcast, and a scalar call returns a scalar. No formula knows
a model or a plan. Times are those of one rank. Payload conventions of collectives follow NCCL's and MPI's buffers:

* all_reduce and broadcast: bytes of the buffer, the same on every rank;
* all_gather and reduce_scatter: bytes of the full (gathered, or unreduced) buffer;
* all_to_all: bytes of one rank's whole send buffer, the share that stays included.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, TypeAlias, cast, get_args

import numpy as np
import numpy.typing as npt

from planner.errors import MachineError
from planner.machine import Algorithm, Collective, GemmCurve, Link, Machine, MeasuredCollective, MeasuredRegime

Size: TypeAlias = float | npt.NDArray[Any]
Flag: TypeAlias = bool | npt.NDArray[np.bool_]
Seconds: TypeAlias = npt.NDArray[np.float64]  # of the broadcast shape; a NumPy scalar for scalar arguments

ELEMENT_BYTES = {"float64": 8, "float32": 4, "tf32": 4, "float16": 2, "bfloat16": 2, "fp8": 1}
_ROUNDS = {"all_reduce": 2, "all_gather": 1, "reduce_scatter": 1, "all_to_all": 1, "broadcast": 1}


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
    one call. The reached rate is `fraction` x peak, lowered by edges and start-up, (1 + half/size) in each dimension
    (Hockney & Jesshope's n_half), and by tile and wave quantization where the profile names tiles: the output is
    covered by whole tiles, and tiles run in whole waves of one per multiprocessor (NVIDIA, "Matrix Multiplication
    Background User's Guide"). The library takes the fastest tile. Dimensions that are not multiples of 16 bytes run at
    the profile's `misaligned_rate` (the same guide, section "Tensor Core Requirements"). `curve` stands in for the
    profile's curve of the precision.

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
    return _if_any(work, np.maximum(arithmetic, traffic_seconds(machine, moved)) + machine.device.call_seconds)


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
    return _if_any(flops, np.maximum(arithmetic, traffic_seconds(machine, moved)) + device.call_seconds)


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
        return _if_any(moved_bytes, traffic_seconds(machine, moved_bytes, ranks_per_host) + device.call_seconds)
    # Vector lanes hold half as many float64 as float32, so the arithmetic scales like the bytes.
    arithmetic = np.multiply(elements, figures.seconds_per_element * ELEMENT_BYTES[precision] / 4)
    if figures.seconds_per_byte is not None:
        traffic = np.multiply(moved_bytes, figures.seconds_per_byte)
    else:
        traffic = traffic_seconds(machine, moved_bytes, ranks_per_host) / figures.bandwidth_fraction
    call = device.call_seconds if figures.call_seconds is None else figures.call_seconds
    return _if_any(np.add(elements, moved_bytes), np.maximum(arithmetic, traffic) + figures.calls * call)


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
    meanwhile (FSDP's prefetched gathers, Zhao et al. 2023, arXiv 2304.11277, section 3.3); the rest is exposed.
    """
    overheads = machine.overheads
    hidden = np.minimum(np.multiply(communication_seconds, overheads.overlap_fraction), compute_seconds)
    return np.asarray(communication_seconds - hidden + hidden * (overheads.overlap_slowdown - 1))[()]


def slowest_host_factor(machine: Machine, hosts: Size) -> Seconds:
    """Return by how much a step on several hosts is slower than on an average one, because it waits for the slowest.

    1 + sigma sqrt(2 ln hosts): the expected maximum of normal speeds, to leading order (Cramer 1946, section 28.6).
    """
    return np.asarray(1 + machine.overheads.host_speed_sigma * np.sqrt(2 * np.log(np.maximum(hosts, 1))))[()]


def oversubscription_factor(machine: Machine, ranks_per_host: Size, threads_per_rank: Size = 1) -> Seconds:
    """Return by how much computing slows when a host's ranks times threads outnumber its cores (1 when they do not)."""
    load = np.multiply(ranks_per_host, threads_per_rank) / machine.host.cores
    return np.asarray(np.where(load > 1, load * machine.host.oversubscription_slowdown, 1.0))[()]


def p2p_seconds(machine: Machine, payload_bytes: Size, same_host: Flag = True, concurrent: Size = 1) -> Seconds:
    """Return the time of one message, latency plus bytes over bandwidth (Hockney 1994).

    Args:
        machine: the profile.
        payload_bytes: bytes of the message.
        same_host: whether both ends sit on one host.
        concurrent: messages that leave the same host at once and share its network cards.
    """
    times = []
    for link in (machine.link_in_host, machine.link_between_hosts):
        tables = [table for table in link.measured if table.operation == "send"]
        bandwidth = _rank_bandwidth(link, "send", concurrent)
        formula = link.call_seconds + link.latency_seconds + np.divide(payload_bytes, bandwidth)
        measured = _measured_seconds(link, tables[:1], payload_bytes, 2, concurrent) if tables else formula
        times.append(measured)
    return _if_any(payload_bytes, np.where(same_host, *times))


def collective_seconds(
    machine: Machine,
    operation: Collective,
    payload_bytes: Size,
    group_size: Size,
    ranks_per_host: Size | None = None,
    algorithm: str | None = None,
    concurrent_groups: Size = 1,
) -> Seconds:
    """Return the time of one collective on one group.

    Latency plus bandwidth per algorithm: Thakur, Rabenseifner & Gropp 2005 (recursive doubling, halving and doubling,
    ring), Patarasu & Yuan 2009 (ring all-reduce moves the least possible, 2 (p-1)/p n), NCCL's double binary tree
    (Sanders, Speck & Träff 2009) and hop latencies by tier (NCCL tuning model). Measured regimes of the operation,
    where the profile has them for a group inside one tier, replace the formulas.

    Args:
        machine: the profile.
        operation: the collective.
        payload_bytes: see the module's conventions.
        group_size: ranks in the group; a group of one costs nothing.
        ranks_per_host: how many of the group sit on one host; None: all of them.
        algorithm: None for the profile's choice, or the fastest that it has measured; "auto" for the fastest formula;
            or the name of one, measured or of a formula.
        concurrent_groups: groups like this one that use the same hosts' network cards at once.
    """
    known = algorithm in get_args(Algorithm)
    chosen = cast(Algorithm, algorithm) if known else machine.algorithm(operation)
    on_host = np.minimum(group_size, group_size if ranks_per_host is None else ranks_per_host)
    seconds = _formula_seconds(machine, operation, payload_bytes, group_size, on_host, chosen, concurrent_groups)
    inside = np.greater_equal(on_host, group_size)
    tiers = [(machine.link_in_host, 1, inside)]
    counts = {table.ranks_per_host for table in machine.link_between_hosts.measured}
    tiers += [(machine.link_between_hosts, count, ~inside & np.equal(on_host, count)) for count in sorted(counts)]
    for link, count, applies in tiers:
        tables = [table for table in link.measured if (table.operation, table.ranks_per_host) == (operation, count)]
        tables = [table for table in tables if algorithm in (None, "auto", table.algorithm)]
        if tables:
            measured = _measured_seconds(link, tables, payload_bytes, group_size, concurrent_groups)
            seconds = np.where(applies, measured, seconds)
    return _if_any(np.multiply(payload_bytes, np.greater(group_size, 1)), seconds)


def _formula_seconds(
    machine: Machine, operation: Collective, n: Size, p: Size, r: Size, algorithm: Algorithm, concurrent: Size
) -> Seconds:
    """Return latency plus bandwidth of a collective over p ranks, r of them on each host."""
    if algorithm == "auto":
        names: tuple[Algorithm, ...] = ("ring", "tree", "recursive_doubling", "halving_doubling", "hierarchical")
        every = [_formula_seconds(machine, operation, n, p, r, name, concurrent) for name in names]
        return np.asarray(np.minimum.reduce(every))
    if algorithm == "hierarchical":
        return _hierarchical_seconds(machine, operation, n, p, r, concurrent)
    host, network = machine.link_in_host, machine.link_between_hosts
    hosts = np.ceil(np.divide(p, r))
    steps, volume = _steps_and_volume(operation, algorithm, n, p)
    # Of the hops that a chunk makes, those between hosts: one per host for a ring, log2 of the hosts for a tree.
    network_steps, _ = _steps_and_volume(operation, algorithm, n, hosts)
    latency = network_steps * network.latency_seconds + (steps - network_steps) * host.latency_seconds
    in_host = np.where(np.greater(r, 1), volume / _rank_bandwidth(host, operation, np.multiply(r, concurrent)), 0.0)
    group_bandwidth = _host_bandwidth(network, operation, r, concurrent)
    # Ring and tree cross each host boundary with one rank's volume; all-to-all with that of all r ranks of the host.
    crossing = volume
    if operation == "all_to_all":
        crossing = np.multiply(r, volume) * np.subtract(p, r) / np.maximum(np.subtract(p, 1), 1)
    between = np.where(hosts > 1, crossing / group_bandwidth, 0.0)
    call = np.where(hosts > 1, network.call_seconds, host.call_seconds)
    return np.asarray(call + latency + np.maximum(in_host, between))


def _steps_and_volume(operation: Collective, algorithm: Algorithm, n: Size, p: Size) -> tuple[Seconds, Seconds]:
    """Return the latency-bound steps, and the bytes that the busiest rank sends, for p ranks on one tier."""
    rounds = _ROUNDS[operation]
    p = np.maximum(p, 1)
    levels = np.ceil(np.log2(p))
    ring_steps, share = np.subtract(p, 1.0), np.multiply(n, np.subtract(p, 1.0) / p)
    pipelined = np.multiply(n, np.minimum(ring_steps, 1.0))  # a broadcast down a chain or tree sends all n bytes once
    if algorithm == "ring":
        return rounds * ring_steps, pipelined if operation == "broadcast" else rounds * share
    if algorithm == "tree" and operation in ("all_reduce", "broadcast"):
        return rounds * levels, rounds * pipelined
    if algorithm == "recursive_doubling" and operation in ("all_reduce", "broadcast"):
        return levels, np.multiply(n, levels)
    if operation == "all_to_all":  # Bruck et al. 1997: log2 p steps, each with half of the buffer
        return levels, np.multiply(n, levels / 2)
    # Recursive halving and doubling (Rabenseifner 2004); van de Geijn's scatter and all-gather for broadcast.
    passes = 2 if operation == "broadcast" else rounds
    return passes * levels, passes * share


def _hierarchical_seconds(
    machine: Machine, operation: Collective, n: Size, p: Size, r: Size, concurrent: Size
) -> Seconds:
    """Return a two-level collective: rings inside each host, and r rings between hosts, one per local rank.

    All-reduce is reduce-scatter inside, all-reduce of 1/r across, all-gather inside (Cho et al. 2019, BlueConnect).
    """
    hosts = np.ceil(np.divide(p, r))
    shard = np.divide(n, r)
    many = np.multiply(concurrent, r)

    def inside(op: Collective, size: Size) -> Seconds:
        return np.where(np.greater(r, 1), _formula_seconds(machine, op, size, r, r, "ring", concurrent), 0.0)

    def across(op: Collective, size: Size) -> Seconds:
        return np.where(hosts > 1, _formula_seconds(machine, op, size, hosts, 1, "ring", many), 0.0)

    if operation == "all_reduce":
        return inside("reduce_scatter", n) + across("all_reduce", shard) + inside("all_gather", n)
    if operation in ("all_gather", "reduce_scatter"):
        return inside(operation, n) + across(operation, shard)
    if operation == "all_to_all":
        return inside(operation, n) + across(operation, n)
    return across("broadcast", shard) + inside("broadcast", n) + inside("all_gather", n)


def _rank_bandwidth(link: Link, operation: str, sharing: Size) -> Seconds:
    """Return what one rank gets of a link when `sharing` ranks of its host use it."""
    share = link.efficiency.get(operation, link.efficiency.get("default", 1.0))
    bandwidth = np.asarray(link.bandwidth_bytes_per_second, dtype=np.float64)
    if link.shared_bandwidth_bytes_per_second is not None:
        bandwidth = np.minimum(bandwidth, np.divide(link.shared_bandwidth_bytes_per_second, sharing))
    return np.asarray(bandwidth * share)


def _host_bandwidth(link: Link, operation: str, ranks: Size, concurrent: Size) -> Seconds:
    """Return what `ranks` ranks of one host reach together, each through its own card, beside other groups."""
    share = link.efficiency.get(operation, link.efficiency.get("default", 1.0))
    bandwidth = np.multiply(ranks, link.bandwidth_bytes_per_second)
    if link.shared_bandwidth_bytes_per_second is not None:
        bandwidth = np.minimum(bandwidth, np.divide(link.shared_bandwidth_bytes_per_second, concurrent))
    return np.asarray(bandwidth * share)


def _measured_seconds(link: Link, tables: list[MeasuredCollective], n: Size, p: Size, concurrent: Size) -> Seconds:
    """Return measured times of a group beside other groups, all of which share what their host's cards carry.

    What was measured is one group alone: beside others, the part of its time that grows with the bytes stretches as far
    as their sum exceeds `shared_bandwidth_bytes_per_second`.
    """
    alone = _interpolated_seconds(tables, n, p)
    if link.shared_bandwidth_bytes_per_second is None:
        return alone
    load = np.multiply(concurrent, link.bandwidth_bytes_per_second / link.shared_bandwidth_bytes_per_second)
    return np.asarray(alone + np.maximum(load - 1, 0) * (alone - _interpolated_seconds(tables, np.sign(n), p)))


def _interpolated_seconds(tables: list[MeasuredCollective], n: Size, p: Size) -> Seconds:
    """Return measured times: linear in the group size between measured sizes, proportional to p - 1 outside them.

    Of several algorithms the fastest for the bytes at hand.
    """
    sizes = sorted({table.group_size for table in tables})
    times = {
        size: np.minimum.reduce([regimes_seconds(t.regimes, n) for t in tables if t.group_size == size])
        for size in sizes
    }
    first, last = sizes[0], sizes[-1]
    seconds = times[first] * np.subtract(p, 1) / (first - 1)
    for low, high in pairwise(sizes):
        weight = np.subtract(p, low) / (high - low)
        between = (1 - weight) * times[low] + weight * times[high]
        seconds = np.where(np.greater_equal(p, low), between, seconds)
    beyond = times[last] * np.subtract(p, 1) / (last - 1)
    return np.asarray(np.where(np.greater_equal(p, last), beyond, seconds))


def regimes_seconds(regimes: tuple[MeasuredRegime, ...], n: Size) -> Seconds:
    """Return latency plus bandwidth of the regime of a size, never less than the end of the regimes before it."""
    seconds = np.zeros(np.shape(n))
    start = 0.0
    for regime in sorted(regimes, key=lambda item: item.up_to_bytes or np.inf):
        end = regime.up_to_bytes or np.inf
        here = regime.latency_seconds + regime.seconds_per_byte * np.minimum(n, end)
        seconds = np.where(np.greater(n, start), np.maximum(seconds, here), seconds)
        start = end
    return np.asarray(seconds)


def _thread_speedup(machine: Machine, threads: Size) -> Seconds:
    """Return the measured speedup of a matrix product on several threads (that of the most measured beyond them)."""
    table = np.asarray(machine.host.thread_speedup)
    index = np.clip(np.asarray(threads, dtype=np.int64) - 1, 0, len(table) - 1)
    return np.asarray(table[index])


def _if_any(work: Size, seconds: Size) -> Seconds:
    """Return the seconds where there is work, zero elsewhere: nothing is called for nothing."""
    return np.asarray(np.where(np.greater(work, 0), seconds, 0.0))[()]
