"""The survey of a machine: what is timed, in which order, in how many seconds, and who works meanwhile.

Rank 0 first works alone while the others sleep, then all ranks compute side by side, then groups of every size
communicate. All of it takes at most a minute, a quarter of that with `quick`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median
from time import perf_counter, sleep

import numpy as np

from executor.calibrate.assemble import Survey, machine_of
from executor.calibrate.between import equal_hosts, time_between
from executor.calibrate.exchanges import Timed, barrier_seconds, group_sizes, time_exchanges
from executor.calibrate.host import memory_bytes, rival, thread_speedup, usable_cores
from executor.calibrate.in_place import InPlace, early_reduction_cost, fastest_algorithms, time_in_place
from executor.calibrate.probes import Probe, ProbeResult, run_probe
from executor.comm import ALGORITHMS, Communicator
from executor.measure import gemm_flops_per_second, resident_bytes
from executor.session import load_kernels
from planner.machine import Machine

Report = Callable[[str, float], None]
"""Told on rank 0 what is being timed and which share of the survey is done."""

_READY_TAG = 2

LLAMA = {"gated_ffn": True, "norm": "rms", "norm_position": "pre", "positions": "rotary", "causal": True}

PROBES: tuple[Probe, ...] = (
    Probe(256, 128, 2, layers=4),
    Probe(512, 128, 8),
    Probe(512, 128, 2, share=0.5),
    Probe(128, 64, 4, layers=4, head_dim=32),
    Probe(1024, 128, 2, layers=1),
    Probe(128, 128, 4, head_dim=32, attention="blocked", clip_norm=1e-3),
    Probe(256, 128, 8, attention="blocked"),
    Probe(512, 64, 4, clip_norm=1e-3, sizes=LLAMA),
    Probe(192, 64, 2, layers=4, attention="blocked"),
    Probe(256, 512, 2),
    Probe(512, 256, 2, layers=1, vocab=8192),
    Probe(1024, 128, 4, layers=1, share=0.5),
    Probe(512, 128, 4, share=0.25, clip_norm=1e-3),
    Probe(256, 128, 1, layers=4, share=0.5),
    Probe(768, 128, 1, layers=1),
    Probe(512, 512, 1, layers=1, attention="blocked"),
    Probe(128, 128, 16, layers=2),
    Probe(256, 256, 2, sizes={"norm_position": "pre", "causal": True}),
    Probe(160, 96, 4, layers=4, head_dim=32),
    Probe(320, 64, 2, layers=2, share=0.5),
    Probe(256, 256, 1, attention="blocked"),
)
QUICK_PROBES: tuple[Probe, ...] = (
    Probe(256, 128, 2),
    Probe(512, 128, 4, layers=1),
    Probe(512, 128, 2, share=0.5, layers=1),
    Probe(128, 64, 4, head_dim=32),
    Probe(1024, 128, 1, layers=1),
    Probe(256, 64, 4, clip_norm=1e-3, sizes=LLAMA),
    Probe(256, 128, 4, attention="blocked"),
    Probe(160, 96, 2, head_dim=32, attention="blocked"),
    Probe(256, 256, 1, layers=1, attention="blocked"),
)
ESSENTIAL = 9
"""So many of the first probes show every kind of operator: they are run even when the time is used up."""

THREAD_PROBES = 2
"""How many of the first probes run on several threads: products of two sizes tell their start from their speed."""

TOGETHER: tuple[int, ...] = (0, 1, 4)
"""Which probes all ranks also run at the same time: in cache, out of it, and with weights that are hardly reused."""


@dataclass(frozen=True)
class _Budget:
    """Seconds for each part of the survey; `together` for each of its probes."""

    alone: float
    threads: float
    together: float
    exchanges: float
    in_place: float
    early: float


DEFAULT = _Budget(alone=24.0, threads=2.0, together=1.0, exchanges=10.0, in_place=10.0, early=3.0)
QUICK = _Budget(alone=3.6, threads=1.0, together=0.5, exchanges=1.6, in_place=1.0, early=0.4)


def profile(comm: Communicator, quick: bool, report: Report | None = None) -> Machine | None:
    """Measure this machine; collective, the Machine is rank 0's.

    Args:
        comm: all ranks of the job, started as for a run of the executor, on one host or several.
        quick: fewer and smaller probes, at most 15 seconds instead of 60.
        report: told of progress on rank 0.

    Raises:
        MachineError: hosts have unequal numbers of ranks, or do not hold them in order.
    """
    hosts = equal_hosts(comm)
    tell = report if report is not None and comm.rank == 0 else _silent
    budget = QUICK if quick else DEFAULT
    survey: Survey | None = None

    def alone() -> None:
        nonlocal survey
        survey = _survey_alone(len(hosts[0]), quick, budget, tell)

    rank_zero_alone(comm, alone)
    together = _probe_together(comm, quick, budget, tell)
    inside = _Inside()
    if comm.rank in hosts[0]:
        inside = _time_inside(comm.subset(hosts[0]), quick, budget, tell)
    _sleep_until_all_are_here(comm)
    between = time_between(
        comm, hosts, quick=quick, seconds=budget.exchanges,
        tell=lambda size: tell(f"collectives on {size} ranks of {len(hosts)} hosts", 0.95),
        meet=lambda: _sleep_until_all_are_here(comm),
    )  # fmt: skip
    if survey is None:
        return None
    survey.together, survey.hosts, survey.between = together, len(hosts), between
    survey.exchanges, survey.barrier_seconds = inside.exchanges, inside.barrier_seconds
    survey.in_place, survey.early_reduction_cost = inside.in_place, inside.early_reduction_cost
    if survey.ranks > survey.cores:
        survey.oversubscription_slowdown = _crowding(survey)
    machine = machine_of(survey)
    tell("; ".join(survey.remarks) or "every median settled", 1.0)
    return machine


@dataclass
class _Inside:
    """What the ranks of one host found about moving bytes among themselves."""

    exchanges: list[Timed] = field(default_factory=list)
    barrier_seconds: float = 0.0
    in_place: list[InPlace] = field(default_factory=list)
    early_reduction_cost: float | None = None


def _time_inside(comm: Communicator, quick: bool, budget: _Budget, tell: Report) -> _Inside:
    """Groups of every size, their meeting, and collectives inside steps, on the ranks of one host."""
    found = _Inside()
    sizes = group_sizes(comm.size)
    for position, size in enumerate(sizes):
        tell(f"collectives on {size} ranks", 0.65 + 0.25 * position / len(sizes))
        if comm.rank < size:
            group = comm.group(range(size), f"profile{size}")
            found.exchanges += time_exchanges(group, quick=quick, seconds=budget.exchanges / len(sizes))
            found.barrier_seconds = barrier_seconds(group)
        _sleep_until_all_are_here(comm)
    tell("collectives inside a step", 0.9)
    _time_in_steps(comm, found, budget)
    return found


def _time_in_steps(comm: Communicator, found: _Inside, budget: _Budget) -> None:
    """Collectives inside steps of all ranks, by the algorithms that rank 0 found fastest."""
    if comm.size == 1:
        return
    whole = [each for each in found.exchanges if each.group_size == comm.size]
    found.in_place = time_in_place(comm, _agreed(comm, fastest_algorithms(whole)), budget.in_place)
    largest = max((size for each in whole for size in each.sizes_bytes), default=0)
    found.early_reduction_cost = early_reduction_cost(
        comm, _agreed(comm, fastest_algorithms(whole, largest)), budget.early
    )


def _agreed(comm: Communicator, own: dict[str, str]) -> dict[str, str]:
    """Rank 0's choice of algorithms, on every rank."""
    names = {operation: ALGORITHMS[operation] for operation in sorted(ALGORITHMS)}
    choice = np.array([names[operation].index(own.get(operation, "native")) for operation in names])
    comm.world.broadcast(choice, key="profile")
    return {operation: names[operation][int(i)] for operation, i in zip(names, choice, strict=True)}


