"""Probes on a device: what its kernels take, and what the host takes to dispatch them, timed apart.

The host enqueues and the device works behind it. Where the device is idle when a task comes, the task's span (a pair of
events around it) begins before the host has done anything for it, and holds the host's time as well. So a probe runs
two kinds of steps:

* *Behind a stall*: long copies are enqueued before the first task. While the device works on them the host enqueues
  the step, so that the spans are the device's time alone and the readings of the host's clock between tasks are the
  host's. A point at which the host waits for the device ends this: what follows it is not kept.
* *Free*, as training runs: the seconds of a step, and of these what lies outside its tasks.
"""

from __future__ import annotations

import gc
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from time import perf_counter
from typing import Any

import msgspec
import numpy as np

from executor.calibrate.probes import Observation, Probe, is_stable
from executor.comm import Communicator
from executor.comm.fabric import Fabric
from executor.comm.loopback import LoopbackTransport
from executor.data import Batches
from executor.device import Device
from executor.runtime import Runtime, StepResult
from executor.state import INITIAL_STD, UnitState
from planner.placement import Placement
from planner.plan import Plan
from planner.program import Step, Task
from planner.program.tasks import Work

WARMUP_STEPS = 2
LEAST_STEPS, MAX_STEPS = 3, 12
STALL_SHARE = 1.5
"""How long the stall is, of what the host took to enqueue a step."""

COPIES = 5
MAX_STALL = 128
"""Copies of a stall; the driver lets some 1000 launches wait, and holds the host beyond."""

REPEATED_ELEMENTS = 1 << 20

HOST_WAITS = ("gradient_norm", "gradient_unscale", "overflow_max", "loss_sum")
"""Kinds whose task ends with the host waiting for the device: later tasks find it idle."""

Key = tuple[str, Work]


@dataclass
class DeviceProbeResult:
    """What one probe showed in one precision.

    Attributes:
        probe: the model.
        precision: of its plan.
        observations: the device's time per task kind and size; the processor's time stands for the elapsed time.
        host_seconds: the host's time per task, by kind.
        around_seconds: what of a free step lies outside its tasks: the batch, and the end.
        step_seconds: of every free step.
        peak_bytes: of the arena, in use.
        reserved_bytes: of the arena, taken from the pool.
        pool_bytes: what the device's pool held for it.
    """

    probe: Probe
    precision: str
    observations: list[Observation]
    host_seconds: dict[str, list[float]]
    around_seconds: float
    step_seconds: list[float]
    peak_bytes: int
    reserved_bytes: int
    pool_bytes: int

    @property
    def attention_pairs(self) -> int:
        """Query-key pairs of one layer, over sequences and heads."""
        spec = self.probe.spec()
        return self.probe.batch * spec.heads * spec.seq_len**2

    @property
    def scratch_bytes(self) -> int:
        """What kernels took beside the arena."""
        return max(0, self.pool_bytes - self.reserved_bytes)


