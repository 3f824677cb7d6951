"""From what was timed to a Machine: every figure fitted, every group saying where it comes from."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version

import numpy as np

from executor.calibrate.between import Between
from executor.calibrate.exchanges import Timed
from executor.calibrate.fit import evaluate, fit_attention, fit_concurrent, fit_excess, fit_gemm, fit_regimes
from executor.calibrate.in_place import InPlace
from executor.calibrate.probes import Observation, ProbeResult
from executor.environment import describe_environment
from planner.machine import (
    GENERIC_PROFILE,
    AttentionFigures,
    Device,
    Framework,
    GemmSample,
    Host,
    KernelFigures,
    Link,
    Machine,
    MeasuredRegime,
    MemoryOverhead,
    Overheads,
    Residuals,
    load_machine,
)
from planner.program.rank import ITEM_BYTES

MIN_STEP_LOG_SIGMA = 0.04
"""No prediction claims to know a step better than this: equal runs differ by a few percent on an idle machine."""

DEFAULT_COLLECTIVE_LOG_SIGMA = 0.15
"""Spread claimed for links that nothing was timed on."""

FALLBACK_KERNEL = "activation_backward"
"""One multiply per element: what kinds that no probe has take by the byte."""


@dataclass
class Survey:
    """Everything that was timed on a machine, as rank 0 knows it; `ranks` and all but `between` are of one host."""

    ranks: int
    cores: int
    memory_bytes: float
    resident_bytes: float
    peak_flops_per_second: dict[str, float]
    alone: list[ProbeResult] = field(default_factory=list)
    together: list[ProbeResult] = field(default_factory=list)
    exchanges: list[Timed] = field(default_factory=list)
    in_place: list[InPlace] = field(default_factory=list)
    early_reduction_cost: float | None = None  # over that of one that is waited for; None with one rank
    barrier_seconds: float = 0.0
    hosts: int = 1
    between: Between = field(default_factory=Between)
    thread_speedup: tuple[float, ...] = (1.0,)
    thread_call_seconds: float = 0.0
    oversubscription_slowdown: float = 1.0
    remarks: list[str] = field(default_factory=list)


def machine_of(survey: Survey) -> Machine:
    """Fit all figures of a machine."""
    environment = describe_environment()
    library = next((each for each in environment["blas"] if each["architecture"]), None)
    kernels = f"{library['name']} {library['architecture']}" if library else "BLAS"
    where = f"{environment['processor']}, {survey.cores} cores, {kernels}, {environment['mpi'] or 'no MPI'}"
    provenance = f"measured by meshwright {version('meshwright')} on {environment['host']}: {where}"
    if survey.remarks:
        provenance += "; " + "; ".join(survey.remarks)
    device, kernel_sigma = _device(survey, environment["processor"], provenance)
    gemm_slowdown, gemm_seconds_per_byte = concurrent_products(survey)
    generic = load_machine(GENERIC_PROFILE)
    link = link_of(survey.exchanges, provenance, in_place=_in_place(survey)) or generic.link_in_host
    shared = survey.between.host_bytes_per_second
    between = link_of(survey.between.exchanges, provenance, shared=shared) or generic.link_between_hosts
    several = survey.hosts > 1
    return Machine(
        name=f"{environment['host']}-cpu" + (f"-{survey.hosts}-hosts" if several else ""),
        description=(f"{survey.hosts} hosts, each " if several else "") + where,
        hosts=survey.hosts,
        host=Host(
            provenance=provenance,
            devices=survey.cores,
            cores=survey.cores,
            memory_bytes=survey.memory_bytes,
            thread_speedup=survey.thread_speedup,
            thread_call_seconds=survey.thread_call_seconds,
            oversubscription_slowdown=survey.oversubscription_slowdown,
            concurrent_gemm_slowdown=gemm_slowdown,
            concurrent_gemm_seconds_per_byte=gemm_seconds_per_byte,
        ),
        device=device,
        link_in_host=link,
        link_between_hosts=between,
        overheads=_overheads(survey, link, provenance),
        memory=MemoryOverhead(provenance=provenance, context_bytes=survey.resident_bytes),
        residuals=Residuals(
            provenance=f"spread of log(measured / fitted); steps: of equal steps of a probe; {provenance}",
            step_log_sigma=max(MIN_STEP_LOG_SIGMA, _step_noise(survey.alone)),
            kernel_log_sigma=kernel_sigma,
            collective_log_sigma=link_sigma([*survey.exchanges, *survey.between.exchanges]),
        ),
        framework=Framework(provenance="the receiver copies a message when it asks for it", blocking_messages=True),
        # Where a collective or group was not measured, the formula of MPI libraries' long-message algorithms serves.
        algorithms={"default": "halving_doubling"},
    )


def _overheads(survey: Survey, link: Link, provenance: str) -> Overheads:
    """The interpreter's time around tasks, micro-batches and steps."""
    cost = 1.0 if survey.early_reduction_cost is None else survey.early_reduction_cost
    return Overheads(
        provenance=provenance,
        dispatch_seconds=_median(probe.gap_seconds for probe in survey.alone),
        collective_dispatch_seconds=survey.barrier_seconds or survey.between.barrier_seconds,
        micro_batch_seconds=_median(probe.load_seconds for probe in survey.alone),
        step_seconds=max(0.0, _median(probe.around_seconds for probe in survey.alone)),
        exchange_seconds=_exchange_seconds(survey, link),
        overlap_fraction=max(0.0, 1 - cost),
        overlap_slowdown=max(1.0, cost),
    )


