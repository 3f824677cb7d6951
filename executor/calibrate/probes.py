"""Probes: small models really trained on one rank, so that each task is timed where and how the executor runs it.

A kernel alone in a loop finds its operands in cache; between the tasks of a training step it finds what its
predecessors left. So nothing is timed in isolation here: a probe is a plan of one rank, run by the executor's own
`Runtime`, and what is kept is the seconds of each task beside the `Work` that the cost formulas will be asked about.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from time import perf_counter, thread_time
from typing import Any, NoReturn

import msgspec
import numpy as np

from executor.comm import Communicator
from executor.data import Batches
from executor.runtime import Runtime, StepResult
from planner.mesh import Mesh
from planner.model import ModelSpec, with_sizes
from planner.plan import Plan, Training, make_plan
from planner.program import Step, Task
from planner.program.tasks import Work

WARMUP_STEPS = 1
LEAST_STEPS = 3  # even when the time is up
MIN_STEPS = 6
MAX_STEPS = 24
LOWER_QUARTILE = 0.25
PREEMPTION_SECONDS = 20e-6
"""Elapsed beyond processor time that tells of another process on the core; reading both clocks takes less."""

STABLE = 0.03
"""Relative standard error of the median step at which a probe has been run often enough."""


class _Alone:
    """The transport of a job of one rank."""

    rank = 0
    size = 1
    takes_device_pointers = False
    library = "nothing"

    def channel(self, ranks: tuple[int, ...], axis: str) -> NoReturn:
        raise AssertionError(f"a job of one rank has no group {axis} of ranks {ranks}")


@dataclass(frozen=True)
class Probe:
    """A model and micro-batch whose tasks are timed.

    `share` is the part of heads, feed-forward units and vocabulary that the rank holds, as under tensor parallelism.
    """

    hidden: int
    seq_len: int
    batch: int
    layers: int = 2
    head_dim: int = 64
    share: float = 1.0
    vocab: int = 260
    attention: str = "plain"
    clip_norm: float | None = None
    sizes: dict[str, Any] = field(default_factory=dict)

    def spec(self) -> ModelSpec:
        """The model."""
        heads = max(1, round(self.hidden / self.head_dim * self.share))
        sized = with_sizes(
            None, layers=self.layers, hidden=self.hidden, heads=self.hidden // self.head_dim, seq_len=self.seq_len,
            vocab=self.vocab, **self.sizes,
        )  # fmt: skip
        return _narrowed(sized, heads, max(1, round(sized.ffn_hidden * self.share)))

    def plan(self, threads: int = 1) -> Plan:
        """The plan of one rank."""
        return make_plan(
            self.spec(), Mesh(), global_batch_size=self.batch, micro_batch_size=self.batch, attention=self.attention,
            training=Training(threads_per_rank=threads, clip_norm=self.clip_norm),
        )  # fmt: skip


def _narrowed(spec: ModelSpec, heads: int, ffn_hidden: int) -> ModelSpec:
    """The model with fewer heads of the same width: what a rank of a tensor axis holds."""
    kv_heads = max(1, heads * spec.kv_heads // spec.heads)
    return msgspec.structs.replace(spec, heads=heads, kv_heads=kv_heads, ffn_hidden=ffn_hidden)


class _Timed(Runtime):
    """A runtime that also notes the processor time of each task, in the order of the spans."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.processor_seconds: list[float] = []

    def _run(self, part: Step, task: Task) -> None:
        begun = thread_time()
        super()._run(part, task)
        self.processor_seconds.append(thread_time() - begun)


