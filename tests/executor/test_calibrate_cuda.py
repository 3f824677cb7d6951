"""The survey of CUDA devices, on emulated ones: what is kept of a probe, what becomes a figure, `make gpu`."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import emulated_cupy
import msgspec
import pytest
import small_survey
import widened_kernels
from gpu_processes import prepare

import executor.measure
from executor.calibrate.carried import time_direct
from executor.calibrate.copies import Copies
from executor.calibrate.device_machine import host_times, with_calls, with_transports
from executor.calibrate.device_probes import MAX_STALL, DeviceProbeResult, Stall, run_device_probe
from executor.calibrate.device_survey import ESSENTIAL, QUICK, Effort, profile_devices
from executor.calibrate.exchanges import OPERATIONS
from executor.calibrate.fit import fit_scratch
from executor.calibrate.probes import Probe
from executor.comm.loopback import run_loopback
from executor.device import open_device
from executor.threads import use_threads
from planner import Machine, Mesh, load_machine, make_plan, predict, with_sizes
from planner.cli.frame import run
from planner.cost.footprint import attention_scratch_bytes
from planner.cost.price import compute_seconds, launches
from planner.machine import AttentionFigures, dump_machine
from planner.plan import Training
from planner.program import lower

ROOT = Path(__file__).parents[2]
PRECISIONS = ("float32", "bfloat16", "tf32")


@pytest.fixture(scope="module")
def table():
    return widened_kernels.table()


def device_of(rank, table):
    return open_device("cuda", rank, cupy=emulated_cupy, kernels=table)


@pytest.fixture(scope="module")
def machine(table) -> Machine:
    """What a survey finds with two ranks on one device."""
    patch = pytest.MonkeyPatch()
    patch.setattr(executor.measure, "DEVICE_GEMM_SIZE", small_survey.GEMM_SIZE)
    use_threads(1)

    def main(comm):
        device = device_of(comm.rank, table)
        comm.use_device(device, "staged")
        return profile_devices(comm, device, small_survey.EFFORT)

    try:
        return run_loopback(2, main, timeout_seconds=100)[0]
    finally:
        patch.undo()


# ---- probes ----------------------------------------------------------------------------------------------------------


def test_a_probe_keeps_the_device_and_the_host_apart_until_the_host_waits(table) -> None:
    device = device_of(0, table)
    stall = Stall(device, 1 << 16)
    plain, clipped = (
        run_device_probe(Probe(32, 16, 2, layers=1, head_dim=16, clip_norm=norm), "float32", device, stall, 0.0)
        for norm in (None, 1e-3)
    )
    kinds = {each.kind for each in plain.observations}
    assert {"linear.forward", "linear.backward_weight", "attention_plain.backward", "optimizer"} <= kinds
    assert "loss_sum" not in kinds | set(plain.host_seconds)
    assert {"gradient_norm"} == {each.kind for each in clipped.observations} - kinds
    assert "optimizer" not in {each.kind for each in clipped.observations}  # it finds the device idle
    assert plain.peak_bytes > 0
    assert all(seconds > 0 for found in plain.host_seconds.values() for seconds in found)


def test_a_stall_is_as_many_copies_as_asked_for_and_leaves_room_in_the_queue(table) -> None:
    class Counted(Stall):
        copies = 0

        def _copy(self) -> None:
            super()._copy()
            self.copies += 1

    stall = Counted(device_of(0, table), 1 << 16)
    for seconds, expected in ((7.5 * (1 << 16) / stall.bytes_per_second, 8), (1e9, MAX_STALL), (0.0, 0)):
        before = stall.copies
        stall.begin(seconds)
        assert stall.copies - before == expected


# ---- figures ---------------------------------------------------------------------------------------------------------


def result(host_seconds, **changes) -> DeviceProbeResult:
    usual = {
        "probe": small_survey.PROBES[0], "precision": "float32", "observations": [], "around_seconds": 0.0,
        "step_seconds": [1.0], "peak_bytes": 1, "reserved_bytes": 1, "pool_bytes": 1,
    }  # fmt: skip
    return DeviceProbeResult(host_seconds=host_seconds, **(usual | changes))


def test_host_time_is_whole_launches_and_all_of_it_is_kept() -> None:
    hosts = {"linear.forward": [2.1e-5] * 8, "norm.forward": [1e-5] * 4, "attention_blocked.backward": [9.4e-5] * 2}
    fused = {"attention_blocked.backward": [2e-5]}
    launch_seconds, calls = host_times([result(hosts), result(fused, precision="bfloat16")])
    assert calls["float32"] == {"linear": 2, "norm": 1, "attention_blocked_backward": 9}
    assert calls["bfloat16"] == {"attention_blocked_backward": 2}
    counted = 8 * 2 + 4 * 1 + 2 * 9 + 2
    assert launch_seconds * counted == pytest.approx(sum(map(sum, hosts.values())) + 2e-5)


def test_scratch_memory_is_a_rate_up_to_a_limit() -> None:
    pairs = [1e6, 2e6, 8e6, 1e8, 4e8]
    assert fit_scratch(pairs, [min(6 * each, 1.2e8) for each in pairs]) == pytest.approx((6.0, 1.2e8))
    assert fit_scratch(pairs, [0.0] * 5) == (0.0, 0.0)
    assert fit_scratch([1e6], [4e6]) == pytest.approx((4.0, 4e6))


def test_scratch_memory_counts_in_what_must_fit(machine) -> None:
    scratch = AttentionFigures(scratch_bytes_per_pair=6.0, scratch_limit_bytes=5e5)
    device = msgspec.structs.replace(machine.device, attention={"attention_plain_backward": scratch}, precisions={})
    hungry = msgspec.structs.replace(machine, device=device)
    for seq, expected in ((32, 2 * 4 * 32 * 32 * 6), (256, 5e5)):
        spec = with_sizes(None, layers=2, hidden=64, heads=4, seq_len=seq)
        plan, blocked = (
            make_plan(spec, Mesh(), global_batch_size=2, micro_batch_size=2, attention=kind, transport="staged")
            for kind in ("plain", "blocked")
        )
        assert attention_scratch_bytes(hungry, plan) == expected
        assert attention_scratch_bytes(hungry, blocked) == 0


def test_bandwidth_of_copies_is_of_the_largest_without_its_latency() -> None:
    copies = Copies((1 << 12, 1 << 30), (1e-5, 1e-5 + (1 << 30) / 5e10), (2e-5, 2e-5 + (1 << 30) / 2.5e10))
    assert copies.bytes_per_second(copies.to_host_seconds) == pytest.approx(5e10)
    assert copies.bytes_per_second(copies.to_device_seconds) == pytest.approx(2.5e10)
    assert copies.latency_seconds == pytest.approx(1.5e-5)


# ---- the survey ------------------------------------------------------------------------------------------------------


def test_a_survey_is_a_profile_of_its_device_in_every_precision(machine, tmp_path) -> None:
    dump_machine(machine, tmp_path / "machine.toml")
    assert load_machine(tmp_path / "machine.toml") == machine
    device = machine.device
    assert (device.kind, set(device.peak_flops_per_second)) == ("gpu", set(PRECISIONS))
    assert set(device.precisions) == set(PRECISIONS) - {"float32"}
    for figures in (device, *device.precisions.values()):
        assert {sample.form for sample in figures.gemm_samples} == {"forward", "backward_input", "backward_weight"}
        assert {"attention_plain", "attention_plain_backward", "attention_blocked"} <= set(figures.attention)
        assert {"optimizer", "norm", "norm_backward", "residual_norm", "gated"} <= set(figures.kernels)
        assert all(kernel.regimes or name == "linear" for name, kernel in figures.kernels.items())
    assert (machine.host.devices, machine.host.ranks_per_device) == (1, 2)
    assert machine.overheads.dispatch_seconds > 0
    assert machine.overheads.step_seconds > 0


def test_ranks_that_share_a_device_get_a_staged_transport(machine) -> None:
    assert machine.transport_in_use == "staged"
    assert machine.staging is not None
    assert machine.staging.shared_bandwidth_bytes_per_second is not None
    assert {table.operation for table in machine.link_in_host.measured} == {*OPERATIONS, "send"}
    assert "no nccl here" in machine.device.provenance
    assert "no cuda-aware here" in machine.device.provenance
    plan = make_plan(
        with_sizes(None, layers=2, hidden=64, heads=4, seq_len=32), Mesh(tp=2), global_batch_size=2,
        micro_batch_size=2, transport="staged",
    )  # fmt: skip
    assert predict(plan, machine).exposed_communication_seconds > 0


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_predicted_step_is_the_sum_of_its_parts(machine, precision) -> None:
    """Of each of forward, backward and update the longer of the device's time and the host's, and what is around."""
    plan = make_plan(
        with_sizes(None, layers=2, hidden=64, heads=4, seq_len=32), Mesh(), global_batch_size=2, micro_batch_size=2,
        training=Training(precision=precision), transport="staged",
    )  # fmt: skip
    free = ("loss_sum", "slice")
    for factor in (0.0, 1.0, 10.0):  # bound by the device, by either, by the host
        dispatch = factor * machine.overheads.dispatch_seconds
        changed = machine.with_figures({"overheads.dispatch_seconds": dispatch})
        total = changed.overheads.step_seconds
        for part in lower(plan, 0).steps:
            tasks = [task for task in part.tasks if task.kind not in free]
            device = sum(float(compute_seconds(changed, task, precision)) for task in tasks)
            host = dispatch * sum(launches(changed, task, precision) for task in tasks)
            total += max(device, host)
        assert predict(plan, changed).step_seconds == pytest.approx(total, rel=1e-9)


def test_launches_of_a_kind_are_those_that_were_timed_in_its_precision(machine) -> None:
    calls = {"float32": {"linear": 3, "norm": 2, "attention_plain_backward": 11}, "bfloat16": {"norm": 5, "linear": 4}}
    counted = with_calls(machine.device, calls)
    assert counted.attention["attention_plain_backward"].calls == 11
    assert counted.kernels["norm"].regimes == machine.device.kernels["norm"].regimes
    assert (counted.kernels["linear"].calls, counted.kernels["norm"].calls) == (3, 2)
    narrow = counted.precisions["bfloat16"]
    assert (narrow.kernels["linear"].calls, narrow.kernels["norm"].calls) == (4, 5)


def test_nccl_is_timed_where_every_rank_has_a_device_and_becomes_the_transport(machine, table, monkeypatch) -> None:
    monkeypatch.setattr(emulated_cupy.cuda.runtime, "devices", 2)
    sizes = (1 << 9, 1 << 14)

    def main(comm):
        device = device_of(comm.rank, table)
        comm.use_device(device, "staged")
        return time_direct(comm, device, sizes, seconds=5.0)

    (found, remarks), _ = run_loopback(2, main, timeout_seconds=60)
    assert remarks == ["no cuda-aware here"]
    assert {(each.operation, each.group_size) for each in found["nccl"]} == {
        (name, 2) for name in (*OPERATIONS, "send")
    }
    assert all(each.sizes_bytes == list(sizes) and min(each.seconds) > 0 for each in found["nccl"])

    class Found:
        exchanges, direct = [], found
        copies = Copies((1 << 12, 1 << 20), (1e-5, 1e-4), (1e-5, 1e-4), 1e10)

    several = with_transports(machine, Found, "two emulated devices")
    assert (several.transport_in_use, set(several.transports)) == ("nccl", {"staged"})
    assert several.staging is None
    assert several.over("staged").staging is not None


def test_the_efforts_differ_in_size_only() -> None:
    whole = Effort()
    assert all(probe in whole.probes for probe in QUICK.probes)
    assert [name for name, _ in QUICK.shares] == [name for name, _ in whole.shares]
    assert sum(seconds for _, seconds in whole.shares) + 2 * whole.exchange_seconds <= 80
    assert sum(seconds for _, seconds in QUICK.shares) + 2 * QUICK.exchange_seconds <= 25
    first = whole.probes[:ESSENTIAL]
    assert {probe.attention for probe in first} == {"plain", "blocked"}
    assert any(probe.clip_norm for probe in first)
    assert any(probe.sizes.get("gated_ffn") for probe in first)
    for probe in whole.probes:
        assert probe.plan().mesh.world_size == 1


# ---- commands --------------------------------------------------------------------------------------------------------


def emulated_environment(tmp_path) -> dict[str, str]:
    paths = [str(ROOT / "tests/emulated_gpu"), str(ROOT / "tests")]
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("OPENBLAS_", "PYTHONPATH"))}
    return kept | {"PYTHONPATH": os.pathsep.join(paths), "XDG_CACHE_HOME": str(tmp_path)}


@pytest.mark.mpi
def test_planner_profile_on_cuda_writes_a_profile_beside_that_of_the_cores(tmp_path) -> None:
    planner = Path(sys.executable).with_name("planner")
    command = [str(planner), "profile", "--device", "cuda", "--quick", "--workers", "1", "--json"]
    done = subprocess.run(
        command, env=emulated_environment(tmp_path), capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "measuring this machine's GPUs with 1 ranks: at most 30 s" in done.stderr
    written = tmp_path / "meshwright/machine-cuda.toml"
    assert json.loads(done.stdout)["name"] == load_machine(written).name == "emulated-device-measured"
    assert not (tmp_path / "meshwright/machine.toml").exists()


def test_planner_profile_knows_its_devices(capsys) -> None:
    assert run(["profile", "--device", "tpu"]) == 2
    assert "--device tpu is not known; use one of cpu, cuda" in capsys.readouterr().err


@pytest.mark.mpi
def test_profiling_a_device_that_is_not_here_is_one_message(tmp_path) -> None:
    executor_ = Path(sys.executable).with_name("executor")
    environment = emulated_environment(tmp_path) | {"PYTHONPATH": ""}
    if subprocess.run([sys.executable, "-c", "import cupy"], capture_output=True, check=False).returncode == 0:
        pytest.skip("CuPy is here")
    command = [str(executor_), "profile", "--device", "cuda", "-o", str(tmp_path / "machine.toml")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "error: device cuda is not available: CuPy (meshwright's gpu extra) is not installed" in done.stderr


@pytest.mark.mpi
def test_make_gpu_runs_every_stage_and_says_what_was_not_reached(tmp_path) -> None:
    command = [sys.executable, str(ROOT / "tests/gpu.py"), "--out", str(tmp_path / "out"), "--scale", "tiny"]
    command += ["--wheels", str(tmp_path / "none")]
    done = subprocess.run(
        command, env=emulated_environment(tmp_path), capture_output=True, text=True, timeout=115, check=False
    )
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert not results["failures"], done.stdout + done.stderr
    assert set(results["stage_seconds"]) == {"kernels", "check", "profile", "measured", "torch", "staged"}
    rows = {row["what"]: row for row in results["rows"]}
    assert rows["check float32: largest gradient difference"]["met"]
    assert rows["check: plans that failed in any precision"]["met"]
    assert {one["name"] for one in results["check"]} >= {"one rank float32", "tp=2 float32", "pp=4 zb-1p float32"}
    assert len(results["measured"]) == 2
    assert all(one["pool_bytes"] >= one["arena_bytes"] == one["predicted_arena_bytes"] for one in results["measured"])
    assert results["staged"][0]["step_seconds"] > 0
    assert results["torch"]["bfloat16"]["seconds"]["ours"]
    if "eager" not in results["torch"]["bfloat16"]["seconds"]:
        assert rows["bfloat16 step over PyTorch eager"]["note"] == "not measured"
        assert done.returncode == 1  # a goal that nothing was measured for is not met


def test_ranks_load_the_mpi_that_was_carried(tmp_path, monkeypatch) -> None:
    """Whichever MPI the machine's own Python has: mpirun and library must be one."""
    carried = tmp_path / "wheels"
    carried.mkdir()
    with zipfile.ZipFile(carried / "mpich-5-py3-none-any.whl", "w") as wheel:
        for name in ("bin/mpirun", "lib/libmpi.so.12"):
            wheel.writestr(f"mpich-5.data/data/{name}", "")
    monkeypatch.setattr(sys, "path", list(sys.path))
    for wheels, chosen in ((carried, True), (tmp_path / "none", False)):
        work = tmp_path / str(chosen)
        environment = prepare(wheels, work)
        data = work / "site/mpich-5.data/data"
        assert (environment.get("MPI4PY_LIBMPI") == str(data / "lib/libmpi.so.12")) == chosen
        assert (shutil.which("mpirun", path=environment["PATH"]) == str(data / "bin/mpirun")) == chosen


def test_make_gpu_without_a_gpu_is_one_line_and_status_2(tmp_path) -> None:
    if subprocess.run([sys.executable, "-c", "import cupy"], capture_output=True, check=False).returncode == 0:
        pytest.skip("CuPy is here")
    command = [sys.executable, str(ROOT / "tests/gpu.py"), "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("make gpu: device cuda is not available: ")
    assert len(done.stderr.splitlines()) == 1