def _exchange_seconds(survey: Survey, link: Link) -> float:
    """Posting a receive and starting a send, as pipeline ranks do for every message."""
    calls = [each.seconds for each in survey.in_place if each.operation == "exchange"]
    return 2 * float(np.mean(calls)) if calls else link.latency_seconds


def _median(values: Iterable[float]) -> float:
    return float(np.median(list(values)))


def _step_noise(probes: Sequence[ProbeResult]) -> float:
    """Relative spread of equal steps: 1.48 median absolute deviations of their logarithms."""
    logs = np.concatenate([np.log(probe.step_seconds) - np.log(np.median(probe.step_seconds)) for probe in probes])
    return float(1.4826 * np.median(np.abs(logs)))


# ---- compute ---------------------------------------------------------------------------------------------------------


def figure_name(kind: str) -> str:
    """Name of a task kind's figures in a profile: "norm.backward" is "norm_backward"."""
    operator, _, way = kind.partition(".")
    return f"{operator}_backward" if way.startswith("backward") else operator


def _device(survey: Survey, processor: str, provenance: str) -> tuple[Device, float]:
    """The device; the spread of all kernel fits."""
    by_name: dict[str, list[Observation]] = defaultdict(list)
    for probe in survey.alone:
        for each in probe.observations:
            by_name[figure_name(each.kind) if not each.kind.startswith("linear") else "linear"].append(each)
    slowdown = concurrent_slowdowns(survey)
    products = by_name.pop("linear")
    samples = gemm_samples(products)
    rates = [2 * each.m * each.n * each.k / each.seconds for each in samples]
    peaks = dict(survey.peak_flops_per_second)
    peaks["float32"] = max(peaks["float32"], *rates)
    gemm = fit_gemm([(s.m, s.n, s.k) for s in samples], [s.seconds for s in samples], peaks["float32"])
    kernels, attention, sigmas = {}, {}, [gemm.log_sigma]
    for name, found in sorted(by_name.items()):
        if name == "loss_sum":  # a collective: nothing is summed on one rank
            continue
        fitted = _operator_figures(name, found, slowdown.get(name, 1.0))
        sigmas.append(fitted[1])
        if isinstance(fitted[0], AttentionFigures):
            attention[name] = fitted[0]
        else:
            kernels[name] = fitted[0]
    kernels["default"] = kernels[FALLBACK_KERNEL]
    largest = max(by_name["optimizer"], key=lambda each: int(each.work.bytes))
    device = Device(
        provenance=provenance,
        name=processor,
        kind="cpu",
        peak_flops_per_second=peaks,  # type: ignore[arg-type]
        gemm={"default": gemm.curve},
        gemm_samples=samples,
        attention=attention,
        memory_bytes=survey.memory_bytes / survey.cores,
        memory_bandwidth_bytes_per_second=float(largest.work.bytes) / largest.seconds,
        kernels=kernels,
        call_seconds=gemm.call_seconds,
    )
    return device, float(np.sqrt(np.mean(np.square(sigmas))))


def gemm_samples(products: Sequence[Observation]) -> tuple[GemmSample, ...]:
    """One sample per product and shape."""
    found: dict[tuple[str, int, int, int], list[float]] = defaultdict(list)
    for each in products:
        work = each.work
        found[each.kind.partition(".")[2], int(work.m), int(work.n), int(work.k)].append(each.seconds)
    return tuple(
        GemmSample(form=form, m=m, n=n, k=k, seconds=float(np.median(seconds)))  # type: ignore[arg-type]
        for (form, m, n, k), seconds in sorted(found.items())
    )


