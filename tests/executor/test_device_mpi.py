"""The command line with `--device cuda` under real MPI: ranks share an emulated GPU, staged; and what it refuses."""

import json
import os
import sys

import pytest
from device_runs import on
from equivalence_plans import model, plan

from planner.plan import dump_plan
from planner.trace import load_measurement

FLOAT32 = {"precision": "float32", "clip_norm": 1.0}
PLANS = {
    "tensor": plan(model("gpt", vocab=260), tp=2, sequence_parallel=True, training=FLOAT32),
    "pipeline": plan(model("gpt", vocab=260), pp=2, batch=8, training=FLOAT32),
}
PROGRAM = "mpi_program_device.py"


@pytest.fixture
def installed(launch):
    """One MPI library will do where what is tested is ours."""
    if launch.python != sys.executable:
        pytest.skip("tested with the installed MPI")
    return launch


def written(tmp_path, name, transport):
    path = tmp_path / "plan.json"
    dump_plan(on(transport, PLANS[name]), path)
    return path


@pytest.mark.parametrize(
    ("launch", "name"),
    [("installed", "tensor"), ("installed", "pipeline"), ("openmpi", "pipeline")],
    indirect=["launch"],
)
def test_check_on_ranks_that_share_a_gpu(launch, tmp_path, name):
    done = launch(2, PROGRAM, "check", written(tmp_path, name, "staged"), "--device", "cuda", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["passed"] and report["limit"] == 1e-5
    assert report["largest"]["difference"] > 1e-9, "float32 of another kernel table"


def test_run_writes_a_measurement_of_the_device(installed, tmp_path):
    path = written(tmp_path, "pipeline", "staged")
    output = tmp_path / "measured.json"
    done = installed(2, PROGRAM, "run", path, "--device", "cuda", "--steps", "2", "--warmup", "1", "-o", output)
    assert done.returncode == 0, done.stderr
    measured = load_measurement(output)
    assert measured.machine.name == "emulated device, CUDA 13.0"
    assert measured.environment["transport"] == "staged" and measured.environment["kernels"] == "cuda"
    pools = measured.environment["device_pool_bytes"]
    assert all(pool >= peak for pool, peak in zip(pools, measured.peak_bytes, strict=True))
    spans = measured.spans()
    assert {span.rank for span in spans} == {0, 1} and {span.stream for span in spans} == {"compute", "pp"}
    assert all(-1e-3 <= span.start <= span.end <= 1.5 * max(measured.steps) for span in spans)
    host = installed(2, PROGRAM, "run", path, "--steps", "2", "--warmup", "1", "-o", tmp_path / "host.json")
    assert host.returncode == 0, host.stderr
    assert measured.losses == pytest.approx(load_measurement(tmp_path / "host.json").losses, rel=1e-5)


REFUSED = {
    "nccl": ("nccl", {}, "ranks 0, 1 share one (2 ranks on 1 GPUs)"),
    "memory": ("staged", {"FAULT": "memory"}, "out of device memory: "),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_one_message_exit_2_and_the_end_of_all_ranks(installed, tmp_path, monkeypatch, case):
    transport, environment, message = REFUSED[case]
    for name, value in environment.items():
        monkeypatch.setitem(os.environ, name, value)
    path = written(tmp_path, "pipeline", transport)
    done = installed(2, PROGRAM, "run", path, "--device", "cuda", "-o", tmp_path / "m.json", timeout_seconds=30)
    assert done.returncode == 2, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and message in errors[0], done.stderr
