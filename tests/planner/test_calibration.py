"""Calibration: figures of a known machine are recovered from its runs; what disturbs a run is not believed."""

import json
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from records import dumped, measurement_of
from small_plans import plan

from planner.calibrate import calibrate, weighted_median
from planner.cli import frame
from planner.cost.figures import Figure, figure_text, scaled
from planner.errors import MachineError
from planner.machine import GemmSample, MeasuredCollective, MeasuredRegime, load_machine
from planner.model import with_sizes
from planner.predict import predict

TODAY = "2026-01-31"
GENERIC = load_machine("cpu-generic")
MODEL = with_sizes(layers=6, hidden=256, heads=4, seq_len=64)
DP = plan(MODEL, dp=2, batch=8, micro=2)


def test_the_figures_of_a_slower_machine_are_recovered_from_its_run():
    truth = scaled(GENERIC, Figure("curve", ("default",)), 2.5)
    truth = scaled(truth, Figure("kernel", ("residual_norm",)), 3.0)
    truth = scaled(truth, Figure("link", ("link_in_host",)), 4.0)
    run = measurement_of(DP, truth)
    found = calibrate(GENERIC, [run], TODAY)
    by_figure = {change.figure: change for change in found.changes}
    assert by_figure["device.gemm.default.fraction"].ratio == pytest.approx(2.5, rel=0.02)
    assert found.machine.device.gemm["default"].fraction == pytest.approx(
        truth.device.gemm["default"].fraction, rel=0.05
    )
    assert by_figure["device.kernels.residual_norm"].ratio == pytest.approx(3.0, rel=0.02)
    assert by_figure["link_in_host"].ratio == pytest.approx(4.0, rel=0.02)
    (error,) = found.runs
    assert abs(error.before_seconds / run.step_seconds - 1) > 0.3
    assert error.after_seconds == pytest.approx(run.step_seconds, rel=0.03)
    assert error.after_operator_mape < 0.25 * error.before_operator_mape


def test_what_one_run_taught_serves_another_plan():
    truth = scaled(GENERIC, Figure("curve", ("default",)), 2.0)
    found = calibrate(GENERIC, [measurement_of(DP, truth)], TODAY)
    other = plan(MODEL, tp=2, batch=4, micro=4)
    expected = predict(other, truth).step_seconds
    before, after = predict(other, GENERIC).step_seconds, predict(other, found.machine).step_seconds
    assert abs(after / expected - 1) < 0.05 < abs(before / expected - 1)


def test_a_run_that_is_as_predicted_changes_nothing():
    found = calibrate(GENERIC, [measurement_of(DP, GENERIC)], TODAY)
    assert all(change.applied == pytest.approx(1.0, abs=1e-6) for change in found.changes if change.calls > 1)
    assert found.runs[0].after_seconds == pytest.approx(found.runs[0].before_seconds, rel=0.01)


def test_an_interrupted_call_is_not_believed():
    def interrupted(trace):
        longest = max(
            (row for row in trace if "ffn_in.forward" in row[2] and row[5] == "work"), key=lambda row: row[4] - row[3]
        )
        return [(*row[:4], row[4] + 1.0, row[5]) if row is longest else row for row in trace]

    run = measurement_of(DP, GENERIC, interrupted)
    assert sum(row[4] - row[3] for row in run.trace) > 1.0
    found = calibrate(GENERIC, [run], TODAY)
    (change,) = (each for each in found.changes if each.figure == "device.gemm.default.fraction")
    assert change.ratio == pytest.approx(1.0, abs=1e-6)


def test_a_figure_moves_as_far_as_its_calls_carry():
    truth = scaled(GENERIC, Figure("kernel", ("loss",)), 8.0)
    small = plan(with_sizes(layers=1, hidden=64, heads=4, seq_len=32), batch=64, micro=64)
    found = calibrate(GENERIC, [measurement_of(small, truth)], TODAY)
    loss = [change for change in found.changes if change.figure == "device.kernels.loss"]
    for change in loss:
        assert change.ratio == pytest.approx(8.0, rel=0.05)
        assert change.applied == pytest.approx(change.ratio ** (change.calls / (change.calls + 2)), rel=1e-6)
    assert loss


def _measured_machine():
    """A profile as `planner profile` writes them, small."""
    samples = tuple(
        GemmSample(form=form, m=m, n=n, k=k, seconds=2e-9 * m * n * k / 100)
        for form in ("forward", "backward_input", "backward_weight")
        for m, n, k in ((256, 256, 256), (128, 1024, 256), (64, 64, 64))
    )
    table = MeasuredCollective(
        operation="all_reduce",
        group_size=2,
        algorithm="native",
        regimes=(MeasuredRegime(latency_seconds=5e-6, seconds_per_byte=1e-10),),
    )
    device = msgspec.structs.replace(GENERIC.device, gemm_samples=samples)
    link = msgspec.structs.replace(GENERIC.link_in_host, measured=(table,))
    return msgspec.structs.replace(GENERIC, device=device, link_in_host=link)


