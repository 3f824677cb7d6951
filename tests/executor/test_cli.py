"""The executor's command line under real MPI: what it writes, what it prints, how it ends."""

import json
import time
from itertools import pairwise

import msgspec
import pytest
from equivalence_plans import model, plan

from planner.plan import dump_plan
from planner.trace import COLLECTIVE_AXES, load_measurement

pytestmark = pytest.mark.mpi
PROGRAM = "mpi_program_cli.py"
# Where what is tested is ours and not the library's: how jobs end and what arrives is tested with both in test_comm,
# messages and forward-only plans in test_equivalence_mpi.
one_library = pytest.mark.parametrize("launch", ["installed"], indirect=True)
BYTES = {"vocab": 260, "layers": 2}


@pytest.fixture
def plan_file(tmp_path):
    """A plan for two ranks that reads bytes."""
    path = tmp_path / "plan.json"
    training = {"precision": "float32", "clip_norm": 1.0}
    dump_plan(plan(model("gpt", **BYTES), tp=2, batch=4, training=training), path)
    return path


def test_run_writes_a_measurement_and_only_the_first_rank_loads_rich(launch, plan_file, tmp_path, monkeypatch):
    monkeypatch.setenv("FAULT", "rich")
    output = tmp_path / "measured.json"
    done = launch(2, PROGRAM, "run", plan_file, "--steps", 5, "--warmup", 2, "-o", output, "--json")
    assert done.returncode != 7, "a rank that prints nothing has loaded rich"
    assert done.returncode == 0, done.stderr
    measured = load_measurement(output)
    assert len(measured.steps) == 5 and len(measured.losses) == 7 and len(measured.gradient_norms) == 7
    assert measured.step_seconds == sorted(measured.steps)[2]
    assert measured.plan_hash == measured.plan.hash
    assert measured.tokens_per_second == pytest.approx(4 * 12 / measured.step_seconds)
    assert 0 < measured.mfu < 1
    assert measured.losses[0] == pytest.approx(5.56, abs=0.1)
    # Memory: parts add up, and the process is larger than what it counts.
    for rank in range(2):
        assert sum(part[rank] for part in measured.peak_parts.values()) == measured.peak_bytes[rank]
        assert measured.resident_bytes[rank] > measured.peak_bytes[rank] > 0
    # The trace: inside the step, both ranks, in order on each compute stream.
    spans = measured.spans()
    assert {span.rank for span in spans} == {0, 1}
    longest = max(measured.steps)
    for rank in range(2):
        own = [span for span in spans if span.rank == rank and span.stream == "compute"]
        assert all(0 <= span.start <= span.end <= 1.05 * longest + 1e-3 for span in own)
        assert all(a.end <= b.start + 1e-9 for a, b in pairwise(own))
    # Keys: operators by stage, collectives by axis, with the bytes of the tp all-reduces.
    keys = measured.operators
    assert keys["0.layer.qkv.forward"].count == 2 * 2  # layers · micro-batches
    assert keys["0.layer.qkv.forward"].bytes == 0
    reduced = keys["tp.all_reduce.layer.attention_out.forward"]
    assert reduced.bytes == 2 * (12 * 4 * 16 * 4)  # layers · tokens · hidden · float32
    assert all(key.partition(".")[0] in (*COLLECTIVE_AXES, "0", "update") for key in keys)
    assert measured.payload_bytes["tp.all_reduce"] >= reduced.bytes
    assert measured.environment["ranks"] == 2 and measured.environment["kernels"] in ("fused", "reference")
    # stdout is one JSON document; the loss goes to stderr.
    printed = json.loads(done.stdout)
    assert printed["step_seconds"] == measured.step_seconds and "trace" not in printed
    assert f"loss {measured.losses[-1]:.4f}" in done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"plan.json", "measured.json"}


@one_library
def test_evaluation_of_a_forward_only_plan(launch, tmp_path):
    dump_plan(plan(model("bert", **BYTES), pp=2, batch=4, forward_only=True), tmp_path / "plan.json")
    done = launch(2, PROGRAM, "run", tmp_path / "plan.json", "--steps", 2, "-o", tmp_path / "measured.json")
    assert done.returncode == 0, done.stderr
    measured = load_measurement(tmp_path / "measured.json")
    assert not any("backward" in key or "adamw" in key for key in measured.operators)
    assert measured.peak_parts["gradients"] == [0, 0]
    assert measured.operators["pp.receive.layer.out.forward"].seconds, "waiting for the first stage is recorded"