def _operator_figures(
    name: str, found: Sequence[Observation], slowdown: float
) -> tuple[KernelFigures | AttentionFigures, float]:
    """Figures of one kind and what the fit leaves unexplained."""
    seconds = [each.seconds for each in found]
    if name.startswith("attention_"):
        fit = fit_attention([each.work for each in found], seconds)
        terms = {key: getattr(fit.figures, key) for key in fit.figures.__struct_fields__}
        return AttentionFigures(**(terms | {"concurrent_slowdown": slowdown})), fit.log_sigma
    # The norm's task counts what it sends; what takes its time is reading every gradient once.
    moved = [4 * each.work.elements if name == "gradient_norm" else each.work.bytes for each in found]
    line = fit_regimes([float(each) for each in moved], seconds)
    return KernelFigures(regimes=line.regimes, concurrent_slowdown=slowdown), line.log_sigma


def concurrent_slowdowns(survey: Survey) -> dict[str, float]:
    """Seconds beside other ranks over seconds alone, by figure, matrix products apart; never below 1."""
    ratios: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for each, alone, together in _beside_others(survey):
        if not each.kind.startswith("linear"):
            ratios[figure_name(each.kind)].append((together, alone))
    found = {name: sum(a for a, _ in pairs) / sum(b for _, b in pairs) for name, pairs in ratios.items()}
    return {name: max(1.0, ratio) for name, ratio in found.items()}


def concurrent_products(survey: Survey) -> tuple[float, float]:
    """Slowdown of matrix products beside other ranks, and seconds per byte of operands that come on top."""
    found = [(each.work, *times) for each, *times in _beside_others(survey) if each.kind.startswith("linear")]
    if not found:
        return 1.0, 0.0
    works, alone, together = zip(*found, strict=True)
    moved = [ITEM_BYTES["float32"] * int(w.m * w.k + w.k * w.n + w.m * w.n) * int(w.batch) for w in works]
    return fit_concurrent(alone, together, moved)


def _beside_others(survey: Survey) -> list[tuple[Observation, float, float]]:
    """What was timed both ways: seconds alone and, scaled to as many ranks as cores, beside other ranks."""
    alone = {(each.kind, each.work): each.seconds for probe in survey.alone for each in probe.observations}
    share = min(1.0, (survey.ranks - 1) / max(1, survey.cores - 1))
    return [
        (each, before, before + (each.seconds - before) / share)
        for probe in survey.together
        for each in probe.observations
        if share > 0 and (before := alone.get((each.kind, each.work)))
    ]


# ---- communication ---------------------------------------------------------------------------------------------------


def link_of(
    exchanges: Sequence[Timed],
    provenance: str,
    *,
    in_place: dict[str, MeasuredRegime] | None = None,
    shared: float | None = None,
) -> Link | None:
    """The link that some groups use, None where nothing was timed.

    Args:
        exchanges: what was timed on it.
        provenance: where that was.
        in_place: what a step adds.
        shared: bytes per second that all ranks of a host send together, where that is a limit of the link's.
    """
    if not exchanges:
        return None
    messages = min((each for each in exchanges if each.operation == "send"), key=lambda each: each.group_size)
    largest = max(zip(messages.sizes_bytes, messages.seconds, strict=True))
    bandwidth = largest[0] / largest[1]
    return Link(
        provenance=provenance,
        latency_seconds=messages.fit().regimes[0].latency_seconds,
        bandwidth_bytes_per_second=bandwidth,
        shared_bandwidth_bytes_per_second=None if shared is None else max(bandwidth, shared),
        measured=tuple(each.measured() for each in exchanges),
        in_place=in_place or {},
    )


def link_sigma(exchanges: Sequence[Timed]) -> float:
    """The spread of the collectives' fits."""
    if not exchanges:
        return DEFAULT_COLLECTIVE_LOG_SIGMA
    return float(np.sqrt(np.mean([each.fit().log_sigma ** 2 for each in exchanges])))


def _in_place(survey: Survey) -> dict[str, MeasuredRegime]:
    """What each collective takes inside a step beyond its time alone, on as many ranks as the survey had."""
    alone = {(t.operation, t.algorithm): t.fit().regimes for t in survey.exchanges if t.group_size == survey.ranks}
    found: dict[str, list[InPlace]] = defaultdict(list)
    for each in survey.in_place:
        if (each.operation, each.algorithm) in alone:
            found[each.operation].append(each)
    return {
        operation: fit_excess(
            [each.full_bytes for each in them],
            [each.seconds for each in them],
            [evaluate(alone[operation, each.algorithm], each.full_bytes) for each in them],
        )
        for operation, them in found.items()
    }
