"""Running plans on emulated devices: ranks are threads, each with streams of its own, sharing a GPU or not."""

import functools

import emulated_cupy
import msgspec
from emulated_cupy import kernels as tables

from executor.check import check
from executor.comm.loopback import LoopbackChannel, run_loopback
from executor.data import Batches
from executor.device import open_device
from executor.memory import Arena
from executor.runtime import Runtime


@functools.cache
def table(name):
    """A table of kernels: "reference" or "cuda"."""
    return tables.cuda_table() if name == "cuda" else tables.reference_table()


def on(transport, plan):
    """The plan with another transport."""
    return msgspec.structs.replace(plan, transport=transport)


def connect(comm, plan, kernels="reference"):
    """This rank's emulated device, which its communicator reaches."""
    device = open_device("cuda", comm.rank, cupy=emulated_cupy, kernels=table(kernels))
    comm.use_device(device, plan.transport)
    return device


def run_on_devices(plan, main, kernels="reference", **settings):
    """main(comm, device) on every rank of a plan."""
    table(kernels)  # imported once, before there are threads
    return run_loopback(plan.mesh.world_size, lambda comm: main(comm, connect(comm, plan, kernels)), **settings)


def check_on_devices(plan, dtype="float64", kernels="reference", **settings):
    """The check's report; the one rank it compares with computes on the host."""
    return run_on_devices(plan, lambda comm, device: check(plan, comm, dtype, device), kernels, **settings)[0]


def runtime_on(plan, comm, device, **settings):
    """A rank on synthetic tokens."""
    batches = Batches("synthetic", plan.model, plan.global_batch_size, plan.training.seed)
    return Runtime(plan, comm, batches, device=device, **settings)


def guard_host(monkeypatch):
    """Let the host's transport refuse arrays in device memory, as a library that is not CUDA-aware crashes on them."""
    for name in ("isend", "irecv", "all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast"):
        monkeypatch.setattr(LoopbackChannel, name, _refusing(getattr(LoopbackChannel, name)))


def _refusing(call):
    @functools.wraps(call)
    def guarded(self, *arguments, **named):
        assert not any(hasattr(x, "__cuda_array_interface__") for x in arguments), (
            "device memory given to the host's MPI"
        )
        return call(self, *arguments, **named)

    return guarded


def poison_released(monkeypatch):
    """Let the arena destroy what is given back: a stream that still reads it reads poison."""
    release = Arena.release

    def poisoning(self, block):
        release(self, block)
        if block.holders == 0 and not self.device.is_host:
            emulated_cupy.memory.poison(block.raw)

    monkeypatch.setattr(Arena, "release", poisoning)


__all__ = [
    "check_on_devices", "connect", "guard_host", "on", "poison_released", "run_on_devices", "runtime_on",
]  # fmt: skip