@dataclass(frozen=True)
class Observation:
    """Times of one task kind at one size, as often as it was seen.

    Attributes:
        kind: of the task.
        work: its sizes.
        samples: (elapsed, processor) seconds of each run.
        count: runs per step.
    """

    kind: str
    work: Work
    samples: tuple[tuple[float, float], ...]
    count: int

    @property
    def seconds(self) -> float:
        """Typical time: the lower quartile of the runs in which no other process took the core.

        Where all suffered, that of the processor time. Whatever else the machine does only ever adds, in caches and
        memory too; on an idle machine the quartile lies a percent below the median.
        """
        elapsed, own = np.asarray(self.samples).T
        undisturbed = elapsed <= 1.02 * own + PREEMPTION_SECONDS
        return float(np.quantile(elapsed[undisturbed] if undisturbed.any() else own, LOWER_QUARTILE))


@dataclass
class ProbeResult:
    """What one probe showed.

    Attributes:
        observations: one per task kind and size.
        gap_seconds: the interpreter's time between two tasks.
        load_seconds: reading the batch, once per micro-batch.
        around_seconds: what else of a step is in no task.
        step_seconds: of every timed step.
        processor_seconds: of every timed step's tasks; what no other process can lengthen.
    """

    observations: list[Observation]
    gap_seconds: float
    load_seconds: float
    around_seconds: float
    step_seconds: list[float]
    processor_seconds: list[float]

    @property
    def stable(self) -> bool:
        """Whether the median step had settled, and other processes left the core alone."""
        undisturbed = float(np.median(self.step_seconds)) < 1.1 * float(np.median(self.processor_seconds))
        return is_stable(self.step_seconds) and undisturbed


def run_probe(probe: Probe, deadline: float, threads: int = 1) -> ProbeResult:
    """Train a probe until its median step is stable, or until `deadline` (perf_counter) after a few steps."""
    plan = probe.plan(threads)
    batches = Batches("synthetic", plan.model, plan.global_batch_size, plan.training.seed)
    runtime = _Timed(plan, Communicator(_Alone()), batches)
    tasks = [(part, task) for part in runtime.program.steps for task in part.tasks]
    samples: dict[tuple[str, Work], list[tuple[float, float]]] = defaultdict(list)
    results: list[StepResult] = []
    own: list[float] = []
    for number in range(WARMUP_STEPS + MAX_STEPS):
        runtime.processor_seconds.clear()
        result = runtime.run_step(number)
        if number < WARMUP_STEPS:
            continue
        results.append(result)
        own.append(sum(runtime.processor_seconds))
        for (_, task), span, used in zip(tasks, result.spans, runtime.processor_seconds, strict=True):
            samples[task.kind, task.work].append((span.end - span.start, used))
        late = len(results) >= LEAST_STEPS and perf_counter() > deadline
        if late or (len(results) >= MIN_STEPS and is_stable(own)):
            break
    gaps, loads = _between(tasks, results)
    return ProbeResult(
        [Observation(kind, work, tuple(found), len(found) // len(results)) for (kind, work), found in samples.items()],
        float(np.median(gaps)),
        float(np.median(loads)),
        float(np.median([_outside(result) for result in results])) - float(np.median(loads)),
        [result.seconds for result in results],
        own,
    )


def is_stable(samples: Iterable[float]) -> bool:
    """Whether the median is known to `STABLE`: 1.25 σ/√n with σ from the median absolute deviation."""
    values = np.asarray(list(samples))
    middle = np.median(values)
    sigma = 1.4826 * np.median(np.abs(values - middle))
    return bool(1.2533 * sigma / np.sqrt(len(values)) <= STABLE * middle)


def _between(tasks: list[tuple[Any, Task]], results: list[StepResult]) -> tuple[list[float], list[float]]:
    """Seconds between consecutive spans inside an instruction, and before its first task where a batch is read."""
    gaps, loads = [], []
    for result in results:
        loads.append(result.spans[0].start - result.started)
        for (here, before), (there, after) in pairwise(zip(tasks, result.spans, strict=True)):
            if here[0] is there[0]:
                gaps.append(after.start - before.end)
    return gaps, loads


def _outside(result: StepResult) -> float:
    """Seconds of a step outside its tasks and the gaps between them."""
    first, last = result.spans[0], result.spans[-1]
    return result.seconds - (last.end - first.start)
