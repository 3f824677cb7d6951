"""From recorded steps to a Measurement: clocks aligned, ranks gathered, one representative step in full.

Every rank keeps the spans of its last timed steps. The step whose slowest rank took closest to the median of all is
the representative one; its spans travel to rank 0, each rank's clock read as rank 0's, and are reduced by the same
functions that reduce a prediction.
"""

from __future__ import annotations

import math
import resource
import sys
from collections import deque
from collections.abc import Sequence
from statistics import median
from time import perf_counter
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from executor.collect import gather_bytes
from executor.comm import ClockWatch, Communicator
from executor.device import HOST, Device
from executor.environment import describe_environment
from executor.memory import Arena
from executor.precision import Precision
from executor.runtime import StepResult
from planner.model import model_flops
from planner.plan import Plan
from planner.trace import MachineNote, Measurement, Span, figures, operator_times, rank_classes, version_note

KEPT_STEPS = 32
"""How many of the last timed steps keep their spans: enough to hold a step near the median, bounded on long runs."""

GEMM_SIZE = {"float32": 1024, "float64": 768}
DEVICE_GEMM_SIZE = 8192  # a smaller product does not fill a large GPU
GEMM_REPEATS = 5


class Recorder:
    """What a rank remembers of its run; making one is collective over the job, which compares its clocks.

    Attributes:
        losses: global loss of every step, warm-up included; None where it was not a number.
        gradient_norms: global gradient norm of every step, None where it was skipped; empty where the plan does not
            clip, which computes it.
        loss_scales: the loss scale of every step; empty where nothing scales the loss.
        skipped_steps: numbers of the steps that changed nothing, because float16 overflowed.
    """

    def __init__(self, plan: Plan, comm: Communicator) -> None:
        self.plan, self.comm = plan, comm
        self.losses: list[float | None] = []
        self.gradient_norms: list[float | None] = []
        self.loss_scales: list[float] = []
        self.skipped_steps: list[int] = []
        self.resident_at_start_bytes = resident_bytes()
        self._clocks = ClockWatch(comm)
        self._seconds: list[float] = []
        self._kept: deque[StepResult] = deque(maxlen=KEPT_STEPS)

    def add(self, result: StepResult, *, timed: bool) -> None:
        """Note one step; bytes are counted from the first timed one."""
        if result.skipped:
            self.skipped_steps.append(len(self.losses))
        self.losses.append(result.loss if math.isfinite(result.loss) else None)
        trains = not self.plan.forward_only
        if self.plan.training.clip_norm is not None and trains:
            self.gradient_norms.append(None if result.skipped else result.gradient_norm)
        if Precision.of(self.plan).scales_loss and trains:
            self.loss_scales.append(result.loss_scale)
        if timed:
            self._seconds.append(result.seconds)
            self._kept.append(result)
        else:
            self.comm.counters.reset()

    def finish(self, arena: Arena, peak_flops_per_second: float, notes: dict[str, Any]) -> Measurement | None:
        """Gather all ranks; collective, the measurement is rank 0's.

        Args:
            arena: the rank's buffers.
            peak_flops_per_second: rank 0's GEMM rate.
            notes: what to add to the environment.
        """
        comm, timed = self.comm, len(self._seconds)
        payloads = {
            f"{axis}|{operation}|{key}": tally.payload_bytes // timed
            for (axis, operation, key), tally in comm.counters.snapshot().items()
        }
        seconds = self._slowest()
        typical = median(seconds)
        kept = len(self._kept)
        index = min(range(kept), key=lambda i: abs(seconds[timed - kept + i] - typical))
        self._clocks.end()
        chosen = self._kept[index]
        offset = self._clocks.offset_seconds(chosen.started)
        own = _RankRecord(
            started=chosen.started + offset,
            spans=[(s.stream, s.key, s.start + offset, s.end + offset, s.wait) for s in chosen.spans],
            payloads=payloads,
            peak_bytes=arena.peak_bytes,
            peak_parts=arena.peak,
            resident_bytes=resident_bytes(),
            resident_at_start_bytes=self.resident_at_start_bytes,
            device_bytes=arena.device.peak_bytes(),
        )
        gathered = gather_bytes(comm, msgspec.msgpack.encode(own))
        if comm.rank:
            return None
        ranks = [msgspec.msgpack.decode(content, type=_RankRecord) for content in gathered]
        machine = _machine_note(self.plan, peak_flops_per_second, arena.device)
        if not arena.device.is_host:
            pools = [rank.device_bytes for rank in ranks]
            notes = notes | {"device": arena.device.note()._asdict(), "device_pool_bytes": pools}
        notes = notes | {"clock_offsets": self._clocks.note()}
        return self._measurement(ranks, seconds, seconds[timed - kept + index], machine, notes)

    def _slowest(self) -> list[float]:
        """Seconds of every timed step on its slowest rank."""
        count = len(self._seconds)
        table: NDArray[np.float64] = np.zeros((self.comm.size, count))
        table[self.comm.rank] = self._seconds
        self.comm.world.all_gather(None, table)
        return [float(value) for value in table.max(axis=0)]

    def _measurement(
        self, ranks: list[_RankRecord], seconds: list[float], chosen_seconds: float, machine: MachineNote,
        notes: dict[str, Any],
    ) -> Measurement:  # fmt: skip
        plan, step_seconds = self.plan, median(seconds)
        spans = aligned_spans(ranks)
        figure = figures(spans, range(len(ranks)), chosen_seconds)
        classes = rank_classes(plan)
        flops = model_flops(plan.model) * plan.global_batch_size / (3 if plan.forward_only else 1)
        growth = [rank.resident_bytes - rank.resident_at_start_bytes for rank in ranks]
        return Measurement(
            version=version_note(),
            plan_hash=plan.hash,
            plan=plan,
            machine=machine,
            step_seconds=step_seconds,
            tokens_per_second=plan.global_batch_size * plan.model.seq_len / step_seconds,
            mfu=flops / (step_seconds * len(ranks) * machine.peak_flops_per_second),
            bubble_fraction=figure.bubble_fraction,
            exposed_communication_seconds=figure.exposed_mean_seconds,
            exposed_communication_seconds_max=figure.exposed_max_seconds,
            wait_seconds=figure.wait_seconds,
            rank_seconds=figure.rank_seconds,
            peak_bytes=[rank.peak_bytes for rank in ranks],
            peak_parts={part: [rank.peak_parts[part] for rank in ranks] for part in ranks[0].peak_parts},
            rank_classes=classes,
            operators=operator_times(spans, classes, _bytes_by_key(ranks)),
            trace=[tuple(span) for span in spans],  # type: ignore[misc]
            steps=seconds,
            losses=self.losses,
            gradient_norms=self.gradient_norms,
            loss_scales=self.loss_scales,
            skipped_steps=self.skipped_steps,
            resident_bytes=[rank.resident_bytes for rank in ranks],
            environment=describe_environment() | notes | {"resident_growth_bytes": growth},
            payload_bytes=_bytes_by_operation(ranks[0]),
        )


