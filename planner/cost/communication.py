"""Seconds of messages and collectives on a machine: latency and bandwidth, or what the profile measured.

Every argument that is a size may be an array; arguments broadcast, and a scalar call returns a scalar. No formula knows
a model or a plan. Times are those of one rank. Payload conventions of collectives follow NCCL's and MPI's buffers:

* all_reduce and broadcast: bytes of the buffer, the same on every rank;
* all_gather and reduce_scatter: bytes of the full (gathered, or unreduced) buffer;
* all_to_all: bytes of one rank's whole send buffer, the share that stays included.

On a machine whose transport is staged every call also takes the copies that `planner.cost.staging` prices.
"""

from __future__ import annotations

from itertools import pairwise
from typing import cast, get_args

import numpy as np

from planner.cost.sizes import Flag, Seconds, Size, if_any, regimes_seconds
from planner.cost.staging import chunks, piped_seconds, staged_seconds
from planner.machine import Algorithm, Collective, Link, Machine, MeasuredCollective

_ROUNDS = {"all_reduce": 2, "all_gather": 1, "reduce_scatter": 1, "all_to_all": 1, "broadcast": 1}


def p2p_seconds(machine: Machine, payload_bytes: Size, same_host: Flag = True, concurrent: Size = 1) -> Seconds:
    """Return the time of one message, latency plus bytes over bandwidth (Hockney 1994).

    Args:
        machine: the profile.
        payload_bytes: bytes of the message.
        same_host: whether both ends sit on one host.
        concurrent: messages that leave the same host at once and share its network cards.
    """
    pieces = chunks(machine, payload_bytes)
    payload_bytes = np.divide(payload_bytes, pieces)
    times = []
    for link in (machine.link_in_host, machine.link_between_hosts):
        tables = [table for table in link.measured if table.operation == "send"]
        bandwidth = _rank_bandwidth(link, "send", concurrent)
        formula = link.call_seconds + link.latency_seconds + np.divide(payload_bytes, bandwidth)
        measured = _measured_seconds(link, tables[:1], payload_bytes, 2, concurrent) if tables else formula
        times.append(measured)
    sent = np.where(same_host, *times)
    if machine.staging is not None:
        sent = piped_seconds(staged_seconds(machine, "send", payload_bytes, 2, concurrent), sent, pieces)
    return if_any(payload_bytes, sent)


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
    ranks = np.multiply(on_host, concurrent_groups)
    seconds = seconds + staged_seconds(machine, operation, payload_bytes, group_size, ranks).total
    return if_any(np.multiply(payload_bytes, np.greater(group_size, 1)), seconds)


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
