"""Plans on emulated GPUs: every layout and transport equals one rank on the host, and streams keep their rules.

The emulation (`emulated_cupy`) is for tests: it refuses what CuPy refuses, runs other streams than the compute stream
as late as it may, and finds accesses that no event orders. `poison_released` destroys memory as soon as it is given
back.
"""

import threading
from itertools import pairwise

import cuda_on_cpu
import emulated_cupy
import msgspec
import numpy as np
import pytest
from device_runs import check_on_devices, guard_host, on, poison_released, run_on_devices, runtime_on
from emulated_cupy import streams
from equivalence_plans import describe, model, plan

from executor.device import HOST
from executor.device.cuda import MAX_AHEAD, CudaDevice
from executor.ops import Context
from executor.runtime import Runtime
from planner.cost.memory import peak_memory

PLANS = [
    plan(model("bert")),
    plan(model("gpt"), attention="blocked", recompute="selective"),
    plan(model("gpt"), tp=2, sequence_parallel=True),
    plan(model("llama"), tp=2, training={"dropout": 0.2}),
    plan(model("llama"), tp=4, sequence_parallel=True, recompute="full"),
    plan(model("gpt"), dp=2, zero_stage=1, overlap_gradients=True),
    plan(model("gpt"), dp=2, zero_stage=2, batch=3),
    plan(model("bert"), dp=2, zero_stage=3, recompute="full"),
    plan(model("bert"), dp=4, overlap_gradients=True, batch=7),
    plan(model("gpt"), cp=2, cp_kind="ring"),
    plan(model("gpt"), cp=2, cp_kind="ulysses", tp=2),
    plan(model("modernbert"), cp=2, cp_kind="allgather"),
    plan(model("gpt"), pp=2, schedule="1f1b", batch=9),
    plan(model("llama"), pp=4, schedule="zb-h1", batch=9),
    plan(model("qwen3"), pp=2, schedule="zb-v", chunks=2, batch=9),
    plan(model("gpt"), pp=2, schedule="interleaved", chunks=2, batch=8),
    plan(model("gpt"), pp=2, dp=2, zero_stage=1, batch=9),
    plan(model("gpt"), pp=2, tp=2, sequence_parallel=True, forward_only=True),
]
TRANSPORTS = ["staged", "cuda-aware", "nccl"]


@pytest.fixture
def gpus(monkeypatch):
    """Set how many GPUs there are."""

    def choose(count):
        monkeypatch.setattr(emulated_cupy.cuda.runtime, "devices", count)

    return choose


@pytest.fixture(autouse=True)
def strict(request, monkeypatch):
    """The host's transport takes host memory only (unless it is CUDA-aware), and what is given back is destroyed."""
    poison_released(monkeypatch)
    if "cuda-aware" not in str(request.node.name):
        guard_host(monkeypatch)


def prepare(transport, candidate, gpus, monkeypatch):
    """GPUs for a transport: one for all ranks, or, for NCCL, one each."""
    gpus(candidate.mesh.world_size if transport == "nccl" else 1)
    if transport == "cuda-aware":
        from executor.comm.loopback import LoopbackTransport

        monkeypatch.setattr(LoopbackTransport, "takes_device_pointers", True)
    return on(transport, candidate)


@pytest.mark.parametrize(
    ("candidate", "transport"),
    [(candidate, transport) for transport in ("staged", "nccl") for candidate in PLANS]
    + [(candidate, "cuda-aware") for candidate in PLANS[2::4]],
    ids=lambda value: value if isinstance(value, str) else describe(value),
)
def test_every_layout_on_gpus_equals_one_rank_on_the_host(candidate, transport, gpus, monkeypatch):
    candidate = prepare(transport, candidate, gpus, monkeypatch)
    report = check_on_devices(candidate, synchronous_sends=True)
    assert report.passed, report.largest
    assert report.limit == 1e-12


def test_staged_messages_leave_before_the_host_waits_for_fingerprints(gpus, monkeypatch):
    """A rank that waits for its peer's record, with the message that the peer waits for still on its way out."""
    candidate = prepare("staged", PLANS[12], gpus, monkeypatch)
    monkeypatch.setattr(streams, "EAGERNESS", 100)  # copies out seldom end before the host waits for them
    assert check_on_devices(candidate, paranoid=True, paranoid_timeout_seconds=5.0).passed


CUDA_PLANS = [PLANS[i] for i in (2, 3, 7, 9, 10, 14)]


@pytest.mark.skipif(not cuda_on_cpu.available(), reason="no g++ to run the CUDA sources")
@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
@pytest.mark.parametrize("candidate", CUDA_PLANS, ids=describe)
def test_the_cuda_kernels_train_the_same_model(candidate, dtype, gpus, monkeypatch):
    """The sources that a GPU compiles, their Python side and the runtime together; bfloat16 is stored in 16 bits."""
    if dtype == "bfloat16":
        pytest.importorskip("ml_dtypes")
    candidate = prepare("staged", candidate, gpus, monkeypatch)
    report = check_on_devices(candidate, dtype, kernels="cuda")
    assert report.passed, report.largest


