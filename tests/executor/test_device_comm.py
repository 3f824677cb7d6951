"""Transports of device arrays: every operation equals the host's, long messages come in pieces; bad input."""

import functools
import gc
import importlib
import re
import threading

import emulated_cupy
import numpy as np
import pytest
from device_runs import connect, guard_host, on, run_on_devices, runtime_on
from emulated_cupy import arrays, memory, streams
from equivalence_plans import model, plan

from executor.comm import ALGORITHMS
from executor.comm.loopback import LoopbackTransport, run_loopback
from executor.comm.staged import CHUNK_BYTES
from executor.device import open_device
from executor.device.choice import count_devices
from executor.device.exhausted import told_of_memory
from planner.errors import DataError, PlanError

SIZE = 4
COUNTS = [3, 0, 5, 2]
ALIKE = [4, 4, 4, 4]
PLAN = plan(model("gpt"), dp=SIZE, batch=8)


@pytest.fixture(autouse=True)
def gpus(monkeypatch):
    """One GPU for each rank, of which only NCCL needs as many."""
    monkeypatch.setattr(emulated_cupy.cuda.runtime, "devices", SIZE)


def collectives(group, rank, algorithm, counts, put, get):
    """Results of the operations that have an algorithm, with buffers where `put` puts them."""
    values = np.random.default_rng(rank).integers(-8, 8, sum(counts)).astype(np.float64)
    named = {"algorithm": algorithm}
    found = {}
    if algorithm in ALGORITHMS["all_reduce"]:
        for op in ("sum", "max"):
            buffer = put(values)
            group.all_reduce(buffer, op, **named)
            found["all_reduce", op] = get(buffer)
    if algorithm in ALGORITHMS["all_gather"]:
        own, whole = put(values[: counts[rank]]), put(np.zeros(sum(counts)))
        group.all_gather(own, whole, counts, **named)
        found["all_gather"] = get(whole)
    if algorithm in ALGORITHMS["reduce_scatter"]:
        part = put(np.zeros(counts[rank]))
        group.reduce_scatter(put(values), part, counts, **named)
        found["reduce_scatter"] = get(part)
        request = group.ireduce_scatter(put(values), part := put(np.zeros(counts[rank])), counts, **named)
        request.wait()
        found["ireduce_scatter"] = get(part)
    if algorithm in ALGORITHMS["all_to_all"]:
        received = put(np.zeros(counts[rank] * SIZE))
        group.all_to_all(put(values), received, counts, [counts[rank]] * SIZE, **named)
        found["all_to_all"] = get(received)
    if algorithm in ALGORITHMS["broadcast"]:
        buffer = put(values)
        group.broadcast(buffer, 2, **named)
        found["broadcast"] = get(buffer)
    return found


EVERY = sorted({name for names in ALGORITHMS.values() for name in names})
CASES = [("staged", name) for name in EVERY] + [("cuda-aware", name) for name in EVERY] + [("nccl", "native")]


@pytest.mark.parametrize("counts", [ALIKE, COUNTS], ids=["alike", "uneven"])
@pytest.mark.parametrize(("transport", "algorithm"), CASES)
def test_collectives_of_device_arrays_equal_the_hosts(transport, algorithm, counts, monkeypatch):
    if transport == "cuda-aware":
        monkeypatch.setattr(LoopbackTransport, "takes_device_pointers", True)
    else:
        guard_host(monkeypatch)

    def main(comm, device):
        group = comm.group(range(SIZE), "tp")
        on_host = collectives(group, comm.rank, algorithm, counts, np.copy, np.copy)
        on_device = collectives(group, comm.rank, algorithm, counts, device.upload, device.download)
        return on_host, on_device

    for on_host, on_device in run_on_devices(on(transport, PLAN), main):
        assert on_host.keys() == on_device.keys() and on_host
        for name, expected in on_host.items():
            assert np.array_equal(on_device[name], expected), name


