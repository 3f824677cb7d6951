"""The survey of a host's CUDA devices: what is timed, in which order, in how many seconds.

Rank 0 works alone while the others sleep: products in every precision, then probes, precision by precision. Then the
ranks copy, and communicate in groups of every size, together. At most 90 seconds on a GPU, 30 with `quick`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from time import perf_counter

from executor.calibrate.carried import QUICK_SIZES as QUICK_DIRECT_SIZES
from executor.calibrate.carried import SIZES as DIRECT_SIZES
from executor.calibrate.carried import time_direct
from executor.calibrate.copies import QUICK_SIZES as QUICK_COPY_SIZES
from executor.calibrate.copies import SIZES as COPY_SIZES
from executor.calibrate.copies import time_copies, together_bytes_per_second
from executor.calibrate.device_machine import DeviceSurvey, device_machine_of
from executor.calibrate.device_probes import Stall, probe_plan, run_device_probe
from executor.calibrate.exchanges import Timed, barrier_seconds, group_sizes, time_exchanges
from executor.calibrate.host import memory_bytes, usable_cores
from executor.calibrate.probes import Probe
from executor.calibrate.survey import LLAMA, Report, rank_zero_alone
from executor.comm import Communicator
from executor.comm.hosts import ranks_by_host
from executor.device.base import DeviceMemoryError
from executor.device.cuda import CudaDevice
from executor.measure import gemm_flops_per_second
from executor.precision import Precision
from executor.session import load_kernels
from planner.errors import MachineError
from planner.machine import Machine

PROBES = (
    Probe(1024, 512, 8, layers=1),
    Probe(1024, 512, 8, layers=1, attention="blocked"),
    Probe(512, 128, 16, layers=1, head_dim=32, clip_norm=1e-3),
    Probe(512, 512, 4, layers=1, head_dim=32, attention="blocked"),
    Probe(2048, 1024, 4, layers=1, head_dim=128, sizes=LLAMA),
    Probe(4096, 2048, 4, layers=1, head_dim=128, attention="blocked"),
    Probe(256, 128, 8, layers=1),
    Probe(2048, 2048, 2, layers=1, head_dim=128, attention="blocked"),
    Probe(4096, 1024, 2, layers=1, head_dim=128, share=0.5),
    Probe(1024, 4096, 1, layers=1, attention="blocked"),
    Probe(2048, 512, 16, layers=1, head_dim=64, vocab=32768),
    Probe(4096, 2048, 1, layers=1, head_dim=128),
    Probe(1024, 1024, 2, layers=1, share=0.25, clip_norm=1e-3),
    Probe(768, 512, 16, layers=1),
    Probe(3072, 1024, 4, layers=1, head_dim=96, attention="blocked"),
    Probe(128, 64, 4, layers=1, head_dim=32),
)
ESSENTIAL = 5
"""So many of the first probes show every kind of operator: they are run even when the time is used up."""


@dataclass(frozen=True)
class Effort:
    """How much of the survey is done.

    Attributes:
        probes: of every precision, in order.
        shares: seconds for the probes of each precision; the first is float32, whose figures serve the others.
        exchange_seconds: for collectives between host buffers.
        copy_sizes: of copies, in bytes.
        direct_sizes: of messages over NCCL and CUDA-aware MPI, in bytes.
        stall_bytes: read and written by the copies that keep the device busy, and show the memory's bandwidth.
    """

    probes: tuple[Probe, ...] = PROBES
    shares: tuple[tuple[str, float], ...] = (("float32", 22.0), ("bfloat16", 20.0), ("tf32", 9.0), ("float16", 9.0))
    exchange_seconds: float = 8.0
    copy_sizes: tuple[int, ...] = COPY_SIZES
    direct_sizes: tuple[int, ...] = DIRECT_SIZES
    stall_bytes: int = 1 << 30


QUICK = Effort(
    probes=PROBES[:8],
    shares=(("float32", 6.0), ("bfloat16", 6.0), ("tf32", 2.0), ("float16", 2.0)),
    exchange_seconds=2.0,
    copy_sizes=QUICK_COPY_SIZES,
    direct_sizes=QUICK_DIRECT_SIZES,
)


def profile_devices(
    comm: Communicator, device: CudaDevice, effort: Effort, report: Report | None = None
) -> Machine | None:
    """Measure the CUDA devices of this host; collective, the Machine is rank 0's.

    Args:
        comm: all ranks of the job, on one host.
        device: this rank's.
        effort: how much is done.
        report: told of progress on rank 0.

    Raises:
        MachineError: ranks on several hosts.
    """
    if len(ranks_by_host(comm)) > 1:
        raise MachineError("profile --device cuda measures one host; start all its ranks there, without --hosts")
    tell: Report = report if report is not None and comm.rank == 0 else lambda _what, _share: None
    survey: DeviceSurvey | None = None

    def alone() -> None:
        nonlocal survey
        tell("kernels are compiled", 0.0)
        for probe in effort.probes[:2]:
            load_kernels(probe.plan(), device)
        survey = _survey_alone(comm.size, device, effort, tell)

    rank_zero_alone(comm, alone)
    tell("copies", 0.75)
    sharing = together_bytes_per_second(comm, device, effort.copy_sizes[-1])
    tell("collectives between host buffers", 0.8)
    exchanges, meeting = _time_exchanges(comm, effort)
    tell("collectives between devices", 0.9)
    direct, remarks = time_direct(comm, device, effort.direct_sizes, effort.exchange_seconds / 2)
    pools = sum(comm.world.gather_words(device.peak_bytes() >> 20)) << 20
    if survey is None:
        return None
    survey.exchanges, survey.meeting_seconds, survey.direct = exchanges, meeting, direct
    survey.copies = replace(survey.copies, together_bytes_per_second=sharing)
    sharing_ranks = -(-comm.size // survey.devices)
    survey.context_bytes = max(0.0, (survey.note.total_bytes - device.free_bytes()[0] - pools) / sharing_ranks)
    survey.remarks += remarks
    machine = device_machine_of(survey)
    tell("; ".join(survey.remarks) or "done", 1.0)
    return machine


def _survey_alone(ranks: int, device: CudaDevice, effort: Effort, tell: Report) -> DeviceSurvey:
    """What rank 0 finds out by itself."""
    tell("matrix products", 0.03)
    stall = Stall(device, effort.stall_bytes)
    survey = DeviceSurvey(
        ranks=ranks,
        devices=min(ranks, int(device.cupy.cuda.runtime.getDeviceCount())),
        cores=usable_cores(),
        host_memory_bytes=memory_bytes(),
        note=device.note(),
        peak_flops_per_second={name: _product_rate(name, device) for name, _ in effort.shares},
        copy_bytes_per_second=stall.bytes_per_second,
        copies=time_copies(device, effort.copy_sizes),
    )
    for number, (precision, seconds) in enumerate(effort.shares):
        tell(f"training steps in {precision}", 0.05 + 0.7 * number / len(effort.shares))
        _run_probes(survey, device, stall, effort, precision, seconds)
    return survey


def _run_probes(
    survey: DeviceSurvey, device: CudaDevice, stall: Stall, effort: Effort, precision: str, seconds: float
) -> None:
    """The probes of one precision, as many as the time allows."""
    begun, count = perf_counter(), len(effort.probes)
    for position, probe in enumerate(effort.probes):
        if position >= ESSENTIAL and perf_counter() > begun + seconds:
            survey.remarks.append(f"{count - position} of {count} probes in {precision} left out: the time was used up")
            break
        left = begun + seconds - perf_counter()
        try:
            found = run_device_probe(probe, precision, device, stall, perf_counter() + left / (count - position))
        except DeviceMemoryError as error:
            survey.remarks.append(f"a probe of hidden {probe.hidden} in {precision} left out: {error}")
            continue
        survey.probes.append(found)


def _product_rate(precision: str, device: CudaDevice) -> float:
    """Best rate of a large product in a precision, in FLOP/s."""
    device.use_precision(precision)
    return gemm_flops_per_second(Precision.of(probe_plan(PROBES[0], precision)).storage, device)


def _time_exchanges(comm: Communicator, effort: Effort) -> tuple[list[Timed], float]:
    """MPI between host buffers on groups of every size, and what a meeting of all ranks takes."""
    found: list[Timed] = []
    meeting, sizes = 0.0, group_sizes(comm.size)
    for size in sizes:
        if comm.rank < size:
            group = comm.group(range(size), f"profile{size}")
            found += time_exchanges(group, quick=effort.exchange_seconds < Effort.exchange_seconds,
                                    seconds=effort.exchange_seconds / len(sizes))  # fmt: skip
            meeting = barrier_seconds(group)
        comm.world.barrier()
    return found, meeting
