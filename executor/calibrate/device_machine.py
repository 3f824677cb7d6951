"""From what was timed on CUDA devices to a Machine: figures per precision, host time, memory, transports."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import TypeVar

import msgspec
import numpy as np

from executor.calibrate.assemble import (
    DEFAULT_COLLECTIVE_LOG_SIGMA,
    FALLBACK_KERNEL,
    MIN_STEP_LOG_SIGMA,
    figure_name,
    gemm_samples,
    link_of,
    link_sigma,
)
from executor.calibrate.copies import Copies
from executor.calibrate.device_probes import DeviceProbeResult
from executor.calibrate.exchanges import Timed
from executor.calibrate.fit import GemmFit, fit_attention, fit_gemm, fit_regimes, fit_scratch
from executor.calibrate.probes import Observation
from executor.comm.staged import CHUNK_BYTES
from executor.device.base import DeviceNote
from executor.environment import describe_environment
from planner.machine import (
    GENERIC_PROFILE,
    AttentionFigures,
    Device,
    Framework,
    GemmSample,
    Host,
    KernelFigures,
    Machine,
    MemoryOverhead,
    Overheads,
    PrecisionFigures,
    Residuals,
    Staging,
    Transport,
    TransportFigures,
    load_machine,
)

BASE = "float32"
"""The precision whose figures serve where another has none of its own."""

F = TypeVar("F", Device, PrecisionFigures)

MAX_REGIMES = 2
"""Of a kernel's bytes: what fits into the cache of the device, and what does not."""


@dataclass
class DeviceSurvey:
    """Everything that was timed on the devices of a host, as rank 0 knows it."""

    ranks: int
    devices: int
    cores: int
    host_memory_bytes: float
    note: DeviceNote
    peak_flops_per_second: dict[str, float]
    copy_bytes_per_second: float
    copies: Copies
    context_bytes: float = 0.0
    probes: list[DeviceProbeResult] = field(default_factory=list)
    exchanges: list[Timed] = field(default_factory=list)
    meeting_seconds: float = 0.0
    direct: dict[str, list[Timed]] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)