@one_library
def test_paranoid_run_with_synchronous_sends(launch, tmp_path):
    dump_plan(plan(model("gpt", **BYTES), pp=2, dp=2, batch=6), tmp_path / "plan.json")
    options = ("--paranoid", "--synchronous-sends", "--data", "synthetic", "--steps", 2, "--warmup", 0)
    done = launch(4, PROGRAM, "run", tmp_path / "plan.json", *options, "-o", tmp_path / "measured.json")
    assert done.returncode == 0, done.stderr
    assert load_measurement(tmp_path / "measured.json").environment["data"] == "synthetic"


def test_check_passes_and_prints_one_line(launch, plan_file):
    done = launch(2, PROGRAM, "check", plan_file)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("passed: largest relative difference") and done.stdout.count("\n") == 1


@one_library
def test_check_in_float64_as_one_document(launch, plan_file):
    report = json.loads(launch(2, PROGRAM, "check", plan_file, "--dtype", "float64", "--json").stdout)
    assert report["passed"] and report["limit"] == 1e-12 and report["largest"]["difference"] < 1e-12


@one_library
def test_check_fails_where_one_rank_computes_wrongly(launch, plan_file, monkeypatch):
    monkeypatch.setenv("FAULT", "wrong")
    done = launch(2, PROGRAM, "check", plan_file)
    assert done.returncode == 1, (done.returncode, done.stderr)
    assert done.stdout.startswith("FAILED") and "gradient of " in done.stdout


def test_help_and_version_are_said_once(launch):
    for arguments, expected in ((["--help"], "Usage:"), (["run", "--help"], "Example: mpirun"), (["--version"], "0.")):
        done = launch(2, PROGRAM, *arguments)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count(expected) == 1


# ---- bad input -------------------------------------------------------------------------------------------------------


def edited(path, **changes):
    """The plan file with fields changed."""
    content = msgspec.json.decode(path.read_bytes())
    path.write_bytes(msgspec.json.encode(content | changes))


def truncate(path):
    """Half a file."""
    path.write_bytes(path.read_bytes()[:300])


# One of each road: every way in which a plan file can be bad is in tests/planner/test_plan.py.
BAD_INPUT = {
    "truncated plan": (truncate, [], "not a whole JSON plan"),
    "impossible layout": (lambda path: edited(path, zero_stage=2), [], "zero=2"),
    "precision": (
        lambda path: edited(path, training={"precision": "fp8"}), [], "precision fp8 is for predictions only",
    ),
    "missing data": (lambda path: None, ["--data", "no/such/text"], "cannot read data file no/such/text"),
    "missing folder": (lambda path: None, ["-o", "no/such/folder/out.json"], "cannot write no/such/folder/out.json"),
    "cuda": (lambda path: None, ["--device", "cuda"], "use --device cpu"),
    "no steps": (lambda path: None, ["--steps", "0"], "--steps"),
}  # fmt: skip


# What the file is refused for does not depend on the MPI library; how the job ends does, before and after connecting.
CASES = [("installed", case) for case in BAD_INPUT] + [("openmpi", case) for case in ("precision", "no steps")]


@pytest.mark.parametrize(("launch", "case"), CASES, indirect=["launch"])
def test_bad_input_is_one_message_and_exit_2(launch, plan_file, tmp_path, case):
    spoil, arguments, expected = BAD_INPUT[case]
    spoil(plan_file)
    start = time.monotonic()
    done = launch(2, PROGRAM, "run", plan_file, "-o", tmp_path / "measured.json", *arguments)
    assert time.monotonic() - start < 10, "ranks hung: the job itself has to end within 5 s of the error"
    assert done.returncode == 2, (done.returncode, done.stderr)
    assert done.stderr.count(expected) == 1, done.stderr
    assert "Traceback" not in done.stderr and done.stdout == ""
    assert not list(tmp_path.glob("*measured*"))


@one_library
def test_wrong_number_of_ranks(launch, plan_file):
    done = launch(3, PROGRAM, "run", plan_file)
    assert done.returncode == 2
    message = "the plan is for 2 ranks (pp=1, dp=1, cp=1, tp=2) and 3 started; use mpirun -n 2"
    assert done.stderr.count(message) == 1, done.stderr


def test_a_rank_that_raises_ends_the_job(launch, plan_file, tmp_path, monkeypatch):
    monkeypatch.setenv("FAULT", "raise")
    start = time.monotonic()
    done = launch(2, PROGRAM, "run", plan_file, "--steps", 10000, "-o", tmp_path / "measured.json")
    assert time.monotonic() - start < 12, "the start takes seconds, the end after the error at most five"
    assert done.returncode not in (0, 2)
    assert "rank 1 of 2" in done.stderr and "RuntimeError: planted in a kernel" in done.stderr
    assert "rank 0 of 2" not in done.stderr
    assert not list(tmp_path.glob("*measured*"))