class Stall:
    """Work that keeps a device busy for about a wanted time: copies inside its memory, one after the other.

    Args:
        device: whose.
        nbytes: read and written by one copy; enough that the host enqueues it in less time than it takes.

    Attributes:
        bytes_per_second: read and written.
    """

    def __init__(self, device: Device, nbytes: int) -> None:
        self._source, self._target = (device.empty((nbytes // 8,), np.dtype(np.float32)) for _ in range(2))
        self._source[...] = 0.0
        self._copy()
        device.begin_step()
        marks = [device.now()]
        for _ in range(COPIES):
            self._copy()
            marks.append(device.now())
        self._seconds = max(float(np.diff(device.seconds(marks)).min()), 1e-9)
        self.bytes_per_second = nbytes / self._seconds

    def _copy(self) -> None:
        self._target[...] = self._source

    def begin(self, seconds: float) -> None:
        """Enqueue about so much work, as far as it leaves room for a step in the queue of launches."""
        for _ in range(min(MAX_STALL, int(np.ceil(seconds / self._seconds)))):
            self._copy()


class TimedRuntime(Runtime):
    """One rank on a device, whose steps are timed and whose training means nothing: any parameters will do.

    Args:
        plan: of one rank.
        device: where it computes.
    """

    def __init__(self, plan: Plan, device: Device) -> None:
        comm = Communicator(LoopbackTransport(Fabric(1), 0))
        batches = Batches("synthetic", plan.model, plan.global_batch_size, plan.training.seed)
        super().__init__(plan, comm, batches, device=device)
        device.release_unused()  # what the parameters were uploaded through

    def _initialise(self, unit: UnitState, placement: Placement) -> None:
        """Repeat a short stretch of normal numbers: drawing all of them takes the host longer than all steps."""
        device, size = self.device, unit.unit.size
        drawn = np.random.default_rng(0).normal(0.0, INITIAL_STD, min(size, REPEATED_ELEMENTS)).astype(unit.dtype)
        stretch, flat = device.upload(drawn), device.empty((size,), unit.dtype)
        for start in range(0, size, drawn.size):
            part = flat[start : start + drawn.size]
            part[...] = stretch[: part.size]
        unit.set_parameters(flat)


class _Stalled(TimedRuntime):
    """A runtime that notes when the host comes to each task, and may stall the device before the first."""

    def __init__(self, plan: Plan, device: Device, stall: Stall) -> None:
        super().__init__(plan, device)
        self.stall, self.stall_seconds = stall, 0.0
        self.readings: list[float] = []

    def _load(self, part: Step, m: Any) -> None:
        super()._load(part, m)
        self.stall.begin(self.stall_seconds)

    def _run(self, part: Step, task: Task) -> None:
        self.readings.append(perf_counter())
        super()._run(part, task)

    def run_step(self, step: int) -> StepResult:
        """A step; afterwards `readings` has the host's clock at each task and at the end of the last."""
        self.readings = []
        result = super().run_step(step)
        self.readings.append(perf_counter())
        return result


def probe_plan(probe: Probe, precision: str) -> Plan:
    """The plan of one rank in a precision."""
    plan = probe.plan()
    return msgspec.structs.replace(
        plan, transport="staged", training=msgspec.structs.replace(plan.training, precision=precision)
    )


def run_device_probe(probe: Probe, precision: str, device: Device, stall: Stall, deadline: float) -> DeviceProbeResult:
    """Train a probe free and behind a stall, each until settled or until `deadline` after a few steps.

    Raises:
        DeviceMemoryError: the device has no room for it.
    """
    gc.collect()  # what the last probe's runtime held, if it was part of a cycle
    device.release_unused()
    before = device.peak_bytes()
    runtime = _Stalled(probe_plan(probe, precision), device, stall)
    number = 0
    free: list[StepResult] = []
    for _ in range(WARMUP_STEPS):
        runtime.run_step(number)
        number += 1
    while len(free) < MAX_STEPS:
        free.append(runtime.run_step(number))
        number += 1
        late = perf_counter() > deadline
        if len(free) >= LEAST_STEPS and (late or is_stable([each.seconds for each in free])):
            break
    runtime.stall_seconds = STALL_SHARE * (runtime.readings[-2] - runtime.readings[0])
    samples: dict[Key, list[float]] = defaultdict(list)
    hosts: dict[str, list[float]] = defaultdict(list)
    for position in range(WARMUP_STEPS + LEAST_STEPS):  # the first still has the stall to learn
        result = runtime.run_step(number)
        number += 1
        if position >= WARMUP_STEPS and not result.skipped:
            _keep(runtime, result, samples, hosts)
    return DeviceProbeResult(
        probe, precision,
        [Observation(kind, work, tuple((x, x) for x in found), 1) for (kind, work), found in samples.items()],
        dict(hosts),
        float(np.median([_outside(each) for each in free])),
        [each.seconds for each in free],
        runtime.arena.peak_bytes,
        runtime.arena.reserved_bytes,
        max(0, device.peak_bytes() - before),
    )  # fmt: skip


def _keep(
    runtime: _Stalled, result: StepResult, samples: dict[Key, list[float]], hosts: dict[str, list[float]]
) -> None:
    """Note the tasks of a stalled step up to the first at which the host waited; each lasts until the next begins."""
    tasks = [task for part in runtime.program.steps for task in part.tasks]
    device = _until_next([each.start for each in result.spans], result.spans[-1].end)
    host = [after - before for before, after in pairwise(runtime.readings)]
    for task, elapsed, enqueued in zip(tasks, device, host, strict=True):
        waits = task.kind in HOST_WAITS
        if task.kind != "loss_sum":
            samples[task.kind, task.work].append(max(elapsed, 1e-9))
        if not waits:
            hosts[task.kind].append(enqueued)
        elif task.kind != "loss_sum":
            break


def _until_next(starts: Sequence[float], end: float) -> list[float]:
    """From each beginning to the next: what a task adds to the device's time, the gap behind it included."""
    return [after - before for before, after in pairwise([*starts, end])]


def _outside(result: StepResult) -> float:
    """Seconds of a step before its first task and after its last."""
    return result.seconds - (result.spans[-1].end - result.spans[0].start)