def device_machine_of(survey: DeviceSurvey) -> Machine:
    """Fit all figures of a machine."""
    environment, note = describe_environment(), survey.note
    where = (
        f"{survey.devices} x {note.name}, CUDA {note.runtime}, {environment['processor']}, {survey.cores} cores, "
        f"{environment['mpi'] or 'no MPI'}"
    )
    provenance = f"measured by meshwright {version('meshwright')} on {environment['host']}: {where}"
    if survey.remarks:
        provenance += "; " + "; ".join(survey.remarks)
    device, kernel_sigma = _device(survey, provenance)
    host_seconds, calls = host_times(survey.probes)
    device = with_calls(device, calls)
    device = with_scratch(device, survey.probes)
    machine = Machine(
        name=f"{note.name.lower().replace(' ', '-')}-measured",
        description=where,
        host=Host(
            provenance=provenance,
            devices=survey.devices,
            ranks_per_device=-(-survey.ranks // survey.devices),
            cores=survey.cores,
            memory_bytes=survey.host_memory_bytes,
        ),
        device=device,
        link_in_host=load_machine(GENERIC_PROFILE).link_in_host,
        link_between_hosts=load_machine(GENERIC_PROFILE).link_between_hosts,
        overheads=Overheads(
            provenance=f"{provenance}; host time per launch, of which a task makes `calls`; overlap is assumed",
            dispatch_seconds=host_seconds,
            collective_dispatch_seconds=survey.meeting_seconds or host_seconds,
            step_seconds=max(0.0, _median(probe.around_seconds for probe in survey.probes)),
            exchange_seconds=host_seconds,
        ),
        memory=MemoryOverhead(
            provenance=f"what the arena takes beyond its peak, median of {len(survey.probes)} probes; {provenance}",
            context_bytes=survey.context_bytes,
            fragmentation_fraction=max(
                0.0, _median(p.reserved_bytes / max(1, p.peak_bytes) - 1 for p in survey.probes)
            ),
        ),
        residuals=Residuals(
            provenance=f"spread of log(measured / fitted); steps: of equal steps of a probe; {provenance}",
            step_log_sigma=max(MIN_STEP_LOG_SIGMA, _step_noise(survey.probes)),
            kernel_log_sigma=kernel_sigma,
            collective_log_sigma=link_sigma(survey.exchanges) if survey.exchanges else DEFAULT_COLLECTIVE_LOG_SIGMA,
        ),
        framework=Framework(provenance="the executor of this distribution on CUDA devices"),
        algorithms={"default": "halving_doubling"},
    )
    return with_transports(machine, survey, provenance)


def _median(values: Iterable[float]) -> float:
    return float(np.median(list(values)))


def _step_noise(probes: Sequence[DeviceProbeResult]) -> float:
    """Relative spread of equal steps: 1.48 median absolute deviations of their logarithms."""
    logs = [np.log(probe.step_seconds) - np.log(np.median(probe.step_seconds)) for probe in probes]
    return float(1.4826 * np.median(np.abs(np.concatenate(logs))))


# ---- compute ---------------------------------------------------------------------------------------------------------


@dataclass
class _Fitted:
    """Figures of one precision, and what their fits leave unexplained."""

    samples: tuple[GemmSample, ...]
    gemm: GemmFit
    kernels: dict[str, KernelFigures]
    attention: dict[str, AttentionFigures]
    log_sigmas: list[float]


def _device(survey: DeviceSurvey, provenance: str) -> tuple[Device, float]:
    """The device; the spread of all fits."""
    by_precision: dict[str, list[Observation]] = defaultdict(list)
    for probe in survey.probes:
        by_precision[probe.precision] += probe.observations
    peaks = dict(survey.peak_flops_per_second)
    fitted: dict[str, _Fitted] = {}
    for precision, observations in by_precision.items():
        samples = gemm_samples([each for each in observations if each.kind.startswith("linear")])
        if not samples:  # float16 may overflow in every step of a short probe
            continue
        peaks[precision] = max(peaks.get(precision, 0.0), *(2 * s.m * s.n * s.k / s.seconds for s in samples))
        fitted[precision] = fit_precision(samples, observations, peaks[precision])
    base = fitted[BASE]
    kernels = base.kernels | {"default": base.kernels[FALLBACK_KERNEL]}
    others = {
        name: PrecisionFigures(gemm_samples=each.samples, attention=each.attention, kernels=each.kernels)
        for name, each in fitted.items()
        if name != BASE
    }
    device = Device(
        provenance=provenance,
        name=survey.note.name,
        kind="gpu",
        peak_flops_per_second=peaks,  # type: ignore[arg-type]
        gemm={"default": base.gemm.curve, **{name: each.gemm.curve for name, each in fitted.items() if name != BASE}},
        gemm_samples=base.samples,
        attention=base.attention,
        precisions=others,  # type: ignore[arg-type]
        memory_bytes=float(survey.note.total_bytes),
        memory_bandwidth_bytes_per_second=survey.copy_bytes_per_second,
        kernels=kernels,
        call_seconds=base.gemm.call_seconds,
    )
    sigmas = [sigma for each in fitted.values() for sigma in each.log_sigmas]
    return device, float(np.sqrt(np.mean(np.square(sigmas))))


def fit_precision(samples: tuple[GemmSample, ...], observations: Sequence[Observation], peak: float) -> _Fitted:
    """Fit what was observed in one precision."""
    gemm = fit_gemm([(s.m, s.n, s.k) for s in samples], [s.seconds for s in samples], peak)
    fitted = _Fitted(samples, gemm, {}, {}, [gemm.log_sigma])
    by_name: dict[str, list[Observation]] = defaultdict(list)
    for each in observations:
        if not each.kind.startswith("linear"):
            by_name[figure_name(each.kind)].append(each)
    for name, found in sorted(by_name.items()):
        if name.startswith("attention_"):
            # A mask that skips blocks saves its share of the time; a plain kernel takes all pairs.
            visible = [1.0 if "plain" in name else float(each.work.share) for each in found]
            seconds = [each.seconds / share for each, share in zip(found, visible, strict=True)]
            attention = fit_attention([each.work for each in found], seconds, call_seconds=0.0)
            fitted.attention[name] = attention.figures
            fitted.log_sigmas.append(attention.log_sigma)
            continue
        moved = [4 * each.work.elements if name == "gradient_norm" else each.work.bytes for each in found]
        line = fit_regimes(
            [max(1.0, float(each)) for each in moved], [each.seconds for each in found], max_regimes=MAX_REGIMES
        )
        fitted.kernels[name] = KernelFigures(regimes=line.regimes)
        fitted.log_sigmas.append(line.log_sigma)
    return fitted


def with_scratch(device: Device, probes: Sequence[DeviceProbeResult]) -> Device:
    """The device whose attention kernels say what memory they take beside their tensors."""
    found: dict[tuple[str, str], list[DeviceProbeResult]] = defaultdict(list)
    for probe in probes:
        found[probe.precision, f"attention_{probe.probe.attention}"].append(probe)

    def told(precision: str, figures: F) -> F:
        attention = dict(figures.attention)
        for name, each in attention.items():
            mine = found.get((precision, name.removesuffix("_backward")))
            if mine:
                rate, limit = fit_scratch([one.attention_pairs for one in mine], [one.scratch_bytes for one in mine])
                attention[name] = msgspec.structs.replace(each, scratch_bytes_per_pair=rate, scratch_limit_bytes=limit)
        return msgspec.structs.replace(figures, attention=attention)

    precisions = {name: told(name, each) for name, each in device.precisions.items()}
    return msgspec.structs.replace(told(BASE, device), precisions=precisions)


# ---- host ------------------------------------------------------------------------------------------------------------


def host_times(probes: Sequence[DeviceProbeResult]) -> tuple[float, dict[str, dict[str, int]]]:
    """Host seconds of one launch, and how many launches a task of each kind is worth, by precision.

    The quickest kind of task is one launch. Counts are whole numbers, so the seconds are then such that all tasks of
    all probes together take what they took.
    """
    found: dict[tuple[str, str], list[float]] = defaultdict(list)
    for probe in probes:
        for kind, seconds in probe.host_seconds.items():
            found[probe.precision, "linear" if kind.startswith("linear") else figure_name(kind)] += seconds
    typical = {key: float(np.median(seconds)) for key, seconds in found.items()}
    quickest = min(typical.values())
    calls: dict[str, dict[str, int]] = defaultdict(dict)
    total, launches = 0.0, 0
    for (precision, name), usual in typical.items():
        count = calls[precision][name] = max(1, round(usual / quickest))
        total += usual * len(found[precision, name])
        launches += count * len(found[precision, name])
    return total / launches, dict(calls)


def with_calls(device: Device, calls: Mapping[str, Mapping[str, int]]) -> Device:
    """The device whose kinds say how many launches they are worth, in each precision that was timed."""
    precisions = {name: _counted(each, calls.get(name, {})) for name, each in device.precisions.items()}
    return msgspec.structs.replace(_counted(device, calls.get(BASE, {})), precisions=precisions)


def _counted(figures: F, calls: Mapping[str, int]) -> F:
    """Figures of one precision with their launches; products, whose time is elsewhere, get an entry for theirs."""
    kernels = figures.kernels | ({"linear": KernelFigures()} if "linear" in calls else {})
    return msgspec.structs.replace(
        figures,
        attention={
            name: msgspec.structs.replace(each, calls=calls.get(name, each.calls))
            for name, each in figures.attention.items()
        },
        kernels={
            name: msgspec.structs.replace(each, calls=calls.get(name, each.calls)) for name, each in kernels.items()
        },
    )


# ---- transports ------------------------------------------------------------------------------------------------------


def with_transports(machine: Machine, survey: DeviceSurvey, provenance: str) -> Machine:
    """The machine with the links of every transport that was timed; NCCL's are its own where there are any."""
    generic = load_machine(GENERIC_PROFILE)
    over_host = link_of(survey.exchanges, f"MPI between host buffers; {provenance}") or generic.link_in_host
    found: dict[Transport, TransportFigures] = {
        "staged": TransportFigures(
            provenance=f"the executor's staged transport; {provenance}",
            link_in_host=over_host,
            link_between_hosts=generic.link_between_hosts,
            staging=staging_of(survey.copies, provenance),
        )
    }
    for name, timed in survey.direct.items():
        link = link_of(timed, f"device buffers over {name}; {provenance}")
        if link is not None:
            found[name] = TransportFigures(  # type: ignore[index]
                provenance=f"{name}; {provenance}", link_in_host=link, link_between_hosts=generic.link_between_hosts
            )
    used: Transport = "nccl" if "nccl" in found else "staged"
    own = found.pop(used)
    return msgspec.structs.replace(
        machine, link_in_host=own.link_in_host, link_between_hosts=own.link_between_hosts, transport=used,
        transports=found, staging=own.staging,
    )  # fmt: skip


def staging_of(copies: Copies, provenance: str) -> Staging:
    """The copies of a staged transport; sums are part of the link's figures."""
    return Staging(
        provenance=f"copies between the device and pinned memory; {provenance}",
        to_host_bytes_per_second=copies.bytes_per_second(copies.to_host_seconds),
        to_device_bytes_per_second=copies.bytes_per_second(copies.to_device_seconds),
        shared_bandwidth_bytes_per_second=copies.together_bytes_per_second,
        latency_seconds=copies.latency_seconds,
        chunk_bytes=float(CHUNK_BYTES),
    )