class _RankRecord(msgspec.Struct):
    """What one rank sends to rank 0; times are rank 0's clock."""

    started: float
    spans: list[tuple[str, str, float, float, float]]  # stream, key, start, end, leading wait
    payloads: dict[str, int]  # per step, by axis|operation|key
    peak_bytes: int
    peak_parts: dict[str, int]
    resident_bytes: int
    resident_at_start_bytes: int
    device_bytes: int


def aligned_spans(ranks: Sequence[_RankRecord]) -> list[Span]:
    """All ranks' spans from the start of the step, the leading wait of each a span of its own."""
    origin = min(rank.started for rank in ranks)
    spans = []
    for number, record in enumerate(ranks):
        for stream, key, start, end, wait in record.spans:
            begin = start - origin
            middle = min(begin + wait, end - origin)
            if wait > 0:
                spans.append(Span(number, stream, key, begin, middle, "wait"))
            if end - origin > middle:
                spans.append(Span(number, stream, key, middle, end - origin, "work"))
    return spans


def _bytes_by_key(ranks: Sequence[_RankRecord]) -> dict[str, int]:
    """Bytes that a rank hands to MPI per step under each key: the most that any rank does."""
    most: dict[str, int] = {}
    for record in ranks:
        own: dict[str, int] = {}
        for name, count in record.payloads.items():
            key = name.split("|", 2)[2]
            own[key] = own.get(key, 0) + count
        for key, count in own.items():
            most[key] = max(most.get(key, 0), count)
    return most