def _silent(_what: str, _share: float) -> None:
    pass


def _survey_alone(ranks: int, quick: bool, budget: _Budget, tell: Report) -> Survey:
    """What rank 0 finds out by itself."""
    tell("matrix products", 0.0)
    survey = Survey(
        ranks=ranks,
        cores=usable_cores(),
        memory_bytes=memory_bytes(),
        resident_bytes=resident_bytes(),
        peak_flops_per_second={name: gemm_flops_per_second(np.dtype(name)) for name in ("float32", "float64")},
    )
    probes = QUICK_PROBES if quick else PROBES
    for probe in (Probe(64, 16, 1), Probe(64, 16, 1, attention="blocked", sizes=LLAMA)):
        load_kernels(probe.plan())  # compiled before time counts
    begun = perf_counter()
    for position, probe in enumerate(probes):
        if position >= ESSENTIAL and perf_counter() > begun + budget.alone:
            survey.remarks.append(f"{len(probes) - position} of {len(probes)} probes left out: the time was used up")
            break
        tell(
            f"training step of hidden {probe.hidden}, {probe.seq_len * probe.batch} tokens",
            0.6 * position / len(probes),
        )
        left = begun + budget.alone - perf_counter()
        survey.alone.append(run_probe(probe, perf_counter() + left / (len(probes) - position)))
    tell("matrix products on several threads", 0.6)
    threads = thread_speedup(survey.cores, probes[:THREAD_PROBES], budget.threads)
    survey.thread_speedup, survey.thread_call_seconds = threads
    if not quick:
        survey.oversubscription_slowdown = _oversubscription(probes[0], survey.alone[0])
    unsettled = sum(not found.stable for found in survey.alone)
    if unsettled:
        survey.remarks.append(
            f"{unsettled} of {len(survey.alone)} probes did not settle: other processes used the cores, profile again "
            "on an idle machine"
        )
    return survey