@pytest.mark.parametrize("transport", ["staged", "nccl"])
@pytest.mark.parametrize("nbytes", [0, 1000, 2 * CHUNK_BYTES - 8, 2 * CHUNK_BYTES, 5 * CHUNK_BYTES + 24])
def test_messages_of_any_length_both_ways_at_once(transport, nbytes, monkeypatch):
    """Every rank sends to both neighbours before it receives, synchronously; lanes must not block one another."""
    guard_host(monkeypatch)
    posted = []

    def main(comm, device):
        group = comm.group(range(SIZE), "pp")
        values = np.arange(nbytes // 8, dtype=np.float64)
        for step, tag in ((1, 0), (-1, 1)):
            out, into = device.upload(values + comm.rank), device.empty(values.shape, values.dtype)
            sent = group.issend(out, (comm.rank + step) % SIZE, tag)
            received = group.irecv(into, (comm.rank - step) % SIZE, tag)
            received.wait()
            sent.wait()
            assert np.array_equal(device.download(into), values + (comm.rank - step) % SIZE)
        posted.append(len(getattr(sent, "stages", [])))

    run_on_devices(on(transport, PLAN), main, synchronous_sends=True)
    if transport == "staged":
        expected = 1 if nbytes < 2 * CHUNK_BYTES else -(-nbytes // CHUNK_BYTES)
        assert posted == [expected] * SIZE


def test_staged_calls_reach_mpi_in_the_programs_order(monkeypatch):
    """Copies that end late may not let a later collective overtake an earlier one: ranks would pair different ones."""
    monkeypatch.setattr(streams, "EAGERNESS", 50)

    def main(comm, device):
        group = comm.group(range(SIZE), "data")
        buffers = [device.upload(np.full(9, float(comm.rank + number))) for number in range(6)]
        started = [group.iall_reduce(buffer) for buffer in buffers[:-1]]
        for _ in range(comm.rank):
            started[0].test()  # ranks look differently often
        group.all_reduce(buffers[-1])
        for request in reversed(started):
            request.wait()
        return [float(device.download(buffer)[0]) for buffer in buffers]

    for found in run_on_devices(on("staged", PLAN), main):
        assert found == [sum(range(SIZE)) + SIZE * number for number in range(6)]


def test_cuda_aware_calls_find_the_compute_stream_empty(monkeypatch):
    """MPI may read a buffer the moment it is called: the host has waited for everything before."""
    monkeypatch.setattr(LoopbackTransport, "takes_device_pointers", True)
    from executor.comm.loopback import LoopbackChannel

    seen = []

    def watched(call):
        def checked(self, *arguments, **named):
            if any(hasattr(x, "__cuda_array_interface__") for x in arguments):
                current = streams.current_stream()
                assert current.seen_by_host == current.counter
                seen.append(threading.get_ident())
            return call(self, *arguments, **named)

        return checked

    for name in ("isend", "irecv", "all_reduce", "all_gather", "reduce_scatter"):
        monkeypatch.setattr(LoopbackChannel, name, watched(getattr(LoopbackChannel, name)))
    candidate = on(
        "cuda-aware", plan(model("gpt"), tp=2, pp=2, sequence_parallel=True, collectives={"all_gather": "ring"})
    )
    run_on_devices(candidate, lambda comm, device: runtime_on(candidate, comm, device).run_step(0))
    assert len(seen) > 20


# ---- bad input -------------------------------------------------------------------------------------------------------


def refused(transport, size=2, candidate=None):
    """The one message with which all ranks refuse."""
    candidate = candidate or on(transport, plan(model("gpt"), dp=size))

    def main(comm):
        with pytest.raises((PlanError, DataError)) as caught:
            connect(comm, candidate)
        return str(caught.value)

    messages = run_loopback(size, main)
    assert len(set(messages)) == 1
    return messages[0]


def test_nccl_is_refused_before_it_hangs_where_ranks_share_a_gpu(monkeypatch):
    monkeypatch.setattr(emulated_cupy.cuda.runtime, "devices", 1)
    message = refused("nccl", 3)
    assert "one GPU per rank" in message and "ranks 0, 1, 2 share one (3 ranks on 1 GPUs)" in message
    assert "--transport staged" in message


def test_cuda_aware_is_refused_where_the_library_is_not():
    message = refused("cuda-aware")
    assert "MPIX_Query_cuda_support" in message and "MPIR_CVAR_ENABLE_GPU" in message and "staged" in message


def test_host_plans_are_refused_on_gpus():
    assert "--transport nccl" in refused("host")


def test_nccl_without_a_library(monkeypatch):
    monkeypatch.setattr(emulated_cupy.cuda.nccl, "available", False)
    assert "nvidia-nccl-cu13" in refused("nccl")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"devices": 0}, "the driver shows no device"),
        ({"driver": 0, "status": 35}, "no NVIDIA driver is installed"),
        ({"driver": 12020, "status": 35}, "supports CUDA up to 12.2 and this CuPy needs 13.0"),
        ({"status": 100}, "the driver shows no device"),
        ({"status": 999}, "CUDA says unknown error"),
    ],
)
def test_a_machine_without_a_usable_gpu(monkeypatch, changes, message):
    runtime = emulated_cupy.cuda.runtime
    status = changes.pop("status", None)
    for name, value in changes.items():
        monkeypatch.setattr(runtime, name, value)
    if status is not None:
        monkeypatch.setattr(runtime, "failure", emulated_cupy.cuda.CUDARuntimeError(status, "unknown error"))
    with pytest.raises(DataError, match=message) as caught:
        count_devices(emulated_cupy)
    assert str(caught.value).endswith("use --device cpu")