# ---- the rules of streams --------------------------------------------------------------------------------------------

PIPELINE = plan(model("gpt"), pp=2, schedule="1f1b", batch=9)
OVERLAPPED = plan(model("gpt"), dp=2, overlap_gradients=True)
RACES = (emulated_cupy.RaceError, AssertionError)


@pytest.mark.parametrize("transport", ["staged", "nccl"])
@pytest.mark.parametrize("candidate", [PIPELINE, OVERLAPPED], ids=["pipeline", "overlap"])
def test_a_stream_that_starts_too_early_is_found(candidate, transport, gpus, monkeypatch):
    """Rule 2: without the fork the copy or the message does not wait for what computes it."""
    candidate = prepare(transport, candidate, gpus, monkeypatch)
    monkeypatch.setattr(streams, "WAIT_SECONDS", 1.0)  # how long the other rank waits for this one's message
    monkeypatch.setattr(CudaDevice, "fork", lambda *_: None)
    monkeypatch.setattr(streams.Stream, "wait_event", _only_when_current(streams.Stream.wait_event))
    with pytest.raises(emulated_cupy.RaceError, match="having waited for"):
        check_on_devices(candidate)


def _only_when_current(wait_event):
    def wait(self, event):
        if self.is_current:
            wait_event(self, event)

    return wait


@pytest.mark.parametrize("transport", ["staged", "nccl"])
@pytest.mark.parametrize("candidate", [PIPELINE, OVERLAPPED], ids=["pipeline", "overlap"])
def test_a_join_left_out_is_found(candidate, transport, gpus, monkeypatch):
    """Rule 3: without the join kernels read what has not arrived, or overwrite what is still being sent."""
    candidate = prepare(transport, candidate, gpus, monkeypatch)
    monkeypatch.setattr(CudaDevice, "join", lambda *_: None)
    # A host that sees every operation end before it goes on needs no join: let it look once only.
    monkeypatch.setattr(streams, "EAGERNESS", 1000)
    try:
        passed = check_on_devices(candidate).passed
    except RACES:
        passed = False
    assert not passed or transport == "staged", "nothing of a staged message is joined on the device but its copy in"


def test_memory_given_back_before_its_send_has_passed_is_found(gpus, monkeypatch):
    """Rule 4: a send that holds its block no longer sends what was written there since."""
    candidate = prepare("nccl", PIPELINE, gpus, monkeypatch)
    from executor.transfers import Transfers

    send = Transfers.send

    def careless(self, m, task, root):
        send(self, m, task, root)
        one = self.pending[-1]
        self.arena.release(one.block)
        one.block = None

    monkeypatch.setattr(Transfers, "send", careless)
    try:
        passed = check_on_devices(candidate).passed
    except RACES:
        passed = False
    assert not passed


def test_host_arrays_among_device_arrays_are_refused(gpus, monkeypatch):
    """Index data that was not uploaded, as on a real GPU, does not pass unnoticed."""
    candidate = prepare("staged", PLANS[0], gpus, monkeypatch)
    monkeypatch.setattr(Context, "constant", lambda self, key, make: make())
    with pytest.raises(emulated_cupy.MixedArraysError):
        check_on_devices(candidate)
    device, host = emulated_cupy.asarray(np.ones(3)), np.ones(3)
    for mix in (
        lambda: device + host, lambda: host + device, lambda: np.add(host, 1.0, out=device),
        lambda: np.copyto(host, device),
        lambda: np.concatenate([host, device]), lambda: device.__setitem__(slice(None), host), lambda: device[host > 0],
    ):  # fmt: skip
        with pytest.raises(TypeError):
            mix()


def synchronisations(candidate, steps=2):
    """How often each rank's host waited for its device inside the last step."""

    def main(comm, device):
        runtime = runtime_on(candidate, comm, device, measure_wait=False)
        for step in range(steps):
            before = len(streams.log)
            runtime.run_step(step)
        own = threading.get_ident()
        return [entry for entry in streams.log[before:] if entry[0] == own and entry[2] == "synchronize"]

    return [len(found) for found in run_on_devices(candidate, main)]


def test_under_nccl_the_host_waits_at_the_ends_of_a_step_only(gpus, monkeypatch):
    """As often with four layers of collectives as with one: at the beginning, for the loss, and at the end."""
    waits = []
    for layers in (1, 4):
        candidate = plan(model("gpt", layers=layers), tp=2, dp=2, overlap_gradients=True, training={"clip_norm": None})
        waits.append(synchronisations(prepare("nccl", candidate, gpus, monkeypatch)))
    assert waits[0] == waits[1]
    # begin_step 2 (compute, copies out), the loss 1, synchronise 2, reading the spans 1; uploads go round their slots.
    assert max(waits[1]) <= 8