def test_measured_profiles_gain_samples_and_their_tables_move():
    machine = _measured_machine()
    truth = scaled(machine, Figure("table", ("link_in_host", "all_reduce", 2, "native")), 3.0)
    found = calibrate(machine, [measurement_of(DP, truth)], TODAY)
    regime = found.machine.link_in_host.measured[0].regimes[0]
    trust = 8 / 10  # eight gradient reductions: six layers, embedding, head
    assert regime.seconds_per_byte == pytest.approx(1e-10 * 3**trust, rel=0.01)
    assert regime.latency_seconds == pytest.approx(5e-6 * 3**trust, rel=0.01)
    assert len(found.machine.device.gemm_samples) > len(machine.device.gemm_samples)
    shapes = {(s.form, s.m, s.n, s.k) for s in found.machine.device.gemm_samples}
    assert ("forward", 2 * 64, 4 * 256, 256) in shapes  # rows of a micro-batch, feed-forward width, hidden
    assert len(shapes) == len(found.machine.device.gemm_samples)


def test_provenance_names_date_and_run_and_is_not_repeated():
    run = measurement_of(DP, GENERIC)
    once = calibrate(GENERIC, [run], TODAY).machine
    twice = calibrate(once, [run], "2026-02-01").machine
    assert once.device.provenance.endswith(f"; calibrated {TODAY} on 1 run(s) ({DP.hash})")
    assert twice.device.provenance.count("calibrated") == 1
    assert "2026-02-01" in twice.device.provenance
    assert twice.device.provenance.startswith(GENERIC.device.provenance)


def test_a_run_without_priced_operators_is_refused():
    run = measurement_of(DP, GENERIC, lambda trace: [])
    with pytest.raises(MachineError, match="hold no operator"):
        calibrate(GENERIC, [run], TODAY)


@pytest.mark.parametrize(
    ("values", "weights", "median"),
    [([1, 2, 3], [1, 1, 1], 2), ([1, 2, 300], [1, 1, 1], 2), ([1, 4], [1, 1], 2), ([1, 2], [3, 1], 1), ([7], [1], 7)],
)
def test_weighted_median(values, weights, median):
    assert weighted_median(values, weights) == pytest.approx(median)


def test_figures_have_dotted_paths():
    assert figure_text(Figure("kernel", ("norm",))) == "device.kernels.norm"
    assert figure_text(Figure("product", ("forward", 1, 2, 3))) == "device.gemm_samples.forward.1x2x3"
    assert (
        figure_text(Figure("table", ("link_in_host", "all_reduce", 2, "ring")))
        == "link_in_host.measured.all_reduce.2.ring"
    )
    assert GENERIC.figure(figure_text(Figure("curve", ("default",)))) == GENERIC.device.gemm["default"].fraction


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("norm", "0.embedding.norm.forward"),
        ("loss", "0.head.loss.forward"),
        ("activation_backward", "0.layer.activation.backward"),
    ],
)
def test_scaling_a_kernel_scales_its_seconds(name, key):
    one = plan(MODEL, batch=2, micro=2)
    slower = scaled(GENERIC, Figure("kernel", (name,)), 3.0)
    before, after = (predict(one, machine).operators[key].seconds[0] for machine in (GENERIC, slower))
    assert after == pytest.approx(3 * before, rel=1e-6)


def test_kernels_faster_than_the_profile_says_are_found_too():
    truth = scaled(GENERIC, Figure("kernel", ("residual_norm",)), 0.25)
    run = measurement_of(DP, truth)
    found = calibrate(GENERIC, [run], TODAY)
    key = "0.layer.ffn_residual.forward"
    expected = run.operators[key].seconds[0]
    before = predict(DP, GENERIC).operators[key].seconds[0]
    assert before > 1.5 * expected
    assert predict(DP, found.machine).operators[key].seconds[0] == pytest.approx(expected, rel=0.15)


# ---- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


def test_the_command_writes_a_profile_that_loads(folder, capsys):
    dumped(measurement_of(DP, scaled(GENERIC, Figure("curve", ("default",)), 2.0)), folder / "measured.json")
    assert frame.run(["calibrate", "measured.json", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["file"] == "cpu-generic-calibrated.toml"
    assert document["runs"][0]["after_seconds"] == pytest.approx(document["runs"][0]["measured_seconds"], rel=0.05)
    refined = load_machine(folder / "cpu-generic-calibrated.toml")
    assert refined.device.gemm["default"].fraction < 0.6 * GENERIC.device.gemm["default"].fraction
    # Again, on the profile that it wrote: the file itself is refined.
    assert frame.run(["calibrate", "measured.json", "--machine", "cpu-generic-calibrated.toml"]) == 0
    assert "cpu-generic-calibrated.toml" in capsys.readouterr().out


def test_the_command_refuses_a_prediction(folder, capsys):
    dumped(predict(DP, GENERIC), folder / "predicted.json")
    assert frame.run(["calibrate", "predicted.json"]) == 2
    assert "is a prediction" in capsys.readouterr().err


@pytest.mark.mpi
def test_a_real_run_calibrates(folder):
    arguments = ["plan", "--layers", "1", "--hidden", "64", "--heads", "4", "--seq-len", "32", "--dp", "2"]
    for command in (
        [*arguments, "-o", "plan.json"],
        ["run", "plan.json", "--steps", "3", "--warmup", "1"],
        ["calibrate", "measured.json", "-o", "mine.toml"],
    ):
        done = subprocess.run([sys.executable, "-m", "planner", *command], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    assert Path("mine.toml").is_file()
    run = json.loads(Path("measured.json").read_text(encoding="utf-8"))
    assert run["plan_hash"] in load_machine("mine.toml").device.provenance