def _bytes_by_operation(record: _RankRecord) -> dict[str, int]:
    """The same of one rank by axis and operation: "tp.all_reduce"."""
    totals: dict[str, int] = {}
    for name, count in record.payloads.items():
        axis, operation, _ = name.split("|", 2)
        totals[f"{axis}.{operation}"] = totals.get(f"{axis}.{operation}", 0) + count
    return totals


def _machine_note(plan: Plan, peak_flops_per_second: float, device: Device) -> MachineNote:
    """Name the machine and the rate that the MFU divides by."""
    if not device.is_host:
        note, precision = device.note(), plan.training.precision
        size = DEVICE_GEMM_SIZE
        return MachineNote(
            name=f"{note.name}, CUDA {note.runtime}", precision=precision, peak_flops_per_second=peak_flops_per_second,
            provenance=f"{precision} GEMM of {size}x{size}x{size} on rank 0's device in this run (cuBLAS)",
        )  # fmt: skip
    environment = describe_environment()
    kernels = ", ".join(f"{x['name']} {x['architecture']}" for x in environment["blas"] if x["architecture"])
    measured, threads = Precision.of(plan).master.name, plan.training.threads_per_rank
    size = GEMM_SIZE[measured]
    return MachineNote(
        name=f"{environment['processor']}, {environment['usable_cores']} cores, {threads} thread(s) per rank",
        precision=measured,
        peak_flops_per_second=peak_flops_per_second,
        provenance=f"{measured} GEMM of {size}x{size}x{size} on one rank's threads in this run ({kernels})",
    )


def resident_bytes() -> int:
    """High-water mark of this process's resident memory, libraries and interpreter included."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts KiB


def gemm_flops_per_second(dtype: np.dtype[Any], device: Device = HOST) -> float:
    """Best rate of a square matrix product on this process's BLAS threads, or on its device, in FLOP/s."""
    if not device.is_host:
        return _device_gemm_flops_per_second(dtype, device)
    size = GEMM_SIZE[dtype.name]
    a = np.linspace(-1, 1, size * size, dtype=dtype).reshape(size, size)
    out = np.matmul(a, a)  # also brings the threads up
    best = float("inf")
    for _ in range(GEMM_REPEATS):
        start = perf_counter()
        np.matmul(a, a, out=out)
        best = min(best, perf_counter() - start)
    return 2 * size**3 / best


def _device_gemm_flops_per_second(dtype: np.dtype[Any], device: Device) -> float:
    """The same by the device's own product and clock; random operands, for zeros are faster than any real ones."""
    size = DEVICE_GEMM_SIZE
    a, out = device.empty((size, size), dtype), device.empty((size, size), dtype)
    a[...] = device.upload(np.random.default_rng(0).standard_normal((size, size), np.float32))
    device.kernels.matmul(a, a, out)
    device.begin_step()
    marks = [device.now()]
    for _ in range(GEMM_REPEATS):
        device.kernels.matmul(a, a, out)
        marks.append(device.now())
    rate = float(2 * size**3 / np.diff(device.seconds(marks)).min())
    del a, out
    device.release_unused()  # the pool's high-water mark is to be the plan's
    return rate