def _oversubscription(probe: Probe, alone: ProbeResult) -> float:
    """Slowdown beyond halving when two processes share a core: what switching and cold caches cost."""
    with rival():
        shared = run_probe(probe, perf_counter() + 1.0)
    return max(1.0, median(shared.step_seconds) / (2 * median(alone.step_seconds)))


def _crowding(survey: Survey) -> float:
    """Slowdown of more ranks than cores beyond the cores' being shared, as the ranks themselves saw it."""
    load = survey.ranks / survey.cores
    alone = [found for position, found in enumerate(survey.alone) if position in TOGETHER]
    ratios = [
        median(crowded.step_seconds) / median(one.step_seconds) / load
        for crowded, one in zip(survey.together, alone, strict=False)
    ]
    return max(1.0, median(ratios))


def _probe_together(comm: Communicator, quick: bool, budget: _Budget, tell: Report) -> list[ProbeResult]:
    """Some probes on all ranks at the same time."""
    if comm.size == 1:
        return []
    found = []
    probes = QUICK_PROBES if quick else PROBES
    for probe in (probe for position, probe in enumerate(probes) if position in TOGETHER):
        tell(f"the same on all {comm.size} ranks at once", 0.6)
        comm.world.barrier()
        found.append(run_probe(probe, perf_counter() + budget.together))
        _sleep_until_all_are_here(comm)
    return found


def rank_zero_alone(comm: Communicator, work: Callable[[], None]) -> None:
    """Let rank 0 work while the others sleep: ranks that spin in MPI would take its cores."""
    if comm.rank == 0:
        work()
    _sleep_until_all_are_here(comm)


def _sleep_until_all_are_here(comm: Communicator) -> None:
    """A barrier through rank 0 whose waiting ranks leave their cores to others."""
    word = np.zeros(1)
    if comm.rank:
        comm.world.isend(word, 0, _READY_TAG, key="ready", synchronous=False).wait()
        _sleep_for(comm, 0)
        return
    for peer in range(1, comm.size):
        _sleep_for(comm, peer)
    for peer in range(1, comm.size):
        comm.world.isend(word, peer, _READY_TAG, key="ready", synchronous=False).wait()


def _sleep_for(comm: Communicator, peer: int) -> None:
    """Wait for a word from another rank, asleep."""
    request = comm.world.irecv(np.zeros(1), peer, _READY_TAG, key="ready")
    while not request.test():
        sleep(1e-3)