# ---- spans, memory, the end of a step --------------------------------------------------------------------------------


def step_on(candidate, device_of):
    """Two steps on each rank; spans, seconds and arena of the second."""

    def main(comm, device):
        runtime = runtime_on(candidate, comm, device_of(device))
        runtime.run_step(0)
        result = runtime.run_step(1)
        return result, runtime

    return run_on_devices(candidate, main)


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("candidate", [PLANS[5], PLANS[9], PLANS[16]], ids=describe)
def test_spans_are_read_from_events_and_fill_the_step(candidate, transport, gpus, monkeypatch):
    candidate = prepare(transport, candidate, gpus, monkeypatch)
    on_gpu = step_on(candidate, lambda device: device)
    expected = step_on(on("staged", candidate), lambda _: HOST) if transport != "nccl" else on_gpu
    for (result, _), (host, _) in zip(on_gpu, expected, strict=True):
        assert [(s.key, s.stream) for s in result.spans] == [(s.key, s.stream) for s in host.spans]
        assert all(isinstance(x, float) for s in result.spans for x in (s.start, s.end, s.wait))
        assert all(0 <= s.wait <= s.end - s.start + 1e-12 for s in result.spans)
        begun, ended = result.started - 1e-4, result.started + result.seconds + 1e-4
        assert all(begun <= s.start <= s.end <= ended for s in result.spans)
        compute = [s for s in result.spans if s.stream == "compute"]
        assert all(a.end <= b.start + 1e-9 for a, b in pairwise(compute))
        receives = [s for s in result.spans if ".receive." in s.key]
        assert all(s.wait == pytest.approx(s.end - s.start, abs=1e-9) for s in receives)


@pytest.mark.parametrize("candidate", [PLANS[4], PLANS[7], PLANS[12], PLANS[14]], ids=describe)
def test_a_device_holds_what_was_predicted_and_reserves_nothing_in_later_steps(candidate, gpus, monkeypatch):
    candidate = prepare("staged", candidate, gpus, monkeypatch)

    def main(comm, device):
        runtime = runtime_on(candidate, comm, device)
        runtime.run_step(0)
        reserved = runtime.arena.reserved_bytes
        pinned = []
        for step in range(1, 5):
            runtime.run_step(step)
            pinned.append(device.pinned.reserved_bytes)
        assert runtime.arena.reserved_bytes == reserved
        assert pinned[-1] == pinned[-2], "pinned memory goes round"
        assert device.peak_bytes() >= runtime.arena.peak_bytes
        return runtime.arena.peak_bytes, peak_memory(runtime.program).total_bytes

    for counted, predicted in run_on_devices(candidate, main):
        assert counted == predicted or candidate.mesh.pp > 1  # sends complete when the host looks


def test_the_same_plan_twice_is_bitwise_equal(gpus, monkeypatch):
    candidate = prepare("nccl", PLANS[16], gpus, monkeypatch)

    def main(comm, device):
        runtime = runtime_on(candidate, comm, device)
        losses = [runtime.run_step(step).loss for step in range(3)]
        return losses, [device.download(unit.shard) for unit in runtime.units.values()]

    first, second = (run_on_devices(candidate, main) for _ in range(2))
    for (losses, states), (again, others) in zip(first, second, strict=True):
        assert losses == again
        assert all(np.array_equal(a, b) for a, b in zip(states, others, strict=True))


def test_the_host_keeps_its_lead_short(gpus, monkeypatch):
    """While sends are under way a rank waits for its own stream of MAX_AHEAD instructions ago, never for a peer."""
    candidate = prepare("nccl", plan(model("gpt"), pp=2, schedule="gpipe", batch=16, micro=1), gpus, monkeypatch)

    def main(comm, device):
        runtime = runtime_on(candidate, comm, device)
        noted = []
        note = device.end_instruction

        def watched():
            note()
            noted.append(len(device._ends))

        device.end_instruction = watched
        runtime.run_step(0)
        return noted

    for noted in run_on_devices(candidate, main):
        assert noted and max(noted) == MAX_AHEAD


def test_runs_on_the_host_know_nothing_of_devices():
    candidate = PLANS[5]
    assert Runtime.__init__.__kwdefaults__["device"] is HOST
    result, runtime = step_on(on("staged", candidate), lambda _: HOST)[0]
    assert runtime.arena.device is HOST
    assert all(type(s.start) is float for s in result.spans)
    assert msgspec.structs.asdict(candidate)["transport"] == "host"
