"""A run of a plan on one rank: is it possible here, set up, train step by step, measure."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from time import sleep
from typing import Any, Literal, Protocol

import msgspec
import numpy as np

from executor import kernels
from executor.comm import Communicator, hash_replicated, ranks_by_host
from executor.comm.fabric import Fabric
from executor.comm.loopback import LoopbackTransport
from executor.data import Batches
from executor.device import HOST, Device, open_device
from executor.device.base import DeviceKind
from executor.measure import Recorder, gemm_flops_per_second
from executor.precision import Precision
from executor.runtime import Runtime, StepResult
from executor.threads import use_threads
from planner.errors import DataError, PlanError
from planner.mesh import Mesh
from planner.plan import Plan, make_plan
from planner.trace import Measurement

_READY_TAG = 1


class Progress(Protocol):
    """Who is told of each step; only rank 0 has one."""

    def step(self, number: int, result: StepResult, *, timed: bool) -> None:
        """A step has ended; warm-up steps are not timed."""


@dataclass(frozen=True)
class RunOptions:
    """What the command line adds to a plan.

    Attributes:
        steps: timed steps.
        warmup: steps before them: allocations, first touches, compilation.
        data: None for the default text, "synthetic", or a file.
        paranoid: also compare replicated parameters across ranks after every step.
    """

    steps: int = 10
    warmup: int = 2
    data: str | None = None
    paranoid: bool = False


def open_rank_device(kind: DeviceKind, plan: Plan, comm: Communicator) -> Device:
    """This rank's device, which the communicator then reaches; collective over the job.

    Raises:
        MeshwrightError: no such device, or the plan's transport cannot reach it.
    """
    device = open_device(kind, local_rank(comm))
    if not device.is_host and comm.size > 1:
        require_transport(plan)
        comm.use_device(device, plan.transport)
    return device


def local_rank(comm: Communicator) -> int:
    """This rank's position among the ranks of its host; collective over the job."""
    return next(ranks.index(comm.rank) for ranks in ranks_by_host(comm) if comm.rank in ranks)


def require_runnable(plan: Plan, comm: Communicator) -> None:
    """Refuse a plan that these ranks cannot carry out.

    Raises:
        PlanError: another number of ranks than the plan's, or a precision that the executor does not compute in.
    """
    needed = plan.mesh.world_size
    if comm.size != needed:
        mesh = plan.mesh
        raise PlanError(
            f"the plan is for {needed} ranks (pp={mesh.pp}, dp={mesh.dp}, cp={mesh.cp}, tp={mesh.tp}) and {comm.size} "
            f"started; use mpirun -n {needed}, or make a plan for {comm.size} workers"
        )
    Precision.of(plan)


def require_transport(plan: Plan) -> None:
    """Refuse a plan whose transport cannot do what else it fixes, on a device.

    Raises:
        PlanError: NCCL and an algorithm of ours for a collective.
    """
    composed = {name: algorithm for name, algorithm in plan.collectives.items() if algorithm != "native"}
    if plan.transport == "nccl" and composed and plan.mesh.world_size > 1:
        name, algorithm = next(iter(composed.items()))
        raise PlanError(
            f"the plan carries {name} out by {algorithm}, and transport nccl chooses its own algorithms; leave "
            "collectives out of the plan, or plan with --transport staged"
        )


def set_threads(plan: Plan) -> None:
    """Give every numerical library loaded so far the plan's number of threads."""
    use_threads(plan.training.threads_per_rank)


def load_kernels(plan: Plan, device: Device = HOST) -> None:
    """Load every compiled kernel that the plan will call, by one step of its smallest relative on one rank.

    What code and libraries take is then in the process before its memory is watched: the growth of its high-water mark
    is what the plan's own buffers take.
    """
    width = plan.model.head_dim
    model = msgspec.structs.replace(
        plan.model, layers=1, heads=1, kv_heads=1, hidden=width, ffn_hidden=width, seq_len=min(plan.model.seq_len, 8),
        vocab=min(plan.model.vocab, 8),
    )  # fmt: skip
    attention: Literal["plain", "blocked"] = "blocked" if plan.cp_kind == "ring" else plan.attention
    small = make_plan(
        model, Mesh(), global_batch_size=1, micro_batch_size=1, attention=attention, training=plan.training,
        forward_only=plan.forward_only,
    )  # fmt: skip
    alone = Communicator(LoopbackTransport(Fabric(1), 0))
    Runtime(small, alone, Batches("synthetic", model, 1, plan.training.seed), device=device).run_step(0)