def test_without_cupy():
    with pytest.raises(DataError, match=r"CuPy .* is not installed; install .*cupy-cuda13x or cupy-cuda12x"):
        open_device("cuda")


def test_ranks_of_a_host_go_round_its_gpus():
    numbers = [open_device("cuda", rank, cupy=emulated_cupy, kernels=np).index for rank in range(6)]
    assert numbers == [0, 1, 2, 3, 0, 1]


def test_out_of_memory_names_the_tensor_its_size_and_the_prediction(tmp_path):
    spec = model("gpt", hidden=64, ffn_hidden=256)
    candidate = on("staged", plan(spec, batch=32, micro=32, training={"precision": "float32"}))
    file = tmp_path / "plan.json"
    peak = run_on_devices(candidate, lambda comm, device: _peak(candidate, comm, device))[0]

    def attempt(limit):
        gc.collect()  # what earlier runs left in cycles is not to be freed meanwhile
        memory.set_limit(memory.get_default_memory_pool().used_bytes() + limit)
        try:
            with pytest.raises(DataError) as caught:
                run_loopback(1, lambda comm: _one_step(candidate, comm, file))
        finally:
            memory.set_limit(None)
        return str(caught.value)

    early, late = attempt(200_000), attempt(int(0.9 * peak))
    assert "of layers." in early and "needs" in early and "parameters" in early
    assert "run planner predict" in early
    assert "activations" in late and "optimizer" in late and "--recompute full" in late
    _predict(candidate, tmp_path)
    assert re.search("was predicted to peak at .* on this rank", attempt(200_000))


def _peak(candidate, comm, device):
    runtime = runtime_on(candidate, comm, device)
    runtime.run_step(0)
    return runtime.arena.peak_bytes


def _one_step(candidate, comm, file):
    device = connect(comm, candidate)
    with told_of_memory(file, candidate, comm.rank, device):
        runtime_on(candidate, comm, device).run_step(0)


def _predict(candidate, folder):
    from planner.machine import load_machine
    from planner.predict import predict
    from planner.trace import dump_record

    dump_record(predict(candidate, load_machine("h100-80gb")), folder / "predicted.json")


def test_no_host_memory_error_is_dressed_as_the_devices(tmp_path):
    from executor.device import HOST

    with pytest.raises(MemoryError), told_of_memory(tmp_path / "plan.json", PLAN, 0, HOST):
        raise MemoryError("the host's")


USED = [
    *(f"ndarray.{name}" for name in vars(emulated_cupy.ndarray) if name[0] != "_" and name != "allocation"),
    "asarray", "asnumpy", "empty", "empty_like", "zeros", "may_share_memory", "broadcast_to", "ndarray.get",
    "ndarray.set", "RawModule", "get_default_memory_pool", "cuda.Device.use", "cuda.Device.synchronize",
    "cuda.Device.pci_bus_id",
    "cuda.Stream.record", "cuda.Stream.wait_event", "cuda.Stream.synchronize", "cuda.Stream.use", "cuda.Event.done",
    "cuda.Event.synchronize", "cuda.get_elapsed_time", "cuda.alloc_pinned_memory", "cuda.memory.OutOfMemoryError",
    "cuda.runtime.getDeviceCount", "cuda.runtime.driverGetVersion", "cuda.runtime.runtimeGetVersion",
    "cuda.runtime.getDeviceProperties", "cuda.runtime.memGetInfo", "cuda.runtime.CUDARuntimeError",
    "cuda.nccl.get_unique_id", "cuda.nccl.groupStart", "cuda.nccl.groupEnd", "cuda.nccl.NCCL_UINT8",
    "cuda.nccl.NCCL_SUM",
    "cuda.nccl.NCCL_MAX", "cuda.nccl.NCCL_BFLOAT16", *(
        f"cuda.nccl.NcclCommunicator.{name}"
        for name in ("allReduce", "allGather", "reduceScatter", "broadcast", "reduce", "send", "recv")
    ),
]  # fmt: skip


@pytest.mark.parametrize("library", ["cupy", "emulated_cupy"])
def test_the_calls_made_exist_in_cupy_and_in_its_emulation(library):
    module = pytest.importorskip(library)
    importlib.import_module(f"{library}.cuda.nccl")
    by_protocol = [*arrays.FUNCTIONS, *arrays.UFUNCS] if library == "cupy" else []  # NumPy calls them
    for name in (*USED, *by_protocol):
        assert functools.reduce(getattr, name.split("."), module) is not None, name