def run(
    plan: Plan, comm: Communicator, options: RunOptions, progress: Progress | None, device: Device = HOST
) -> Measurement | None:
    """Train (or evaluate) and measure; collective, the measurement is rank 0's.

    Args:
        plan: what to run.
        comm: the job, which reaches the device.
        options: what the command line adds.
        progress: who is told of each step.
        device: where this rank computes.

    Raises:
        DeviceMemoryError: the device has no room.
        PlanError: see `require_runnable`.
        DataError: the data cannot be read.
    """
    require_runnable(plan, comm)
    set_threads(plan)
    batches = Batches(options.data, plan.model, plan.global_batch_size, plan.training.seed)
    load_kernels(plan, device)
    recorder = Recorder(plan, comm)
    # NCCL's collectives wait for late ranks on the device: a barrier of hosts would only hold the hosts up.
    runtime = Runtime(plan, comm, batches, measure_wait=device.is_host or plan.transport != "nccl", device=device)
    peak = _peak_of_one_rank(runtime)
    for number in range(options.warmup + options.steps):
        result = runtime.run_step(number)
        timed = number >= options.warmup
        recorder.add(result, timed=timed)
        if options.paranoid:
            hash_replicas(runtime)
        if progress is not None:
            progress.step(number, result, timed=timed)
    return recorder.finish(runtime.arena, peak, _notes(plan, comm, options, device))


def _peak_of_one_rank(runtime: Runtime) -> float:
    """Rank 0's GEMM rate while the others sleep: ranks that spin in MPI would take its cores."""
    comm, precision, device = runtime.comm, runtime.precision, runtime.device
    comm.world.barrier()
    word = np.zeros(1)
    if comm.rank == 0:
        rate = gemm_flops_per_second(precision.master if device.is_host else precision.storage, device)
        for peer in range(1, comm.size):
            comm.world.isend(word, peer, _READY_TAG, key="ready", synchronous=False).wait()
        return rate
    request = comm.world.irecv(word, 0, _READY_TAG, key="ready")
    while not request.test():
        sleep(2e-3)
    return 0.0


def hash_replicas(runtime: Runtime) -> None:
    """Compare every replicated parameter across the ranks that hold it, bit for bit.

    Raises:
        CommunicationError: a replica differs; names the odd rank.
    """
    mesh, at, comm = runtime.plan.mesh, runtime.at, runtime.comm
    data = comm.group(mesh.group("data", at), "data")
    tensor = comm.group(mesh.group("tp", at), "tp")
    download = runtime.device.download
    for unit in runtime.units.values():
        if unit.whole is None:
            continue
        if data.size > 1:
            hash_replicated(download(unit.whole), data, unit.unit.block)
        for slot in unit.unit.slots:
            if slot.replicated_tp:
                hash_replicated(download(unit.view(unit.whole, slot)), tensor, slot.parameter.name)


def _notes(plan: Plan, comm: Communicator, options: RunOptions, device: Device) -> dict[str, Any]:
    """What the environment of a measurement says beyond the machine's own description."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    hosts = ranks_by_host(comm)
    here = next(len(ranks) for ranks in hosts if comm.rank in ranks)
    threads = here * plan.training.threads_per_rank
    return {
        "ranks": comm.size,
        "ranks_on_host": here,
        "hosts": len(hosts),
        "threads_per_rank": plan.training.threads_per_rank,
        # Bound ranks each see their own cores only, so the machine's count is the one to compare with.
        "oversubscribed": threads > (os.cpu_count() or usable),
        "kernels": ("fused" if kernels.FUSED else "reference") if device.is_host else "cuda",
        "transport": "host" if device.is_host else plan.transport,
        "precision": plan.training.precision,
        "emulated": device.is_host and Precision.of(plan).emulated,
        "data": options.data or "default text",
        "paranoid": options.paranoid,
    }


def require_writable(comm: Communicator, output: Path) -> None:
    """Refuse an output file that rank 0 could not write when the run is over; collective, all ranks refuse.

    Raises:
        DataError: its folder is missing or read-only, or it is a folder.
    """
    folder = output.parent
    possible = not output.is_dir() and folder.is_dir() and os.access(folder, os.W_OK)
    if not comm.world.gather_words(possible)[0]:
        reason = "it is a folder" if output.is_dir() else f"{folder} is no writable folder"
        raise DataError(f"cannot write {output}: {reason}; choose another file with -o")
